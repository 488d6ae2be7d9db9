"""Judges from files: transformers, timm and open_clip, their labels, faces; and metrics where some
images show no face.
"""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
import transformers
from conftest import read_conf
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.evaluators.base import Evaluator
from cu_runner.evaluators.classifier import Classifier
from cu_runner.evaluators.evaluate import classify, evaluate, through_jpeg
from cu_runner.evaluators.faces import FaceSettings
from cu_runner.evaluators.labels import read_labels
from cu_runner.evaluators.metrics import metrics, read_predictions, step_metrics
from cu_runner.evaluators.open_clip import OpenClip
from cu_runner.models.checkpoint_files import locate
from cu_runner.models.image_text import ImageTextSource, load_image_text
from cu_runner.models.preprocessing import Preprocessing, choose_preprocessing
from cu_runner.retention.features import FeatureExtractor, FeatureSource
from cu_runner.runner.measure import Instruments
from cu_runner.runtime.code_identity import identify
from cu_runner.schema.errors import ModelError, WeightFileError
from cu_runner.schema.settings import EvalSettings
from cu_runner.shapecanvas.objects import OBJECTS
from cu_runner.shapecanvas.render import render
from cu_runner.shapecanvas.styles import STYLES
from cu_runner.store.cache import Cache

HALF = [0.5, 0.5, 0.5]
PREPROCESSING = {"size": 32, "mean": HALF, "std": HALF}
CLIP = "package:shapecanvas/weights/open_clip"
LABELS = ["a", "b", "c"]


@pytest.fixture(scope="module")
def images():
    """60 rendered images [60, 3, 64, 64] with the indices of their objects and styles."""
    generator = torch.Generator().manual_seed(31)
    objects, styles = (
        torch.randint(32, (60,), generator=generator),
        torch.randint(144, (60,), generator=generator),
    )
    return (
        render([OBJECTS[i] for i in objects], [STYLES[i] for i in styles], generator),
        objects,
        styles,
    )


def judge(
    path: str, labels: object = LABELS, architecture: str = "timm:test_resnet", **more
) -> Classifier:
    settings = {"architectures": {"style": architecture}, "labels": {"style": labels}}
    return Classifier({"style": path}, **PREPROCESSING, **settings | more)


# --------------------------------------------------------------------------------------------- timm
@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return timm.create_model("test_resnet", num_classes=3).eval()


@pytest.fixture
def resnet_file(resnet, tmp_path):
    safetensors.torch.save_file(resnet.state_dict(), tmp_path / "net.safetensors")
    return str(tmp_path / "net.safetensors")


def test_timm_from_a_file_predicts_what_the_network_says(resnet, resnet_file):
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = resnet((images - 0.5) / 0.5).softmax(1).max(1)
    found = judge(resnet_file).predict(images)["style"]
    assert found.labels == [LABELS[index] for index in expected.indices]
    assert found.scores == pytest.approx(expected.values.tolist())
    assert found.faces is None


def test_a_pickle_needs_permission_and_a_nested_state_dict_is_found(resnet, resnet_file, tmp_path):
    torch.save({"model_state_dict": resnet.state_dict(), "epoch": 9}, tmp_path / "net.pth")
    with pytest.raises(WeightFileError, match=r"allow_pickle=\["):
        judge(str(tmp_path / "net.pth"))
    allowed = judge(str(tmp_path / "net.pth"), allow_pickle=[str(tmp_path / "net.pth")])
    assert allowed.fingerprint() == judge(resnet_file).fingerprint()


