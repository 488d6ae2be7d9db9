"""Every file of conf/ composes and builds; the signature, the directory's name, tuned settings."""

import atexit
import functools
import importlib.util
import inspect
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import compose
from copies import make_descriptor, make_references
from hydra.utils import get_object
from omegaconf import OmegaConf

from cu_runner.config.compose import parse
from cu_runner.config.revise import revise
from cu_runner.config.targets import Node
from cu_runner.runtime.paths import PACKAGE, config_dir
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.settings import TrainSettings

FILES = sorted(path.relative_to(config_dir()).as_posix() for path in config_dir().rglob("*.yaml"))


def choose(file: str) -> list[str]:
    """The overrides that bring a file of conf/ into the composition."""
    group, _, name = file.removesuffix(".yaml").rpartition("/")
    return {
        "": [],
        "tuned": [f"sequence={name}"],
        "training": [f"model={name}"],
        "local": [],
    }.get(group, [f"{group}={name}"])


PARTS = "package:shapecanvas/weights"
EMBEDDED = {
    "method.checkpoint": str(PACKAGE / "shapecanvas/weights/pipeline"),
    "model.path": f"{PARTS}/pipeline",
    "evaluator.paths.style": f"{PARTS}/style_classifier",
    "evaluator.paths.object": f"{PARTS}/object_classifier",
    "evaluator.paths.celebrity": f"{PARTS}/style_classifier",
    "evaluator.paths.scene": f"{PARTS}/open_clip",
    "evaluator.path": "null",
    "retention.clip_score.path": "null",
    "retention.features.path": f"{PARTS}/open_clip",
    "retention.prompts": "general_captions",
}
LABELS = {
    "style": "shapecanvas_styles",
    "object": "shapecanvas_objects",
    "scene": "portrait_scenes",
}


@functools.cache
def copies() -> dict[str, str]:
    """A descriptor and references for evaluator=copy_detection, which nothing ships."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    references = make_references(folder / "memorised", {"torch light": ["red"]})
    descriptor = str(make_descriptor(folder))
    return {"evaluator.descriptor": descriptor, "evaluator.references": str(references)}


@functools.cache
def with_classes() -> Path:
    """A model with classes, for model=class_conditional."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    path = Path(__file__).parents[2] / "scripts/make_random_pipeline.py"
    spec = importlib.util.spec_from_file_location("make_random_pipeline", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.make_class_conditional(folder, tiny=True)
    return folder


def compose_complete(*overrides: str):
    """compose, with the embedded model's parts for paths that only a user can give, and their
    labels.
    """
    config = compose(*overrides)
    missing = sorted(OmegaConf.missing_keys(config))
    made = copies() if "evaluator.descriptor" in missing else {}
    if config.model.get("classes"):
        given = f"model.path={with_classes()}"
        return compose(*overrides, given, "model.resolution=8")
    given = [f"{key}={(EMBEDDED | made)[key]}" for key in missing]
    given += [f"evaluator.allow_pickle=[{made['evaluator.descriptor']}]"] if made else []
    if "evaluator.path" in missing:
        given.append(f"evaluator.model={PARTS}/open_clip")
    elif missing and not made:
        given += [
            f"evaluator.labels.{domain}={LABELS[domain]}"
            for domain in config.evaluator.get("labels", {})
        ]
    if config.evaluator.get("mean", 0) is None:  # the embedded judges bring no image processor
        given += ["evaluator.size=64", "evaluator.interpolation=bilinear"]
        given += [f"evaluator.{name}=[0.5,0.5,0.5]" for name in ("mean", "std")]
    if not OmegaConf.is_missing(config.model, "path") and not config.model.path.startswith(
        "package:"
    ):  # of the hub
        given.append(f"model.path={EMBEDDED['model.path']}")
    return compose(*overrides, *given) if given else config


BUILT: dict[str, str] = {}


def home(node: Node, **device: str) -> str:
    """The module of what a node builds; the same node, of many files, is built once."""
    key = repr((node, device))
    if key not in BUILT:
        BUILT[key] = type(node.build(**device)).__module__
    return BUILT[key]


def signature(*overrides: str) -> str:
    return parse(compose("sequence=smoke", *overrides)).signature


# --------------------------------------------------------------------------------------- every file
@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_every_node_builds(file):
    plan = parse(compose_complete(*choose(file)))
    assert isinstance(plan.spine.train, TrainSettings)
    for node in (plan.sequence, plan.method, *plan.regularizers.values()):
        assert isinstance(node, Node)
        assert home(node).startswith("cu_runner.")
    if plan.retention:
        assert plan.retention.build(device="cpu").num_images > 0
    for node in (plan.model, plan.evaluator):
        assert home(node, device="cpu").startswith("cu_runner.")


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith(("method/", "reg/"))])
def test_options_of_a_file_are_the_parameters_of_its_class(file):
    content = yaml.safe_load((config_dir() / file).read_text(encoding="utf-8"))
    nodes = (
        [content]
        if file.startswith("method/")
        else [node for node in content.values() if isinstance(node, dict)]
    )
    for node in nodes:
        if "_target_" in node:
            parameters = list(inspect.signature(get_object(node["_target_"])).parameters)
            assert [key for key in node if key != "_target_"] == parameters


