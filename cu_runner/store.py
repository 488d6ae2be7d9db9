"""The run directory: what is finished, what it was made from, and how to write it so that a kill at any moment loses nothing.

A step is finished when its step.json exists; that file is written last and names the sha256 of every other file of the step and of
the step before it. Every file is written beside its place, flushed to disk and renamed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import safetensors
import safetensors.torch
import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from cu_runner import parallel

DELTA, MERGED, TRAINING = "delta.safetensors", "merged.safetensors", "training.csv"
HEADER = b"# sha256 of the lines below: "
PREDICTIONS, METRICS, GRID, STEP = "predictions.csv", "metrics.json", "grid.png", "step.json"


class StoreError(RuntimeError):
    """The run directory cannot be used as it is; the message is one line with what to do."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash of the machine."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_header(content: bytes) -> bytes:
    """A text file behind a comment that holds its sha256."""
    return HEADER + hashlib.sha256(content).hexdigest().encode() + b"\n" + content


def has_intact_header(content: bytes) -> bool:
    """Whether the comment holds the sha256 of the rest; true of a file without one, as older versions wrote it."""
    header, _, rest = content.partition(b"\n")
    if not header.startswith(HEADER[:2]):
        return True
    return header == HEADER + hashlib.sha256(rest).hexdigest().encode()


def to_csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


