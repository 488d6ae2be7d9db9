"""CLIP score, FID and KID: their formulas, their prompts and pictures, their judges, and a real
run.
"""

import json

import numpy as np
import open_clip
import pandas as pd
import pytest
import safetensors.torch
import timm
import torch
from conftest import SMOKE, read_conf, run_directory
from PIL import Image
from scipy.linalg import sqrtm

from cu_runner.concepts.entries import read_shipped
from cu_runner.concepts.picture_folder import find_pictures
from cu_runner.models.image_text import ImageTextSource, load_image_text
from cu_runner.models.pictures import read_pictures
from cu_runner.models.sampling import generate
from cu_runner.retention.distances import frechet_distance, kernel_distance
from cu_runner.retention.features import FeatureExtractor, FeatureSource
from cu_runner.retention.general import GeneralRetention, PromptScorer, read_images
from cu_runner.runtime.code_identity import identify
from cu_runner.schema.errors import ModelError, SamplingError, WeightFileError
from cu_runner.schema.settings import EvalSettings
from cu_runner.store.cache import Cache

CLIP = "package:shapecanvas/weights/open_clip"
SETTINGS = EvalSettings(2, 2.5, None, batch_size=4)


def features(count: int, seed: int, shift: float = 0.0) -> torch.Tensor:
    return (
        torch.randn(count, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        + shift
    )


# ----------------------------------------------------------------------------------------- formulas
def test_frechet_distance():
    one, other = features(40, 0), features(30, 1, shift=0.5)
    a, b = one.numpy(), other.numpy()
    spread = (
        np.cov(a, rowvar=False)
        + np.cov(b, rowvar=False)
        - 2 * sqrtm(np.cov(a, rowvar=False) @ np.cov(b, rowvar=False)).real
    )
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(spread)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)


def test_kernel_distance():
    one, other = features(12, 0), features(12, 1, shift=1.0)

    def kernel(x, y):
        return (x @ y.T / 5 + 1) ** 3

    def unlike(k):
        return (k.sum() - k.trace()) / (12 * 11)

    expected = (
        unlike(kernel(one, one)) + unlike(kernel(other, other)) - 2 * kernel(one, other).mean()
    )
    assert kernel_distance(one, other, 100) == pytest.approx(expected.item(), rel=1e-6)
    state = torch.random.get_rng_state()
    assert kernel_distance(one, other, 6) == kernel_distance(
        one, other, 6
    )  # the same random subsets
    assert torch.equal(torch.random.get_rng_state(), state)


def test_kernel_distance_is_computed_in_float64():
    """Features far from zero have kernels of 1e18, whose differences float32 does not hold."""
    one, other = (features(40, seed).float() + 1000 for seed in (0, 1))
    exact = kernel_distance(one.double(), other.double(), 20)
    assert kernel_distance(one, other, 20) == pytest.approx(exact, rel=1e-9)


# ------------------------------------------------------------------------------------------- judges
def test_a_timm_tower_without_its_head(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=3).eval()
    safetensors.torch.save_file(network.state_dict(), tmp_path / "net.safetensors")
    extract = FeatureExtractor(
        FeatureSource("timm:test_resnet", str(tmp_path / "net.safetensors"), size=32), "cpu"
    )
    images = torch.rand(3, 3, 32, 32)
    expected = network.forward_head(network.forward_features((images - 0.5) / 0.5), pre_logits=True)
    torch.testing.assert_close(extract(images), expected.detach().double())
    with pytest.raises(
        ModelError,
        match="is missing or has another shape; the file belongs to another architecture",
    ):
        FeatureExtractor(FeatureSource("timm:test_vit", str(tmp_path / "net.safetensors")), "cpu")


