"""The studies: their statistics by hand, the runs that they ask for, their analyses on small
tables, their complaints.
"""

import dataclasses
import functools
import importlib
import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from commands import environment, run_forked
from conftest import SMOKE
from study_statistics import near_and_far, output_change, pearson, spearman, text_similarity

from cu_runner.concepts.entries import read_shipped
from cu_runner.concepts.sequence import Sequence
from cu_runner.models.parameters import select_parameters
from cu_runner.runtime.paths import shipped_dir
from cu_runner.schema.errors import LaunchError

SCRIPTS = Path(__file__).parents[2] / "scripts/studies"
STUDIES = (
    *("diagnostic", "ablation", "sensitivity", "scaling", "auxiliary", "order", "frontier"),
    *("crossdomain", "taylor", "masks", "neighbourhood", "served"),
)
STABLE_DIFFUSION = [
    "experiment=unlearncanvas_style",
    "model.path=m",
    "evaluator.paths.style=s",
    "evaluator.paths.object=o",
]


@pytest.fixture
def script(monkeypatch):
    """Returns script(name) -> the module of scripts/studies."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module


def make_study(script, tmp_path: Path, *overrides: str):
    return script("study").Study("a_study", "What it asks.", list(overrides), tmp_path / "written")


def cells_of(module: ModuleType, study, tmp_path: Path) -> dict[str, list[str]]:
    """The runs of a study, whatever it needs to name them."""
    if module.__name__ == "auxiliary":
        (tmp_path / "names.txt").write_text("stone\nwalnut ray\n")
        return module.cells(study, tmp_path / "names.txt")
    if module.__name__ == "sensitivity":
        sequence: Sequence = study.plan([]).sequence.build()
        return module.cells(study, sequence, list(sequence.vocabulary))
    if module.__name__ == "scaling":
        return module.cells(study, [0, 1])
    if module.__name__ == "taylor":
        return module.cells([0, 1])
    if module.__name__ == "frontier":
        (tmp_path / "prompts.txt").write_text("a tree image in {concept} style\n")
        return module.cells(study, [0, 1], tmp_path / "prompts.txt")
    if module.__name__ == "crossdomain":
        names = {"own": "lamp\nbell\n", "other": "amber\nhoney\n"}
        sources = (*names, "both", *module.PARTNERS)
        files = {source: tmp_path / f"{source}.txt" for source in sources}
        for source, file in files.items():
            file.write_text(names.get(source, "".join(names.values())))
        return module.cells(study, [0, 1], files)
    if module.__name__ in ("masks", "served"):
        return module.cells(study)
    return module.cells()


def metrics_table(**columns: list[float]) -> pd.DataFrame:
    number = len(next(iter(columns.values())))
    return pd.DataFrame({"request": range(number), **columns})


# --------------------------------------------------------------------------------------- statistics
def test_pearson_and_its_interval_by_hand():
    # deviations -2 -1 0 1 2 and -1 -2 1 0 2: r = 8 / 10; z = atanh 0.8 = 1.09861 -+ 1.95996 / sqrt
    # 2 = 1.38590
    found = pearson(pd.Series([1, 2, 3, 4, 5]), pd.Series([2, 1, 4, 3, 5]))
    assert found.number == 5
    assert (found.value, found.low, found.high) == pytest.approx((0.8, -0.27964, 0.98620), abs=1e-5)


def test_spearman_has_the_wider_interval_and_mean_ranks_for_ties():
    # the same ranks, but 1.95996 sqrt(1.06 / 2) = 1.42688
    found = spearman(pd.Series([1, 2, 3, 4, 50]), pd.Series([2, 1, 4, 3, 5]))
    assert (found.value, found.low, found.high) == pytest.approx((0.8, -0.31695, 0.98728), abs=1e-5)
    # ranks 1, 2.5, 2.5, 4 against 1 to 4: 4.5 / sqrt(4.5 * 5)
    assert spearman(pd.Series([1, 7, 7, 9]), pd.Series([1, 2, 3, 4])).value == pytest.approx(
        0.9486833
    )


def test_correlations_of_too_little():
    constant, rising = pd.Series([5.0, 5.0, 5.0, 5.0]), pd.Series([1.0, 2.0, 3.0, 4.0])
    assert np.isnan(pearson(rising, constant).value)
    assert pearson(rising, constant).number == 4
    three = pearson(rising[:3], pd.Series([1.0, 2.0, 4.0]))
    assert three.value == pytest.approx(0.981981)
    assert np.isnan(three.low)
    assert np.isnan(three.high)
    perfect = pearson(rising, -rising)
    assert (perfect.value, perfect.low, perfect.high) == pytest.approx((-1, -1, -1))


def test_the_papers_points_have_the_papers_correlation():
    paper = pd.read_csv(SCRIPTS / "paper_similarity.csv", comment="#")
    found = pearson(paper["cosine_similarity"], paper["accuracy_percent"])
    assert found.number == 12
    assert found.value == pytest.approx(-0.627, abs=0.002)  # the points are read off a plot


def test_near_and_far_halves():
    similarity = pd.Series({"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.9, "e": 0.3})
    assert near_and_far(similarity) == (["b", "d"], ["c", "e", "a"])


def test_text_similarity_is_the_cosine_of_all_positions(model):
    found = text_similarity(model, ["torch light", "snow drift"], ["torch light"], "style")
    assert found.columns.tolist() == ["torch light"]
    one, two = (
        model.encode_prompts(["torch light Style", "snow drift Style"])
        .hidden.numpy()
        .reshape(2, -1)
    )
    assert found.loc["torch light"].item() == pytest.approx(1)
    assert found.loc["snow drift"].item() == pytest.approx(
        one @ two / np.linalg.norm(one) / np.linalg.norm(two), abs=1e-6
    )


def test_output_change_by_hand():
    text = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])  # one prompt of two tokens
    base = {"k": torch.tensor([[3.0, 0.0]]), "v": torch.tensor([[0.0, 2.0]])}
    # W X: k gives 3 and 0, v gives 0 and 4, norm 5. (W' - W) X: k gives 1 and 2, v does not change
    assert output_change(base, {"k": torch.tensor([[1.0, 1.0]])}, text) == pytest.approx(5**0.5 / 5)
    assert output_change(base, {}, text) == 0


def test_output_change_of_the_model(model):
    base = select_parameters(model.denoiser, "kv_xattn")
    doubled = {name: weight.detach() for name, weight in base.items()}
    assert output_change(
        base, doubled, model.encode_prompts(["a tree image"]).hidden
    ) == pytest.approx(1)


# --------------------------------------------------------------------------------------------- runs
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param([], id="shapecanvas"),
        pytest.param(STABLE_DIFFUSION, id="stable_diffusion", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", STUDIES)
def test_the_runs_of_every_study_compose(script, tmp_path, name, overrides):
    study = make_study(script, tmp_path, *overrides)
    cells = cells_of(script(name), study, tmp_path)
    plans = [study.plan(cell) for cell in cells.values()]
    if not overrides:  # a value that a study tries may be the published one
        assert len({plan.directory for plan in plans}) == len(cells)
    # ewc and replay have no published settings; masks trains nothing
    assert all(plan.tuned for plan in plans) or overrides or name == "masks"
    for plan in plans:
        assert plan.sequence.build().targets
        assert plan.model.target == "cu_runner.models.load_model"
        assert ("unlearncanvas" in plan.resolved["sequence"]["name"]) == bool(overrides)


def test_semantic_has_the_runs_of_the_ablation(script):
    assert script("semantic").cells is script("ablation").cells
    assert [*script("ablation").cells()] == script("study").regularizers()


def test_the_user_names_the_seeds_and_the_page_says_so(script, tmp_path):
    module = script("study_seeds")
    seeds, study = module.take_seeds(make_study(script, tmp_path, "seed=3,4", "method=uce"))
    assert (seeds, study.overrides, study.own) == ([3, 4], ["method=uce"], ("seed=3,4",))
    assert module.take_seeds(make_study(script, tmp_path))[0] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"seed=x: .*seed=0,1,2"):
        module.take_seeds(make_study(script, tmp_path, "seed=0,x"))
    study.write(pd.DataFrame({"a": [1]}), script("study").panels(1, 1)[0], "Table.")
    assert "a_study.py seed=3,4 method=uce --output" in (study.output / "a_study.md").read_text()
    values, _ = make_study(script, tmp_path, "models=[a/b,c d]").take("models", [])
    assert values == ["a/b", "c d"]


def test_frontier_holds_the_multiplier_where_no_bound_asks_for_it(script, tmp_path):
    from cu_runner.methods._primal_dual import Duals

    study = make_study(script, tmp_path)
    module = script("frontier")
    cells = cells_of(module, study, tmp_path)
    assert len(cells) == 27 * 2
    sequence = study.plan([]).sequence.build()
    prompts = module.diversified_prompts(sequence)
    assert all(prompt.count("{concept}") == 1 for prompt in prompts)
    name = sequence.targets[0].prompt_name
    shown = {anchor for _, anchor in sequence.training_pairs(sequence.targets[0])}
    assert {prompt.replace("{concept}", name) for prompt in prompts} == {
        f"a {name} painting of {anchor}" for anchor in shown
    }
    for method, every in (("reverse_kl", 5), ("forward_kl", 1), ("likelihood", 5)):
        for bound in module.PROBLEMS[method].bounds:
            own = study.plan(cells[f"{method}, bound {bound:g}, seed 0"]).method.build()
            assert (own.bound, own.dual.every) == (bound, every)
    for method, sense in (("reverse_kl", "at least"), ("likelihood", "at most")):
        problem = module.PROBLEMS[method]
        plan = study.plan(cells[f"{method}, weight {problem.weights[1]:g}, seed 0"])
        assert len(plan.sequence.build().targets) == 4
        held = plan.method.build()
        initial = torch.tensor([0.7], dtype=torch.float64)
        bound = held.bound * initial
        limit = functools.partial(torch.clamp, max=held.cap)
        duals = Duals(held.dual, initial, bound, sense, limit)
        for measured in (0.7, 5.0, 1e-3):  # whatever the constraint does
            duals.note(torch.tensor([measured], dtype=torch.float64))
            duals.advance()
            assert duals.lam.tolist() == [problem.weights[1]]
        free = study.plan(cells[f"{method}, bound {problem.bounds[0]:g}, seed 0"]).method.build()
        assert (free.bound, free.cap) == (problem.bounds[0], max(problem.weights))
        assert free.dual.step_size < 1


def test_the_user_may_not_set_what_some_run_of_a_study_sets(script, tmp_path):
    cells = {"plain": ["reg=none"], "strong": ["reg=l2", "reg.l2.weight=3"]}
    make_study(script, tmp_path, "seed=3", "train.steps=2").check_own(cells)
    for words in (["reg.l2.weight=1"], ["+reg.l2.weight=1"], ["seed=3", "reg=l1"]):
        with pytest.raises(ValueError, match=r"^reg(\.l2\.weight)?: this study sets it itself"):
            make_study(script, tmp_path, *words).check_own(cells)
    study = make_study(script, tmp_path, "setting.stop_at=99")
    with pytest.raises(ValueError, match=r"^setting\.stop_at: this study sets it itself"):
        study.check_own({"plain": ["++setting.stop_at=95"]})


def test_masks_of_all_methods_are_of_one_size_and_of_keys_and_values(script, tmp_path):
    (tmp_path / "tuned").mkdir()
    cell = "models: [shapecanvas]\nconabl:\n  selft:\n    reg.selft.fraction: 0.3\n"
    (tmp_path / "tuned/smoke.yaml").write_text(cell)
    words = [f"hydra.searchpath=[file://{tmp_path}]", "sequence=smoke"]
    for overrides, fraction in ((words, 0.3), ([*words, "reg.selft.fraction=0.2"], 0.2)):
        study = make_study(script, tmp_path, *overrides)
        plans = [study.plan(cell) for cell in script("masks").cells(study).values()]
        fractions = [plan.regularizers["selft"].arguments["fraction"] for plan in plans]
        assert fractions == [fraction] * 6
        assert [plan.method.build().params for plan in plans] == ["kv_xattn"] * 6


def test_crossdomain_takes_as_many_names_of_either_domain(script, sequence):
    module = script("crossdomain")
    own = ["frost", "Lava-Flow", "Torch Light", "brass", "shared", "sage"]
    other = ["cloud", "tree", "cup", "Shared", "box", "house"]
    found = module.choose_names(sequence, own, other)
    # targets, what is retained in either domain and what is in both are left out
    assert sorted(found["own"]) == ["brass", "frost", "sage"]
    assert len(found["other"]) == 3
    assert {*found["other"]} < {"cloud", "cup", "box", "house"}
    assert found["both"] == [*found["own"], *found["other"]]
    assert module.choose_names(sequence, own, other) == found
    with pytest.raises(ValueError, match=r"^other: no name is left .* give other=LIST"):
        module.choose_names(sequence, own, ["tree", "star"])


def test_crossdomain_has_prompts_where_every_token_is_read(script, sequence, tmp_path):
    module, chosen = script("crossdomain"), {"own": ["moss"], "other": ["cup", "box"]}
    study = make_study(script, tmp_path, "sequence=smoke", "reg.gradproj.tokens=all")
    found = module.as_prompts(study, sequence, chosen)
    pairs = "a cup image in moss style\na box image in moss style\n"
    assert found == {
        "own": "an image in moss style\n",
        "other": "a cup image\na box image\n",
        "both": "an image in moss style\na cup image\na box image\n",
        "pairs": pairs,
        "more pairs": pairs,
        "pairs as trained": "a cup in the style of moss\na box in the style of moss\n",
    }
    study = make_study(script, tmp_path, "reg.gradproj.tokens=own")
    bare = module.as_prompts(study, sequence, chosen)
    assert (bare["both"], bare["pairs"]) == ("moss\ncup\nbox\n", "moss cup\nmoss box\n")


def test_crossdomain_pairs_every_name_equally_often(script):
    pair_up, own, other = script("crossdomain").pair_up, ["a", "b", "c"], ["x", "y", "z"]
    two = [("a", "x"), ("a", "y"), ("b", "y"), ("b", "z"), ("c", "z"), ("c", "x")]
    assert pair_up(own, other, 2) == two
    assert set(pair_up(own, other, 12)) == {(one, with_it) for one in own for with_it in other}
    assert len(pair_up(own, other, 12)) == 9


def test_crossdomain_finds_the_names_of_the_other_domain(script, tmp_path):
    module = script("crossdomain")
    own, other, study = module.take_names(make_study(script, tmp_path))
    assert own == read_shipped("shapecanvas_objects")
    assert other == read_shipped("shapecanvas_styles")
    assert study.plan(module.default_sequence(study)).sequence.build().domain == "object"
    styles = make_study(script, tmp_path, "sequence=shapecanvas_style")
    assert module.take_names(styles)[:2] == (other, own)
    words = ["sequence.vocabulary=[brick]", "other=[ruby_red,lime]"]
    own, other, study = module.take_names(make_study(script, tmp_path, *words))
    assert (own, other) == (["brick"], ["ruby red", "lime"])
    assert (study.overrides, study.own) == (words[:1], ("other=[ruby_red,lime]",))
    with pytest.raises(ValueError, match=r"^other: no list of style names .* give other=LIST"):
        module.take_names(make_study(script, tmp_path, words[0]))
    with pytest.raises(ValueError, match=r"^own=nowhere: no such list"):
        module.take_names(make_study(script, tmp_path, "own=nowhere"))


def test_crossdomain_on_stable_diffusion_has_names_left(script, tmp_path):
    module = script("crossdomain")
    words = shlex.split(module.ON_STABLE_DIFFUSION)
    study = make_study(script, tmp_path, *words[: words.index("--output")])
    own, other, study = module.take_names(study)
    sequence = study.plan(module.default_sequence(study)).sequence.build()
    assert (sequence.name, sequence.domain) == ("unlearncanvas_object", "object")
    assert len(module.choose_names(sequence, own, other)["both"]) > 200


def test_crossdomain_projects_off_all_names_of_a_file(script, tmp_path):
    study = make_study(script, tmp_path)
    cells = cells_of(script("crossdomain"), study, tmp_path)
    assert len(cells) == 8 * 2
    plan = study.plan(cells["projection, other, seed 1"])
    settings = plan.resolved["reg"]["gradproj"]
    assert settings["contexts"] == ["{concept}"]
    assert settings["auxiliary"] == {
        "source": "file",
        "name": str(tmp_path / "other.txt"),
        "number": 4,  # as many as both have
        "retained": False,
    }
    tuned = study.plan(cells["projection, as tuned, seed 1"])
    same = [each.resolved["reg"]["gradproj"]["energy"] for each in (plan, tuned)]
    assert same[0] == same[1]
    assert (plan.spine.seed, plan.spine.train.lr) == (1, tuned.spine.train.lr)
    assert plan.resolved["sequence"]["name"] == "shapecanvas_object"


def test_order_has_four_orders_and_three_seeds(script, tmp_path):
    study = make_study(script, tmp_path)
    plans = [study.plan(cell) for cell in script("order").cells().values()]
    assert len(plans) == 12
    assert {plan.resolved["sequence"]["order"] for plan in plans} == {
        "paper",
        "reversed",
        "shuffle-1",
        "shuffle-2",
    }
    assert sorted({plan.spine.seed for plan in plans}) == [0, 1, 2]


def test_scaling_makes_the_rows_that_are_named(script, tmp_path):
    module = script("scaling")
    rows, study = module.take_rows(make_study(script, tmp_path, "rows=uce,none"))
    assert rows == ["none", "uce"]
    assert list(module.cells(study, [0, 1], rows)) == [
        "none, seed 0",
        "none, seed 1",
        "uce, seed 0",
    ]
    with pytest.raises(ValueError, match="rows=ewc: no such row; allowed: none, l2, "):
        module.take_rows(make_study(script, tmp_path, "rows=none,ewc"))


def test_scaling_takes_100_styles_or_what_the_user_names(script, tmp_path):
    module = script("scaling")
    study = make_study(script, tmp_path)
    cells = module.cells(study, [0, 1, 2])
    assert len(cells) == 19  # six regularizers with three seeds, and UCE
    sequence = study.plan(cells["merge, seed 1"]).sequence.build()
    assert len(sequence.targets) == 100
    images = sum(len(sequence.evaluation_images([concept])) for concept in sequence.retain)
    assert images == 96
    assert study.plan(cells["uce, seed 0"]).method_name == "uce"
    other = make_study(script, tmp_path, "sequence=shapecanvas_tune")
    assert (
        other.plan(module.cells(other, [0])["merge, seed 0"]).sequence.build().name
        == "shapecanvas_tune"
    )
    wider = make_study(script, tmp_path, "sequence.cross_retain=[cup]")
    assert [
        concept.name
        for concept in wider.plan(module.cells(wider, [0])["l2, seed 0"])
        .sequence.build()
        .cross_retain
    ] == ["cup"]


def test_scaling_on_stable_diffusion_has_every_style_that_is_not_retained(script, tmp_path):
    module = script("scaling")
    words = shlex.split(module.on_stable_diffusion())
    study = make_study(
        script, tmp_path, *words[: words.index("--output")], *words[words.index("--output") + 2 :]
    )
    plan = study.plan(module.cells(study, [0])["gradproj, seed 0"])
    sequence = plan.sequence.build()
    targets, retained = (
        [concept.name for concept in concepts] for concepts in (sequence.targets, sequence.retain)
    )
    assert (len(set(targets)), targets[:2], targets[-1]) == (
        38,
        ["Abstractionism", "Byzantine"],
        "Watercolor",
    )
    assert {*targets, *retained, "Seed_Images"} == set(read_shipped("unlearncanvas_styles"))
    assert plan.tuned


def test_sensitivity_measures_every_other_name_and_never_names_it(script, tmp_path):
    study = make_study(script, tmp_path)
    vocabulary = read_shipped("shapecanvas_styles")
    cells = cells_of(script("sensitivity"), study, tmp_path)
    sequences = {label: study.plan(cell).sequence.build() for label, cell in cells.items()}
    retained = {
        label: [concept.name for concept in sequence.retain]
        for label, sequence in sequences.items()
    }
    assert [*sequences] == ["none, all", *(f"gradproj, {i} of 4" for i in (1, 2, 3, 4))]
    assert retained["none, all"] == [name for name in vocabulary if name != "blaze"]
    folds = [name for label, names in retained.items() if label != "none, all" for name in names]
    assert sorted(folds) == sorted(retained["none, all"])
    for sequence in sequences.values():
        assert [concept.name for concept in sequence.targets] == ["blaze"]
        assert [concept.name for concept in sequence.cross_retain] == [
            "tree",
            "star",
            "fish",
            "cup",
        ]


def test_sensitivity_of_objects_unlearns_one_with_its_anchor(script, tmp_path):
    study = make_study(script, tmp_path, "sequence=shapecanvas_object")
    cells = cells_of(script("sensitivity"), study, tmp_path)
    sequence = study.plan(cells["none, all"]).sequence.build()
    assert [(concept.name, concept.anchor) for concept in sequence.targets] == [("ball", "gear")]
    assert len(sequence.retain) == 31


def test_sensitivity_leaves_out_what_the_evaluator_does_not_know(script, tmp_path):
    study = make_study(script, tmp_path)
    cells = script("sensitivity").cells(
        study, study.plan([]).sequence.build(), ["wine cellar", "blaze", "stone"]
    )
    assert [concept.name for concept in study.plan(cells["none, all"]).sequence.build().retain] == [
        "stone",
        "wine cellar",
    ]


def test_thresholds_are_tried_on_own_tokens(script, tmp_path):
    for overrides, threshold, lr in (([], 0.4, 7e-5), (STABLE_DIFFUSION, 0.7, 8e-6)):
        study = make_study(script, tmp_path, *overrides)
        cells = cells_of(script("auxiliary"), study, tmp_path)
        plan = study.plan(cells[f"own tokens, threshold {threshold}"])
        node = plan.resolved["reg"]["gradproj"]
        assert (node["tokens"], node["threshold"]) == ("own", threshold)
        assert plan.spine.train.lr == pytest.approx(lr)
        # the embedded model knows no word of the lists
        assert ("list painting_styles" in cells) == bool(overrides)


def test_every_threshold_of_the_embedded_model_drops_another_number_of_names(script, model):
    from cu_runner.concepts.entries import read_shipped
    from cu_runner.regularizers.gradproj import kept_columns
    from cu_runner.request.text_subspace import concept_vectors

    for names in (read_shipped("shapecanvas_styles"), read_shipped("shapecanvas_objects")):
        columns = concept_vectors(model, [*names], "{concept}")
        kept = [
            len(kept_columns(columns, threshold))
            for threshold in script("auxiliary").THRESHOLDS_OF_EMBEDDED
        ]
        assert kept == sorted(set(kept))
        assert kept[-1] == len(names)


def test_what_was_not_searched_is_named(script, tmp_path):
    module, study = script("study"), make_study(script, tmp_path)
    cells = script("ablation").cells()
    assert module.unsearched(study, cells) == []
    assert module.unsearched(study, {"uce": ["method=uce", "reg=none"]}) == []
    assert module.unsearched(study, {"a": ["method=uce", "reg=gradproj"]}) == ["a"]
    mixed = make_study(script, tmp_path, "sequence=shapecanvas_mixed", "~tracker")
    assert module.unsearched(mixed, {"a": ["reg=l2"]}) == ["a"]
    flow = make_study(script, tmp_path, "model=shapecanvas_flow")
    assert module.unsearched(flow, {"a": ["reg=l1"], "b": ["reg=l2"]}) == ["a"]
    projected = {"a": ["method=uce", "reg=gradproj"]}
    assert "not searched on this model: a." in module.remark_unsearched(study, projected)
    other = make_study(script, tmp_path, *STABLE_DIFFUSION)
    assert module.remark_unsearched(other, projected) == ""


def test_one_request_goes_on_until_it_forgot(script, tmp_path):
    module, study = script("sensitivity"), make_study(script, tmp_path)
    plan = study.plan(cells_of(module, study, tmp_path)["none, all"])
    assert (plan.setting.stop_at, plan.setting.interval) == (95.0, 20)
    assert plan.spine.train.steps == 600
    assert plan.spine.train.lr == study.plan(["reg=none"]).spine.train.lr
    study = make_study(script, tmp_path, "train.steps=7")  # of a user who sets it
    plan = study.plan(cells_of(module, study, tmp_path)["none, all"])
    assert (plan.setting.stop_at, plan.spine.train.steps) == (None, 7)
    study = make_study(script, tmp_path, "setting.stop_loss=0.2", "setting.interval=7")
    assert study.plan(cells_of(module, study, tmp_path)["none, all"]).setting.stop_loss == 0.2
    study = make_study(script, tmp_path, "setting.interval=7")
    plan = study.plan(cells_of(module, study, tmp_path)["none, all"])
    assert (plan.setting.stop_at, plan.setting.interval, plan.spine.train.steps) == (95.0, 7, 600)


# ----------------------------------------------------------------------------------------- analyses
def test_a_finding_stands_in_the_page_and_survives_the_next_one(script, tmp_path, capsys):
    study = make_study(script, tmp_path)
    page, finding = (study.output / f"a_study.{kind}" for kind in ("md", "finding.md"))
    table = pd.DataFrame({"run": ["none"], "UA": [1.0]})
    study.write(table, script("study").panels(1, 1)[0], "Table.")
    assert page.read_text().startswith(
        "# a_study\n\nWhat it asks.\n\n    python scripts/studies/a_study.py"
    )
    finding.write_text("\nNothing is kept.\n\n")
    capsys.readouterr()
    for _ in range(2):
        study.write(table, script("study").panels(1, 1)[0], "Table.", "model.path=DIR")
        assert page.read_text().startswith(
            "# a_study\n\nWhat it asks.\n\nNothing is kept.\n\n    python "
            "scripts/studies/a_study.py"
        )
        assert (
            "    python scripts/studies/a_study.py model.path=DIR  # on Stable Diffusion\n"
            in page.read_text()
        )
        assert f"{finding} is in it: read whether it still holds" in capsys.readouterr().out
    assert finding.read_text() == "\nNothing is kept.\n\n"


def test_every_shipped_finding_stands_in_its_page():
    root = SCRIPTS.parent.parent
    for finding in (root / "docs/studies").glob("*.finding.md"):
        page, text = (
            finding.with_name(finding.name.replace(".finding", "")),
            finding.read_text(encoding="utf-8").strip(),
        )
        assert text in page.read_text(encoding="utf-8"), finding.name


def test_random_names_leave_out_what_is_shut(script):
    names = script("auxiliary").draw_names(["A_B", "c", "d", "e"], ["a b", "d"], 5)
    assert sorted(names) == ["c", "e"]


def test_halved(script):
    table = metrics_table(RA_I=[90.0, 60.0, 45.0, 44.0], RA_C=[90.0, 80.0, 70.0, 60.0])
    assert script("diagnostic").halved(table, "RA_I") == 3  # 45 is half, not below it
    assert script("diagnostic").halved(table, "RA_C") == "never"
    assert script("diagnostic").halved(table.assign(RA_C=np.nan), "RA_C") == "-"


def test_the_distance_to_the_papers_curves_by_hand(script):
    """The paper's RA-I on styles begins 81, 63; request 0 and RA-C are left out here."""
    table = pd.DataFrame({"request": [0, 1, 2], "RA_I": [99.0, 91.0, 60.0], "RA_C": np.nan})
    (row,) = script("diagnostic").beside_paper({"seed 0": table}, "style").to_dict("records")
    assert row["metric"] == "RA-I"
    assert row["requests"] == 2
    curves = pd.read_csv(shipped_dir("tables") / "paper_curves.csv", comment="#")
    plain = curves[(curves["column"] == "style") & (curves["row"] == "sequential")]
    first, second = plain[plain["metric"] == "RA_I"].sort_values("request")["percent"][:2]
    assert row["mean"] == 75.5
    assert row["paper's mean"] == pytest.approx((first + second) / 2)
    expected = (abs(91 - first) + abs(60 - second)) / 2
    assert row["mean absolute difference"] == pytest.approx(expected)
    assert script("diagnostic").beside_paper({"seed 0": table}, "celebrity").empty


