"""The wheel holds the configuration, the weights and the lists, and its cu-run works from another
directory.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import environment
from conftest import SMOKE, run_directory

ROOT = Path(__file__).parent.parent


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture(scope="module")
def wheel(shared):
    """The built wheel."""

    def make(target: Path) -> str:
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
        build += ["--outdir", str(target), str(ROOT)]
        done = subprocess.run(build, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        (path,) = target.glob("cu_runner-*.whl")
        return str(path)

    return Path(shared("wheel", make)[0])


def test_the_wheel_holds_everything_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    local = {
        f"cu_runner/conf/{name}"
        for name in files_below(ROOT / "conf")
        if not name.startswith("local/")
    }
    assert local <= names
    assert {f"cu_runner/{name}" for name in files_below(ROOT / "cu_runner")} <= names
    for name in (
        "cu_runner/shapecanvas/weights/pipeline/unet/diffusion_pytorch_model.safetensors",
        "cu_runner/shapecanvas/weights/flow/transformer/diffusion_pytorch_model.safetensors",
        "cu_runner/shapecanvas/weights/style_classifier/model.safetensors",
        "cu_runner/concepts/lists/painting_styles.txt",
        "cu_runner/conf/config.yaml",
        "hydra_plugins/cu_runner_jobs/__init__.py",
    ):
        assert name in names
    assert all(name.startswith(("cu_runner/", "hydra_plugins/cu_runner_jobs/")) for name in names)
    assert "hydra_plugins/__init__.py" not in names  # it would hide the plugins of others
    assert not any("/local/" in name or name.endswith((".pyc", ".tmp", ".pt")) for name in names)
    assert wheel.stat().st_size < 72e6


def test_the_installed_package_runs_from_another_directory(wheel, tmp_path):
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
        str(wheel),
    ]
    subprocess.run(install, check=True, timeout=300, capture_output=True)
    env = environment(PYTHONPATH=str(target))
    where = [
        sys.executable,
        "-c",
        (
            "import cu_runner, cu_runner.cli.help; print(cu_runner.__file__); "
            "print(cu_runner.runtime.paths.config_dir())"
        ),
    ]
    found = subprocess.run(
        where, cwd=elsewhere, env=env, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert found == [str(target / "cu_runner/__init__.py"), str(target / "cu_runner/conf")]
    assert os.access(target / "bin/cu-run", os.X_OK)
    done = subprocess.run(
        [sys.executable, str(target / "bin/cu-run"), *SMOKE],
        cwd=elsewhere,
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert (run_directory(done.stdout, elsewhere) / "summary.json").exists()
    assert {path.name for path in elsewhere.iterdir()} == {"outputs"}
