"""The study of positions: groups, donors, what is replaced, what is told apart, by hand."""

import pandas as pd
import positions
import pytest
import torch
from conftest import SMOKE
from test_studies import call, script  # noqa: F401, fixtures

from cu_runner.models.text import Text


def test_groups_of_a_prompt_hold_every_position_once(model):
    prompt = "a ball image in torch light style"
    groups = positions.groups_of(model, "torch light", prompt)
    # begin, a ball image in, torch, light, style, end and padding
    assert groups["begin"] == [0]
    assert groups["before"] == [1, 2, 3, 4]
    assert groups["first token"] == [5]
    assert groups["other tokens"] == [6]
    assert groups["after"] == [7]
    assert groups["end and padding"] == list(range(8, model.num_tokens))
    assert groups["all"] == list(range(model.num_tokens))
    last = positions.groups_of(model, "blaze", "a ball in the style of blaze")
    assert set(groups) - set(last) == {"other tokens", "after"}


def test_a_donor_has_as_many_tokens(model, sequence):
    concept = sequence.targets[0]
    named = {name: type(concept)(name, "style") for name in ("blaze", "river", "torch light")}
    found = positions.donors(model, tuple(named.values()))
    assert {name: donor.name for name, donor in found.items()} == {
        "blaze": "river",
        "river": "blaze",
    }


def test_only_the_places_are_replaced():
    own, other = torch.zeros(4, 2), torch.ones(4, 2)
    mixed = positions.patched(own, other, [1, 3])
    assert mixed[:, 0].tolist() == [0, 1, 0, 1]
    assert own.sum() == 0


def test_the_model_reads_other_texts_for_a_while(model):
    text = Text(torch.full((1, model.num_tokens, 512), 7.0))
    before = model.encode_prompts(["a ball", "a box"]).hidden
    with positions.saying(model, {"a box": text}):
        inside = model.encode_prompts(["a ball", "a box"]).hidden
    assert torch.equal(inside[0], before[0])
    assert (inside[1] == 7).all()
    assert torch.equal(model.encode_prompts(["a box"]).hidden[0], before[1])


def test_the_own_token_tells_apart_and_the_begin_does_not(model, sequence):
    """The begin is the same in every prompt: whoever hears it of one hears it of all."""
    own = positions.told_apart(model, sequence, "first token")
    begin = positions.told_apart(model, sequence, "begin")
    assert len(own) == len(begin) == len(sequence.targets)
    assert min(own) > 10 * max(begin)
    assert max(begin) < 5


@pytest.mark.slow
def test_from_end_to_end(call, tmp_path):  # noqa: F811
    status, _, err = call("positions", *SMOKE, "--output", "found")
    assert (status, err) == (0, "")
    table = pd.read_csv(tmp_path / "found/positions.csv").set_index("positions")
    assert list(table.index) == list(positions.GROUPS)
    assert (table["images"] > 0).all()
    assert table[["own", "donor", "cross kept"]].stack().between(0, 100).all()
    text = (tmp_path / "found/positions.md").read_text()
    assert "sequence=smoke" in text
