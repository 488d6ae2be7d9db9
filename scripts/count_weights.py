"""Count the weights of each transformer and of what its text enters by, at their published sizes.

    python scripts/count_weights.py

Nothing is loaded: the networks are built without memory.
"""

import diffusers
import torch
import transformers
from make_random_pipeline import (
    TRANSFORMERS,
    gemma_config,
    t5_config,
    transformer_config,
    umt5_config,
)

from cu_runner.models.parameters import select_parameters
from cu_runner.schema.settings import ParameterGroup

GROUPS: tuple[ParameterGroup, ...] = ("kv_xattn", "text_linear", "reads_text", "xattn")


def millions(network: torch.nn.Module, group: ParameterGroup = "full") -> str:
    """Return how many weights of a group a denoiser has, or any network in all."""
    weights = dict(network.named_parameters())
    chosen = weights if group == "full" else select_parameters(network, group)
    return f"{sum(weight.numel() for weight in chosen.values()) / 1e6:.1f}"


def main() -> None:
    print("millions of weights:")
    with torch.device("meta"):
        for kind, (_, name, _) in TRANSFORMERS.items():
            network = getattr(diffusers, name)(**transformer_config(kind, tiny=False))
            groups = ", ".join(f"{group} {millions(network, group)}" for group in GROUPS)
            print(f"{kind}: {millions(network)}; {groups}", flush=True)
        print(f"T5: {millions(transformers.T5EncoderModel(t5_config(tiny=False)))}")
        print(f"Pile-T5: {millions(transformers.UMT5EncoderModel(umt5_config(tiny=False)))}")
        print(f"Gemma: {millions(transformers.Gemma2Model(gemma_config(tiny=False)))}")


if __name__ == "__main__":
    main()
