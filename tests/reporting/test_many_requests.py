"""A run of more than a hundred requests, whose folders of steps have names of two and of three
digits: every reader goes through all of them, in the order of their numbers.
"""

import shutil
from pathlib import Path

import pytest
from test_page import make_run

from cu_runner.cli import report
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.store import verify
from cu_runner.store.archive import pack, unpack
from cu_runner.store.files import hash_json
from cu_runner.store.leftovers import strangers
from cu_runner.store.proof import require_true
from cu_runner.store.run_record import find_runs, read_run

TARGETS = tuple(f"style {number}" for number in range(1, 103))
SEQUENCE = Sequence(
    name="hand",
    targets=tuple(Concept(name, "style") for name in TARGETS),
    retain=(Concept("kept", "style"), Concept("near", "style")),
    cross_retain=(Concept("tree", "object"), Concept("cup", "object")),
    vocabulary=(),
    prompt="a {object} in {style} style",
    target_prompt=("{concept}",),
    anchor_prompt="",
    captions=(),
    seeds=(188,),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run directory of 102 requests; metrics follow from predictions."""
    folder = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)  # no crash to survive
        return make_run(folder, targets=TARGETS, finished=len(TARGETS), computed=True)


@pytest.fixture
def many(made, tmp_path):
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(made, tmp_path / made.name))


def test_readers_see_all_steps_in_order(made, tmp_path):
    run = read_run(made)
    assert [record.index for record in run.records] == list(range(103))
    assert run.complete
    assert run.unlearned(102) == list(TARGETS)
    assert run.weights(102) == made / "steps/102/delta.safetensors"
    assert list(run.accuracy_matrix().columns) == list(range(103))
    require_true(run)
    assert (strangers(made), find_runs([made.parent])) == ([], [made])


def test_cu_doctor_checks_every_step(many, monkeypatch):
    monkeypatch.setattr(verify, "signature", hash_json)

    def checks() -> list[verify.Finding]:
        return list(verify.verify_run(many, SEQUENCE, read_run(many).config))

    before = checks()
    places = [finding.what for finding in before if finding.what.endswith(": chain")]
    assert places == [f"steps/{number:02d}: chain" for number in range(103)]
    for step in (11, 99, 102):
        (many / f"steps/{step}/grid.png").write_bytes(b"damaged")
    after = checks()
    assert [found.what for found in after] == [found.what for found in before]
    changed = [found for found, earlier in zip(after, before, strict=True) if found != earlier]
    assert [(found.what, found.ok) for found in changed] == [
        (f"steps/{step}/grid.png", False) for step in (11, 99, 102)
    ]


@pytest.mark.slow
def test_a_report_shows_every_request(made, call_command, tmp_path):
    status, _, err = call_command(report.main, "cu-report", made)
    assert (status, err) == (0, "")
    (page,) = (tmp_path / "outputs/reports").glob("*/index.html")
    text = page.read_text(encoding="utf-8")
    assert [name for name in TARGETS if name not in text] == []


def test_a_packed_run_has_every_step(many, tmp_path):
    for name in ("metrics.csv", "summary.json"):
        (many / name).touch()
    pack(read_run(many), tmp_path / "run.zip")
    again = read_run(unpack(tmp_path / "run.zip", tmp_path / "again"))
    assert [record.sha256 for record in again.records] == [
        record.sha256 for record in read_run(many).records
    ]
