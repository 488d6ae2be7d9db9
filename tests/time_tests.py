"""Which tests take long: a plugin of pytest that times them, and writes tests/long_tests.txt.

    make time-tests

Of a test its own seconds count, without what sessions and modules share. Whatever asks for a shared
fixture that takes long is long too: else its time would fall to another test.
"""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

LIST = Path(__file__).with_name("long_tests.txt")
LONG, LONG_FIXTURE = 1.0, 4.0  # seconds
EVERYWHERE = {"finished_run", "loaded_model"}  # made anyway, so many tests ask for it
HEAD = f"""\
# Tests of more than {LONG:g} s on two slow cores, and of shared fixtures of more than
# {LONG_FIXTURE:g} s: left out of `make test`, run by `make test-long`; by `make time-tests`.
"""


class Timer:
    """Times the tests of one process and what they share, and writes them down at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own: dict[str, float] = defaultdict(float)
        self.fixtures: dict[str, list[str]] = {}
        self.shared: dict[str, float] = defaultdict(float)
        self.waited = 0.0  # for what is shared, in the phase that runs

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef, request):
        before, started = self.waited, time.monotonic()
        found = yield
        if fixturedef.scope != "function":
            seconds = time.monotonic() - started - (self.waited - before)
            self.shared[fixturedef.argname] = max(seconds, self.shared[fixturedef.argname])
            self.waited += seconds
        return found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        self.own[item.nodeid] += report.duration - self.waited
        self.fixtures[item.nodeid] = list(item.fixturenames)
        self.waited = 0.0
        return report

    def pytest_sessionfinish(self, session):
        worker = getattr(session.config, "workerinput", {"workerid": "main"})["workerid"]
        found = {"own": self.own, "fixtures": self.fixtures, "shared": self.shared}
        (self.folder / f"{worker}.json").write_text(json.dumps(found), encoding="utf-8")


def register(config) -> None:
    """Times the tests of this process, if CU_TIMES names a folder for their seconds."""
    if folder := os.environ.get("CU_TIMES"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        config.pluginmanager.register(Timer(Path(folder).absolute()))


def long_tests(folder: Path) -> list[str]:
    """The tests that take long, by the files of every process."""
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    shared: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, seconds in part["shared"].items():
            shared[name] = max(seconds, shared[name])
    heavy = {name for name, seconds in shared.items() if seconds > LONG_FIXTURE} - EVERYWHERE
    return sorted(
        test
        for part in parts
        for test, seconds in part["own"].items()
        if seconds > LONG or heavy & set(part["fixtures"][test])
    )


def listed() -> set[str]:
    """The tests of the list."""
    lines = LIST.read_text(encoding="utf-8").splitlines()
    return {line for line in lines if line and not line.startswith("#")}


if __name__ == "__main__":
    found = long_tests(Path(sys.argv[1]))
    LIST.write_text(HEAD + "".join(f"{test}\n" for test in found), encoding="utf-8")
    print(f"{len(found)} tests take long: {LIST}")
