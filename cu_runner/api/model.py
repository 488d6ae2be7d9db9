"""A model as the library hands it out: it draws, it is a diffusers pipeline, it can be unlearned.

Shapes: S image side.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from PIL import Image
from pydantic import PositiveInt

from cu_runner.api.settings import UNTUNED, composed, word
from cu_runner.concepts.sequence import Concept
from cu_runner.evaluators.grid import to_picture
from cu_runner.models.checkpoint_files import locate
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.gates import DIRECTIONS, add_gates
from cu_runner.models.parameters import Drift, drift, is_gate
from cu_runner.models.sampling import generate
from cu_runner.runtime.devices import choose_device
from cu_runner.runtime.lazy import without_gradients
from cu_runner.runtime.paths import config_dir
from cu_runner.runtime.progress import note, unseen
from cu_runner.runtime.quiet import quiet_loading
from cu_runner.schema.errors import ConfigError, ModelError
from cu_runner.schema.settings import Sampler
from cu_runner.schema.validate import validate
from cu_runner.store.cache import MemoryCache

if TYPE_CHECKING:
    import diffusers
    from torch import Tensor


@dataclass(frozen=True)
class Edit:
    """One request that a model has unlearned.

    concept: what it added. anchor: what is drawn in its place. method, regularizers: by name.
    steps: of training. logs: of each step, as training.csv has them. record: what the method and
    the regularizers say of it. own: the change [by name] that the request made alone, where
    requests are merged; None elsewhere.
    """

    concept: Concept
    method: str
    regularizers: tuple[str, ...]
    steps: int
    logs: list[dict[str, float]]
    record: Mapping[str, object]
    own: dict[str, Tensor] | None = None

    @property
    def anchor(self) -> str | None:
        """Return what is drawn in the concept's place; None: its prompts without it."""
        return self.concept.anchor


