"""The published experiments compose to the published numbers: every released setting, sequences,
lists, missing paths.
"""

import re

import pytest
import timm
from conftest import SMOKE, compose, read_conf

from cu_runner.concepts.entries import read_shipped
from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.config.compose import parse
from cu_runner.config.run_config import RunConfig
from cu_runner.models.checkpoint_files import HUB_ID
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import ConfigError

PATHS = {
    "unlearncanvas_style": (
        "model.path=/x",
        "evaluator.paths.style=/x",
        "evaluator.paths.object=/x",
    ),
    "unlearncanvas_object": (
        "model.path=/x",
        "evaluator.paths.style=/x",
        "evaluator.paths.object=/x",
    ),
    "celebrity_sd14": ("model.path=/x", "evaluator.paths.celebrity=/x", "evaluator.paths.scene=/x"),
    "celebrity_sdxl": ("model.path=/x", "evaluator.paths.celebrity=/x", "evaluator.paths.scene=/x"),
}
STYLE, OBJECT, SD14, SDXL = PATHS


def preset(experiment: str, *overrides: str) -> RunConfig:
    return parse(compose(f"experiment={experiment}", *PATHS[experiment], *overrides))


def value(plan: RunConfig, key: str) -> object:
    """A setting of the resolved configuration by its dotted key."""
    node = plan.resolved
    for part in key.split("."):
        node = node[part]
    return node


# ---------------------------------------------------------------------------- the released settings
# (experiment, method): steps, L1, L2, SelFT, the list of projection, and the tuned combination;
# None where the table has a dash
TABLE = {
    (STYLE, "conabl"): (
        1000,
        50,
        25000,
        0.05,
        "painting_captions",
        ("selft_gradproj", "reg.selft.fraction", 0.30),
    ),
    (OBJECT, "conabl"): (
        2000,
        50,
        25000,
        0.05,
        "auxiliary_styles_objects",
        ("gradproj_l1", "reg.l1.weight", 0.75),
    ),
    (SD14, "conabl"): (
        2000,
        0.10,
        100,
        0.05,
        "auxiliary_styles_objects",
        ("selft_gradproj", "reg.selft.fraction", 0.10),
    ),
    (STYLE, "sculpmem"): (1000, 10, 25000, None, "painting_captions", None),
    (OBJECT, "sculpmem"): (2000, 100, 25000, None, "auxiliary_styles_objects", None),
    (SDXL, "esd"): (
        200,
        5,
        100,
        0.40,
        "auxiliary_styles_objects",
        ("gradproj_merge", "reg.merge.lam", 1.25),
    ),
}
ROWS = pytest.mark.parametrize(("experiment", "method"), list(TABLE), ids=lambda part: part)


@ROWS
def test_steps_and_weights(experiment, method):
    steps, l1, l2, selft, _, _ = TABLE[experiment, method]
    for reg, key, expected in (
        ("l1", "weight", l1),
        ("l2", "weight", l2),
        ("selft", "fraction", selft),
    ):
        if expected is not None:
            plan = preset(experiment, f"method={method}", f"reg={reg}")
            assert plan.spine.train.steps == steps
            assert value(plan, f"reg.{reg}.{key}") == expected
    assert preset(experiment, f"method={method}").spine.train.steps == steps
    assert value(preset(experiment, f"method={method}", "reg=l1"), "reg.l1.anchor") == "previous"
    assert value(preset(experiment, f"method={method}", "reg=l2"), "reg.l2.anchor") == "previous"


