"""People's own pictures: which are trained on, with which text; folders and captions; what is
refused, and what counts for the signature.
"""

import dataclasses
import json

import numpy as np
import pytest
import torch
from conftest import SMOKE, compose, read_conf
from PIL import Image

from cu_runner.cli import doctor
from cu_runner.concepts.picture_folder import read_folder
from cu_runner.concepts.requests import Request, plan_requests
from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.concepts.templates import caption_in
from cu_runner.config.compose import parse
from cu_runner.methods.conabl import ConAbl
from cu_runner.methods.erasediff import EraseDiff
from cu_runner.methods.esd import ESD
from cu_runner.methods.forward_kl import ForwardKL
from cu_runner.methods.gradient_ascent import GradientAscent
from cu_runner.methods.random_label import RandomLabel
from cu_runner.methods.rgd import RGD
from cu_runner.methods.salun import SalUn
from cu_runner.models.pictures import read_pictures
from cu_runner.request.images import RetainSet
from cu_runner.request.own_images import anchored, captioned_by, images_of_target
from cu_runner.runner.own_images import check_pictured
from cu_runner.runner.preflight import check_pictures
from cu_runner.schema.errors import ConfigError

FIRST = "torch light"  # the first target of the smoke sequence
NONE_KEPT = {"retain": RetainSet("anchors", prompts=2, images=2)}
METHODS = {
    "gradient_ascent": lambda: GradientAscent(num_images=6),
    "random_label": lambda: RandomLabel(num_images=6, **NONE_KEPT),
    "salun": lambda: SalUn(num_images=6, **NONE_KEPT),
    "erasediff": lambda: EraseDiff(num_images=6, **NONE_KEPT),
    "rgd": lambda: RGD(num_images=6, **NONE_KEPT),
}


def paint(folder, count: int, seed: int = 0, side: int = 80) -> list[str]:
    """Pictures 0.png, 1.png, ... of one colour each, in a folder that is made; their names."""
    folder.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(seed).integers(0, 256, (count, 3), np.uint8)
    for i, colour in enumerate(colours):
        pixels = np.broadcast_to(colour, (side, side + 20, 3)).copy()
        pixels[: side // 2] = 255 - colour
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [f"{i}.png" for i in range(count)]


def write_table(folder, captions: list[str]) -> None:
    rows = [f'{i}.png,"{caption}"' for i, caption in enumerate(captions)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *rows]) + "\n")


def smoke(**changes):
    return make_sequence(**read_conf("sequence/smoke.yaml") | changes)


@pytest.fixture
def of(make_scope):
    """Returns of(sequence) -> the scope of its first request, in which nothing is generated."""

    def make(sequence, **changes):
        def refuse(prompts, number, mirrored=False):
            raise AssertionError(f"images of {prompts[0]} were generated")

        request = plan_requests(sequence, "sequential")[0]
        scope = make_scope(batch_size=3)
        return dataclasses.replace(
            scope, sequence=sequence, request=request, **{"anchors": refuse} | changes
        )

    return make


def latents_of(model, folder, places) -> torch.Tensor:
    """What the autoencoder makes of pictures, one by one."""
    paths = [folder / f"{i}.png" for i in places]
    return torch.cat([model.encode_images(each) for each in read_pictures(paths, 64, 1)])


