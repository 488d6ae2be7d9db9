"""Text-to-image checkpoints on disk or on the Hugging Face hub, read into their components.

Three forms: a diffusers directory, the id of one on the hub, and a single file of the original layout. Pickles are refused unless
the user names them. What is incomplete or does not fit is refused where the libraries would only warn.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import huggingface_hub
import safetensors

from cu_runner.models.weight_files import check_pickle
from cu_runner.runtime.lazy import diffusers, nn, torch, transformers
from cu_runner.runtime.paths import PACKAGE
from cu_runner.schema.errors import ModelError, first_line

logger = logging.getLogger(__name__)


PredictionType = Literal["epsilon", "v_prediction"]


HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model|pytorch_model)(\.fp16)?(?:-\d+-of-\d+)?(\.fp16)?\.(safetensors|bin)"
)  # shards of some precision come with the precision before their number, or after it


SINGLE_FILES = (".safetensors", ".ckpt", ".pt")


COMPONENTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


NO_DIFFUSION = (
    "has no noise schedule of a diffusion model (alphas_cumprod); give one such as DDIMScheduler"
)


SECOND = ("text_encoder_2", "tokenizer_2")  # SDXL has them


TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclass(frozen=True)
class Components:
    """The parts of a pipeline.

    text_encoders, tokenizers: one of each, or SDXL's two. zero_empty_prompt: the text of the empty prompt is zeros
    (force_zeros_for_empty_prompt of SDXL's model_index.json).
    """

    unet: diffusers.UNet2DConditionModel
    vae: diffusers.AutoencoderKL
    text_encoders: tuple[transformers.PreTrainedModel, ...]
    tokenizers: tuple[transformers.PreTrainedTokenizerBase, ...]
    scheduler: diffusers.SchedulerMixin
    zero_empty_prompt: bool = False


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a component's weights. variant: "fp16" or None. kind: "safetensors" or "bin", a pickle."""

    paths: list[Path]
    variant: str | None
    kind: str


def locate(path: str, revision: str | None = None, *, download: bool = True) -> Path:
    """Where a checkpoint lies.

    Args:
        path: a local file or directory; `package:...` is inside the installed cu_runner; what else has the form ORGANISATION/NAME
            is a repository of the Hugging Face hub.
        revision: branch, tag or commit of the repository; None is its main branch.
        download: fetch from the hub what is not in its local cache.

    Raises:
        ModelError: it is not there, or a revision is asked of what is on this machine.
    """
    inside = path.removeprefix("package:")
    found = PACKAGE / inside if inside != path else Path(path).expanduser()
    if found.exists() and revision is not None:
        raise ModelError(
            f"model.revision={revision}: {path} is on this machine; only a repository of the hub has revisions, use null"
        )
    if found.exists():
        return found
    if HUB_ID.fullmatch(path):
        return fetch(path, revision, download)
    raise ModelError(f"{path}: no such file or directory; give a local diffusers directory or file")


def fetch(repository: str, revision: str | None, download: bool) -> Path:
    """The local copy of a repository: configurations and safetensors, fp16 ones where there are no others. Raises ModelError."""
    place = {"revision": revision, "local_files_only": not download}
    for variant in ("", ".fp16"):
        try:
            root = Path(
                huggingface_hub.snapshot_download(
                    repository, allow_patterns=wanted_files(variant), **place
                )
            )
        except Exception as error:  # no network, no such repository or revision, no permission: the library has a type for each
            raise ModelError(
                f"{repository}: no such directory here, and the Hugging Face hub did not give it "
                f"({type(error).__name__}); give model.path a local diffusers directory or file"
            ) from error
        if all(
            find_weights(part.parent)
            for part in root.glob("*/config.json")
            if part.parent.name in COMPONENTS + SECOND
        ):
            break
    return root


def wanted_files(variant: str) -> list[str]:
    """Patterns of the files of a hub repository that make up a model; variant: "" or ".fp16"."""
    stems = [f"model{variant}", f"model{variant}-0*", f"model-0*-of-?????{variant}"]
    weights = [f"*{stem}.safetensors" for stem in stems] + [
        f"*model.safetensors.index{variant}.json"
    ]
    configurations = ["model_index.json", "scheduler/*", "tokenizer*/*", "*/config.json"]
    return configurations + [
        f"{part}/{name}" for part in ("unet", "vae", "text_encoder*") for name in weights
    ]


def find_weights(directory: Path) -> WeightFiles | None:
    """The weights of a component: safetensors before pickles, full precision before fp16. None if there are none."""
    found: dict[tuple[str, str | None], list[Path]] = {}
    for path in sorted(directory.glob("*")):
        if match := WEIGHTS.fullmatch(path.name):
            found.setdefault((match[3], "fp16" if match[1] or match[2] else None), []).append(path)
    for kind in ("safetensors", "bin"):
        for variant in (None, "fp16"):
            if (kind, variant) in found:
                return WeightFiles(found[kind, variant], variant, kind)
    return None


def read_components(
    root: Path,
    *,
    config: str | None,
    prediction_type: PredictionType | None,
    allow_pickle: Sequence[str],
) -> Components:
    """A checkpoint as its components, in fp32 on the CPU, checked against each other.

    Args:
        root: a diffusers directory or a single file.
        config: of a single file: the diffusers directory or hub repository with its configurations and tokenizers; None is the
            one that diffusers takes it for, from the hub.
        prediction_type: in place of the scheduler's own.
        allow_pickle: files that may be read although they are pickles.

    Raises:
        ModelError: missing or damaged components, weights that are incomplete or do not fit.
    """
    parts = (
        read_single_file(root, config, allow_pickle)
        if root.is_file()
        else read_directory(root, allow_pickle)
    )
    if prediction_type is not None:
        own = parts.scheduler.config
        parts = replace(
            parts, scheduler=type(parts.scheduler).from_config(own, prediction_type=prediction_type)
        )
    for complaint in complaints(parts):
        raise ModelError(f"{root}: {complaint}")
    return parts


def complaints(parts: Components) -> Iterator[str]:
    """Why components do not work together, or not with this program."""
    unet, vae, scheduler = parts.unet.config, parts.vae.config, parts.scheduler.config
    width = sum(encoder.config.hidden_size for encoder in parts.text_encoders)
    if unet.cross_attention_dim != width:
        names = " and ".join(["text_encoder", "text_encoder_2"][: len(parts.text_encoders)])
        writes = "writes" if len(parts.text_encoders) == 1 else "write"
        yield f"unet reads text of width {unet.cross_attention_dim}, {names} {writes} {width}; they must match"
    if unet.in_channels != vae.latent_channels:
        yield f"unet has {unet.in_channels} latent channels, vae {vae.latent_channels}; they must match"
    wanted = "text_time" if len(parts.text_encoders) == 2 else None
    if unet.addition_embed_type != wanted:
        yield (
            f"unet has addition_embed_type {unet.addition_embed_type!r} with {len(parts.text_encoders)} text encoders; "
            "Stable Diffusion 1 and 2 (none, one) and SDXL ('text_time', two) are known"
        )
    if vae.latents_mean is not None:
        yield "vae shifts its latents (latents_mean); Stable Diffusion 1, 2 and SDXL do not, and other models are not known"
    if not hasattr(parts.scheduler, "alphas_cumprod"):
        yield f"the scheduler {type(parts.scheduler).__name__} {NO_DIFFUSION}"
    elif scheduler.prediction_type not in ("epsilon", "v_prediction"):
        yield f"prediction type {scheduler.prediction_type!r}; epsilon and v_prediction are known"


def read_directory(root: Path, allow_pickle: Sequence[str]) -> Components:
    """A diffusers directory, as save_pretrained writes it. Raises ModelError."""
    try:
        index = json.loads((root / "model_index.json").read_text(encoding="utf-8"))
        entries = index.items()
    except (OSError, ValueError, AttributeError):
        raise ModelError(
            f"{root}: no readable model_index.json; it must be a diffusers directory (save_pretrained)"
        ) from None
    classes = {}  # part -> its class; [library, class], or null for what is not used
    for part, entry in entries:
        match entry:
            case [str(), str(name)]:
                classes[part] = name
    second = any(part in classes for part in SECOND)
    needed = COMPONENTS + SECOND * second
    missing = [part for part in needed if part not in classes or not (root / part).is_dir()]
    if missing:
        raise ModelError(
            f"{root}: the component {missing[0]} is missing; a complete pipeline has {', '.join(needed)}"
        )
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in needed]
    for name in encoders:
        if classes[name] not in TEXT_ENCODERS:
            raise ModelError(
                f"{root}: {name} is a {classes[name]}; {' and '.join(TEXT_ENCODERS)} are known"
            )
    unet = load_weights(diffusers.UNet2DConditionModel, root / "unet", allow_pickle)
    vae = load_weights(diffusers.AutoencoderKL, root / "vae", allow_pickle)
    texts = tuple(
        load_weights(getattr(transformers, classes[name]), root / name, allow_pickle)
        for name in encoders
    )
    try:
        names = [name for name in ("tokenizer", "tokenizer_2") if name in needed]
        tokenizers = tuple(
            transformers.AutoTokenizer.from_pretrained(root / name) for name in names
        )
        scheduler = getattr(diffusers, classes["scheduler"]).from_pretrained(root / "scheduler")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{root}: tokenizer or scheduler cannot be read: {first_line(error)}"
        ) from error
    return Components(
        unet,
        vae,
        texts,
        tokenizers,
        scheduler,
        bool(second and index.get("force_zeros_for_empty_prompt", True)),
    )


