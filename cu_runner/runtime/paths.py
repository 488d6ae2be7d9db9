"""Where the files that ship with the package lie."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent.parent  # cu_runner/

GROUPS = {
    "model": "the diffusion model to unlearn from",
    "evaluator": "what names the content of generated images",
    "sequence": "concepts to unlearn, in order, and concepts to retain",
    "method": "the unlearning loss",
    "reg": "regularizers; a list combines them in that order: 'reg=[l2,gradproj]'",
    "retention": "what else the model keeps: CLIP score, FID, KID on general prompts; "
    "off by default",
    "recovery": "probes whether what was unlearned comes back; a list combines them: "
    "'recovery=[paraphrase,completion]'; off by default",
    "setting": "how the sequence becomes requests",
    "tracker": "what follows a run elsewhere; a list combines them: 'tracker=[wandb,tensorboard]'",
    "experiment": "a preset of the choices and settings of a published experiment",
}


def config_dir() -> Path:
    """Return conf/ inside an installed package, or at the top of a checkout."""
    packed = PACKAGE / "conf"
    return packed if packed.is_dir() else PACKAGE.parent / "conf"


def shipped_dir(name: str) -> Path:
    """Return a folder of scripts/ (tables): inside an installed package, or in a checkout."""
    packed = PACKAGE / "shipped" / name
    return packed if packed.is_dir() else PACKAGE.parent / "scripts" / name
