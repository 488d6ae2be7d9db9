"""Each probe against what can be said of it by hand."""

import csv
import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from conftest import read_conf

from cu_runner.concepts.entries import LISTS
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.concepts.templates import PLACEHOLDER
from cu_runner.evaluators.evaluate import Judge, evaluate
from cu_runner.models.parameters import placed, select_parameters, snapshot
from cu_runner.models.sampling import make_scheduler, sample_images
from cu_runner.models.schedulers import largest_eta
from cu_runner.models.trajectory import Trajectory
from cu_runner.recovery._finetune import batch_loss, own_prompts, spread_over, unrelated_prompts
from cu_runner.recovery.adversarial import RingABell, plain_tokens, words_of
from cu_runner.recovery.base import Cost, Probe, cost_of, evaluation_images
from cu_runner.recovery.battery import Battery
from cu_runner.recovery.completion import Completion
from cu_runner.recovery.composition import Composition
from cu_runner.recovery.drawing import Drawing
from cu_runner.recovery.inversion import Inversion
from cu_runner.recovery.noise import Noise
from cu_runner.recovery.paraphrase import Paraphrase
from cu_runner.recovery.precision import Precision, rounded
from cu_runner.recovery.rebound import Rebound
from cu_runner.recovery.relearning import Relearning
from cu_runner.recovery.residual import Residual, residual
from cu_runner.recovery.unlearndiffatk import UnlearnDiffAtk, nearest_tokens
from cu_runner.runtime.code_identity import identify
from cu_runner.schema.settings import EvalSettings
from cu_runner.shapecanvas.captions import SYNONYMS
from cu_runner.shapecanvas.styles import STYLE_PARTS
from cu_runner.store.cache import Cache

SETTINGS = EvalSettings(4, 2.5, None, batch_size=8)
LIST = "paraphrases_shapecanvas_styles"


@pytest.fixture
def bench(model, evaluator, sequence, tmp_path) -> Callable[..., SimpleNamespace]:
    """Returns make(change=0.0, **probes): a battery, its lab of the changed weights and of the
    untouched ones, and the first two targets as unlearned; change: how much noise the weights get.
    """
    params = select_parameters(model.denoiser, "kv_xattn")
    base = snapshot(params)
    unlearned = list(sequence.targets[:2])

    def make(change: float = 0.0, **probes: Probe) -> SimpleNamespace:
        judge = Judge(model, evaluator, sequence, SETTINGS)
        cache = Cache(tmp_path / "cache", identify())
        settings: dict = {name: {} for name in probes}
        battery = Battery(probes, settings, judge, "model", "judge", params, base, cache)
        shown = [*sequence.targets, *sequence.retain]
        seen = {0: evaluate(model, evaluator, sequence, shown, 0, SETTINGS).predictions}
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in params.items():
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(base[name] + change * base[name].std() * noise)
        seen[2] = evaluate(
            model, evaluator, sequence, [*unlearned, *sequence.retain], 2, SETTINGS
        ).predictions
        seen[1] = seen[2]
        lab = battery._lab(2, unlearned, seen.get, sequence, untouched=False)
        return SimpleNamespace(battery=battery, lab=lab, seen=seen, unlearned=unlearned)

    return make


def drawn(bench) -> list:
    """What the bench's model draws, as (prompt, seed, steps of the untouched model, image)."""
    found = []
    decode = bench.lab.model.decode_latents
    bench.lab.model.decode_latents = lambda latents: found.append(decode(latents)) or found[-1]
    return found


# ----------------------------------------------------------------------------------------- residual
def test_the_residual_of_a_3x3_map_by_hand():
    base, now = torch.diag(torch.tensor([1.0, 2.0, 4.0])), torch.diag(torch.tensor([1.0, 2.0, 0.0]))
    # what reads the third direction is gone: a text along it is out of reach, the others are not
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]]).T
    left = residual([base], [now], texts, 1e-9)
    torch.testing.assert_close(left, torch.tensor([0.0, 1.0, 16 / 17]).double(), atol=1e-6, rtol=0)


