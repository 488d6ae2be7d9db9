"""Every method and every regularizer through cu-run: two requests, the second again with an interruption in its middle, bitwise."""

import os
import shutil
import signal

import pandas as pd
import pytest
import safetensors.torch
from conftest import SMOKE, read_conf, run_directory

from cu_runner.runner.runner import Runner
from cu_runner.runtime.paths import config_dir
from cu_runner.store.checkpoint import FILE

# Small sizes for the settings that methods and regularizers have.
SMALL = {
    "num_anchors": 4,
    "num_images": 4,
    "num_fresh": 4,
    "retain.images": 4,
    "retain.prompts": 4,
    "sampler_steps": 2,
    "sampling_steps": 2,
    "dual.rounds": 1,
    "dual.every": 1,
    "warmup": 1,
    "interval": 1,
    "num_batches": 2,
}


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (config_dir() / group).glob("*.yaml"))


def shrink(prefix: str, options: dict) -> list[str]:
    """Overrides that make what has a size small."""
    found = []
    for key, value in SMALL.items():
        group, _, last = key.rpartition(".")
        if last in (options.get(group, {}) if group else options):
            found.append(f"{prefix}.{key}={value}")
    return found


def overrides(method: str, reg: str) -> list[str]:
    chosen = [
        f"method={method}",
        f"reg={reg}",
        *shrink("method", read_conf(f"method/{method}.yaml")),
    ]
    for name in reg.split("_"):  # a combination is a file named after its parts
        chosen += shrink(f"reg.{name}", read_conf(f"reg/{name}.yaml").get(name, {}))
    return [*(override for override in SMOKE if not override.startswith("method.")), *chosen]


def run(in_process, tmp_path, chosen):
    status, out, err = in_process(*chosen)
    assert (status, err) == (0, ""), err
    directory = run_directory(out, tmp_path)
    return directory, safetensors.torch.load_file(directory / "steps/02/delta.safetensors")


CELLS = [(method, "none") for method in names("method")] + [
    ("conabl", reg) for reg in names("reg") if reg != "none"
]


@pytest.mark.parametrize(("method", "reg"), CELLS)
def test_a_request_that_is_interrupted_ends_bitwise_the_same(
    in_process, tmp_path, monkeypatch, method, reg
):
    chosen = overrides(method, reg)
    directory, first = run(in_process, tmp_path, chosen)
    table = pd.read_csv(directory / "metrics.csv")
    assert table["request"].tolist() == [0, 1, 2]
    assert (table["drift_l2"][1:] > 0).all()
    for name in (
        "steps/02/step.json",
        "summary.json",
        "metrics.csv",
    ):  # as if killed before the commit
        (directory / name).unlink()
    shutil.rmtree(tmp_path / "outputs/cache")
    with monkeypatch.context() as patch:
        steps = iter(
            [] if method == "uce" else [None]
        )  # signalled after step 2; the closed form has only one
        patch.setattr(
            Runner,
            "_note_first_step",
            lambda runner: next(steps, 0) == 0 and os.kill(os.getpid(), signal.SIGUSR1),
        )
        status, _, err = in_process(*chosen)
    assert (status, err) == (
        128 + signal.SIGUSR1,
        "cu-run: stopped by SIGUSR1; what was done is kept. Run the same command again to go on\n",
    )
    assert (directory / FILE).is_file()
    assert not (directory / "steps/02/step.json").exists()
    again, second = run(in_process, tmp_path, chosen)
    assert again == directory
    assert (
        f"request 2 goes on after step {1 if method == 'uce' else 2}"
        in (directory / "run.log").read_text()
    )
    assert not (directory / FILE).exists()
    assert all(first[name].equal(second[name]) for name in first)
    columns = [name for name in table.columns if not name.endswith(("seconds", "memory_mb"))]
    pd.testing.assert_frame_equal(pd.read_csv(directory / "metrics.csv")[columns], table[columns])