def read_single_file(file: Path, config: str | None, allow_pickle: Sequence[str]) -> Components:
    """A checkpoint in the original layout, all weights in one file. Raises ModelError."""
    if file.suffix not in SINGLE_FILES:
        raise ModelError(
            f"{file}: is no checkpoint; give a diffusers directory or a file that ends in {', '.join(SINGLE_FILES)}"
        )
    check_pickle(file, allow_pickle)
    place = None if config is None else str(locate(config, download=False))
    try:
        pipe = read_original(file, place)
    except Exception as error:  # a damaged file, one of another model, no network for the configuration: many types
        reason = (
            f"cannot be read with the configuration of {place}"
            if place
            else "cannot be read, or its configuration not be had"
        )
        raise ModelError(
            f"{file}: {reason} ({first_line(error)}); give model.config a local diffusers directory of the same kind of model "
            "(its weights are not read)"
        ) from error
    second = "text_encoder_2" in pipe.components
    texts = (pipe.text_encoder, pipe.text_encoder_2) if second else (pipe.text_encoder,)
    tokenizers = (pipe.tokenizer, pipe.tokenizer_2) if second else (pipe.tokenizer,)
    for name, part in zip(
        ("unet", "vae", "text_encoder", "text_encoder_2"),
        (pipe.unet, pipe.vae, *texts),
        strict=False,
    ):
        lacking = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
        if lacking:
            raise ModelError(f"{file}: weights of the {name} are missing, e.g. {lacking[0]}")
    return Components(
        pipe.unet,
        pipe.vae,
        texts,
        tokenizers,
        pipe.scheduler,
        bool(second and pipe.config.force_zeros_for_empty_prompt),
    )