def test_one_text_for_all_layers():
    one, zero = torch.eye(3), torch.zeros(3, 3)
    # two layers that ask for opposite texts: the best text gives up half of the energy
    left = residual([one, one], [one, -one], torch.tensor([[1.0, 0.0, 0.0]]).T, 1e-9)
    torch.testing.assert_close(left, torch.tensor([1.0]).double())
    left = residual([one, one], [one, zero], torch.tensor([[1.0, 0.0, 0.0]]).T, 1e-9)
    torch.testing.assert_close(left, torch.tensor([0.5]).double())


def test_the_untouched_model_is_wholly_in_reach(bench):
    made = bench()
    found = Residual(ridge=1e-9).measure(made.lab, made.unlearned)
    assert [each.value for each in found] == pytest.approx([100, 100], abs=1e-3)
    changed = Residual().measure(bench(change=1.0).lab, made.unlearned)
    assert max(each.value for each in changed) < 99


# --------------------------------------------------------------------------------------- completion
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_completion_of_nothing_and_of_all_is_a_models_own_image_bitwise(bench, share):
    made = bench(change=0.6)
    images = drawn(made)
    made.lab.model.decode_latents(torch.zeros(1, *made.lab.model.latent_shape))
    probe = Completion([share], images=2)
    wanted = probe.images(made.lab, made.unlearned[:1])
    assert wanted[0].untouched_steps == round(4 * share)
    seen = made.lab.look(wanted)
    step = 0 if share else 2
    rows = made.seen[step].set_index(["prompt", "seed"])
    for each in seen:
        row = rows.loc[(each.image.prompt, each.image.seed)]
        assert each.columns["predicted_style"] == row["predicted_style"]
        assert each.columns["score_style"] == row["score_style"]
    if not share:  # the evaluation has drawn it
        assert len(images) == 1
        return
    batch = [each.image for each in seen]
    with placed(made.battery.params, made.battery.base):
        whole = sample_images(
            made.lab.model,
            [each.prompt for each in batch],
            [each.seed for each in batch],
            made.lab.settings,
        )
    assert torch.equal(images[1], whole)


def test_the_first_steps_are_the_untouched_models_and_drawn_once(bench, monkeypatch):
    made = bench(change=0.6)
    images = drawn(made)
    wanted = Completion([0.5], images=2).images(made.lab, made.unlearned[:1])
    made.lab.look(wanted)
    model, settings = made.lab.model, made.lab.settings
    words = [each.prompt for each in wanted], [each.seed for each in wanted]
    trajectory = Trajectory(model, make_scheduler(model, settings), *words, settings.guidance)
    with placed(made.battery.params, made.battery.base):
        trajectory.advance(2)
    by_hand = model.decode_latents(trajectory.advance(4))
    assert torch.equal(images[0], by_hand)
    assert len(made.battery.heads) == 2
    runs = []
    output = model.output
    monkeypatch.setattr(
        model, "output", lambda *words, **more: runs.append(1) or output(*words, **more)
    )
    later = made.battery._lab(
        3, made.unlearned, lambda step: made.seen[2], made.lab.sequence, untouched=False
    )
    later.look(wanted)
    assert len(runs) == 2  # of four steps; the first two are kept


def test_a_share_above_none_is_a_step_at_least(bench):
    made = bench()
    (image,) = Completion([0.01], images=1).images(made.lab, made.unlearned[:1])
    assert image.untouched_steps == 1