def test_label_lists_come_from_files_and_their_order_counts(resnet_file, tmp_path):
    (tmp_path / "labels.txt").write_text("# outputs\nc\nb\na\n", encoding="utf-8")
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    plain, turned = judge(resnet_file), judge(resnet_file, str(tmp_path / "labels.txt"))
    assert turned.labels() == {"style": ["c", "b", "a"]}
    swap = {"a": "c", "b": "b", "c": "a"}
    assert [swap[label] for label in plain.predict(images)["style"].labels] == turned.predict(
        images
    )["style"].labels
    assert turned.fingerprint() != plain.fingerprint()
    assert judge(resnet_file, interpolation="bicubic").fingerprint() != plain.fingerprint()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"labels": ["a", "b"]},
            ModelError,
            "has 3 outputs and the label list 2 labels; they must be as many$",
        ),
        (
            {"labels": "unlearncanvas_styles"},
            ModelError,
            "has 3 outputs and the label list 51 labels",
        ),
        (
            {"labels": ["a", "b", "a"]},
            ValueError,
            "^evaluator.labels.style: a stands for two outputs",
        ),
        (
            {"labels": "nowhere.txt"},
            ValueError,
            "^evaluator.labels.style=nowhere.txt: no such file",
        ),
        (
            {"labels": "nothing"},
            ValueError,
            "^evaluator.labels.style=nothing: no such list; allowed: .*unlearncanvas_styles",
        ),
        ({"architecture": "timm:nothing"}, ModelError, "^timm:nothing: Unknown model"),
        (
            {"architecture": "timm"},
            ValueError,
            "^evaluator.architectures.style=timm: allowed: timm:NAME, open_clip",
        ),
        (
            {"architecture": "keras:x"},
            ValueError,
            "^evaluator.architectures.style=keras:x: allowed",
        ),
        (
            {"architecture": "timm:test_vit"},
            ModelError,
            "lacks .* of test_vit; the file belongs to another architecture",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(resnet_file, changes, error, message):
    arguments = {"labels": LABELS} | changes
    with pytest.raises(error, match=message) as caught:
        judge(resnet_file, **arguments)
    assert "\n" not in str(caught.value)


def test_settings_of_a_domain_without_a_path_are_refused(resnet_file):
    with pytest.raises(
        ValueError, match=r"^evaluator.labels: object is no domain of evaluator.paths \(style\)$"
    ):
        Classifier({"style": resnet_file}, **PREPROCESSING, labels={"object": LABELS})
    with pytest.raises(
        ValueError,
        match=r"^evaluator.labels.style is not set; timm weights do not name their outputs$",
    ):
        Classifier(
            {"style": resnet_file}, **PREPROCESSING, architectures={"style": "timm:test_resnet"}
        )


# ------------------------------------------------------------------------------------- transformers
@pytest.fixture
def directory_with(tmp_path):
    """Returns write(names) -> a transformers directory whose config.json names its outputs so."""

    def write(names: list[str]) -> str:
        config = transformers.ViTConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
            image_size=32,
            patch_size=16,
            id2label=dict(enumerate(names)),
            label2id={name: index for index, name in enumerate(names)},
        )
        transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
        return str(tmp_path / "vit")

    return write


@pytest.mark.parametrize(
    ("spell", "order", "refused"),
    [
        (lambda name: name, 1, None),
        (lambda name: name.replace("_", " ").lower(), 1, None),
        (lambda name: name.replace("_", "-").upper() + " ", 1, None),
        (lambda name: f"style of {name}", -1, None),  # names of its own say nothing of the order
        (
            lambda name: name,
            -1,
            "output 0 is 'Winter' in its config.json and 'Abstractionism' in the label list",
        ),
        (
            lambda name: name.replace("_", " "),
            -1,
            "which is its output 50; put the list in its order$",
        ),
        (
            lambda name: {"Bricks": "Stones"}.get(name, name.replace("_", " ")),
            1,
            None,
        ),  # one is renamed
        (
            lambda name: {"Bricks": "Cartoon", "Cartoon": "x"}.get(name, name),
            1,
            "'Cartoon' in the label list, which is its output 3",
        ),
    ],
)
def test_the_names_of_a_directory_may_be_spelled_otherwise_but_not_stand_elsewhere(
    directory_with, spell, order, refused
):
    names = read_labels("x", "unlearncanvas_styles")
    path = directory_with([spell(name) for name in names][::order])
    settings = PREPROCESSING | {"labels": {"style": "unlearncanvas_styles"}}
    if refused is None:
        assert Classifier({"style": path}, **settings).labels() == {"style": names}
    else:
        with pytest.raises(ModelError, match=refused) as caught:
            Classifier({"style": path}, **settings)
        assert "\n" not in str(caught.value)


def test_outputs_without_names_are_believed_to_be_in_the_order_of_the_list(directory_with):
    path = directory_with([f"LABEL_{index}" for index in range(3)])
    assert Classifier({"style": path}, **PREPROCESSING, labels={"style": LABELS}).labels() == {
        "style": LABELS
    }


def test_the_imagenet_list_has_a_thousand_names():
    names = read_labels("x", "imagenet")
    assert (len(names), len(set(names)), names[0], names[497]) == (1000, 1000, "tench", "church")
    sequence = read_conf("sequence/duge.yaml")
    assert set(sequence["targets"] + sequence["retain"]) <= set(names)
    assert (
        len(sequence["targets"]),
        len(read_labels("x", "duge_scenes")) * len(sequence["seeds"]),
    ) == (21, 8)