def to_json(value: object) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_delta(path: Path, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load a delta and check that it fits the weights by name and shape. Raises StoreError."""
    try:
        delta = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise StoreError(f"{path}: cannot be read ({error})") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in delta.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in params.items()}
    if shapes != wanted:
        name = next(iter(sorted(set(shapes.items()) ^ set(wanted.items()))))[0]
        raise StoreError(
            f"{path}: holds other weights than this run trains (e.g. {name}); it belongs to another model or method.params"
        )
    return delta


def to_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    return safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a delta, without reading the others."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


@dataclass(frozen=True)
class Step:
    """A finished step: its number, directory, the sha256 that the next step must name, and its metrics row."""

    index: int
    directory: Path
    sha256: str
    row: dict[str, object]


class RunStore:
    """One run directory, locked by one run. Use as a context manager. Of several processes of a run, the first reads and writes."""

    def __init__(self, directory: Path, config: dict[str, object], signature_of: Callable[[dict[str, object]], str]) -> None:
        """
        Args:
            directory: the run directory; created if missing.
            config: resolved configuration, kept in config.yaml.
            signature_of: hash of its scientific part; a directory whose config.yaml has another one is refused.
        """
        self.directory, self._config, self._signature_of = directory, config, signature_of
        self.signature = signature_of(config)
        self._lock = FileLock(directory / ".lock")

    def __enter__(self) -> "RunStore":
        parallel.from_main(self._open)
        return self

    def _open(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0.5, poll_interval=0.05)  # cu-sweep looks at locks by taking one for an instant
        except Timeout:
            raise StoreError(f"{self.directory}: another process is writing this run; wait for it to end or stop it") from None
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
            write_atomic(path, with_header(yaml.safe_dump(self._config, sort_keys=False, allow_unicode=True).encode()))
            return
        content = path.read_bytes()
        try:
            found = self._signature_of(yaml.safe_load(content.decode()))
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError):
            found = "unreadable"
        differs = f"signature {found[:8]}, this run is {self.signature[:8]}" if found != self.signature else None
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
        return parallel.from_main(self._read_finished)

    def _read_finished(self) -> list[Step]:
        steps: list[Step] = []
        present = sorted(
            int(path.parent.name) for path in (self.directory / "steps").glob(f"[0-9]*/{STEP}") if path.parent.name.isdigit()
        )
        for position, index in enumerate(present):
            if index != position:
                raise StoreError(
                    f"{self.step_dir(position)}: step {position} is missing but step {index} is there; {self._advice(position)}"
                )
            steps.append(self._check_step(index, steps[-1].sha256 if steps else None))
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
            raise StoreError(f"{path}: names another parent than {f'step {index - 1}' if index else 'the base model'}; {advice}")
        for name, expected in record["files"].items():
            file = directory / name
            if not file.is_file():
                raise StoreError(f"{file}: is missing; {advice}")
            if sha256_of(file) != expected:
                raise StoreError(f"{file}: is damaged (its sha256 is not the one in {STEP}); {advice}")
        if not is_intact(record):
            raise StoreError(f"{path}: does not match its own sha256; {advice}")
        return Step(index, directory, record["sha256"], record["row"])

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
            links = {"index": index, "signature": self.signature, "parent_sha256": above, "sha256": own, "files": hashes}
            entries = {**links, **record, "row": dict(row)}
            write_atomic(directory / STEP, to_json(entries | {"record_sha256": hash_json(entries)}))
            return Step(index, directory, own, dict(row))

        return parallel.from_main(write)

    def write_metrics(self, rows: list[dict[str, object]]) -> None:
        """metrics.csv, made anew from the rows of the finished steps."""
        parallel.from_main(lambda: write_atomic(self.directory / "metrics.csv", to_csv(pd.DataFrame(rows))))

    def write_summary(self, steps: list[Step]) -> None:
        """summary.json, made anew: it says that the run is complete, and where it ended."""
        last = steps[-1]
        summary = {
            "signature": self.signature,
            "requests": len(steps) - 1,
            "sha256": last.sha256,
            "metrics": {name: last.row[name] for name in ("UA", "RA_I", "RA_C", "RA_C_retained", "drift_l2")},
            "seconds": round(sum(float(step.row["train_seconds"]) + float(step.row["eval_seconds"]) for step in steps), 1),
        }
        parallel.from_main(lambda: write_atomic(self.directory / "summary.json", to_json(summary)))


def read_record(directory: Path) -> dict[str, object]:
    """step.json of a step directory, checked against its own sha256. Raises StoreError; the files that it names are not read."""
    path = directory / STEP
    record = parse_record(path)
    if record is None:
        raise StoreError(f"{path}: cannot be read")
    if not is_intact(record):
        raise StoreError(f"{path}: does not match its own sha256")
    return record


def parse_record(path: Path) -> dict[str, object] | None:
    """A step.json as it stands; None if it is missing, no JSON or lacks an entry."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        dict(record["files"]), dict(record["row"])
        record["sha256"], record["parent_sha256"], record["signature"], record["index"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record


def is_intact(record: dict[str, object]) -> bool:
    """Whether a record is the one that was written: its own sha256 holds, and so does that of the step over its files."""
    entries = {key: value for key, value in record.items() if key != "record_sha256"}
    return record["sha256"] == chain(record["parent_sha256"], record["files"]) and record.get("record_sha256") == hash_json(entries)


def continues(record: Mapping[str, object], parent: str | None) -> bool:
    """Whether a record names its parent: the sha256 of the step before, and step 0 that of the base model."""
    if parent is None:  # older versions began with nothing
        return record["parent_sha256"] in (None, record.get("model_sha256"))
    return record["parent_sha256"] == parent


def chain(parent: str | None, files: Mapping[str, str]) -> str:
    """sha256 of a step: over its parent's and those of its files, so that it stands for all from the base model on."""
    return hash_json([parent, sorted(files.items())])


def hash_json(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Cache:
    """outputs/cache/<kind>/<sig8>/: things that many runs need, made once. A broken entry is made again."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def fetch(self, kind: str, key: Mapping[str, object]) -> dict[str, bytes] | None:
        """The files of an entry by name, or None if there is none or it is damaged."""
        return parallel.from_main(lambda: self._read(kind, key))

    def _read(self, kind: str, key: Mapping[str, object]) -> dict[str, bytes] | None:
        directory = self._directory(kind, key)
        try:
            index = json.loads((directory / "index.json").read_text(encoding="utf-8"))
            files = {name: (directory / name).read_bytes() for name in index["files"]}
            same = index["key"] == json.loads(json.dumps(key))
            whole = all(hashlib.sha256(content).hexdigest() == index["files"][name] for name, content in files.items())
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return files if same and whole else None

    def put(self, kind: str, key: Mapping[str, object], files: Mapping[str, bytes]) -> None:
        """Write an entry; its index is written last. Two runs may write the same entry, with the same contents."""
        parallel.from_main(lambda: self._write(kind, key, files))

    def _write(self, kind: str, key: Mapping[str, object], files: Mapping[str, bytes]) -> None:
        directory = self._directory(kind, key)
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / ".lock"):
            for name, content in files.items():
                write_atomic(directory / name, content)
            hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            write_atomic(directory / "index.json", to_json({"key": key, "files": hashes}))

    def _directory(self, kind: str, key: Mapping[str, object]) -> Path:
        return self.root / kind / hash_json(key)[:8]
