"""A change of weights as a LoRA, and LoRAs of every tool's names as a change of weights."""

import json
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from torch import Tensor

from cu_runner.models.lora_files import lora_change, same_up_to_rounding, settings_in
from cu_runner.models.low_rank import ROUNDING, LowRank, low_rank
from cu_runner.schema.errors import ModelError, WeightFileError

K = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(found: LowRank, name: str) -> Tensor:
    down, up = found.factors[name]
    matrix = up.flatten(1) @ down.flatten(1)
    return matrix.reshape(len(up), *down.shape[1:]) if down.ndim == 4 else matrix


# ---------------------------------------------------------------------------------- change to LoRA
def test_a_change_of_low_rank_is_exact():
    weights = {"a.weight": draw(40, 60), "b.weight": draw(30, 50, seed=1)}
    change = {
        "a.weight": 0.1 * draw(40, 2, seed=2) @ draw(2, 60, seed=3),
        "b.weight": 0.1 * draw(30, 1, seed=4) @ draw(1, 50, seed=5),
    }
    # what hundreds of steps leave: some roundings of the weight
    noisy = {
        name: each + 2.0**-23 * weights[name] * draw(*each.shape, seed=6)
        for name, each in change.items()
    }
    for given in (change, noisy):
        found = low_rank(given, weights)
        assert (found.rank, found.exact) == (2, True)
        assert found.kept > 1 - 1e-9
        for name, each in given.items():
            assert found.factors[name][0].shape == (2, each.shape[1])
            assert (product(found, name) - each).norm() < ROUNDING * weights[name].norm()
    louder = {name: each + 1e-3 * draw(*each.shape, seed=7) for name, each in change.items()}
    assert low_rank(louder, weights).exact is False


def test_the_rank_keeps_a_part_of_the_squared_norm_of_all():
    """Squared singular values 4, 2, 1 and 3: of ranks 1, 2, 3 are kept 7/10, 9/10, 1."""
    first = torch.diag(torch.tensor([2.0, 2.0**0.5, 1.0]))
    second = torch.zeros(3, 3)
    second[0, 1] = 3.0**0.5
    change = {"a.weight": first, "b.weight": second}
    for keep, rank, kept in ((0.5, 1, 0.7), (0.7, 1, 0.7), (0.71, 2, 0.9), (1.0, 3, 1.0)):
        found = low_rank(change, change, keep=keep)
        assert found.rank == rank
        assert found.kept == pytest.approx(kept)
    found = low_rank(change, change, rank=2)
    assert found.kept == pytest.approx(0.9)
    torch.testing.assert_close(product(found, "b.weight"), second)
    torch.testing.assert_close(
        product(found, "a.weight"), torch.diag(first.diag() * Tensor([1, 1, 0]))
    )
    assert found.factors["b.weight"][1][:, 1].tolist() == [0, 0, 0]


def test_a_convolution_is_a_matrix():
    weight = draw(12, 8, 3, 3)
    change = draw(12, 1) @ draw(1, 72, seed=1)
    found = low_rank({f"{CONV}.weight": change.reshape(12, 8, 3, 3)}, {f"{CONV}.weight": weight})
    down, up = found.factors[f"{CONV}.weight"]
    assert (down.shape, up.shape) == ((1, 8, 3, 3), (12, 1, 1, 1))
    torch.testing.assert_close(product(found, f"{CONV}.weight"), change.reshape(12, 8, 3, 3))
    assert set(found.state_dict()) == {f"unet.{CONV}.lora_{side}.weight" for side in "AB"}


def test_biases_and_no_change_are_refused():
    change = {"a.weight": torch.eye(4), "a.bias": torch.ones(4) * 0.1}  # 4 and 0.04
    with pytest.raises(ModelError, match=r"hold 99\.01% of the change.*--keep 0\.99 or"):
        low_rank(change, change)
    found = low_rank(change, change, keep=0.99)
    assert (found.rank, found.exact) == (4, False)
    assert found.kept == pytest.approx(4 / 4.04)
    with pytest.raises(ModelError, match="would change nothing"):
        low_rank({"a.weight": torch.zeros(2, 2)}, change)


