"""Merging: TIES by hand and by brute force, schedules, shared training, resume."""

import json
import shutil

import pytest
import torch
from conftest import SMOKE, run_directory
from safetensors.torch import load_file

from cu_runner.methods.conabl import ConAbl
from cu_runner.models.parameters import is_cross_attention_kv
from cu_runner.regularizers.merge import Merge, ties

ROWS = torch.tensor([[1.0, -2.0, 3.0, 0.0], [-1.0, -4.0, 1.0, 2.0], [2.0, 3.0, -1.0, 0.0]])


# --------------------------------------------------------------------------------------------- ties
@pytest.mark.parametrize(
    ("how", "merged"),
    [
        ("mean", [1.5, -3.0, 2.0, 2.0]),
        ("sum", [3.0, -6.0, 4.0, 2.0]),
        ("max", [2.0, -4.0, 3.0, 2.0]),
    ],
)
def test_without_trimming(how, merged):
    """The sums are 2, -3, 3, 2: what has the other sign is left out, and zeros do not count in a
    mean.
    """
    assert ties(ROWS, 1.0, how=how).tolist() == merged


def test_trimming_is_per_row():
    """Kept: -2 3 | -4 2 | 2 3 of the rows."""
    assert ties(ROWS, 0.5).tolist() == [2.0, -3.0, 3.0, 2.0]
    assert ties(ROWS, 0.25).tolist() == [
        0.0,
        -4.0,
        3.0,
        0.0,
    ]  # 3 | -4 | 3 (element 1): the sum -4 + 3 elects minus


@pytest.mark.parametrize(
    ("topk", "kept"), [(0.0, 0), (0.1, 0), (0.15, 1), (0.5, 3), (0.99, 6), (1.0, 7)]
)
def test_exactly_floor_of_the_fraction_is_kept(topk, kept):
    row = torch.tensor([[3.0, -7.0, 1.0, 5.0, -2.0, 6.0, -4.0]])
    order = [1, 5, 3, 6, 0, 4, 2]
    expected = [row[0, i].item() if i in order[:kept] else 0.0 for i in range(7)]
    assert ties(row, topk).tolist() == expected


def test_of_equal_magnitudes_the_first_are_kept():
    assert ties(torch.tensor([[1.0, -1.0, 1.0, 1.0, 2.0]]), 0.6).tolist() == [
        1.0,
        -1.0,
        0.0,
        0.0,
        2.0,
    ]
    assert ties(torch.tensor([[0.5, -0.5], [-0.5, 0.5]]), 0.5).tolist() == [
        0.0,
        0.0,
    ]  # 0.5 and -0.5 cancel, no majority


@pytest.mark.parametrize(
    ("rows", "merged"),
    [
        ([[1.0, 1.0, 1.0], [1.0, -1.0, 2.0]], [1.0, 1.0, 1.5]),  # sums 2 0 3: the majority is plus
        ([[-1.0, 1.0, -1.0], [-1.0, -1.0, -2.0]], [-1.0, -1.0, -1.5]),
        ([[1.0, -1.0, 1.0], [1.0, -1.0, -1.0]], [1.0, -1.0, 0.0]),  # sums 2 -2 0: no majority
        ([[0.0, 0.0], [0.0, 0.0]], [0.0, 0.0]),
    ],
)
def test_a_sum_of_zero_takes_the_majority_sign(rows, merged):
    assert ties(torch.tensor(rows), 1.0).tolist() == merged


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_rows_of_zeros_change_nothing(how):
    with_zeros = torch.cat([torch.zeros(1, 4), ROWS, torch.zeros(2, 4)])
    assert torch.equal(ties(with_zeros, 0.5, 1.25, how), ties(ROWS, 0.5, 1.25, how))


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
def test_one_row_is_scaled_and_trimmed(how):
    assert ties(ROWS[:1], 0.5, 1.5, how).tolist() == [0.0, -3.0, 4.5, 0.0]
    assert torch.equal(ties(ROWS[:1], 1.0, 1.0, how), ROWS[0])


def test_lambda_scales_first_and_the_input_stays():
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    before = rows.clone()
    assert torch.equal(ties(rows, 0.4, 1.75), ties(1.75 * rows, 0.4))
    assert torch.equal(rows, before)


