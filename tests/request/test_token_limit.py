"""Concepts beyond the tokens that the model reads are refused by name, wherever they are used."""

import dataclasses

import pytest
from conftest import read_conf

from cu_runner.concepts.sequence_file import make_sequence
from cu_runner.methods.uce import UCE
from cu_runner.regularizers.gradproj import GradProj
from cu_runner.regularizers.nullspace import NullSpace
from cu_runner.request.text_subspace import concept_vectors, prompt_vectors
from cu_runner.request.token_limit import check_prompts

LONG = "a fish and a cup and a fish and a cup and a fish and a cup and a fish and a cup and a"


def sequence_with(**changes):
    return make_sequence(**read_conf("sequence/smoke.yaml") | changes)


def refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_the_span_of_a_concept_is_within_the_tokens_that_are_read(model):
    assert model.num_tokens == 20
    span = model.prompts.parts[0].find("torch light", f"{LONG} torch light")
    assert span.start > 19
    refused(
        lambda: model.token_span("torch light", f"{LONG} torch light"),
        r"^'torch light' lies beyond the 20 tokens that the model reads of the prompt 'a fish "
        r"and .*torch light'; shorten the prompt, or name it earlier$",
    )
    own = model.prompts.parts[0].find("torch light", "torch light")
    room = 19 - (own.stop - own.start) - 1  # tokens before it, so that it ends as the last one
    words = " ".join(["tree"] * room)
    assert len(model.tokenizer(words).input_ids) == room + 2
    assert model.token_span("torch light", f"{words} torch light").stop == 19
    refused(lambda: model.token_span("torch light", f"tree {words} torch light"), "lies beyond")
    refused(
        lambda: model.token_span(LONG, LONG),
        rf"^'{LONG}' is a name of \d\d tokens, and the model reads 18 of a prompt; shorten it$",
    )
    assert model.token_span(LONG, LONG, partly=True) == slice(1, 19)  # as of auxiliary names


@pytest.mark.parametrize("tokens", ["own", "last"])
def test_vectors_of_a_name_that_is_cut_off_are_refused(model, tokens):
    context = f"{LONG} {{concept}}"
    refused(lambda: concept_vectors(model, ["tree", "star"], context, tokens), "lies beyond the 20")
    refused(lambda: prompt_vectors(model, ["tree", "star"], context), "lies beyond the 20")


@pytest.mark.parametrize(
    "part",
    [
        lambda: GradProj(contexts=(f"{LONG} {{concept}}",)),
        lambda: GradProj(contexts=(f"{LONG} {{concept}}",), tokens="all"),
        lambda: NullSpace(contexts=(f"{LONG} {{concept}}",)),
    ],
)
def test_regularizers_refuse_it(make_scope, part):
    refused(lambda: part().begin_request(make_scope(), UCE()), "lies beyond the 20 tokens")


def test_uce_refuses_it(make_scope):
    sequence = sequence_with(target_prompt=f"{LONG} {{concept}} {{caption}}")
    scope = dataclasses.replace(make_scope(), sequence=sequence)
    refused(lambda: UCE().batch(scope, 1), "'torch light' lies beyond the 20 tokens")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_prompt": f"{LONG} {{concept}} {{caption}}"}, "^'torch light' lies beyond the"),
        ({"prompt": f"{LONG} {{object}} in {{style}}"}, "^'torch light' lies beyond the 20"),
        ({"prompt": f"in {{style}} {LONG} {{object}}"}, "^'tree' lies beyond the 20"),
        ({"retain": [LONG]}, f"^'{LONG}' is a name of"),
        (
            {
                "anchors": {"torch light": "gold dot", "snow drift": "gold dot"},
                "anchor_prompt": f"{LONG} {{anchor}}",
            },
            "^'gold dot' lies beyond the 20 tokens",
        ),
        (
            {"cross_retain": ["tree", LONG], "prompt": "{style} {object}"},
            f"^'{LONG}' is a name of",
        ),
        (
            {"target_prompt": "{caption}, {concept}", "captions": [LONG]},
            "^'torch light' lies beyond the 20 tokens",
        ),
    ],
)
def test_a_run_refuses_it_before_anything_is_trained(model, changes, message):
    check_prompts(model, sequence_with())
    refused(lambda: check_prompts(model, sequence_with(**changes)), message)


def test_prompts_of_a_target_and_its_anchor_that_are_read_alike(model):
    """Both are cut before their names, or the anchor is the target in capitals."""
    sequence = sequence_with()
    anchors = {target.name: target.name.upper() for target in sequence.targets}
    alike = sequence_with(
        anchors=anchors, target_prompt="{concept} {caption}", anchor_prompt="{anchor} {caption}"
    )
    refused(
        lambda: check_prompts(model, alike),
        "^the model reads the prompt of torch light and that of its anchor alike, .*TORCH LIGHT",
    )
    # the name is not a run of whole tokens of its prompt, so that only the texts can be compared
    cut = dataclasses.replace(
        sequence, target_prompt=(f"{LONG} {{concept}}s",), anchor_prompt=f"{LONG} nothing"
    )
    refused(lambda: check_prompts(model, cut), "alike, so that nothing can be unlearned")


def test_a_prompt_that_is_cut_is_named_once(model, caplog):
    texts = [f"{LONG} {name}" for name in ("one", "two", "three")]
    for _ in range(2):
        model.encode_prompts([*texts, "a tree"])
    model.encode_prompts([f"{LONG} four"])
    first, second = caplog.messages
    assert first == (
        f"   prompt '{texts[0]}' has 46 tokens and is cut to the 20 that the model reads; "
        "so are 2 more"
    )
    assert second.startswith(f"   prompt '{LONG} four' has ")