@ROWS
def test_gradient_projection(experiment, method):
    steps, *_, names, _ = TABLE[experiment, method]
    plan = preset(experiment, f"method={method}", "reg=gradproj")
    assert plan.spine.train.steps == steps
    assert value(plan, "reg.gradproj.auxiliary") == {
        "source": "list",
        "name": names,
        "number": 200,
        "retained": False,
    }
    assert value(plan, "reg.gradproj.apply") == "gradient"
    assert value(plan, "reg.gradproj.tokens") == ("last" if experiment == STYLE else "own")
    assert value(plan, "reg.gradproj.earlier") is (experiment != STYLE)
    context = "{concept}" if experiment == STYLE else "An image of a {concept}"
    assert value(plan, "reg.gradproj.contexts") == [context]
    assert value(plan, "reg.gradproj.threshold") == 0.95
    assert value(plan, "reg.gradproj.energy") == 1


@pytest.mark.parametrize(
    ("experiment", "method"),
    [row for row, cells in TABLE.items() if cells[-1]],
    ids=lambda part: part,
)
def test_tuned_combination(experiment, method):
    steps, *_, names, (reg, key, expected) = TABLE[experiment, method]
    plan = preset(experiment, f"method={method}", f"reg={reg}")
    assert plan.spine.train.steps == steps
    assert list(plan.regularizers) == reg.split("_")
    assert value(plan, key) == expected
    assert value(plan, "reg.gradproj.auxiliary.name") == names
    assert value(plan, "reg.gradproj.auxiliary.number") == 200


MERGING = {
    (STYLE, "conabl"): (
        [1.25, 1.25, 1.75, 1.75, 1.75, 2.25, 2.25, 2.25, 2.25, 2.75, 2.75],
        [0.8, 0.4, 0.8, 0.4, 0.4, 0.4, 0.8, 0.6, 0.4, 0.4, 0.4],
    ),
    (OBJECT, "conabl"): (
        [1.25] * 5 + [1.75, 1.75, 2.25, 2.25, 2.75, 2.75],
        [0.2, 0.8, 0.8, 0.4, 0.4, 0.6, 0.6, 0.8, 0.6, 0.8, 0.8],
    ),
    (STYLE, "sculpmem"): (
        [1.25, 1.25, 1.75, 2.25, 2.25, 2.25, 2.25, 2.75, 2.75, 3.25, 3.25],
        [0.8, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.6, 0.6, 0.2, 0.2],
    ),
    (OBJECT, "sculpmem"): (
        [1.25] * 5 + [1.75, 1.75, 1.75, 2.25, 2.25, 2.75],
        [0.8, 0.8, 0.8, 0.2, 0.4, 0.6, 0.6, 0.4, 0.6, 0.4, 0.8],
    ),
    (SD14, "conabl"): ([1.75, 1.75, 1.75, 2.25, 2.25], [0.2, 0.6, 0.8, 0.8, 0.6]),
    (SDXL, "esd"): (1.25, [0.2, 0.2, 0.8, 0.6, 0.6]),
}


@pytest.mark.parametrize(("experiment", "method"), list(MERGING), ids=lambda part: part)
def test_merging(experiment, method):
    lam, topk = MERGING[experiment, method]
    plan = preset(experiment, f"method={method}", "reg=merge")
    arguments = value(plan, "reg.merge")
    assert (arguments["lam"], arguments["topk"]) == (lam, topk)
    assert (arguments["rule"], arguments["how"]) == ("ties", "mean")
    assert len(topk) == len(plan.sequence.build().targets) - 1
    assert plan.spine.train.steps == TABLE[experiment, method][0]
    assert plan.setting.plan == "independent"


@pytest.mark.parametrize(
    ("experiment", "method", "steps", "interval", "patience_steps"),
    [
        (STYLE, "conabl", 4000, 100, 1000),
        (OBJECT, "conabl", 4000, 100, 1000),
        (STYLE, "sculpmem", 6000, 100, 3000),
        (OBJECT, "sculpmem", 8000, 100, 3000),
        (SD14, "conabl", 12000, 100, 20000),
        (SDXL, "esd", 300, 10, 200),
    ],
)
def test_simultaneous(experiment, method, steps, interval, patience_steps):
    plan = preset(experiment, f"method={method}", "setting=simultaneous")
    assert (plan.setting.stop_at, plan.setting.interval, plan.setting.patience) == (
        99.0,
        interval,
        1,
    )
    assert plan.spine.train.steps == steps
    assert plan.setting.patience_steps == patience_steps