# --------------------------------------------------------------------------------------- relearning
def test_no_steps_of_relearning_are_the_evaluation_and_weights_come_back(bench):
    made = bench(change=0.3)
    before = {name: weight.clone() for name, weight in made.battery.params.items()}
    probe = Relearning([0, 2], 1e-2, data=["own", "unrelated"], batch_size=2, examples=2, images=2)
    seen = probe.measure(made.lab, made.unlearned[:1])
    assert [(each.image.variant, each.image.dose) for each in seen] == [
        (kind, dose) for kind in ("own", "unrelated") for dose in (0, 0, 2, 2)
    ]
    rows = made.seen[2].set_index(["prompt", "seed"])
    for each in seen:
        own = rows.loc[(each.image.prompt, each.image.seed), "score_style"]
        assert (each.columns["score_style"] == own) == (each.image.dose == 0)
    assert seen[2].columns["score_style"] != seen[6].columns["score_style"]  # other images
    for name, weight in made.battery.params.items():
        assert torch.equal(weight, before[name])
        assert not weight.requires_grad
    again = probe.measure(made.lab, made.unlearned[:1])
    assert [each.columns for each in again] == [each.columns for each in seen]


def test_concepts_of_the_same_unrelated_images_share_a_training(bench, monkeypatch):
    made, trained = bench(change=0.3), []
    train = Relearning._train
    monkeypatch.setattr(
        Relearning,
        "_train",
        lambda own, lab, chosen, *more: trained.append(chosen) or train(own, lab, chosen, *more),
    )
    probe = Relearning([0, 2], 1e-2, data=["own", "unrelated"], batch_size=2, examples=2, images=1)
    both = probe.measure(made.lab, made.unlearned)
    assert len(made.unlearned) == 2
    assert len(trained) == 3  # each on its own, and both on the unrelated ones
    assert probe.cost(made.lab.sequence, 2) == Cost(images=8, steps=6)
    alone = [row for each in made.unlearned for row in probe.measure(made.lab, [each])]
    assert len(trained) == 3 + 4
    assert {(row.image, *row.columns.items()) for row in both} == {
        (row.image, *row.columns.items()) for row in alone
    }  # what one shows does not depend on the other


def test_relearning_on_the_concepts_own_images_lowers_their_loss(bench):
    made = bench(change=1.0)
    lab, concept = made.lab, made.unlearned[0]
    chosen = spread_over(own_prompts(lab.sequence, concept), 2)
    latents, text = lab.latents(chosen, 2), lab.model.encode_prompts(chosen)
    losses = []
    look = lab.look

    def watch(images):
        losses.append(batch_loss(lab.model, latents, text, 64, lab.generator("test")).item())
        return look(images)

    object.__setattr__(lab, "look", watch)
    Relearning([0, 20], 1e-3, data=["own"], examples=2, images=1).measure(lab, [concept])
    assert losses[1] < 0.9 * losses[0]


# ---------------------------------------------------------------------------------------- precision
def test_weights_of_fewer_bits():
    weight = torch.tensor([[1.0, 0.004, -0.5], [0.0, 0.0, 0.0]])
    int8 = rounded(weight, "int8")
    assert int8[0].tolist() == pytest.approx([1.0, 1 / 127, round(-63.5) / 127])
    assert int8[1].tolist() == [0, 0, 0]
    assert torch.equal(rounded(weight, "bf16"), weight.bfloat16().float())
    assert rounded(torch.tensor([3.0, 1.0]), "int8").tolist() == pytest.approx([3.0, 3 * 42 / 127])


def test_rounding_is_undone_and_every_weight_has_it(bench):
    made = bench(change=0.3)
    unet = dict(made.lab.model.denoiser.named_parameters())
    before = {name: weight.clone() for name, weight in unet.items()}
    during = []
    look = made.lab.look
    object.__setattr__(
        made.lab,
        "look",
        lambda images: during.append({n: w.clone() for n, w in unet.items()}) or look(images),
    )
    seen = Precision(["bf16", "int8"], images=1).measure(made.lab, made.unlearned[:1])
    assert [each.image.variant for each in seen] == ["bf16", "int8"]
    for name, weight in unet.items():
        assert torch.equal(weight, before[name])
        assert torch.equal(during[0][name], before[name].bfloat16().float())
        assert torch.equal(during[1][name], rounded(before[name], "int8"))


