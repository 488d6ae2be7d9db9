"""The embedded world: renderer, shipped pipeline, judges, and the names that sequences use."""

import importlib
import json
import random
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import SMOKE, compose, read_conf

from cu_runner.concepts.entries import read_shipped
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.config.compose import parse
from cu_runner.models.checkpoint_files import locate
from cu_runner.models.loading import load_model
from cu_runner.models.sampling import generate
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.settings import Sampler
from cu_runner.shapecanvas.captions import FORMS, SYNONYMS, draw_caption, first_caption
from cu_runner.shapecanvas.objects import OBJECTS
from cu_runner.shapecanvas.render import render
from cu_runner.shapecanvas.styles import FAMILY_NAMES, PALETTES, STYLE_PARTS, STYLES, TEXTURES

WEIGHTS = locate("package:shapecanvas/weights")
SEQUENCES = sorted(
    path.stem for path in (config_dir() / "sequence").glob("s*.yaml")
)  # shapecanvas_* and smoke


def draw(objects, styles, seed: int = 0):
    return render(list(objects), list(styles), torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------- renderer
def test_names():
    assert len(STYLES) == len(set(STYLES)) == 144
    assert len(OBJECTS) == len(set(OBJECTS)) == 32
    assert all(len(style.split()) <= 2 for style in STYLES)
    assert list(FAMILY_NAMES) == list(PALETTES)
    assert {len(names) for names in FAMILY_NAMES.values()} == {12}
    assert not {word for style in STYLES for word in style.split()} & set(OBJECTS)


def test_the_first_word_of_a_style_is_in_no_other_name_and_in_no_description():
    words = [word for style in STYLES for word in style.split()]
    described = {word for parts in STYLE_PARTS.values() for word in parts.description.split()}
    for style in STYLES:
        first = style.split()[0]
        assert words.count(first) == 1
        assert first not in described
    assert not described & set(words)
    assert not set(SYNONYMS.values()) & ({*words, *OBJECTS} | described)


def test_other_words_for_a_style_or_an_object_mean_no_other():
    descriptions = [parts.description for parts in STYLE_PARTS.values()]
    assert len(set(descriptions)) == 144
    assert list(SYNONYMS) == list(OBJECTS)
    assert len(set(SYNONYMS.values())) == 32


def test_a_family_shares_its_palette_and_no_texture():
    for family, names in FAMILY_NAMES.items():
        assert {STYLE_PARTS[name].palette for name in names} == {family}
        assert {STYLE_PARTS[name].texture for name in names} == set(TEXTURES)


def test_captions():
    assert first_caption("tree", "lava flow") == "a tree image in lava flow style"
    assert first_caption("tree", None) == "a tree image"
    assert first_caption(None, "lava flow") == "an image in lava flow style"
    generator = random.Random(0)
    drawn = [draw_caption("tree", "lava flow", generator) for _ in range(400)]
    forms = FORMS[True, True]
    named = {form.format(object="tree", style="lava flow") for form in forms}
    assert named < set(drawn)
    other = sum(("fir" in caption.split()) for caption in drawn)
    described = sum(STYLE_PARTS["lava flow"].description in caption for caption in drawn)
    assert 60 < other < 140
    assert 60 < described < 140  # a quarter of 400, five standard deviations of 8.7 either way
    assert not any("fir" in draw_caption(None, "torch light", generator).split() for _ in range(50))


def test_images_are_deterministic_in_the_generator():
    objects, styles = OBJECTS[:6], STYLES[:72:12]
    first = draw(objects, styles)
    assert first.shape == (6, 3, 64, 64)
    assert first.dtype == torch.float32
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, draw(objects, styles))
    assert (first - draw(objects, styles, seed=1)).abs().flatten(1).max(1).values.min() > 0.05


def test_position_scale_and_rotation_vary():
    images = draw(["box"] * 8, ["torch light"] * 8)
    distances = torch.cdist(images.flatten(1), images.flatten(1)) + 1e9 * torch.eye(8)
    assert distances.min() > 5