# ---------------------------------------------------------------------------------- common settings
@pytest.mark.parametrize(
    ("experiment", "method"), [row for row in TABLE if row[1] != "esd"], ids=lambda part: part
)
def test_settings_common_to_conabl_and_sculpmem(experiment, method):
    plan = preset(experiment, f"method={method}")
    train, anchors = plan.spine.train, plan.spine.anchors
    assert (train.optimizer, train.lr, train.batch_size) == ("adamw", 8e-6, 4)
    assert (train.betas, train.weight_decay, train.grad_clip) == ((0.9, 0.999), 0.01, 1.0)
    assert (anchors.steps, anchors.guidance, anchors.scheduler) == (
        100,
        6.0,
        "DPMSolverMultistepScheduler",
    )
    assert plan.spine.seed == 42
    method_settings = plan.method.arguments
    assert (method_settings["params"], method_settings["num_anchors"], method_settings["flip"]) == (
        "kv_xattn",
        200,
        True,
    )
    assert plan.setting.plan == "sequential"


def test_sculpmem_masks():
    settings = preset(STYLE, "method=sculpmem").method.arguments
    assert [settings[key] for key in ("active", "warmup", "interval", "exchanged", "until")] == [
        0.5,
        50,
        100,
        0.2,
        0.8,
    ]


def test_esd_on_sdxl():
    plan = preset(SDXL)
    train = plan.spine.train
    assert plan.method_name == "esd"
    assert (train.optimizer, train.lr, train.batch_size, train.weight_decay, train.grad_clip) == (
        "adam",
        2e-4,
        1,
        0.0,
        0.0,
    )
    settings = plan.method.arguments
    assert [settings[key] for key in ("variant", "eta", "guidance", "teacher", "trajectories")] == [
        "esd-x-strict",
        1.0,
        3.0,
        "previous",
        "teacher",
    ]


@pytest.mark.parametrize(
    ("experiment", "resolution", "steps", "guidance", "scheduler"),
    [
        (STYLE, 512, 100, 9.0, None),
        (OBJECT, 512, 100, 9.0, None),
        (SD14, 512, 50, 7.5, "DDIMScheduler"),
        (SDXL, 1024, 50, 7.5, None),
    ],
)
def test_sampling(experiment, resolution, steps, guidance, scheduler):
    plan = preset(experiment)
    model, sampler = plan.model.arguments, plan.spine.eval
    assert (model["path"], model["resolution"], model["precision"]) == ("/x", resolution, "fp16")
    assert (sampler.steps, sampler.guidance, sampler.scheduler) == (steps, guidance, scheduler)
    classifier = plan.evaluator.arguments
    # those of a directory, or of the architecture: of the released ones 224 pixels and 0.5
    side = 224 if experiment in (STYLE, OBJECT) else None
    assert [classifier[name] for name in ("size", "mean", "std")] == [side, None, None]
    if experiment in (STYLE, OBJECT):
        for architecture in classifier["architectures"].values():
            trained = timm.models.get_pretrained_cfg(architecture.removeprefix("timm:"))
            assert (trained.input_size, trained.mean) == ((3, 224, 224), (0.5, 0.5, 0.5))
            assert trained.std == (0.5, 0.5, 0.5)


def test_the_command_line_beats_a_preset():
    plan = preset(STYLE, "method=sculpmem", "reg=l1", "reg.l1.weight=3", "train.steps=7", "seed=1")
    assert (value(plan, "reg.l1.weight"), plan.spine.train.steps, plan.spine.seed) == (3, 7, 1)


# ---------------------------------------------------------------------------------------- sequences
def sequence_of(experiment: str, *overrides: str):
    return preset(experiment, *overrides).sequence.build()


