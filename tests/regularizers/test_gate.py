"""Gates: shut ones change no bit, an open one adds its values, a request moves its own alone."""

import copy
import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMOKE, run_directory
from doubles import Pull
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from cu_runner.cli import evaluate
from cu_runner.concepts.requests import plan_requests
from cu_runner.methods.base import Method
from cu_runner.methods.conabl import ConAbl
from cu_runner.methods.forward_kl import ForwardKL
from cu_runner.methods.salun import SalUn
from cu_runner.methods.uce import UCE
from cu_runner.models.gates import GatedLinear, add_gates, gate_weights, load_gates
from cu_runner.models.parameters import select_parameters, snapshot, subtract
from cu_runner.recovery.relearning import trainable
from cu_runner.recovery.residual import Residual
from cu_runner.regularizers.gate import Gate
from cu_runner.regularizers.l2 import L2
from cu_runner.regularizers.merge import Merge
from cu_runner.regularizers.minvar import MinVar
from cu_runner.request.scope import Scope
from cu_runner.runner import measure
from cu_runner.runner.before import Before
from cu_runner.runner.training import check_composition, erase
from cu_runner.runtime.devices import device_name
from cu_runner.runtime.seeding import RandomSource
from cu_runner.schema.errors import ModelError, WeightFileError

PAGE = Path(__file__).parents[2] / "docs/gate.md"


@pytest.fixture
def gated(model):
    """A model of its own: gates cannot be taken from the one that tests share."""
    return copy.deepcopy(model)


@pytest.fixture
def begin(gated, sequence, settings):
    """Returns make(request=1, method=ConAbl(), **train) -> a scope, with the gates' weights."""

    def make(request: int = 1, method: Method = ConAbl(), **train: object) -> Scope:  # noqa: B008
        params = Gate().own_weights(gated, sequence, method)
        latents = torch.randn(64, *gated.latent_shape, generator=torch.Generator().manual_seed(1))
        return Scope(
            model=gated,
            sequence=sequence,
            request=plan_requests(sequence, "sequential")[request - 1],
            params=params,
            start=snapshot(params),
            base={name: torch.zeros_like(weight) for name, weight in params.items()},
            rng=RandomSource(0, request),
            train=settings(**train),
            anchors=lambda prompts, number, mirrored=False: latents[:number],
        )

    return make


def noise_of(model, prompt: str) -> torch.Tensor:
    noisy = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.predict(noisy, torch.tensor([500]), model.encode_prompts([prompt]))


# ---------------------------------------------------------------------------------- the layer
def test_a_gate_adds_its_values_where_it_hears_more_than_half():
    """x = (1, 1): the first gate hears 0.6 and adds 0.6 (10, 20), the second hears 0.4."""
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.eye(2)
    layer.__class__ = GatedLinear
    layer.gate_directions = nn.Parameter(torch.tensor([[0.6, 0.0], [0.0, 0.4], [0.0, 0.0]]))
    layer.gate_values = nn.Parameter(torch.tensor([[10.0, 1.0, 7.0], [20.0, 1.0, 7.0]]))
    torch.testing.assert_close(layer(torch.ones(1, 2)), torch.tensor([[7.0, 13.0]]))


def test_new_gates_change_no_bit(gated):
    prompt = "a ball in the style of blaze"
    before, names = noise_of(gated, prompt), set(dict(gated.denoiser.named_parameters()))
    added = add_gates(gated.denoiser, 5)
    assert torch.equal(noise_of(gated, prompt), before)
    assert added.keys() == set(dict(gated.denoiser.named_parameters())) - names
    assert add_gates(gated.denoiser, 5).keys() == added.keys()
    assert not any(name in select_parameters(gated.denoiser, "full") for name in added)
    with pytest.raises(ModelError, match=r"^gates: the denoiser has 5 of them, not 6$"):
        add_gates(gated.denoiser, 6)


def test_what_gates_cannot_be_put_before_is_refused(gated):
    with pytest.raises(ModelError, match="Sequential is no known denoiser"):
        add_gates(nn.Sequential(nn.Linear(2, 2)), 1)
    attention = next(
        module for name, module in gated.denoiser.named_modules() if name.endswith("attn2")
    )
    attention.to_k = nn.Sequential(attention.to_k)
    with pytest.raises(ModelError, match="not plain linear"):
        add_gates(gated.denoiser, 1)