def test_drift_against_retention(script):
    table = metrics_table(
        drift_l2=[1.0, 2.0, 3.0, 4.0, 5.0], RA_I=[4.0, 5.0, 2.0, 3.0, 1.0], RA_C=[9.0] * 5
    )
    found = script("diagnostic").correlations({"seed 0": table})
    assert found["Pearson r"].tolist() == pytest.approx([-0.8, np.nan], nan_ok=True)
    assert found["r from"][0] == pytest.approx(-0.98620, abs=1e-5)
    assert found["halved at request"].tolist() == [4, "never"]


def test_quarters_leave_the_untouched_model_out(script):
    module = script("scaling")
    table = metrics_table(
        RA_I=[99.0, 80.0, 60.0, 40.0, 20.0, 9.0, 7.0, 8.0, 6.0],
        UA=[np.nan, *[100.0] * 8],
        RA_C=[50.0] * 9,
    )
    assert module.quarters(table, "RA_I") == [70, 30, 8, 7]
    table = table.assign(UA_images=8, RA_I_images=96, RA_C_images=192)
    found = module.by_quarter({"none, seed 0": table, "none, seed 1": table})
    assert found["fate"].tolist() == ["-", "level", "level"]
    assert found["seeds"].tolist() == [2, 2, 2]
    # two seeds that agree leave the interval of 96 images, of which 7 are recognised
    assert found[["quarter 4", "from", "to"]].iloc[1].tolist() == pytest.approx(
        [7, 3.576, 14.286], abs=1e-2
    )
    assert (module.fate(30, 4.9), module.fate(30, 28), module.fate(30, 27.9)) == (
        "gone",
        "level",
        "falling",
    )
    assert module.fate(np.nan, 40) == "-"  # no request of the quarter was evaluated