def names(concepts) -> str:
    return " ".join(concept.name for concept in concepts)


RETAINED_STYLES = (
    "Blossom_Season Rust Crayon Fauvism Superstring Red_Blue_Ink Gorgeous_Love French Joy "
    "Greenfield Expressionism Impressionism"
)
RETAINED_OBJECTS = "Architectures Butterfly Flame Flowers Horses Human Sea Trees"


def images_of(sequence) -> list[int]:
    """Images that are judged after each request."""
    per_concept = len(sequence.cross_retain) * len(sequence.seeds)
    return [
        (len(request.erased) + len(sequence.retain)) * per_concept
        for request in plan_requests(sequence, "sequential")
    ]


def test_styles():
    sequence = sequence_of(STYLE)
    targets = (
        "Abstractionism Byzantine Cartoon Cold_Warm Ukiyoe Van_Gogh Neon_Lines Picasso On_Fire "
        "Magic_Cube Winter Vibrant_Flow"
    )
    assert names(sequence.targets) == targets
    assert names(sequence.retain) == RETAINED_STYLES
    assert names(sequence.cross_retain) == RETAINED_OBJECTS
    assert sequence.seeds == (188, 288, 588, 688, 888)
    assert (sequence.domain, sequence.cross_domain) == ("style", "object")
    assert images_of(sequence) == [(step + 12) * 8 * 5 for step in range(1, 13)]
    assert sum(images_of(sequence)) == 8880
    prompt = sequence.evaluation_prompt(sequence.targets[3], sequence.cross_retain[0])
    assert prompt == "A Architectures image in Cold_Warm style"
    pairs = sequence.training_pairs(sequence.targets[3])
    assert len(set(pairs)) == 200
    for i, (target, anchor) in enumerate(pairs):
        prepended = f"In Cold Warm Style, {anchor}"
        assert target == (f"{anchor}, in Cold Warm Style." if i % 2 else prepended)
    for ways, anchor in sequence.training_prompts(sequence.targets[5]):
        assert ways == (f"In Van Gogh Style, {anchor}", f"{anchor}, in Van Gogh Style.")


def test_objects():
    sequence = sequence_of(OBJECT)
    targets = (
        "Bears Birds Cats Dogs Fishes Frogs Jellyfish Rabbits Sandwiches Statues Towers Waterfalls"
    )
    assert names(sequence.targets) == targets
    assert names(sequence.retain) == RETAINED_OBJECTS
    assert names(sequence.cross_retain) == RETAINED_STYLES
    assert sequence.seeds == (188, 288, 588, 688, 888)
    assert (sequence.domain, sequence.cross_domain) == ("object", "style")
    assert images_of(sequence) == [12 * (step + 8) * 5 for step in range(1, 13)]
    assert sum(images_of(sequence)) == 10440
    prompt = sequence.evaluation_prompt(sequence.targets[0], sequence.cross_retain[5])
    assert prompt == "A Bears image in Red_Blue_Ink style"
    anchors = " ".join(concept.anchor for concept in sequence.targets)
    assert (
        anchors
        == "horse butterfly horse horse butterfly butterfly flower horse flower tree tree tree"
    )
    singulars = "bear bird cat dog fish frog jellyfish rabbit sandwich statue tower waterfall"
    for concept, singular in zip(sequence.targets, singulars.split(), strict=True):
        assert concept.prompt_name == singular
        pairs = sequence.training_pairs(concept)
        assert len(set(pairs)) == 200
        assert all(
            target == re.sub(rf"\b{concept.anchor}\b", singular, anchor) != anchor
            for target, anchor in pairs
        )
        assert all(re.search(rf"\b{singular}\b", target) for target, _ in pairs)


