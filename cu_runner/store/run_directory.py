"""The run directory: what is finished, what it was made from; a kill at any moment loses nothing.

A step is finished when its step.json exists; that file is written last and names the sha256 of
every other file of the step and of the step before it. Every file is written beside its place,
flushed to disk and renamed.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import yaml
from filelock import FileLock

from cu_runner.runtime import distributed
from cu_runner.runtime.code_identity import CodeIdentity, identify, spell_changes
from cu_runner.schema.errors import StoreError
from cu_runner.schema.values import ConfigTree
from cu_runner.store.files import (
    has_intact_header,
    sha256_of,
    to_csv,
    to_json,
    with_header,
    write_atomic,
)
from cu_runner.store.layout import CONFIG, STEP, SUMMARY, TABLE, step_dir
from cu_runner.store.leftovers import clear, refuse_what_is_in_the_way, strangers
from cu_runner.store.locks import LOCK, acquire, holder_of, lock_directory, release
from cu_runner.store.proof import require_true
from cu_runner.store.records import COLUMNS, StepRecord, StepResult, as_table, chain, read_chain
from cu_runner.store.run_record import RunRecord

logger = logging.getLogger(__name__)


class RunStore:
    """One run directory, locked by one run. Use as a context manager.

    Of several processes of a run, the first reads and writes.
    """

    def __init__(
        self,
        directory: Path,
        config: ConfigTree,
        signature_of: Callable[[ConfigTree], str],
        *,
        command: str | None = None,
        code: CodeIdentity | None = None,
        allow_other_code: bool = False,
    ) -> None:
        """Take the directory, which is created on entering if it is missing.

        Args:
            directory: the run directory.
            config: resolved configuration, kept in config.yaml.
            signature_of: hash of its scientific part; a directory whose config.yaml has another one
                is refused.
            command: what makes the run again, one line, for config.yaml; None if no command does.
            code: that makes the steps; None is that of the package alone.
            allow_other_code: go on with steps that other code made.
        """
        self.directory, self._config, self._signature_of = directory, config, signature_of
        self.signature, self._command = signature_of(config), command
        self._code, self._allow_other_code = code or identify(), allow_other_code
        self._lock = FileLock(directory / LOCK)
        self._handle: int | None = None  # of the directory, whatever becomes of its name
        self._looked = False  # for what is no step
        self.goes_on = False  # whether what is gone on with is of other code

    def __enter__(self) -> RunStore:
        distributed.from_main(self._open)
        return self

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:  # cu-sweep looks at locks by taking one for an instant
            if not (lock_directory(self._handle, 0.5) and acquire(self._lock, 0.5)):
                raise StoreError(
                    f"{self.directory}: another process is writing this run: "
                    f"{holder_of(self.directory / LOCK)}; wait for it to end or stop it"
                )
            self._check_config()
        except BaseException:
            self._let_go()
            raise

    def __exit__(self, *exception: object) -> None:
        self._let_go()

    def _let_go(self) -> None:
        release(self._lock)
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def require_here(self) -> None:
        """Raise StoreError if the directory was moved, removed or replaced since it was entered."""
        if self._handle is None:  # of the first process alone
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(self.directory), os.fstat(self._handle)):
                return
        place = ""
        with contextlib.suppress(OSError):  # Linux tells
            now = os.readlink(f"/proc/self/fd/{self._handle}")
            place = f" (now {now})" if Path(now).is_dir() else ""
        raise StoreError(
            f"{self.directory}: was moved or removed while the run was working{place}; "
            "nothing more is written. Put it back and run the same command again"
        )

    def _check_config(self) -> None:
        path = self.directory / CONFIG
        if not path.exists():
            comment = f"# {self._command}\n" if self._command else ""
            settings = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True)
            write_atomic(path, with_header((comment + settings).encode()))
            return
        content = path.read_bytes()
        try:
            found = self._signature_of(yaml.safe_load(content.decode()))
        except (
            yaml.YAMLError,
            AttributeError,
            KeyError,
            TypeError,
            UnicodeDecodeError,
            RecursionError,
        ):
            found = "unreadable"
        differs = "its sha256 does not fit" if not has_intact_header(content) else ""
        if found != self.signature:
            differs = f"signature {found[:8]}, this run is {self.signature[:8]}"
        if differs:
            raise StoreError(
                f"{path}: was changed after the run began ({differs}); "
                "restore it, or move the directory away to start anew"
            )

    # ------------------------------------------------------------------------------------ reading
    def step_dir(self, index: int) -> Path:
        """Return the folder of a step, to be read or written. Raises StoreError if it is gone."""
        self.require_here()
        return step_dir(self.directory, index)

    def finished(self) -> list[StepRecord]:
        """Return the finished steps, each checked against its files and its parent.

        Raises:
            StoreError: any damage, or steps of other code that are not allowed.
        """
        return distributed.from_main(self._read_finished)

    def _read_finished(self) -> list[StepRecord]:
        steps: list[StepRecord] = []
        refuse_what_is_in_the_way(self.directory)
        for position, link in enumerate(read_chain(self.directory)):
            folder = self.step_dir(position)
            problem, record = link.problem, link.record
            if problem is None and record is not None and record.signature != self.signature:
                problem = "belongs to another run"
            if problem is not None or record is None:
                raise StoreError(f"{link.path}: {problem}; {advice(folder)}")
            for name, expected in record.files.items():
                if not (folder / name).is_file():
                    raise StoreError(f"{folder / name}: is missing; {advice(folder)}")
                if sha256_of(folder / name) != expected:
                    raise StoreError(
                        f"{folder / name}: is damaged (its sha256 is not the one in {STEP}); "
                        f"{advice(folder)}"
                    )
            steps.append(record)
        codes = [step.code for step in steps]
        if not self._allow_other_code:
            refuse_other_code(self.directory, self._code, codes)
        self.goes_on = any(self._code.changes(code) for code in codes)
        return steps

    def proven(self) -> list[StepRecord]:
        """Return the finished steps, each also held against what its files say.

        Raises:
            StoreError: as finished(), or metrics and drift are not those of the files.
        """
        steps = self.finished()
        if distributed.is_main() and not self._looked:
            for path in strangers(self.directory):
                logger.warning("%s: is no step and is left alone", path)
        self._looked = True
        if steps:
            run = RunRecord(self.directory, self._config, steps)
            distributed.from_main(lambda: require_true(run))
        return steps

    # ------------------------------------------------------------------------------------ writing
    def save_step(self, result: StepResult, parent: StepRecord | None) -> StepRecord:
        """Write a step and commit it. parent: the step before, None for step 0."""
        return distributed.from_main(lambda: self._write_step(result, parent))

    def _write_step(self, result: StepResult, parent: StepRecord | None) -> StepRecord:
        directory = self.step_dir(result.index)
        clear(directory)  # of what a process left that was killed before its commit
        directory.parent.mkdir(exist_ok=True)  # not what is above it: that is there or lost
        directory.mkdir()
        for name, content in result.files.items():
            write_atomic(directory / name, content)
        files = {
            name: hashlib.sha256(content).hexdigest() for name, content in result.files.items()
        }
        above = parent.sha256 if parent else result.model_sha256
        record = StepRecord(
            **vars(result) | {"files": files},
            signature=self.signature,
            parent_sha256=above,
            sha256=chain(above, files),
            code=self._code,
            allowed_other_code=self.goes_on,
        )
        write_atomic(directory / STEP, to_json(record.entries()))
        return record

    def write_metrics(self, steps: list[StepRecord]) -> None:
        """Make metrics.csv anew from the rows of the finished steps."""
        rows = [step.row for step in steps]
        self._write(TABLE, lambda: to_csv(as_table(rows)))

    def write_summary(self, steps: list[StepRecord]) -> None:
        """Make summary.json anew: it says that the run is complete, and where it ended."""
        row = steps[-1].row.flat()
        seconds = sum(step.row.train_seconds + step.row.eval_seconds for step in steps)
        summary = {
            "signature": self.signature,
            "requests": len(steps) - 1,
            "sha256": steps[-1].sha256,
            "metrics": {name: row[name] for name in (*COLUMNS, "drift_l2")},
            "seconds": round(seconds, 1),
        }
        self._write(SUMMARY, lambda: to_json(summary))

    def _write(self, name: str, content: Callable[[], bytes]) -> None:
        distributed.from_main(lambda: self._write_here(name, content()))

    def _write_here(self, name: str, content: bytes) -> None:
        self.require_here()
        write_atomic(self.directory / name, content)


def advice(folder: Path) -> str:
    """Say what to do about a damaged step, by its folder."""
    return f"restore it, or delete {folder} and all later steps and run the same command again"


def refuse_other_code(
    directory: Path, code: CodeIdentity, recorded: Iterable[CodeIdentity]
) -> None:
    """Raise StoreError with the names of the changed files if other code made a step of a run."""
    if changed := sorted({name for each in recorded for name in code.changes(each)}):
        raise StoreError(
            f"{directory}: was made by other code (changed: {spell_changes(changed)}); "
            "fresh=true makes a new run beside it, allow_other_code=true goes on with this one"
        )
