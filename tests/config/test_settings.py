"""Sequential, independent and simultaneous requests: their plans, their runs, the deltas that they
share.
"""

import dataclasses
import json
import shutil

import pandas as pd
import pytest
import safetensors.torch
from conftest import SMOKE, compose, run_directory

from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence_file import reorder
from cu_runner.config.compose import parse
from cu_runner.schema.errors import ConfigError
from cu_runner.store.run_record import read_run


def test_patience_without_a_measurement_is_refused():
    arguments = ("sequence=smoke", "setting=simultaneous", "setting.patience_steps=10")
    with pytest.raises(ConfigError, match=r"^setting.patience_steps: .* give both$"):
        parse(compose(*arguments, "setting.stop_at=null"))
    assert parse(compose(*arguments, "setting.stop_at=99")).setting.patience_steps == 10


def names(concepts) -> str:
    return " ".join(concept.name.split()[0] for concept in concepts)


@pytest.mark.parametrize(
    ("setting", "targets", "erased", "start"),
    [
        ("sequential", ["torch", "snow"], ["torch", "torch snow"], "previous"),
        ("independent", ["torch", "snow"], ["torch", "snow"], "base"),
        ("simultaneous", ["torch", "torch snow"], ["torch", "torch snow"], "base"),
    ],
)
def test_plans(sequence, setting, targets, erased, start):
    requests = plan_requests(sequence, setting)
    assert [request.index for request in requests] == [1, 2]
    assert [names(request.targets) for request in requests] == targets
    assert [names(request.erased) for request in requests] == erased
    assert {request.start for request in requests} == {start}
    assert [request.label for request in requests] == ["torch light", "snow drift"]


def test_the_last_of_simultaneous_requests_alone(sequence):
    (request,) = plan_requests(sequence, "simultaneous", last_only=True)
    assert (request.index, names(request.targets), names(request.erased)) == (
        1,
        "torch snow",
        "torch snow",
    )
    assert (request.start, request.label) == ("base", "2 concepts")


def test_orders():
    listed = ["a", "b", "c", "d", "e"]
    assert reorder(listed, "paper") == listed
    assert reorder(listed, "reversed") == listed[::-1]
    shuffled = reorder(listed, "shuffle-1")
    assert sorted(shuffled) == listed
    assert shuffled != listed
    assert reorder(listed, "shuffle-1") == shuffled
    assert reorder(listed, "shuffle-2") != shuffled


@pytest.fixture
def compose_run():
    return lambda *overrides: parse(compose(*overrides))


def run(in_process, tmp_path, *overrides):
    """The run directory, its metrics and its training records."""
    status, out, err = in_process(*SMOKE, *overrides)
    assert (status, err) == (0, "")
    directory = run_directory(out, tmp_path)
    records = [
        json.loads((directory / f"steps/{step:02d}/step.json").read_text())["training"]
        for step in (1, 2)
    ]
    return directory, pd.read_csv(directory / "metrics.csv"), records


def deltas(directory):
    return [
        safetensors.torch.load_file(directory / f"steps/{step:02d}/delta.safetensors")
        for step in (1, 2)
    ]


def test_independent_requests_do_not_depend_on_each_other(in_process, filled_cache, tmp_path):
    directory, table, records = run(in_process, tmp_path, "setting=independent")
    assert directory.name.startswith("conabl-none-independent-s0-")
    assert table["UA_previous"].isna().all()
    assert (table["UA"] == table["UA_current"])[1:].all()
    assert not any("cached" in record for record in records)
    sequential, _, _ = run(in_process, tmp_path, "setting=sequential")
    (first, second), (same, other) = deltas(directory), deltas(sequential)
    assert all(first[name].equal(same[name]) for name in first)
    assert not any(second[name].equal(other[name]) for name in second)


def test_what_starts_from_the_base_model_is_trained_once(in_process, filled_cache, tmp_path):
    """Another evaluation is another run, of the same deltas."""
    once = ("setting=independent", "train.steps=1")
    first, _, _ = run(in_process, tmp_path, *once)
    again, _, records = run(in_process, tmp_path, *once, "eval.steps=1")
    assert again != first
    assert [record["cached"] for record in records] == [True, True]
    for one, two in zip(deltas(first), deltas(again), strict=True):
        assert all(one[name].equal(two[name]) for name in one)
    _, _, records = run(in_process, tmp_path, *once, "train.lr=1e-5")
    assert not any("cached" in record for record in records)