# -------------------------------------------------------------------------------------------- noise
def test_the_largest_eta_is_where_ddim_has_no_noise_left(bench):
    made = bench()
    scheduler = make_scheduler(
        made.lab.model, type(made.lab.settings)(4, 2.5, "DDIMScheduler", batch_size=8)
    )
    alphas, steps = scheduler.alphas_cumprod.tolist(), scheduler.timesteps.tolist()
    most = largest_eta(scheduler)
    ends = list(itertools.pairwise(steps))
    variances = [float(scheduler._get_variance(now, before)) for now, before in ends]
    left = [1 - alphas[before] for _, before in ends]
    assert min(b - most**2 * a for a, b in zip(variances, left, strict=True)) == pytest.approx(
        0, abs=1e-6
    )


def test_attempts_share_an_image_and_differ_in_noise(bench, monkeypatch):
    made, batches = bench(), []
    begin = Drawing._begin
    monkeypatch.setattr(
        Drawing, "_begin", lambda own, images: batches.append(len(images)) or begin(own, images)
    )
    probe = Noise([0.0, 0.5], [1.0, 1.04], images=2)
    images = probe.images(made.lab, made.unlearned[:1])
    assert len(images) == 8
    assert {(image.image, image.eta, image.noise_scale) for image in images} == {
        (number, eta, scale) for number in (0, 1) for eta in (0.0, 0.5) for scale in (1.0, 1.04)
    }
    scores = [each.columns["score_style"] for each in made.lab.look(images)]
    assert len(set(scores)) > 4
    assert sum(batches) == 8
    assert len(batches) <= 3  # one for each eta, cut where a batch is full


@pytest.mark.parametrize(
    ("etas", "scheduler", "said"),
    [([5.0], "DDIMScheduler", "at most"), ([0.0], "DPMSolverMultistepScheduler", "takes no eta")],
)
def test_an_eta_that_cannot_be_taken_is_refused(bench, etas, scheduler, said):
    made = bench()
    with pytest.raises(ValueError, match=said):
        Noise(etas, [1.0], scheduler=scheduler).check_model(
            made.lab.model, made.lab.sequence, made.lab.settings
        )


# --------------------------------------------------------------------------------------- paraphrase
PARAPHRASES = sorted(LISTS.glob("paraphrases_*.csv"))


