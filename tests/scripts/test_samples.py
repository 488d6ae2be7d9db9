"""scripts/samples.py: which concepts and images it shows, its picture, and the runs it refuses."""

import dataclasses
import importlib
from pathlib import Path

import numpy as np
import pytest
from conftest import compose

from cu_runner import read_run
from cu_runner.config.compose import parse

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
    monkeypatch.setattr("sys.argv", ["samples.py", str(directory), "--output", str(file)])
    samples.main()
    assert file.read_bytes().startswith(b"\x89PNG")
    run = read_run(directory)
    assert drawn["unlearned"] == [record.row.concept for record in run.records[1:]]
    last = run.table.iloc[-1]
    numbers = f"{last['UA']:.0f} / {last['RA_I']:.0f} / {last['RA_C']:.0f}"
    assert [*drawn["rows"]] == ["untouched model", samples.label(run)]
    assert samples.label(run).endswith(numbers)
    before, after = (np.stack([*map(np.asarray, row)]) for row in drawn["rows"].values())
    assert len(before) == len(drawn["unlearned"] + drawn["kept"])
    assert (before != after).any()


def test_runs_that_cannot_stand_in_one_picture(samples, run_copy, monkeypatch, tmp_path, capsys):
    run = read_run(run_copy)
    samples.require_alike([run, run])
    for key in ("sequence", "model"):
        changed = run.config | {key: run.config[key] | {"_target_": "another"}}
        other = dataclasses.replace(run, config=changed)
        with pytest.raises(ValueError, match=f"has another {key} than "):
            samples.require_alike([run, other])
    with pytest.raises(ValueError, match="is not finished"):
        samples.require_alike([dataclasses.replace(run, records=run.records[:-1])])
    monkeypatch.setattr("sys.argv", ["samples.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        samples.main()
    assert f"error: {tmp_path}" in capsys.readouterr().err