def test_a_timm_tower_reads_as_it_was_trained(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet10t").eval()
    path = str(tmp_path / "net.safetensors")
    safetensors.torch.save_file(network.state_dict(), path)
    extract = FeatureExtractor(FeatureSource("timm:resnet10t", path, size=32), "cpu")
    half = FeatureExtractor(
        FeatureSource("timm:resnet10t", path, size=32, mean=(0.5,) * 3, std=(0.5,) * 3), "cpu"
    )
    images = torch.rand(2, 3, 32, 32)
    mean, std = (
        torch.tensor(network.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std")
    )
    expected = network.forward_head(
        network.forward_features((images - mean) / std), pre_logits=True
    )
    torch.testing.assert_close(extract(images), expected.detach().double())
    assert (half(images) - extract(images)).abs().max() > 1e-3
    assert half.fingerprint() != extract.fingerprint()


def test_a_module_file_must_be_named_and_make_rows(tmp_path):
    path = str(tmp_path / "mean.pt")
    torch.jit.script(torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())).save(
        path
    )
    with pytest.raises(WeightFileError, match="allow_pickle"):
        FeatureExtractor(FeatureSource("module", path), "cpu")
    extract = FeatureExtractor(FeatureSource("module", path, size=8, allow_pickle=(path,)), "cpu")
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(extract(images), ((images - 0.5) / 0.5).mean((2, 3)).double())
    spoilt = torch.nn.Linear(3, 2)
    with torch.no_grad():
        spoilt.bias[0] = torch.nan
    torch.jit.script(spoilt).save(path)
    with pytest.raises(WeightFileError, match=r"mean.pt: bias is not finite"):
        FeatureExtractor(FeatureSource("module", path, size=8, allow_pickle=(path,)), "cpu")
    torch.jit.script(torch.nn.Flatten(0)).save(path)
    with pytest.raises(ModelError, match="must map 2 images to as many rows of features"):
        FeatureExtractor(FeatureSource("module", path, size=8, allow_pickle=(path,)), "cpu")(images)


def test_what_cannot_be_had_is_one_line(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(ModelError, match="is no TorchScript file"):
        FeatureExtractor(
            FeatureSource("module", str(tmp_path / "x.pt"), allow_pickle=(str(tmp_path / "x.pt"),)),
            "cpu",
        )


def test_inception_is_neither_downloaded_nor_read_unasked(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("downloads a pickle")
    )
    (tmp_path / "inception.pth").write_bytes(b"x")
    with pytest.raises(WeightFileError, match="allow_pickle"):
        FeatureExtractor(FeatureSource("inception", str(tmp_path / "inception.pth")), "cpu")


def test_presets_of_published_scores_have_the_activation_of_their_weights():
    for name in ("coco", "clip_score"):
        architecture = read_conf(f"retention/{name}.yaml")["clip_score"]["model"]
        config = open_clip.get_model_config(architecture)
        assert (
            config["quick_gelu"]
            is open_clip.get_pretrained_cfg("ViT-L-14", "openai")["quick_gelu"]
            is True
        )
        assert config | open_clip.get_model_config("ViT-L-14") == config  # nothing else differs


# ----------------------------------------------------------------------------- prompts and pictures
def test_prompts_from_every_source(tmp_path):
    assert read_images(["a", "b"], [1, 2], 9) == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert read_images("general_captions", [0], 2) == [
        (read_shipped("general_captions")[i], 0) for i in (0, 50)
    ]
    (tmp_path / "plain.csv").write_text("prompt\none\n", encoding="utf-8")
    (tmp_path / "seeded.csv").write_text("seed,prompt,id\n7,one,x\n8,two,y\n", encoding="utf-8")
    assert read_images(str(tmp_path / "plain.csv"), [3, 4], 9) == [("one", 3), ("one", 4)]
    assert read_images(str(tmp_path / "seeded.csv"), [3], 9) == [("one", 7), ("two", 8)]
    with pytest.raises(
        ValueError, match=r"^retention.prompts=gone: no such list; allowed: .*general_captions"
    ):
        read_images("gone", [0], 9)
    with pytest.raises(ValueError, match=r"^retention.seeds is empty"):
        read_images(["a"], [], 9)


def test_prompts_are_the_captions_of_a_folder_of_pictures(tmp_path):
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match=rf"^retention.prompts={tmp_path}: has no captions.txt"):
        read_images(str(tmp_path), [0], 9)
    (tmp_path / "captions.txt").write_text("one\ntwo\none\n", encoding="utf-8")
    assert read_images(str(tmp_path), [3], 9) == [("one", 3), ("two", 3)]


def test_a_changed_picture_of_the_reference_measures_another_thing(tmp_path):
    def fingerprint(**more) -> str:
        source = ImageTextSource(CLIP)
        features = FeatureSource("open_clip", CLIP)
        retention = GeneralRetention(["a", "b"], [0], clip_score=source, features=features, **more)
        retention.load()
        return retention.fingerprint()

    found = {fingerprint()}
    for colour in ("red", "blue"):
        for i in range(2):
            Image.new("RGB", (4, 4), colour).save(tmp_path / f"{i}.png")
        found.add(fingerprint(reference=str(tmp_path)))
    assert len(found) == 3


@pytest.mark.parametrize(
    "name", ["shapecanvas_style", "shapecanvas_tune", "smoke", "shapecanvas_object"]
)
def test_general_prompts_name_no_concept_of_a_sequence(name):
    sequence = read_conf(f"sequence/{name}.yaml")
    text = "\n".join(read_shipped("shapecanvas_captions"))
    for key in ("targets", "retain", "cross_retain"):
        assert not [
            name for name in sequence.get(key, []) if " " in name and name in text
        ]  # a style has two words
    assert len(read_shipped("shapecanvas_captions")) == 120
    assert len(read_shipped("general_captions")) >= 100


def test_pictures_are_cropped_to_their_middle(tmp_path):
    wide = np.zeros((4, 8, 3), np.uint8)
    wide[:, 2:6] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    (batch,) = read_pictures([tmp_path / "a.png"], 4, 8)
    assert batch.shape == (1, 3, 4, 4)
    assert batch.min() == 1
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"b.png: cannot be read as an image"):
        list(read_pictures([tmp_path / "b.png"], 4, 8))


