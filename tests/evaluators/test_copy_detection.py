"""Copy detection: similarities, labels and UA worked out by hand, SSCD's ResNet beside its formula,
what is refused, what the fingerprint covers, a run.
"""

import shutil

import pandas as pd
import pytest
import torch
import torchvision
from conftest import SMOKE, run_directory
from copies import PLAIN, make_descriptor, make_references
from PIL import Image
from torch import nn

from cu_runner.evaluators.copy_detection import NONE, CopyDetection, OtherDomains, make_resnet
from cu_runner.evaluators.metrics import unlearning_accuracy
from cu_runner.schema.errors import ModelError, WeightFileError

COLOURS = {"ann": ["#ff0000", "#0000ff"], "bob": ["#00ff00"]}


@pytest.fixture
def files(tmp_path):
    return make_descriptor(tmp_path), make_references(tmp_path / "memorised", COLOURS)


def detect(files, **more) -> CopyDetection:
    descriptor, references = files
    plain = {"size": 16, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    allowed = {"allow_pickle": [str(descriptor)]}
    settings = {"descriptor": str(descriptor), "references": str(references), **plain, **allowed}
    return CopyDetection("person", **(settings | more))


def images(*colours: tuple[float, float, float]) -> torch.Tensor:
    return (
        torch.tensor(colours, dtype=torch.float32)[:, :, None, None]
        .expand(-1, -1, 32, 32)
        .contiguous()
    )


def test_the_nearest_reference_names_an_image_if_it_is_near_enough(files):
    found = detect(files)
    assert found.labels() == {"person": ["ann", "bob"]}
    shown = images((1, 0, 0), (0, 0, 1), (1, 1, 0), (1, 1, 1), (0.5, 1, 0))
    cosines = [[1, 0], [1, 0], [0.5**0.5, 0.5**0.5], [3**-0.5, 3**-0.5], [0.2**0.5, 0.8**0.5]]
    torch.testing.assert_close(found.similarities(shown), torch.tensor(cosines).float())
    prediction = found.predict(shown)["person"]
    assert prediction.labels[:2] == ["ann", "ann"]
    assert prediction.labels[4] == "bob"
    assert prediction.scores == pytest.approx([1, 1, 0.5**0.5, 3**-0.5, 0.8**0.5], abs=1e-6)
    strict = detect(files, threshold=0.75).predict(shown)["person"]
    assert strict.labels == ["ann", "ann", NONE, NONE, "bob"]
    assert strict.scores == prediction.scores


def test_ua_is_the_share_of_images_that_are_no_copy_any_longer(files):
    shown = images((1, 0, 0), (0, 1, 0), (1, 1, 1), (0.1, 0.1, 0.9))  # of prompts for ann
    seen = detect(files, threshold=0.6).predict(shown)["person"].labels
    assert seen == ["ann", "bob", NONE, "ann"]  # bob's: a copy, but not of hers
    table = pd.DataFrame({"person": ["ann"] * 4, "predicted_person": seen})
    assert unlearning_accuracy(table, "person", ["ann"]) == 50.0


def test_references_are_read_at_their_middle_square(tmp_path):
    descriptor = make_descriptor(tmp_path)
    (tmp_path / "refs/wide").mkdir(parents=True)
    picture = Image.new("RGB", (60, 20), "#00ff00")
    picture.paste("#ff0000", (20, 0, 40, 20))
    picture.save(tmp_path / "refs/wide/x.png")
    found = detect((descriptor, tmp_path / "refs"))
    assert found.similarities(images((1, 0, 0))).item() == pytest.approx(1, abs=1e-3)


def test_the_resnet_of_sscd_is_its_formula(tmp_path):
    torch.manual_seed(0)
    network = make_resnet("resnet18", 8).eval()
    assert sum(p.numel() for p in network.fc.parameters()) == 512 * 8 + 8
    plain = torchvision.models.resnet18(num_classes=8).eval()
    plain.load_state_dict(network.state_dict())
    shown = torch.rand(2, 3, 64, 64)
    maps = nn.Sequential(*list(plain.children())[:-2])(shown)  # [B, 512, 2, 2]
    pooled = (maps.clamp(min=1e-6) ** 3).flatten(2).mean(2) ** (1 / 3)
    by_hand = nn.functional.normalize(plain.fc(pooled))
    file = tmp_path / "sscd.torchvision.pt"  # as the authors save it
    torch.save({f"backbone.{name}": each for name, each in network.state_dict().items()}, file)
    references = make_references(tmp_path / "memorised", COLOURS)
    more = {"architecture": "resnet18", "size": 64, "allow_pickle": [str(file)]}
    found = detect((file, references), **more)
    torch.testing.assert_close(found.describe(shown), by_hand, atol=1e-6, rtol=0)
    with pytest.raises(ModelError, match="is missing or has another shape than in resnet34"):
        detect((file, references), **(more | {"architecture": "resnet34"}))
    with pytest.raises(ModelError, match=r"is no TorchScript file .*architecture=resnet50"):
        detect((file, references), **(more | {"architecture": "module"}))
    with pytest.raises(WeightFileError, match="allow_pickle"):
        detect((file, references), **(more | {"allow_pickle": []}))


def test_what_cannot_be_used_is_refused_in_a_line(files, tmp_path):
    with pytest.raises(WeightFileError, match=r"allow this one with allow_pickle=\["):
        detect(files, allow_pickle=[])
    with pytest.raises(WeightFileError, match="no such file"):
        detect(files, descriptor="models/nowhere.pt")
    with pytest.raises(ValueError, match=r"references=.*no folder in it; give a folder"):
        detect(files, references=str(tmp_path / "memorised/bob"))
    with pytest.raises(ValueError, match=r"evaluator.references=.*no such folder"):
        detect(files, references={"ann": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="'none' is the label of images that copy nothing"):
        detect(files, references={"none": str(tmp_path / "memorised/bob")})
    (tmp_path / "memorised/bob/torn.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"torn.png: cannot be read .*from evaluator.references"):
        detect(files)
    (tmp_path / "memorised/bob/torn.png").unlink()
    clip = OtherDomains("package:shapecanvas/weights/open_clip", {"person": ["a", "b"]})
    with pytest.raises(ValueError, match=r"evaluator.others.labels.person: is the domain of"):
        detect(files, others=clip)


def test_the_fingerprint_covers_descriptor_threshold_and_references(files, tmp_path):
    first = detect(files).fingerprint()
    assert detect(files).fingerprint() == first
    moved = shutil.copytree(files[1], tmp_path / "elsewhere")
    (moved / "bob/00ff00.png").rename(moved / "bob/other_name.png")
    assert detect((files[0], moved)).fingerprint() == first  # what counts is what is in them
    assert detect(files, threshold=0.6).fingerprint() != first
    assert detect(files, size=8).fingerprint() != first
    Image.new("RGB", (24, 20), "#00fe00").save(moved / "bob/other_name.png")
    assert detect((files[0], moved)).fingerprint() != first
    (moved / "bob").rename(moved / "bill")
    assert detect((files[0], moved)).fingerprint() != first


def test_a_run_measures_copies(in_process, tmp_path):
    concepts = ["torch light", "snow drift", "lava flow", "fog bank"]
    colours = dict(zip(concepts, (["#802010"], ["#d0e0ff"], ["#c03000"], ["#909090"]), strict=True))
    references = make_references(tmp_path / "memorised", colours)
    descriptor = make_descriptor(tmp_path)
    words = ["evaluator=copy_detection", f"evaluator.descriptor={descriptor}", *PLAIN]
    words += [f"evaluator.allow_pickle=[{descriptor}]", f"evaluator.references={references}"]
    words += ["evaluator.threshold=0.99"]
    clip = "{model: 'package:shapecanvas/weights/open_clip', labels: {object: [tree, star]}}"
    status, out, err = in_process(*SMOKE, *words, f"evaluator.others={clip}")
    assert (status, err) == (0, "")
    run = run_directory(out, tmp_path)
    table = pd.read_csv(run / "steps/02/predictions.csv")
    assert set(table["predicted_style"]) <= {*concepts, NONE}
    assert set(table["predicted_object"]) <= {"tree", "star"}
    copied = table["score_style"] > 0.99
    assert copied.any()
    assert (~copied).any()
    assert ((table["predicted_style"] == NONE) == ~copied).all()
    right = table["predicted_style"] == table["style"]
    share = right.groupby(table["style"]).mean()
    metrics = pd.read_csv(run / "metrics.csv")
    assert metrics["UA"][2] == pytest.approx(100 - 100 * share[concepts[:2]].mean(), abs=1e-3)
    status, _, err = in_process(*SMOKE, *words)  # nothing names objects
    assert (status, err.count("\n")) == (2, 1)
    assert "the evaluator has no object 'tree'" in err