def by_hand(rows: list[list[float]], topk: float, lam: float, how: str) -> list[float]:
    """TIES element by element."""
    count = int(topk * len(rows[0]))
    scaled = [[lam * value for value in row] for row in rows]
    kept = []
    for row in scaled:
        chosen = sorted(range(len(row)), key=lambda i: (-abs(row[i]), i))[:count]
        kept.append([row[i] if i in chosen else 0.0 for i in range(len(row))])
    sums = [sum(column) for column in zip(*kept, strict=True)]
    sign = lambda value: (value > 0) - (value < 0)  # noqa: E731
    majority = sign(sum(sign(total) for total in sums))
    merged = []
    for total, column in zip(sums, zip(*kept, strict=True), strict=True):
        elected = sign(total) or majority
        agree = [value for value in column if value and sign(value) == elected] or [0.0]
        merged.append(
            {
                "mean": sum(agree) / len(agree),
                "sum": sum(agree),
                "max": elected * max(map(abs, agree)),
            }[how]
        )
    return merged


@pytest.mark.parametrize("how", ["mean", "sum", "max"])
@pytest.mark.parametrize("topk", [0.0, 0.2, 0.55, 1.0])
def test_against_brute_force(how, topk):
    """Small integers: magnitudes tie and sums cancel often."""
    rows = torch.randint(-3, 4, (5, 83), generator=torch.Generator().manual_seed(7)).double()
    assert ties(rows, topk, 2.0, how).tolist() == pytest.approx(
        by_hand(rows.tolist(), topk, 2.0, how), rel=1e-12
    )


# ------------------------------------------------------------------------------------- post_request
def stacks(number: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        "a": torch.randn(number, 3, 4, generator=draw),
        "b": torch.randn(number, 5, generator=draw),
    }


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("ties", lambda stack: ties(stack.flatten(1), 0.5, 1.5).view(stack.shape[1:])),
        ("uniform", lambda stack: 1.5 * (stack[0] + stack[1] + stack[2]) / 3),
        ("task_arithmetic", lambda stack: 1.5 * (stack[0] + stack[1] + stack[2])),
    ],
)
def test_rules(rule, expected):
    deltas = stacks(3)
    merged = Merge(rule, 1.5, 0.5).post_request(list(deltas), deltas.get)
    assert merged.keys() == deltas.keys()
    for name, stack in deltas.items():
        torch.testing.assert_close(merged[name], expected(stack), rtol=1e-6, atol=1e-7)


def test_the_first_request_is_used_as_it_is_and_the_run_says_what_merging_does(caplog):
    deltas = stacks(1)
    with caplog.at_level("INFO", logger="cu_runner"):
        assert Merge(lam=3.0, topk=0.1).post_request(list(deltas), deltas.get) is None
    assert caplog.messages == [
        (
            "merge: every request starts from the untouched model; from the second on their "
            "changes are merged"
        )
    ]


def test_schedules_have_an_entry_per_request_from_the_second_on():
    scheduled = Merge(lam=[1.25, 1.75, 9.0], topk=[0.8, 0.4, 0.0])  # longer than needed is allowed
    for number, lam, topk in ((2, 1.25, 0.8), (3, 1.75, 0.4)):
        deltas = stacks(number)
        found, fixed = (
            each.post_request(list(deltas), deltas.get)
            for each in (scheduled, Merge(lam=lam, topk=topk))
        )
        assert all(torch.equal(found[name], fixed[name]) for name in deltas)


def test_a_schedule_that_is_too_short_is_refused_before_training(make_scope):
    scope = make_scope()  # two targets
    assert Merge(lam=[1.0], topk=[0.4]).begin_request(scope, ConAbl()) == {}
    for short, key in ((Merge(lam=[]), "lam"), (Merge(topk=[]), "topk")):
        with pytest.raises(
            ValueError, match=rf"reg\.merge\.{key} has 0 entries; 2 requests need 1"
        ):
            short.begin_request(scope, ConAbl())
    deltas = stacks(3)
    with pytest.raises(ValueError, match=r"reg\.merge\.lam has 1 entries; 3 requests need 2"):
        Merge(lam=[1.0]).post_request(list(deltas), deltas.get)


# --------------------------------------------------------------------------------------------- runs
def finish(in_process, tmp_path, *overrides: str):
    """Runs to the end; the run directory."""
    status, out, err = in_process(*SMOKE, *overrides)
    assert (status, err) == (0, "")
    return run_directory(out, tmp_path)


