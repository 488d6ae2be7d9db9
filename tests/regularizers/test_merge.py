"""Merging: TIES by hand and by brute force, schedules, shared training, resume."""

import dataclasses
import json
import shutil

import pytest
import torch
from conftest import SMOKE, run_directory
from safetensors.torch import load_file

from cu_runner.concepts.requests import plan_requests
from cu_runner.methods.conabl import ConAbl
from cu_runner.models.architectures import ARCHITECTURES
from cu_runner.regularizers.merge import Merge, regression, ties
from cu_runner.request.images import RetainSet
from cu_runner.runner.training import check_composition

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
    merged = Merge(rule, 1.5, 0.5).post_request(list(deltas), deltas.get, None)
    assert merged.keys() == deltas.keys()
    for name, stack in deltas.items():
        torch.testing.assert_close(merged[name], expected(stack), rtol=1e-6, atol=1e-7)


def test_the_first_request_is_used_as_it_is_and_the_run_says_what_merging_does(caplog):
    deltas = stacks(1)
    with caplog.at_level("INFO", logger="cu_runner"):
        assert Merge(lam=3.0, topk=0.1).post_request(list(deltas), deltas.get, None) is None
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
            each.post_request(list(deltas), deltas.get, None)
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
        Merge(lam=[1.0]).post_request(list(deltas), deltas.get, None)


# --------------------------------------------------------------------------------------- regression
def texts(number: int, width: int = 6) -> torch.Tensor:
    """Three rows of text for each request, [N, 3, D]."""
    draw = torch.Generator().manual_seed(2)
    return torch.randn(number, 3, width, generator=draw, dtype=torch.float64)


def test_regression_is_its_published_form_and_the_minimum_of_its_objective():
    draw = torch.Generator().manual_seed(3)
    base, changes = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((4, 6), (3, 4, 6))
    )
    rows, kept = texts(3), texts(4)[3]
    own = torch.stack([each.T @ each for each in rows])
    found = regression(changes, own, 0.7 * kept.T @ kept, 0.2)
    left = sum((base + change) @ S for change, S in zip(changes, own, strict=True))
    left = left + 0.7 * base @ kept.T @ kept + 0.2 * base
    right = own.sum(0) + 0.7 * kept.T @ kept + 0.2 * torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(base + found, left @ right.inverse(), rtol=1e-9, atol=1e-9)
    found.requires_grad_(True)
    objective = 0.7 * (kept @ found.T).square().sum() + 0.2 * found.square().sum()
    for change, each in zip(changes, rows, strict=True):
        objective = objective + (each @ (found - change).T).square().sum()
    objective.backward()
    assert found.grad.abs().max() < 1e-9


def test_regression_gives_every_request_its_own_change_where_texts_do_not_meet():
    """Texts on three axes each: the columns of the change come from the request that reads them."""
    changes = torch.ones(2, 1, 6) * torch.tensor([1.0, 2.0]).view(2, 1, 1)
    own = torch.stack(
        [torch.diag(torch.tensor([1.0] * 3 + [0.0] * 3)).roll((i, i), (0, 1)) for i in (0, 3)]
    )
    merged = regression(changes, own, torch.zeros(6, 6), 1e-9)
    assert merged[0].tolist() == pytest.approx([1, 1, 1, 2, 2, 2])
    assert regression(changes, own, torch.eye(6), 0.0)[0].tolist() == pytest.approx(
        [0.5, 0.5, 0.5, 1, 1, 1]  # kept text that weighs as much as a request's halves it
    )


def test_regression_takes_the_text_of_the_requests_so_far(make_scope, sequence):
    scope = make_scope(request=2)
    scope = dataclasses.replace(scope, request=plan_requests(sequence, "independent")[1])
    names = list(scope.params)[:2]
    draw = torch.Generator().manual_seed(1)
    deltas = {name: torch.randn(2, *scope.params[name].shape, generator=draw) for name in names}
    retain = RetainSet("names", prompts=8)
    found = Merge("regression", keep=0.5, ridge=0.3, retain=retain).post_request(
        names, deltas.get, scope
    )
    model, means = scope.model, []
    for concept in ("torch light", "snow drift"):
        prompts = [f"a {caption} in the style of {concept}" for caption in sequence.captions]
        rows = model.encode_prompts(prompts).hidden[:, 7:].flatten(0, 1).double()
        means.append(rows.T @ rows / len(rows))
    banned = {"torch light", "snow drift", "lava flow", "fog bank"}
    names_kept = [name for name in sequence.vocabulary if name not in banned]
    several = [names_kept[i * len(names_kept) // 8] for i in range(8)]
    rows = (
        model.encode_prompts(
            [sequence.prompts_naming(name)[names_kept.index(name) % 4] for name in several]
        )
        .hidden.flatten(0, 1)
        .double()
    )
    kept = 0.5 * rows.T @ rows / len(rows)
    for name, stack in deltas.items():
        expected = regression(stack, torch.stack(means), kept, 0.3)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)
        assert found[name].dtype == torch.float32


def test_regression_refuses_weights_that_read_no_text():
    check_composition(ConAbl(), {"merge": Merge("regression")})
    check_composition(ConAbl(params="xattn"), {"merge": Merge("uniform")})
    with pytest.raises(
        ValueError, match=r"method\.params=xattn trains weights that read none; choose"
    ):
        check_composition(ConAbl(params="xattn"), {"merge": Merge("regression")})


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
    assert all(ARCHITECTURES["UNet2DConditionModel"].roles.linear.search(name) for name in merged)
    for name, weights in merged.items():
        expected = ties(torch.stack([each[name].flatten() for each in tau]), 0.4)
        assert torch.equal(weights, expected.view(weights.shape))
    row = json.loads((merging / "steps/02/step.json").read_text())["row"]
    assert row["drift_l2"] == pytest.approx(
        sum(weights.double().pow(2).sum() for weights in merged.values()) ** 0.5
    )
    assert row["UA_previous"] is not None  # a merged model has unlearned both concepts


def test_regression_of_trainings_that_were_cached(
    in_process, filled_cache, tmp_path, make_scope, sequence
):
    finish(in_process, tmp_path, "train.lr=1e-4", "setting=independent")
    chosen = ("reg=merge", "reg.merge.rule=regression", "reg.merge.retain.prompts=8")
    directory = finish(in_process, tmp_path, "train.lr=1e-4", *chosen)
    assert [cached(directory, request) for request in (1, 2)] == [True, True]
    tau = [load_file(directory / f"steps/0{request}/delta.safetensors") for request in (1, 2)]
    merged = load_file(directory / "steps/02/merged.safetensors")
    assert merged.keys() == tau[0].keys()
    request = plan_requests(sequence, "independent")[1]
    scope = dataclasses.replace(make_scope(), request=request)
    deltas = lambda name: torch.stack([each[name] for each in tau])  # noqa: E731
    expected = Merge("regression", retain=RetainSet(prompts=8)).post_request(
        list(merged), deltas, scope
    )
    for name, weights in merged.items():
        torch.testing.assert_close(weights, expected[name], rtol=1e-5, atol=1e-7)
        assert weights.norm() > 0.01 * tau[0][name].norm()


@pytest.mark.slow
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