def test_every_style_and_every_object_has_its_own_look():
    styles = draw(["ball"] * 144, STYLES)
    assert (torch.cdist(styles.flatten(1), styles.flatten(1)) + 1e9 * torch.eye(144)).min() > 1
    objects = torch.cat([draw([name], ["stone"]) for name in OBJECTS])
    assert (torch.cdist(objects.flatten(1), objects.flatten(1)) + 1e9 * torch.eye(32)).min() > 1


def test_edges_are_anti_aliased():
    """A misty background and object change slowly; most steps between neighbours at the edge are
    not full jumps.
    """
    misty = [style for style in STYLES if STYLE_PARTS[style].texture == "mist"]
    image = draw(["box"], misty[:1])[0].mean(0)
    low, high = image.quantile(0.1), image.quantile(0.9)
    between = (
        ((image > low + 0.25 * (high - low)) & (image < low + 0.75 * (high - low))).sum().item()
    )
    assert between > 30
    assert image.unique().numel() > 500


def test_styles_of_one_palette_are_nearer_in_colour_than_styles_of_others():
    colours = torch.stack([draw(OBJECTS, [style] * 32).mean((0, 2, 3)) for style in STYLES])
    distances = torch.cdist(colours, colours)
    palettes = [STYLE_PARTS[style].palette for style in STYLES]
    same = torch.tensor([[a == b for b in palettes] for a in palettes])
    within = distances[same & ~torch.eye(144, dtype=torch.bool)].mean()
    across = distances[~same].mean()
    assert within < across / 3


# -------------------------------------------------------------------------------------------- build
@pytest.fixture
def build(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("build_shapecanvas")


def test_half_of_the_pairs_hold_every_object_and_every_style_half_of_the_time(build):
    objects = torch.arange(32).repeat_interleave(144)
    styles = build.every_other(objects, torch.arange(144).repeat(32))
    pairs = set(zip(objects.tolist(), styles.tolist(), strict=True))
    assert len(pairs) == 32 * 144 / 2
    assert {style for _, style in pairs} == set(range(144))
    assert (0, 143) not in pairs
    assert (1, 143) in pairs


def test_text_outside_a_span_and_its_entropy_rank_by_hand(build):
    span = torch.tensor([[2.0, 0.0, 0.0], [2.0, 0.0, 1e-5]])  # the third axis does not count
    states = torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    expected = torch.tensor([16 / 25, 0.0, 1.0])
    torch.testing.assert_close(build.share_outside(states, span), expected)
    corners = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert build.entropy_rank(corners) == pytest.approx(2.0)
    assert build.entropy_rank(torch.tensor([[1.0, 5.0], [-1.0, 5.0]])) == pytest.approx(1.0)


def test_the_transformer_fits_and_begins_with_no_velocity(build):
    transformer = build.make_transformer()
    assert sum(2 * part.numel() for part in transformer.state_dict().values()) < 24e6
    latents, text = torch.randn(2, 6, 16, 16), torch.randn(2, 20, 512)
    with torch.no_grad():
        velocity = build.FlowOf(transformer)(latents, torch.tensor([1.0, 900.0]), text, text[:, 0])
    assert torch.equal(velocity, torch.zeros(2, 6, 16, 16))


def test_what_denoisers_are_trained_on(build):
    """Ten captions of one pair, whose end is at position 3; latents and states are numbers."""
    states = torch.full((33, 145, 7, 20, 512), 2.0, dtype=torch.float16)
    states[..., 3, :] = 3.0  # the end's
    empty = torch.arange(20.0)[:, None].repeat(1, 512)
    latents = torch.zeros(32, 144, 1, 6, 16, 16)
    cached = build.Cached(latents, states, torch.full((33, 145, 7), 3), empty)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "LATENTS_PER_PAIR", 1)
        clean, context, pooled = cached.draw(400, torch.Generator().manual_seed(0))
    assert clean.shape == (400, 6, 16, 16)
    rows, ends = context[:, :, 0], pooled[:, 0]
    whole = torch.tensor([2.0] * 3 + [3.0] + [2.0] * 16)
    kinds = {
        "whole": ((rows == whole).all(1), 3.0),
        "cut": ((rows == torch.cat([whole[:3], empty[3:, 0]])).all(1), 1.0),
        "empty": ((rows == empty[:, 0]).all(1), 1.0),
    }
    shares = {name: (found.float().mean().item(), end) for name, (found, end) in kinds.items()}
    for name, (found, end) in kinds.items():
        assert (ends[found] == end).all(), name
    assert sum(share for share, _ in shares.values()) == pytest.approx(1.0)
    for name, expected in (("whole", 0.45), ("cut", 0.45), ("empty", 0.1)):
        assert shares[name][0] == pytest.approx(expected, abs=0.08)  # over three deviations