@dataclass(frozen=True)
class Model:
    """A text-to-image model, untouched or with concepts unlearned. load_model() makes one.

    diffusion: its networks, with its weights. words: the choices of conf/ that load it. origin: the
    untouched model; None of that itself. delta: theta - theta_base by name, on the model's device.
    edits: the requests that made it, in order. targets: of all sequences that these came from.
    gates: (concept, words) that each of its gates is for, in their order; none without gates.
    """

    diffusion: DiffusionModel
    words: tuple[str, ...]
    origin: Model | None = field(default=None, repr=False)
    delta: dict[str, Tensor] = field(default_factory=dict, repr=False)
    edits: tuple[Edit, ...] = field(default=(), repr=False)
    targets: tuple[Concept, ...] = field(default=(), repr=False)
    gates: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    cache: MemoryCache = field(default_factory=MemoryCache, repr=False)

    @property
    def untouched(self) -> Model:
        """Return the model as it was loaded."""
        return self.origin or self

    @property
    def unlearned(self) -> tuple[str, ...]:
        """Return the concepts that it has unlearned, in order."""
        return tuple(edit.concept.name for edit in self.edits)

    @property
    def drift(self) -> Drift:
        """Return the size of theta - theta_base over all weights that were trained."""
        return drift(self.delta) if self.delta else Drift(0.0, 0.0, 0.0)

    @property
    def preset(self) -> str:
        """Return the file of conf/model by which it was loaded."""
        return self.words[0].removeprefix("model=")

    def generate(
        self,
        prompts: str | list[str],
        seeds: int | list[int] = 0,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        batch_size: int = 16,
        progress: bool = True,
    ) -> list[Image.Image]:
        """Draw one image per prompt.

        The noise of an image depends on its prompt and its seed alone: before and after unlearning
        it is the same, in every batch and on every device.

        Args:
            prompts: a prompt, or several.
            seeds: one for all, or one per prompt.
            steps, guidance, scheduler: None is the model's own.
            batch_size: images that are drawn together; it changes speed and memory only.
            progress: whether a bar is shown.

        Returns:
            Pictures of S x S pixels, in the order of the prompts.

        Raises:
            ConfigError: another number of seeds than of prompts, or no prompt.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        one = isinstance(seeds, Integral)
        numbers = [int(each) for each in ([seeds] * len(asked) if one else seeds)]  # type: ignore[union-attr, arg-type]
        if not asked or len(numbers) != len(asked):
            raise ConfigError(
                f"generate: {len(asked)} prompts and {len(numbers)} seeds; give one seed for all, "
                "or one for each of one or more prompts"
            )
        own = self.diffusion.sampler
        given = {"steps": steps, "guidance": guidance, "scheduler": scheduler}
        chosen = {name: value for name, value in given.items() if value is not None}
        sampler = validate(Sampler, {**dataclasses.asdict(own), **chosen}, "generate")
        validate(PositiveInt, batch_size, "generate.batch_size")
        pictures: list[Image.Image] = []
        with unseen(not progress):
            for images in generate(
                self.diffusion, asked, numbers, sampler, batch_size=batch_size, label="images"
            ):
                pictures += [to_picture(image, image.shape[-1]) for image in images]
        return pictures

    def pipeline(self) -> diffusers.DiffusionPipeline:
        """Return it as a pipeline of plain diffusers, with weights of its own.

        `pipeline().save_pretrained(DIR)` writes a directory that every diffusers program loads.

        Raises:
            ModelError: it has gates (reg=gate), which no pipeline of diffusers holds.
        """
        from cu_runner.models.pipeline import make_pipeline

        whole = self.fresh()  # in fp32; what this model draws with may hold weights in bf16
        add_change(whole, self.delta)
        return make_pipeline(whole)

    def fresh(self) -> DiffusionModel:
        """Return the untouched networks with a UNet of their own, whose weights may be changed."""
        return with_own_denoiser(self.untouched.diffusion)


@without_gradients
def with_own_denoiser(source: DiffusionModel) -> DiffusionModel:
    """Return the same model with a copy of its UNet; the two share everything else."""
    parts = source.components.with_denoiser(copy.deepcopy(source.denoiser))
    return DiffusionModel(
        parts,
        resolution=source.resolution,
        sampler=source.sampler,
        precision=source.precision,
        device=source.device,
        vae_slicing=source.vae_slicing,
    )


@without_gradients
def add_change(diffusion: DiffusionModel, delta: Mapping[str, Tensor]) -> None:
    """Add theta - theta_base to the weights of an untouched UNet, in place.

    Of gates [N, ...] a model may have more by now: the first N are set.
    """
    gates = [change for name, change in delta.items() if name.endswith(DIRECTIONS)]
    weights = dict(diffusion.denoiser.named_parameters())
    if gates and not any(map(is_gate, weights)):
        add_gates(diffusion.denoiser, len(gates[0]))
        weights = dict(diffusion.denoiser.named_parameters())
    for name, change in delta.items():
        place = weights[name][tuple(slice(side) for side in change.shape)]
        place.add_(change) if not is_gate(name) else place.copy_(change)


def load_model(
    name: str | Path = "shapecanvas",
    *,
    preset: str | None = None,
    device: str = "auto",
    precision: str | None = None,
    settings: Mapping[str, object] | None = None,
) -> Model:
    """Load a text-to-image model.

    Args:
        name: "shapecanvas" (embedded) or another file of conf/model; the id of a repository of the
            Hugging Face hub; a diffusers directory; a single .safetensors file.
        preset: the file of conf/model whose settings are taken (image side, sampler, training);
            None chooses by the files: the kind of a transformer, SDXL, Stable Diffusion 2 by its
            text width of 1024, a pixel model with classes by its lack of an autoencoder, else 1.5.
        device: auto, cpu, cuda or cuda:1 and so on.
        precision: of forward passes: fp32, bf16 or fp16; None is the preset's on a GPU, else fp32.
        settings: more of conf/model, by key: {"resolution": 256, "sampler.steps": 20}.

    Raises:
        ConfigError: an unknown name or setting. ModelError: files that are missing or do not fit.
    """
    more = {f"model.{key}": value for key, value in (settings or {}).items()}
    revision = (settings or {}).get("revision")
    chosen = chosen_by(str(name), preset, None if revision is None else str(revision))
    words = [*chosen, *(word(key, value) for key, value in more.items())]
    if precision is not None:
        words.append(word("model.precision", precision))
    plan = composed([*words, UNTUNED, f"device={device}"], None)
    place = choose_device(plan.spine)
    if place == "cpu" and precision is None and "precision" not in (settings or {}):
        words.append(word("model.precision", "fp32"))
        plan = composed([*words, UNTUNED, f"device={device}"], None)
    with quiet_loading():
        diffusion = plan.model.build(device=place)
    diffusion.speed_up(plan.spine.speed)
    return Model(diffusion, tuple(words))


def chosen_by(name: str, preset: str | None, revision: str | None = None) -> list[str]:
    """Return the words that choose a model: its preset, and its path where that is another."""
    files = (config_dir() / "model").glob("*.yaml")
    presets = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in files}
    if preset is not None and preset not in presets:
        raise ConfigError(
            f"preset={preset!r}: no such model; allowed: {', '.join(sorted(presets))}"
        )
    if name in presets:
        return [f"model={name}"]
    for own, content in sorted(presets.items()):
        if content.get("path") == name and preset in (None, own):
            return [f"model={own}"]
    chosen, side = (preset, None) if preset else kind_of(name, revision)
    words = [f"model={chosen}", word("model.path", name)]
    return [*words, word("model.resolution", side)] if side else words


def kind_of(name: str, revision: str | None = None) -> tuple[str, int | None]:
    """Return the preset of a directory or hub repository, and its image side.

    A single file says neither: it is taken for Stable Diffusion 1.5, and that is said.
    """
    place = Path(locate(name, revision))
    if not place.is_dir():
        note(f"{name}: a file does not say its kind; taken for sd15, preset=... names another")
        return "sd15", None
    if (place / "unet/config.json").is_file() and not (place / "vae").exists():
        return "class_conditional", None  # pixels, and names of classes
    part = "transformer" if (place / "transformer").is_dir() else "unet"
    try:
        denoiser, vae = (
            json.loads((place / folder / "config.json").read_text(encoding="utf-8"))
            for folder in (part, "vae")
        )
    except (OSError, ValueError):
        raise ModelError(
            f"{name}: holds no readable {part}/config.json and vae/config.json; give a diffusers "
            "directory of a text-to-image model"
        ) from None
    widths = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0] * 4
    size = denoiser.get("sample_size")
    side = size * 2 ** (len(widths) - 1) if isinstance(size, int) else None
    if part == "transformer":
        return transformer_kind(name, denoiser), side
    if (place / "text_encoder_2").is_dir():
        return "sdxl", side
    return ("sd21_base" if denoiser.get("cross_attention_dim") == 1024 else "sd15"), side


def transformer_kind(name: str, config: Mapping[str, object]) -> str:
    """Return the preset of a model with a transformer, by the configuration of this.

    Stable Diffusion 3.5 is told from 3 by the normalisation of its queries and keys, FLUX.1-dev
    from schnell by its input for guidance.
    """
    match config.get("_class_name"):
        case "SD3Transformer2DModel":
            return "sd35_medium" if config.get("qk_norm") else "sd3_medium"
        case "FluxTransformer2DModel":
            return "flux_dev" if config.get("guidance_embeds") else "flux_schnell"
        case "PixArtTransformer2DModel":
            return "pixart_sigma"
        case "SanaTransformer2DModel":
            return "sana"
        case "AuraFlowTransformer2DModel":
            return "auraflow"
    raise ModelError(
        f"{name}: its transformer is of a class that is not known ({config.get('_class_name')}); "
        "known are those of Stable Diffusion 3, FLUX.1, PixArt, Sana and AuraFlow"
    )