# ------------------------------------------------------------------------------------- transformers
def test_a_given_list_is_held_against_a_transformers_directory():
    path = "package:shapecanvas/weights/object_classifier"
    kept = Classifier({"object": path}, **PREPROCESSING, labels={"object": list(OBJECTS)})
    assert kept.labels() == {"object": list(OBJECTS)}
    assert kept.fingerprint() == Classifier({"object": path}, **PREPROCESSING).fingerprint()
    with pytest.raises(
        ModelError, match=r"output 0 is 'ball' in its config.json and 'lamp' in the label list"
    ):
        Classifier({"object": path}, **PREPROCESSING, labels={"object": list(OBJECTS[::-1])})
    with pytest.raises(ModelError, match="has 32 outputs and the label list 144 labels"):
        Classifier({"object": path}, **PREPROCESSING, labels={"object": "shapecanvas_styles"})


def test_the_fingerprint_of_the_shipped_classifiers_is_the_one_that_runs_record(evaluator):
    assert (
        evaluator.fingerprint()
        == "ff0149ccf552ff9e78a8f337be0218bbf1ee7102f2a594746b510bd2c3566009"
    )


# ---------------------------------------------------------------------------------------- open_clip
@pytest.fixture(scope="module")
def zero_shot():
    return OpenClip(**read_conf("evaluator/shapecanvas_clip.yaml"))


def test_zero_shot_names_rendered_images(zero_shot, images):
    pictures, objects, styles = images
    found = zero_shot.predict(pictures)
    right = {
        "object": sum(
            label == OBJECTS[i] for label, i in zip(found["object"].labels, objects, strict=True)
        ),
        "style": sum(
            label == STYLES[i] for label, i in zip(found["style"].labels, styles, strict=True)
        ),
    }
    assert right["style"] >= 48  # of 60; chance is half an image
    assert all(0 < score <= 1 for score in found["style"].scores)


def test_templates_are_averaged_and_count(zero_shot, images):
    pictures = images[0][:8]
    labels = {"object": list(OBJECTS)}
    one, other = (
        OpenClip(CLIP, labels, templates=[text]) for text in ("a {label} image", "an image {label}")
    )
    both = OpenClip(CLIP, labels, templates={"object": ["a {label} image", "an image {label}"]})
    assert both.fingerprint() not in (one.fingerprint(), other.fingerprint())
    assert one.predict(pictures)["object"].scores != both.predict(pictures)["object"].scores
    assert one.predict(pictures)["object"].labels == zero_shot.predict(pictures)["object"].labels


def test_one_domain_by_open_clip_and_one_by_a_classifier(zero_shot, evaluator, images):
    pictures = images[0][:8]
    paths = {"style": "package:shapecanvas/weights/style_classifier", "object": CLIP}
    mixed = Classifier(
        paths,
        64,
        HALF,
        HALF,
        architectures={"object": "open_clip"},
        labels={"object": "shapecanvas_objects"},
        templates={"object": ["a {label} image"]},
    )
    found = mixed.predict(pictures)
    assert found["style"] == evaluator.predict(pictures)["style"]
    assert found["object"].labels == zero_shot.predict(pictures)["object"].labels
    assert mixed.labels() == {"style": list(STYLES), "object": list(OBJECTS)}


def test_a_configuration_and_a_weight_file_of_ones_own(tmp_path):
    """A .json with a weight file gives the same vectors as the directory; the tokenizer is named by
    the configuration.
    """
    folder = locate(CLIP)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(folder)
    (tmp_path / "mine.json").write_text(json.dumps(config["model_cfg"]))
    weights = str(folder / "open_clip_model.safetensors")
    mine = load_image_text(ImageTextSource(str(tmp_path / "mine.json"), weights), "cpu")
    shipped = load_image_text(ImageTextSource(CLIP), "cpu")
    texts = ["a star image", "an image in amber style"]
    assert torch.equal(mine.embed_texts(texts), shipped.embed_texts(texts))
    assert shipped.embed_texts(texts).norm(dim=1).tolist() == pytest.approx([1, 1])
    torch.save(safetensors.torch.load_file(weights), tmp_path / "weights.pt")
    with pytest.raises(WeightFileError, match="allow_pickle"):
        load_image_text(
            ImageTextSource(str(tmp_path / "mine.json"), str(tmp_path / "weights.pt")), "cpu"
        )
    named = ImageTextSource(
        str(tmp_path / "mine.json"), str(tmp_path / "weights.pt"), (str(tmp_path / "weights.pt"),)
    )
    assert torch.equal(load_image_text(named, "cpu").embed_texts(texts), shipped.embed_texts(texts))


@pytest.mark.parametrize(
    ("model", "path", "message"),
    [
        ("ViT-Q-99", None, "^ViT-Q-99: open_clip knows no such architecture"),
        ("RN50", None, "^RN50: is an architecture without weights"),
        ("package:shapecanvas/weights/pipeline", None, "describes no open_clip model"),
        ("package:shapecanvas/weights/none", None, "no such file or directory"),
    ],
)
def test_image_text_models_that_cannot_be_had(model, path, message):
    with pytest.raises(ModelError, match=message) as caught:
        load_image_text(ImageTextSource(model, path), "cpu")
    assert "\n" not in str(caught.value)