def test_the_cache_of_deltas_knows_precision_sampler_and_method(in_process, filled_cache, tmp_path):
    """What another forward pass would have trained is not taken from it."""
    once = ("setting=independent", "train.steps=1")
    run(in_process, tmp_path, *once)
    for change in (
        "model.precision=bf16",
        "model.sampler.scheduler=DDIMScheduler",
        "method.teacher=base",
    ):
        _, _, records = run(in_process, tmp_path, *once, change)
        assert not any("cached" in record for record in records), change


def test_a_file_of_names_counts_by_its_content(in_process, filled_cache, tmp_path):
    names = tmp_path / "names.txt"
    found = []
    for content in ("tide pool\nlead mist\n", "tide pool\nash stripe\n", "tide pool\nlead mist\n"):
        names.write_text(content)
        chosen = (
            "reg=gradproj",
            "reg.gradproj.auxiliary.source=file",
            "reg.gradproj.auxiliary.name=names.txt",
            "train.steps=1",
        )
        found.append(run(in_process, tmp_path, *chosen)[0])
    assert found[0] == found[2] != found[1]


def test_merging_keeps_the_early_stop_of_its_setting(compose_run):
    config = compose_run("sequence=smoke", "reg=merge", "setting.stop_at=99", "setting.interval=5")
    assert (config.setting.plan, config.setting.stop_at, config.setting.interval) == (
        "independent",
        99,
        5,
    )


def test_simultaneous_requests_train_on_all_concepts_so_far(in_process, filled_cache, tmp_path):
    directory, table, _ = run(in_process, tmp_path, "setting=simultaneous")
    assert json.loads((directory / "steps/02/step.json").read_text())["targets"] == [
        "torch light",
        "snow drift",
    ]
    assert table["train_steps"].tolist() == [0, 3, 3]
    assert set(pd.read_csv(directory / "steps/02/predictions.csv")["style"]) >= {
        "torch light",
        "snow drift",
    }


def test_all_concepts_in_one_request(in_process, filled_cache, tmp_path):
    """A run of one request: finished, read, measured again, and in the report as a run that
    unlearned both.
    """
    chosen = (*SMOKE, "setting=simultaneous", "setting.last_only=true")
    status, out, err = in_process(*chosen)
    assert (status, err) == (0, "")
    found = read_run(run_directory(out, tmp_path))
    assert (found.complete, found.num_requests, found.table["concept"].tolist()) == (
        True,
        1,
        ["", "2 concepts"],
    )
    assert found.unlearned(1) == ["torch light", "snow drift"]
    assert found.requested == {"torch light": 1, "snow drift": 1}
    assert found.accuracy_matrix()[1].notna().all()
    judged = found.predictions(1)
    wrong = judged[judged["style"].isin(found.unlearned(1))]
    assert found.table["UA"][1] == pytest.approx(
        100 * (wrong["style"] != wrong["predicted_style"]).mean(), abs=1e-3
    )
    status, again, err = in_process(*chosen)
    assert (status, err) == (0, "")
    assert again.splitlines()[-1] == out.splitlines()[-1]


def test_last_only_belongs_to_simultaneous_requests(in_process):
    status, _, err = in_process(*SMOKE, "+setting.last_only=true")
    assert status == 2
    assert err == (
        "cu-run: setting.last_only: requests are sequential, and each needs its own; use "
        "setting=simultaneous\n"
    )


def test_last_only_is_no_part_of_the_other_simultaneous_runs(compose_run):
    """So that those made before it existed are found again."""
    whole = compose_run("sequence=smoke", "setting=simultaneous")
    assert "last_only" not in whole.resolved["setting"]
    assert (
        compose_run("sequence=smoke", "setting=simultaneous", "setting.last_only=true").signature
        != whole.signature
    )


def test_early_stop_on_ua(in_process, filled_cache, tmp_path):
    """With this short schedule UA is 50 from the start: the stop comes after `patience`
    measurements.
    """
    chosen = (
        "setting=simultaneous",
        "setting.stop_at=0.1",
        "setting.interval=1",
        "setting.patience=2",
    )
    directory, table, records = run(in_process, tmp_path, *chosen)
    assert table["train_steps"].tolist() == [0, 2, 2]
    for step, record in enumerate(records, start=1):
        assert [entry["step"] for entry in record["early_stop"]] == [1, 2]
        assert record["early_stop"][-1]["UA"] == pytest.approx(table["UA"][step], abs=1e-3)
    assert len(pd.read_csv(directory / "steps/01/training.csv")) == 2
    never = run(in_process, tmp_path, *chosen[:1], "setting.stop_at=100", "setting.interval=1")[1]
    assert never["train_steps"].tolist() == [0, 3, 3]


