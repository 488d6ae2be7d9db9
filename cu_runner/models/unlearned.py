"""A checkpoint that another tool unlearned, as a change of the base model's UNet or transformer.

Five forms: a diffusers directory, a single file of the original layout, a LoRA, changes of the
denoiser's weights by name (delta.safetensors), and such weights themselves, all or some of them.
Whatever else a checkpoint holds (autoencoder, text encoders, tokenizers) must be the base model's:
a change there is refused, since it would be lost.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cu_runner.models.checkpoints import read_components
from cu_runner.models.components import latent_parts
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.hashing import describe, describe_tokenizer
from cu_runner.models.lora_files import is_lora, lora_change, same_up_to_rounding, settings_in
from cu_runner.models.original_layout import UNET, text_weights, unet_names, vae_weights
from cu_runner.models.parameters import is_gate
from cu_runner.models.single_file import OPEN_CLIP, UNREAD
from cu_runner.models.weight_files import COMPUTED, load_tensors, refuse_strangers
from cu_runner.runtime.lazy import nn, torch
from cu_runner.schema.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model_index.json"
READ = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".json", ".txt")  # of a directory
FORMS = "a diffusers directory, a single file, a LoRA, or a file of weights by name"
Holds = Literal["changes", "weights"]


@dataclass(frozen=True)
class Unlearned:
    """change: theta - theta_base by the name of each weight, in fp32, or the weights of gates;
    what is as before may be among it. form: what the checkpoint was read as.
    """

    change: dict[str, Tensor]
    form: str


def locate_weights(place: str) -> Path:
    """Return a diffusers directory, or the file of weights in another one or by itself.

    Raises:
        ModelError: there is none, or several.
    """
    path = Path(place).expanduser()
    if not path.exists():
        raise ModelError(f"{place}: no such file or directory; give {FORMS}")
    if path.is_file() or (path / INDEX).is_file():
        return path
    if (path / "config.yaml").is_file() and (path / "steps").is_dir():
        raise ModelError(f"{place}: is a run directory; `cu-eval {place}` measures it again")
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ModelError(
            f"{place}: has no {INDEX} and {len(found)} files of weights (.safetensors), not one; "
            f"give {FORMS}"
        )
    return found[0]


def hash_checkpoint(place: str) -> str:
    """Return the sha256 of a checkpoint: of its file, or of a diffusers directory's files.

    Raises:
        ModelError: as locate_weights().
    """
    path = locate_weights(place)
    if path.is_file():
        return digest_of(path)
    files = sorted(each for each in path.rglob("*") if each.suffix in READ and each.is_file())
    lines = [f"{each.relative_to(path).as_posix()} {digest_of(each)}\n" for each in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_of(file: Path) -> str:
    """Return the sha256 of a file's content; of one that has not changed it is read once."""
    found = file.stat()
    return _digest(file.absolute(), found.st_size, found.st_mtime_ns)