@pytest.mark.parametrize("file", FILES)
def test_every_file_begins_with_a_comment(file):
    assert (config_dir() / file).read_text(encoding="utf-8").startswith("# ")


# ---------------------------------------------------------------------------------------- signature
def test_numbers_count_by_value():
    assert signature("reg=l2", "reg.l2.weight=5") == signature("reg=l2", "reg.l2.weight=5.0")
    assert signature("reg=l2", "reg.l2.weight=5") != signature("reg=l2", "reg.l2.weight=5.5")
    assert signature("train.lr=0.0002") == signature("train.lr=2e-4")


@pytest.mark.parametrize(
    "override",
    [
        "device=cpu",
        "num_threads=2",
        "paths.outputs=elsewhere",
        "wandb.mode=disabled",
        "wandb.entity=me",
        "eval.batch_size=7",
    ],
)
def test_where_and_how_fast_does_not_count(override):
    assert signature(override) == signature()


@pytest.mark.parametrize(
    "override",
    [
        "train.lr=1e-3",
        "train.steps=7",
        "train.batch_size=2",
        "train.betas=[0.9,0.99]",
        "eval.steps=3",
        "eval.guidance=1",
        "seed=1",
        "method.loss=noise",
        "method.num_anchors=3",
        "reg=l1",
        "model.sampler.steps=3",
        "sequence.seeds=[1]",
        "sequence.targets=[snow drift,torch light]",
    ],
)
def test_science_counts(override):
    assert signature(override) != signature()


def test_where_shared_parts_lie_counts_as_the_path_of_the_model_does():
    """The run is another one, its training is not: the weights there have a fingerprint."""
    plain, lent, moved = (
        parse(compose("sequence=smoke", "model=sd15", "model.path=/x", *more))
        for more in ((), ["+model.shared=/y"], ["+model.shared=/z"])
    )
    assert len({plain.signature, lent.signature, moved.signature}) == 3
    assert plain.training_key == lent.training_key == moved.training_key
    assert lent.model.arguments["shared"] == "/y"
    assert revise(lent.resolved, ["model.shared=/z"])["model"]["shared"] == "/z"


def test_retention_that_is_off_is_no_part_of_a_run():
    """The run that the README shows keeps its directory; it was made without any."""
    plan = parse(compose("method=conabl", "reg=gradproj"))
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    assert f"conabl-gradproj-sequential-s0-{plan.signature[:8]}\n" in readme
    assert plan.retention is None
    assert "retention" not in plan.resolved
    assert signature("retention=shapecanvas") != signature()
    assert signature("retention=shapecanvas", "retention.seeds=[6]") != signature(
        "retention=shapecanvas"
    )


def test_the_zero_shot_labels_are_the_concepts_of_the_sequence():
    plan = parse(compose("sequence=smoke", "evaluator=open_clip", "evaluator.path=/x.safetensors"))
    styles = ["torch light", "snow drift", "lava flow", "fog bank"]
    assert plan.evaluator.arguments["labels"] == {"style": styles, "object": ["tree", "star"]}
    assert signature(
        "evaluator=open_clip", "evaluator.path=/x", "evaluator.allow_pickle=[/x]"
    ) == signature("evaluator=open_clip", "evaluator.path=/x")


def test_order_of_regularizers_is_kept_and_counts():
    plans = [parse(compose(f"reg={choice}")) for choice in ("[l2,gradproj]", "[gradproj,l2]")]
    assert [list(plan.regularizers) for plan in plans] == [["l2", "gradproj"], ["gradproj", "l2"]]
    assert plans[0].signature != plans[1].signature


def test_directory_follows_the_contract():
    plan = parse(compose("sequence=smoke", "reg=[l2,gradproj]", "seed=4", "paths.outputs=there"))
    name = f"conabl-l2+gradproj-sequential-s4-{plan.signature[:8]}"
    assert plan.directory == Path("there/runs/smoke") / name
    assert parse(compose("sequence=smoke")).directory.name.startswith("conabl-none-sequential-s0-")