# ---------------------------------------------------------------------------------- a request
def test_other_texts_are_as_they_were_to_the_last_bit(begin, gated, settings):
    """Also of names that no gate was told of; the target's are not."""
    prompts = [
        f"a {thing} in the style of {name}"
        for thing in ("ball", "moon")
        for name in ("lava flow", "garnet", "snow drift", "ember", "dune")
    ]
    target = "a ball in the style of torch light"
    before = {prompt: noise_of(gated, prompt) for prompt in [*prompts, "", target]}
    scope = begin(steps=3, lr=0.1)
    erase(scope, ConAbl(num_anchors=4), {"gate": Gate()}, scope.train)
    for prompt in [*prompts, ""]:
        assert torch.equal(noise_of(gated, prompt), before[prompt]), prompt
    assert not torch.equal(noise_of(gated, target), before[target])


def test_a_request_moves_its_own_gate_alone(begin, gated, settings):
    first = begin(steps=2, lr=0.1)
    erase(first, Pull(), {"gate": Gate()}, first.train)
    between = snapshot(gate_weights(gated.denoiser))
    second = begin(request=2, steps=2, lr=0.1)
    erase(second, Pull(), {"gate": Gate()}, second.train)
    for name, change in subtract(second.params, between).items():
        own, other = (
            (change[1], change[0]) if "directions" in name else (change[:, 1], change[:, 0])
        )
        assert own.norm() > 0, name
        assert other.norm() == 0, name


def test_values_are_moved_by_the_optimiser_of_train(begin, gated, settings):
    """v = a / k with a a leaf of its own, one step of Adam by hand; the directions stay."""
    scope, regularizer = begin(steps=1, lr=0.2, optimizer="adam"), Gate(threshold=0.8, settle=1.0)
    erase(scope, Pull(), {"gate": regularizer}, scope.train)
    (target,), weights = regularizer._T, dict(gated.denoiser.named_parameters())
    for name, found in scope.params.items():
        if name.endswith("directions"):
            torch.testing.assert_close(found[0], 0.5 / 0.8 * regularizer._D[0])
            continue
        weight = weights[name.replace("gate_values", "weight")]
        a = torch.zeros(len(weight), requires_grad=True)
        by_hand = torch.optim.Adam([a], lr=0.2 * (weight @ target).square().mean().sqrt().item())
        (0.5 * (a / (0.5 / 0.8) - 1).square().sum()).backward()
        by_hand.step()
        torch.testing.assert_close(found[:, 0], a.detach() / (0.5 / 0.8), rtol=1e-4, atol=1e-7)


def test_where_it_is_open_it_does_what_minvar_does(begin, gated, make_scope, settings):
    """A step of sgd: what keys and values of the target's own token gain, but for what minvar hears
    of the rest.
    """
    gate, minvar = Gate(settle=1.0), MinVar(settle=1.0)
    scope = begin(steps=1, lr=0.1, optimizer="sgd", weight_decay=0.0)
    erase(scope, ConAbl(num_anchors=4), {"gate": gate}, scope.train)
    linear = dataclasses.replace(make_scope(), train=scope.train)
    erase(linear, ConAbl(num_anchors=4), {"minvar": minvar}, linear.train)
    changes = subtract(linear.params, linear.base)
    gains = torch.cat([change @ minvar._T[0] for change in changes.values()])
    values = [scope.params[name.replace(".weight", ".gate_values")] for name in changes]
    assert torch.cosine_similarity(gains, torch.cat([each[:, 0] for each in values]), dim=0) > 0.99


def test_every_other_word_of_a_target_has_a_gate(begin, gated, tmp_path, monkeypatch):
    """Those of the earlier target and of other names are left alone, of retained ones not read."""
    (tmp_path / "words.csv").write_text(
        "concept,words\ntorch light,barred fiery\ntorch light,campfire\nsnow drift,woven icy\n"
        "ember,striped fiery\nlava flow,dotted fiery\n"
    )
    method, read = ConAbl(num_anchors=4, also_called=str(tmp_path / "words.csv")), []
    encode = gated.encode_prompts
    monkeypatch.setattr(
        gated, "encode_prompts", lambda prompts: read.extend(prompts) or encode(prompts)
    )
    scope, gate = begin(2, method), Gate()
    record = gate.begin_request(scope, method)
    assert [entry["target"] for entry in record["targets"]] == ["snow drift", "woven icy"]
    (directions,) = (weight for name, weight in scope.params.items() if "directions" in name)
    assert [row.any().item() for row in directions] == [False, False, False, True, True]
    said = " ".join(read)
    assert "striped fiery" in said
    assert "campfire" in said
    assert "dotted fiery" not in said  # retained