# ------------------------------------------------------------------------------------------ methods
@pytest.mark.parametrize("name", METHODS)
def test_the_pictures_of_the_target_are_what_is_trained_on(make_scope, of, tmp_path, name):
    paint(tmp_path / "light", 5)
    generated = make_scope().anchors
    scope = of(smoke(images={"torch_light": str(tmp_path / "light")}), anchors=generated)
    for parameter in scope.params.values():
        parameter.requires_grad_(True)
    method = METHODS[name]()
    method.begin_request(scope)
    images = method._forget
    expected = latents_of(scope.model, tmp_path / "light", range(5))
    assert images.sizes == [5]
    torch.testing.assert_close(images.latents[0], expected, rtol=1e-4, atol=1e-4)
    prompts = [target for target, _ in scope.sequence.training_pairs(scope.request.targets[0])]
    batch = images.draw(torch.Generator().manual_seed(0), 20)
    clean = (
        batch.noisy - scope.model.add_noise(0 * batch.noisy, batch.wanted, batch.timesteps)
    ) / (scope.model.process.alphas_cumprod[batch.timesteps].sqrt().view(-1, 1, 1, 1))
    texts = scope.model.encode_prompts(prompts).hidden
    seen = set()
    # a clean latent is told from the noised one only where there is little noise
    for row in torch.nonzero(batch.timesteps < 700).flatten().tolist():
        distances = [(clean[row] - latent).abs().max().item() for latent in images.latents[0]]
        picture = min(range(5), key=distances.__getitem__)
        assert distances[picture] < 1e-2
        known = texts[picture % 4]
        if name == "random_label":
            known = scope.model.encode_prompts([prompts[picture % 4]]).hidden[0]
        torch.testing.assert_close(batch.texts[0].hidden[row], known)
        seen.add(picture)
    assert len(seen) > 2


def test_at_most_the_asked_number_evenly_spread_and_mirrored_on_demand(of, tmp_path):
    paint(tmp_path / "light", 7)
    sequence = smoke(images={FIRST: str(tmp_path / "light")})
    scope = of(sequence)
    shown = images_of_target(sequence, sequence.targets[0], 3)
    assert [path.name for path in shown.pictures.paths] == ["0.png", "2.png", "4.png"]
    plain, mirrored = (shown.pictures.encode(scope.model, 2, turned) for turned in (False, True))
    expected = latents_of(scope.model, tmp_path / "light", (0, 2, 4))
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-4)
    (turned,) = read_pictures([tmp_path / "light/2.png"], 64, 1)
    torch.testing.assert_close(
        mirrored[1:2], scope.model.encode_images(turned.flip(-1)), rtol=1e-4, atol=1e-4
    )


def test_captions_are_the_texts_and_their_anchors_follow(of, tmp_path):
    captions = [
        "A ball in the style of torch light.",
        "a lamp seen in torch light",
        "an old photo",
    ]
    paint(tmp_path / "light", 3)
    write_table(tmp_path / "light", captions)
    sequence = smoke(images={FIRST: str(tmp_path / "light")})
    shown = images_of_target(sequence, sequence.targets[0], 9)
    assert shown.prompts == captions
    # like the template; not like it, so that the anchor's prompts come in turn
    assert shown.anchors == ["a ball", "a box", "a tent"]
    scope = of(sequence)
    (labels,) = RandomLabel(num_images=9)._labels(scope)
    assert labels[0].startswith("A ball in the style of ")
    assert labels[1].startswith("a lamp seen in ")
    assert "torch light" not in labels[0] + labels[1]
    assert labels[2].startswith("a tent in the style of ")
    person = smoke(
        anchors={FIRST: "lamp", "snow drift": "cloud"},
        anchor_prompt="a photo of a {anchor} {caption}",
        target_prompt="a photo of {concept} {caption}",
    )
    target = person.targets[0]
    assert anchored(person, target, "A photo of torch light at night") == (
        "a photo of a lamp at night"
    )
    assert anchored(person, target, "Torch Light, asleep") == "lamp, asleep"
    assert anchored(person, target, "a house") is None


