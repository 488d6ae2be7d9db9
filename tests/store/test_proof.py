"""Records that carry fitting hashes and are none all the same: half records, swapped weights, cache
entries of other content. What is read is held against its files before anything is built on it.
"""

import hashlib
import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import safetensors.torch
import torch
from conftest import SMOKE

from cu_runner.cli import evaluate, report
from cu_runner.config.compose import compose
from cu_runner.reporting.table_cells import open_run
from cu_runner.runtime.code_identity import identify
from cu_runner.schema.errors import StoreError
from cu_runner.store.cache import Cache
from cu_runner.store.files import hash_json, to_safetensors
from cu_runner.store.proof import require_true, size_of
from cu_runner.store.records import chain
from cu_runner.store.run_record import read_run


def forge(step, change) -> None:
    """Change a step.json, take its files as they are, and make all its hashes fit."""
    record = json.loads((step / "step.json").read_text())
    for name in record["files"]:
        record["files"][name] = hashlib.sha256((step / name).read_bytes()).hexdigest()
    change(record)
    if isinstance(record.get("files"), dict):
        record["sha256"] = chain(record["parent_sha256"], record["files"])
    entries = {key: value for key, value in record.items() if key != "record_sha256"}
    (step / "step.json").write_text(json.dumps(entries | {"record_sha256": hash_json(entries)}))


def put(record, place, value) -> None:
    *parents, last = place.split(".")
    for name in parents:
        record = record[name]
    record[last] = value


HALF = {
    "column": (lambda record: record["row"].pop("RA_I"), "its row lacks RA_I"),
    "file": (lambda record: record["files"].pop("grid.png"), "its files lack grid.png"),
    "weights": (lambda record: record["files"].pop("delta.safetensors"), "its files lack delta"),
    "path": (lambda record: record["files"].update({"../x": "0"}), "'../x', which is no file"),
    "nan": (lambda record: put(record, "row.drift_l2", float("nan")), "not finite"),
    "row": (lambda record: put(record, "row", []), "cannot be read"),
    "files": (lambda record: put(record, "files", []), "cannot be read"),
    "training": (lambda record: put(record, "training.method", []), "cannot be read"),
    "metric": (lambda record: put(record, "row.UA", [1]), "cannot be read"),
    "versions": (lambda record: put(record, "versions", []), "cannot be read"),
}


@pytest.mark.parametrize("kind", HALF)
def test_half_a_record_is_refused(run_copy, kind):
    change, said = HALF[kind]
    forge(run_copy / "steps/02", change)
    with pytest.raises(StoreError, match=r"steps/02/step\.json: ") as caught:
        read_run(run_copy)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def nothing(path) -> None:
    path.write_bytes(b"")


def absurd(path) -> None:
    path.write_bytes((2**63 - 1).to_bytes(8, "little") + path.read_bytes()[8:])


def none(path) -> None:
    path.write_bytes((2).to_bytes(8, "little") + b"{}")


def doubled(path) -> None:
    delta = safetensors.torch.load_file(path)
    path.write_bytes(to_safetensors({name: 2 * change for name, change in delta.items()}))


@pytest.mark.parametrize(
    ("swap", "said"),
    [
        (nothing, "cannot be read ("),
        (absurd, "cannot be read ("),
        (none, "holds no weights"),
        (doubled, "has drift "),
    ],
)
def test_weights_that_were_swapped_and_signed_anew_are_refused(run_copy, swap, said):
    require_true(read_run(run_copy))
    swap(run_copy / "steps/02/delta.safetensors")
    forge(run_copy / "steps/02", lambda record: None)
    with pytest.raises(StoreError, match=r"02/delta\.safetensors: ") as caught:
        require_true(read_run(run_copy))
    assert said in str(caught.value)


@pytest.mark.parametrize("column", ["prompt", "seed", "score_style", "score_object"])
def test_predictions_that_lack_a_column_and_were_signed_anew_are_refused(run_copy, column):
    path = run_copy / "steps/02/predictions.csv"
    pd.read_csv(path, dtype=str).drop(columns=column).to_csv(path, index=False)
    forge(run_copy / "steps/02", lambda record: None)
    with pytest.raises(StoreError, match=rf"predictions\.csv: gives no metrics .*{column}"):
        require_true(read_run(run_copy))


