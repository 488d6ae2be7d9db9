"""The settings that every run has, whatever its model, method or regularizers. Defaults stand in conf/config.yaml, once."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
StepSize = Annotated[float, Field(gt=0, le=1e30)]  # beyond that float32 overflows inside the optimiser
Fraction = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=STRICT)
class TrainSettings:
    """The inner loop of one request; AdamW."""

    steps: PositiveInt
    batch_size: PositiveInt
    lr: StepSize
    betas: tuple[Fraction, Fraction]
    weight_decay: NonNegativeFloat
    grad_clip: NonNegativeFloat  # largest gradient norm; 0 is no clipping


@dataclass(frozen=True, config=STRICT)
class EvalSettings:
    """How evaluation images are sampled."""

    batch_size: PositiveInt
    steps: PositiveInt
    guidance: Annotated[float, Field(ge=1)]


@dataclass(frozen=True, config=STRICT)
class WandbSettings:
    """Where and whether the W&B mirror is written."""

    mode: Literal["offline", "online", "disabled"]
    project: Annotated[str, Field(min_length=1)]
    entity: str | None


@dataclass(frozen=True, config=STRICT)
class Paths:
    """outputs: the folder that holds runs, cache, sweeps and W&B files."""

    outputs: Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class SettingChoice:
    """conf/setting: how a sequence becomes requests."""

    plan: Literal["sequential"]


@dataclass(frozen=True, config=STRICT)
class Spine:
    """Everything in conf/config.yaml that is not a choice of a group."""

    seed: NonNegativeInt
    num_threads: PositiveInt | None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]
    train: TrainSettings
    eval: EvalSettings
    wandb: WandbSettings
    paths: Paths