def read_original(file: Path, config: str | None) -> diffusers.DiffusionPipeline:
    """The pipeline that diffusers makes of a single file: SDXL's if the file has its two text encoders."""
    if file.suffix == ".safetensors":
        with safetensors.safe_open(file, framework="pt") as weights:
            names = list(weights.keys())
    else:
        content = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        names = list(content.get("state_dict", content))
    is_sdxl = any(name.startswith("conditioner.") for name in names)
    kind = diffusers.StableDiffusionXLPipeline if is_sdxl else diffusers.StableDiffusionPipeline
    places = {} if config is None else {"config": config, "local_files_only": True}
    unused = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    return kind.from_single_file(str(file), torch_dtype=torch.float32, **places, **unused)


def load_weights(
    kind: type[nn.Module], directory: Path, allow_pickle: Sequence[str] | None = None
) -> nn.Module:
    """from_pretrained in fp32 from local files, refusing what it would only warn of.

    Args:
        allow_pickle: pickles that may be read; None never looks at one.

    Raises:
        ModelError: weights that are missing, damaged or do not fit. WeightFileError: a pickle that is not allowed.
    """
    dtype = (
        {"torch_dtype": torch.float32}
        if issubclass(kind, diffusers.ModelMixin)
        else {"dtype": torch.float32}
    )
    files = find_weights(directory) or WeightFiles([], None, "safetensors")
    for path in files.paths if allow_pickle is not None else []:
        check_pickle(path, allow_pickle)
    safe = files.kind == "safetensors" or allow_pickle is None
    place = {"variant": files.variant, "use_safetensors": safe, "local_files_only": True}
    try:
        model, info = kind.from_pretrained(directory, output_loading_info=True, **place, **dtype)
    except Exception as error:  # damaged files raise many types; the cause is kept and the line says which component
        raise ModelError(
            f"{directory}: cannot be loaded as {kind.__name__}: {first_line(error)}"
        ) from error
    for problem in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(problem):
            raise ModelError(
                f"{directory}: {problem.replace('_', ' ')}, e.g. {next(iter(info[problem]))}; the weights do not fit config.json"
            )
    return model