# ---------------------------------------------------------------------------------- LoRA to change
@pytest.fixture(scope="module")
def unet(pipelines):
    return diffusers.UNet2DConditionModel.from_pretrained(pipelines["sd15"] / "unet")


def names_of(kind: str, module: str) -> tuple[str, str, str | None]:
    """The names of A, B and alpha."""
    kohya = f"lora_unet_{module.replace('.', '_')}"
    attention, _, last = module.rpartition(".")
    return {
        "peft": (f"unet.{module}.lora_A.weight", f"unet.{module}.lora_B.weight", None),
        "diffusers": (f"unet.{module}.lora.down.weight", f"unet.{module}.lora.up.weight", None),
        "processor": (
            f"unet.{attention}.processor.{last}_lora.down.weight",
            f"unet.{attention}.processor.{last}_lora.up.weight",
            None,
        ),
        "kohya": (f"{kohya}.lora_down.weight", f"{kohya}.lora_up.weight", f"{kohya}.alpha"),
    }[kind]


@pytest.mark.parametrize("kind", ["peft", "diffusers", "processor", "kohya", "kohya proj_in"])
def test_every_tools_names(unet, kind):
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    if "proj_in" in kind:  # whose alpha diffusers names otherwise
        module, kind = "down_blocks.0.attentions.0.proj_in", "kohya"
    out, width = unet.get_submodule(module).weight.shape[:2]
    down, up = draw(4, width), draw(out, 4, seed=1)
    lower, upper, alpha = names_of(kind, module)
    weights = {lower: down, upper: up} | ({alpha: torch.tensor(2.0)} if alpha else {})
    change = lora_change(Path("x.safetensors"), weights, {}, unet)
    scale = 0.5 if alpha else 1.0
    assert set(change) == {f"{module}.weight"}
    torch.testing.assert_close(change[f"{module}.weight"].flatten(1), scale * up @ down)


def test_alpha_of_the_header(unet, tmp_path):
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"
    out, width = unet.get_submodule(module).weight.shape
    weights = {
        f"unet.{module}.lora_A.weight": draw(4, width),
        f"unet.{module}.lora_B.weight": draw(out, 4, seed=1),
    }
    plain = lora_change(Path("x"), weights, {}, unet)[f"{module}.weight"]
    header = {"unet.r": 4, "unet.lora_alpha": 12}
    file = tmp_path / "x.safetensors"
    said = {"lora_adapter_metadata": json.dumps(header)}
    safetensors.torch.save_file(weights, file, said)
    found = lora_change(file, weights, settings_in(file), unet)[f"{module}.weight"]
    torch.testing.assert_close(found, 3 * plain)
    header["unet.use_rslora"] = True
    with pytest.raises(WeightFileError, match="use_rslora"):
        lora_change(file, weights, {"lora_adapter_metadata": json.dumps(header)}, unet)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("text_encoder.a.lora_A.weight", "changes more than the UNet"),
        ("unet.a.lora_A.weight", "does not fit the base model's UNet"),
        ("unet.a.lokr_w1", "is of another form than LoRA"),
        ("lora_unet_nowhere.lora_down.weight", "does not fit|no LoRA that diffusers reads"),
    ],
)
def test_what_is_no_lora_of_this_unet_is_refused(unet, name, said):
    with pytest.raises(WeightFileError, match=said):
        lora_change(Path("x"), {name: draw(2, 4)}, {}, unet)


def test_same_up_to_rounding():
    weight = draw(5, 5)
    assert same_up_to_rounding(weight, weight.half())
    assert same_up_to_rounding(weight, weight.bfloat16().float())
    changed = weight.clone()
    changed[0, 0] *= 1.02
    assert not same_up_to_rounding(weight, changed)
