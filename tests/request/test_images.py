"""What methods train on: anchor images and their mirror images, retained prompts."""

import pytest
import torch

from cu_runner.concepts.entries import spread
from cu_runner.models.parameters import select_parameters, snapshot
from cu_runner.request.anchors import AnchorImages
from cu_runner.request.images import CaptionedImages, RetainSet
from cu_runner.request.name_sources import NameSource
from cu_runner.runtime.code_identity import identify
from cu_runner.schema.settings import Sampler
from cu_runner.store.cache import Cache


def test_mirrored_anchors_are_encoded_mirror_images(model, tmp_path):
    """Not mirrored latents: the autoencoder does not commute with a reflection."""
    params = select_parameters(model.denoiser, "kv_xattn")
    anchors = AnchorImages(
        model,
        "fingerprint",
        params,
        snapshot(params),
        Sampler(2, 2.5),
        Cache(tmp_path, identify()),
        batch_size=3,
    )
    plain, mirrored = (
        anchors.latents(["a tree image"], 4),
        anchors.latents(["a tree image"], 4, mirrored=True),
    )
    assert plain.shape == mirrored.shape == (4, *model.latent_shape)
    images, turned = model.decode_latents(plain), model.decode_latents(mirrored)
    assert (turned - images.flip(-1)).abs().mean() < 0.05
    assert (turned - images).abs().mean() > (turned - images.flip(-1)).abs().mean()
    assert not torch.allclose(mirrored, plain.flip(-1), atol=1e-3)
    again = anchors.latents(["a tree image"], 4, mirrored=True)  # from the cache
    assert torch.equal(again, mirrored)


def test_retained_prompts_hold_every_name_before_any_comes_twice(make_scope):
    scope = make_scope()
    names = (
        24 - 1 - len(scope.sequence.retain)
    )  # the vocabulary but for the target and the retained
    for number in (10, 15, names):
        prompts = RetainSet("names", prompts=number).read(scope)
        assert len(prompts) == number
        assert len({prompt.rpartition(" in the style of ")[2] for prompt in prompts}) == number
    more = RetainSet("names", prompts=2 * names).read(scope)
    assert len(set(more)) == 2 * names


def test_both_sources_share_the_prompts(make_scope):
    prompts = RetainSet("both", prompts=8).read(make_scope())
    assert sum("style" not in prompt for prompt in prompts) == 4
    assert RetainSet("anchors").read(make_scope()) == [
        f"a {caption}" for caption in ("ball", "box", "tent", "hoop")
    ]


def test_fewer_images_than_prompts_take_prompts_from_the_whole_list(make_scope):
    retain, scope = RetainSet("both", prompts=40, images=6), make_scope()
    images = retain.images_of(scope)
    assert images.latents.shape[:2] == (1, 6)
    assert len(images.texts[0][0][0]) == 6
    text = scope.model.encode_prompts(spread(retain.read(scope), 6)).hidden
    assert torch.equal(images.texts[0][0][0].hidden, text)


def test_a_list_or_file_that_cannot_be_read_is_refused_at_once(tmp_path):
    for broken in (
        {"source": "list", "name": "nope"},
        {"source": "file", "name": str(tmp_path / "gone")},
    ):
        with pytest.raises(ValueError, match="no such"):
            RetainSet(**broken)
        with pytest.raises(ValueError, match="no such"):
            NameSource(**broken)


def test_every_caption_list_follows_the_images(make_scope):
    scope = make_scope()
    images = CaptionedImages(
        scope, [["a tree image", "a star image"]], [["a fish image", "a cup image"]], number=4
    )
    batch = images.draw(torch.Generator().manual_seed(0), 16)
    made, other = (
        scope.model.encode_prompts(prompts).hidden
        for prompts in (["a tree image", "a star image"], ["a fish image", "a cup image"])
    )
    for row in range(16):
        pair = 0 if torch.equal(batch.texts[0].hidden[row], made[0]) else 1
        assert torch.equal(batch.texts[0].hidden[row], made[pair])
        assert torch.equal(batch.texts[1].hidden[row], other[pair])


# ---------------------------------------------------------------------------------------- templates
MADE = ["a tree image", "a star image"]
WAYS = [("a fish image", "a cup image"), ("a ball image", "a hoop image")]


def test_each_of_two_templates_is_drawn_about_half_of_the_time(make_scope):
    scope = make_scope()
    images = CaptionedImages(scope, [MADE], [WAYS], number=4)
    encoded = {
        prompt: scope.model.encode_prompts([prompt]).hidden[0]
        for prompt in (*MADE, *(way for ways in WAYS for way in ways))
    }
    counts = dict.fromkeys(sum(WAYS, ()), 0)
    for seed in range(100):
        batch = images.draw(torch.Generator().manual_seed(seed), 8)
        again = images.draw(torch.Generator().manual_seed(seed), 8)
        assert torch.equal(batch.texts[1].hidden, again.texts[1].hidden)
        for made, other in zip(batch.texts[0].hidden, batch.texts[1].hidden, strict=True):
            (caption,) = (i for i, prompt in enumerate(MADE) if torch.equal(made, encoded[prompt]))
            (way,) = (prompt for prompt in WAYS[caption] if torch.equal(other, encoded[prompt]))
            counts[way] += 1
    for first, second in WAYS:
        # of about 400 draws each: three standard deviations
        share = counts[first] / (counts[first] + counts[second])
        assert abs(share - 0.5) < 1.5 / (counts[first] + counts[second]) ** 0.5


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_one_template_draws_what_was_drawn_before_there_were_several(make_scope, flip, wrapped):
    """Concepts, images, timesteps, noise, mirroring: in this order, and nothing after them."""
    scope = make_scope()
    model, latents = scope.model, scope.anchors([], 4)
    other = ["a fish image", "a cup image"]
    further = [(prompt,) for prompt in other] if wrapped else other
    images = CaptionedImages(scope, [MADE, MADE], [further, further], number=4, flip=flip)
    generator, plain = (torch.Generator().manual_seed(5) for _ in range(2))
    several = CaptionedImages(scope, [MADE, MADE], [WAYS, WAYS], number=4, flip=flip)
    of_several = several.draw(torch.Generator().manual_seed(5), 6)
    batch = images.draw(generator, 6)
    torch.randint(2, (6,), generator=plain)
    chosen = torch.randint(4, (6,), generator=plain)
    timesteps = torch.randint(model.num_train_timesteps, (6,), generator=plain)
    noise = torch.randn(6, *model.latent_shape, generator=plain)
    clean = latents[chosen]
    if flip:
        mirrored = torch.rand(6, 1, 1, 1, generator=plain) < 0.5
        clean = torch.where(mirrored, clean.flip(-1), clean)
    for drawn in (batch, of_several):  # the choice of a template comes last
        assert torch.equal(drawn.timesteps, timesteps)
        assert torch.equal(drawn.wanted, noise)
        assert torch.equal(drawn.noisy, model.add_noise(clean, noise, timesteps))
        captions = model.encode_prompts([MADE[i % 2] for i in chosen.tolist()])
        assert torch.equal(drawn.texts[0].hidden, captions.hidden)
    others = model.encode_prompts([other[i % 2] for i in chosen.tolist()])
    assert torch.equal(batch.texts[1].hidden, others.hidden)
    assert torch.equal(generator.get_state(), plain.get_state())