def test_requests_that_were_not_evaluated_are_passed_over(script):
    whole = metrics_table(
        UA=[np.nan, *[100.0] * 8],
        RA_I=[99.0, 80.0, 60.0, 40.0, 20.0, 9.0, 7.0, 8.0, 6.0],
        RA_C=[50.0] * 9,
        drift_l2=[float(i) for i in range(9)],
    ).assign(UA_images=8, RA_I_images=96, RA_C_images=192)
    every_third = whole.iloc[[0, 3, 6, 8]]
    assert script("scaling").quarters(every_third, "RA_I") == pytest.approx(
        [np.nan, 40, 7, 6], nan_ok=True
    )
    seeds = script("study_seeds")
    found = seeds.curves({"none, seed 0": whole, "none, seed 1": every_third})
    assert found["request"].unique().tolist() == [0, 3, 6, 8]  # what both seeds have
    own = found[found["metric"] == "RA_I"].set_index("request")["mean"]
    assert own.to_dict() == {0: 99, 3: 40, 6: 7, 8: 6}
    (last,) = seeds.last_with_intervals(found).to_dict("records")
    assert (last["request"], last["RA_I"], last["drift_l2"]) == (8, 6, 8)


@pytest.mark.parametrize(("name", "gaps"), [("ablation", True), ("diagnostic", False)])
def test_a_study_of_the_last_request_takes_runs_with_gaps(
    name, gaps, script, tmp_path, monkeypatch
):
    asked = []

    def no_runs(jobs, **more):
        asked.append((jobs, more))
        return iter(["cu-run: training led to NaN"] * len(jobs))

    monkeypatch.setattr(script("study"), "cu_runs", no_runs)
    study = make_study(script, tmp_path, "sequence=smoke", "eval.every=last")
    with pytest.raises(LaunchError, match="every run diverged"):
        script(name).main(study)
    ((jobs, more),) = asked
    assert more == {"evaluated": (-1,) if gaps else None}
    assert all("eval.every=last" in job for job in jobs)