def test_open_clip_weights_must_be_complete(tmp_path):
    folder = shutil.copytree(locate(CLIP), tmp_path / "clip")
    tensors = safetensors.torch.load_file(folder / "open_clip_model.safetensors")
    tensors.pop("logit_scale")
    safetensors.torch.save_file(tensors, folder / "open_clip_model.safetensors")
    with pytest.raises(ModelError, match=r"cannot be loaded by open_clip \(.*logit_scale"):
        load_image_text(ImageTextSource(str(folder)), "cpu")


@pytest.mark.parametrize("templates", [[], ["no place"], ["{label} {other}"], {"object": []}])
def test_bad_templates(templates):
    with pytest.raises(ValueError, match=r"^evaluator.templates: "):
        OpenClip(CLIP, {"object": list(OBJECTS)}, templates=templates)


# -------------------------------------------------------------------------------------------- faces
@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """A tiny real YOLOS that finds an object of class "face" in every image: only the bias of its
    class head is not random.
    """
    torch.manual_seed(0)
    config = transformers.YolosConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[32, 32],
        patch_size=8,
        num_detection_tokens=2,
        id2label={0: "face", 1: "cat"},
        label2id={"face": 0, "cat": 1},
        use_mid_position_embeddings=False,
    )
    network = transformers.YolosForObjectDetection(config)
    folder = tmp_path_factory.mktemp("faces")
    last = network.class_labels_classifier.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.copy_(torch.tensor([6.0, 0.0, 0.0]))
    network.save_pretrained(folder)
    transformers.YolosImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def with_faces(detector: str, **settings) -> Classifier:
    faces = FaceSettings(path=detector, domain="style", **settings)
    return Classifier(**read_conf("evaluator/shapecanvas.yaml"), faces=faces)


def test_an_image_without_a_face_has_no_label(detector, evaluator, images):
    pictures = images[0][:3]
    seen = with_faces(detector).predict(pictures)
    assert seen["style"].faces == [True] * 3
    assert seen["style"].labels == evaluator.predict(pictures)["style"].labels
    unseen = with_faces(detector, classes=("cat",)).predict(pictures)
    assert unseen["style"].faces == [False] * 3
    assert unseen["style"].labels == [""] * 3
    assert unseen["object"] == evaluator.predict(pictures)["object"]
    assert with_faces(detector, threshold=0.999).predict(pictures)["style"].faces == [False] * 3
    with pytest.raises(ModelError, match=r"detects no class 'dog' \(it knows face, cat\)"):
        with_faces(detector, classes=("dog",))


@pytest.mark.parametrize(("classes", "face"), [(("face",), 1), (("cat",), 0)])
def test_faceless_images_are_no_success(detector, model, sequence, classes, face):
    """Through the real path: a model that draws no face at all has forgotten nothing that can be
    seen.
    """
    judge, settings = (
        with_faces(detector, classes=classes),
        EvalSettings(2, 2.5, None, batch_size=8),
    )
    rows = evaluate(
        model, judge, sequence, [*sequence.targets, *sequence.retain], 1, settings
    ).predictions
    assert rows["face"].tolist() == [face] * 8
    found = step_metrics(rows, ["torch light", "snow drift"], sequence)
    assert (found["faceless_unlearned"], found["faceless_retained"]) == ((0, 0) if face else (4, 4))
    if face:
        right = (rows["style"] == rows["predicted_style"])[
            rows["style"].isin(["torch light", "snow drift"])
        ]
        assert found["UA"] == pytest.approx(100 - 100 * right.mean())
    else:
        assert (found["UA"], found["UA_current"], found["UA_previous"], found["RA_I"]) == (
            None,
            None,
            None,
            0.0,
        )
    assert found["RA_C"] is not None


def test_unlearning_accuracy_is_over_images_with_a_face(tmp_path):
    rows = pd.DataFrame(
        [
            ("a", "a", 1),
            ("a", "", 0),
            ("a", "x", 1),
            ("b", "", 0),
            ("b", "", 0),
            ("r", "r", 1),
            ("r", "", 0),
        ],
        columns=["who", "predicted_who", "face"],
    )
    rows["scene"] = rows["predicted_scene"] = "hall"
    rows.to_csv(tmp_path / "predictions.csv", index=False)
    rows = read_predictions(tmp_path / "predictions.csv")
    found = metrics(rows, ["a", "b"], ["r"], ["hall"])
    assert found == {
        "UA": 50.0,
        "RA_I": 50.0,
        "RA_C": 100.0,
        "RA_C_retained": 100.0,
    }  # b shows no face: not in the mean
    assert metrics(rows, ["b"], ["r"], ["hall"])["UA"] is None
    with pytest.raises(ValueError, match="predictions hold no image of q"):
        metrics(rows, ["b", "q"], ["r"], ["hall"])