def test_a_run_is_not_continued_from_what_was_forged(in_process, call_command, run_copy):
    """No request is trained on it, and no run is called finished, reported or tabulated with it."""
    whole = run_copy.with_name("whole")
    shutil.copytree(run_copy, whole)
    shutil.rmtree(run_copy / "steps/02")
    doubled(run_copy / "steps/01/delta.safetensors")
    forge(run_copy / "steps/01", lambda record: None)
    status, _, err = in_process(*SMOKE)
    assert (status, err.count("\n")) == (1, 1), err
    assert "01/delta.safetensors: has drift " in err
    assert not (run_copy / "steps/02").exists()

    shutil.rmtree(run_copy)
    whole.rename(run_copy)
    forge(run_copy / "steps/02", lambda record: put(record, "row.UA", 99.0))
    for status, _, err in (
        in_process(*SMOKE),
        call_command(report.main, "cu-report", run_copy),
        call_command(evaluate.main, "cu-eval", run_copy),
    ):
        assert (status, err.count("\n")) == (1, 1), err
        assert "02/predictions.csv: gives UA " in err
        assert "says 99.0" in err
    with pytest.raises(StoreError, match=r"says 99\.0"):  # as a cell of a table
        open_run(compose(list(SMOKE)))


def sign(entry, files) -> None:
    index = json.loads((entry / "index.json").read_text())
    for name, content in files.items():
        (entry / name).write_bytes(content)
        index["files"][name] = hashlib.sha256(content).hexdigest()
    (entry / "index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["lacks", "outside", "empty", "absurd", "record"])
def test_a_cache_entry_of_other_content_is_none(tmp_path, kind):
    cache, key = Cache(tmp_path / "cache", identify()), {"a": 1}
    weights = to_safetensors({"a": safetensors.torch.torch.ones(2)})
    record = json.dumps({"steps": 1}).encode()
    files = {"delta.safetensors": weights, "training.csv": b"", "record.json": record}
    cache.put("deltas", key, files)
    assert cache.fetch("deltas", key) == files
    (entry,) = (tmp_path / "cache/deltas").iterdir()
    (entry.parent / "x").write_bytes(b"1")
    if kind == "lacks":
        index = json.loads((entry / "index.json").read_text())
        del index["files"]["record.json"]
        (entry / "index.json").write_text(json.dumps(index))
    else:
        sign(
            entry,
            {
                "outside": {"../x": b"1"},
                "empty": {"delta.safetensors": b""},
                "absurd": {"delta.safetensors": b"\xff" * 7 + b"\x7f{}"},
                "record": {"record.json": b'{"steps": []}'},
            }[kind],
        )
    assert cache.fetch("deltas", key) is None
    cache.put("deltas", key, files)
    assert cache.fetch("deltas", key) == files


def test_a_run_is_held_against_its_files_without_torch(finished_run):
    """A table of a hundred cells needs neither the seconds nor the memory."""
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from cu_runner.store.proof import require_true, size_of\n"
        "from cu_runner.store.run_record import read_run\n"
        "run = read_run(Path(sys.argv[1]))\nrequire_true(run)\n"
        "print(size_of(run.weights(2)), 'torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(finished_run[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, has_torch = done.stdout.split()
    tensors = safetensors.torch.load_file(finished_run[1] / "steps/02/delta.safetensors").values()
    norm = sum(tensor.double().square().sum() for tensor in tensors).sqrt().item()
    assert float(size) == pytest.approx(norm, rel=1e-12)
    assert has_torch == "False"


def test_weights_of_a_type_that_no_run_writes(tmp_path):
    path = tmp_path / "delta.safetensors"
    safetensors.torch.save_file({"w": torch.ones(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(StoreError, match=r"delta\.safetensors: cannot be read .*bfloat16"):
        size_of(path)
