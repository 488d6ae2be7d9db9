"""The notebooks of examples/ run from their first cell to their last, with less to do."""

import json
from pathlib import Path

import diffusers
import nbformat
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = {"train.steps": 2, "train.batch_size": 2, "method.num_anchors": 2, "anchors.steps": 2}
NAMES = {"reg.gradproj.contexts": ["{concept}"]}  # fewer prompts of names
SMALL = {  # what stands in the cell of parameters, by notebook
    "first_steps": {
        "SEQUENCE": "shapecanvas_style",
        "SETTINGS": FEW | NAMES,
        "EVALUATION": {
            "sequence.seeds": [1],
            "sequence.retain": ["moss"],
            "sequence.cross_retain": ["fish"],
            "eval.steps": 2,
        },
    },
    "own_method": {
        "SEQUENCE, CONCEPT": ("smoke", "snow drift"),
        "SETTINGS": {"train.steps": 2, "train.batch_size": 2, "anchors.steps": 2},
    },
    "stable_diffusion": {
        "LOADING": {"sampler.steps": 2},
        "SETTINGS": {"train.steps": 1, "train.batch_size": 1, "method.num_anchors": 1},
    },
}


def notebook(name: str, changed: dict) -> nbformat.NotebookNode:
    """A notebook whose parameters are followed by others."""
    found = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    [place] = [
        number
        for number, cell in enumerate(found.cells)
        if "parameters" in cell.metadata.get("tags", ())
    ]
    lines = "\n".join(f"{key} = {value!r}" for key, value in changed.items())
    assert all(f"{key} = " in found.cells[place].source for key in changed)
    found.cells.insert(place + 1, nbformat.v4.new_code_cell(lines))
    return found


@pytest.fixture
def changed(pipelines, tmp_path):
    """Returns changed(name) -> the parameters of a notebook that make it small."""

    def get(name: str) -> dict:
        own = dict(SMALL[name])
        if name == "stable_diffusion":
            own["MODEL"] = str(pipelines["sd15"])
        if name != "own_method":
            own["OUTPUT"] = str(tmp_path / "saved")
        return own

    return get


def test_there_are_the_notebooks_that_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.ipynb")} == set(SMALL)
    for path in EXAMPLES.glob("*.ipynb"):  # results are for whoever runs it
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not [cell for cell in cells if cell.get("outputs")]


@pytest.mark.parametrize("name", sorted(SMALL))
def test_every_cell_runs(name, changed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "__main__"}
    for cell in notebook(name, changed(name)).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, name, "exec"), names)
    assert names["edited"].drift.l2 > 0
    if name != "own_method":
        assert diffusers.DiffusionPipeline.from_pretrained(tmp_path / "saved")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_kernel_runs_it_with_a_bar(name, changed, tmp_path):
    from nbclient import NotebookClient

    found = notebook(name, changed(name))
    NotebookClient(found, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = json.dumps([cell.get("outputs", []) for cell in found.cells])
    assert "image/png" in shown
    assert "unlearn " in shown  # the bar's label
