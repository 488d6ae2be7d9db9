"""What closed forms share: which text is edited and preserved, sums, and that the order of requests
changes no bit.
"""

import dataclasses

import pytest
import torch

from cu_runner.concepts.requests import plan_requests
from cu_runner.concepts.sequence import Concept
from cu_runner.methods import _closed_form
from cu_runner.methods._closed_form import (
    ConceptSums,
    at_once,
    bare,
    edit_sums,
    edited_rows,
    pair_sums,
    preserved_rows,
    prompt_pairs,
    read_prompts,
    together,
)
from cu_runner.methods.dp import DP
from cu_runner.methods.mace_fusion import MACEFusion
from cu_runner.methods.oce import OCE
from cu_runner.methods.speed import SPEED
from cu_runner.methods.uce import UCE
from cu_runner.models.parameters import assign, snapshot
from cu_runner.models.prompt_encoders import ClipText
from cu_runner.regularizers.gradproj import GradProj
from cu_runner.regularizers.minvar import MinVar
from cu_runner.regularizers.nullspace import NullSpace
from cu_runner.regularizers.rece import RECE
from cu_runner.request.images import RetainSet
from cu_runner.runner.training import erase
from cu_runner.runtime.seeding import RandomSource

NAMES = RetainSet("names", prompts=8)
CAPTIONS = RetainSet("list", "shapecanvas_captions", prompts=8)
METHODS = {
    "uce": lambda **more: UCE(retain=NAMES, **more),
    "speed": lambda **more: SPEED(retain=NAMES, **more),
    "speed all": lambda **more: SPEED(retain=NAMES, tokens="all", **more),
    "oce": lambda **more: OCE(retain=NAMES, captions=CAPTIONS, **more),
    "dp": lambda **more: DP(retain=NAMES, **more),
    "mace_fusion": lambda **more: MACEFusion(retain=NAMES, **more),
}


# each solves for other sums; make test tries two
TRIED = [
    pytest.param(name, marks=[] if name in ("uce", "dp") else [pytest.mark.slow])
    for name in METHODS
]


@pytest.fixture
def four(sequence):
    """The sequence with four targets: sums of two do not tell their order."""
    added = tuple(Concept(name, "style") for name in ("river", "ember"))
    return dataclasses.replace(sequence, targets=(*sequence.targets, *added))


@pytest.fixture
def serve(make_scope, settings):
    """Returns serve(method, sequence, requests, regularizers) -> the weights after the last."""

    def run(method, sequence, requests, regularizers=None):
        scope = make_scope(group=method.params)
        base = snapshot(scope.params)
        for request in requests:
            scope = dataclasses.replace(
                scope,
                sequence=sequence,
                request=request,
                start=snapshot(scope.params),
                rng=RandomSource(0, request.index),
            )
            erase(scope, method, regularizers or {}, settings())
        found = snapshot(scope.params)
        assign(scope.params, base)
        return found

    return run


# -------------------------------------------------------------------------------------------- order
@pytest.mark.parametrize("name", TRIED)
def test_the_order_of_requests_changes_no_bit(serve, four, name):
    """Nor do weights that start elsewhere, a cold memory, and one request for all."""
    backwards = dataclasses.replace(four, targets=four.targets[::-1])
    mixed = dataclasses.replace(four, targets=tuple(four.targets[i] for i in (2, 0, 3, 1)))
    served = (
        (four, plan_requests(four, "sequential")[2:]),
        (four, plan_requests(four, "sequential")[3:]),
        (backwards, plan_requests(backwards, "sequential")[3:]),
        (mixed, plan_requests(mixed, "sequential")[3:]),
        (mixed, plan_requests(mixed, "simultaneous", last_only=True)),
    )
    first, *others = (serve(METHODS[name](cumulative=True), *each) for each in served)
    for found in others:
        assert all(torch.equal(found[key], weight) for key, weight in first.items())


ON_TOP = {
    "rece": lambda: RECE(),
    "gradproj": lambda: GradProj(apply="update"),
    "nullspace": lambda: NullSpace(),
    "minvar": lambda: MinVar(prompts=2),
}


