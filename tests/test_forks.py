"""The forks in which tests run commands."""

import sys

from commands import run_forked


def show_modules() -> None:
    print(*sys.modules)


def test_a_fork_has_the_libraries_from_its_first_moment(tmp_path):
    loaded = run_forked("anything", cwd=tmp_path, main=show_modules).stdout.split()
    assert {"torch", "diffusers", "transformers", "pandas", "cu_runner.runner.runner"} <= {*loaded}
    assert "diffusers.models.unets.unet_2d_condition" in loaded