@pytest.fixture
def four_pairs(build, tmp_path, monkeypatch):
    """A build of two styles of two objects whose latents are there: their names and images."""
    for folder in ("work", "weights"):
        (tmp_path / folder).mkdir()
    sizes = {"OBJECTS": OBJECTS[:2], "STYLES": STYLES[:24:12], "LATENTS_PER_PAIR": 1}
    for name, value in sizes.items():
        monkeypatch.setattr(build, name, value)
    names = [(thing, style) for thing in build.OBJECTS for style in build.STYLES]
    images = draw(*zip(*names, strict=True))
    vae = diffusers.AutoencoderKL.from_pretrained(WEIGHTS / "pipeline/vae")
    with torch.no_grad():
        latents = vae.encode(images * 2 - 1).latent_dist.mean
    torch.save(latents.view(2, 2, 1, 6, 16, 16), tmp_path / "work/latents.pt")
    return names, images


def test_a_unet_of_another_size_has_the_text_encoder_and_the_autoencoder_of_the_package(
    build, four_pairs, tmp_path, monkeypatch, call_command
):
    """The stage `other_unet`, as the study of sizes needs it."""
    for setting, value in ((build.STEPS, 20), (build.BATCH, 2)):
        monkeypatch.setitem(setting, "unet", value)
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "weights")]
    size = ["--channels", "16", "16", "32", "--device", "cpu", "--threads", "1"]
    words = [*places, *size, "--only", "other_unet"]
    assert call_command(build.main, "build_shapecanvas.py", *words)[0] == 0
    made, shipped = (
        diffusers.StableDiffusionPipeline.from_pretrained(folder / "pipeline")
        for folder in (tmp_path / "weights", WEIGHTS)
    )
    assert made.unet.config.block_out_channels == [16, 16, 32]
    for part in ("text_encoder", "vae"):
        own, other = (getattr(each, part).state_dict() for each in (made, shipped))
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)
    pipeline = tmp_path / "weights/pipeline"
    assert (
        abs(1 / made.vae.config.scaling_factor - torch.load(tmp_path / "work/latents.pt").std())
        < 1e-4
    )
    model = load_model(str(pipeline), 64, Sampler(2, 2.5))
    drawn = next(generate(model, ["a tree image"], [1], Sampler(2, 2.5), batch_size=1, label=""))
    assert drawn.shape == (1, 3, 64, 64)
    assert drawn.isfinite().all()


@pytest.mark.parametrize("given", ["--work", "--out"])
def test_a_unet_of_another_size_does_not_take_the_place_of_the_shipped_one(
    build, tmp_path, monkeypatch, capsys, given
):
    words = [given, str(tmp_path / "new"), "--only", "other_unet"]
    monkeypatch.setattr("sys.argv", ["build_shapecanvas.py", *words])
    with pytest.raises(SystemExit) as ended:
        build.main()
    other = {"--work": "--out", "--out": "--work"}[given]
    assert ended.value.code == 2
    assert f"other_unet needs a {other} of its own" in capsys.readouterr().err