def read_one(path, side: int = 4) -> np.ndarray:
    """The picture as [side, side, 3] in 0..255."""
    (batch,) = read_pictures([path], side, 8)
    return (batch[0] * 255).round().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_turned_as_its_camera_held_it(tmp_path, turn):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, :2] = [[200, 30, 30], [30, 200, 30]]
    plain = Image.fromarray(pixels)
    # what a camera stores for what is seen: by the EXIF standard, each turn undone
    ways = Image.Transpose
    stored = {
        2: ways.FLIP_LEFT_RIGHT,
        3: ways.ROTATE_180,
        4: ways.FLIP_TOP_BOTTOM,
        5: ways.TRANSPOSE,
        6: ways.ROTATE_90,
        7: ways.TRANSVERSE,
        8: ways.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = turn
    kept = plain.transpose(stored[turn]) if turn in stored else plain
    kept.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_one(tmp_path / "a.png"), pixels)


def test_pictures_of_every_kind_look_as_in_a_viewer(tmp_path):
    ramp = np.linspace(0, 65535, 16).astype(np.uint16).reshape(4, 4)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    expected = np.repeat((ramp / 257).round()[..., None], 3, 2)
    assert np.abs(read_one(tmp_path / "deep.png") - expected).max() <= 1
    clear = np.zeros((4, 4, 4), np.uint8)
    clear[..., 3] = 128
    clear[0, 0] = [255, 0, 0, 255]
    Image.fromarray(clear).save(tmp_path / "clear.png")
    found = read_one(tmp_path / "clear.png")
    assert found[0, 0].tolist() == [255, 0, 0]
    assert found[1, 1].tolist() == [127, 127, 127]  # half black on white
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.save(tmp_path / "palette.png")
    assert read_one(tmp_path / "palette.png")[2, 2].tolist() == [10, 200, 30]
    palette.save(tmp_path / "keyed.png", transparency=1)
    assert read_one(tmp_path / "keyed.png")[2, 2].tolist() == [255, 255, 255]
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=100)
    assert np.abs(read_one(tmp_path / "ink.jpg") - [255, 0, 0]).max() < 8
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    assert read_one(tmp_path / "bits.png").min() == 255
    Image.fromarray(clear[..., [0, 3]], "LA").save(tmp_path / "grey.png")
    assert read_one(tmp_path / "grey.png")[1, 1].tolist() == [127, 127, 127]


def test_files_that_are_no_picture_are_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for suffix in ("png", "jpg", "webp"):
        Image.fromarray(noise).save(tmp_path / f"a.{suffix}")
        cut = tmp_path / f"cut.{suffix}"
        cut.write_bytes((tmp_path / f"a.{suffix}").read_bytes()[:-900])
        with pytest.raises(ValueError, match=rf"cut.{suffix}: cannot be read as an image \(") as e:
            read_one(cut)
        assert "\n" not in str(e.value)
        cut.unlink()
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moves.webp", save_all=True, append_images=frames[1:], lossless=True)
    with pytest.raises(ValueError, match=r"moves.webp: cannot be read .*it has 2 frames"):
        read_one(tmp_path / "moves.webp")
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(read_one(tmp_path / "phone.jpg") - [255, 0, 0]).max() < 8
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "b.png").mkdir()
    assert [path.name for path in find_pictures(str(tmp_path))] == [
        "a.jpg",
        "a.png",
        "a.webp",
        "moves.webp",
        "phone.jpg",
    ]
    for suffix in ("TIFF", "gif", "heic"):
        (tmp_path / f"z.{suffix}").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"z.TIFF and 2 more are pictures in a format that is not"):
        find_pictures(str(tmp_path))


def test_nothing_to_measure_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing is measured; use retention=none"):
        GeneralRetention(["a"], [0])
    tower = FeatureSource("open_clip", CLIP)
    with pytest.raises(ValueError, match="at least two images on each side"):
        GeneralRetention(["a"], [0], features=tower)
    with pytest.raises(ValueError, match=r"^retention.reference=\S+: no such folder, or no .png"):
        GeneralRetention(["a", "b"], [0], features=tower, reference=str(tmp_path))


