"""Fingerprints see what is no weight: every key of a configuration, tokenizers, processors."""

import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import transformers
from conftest import SMOKE, read_conf, run_directory

from cu_runner.evaluators.classifier import Classifier
from cu_runner.evaluators.faces import FaceDetector, FaceSettings
from cu_runner.evaluators.open_clip import OpenClip
from cu_runner.models.checkpoint_files import locate
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.hashing import WITHOUT_EFFECT, describe_timm, describe_tokenizer
from cu_runner.models.loading import load_model
from cu_runner.retention.features import FeatureExtractor, FeatureSource
from cu_runner.schema.settings import Sampler

EMBEDDED = "package:shapecanvas/weights/pipeline"
KINDS = ("embedded", "sd15", "sd21_base", "sdxl")
PREPROCESSING = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}


def load(path: Path | str) -> DiffusionModel:
    return load_model(str(path), 64, Sampler(2, 2.0))


@pytest.fixture(scope="module")
def directories(pipelines):
    """The diffusers directory of every kind of model."""
    return {"embedded": locate(EMBEDDED), **pipelines}


@pytest.fixture
def copy_of(directories, tmp_path):
    """Returns copy(kind) -> a copy of its directory, to be changed."""
    return lambda kind: Path(shutil.copytree(directories[kind], tmp_path / kind))


def edit(file: Path, **changes: object) -> None:
    """Change keys of a JSON file."""
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )


def another(value: object) -> object:
    """A value of the same kind that is not this one."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1 if math.isfinite(value) else 0.0
        case str():
            return f"{value}_2"
        case list():
            return [another(value[0]), *value[1:]] if value else [1]
        case dict():
            return value | {"another": 1}
    return 1  # null


# ----------------------------------------------------------------------------------- configurations
def parts_of(model: DiffusionModel) -> dict[str, object]:
    """The components that have a configuration, by the name of their folder."""
    encoders = {
        f"text_encoder{suffix}": part
        for suffix, part in zip(("", "_2"), model.text_encoders, strict=False)
    }
    return {"unet": model.denoiser, "vae": model.vae, "scheduler": model.scheduler, **encoders}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_of_every_configuration_counts_or_is_listed(directories, kind, monkeypatch):
    """A loaded component has every key of its file, with its value: changing one is the other."""
    model = load(directories[kind])
    monkeypatch.setattr(
        "cu_runner.models.components.describe_tokenizer", functools.cache(describe_tokenizer)
    )
    before = model.components.configuration()
    for name, part in parts_of(model).items():
        (file,) = [
            path
            for path in (directories[kind] / name).glob("*config.json")
            if path.name != "tokenizer_config.json"
        ]
        keys = json.loads(file.read_text(encoding="utf-8"))
        assert len(keys.keys() - set(WITHOUT_EFFECT)) >= 10, name
        for key, value in keys.items():
            with monkeypatch.context() as patch:
                if isinstance(part, transformers.PreTrainedModel):
                    assert key in WITHOUT_EFFECT or getattr(part.config, key) == value, (name, key)
                    patch.setattr(part.config, key, another(value))
                else:
                    read = json.loads(json.dumps(part.config, default=str)).get(key)
                    assert key in WITHOUT_EFFECT or read == value, (name, key)
                    changed = type(part.config)({**part.config, key: another(value)})
                    patch.setattr(part, "_internal_dict", changed)
                same = model.components.configuration() == before
                assert same == (key in WITHOUT_EFFECT), (name, key)
            assert model.components.configuration() == before


CHANGES = [
    ("text_encoder", {"layer_norm_eps": 1e-3}),
    ("text_encoder", {"num_attention_heads": 2}),
    ("unet", {"act_fn": "gelu"}),
    ("unet", {"attention_head_dim": 2}),
    ("vae", {"act_fn": "gelu"}),
]


@pytest.mark.parametrize("kind", ["embedded", "sd15"])
def test_a_changed_file_is_another_model(copy_of, kind):
    directory = copy_of(kind)
    found = [load(directory).fingerprint()]
    for part, change in CHANGES:
        file = directory / part / "config.json"
        whole = file.read_bytes()
        edit(file, **change)
        found.append(load(directory).fingerprint())
        file.write_bytes(whole)
    edit(directory / "tokenizer/tokenizer_config.json", model_max_length=9)
    found.append(load(directory).fingerprint())
    assert len(set(found)) == len(CHANGES) + 2
    edit(directory / "unet/config.json", _diffusers_version="0.1", _name_or_path="elsewhere")
    edit(
        directory / "text_encoder/config.json",
        transformers_version="4.0",
        dtype="float16",
        architectures=["Other"],
    )
    assert load(directory).fingerprint() == found[-1]


def test_a_run_goes_on_with_the_model_that_it_began_with_alone(in_process, tmp_path, copy_of):
    directory = copy_of("embedded")
    wanted = (*SMOKE, f"model.path={directory}")
    status, out, _ = in_process(*wanted)
    run = run_directory(out, tmp_path)
    assert status == 0
    assert len(list((tmp_path / "outputs/cache/base_eval").iterdir())) == 1
    edit(directory / "text_encoder/config.json", layer_norm_eps=1e-3)
    for name in ("steps/02/step.json", "summary.json"):
        (run / name).unlink()
    status, _, err = in_process(*wanted)
    assert (status, err) == (
        1,
        f"cu-run: {run.relative_to(tmp_path)}: was begun with another model; "
        "restore it or move the run away; "
        f"{run.relative_to(tmp_path)}/run.log holds the traceback\n",
    )
    assert in_process(*wanted, "seed=1")[0] == 0
    for kind in ("base_eval", "anchors"):
        assert len(list((tmp_path / "outputs/cache" / kind).iterdir())) >= 2, kind


# --------------------------------------------------------------------------------------- tokenizers
def read_tokenizer(directory: Path) -> dict[str, object]:
    return describe_tokenizer(transformers.AutoTokenizer.from_pretrained(directory))


def test_every_key_of_a_tokenizers_configuration_counts(copy_of):
    for kind, folder in (("embedded", "tokenizer"), ("sd15", "tokenizer"), ("sdxl", "tokenizer_2")):
        directory = copy_of(kind) / folder
        (directory / "special_tokens_map.json").unlink(missing_ok=True)
        before, file = read_tokenizer(directory), directory / "tokenizer_config.json"
        whole = file.read_bytes()
        keys = set(json.loads(whole)) - {
            "tokenizer_class",
            "backend",
        }  # the class by name: what it reads is compared
        for key in keys | {"padding_side", "truncation_side", "split_special_tokens"}:
            value = {
                "padding_side": "left",
                "truncation_side": "left",
                "split_special_tokens": True,
            }.get(key)
            edit(file, **{key: value or another(json.loads(whole)[key])})
            assert read_tokenizer(directory) != before, (kind, key)
            file.write_bytes(whole)
        assert read_tokenizer(directory) == before
        edit(file, name_or_path="elsewhere")
        assert read_tokenizer(directory) == before


def test_a_tokenizers_files_count_by_content(copy_of):
    directory = copy_of("sd15") / "tokenizer"
    before, merges, words = (
        read_tokenizer(directory),
        directory / "merges.txt",
        directory / "vocab.json",
    )
    lines = merges.read_text(encoding="utf-8").splitlines()
    merges.write_text(
        "\n".join([lines[0], lines[2], lines[1], *lines[3:]]) + "\n", encoding="utf-8"
    )
    swapped = read_tokenizer(directory)
    merges.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_tokenizer(directory) == before != swapped
    vocabulary = json.loads(words.read_text(encoding="utf-8"))
    edit(words, cat=vocabulary["dog"], dog=vocabulary["cat"])
    assert read_tokenizer(directory) != before
    edit(words, cat=vocabulary["cat"], dog=vocabulary["dog"])
    edit(directory / "special_tokens_map.json", pad_token="!")
    assert read_tokenizer(directory) != before


def test_a_tokenizer_that_has_read_something_is_the_same(copy_of):
    tokenizer = transformers.AutoTokenizer.from_pretrained(copy_of("embedded") / "tokenizer")
    before = describe_tokenizer(tokenizer)
    tokenizer(["a tree image"], padding="max_length", truncation=True)
    assert describe_tokenizer(tokenizer) == before


# ------------------------------------------------------------------------------------------- judges
@pytest.fixture
def judges(random_pipeline, tmp_path):
    """The judges of celebrities in miniature: a classifier, an open_clip directory, a detector."""
    random_pipeline.make_classifiers(tmp_path / "judges", "celebrity", tiny=True)
    return tmp_path / "judges"


def test_every_key_of_a_classifier_counts_or_is_listed(judges, monkeypatch):
    path = judges / "celebrity"
    network = Classifier({"celebrity": str(path)}, **PREPROCESSING)
    before, config = (
        network.fingerprint(),
        json.loads((path / "config.json").read_text(encoding="utf-8")),
    )
    for key, value in {
        "hidden_act": "relu",
        "layer_norm_eps": 1e-3,
        "num_attention_heads": 2,
    }.items():
        edit(path / "config.json", **{key: value})
        assert Classifier({"celebrity": str(path)}, **PREPROCESSING).fingerprint() != before, key
        edit(path / "config.json", **{key: config[key]})
    assert Classifier({"celebrity": str(path)}, **PREPROCESSING).fingerprint() == before
    edit(path / "config.json", transformers_version="4.0", dtype="float16", architectures=["Other"])
    assert Classifier({"celebrity": str(path)}, **PREPROCESSING).fingerprint() == before


def test_a_face_detector_counts_with_its_image_processor(judges):
    settings = FaceSettings(str(judges / "faces"), "celebrity")
    processor, network = judges / "faces/preprocessor_config.json", judges / "faces/config.json"
    found = [
        FaceDetector(settings, "cpu").fingerprint(),
        FaceDetector(settings, "cpu").fingerprint(),
    ]
    assert found[0] == found[1]
    for file, change in (
        (processor, {"size": {"height": 32, "width": 32}}),
        (processor, {"image_mean": [0.1, 0.2, 0.3]}),
        (processor, {"resample": 3}),
        (network, {"layer_norm_eps": 1e-3}),
        (network, {"hidden_act": "relu"}),
    ):
        whole = file.read_bytes()
        edit(file, **change)
        found.append(FaceDetector(settings, "cpu").fingerprint())
        file.write_bytes(whole)
    found.append(
        FaceDetector(
            FaceSettings(str(judges / "faces"), "celebrity", threshold=0.6), "cpu"
        ).fingerprint()
    )
    assert len(set(found)) == len(found) - 1


def test_an_open_clip_model_counts_with_its_configuration_and_tokenizer(tmp_path):
    directory = Path(
        shutil.copytree(locate("package:shapecanvas/weights/open_clip"), tmp_path / "clip")
    )
    file, tokenizer = directory / "open_clip_config.json", directory / "tokenizer.json"
    config, rules = json.loads(file.read_text()), json.loads(tokenizer.read_text())

    def fingerprint() -> str:
        return OpenClip(str(directory), {"object": ["tree", "star"]}).fingerprint()

    found = [fingerprint()]
    for change in (
        {"text_cfg": config["model_cfg"]["text_cfg"] | {"heads": 2}},
        {"vision_cfg": config["model_cfg"]["vision_cfg"] | {"head_width": 8}},
        {"quick_gelu": True},
    ):
        edit(file, model_cfg=config["model_cfg"] | change)
        found.append(fingerprint())
    edit(file, model_cfg=config["model_cfg"])
    merges = rules["model"]["merges"]
    edit(tokenizer, model=rules["model"] | {"merges": [merges[1], merges[0], *merges[2:]]})
    found.append(fingerprint())
    assert len(set(found)) == 5


def test_timm_and_torchscript_count_with_what_they_compute(tmp_path):
    assert describe_timm("test_resnet") != describe_timm("test_resnet2")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "architecture": "test_resnet",
                "model_args": {"act_layer": "gelu"},
                "pretrained_cfg": {},
            }
        )
    )
    assert describe_timm(f"local-dir:{tmp_path}") == ["test_resnet", {"act_layer": "gelu"}]
    safetensors.torch.save_file(
        timm.create_model("test_resnet").state_dict(), tmp_path / "net.safetensors"
    )
    labels = {"labels": {"style": "imagenet"}, **PREPROCESSING}
    plain, other = (
        Classifier(
            {"style": str(tmp_path / "net.safetensors")},
            architectures={"style": f"timm:{name}"},
            **labels,
        )
        for name in ("test_resnet", f"local-dir:{tmp_path}")
    )
    assert plain.fingerprint() != other.fingerprint()

    found = []
    for name, function in (("a", lambda x: x.mean((2, 3))), ("b", lambda x: x.amax((2, 3)))):
        path = tmp_path / f"{name}.pt"
        torch.jit.trace(function, torch.rand(1, 3, 8, 8)).save(str(path))
        found.append(
            FeatureExtractor(
                FeatureSource("module", str(path), size=8, allow_pickle=(str(path),)), "cpu"
            ).fingerprint()
        )
    assert found[0] != found[1]


def test_the_shipped_judges_have_no_path_in_their_fingerprint(evaluator, tmp_path):
    weights = locate("package:shapecanvas/weights")
    settings = read_conf("evaluator/shapecanvas.yaml")
    paths = {
        domain: shutil.copytree(weights / Path(path).name, tmp_path / domain)
        for domain, path in settings["paths"].items()
    }
    moved = Classifier(
        **settings | {"paths": {domain: str(path) for domain, path in paths.items()}}
    )
    assert moved.fingerprint() == evaluator.fingerprint()