def test_a_small_transformer_is_trained_packed_and_draws(build, four_pairs, tmp_path, monkeypatch):
    """The stage `flow` on two styles of two objects."""
    out, work = tmp_path / "weights", tmp_path / "work"
    for shipped in ("pipeline", "style_classifier", "object_classifier"):
        (out / shipped).symlink_to(WEIGHTS / shipped)
    for setting, value in ((build.STEPS, 120), (build.BATCH, 8), (build.PEAK_RATE, 5e-3)):
        monkeypatch.setitem(setting, "flow", value)
    small = build.make_transformer
    monkeypatch.setattr(build, "make_transformer", lambda: small(1, 2, 16))
    names, images = four_pairs
    build.pack_flow(work, out, "cpu")
    assert sorted(path.name for path in (out / "flow").iterdir()) == [
        "model_index.json",
        "scheduler",
        "transformer",
    ]
    monkeypatch.setattr(build, "FLOW_SAMPLER", Sampler(4, 2.5))
    model, _, sampler = build.load_result(out, "cpu", flow=True)
    assert isinstance(model.scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    captions = [first_caption(*name) for name in names]
    clean, noise = model.encode_images(images), torch.randn(4, 6, 16, 16)
    timesteps = torch.tensor([300.0, 500.0, 700.0, 1000.0])
    noisy, target = model.add_noise(clean, noise, timesteps), model.target(clean, noise)
    with torch.no_grad():
        velocity = model.predict(noisy, timesteps, model.encode_prompts(captions))
    # it began at no velocity
    assert (velocity - target).square().mean() < 0.8 * target.square().mean()
    drawn = next(generate(model, captions, [1] * 4, sampler, batch_size=4, label=""))
    assert drawn.shape == images.shape
    assert drawn.isfinite().all()
    assert not torch.equal(drawn[0], drawn[1])
    build.pack_flow(work, out, "cpu")  # finished: nothing is trained again
    again, _, _ = build.load_result(out, "cpu", flow=True)
    assert again.fingerprint() == model.fingerprint()


# ---------------------------------------------------------------------------------- shipped weights
def test_the_shipped_directory_is_a_stable_diffusion_pipeline():
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(
        WEIGHTS / "pipeline", local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        "a tree image in torch light style",
        num_inference_steps=2,
        generator=generator,
        output_type="np",
    ).images
    assert images.shape == (1, 64, 64, 3)
    assert 0 <= images.min() < images.max() <= 1


def test_the_shipped_weights_are_small():
    sizes = {path: path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()}
    flow = sum(size for path, size in sizes.items() if path.is_relative_to(WEIGHTS / "flow"))
    assert 10e6 < flow <= 24e6
    assert sum(sizes.values()) - flow <= 48e6


def test_the_judges_know_every_style_and_object(evaluator):
    assert evaluator.labels() == {"style": list(STYLES), "object": list(OBJECTS)}


def test_the_judges_are_right_on_fresh_images(evaluator):
    styles = [style for style in STYLES for _ in range(8)]
    objects = [OBJECTS[i % 32] for i in range(len(styles))]
    right = {"style": 0, "object": 0}
    generator = torch.Generator().manual_seed(20_000)
    for start in range(0, len(styles), 200):
        rows = slice(start, start + 200)
        found = evaluator.predict(render(objects[rows], styles[rows], generator))
        right["style"] += sum(
            a == b for a, b in zip(found["style"].labels, styles[rows], strict=True)
        )
        right["object"] += sum(
            a == b for a, b in zip(found["object"].labels, objects[rows], strict=True)
        )
    assert right["style"] / len(styles) >= 0.97
    assert right["object"] / len(styles) >= 0.97


def test_the_text_encoder_leaves_room_beside_the_auxiliary_names(loaded_model):
    assert loaded_model.denoiser.config.cross_attention_dim == 512


def test_the_shipped_transformer_draws_what_its_prompt_names(evaluator):
    read = read_conf("model/shapecanvas_flow.yaml")
    sampler = Sampler(**read["sampler"])
    model = load_model(read["path"], read["resolution"], sampler, shared=read["shared"])
    assert isinstance(model.denoiser, diffusers.SD3Transformer2DModel)
    names = list(zip(OBJECTS[::4], STYLES[::18], strict=True))
    captions = [first_caption(name, style) for name, style in names]
    drawn = next(generate(model, captions, [7] * 8, sampler, batch_size=8, label=""))
    found = evaluator.predict(drawn)
    right = [
        (found["object"].labels[n], found["style"].labels[n]) == name
        for n, name in enumerate(names)
    ]
    assert sum(right) >= 7


@pytest.mark.parametrize("folder", [".", "flow"])
def test_the_saved_base_accuracy(folder):
    path = WEIGHTS / folder / "base_accuracy.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["benchmark"]["images"] >= 960
    assert found["benchmark"]["style_percent"] >= 97
    assert found["benchmark"]["object_percent"] >= 97
    assert found["all_styles"]["images"] >= 960
    assert found["all_styles"]["style_percent"] >= 95


# ---------------------------------------------------------------------------------------- sequences
def resolved(name: str) -> dict:
    """A sequence file over the one that its defaults list names."""
    content = read_conf(f"sequence/{name}.yaml")
    for base in content.pop("defaults", []):
        if base != "_self_":
            content = resolved(base) | content
    return content


@pytest.mark.parametrize("name", SEQUENCES)
def test_every_name_of_a_sequence_is_one_of_the_renderer(name):
    for sequence in parts_of(name):
        check_names(sequence)


def parts_of(name):
    """A sequence by domain; of one domain it is the only one."""
    return parse(compose(f"sequence={name}")).sequence.build().by_domain


def check_names(sequence):
    known = {"style": STYLES, "object": OBJECTS}
    for concept in (*sequence.targets, *sequence.retain, *sequence.cross_retain):
        assert concept.name in known[concept.domain]
    assert all(concept.anchor is None or concept.anchor in OBJECTS for concept in sequence.targets)
    assert set(sequence.vocabulary) <= set(known[sequence.domain])
    assert set(sequence.captions) <= {*STYLES, *OBJECTS}
    assert {concept.name for concept in sequence.targets} <= set(sequence.vocabulary)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("shapecanvas_style", (12, 12, 8)),
        ("shapecanvas_object", (12, 8, 16)),
        ("shapecanvas_style100", (100, 32, 3)),
        ("shapecanvas_tune", (12, 12, 8)),
        ("shapecanvas_tune_object", (8, 4, 12)),
        ("smoke", (2, 2, 2)),
    ],
)
def test_sizes_of_the_sequences(name, sizes):
    sequence = make_sequence(**resolved(name))
    assert (len(sequence.targets), len(sequence.retain), len(sequence.cross_retain)) == sizes


