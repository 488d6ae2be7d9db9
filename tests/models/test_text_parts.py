"""Where words lie among the tokens of CLIP, T5 and Gemma, and what is put in their place."""

import functools
from pathlib import Path

import pytest
import torch

from cu_runner.methods.reverse_kl import ReverseKL
from cu_runner.models import prompt_encoders, transformers
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.loading import load_model
from cu_runner.models.sampling import make_scheduler
from cu_runner.recovery._finetune import one_token
from cu_runner.recovery.adversarial import plain_tokens
from cu_runner.schema.settings import Sampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
KINDS = ("sd3_medium", "flux_dev", "pixart_sigma", "sana", "auraflow")


@functools.cache
def loaded(directory: Path) -> DiffusionModel:
    return load_model(str(directory), 64, Sampler(2, 3.0), tokens=24)


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_found_where_its_tokens_are(transformers_on_disk, kind):
    for part in loaded(transformers_on_disk[kind]).prompts.parts:

        def said(prompt: str, span: slice, part=part) -> str:
            return part.tokenizer.decode(part.row(prompt)[span]).strip()

        for prompt in ("a dog on grass", "dog", "a photo of a (dog)"):
            assert said(prompt, part.find("dog", prompt)) == "dog"
        twice = "a photo of dog on a dog"
        first, last = (part.find("dog", twice, before) for before in ("", "a photo of dog on a "))
        assert first.start < last.start
        assert said(twice, last) == "dog"
        assert part.find("dog", "a photo of a cat") is None
        assert part.end("a dog") < part.end("a dog on the grass")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_a_prompt_that_is_cut(transformers_on_disk, kind):
    model = loaded(transformers_on_disk[kind])
    long = " ".join(["dog"] * 200)
    for part in model.prompts.parts:
        read = part.read(long)
        assert len(read) == part.length
        assert (read[-1] == part.row("dog")[-1]) or not part.ends
        with pytest.raises(ValueError, match=r"lies beyond the \d+ tokens"):
            part.span("cat", f"{long} cat")
    assert model.prompts.alike(f"{long} cat", f"{long} bird")
    assert not model.prompts.alike("a cat", "a bird")
    encoded = model.prompts.encode_once([f"{long} cat", f"{long} bird"])
    torch.testing.assert_close(encoded.hidden[0], encoded.hidden[1])
    assert model.prompts.cut([f"{long} cat", "a cat"]) == {f"{long} cat"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_with_its_own_embedding_is_read_as_ever(transformers_on_disk, kind):
    """Inversion and attacks put vectors into the place of a word, in every encoder."""
    prompts = loaded(transformers_on_disk[kind]).prompts
    word = next(
        each
        for each in ("dog", "cat", "red", "a")
        if all(len(one_token(tokenizer, each)) == 1 for tokenizer in prompts.tokenizers)
    )
    vectors = [
        table[one_token(tokenizer, word)[0]][None].clone()
        for tokenizer, table in zip(prompts.tokenizers, prompts.embeddings(), strict=True)
    ]
    said = [f"The Big {word} there"]
    with torch.no_grad():
        plain, same = prompts.encode_once(said), prompts.encode_replaced(said, word, vectors)
        other = prompts.encode_replaced(said, word, [each + 1 for each in vectors])
    torch.testing.assert_close(same.hidden, plain.hidden)
    assert not torch.allclose(other.hidden, plain.hidden)
    if plain.pooled is not None:
        torch.testing.assert_close(same.pooled, plain.pooled)


@pytest.mark.parametrize("kind", KINDS)
def test_attacks_search_among_words(transformers_on_disk, kind):
    model = loaded(transformers_on_disk[kind])
    tokenizer = model.prompts.parts[0].tokenizer
    found = plain_tokens(model, "dog")
    words = [tokenizer.decode([token]).strip() for token in found.tolist()]
    assert len([word for word in words if len(word) > 2 and word.isalpha()]) > 50
    assert "dog" not in words


def test_the_instruction_of_sana_is_part_of_the_model(transformers_on_disk, monkeypatch):
    model = load_model(str(transformers_on_disk["sana"]), 64, Sampler(2, 3.0))
    before = model.fingerprint()
    assert "User Prompt" in model.components.configuration()["instruction"]
    for module in (prompt_encoders, transformers):
        monkeypatch.setattr(module, "instruction", lambda: "Draw: ")
    assert model.fingerprint() != before


def test_another_scheduler_of_a_flow_keeps_the_shift(transformers_on_disk):
    model = loaded(transformers_on_disk["sana"])
    own, euler = (
        make_scheduler(model, Sampler(10, 1.0, name))
        for name in (None, "FlowMatchEulerDiscreteScheduler")
    )
    assert own.config.flow_shift == euler.config.shift == 3.0
    torch.testing.assert_close(own.sigmas[:4], euler.sigmas[:4], atol=0.03, rtol=0)
    model = loaded(transformers_on_disk["sd3_medium"])
    solver = make_scheduler(model, Sampler(10, 1.0, "DPMSolverMultistepScheduler"))
    assert solver.config.flow_shift == 3.0


@pytest.mark.parametrize("kind", ["sd3_medium", "flux_dev", "sana"])
def test_levels_of_a_sampler_count_by_how_far_they_are_apart(transformers_on_disk, kind):
    """A mean over them is one over all levels: of s(1 - s) it is 1/6, whatever the shift."""
    model = loaded(transformers_on_disk[kind])

    class Scope:
        pass

    scope = Scope()
    scope.model = model
    levels, spacing = ReverseKL(sampling_steps=400)._sampler_spacing(scope)
    assert len(levels) == len(spacing) == 400
    s = levels / 1000
    assert (spacing * s * (1 - s)).mean().item() == pytest.approx(1 / 6, rel=0.02)
    if kind != "flux_dev":  # whose shift is small at so few patches
        assert (s * (1 - s)).mean().item() != pytest.approx(1 / 6, rel=0.05)
