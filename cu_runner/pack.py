"""A finished run as one file: configuration, metrics, predictions, grids, weights, and the sha256 of each of them."""

import hashlib
import json
import zipfile
from pathlib import Path

from cu_runner.runs import RunRecord
from cu_runner.store import STEP, StoreError, sha256_of, to_json

MANIFEST = "manifest.json"
TEXTS = ("config.yaml", "metrics.csv", "summary.json")


def pack(run: RunRecord, target: Path) -> None:
    """Write a zip archive that holds `<sequence>/<run>/...`, so that unpacked into outputs/runs it is the run again.

    What is only of use where the run was made is left out: its log, its lock, what cu-eval measured.

    Raises:
        StoreError: the run is not finished, or a file is not the one that its step names.
    """
    if not run.complete:
        done = len(run.records) - 1
        raise StoreError(f"{run.directory}: {done} of {run.num_requests} requests are done; finish the run before it is packed")
    files = {name: run.directory / name for name in TEXTS}
    hashes: dict[str, str] = {}
    for index, record in enumerate(run.records):
        place = run.step_dir(index)
        files[f"steps/{place.name}/{STEP}"] = place / STEP
        for name, expected in record["files"].items():
            files[f"steps/{place.name}/{name}"] = place / name
            hashes[f"steps/{place.name}/{name}"] = expected
    root = f"{run.sequence}/{run.directory.name}"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.tmp")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, path in files.items():
                found = sha256_of(path) if path.is_file() else None
                if found is None or hashes.get(name, found) != found:
                    raise StoreError(f"{path}: is missing or damaged; `cu-doctor {run.directory}` says what else is")
                hashes[name] = found
                archive.write(path, f"{root}/{name}")
            archive.writestr(f"{root}/{MANIFEST}", to_json(hashes))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def unpack(source: Path, folder: Path) -> Path:
    """The run directory that a packed run becomes below a folder. Raises StoreError for another file or a damaged one."""
    try:
        with zipfile.ZipFile(source) as archive:
            manifests = [name for name in archive.namelist() if name.endswith(f"/{MANIFEST}")]
            if len(manifests) != 1 or (damaged := archive.testzip()) is not None:
                raise StoreError(f"{source}: {'is no packed run' if len(manifests) != 1 else f'{damaged} in it is damaged'}")
            hashes = json.loads(archive.read(manifests[0]))
            archive.extractall(folder)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as error:
        raise StoreError(f"{source}: cannot be read as a packed run ({error})") from None
    directory = (folder / manifests[0]).parent
    for name, expected in hashes.items():
        path = directory / name
        if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
            raise StoreError(f"{source}: {name} in it is missing or is not the one that was packed")
    (directory / MANIFEST).unlink()
    return directory
