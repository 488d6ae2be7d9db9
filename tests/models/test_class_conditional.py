"""Models with classes: images beside diffusers' own loop, what a prompt may be, which methods and
regularizers run and which are refused by name, a run that is interrupted and goes on.
"""

import csv
import json

import diffusers
import pandas as pd
import pytest
import safetensors.torch
import torch
import yaml
from conftest import compose, run_directory
from small_runs import names, overrides

from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.config.compose import parse
from cu_runner.models.loading import load_model
from cu_runner.models.parameters import select_parameters, snapshot
from cu_runner.models.sampling import generate
from cu_runner.request.scope import Scope
from cu_runner.request.token_limit import check_prompts
from cu_runner.runner.parts import check_words, named
from cu_runner.runner.training import check_composition, erase
from cu_runner.runtime.seeding import RandomSource, derive_seed, image_noise
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import Sampler

CLASSES = ["tree", "star", "ball", "box", "tent", "hoop", "boat", "kite", "cup", "sun"]
SHOWN = ["tree", "Star", "sun"]  # a prompt is a name, however it is spelled
WORDS = {
    "method": {"uce", "speed", "oce", "dp", "mace_fusion"},
    "reg": {"gradproj", "gradproj_l1", "gradproj_merge", "selft_gradproj", "nullspace", "minvar"}
    | {"gate", "recommended", "rece"},
}
SEQUENCE = {
    "name": "classes",
    "domain": "object",
    "cross_domain": "style",
    "targets": ["tree", "star"],
    "retain": ["ball", "box"],
    "cross_retain": ["lava flow"],
    "vocabulary": CLASSES,
    "anchors": {"tree": "tent", "star": "hoop"},
    "prompt": "{object} {style}",
    "target_prompt": "{concept}",
    "anchor_prompt": "{anchor}",
    "captions": ["image"],
    "seeds": [0],
}


@pytest.fixture(scope="session")
def directories(random_pipeline, tmp_path_factory):
    """Small models with ten classes: with a null class, and without."""
    found = {}
    for null in (True, False):
        found[null] = tmp_path_factory.mktemp("classes")
        random_pipeline.make_class_conditional(found[null], tiny=True, null=null)
    return found


def load(directory, classes=CLASSES, **more):
    return load_model(str(directory), 8, Sampler(2, 1.0), classes=classes, **more)


@pytest.fixture(scope="session")
def shared_model(directories):
    return load(directories[True])


@pytest.fixture
def model(shared_model):
    """The model with a null class; its weights are put back."""
    before = snapshot(dict(shared_model.denoiser.named_parameters()))
    yield shared_model
    for name, parameter in shared_model.denoiser.named_parameters():
        parameter.requires_grad_(False).copy_(before[name])


# ---------------------------------------------------------------------------------------- the model
def their_images(directory, sampler: Sampler) -> torch.Tensor:
    """Those of diffusers' own parts, in a plain loop, with each image's own noise."""
    pipeline = diffusers.DDPMPipeline.from_pretrained(directory)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    if sampler.scheduler:
        scheduler = getattr(diffusers, sampler.scheduler).from_config(scheduler.config)
    scheduler.set_timesteps(sampler.steps)
    labels = torch.tensor([CLASSES.index(name.lower()) for name in SHOWN])
    seeds = range(len(SHOWN))
    images = image_noise(SHOWN, list(seeds), (3, 8, 8)) * scheduler.init_noise_sigma
    draws = [
        torch.Generator().manual_seed(derive_seed("sampler", prompt, seed))
        for prompt, seed in zip(SHOWN, seeds, strict=True)
    ]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            if sampler.guidance == 1:
                output = unet(images, timestep, class_labels=labels).sample
            else:
                both = torch.cat([torch.full_like(labels, 10), labels])
                rows = torch.cat([images, images])
                none, own = unet(rows, timestep, class_labels=both).sample.chunk(2)
                output = none + sampler.guidance * (own - none)
            images = scheduler.step(output, timestep, images, generator=draws).prev_sample
    return (images / 2 + 0.5).clamp(0, 1)  # as DDPMPipeline does


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", [None, "DDIMScheduler"])
def test_images_are_those_of_diffusers_bit_by_bit(directories, model, scheduler, guidance):
    sampler = Sampler(4, guidance, scheduler)
    (ours,) = generate(model, SHOWN, [0, 1, 2], sampler, batch_size=3, label="")
    theirs = their_images(directories[True], sampler)
    assert torch.equal(ours, theirs)
    assert theirs.std() > 0.1
    assert (theirs[0] - theirs[1]).abs().max() > 0.1


