"""The studies of what unlearning does to the weights: taylor, masks and neighbourhood, by hand."""

import math
from types import SimpleNamespace

import masks
import neighbourhood
import numpy as np
import pandas as pd
import pytest
import study_statistics
import taylor
import torch
from conftest import SMOKE
from safetensors.torch import save_file
from study_statistics import distinct_pairs, over_items, resamples
from test_studies import call, script  # noqa: F401, fixtures
from torch import nn

from cu_runner.regularizers.selft import SelFT
from cu_runner.store.cache import MemoryCache
from cu_runner.store.run_record import read_run


# ----------------------------------------------------------------------------------- pairs of items
def test_distinct_pairs_of_a_resample():
    matrix = np.array([[0, 1, 2], [1, 0, 3], [2, 3, 0]])
    assert distinct_pairs(matrix, np.arange(3)).tolist() == [1, 2, 3]
    assert distinct_pairs(matrix, np.array([2, 0, 2])).tolist() == [2, 2]  # (2, 2) is no pair


def test_resamples_are_the_same_each_time_and_have_pairs():
    drawn = resamples(2)
    assert all(sorted(items.tolist()) == [0, 1] for items in drawn)  # the others are one item twice
    assert 200 < len(drawn) < 300
    assert all(np.array_equal(*both) for both in zip(drawn, resamples(2), strict=True))
    assert len(resamples(12)) == study_statistics.RESAMPLES


def test_intervals_over_items_are_percentiles():
    values = [*map(float, range(101)), float("nan")]
    assert over_items(3, values) == pytest.approx((2.5, 97.5))
    assert all(map(math.isnan, over_items(2, values)))


# ------------------------------------------------------------------------------------------- taylor
class Scale:
    """A model that predicts power(w) x of images x, w per channel."""

    def __init__(self, weights: list[float], power: int) -> None:
        self.weight = nn.Parameter(torch.tensor(weights), requires_grad=False)
        self.power = power

    def predict(self, noisy, timesteps, text):
        return noisy * (self.weight**self.power).view(1, -1, 1, 1)


def scale_loss(power: int, weights: list[float], noise: list[list[float]]) -> taylor.RetentionLoss:
    """The mean over rows r and channels c of (w_c^power - noise_rc)^2."""
    model, wanted = Scale(weights, power), torch.tensor(noise)[..., None, None]
    number = len(noise)
    return taylor.RetentionLoss(
        model=model,
        params={"w": model.weight},
        noisy=torch.ones_like(wanted),
        noise=wanted,
        timesteps=torch.zeros(number),
        text=torch.zeros(number),
        batch_size=1,
        rows_sha256=f"{power} {noise}",
    )


def test_gradient_hessian_and_its_largest_eigenvalue_by_hand():
    loss = scale_loss(2, [0.0, 1.0, 0.5], [[3.0, 0.25, 0.0], [3.0, 0.25, 2.0]])
    # (0 - 3)^2 = 9, (1 - 1/4)^2 = 9/16, (1/4 - 0)^2 = 1/16, (1/4 - 2)^2 = 49/16
    assert loss.values().tolist() == pytest.approx([(9 + 10 / 16) / 3, (9 + 58 / 16) / 3])
    # with e the mean noise g = 4 w (w^2 - e) / 3, H = (12 w^2 - 4 e) / 3 on the diagonal
    assert loss.gradient().tolist() == pytest.approx([0, 1, -0.5])
    assert loss.hessian_times(torch.tensor([1.0, 2.0, 3.0])).tolist() == pytest.approx(
        [-4, 22 / 3, -1]
    )
    assert loss.curvature(MemoryCache()) == pytest.approx(-4, abs=0.04)  # and not 11 / 3
    assert not loss.params["w"].requires_grad


def test_a_curvature_that_was_found_is_not_looked_for_again(monkeypatch):
    found = []
    monkeypatch.setattr(
        taylor.RetentionLoss,
        "_largest_eigenvalue",
        lambda self: found.append(self.params["w"].tolist()) or float(len(found)),
    )
    cache, one = MemoryCache(), scale_loss(2, [1.0, 2.0], [[0.0, 0.0]])
    assert [one.curvature(cache), one.curvature(cache)] == [1.0, 1.0]
    # other weights, and other rows
    assert scale_loss(2, [1.0, 3.0], [[0.0, 0.0]]).curvature(cache) == 2.0
    assert scale_loss(2, [1.0, 2.0], [[0.0, 1.0]]).curvature(cache) == 3.0
    assert one.curvature(cache) == 1.0