def test_spread_over_orders_and_over_seeds(script):
    labels = ["none, paper, seed 0", "none, reversed, seed 0", "none, paper, seed 1"]
    table = pd.DataFrame(
        {"run": labels, "UA": [90.0, 94.0, 96.0], "RA_I": [1.0, 2.0, 3.0], "RA_C": [5.0, 5.0, 5.0]}
    )
    found = script("order").spread(table).set_index(["varied", "metric"])
    assert found.loc[("order", "UA"), ["n", "mean", "from", "to"]].tolist() == [2, 92, 90, 94]
    assert found.loc[("order", "UA"), "sd"] == pytest.approx(8**0.5)
    assert found.loc[("seed", "UA"), ["n", "mean", "from", "to"]].tolist() == [2, 93, 90, 96]


def test_curves_over_seeds(script):
    module = script("study_seeds")

    def table(*values: float) -> pd.DataFrame:
        columns = {name: list(values) for name in ("UA", "RA_I", "RA_C", "drift_l2")}
        images = {f"{name}_images": 10_000 for name in ("UA", "RA_I", "RA_C")}
        return metrics_table(**columns).assign(**images)

    tables = {"l2, seed 0": table(50, 40), "l2, seed 1": table(50, 50), "l2, seed 2": table(50, 60)}
    found = module.curves(tables)
    last = module.last_with_intervals(found).iloc[0]
    # t_.975 with 2 degrees of freedom is 4.3027; the standard error of 40, 50, 60 is 10 / sqrt 3
    half = 4.3027 * 10 / 3**0.5
    assert last[["run", "request", "seeds", "RA_I"]].tolist() == ["l2", 1, 3, 50]
    assert last[["RA_I from", "RA_I to"]].tolist() == pytest.approx(
        [50 - half, 50 + half], abs=0.01
    )
    first = found[(found["request"] == 0) & (found["metric"] == "RA_I")].iloc[0]
    # seeds that agree: half the images, 1.96 sqrt(.25 / 10000)
    assert first[["from", "to"]].tolist() == pytest.approx([49.02, 50.98], abs=0.01)
    one = module.curves({"l2, seed 0": tables["l2, seed 0"]})
    assert one[one["metric"] == "drift_l2"]["from"].isna().all()
    assert "over images" in module.remark(["l2, seed 0"])
    assert "over seeds" in module.remark([*tables])


