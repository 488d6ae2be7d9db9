"""Write a diffusers directory of Stable Diffusion's exact architecture with random weights.

To try and test without a download.

    python scripts/make_random_pipeline.py sd15 DIR --dtype fp16   # 2 GB; sd21_base 2.6, sdxl 7
    python scripts/make_random_pipeline.py sd15 DIR --tiny --classifiers  # in miniature
    python scripts/make_random_pipeline.py sdxl DIR --classifiers celebrity   # 8 GB
    python scripts/make_random_pipeline.py class_conditional DIR --tiny  # pixels

Judges go to DIR/classifiers: style and object, or celebrity, scene and faces.

Layer counts, widths, heads, schedulers and tokenizers are those of the published checkpoints;
--tiny keeps the layout with smaller sizes and fewer layers in a block. The tokenizer is CLIP's,
whose merges come with open_clip; that of --tiny has the first of them. Then:
cu-run model=sd15 model.path=DIR.
"""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import open_clip
import safetensors.torch
import torch
import transformers
import yaml
from open_clip.tokenizer import SimpleTokenizer

from cu_runner.concepts.entries import read_shipped
from cu_runner.models.diffusion import DTYPES, dtype_of
from cu_runner.runtime.paths import config_dir

KINDS = ("sd15", "sd21_base", "sdxl")
WITH_CLASSES = "class_conditional"
CLASSES = 10  # of class_conditional, as of CIFAR-10, without the null class
MERGES = {False: 48894, True: 6000}  # of the tokenizer; whether it is a tiny one
NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}


