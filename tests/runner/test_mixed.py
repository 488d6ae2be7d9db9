"""A run of targets of two domains: what it writes, and all that reads it."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from conftest import SMOKE, run_directory

from cu_runner.cli import doctor, evaluate, report, table
from cu_runner.config.compose import compose
from cu_runner.reporting.model_card import measured
from cu_runner.runner.rehearsal import Rehearsal
from cu_runner.schema.errors import StoreError
from cu_runner.store.proof import require_metrics, require_true
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


PROBES = (
    "recovery=[paraphrase,completion,residual,rebound,relearning]",
    "recovery.paraphrase.prompts=[paraphrases_shapecanvas_styles,paraphrases_shapecanvas_objects]",
    "recovery.paraphrase.images=1",
    "recovery.completion.images=1",
    "recovery.relearning.steps=[0,1]",
    "recovery.relearning.data=[own]",
    "recovery.relearning.examples=1",
    "recovery.relearning.batch_size=1",
    "recovery.relearning.images=1",
)


def test_each_concept_is_probed_in_its_own_domain(in_process, call_command, tmp_path):
    status, out, err = in_process(*SMALL, *PROBES, "train.steps=1")
    assert (status, err) == (0, "")
    directory = run_directory(out, tmp_path)
    first, last = (pd.read_csv(directory / f"steps/0{i}/recovery.csv") for i in (1, 3))
    assert set(first["measures"]) == {"style"}  # no object is unlearned yet, none is a control
    shown = {(row.group, row.measures, getattr(row, row.measures)) for row in last.itertuples()}
    assert shown == {
        ("erased", "style", "blaze"),
        ("erased", "style", "glacier"),
        ("retained", "style", "lava flow"),
        ("erased", "object", "ball"),
        ("retained", "object", "tree"),
    }
    names = {"predicted_style", "predicted_object", "score_style", "score_object"}
    assert names <= set(last.columns)
    assert last[[*names]].notna().all(axis=None)
    own = last[(last["probe"] == "completion") & (last["group"] == "erased")]
    own = own[(own["weights"] == "edited") & (own["dose"] == 10)]
    assert set(own[own["measures"] == "object"]["prompt"]) == {"a ball image in lava flow style"}
    values = pd.read_csv(directory / "steps/03/recovery_values.csv")
    erased = values[(values["group"] == "erased") & (values["weights"] == "edited")]
    by_probe = {name: set(rows["concept"]) for name, rows in erased.groupby("probe")}
    assert by_probe["residual"] == {"blaze", "ball", "glacier"}
    assert by_probe["rebound"] == {"blaze", "ball"}

    run = read_run(directory)
    require_true(run)
    record = run.records[3]
    shares: dict[float, list[bool]] = {}  # one image of each concept at each dose
    for each in last[last["probe"] == "completion"].itertuples():
        if (each.group, each.weights) == ("erased", "edited"):
            right = getattr(each, each.measures) == getattr(each, f"predicted_{each.measures}")
            shares.setdefault(each.dose, []).append(right)
    largest = max(100 * sum(right) / 3 for right in shares.values())
    assert record.row.metrics["recovered_completion"] == pytest.approx(largest, abs=1e-3)
    other = {**record.row.metrics, "recovered_completion": 77.0}
    run.records[3] = dataclasses.replace(record, row=dataclasses.replace(record.row, metrics=other))
    with pytest.raises(StoreError, match="recovered_completion"):
        require_metrics(run, 3)
    assert call_command(doctor.main, "cu-doctor", directory)[0] == 0
    assert call_command(report.main, "cu-report", directory)[0] == 0
    words = [*SMALL, *PROBES, "train.steps=1"]
    experiment = {"model": "M", "methods": {"ConAbl": words}, "columns": {"mixed": []}}
    rows = {"title": "t", "metrics": ["recovered_completion"], "rows": {"plain": []}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(rows | {"experiments": {"m": experiment}}))
    status, out, err = call_command(table.main, "cu-table", "own.yaml")
    assert (status, err) == (0, "")
    metrics = record.row.metrics
    endings = ("", "_untouched", "_retained")
    shown = [metrics[f"recovered_completion{ending}"] for ending in endings]
    assert re.search(r"plain \| {:.1f}.* \[{:.1f}, {:.1f}\] \|".format(*shown), out)
    status, out, err = call_command(evaluate.main, "cu-eval", directory, "recovery=completion")
    assert (status, err) == (0, "")
    assert "1 seed of noise" in measured(run, 2)  # the card of an export
    place = tmp_path / out.splitlines()[-1].removeprefix("evaluation: ")
    again = pd.read_csv(place / "steps/03/recovery.csv")
    assert set(again["measures"]) == {"style", "object"}
    assert read_run(place).records[3].row.metrics["recovered_completion"] is not None


def test_the_paraphrases_of_both_vocabularies():
    plan = compose(["sequence=shapecanvas_mixed", "recovery=paraphrase"])
    lists = ["paraphrases_shapecanvas_styles", "paraphrases_shapecanvas_objects"]
    assert plan.resolved["recovery"]["paraphrase"]["prompts"] == lists
    plain = compose(["sequence=shapecanvas_object", "recovery=paraphrase"])
    assert plain.resolved["recovery"]["paraphrase"]["prompts"] == lists[1]


def test_what_a_mixed_sequence_does_not_go_with_is_one_line(in_process):
    for words, message in {
        ("setting=simultaneous",): "setting=simultaneous: trains all targets with the prompts of",
        (
            "recovery=paraphrase",
        ): "sequence: a vocabulary is a list of names, for which no paraphrases",
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
