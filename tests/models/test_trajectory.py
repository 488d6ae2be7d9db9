"""A trajectory that stops, is kept and goes on ends where one that does not does, bitwise."""

import diffusers
import pytest
import torch

from cu_runner.models.sampling import make_scheduler, sample_latents
from cu_runner.models.schedulers import largest_eta, real_eta
from cu_runner.models.trajectory import Trajectory
from cu_runner.schema.settings import Sampler

PROMPTS = ["a tree image in blaze style", "a star image in plum style", "a cup image"]
SEEDS = [1, 2, 3]


def begin(model, sampler, rows, **more):
    chosen = [[each[row] for row in rows] for each in (PROMPTS, SEEDS)]
    return Trajectory(model, make_scheduler(model, sampler), *chosen, sampler.guidance, **more)


@pytest.mark.parametrize(
    "name",
    [
        "DPMSolverMultistepScheduler",
        "DDIMScheduler",
        "UniPCMultistepScheduler",
        "HeunDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
    ],
)
def test_images_that_are_kept_go_on_in_another_batch(model, name):
    sampler = Sampler(5, 2.5, name)
    whole = sample_latents(model, PROMPTS, SEEDS, sampler)
    trajectory = begin(model, sampler, [0, 1, 2])
    for stop in (1, 3):
        trajectory.advance(stop)
        kept = trajectory.keep()
        rest = begin(model, sampler, [2, 0])
        rest.resume([kept[2], kept[0]])
        assert rest.done == stop
        assert torch.equal(rest.advance(rest.num_steps), whole[[2, 0]])
    assert torch.equal(trajectory.advance(trajectory.num_steps), whole)


def test_the_first_noise_is_scaled_and_eta_adds_some_on_the_way(model):
    sampler = Sampler(3, 1.0, "DDIMScheduler")
    plain, larger = begin(model, sampler, [0]), begin(model, sampler, [0], noise_scales=[1.5])
    torch.testing.assert_close(larger.latents, 1.5 * plain.latents)
    both = begin(model, sampler, [1, 0], noise_scales=[1.0, 1.5])
    assert torch.equal(both.latents[1:], larger.latents)
    noisy = begin(model, sampler, [0], eta=0.5)
    assert torch.equal(noisy.latents, plain.latents)
    assert not torch.equal(noisy.advance(3), plain.advance(3))


def rounded_down(scheduler):
    """Let the noise level before the last be one at which 1 - a and its root's square differ."""
    found = next(a for a in torch.linspace(0.01, 0.2, 1000) if 1 - a - ((1 - a) ** 0.5) ** 2 < 0)
    scheduler.alphas_cumprod[scheduler.timesteps[1]] = found
    return scheduler


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDIMParallelScheduler"])
def test_an_eta_at_the_limit_has_a_real_root_on_every_machine(model, name):
    sampler = Sampler(5, 1.0, name)
    scheduler = rounded_down(make_scheduler(model, sampler))
    drawn = Trajectory(model, scheduler, PROMPTS[:1], SEEDS[:1], 1.0, eta=1.0).advance(5)
    assert drawn.isfinite().all()
    assert real_eta(scheduler, 1.0) == pytest.approx(1.0, abs=1e-6)
    assert real_eta(scheduler, 1.0) < 1.0
    assert real_eta(scheduler, 0.9) == 0.9
    assert real_eta(scheduler, 1.5) == 1.5  # what is more than there is room for stays to be seen
    plain = make_scheduler(model, Sampler(5, 1.0))
    assert real_eta(plain, 1.0) == 1.0  # takes no eta of DDIM


@pytest.mark.parametrize("steps", [7, 13, 50, 61, 64, 150])
def test_the_largest_eta_is_one_that_every_step_can_take(steps):
    """Also where the steps are not evenly spread: DDIM goes from t to t - 1000 // steps."""
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(steps)
    most, image = largest_eta(scheduler), torch.ones(1, 1, 2, 2)
    assert most > 1
    assert real_eta(scheduler, most) == pytest.approx(most, rel=1e-4)
    for timestep in scheduler.timesteps:
        image = scheduler.step(
            image, timestep, image, eta=real_eta(scheduler, most), variance_noise=image
        ).prev_sample
    assert image.isfinite().all()


def test_a_text_takes_the_place_of_the_words(model):
    sampler = Sampler(3, 2.5)
    other = model.encode_prompts([PROMPTS[1]])
    told = begin(model, sampler, [0], text=other).advance(3)
    assert not torch.equal(told, begin(model, sampler, [0]).advance(3))
    same = begin(model, sampler, [0], text=model.encode_prompts([PROMPTS[0]])).advance(3)
    assert torch.equal(same, begin(model, sampler, [0]).advance(3))


# ----------------------------------------------------------------------------- replaced embeddings
def test_a_words_own_embedding_in_its_place_changes_nothing(model):
    prompts = ["a x image in blaze style", "a tree in x style"]
    token = model.tokenizer("x").input_ids[1]
    own = [table[token][None] for table in model.prompts.embeddings()]
    with torch.no_grad():
        replaced = model.prompts.encode_replaced(prompts, "x", own).hidden
    torch.testing.assert_close(replaced, model.encode_prompts(prompts).hidden)


def test_another_embedding_is_that_other_word_and_has_a_gradient(model):
    tree = model.tokenizer("tree").input_ids[1]
    own = [table[tree][None].clone().requires_grad_(True) for table in model.prompts.embeddings()]
    replaced = model.prompts.encode_replaced(["a x image"], "x", own).hidden
    torch.testing.assert_close(replaced, model.encode_prompts(["a tree image"]).hidden)
    replaced.square().sum().backward()
    assert own[0].grad.abs().sum() > 0


@pytest.mark.parametrize(("prompt", "word"), [("a tree image", "x"), ("a x image", "a x")])
def test_a_word_that_is_not_there_or_has_other_tokens_is_refused(model, prompt, word):
    own = [table[:1] for table in model.prompts.embeddings()]
    with pytest.raises(ValueError, match="x"):
        model.prompts.encode_replaced([prompt], word, own)