@pytest.mark.parametrize("path", PARAPHRASES, ids=[path.stem for path in PARAPHRASES])
def test_no_shipped_paraphrase_names_its_concept(path):
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    levels = {row["level"] for row in rows}
    assert levels <= {"synonym", "short", "long"}
    for row in rows:
        words = row["concept"].replace("_", " ").casefold().split()
        said = row["prompt"].casefold()
        assert not any(f" {word} " in f" {said} " for word in words), row
        assert len(PLACEHOLDER.findall(row["prompt"])) == 1, row
    concepts = {row["concept"] for row in rows}
    assert {(row["concept"], row["level"]) for row in rows} == {
        (concept, level) for concept in concepts for level in levels
    }
    assert len({row["prompt"] for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("kind", "words"),
    [("objects", SYNONYMS), ("styles", {k: v.description for k, v in STYLE_PARTS.items()})],
)
def test_the_embedded_models_paraphrases_are_words_that_it_was_trained_on(kind, words):
    for name, column in (("paraphrases", "prompt"), ("other_words", "words")):
        file = LISTS / f"{name}_shapecanvas_{kind}.csv"
        with file.open(encoding="utf-8", newline="") as content:
            rows = list(csv.DictReader(content))
        assert {row["concept"] for row in rows} == set(words)
        assert all(words[row["concept"]] in row[column] for row in rows)


def test_paraphrases_take_other_prompts_and_other_objects(bench, sequence):
    made = bench()
    probe = Paraphrase(LIST, images=2)
    probe.check(sequence)
    images = probe.images(made.lab, made.unlearned[:1])
    assert [image.concept for image in images] == ["torch light"] * 2
    assert [image.image for image in images] == [0, 1]
    assert len({image.prompt for image in images}) == 2
    assert all(image.cross in image.prompt for image in images)
    assert not any("torch light" in image.prompt for image in images)


def test_a_paraphrase_that_says_the_same_again_takes_the_next_seed(bench, tmp_path):
    made = bench()
    sequence, name = made.lab.sequence, made.unlearned[0].name
    assert (len(sequence.cross_retain), len(sequence.seeds)) == (2, 1)
    lab = dataclasses.replace(made.lab, sequence=dataclasses.replace(sequence, seeds=(5, 7)))
    file = tmp_path / "mine.csv"
    names = [concept.name for concept in (*sequence.targets, *sequence.retain)]
    rows = [f"{each},short,a {{object}} {place}" for place, each in enumerate(names)]
    file.write_text("\n".join(["concept,level,prompt", *rows]) + "\n", encoding="utf-8")
    images = Paraphrase(str(file), images=5).images(lab, made.unlearned[:1])
    crosses = [concept.name for concept in sequence.cross_retain]
    asked = [(image.concept, image.cross, image.seed, image.image) for image in images]
    # of five two are of each of two objects, the fifth would be one of them again
    assert asked == [
        (name, crosses[0], 5, 0),
        (name, crosses[0], 7, 1),
        (name, crosses[1], 5, 2),
        (name, crosses[1], 7, 3),
    ]


def test_a_list_that_lacks_a_concept_names_one_or_holds_what_is_unknown(sequence, tmp_path):
    file = tmp_path / "mine.csv"

    def read(*rows: str) -> Paraphrase:
        file.write_text("\n".join(["concept,level,prompt", *rows]) + "\n", encoding="utf-8")
        probe = Paraphrase(str(file))
        probe.check(sequence)
        return probe

    with pytest.raises(ValueError, match="has no row of 'torch light'"):
        read("other,short,a {object} of light")
    for said in ("in Torch Light style", "by torch_light, oil", "of torch-light's"):
        with pytest.raises(ValueError, match="names torch light"):
            read(f'torch light,short,"a {{object}} {said}"')
    names = [concept.name for concept in (*sequence.targets, *sequence.retain)]
    with pytest.raises(ValueError, match=r"unknown placeholder \{scene\}"):
        read(*(f"{name},short,a {{scene}} of it" for name in names))
    rows = [f"{name},short,a {{object}} {number}" for number, name in enumerate(names)]
    assert read(*rows)
    with pytest.raises(ValueError, match="no level 'long'"):
        Paraphrase(str(file), levels=["long"])
    with pytest.raises(ValueError, match="levels: is empty"):
        Paraphrase(str(file), levels=[])
    with pytest.raises(ValueError, match="levels: has 'short' twice"):
        Paraphrase(str(file), levels=["short", "short"])
    # a mean over those that have a level is none over what was unlearned
    message = f"has no row of '{names[1]}' at the level 'long'"
    with pytest.raises(ValueError, match=message):
        read(*rows, f"{names[0]},long,a {{object}} of lines")
    assert Paraphrase(str(file), levels=["short"]).check(sequence) is None
    message = "there is no list paraphrases_of_nothing; shipped lists: paraphrases_celebrities"
    with pytest.raises(ValueError, match=message):
        Paraphrase([str(file), "paraphrases_of_nothing"])
    with pytest.raises(ValueError, match="prompts: is empty"):
        Paraphrase([])


# ------------------------------------------------------------------------- rebound, composition
def test_a_rebound_is_the_rise_since_the_lowest(bench):
    made = bench()
    concept = made.unlearned[0].name

    def shows(share: float):
        rows = made.seen[2].copy()
        own = rows.index[rows["style"] == concept]
        rows.loc[own, "predicted_style"] = "x"
        rows.loc[own[: int(share * len(own))], "predicted_style"] = concept
        return rows

    seen = {0: shows(1.0), 1: shows(0.5), 2: shows(0.0), 3: shows(0.5)}
    lab = made.battery._lab(3, made.unlearned, seen.get, made.lab.sequence, untouched=False)
    (found,) = Rebound().measure(lab, made.unlearned[:1])
    assert found.value == 50  # the untouched model's 100 is no rebound
    assert Rebound().on_retained(lab.sequence) == []


def test_composition_asks_for_retained_concepts_alone(bench, sequence):
    made = bench()
    probe = Composition(["a painting of a {object} in the style of {style}"], images=2, controls=2)
    probe.check(sequence)
    assert probe.on_erased(made.lab) == []
    images = probe.images(made.lab, probe.on_retained(sequence))
    assert all(image.both for image in images)
    assert all(image.concept in image.prompt and image.cross in image.prompt for image in images)
    with pytest.raises(ValueError, match=r"lacks the placeholder \{object\}"):
        Composition(["a {style} painting"]).check(sequence)


# ----------------------------------------------------------------------------------------- searches
def test_prompts_of_a_search_are_words_that_are_read_as_they_are_written(model):
    tokens = plain_tokens(model, "torch light")
    assert not set(model.tokenizer("torch light").input_ids) & set(tokens.tolist())
    rows = tokens[torch.randint(len(tokens), (20, 6), generator=torch.Generator().manual_seed(0))]
    for words, ids in zip(words_of(model, rows), rows.tolist(), strict=True):
        assert model.tokenizer(words).input_ids[1:-1] == ids


def test_ring_a_bell_comes_nearer_and_is_searched_once(bench, monkeypatch):
    made = bench()
    concept = made.unlearned[0]
    pairs = made.lab.sequence.training_pairs(concept)[:50]
    named, plain = (
        made.lab.model.prompts.encode_once(list(side)).hidden for side in zip(*pairs, strict=True)
    )
    wanted = plain[0] + 3.0 * (named - plain).mean(0)

    def left(generations: int) -> float:
        probe = RingABell(tokens=4, population=12, generations=generations, images=2)
        prompt = probe._search(made.lab, concept, pairs)
        assert concept.name not in prompt
        text = made.lab.model.prompts.encode_once([prompt]).hidden
        return (text - wanted).square().sum().item()

    assert left(12) < left(1)
    searches = []
    monkeypatch.setattr(RingABell, "_search", lambda *words: searches.append(1) or "a prompt")
    probe = RingABell(images=2)
    images = probe.images(made.lab, [concept])
    assert [(image.prompt, image.seed, image.image) for image in images] == [
        ("a prompt", 0, 0),
        ("a prompt", 1, 1),
    ]
    probe.images(made.lab, [concept])
    assert len(searches) == 1


@pytest.mark.parametrize("name", ["unlearncanvas_object", "shapecanvas_object", "celebrity"])
def test_a_retained_concept_has_training_prompts_that_name_it_once(name):
    sequence = make_sequence(**read_conf(f"sequence/{name}.yaml"))
    for concept in (*sequence.retain[:3], *sequence.targets[:2]):
        own, other = own_prompts(sequence, concept), unrelated_prompts(sequence, concept)
        assert len(own) > 10
        assert all(prompt.count(concept.prompt_name) == 1 for prompt in own)
        assert not any("{" in prompt or "  " in prompt for prompt in own + other)
        assert not any(concept.prompt_name in prompt.split() for prompt in other)


def test_an_inversion_searches_a_token_for_the_name(bench):
    made = bench(change=0.3)
    probe = Inversion(5e-3, steps=3, batch_size=2, examples=2, images=2)
    found = probe.measure(made.lab, made.unlearned[:1])
    assert len(found) == 2
    assert found[0].columns["score_style"] != made.seen[2].iloc[0]["score_style"]
    assert probe.measure(made.lab, made.unlearned[:1])[0].columns == found[0].columns
    assert all(not encoder.training for encoder in made.lab.model.text_encoders)


def test_an_attack_puts_tokens_before_the_prompt(bench):
    made = bench(change=0.3)
    probe = UnlearnDiffAtk(tokens=2, steps=3, batch_size=2, examples=2, images=1)
    (found,) = probe.measure(made.lab, made.unlearned[:1])
    (plain,) = evaluation_images(made.lab.sequence, made.unlearned[:1], 1)
    words = found.image.prompt.removesuffix(plain.prompt).split()
    assert found.image.prompt.endswith(plain.prompt)
    assert len(words) == 2


def test_the_nearest_tokens():
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert nearest_tokens(torch.tensor([[0.9, 0.2], [0.1, 0.0]]), table).tolist() == [1, 0]


# ------------------------------------------------------------------------------------------ battery
def test_a_probe_is_due_after_every_so_many_requests_or_the_last():
    due = {
        every: [step for step in range(7) if Rebound(every=every).is_due(step, 6)]
        for every in (1, 4, "last")
    }
    assert due == {1: [1, 2, 3, 4, 5, 6], 4: [4, 6], "last": [6]}


def test_controls_are_evenly_spread_over_the_retained(sequence):
    names = [concept.name for concept in sequence.retain]
    kept = Completion([0.1], controls=1).on_retained(sequence)
    assert [concept.name for concept in kept] == names[:1]
    assert len(Completion([0.1], controls=99).on_retained(sequence)) == len(names)


def test_a_model_that_forgot_nothing_recovers_what_the_untouched_one_shows(bench):
    made = bench(completion=Completion([0.5], images=4))
    files, metrics = made.battery.measure(2, 2, made.unlearned, made.seen.get, 0.0)
    assert metrics["recovered_completion"] == metrics["recovered_completion_untouched"] == 100
    assert set(files) == {"recovery.csv"}


def test_controls_of_the_untouched_model_are_drawn_once_for_all_runs(bench, monkeypatch):
    probe = Paraphrase(LIST, images=1, controls=1)
    made = bench(change=0.3, paraphrase=probe)
    files, metrics = made.battery.measure(2, 2, made.unlearned, made.seen.get, 50.0)
    asked = []
    measure = Paraphrase.measure
    monkeypatch.setattr(
        Paraphrase,
        "measure",
        lambda self, lab, concepts: asked.append(lab.is_untouched) or measure(self, lab, concepts),
    )
    again = made.battery.measure(2, 2, made.unlearned, made.seen.get, 50.0)
    assert asked == [False, False]
    assert again == (files, metrics)
    made.battery.settings["paraphrase"]["images"] = 2
    made.battery.measure(2, 2, made.unlearned, made.seen.get, 50.0)
    assert True in asked


def test_controls_do_not_depend_on_the_order_in_which_they_are_made(bench, monkeypatch, tmp_path):
    """Runs side by side share them out: some are another's, made in another order."""
    probes = {
        "paraphrase": Paraphrase(LIST, images=1, controls=1),
        "completion": Completion([0.25, 0.5], images=2, controls=1),
        "relearning": Relearning([0, 1], 1e-2, data=["own"], batch_size=2, examples=2, images=1),
    }
    made, orders, found = bench(change=0.3, **probes), [], []
    control = Battery._control

    def noted(self, lab, due, name, group, one):
        orders[-1].append((name, one.name))
        return control(self, lab, due, name, group, one)

    monkeypatch.setattr(Battery, "_control", noted)
    for pid in (1, 2, 1):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        orders.append([])
        if len(orders) == 3:  # what is cached is of the second order, and half of it is gone
            for entry in sorted((tmp_path / "cache/recovery").iterdir())[::2]:
                shutil.rmtree(entry)
        elif len(orders) == 2:
            shutil.rmtree(tmp_path / "cache")
        found.append(made.battery.measure(2, 2, made.unlearned, made.seen.get, 50.0))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert found[0] == found[1] == found[2]


def test_first_steps_are_kept_by_all_that_decides_them(bench):
    made = bench(change=0.6)
    (plain,) = Completion([0.5], images=1).images(made.lab, made.unlearned[:1])
    other = dataclasses.replace(plain, eta=0.5, noise_scale=1.5, scheduler="DDIMScheduler")
    alone = made.lab.look([other])[0].columns["score_style"]
    again = made.battery._lab(2, made.unlearned, made.seen.get, made.lab.sequence, untouched=False)
    made.battery.heads.clear()
    again.look([plain])
    assert again.look([other])[0].columns["score_style"] == alone


def test_a_probe_of_retained_concepts_alone_costs_what_it_draws(sequence):
    probe = Composition(images=4, controls=2)
    erased = [list(sequence.targets[:1]), list(sequence.targets[:2])]
    # two retained concepts after either request, and the untouched model's once
    assert cost_of({"composition": probe}, erased, sequence) == Cost(images=3 * 2 * 4)


def test_a_search_that_is_cached_is_paid_once(sequence):
    probe = RingABell(generations=7, images=1, controls=2)
    erased = [list(sequence.targets[:1]), list(sequence.targets[:2])]
    # images: 1 + 2 and 2 + 2, and of four concepts in the untouched model
    wanted = Cost(images=11, steps=4 * 7)
    assert cost_of({"adversarial": probe}, erased, sequence) == wanted


def test_a_name_that_no_training_prompt_has_once_is_refused(sequence):
    twice = dataclasses.replace(sequence, target_prompt=("{concept} {caption} of {concept}",))
    probes = (Relearning([1], 1e-3, data=["own"]), Inversion(1e-3), UnlearnDiffAtk())
    for probe in probes:
        probe.check(sequence)
        with pytest.raises(ValueError, match="none of the training prompts of 'torch light'"):
            probe.check(twice)
    Relearning([1], 1e-3, data=["unrelated"]).check(twice)


def test_relearning_costs_a_training_of_each_concepts_own_images(sequence):
    one = dataclasses.replace(sequence, targets=sequence.targets[:1])
    probe = Relearning([0, 5], 1e-3, data=["own"], images=1, controls=2)
    assert probe.cost(one, 2) == Cost(images=4, steps=10)
    # one erased, two retained; then three of the untouched model
    assert cost_of({"relearning": probe}, [list(one.targets)], one) == Cost(images=12, steps=30)


def test_a_control_rests_on_seeds_and_names_of_the_other_domain(bench, sequence):
    made = bench(paraphrase=Paraphrase(LIST, images=1))
    key = made.battery._key("paraphrase", made.unlearned[0], sequence)
    for changes in (
        {"seeds": (5,)},
        {"cross_retain": sequence.cross_retain[:1]},
        {"parts": {"style": sequence}},  # whose rows have one column more
    ):
        judge = dataclasses.replace(
            made.battery.judge, sequence=dataclasses.replace(sequence, **changes)
        )
        battery = dataclasses.replace(made.battery, judge=judge)
        assert battery._key("paraphrase", made.unlearned[0], judge.sequence) != key


def test_nothing_is_drawn_twice(bench, monkeypatch):
    made = bench(change=0.3)
    drawn_now = drawn(made)
    images = evaluation_images(made.lab.sequence, made.unlearned, 2)
    rows = made.seen[2].set_index(["prompt", "seed"])
    for each in made.lab.look(images):
        assert (
            each.columns["score_style"]
            == rows.loc[(each.image.prompt, each.image.seed), "score_style"]
        )
    assert drawn_now == []
    other = Paraphrase(LIST, images=2).images(made.lab, made.unlearned)
    made.lab.look(other + other)
    assert sum(map(len, drawn_now)) == len(other)
    with made.lab.changed():  # other weights: all of them anew
        made.lab.look(images)
    assert sum(map(len, drawn_now)) == len(other) + len(images)