def cached(directory, request: int) -> bool:
    return json.loads((directory / f"steps/0{request}/step.json").read_text())["training"].get(
        "cached", False
    )


def delta(directory, request: int) -> bytes:
    return (directory / f"steps/0{request}/delta.safetensors").read_bytes()


def test_merging_and_independent_runs_share_their_training(in_process, tmp_path):
    for outputs, order in (
        ("one", [["setting=independent"], ["reg=merge", "reg.merge.lam=1"]]),
        ("two", [["reg=merge", "reg.merge.lam=1"], ["setting=independent"]]),
    ):
        first, second = (
            finish(in_process, tmp_path, f"paths.outputs={outputs}", "train.lr=1e-4", *choice)
            for choice in order
        )
        assert [cached(first, request) for request in (1, 2)] == [False, False]
        assert [cached(second, request) for request in (1, 2)] == [True, True]
        assert all(delta(first, request) == delta(second, request) for request in (1, 2))
    independent, merging = second, first
    assert merging.name.startswith("conabl-merge-independent-s0-")
    assert (
        "merge: every request starts from the untouched model" in (merging / "run.log").read_text()
    )
    other = next((tmp_path / "one/runs/smoke").glob("conabl-none-*"))
    assert all(delta(other, request) == delta(independent, request) for request in (1, 2))

    assert not (merging / "steps/01/merged.safetensors").exists()
    tau = [load_file(merging / f"steps/0{request}/delta.safetensors") for request in (1, 2)]
    merged = load_file(merging / "steps/02/merged.safetensors")
    assert merged.keys() == tau[0].keys()
    assert all(is_cross_attention_kv(name) for name in merged)
    for name, weights in merged.items():
        expected = ties(torch.stack([each[name].flatten() for each in tau]), 0.4)
        assert torch.equal(weights, expected.view(weights.shape))
    row = json.loads((merging / "steps/02/step.json").read_text())["row"]
    assert row["drift_l2"] == pytest.approx(
        sum(weights.double().pow(2).sum() for weights in merged.values()) ** 0.5
    )
    assert row["UA_previous"] is not None  # a merged model has unlearned both concepts


def test_gradproj_merge_shares_with_gradproj_and_resumes_bitwise(
    in_process, filled_cache, tmp_path
):
    finish(in_process, tmp_path, "reg=gradproj", "setting=independent")
    run = ("reg=gradproj_merge", "reg.merge.lam=[1.75]", "reg.merge.topk=[0.8]")
    directory = finish(in_process, tmp_path, *run)
    assert directory.name.startswith("conabl-gradproj+merge-independent-s0-")
    assert [cached(directory, request) for request in (1, 2)] == [True, True]
    names = ("delta.safetensors", "merged.safetensors", "predictions.csv")
    before = [(directory / "steps/02" / name).read_bytes() for name in names]
    metrics = json.loads((directory / "steps/02/metrics.json").read_text())

    shutil.rmtree(directory / "steps/02")
    shutil.rmtree(tmp_path / "outputs/cache/deltas")
    (directory / "summary.json").unlink()
    assert finish(in_process, tmp_path, *run) == directory
    assert [cached(directory, request) for request in (1, 2)] == [True, False]
    assert [(directory / "steps/02" / name).read_bytes() for name in names] == before
    assert json.loads((directory / "steps/02/metrics.json").read_text()) == metrics


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["reg.merge.lam=[]"], "reg.merge.lam has 0 entries; 2 requests need 1"),
        (
            ["reg.merge.topk=1.5"],
            "reg.merge.topk=1.5: give a number from 0 to 1, or a list of them",
        ),
        (
            ["reg.merge.lam=[1.0,-1.0]"],
            "reg.merge.lam=[1.0, -1.0]: give a number above 0, or a list of them",
        ),
        (["setting=simultaneous"], "reg=merge merges requests that each start from the base model"),
    ],
)
def test_bad_settings_are_one_line(in_process, tmp_path, overrides, words):
    status, _, err = in_process(*SMOKE, "reg=merge", *overrides)
    assert (status, err.count("\n")) == (2, 1)
    assert words in err
    assert not list(tmp_path.glob("outputs/runs/*/*/steps/01"))