# -------------------------------------------------------------------------------------------- tuned
@pytest.fixture
def tuned_tree(tmp_path):
    """A configuration tree with tuned settings of the smoke sequence; the override that adds it."""
    (tmp_path / "tuned").mkdir()
    cells = {
        "conabl": {
            "none": {"train.lr": 5e-4},
            "l2+gradproj": {
                "train.steps": 11,
                "reg.l2.weight": 3.5,
                "reg.gradproj.apply": "update",
            },
        }
    }
    (tmp_path / "tuned" / "smoke.yaml").write_text(yaml.safe_dump(cells), encoding="utf-8")
    return f"hydra.searchpath=[file://{tmp_path}]"


def test_a_tuned_cell_applies_to_its_method_and_regularizers_only(tuned_tree):
    plain = parse(compose(tuned_tree, "sequence=smoke"))
    assert (plain.spine.train.lr, plain.spine.train.steps) == (5e-4, 60)
    both = parse(compose(tuned_tree, "sequence=smoke", "reg=[l2,gradproj]"))
    assert (both.spine.train.lr, both.spine.train.steps) == (2e-4, 11)
    assert both.regularizers["l2"].arguments["weight"] == 3.5
    assert both.regularizers["gradproj"].arguments["apply"] == "update"
    assert parse(compose(tuned_tree, "sequence=smoke", "reg=l2")).spine.train.steps == 60
    assert parse(compose(tuned_tree, "sequence=smoke", "reg=[gradproj,l2]")).spine.train.steps == 60
    assert "tuned" not in both.resolved


def test_the_command_line_beats_a_tuned_cell(tuned_tree):
    assert parse(compose(tuned_tree, "sequence=smoke", "train.lr=0.25")).spine.train.lr == 0.25


def test_a_tuned_run_is_the_run_with_the_same_settings_given_by_hand(tuned_tree):
    tuned = parse(compose(tuned_tree, "sequence=smoke"))
    assert tuned.signature == parse(compose("sequence=smoke", "train.lr=5e-4")).signature


def test_an_unknown_tuned_key_is_refused(tmp_path):
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "smoke.yaml").write_text(
        "conabl: {none: {train.lrr: 1}}", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match=r"^conf/tuned: train.lrr is not a setting of this run"):
        parse(compose(f"hydra.searchpath=[file://{tmp_path}]", "sequence=smoke"))


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("tuned/")])
def test_shipped_tuned_cells_apply(file):
    tuned = yaml.safe_load((config_dir() / file).read_text(encoding="utf-8"))
    tuned.pop("defaults", None)
    models = tuned.pop("models", ["shapecanvas"])
    assert set(models) <= {path.stem for path in (config_dir() / "model").iterdir()}
    model = [f"model={models[0]}", "model.path=/a/directory"]
    for method, cells in tuned.items():
        for name, cell in cells.items():
            special = {
                "default": [],
                "none": ["reg=none"],
                "simultaneous": ["setting=simultaneous"],
            }
            chosen = special.get(name, [f"reg=[{name.replace('+', ',')}]"])
            config = compose(*choose(file), *model, f"method={method}", *chosen)
            parse(config)
            assert {key: OmegaConf.select(config, key) for key in cell or {}} == (cell or {})