def test_celebrities():
    sequence = sequence_of(SD14)
    assert sequence == sequence_of(SDXL)
    targets = "Neil_Degrasse_Tyson Benicio_Del_Toro Aziz_Ansari Oprah_Winfrey Betty_White Megan_Fox"
    retained = (
        "Morgan_Freeman Keanu_Reeves George_Takei Aretha_Franklin Maya_Angelou Natalie_Portman"
    )
    assert [concept.name.replace(" ", "_") for concept in sequence.targets] == targets.split()
    assert [concept.name.replace(" ", "_") for concept in sequence.retain] == retained.split()
    assert [concept.anchor for concept in sequence.targets] == ["man"] * 3 + ["woman"] * 3
    prompts = {
        sequence.evaluation_prompt(sequence.targets[0], scene) for scene in sequence.cross_retain
    }
    assert len(prompts) * len(sequence.seeds) == 50
    assert all(prompt.startswith("a photo of Neil Degrasse Tyson ") for prompt in prompts)
    pairs = sequence.training_pairs(sequence.targets[-1])
    assert len(set(pairs)) == 200
    assert all(target == anchor.replace("a woman", "Megan Fox", 1) for target, anchor in pairs)
    trained = {target.removeprefix("a photo of Megan Fox ") for target, _ in pairs}
    assert trained.isdisjoint(scene.name for scene in sequence.cross_retain)


def test_the_order_of_requests_is_sweepable():
    orders = ["paper", "reversed", "shuffle-0", "shuffle-1"]
    plans = [preset(STYLE, f"sequence.order={order}") for order in orders]
    sequences = [plan.sequence.build() for plan in plans]
    targets = [names(sequence.targets) for sequence in sequences]
    assert len(set(targets)) == 4
    assert targets[1].split() == targets[0].split()[::-1]
    assert targets[2] == names(preset(STYLE, "sequence.order=shuffle-0").sequence.build().targets)
    assert len({plan.signature for plan in plans}) == 4
    for sequence in sequences[1:]:
        assert sorted(sequence.targets, key=str) == sorted(sequences[0].targets, key=str)
        for field in (
            "retain",
            "cross_retain",
            "vocabulary",
            "prompt",
            "target_prompt",
            "anchor_prompt",
            "captions",
            "seeds",
        ):
            assert getattr(sequence, field) == getattr(sequences[0], field)
    with pytest.raises(ConfigError, match=r"^sequence.order='random'"):
        preset(STYLE, "sequence.order=random")


# ------------------------------------------------------------------------------- lists in sequences
def test_captions_come_from_a_list_a_file_or_the_configuration(tmp_path):
    (tmp_path / "mine.txt").write_text("# mine\nfirst\nsecond\n", encoding="utf-8")
    smoke = read_conf("sequence/smoke.yaml")
    assert make_sequence(**smoke | {"captions": "painting_captions"}).captions == tuple(
        read_shipped("painting_captions")
    )
    assert make_sequence(**smoke | {"captions": str(tmp_path / "mine.txt")}).captions == (
        "first",
        "second",
    )
    assert make_sequence(**smoke).captions == ("ball", "box", "tent", "hoop")
    scenes = make_sequence(**smoke | {"cross_retain": "portrait_scenes"}).cross_retain
    assert [scene.name for scene in scenes] == read_shipped("portrait_scenes")


@pytest.mark.parametrize("field", ["captions", "cross_retain", "vocabulary"])
@pytest.mark.parametrize(
    ("source", "complaint"),
    [("nope", "no such list; allowed: .*painting_captions"), ("gone.txt", "no such file")],
)
def test_a_list_that_is_not_there(field, source, complaint):
    with pytest.raises(ValueError, match=f"^sequence.{field}={source}: {complaint}"):
        make_sequence(**read_conf("sequence/smoke.yaml") | {field: source})


SIZES = {
    "painting_captions": 200,
    "object_scenes": 200,
    "portrait_captions": 200,
    "portrait_scenes": 50,
    "auxiliary_styles": 200,
    "auxiliary_styles_objects": 200,
    "celebrities": 200,
    "unlearncanvas_styles": 51,
    "unlearncanvas_objects": 20,
}