@pytest.mark.parametrize(("faceless", "column"), [("excluded", "face"), ("forgotten", "face_only")])
def test_predictions_say_what_images_without_a_face_count_for(
    detector, model, sequence, tmp_path, faceless, column
):
    settings = EvalSettings(2, 2.5, None, batch_size=8)
    concepts = [*sequence.targets, *sequence.retain]
    found = {}
    for classes, face in ((("face",), 1), (("cat",), 0)):
        faces = FaceSettings(path=detector, domain="style", classes=classes)
        judge = Classifier(
            **read_conf("evaluator/shapecanvas.yaml"), faces=faces, faceless=faceless
        )
        rows = evaluate(model, judge, sequence, concepts, 1, settings).predictions
        rows.to_csv(tmp_path / "predictions.csv", index=False)
        header = (tmp_path / "predictions.csv").read_text().splitlines()[0].split(",")
        assert [name for name in header if name.startswith("face")] == [column]
        rows = read_predictions(tmp_path / "predictions.csv")
        assert rows[column].tolist() == [face] * 8
        found[face] = step_metrics(rows, [target.name for target in sequence.targets], sequence)
    # not one face: nothing is known of UA, or everything is forgotten
    assert found[0]["UA"] == (None if faceless == "excluded" else 100.0)
    assert found[0]["RA_I"] == 0.0
    assert found[0]["faceless_unlearned"] == found[0]["faceless_retained"] == 4
    assert found[1]["faceless_unlearned"] == found[1]["faceless_retained"] == 0


def test_what_faceless_images_count_for_is_part_of_the_fingerprint(detector):
    faces = FaceSettings(path=detector, domain="style")
    conf = read_conf("evaluator/shapecanvas.yaml")
    prints = [
        Classifier(**conf, faces=faces, faceless=faceless).fingerprint()
        for faceless in ("excluded", "forgotten")
    ]
    assert prints[0] != prints[1]


# --------------------------------------------------------------------------------------------- JPEG
class Seeing(Evaluator):
    """Notes the images that another evaluator gets."""

    def __init__(self, judge: Evaluator) -> None:
        self.judge, self.images = judge, []

    def predict(self, images):
        self.images.append(images)
        return self.judge.predict(images)

    def labels(self):
        return self.judge.labels()

    def fingerprint(self):
        return self.judge.fingerprint()


def as_files(pictures: torch.Tensor, folder, quality: int) -> torch.Tensor:
    """Images [B, 3, S, S] in 0..1 as PIL reads them from the files that it wrote."""
    read = []
    for picture in pictures:
        pixels = np.rint(picture.numpy().transpose(1, 2, 0) * 255).astype("uint8")
        Image.fromarray(pixels).save(folder / "image.jpg", quality=quality)
        with Image.open(folder / "image.jpg") as file:
            read.append(torch.from_numpy(np.asarray(file).transpose(2, 0, 1) / np.float32(255)))
    return torch.stack(read)


def test_through_jpeg_is_what_a_file_gives(images, tmp_path):
    draw = torch.Generator().manual_seed(0)
    wide, large = (torch.rand(1, 3, *size, generator=draw) for size in ((24, 40), (200, 200)))
    for pictures in (images[0][:4], wide, large):
        results = []
        for quality in (10, 75, 95):
            found = through_jpeg(pictures, quality)
            expected = as_files(pictures, tmp_path, quality)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)
            results.append((found - pictures).abs().mean().item())
        assert results[0] > results[1] > results[2] > 1e-4


def test_the_evaluator_judges_what_jpeg_left(model, evaluator, sequence, tmp_path):
    concepts, seen = [*sequence.targets, *sequence.retain], {}
    for jpeg in (None, 75):
        judge = Seeing(evaluator)
        settings = EvalSettings(2, 2.5, None, batch_size=3, jpeg=jpeg)
        rows = evaluate(model, judge, sequence, concepts, 1, settings).predictions
        seen[jpeg] = torch.cat(judge.images)
        labels = evaluator.predict(seen[jpeg])["style"]
        assert rows["predicted_style"].tolist() == labels.labels
        assert rows["score_style"].tolist() == pytest.approx(labels.scores, abs=1e-4)
    assert len(seen[None]) == 8
    expected = as_files(seen[None], tmp_path, 75)
    torch.testing.assert_close(seen[75], expected, rtol=0, atol=1e-7)
    assert (seen[75] - seen[None]).abs().mean() > 1e-3


