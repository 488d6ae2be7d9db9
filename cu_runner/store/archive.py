"""A finished run as one file: configuration, metrics, predictions, grids, weights, and hashes."""

from __future__ import annotations

import hashlib
import lzma
import zipfile
import zlib
from pathlib import Path

from cu_runner.schema.errors import StoreError, one_line
from cu_runner.schema.json_files import parse_json
from cu_runner.schema.validate import validate
from cu_runner.store.files import sha256_of, to_json
from cu_runner.store.layout import CONFIG, STEP, SUMMARY, TABLE
from cu_runner.store.run_record import RunRecord

MANIFEST = "manifest.json"
TEXTS = (CONFIG, TABLE, SUMMARY)

# What is packed is images, numbers and weights: they become little smaller.
LARGEST_RATIO = 100
# All that zipfile raises.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    ValueError,
    EOFError,
    OSError,
    RuntimeError,
)


def pack(run: RunRecord, target: Path) -> None:
    """Write a zip archive of `<sequence>/<run>/...`: unpacked into outputs/runs it is the run.

    What is only of use where it was made is left out: its log, its lock, what cu-eval measured.

    Raises:
        StoreError: the run is not finished, or a file is not the one that its step names.
    """
    if not run.complete:
        done = len(run.records) - 1
        raise StoreError(
            f"{run.directory}: {done} of {run.num_requests} requests are done; "
            "finish the run before it is packed"
        )
    files = {name: run.directory / name for name in TEXTS}
    hashes: dict[str, str] = {}
    for index, record in enumerate(run.records):
        place = run.step_dir(index)
        files[f"steps/{place.name}/{STEP}"] = place / STEP
        for name, expected in record.files.items():
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
                    raise StoreError(
                        f"{path}: is missing or damaged; "
                        f"`cu-doctor {run.directory}` says what else is"
                    )
                hashes[name] = found
                archive.write(path, f"{root}/{name}")
            archive.writestr(f"{root}/{MANIFEST}", to_json(hashes))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def unpack(source: Path, folder: Path) -> Path:
    """Unpack a run below a folder, and return the run directory.

    Every file is checked before it is written, and nothing is written outside the folder, whatever
    the archive says. Raises StoreError for another file or a damaged one.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            manifests = [name for name in archive.namelist() if name.endswith(f"/{MANIFEST}")]
            if len(manifests) != 1:
                raise StoreError(f"{source}: is no packed run")
            root = manifests[0].removesuffix(f"/{MANIFEST}")
            hashes = validate(dict[str, str], parse_json(archive.read(manifests[0])), MANIFEST)
            for name in (root, *hashes):
                if set(name.split("/")) & {"", ".", ".."} or "\\" in name or "\0" in name:
                    raise StoreError(f"{source}: {name!r} in it is no name of a packed file")
            size = sum(entry.file_size for entry in archive.infolist())
            if size > LARGEST_RATIO * source.stat().st_size:
                raise StoreError(
                    f"{source}: unpacks to {size / 1e6:.0f} MB, over {LARGEST_RATIO} times its "
                    "size; no packed run does"
                )
            for name, expected in hashes.items():
                there = f"{root}/{name}" in archive.namelist()
                content = archive.read(f"{root}/{name}") if there else b""
                if hashlib.sha256(content).hexdigest() != expected:
                    raise StoreError(
                        f"{source}: {name} in it is missing or is not the one that was packed"
                    )
                path = folder / root / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    except StoreError:
        raise
    except ZIP_ERRORS as error:
        raise StoreError(f"{source}: cannot be read as a packed run ({one_line(error)})") from None
    return folder / root
