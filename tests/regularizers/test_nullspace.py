"""Null-space projection: the projector's closed forms, the target's own directions, the kept
prompts, resume.
"""

import dataclasses
import json
import logging

import pytest
import torch
from conftest import SMOKE, run_directory
from doubles import Pull

from cu_runner.methods.conabl import ConAbl
from cu_runner.models.parameters import assign, snapshot, subtract
from cu_runner.regularizers.nullspace import NullSpace, null_space_projector, own_directions
from cu_runner.request.name_sources import NameSource
from cu_runner.request.text_subspace import text_vectors
from cu_runner.runner.training import erase


def rows(
    number: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.randn(number, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------------------------------- projector
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("number", "rank"), [(100, 5), (6, 5), (6, 6), (1, 1)])
def test_projector_is_symmetric_idempotent_and_removes_the_top_directions(number, rank, dtype):
    X = rows(number, 16, dtype=dtype) * torch.arange(16, 0, -1)
    P = null_space_projector(X, rank=rank)
    assert P.dtype == dtype
    assert P.shape == (16, 16)
    tolerance = {"atol": 1e-6 if dtype == torch.float32 else 1e-13, "rtol": 0}
    torch.testing.assert_close(P, P.T, **tolerance)
    torch.testing.assert_close(P @ P, P, **tolerance)
    assert P.trace().item() == pytest.approx(16 - rank, abs=1e-5)
    _, singular, V = torch.linalg.svd(
        X.double(), full_matrices=False
    )  # an independent way to the same directions
    left = (X.double() @ P.double()).norm().item()
    assert left == pytest.approx(singular[rank:].norm().item(), rel=1e-5, abs=1e-3)
    assert (P.double() @ V[:rank].T).norm() < 1e-5


def test_projector_is_that_of_the_uncentred_covariance():
    """Rows around (10, 0): the mean itself is the top direction; centred, it would be the second
    axis.
    """
    X = torch.tensor([[10.0, 1.0], [10.0, -1.0]])
    torch.testing.assert_close(
        null_space_projector(X, rank=1), torch.diag(torch.tensor([0.0, 1.0]))
    )


def test_energy_takes_the_fewest_directions():
    X = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))  # squared norms 9, 4, 1 of 14
    removed = [
        4 - null_space_projector(X, energy=energy).trace().item()
        for energy in (0.6, 0.65, 0.92, 0.93, 0.99)
    ]
    assert removed == pytest.approx([1, 2, 2, 3, 3], abs=1e-6)
    equal = [
        10 - null_space_projector(torch.eye(10), energy=part / 10).trace().item()
        for part in range(1, 11)
    ]
    assert equal == pytest.approx(
        range(1, 11), abs=1e-5
    )  # ties: 3/10 of the energy is exactly three of ten