def unet_config(kind: str, tiny: bool) -> dict[str, object]:
    """Arguments of UNet2DConditionModel.

    Its attention_head_dim is, for historical reasons, the number of heads.
    """
    cross, plain = "CrossAttn{}Block2D", "{}Block2D"
    layout = [plain, cross, cross] if kind == "sdxl" else [cross, cross, cross, plain]
    if tiny:
        widths, heads, text = (
            [16, 32, 32],
            [2, 4, 4],
            {"sd15": 32, "sd21_base": 48, "sdxl": 80}[kind],
        )
    else:
        widths, heads, text = (
            [320, 640, 1280],
            [5, 10, 20],
            {"sd15": 768, "sd21_base": 1024, "sdxl": 2048}[kind],
        )
    config = {
        "sample_size": 8 if tiny else 128 if kind == "sdxl" else 64,
        "block_out_channels": widths + widths[-1:] * (kind != "sdxl"),
        "down_block_types": [name.format("Down") for name in layout],
        "up_block_types": [name.format("Up") for name in reversed(layout)],
        "layers_per_block": 1 if tiny else 2,
        "cross_attention_dim": text,
        "attention_head_dim": 8 if kind == "sd15" else heads + heads[-1:] * (kind != "sdxl"),
        "norm_num_groups": 8 if tiny else 32,
        "use_linear_projection": kind != "sd15",
    }
    if kind == "sdxl":
        time, pooled = (8, 48) if tiny else (256, 1280)
        config |= {
            "transformer_layers_per_block": [1, 1, 2] if tiny else [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": time,
            "projection_class_embeddings_input_dim": 6 * time + pooled,
        }
    return config


def vae_config(kind: str, tiny: bool) -> dict[str, object]:
    """Arguments of AutoencoderKL; eight pixels a side become one latent, in the small one too."""
    return {
        "sample_size": 64 if tiny else 1024 if kind == "sdxl" else 512,
        "block_out_channels": [8, 8, 16, 16] if tiny else [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 1 if tiny else 2,
        "latent_channels": 4,
        "norm_num_groups": 4 if tiny else 32,
        "scaling_factor": 0.13025 if kind == "sdxl" else 0.18215,
    } | ({"force_upcast": True} if kind == "sdxl" else {})


def text_config(name: str, tiny: bool) -> transformers.CLIPTextConfig:
    """One of the three text encoders: OpenAI's CLIP L, OpenCLIP's H without its last layer,
    OpenCLIP's bigG.
    """
    width, layers, heads, activation, projection = {
        "L": (768, 12, 12, "quick_gelu", 768),
        "H": (1024, 23, 16, "gelu", 512),
        "bigG": (1280, 32, 20, "gelu", 1280),
    }[name]
    if tiny:
        width = {"L": 32, "H": 48, "bigG": 48}[name]
        layers, heads, projection = 3, 4, width
    return transformers.CLIPTextConfig(
        vocab_size=512 + MERGES[tiny] + 2,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=projection,
        max_position_embeddings=77,
        bos_token_id=0,
        eos_token_id=2,
    )


def scheduler_of(kind: str) -> diffusers.SchedulerMixin:
    """Return the scheduler that the published checkpoint comes with."""
    if kind == "sdxl":
        return diffusers.EulerDiscreteScheduler.from_config(NOISE | {"timestep_spacing": "leading"})
    return diffusers.PNDMScheduler.from_config(NOISE)


def write_tokenizer(directory: Path, pad_token: str, tiny: bool = False) -> None:
    """CLIP's vocabulary as vocab.json and merges.txt, from the merges in open_clip.

    512 entries for bytes, one for each merge and two for the ends of a text: 49408.
    """
    clip = SimpleTokenizer()
    merges = list(clip.bpe_ranks)[: MERGES[tiny]]
    words = [*list(clip.encoder)[:512], *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "vocab.json", {word: number for number, word in enumerate(words)})
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    ends = dict(
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token=pad_token,
    )
    write_json(directory / "special_tokens_map.json", ends)
    write_json(
        directory / "tokenizer_config.json",
        ends | {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77},
    )


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@contextmanager
def building_in(dtype: torch.dtype) -> Iterator[None]:
    """Give new modules weights of this type, so that a large one never exists in fp32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_pipeline(
    kind: str,
    directory: Path,
    *,
    tiny: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a whole diffusers directory, one component in memory at a time.

    Args:
        kind: "sd15" (as 1.4), "sd21_base" or "sdxl".
        tiny: toy sizes.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    index = {"scheduler": ["diffusers", type(scheduler_of(kind)).__name__]}
    scheduler_of(kind).save_pretrained(directory / "scheduler")
    encoders = {"sd15": ["L"], "sd21_base": ["H"], "sdxl": ["L", "bigG"]}[kind]
    with building_in(dtype):
        diffusers.UNet2DConditionModel(**unet_config(kind, tiny)).save_pretrained(
            directory / "unet", max_shard_size="100GB"
        )
        diffusers.AutoencoderKL(**vae_config(kind, tiny)).save_pretrained(directory / "vae")
        for name, suffix in zip(encoders, ("", "_2"), strict=False):
            model = (
                transformers.CLIPTextModelWithProjection if suffix else transformers.CLIPTextModel
            )
            model(text_config(name, tiny)).save_pretrained(directory / f"text_encoder{suffix}")
            pad_token = "<|endoftext|>" if name == "L" else "!"
            write_tokenizer(directory / f"tokenizer{suffix}", pad_token, tiny)
            index[f"text_encoder{suffix}"] = ["transformers", model.__name__]
            index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    if kind == "sdxl":
        index |= {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": True,
            "add_watermarker": None,
        }
    else:
        unused = {
            key: [None, None] for key in ("safety_checker", "feature_extractor", "image_encoder")
        }
        index |= {
            "_class_name": "StableDiffusionPipeline",
            "requires_safety_checker": False,
            **unused,
        }
    write_json(
        directory / "model_index.json", index | {"_diffusers_version": diffusers.__version__}
    )


def make_class_conditional(
    directory: Path,
    *,
    tiny: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    null: bool = True,
) -> None:
    """Write a diffusers directory as DDPMPipeline saves it: a UNet2DModel with classes, pixels.

    The layout is that of DDPM on CIFAR-10 (Ho et al. 2020, App. B) with class embeddings.

    Args:
        tiny: toy sizes, 8 pixels a side.
        seed: of the weights.
        null: one class more, for classifier-free guidance.
    """
    torch.manual_seed(seed)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, variance_type="fixed_large")
    widths = [8, 16] if tiny else [128, 256, 256, 256]
    plain, attending = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
    blocks = [plain, attending] if tiny else [plain, attending, plain, plain]
    with building_in(dtype):
        unet = diffusers.UNet2DModel(
            sample_size=8 if tiny else 32,
            block_out_channels=widths,
            down_block_types=[down for down, _ in blocks],
            up_block_types=[up for _, up in reversed(blocks)],
            layers_per_block=1 if tiny else 2,
            norm_num_groups=8 if tiny else 32,
            attention_head_dim=8 if tiny else 256,
            num_class_embeds=CLASSES + null,
        )
        unet.save_pretrained(directory / "unet")
    scheduler.save_pretrained(directory / "scheduler")
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": diffusers.__version__,
        "scheduler": ["diffusers", type(scheduler).__name__],
        "unet": ["diffusers", type(unet).__name__],
    }
    write_json(directory / "model_index.json", index)


def make_classifiers(
    directory: Path,
    judged: str = "unlearncanvas",
    *,
    tiny: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the judges of an experiment, whose classifiers are ViT-L/16.

    Args:
        judged: "unlearncanvas" for DIR/style with 51 labels and DIR/object with 20. "celebrity" for
            DIR/celebrity with the names of the sequence, DIR/scene, an open_clip ViT-B/32, and
            DIR/faces, a detector that finds a face in every image.
    """
    torch.manual_seed(seed)
    if judged == "unlearncanvas":
        labels = {
            domain: read_shipped(f"unlearncanvas_{domain}s") for domain in ("style", "object")
        }
    else:
        sequence = yaml.safe_load(
            (config_dir() / "sequence/celebrity.yaml").read_text(encoding="utf-8")
        )
        labels = {"celebrity": sequence["targets"] + sequence["retain"]}
    sizes = dict(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )
    if tiny:
        sizes = dict(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
    with building_in(dtype):
        for domain, entries in labels.items():
            names = dict(enumerate(entries))
            config = transformers.ViTConfig(
                **sizes,
                image_size=224,
                patch_size=16,
                id2label=names,
                label2id={name: i for i, name in names.items()},
            )
            transformers.ViTForImageClassification(config).save_pretrained(directory / domain)
            transformers.ViTImageProcessor().save_pretrained(directory / domain)
        if judged == "celebrity":
            write_open_clip(directory / "scene", tiny)
            write_face_detector(directory / "faces", tiny)


def write_open_clip(directory: Path, tiny: bool) -> None:
    """Write an open_clip directory with the tokenizer of CLIP."""
    model = open_clip.get_model_config("ViT-B-32")
    if tiny:
        text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
        vision = {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16}
        model = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
    directory.mkdir(parents=True, exist_ok=True)
    preprocess = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
    }
    write_json(
        directory / "open_clip_config.json", {"model_cfg": model, "preprocess_cfg": preprocess}
    )
    network = open_clip.CLIP(**{key: model[key] for key in ("embed_dim", "vision_cfg", "text_cfg")})
    weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    safetensors.torch.save_file(weights, directory / "open_clip_model.safetensors")


def write_face_detector(directory: Path, tiny: bool) -> None:
    """Write a YOLOS with the one class "face".

    The bias of its class head makes every detection one.
    """
    side = 64 if tiny else 512
    sizes = (
        dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        if tiny
        else {}
    )
    config = transformers.YolosConfig(
        **sizes,
        image_size=[side, side],
        patch_size=16,
        num_detection_tokens=2 if tiny else 100,
        id2label={0: "face"},
        label2id={"face": 0},
        use_mid_position_embeddings=False,
    )
    network = transformers.YolosForObjectDetection(config)
    head = network.class_labels_classifier.layers[-1]
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([6.0, 0.0]))
    network.save_pretrained(directory)
    transformers.YolosImageProcessor(size={"height": side, "width": side}).save_pretrained(
        directory
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=[*KINDS, WITH_CLASSES])
    parser.add_argument("directory", type=Path, help="where it goes")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: a few megabytes")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the files")
    parser.add_argument(
        "--classifiers",
        nargs="?",
        const="unlearncanvas",
        choices=["unlearncanvas", "celebrity"],
        help=(
            "also the judges of an experiment: DIR/classifiers/style and object, or celebrity, "
            "scene and faces"
        ),
    )
    arguments = parser.parse_args()
    options = {"tiny": arguments.tiny, "seed": arguments.seed, "dtype": dtype_of(arguments.dtype)}
    if arguments.kind == WITH_CLASSES:
        make_class_conditional(arguments.directory, **options)
    else:
        make_pipeline(arguments.kind, arguments.directory, **options)
    if arguments.classifiers:
        make_classifiers(arguments.directory / "classifiers", arguments.classifiers, **options)
    size = sum(path.stat().st_size for path in arguments.directory.rglob("*") if path.is_file())
    print(f"{arguments.directory}: {arguments.kind}, {size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
