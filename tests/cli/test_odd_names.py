"""Concepts, sequences, methods and regularizers with names that are no good file names: nothing
leaves the run directory.
"""

import json
import shutil

import pandas as pd
import pytest
import safetensors.torch
import yaml
from commands import assert_one_line
from conftest import SMOKE, compose, run_directory
from wandb_records import read_run_of_wandb

from cu_runner.cli.report import main as cu_report
from cu_runner.config.compose import parse
from cu_runner.models.checkpoint_files import locate
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import ConfigError

TARGETS = ['../../up/it\'s "q"', "\u00e9t\u00e9 \u6f22\u5b57 \U0001f600 <b>&amp;</b>"]
RETAIN = ["con", ".hidden, %s {x} | ${seed} " + "long " * 60]


@pytest.fixture
def odd_tree(tmp_path):
    """A configuration tree with a sequence of odd names and a judge that knows them; its folder."""
    smoke = yaml.safe_load((config_dir() / "sequence/smoke.yaml").read_text())
    old = [*smoke["targets"], *smoke["retain"]][: len(TARGETS + RETAIN)]
    new = dict(zip(old, [*TARGETS, *(name.strip() for name in RETAIN)], strict=False))
    smoke |= {
        "name": "odd.names-1",
        "targets": TARGETS,
        "retain": [new[name] for name in smoke["retain"]],
    }
    if smoke.get("anchors"):
        smoke["anchors"] = {new[name]: anchor for name, anchor in smoke["anchors"].items()}
    text = yaml.safe_dump(smoke).replace("${seed}", "\\${seed}")  # as a user writes it
    (tmp_path / "tree/sequence").mkdir(parents=True)
    (tmp_path / "tree/sequence/odd.yaml").write_text(text)
    judge = shutil.copytree(
        locate("package:shapecanvas/weights/style_classifier"), tmp_path / "tree/judge"
    )
    config = json.loads((judge / "config.json").read_text())
    config["id2label"] = {key: new.get(name, name) for key, name in config["id2label"].items()}
    config["label2id"] = {name: int(key) for key, name in config["id2label"].items()}
    (judge / "config.json").write_text(json.dumps(config))
    # the embedded model reads 20 tokens of a prompt; at least 256 of this one
    longer = shutil.copytree(
        locate("package:shapecanvas/weights/pipeline"), tmp_path / "tree/model"
    )
    for file, key in (
        ("tokenizer/tokenizer_config.json", "model_max_length"),
        ("text_encoder/config.json", "max_position_embeddings"),
    ):
        content = json.loads((longer / file).read_text())
        (longer / file).write_text(json.dumps(content | {key: 256}))
    file = longer / "text_encoder/model.safetensors"
    weights = safetensors.torch.load_file(file)
    (name,) = [name for name in weights if name.endswith("position_embedding.weight")]
    weights[name] = weights[name].repeat(13, 1)[:256]
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    return tmp_path / "tree"


def test_a_run_of_concepts_with_odd_names_stays_in_its_directory(
    odd_tree, in_process, call_command, tmp_path
):
    overrides = [override for override in SMOKE if not override.startswith(("wandb.", "sequence="))]
    odd = (
        f"--config-dir={odd_tree}",
        "sequence=odd",
        f"evaluator.paths.style={odd_tree}/judge",
        f"model.path={odd_tree}/model",
        *overrides,
    )
    status, out, err = in_process(*odd)
    assert (err, status) == ("", 0)
    run = run_directory(out, tmp_path)
    assert run.parent == tmp_path / "outputs/runs/odd.names-1"
    assert {path.name for path in tmp_path.iterdir()} == {"tree", "outputs"}
    for path in (tmp_path / "outputs/runs").rglob("*"):
        assert path.name.isascii(), path
    assert list(pd.read_csv(run / "metrics.csv", keep_default_na=False)["concept"]) == [
        "",
        *TARGETS,
    ]
    (written,) = (tmp_path / "outputs/wandb").glob("offline-run-*")
    history = read_run_of_wandb(written)["history"].values()
    assert [row["concept"] for row in history if "concept" in row] == ["", *TARGETS]
    status, out, err = call_command(cu_report, "cu-report", run)
    assert (status, err) == (0, "")
    page = (tmp_path / "outputs/reports" / run.name / "index.html").read_text()
    assert "<b>&amp;</b>" not in page
    assert "&lt;b&gt;&amp;amp;&lt;/b&gt;" in page


@pytest.mark.parametrize("name", ["a\nb", "a\tb", "\x07", " ", "", "\u200b"])
def test_a_concept_that_no_line_can_hold(name):
    with pytest.raises(ValueError, match="blank or holds a line break or control character"):
        parse(compose("sequence=smoke", f'sequence.retain=["{name}"]')).sequence.build()


@pytest.mark.parametrize(
    "name",
    ["../up", "a/b", "a b", "a\\b", ".", "..", ".hidden", "-x", "a" * 65, "'a'", "", "a:b", "a\nb"],
)
def test_a_sequence_that_no_folder_can_be_named_after(name, tmp_path, in_process):
    (tmp_path / "tree/experiment").mkdir(parents=True)
    (tmp_path / "tree/experiment/odd.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump({"sequence": {"name": name}})
    )
    assert_one_line(
        in_process(f"--config-dir={tmp_path}/tree", *SMOKE, "experiment=odd"), 2, ["sequence.name="]
    )
    assert {path.name for path in tmp_path.iterdir()} <= {"tree"}


@pytest.mark.parametrize("name", ["../up", "a/b", "a b", "..", "a" * 65, "\u00e4"])
def test_a_regularizer_or_method_that_no_folder_can_be_named_after(name, tmp_path):
    for group in ("reg", "method"):
        shutil.rmtree(tmp_path / "tree", ignore_errors=True)
        path = tmp_path / "tree" / group / (f"{name}.yaml" if group == "method" else "odd.yaml")
        (tmp_path / "tree" / group).mkdir(parents=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        node = yaml.safe_load(
            (config_dir() / ("method/esd.yaml" if group == "method" else "reg/l2.yaml")).read_text()
        )
        path.write_text(yaml.safe_dump(node if group == "method" else {name: node["l2"]}))
        tree = f"hydra.searchpath=[file://{tmp_path}/tree]"
        chosen = f"method='{name}'" if group == "method" else "reg=odd"
        with pytest.raises(ConfigError, match=f"^{group}=.*is part of the run directory's name"):
            parse(compose(tree, "sequence=smoke", chosen))


def test_a_list_of_regularizers_that_is_too_long_for_a_name(tmp_path):
    (tmp_path / "reg").mkdir()
    node = yaml.safe_load((config_dir() / "reg/l2.yaml").read_text())["l2"]
    (tmp_path / "reg/many.yaml").write_text(
        yaml.safe_dump({f"a_rather_long_name_{index}": node for index in range(9)})
    )
    with pytest.raises(ConfigError, match="at most 124"):
        parse(compose(f"hydra.searchpath=[file://{tmp_path}]", "sequence=smoke", "reg=many"))