def test_forward_kl_holds_pictures_out_and_weighs_what_is_left(make_scope, of, tmp_path):
    paint(tmp_path / "light", 9)
    paint(tmp_path / "kept/lava flow", 3, 1)
    paint(tmp_path / "kept/torch_light", 3, 2)
    sequence = smoke(images={FIRST: str(tmp_path / "light")})
    retain = RetainSet("images", str(tmp_path / "kept"))
    method = ForwardKL(num_images=200, num_fresh=4, retain=retain)
    scope = of(sequence)
    method.begin_request(scope)
    assert (method._total, method._sizes.tolist()) == (5 + 3, [5.0])
    expected = latents_of(scope.model, tmp_path / "light", range(9))
    torch.testing.assert_close(method._groups[0].latents[0], expected[:5], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(method._fresh[0], expected[5:], rtol=1e-4, atol=1e-4)
    prompts = [target for target, _ in sequence.training_pairs(sequence.targets[0])]
    assert method._captions == [[prompts[i % 4] for i in range(5, 9)]]
    assert {group for group in method.batch(scope, 0).groups} == {0}
    assert method.final_constraint(scope).tolist() == pytest.approx([0.0])
    with pytest.raises(ConfigError, match=r"light: holds 9 pictures, and method=mine needs 10 "):
        check_pictured("mine", ForwardKL(num_fresh=9), sequence)
    check_pictured("mine", method, sequence)


def test_targets_with_few_and_many_pictures_are_drawn_alike_each_in_its_own(of, tmp_path):
    paint(tmp_path / "few", 2)
    paint(tmp_path / "many", 6, 1)
    sequence = smoke(images={FIRST: str(tmp_path / "few"), "snow_drift": str(tmp_path / "many")})
    together = Request(1, "simultaneous", sequence.targets, is_only=True)
    scope = of(sequence)
    method = GradientAscent()
    method.begin_request(dataclasses.replace(scope, request=together))
    assert method._forget.sizes == [2, 6]
    assert method._forget.latents[0, 2:].abs().max() == 0  # which is never drawn
    generator = torch.Generator().manual_seed(0)
    concepts = torch.randint(2, (600,), generator=generator).tolist()
    places = method._forget._choose(generator, concepts)
    for concept, size in enumerate((2, 6)):
        drawn = [place for place, own in zip(places, concepts, strict=True) if own == concept]
        counts = [drawn.count(i) for i in range(size)]
        assert sum(counts) == len(drawn)  # none beyond its own
        assert min(counts) > 0.5 * len(drawn) / size


@pytest.mark.parametrize("loss", ["noise", "model"])
def test_conabl_trains_on_pictures_of_the_anchor(of, tmp_path, loss):
    paint(tmp_path / "plain", 4)
    texts = ["A jug.", "a red shoe", "a chair", "a bird"]
    write_table(tmp_path / "plain", texts)
    sequence = smoke(anchor_images={FIRST: str(tmp_path / "plain")})
    scope, method = of(sequence), ConAbl(loss, num_anchors=9, flip=True)
    check_pictured("conabl", method, sequence)
    method.begin_request(scope)
    images = method._images
    assert images.sizes == [4]
    assert images.mirrored.shape == images.latents.shape
    first, second = (images.texts[kind][0][0] for kind in (0, 1))
    wanted = ["a jug", "a red shoe", "a chair", "a bird"]
    assert torch.equal(first.hidden, scope.model.encode_prompts(wanted).hidden)
    named = [f"{text} in the style of torch light" for text in wanted]
    assert torch.equal(second.hidden, scope.model.encode_prompts(named).hidden)


def test_anchor_captions_that_name_no_target_are_refused(tmp_path):
    paint(tmp_path / "plain", 2)
    write_table(tmp_path / "plain", ["a jug", "some shoes"])
    sequence = smoke(anchor_images={FIRST: str(tmp_path / "plain")})
    with pytest.raises(ValueError, match=r"plain: the caption 'some shoes' is not like .*'a {cap"):
        captioned_by(sequence, sequence.targets[0], 9)
    assert captioned_by(sequence, sequence.targets[1], 9) is sequence
    assert caption_in("a {caption}", "A jug.") == "jug"
    assert caption_in("{caption}", "Two (odd) words") == "Two (odd) words"
    assert caption_in("no place", "no place") is None


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        (ESD(), "images", r"^sequence.images: method=mine trains on no images of targets"),
        (ESD(), "anchor_images", r"^sequence.anchor_images: method=mine trains on no images"),
        (ConAbl(), "images", r"^sequence.images: .* images of anchors: give sequence.anchor_im"),
        (RGD(), "anchor_images", r"^sequence.anchor_images: .* of targets: give sequence.images;"),
        (RGD(diversity="narrow"), "images", r"^sequence.images: .* trains on no images"),
    ],
)
def test_a_method_that_would_not_use_them_says_so(tmp_path, method, kind, message):
    paint(tmp_path / "light", 1)
    sequence = smoke(**{kind: {FIRST: str(tmp_path / "light")}})
    with pytest.raises(ConfigError, match=message) as said:
        check_pictured("mine", method, sequence)
    assert "\n" not in str(said.value)


