"""Overrides that make a run of any method and regularizer small."""

import safetensors.torch
from conftest import SMOKE, read_conf, run_directory

from cu_runner.runtime.paths import config_dir

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