@pytest.mark.parametrize("name", ON_TOP)
def test_neither_does_it_with_a_regularizer_of_the_step_on_top(serve, four, name):
    """It acts on the change from the untouched weights, of all targets so far."""
    weights = [
        serve(UCE(cumulative=True, retain=NAMES), each, requests, {name: ON_TOP[name]()})
        for each in (four, dataclasses.replace(four, targets=four.targets[::-1]))
        for requests in [plan_requests(each, "sequential")[2:]]
    ]
    plain = serve(UCE(cumulative=True, retain=NAMES), four, plan_requests(four, "sequential")[3:])
    assert all(torch.equal(weights[1][key], weight) for key, weight in weights[0].items())
    assert not all(torch.equal(plain[key], weight) for key, weight in weights[0].items())


@pytest.mark.parametrize("name", TRIED)
def test_one_by_one_the_order_does_matter_and_the_first_request_is_the_same(serve, sequence, name):
    backwards = dataclasses.replace(sequence, targets=sequence.targets[::-1])
    two = [
        serve(METHODS[name](cumulative=False), each, plan_requests(each, "sequential"))
        for each in (sequence, backwards)
    ]
    assert not all(torch.equal(two[0][key], weight) for key, weight in two[1].items())
    only = plan_requests(sequence, "sequential")[:1]
    single, whole = (
        serve(METHODS[name](cumulative=value), sequence, only) for value in (False, True)
    )
    for key, weight in single.items():
        if not name.startswith("speed"):  # draws neighbours by the number of the request
            torch.testing.assert_close(whole[key], weight, rtol=1e-5, atol=1e-6)
        assert whole[key].shape == weight.shape


def test_a_cumulative_request_has_all_targets_by_name_and_no_earlier_ones(make_scope, four):
    scope = make_scope()
    requests = plan_requests(four, "sequential")
    for name, parameter in scope.params.items():
        parameter.data += 1.0
        assert not torch.equal(parameter, scope.base[name])
    scope = dataclasses.replace(scope, sequence=four, request=requests[2], start={})
    whole = together(scope)
    assert [each.name for each in whole.request.targets] == ["river", "snow drift", "torch light"]
    assert whole.request.erased == whole.request.targets
    assert whole.start is scope.base
    assert whole.rng == RandomSource(0, 0)
    alone = dataclasses.replace(scope, request=plan_requests(four, "independent")[2])
    assert [each.name for each in together(alone).request.targets] == ["river"]
    chosen = at_once(scope, four.targets[::-1])
    assert chosen.request.targets == four.targets[::-1]


def test_text_is_bitwise_the_same_whatever_it_is_encoded_with(loaded_model, sequence):
    """A process that begins later encodes prompts together that another encoded apart."""
    prompts = [prompt for name in sequence.vocabulary for prompt in sequence.prompts_naming(name)]
    encoders = [ClipText(loaded_model.components, loaded_model.device) for _ in range(2)]
    whole = encoders[0](prompts).hidden
    for start, stop in ((3, 4), (50, 67), (0, len(prompts))):
        assert torch.equal(encoders[1](prompts[start:stop]).hidden, whole[start:stop])


# --------------------------------------------------------------------------------------------- text
def test_the_last_token_of_bare_names_or_all_from_the_concept_on(make_scope):
    scope = make_scope()
    model, concept = scope.model, scope.request.targets[0]  # torch light, without an anchor
    (pair,) = prompt_pairs(scope, concept, "last")
    hidden = model.encode_prompts(["torch light", ""]).hidden
    last = len(model.tokenizer("torch light").input_ids) - 2
    assert torch.equal(pair.own, hidden[:1, last])
    assert torch.equal(pair.anchor, hidden[1:, 0])  # the begin: "" has no other token
    pairs = prompt_pairs(scope, concept, "all")
    assert [pair.first for pair in pairs] == [7] * 4
    own, anchor = edited_rows(pairs, holds_context=False)
    whole, held = edited_rows(pairs, holds_context=True)
    length = len(pairs[0].own)
    assert len(own) == len(anchor) == 4 * (length - 7)
    assert torch.equal(own[: length - 7], whole[7:length])
    assert torch.equal(held[:7], whole[:7])
    assert torch.equal(held[7:length], anchor[: length - 7])