def test_images_of_the_untouched_model_are_kept_by_jpeg_quality(
    model, evaluator, sequence, tmp_path
):
    cache, seen = Cache(tmp_path, identify()), Seeing(evaluator)
    judged = []
    for jpeg in (None, 75, 20, 75):
        settings = EvalSettings(2, 2.5, None, batch_size=8, jpeg=jpeg)
        instruments = Instruments(model, seen, sequence, None, settings, "model", "judge")
        files, _ = instruments.measure(0, [], "base", cache)
        judged.append(files["predictions.csv"])
    assert len(list((tmp_path / "base_eval").iterdir())) == len(seen.images) == 3
    assert judged[1] == judged[3]
    assert len(set(judged)) == 3


# ------------------------------------------------------------------------------ images of one's own
def test_without_a_cross_domain_only_the_concepts_are_judged(model, sequence, evaluator, tmp_path):
    names = [concept.name for concept in (*sequence.targets, *sequence.retain)]
    lines = [f'"a {name} thing, {i}",{name},{i}' for name in names for i in (3, 4)]
    (tmp_path / "mine.csv").write_text(
        "prompt,concept,seed\n" + "\n".join(lines) + "\n", encoding="utf-8"
    )
    own = make_sequence(**read_conf("sequence/smoke.yaml"), prompts=str(tmp_path / "mine.csv"))
    assert own.measured_domains == ("style",)
    assert [dataclasses.astuple(image) for image in own.evaluation_images(own.targets[1:])] == [
        ("a snow drift thing, 3", 3, "snow drift", ""),
        ("a snow drift thing, 4", 4, "snow drift", ""),
    ]
    rows = evaluate(
        model,
        evaluator,
        own,
        [*own.targets, *own.retain],
        1,
        EvalSettings(1, 1.0, None, batch_size=8),
    ).predictions
    assert rows["seed"].tolist() == [3, 4] * 4
    assert "predicted_object" not in rows
    found = step_metrics(rows, ["torch light"], own)
    assert (found["RA_C"], found["RA_C_retained"]) == (None, None)
    assert 0 <= found["RA_I"] <= 100


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,concept\nx,torch light\n", "has no column seed; needed: prompt, concept, seed$"),
        ("prompt,concept,seed\n", "holds no row below its header$"),
        (
            "prompt,concept,seed\nx,torch light,-1\n",
            "line 2: seed '-1' is no whole number from 0 on$",
        ),
        (
            "prompt,concept,seed\nx,y,z,torch light,1\n",
            "line 2 has another number of fields than the header",
        ),
        ("prompt,concept,seed\n ,torch light,1\n", "line 2 has no prompt$"),
        (
            "prompt,concept,seed\nx,nobody,1\n",
            "'nobody' is neither in sequence.targets nor in sequence.retain$",
        ),
        (
            "prompt,concept,seed\nx,torch light,1\n",
            "holds no image of snow drift, lava flow, fog bank",
        ),
        (
            (
                "prompt,concept,seed,object\nx,torch light,1,tree\nx,snow drift,1,"
                "cow\nx,lava flow,1,tree\nx,fog bank,1,tree\n"
            ),
            "object 'cow' is not in sequence.cross_retain",
        ),
        (
            "prompt,concept,seed\n"
            + "x,torch light,1\n" * 2
            + "x,snow drift,1\nx,lava flow,1\nx,fog bank,1\n",
            "is there twice",
        ),
    ],
)
def test_bad_files_of_images_are_one_line(tmp_path, text, message):
    (tmp_path / "mine.csv").write_text(text, encoding="utf-8")
    with pytest.raises(
        ValueError, match=rf"^sequence.prompts={tmp_path}/mine.csv: .*{message}"
    ) as caught:
        make_sequence(**read_conf("sequence/smoke.yaml"), prompts=str(tmp_path / "mine.csv"))
    assert "\n" not in str(caught.value)


def test_a_judge_that_answers_nan_is_one_line(sequence, evaluator, monkeypatch):
    real = evaluator.predict

    def predict(images):
        found = real(images)
        found["object"].scores[1] = float("nan")
        return found

    monkeypatch.setattr(evaluator, "predict", predict)
    with pytest.raises(ValueError, match=r"^evaluator: its judge of object answers NaN to a fin"):
        classify(evaluator, torch.rand(2, 3, 64, 64), sequence)


# ------------------------------------------------------------------------------------ preprocessing
OWN = {"size": None, "mean": None, "std": None, "interpolation": None}