def test_it_records_how_far_the_target_is_from_the_rest(begin):
    (entry,) = Gate(threshold=0.4).begin_request(begin(), ConAbl(num_anchors=4))["targets"]
    assert entry["threshold"] == 0.4
    assert entry["most_of_unknown_names"] < 0.5 < entry["least_of_target"] <= 1


def test_a_word_that_is_another_concepts_is_not_left_alone(begin, tmp_path):
    """Of snow drift, also called as the earlier target is: the gate of that word hears it."""
    (tmp_path / "words.csv").write_text("concept,words\nsnow drift,torch light\n" * 2)
    method = ConAbl(num_anchors=4, also_called=str(tmp_path / "words.csv"))
    record = Gate().begin_request(begin(2, method), method)
    assert [entry["target"] for entry in record["targets"]] == ["snow drift", "torch light"]
    assert all(entry["most_of_unknown_names"] < 0.5 for entry in record["targets"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_in_a_unet_of_half_precision(gated, dtype, tmp_path):
    save_file(add_gates(gated.denoiser, 2), tmp_path / "delta.safetensors")
    plain = copy.deepcopy(gated.denoiser).to(dtype)
    load_gates(plain, str(tmp_path / "delta.safetensors"))
    text = torch.zeros(1, 4, 512, dtype=dtype)
    with torch.no_grad():
        noisy = torch.zeros(1, *gated.latent_shape, dtype=dtype)
        assert plain(noisy, 5, text).sample.dtype == dtype


def test_it_says_when_a_gate_stays_shut(begin, caplog):
    Gate(threshold=0.999).begin_request(begin(), ConAbl(num_anchors=4))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("reg.gate.threshold=0.999: the gate of torch light stays shut in some")


@pytest.mark.parametrize(
    ("method", "others", "said"),
    [
        (UCE(), {}, "the method sets the weights themselves; choose a method that trains"),
        (ConAbl(params="v_xattn"), {}, r"method\.params=v_xattn trains other weights; choose"),
        (ForwardKL(cap=2.0, ascent_stop=1.0), {}, r"choose method\.ascent_stop=null with a method"),
        (ConAbl(), {"l2": L2(1.0)}, "reg=gate has weights of its own, and reg=l2 acts on those"),
        (SalUn(num_images=4), {}, "the method's mask of the optimiser's step would be lost"),
        (ConAbl(), {"merge": Merge()}, r"reg=gate has weights of its own, and reg=merge"),
    ],
)
def test_what_does_not_go_with_gates_is_refused(method, others, said):
    with pytest.raises(ValueError, match=said):
        check_composition(method, {"gate": Gate(), **others})


# ---------------------------------------------------------------------------------- files
def test_a_file_of_other_weights_is_refused(gated, tmp_path):
    save_file({"conv_in.weight": torch.zeros(2)}, tmp_path / "delta.safetensors")
    with pytest.raises(ModelError, match=r"delta\.safetensors: holds no gates; give"):
        load_gates(gated.denoiser, str(tmp_path / "delta.safetensors"))
    save_file({"attn2.to_k.gate_directions": torch.zeros(2, 512)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match=r"other\.safetensors: holds gates of another model"):
        load_gates(gated.denoiser, str(tmp_path / "other.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:99])
    with pytest.raises(WeightFileError, match=r"cut\.safetensors: cannot be read as weights \("):
        load_gates(gated.denoiser, str(tmp_path / "cut.safetensors"))


# ---------------------------------------------------------------------------------- commands
def test_a_run_its_weights_in_plain_diffusers_and_its_second_evaluation(
    in_process, call_command, filled_cache, tmp_path, model, gated
):
    status, out, err = in_process(*SMOKE, "reg=gate", "train.lr=0.1")
    assert (status, err) == (0, "")
    run = run_directory(out, tmp_path)
    step = json.loads((run / "steps/02/step.json").read_text())
    (entry,) = step["training"]["regularizers"]["gate"]["targets"]
    assert entry["target"] == "snow drift"
    load_gates(gated.denoiser, str(run / "steps/02/delta.safetensors"))
    size = sum(weight.double().square().sum() for weight in gate_weights(gated.denoiser).values())
    assert size.sqrt().item() == pytest.approx(step["row"]["drift_l2"], rel=1e-5)
    prompt = "a ball in the style of snow drift"
    wanted = noise_of(gated, prompt)
    assert not torch.equal(wanted, noise_of(model, prompt))
    code = re.search(r"```python\n(def hook_gates.*?)```", PAGE.read_text(), re.DOTALL)[1]
    exec(code, found := {})  # what the page gives to those who have no cu_runner
    plain = copy.deepcopy(model)
    found["hook_gates"](plain.denoiser, str(run / "steps/02/delta.safetensors"))
    torch.testing.assert_close(noise_of(plain, prompt), wanted, rtol=1e-4, atol=1e-5)
    status, out, err = call_command(evaluate.main, "cu-eval", run, "eval.steps=1")
    assert (status, err) == (0, "")


def test_what_is_read_as_before_is_not_drawn_again(in_process, filled_cache, tmp_path, monkeypatch):
    """At the second request only its target is; all rows are those of a run that draws all."""
    drawn = []
    draw = measure.evaluate

    def evaluate_these(model, judge, sequence, concepts, step, settings):
        drawn.append((step, [concept.name for concept in concepts]))
        return draw(model, judge, sequence, concepts, step, settings)

    monkeypatch.setattr(measure, "evaluate", evaluate_these)
    words = [*SMOKE, "reg=gate", "train.lr=0.1"]
    run = run_directory(in_process(*words)[1], tmp_path)
    assert [names for step, names in drawn if step] == [["torch light"], ["snow drift"]]
    everything = lambda before, model, sequence, concepts: concepts  # noqa: E731
    monkeypatch.setattr(Before, "changed", everything)
    whole = run_directory(in_process(*words, "paths.outputs=whole")[1], tmp_path)
    for step in ("steps/01", "steps/02"):
        ours, all_drawn = (pd.read_csv(each / step / "predictions.csv") for each in (run, whole))
        exact = [name for name in ours if not name.startswith("score")]
        pd.testing.assert_frame_equal(ours[exact], all_drawn[exact])
        scores = [name for name in ours if name.startswith("score")]
        pd.testing.assert_frame_equal(ours[scores], all_drawn[scores], atol=1e-4, rtol=0)
        grids = [np.asarray(Image.open(each / step / "grid.png"), int) for each in (run, whole)]
        assert np.abs(grids[0] - grids[1]).max() <= 1  # batches of other sizes round otherwise


def test_another_device_or_code_draws_everything_again(gated, tmp_path):
    """What it would take over from the step before is not its own."""
    code = SimpleNamespace(sha256="a")
    (tmp_path / "predictions.csv").write_text(
        "step,prompt,style,object,seed,predicted_style,score_style\n0,a tree,blaze,tree,1,blaze,1\n"
    )
    made = SimpleNamespace(code=code, device=device_name("cpu"))
    assert Before.of(gated, tmp_path, made, code).read.keys() == {"", "a tree"}
    assert Before.of(gated, tmp_path, made, SimpleNamespace(sha256="b")) is None
    made.device = "NVIDIA H200"
    assert Before.of(gated, tmp_path, made, code) is None


def test_relearning_trains_what_the_gates_stand_before_and_puts_it_back(begin, gated):
    weights = select_parameters(gated.denoiser, "kv_xattn")
    before, lab = snapshot(weights), SimpleNamespace(params=begin().params, model=gated)
    with trainable(lab) as trained:
        assert [id(weight) for weight in trained] == [id(weight) for weight in weights.values()]
        for weight in trained:
            assert weight.requires_grad
            weight.data += 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    assert Residual().measure(lab, []) == []  # gates move no weight: there is nothing to say


def test_bf16_trains_gates_in_fp32_also_where_probes_follow(in_process, filled_cache, tmp_path):
    """The directions, which layers share, keep their type."""
    probe = [
        "recovery=relearning",
        "recovery.relearning.steps=[0,1]",
        "recovery.relearning.images=1",
    ]
    words = [*SMOKE, "reg=gate", "train.lr=0.1", "model.precision=bf16", *probe]
    status, out, err = in_process(*words, "recovery.relearning.examples=2")
    assert (status, err) == (0, "")
    delta = load_file(run_directory(out, tmp_path) / "steps/02/delta.safetensors")
    assert {tensor.dtype for tensor in delta.values()} == {torch.float32}
