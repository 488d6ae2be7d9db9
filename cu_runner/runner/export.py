"""A step's weights written in the forms that other programs read."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from cu_runner.models.architectures import folder_of
from cu_runner.models.components import latent_parts
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.lora_files import require_loader
from cu_runner.models.low_rank import LowRank, low_rank
from cu_runner.models.original_layout import original_weights
from cu_runner.models.parameters import is_gate
from cu_runner.models.pipeline import make_pipeline, save_configurations
from cu_runner.models.single_file import read_single_file
from cu_runner.models.transformers import TransformerComponents
from cu_runner.runner.finished import trained_run
from cu_runner.runtime.lazy import nn, torch
from cu_runner.runtime.progress import slow
from cu_runner.schema.errors import ModelError, first_line
from cu_runner.store.files import from_safetensors, squared_norms, to_safetensors
from cu_runner.store.run_record import RunRecord

Form = Literal["diffusers", "single-file", "lora", "delta"]
FORMS: tuple[Form, ...] = get_args(Form)
SINGLE, CONFIGURATIONS = "model.safetensors", "config"
LORA = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for


@dataclass(frozen=True)
class Exported:
    """What was written. weights: the file of the weights, in a folder; of diffusers, the folder
    itself. pipeline: the class of diffusers that reads it, as far as that is known. gates: whether
    it holds gates. lora: of a LoRA. denoiser: its name in the pipeline.
    """

    form: Form
    weights: str
    pipeline: str = "StableDiffusionPipeline"
    gates: bool = False
    lora: LowRank | None = None
    denoiser: str = "unet"


def refuse_gates(run: RunRecord, index: int, form: Form) -> bool:
    """Tell whether a step has gates. Raises ModelError if the form cannot hold them."""
    gates = any(map(is_gate, squared_norms(trained_run(run).weights(index))))
    if gates and form != "delta":
        raise ModelError(
            f"--to {form}: cannot hold the gates of this run (reg=gate), which open for some texts "
            "alone; use --to delta, whose card has the code that puts them into diffusers"
        )
    return gates


def write_delta(run: RunRecord, index: int, folder: Path) -> Exported:
    """Copy the weights theta - theta_base that a step was measured with; no model is needed."""
    path = trained_run(run).weights(index)
    shutil.copyfile(path, folder / path.name)
    gates = refuse_gates(run, index, "delta")
    return Exported("delta", path.name, gates=gates, denoiser=folder_of(squared_norms(path)))


def write_diffusers(model: DiffusionModel, folder: Path) -> Exported:
    """Write a model as a diffusers directory."""
    pipeline = make_pipeline(model)
    pipeline.save_pretrained(folder)
    kind, part = type(pipeline).__name__, model.architecture.folder
    return Exported("diffusers", ".", kind, denoiser=part)


def write_single_file(model: DiffusionModel, folder: Path) -> Exported:
    """Write all weights of a model into one file of the original layout, and read it back.

    Beside it lie the configurations and tokenizers, which the file does not hold.

    Raises:
        ModelError: it has a transformer; or what is read back is not what was written: the layout
            does not hold this model.
    """
    import safetensors.torch

    if isinstance(model.components, TransformerComponents):
        raise ModelError(
            "--to single-file: the original layouts of models with a transformer are not known "
            f"({model.components.kind}); use --to diffusers"
        )
    pipeline = make_pipeline(model)
    save_configurations(pipeline, folder / CONFIGURATIONS)
    try:
        own = latent_parts(model.components, "--to single-file")
        weights = original_weights(own)
        whole = {name: weight.contiguous() for name, weight in weights.items()}
        safetensors.torch.save_file(whole, folder / SINGLE)
        with slow("reading the file back"):
            found = read_single_file(folder / SINGLE, str(folder / CONFIGURATIONS), {}, ())
        pairs = [
            (own.denoiser, found.denoiser),
            (own.vae, found.vae),
            *zip(own.text_encoders, found.text_encoders, strict=True),
        ]
        differing = [type(one).__name__ for one, other in pairs if not same_weights(one, other)]
        if differing:
            raise ValueError(f"the {differing[0]} comes back with other weights")
    except ValueError as error:
        raise ModelError(
            "--to single-file: the original layout does not hold this model "
            f"({first_line(error)}); use --to diffusers"
        ) from error
    return Exported("single-file", SINGLE, type(pipeline).__name__)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Tell whether two networks have the same weights, to the last bit."""
    own, others = one.state_dict(), other.state_dict()
    return own.keys() == others.keys() and all(
        torch.equal(weight.cpu(), others[name].cpu()) for name, weight in own.items()
    )


def write_lora(
    run: RunRecord,
    index: int,
    model: DiffusionModel,
    folder: Path,
    *,
    rank: int | None = None,
    keep: float | None = None,
) -> Exported:
    """Write the change of a step as a LoRA. Raises ModelError where it has no such form.

    Args:
        model: of the step. rank, keep: as of low_rank().
    """
    require_loader(model.denoiser, "--to lora")
    change = from_safetensors(trained_run(run).weights(index).read_bytes())
    weights = dict(model.denoiser.named_parameters())
    found = low_rank(change, weights, rank=rank, keep=keep)
    part = model.architecture.folder
    (folder / LORA).write_bytes(to_safetensors(found.state_dict(part)))
    return Exported("lora", LORA, type(make_pipeline(model)).__name__, lora=found, denoiser=part)