def test_expansion_by_hand():
    point = taylor.Point(torch.zeros(1), torch.tensor([3.0, 4.0]), curvature=-2.0)
    found = taylor.expansion(point, torch.tensor([0.0, 2.0]), torch.tensor([1.0, -3.0]))
    assert found == {
        "step": 2.0,
        "gradient": 5.0,
        "curvature": -2.0,
        "first": 8.0,
        "second": -3.0,
        "bound": 5 * 2 + 2 * 2**2 / 2,
    }


def test_a_change_of_loss_has_an_interval_over_its_rows():
    before = torch.zeros(4)
    found = taylor.measured(before, torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert found["dL"] == 3
    assert 1 < found["dL from"] < 3 < found["dL to"] < 6
    for rows in (torch.ones(4), torch.ones(1)):
        found = taylor.measured(before[: len(rows)], rows)
        assert found["dL"] == 1
        assert math.isnan(found["dL from"])


class Weights:
    """Weights of a loss above a base; a change is read from the place where a run has it."""

    def __init__(self, params: dict[str, nn.Parameter]) -> None:
        self.params = params
        self.base = {name: weight.clone() for name, weight in params.items()}

    def read(self, change: list[float]) -> taylor.Delta:
        return {"w": torch.tensor(change)}

    def set(self, change: taylor.Delta | None = None) -> None:
        for name, weight in self.params.items():
            weight.copy_(self.base[name] + (change[name] if change else 0))


def run_of(*changes: list[float]) -> SimpleNamespace:
    """A run whose requests left these changes of the untouched weights."""
    number = len(changes) + 1
    table = {"concept": [f"c{i}" for i in range(number)], "RA_I": [90.0, 70.0, 40.0][:number]}
    table = pd.DataFrame(table | {"RA_C": [80.0, 75.0, 75.0][:number]})
    return SimpleNamespace(
        records=range(number), weights=lambda i: changes[i - 1], table=table, seed=0
    )


def test_the_expansion_is_exact_where_the_loss_is_quadratic():
    loss = scale_loss(1, [1.0, 2.0, 0.0], [[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    run = run_of([0.5, -1.0, 0.0], [1.0, 1.0, -2.0])
    path = taylor.along_the_path(loss, run, (None, Weights(loss.params), MemoryCache()))
    assert path[["change", "request"]].to_numpy().tolist() == [
        ["the request", 1],
        ["the whole path", 1],
        ["the request", 2],
        ["the whole path", 2],
    ]
    # L = sum_c ((w_c - m_c)^2 + var_c) / 3, m = (1/2, 1, 1): 1/4 1 1, then 1 0 1, then 9/4 4 9
    assert path["dL"].tolist() == pytest.approx([-0.25 / 3, -0.25 / 3, 13.25 / 3, 13 / 3])
    assert (path["first"] + path["second"]).tolist() == pytest.approx(path["dL"].tolist())
    assert path["curvature"].tolist() == pytest.approx([2 / 3] * 4, rel=0.01)
    assert path["step"][2] == pytest.approx((0.5**2 + 2**2 + 2**2) ** 0.5)
    assert path["L before"][2] == pytest.approx(path["L before"][0] + path["dL"][0])
    assert path["RA_I lost"].tolist() == [20, 20, 30, 50]
    assert path["RA_C lost"].tolist() == [5, 5, 0, 5]
    assert (path["dL"].abs() <= path["bound"]).all()


def test_curvature_is_that_at_the_start_of_a_change():
    loss = scale_loss(2, [1.0, 1.0, 1.0], [[0.0, 0.0, 0.0]])
    path = taylor.along_the_path(
        loss,
        run_of([1.0, 0.0, 0.0], [3.0, 0.0, 0.0]),
        (None, Weights(loss.params), MemoryCache()),
    )
    # L = sum w^4 / 3: g = 4 w^3 / 3, H = 4 w^2; d = 1 and 1 from w = 1, 2 from 2, 3 from 1
    assert path["first"].tolist() == pytest.approx([4 / 3, 4 / 3, 64 / 3, 4])
    assert path["second"].tolist() == pytest.approx([2, 2, 32, 18])
    assert path["curvature"].tolist() == pytest.approx([4, 4, 16, 4], rel=0.01)


def test_a_request_that_was_not_evaluated_is_measured_by_the_study(monkeypatch):
    loss, asked = scale_loss(2, [1.0, 1.0, 1.0], [[0.0, 0.0, 0.0]]), []
    run = run_of([1.0, 0.0, 0.0], [3.0, 0.0, 0.0])
    run.table.loc[1, ["RA_I", "RA_C"]] = math.nan

    def measure(run, index, change, loaded, cache):
        asked.append((index, change["w"].tolist()))
        return {"UA": 100.0, "RA_I": 80.0, "RA_C": 60.0}

    monkeypatch.setattr(taylor, "measure_change", measure)
    path = taylor.along_the_path(loss, run, (None, Weights(loss.params), MemoryCache()))
    assert asked == [(1, [1.0, 0.0, 0.0])]
    assert path["RA_I lost"].tolist() == [10, 10, 40, 50]
    assert path["RA_C lost"].tolist() == [20, 20, -15, 5]


def test_what_the_expansion_explains_by_hand():
    path = pd.DataFrame(
        {
            "run": "seed 0",
            "change": "the request",
            "dL": [1.0, -1.0, 2.0],
            "bound": [2.0, 0.5, 8.0],
            "first": [1.0, -1.0, 0.0],
            "second": [0.0, 0.0, 3.0],
            "RA_I lost": [4.0, 1.0, 16.0],
            "RA_C lost": [0.0, 0.0, 0.0],
        }
    )
    row = taylor.explained(path).iloc[0]
    assert row[["n", "holds", "dL / bound"]].tolist() == [3, 2, 0.5]
    assert row["first order"] == pytest.approx(1 - 4 / 6)
    assert row["second order"] == pytest.approx(1 - 1 / 6)
    assert row["r, RA-I lost"] == pytest.approx(1)
    assert math.isnan(row["r, RA-C lost"])
    assert math.isnan(taylor.explained(path.assign(dL=0.0)).iloc[0]["first order"])


def test_a_random_change_has_the_norm_of_every_tensor():
    change = {"a": torch.tensor([3.0, 4.0, 0.0]), "b": torch.full((2, 2), 0.5)}
    found = taylor.random_like(change, 0)
    assert {name: part.norm().item() for name, part in found.items()} == pytest.approx(
        {"a": 5, "b": 1}
    )
    assert found["b"].shape == (2, 2)
    assert not torch.allclose(found["a"], change["a"], atol=0.1)
    assert torch.equal(found["a"], taylor.random_like(change, 0)["a"])
    assert not torch.equal(found["a"], taylor.random_like(change, 1)["a"])


def test_interventions_scale_turn_and_undo():
    weights = Weights({"w": nn.Parameter(torch.zeros(2), requires_grad=False)})
    found = taylor.interventions(run_of([1.0, 0.0], [4.0, 8.0]), (None, weights))
    random = found.pop("random, the same norms")
    assert random["w"].norm().item() == pytest.approx(80**0.5)
    assert {name: change["w"].tolist() for name, change in found.items()} == {
        "the run's own": [4, 8],
        "scaled to 0.75": [3, 6],
        "scaled to 0.5": [2, 4],
        "scaled to 0.25": [1, 2],
        "last half undone": [1, 0],
        "first half undone": [3, 8],
    }
    one = taylor.interventions(run_of([1.0, 0.0]), (None, weights))
    assert not any("undone" in name for name in one)


def test_interventions_of_seeds_by_hand():
    columns = {"drift": [1.0, 2.0, 3.0], "dL": [0.1, 0.2, 0.6], "UA": 100.0, "RA_C": math.nan}
    table = pd.DataFrame({"weights": "scaled", "RA_I": [40.0, 50.0, 60.0], **columns})
    row = taylor.over_runs(table, {"UA": 100, "RA_I": 10_000, "RA_C": 100}).iloc[0]
    assert row[["seeds", "drift", "RA_I"]].tolist() == [3, 2, 50]
    assert row["dL"] == pytest.approx(0.3)
    # t_.975 with 2 degrees of freedom is 4.3027
    half = 4.3027 * 10 / 3**0.5
    assert row[["RA_I from", "RA_I to"]].tolist() == pytest.approx([50 - half, 50 + half], abs=0.01)
    assert row["UA from"] == pytest.approx(96.30, abs=0.01)  # Wilson's of 100 of 100 images
    assert math.isnan(row["RA_C to"])


@pytest.mark.slow
def test_taylor_from_end_to_end(call, run_copy, tmp_path, jobs_in_forks, monkeypatch):  # noqa: F811
    monkeypatch.setattr(taylor, "IMAGES", 4)
    monkeypatch.setattr(taylor.RetentionLoss, "_largest_eigenvalue", lambda self: -2.0)
    monkeypatch.setattr(taylor, "SCALES", (0.5,))
    status, _, err = call("taylor", "seed=0", *SMOKE, "--output", "found")
    assert (status, err) == (0, "")
    table = pd.read_csv(tmp_path / "found/taylor.csv")
    path, changes = (table[table["part"] == part] for part in ("path", "interventions"))
    assert path["request"].tolist() == [1, 1, 2, 2]
    run = read_run(run_copy)
    own = changes[changes["weights"] == "the run's own"].iloc[0]
    assert own["drift"] == pytest.approx(run.table["drift_l2"].iloc[-1], rel=1e-5)
    assert (
        own[["UA", "RA_I", "RA_C"]].tolist() == run.table[["UA", "RA_I", "RA_C"]].iloc[-1].tolist()
    )
    # the loss of the run's own weights, come to by both ways
    assert own["dL"] == pytest.approx(path["dL"].iloc[-1], rel=1e-3)
    assert changes["drift"].iloc[1] == pytest.approx(own["drift"] / 2, rel=1e-5)
    assert (path["bound"] > path["first"].abs()).all()
    assert taylor.images_behind(run) == {"UA": 4, "RA_I": 4, "RA_C": 8}
    assert "4 images in L" in (tmp_path / "found/taylor.md").read_text()


# -------------------------------------------------------------------------------------------- masks
def mask(first: list[int], second: list[int]) -> masks.Mask:
    return {"first": torch.tensor(first).bool(), "second": torch.tensor(second).bool()}


def test_overlap_and_both_chances_by_hand():
    one = mask([1, 1, 0, 0], [0, 0, 0, 0, 0, 0])
    two = mask([1, 0, 0, 0], [0, 0, 0, 0, 0, 1])
    # 1 of 3 is common; anywhere 2 x 2 / 10 are: 0.4 / 3.6; within layers 2 x 1 / 4: 0.5 / 3.5
    found = {"jaccard": 1 / 3, "by chance": 1 / 9, "by chance within layers": 1 / 7}
    assert masks.overlap(one, two) == pytest.approx(found)
    extra = {"of one alone": torch.ones(9).bool()}
    assert masks.overlap(one | extra, two) == pytest.approx(found)
    empty = mask([0] * 4, [0] * 6)
    assert masks.overlap(empty, empty) == dict.fromkeys(masks.MEASURES, 0)


ALIKE = [mask([1, 1, 0, 0], [0]), mask([1, 1, 0, 0], [0]), mask([0, 0, 1, 1], [0])]


def test_overlap_between_concepts_is_over_pairs():
    found = masks.between_concepts(ALIKE)
    assert (found["pairs"], found["jaccard"]) == (3, pytest.approx(1 / 3))
    assert found["by chance within layers"] == pytest.approx(1 / 3)  # 2 x 2 / 4 of 3
    # a draw of the first two alone, or of one of them and the last, is common
    assert (found["from"], found["to"]) == (0, 1)
    assert math.isnan(masks.between_concepts(ALIKE[:2])["from"])
    assert masks.between_concepts(ALIKE[:1]) == {"pairs": 0}


def test_overlap_of_the_same_concept_is_over_concepts():
    half = mask([0, 1, 1, 0], [0])  # has one of three in common with each of ALIKE
    found = masks.of_same_concept([(ALIKE, [half] * 3), (ALIKE, ALIKE)])
    # per concept the mean of 1/3 and 1, without spread
    assert (found["pairs"], found["jaccard"]) == (6, pytest.approx(2 / 3))
    assert (found["from"], found["to"]) == pytest.approx((2 / 3, 2 / 3))
    wide = masks.of_same_concept([(ALIKE, [ALIKE[0]] * 3)])  # 1, 1, 0: within 0 and 1
    assert (wide["jaccard"], wide["from"], wide["to"]) == (pytest.approx(2 / 3), 0, 1)


def test_every_pair_that_differs_in_one_thing_is_compared():
    labels = [f"conabl, loss, seed {seed}" for seed in (0, 1, 2)]
    labels += [f"{name}, loss, seed 0" for name in ("esd", "gradient_ascent")]
    made = {label: ALIKE for label in [*labels, masks.TRAJECTORY, masks.RANDOM]}
    made["esd, loss, seed 0"] = [ALIKE[2], ALIKE[2], ALIKE[0]]
    table = masks.compare(made).set_index(["differs", "between"])
    assert table.index.get_level_values("differs").tolist() == [
        *["concept"] * 5,
        "seed",
        "scoring",
        *["method"] * 3,
    ]
    assert table.loc[("seed", "conabl, loss"), ["pairs", "jaccard"]].tolist() == [9, 1]
    assert table.loc[("method", "conabl and esd"), "jaccard"] == 0
    assert table.loc[("method", "conabl and gradient_ascent"), "times chance"] == pytest.approx(
        1 / ((4 / 5) / (4 - 4 / 5))
    )


@pytest.mark.slow
def test_masks_from_end_to_end(call, filled_cache, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(masks, "SEEDS", (0, 1))
    monkeypatch.setattr(masks, "METHODS", {"conabl": []})
    small = ["reg.selft.steps=2", "reg.selft.num_batches=1"]
    choose, chosen = SelFT.choose, []
    monkeypatch.setattr(
        SelFT, "choose", lambda self, *given: chosen.append(choose(self, *given)) or chosen[-1]
    )
    for _ in range(2):  # the second time all masks are cached
        status, out, err = call("masks", *SMOKE, *small, "--output", "found")
        assert (status, err.strip()) == (0, "")
        assert len(chosen) == 6  # two concepts, three settings
    kept = {sum(int(part.sum()) for part in each.values()) for each in chosen}
    assert len(kept) == 1  # of all
    assert out.startswith("conabl, loss, seed 0")
    table = pd.read_csv(tmp_path / "found/masks.csv").set_index(["differs", "between"])
    found = masks.overlap(chosen[0], chosen[1])["jaccard"]
    assert table.loc[("concept", "conabl, loss, seed 0"), "jaccard"] == pytest.approx(
        found, rel=1e-5
    )
    assert table.loc[("seed", "conabl, loss"), "pairs"] == 2
    assert "6 masks" in (tmp_path / "found/masks.md").read_text()


# ------------------------------------------------------------------------------------ neighbourhood
def test_names_are_targets_retained_and_the_rest_of_the_vocabulary(sequence):
    names = [concept.name for concept in neighbourhood.names_of(sequence)]
    assert names[:4] == ["torch light", "snow drift", "lava flow", "fog bank"]
    assert (len(names), {*names}) == (len({*names}), {*sequence.vocabulary})


KEYS = {
    "a.attn2.to_k.weight": torch.tensor([[3.0, 0.0]]),
    "b.attn2.to_k.weight": torch.tensor([[0.0, 4.0]]),
    "b.attn2.to_v.weight": torch.tensor([[1.0, 1.0]]),
}


def test_distances_of_keys_and_values_by_hand():
    text = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert neighbourhood.distances(text)[1].tolist() == pytest.approx([1, 0, 2**0.5])
    found = neighbourhood.distances_of_outputs(KEYS, text)
    assert {place: matrix[[0, 0, 1], [1, 2, 2]].tolist() for place, matrix in found.items()} == {
        ("keys", "a"): [3, 0, 3],
        ("keys", "b"): [0, 4, 4],
        ("keys", "all layers"): [3, 4, 5],
        ("values", "b"): [1, 1, 0],
        ("values", "all layers"): [1, 1, 0],
    }


def matrix_of(*pairs: float) -> np.ndarray:
    """The symmetric matrix with these entries (0, 1), (0, 2), (1, 2)."""
    found = np.zeros((3, 3))
    found[np.triu_indices(3, 1)] = pairs
    return found + found.T


def test_rank_correlation_over_pairs_of_names():
    outputs = {
        ("keys", "same"): matrix_of(10, 20, 21),
        ("keys", "turned"): matrix_of(3, 2, 1),
        ("keys", "ties"): matrix_of(1, 7, 7),
        ("keys", "flat"): matrix_of(5, 5, 5),
    }
    found = neighbourhood.rhos(matrix_of(1, 2, 3), outputs)
    values = [rho[0] for rho in found.values()]
    # ranks 1 2 3 against 1 2.5 2.5: 1.5 / sqrt(2 x 1.5)
    assert values == pytest.approx([1, -1, 0.8660254, math.nan], nan_ok=True)
    assert {len(rho) for rho in found.values()} == {1 + len(resamples(3))}
    # any resample keeps the order
    assert np.nanmin(found["keys", "same"]) == pytest.approx(1)


def test_the_interval_of_a_change_is_of_the_same_names_before_and_after():
    place, other = ("keys", "a"), ("values", "a")
    before = np.array([0.9, *np.linspace(0, 1, 101)])
    table = neighbourhood.compare(
        3, {place: before, other: before}, {place: before - 0.1, other: before}
    )
    keys = table.iloc[0]
    assert keys[["of", "layer", "before", "after"]].tolist() == ["keys", "a", 0.9, 0.9 - 0.1]
    assert keys[["before from", "before to"]].tolist() == pytest.approx([0.025, 0.975])
    assert keys[["change", "change from", "change to"]].tolist() == pytest.approx([-0.1] * 3)
    assert table.iloc[1]["change"] == 0


def test_weights_after_a_run_are_compared_group_by_group(tmp_path):
    # one key turns the order of three names round; the values are not in the change
    text = torch.tensor([[0.0, 0.0], [1.0, 0.0], [3.0, 1.0]])
    base = {name: KEYS[name] for name in ("a.attn2.to_k.weight", "b.attn2.to_v.weight")}
    save_file({"a.attn2.to_k.weight": torch.tensor([[-2.0, -7.0]])}, tmp_path / "delta")
    run = SimpleNamespace(records=range(3), weights=lambda index: tmp_path / "delta")
    groups = {"all": np.arange(3), "two": np.array([0, 2])}
    table = neighbourhood.table_of({"one": run, "again": run}, text, base, groups)
    assert table["names"].unique().tolist() == ["all (3)", "two (2)"]
    assert table["run"].tolist() == [*["one"] * 4, *["again"] * 4] * 2
    keys, values = (table.iloc[0], table.iloc[2])
    assert (keys["of"], values["of"]) == ("keys", "values")
    # |x - y| = 1, 3.2, 2.2; 3 x: 3, 9, 6; x - 7 y: 1, 4, 5
    assert keys[["before", "after", "change"]].tolist() == pytest.approx([1, 0.5, -0.5])
    assert values[["before", "after", "change"]].tolist() == pytest.approx([1, 1, 0])


@pytest.mark.slow
def test_neighbourhood_from_end_to_end(call, run_copy, tmp_path, jobs_in_forks, monkeypatch):  # noqa: F811
    monkeypatch.setattr(neighbourhood, "SEEDS", (0,))
    monkeypatch.setattr(neighbourhood, "REGULARIZERS", ("none",))
    monkeypatch.setattr(study_statistics, "RESAMPLES", 4)
    status, _, err = call("neighbourhood", *SMOKE, "--output", "found")
    assert (status, err) == (0, "")
    table = pd.read_csv(tmp_path / "found/neighbourhood.csv")
    number = len(read_run(run_copy).config["sequence"]["targets"])
    names = sorted({int(name.split("(")[1].strip(")")) for name in table["names"]})
    assert names[1] - names[0] == number
    assert table["before"].between(-1, 1).all()
    assert (table["change"] - (table["after"] - table["before"])).abs().max() < 1e-5
    assert (table["change"] != 0).any()  # the weights of the run are read
    text = (tmp_path / "found/neighbourhood.md").read_text()
    assert text.count("| none, seed 0 | ") == 4  # keys and values of both groups, all layers
    assert "| all layers |" not in text