def test_area_under_a_front_by_hand(script):
    module = script("frontier")
    # a step at 50 and one at 100: 50 x 80 + 50 x 20; the point below the front adds nothing
    assert module.area_under_front([50, 100, 40], [80, 20, 30]) == pytest.approx(50)
    assert module.area_under_front([100], [100]) == 100
    points = pd.DataFrame({"UA": [50, 100, 40, 50], "RA_I": [80, 20, 30, 80]})
    assert module.is_on_front(points, "RA_I") == [True, True, False, True]


def test_bounds_against_weights(script):
    rows = [
        (f"reverse_kl, {kind} {value}, seed {seed}", 100.0, kept, 50.0)
        for seed, kept_bound in ((0, 60.0), (1, 64.0))
        for kind, value, kept in (("bound", "1.5", kept_bound), ("weight", "2", 50.0))
    ]
    table = pd.DataFrame(
        [*rows, ("rgd, narrow, seed 0", 1.0, 1.0, 1.0)], columns=["run", "UA", "RA_I", "RA_C"]
    )
    found = script("frontier").compare(table).set_index("metric")
    # gains of 10 and 14: t_.975 with one degree of freedom is 12.706, the standard error 2
    assert found.loc["RA_I", ["bounds", "weights", "bounds gain"]].tolist() == [62, 50, 12]
    assert found.loc["RA_I", "from"] == pytest.approx(12 - 25.412, abs=0.01)
    assert found.loc["RA_C", "bounds gain"] == 0
    one = script("frontier").compare(table[table["run"].str.endswith("seed 0")])
    assert one["from"].isna().all()


def test_differences_of_sources_are_paired_by_seed(script):
    def table(ra_c: float, images: int) -> pd.DataFrame:
        columns = {"UA": [np.nan, 100.0], "RA_I": [90.0, 50.0], "RA_C": [99.0, ra_c]}
        return metrics_table(**columns).assign(
            UA_images=images, RA_I_images=images, RA_C_images=images
        )

    values = {"other, seed 0": 60, "other, seed 1": 64, "own, seed 1": 50, "own, seed 0": 50}
    values["both, seed 2"] = 90  # a seed that own does not have
    tables = {f"projection, {label}": table(value, 10**6) for label, value in values.items()}
    module, pairs = script("study_seeds"), script("crossdomain").DIFFERENCES
    found = module.differences(tables | {"plain, seed 0": table(1, 1)}, pairs)
    assert found["difference"].unique().tolist() == ["other - own"]
    row = found.set_index("metric").loc["RA_C"]
    # gains of 10 and 14: t_.975 with one degree of freedom is 12.706, the standard error 2
    assert row[["seeds", "points"]].tolist() == [2, 12]
    assert row[["from", "to"]].tolist() == pytest.approx([12 - 25.412, 12 + 25.412], abs=0.01)
    one = {"projection, both, seed 0": table(60, 100), "merge, seed 0": table(50, 100)}
    row = module.differences(one, pairs).set_index("metric").loc["RA_C"]
    # Wilson's of 60 and of 50 of 100 images: 50.20 to 69.06 and 40.38 to 59.62
    assert row["difference"] == "both - merge"
    low, high = (9.80**2 + 9.62**2) ** 0.5, (9.06**2 + 9.62**2) ** 0.5
    assert row[["from", "to"]].tolist() == pytest.approx([10 - low, 10 + high], abs=0.01)
    assert module.differences({}, pairs).empty
    assert "over images (Newcombe's) alone" in module.remark_of_differences([*one])
    assert "paired" in module.remark_of_differences([*tables])