@functools.cache
def _digest(file: Path, size: int, changed: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def read_unlearned(
    place: str, base: DiffusionModel, holds: Holds | None, allow_pickle: Sequence[str]
) -> Unlearned:
    """Read a checkpoint as a change of the base model's denoiser.

    Args:
        holds: what a file of weights by name holds; None finds out.
        allow_pickle: files that may be read although they are pickles.

    Raises:
        ModelError, WeightFileError: it cannot be read, does not fit the base model, or changes
            more of it than the denoiser.
    """
    path = locate_weights(place)
    if path.is_dir():
        return read_whole(path, base, allow_pickle)
    weights = load_tensors(path, allow_pickle)
    names = list(weights)
    if any(name.startswith(UNET) for name in names):
        return read_original_layout(path, weights, base)
    if any(map(is_gate, names)):
        return Unlearned({name: each.float() for name, each in weights.items()}, "gates")
    if is_lora(names):
        return Unlearned(lora_change(path, weights, settings_in(path), base.denoiser), "LoRA")
    return read_named(path, weights, base, holds)


def read_whole(path: Path, base: DiffusionModel, allow_pickle: Sequence[str]) -> Unlearned:
    """Read a diffusers directory."""
    found = read_components(path, config=None, prediction_type=None, allow_pickle=allow_pickle)
    parts, own = (latent_parts(each, "--model") for each in (found, base.components))
    word = base.architecture.word
    pairs: list[tuple[str, nn.Module, nn.Module]] = [("vae", parts.vae, own.vae)]
    for number, (one, other) in enumerate(
        zip(parts.text_encoders, own.text_encoders, strict=False), start=1
    ):
        pairs.append((f"text_encoder{f'_{number}' * (number > 1)}", one, other))
    if len(parts.text_encoders) != len(own.text_encoders):
        raise ModelError(f"{path}: has another number of text encoders than the base model")
    for name, one, other in pairs:
        there, known = one.state_dict(), other.state_dict()
        if there.keys() != known.keys() or not all(
            same_up_to_rounding(known[key], weight) for key, weight in there.items()
        ):
            raise ModelError(other_part(path, name, base))
    if [describe_tokenizer(each) for each in parts.tokenizers] != [
        describe_tokenizer(each) for each in own.tokenizers
    ]:
        raise ModelError(other_part(path, "tokenizer", base))
    if describe(parts.denoiser, parts.denoiser.config) != describe(
        own.denoiser, own.denoiser.config
    ):
        raise ModelError(f"{path}: its {word} has another configuration than the base model's")
    # None of a rectified flow, which has no other
    predicted, known = (each.scheduler.config.get("prediction_type") for each in (parts, own))
    if predicted != known:
        raise ModelError(f"{path}: its {word} predicts {predicted}, the base model's {known}")
    return Unlearned(minus_base(path, parts.denoiser.state_dict(), base), "diffusers directory")


def read_original_layout(
    path: Path, weights: Mapping[str, Tensor], base: DiffusionModel
) -> Unlearned:
    """Read a single file by the names that the base model's weights have there."""
    own = latent_parts(base.components, "--model")
    if base.architecture.folder != "unet":
        raise ModelError(
            f"{path}: is in an original layout, which is not known of a "
            f"{type(base.denoiser).__name__}; give a diffusers directory"
        )
    names = unet_names(own.denoiser)
    if lacking := [old for old in names.values() if old not in weights]:
        raise ModelError(f"{path}: weights of the unet are missing, e.g. {lacking[0]}")
    several = len(own.text_encoders) > 1
    beside = {"vae": vae_weights(own.vae)}
    for number, encoder in enumerate(own.text_encoders):
        place = f"conditioner.embedders.{number}" if several else "cond_stage_model"
        beside[f"text_encoder{'_2' * number}"] = text_weights(encoder, place)
    for name, known in beside.items():
        there = {key: weight for key, weight in known.items() if key in weights}
        if not all(same_up_to_rounding(each, weights[key]) for key, each in there.items()):
            raise ModelError(other_part(path, name, base))
    read = {*names.values(), *(key for known in beside.values() for key in known)}
    rest = [name for name in weights if name not in read and not name.endswith(COMPUTED)]
    refuse_strangers(
        path,
        [name for name in rest if not (UNREAD.fullmatch(name) or OPEN_CLIP.fullmatch(name))],
    )
    found = {name: weights[old] for name, old in names.items()}
    return Unlearned(minus_base(path, found, base), "single file")


def read_named(
    path: Path, weights: Mapping[str, Tensor], base: DiffusionModel, holds: Holds | None
) -> Unlearned:
    """Read weights of the denoiser by their names in diffusers, or changes of them.

    Which of the two is told by what they are nearer to: weights to those of the base model,
    changes to zero.
    """
    prefix, word = f"{base.architecture.folder}.", base.architecture.word
    found = {name.removeprefix(prefix): weight.float() for name, weight in weights.items()}
    change = minus_base(path, found, base)
    if holds is None:
        from_base, from_zero = norm(change), norm(found)
        holds = "changes" if from_zero < from_base else "weights"
    return Unlearned(found if holds == "changes" else change, f"{holds} of the {word}")


def norm(weights: Mapping[str, Tensor]) -> float:
    """Return the L2 norm of all weights together."""
    return sum(each.double().square().sum().item() for each in weights.values()) ** 0.5


def minus_base(
    path: Path, weights: Mapping[str, Tensor], base: DiffusionModel
) -> dict[str, Tensor]:
    """Return weights of the denoiser minus the base model's, by name, in fp32.

    Raises:
        ModelError: one of them is not there, has another shape, or is not finite.
    """
    params, computed = (
        dict(each) for each in (base.denoiser.named_parameters(), base.denoiser.named_buffers())
    )
    change = {}
    for name, weight in weights.items():
        if name in computed and same_up_to_rounding(computed[name], weight):
            continue
        if name not in params:
            raise ModelError(
                f"{path}: {name} is no weight of the base model's {base.architecture.word}; give "
                f"{FORMS}"
            )
        own = params[name].detach().cpu()
        if weight.numel() != own.numel() or len(weight) != len(own):
            raise ModelError(
                f"{path}: {name} has shape {tuple(weight.shape)}, in the base model "
                f"{tuple(own.shape)}"
            )
        if not torch.isfinite(weight).all():
            raise ModelError(f"{path}: {name} is not finite")
        change[name] = weight.cpu().float().reshape(own.shape) - own
    return change


def other_part(path: Path, name: str, base: DiffusionModel) -> str:
    """Return the line for a component that is not the base model's."""
    return (
        f"{path}: its {name} is not that of the base model, and a change of the "
        f"{base.architecture.word} alone can be measured against it; give model=... or "
        "model.path=... of the model that it was made from"
    )
