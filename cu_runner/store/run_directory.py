"""The run directory: what is finished, what it was made from, and how to write it so that a kill at any moment loses nothing.

A step is finished when its step.json exists; that file is written last and names the sha256 of every other file of the step and of
the step before it. Every file is written beside its place, flushed to disk and renamed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from cu_runner.runtime import distributed
from cu_runner.runtime.code_identity import CodeIdentity, identify, spell_changes
from cu_runner.runtime.lazy import pd
from cu_runner.schema.errors import StoreError
from cu_runner.store.files import (
    has_intact_header,
    hash_json,
    sha256_of,
    to_csv,
    to_json,
    with_header,
    write_atomic,
)
from cu_runner.store.layout import STEP
from cu_runner.store.records import Step, chain, continues, is_intact, parse_record


def command_in(text: str) -> str | None:
    """Return the command that a config.yaml records below its sha256; None if it has none."""
    line = next(iter(text.split("\n")[1:2]), "")
    return line.removeprefix("# ") if line.startswith("# cu-") else None


class RunStore:
    """One run directory, locked by one run. Use as a context manager. Of several processes of a run, the first reads and writes."""

    def __init__(
        self,
        directory: Path,
        config: dict[str, object],
        signature_of: Callable[[dict[str, object]], str],
        *,
        command: str | None = None,
        code: CodeIdentity | None = None,
        allow_other_code: bool = False,
    ) -> None:
        """
        Args:
            directory: the run directory; created if missing.
            config: resolved configuration, kept in config.yaml.
            signature_of: hash of its scientific part; a directory whose config.yaml has another one is refused.
            command: what makes the run again, one line, for config.yaml; None if no command does.
            code: that makes the steps; None is that of the package alone.
            allow_other_code: go on with steps that other code made.
        """
        self.directory, self._config, self._signature_of = directory, config, signature_of
        self.signature, self._command = signature_of(config), command
        self._code, self._allow_other_code = code or identify(), allow_other_code
        self._lock = FileLock(directory / ".lock")
        self._goes_on = False  # whether finished steps are of other code

    def __enter__(self) -> RunStore:
        distributed.from_main(self._open)
        return self

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(
                timeout=0.5, poll_interval=0.05
            )  # cu-sweep looks at locks by taking one for an instant
        except Timeout:
            raise StoreError(
                f"{self.directory}: another process is writing this run; wait for it to end or stop it"
            ) from None
        try:
            self._check_config()
        except BaseException:
            self._lock.release()
            raise

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def _check_config(self) -> None:
        path = self.directory / "config.yaml"
        if not path.exists():
            comment = f"# {self._command}\n" if self._command else ""
            settings = yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True)
            write_atomic(path, with_header((comment + settings).encode()))
            return
        content = path.read_bytes()
        try:
            found = self._signature_of(yaml.safe_load(content.decode()))
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError):
            found = "unreadable"
        differs = (
            f"signature {found[:8]}, this run is {self.signature[:8]}"
            if found != self.signature
            else None
        )
        if differs or not has_intact_header(content):
            raise StoreError(
                f"{path}: was changed after the run began ({differs or 'its sha256 does not fit'}); "
                "restore it, or move the directory away to start anew"
            )

    # ------------------------------------------------------------------------------------------------------ reading
    def step_dir(self, index: int) -> Path:
        return self.directory / "steps" / f"{index:02d}"

    def finished(self) -> list[Step]:
        """The finished steps from 0 on, each checked against its hashes and its parent. Raises StoreError on any damage."""
        return distributed.from_main(self._read_finished)

    def _read_finished(self) -> list[Step]:
        steps: list[Step] = []
        present = sorted(
            int(path.parent.name)
            for path in (self.directory / "steps").glob(f"[0-9]*/{STEP}")
            if path.parent.name.isdigit()
        )
        for position, index in enumerate(present):
            if index != position:
                raise StoreError(
                    f"{self.step_dir(position)}: step {position} is missing but step {index} is there; {self._advice(position)}"
                )
            steps.append(self._check_step(index, steps[-1].sha256 if steps else None))
        if not self._allow_other_code:
            refuse_other_code(self.directory, self._code, [step.code for step in steps])
        self._goes_on = any(self._code.changes(step.code) for step in steps)
        return steps

    def _check_step(self, index: int, parent: str | None) -> Step:
        directory, advice = self.step_dir(index), self._advice(index)
        path = directory / STEP
        record = parse_record(path)
        if record is None:
            raise StoreError(f"{path}: cannot be read; {advice}")
        if record["signature"] != self.signature or record["index"] != index:
            raise StoreError(f"{path}: belongs to another run or step; {advice}")
        if not continues(record, parent):
            raise StoreError(
                f"{path}: names another parent than {f'step {index - 1}' if index else 'the base model'}; {advice}"
            )
        for name, expected in record["files"].items():
            file = directory / name
            if not file.is_file():
                raise StoreError(f"{file}: is missing; {advice}")
            if sha256_of(file) != expected:
                raise StoreError(
                    f"{file}: is damaged (its sha256 is not the one in {STEP}); {advice}"
                )
        if not is_intact(record):
            raise StoreError(f"{path}: does not match its own sha256; {advice}")
        return Step(
            index,
            directory,
            record["sha256"],
            record["row"],
            code_of(directory.parent.parent, record),
        )

    def _advice(self, index: int) -> str:
        return f"restore it, or delete {self.directory}/steps/{index:02d} and all later steps and run the same command again"

    # ------------------------------------------------------------------------------------------------------ writing
    def save_step(
        self,
        index: int,
        files: Mapping[str, bytes],
        record: Mapping[str, object],
        row: Mapping[str, object],
        parent: Step | None,
    ) -> Step:
        """Write a step and commit it.

        Args:
            index: 0 for the untouched model, n after request n.
            files: contents by file name.
            record: further entries of step.json (targets, seconds, versions, ...).
            row: this step's row of metrics.csv.
            parent: the step before, None for step 0.
        """

        def write() -> Step:
            directory = self.step_dir(index)
            if directory.exists():  # left by a process that was killed before its commit
                shutil.rmtree(directory)
            directory.mkdir(parents=True)
            for name, content in files.items():
                write_atomic(directory / name, content)
            hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            above = parent.sha256 if parent else record.get("model_sha256")
            own = chain(above, hashes)
            links = {
                "index": index,
                "signature": self.signature,
                "parent_sha256": above,
                "sha256": own,
                "files": hashes,
            }
            code = {"code": self._code.record()} | (
                {"allowed_other_code": True} if self._goes_on else {}
            )
            entries = {**links, **record, **code, "row": dict(row)}
            write_atomic(directory / STEP, to_json(entries | {"record_sha256": hash_json(entries)}))
            return Step(index, directory, own, dict(row), self._code.record())

        return distributed.from_main(write)

    def write_metrics(self, rows: list[dict[str, object]]) -> None:
        """metrics.csv, made anew from the rows of the finished steps."""
        distributed.from_main(
            lambda: write_atomic(self.directory / "metrics.csv", to_csv(pd.DataFrame(rows)))
        )

    def write_summary(self, steps: list[Step]) -> None:
        """summary.json, made anew: it says that the run is complete, and where it ended."""
        last = steps[-1]
        summary = {
            "signature": self.signature,
            "requests": len(steps) - 1,
            "sha256": last.sha256,
            "metrics": {
                name: last.row[name] for name in ("UA", "RA_I", "RA_C", "RA_C_retained", "drift_l2")
            },
            "seconds": round(
                sum(
                    float(step.row["train_seconds"]) + float(step.row["eval_seconds"])
                    for step in steps
                ),
                1,
            ),
        }
        distributed.from_main(
            lambda: write_atomic(self.directory / "summary.json", to_json(summary))
        )


def code_of(directory: Path, record: Mapping[str, object]) -> dict[str, object]:
    """The code that made a step of a run. Raises StoreError for a run of a version that did not record it."""
    if "code" not in record:
        version = record.get("versions", {}).get("cu_runner", "of unknown version")
        raise StoreError(
            f"{directory}: was made by cu_runner {version}, whose runs this one does not read; fresh=true makes it anew"
        )
    return record["code"]


def refuse_other_code(
    directory: Path, code: CodeIdentity, recorded: Iterable[Mapping[str, object]]
) -> None:
    """Raises StoreError with the names of the files that changed if other code made a step of a run."""
    if changed := sorted({name for record in recorded for name in code.changes(record)}):
        raise StoreError(
            f"{directory}: was made by other code (changed: {spell_changes(changed)}); fresh=true makes a new run beside it, "
            "allow_other_code=true goes on with this one"
        )