def test_a_study_is_written_where_all_runs_of_a_kind_diverged(script):
    module = script("frontier")
    losses = module.losses_over_steps({})
    assert losses.empty
    assert module.change_of_losses(losses).empty
    assert script("auxiliary").subspaces({})["run"].tolist() == []


def test_what_is_kept_of_a_template_is_a_whole_prompt(script, tmp_path):
    from cu_runner.methods.rgd import without_concept

    for overrides in ([], STABLE_DIFFUSION):
        sequence = make_study(script, tmp_path, *overrides).plan(["method=rgd"]).sequence.build()
        prompts = script("frontier").diversified_prompts(sequence)
        assert prompts
        for prompt in prompts:
            assert prompt.count("{concept}") == 1
            assert without_concept(prompt).split()[-1] not in {"of", "in", "the", "a", "style"}


def test_finished_runs_with_gaps_are_refused_before_the_first_one(
    script, run_copy, tmp_path, monkeypatch
):
    from cu_runner.store.layout import PREDICTIONS
    from cu_runner.store.run_record import read_run

    module = script("study")
    module.refuse_gaps({"a": run_copy, "b": run_copy / "nothing"})
    run = read_run(run_copy)
    files = {name: held for name, held in run.records[1].files.items() if name != PREDICTIONS}
    run.records[1] = dataclasses.replace(run.records[1], files=files)
    assert not run.records[1].evaluated
    monkeypatch.setattr(module, "read_run", lambda place: run)
    with pytest.raises(ValueError, match=r"^a: .* did not evaluate request 1 .*paths\.outputs"):
        module.refuse_gaps({"a": run_copy})
    # before any run begins
    monkeypatch.setattr(module, "cu_runs", lambda *given, **more: pytest.fail("a run began"))
    plan = SimpleNamespace(directory=run_copy)
    monkeypatch.setattr(module.Study, "plan", lambda self, cell: plan)
    with pytest.raises(ValueError, match="did not evaluate request 1"):
        make_study(script, tmp_path).run({"a": []})


def test_growth_of_losses(script):
    losses = pd.DataFrame(
        {
            "run": ["rgd, narrow, seed 0"] * 20 + ["rgd, narrow, seed 1"] * 20,
            "step": [*range(1, 21)] * 2,
            "forget_loss": [1.0] * 2 + [9.0] * 16 + [3.0] * 2 + [1.0] * 18 + [5.0] * 2,
            "retain_loss": 0.5,
        }
    )
    found = script("frontier").change_of_losses(losses)
    assert found["growth"].tolist() == [3, 0]  # 2 and 4
    assert found["from"][0] == pytest.approx(3 - 12.706, abs=0.01)


def test_models_are_told_apart_by_their_last_parts(script):
    names = script("sizes").names_of
    assert names(["x/small", "x/large"]) == {"small": "x/small", "large": "x/large"}
    assert [*names(["a/small/pipeline", "a/large/pipeline"])] == [
        "small/pipeline",
        "large/pipeline",
    ]
    for wrong in ([], ["a"], ["a", "a"]):
        with pytest.raises(ValueError, match=r"two or more different diffusers directories"):
            names(wrong)


def test_correlations_of_models_differ_or_do_not(script):
    from study_statistics import Correlation

    module = script("sizes")
    points = [Correlation(0.0, 0, 0, 28), Correlation(0.0, 0, 0, 28)]
    assert module.homogeneity(points) == (0, 1)
    # z = +-atanh 0.5 = +-0.549306, each with weight 25: Q = 2 x 25 x 0.301737
    q, p = module.homogeneity([Correlation(0.5, 0, 0, 28), Correlation(-0.5, 0, 0, 28)])
    assert (q, p) == pytest.approx((15.0869, 1.03e-4), rel=1e-2)
    assert np.isnan(module.homogeneity(points[:1])).all()
    assert module.holds(Correlation(-0.6, -0.7, -0.4, 100), -1) == "yes"
    assert module.holds(Correlation(0.6, 0.4, 0.7, 100), -1) == "no"
    assert module.holds(Correlation(-0.6, -0.8, 0.1, 10), -1) == "open"
    assert module.holds(Correlation(0.6, float("nan"), float("nan"), 3), 1) == "open"


def test_seeds_of_a_model_are_averaged_per_concept(script):
    module = script("sizes")
    names = ["similarity", "before", *module.MEASURES]

    def table(after: float) -> pd.DataFrame:
        values = dict.fromkeys(names, 1.0) | {"after": after}
        return pd.DataFrame([{"concept": name, **values} for name in ("a", "b")])

    found = module.over_seeds_per_concept({"m, seed 0": table(20), "m, seed 1": table(40)})
    assert found["after"].tolist() == [30, 30]
    assert found["seeds"].tolist() == [2, 2]


def test_images_that_a_difference_of_ten_points_needs(script):
    module = script("semantic")
    # (1.959964 + 0.841621)^2 / 2 / 0.01
    assert module.images_needed(10, 0.8) == 393
    assert module.evaluation_seeds([188], 48) == [188, *range(189, 197)]
    assert module.evaluation_seeds([188, 288], 400) == [188, 288]


def test_what_near_concepts_lost_more(script):
    def shares(*percent: float) -> pd.DataFrame:
        return pd.DataFrame({"mean": percent, "size": 100}, index=["a", "b", "c", "d"]) / [100, 1]

    before = shares(100, 100, 100, 100)
    found = script("semantic").lost_more(
        {
            "l2, seed 0": [before, shares(20, 40, 75, 85)],
            "l2, seed 1": [before, shares(20, 40, 75, 85)],
        },
        ["a", "b"],
        ["c", "d"],
    )
    row = found.iloc[0]
    assert row[["near before", "near after", "far after", "near lost more"]].tolist() == (
        pytest.approx([100, 30, 80, 50])
    )
    assert row["near images"] == 200
    # Welch's t of 80, 60 against 25, 15: variances 200 and 50, standard error sqrt(100 + 25),
    # degrees of freedom 125^2 / (100^2 + 25^2) = 1.4706, t 6.1881
    assert row["concepts from"] == pytest.approx(50 - 6.1881 * 125**0.5, abs=0.01)
    # Newcombe's of 30% and 80% of 200 images, and twice 100% of 200, whose end is at 98.115
    assert row["images to"] - 50 == pytest.approx(
        ((30 - 24.07) ** 2 + (84.96 - 80) ** 2 + (100 - 98.115) ** 2) ** 0.5, abs=0.05
    )
    one = script("semantic").lost_more(
        {
            "l2, seed 0": [before, shares(20, 40, 75, 85)],
            "l2, seed 1": [before, shares(100, 100, 100, 100)],
        },
        ["a", "b"],
        ["c", "d"],
    )
    assert one["images to"][0] == pytest.approx(25 + 12.706 * 25, abs=0.1)  # 50 and 0


def test_what_the_near_half_lost_more(script):
    halves = pd.DataFrame(
        {"run": "l2", "request": [0, 1, 2], "near": [100.0, 60.0, 40.0], "far": [90.0, 80.0, 70.0]}
    )
    found = script("semantic").losses(halves, {"near": 48, "far": 48}).iloc[0]
    assert found[["near before", "near after", "near mean"]].tolist() == [100, 40, 50]
    assert found[["near lost more, after", "near lost more, mean"]].tolist() == [60 - 20, 50 - 15]
    assert found["after from"] < 40 < found["after to"]
    assert found["mean from"] < 35 < found["mean to"]


def test_concepts_that_all_lost_the_same_have_no_interval(script):
    table = pd.DataFrame({"mean": [1.0] * 4, "size": 100}, index=["a", "b", "c", "d"])
    row = script("semantic").lost_more({"gate, seed 0": [table] * 2}, ["a", "b"], ["c", "d"])
    assert row["near lost more"].tolist() == [0]
    assert row[["concepts from", "concepts to"]].isna().all(axis=None)


