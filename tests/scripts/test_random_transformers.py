"""Directories of transformers with random weights: their sizes, tokenizers and images."""

import inspect
import json

import diffusers
import pytest
import torch
import transformers

PARAMETERS = {  # of the published transformers, in billions
    "sd3_medium": 2.028,
    "sd35_medium": 2.243,
    "flux_dev": 11.90,
    "flux_schnell": 11.89,
    "pixart_sigma": 0.611,
    "sana": 1.604,
    "auraflow": 6.8,
}
KINDS = list(PARAMETERS)
WITHOUT_BINS = {"use_resolution_binning": False, "clean_caption": False}
ARGUMENTS = {"pixart_sigma": WITHOUT_BINS, "sana": WITHOUT_BINS}


def draw(pipeline, prompt: str, steps: int = 2, **arguments) -> torch.Tensor:
    images = pipeline(
        prompt,
        height=64,
        width=64,
        num_inference_steps=steps,
        max_sequence_length=32,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        **arguments,
    ).images
    assert images.shape == (1, 3, 64, 64)
    return images


def read(directory, dtype: torch.dtype = torch.float32):
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        directory, torch_dtype=dtype, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_kind_is_tested(random_pipeline):
    assert list(random_pipeline.TRANSFORMERS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_one_draws_what_the_prompt_says(random_pipeline, tmp_path, kind):
    random_pipeline.make_transformer_pipeline(kind, tmp_path, tiny=True)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) < 3e6
    pipeline = read(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert type(pipeline).__name__ == index["_class_name"]
    arguments = ARGUMENTS.get(kind, {})
    ball, river = (draw(pipeline, prompt, **arguments) for prompt in ("a ball", "blue river"))
    assert ball.isfinite().all()
    assert river.isfinite().all()
    assert (ball - river).abs().mean() > 1 / 255
    assert torch.equal(ball, draw(pipeline, "a ball", **arguments))
    assert draw(pipeline, "a ball", steps=10, **arguments).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_in_half_precision_draws_too(random_pipeline, tmp_path, kind):
    random_pipeline.make_transformer_pipeline(kind, tmp_path, tiny=True, dtype=torch.bfloat16)
    pipeline = read(tmp_path, torch.bfloat16)
    assert pipeline.transformer.dtype == torch.bfloat16
    assert draw(pipeline, "a ball", **ARGUMENTS.get(kind, {})).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_size_is_the_published_one(random_pipeline, kind):
    with torch.device("meta"):
        transformer = random_pipeline.transformer_of(kind, tiny=False)
    number = sum(parameter.numel() for parameter in transformer.parameters())
    assert number == pytest.approx(1e9 * PARAMETERS[kind], rel=0.02)


def test_the_full_encoders_and_the_deep_vae_have_the_published_sizes(random_pipeline):
    with torch.device("meta"):
        parts = {
            4.762: transformers.T5EncoderModel(random_pipeline.t5_config(tiny=False)),
            2.614: transformers.Gemma2Model(random_pipeline.gemma_config(tiny=False)),
            0.312: diffusers.AutoencoderDC(**random_pipeline.deep_vae_config(tiny=False)),
        }
    for billions, part in parts.items():
        number = sum(parameter.numel() for parameter in part.parameters())
        assert number == pytest.approx(1e9 * billions, rel=0.02)


def test_t5_knows_frequent_words_and_every_letter(random_pipeline, tmp_path):
    random_pipeline.write_t5_tokenizer(tmp_path, tiny=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.model_max_length == 512
    ids = tokenizer("blue zqj", padding="max_length", max_length=8).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("\u2581blue", "\u2581", "z", "q", "j", "</s>", "<pad>", "<pad>")
    ]
    assert tokenizer("\u00e9").input_ids[-2:] == [2, 1]


def test_gemma_begins_pads_at_the_right_and_falls_back_to_bytes(random_pipeline, tmp_path):
    random_pipeline.write_gemma_tokenizer(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("a blue \u00e9", padding="max_length", max_length=8).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == [
        *("<bos>", "a", "\u2581blue", "\u2581", "<0xC3>", "<0xA9>", "<pad>", "<pad>")
    ]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a blue \u00e9"
    instruction = inspect.signature(diffusers.SanaPipeline.__call__).parameters[
        "complex_human_instruction"
    ]
    assert len(tokenizer.encode("\n".join(instruction.default))) < 300