def test_retained_styles_include_near_neighbours_of_unlearned_ones():
    sequence = make_sequence(**resolved("shapecanvas_style"))
    families = {STYLE_PARTS[concept.name].palette for concept in sequence.targets}
    near = [STYLE_PARTS[concept.name].palette in families for concept in sequence.retain]
    assert near == [True] * 8 + [False] * 4


@pytest.mark.parametrize("name", [name for name in SEQUENCES if name != "smoke"])
def test_training_prompts_hold_nothing_that_retention_is_judged_by(name):
    parts = parts_of(name)
    judged = {concept.name for each in parts for concept in (*each.retain, *each.cross_retain)}
    for sequence in parts:
        trained = {*sequence.captions, *(concept.anchor for concept in sequence.targets)}
        assert not trained & judged
        assert not {concept.name for concept in sequence.targets} & judged
        assert sequence.prompt not in sequence.target_prompt


@pytest.mark.parametrize("domain", ["style", "object"])
def test_a_retained_concept_has_sixteen_images(domain):
    sequence = make_sequence(**resolved(f"shapecanvas_{domain}"))
    assert {sequence.num_images(concept) for concept in sequence.retain} == {16}


def test_the_shipped_lists_are_those_of_the_renderer():
    assert set(read_shipped("shapecanvas_styles")) == set(STYLES)
    assert set(read_shipped("shapecanvas_objects")) == set(OBJECTS)
    assert len(read_shipped("painting_styles")) >= 100
    assert len(read_shipped("common_objects")) >= 100


# --------------------------------------------------------------------------------------------- slow
@pytest.mark.slow
def test_generated_images_show_what_their_prompts_say(in_process, tmp_path):
    """960 images of the benchmark's concepts with the default sampler."""
    overrides = [
        override for override in SMOKE if not override.startswith(("sequence", "model.sampler"))
    ]
    seeds = "sequence.seeds=[1,2,3,4,5]"
    assert in_process(*overrides, seeds, "sequence.targets=[torch light]", "train.steps=1")[0] == 0
    (path,) = tmp_path.glob("outputs/runs/*/*/steps/00/metrics.json")
    metrics = json.loads(path.read_text())
    assert metrics["RA_I"] >= 97
    assert metrics["RA_C"] >= 97
