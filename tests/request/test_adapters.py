"""A request as a LoRA: the steps of peft, weights of low rank, a resume, and what it goes with."""

import dataclasses

import peft
import pytest
import safetensors.torch
import torch
from conftest import compose, run_directory
from small_runs import overrides
from torch import nn

from cu_runner.config.compose import parse
from cu_runner.methods.conabl import ConAbl
from cu_runner.methods.salun import SalUn
from cu_runner.methods.uce import UCE
from cu_runner.models.low_rank import low_rank
from cu_runner.models.parameters import assign, snapshot, subtract
from cu_runner.regularizers.gate import Gate
from cu_runner.regularizers.gradproj import GradProj
from cu_runner.regularizers.l2 import L2
from cu_runner.regularizers.merge import Merge
from cu_runner.regularizers.minvar import MinVar
from cu_runner.regularizers.selft import SelFT
from cu_runner.request.adapters import Adapters
from cu_runner.request.optimizer import make_optimizer
from cu_runner.runner.training import Training, check_composition, erase

RANK, ALPHA = 3, 6.0


@pytest.fixture
def lora(settings):
    return settings(steps=3, batch_size=2, lr=1e-2, lora_rank=RANK, lora_alpha=ALPHA)


@pytest.fixture
def scope(make_scope):
    made = make_scope()
    yield made
    assign(made.params, made.base)
    for parameter in made.params.values():
        parameter.requires_grad_(False)
        parameter.grad = None


def test_steps_are_those_of_peft(scope, settings):
    """AdamW on A and B of the same start, with the same loss of the layer."""
    name, weight = next(iter(scope.params.items()))
    own = dataclasses.replace(scope, params={name: weight}, start={name: weight.detach().clone()})
    adapters = Adapters(own, RANK, ALPHA)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data.copy_(weight)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(layer), config)
    down, up = (
        theirs.get_parameter(f"base_model.model.0.lora_{side}.default.weight") for side in "AB"
    )
    assert down.shape == adapters.pairs[name][0].shape
    assert up.shape == adapters.pairs[name][1].shape
    assert down.abs().max() <= weight.shape[1] ** -0.5  # as ours are drawn
    assert adapters.pairs[name][0].abs().max() <= weight.shape[1] ** -0.5
    assert adapters.pairs[name][0].std().item() == pytest.approx(down.std().item(), rel=0.1)
    down.data.copy_(adapters.pairs[name][0])
    inputs = torch.randn(5, weight.shape[1], generator=torch.Generator().manual_seed(0))
    train = settings(lr=1e-2, optimizer="adamw", weight_decay=0.1)
    optimizers = [make_optimizer(each, train) for each in (adapters.trained, [down, up])]
    weight.requires_grad_(True)
    for _ in range(4):
        (inputs @ weight.T).square().mean().backward()
        adapters.take_gradients()
        theirs(inputs).square().mean().backward()
        torch.testing.assert_close(adapters.pairs[name][1].grad, up.grad)
        for optimizer in optimizers:
            optimizer.step()
        adapters.put()
        weight.grad = None
        optimizers[1].zero_grad()
    merged = theirs.merge_and_unload()[0].weight
    torch.testing.assert_close(weight.detach(), merged, rtol=1e-4, atol=1e-6)
    assert not torch.equal(weight.detach(), own.start[name])


def test_a_request_moves_every_matrix_by_the_rank_and_is_an_exact_lora(scope, lora):
    base = snapshot(scope.params)
    report = erase(scope, ConAbl(num_anchors=4), {"l2": L2(weight=1.0)}, lora)
    assert len(report.logs) == 3
    delta = subtract(scope.params, base)
    for change in delta.values():
        values = torch.linalg.svdvals(change.double())
        assert values[0] > 0
        assert values[RANK] < 1e-5 * values[0]
    found = low_rank(delta, base)
    assert (found.rank, found.exact) == (RANK, True)


def test_a_request_that_was_interrupted_goes_on_as_if_it_was_not(scope, lora):
    method, base = ConAbl(num_anchors=4), snapshot(scope.params)
    erase(scope, method, {}, lora)
    whole = snapshot(scope.params)
    assign(scope.params, base)
    training = Training(scope, method, {}, lora)
    training.step()
    state = training.state()
    state = {**state, "params": {name: each.clone() for name, each in state["params"].items()}}
    state["adapters"] = {
        name: tuple(matrix.clone() for matrix in pair) for name, pair in state["adapters"].items()
    }
    assign(scope.params, base)
    erase(scope, ConAbl(num_anchors=4), {}, lora, state=state)
    assert all(torch.equal(parameter, whole[name]) for name, parameter in scope.params.items())


def test_biases_stay_and_what_has_no_matrix_is_refused(make_scope, lora):
    scope = make_scope(group="xattn")
    biases = [name for name, each in scope.params.items() if each.ndim == 1]
    assert biases
    erase(scope, ConAbl(num_anchors=4, params="xattn"), {}, lora)
    assert all(torch.equal(scope.params[name], scope.base[name]) for name in biases)
    assign(scope.params, scope.base)
    few = {name: scope.params[name] for name in biases}
    with pytest.raises(ValueError, match=r"^train.lora_rank: none of the weights"):
        Adapters(dataclasses.replace(scope, params=few), RANK, ALPHA)


def test_what_chooses_single_weights_is_refused(lora):
    for method, regularizers, said in (
        (UCE(), {}, "sets the weights in closed form"),
        (SalUn(), {}, "trains a part of the weights"),
        (ConAbl(), {"gradproj": GradProj()}, "reg=gradproj acts on the gradient weight by weight"),
        (ConAbl(), {"selft": SelFT(0.1)}, "reg=selft acts on the gradient"),
        (ConAbl(), {"minvar": MinVar()}, "reg=minvar acts on the step"),
        (ConAbl(), {"gate": Gate()}, "reg=gate acts on the step"),
    ):
        check_composition(method, regularizers)
        with pytest.raises(ValueError, match=said):
            check_composition(method, regularizers, lora)
    check_composition(ConAbl(), {"l2": L2(weight=1.0), "merge": Merge()}, lora)


def test_a_run_is_one_lora_and_without_one_has_the_name_it_had(in_process, tmp_path):
    words = [*overrides("conabl", "none"), "train.lr=1e-2"]
    status, out, err = in_process(*words, "train.lora_rank=2")
    assert (status, err) == (0, "")
    run = run_directory(out, tmp_path)
    delta = safetensors.torch.load_file(run / "steps/02/delta.safetensors")
    for change in delta.values():  # of two requests, each of rank 2
        values = torch.linalg.svdvals(change.double())
        assert values[1] > 1e-4 * values[0]
        assert values[4] < 1e-5 * values[0]
    plain = parse(compose(*words))
    assert plain.signature == parse(compose(*words, "train.lora_rank=null")).signature
    assert plain.signature != parse(compose(*words, "train.lora_rank=2")).signature
    status, _, err = in_process(*words, "train.lora_alpha=2")
    assert (status, err.count("\n")) == (2, 1)
    assert "train.lora_alpha=2: belongs to a LoRA; give train.lora_rank too" in err
