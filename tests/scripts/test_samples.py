"""scripts/samples.py: which concepts and images it shows, its picture, and the runs it refuses."""

import dataclasses
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import compose

from cu_runner import read_run
from cu_runner.config.compose import parse
from cu_runner.schema.errors import StoreError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def samples(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("samples")


def test_concepts_and_objects_are_spread_over_the_sequence(samples):
    sequence = parse(compose("sequence=shapecanvas_style")).sequence.build()
    chosen = [concept.name for concept in samples.spread(sequence.targets)]
    assert chosen == [sequence.targets[n].name for n in (0, 3, 6, 8, 11)]
    images = samples.pictured(sequence, sequence.targets)
    assert [image.concept for image in images] == chosen
    assert len({image.cross for image in images}) == samples.SHOWN
    assert set(images) <= set(sequence.evaluation_images(sequence.targets))
    few = sequence.targets[:2]
    assert samples.spread(few) == list(few)


def test_a_row_for_the_untouched_model_and_one_for_each_run(
    samples, finished_run, monkeypatch, tmp_path
):
    directory, file, drawn = finished_run[1], tmp_path / "shown.png", {}
    draw = samples.draw

    def noted(rows, unlearned, kept):
        drawn.update(rows=rows, unlearned=unlearned, kept=kept)
        return draw(rows, unlearned, kept)

    monkeypatch.setattr(samples, "draw", noted)
    told = [str(directory), str(directory), "--output", str(file)]
    monkeypatch.setattr("sys.argv", ["samples.py", *told])
    samples.main()
    assert file.read_bytes().startswith(b"\x89PNG")
    run = read_run(directory)
    assert drawn["unlearned"] == [record.row.concept for record in run.records[1:]]
    names, pictures = zip(*drawn["rows"], strict=True)
    assert names == ("untouched model", *samples.labels([run, run]))
    before, after, again = (np.stack([*map(np.asarray, row)]) for row in pictures)
    assert len(before) == len(drawn["unlearned"] + drawn["kept"])
    assert (before != after).any()
    assert (after == again).all()  # the same run twice is two rows


def test_a_row_names_what_its_run_differs_in(samples, finished_run, monkeypatch):
    run = read_run(finished_run[1])
    plan = samples.plan_of(run)
    last = run.table.iloc[-1]
    numbers = f"{last['UA']:.1f} / {last['RA_I']:.1f} / {last['RA_C']:.1f}"
    assert samples.labels([run, run]) == [f"conabl, none\n{numbers}"] * 2
    config = run.config | {"seed": 7}
    other = SimpleNamespace(method="conabl", config=config, table=run.table)
    monkeypatch.setattr(samples, "plan_of", lambda given: plan)
    assert samples.labels([run, other]) == [
        f"conabl, none\nseed {seed}\n{numbers}" for seed in (run.config["seed"], 7)
    ]


def test_runs_that_cannot_stand_in_one_picture(samples, finished_run, monkeypatch, tmp_path):
    run = read_run(finished_run[1])
    samples.require_alike([run, run])
    cases = {"sequence": {"seeds": [9]}, "model": {"precision": "bf16"}, "eval": {"steps": 3}}
    for key, change in cases.items():
        other = dataclasses.replace(run, config=run.config | {key: run.config[key] | change})
        with pytest.raises(ValueError, match=f"has another {key} than "):
            samples.require_alike([run, other])
    faster = dataclasses.replace(
        run, config=run.config | {"eval": run.config["eval"] | {"batch_size": 3}}
    )
    samples.require_alike([run, faster])
    with pytest.raises(ValueError, match="is not finished"):
        samples.require_alike([dataclasses.replace(run, records=run.records[:-1])])
    monkeypatch.setattr(samples.RunRecord, "unlearned", lambda self, index: ["torch light"])
    with pytest.raises(ValueError, match="have not unlearned all targets"):
        samples.require_alike([run])
    monkeypatch.setattr("sys.argv", ["samples.py", str(tmp_path), "--output", "a.png"])
    with pytest.raises(StoreError, match=re.escape(str(tmp_path))):
        samples.main()
