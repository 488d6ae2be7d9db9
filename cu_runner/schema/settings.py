"""The settings that every run has, whatever its model, method or regularizers.

Defaults stand in conf/config.yaml, once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PlainValidator,
    PositiveFloat,
    PositiveInt,
)
from pydantic.dataclasses import dataclass

from cu_runner.schema.errors import ConfigError
from cu_runner.schema.words import Matches

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

WandbMode = Literal["offline", "online", "disabled"]
Precision = Literal["fp32", "bf16", "fp16"]
ParameterGroup = Literal[
    "kv_xattn",
    "k_xattn",
    "v_xattn",
    "reads_text",
    "text_linear",
    "xattn",
    "non_xattn",
    "full",
    "non_xattn_layers",
    "layers",
]
# Beyond 1e30 float32 overflows inside the optimiser.
StepSize = Annotated[float, Field(gt=0, le=1e30)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
SAVED = "a number of steps, minutes as 10min, or null for never"
PLAIN = "letters, digits and . , : @ + - _"
# Steps, or minutes as "10min".
Every = PositiveInt | Literal["last"]  # so many requests and the last, or the last alone
SaveEvery = PositiveInt | Annotated[str, Matches(r"\d+(\.\d+)?min", SAVED)] | None


def check_evaluated(value: Any) -> Any:
    """Return what eval.every may be. Raises ValueError with all that is allowed, in one line."""
    numbers = value if isinstance(value, list) else [value]
    if value != "last" and not (
        numbers and all(type(each) is int and each > 0 for each in numbers)
    ):
        raise ValueError("allowed: so many requests, as 5; some of them, as [1,6]; or last")
    return value


# Every, or a list of requests: their numbers, from 1.
Evaluated = Annotated[
    PositiveInt | list[PositiveInt] | Literal["last"], PlainValidator(check_evaluated)
]
# Both stand in the scripts of jobs, which a line break would cut.
ClusterName = Annotated[str, Matches(r"[\w.,:@+-]+", PLAIN)]
FolderName = Annotated[str, Matches(r"[^\x00-\x1f\x7f]+", "a path without control characters")]


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """The inner loop of one request.

    gradient_checkpointing: activations are computed again on the way back: less memory, the same
    gradients. save_every: how often the state of a request is saved; None is never. lora_rank: of
    the change that a request may make of every matrix; None trains the weights themselves.
    lora_alpha: with it, a change is (alpha / rank) B A; None is the rank.
    """

    steps: PositiveInt
    optimizer: Literal["adamw", "adam", "sgd"]
    batch_size: PositiveInt
    lr: StepSize
    betas: tuple[Fraction, Fraction]
    weight_decay: NonNegativeFloat
    grad_clip: NonNegativeFloat  # largest gradient norm; 0 is no clipping
    gradient_checkpointing: bool = False
    save_every: SaveEvery = None
    lora_rank: PositiveInt | None = None
    lora_alpha: PositiveFloat | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an alpha of no LoRA."""
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(
                f"train.lora_alpha={self.lora_alpha:g}: belongs to a LoRA; give train.lora_rank too"
            )


@dataclass(frozen=True, config=STRICT)
class Sampler:
    """How images are sampled.

    steps: denoising steps. guidance: classifier-free guidance scale, 1 is none. scheduler: a
    diffusers scheduler class by name, made from the configuration of the pipeline's own; None is
    the pipeline's own.
    """

    steps: PositiveInt
    guidance: Annotated[float, Field(ge=1)]
    scheduler: str | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EvalSettings(Sampler):
    """How evaluation images are sampled, how many together, and after which requests.

    jpeg: quality of the JPEG files as which images are judged; None judges them as they are.
    every: after every so many requests, after those of a list, or after the last one alone; the
    last is always evaluated.
    """

    batch_size: PositiveInt
    jpeg: Annotated[int, Field(ge=1, le=95)] | None = None
    every: Evaluated = 1

    def is_due(self, request: int, last: int) -> bool:
        """Tell whether the weights are evaluated after a request; the untouched model always is."""
        if request in (0, last):
            return True
        if isinstance(self.every, list):
            return request in self.every
        return self.every != "last" and request % self.every == 0

    def require_requests(self, last: int) -> None:
        """Refuse with ConfigError a list that names a request beyond the last."""
        if isinstance(self.every, list) and max(self.every) > last:
            raise ConfigError(
                f"eval.every={self.every}: there is no request {max(self.every)}; allowed: 1 to "
                f"{last}, the number of requests, or last"
            )


@dataclass(frozen=True, config=STRICT)
class WandbSettings:
    """Where and whether the W&B mirror is written."""

    mode: WandbMode
    project: Annotated[str, Field(min_length=1)]
    entity: str | None


@dataclass(frozen=True, config=STRICT)
class Speed:
    """What gives the same results faster, up to rounding.

    kv_cache: keys and values of a prompt are computed once per image, not at every denoising step.
    channels_last: on a GPU, the memory layout that its convolutions are fastest in. compile:
    torch.compile of the UNet, once per process and batch shape.
    """

    kv_cache: bool = True
    channels_last: bool = True
    compile: bool = False


@dataclass(frozen=True, config=STRICT)
class Paths:
    """outputs: the folder that holds runs, cache, sweeps and W&B files."""

    outputs: FolderName


@dataclass(frozen=True, config=STRICT)
class Cluster:
    """What hydra/launcher=slurm asks for, for every job."""

    partition: ClusterName | None
    account: ClusterName | None
    timeout_min: PositiveInt
    mem_gb: PositiveInt
    cpus: PositiveInt
    gpus: PositiveInt | None
    parallel_jobs: PositiveInt
    warn_seconds: PositiveInt = 120
    requeues: NonNegativeInt = 100


@dataclass(frozen=True, config=STRICT)
class PlanSettings:
    """conf/setting: how a sequence becomes requests, and when one may end before train.steps.

    stop_at: UA in percent that ends a request when it is reached, over all concepts so far, of
    independent requests over the one; None is never. stop_loss: the same of the method's loss, as a
    fraction of that of the untouched weights. recheck: after a request, an earlier target whose
    loss is over so many times stop_loss again is trained again; None is never.
    """

    plan: Literal["sequential", "independent", "simultaneous"]
    stop_at: Annotated[float, Field(gt=0, le=100)] | None = None
    stop_loss: Annotated[float, Field(gt=0, lt=1)] | None = None
    interval: PositiveInt = 100  # steps between measurements
    patience: PositiveInt = 1  # measurements in a row that must reach it
    # steps without a better UA after which a request ends too; None is never
    patience_steps: PositiveInt | None = None
    recheck: Annotated[float, Field(ge=1)] | None = None
    last_only: bool = False  # of simultaneous requests only the one for all concepts

    @property
    def ends_early(self) -> bool:
        """Tell whether a request may end before train.steps."""
        return self.stop_at is not None or self.stop_loss is not None


@dataclass(frozen=True, config=STRICT)
class Spine:
    """Everything in conf/config.yaml that is not a choice of a group."""

    dry_run: bool
    fresh: bool
    allow_other_code: bool
    seed: NonNegativeInt
    num_threads: PositiveInt | None
    device: Annotated[str, Matches(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda, or cuda:1 and so on")]
    train: TrainSettings
    anchors: Sampler
    eval: EvalSettings
    speed: Speed
    wandb: WandbSettings
    paths: Paths
    cluster: Cluster
