"""Parameter groups, deltas and drift norms."""

import math

import diffusers
import pytest
import torch
from torch import nn

from cu_runner.models.loading import load_model
from cu_runner.models.parameters import MOVED, assign, drift, select_parameters, snapshot, subtract
from cu_runner.schema.errors import ModelError
from cu_runner.schema.settings import Sampler


def test_groups_of_the_embedded_unet(model):
    kv, xattn, full = (
        select_parameters(model.denoiser, group) for group in ("kv_xattn", "xattn", "full")
    )
    assert all(name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for name in kv)
    assert all(
        parameter.shape[1] == model.denoiser.config.cross_attention_dim for parameter in kv.values()
    )
    assert list(select_parameters(model.denoiser, "text_linear")) == list(kv)
    layers = {name.rpartition(".to_")[0] for name in kv}
    assert len(kv) == 2 * len(layers) > 0
    # to_q, to_k, to_v, and to_out with its bias
    assert len(xattn) == 5 * len(layers)
    assert len(full) == len(list(model.denoiser.parameters()))
    assert set(kv) < set(xattn) < set(full)
    assert list(kv) == [name for name in full if name in kv]


def test_keys_and_values_are_groups_of_their_own(model):
    kv, keys, values = (
        select_parameters(model.denoiser, group) for group in ("kv_xattn", "k_xattn", "v_xattn")
    )
    assert list(keys) == [name for name in kv if name.endswith("attn2.to_k.weight")]
    assert list(values) == [name for name in kv if name.endswith("attn2.to_v.weight")]
    assert len(keys) == len(values) == len(kv) / 2


def test_cross_attention_and_the_rest_are_the_whole_unet(model):
    xattn, rest, full = (
        select_parameters(model.denoiser, group) for group in ("xattn", "non_xattn", "full")
    )
    assert len(rest) == len(full) - len(xattn) > 0
    assert list(rest) == [name for name in full if name not in xattn]
    assert "conv_in.weight" in rest
    assert any(".attn1.to_k." in name for name in rest)
    assert not any("attn2" in name for name in rest)


def test_a_unet_without_cross_attention_is_refused():
    unet = diffusers.UNet2DModel(
        8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    message = (
        r"^method.params=kv_xattn: UNet2DModel has no such parameters; it needs attention to a "
        r"text. method.params=full trains all weights, layers all but normalisations$"
    )
    with pytest.raises(ValueError, match=message):
        select_parameters(unet, "kv_xattn")
    with pytest.raises(ModelError, match=r"^Linear is no known denoiser; known are UNet2DCond"):
        select_parameters(nn.Linear(2, 2), "kv_xattn")


@pytest.mark.parametrize(
    ("kind", "linear", "keys", "both"),
    [
        ("sd3_medium", ["context_embedder.weight"], "attn.add_k_proj.weight", 3),
        ("flux_dev", ["context_embedder.weight"], "attn.add_k_proj.weight", 2),
        ("pixart_sigma", ["caption_projection.linear_1.weight"], "attn2.to_k.weight", 2),
        ("sana", ["caption_projection.linear_1.weight"], "attn2.to_k.weight", 2),
    ],
)
def test_what_reads_the_text_of_a_transformer(transformers_on_disk, kind, linear, keys, both):
    denoiser = load_model(str(transformers_on_disk[kind]), 64, Sampler(2, 1.0)).denoiser

    def chosen(group: str) -> list[str]:
        return list(select_parameters(denoiser, group))

    assert chosen("text_linear") == linear
    assert all(name.endswith(keys) for name in chosen("k_xattn"))
    assert len(chosen("k_xattn")) == len(chosen("v_xattn")) == both
    assert set(chosen("kv_xattn")) <= set(chosen("xattn")) < set(chosen("full"))
    assert {*linear, *chosen("kv_xattn")} < set(chosen("reads_text"))
    assert set(chosen("xattn")).isdisjoint(chosen("non_xattn"))
    entries = ("x_embedder", "patch_embed", "pos_embed")
    image = [name for name in chosen("full") if name.startswith(entries)]
    assert image
    assert set(image).isdisjoint(chosen("reads_text"))


def test_subtract_and_assign_are_inverse():
    params = {"a": nn.Parameter(torch.tensor([1.0, 2.0])), "b": nn.Parameter(torch.tensor([[3.0]]))}
    base = snapshot(params)
    with torch.no_grad():
        params["a"].add_(torch.tensor([0.5, -4.0]))
    delta = subtract(params, base)
    assert delta["a"].tolist() == [0.5, -4.0]
    assert delta["b"].tolist() == [[0.0]]
    assign(params, base)
    assert params["a"].tolist() == [1.0, 2.0]
    assign(params, base, delta)
    assert params["a"].tolist() == [1.5, -2.0]
    assert base["a"].tolist() == [1.0, 2.0]


def test_snapshot_does_not_follow_the_weights():
    params = {"a": nn.Parameter(torch.zeros(2))}
    before = snapshot(params)
    with torch.no_grad():
        params["a"].add_(1)
    assert before["a"].tolist() == [0.0, 0.0]
    assert not before["a"].requires_grad


def test_drift_closed_form():
    delta = {"a": torch.tensor([3.0, -4.0, 0.0]), "b": torch.tensor([[12.0, MOVED / 2]])}
    size = drift(delta)
    assert size.l2 == pytest.approx(math.sqrt(9 + 16 + 144 + (MOVED / 2) ** 2), rel=1e-12)
    assert size.l1 == pytest.approx(19 + MOVED / 2, rel=1e-9)
    assert size.fraction == pytest.approx(3 / 5)


def test_drift_does_not_depend_on_the_split_into_tensors():
    change = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    whole, parts = drift({"a": change}), drift({"a": change[:300], "b": change[300:].view(70, 10)})
    assert parts.l2 == pytest.approx(whole.l2, rel=1e-14)
    assert parts.l1 == pytest.approx(whole.l1, rel=1e-14)
    assert parts.fraction == whole.fraction


def test_moved_counts_changes_above_the_threshold_only():
    assert MOVED == 6e-5
    assert drift({"a": torch.tensor([5.9e-5, -6.1e-5, 6.1e-5, 0.0])}).fraction == 0.5
