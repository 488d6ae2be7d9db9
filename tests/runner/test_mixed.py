"""A run of targets of two domains: what it writes, and all that reads it."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from conftest import SMOKE, run_directory

from cu_runner.cli import doctor, report
from cu_runner.config.compose import compose
from cu_runner.runner.rehearsal import Rehearsal
from cu_runner.store.proof import require_true
from cu_runner.store.run_record import read_run

SMALL = (
    *(word for word in SMOKE if not word.startswith("sequence=")),
    "sequence=shapecanvas_mixed",
    "sequence.targets=[{style: blaze},{object: ball},{style: glacier}]",
    "sequence.domains.style.retain=[lava flow]",
    "sequence.domains.style.cross_retain=[tree]",
    "sequence.domains.style.captions=[cross,arrow]",
    "sequence.domains.style.vocabulary=[blaze,glacier,lava flow,moss,river,plum]",
    "sequence.domains.object.vocabulary=[ball,tree,gear,kite,lamp,box]",
    "sequence.domains.object.retain=[tree]",
    "sequence.domains.object.cross_retain=[lava flow,sleet]",
    "sequence.domains.object.captions=[furnace,spark]",
    "~sequence.domains.object.anchors.box",
    "~sequence.domains.object.anchors.tent",
)


@pytest.mark.parametrize("reg", ["gradproj", "gate"])
def test_a_mixed_run_is_measured_and_read(in_process, call_command, tmp_path, reg):
    status, out, err = in_process(*SMALL, f"reg={reg}", "train.steps=2")
    assert (status, err) == (0, "")
    directory = run_directory(out, tmp_path)
    run = read_run(directory)
    require_true(run)
    assert run.complete
    assert [record.targets for record in run.records] == [[], ["blaze"], ["ball"], ["glacier"]]
    rows = run.predictions(3)
    assert list(rows.columns[:5]) == ["step", "prompt", "measures", "style", "object"]
    shown = [(row.measures, getattr(row, row.measures)) for row in rows.itertuples()]
    assert list(dict.fromkeys(shown)) == [
        ("style", "blaze"),
        ("object", "ball"),
        ("style", "glacier"),
        ("style", "lava flow"),
        ("object", "tree"),
    ]
    assert len(rows) == 3 * 1 + 2 * 2
    matrix = run.accuracy_matrix()
    assert list(matrix.index) == ["blaze", "ball", "glacier", "lava flow", "tree"]
    assert matrix.notna().sum(axis=1).tolist() == [4, 3, 2, 4, 4]
    record = json.loads((directory / "steps/02/step.json").read_text())
    names = json.dumps(record["training"]["regularizers"][reg])
    assert "glacier" not in names  # names of objects stand beside the object ...
    assert re.search(r'"(gear|kite|lamp|box)"', names) or reg == "gate"
    assert "blaze" in names or reg == "gate"  # ... and the earlier style
    if reg == "gate":  # one of them is enough for what reads runs
        return
    status, out, _ = call_command(doctor.main, "cu-doctor", directory)
    assert (status, "all well" in out) == (0, True)
    status, out, err = call_command(report.main, "cu-report", directory)
    assert (status, err) == (0, "")
    table = pd.read_csv(directory / "metrics.csv")
    assert table["UA"].notna().all()


def test_what_a_mixed_sequence_does_not_go_with_is_one_line(in_process):
    for words, message in {
        ("setting=simultaneous",): "setting=simultaneous: trains all targets with the prompts of",
        ("recovery=noise",): "recovery=noise: probes ask for concepts of one domain, and those of",
    }.items():
        status, _, err = in_process(*SMALL, *words)
        assert (status, err.count("\n")) == (2, 1)
        assert message in err


def test_the_doctor_rehearses_requests_of_both_domains():
    plan = compose([*SMALL, "reg=gate"])
    sequence = plan.sequence.build()
    parts = SimpleNamespace(sequence=sequence, model=SimpleNamespace(device=torch.device("cpu")))
    small = Rehearsal._small(SimpleNamespace(parts=parts, _together=lambda: 1))
    assert [target.name for target in small.targets] == ["blaze", "ball", "glacier"]
    found = {each.domain: [one.name for one in each.targets] for each in small.by_domain}
    assert found == {"style": ["blaze", "glacier"], "object": ["ball"]}
    more = dataclasses.replace(sequence, targets=sequence.targets[:1])
    parts.sequence = more
    few = Rehearsal._small(SimpleNamespace(parts=parts, _together=lambda: 1))
    assert [len(each.targets) for each in few.by_domain] == [1, 0]
    assert len(few.seeds) == 1


def test_zero_shot_labels_are_the_concepts_of_every_domain():
    plan = compose([*SMALL, "evaluator=open_clip", "evaluator.path=/x.safetensors"])
    assert plan.evaluator.arguments["labels"] == {
        "style": ["blaze", "glacier", "lava flow", "sleet"],
        "object": ["tree", "ball"],
    }