# -------------------------------------------------------------------------------- on the real model
def test_the_numbers_are_those_of_the_images(model, tmp_path):
    prompts = read_shipped("shapecanvas_captions")[:6]
    retention = GeneralRetention(
        prompts,
        [5],
        clip_score=ImageTextSource(CLIP),
        features=FeatureSource("open_clip", CLIP),
        kid_subset=4,
    )
    retention.begin(model, "base", SETTINGS, Cache(tmp_path / "cache", identify()))
    clip = load_image_text(ImageTextSource(CLIP), "cpu")
    texts = clip.embed_texts(prompts)

    def vectors():
        return torch.cat(
            [
                clip.embed_images(x)
                for x in generate(model, prompts, [5] * 6, SETTINGS, batch_size=4, label="")
            ]
        )

    before = vectors()
    assert retention.measure(0) == {
        "clip_score": pytest.approx(100 * (before * texts).sum(1).mean().item(), abs=1e-3),
        "fid": None,
        "kid": None,
    }
    with torch.no_grad():
        for parameter in model.denoiser.parameters():
            parameter.mul_(0.9)
    after, found = vectors(), retention.measure(1)
    assert found["clip_score"] == pytest.approx(
        100 * (after * texts).sum(1).mean().item(), abs=1e-3
    )
    assert found["fid"] == pytest.approx(
        frechet_distance(before.double(), after.double()), abs=1e-4
    )
    assert found["kid"] == pytest.approx(
        kernel_distance(before.double(), after.double(), 4), abs=1e-6
    )
    again = GeneralRetention(
        prompts,
        [5],
        clip_score=ImageTextSource(CLIP),
        features=FeatureSource("open_clip", CLIP),
        kid_subset=4,
    )
    # the weights are not the base: it must come from the cache
    again.begin(model, "base", SETTINGS, Cache(tmp_path / "cache", identify()))
    assert again.measure(2) == found


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("vae", SamplingError, "^the images of general prompts are not finite: the checkpoint"),
        ("clip", ModelError, "^retention.clip_score: its network answers NaN to a finite image"),
    ],
)
def test_what_is_not_finite_stops_the_run(model, tmp_path, monkeypatch, layer, error, message):
    retention = GeneralRetention(["a", "b"], [5], clip_score=ImageTextSource(CLIP))
    if layer == "vae":
        monkeypatch.setattr(model, "decode_latents", lambda _: torch.full((2, 3, 8, 8), torch.nan))
    else:
        monkeypatch.setattr(PromptScorer, "__call__", lambda *_: torch.tensor([1.0, torch.nan]))
    with pytest.raises(error, match=message) as caught:
        retention.begin(model, "base", SETTINGS, Cache(tmp_path / "cache", identify()))
    assert "\n" not in str(caught.value)


def test_a_folder_of_pictures_is_the_reference(model, tmp_path):
    prompts = read_shipped("shapecanvas_captions")[:4]
    (tmp_path / "real").mkdir()
    for number in range(3):
        Image.fromarray(np.full((70, 64, 3), 80 * number, np.uint8)).save(
            tmp_path / "real" / f"{number}.png"
        )
    tower = FeatureSource("open_clip", CLIP)
    retention = GeneralRetention(prompts, [5], features=tower, reference=str(tmp_path / "real"))
    retention.begin(model, "base", SETTINGS, Cache(tmp_path / "cache", identify()))
    found = retention.measure(0)
    assert list(found) == ["fid", "kid"]
    assert found["fid"] > 0.1


def test_a_run_measures_retention_and_resumes(in_process, tmp_path):
    wanted = (*SMOKE, "retention=shapecanvas", "retention.num_prompts=4")
    status, out, err = in_process(*wanted)
    assert (status, err) == (0, "")
    directory = run_directory(out, tmp_path)
    table = pd.read_csv(directory / "metrics.csv")
    assert list(table.columns)[8:11] == ["clip_score", "fid", "kid"]
    assert table["clip_score"].notna().all()
    assert table["fid"].isna().tolist() == [True, False, False]
    for index in (0, 1, 2):
        measured = json.loads((directory / f"steps/0{index}/metrics.json").read_text())
        row = json.loads((directory / f"steps/0{index}/step.json").read_text())
        assert measured["clip_score"] == row["row"]["clip_score"] == table["clip_score"][index]
        assert len(row["retention_sha256"]) == 64
    assert "clip_score" in out
    before = (directory / "steps/02/metrics.json").read_bytes()
    for path in ("steps/02/step.json", "summary.json"):
        (directory / path).unlink()
    status, _, err = in_process(*wanted)
    assert (status, err) == (0, "")
    assert (directory / "steps/02/metrics.json").read_bytes() == before
    status, out, err = in_process(*wanted, "dry_run=true", "seed=1")
    assert "retention: 12 further images, of general prompts\n" in out