# ----------------------------------------------------------------------------------------- retained
def test_what_is_kept_comes_from_one_folder_with_captions(of, tmp_path):
    paint(tmp_path / "kept", 5)
    (tmp_path / "kept/captions.txt").write_text("one\ntwo\nthree\nfour\none\n")
    scope = of(smoke())
    retain = RetainSet("images", str(tmp_path / "kept"), images=3)
    images = retain.images_of(scope)
    expected = latents_of(scope.model, tmp_path / "kept", (0, 1, 3))
    torch.testing.assert_close(images.latents[0], expected, rtol=1e-4, atol=1e-4)
    texts = scope.model.encode_prompts(["one", "two", "four"]).hidden
    assert torch.equal(images.texts[0][0][0].hidden, texts)
    assert retain.read(scope) == ["one", "two", "three", "four"]  # for closed forms


def test_what_is_kept_comes_from_a_folder_per_concept_without_those_unlearned(of, tmp_path):
    for place, (name, count) in enumerate({"lava_flow": 3, "jade": 2, "torch light": 4}.items()):
        paint(tmp_path / "kept" / name, count, place)
    (tmp_path / "kept/jade/captions.txt").write_text("a jade dragon\na jade cup\n")
    sequence = smoke()
    retain = RetainSet("images", str(tmp_path / "kept"))
    first, second = "a ball in the style of lava flow", "a box in the style of lava flow"
    scope = of(sequence)
    assert retain.read(scope) == [
        "a jade dragon",
        first,
        "a jade cup",
        second,
        "a tent in the style of lava flow",
    ]
    both = dataclasses.replace(scope, request=plan_requests(sequence, "sequential")[1])
    assert retain.read(both) == retain.read(scope)  # torch light is unlearned before
    only = RetainSet("images", str(tmp_path / "kept/torch light/.."))
    assert len(only.images_of(scope).latents[0]) == 5
    for name in ("lava_flow", "jade"):
        (tmp_path / "kept" / name).rename(tmp_path / name)
    with pytest.raises(ValueError, match="every concept in it is unlearned"):
        retain.read(scope)


# ------------------------------------------------------------------------------- folders and words
def refused(folder, message) -> None:
    with pytest.raises(ValueError, match=message) as said:
        read_folder("sequence.images.x", str(folder))
    assert "\n" not in str(said.value)
    assert str(said.value).startswith(f"sequence.images.x={folder}")