@pytest.mark.parametrize("group", ["method", "reg"])
def test_the_defaults_of_a_yaml_file_are_those_of_its_class(group):
    """So that a library user and a command-line user get the same method."""
    checked = 0
    for path in sorted((config_dir() / group).glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        node = content.get(path.stem) if group == "reg" else content
        if not node or "_target_" not in node:  # a combination
            continue
        parameters = inspect.signature(get_object(node.pop("_target_"))).parameters
        for key, value in node.items():
            if isinstance(value, str) and (
                found := re.fullmatch(r"\$\{tuned:[\w.]+,(.*)\}", value)
            ):
                value = yaml.safe_load(found[1])
            default = parameters[key].default
            if (
                isinstance(value, dict)
                or default is inspect.Parameter.empty
                or str(value).startswith("${model.")
            ):
                continue
            default = list(default) if isinstance(default, tuple) else default
            assert (float(value) if isinstance(default, float) else value) == default, (
                f"{path.stem}: {key}"
            )
            checked += 1
    assert checked >= 20


# ------------------------------------------------------------------- training settings of the model
SD = ("model=sd15", "evaluator=imagenet", "evaluator.paths.object=/x", "evaluator.paths.scene=/x")


@pytest.mark.parametrize(
    ("method", "steps", "optimizer", "batch_size", "lr"),
    [
        ("conabl", 1000, "adamw", 4, 8e-6),
        ("sculpmem", 1000, "adamw", 4, 8e-6),
        ("esd", 200, "adam", 1, 5e-5),
        ("erasediff", 1000, "adamw", 8, 1e-5),
        ("rgd", 100, "adamw", 8, 1e-5),
    ],
)
def test_a_model_brings_its_own_training_settings(method, steps, optimizer, batch_size, lr):
    for model in ("sd14", "sd15", "sd21_base", "sdxl"):
        plan = parse(compose(*SD, f"model={model}", "sequence=duge", f"method={method}"))
        train = plan.spine.train
        assert (train.steps, train.optimizer, train.batch_size) == (steps, optimizer, batch_size)
        assert train.lr == lr
        assert plan.notes == ()
    assert parse(compose("sequence=smoke")).spine.train.lr == 2e-4
    assert parse(compose(*SD, "sequence=duge", "train.lr=3e-6")).spine.train.lr == 3e-6


def test_a_model_without_training_settings_asks_for_them(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("defaults: [sd15]\n", encoding="utf-8")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    given = ("train.steps=5", "train.lr=1e-5", "train.optimizer=adam", "train.weight_decay=0")
    with pytest.raises(ConfigError, match=r"^not set, and without a default: train.batch_size; "):
        parse(compose(*SD, search, "model=mine", "sequence=duge", *given))
    plan = parse(compose(*SD, search, "model=mine", "sequence=duge", *given, "train.batch_size=2"))
    assert (plan.spine.train.lr, plan.spine.train.batch_size) == (1e-5, 2)


def test_a_run_notes_settings_of_another_model_and_settings_of_nobody():
    (note,) = parse(compose("model=sd15", "sequence=shapecanvas_style")).notes
    assert note.startswith("conf/tuned/shapecanvas_style.yaml was made on model=shapecanvas, and ")
    assert note.endswith("its settings are not taken; those of conf/training/sd15.yaml are")
    _, note = parse(compose("model=sd15", "sequence=shapecanvas_style", "reg=gradproj")).notes
    assert note.startswith("conf/training has no settings of method=conabl with reg=gradproj for ")
    (note,) = parse(compose("sequence=smoke", "reg=[l2,gradproj]")).notes
    assert note.startswith("conf/tuned has no settings of method=conabl with reg=l2+gradproj for ")
    for quiet in ("reg=none", "reg=gradproj"):
        assert parse(compose(quiet)).notes == ()


def test_the_models_of_tuned_settings_are_a_list_of_names():
    for wrong in ("5", "shapecanvas"):
        with pytest.raises(ConfigError, match=r"tuned\.models"):
            parse(compose(f"tuned.models={wrong}"))


def test_settings_of_conf_training_count_as_searched_and_may_be_of_a_setting():
    assert parse(compose("model=shapecanvas_flow", "reg=gradproj")).tuned
    assert not parse(compose("model=shapecanvas_flow", "reg=rece", "method=uce")).tuned
    together = parse(compose("model=shapecanvas_flow", "setting=simultaneous"))
    assert together.spine.train.steps == 720


@pytest.mark.parametrize("reg", ["none", "gradproj", "merge"])
def test_settings_that_were_found_on_another_model_are_not_taken(reg):
    model = "model=shapecanvas_flow"
    tuned = parse(compose(model, f"reg={reg}")).resolved
    own = parse(compose(model, "sequence=smoke", f"reg={reg}")).resolved  # there are none for it
    assert {**tuned, "sequence": None} == {**own, "sequence": None}


def test_regularizers_of_concepts_of_ones_own_take_what_was_chosen_for_the_model():
    plan = parse(compose("sequence=smoke", "reg=gradproj"))
    assert plan.spine.train.lr == 0.001
    assert plan.resolved["reg"]["gradproj"]["tokens"] == "all"
    assert plan.notes == ()
    (note,) = parse(compose("sequence=smoke", "method=esd", "reg=gradproj")).notes
    assert "method=esd with reg=gradproj" in note
    given = parse(compose("sequence=smoke", "reg=gradproj", "reg.gradproj.tokens=own"))
    assert given.resolved["reg"]["gradproj"]["tokens"] == "own"


def test_composed_and_decomposed_accents_are_the_same_run():
    """In the configuration, so in every comparison with it; paths stay as they are."""
    plans = [
        parse(
            compose("sequence=smoke", f"sequence.retain=['{name}']", "+sequence.prompts='e\u0301'")
        )
        for name in ("caf\u00e9", "cafe\u0301")
    ]
    assert plans[0].signature == plans[1].signature
    assert plans[1].resolved["sequence"]["retain"] == ["caf\u00e9"]
    assert plans[1].resolved["sequence"]["prompts"] == "e\u0301"