@pytest.mark.parametrize(("name", "size"), list(SIZES.items()))
def test_sizes_of_lists(name, size):
    entries = read_shipped(name)
    assert len(entries) == len({entry.lower() for entry in entries}) == size
    assert all(entry.isascii() for entry in entries)


def test_labels_of_unlearncanvas():
    styles, objects = read_shipped("unlearncanvas_styles"), read_shipped("unlearncanvas_objects")
    assert styles == sorted(styles)
    assert objects == sorted(objects)
    assert set(RETAINED_STYLES.split()) | {
        concept.name for concept in sequence_of(STYLE).targets
    } <= set(styles)
    assert set(RETAINED_OBJECTS.split()) | {
        concept.name for concept in sequence_of(OBJECT).targets
    } == set(objects)


def words_of(label: str) -> str:
    """A pattern for a label of UnlearnCanvas in running text: On_Fire, on fire; Bears, bear;
    Butterfly, butterflies.
    """
    stem = label.replace("_", "[ _]")
    for ending in ("ies", "es", "s", "y"):
        stem = stem.removesuffix(ending)
    return rf"\b{stem}(s|es|y|ies|e)?\b"


@pytest.mark.parametrize(
    ("captions", "labels"),
    [
        ("painting_captions", "unlearncanvas_styles"),
        ("auxiliary_styles", "unlearncanvas_styles"),
        ("auxiliary_styles_objects", "unlearncanvas_styles"),
        ("auxiliary_styles_objects", "unlearncanvas_objects"),
        ("object_scenes", "unlearncanvas_objects"),
    ],
)
def test_generic_lists_name_no_concept(captions, labels):
    whole = captions.startswith(
        "auxiliary"
    )  # a name may hold a concept as a part: abstract expressionism
    for label in read_shipped(labels):
        pattern = re.compile(words_of(label), re.IGNORECASE)
        found = [
            entry
            for entry in read_shipped(captions)
            if (pattern.fullmatch if whole else pattern.search)(entry)
        ]
        assert not found, label


SINGULAR = {
    "Architectures": "architecture",
    "Bears": "bear",
    "Birds": "bird",
    "Butterfly": "butterfly",
    "Cats": "cat",
    "Dogs": "dog",
    "Fishes": "fish",
    "Flame": "flame",
    "Flowers": "flower",
    "Frogs": "frog",
    "Horses": "horse",
    "Human": "human",
    "Jellyfish": "jellyfish",
    "Rabbits": "rabbit",
    "Sandwiches": "sandwich",
    "Sea": "sea",
    "Statues": "statue",
    "Towers": "tower",
    "Trees": "tree",
    "Waterfalls": "waterfall",
}


@pytest.mark.parametrize("anchor", ["horse", "butterfly", "flower", "tree"])
def test_captions_of_an_anchor_hold_its_word_once_and_no_other_object(anchor):
    captions = read_shipped(f"{anchor}_captions")
    assert len(captions) == len({caption.lower() for caption in captions}) == 200
    plurals = {
        word: word[:-1] + "ies" if word.endswith("y") else word + "s" for word in SINGULAR.values()
    } | {"fish": "fishes", "jellyfish": "jellyfishes", "sandwich": "sandwiches"}
    others = {*plurals, *plurals.values(), *map(str.lower, SINGULAR)} - {anchor}
    assert sorted(SINGULAR) == read_shipped("unlearncanvas_objects")
    for caption in captions:
        words = re.findall(r"[a-z0-9]+", caption.lower())
        assert words.count(anchor) == 1, caption
        assert not others & set(words), caption


def test_people_in_lists():
    sequence = sequence_of(SD14)
    concepts = {concept.name for concept in (*sequence.targets, *sequence.retain)}
    assert concepts.isdisjoint(read_shipped("celebrities"))
    for name in ("portrait_captions", "portrait_scenes"):
        text = "\n".join(read_shipped(name))
        assert not [concept for concept in concepts if concept.split()[-1] in text.split()]


