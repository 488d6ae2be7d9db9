"""The networks, the tokenizer and the schedulers of the embedded models, untrained."""

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
)

from cu_runner.shapecanvas.captions import FORMS, SYNONYMS
from cu_runner.shapecanvas.objects import OBJECTS
from cu_runner.shapecanvas.render import IMAGE_SIZE
from cu_runner.shapecanvas.styles import STYLE_PARTS, STYLES

TEXT_WIDTH, NUM_TOKENS = 512, 20


def make_vae() -> AutoencoderKL:
    """64x64x3 images to 16x16x6 latents."""
    return AutoencoderKL(
        block_out_channels=(24, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=6,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def make_tokenizer() -> CLIPTokenizer:
    """Return a CLIP byte-pair tokenizer whose merges make every word of the world one token.

    Other words fall into letters.
    """
    names = [*STYLES, *OBJECTS, *SYNONYMS.values()]
    names += [style.description for style in STYLE_PARTS.values()]
    names += [form.format(object="", style="") for forms in FORMS.values() for form in forms]
    words = sorted({word for name in names for word in name.split()})
    letters = [chr(code) for code in range(33, 127)]
    vocabulary = letters + [letter + "</w>" for letter in letters]
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        # what the merges of the earlier words already do to this one, in their order of priority
        for merge in merges:
            pieces = apply_merge(pieces, merge)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            vocabulary.append(pieces[0] + pieces[1])
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokens = {token: index for index, token in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=tokens, merges=merges, model_max_length=NUM_TOKENS)


def apply_merge(pieces: list[str], merge: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == merge:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=8,
        max_position_embeddings=NUM_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    encoder = CLIPTextModel(config)
    # Words start at unit length per channel, so that training on images moves them together but
    # each keeps a direction of its own, as the words of a large text encoder do. From the default
    # of 0.02 all styles end up spanning few dimensions, and every style then lies in the span of
    # the others, which no projection can tell apart.
    embeddings = dict(encoder.named_parameters())
    nn.init.normal_(
        next(p for name, p in embeddings.items() if name.endswith("token_embedding.weight")),
        std=1.0,
    )
    nn.init.normal_(
        next(p for name, p in embeddings.items() if name.endswith("position_embedding.weight")),
        std=0.3,
    )
    return encoder


def make_unet(channels: tuple[int, ...]) -> UNet2DConditionModel:
    """Return the layout of Stable Diffusion's UNet at 1/100 of its size.

    Cross-attention at 8x8 and 4x4, in eleven layers. channels: of its levels, multiples of 16.
    """
    return UNet2DConditionModel(
        sample_size=IMAGE_SIZE // 4,
        in_channels=6,
        out_channels=6,
        block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def make_classifier(labels: tuple[str, ...]) -> ResNetForImageClassification:
    config = ResNetConfig(
        embedding_size=24,
        hidden_sizes=[24, 48, 96, 160],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    return ResNetForImageClassification(config)


def clip_config(tokenizer: CLIPTokenizer) -> dict[str, object]:
    """open_clip_config.json: an image-text model of a million weights.

    Its tokenizer is the pipeline's, in the same directory.
    """
    text = {
        "context_length": NUM_TOKENS,
        "vocab_size": len(tokenizer),
        "hf_tokenizer_name": "local",
    }
    model = {
        "embed_dim": 96,
        "vision_cfg": {
            "image_size": IMAGE_SIZE,
            "layers": [1, 1, 1, 1],
            "width": 12,
            "head_width": 16,
        },
        "text_cfg": text | {"width": 96, "heads": 4, "layers": 2, "mlp_ratio": 2.0},
    }
    return {
        "model_cfg": model,
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    }


def make_scheduler() -> DPMSolverMultistepScheduler:
    """Stable Diffusion's noise levels with zero terminal SNR and v-prediction (Lin et al. 2023,
    arXiv 2305.08891).

    Without that the mean colour of a small latent is still visible at the last noise level: the
    UNet reads the palette there instead of in the prompt, and draws any palette when it starts from
    pure noise.
    """
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,
    )


def make_transformer(
    layers: int = 5, heads: int = 8, head_width: int = 32
) -> SD3Transformer2DModel:
    """Return Stable Diffusion 3's blocks on the latents and the text of this world.

    11.6 million weights, 23.2 MB in half precision: 64 patches of 2x2 and 20 tokens, 256 wide.
    Queries and keys are normalised, as in Stable Diffusion 3.5. Every block begins as the identity
    and the velocity as zero (Peebles & Xie 2023, Sec. 3.2, adaLN-Zero).
    """
    width = heads * head_width
    transformer = SD3Transformer2DModel(
        sample_size=IMAGE_SIZE // 4,
        patch_size=2,
        in_channels=6,
        out_channels=6,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=width,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=IMAGE_SIZE // 8,
        qk_norm="rms_norm",
    )
    blocks = transformer.transformer_blocks
    zeros = [norm.linear for block in blocks for norm in (block.norm1, block.norm1_context)]
    for layer in (*zeros, transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def make_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return the noise levels of a rectified flow, not shifted: latents of 16x16 are small."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)
