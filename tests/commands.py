"""The commands as processes of their own: the installed scripts, and forks of one warm process.

A fork behaves as the script does: its own process, directory, environment, arguments and signals,
nothing on stdin, its output captured, its exit status. It costs a fork where the script costs
seconds of imports. `multiprocessing` keeps the process that is forked; the first command of a test
session starts it, it imports warm_imports and computes nothing: a fork of a process in which torch
has started threads would hang.
"""

import atexit
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

SCRIPTS = Path(sysconfig.get_path("scripts"))
ENTRIES = {
    "cu-run": "cu_runner.cli.run",
    "cu-report": "cu_runner.cli.report",
    "cu-table": "cu_runner.cli.table",
    "cu-eval": "cu_runner.cli.evaluate",
    "cu-export": "cu_runner.cli.export",
    "cu-doctor": "cu_runner.cli.doctor",
    "cu-sweep": "cu_runner.cli.sweep",
}
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["warm_imports"])


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"} | more


def patch(module: str, name: str, value: object) -> None:
    """Set an attribute of a module; with functools.partial, a `before` of Forked."""
    setattr(importlib.import_module(module), name, value)


# Code of a process that a test starts: used() is its own peak of memory in MB. That of
# resource.getrusage would begin with the peak of the process that started it.
USED = """
def used():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
"""


_STARTING = threading.Lock()


def start_warm_process() -> None:
    """Start the process that is forked, unless it runs.

    It is an interpreter of its own, and what it cannot import it passes over without a word: it
    must find warm_imports.
    """
    with _STARTING:  # studies start their runs from several threads
        before = os.environ.get("PYTHONPATH")
        paths = [str(Path(__file__).parent), *([before] if before else [])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        try:
            forkserver.ensure_running()
        finally:
            del os.environ["PYTHONPATH"]
            if before:
                os.environ["PYTHONPATH"] = before


def _become(
    name: str,
    arguments: list[str],
    cwd: Path,
    env: dict[str, str],
    output: Path,
    before: Callable[[], None] | None,
    main: Callable[[], None] | None,
) -> None:
    """Turn the fork that calls this into the command."""
    streams = (
        (os.devnull, os.O_RDONLY),
        (output / "stdout", os.O_WRONLY),
        (output / "stderr", os.O_WRONLY),
    )
    for descriptor, (path, flags) in enumerate(streams):
        opened = os.open(path, flags)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    own = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    others = [path for path in sys.path if path not in ("", str(Path(__file__).parent), *own)]
    sys.path[:] = [str(SCRIPTS), *own, *others]
    sys.argv = [str(SCRIPTS / name), *arguments]
    # a shell that starts pytest in the background makes its children ignore ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if media := sys.modules.get("wandb.sdk.data_types._private"):
        # the folder is the warm process's: no fork deletes it
        media.MEDIA_TMP._finalizer.detach()
        atexit.unregister(media.MEDIA_TMP.cleanup)
    if before:
        before()
    try:
        main() if main else importlib.import_module(ENTRIES[name]).main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        threading._shutdown()  # as at the end of an interpreter, in its order
        atexit._run_exitfuncs()


class Forked:
    """A command that runs in a fork; to be used as a subprocess.Popen is.

    Args:
        name: of the command, and its arguments.
        env: its whole environment; that of the tests where it is None.
        before: called in the fork before the command begins.
        main: what the fork runs; None is the command of that name.
    """

    def __init__(
        self,
        name: str,
        *arguments: object,
        cwd: Path,
        env: dict[str, str] | None = None,
        before: Callable[[], None] | None = None,
        main: Callable[[], None] | None = None,
    ) -> None:
        self.args = [name, *map(str, arguments)]
        self._output = tempfile.TemporaryDirectory(prefix="forked_")
        self._streams = [Path(self._output.name, stream) for stream in ("stdout", "stderr")]
        for stream in self._streams:
            stream.touch()
        place = (cwd, environment() if env is None else env, Path(self._output.name))
        self._process = _context.Process(
            target=_become, args=(name, self.args[1:], *place, before, main)
        )
        start_warm_process()
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; what it wrote on stdout and on stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        out, err = (stream.read_text(encoding="utf-8") for stream in self._streams)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run_forked(
    name: str, *arguments: object, timeout: float = 300, **options
) -> subprocess.CompletedProcess:
    """As subprocess.run with captured text, in a fork; the options are those of Forked."""
    process = Forked(name, *arguments, **options)
    try:
        out, err = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_script(
    name: str,
    *arguments: object,
    cwd: Path,
    env: dict[str, str] | None = None,
    timeout: float = 300,
) -> subprocess.CompletedProcess:
    """The installed script, in an interpreter of its own."""
    return subprocess.run(
        [str(SCRIPTS / name), *map(str, arguments)],
        cwd=cwd,
        env=environment() if env is None else env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def assert_one_line(result: tuple[int, str, str], status: int, fragments: list[str]) -> str:
    """Exit status, exactly one line, and every fragment in it."""
    found, out, err = result
    assert err.count("\n") == 1, err
    assert err.startswith("cu-run: ")
    assert "Traceback" not in out + err
    assert found == status, err
    for fragment in fragments:
        assert fragment in err
    return err
