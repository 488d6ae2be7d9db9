"""Which device a run takes, and that a machine without a GPU need not import torch to know."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cu_runner.runtime import devices

ANSWERS = """
import sys
from pathlib import Path
from types import SimpleNamespace
from cu_runner.runtime import devices
devices.DEVICES = Path(sys.argv[1])
for device in ("auto", "cpu"):
    chosen = devices.choose_device(SimpleNamespace(device=device))
    print(chosen, devices.device_name(chosen).partition(" ")[0], "torch" in sys.modules)
"""


def choose(device: str) -> str:
    return devices.choose_device(SimpleNamespace(device=device))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with these files of devices, on which torch finds so many GPUs."""

    def make(files: list[str], gpus: int) -> None:
        for name in files:
            (tmp_path / name).touch()
        monkeypatch.setattr(devices, "DEVICES", tmp_path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.delenv("LOCAL_RANK", raising=False)

    return make


@pytest.mark.parametrize(
    ("files", "gpus", "chosen"),
    [
        (["nvidia0", "nvidiactl"], 2, "cuda:0"),
        (["kfd"], 1, "cuda:0"),
        (["dxg"], 1, "cuda:0"),
        (["nvidia0"], 0, "cpu"),  # CUDA_VISIBLE_DEVICES hides it
        (["nvidiactl", "null"], 0, "cpu"),
        ([], 0, "cpu"),
    ],
)
def test_auto_takes_a_gpu_where_there_is_one(machine, files, gpus, chosen):
    machine(files, gpus)
    assert choose("auto") == chosen
    assert choose("cpu") == "cpu"


def test_each_process_has_a_gpu_of_its_own(machine, monkeypatch):
    machine(["nvidia0", "nvidia1"], 2)
    assert (choose("cuda"), choose("cuda:1")) == ("cuda:0", "cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (choose("cuda"), choose("auto")) == ("cuda:1", "cuda:1")


@pytest.mark.parametrize(
    ("device", "gpus", "message"),
    [
        ("cuda", 0, "device=cuda: no CUDA device is visible; use device=cpu or device=auto"),
        ("cuda:2", 2, "device=cuda:2: there are 2 CUDA devices, counted from 0"),
    ],
)
def test_a_gpu_that_is_not_there(machine, device, gpus, message):
    machine(["nvidia0"], gpus)
    with pytest.raises(ValueError, match=f"^{message}$"):
        choose(device)


def test_without_a_gpu_torch_is_not_imported(tmp_path):
    command = [sys.executable, "-c", ANSWERS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout == "cpu cpu False\n" * 2


def test_threads_and_names():
    before = torch.get_num_threads()
    try:
        devices.limit_threads(before + 1)
        assert torch.get_num_threads() == before + 1
        devices.limit_threads(None)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert devices.device_name("cpu") == devices.device_name(torch.device("cpu"))
