"""Measure one training step of one block of a full-size transformer, with random weights.

For models that are too large for the machine as a whole. The block is one of those in which text
and image attend to one another with weights of their own: 24 of Stable Diffusion 3 medium, the last
without the text's feed-forward layers; 19 of FLUX.1-dev, which has 38 single blocks besides.

    python scripts/bench_block.py sd3_medium              # 1024 pixels, bf16, batch 1
    python scripts/bench_block.py flux_dev --resolution 512

Trained are the block's keys and values of the text (method.params=kv_xattn), in fp32; everything
else is frozen and held in the precision of the forward pass, as in a run. Gradients go to the
block's inputs too, as in any block but the first.
"""

import argparse
import time

import diffusers
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed, FluxTransformerBlock
from torch import Tensor, nn

from cu_runner.cli.console import Parser, whole_number
from cu_runner.models.architectures import JOINT
from cu_runner.models.diffusion import dtype_of
from cu_runner.runtime.devices import device_name, forget_peak_memory, peak_memory_mb

TOKENS = {"sd3_medium": 77 + 256, "flux_dev": 512}  # of the text, as the pipelines read it
SIZES = {"sd3_medium": (24, 64), "flux_dev": (24, 128)}  # heads, and the width of each
PATCH = 16  # pixels a side: eight are a latent, two latents a patch


def make_block(kind: str) -> tuple[nn.Module, int]:
    """Return a block of the published sizes and its width."""
    heads, each = SIZES[kind]
    joint = diffusers.models.attention.JointTransformerBlock
    made = joint if kind == "sd3_medium" else FluxTransformerBlock
    return made(heads * each, heads, each), heads * each


def inputs_of(kind: str, width: int, side: int, device: torch.device) -> dict[str, object]:
    """Return random inputs of a block for one image of side x side patches."""
    image, text = (
        torch.randn(1, length, width, device=device, requires_grad=True)
        for length in (side * side, TOKENS[kind])
    )
    more: dict[str, object] = {}
    if kind == "flux_dev":
        places = torch.zeros(side, side, 3)
        places[..., 1] += torch.arange(side)[:, None]
        places[..., 2] += torch.arange(side)[None, :]
        ids = torch.cat([torch.zeros(TOKENS[kind], 3), places.reshape(-1, 3)]).to(device)
        more["image_rotary_emb"] = FluxPosEmbed(theta=10000, axes_dim=(16, 56, 56))(ids)
    steps = torch.randn(1, width, device=device)
    return {"hidden_states": image, "encoder_hidden_states": text, "temb": steps, **more}


def lower_frozen(block: nn.Module, dtype: torch.dtype) -> list[nn.Parameter]:
    """Freeze and lower all but keys and values of the text; return these."""
    trained = []
    for name, parameter in block.named_parameters():
        whole = f"transformer_blocks.0.{name}"
        if JOINT.keys.search(whole) or JOINT.values.search(whole):
            trained.append(parameter)
        else:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(dtype)
    return trained


def loss_of(block: nn.Module, inputs: dict[str, object], dtype: torch.dtype) -> Tensor:
    device = next(block.parameters()).device.type
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        outputs = block(**inputs)
    return sum(output.float().square().mean() for output in outputs)


def main() -> None:
    parser = Parser(prog="bench_block.py", description=__doc__)
    parser.add_argument("kind", choices=list(TOKENS))
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--resolution", type=whole_number, default=1024, help="in pixels")
    parser.add_argument("--steps", type=whole_number, default=1, help="that are timed, each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measure(parser.parse_args())


def measure(arguments: argparse.Namespace) -> None:
    """Print sizes, the time of each step, and the peak of memory."""
    device, dtype = torch.device(arguments.device), dtype_of(arguments.precision)
    if arguments.resolution % PATCH:
        raise SystemExit(f"bench_block.py: --resolution: not a multiple of {PATCH}")
    side = arguments.resolution // PATCH
    torch.manual_seed(0)
    block, width = make_block(arguments.kind)
    trained = lower_frozen(block.to(device), dtype)
    inputs = inputs_of(arguments.kind, width, side, device)
    weights = sum(parameter.numel() for parameter in block.parameters())
    print(
        f"{arguments.kind}: one block, {weights / 1e6:.1f} million weights, "
        f"{sum(parameter.numel() for parameter in trained) / 1e6:.1f} million trained; "
        f"{side * side} tokens of an image, {TOKENS[arguments.kind]} of a text; "
        f"{device_name(device)}, {arguments.precision}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads; {peak_memory_mb(device):.0f} MB before the step",
        flush=True,
    )
    forget_peak_memory(device)
    for _ in range(arguments.steps):
        for tensor in (*trained, inputs["hidden_states"], inputs["encoder_hidden_states"]):
            tensor.grad = None
        started = time.perf_counter()
        loss = loss_of(block, inputs, dtype)
        value = loss.item()  # it waits for a GPU
        print(f"forward {time.perf_counter() - started:.3f} s", end=", ", flush=True)
        loss.backward()
        moved = trained[0].grad.norm().item()
        seconds = time.perf_counter() - started
        print(
            f"forward and backward {seconds:.3f} s; loss {value:.3f}, "
            f"gradient {moved:.2e}; peak memory {peak_memory_mb(device):.0f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
