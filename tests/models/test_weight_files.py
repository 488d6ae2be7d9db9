"""Weight files: safetensors always, pickles only by name and never with code, and one line for
everything else.
"""

import os

import pytest
import safetensors.torch
import torch

from cu_runner.models.weight_files import load_tensors, refuse_strangers
from cu_runner.schema.errors import WeightFileError

WEIGHTS = {"head.weight": torch.arange(6.0).view(2, 3), "head.bias": torch.ones(2)}


def same(found: dict) -> bool:
    return list(found) == list(WEIGHTS) and all(
        torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS
    )


def test_safetensors_need_no_permission(tmp_path):
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.safetensors")
    assert {
        name: tensor.tolist() for name, tensor in load_tensors(tmp_path / "a.safetensors").items()
    } == {name: tensor.tolist() for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize("nest", [(), ("model_state_dict",), ("state_dict", "model_state_dict")])
def test_a_pickle_is_read_when_it_is_named(tmp_path, nest, monkeypatch):
    content = WEIGHTS
    for name in nest:
        content = {name: content, "epoch": 3}
    torch.save(content, tmp_path / "a.pth")
    assert same(load_tensors(tmp_path / "a.pth", [str(tmp_path / "a.pth")]))
    monkeypatch.chdir(tmp_path)
    assert same(
        load_tensors("a.pth", [str(tmp_path / "a.pth")])
    )  # another spelling of the same file
    for others in ([], [str(tmp_path / "b.pth")], [str(tmp_path)], ["*"]):
        with pytest.raises(
            WeightFileError, match=r"a\.pth: is no \.safetensors file.*allow_pickle=\[a\.pth\]$"
        ):
            load_tensors("a.pth", others)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_never_runs_code(tmp_path):
    torch.save({"model_state_dict": WEIGHTS, "more": Harm(tmp_path / "harm")}, tmp_path / "a.pth")
    with pytest.raises(WeightFileError, match=r"^\S+a\.pth: cannot be read as weights \(.*\)$"):
        load_tensors(tmp_path / "a.pth", [str(tmp_path / "a.pth")])
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2], "holds no weights by name but a list"),
        ({}, "holds no weights"),
        ({"a": torch.ones(1), "lr": 0.1}, "lr is no tensor"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path, content, complaint):
    torch.save(content, tmp_path / "a.bin")
    with pytest.raises(WeightFileError, match=complaint):
        load_tensors(tmp_path / "a.bin", [str(tmp_path / "a.bin")])


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(WeightFileError, match="no such file"):
        load_tensors(tmp_path / "gone.safetensors")
    safetensors.torch.save_file(WEIGHTS, tmp_path / "a.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-4])
    (tmp_path / "cut.pth").write_bytes(b"not a pickle")
    for name in ("cut.safetensors", "cut.pth"):
        with pytest.raises(WeightFileError, match=rf"{name}: cannot be read as weights") as caught:
            load_tensors(tmp_path / name, [str(tmp_path / name)])
        assert "\n" not in str(caught.value)


def test_names_that_no_layer_takes():
    refuse_strangers("place", ["layer.num_batches_tracked", "embeddings.position_ids"])
    with pytest.raises(
        WeightFileError, match=r"^place: holds b.weight, which no layer takes, and 1 more; the"
    ):
        refuse_strangers("place", ["a.num_batches_tracked", "b.weight", "c.weight"])