def vit_directory(folder, processor=None, **config) -> str:
    """A tiny ViT that reads 32 pixels, with its image processor's configuration."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    made = transformers.ViTConfig(**sizes, image_size=32, patch_size=16, **names | config)
    transformers.ViTForImageClassification(made).save_pretrained(folder)
    if processor is not None:
        processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "processor",
    [
        transformers.ViTImageProcessor(size=32, image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3),
        transformers.ViTImageProcessor(size=32, resample=3, do_normalize=False),
        transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32),
        transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8),
    ],
)
def test_a_directorys_own_preprocessing_holds_unless_settings_say_otherwise(
    tmp_path, caplog, processor
):
    path = vit_directory(tmp_path / "vit", processor)
    logging.getLogger("cu_runner").propagate = True
    caplog.set_level(logging.INFO, "cu_runner")
    judge = Classifier({"style": path}, **OWN)
    assert f"evaluator: {path} reads images with size=" in caplog.text
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    network = transformers.ViTForImageClassification.from_pretrained(path)
    with torch.no_grad():
        inputs = processor(list(images), do_rescale=False, return_tensors="pt").pixel_values
        expected = network(inputs).logits.softmax(1).max(1)
    found = judge.predict(images)["style"]
    assert found.scores == pytest.approx(expected.values.tolist(), abs=1e-4)
    overruled = Classifier({"style": path}, **OWN | {"size": 32, "mean": [0.9] * 3})
    assert overruled.predict(images)["style"].scores != found.scores
    assert overruled.fingerprint() != judge.fingerprint()
    before = judge.fingerprint()
    change = json.loads((tmp_path / "vit/preprocessor_config.json").read_text())
    change |= {"do_normalize": True, "image_mean": [0.7] * 3, "image_std": [0.4] * 3}
    (tmp_path / "vit/preprocessor_config.json").write_text(json.dumps(change))
    assert Classifier({"style": path}, **OWN).fingerprint() != before


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (None, "holds no preprocessor_config.json; set evaluator.size, evaluator.mean,"),
        (transformers.ViTImageProcessor(size={"height": 32, "width": 48}), "is no square"),
        (transformers.ViTImageProcessor(size=32, do_rescale=False), "rescale_factor is not 1/255"),
        (transformers.ViTImageProcessor(size=32, resample=1), r"cannot be followed \(KeyError: 1"),
        (transformers.ViTImageProcessor(size=32, do_resize=False), "it does not resize"),
        (
            transformers.EfficientNetImageProcessor(size=32, resample=2, include_top=True),
            "EfficientNetImageProcessor makes something else of an image",
        ),
    ],
)
def test_preprocessing_that_cannot_be_followed(tmp_path, processor, message):
    path = vit_directory(tmp_path / "vit", processor)
    with pytest.raises(ModelError, match=message) as caught:
        Classifier({"style": path}, **OWN)
    assert "\n" not in str(caught.value)
    assert Classifier({"style": path}, **PREPROCESSING).labels() == {"style": LABELS}


def test_timm_reads_as_it_was_trained(tmp_path):
    """resnet10t: mean and std of ImageNet, the middle 176 pixels of 185, bicubic."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=3).eval()
    path = str(tmp_path / "net.safetensors")
    safetensors.torch.save_file(network.state_dict(), path)
    images = torch.rand(2, 3, 200, 200, generator=torch.Generator().manual_seed(1))
    images = (images * 255).round() / 255
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    pictures = [to_pil_image(image) for image in images]
    with torch.no_grad():
        expected = (
            network(torch.stack([prepare(picture) for picture in pictures])).softmax(1).max(1)
        )
    settings = {"architectures": {"style": "timm:resnet10t"}, "labels": {"style": LABELS}}
    own = Classifier({"style": path}, **OWN, **settings)
    assert own.predict(images)["style"].scores == pytest.approx(expected.values.tolist(), abs=4e-4)
    whole = Classifier({"style": path}, **OWN | {"size": 176}, **settings)
    difference = whole.predict(images)["style"].scores[0] - expected.values[0].item()
    assert abs(difference) > 1e-3
    half = Classifier({"style": path}, **OWN | {"mean": HALF, "std": HALF}, **settings)
    assert half.predict(images)["style"].scores != own.predict(images)["style"].scores
    assert half.fingerprint() != own.fingerprint()