def test_halves_of_a_finished_run(script, run_copy):
    from cu_runner.store.run_record import read_run

    found = script("semantic").accuracy_of_halves(
        {"none": read_run(run_copy)}, ["lava flow"], ["fog bank"]
    )
    matrix = read_run(run_copy).accuracy_matrix()
    assert found["request"].tolist() == [0, 1, 2]
    assert found["near"].tolist() == matrix.loc["lava flow"].tolist()
    assert found["far"].tolist() == matrix.loc["fog bank"].tolist()


def test_sensitivity_per_concept_of_a_finished_run(script, run_copy, model):
    from cu_runner.store.run_record import read_run

    module, run = script("sensitivity"), read_run(run_copy)
    table = module.per_concept(model, {"none, all": run})
    assert table["concept"].tolist() == ["lava flow", "fog bank"]
    accuracy = run.accuracy_matrix().loc[["lava flow", "fog bank"]]
    assert table["before"].tolist() == accuracy[0].tolist()
    assert table["drop"].tolist() == (accuracy[0] - accuracy[1]).tolist()
    assert (table["kv_change"] > 0).all()
    paper = pd.read_csv(module.PAPER, comment="#")
    found = module.correlations(table, paper).set_index(["run", "similarity against"])["Pearson r"]
    assert found["paper, none", "relative change of K/V outputs"] == 0.835


# ------------------------------------------------------------------------------------------ command
def test_markdown(script):
    table = pd.DataFrame({"run": ["a|b", "c"], "UA": [99.96, np.nan], "n": [12, 3]})
    assert script("study").as_markdown(table).splitlines() == [
        "| run | UA | n |",
        "| --- | --- | --- |",
        "| a\\|b | 100.0 | 12 |",
        "| c | - | 3 |",
    ]


def test_regularizers_come_with_none_first_and_combinations_last(script):
    names = script("study").regularizers()
    assert names[0] == "none"
    assert names.index("nullspace") < names.index("gradproj_l1")


def test_labels_of_one_run_share_it_and_a_diverged_run_is_shown(
    script, run_copy, tmp_path, jobs_in_forks, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    study = make_study(script, tmp_path, *SMOKE)
    runs = study.run(
        {
            "plain": ["seed=0"],
            "again": ["reg=none", "seed=0"],
            "wild": ["reg=none", "train.lr=1e30"],
        }
    )
    assert runs["plain"] is runs["again"]
    assert runs["plain"].directory == run_copy.relative_to(tmp_path)
    assert runs["wild"].startswith("cu-run: training led to")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in printed] == ["plain, again", "wild"]
    tables = {label: run.table for label, run in script("study").finished(runs).items()}
    shown = script("study").with_stopped(script("study").last_rows(tables), runs)
    assert shown["run"].tolist() == ["plain", "again", "wild"]
    assert shown["stopped"].tolist()[2] == runs["wild"]
    assert shown["RA_I"].isna().tolist() == [False, False, True]