def test_pixels_are_the_latents(model):
    assert model.latent_shape == (3, 8, 8)
    assert model.networks == (model.denoiser,)
    images = torch.rand(2, 3, 8, 8)
    latents = model.encode_images(images)
    assert torch.equal(latents, images * 2 - 1)
    torch.testing.assert_close(model.decode_latents(latents), images)
    assert torch.equal(model.decode_latents(latents.sign() * 9).unique(), torch.tensor([0.0, 1.0]))
    with pytest.raises(ModelError, match="has no autoencoder"):
        _ = model.vae
    with pytest.raises(ModelError, match="has no tokens"):
        _ = model.tokenizer


def test_a_prompt_is_the_name_of_a_class_or_nothing(directories, model):
    text = model.encode_prompts(["sun", "TREE", ""])
    assert text.hidden.tolist() == [9, 0, 10]
    assert model.encode_empty().hidden.tolist() == [10]
    with pytest.raises(ModelError, match=r"no class 'a tree'; a prompt is .*: tree, star, ball"):
        model.encode_prompts(["a tree"])
    without = load(directories[False])
    assert without.encode_prompts(["sun"]).hidden.tolist() == [9]
    with pytest.raises(ModelError, match=r"no null class.*10 classes.*guidance=1"):
        next(generate(without, ["sun"], [0], Sampler(2, 2.0), batch_size=1, label=""))


def test_the_fingerprint_covers_the_order_of_the_classes(directories, model):
    again = load(directories[True])
    assert again.fingerprint() == model.fingerprint()
    turned = load(directories[True], classes=CLASSES[::-1])
    assert turned.fingerprint() != model.fingerprint()


def test_what_is_no_such_model_is_refused_in_a_line(directories, tmp_path, pipelines):
    (tmp_path / "names.txt").write_text("\n".join(CLASSES))
    from_file = load(directories[True], classes=str(tmp_path / "names.txt"))
    assert from_file.encode_prompts(["sun"]).hidden.tolist() == [9]
    for classes, said in (
        (None, "model.classes is not set"),
        (CLASSES[:8], r"model.classes has 8 names and the unet 11 classes"),
        ([*CLASSES[:9], "Tree"], "model.classes: 'tree' and 'Tree' are one name"),
    ):
        with pytest.raises(ModelError, match=said):
            load(directories[True], classes)
    with pytest.raises(ModelError, match="reads prompts and has no classes"):
        load_model(str(pipelines["sd15"]), 64, Sampler(2, 1.0), classes=CLASSES)
    with pytest.raises(ModelError, match="resolution=7: not a multiple of 2"):
        load_model(str(directories[True]), 7, Sampler(2, 1.0), classes=CLASSES)
    for key, value, said in (
        ("class_embed_type", "identity", "unet has class_embed_type='identity'"),
        ("num_class_embeds", None, "no classes"),
        ("out_channels", 6, "out_channels=6"),
    ):
        changed = tmp_path / key
        diffusers.DDPMScheduler().save_pretrained(changed / "scheduler")
        config = dict(diffusers.UNet2DModel.load_config(directories[True] / "unet"))
        diffusers.UNet2DModel.from_config(config | {key: value}).save_pretrained(changed / "unet")
        index = json.loads((directories[True] / "model_index.json").read_text())
        (changed / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=said):
            load(changed)
    index["vae"] = ["diffusers", "AutoencoderKL"]
    (changed / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="has vae beside a UNet2DModel"):
        load(changed)


# --------------------------------------------------------------------------------- what runs on it
def parts_of(method: str, reg: str):
    words = [*overrides(method, reg), "sequence=smoke"]
    if method == "esd":
        words += ["method.variant=esd-all"]
    elif method not in WORDS["method"]:
        words += ["method.params=full"]
    plan = parse(compose(*words))
    return plan.method.build(), {name: node.build() for name, node in plan.regularizers.items()}


@pytest.fixture
def scope(model, settings):
    sequence = make_sequence(**SEQUENCE)
    params = select_parameters(model.denoiser, "full")
    latents = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return Scope(
        model=model,
        sequence=sequence,
        request=plan_requests(sequence, "sequential")[0],
        params=params,
        start=snapshot(params),
        base=snapshot(params),
        rng=RandomSource(0, 1),
        train=settings(batch_size=2, steps=2),
        anchors=lambda prompts, number, mirrored=False: latents[:number],
    )


@pytest.mark.parametrize(
    "method",
    [name for name in names("method") if name not in (*WORDS["method"], "imported")],
)
def test_methods_that_compare_predictions_train_it(scope, method):
    chosen, _ = parts_of(method, "none")
    check_words(scope.model, named(method, chosen, {}))
    report = erase(scope, chosen, {}, scope.train)
    assert len(report.logs) == 2
    moved = [name for name, each in scope.params.items() if not each.equal(scope.base[name])]
    assert "class_embedding.weight" in moved
    assert all(each.isfinite().all() for each in scope.params.values())