# ---------------------------------------------------------------------------- on the embedded model
def test_the_released_settings_run(in_process):
    settings = (
        "experiment=released",
        "anchors.steps=3",
        "train.steps=1",
        "eval.batch_size=48",
        "reg=gradproj",
    )
    names_of_styles = (
        "reg.gradproj.auxiliary.source=list",
        "reg.gradproj.auxiliary.name=auxiliary_styles",
        "reg.gradproj.contexts=['{concept}']",
    )
    status, out, err = in_process(*SMOKE, *settings, *names_of_styles)
    assert status == 0, err
    assert "-s42-" in out.splitlines()[-1]


# ------------------------------------------------------------------------------------ missing paths
def test_a_path_that_only_the_user_can_give(in_process):
    status, out, err = in_process(f"experiment={STYLE}", "method=sculpmem", "reg=l1")
    assert (status, out, err.count("\n")) == (2, "", 1)
    for key in PATHS[STYLE]:
        assert key.removesuffix("/x") + "..." in err
    status, _, err = in_process(f"experiment={STYLE}", *PATHS[STYLE][1:])
    assert (status, err) == (
        2,
        "cu-run: not set, and without a default: model.path; add model.path=...\n",
    )


def test_paths_are_checked_before_anything_is_loaded(in_process):
    status, _, err = in_process(f"experiment={STYLE}", *PATHS[STYLE], "wandb.mode=disabled")
    assert (status, err) == (
        2,
        "cu-run: /x: no such file or directory; give a local diffusers directory or file\n",
    )


def test_a_model_that_no_hub_has_asks_for_its_path():
    with pytest.raises(
        ConfigError, match=r"^not set, and without a default: model.path; add model.path=\.\.\.$"
    ):
        parse(compose("model=unlearncanvas"))


TRANSFORMERS = {  # denoising steps and guidance that their pipelines are published with
    "sd3_medium": (28, 7.0),
    "sd35_medium": (40, 4.5),
    "flux_dev": (28, 3.5),
    "flux_schnell": (4, 1.0),
    "pixart_sigma": (20, 4.5),
    "sana": (20, 4.5),
    "auraflow": (50, 3.5),
}


@pytest.mark.parametrize("name", ["sd14", "sd15", "sd21_base", "sdxl", *TRANSFORMERS])
def test_other_models_come_from_the_hub_unless_a_path_is_given(name):
    assert HUB_ID.fullmatch(parse(compose(f"model={name}")).model.arguments["path"])
    assert parse(compose(f"model={name}", "model.path=/x")).model.arguments["path"] == "/x"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_presets_of_transformers(name):
    chosen = parse(compose(f"model={name}", "sequence=duge", "method=esd")).spine
    assert (chosen.eval.steps, chosen.eval.guidance) == TRANSFORMERS[name]
    train = chosen.train
    flux = name.startswith("flux")  # the one of them for which settings of ESD are published
    found = (train.steps, train.optimizer, train.batch_size, train.lr)
    assert found == ((1400, "adam", 1, 1e-4) if flux else (200, "adam", 1, 5e-5))
    train = parse(compose(f"model={name}", "sequence=duge", "method=conabl")).spine.train
    assert (train.steps, train.optimizer, train.batch_size, train.lr) == (1000, "adamw", 4, 8e-6)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_the_command_of_a_preset_is_in_its_header(name):
    """The command in the header is the one that runs: its overrides compose."""
    header = (config_dir() / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    (command,) = re.findall(r"^# cu-run (.*)$", header.replace("\\\n#", ""), re.MULTILINE)
    plan = parse(compose(*command.split()))
    assert command.startswith(f"experiment={name} ")
    assert plan.spine.train.steps == TABLE[name, plan.method_name][0]