@pytest.fixture
def call(script, tmp_path, monkeypatch, capsys):
    """Returns call(name, *arguments) -> (exit status, stdout, stderr) of a study in this process,
    in tmp_path.
    """
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        module, status = script(name), 0
        monkeypatch.setattr(sys, "argv", [f"scripts/studies/{name}.py", *arguments])
        try:
            script("study").command(module.main, module.__doc__)
        except SystemExit as end:
            status = end.code
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_a_study_from_end_to_end(script, call, run_copy, tmp_path, jobs_in_forks, monkeypatch):
    monkeypatch.setattr(script("diagnostic"), "SEEDS", (0,))
    status, out, err = call("diagnostic", *SMOKE, "--output", "found")
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["seed", "wrote", "wrote", "wrote"]
    table = pd.read_csv(tmp_path / "found/diagnostic.csv")
    pd.testing.assert_series_equal(
        table["drift_l2"], pd.read_csv(run_copy / "metrics.csv")["drift_l2"], rtol=1e-5
    )
    text = (tmp_path / "found/diagnostic.md").read_text()
    assert f"python scripts/studies/diagnostic.py {' '.join(SMOKE)} --output found" in text
    assert text.count("| seed 0 |") == 5  # the metrics; drift, and the paper, against RA-I and RA-C
    assert (tmp_path / "found/diagnostic.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_scaling_from_end_to_end(script, call, filled_cache, tmp_path, jobs_in_forks, monkeypatch):
    small = [word for word in SMOKE if not word.startswith("method.")]  # UCE has no anchors
    status, out, err = call("scaling", "rows=uce", "seed=0", *small, "--output", "found")
    assert (status, err) == (0, "")
    assert out.startswith("uce, seed 0  ")
    text = (tmp_path / "found/scaling.md").read_text()
    assert "python scripts/studies/scaling.py rows=uce seed=0 " in text
    assert "One seed each" in text
    assert text.count("| uce |") == 4  # the last request, and quarters of three metrics
    table = pd.read_csv(tmp_path / "found/scaling.csv")
    assert table["run"].tolist() == ["uce, seed 0"] * 3


@pytest.mark.slow
def test_frontier_from_end_to_end(script, call, filled_cache, tmp_path, jobs_in_forks, monkeypatch):
    module = script("frontier")
    monkeypatch.setattr(
        module,
        "PROBLEMS",
        {"forward_kl": module.Problem((1e-6,), (0.5,), 1.999, 1, ("method.ascent_stop=2.0",))},
    )
    monkeypatch.setattr(module, "SETS", ("diversified",))
    monkeypatch.setattr(module, "NUM_TARGETS", 1)
    small = [word for word in SMOKE if not word.startswith("method.")]
    small += ["method.num_images=4", "method.retain.images=8"]
    status, _, err = call("frontier", "seed=0", *small, "--output", "found")
    assert (status, err) == (0, "")
    text = (tmp_path / "found/frontier.md").read_text()
    # lambda of a fixed weight is the cap of 0.5 n_i / N = 0.5 x 4 / (4 + 8)
    (line,) = [
        line for line in text.splitlines() if line.startswith("| forward_kl, weight 0.5 | 1")
    ]
    assert line.split(" | ")[-2:] == ["0.17", "0.00 |"]
    assert "| rgd, diversified | loss on what is kept | 1 |" in text
    assert (tmp_path / "found/frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_crossdomain_from_end_to_end(script, call, run_copy, tmp_path, jobs_in_forks, monkeypatch):
    module = script("crossdomain")
    cells, names = module.cells, ("plain", "projection, own", "projection, other")
    monkeypatch.setattr(
        module,
        "cells",
        lambda *given: {f"{name}, seed 0": cells(*given)[f"{name}, seed 0"] for name in names},
    )
    lists = ["own=shapecanvas_styles", "other=shapecanvas_objects"]
    status, _, err = call("crossdomain", "seed=0", *lists, *SMOKE, "--output", "found")
    assert (status, err) == (0, "")
    files = {path.name: len(path.read_text().splitlines()) for path in tmp_path.glob("found/*.txt")}
    assert files == {
        "crossdomain_own.txt": 30,  # of 32 objects two are measured
        "crossdomain_other.txt": 30,
        "crossdomain_both.txt": 60,
        "crossdomain_pairs.txt": 60,
        "crossdomain_more_pairs.txt": 360,
        "crossdomain_pairs_as_trained.txt": 60,
    }
    text = (tmp_path / "found/crossdomain.md").read_text()
    assert "own: style, other: object" in text
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith("| projection, o")]
    assert [float(line[-3]) for line in lines[:2]] == [30.5, 30.5]  # the first target joins once
    assert text.count("| other - own |") == 3
    table = pd.read_csv(tmp_path / "found/crossdomain.csv")
    assert table["run"].unique().tolist() == [f"{name}, seed 0" for name in names]


@pytest.mark.slow
def test_auxiliary_from_end_to_end(script, call, run_copy, tmp_path, jobs_in_forks, monkeypatch):
    module = script("auxiliary")
    cells = module.cells
    names = ("number 10", "file, 20 at random", "own tokens, threshold 0.3")
    # without the steps of plain unlearning, which SMOKE gives
    monkeypatch.setattr(module, "own_tokens", lambda study: module.OWN)
    monkeypatch.setattr(
        module, "cells", lambda *given: {name: cells(*given)[name] for name in names}
    )
    status, _, err = call("auxiliary", *SMOKE, "--output", "found")
    assert (status, err) == (0, "")
    table = pd.read_csv(tmp_path / "found/auxiliary.csv").set_index("run")
    assert table.index.tolist() == [*names]
    drawn = (tmp_path / "found/auxiliary_random.txt").read_text().splitlines()
    assert len(set(drawn)) == 20  # no more are left on the smoke sequence
    # The first of two targets joins the names of the second.
    assert table["names"].tolist()[:2] == [10.5, 20.5]
    assert table["rank"].iloc[2] <= table["names"].iloc[2]  # one column per name
    assert table["target_outside"].between(0, 1).all()
    text = (tmp_path / "found/auxiliary.md").read_text()
    assert "The runs with own tokens have `reg.gradproj.tokens=own" in text


def test_what_it_took_by_hand(script):
    module = script("served")
    rows = [("none, forgotten", 0, 1, 90, 95.0), ("none, forgotten", 0, 2, 30, 94.0)]
    rows += [("none, forgotten", 1, 1, 30, 100.0), ("none, forgotten", 1, 2, 30, 97.0)]
    rows += [("l2, fixed", 0, 1, 60, float("nan")), ("l2, fixed", 0, 2, 60, 99.0)]
    columns = ["run", "seed", "request", "steps", "UA"]
    table = pd.DataFrame(rows, columns=columns)
    table["run"] += ", seed " + table["seed"].astype(str)
    found = module.what_it_took(table).set_index("run")
    assert found.loc["none, forgotten"].tolist() == [2, 75.0, 97.5, 45.0, 60.0, 30.0]
    assert found.loc["l2, fixed", ["seeds", "steps", "1", "2"]].tolist() == [1, 60.0, 60.0, 60.0]
    assert found.loc["l2, fixed", ["forgotten", "first UA"]].isna().all()


@pytest.mark.slow
def test_served_from_end_to_end(script, call, run_copy, tmp_path, jobs_in_forks, monkeypatch):
    module = script("served")
    monkeypatch.setattr(module, "REGULARIZERS", ("none",))
    small = [word for word in SMOKE if not word.startswith("train.steps")]
    monkeypatch.setattr(
        module,
        "cells",
        lambda study: {
            "none, fixed": ["reg=none", "train.steps=3"],
            "none, forgotten": [
                *("reg=none", "++setting.stop_at=100", "setting.interval=2", "train.steps=4"),
            ],
        },
    )
    status, _, err = call("served", "seed=0", *small, "--output", "found")
    assert (status, err) == (0, "")
    table = pd.read_csv(tmp_path / "found/served.csv")
    assert table["run"].tolist() == ["none, fixed, seed 0", "none, forgotten, seed 0"]
    text = (tmp_path / "found/served.md").read_text()
    assert text.count("| none: forgotten - fixed |") == 3
    (line,) = [line for line in text.splitlines() if line.endswith("| 4.0 | 4.0 | 4.0 |")]
    assert line.startswith("| none, forgotten | 1 |")  # steps: their mean, and of both requests


@pytest.mark.slow
def test_ablation_from_end_to_end(script, call, run_copy, tmp_path, jobs_in_forks, monkeypatch):
    module = script("ablation")
    (tmp_path / "grid.yaml").write_text("style: {conabl+none: {}}\n")
    monkeypatch.setattr(importlib.import_module("study"), "CANDIDATES", tmp_path / "grid.yaml")
    monkeypatch.setattr(
        module, "cells", lambda: {name: [f"reg={name}"] for name in ("none", "ewc")}
    )
    status, _, err = call("ablation", "seed=0", *SMOKE, "--output", "found")
    assert (status, err) == (0, "")
    text = (tmp_path / "found/ablation.md").read_text()
    assert "not searched on this model: ewc." in text
    assert text.count("| ewc - none |") == 3
    assert "One seed each" in text
    table = pd.read_csv(tmp_path / "found/ablation.csv")
    assert table["run"].tolist() == ["none, seed 0", "ewc, seed 0"]


@pytest.mark.slow
def test_sizes_from_end_to_end(script, call, pipeline_copy, tmp_path, jobs_in_forks, monkeypatch):
    other = pipeline_copy.with_name("again")
    shutil.copytree(pipeline_copy, other)
    names = ["torch light", "lava flow", "fog bank", "snow drift", "ember"]
    monkeypatch.setattr(
        "cu_runner.evaluators.classifier.Classifier.labels", lambda self: {"style": names}
    )
    models = f"models=[{pipeline_copy},{other}]"
    words = [models, "seed=0", *SMOKE, "sequence.cross_retain=[tree]", "--output", "found"]
    status, _, err = call("sizes", *words)
    assert (status, err) == (0, "")
    table = pd.read_csv(tmp_path / "found/sizes.csv")
    assert table["model"].tolist() == ["pipeline"] * 4 + ["again"] * 4
    one, two = (group.reset_index(drop=True) for _, group in table.groupby("model"))
    pd.testing.assert_frame_equal(one.drop(columns="model"), two.drop(columns="model"))
    assert set(table["concept"]) == {*names} - {"torch light"}


@pytest.mark.slow
def test_semantic_from_end_to_end(script, call, run_copy, tmp_path, jobs_in_forks, monkeypatch):
    module = script("semantic")
    monkeypatch.setattr(module, "cells", lambda: {"none": ["reg=none"]})
    monkeypatch.setattr(module, "EFFECT", 70.0)
    for again in (False, True):
        if again:  # the images are cached
            monkeypatch.setattr(module, "load", None)
        status, _, err = call("semantic", "seed=0", *SMOKE, "--output", "found")
        assert (status, err) == (0, "")
    text = (tmp_path / "found/semantic.md").read_text()
    # 9 images in each half are asked for, one seed has two
    assert "on 5 evaluation seeds" in text
    assert "| none | 1 | " in text
    assert len([*(tmp_path / "outputs/studies/semantic").glob("*.csv")]) == 2  # before and after


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("order", ["seed=3"], ["order.py: seed:", "sets it itself"]),
        ("semantic", ["train.stepz=3"], ["train.stepz", "allowed", "steps"]),
        ("scaling", ["--outptu", "x"], ["--outptu", "--help"]),
        ("ablation", ["sequence=nowhere"], ["sequence=nowhere", "allowed", "shapecanvas_style"]),
        (
            "sensitivity",
            ["model.path=nowhere", "evaluator.paths.style=nowhere"],
            ["nowhere", "no such file or directory"],
        ),
    ],
)
def test_bad_input_is_one_line(call, tmp_path, name, arguments, words):
    status, out, err = call(name, *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_a_study_is_a_script(tmp_path):
    place = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")])
    done = run_forked(
        "order.py",
        "sequence.order=reversed",
        cwd=tmp_path,
        env=environment(PYTHONPATH=place),
        main=functools.partial(runpy.run_path, str(SCRIPTS / "order.py"), run_name="__main__"),
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "order.py: sequence.order: this study sets it itself; leave it out, or run cu-run with it\n"
    )