@pytest.mark.parametrize(
    ("preset", "domain", "values"),
    [
        ("unlearncanvas", "style", (224, (0.5,) * 3, (0.5,) * 3, "bilinear")),
        ("unlearncanvas", "object", (224, (0.5,) * 3, (0.5,) * 3, "bilinear")),
        ("imagenet", "object", (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bicubic")),
    ],
)
def test_judges_of_presets_read_the_whole_image_as_they_were_trained(preset, domain, values):
    conf = read_conf(f"evaluator/{preset}.yaml")
    with torch.device("meta"):
        network = timm.create_model(conf["architectures"][domain].removeprefix("timm:"))
    settings = {key: conf[key] for key in OWN}
    assert choose_preprocessing("evaluator", "x", network, **settings) == Preprocessing(*values)


# ---------------------------------------------------------------------------------- files of judges
@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_weights_that_a_wrapper_has_renamed(resnet, resnet_file, tmp_path, wrapper):
    wrapped = {f"{wrapper}{name}": tensor for name, tensor in resnet.state_dict().items()}
    path = str(tmp_path / "wrapped.pth")
    torch.save({"state_dict": wrapped}, path)
    found = judge(path, allow_pickle=[path])
    assert found.fingerprint() == judge(resnet_file).fingerprint()


def test_what_layers_count_by_themselves_may_be_missing_and_nothing_else_be_there(resnet, tmp_path):
    """torchvision's older files have no num_batches_tracked."""
    weights, path = resnet.state_dict(), str(tmp_path / "net.safetensors")
    plain = judge(safe_file(weights, path)).predict(torch.ones(1, 3, 32, 32))["style"]
    old = {name: tensor for name, tensor in weights.items() if "num_batches" not in name}
    assert len(old) < len(weights)
    found = judge(safe_file(old, path)).predict(torch.ones(1, 3, 32, 32))["style"]
    assert found == plain
    for name, message in (
        ("fc.lora_A.weight", "holds weights of an adapter"),
        ("more", "holds more, which no layer takes, and 0 more"),
    ):
        safe_file(weights | {name: torch.ones(1)}, path)
        with pytest.raises(WeightFileError, match=f"net.safetensors: {message}"):
            judge(path)
        with pytest.raises(WeightFileError, match=f"net.safetensors: {message}"):
            FeatureExtractor(FeatureSource("timm:test_resnet", path, size=32), "cpu")


def safe_file(weights: dict[str, torch.Tensor], path: str) -> str:
    safetensors.torch.save_file(weights, path)
    return path


def test_weights_of_a_judge_that_are_not_finite(resnet, tmp_path):
    weights = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    weights["fc.bias"][0] = torch.inf
    safetensors.torch.save_file(weights, tmp_path / "net.safetensors")
    with pytest.raises(WeightFileError, match=r"net.safetensors: fc.bias is not finite"):
        judge(str(tmp_path / "net.safetensors"))
    folder = shutil.copytree(locate(CLIP), tmp_path / "clip")
    tensors = safetensors.torch.load_file(folder / "open_clip_model.safetensors")
    tensors["logit_scale"] += torch.nan
    safetensors.torch.save_file(tensors, folder / "open_clip_model.safetensors")
    with pytest.raises(WeightFileError, match=r"open_clip_model.safetensors: logit_scale is not"):
        load_image_text(ImageTextSource(str(folder)), "cpu")


def test_label_maps_that_contradict_each_other(tmp_path):
    path = vit_directory(tmp_path / "vit", label2id={"a": 1, "b": 0, "c": 2})
    with pytest.raises(
        ModelError, match=r"config.json: label2id has 'a' at output 1, where id2label has 'b'; "
    ):
        Classifier({"style": path}, **PREPROCESSING)
    path = vit_directory(tmp_path / "twice", id2label={0: "a", 1: "b", 2: "a"}, label2id={})
    with pytest.raises(ModelError, match=r"twice: a stands for two outputs in its config.json"):
        Classifier({"style": path}, **PREPROCESSING)
    named = Classifier({"style": path}, **PREPROCESSING, labels={"style": ["x", "y", "z"]})
    assert named.labels() == {"style": ["x", "y", "z"]}


def test_a_repeated_label_in_a_file_is_refused_and_not_dropped(resnet_file, tmp_path):
    (tmp_path / "labels.txt").write_text("\ufeffa\r\nb\na\nc\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"^evaluator.labels.style: a stands for two outputs"):
        judge(resnet_file, str(tmp_path / "labels.txt"))


def test_an_open_clip_directory_beside_transformers_weights(tmp_path):
    folder = shutil.copytree(locate(CLIP), tmp_path / "clip")
    safetensors.torch.save_file({"other": torch.ones(1)}, folder / "model.safetensors")
    (folder / "a.bin").write_bytes(b"not read")
    plain = load_image_text(ImageTextSource(CLIP), "cpu").fingerprint()
    assert load_image_text(ImageTextSource(str(folder)), "cpu").fingerprint() == plain
    (folder / "open_clip_model.safetensors").rename(folder / "mine.safetensors")
    with pytest.raises(
        ModelError, match=r"holds mine.safetensors and model.safetensors; name the one that is"
    ):
        load_image_text(ImageTextSource(str(folder)), "cpu")