def test_an_anchor_stands_bare_in_place_of_the_concept(make_scope, sequence):
    concept = Concept("torch light", "style", anchor="river")
    scope = make_scope()
    (pair,) = prompt_pairs(scope, concept, "last")
    hidden = scope.model.encode_prompts(["river"]).hidden[0]
    assert torch.equal(pair.anchor[0], hidden[1])
    styled = dataclasses.replace(sequence, bare_prompt="{concept} image")
    assert bare(styled).training_pairs(concept) == [("torch light image", "river")]
    assert bare(styled).prompts_naming("ember") == ["ember image"]


def test_preserved_are_names_that_are_neither_targets_nor_retained(make_scope, sequence):
    scope = make_scope(request=2)
    everything = RetainSet("names", prompts=1000)
    rows = preserved_rows(scope, everything, "last")
    banned = {"torch light", "snow drift", "lava flow", "fog bank"}
    names = [name for name in sequence.vocabulary if name not in banned]
    expected = _closed_form.last_tokens(scope.model, [*names, "torch light"])  # the earlier target
    assert torch.equal(rows, expected)
    assert torch.equal(preserved_rows(together(scope), everything, "last"), expected[:-1])
    positions = preserved_rows(scope, RetainSet("names", prompts=5), "all")
    assert len(positions) == (5 + len(sequence.captions)) * scope.model.num_tokens


def test_prompts_of_a_list_that_name_what_is_unlearned_or_retained_are_left_out(
    make_scope, tmp_path
):
    file = tmp_path / "prompts.txt"
    lines = [
        "a red ball",
        "a Tree at night",
        "torch light",
        "a starling",
        "lava  flow",
        "fog bank!",
    ]
    file.write_text("\n".join(lines))
    scope = make_scope(request=2)
    read = RetainSet("file", str(file))
    assert read_prompts(scope, read) == ["a red ball", "a starling"]
    let_in = dataclasses.replace(read, names=dataclasses.replace(read.names, retained=True))
    assert read_prompts(scope, let_in) == [line for line in lines if line != "torch light"]
    file.write_text("a tree\nsnow drift")
    with pytest.raises(ValueError, match=r"^retain: every prompt of .*prompts.txt names a target"):
        read_prompts(scope, RetainSet("file", str(file)))


# --------------------------------------------------------------------------------------------- sums
def test_sums_by_hand():
    concept, anchor = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[2.0, 2.0], [1.0, 1.0]])
    sums = edit_sums(concept, anchor)
    assert sums.matrices[0].tolist() == [[1, 2], [2, 13]]
    assert sums.matrices[1].tolist() == [[1, 2 + 3], [0, -6]]  # (1, 0) (1, 2)^T + (1, -2) (0, 3)^T
    assert (sums.matrices.dtype, sums.number) == (torch.float64, 2)
    both = sums + sums
    assert (both.number, both.matrices[0, 1, 1].item()) == (4, 26)


def test_sums_are_remembered_per_model_and_prompts_while_there_is_room(
    make_scope, four, monkeypatch
):
    scope = dataclasses.replace(make_scope(), sequence=four)
    made = []

    def make(scope, concept):
        made.append(concept.name)
        return pair_sums(scope, concept, tokens="last")

    whole, sums = at_once(scope, four.targets), ConceptSums(make)
    first = sums.total(whole)
    again = sums.total(whole)
    assert made == ["torch light", "snow drift", "river", "ember"]
    assert torch.equal(first.matrices, again.matrices)
    assert first.number == 4
    longer = dataclasses.replace(whole, sequence=dataclasses.replace(four, captions=("other",)))
    sums.of(longer, four.targets[0])
    assert made[4:] == ["torch light"]
    other = dataclasses.replace(whole, model=object())
    with pytest.raises(AttributeError):  # it is asked for text
        sums.of(other, four.targets[0])
    size = first.matrices.nbytes
    monkeypatch.setattr(_closed_form, "REMEMBERED", 2 * size)
    made.clear()
    small = ConceptSums(make)
    assert torch.equal(small.total(whole).matrices, first.matrices)
    assert torch.equal(small.total(whole).matrices, first.matrices)
    assert made == ["torch light", "snow drift", "river", "ember", "river", "ember"]