def test_an_earlier_target_that_came_back_is_trained_again(in_process, filled_cache, tmp_path):
    """So little loss is asked for that every earlier target has more of it left."""
    words = ("setting.stop_loss=0.001", "setting.interval=1")
    plain = run(in_process, tmp_path, *words)
    directory, table, records = run(in_process, tmp_path, *words, "setting.recheck=2")
    assert table["train_steps"].tolist() == [0, 3, 3]
    assert "again" not in records[0]
    (again,) = records[1]["again"]
    assert again["target"] == "torch light"
    assert again["steps"] == 3
    assert again["loss_left_then"] < again["loss_left"]
    first = [(each / "steps/01/delta.safetensors").read_bytes() for each in (plain[0], directory)]
    assert first[0] == first[1]
    assert table["drift_l2"][2] != plain[1]["drift_l2"][2]
    before = (directory / "steps/02/delta.safetensors").read_bytes()
    shutil.rmtree(directory / "steps/02")
    again = run(in_process, tmp_path, *words, "setting.recheck=2")
    assert (again[0] / "steps/02/delta.safetensors").read_bytes() == before
    # what is left is far under so many times the threshold: it is looked at, and left alone
    spared = run(in_process, tmp_path, *words, "setting.recheck=100000")
    assert set(spared[2][1]["again"][0]) == {"target", "loss_left"}
    assert spared[1]["drift_l2"][2] == plain[1]["drift_l2"][2]
    status, _, err = in_process(*SMOKE, "setting.recheck=2")
    assert status == 2
    assert "held against setting.stop_loss; give both" in err


def test_early_stop_on_the_loss(in_process, filled_cache, tmp_path):
    """The step size is tiny: after each step nearly all of the loss is left."""
    chosen = ("setting.stop_loss=0.999999", "setting.interval=1", "train.lr=1e-2")
    _, table, records = run(in_process, tmp_path, *chosen)
    assert table["train_steps"].tolist() == [0, *(len(r["early_stop"]) for r in records)]
    for record in records:
        *before, last = [entry["loss_left"] for entry in record["early_stop"]]
        assert last <= 0.999999 or len(before) == 2
        assert all(left > 0.999999 for left in before)
    status, _, err = in_process(*SMOKE, "setting.stop_loss=0.5", "setting.stop_at=99")
    assert status == 2
    assert err == (
        "cu-run: setting.stop_loss: setting.stop_at ends requests too, by UA; give one of the two\n"
    )
    plain = parse(compose(*SMOKE))
    assert not {"stop_at", "stop_loss", "recheck"} & set(plain.resolved["setting"])
    assert parse(compose(*SMOKE, "setting.interval=5")).signature == plain.signature
    assert parse(compose(*SMOKE, "setting.stop_loss=0.5")).signature != plain.signature


def test_order_is_a_choice_of_the_sequence(in_process, filled_cache, tmp_path):
    _, table, _ = run(in_process, tmp_path, "sequence.order=reversed")
    assert table["concept"].fillna("").tolist() == ["", "snow drift", "torch light"]
    status, _, err = in_process(*SMOKE, "sequence.order=random")
    assert status == 2
    assert err.startswith(
        "cu-run: sequence.order='random': allowed: paper, reversed, or shuffle-1 and so on"
    )


def test_of_a_target_that_is_trained_again_all_others_are_earlier(sequence):
    second = plan_requests(sequence, "sequential")[1]
    first, other = sequence.targets[:2]
    again = dataclasses.replace(second, index=1, after=2)
    assert (again.targets, again.earlier) == ((first,), (other,))
    assert second.earlier == (first,)
    assert len({again.number, second.number, 1}) == 3


def test_a_run_without_other_words_is_the_run_that_it_was():
    plain = parse(compose(*SMOKE))
    assert "also_called" not in plain.resolved["method"]
    words = parse(compose(*SMOKE, "method.also_called=other_words_shapecanvas_styles"))
    assert words.signature != plain.signature