def test_directions_that_hold_nothing_are_not_removed():
    X = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0]))  # numerical rank 2
    torch.testing.assert_close(
        null_space_projector(X, rank=3), torch.diag(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    )
    assert torch.equal(null_space_projector(torch.zeros(3, 4), rank=2), torch.eye(4))
    assert torch.equal(null_space_projector(X, energy=0.0), torch.eye(4))
    assert torch.equal(null_space_projector(X, rank=4), torch.zeros(4, 4))


def test_energy_one_is_the_numerical_row_space():
    X = rows(40, 5) @ rows(5, 16, seed=1)  # rank 5 up to rounding
    P = null_space_projector(X.double(), energy=1.0)
    assert P.trace().item() == pytest.approx(11, abs=1e-9)
    assert (X.double() @ P).norm() / X.norm() < 1e-6
    few = rows(3, 16)
    assert null_space_projector(few, energy=1.0).trace().item() == pytest.approx(13, abs=1e-5)


def test_the_ends_of_the_range_and_empty_inputs():
    X = rows(8, 6)
    assert torch.equal(null_space_projector(X, rank=0), torch.eye(6))
    for rank in (6, 7, 1000):
        assert torch.equal(null_space_projector(X, rank=rank), torch.zeros(6, 6))
    assert torch.equal(null_space_projector(X, energy=1.0), torch.zeros(6, 6))
    for nothing in (torch.zeros(0, 6), torch.zeros(4, 6)):
        assert torch.equal(null_space_projector(nothing, energy=0.9), torch.eye(6))
        assert torch.equal(null_space_projector(nothing, rank=0), torch.eye(6))
    padded = torch.cat([X[:3], torch.zeros(5, 6)])
    torch.testing.assert_close(
        null_space_projector(padded, energy=0.9), null_space_projector(X[:3], energy=0.9)
    )


@pytest.mark.parametrize(
    "arguments", [{}, {"rank": 1, "energy": 0.5}, {"rank": -1}, {"energy": -0.1}, {"energy": 1.1}]
)
def test_bad_ranks_and_energies_are_refused(arguments):
    with pytest.raises(ValueError, match=r"^(rank|energy)="):
        null_space_projector(rows(4, 3), **arguments)


def test_own_directions_lie_in_the_range_of_the_projector_and_groups_do_not_share_them():
    P = null_space_projector(rows(4, 12), energy=1.0)
    groups = [rows(5, 12, seed=1), rows(5, 12, seed=2)]
    U = own_directions(P, groups, 2)
    assert U.shape == (12, 4)
    torch.testing.assert_close(U.T @ U, torch.eye(4, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(P.double() @ U, U, atol=1e-6, rtol=0)
    top = torch.linalg.svd(groups[0].double() @ P.double()).Vh[:2].T
    torch.testing.assert_close(U[:, :2] @ U[:, :2].T, top @ top.T, atol=1e-6, rtol=0)
    assert own_directions(P, [groups[0], groups[0][:1]], 5).shape == (
        12,
        5,
    )  # five rows hold no sixth direction
    assert own_directions(torch.zeros(12, 12), groups, 2).shape == (12, 0)
    assert own_directions(P, [], 2).shape == (12, 0)


# -------------------------------------------------------------------------------------- regularizer
def begun(regularizer: NullSpace, scope) -> dict:
    return regularizer.begin_request(scope, Pull())


def relative_change(scope, prompts: list[str]) -> float:
    """Largest ||dW t|| / (||dW|| ||t||) over keys and values and every token vector t of the
    prompts.
    """
    T = text_vectors(scope.model, prompts)
    changes = subtract(scope.params, scope.base).values()
    return max(
        ((change @ T).norm(dim=0) / (change.norm() * T.norm(dim=0))).max().item()
        for change in changes
    )


def test_the_record(make_scope):
    scope = make_scope()
    record = begun(NullSpace(energy=0.95, target_rank=2), scope)
    assert record["prompts"] == {"names": 21 * 4, "anchors": 4, "empty": 1}
    assert len(record["auxiliary"]) == 21
    assert not {"torch light", "lava flow", "fog bank"} & set(record["auxiliary"])
    assert record["energy"] >= 0.95
    assert begun(NullSpace(rank=record["rank"], energy=None), scope)["energy"] == pytest.approx(
        record["energy"], rel=1e-6
    )
    assert begun(NullSpace(rank=record["rank"] - 1, energy=None), scope)["energy"] < 0.95
    assert 0 < record["target_moved"] < record["target_outside_subspace"] < 1
    json.dumps(record)


def test_retained_names_and_earlier_targets_are_named_only_when_they_may_be(make_scope):
    named = begun(NullSpace(names=NameSource(retained=True)), make_scope())["auxiliary"]
    assert {"lava flow", "fog bank"} <= set(named)
    assert "torch light" not in begun(NullSpace(), make_scope(request=2))["auxiliary"]
    assert "snow drift" not in begun(NullSpace(), make_scope(request=2))["auxiliary"]


def test_every_source_counts_as_much_however_many_prompts_it_holds(make_scope, tmp_path):
    """Two prompts of a file weigh as much as the single empty one."""
    scope, moved = make_scope(), {}
    path = tmp_path / "prompts.txt"
    path.write_text("a quilt\na map\n")
    for sources, file in (
        (("empty",), None),
        ((), str(path)),
        (("empty",), str(path)),
        (("names",), str(path)),
    ):
        regularizer = NullSpace(
            rank=2,
            energy=None,
            target_rank=None,
            scaled=False,
            sources=sources,
            file=file,
            earlier=0,
        )
        record = begun(regularizer, scope)
        moved[sources, file] = regularizer._projector
        assert set(record["prompts"]) == {*sources, *(["file"] if file else [])}
    X = [text_vectors(scope.model, prompts).T for prompts in ([""], ["a quilt", "a map"])]
    both = torch.cat([part / len(part) ** 0.5 for part in X])
    torch.testing.assert_close(
        moved[("empty",), str(path)], null_space_projector(both, rank=2), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        moved[("empty",), None], null_space_projector(X[0], rank=2), atol=1e-5, rtol=0
    )


def test_the_number_of_prompts_is_bounded_and_the_first_hold_every_name(make_scope):
    scope, regularizer = make_scope(), NullSpace(prompts=15, names=NameSource(number=12))
    names, kept = regularizer.kept_prompts(scope)
    assert len(names) == 12
    assert len(kept["names"]) == 15
    assert all(any(name in prompt for prompt in kept["names"]) for name in names)
    assert kept["names"][:2] == [
        f"a ball in the style of {names[0]}",
        f"a box in the style of {names[1]}",
    ]


def test_names_with_quotes_slashes_braces_and_other_scripts(make_scope, tmp_path):
    path = tmp_path / "names.txt"
    odd = [
        "artist's",
        '"quoted"',
        "19th/20th dot",
        "{caption}",
        "art d\u00e9co",
        "\u65e5\u672c\u753b",
        "100% wool",
    ]
    path.write_text("\n".join(odd), encoding="utf-8")
    regularizer = NullSpace(names=NameSource("file", str(path)), energy=0.99)
    record = begun(regularizer, make_scope())
    assert sorted(record["auxiliary"]) == sorted(odd)
    assert record["prompts"]["names"] == 7 * 4
    assert regularizer._projector.isfinite().all()


@pytest.mark.parametrize("group", ["kv_xattn", "xattn"])
def test_only_steps_of_keys_and_values_are_projected(make_scope, group):
    scope, regularizer = make_scope(group=group), NullSpace(energy=0.9, target_rank=None)
    begun(regularizer, scope)
    before = snapshot(scope.params)
    with torch.no_grad():
        for parameter in scope.params.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved = snapshot(scope.params)
    regularizer.on_step(scope.params, before)
    for name, parameter in scope.params.items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            expected = before[name] + (moved[name] - before[name]) @ regularizer._projector
            assert torch.equal(parameter, expected)
            assert not torch.equal(parameter, moved[name])
        else:
            assert torch.equal(parameter, moved[name])


def test_kept_prompts_do_not_move_and_the_target_does(make_scope, settings):
    scope = make_scope()
    kept = [
        prompt
        for prompts in NullSpace(names=NameSource(number=4)).kept_prompts(scope)[1].values()
        for prompt in prompts
    ]
    assert len(kept) == 4 * 4 + 4 + 1
    for target_rank in (None, 1):
        assign(scope.params, scope.base)
        regularizer = NullSpace(
            energy=1 - 1e-6, target_rank=target_rank, names=NameSource(number=4)
        )
        erase(scope, Pull(), {"nullspace": regularizer}, settings(steps=3, lr=1e-2))
        assert relative_change(scope, kept) < 5e-3
    assert relative_change(scope, ["a ball in the style of torch light"]) > 0.3
    changes = subtract(scope.params, scope.base).values()
    assert all(
        torch.linalg.matrix_rank(change, rtol=1e-3) == 1 for change in changes
    )  # target_rank=1: a single direction


def test_earlier_targets_stay_as_unlearned_as_they_are(make_scope):
    """The more directions of an earlier target's text are left alone, the less a step moves it."""
    scope, moved = make_scope(request=2), {}
    T = text_vectors(
        scope.model,
        [f"a {caption} in the style of torch light" for caption in scope.sequence.captions],
    )
    for earlier in (0, 1, 12):
        regularizer = NullSpace(energy=0.9, scaled=False, earlier=earlier)
        begun(regularizer, scope)
        moved[earlier] = ((regularizer._projector @ T).norm() / T.norm()).item()
    assert moved[12] < moved[1] < moved[0]
    assert moved[12] < 0.2 * moved[0]


def test_a_scaled_step_moves_the_targets_text_as_much_as_an_unprojected_one(make_scope):
    """||T P|| = ||T|| over all positions of its prompts: every target is moved alike by one step
    size.
    """
    for request, name in ((1, "torch light"), (2, "snow drift")):
        scope, regularizer = make_scope(request=request), NullSpace()
        begun(regularizer, scope)
        T = text_vectors(
            scope.model,
            [f"a {caption} in the style of {name}" for caption in scope.sequence.captions],
        ).T
        assert (T @ regularizer._projector).norm().item() == pytest.approx(
            T.norm().item(), rel=1e-4
        )


def test_requests_with_several_targets_move_one_direction_for_each(make_scope):
    scope = make_scope()
    both = dataclasses.replace(scope.request, index=2, plan="simultaneous")
    regularizer = NullSpace(scaled=False)
    record = begun(regularizer, dataclasses.replace(scope, request=both))
    assert regularizer._projector.trace().item() == pytest.approx(2, abs=1e-4)
    assert not {"torch light", "snow drift"} & set(record["auxiliary"])


def test_a_target_with_nothing_outside_the_subspace_is_warned_of(make_scope, caplog):
    with caplog.at_level(logging.WARNING, logger="cu_runner"):
        record = begun(NullSpace(rank=512, energy=None), make_scope())
    assert record["target_moved"] == 0
    assert record["rank"] == 512
    assert "leaves nothing of torch light to unlearn" in caplog.text


def test_bad_settings_are_refused(make_scope, tmp_path):
    for arguments, message in (
        ({"rank": 3}, r"^reg.nullspace: rank=3 and energy=0.97; give exactly one"),
        ({"energy": None}, r"^reg.nullspace: rank=None and energy=None"),
        ({"sources": ()}, r"^reg.nullspace.sources is empty"),
        ({"contexts": ("no place",)}, r"^reg.nullspace.contexts: 'no place' lacks the placeholder"),
        ({"file": str(tmp_path / "gone")}, r"^reg.nullspace.file=.*gone: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            begun(NullSpace(**arguments), make_scope())
    scope = make_scope()
    outside = {"conv_in.weight": scope.model.denoiser.conv_in.weight}
    with pytest.raises(
        ValueError, match=r"^reg.nullspace projects weights that are linear in the text"
    ):
        begun(NullSpace(), dataclasses.replace(scope, params=outside))


def test_a_second_request_does_not_depend_on_the_first(make_scope, settings):
    base, ends = make_scope().base, []
    for requests in ((1, 2), (2,)):
        regularizer, method = NullSpace(energy=0.9), ConAbl(num_anchors=4)
        for request in requests:
            scope = make_scope(request)
            assign(scope.params, base)
            erase(
                dataclasses.replace(scope, start=base, base=base),
                method,
                {"nullspace": regularizer},
                settings(),
            )
        ends.append(snapshot(scope.params))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in base)
    assert not any(torch.equal(ends[0][name], base[name]) for name in base)


def test_it_runs_with_gradproj(in_process, filled_cache, tmp_path):
    status, out, error = in_process(*SMOKE, "reg=[gradproj,nullspace]")
    assert status == 0, error
    record = json.loads(
        (run_directory(out, tmp_path) / "steps" / "02").joinpath("step.json").read_text()
    )
    assert record["training"]["regularizers"]["nullspace"]["prompts"] == {
        "names": 20 * 4,
        "anchors": 4,
        "empty": 1,
    }
