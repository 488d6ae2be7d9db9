"""The settings that every run has, whatever its model, method or regularizers. Defaults stand in conf/config.yaml, once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

Precision = Literal["fp32", "bf16", "fp16"]


ParameterGroup = Literal["kv_xattn", "xattn", "non_xattn", "full"]


STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


StepSize = Annotated[
    float, Field(gt=0, le=1e30)
]  # beyond that float32 overflows inside the optimiser


Fraction = Annotated[float, Field(ge=0, lt=1)]


SaveEvery = (
    PositiveInt | Annotated[str, Field(pattern=r"^\d+(\.\d+)?min$")] | None
)  # steps, or minutes as "10min"


ClusterName = Annotated[str, Field(pattern=r"^[\w.,:@+-]+$")]  # it stands in the scripts of jobs


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """The inner loop of one request."""

    steps: PositiveInt
    optimizer: Literal["adamw", "adam", "sgd"]
    batch_size: PositiveInt
    lr: StepSize
    betas: tuple[Fraction, Fraction]
    weight_decay: NonNegativeFloat
    grad_clip: NonNegativeFloat  # largest gradient norm; 0 is no clipping
    gradient_checkpointing: bool = (
        False  # activations are computed again on the way back: less memory, the same gradients
    )
    save_every: SaveEvery = None  # how often the state of a request is saved; None is never


@dataclass(frozen=True, config=STRICT)
class Sampler:
    """How images are sampled.

    steps: denoising steps. guidance: classifier-free guidance scale, 1 is none. scheduler: a diffusers scheduler class by name,
    made from the configuration of the pipeline's own; None is the pipeline's own.
    """

    steps: PositiveInt
    guidance: Annotated[float, Field(ge=1)]
    scheduler: str | None = None


@dataclass(frozen=True, config=STRICT, kw_only=True)
class EvalSettings(Sampler):
    """How evaluation images are sampled, and how many together."""

    batch_size: PositiveInt


@dataclass(frozen=True, config=STRICT)
class WandbSettings:
    """Where and whether the W&B mirror is written."""

    mode: Literal["offline", "online", "disabled"]
    project: Annotated[str, Field(min_length=1)]
    entity: str | None


@dataclass(frozen=True, config=STRICT)
class Speed:
    """What gives the same results faster, up to rounding.

    kv_cache: keys and values of a prompt are computed once per image, not at every denoising step. channels_last: on a GPU, the
    memory layout that its convolutions are fastest in. compile: torch.compile of the UNet, once per process and batch shape.
    """

    kv_cache: bool = True
    channels_last: bool = True
    compile: bool = False


@dataclass(frozen=True, config=STRICT)
class Paths:
    """outputs: the folder that holds runs, cache, sweeps and W&B files."""

    outputs: Annotated[
        str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")
    ]  # it stands in the scripts of jobs: no line breaks


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
    """conf/setting: how a sequence becomes requests, and when one of them may end before train.steps."""

    plan: Literal["sequential", "independent", "simultaneous"]
    stop_at: Annotated[float, Field(gt=0, le=100)] | None = (
        None  # UA in percent that ends a request when it is reached
    )
    interval: PositiveInt = 100  # steps between measurements of UA
    patience: PositiveInt = 1  # measurements in a row that must reach it
    last_only: bool = False  # of simultaneous requests only the one for all concepts


@dataclass(frozen=True, config=STRICT)
class Spine:
    """Everything in conf/config.yaml that is not a choice of a group."""

    dry_run: bool
    fresh: bool
    allow_other_code: bool
    seed: NonNegativeInt
    num_threads: PositiveInt | None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    train: TrainSettings
    anchors: Sampler
    eval: EvalSettings
    speed: Speed
    wandb: WandbSettings
    paths: Paths
    cluster: Cluster