@pytest.mark.parametrize(
    "reg", [name for name in names("reg") if name not in (*WORDS["reg"], "none", "merge")]
)
def test_regularizers_of_weights_go_with_it(scope, reg):
    method, regularizers = parts_of("rgd", reg)
    check_composition(method, regularizers)
    check_words(scope.model, named("rgd", method, regularizers))
    assert len(erase(scope, method, regularizers, scope.train).logs) == 2


@pytest.mark.parametrize("group", ["method", "reg"])
def test_what_needs_words_is_refused_by_name(model, group):
    for name in sorted(WORDS[group]):
        chosen = (name, "none") if group == "method" else ("conabl", name)
        method, regularizers = parts_of(*chosen)
        with pytest.raises(ValueError, match=f"^{group}=") as caught:
            check_words(model, named(chosen[0], method, regularizers))
        assert "reads the names of classes" in str(caught.value)
        assert str(caught.value).partition(" ")[0].partition("=")[2] in [name, *regularizers]


def test_prompts_of_a_sequence_must_be_classes(model):
    sequence = make_sequence(**SEQUENCE | {"target_prompt": "a {concept}"})
    with pytest.raises(ModelError, match="no class 'a tree'"):
        check_prompts(model, sequence)
    with pytest.raises(ValueError, match="begin_token=detached: UNet2DModel makes no keys"):
        model.begin_token_detached()


# ---------------------------------------------------------------------------------------- a run
@pytest.fixture
def run_on_it(in_process, tmp_path, directories):
    """Returns run(*overrides) -> (status, stdout, stderr), of RGD on the model with classes."""
    (tmp_path / "tree/sequence").mkdir(parents=True)
    rows = [[name, name, seed] for name in CLASSES[:4] for seed in (0, 1)]
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "concept", "seed"], *rows])
    prompts = {"prompts": str(tmp_path / "prompts.csv")}
    text = yaml.safe_dump({"_target_": "cu_runner.concepts.make_sequence"} | SEQUENCE | prompts)
    (tmp_path / "tree/sequence/classes.yaml").write_text("# Classes.\n" + text)
    words = ["--config-dir", str(tmp_path / "tree"), "sequence=classes", "model=class_conditional"]
    words += [f"model.path={directories[True]}", f"model.classes=[{','.join(CLASSES)}]"]
    words += ["model.resolution=8", "model.sampler.steps=2", "train.steps=3", "train.batch_size=2"]
    words += ["tracker=none", "num_threads=1", "train.save_every=1", "train.lr=1e-3"]

    def run(*more: str) -> tuple[int, str, str]:
        return in_process(*words, *more)

    return run


RGD = ["method=rgd", "method.params=full", "method.num_images=4", "method.retain.images=4"]


def test_a_request_of_rgd_and_a_resume_are_bitwise_one_run(run_on_it, tmp_path, monkeypatch):
    status, out, err = run_on_it(*RGD, "paths.outputs=whole")
    assert (status, err) == (0, "")
    whole = run_directory(out, tmp_path)
    metrics = pd.read_csv(whole / "metrics.csv")
    assert metrics["concept"].tolist()[1:] == ["tree", "star"]
    assert metrics["UA"].notna().all()
    assert metrics["RA_C"].isna().all()  # nothing of another domain is in its images
    assert (metrics["drift_l2"][1:] > 0).all()

    from cu_runner.runner.runner import Runner

    after_step = Runner.after_step

    def interrupted(self, training, *rest):
        after_step(self, training, *rest)
        if (rest[1].request.index, training.done) == (2, 2):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "after_step", interrupted)
        assert run_on_it(*RGD, "paths.outputs=parts")[0] == 130
    status, out, err = run_on_it(*RGD, "paths.outputs=parts")
    assert (status, err) == (0, "")
    parts = run_directory(out, tmp_path)
    for step in ("01", "02"):
        one, two = (
            safetensors.torch.load_file(path / f"steps/{step}/delta.safetensors")
            for path in (whole, parts)
        )
        assert one.keys() == two.keys()
        assert all(torch.equal(one[name], two[name]) for name in one)
        tables = [pd.read_csv(path / f"steps/{step}/predictions.csv") for path in (whole, parts)]
        pd.testing.assert_frame_equal(*tables)


def test_a_run_that_cannot_be_is_refused_in_a_line(run_on_it):
    for words, said in (
        (["method=uce"], "method=uce solves for keys and values, which are linear in the text"),
        ([*RGD, "reg=gradproj"], "reg=gradproj projects on what the texts of other prompts"),
        ([*RGD, "recovery=inversion"], "recovery=inversion trains the embedding of a word"),
        (RGD[:1], "method.params=kv_xattn: UNet2DModel has no such parameters"),
        ([*RGD, "sequence.anchors.tree=bush"], "the model has no class 'bush'"),
    ):
        status, _, err = run_on_it(*words)
        assert (status, err.count("\n")) == (2, 1), err
        assert said in err