def test_captions_of_every_kind_and_what_is_wrong_with_them(tmp_path):
    folder = tmp_path / "some"
    refused(folder, "no such folder, or no .png")
    paint(folder, 2)
    assert read_folder("k", str(folder)).captions == ()
    lines = [{"file_name": "1.png", "text": "one"}, {"file_name": "0.png", "text": " no\n ught"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert read_folder("k", str(folder)).captions == ("no ught", "one")
    (folder / "captions.txt").write_text("a\n")
    refused(folder, "captions in captions.txt and metadata.jsonl; keep one")
    (folder / "metadata.jsonl").unlink()
    refused(folder, "captions.txt has 1 lines for 2 pictures")
    (folder / "captions.txt").unlink()
    for text, message in {
        "{}\n": "metadata.jsonl line 1 is no JSON object",
        '{"file_name": "0.png", "text": ""}': "line 1 is no JSON object with file_name and text",
        '\n{"file_name": 3, "text": "a"}': "line 2 is no JSON object",
        '{"file_name": "7.png", "text": "a"}': "names 7.png, which is no picture there",
        '{"file_name": "1.png", "text": "a"}': "has no caption of 0.png",
        '{"file_name": "1.png", "text": "a"}\n{"file_name": "1.png", "text": "b"}': "two captions",
    }.items():
        (folder / "metadata.jsonl").write_text(text)
        refused(folder, message)
    (folder / "metadata.jsonl").unlink()
    (folder / "metadata.csv").write_text("file,text\n0.png,a\n")
    refused(folder, "has no column file_name")


def test_names_of_targets_and_folders_are_checked_at_once(tmp_path):
    paint(tmp_path / "light", 1)
    place = str(tmp_path / "light")
    found = smoke(images={"Torch_Light": place}).target_pictures
    assert list(found) == [FIRST]
    with pytest.raises(ValueError, match=r"^sequence.images.lava flow: is not in sequence.targets"):
        smoke(images={"lava flow": place})
    with pytest.raises(ValueError, match=r"^sequence.images lists torch light and torch_light"):
        smoke(images={FIRST: place, "torch_light": place})
    with pytest.raises(ValueError, match=r"^sequence.anchor_images.torch light=/no/where: no such"):
        smoke(anchor_images={FIRST: "/no/where"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty: no such folder, or no \.png"):
        RetainSet("images", str(tmp_path / "empty"))
    (tmp_path / "bare").mkdir()
    paint(tmp_path / "bare", 1)
    with pytest.raises(ValueError, match=r"retain.name=.*bare: says of no picture what it shows"):
        RetainSet("images", str(tmp_path / "bare"))


# ---------------------------------------------------------------------------------------- signature
def test_a_changed_picture_or_caption_is_another_run_and_unset_folders_are_none(tmp_path):
    paint(tmp_path / "light", 2)
    paint(tmp_path / "kept/jade", 1)
    words = (
        "sequence=smoke",
        "method=gradient_ascent",
        f"+sequence.images.torch_light={tmp_path}/light",
        "method.retain.source=images",
        f"method.retain.name={tmp_path}/kept",
    )

    def signed(*chosen: str) -> str:
        return parse(compose(*chosen)).signature

    plain = signed(*words[:2])
    assert signed(*words[:2], "+sequence.images={}", "+sequence.anchor_images=null") == plain
    before = signed(*words)
    assert before != plain
    assert signed(*words) == before
    (tmp_path / "light/notes.md").write_text("not read")
    assert signed(*words) == before
    paint(tmp_path / "kept/jade", 1, seed=9)
    retained = signed(*words)
    (tmp_path / "light/captions.txt").write_text("one\ntwo\n")
    captioned = signed(*words)
    paint(tmp_path / "light", 2, seed=9)
    assert len({before, retained, captioned, signed(*words)}) == 4
    key = parse(compose(*words)).training_key["files"]
    assert set(key) == {f"{tmp_path}/light", f"{tmp_path}/kept"}


# ----------------------------------------------------------------------------------------- commands
def test_the_commands_read_them_before_anything_is_made(in_process, call_command, tmp_path):
    paint(tmp_path / "light", 3, side=40)
    small = [word for word in SMOKE if not word.startswith("method.")]
    words = [*small, "method=gradient_ascent", "method.num_images=4"]
    words += [f"+sequence.images.torch_light={tmp_path}/light"]
    status, out, _ = in_process(*words, "dry_run=true")
    assert status == 0
    assert f"3 pictures: sequence.images.torch_light={tmp_path}/light\n" in out
    plan = parse(compose(*words))
    (finding,) = check_pictures(plan, plan.sequence.build())
    assert (finding.ok, finding.what) == (True, "own images")
    assert finding.detail == (
        f"3 pictures: sequence.images.torch_light={tmp_path}/light; 3 smaller than 64 pixels, "
        "which are enlarged"
    )
    status, out, err = in_process(*words)
    assert (status, err) == (0, "")
    (tmp_path / "light/2.png").write_bytes((tmp_path / "light/2.png").read_bytes()[:-30])
    status, out, _ = call_command(doctor.main, "cu-doctor", *words)
    assert status == 1
    assert "own images:" in out
    assert "2.png: cannot be read as an image" in out
    status, _, err = in_process(*words)
    assert status == 2
    assert f"{tmp_path}/light/2.png: cannot be read as an image" in err
    assert err.count("\n") == 1
    for wrong, message in {
        "method=esd": "sequence.images: method=esd trains on no images of targets or anchors",
        "+sequence.images.lava_flow=x": "sequence.images.lava_flow: is not in sequence.targets",
    }.items():
        chosen = [word for word in words if not word.startswith("method")]
        chosen += [wrong] if wrong.startswith("method") else [wrong, "method=gradient_ascent"]
        for more in ([], ["dry_run=true"]):
            status, _, err = in_process(*chosen, *more)
            assert (status, err.count("\n")) == (2, 1)
            assert message in err
