"""Bad input of every kind: one line on stderr that names the value and what is allowed, a non-zero
exit, nothing lost.
"""

import json
import os
import shutil

import diffusers
import pytest
import torch
from commands import assert_one_line, run_forked
from conftest import SMOKE

from cu_runner.cli.console import say
from cu_runner.cli.failures import explain_error, tell

CONFIGURATION = [
    (["method=nope"], ["method=nope", "conabl"]),
    (["reg=nope"], ["reg=nope", "gradproj", "l1", "l2", "none"]),
    (["reg=[l2,nope]"], ["reg=nope", "gradproj", "l1", "l2"]),
    (["sequence=nope"], ["sequence=nope", "shapecanvas_style", "smoke"]),
    (["model=nope"], ["model=nope", "shapecanvas"]),
    (["experiment=nope"], ["experiment=nope"]),
    (["hydra/launcher=nope"], ["hydra/launcher=nope", "local_processes, slurm"]),
    (["train.lrr=1"], ["train.lrr", "lr", "steps", "batch_size"]),
    (["+train.lrr=1"], ["train.lrr"]),
    (["nokey=1"], ["nokey"]),
    ([f"~{'x' * 400}"], ["unknown key xxxx", "400 characters"]),
    (["+nokey=1"], ["nokey", "seed", "train", "eval"]),
    (["method.nokey=1"], ["method.nokey", "num_anchors", "teacher"]),
    (["+method.nokey=1"], ["method.nokey", "num_anchors", "teacher"]),
    (["reg=gradproj", "+reg.gradproj.auxiliary.nokey=1"], ["reg.gradproj.auxiliary.nokey"]),
    (["train.steps=many"], ["train.steps='many'", "integer"]),
    (["train.steps=1.5"], ["train.steps=1.5", "integer"]),
    (["train.betas=[0.9]"], ["train.betas"]),
    (["train.betas=[0.9,1]"], ["train.betas", "1", "less than 1"]),
    (["seed=-1"], ["seed=-1", "greater than or equal to 0"]),
    (["train.lr=-1"], ["train.lr=-1", "greater than 0"]),
    (["train.lr=0"], ["train.lr=0", "greater than 0"]),
    (["train.lr=nan"], ["train.lr=nan", "finite"]),
    (["train.weight_decay=inf"], ["train.weight_decay=inf", "finite"]),
    (["eval.guidance=0.5"], ["eval.guidance=0.5", "greater than or equal to 1"]),
    (["eval.batch_size=0"], ["eval.batch_size=0", "greater than 0"]),
    (["method.loss=both"], ["method.loss='both'", "'model', 'output' or 'noise'"]),
    (["method.num_anchors=-4"], ["method.num_anchors=-4", "greater than 0"]),
    (
        ["method.params=everything"],
        ["method.params='everything'", "'non_xattn', 'full', 'non_xattn_layers' or 'layers'"],
    ),
    (["reg=l2", "reg.l2.weight=-1"], ["reg.l2.weight=-1", "greater than or equal to 0"]),
    (["reg=l2", "reg.l2.weight=nan"], ["reg.l2.weight=nan", "finite"]),
    (["reg=l2", "reg.l2.anchor=next"], ["reg.l2.anchor='next'", "'previous' or 'base'"]),
    (
        ["reg=gradproj", "reg.gradproj.auxiliary.source=web"],
        ["reg.gradproj.auxiliary.source='web'", "'file' or 'llm'"],
    ),
    (
        ["reg=gradproj", "reg.gradproj.threshold=2"],
        ["reg.gradproj.threshold=2", "less than or equal to 1"],
    ),
    (["+reg.l2.weight=3"], ["reg.l2", "not selected", "reg=[l2]"]),
    (["reg=l1", "+reg.l2.weight=3"], ["reg.l2", "selected: l1", "reg=[l1,l2]"]),
    (["sequence.retain=[torch light,fog bank]"], ["torch light", "targets", "retain"]),
    (
        ["sequence.targets=[torch light,torch light]"],
        ["sequence.targets", "torch light", "more than once"],
    ),
    (["sequence.targets=[]"], ["sequence.targets", "empty"]),
    (["sequence.captions=[]"], ["sequence.captions", "empty"]),
    (["sequence.seeds=[-1]"], ["sequence.seeds", "-1", "greater than or equal to 0"]),
    (["sequence.name=../up"], ["sequence.name", "../up"]),
    (["train.steps=true"], ["train.steps=True", "integer"]),
    (["sequence.targets=ember"], ["sequence.targets='ember'", "list"]),
    (["sequence.targets=[no style]"], ["no style", "ember, cinder"]),
    (["sequence.vocabulary=nope"], ["nope", "shapecanvas_styles"]),
    (["sequence.prompt=a picture"], ["sequence.prompt", "'a picture'", "{object}"]),
    (["setting.plan=parallel"], ["setting.plan='parallel'", "sequential"]),
    (["wandb.mode=maybe"], ["wandb.mode='maybe'", "'offline', 'online' or 'disabled'"]),
    (["device=tpu"], ["device='tpu'", "allowed: auto, cpu, cuda, or cuda:1"]),
    (["model.path=/nowhere/model"], ["/nowhere/model", "no such file or directory", "diffusers"]),
    (["model.precision=fp8"], ["model.precision='fp8'", "'fp32', 'bf16' or 'fp16'"]),
    (["model.resolution=63"], ["model.resolution=63", "multiple of 4"]),
    (["evaluator.paths.style=/nowhere/judge"], ["/nowhere/judge", "no such file or directory"]),
    (
        ["method._target_=cu_runner.nope.Nope"],
        ["method._target_=cu_runner.nope.Nope", "cannot be imported"],
    ),
    (["=="], ["=="]),
    (["methd=esd"], ["unknown key methd; did you mean method?"]),
    (["+methd=esd"], ["unknown key 'methd'; did you mean method?"]),
    (["regularizer=l2"], ["unknown key regularizer; did you mean reg?"]),
    (["Seed=1"], ["unknown key Seed; did you mean seed?"]),
    (["train.step=1"], ["unknown key train.step; did you mean train.steps?"]),
    (["device=cude"], ["device='cude'", "allowed: auto, cpu, cuda, or cuda:1 and so on"]),
    (["sequence.order=sorted"], ["'sorted'", "allowed: paper, reversed, or shuffle-1"]),
    (["seed=0,1", "seed=2,3", "-m"], ["seed=0,1 seed=2,3: seed is given 2 times", "seed=0,1,2,3"]),
    (["seed=0", "seed=2"], ["seed=0 seed=2: seed is given 2 times", "once, as in seed=2\n"]),
    (["+seed=0", "seed=2"], ["seed is given 2 times"]),
    (
        ["sequence.retain=[caf\u00e9, x]"],
        ["put it in quotes", """'sequence.retain=["caf\u00e9","x"]'"""],
    ),
    (["model.path=/tmp/M\u00fcnch"], ["put it in quotes", """'model.path="/tmp/M\u00fcnch"'"""]),
    (["model.path=it's"], ["model.path=it's: cannot be read; put it in quotes"]),
    (["sequence.prompt=a {style}, {object}"], ["""'sequence.prompt="a {style}, {object}"'"""]),
    (["model.allow_pickle=[x.bin]", "model.path=/nowhere"], ["/nowhere", "no such file"]),
    (["model.config=/x"], ["model.config: its file does not set it", "+model.config=..."]),
    (["+setting.stop_at=95"], ["+setting.stop_at: is set already", "write setting.stop_at=..."]),
    (["+device=cpu"], ["+device: is set already", "write device=..."]),
    (["train=3"], ["train=3: is no mapping"]),
    (["model.device=cpu"], ["unknown key model.device"]),
    (
        ["sequence.targets={a: b}"],
        ["sequence.targets={a: b}: is a list, a mapping"],
    ),
    (["recovery=noise", "recovery.noise.every=0"], ["every=0: input should be", "0 or 'last'"]),
    (["evaluator.allow_pickle=[x.pt]", "evaluator.paths.style=/no"], ["/no", "no such file"]),
]


@pytest.mark.parametrize(
    ("overrides", "fragments"), CONFIGURATION, ids=lambda value: " ".join(value)[:60]
)
def test_configuration(in_process, overrides, fragments, tmp_path):
    """A run that is refused before its start leaves no directory."""
    assert_one_line(in_process(*SMOKE, *overrides), 2, fragments)
    assert [path.name for path in tmp_path.glob("outputs/*")] in ([], ["sweeps"])


@pytest.mark.parametrize("mode", ["", "dryrun"])
def test_the_variable_of_wandb_is_named(in_process, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    own = [word for word in SMOKE if not word.startswith("wandb.mode")]
    fragments = [f"WANDB_MODE is {mode!r}", "offline, online, disabled", "wandb.mode=..."]
    assert "KEY=VALUE" not in assert_one_line(in_process(*own), 2, fragments)


def test_the_same_in_a_terminal(cu_run):
    done = cu_run(*SMOKE, "reg=l2", "reg.l2.weight=-1")
    assert_one_line(
        (done.returncode, done.stdout, done.stderr),
        2,
        ["reg.l2.weight=-1", "greater than or equal to 0"],
    )
    assert done.stdout == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_that_is_not_there(in_process, tmp_path):
    assert_one_line(
        in_process(*SMOKE, "device=cuda"), 2, ["device=cuda", "device=cpu", "device=auto"]
    )
    assert list(tmp_path.iterdir()) == []


def test_a_refused_resume_keeps_the_run(in_process, run_copy):
    (run_copy / "steps/02/step.json").unlink()
    words = [*SMOKE, "evaluator.paths.style=/nowhere"]
    before = sorted(run_copy.rglob("*"))
    assert in_process(*words)[0] == 2  # another directory
    (run_copy / "summary.json").unlink()
    if not torch.cuda.is_available():
        assert in_process(*SMOKE, "device=cuda")[0] == 2
    kept = {path for path in before if path.name != "summary.json"}
    assert kept <= set(run_copy.rglob("*"))


@pytest.mark.parametrize("text", ["[on, fog bank]", "[010, fog bank]", "[1e-5, fog bank]"])
def test_names_that_yaml_reads_as_something_else(in_process, tmp_path, text):
    (tmp_path / "tree/experiment").mkdir(parents=True)
    content = f"# @package _global_\nsequence:\n  retain: {text}\n"
    (tmp_path / "tree/experiment/mine.yaml").write_text(content)
    found = in_process(f"--config-dir={tmp_path}/tree", *SMOKE, "experiment=mine")
    assert_one_line(found, 2, ["sequence.retain", "put it in quotes"])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("sizes differ\nby one"), "library: RuntimeError: sizes differ by one; "),
        (ImportError("needs torchsde"), "library: ImportError: needs torchsde; "),
        (torch.linalg.LinAlgError("singular"), "library: LinAlgError: singular; "),
    ],
)
def test_what_a_library_raises_is_one_line(error, said):
    def raised_as(name: str) -> Exception:
        try:
            fresh = error.with_traceback(None)
            exec(compile("raise error", name, "exec"), {"__name__": name, "error": fresh})
        except Exception as raised:
            return raised.with_traceback(raised.__traceback__.tb_next)

    status, line = explain_error(raised_as("library.part"), [])
    assert (status, line) == (1, f"{said}CU_RUNNER_DEBUG=1 shows the traceback")
    with pytest.raises(type(error)):  # a fault of our own is not hidden
        explain_error(raised_as("cu_runner.methods.esd"), [])


def test_what_would_steer_a_terminal_is_shown(capsys):
    say("red \x1b[31m, \u202ereversed, \udcff\tok \u00e9 \U0001f600\n")
    tell("\x07")
    out, err = capsys.readouterr()
    assert out == "red \\x1b[31m, \\u202ereversed, \\udcff\tok \u00e9 \U0001f600\n\n"
    assert err == "\\x07\n"


def test_dry_run_refuses_settings_that_do_not_go_together(in_process):
    words = ["dry_run=true", "reg=gradproj", "reg.gradproj.contexts=['{concept.__class__}']"]
    said = ["reg.gradproj.contexts", "has the unknown placeholder {concept.__class__}; allowed: "]
    assert_one_line(in_process(*SMOKE, *words), 2, said)


def test_a_run_that_the_evaluator_cannot_judge_leaves_nothing_for_wandb(in_process, tmp_path):
    found = in_process("sequence=smoke", "sequence.targets=[on,no]", "wandb.mode=offline")
    assert_one_line((found[0], "", found[2]), 2, ["the evaluator has no style 'on'"])
    assert list(tmp_path.iterdir()) == []


def test_a_combination_file_tuned_for_a_regularizer_that_is_not_selected(in_process, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "strong.yaml").write_text(
        "# @package _global_\nreg:\n  l2:\n    weight: 7\n"
    )
    tree = ("--config-dir", str(tmp_path / "mine"))
    assert_one_line(
        in_process(*tree, *SMOKE, "experiment=strong"), 2, ["reg.l2", "not selected", "reg=[l2]"]
    )


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("reg: null", "reg=None: is no mapping"),
        ("tuned: 5", "tuned=5: is no mapping"),
        ("tuned: {conabl: 5}", "tuned.conabl=5"),
        ("tuned: {conabl: {default: 5}}", "tuned.conabl.default=5"),
        ("tuned: {conabl: {none: [1]}}", "tuned.conabl.none=[1]"),
        ("tuned: {conabl: {l2: 5}}", "tuned.conabl.l2=5"),  # which the run does not read
        ("train: null", "train"),
        ("train: []", "experiment/odd.yaml: has a list where the file that it changes has a map"),
        ("retention: 5", "retention"),
        ("method: null", "method"),
        ("sequence: 5", "sequence"),
        ("setting: null", "setting"),
        ("paths: 5", "paths"),
    ],
)
def test_a_file_that_sets_a_whole_group_to_something_else(in_process, tmp_path, text, fragment):
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/odd.yaml").write_text(f"# @package _global_\n{text}\n")
    assert_one_line(
        in_process("--config-dir", str(tmp_path / "mine"), *SMOKE, "experiment=odd"), 2, [fragment]
    )


# -------------------------------------------------------------------------------- model directories
@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component(in_process, pipeline_copy, component):
    shutil.rmtree(pipeline_copy / component)
    fragments = [
        f"{pipeline_copy}: the component {component} is missing",
        "unet, vae, text_encoder, tokenizer, scheduler",
    ]
    assert_one_line(in_process(*SMOKE, f"model.path={pipeline_copy}"), 2, fragments)


def test_a_directory_that_is_no_pipeline(in_process, tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line(
        in_process(*SMOKE, f"model.path={tmp_path}/empty"),
        2,
        [f"{tmp_path}/empty", "model_index.json"],
    )


def test_a_unet_of_another_text_width(in_process, pipeline_copy):
    config = json.loads((pipeline_copy / "unet" / "config.json").read_text())
    unet = diffusers.UNet2DConditionModel.from_config(config | {"cross_attention_dim": 64})
    unet.save_pretrained(pipeline_copy / "unet")
    fragments = ["unet reads text of width 64, text_encoder writes 512"]
    assert_one_line(in_process(*SMOKE, f"model.path={pipeline_copy}"), 2, fragments)


@pytest.mark.parametrize("change", [{"block_out_channels": [48, 64, 96]}, {"layers_per_block": 1}])
def test_weights_that_do_not_fit_their_configuration(in_process, pipeline_copy, change):
    path = pipeline_copy / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert_one_line(
        in_process(*SMOKE, f"model.path={pipeline_copy}"), 2, [f"{pipeline_copy}/unet: "]
    )


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_truncated_weights(in_process, pipeline_copy, component):
    (path,) = (pipeline_copy / component).glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:100_000])
    assert_one_line(
        in_process(*SMOKE, f"model.path={pipeline_copy}"),
        2,
        [f"{pipeline_copy}/{component}: cannot be loaded"],
    )


def test_broken_json_and_a_foreign_scheduler(in_process, pipeline_copy):
    index = pipeline_copy / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"scheduler": ["diffusers", "NoSuchScheduler"]}))
    assert_one_line(
        in_process(*SMOKE, f"model.path={pipeline_copy}"),
        2,
        ["the scheduler NoSuchScheduler: diffusers has no such scheduler"],
    )
    index.write_text("{")
    assert_one_line(
        in_process(*SMOKE, f"model.path={pipeline_copy}"), 2, ["no readable model_index.json"]
    )


# ------------------------------------------------------------------------------------------- places
def test_outputs_that_are_a_file(in_process, tmp_path):
    (tmp_path / "taken").write_text("mine")
    assert_one_line(in_process(*SMOKE, "paths.outputs=taken"), 1, ["taken", "paths.outputs"])
    assert (tmp_path / "taken").read_text() == "mine"


def write_to_nobody() -> None:
    """Make stdout a pipe whose other end is closed."""
    reading, writing = os.pipe()
    os.close(reading)
    os.dup2(writing, 1)
    os.close(writing)


def test_output_that_nobody_reads(run_copy):
    done = run_forked("cu-run", *SMOKE, cwd=run_copy.parents[3], before=write_to_nobody)
    assert done.returncode == 1
    assert (
        done.stderr
        == "cu-run: whatever read the output has ended (a pipe); what was done is kept\n"
    )


@pytest.mark.parametrize(
    ("source", "name", "fragments"),
    [
        ("list", "nope", ["reg.gradproj.auxiliary: nope", "common_objects"]),
        ("list", "null", ["reg.gradproj.auxiliary: none", "common_objects"]),
        ("file", "gone.txt", ["reg.gradproj.auxiliary: gone.txt", "no such file"]),
        ("file", "null", ["reg.gradproj.auxiliary: none", "no such file"]),
        ("llm", "gone", ["reg.gradproj.auxiliary: gone", "no such directory"]),
    ],
)
def test_sources_of_auxiliary_names(in_process, source, name, fragments):
    chosen = (f"reg.gradproj.auxiliary.source={source}", f"reg.gradproj.auxiliary.name={name}")
    result = in_process(*SMOKE, "reg=gradproj", *chosen)
    assert_one_line(result, 2, fragments)
    assert result[1] == ""  # before anything is sampled


@pytest.mark.parametrize("context", ["plain", "{concept} in {place}"])
def test_a_context_with_wrong_placeholders(in_process, context):
    overrides = ("reg=gradproj", f"reg.gradproj.contexts=['{context}']")
    assert_one_line(
        in_process(*SMOKE, *overrides), 2, [f"reg.gradproj.contexts: '{context}'", "{concept}"]
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=uce", "reg=l2"], "reg=l2 acts on the loss"),
        (["reg=rece"], "reg=rece erases what a closed form leaves"),
        (["reg=[nullspace,minvar]"], "put minvar first: reg=[minvar,nullspace]"),
        (["reg=minvar", "method.params=full"], "choose method.params=text_linear"),
        (["reg=minvar", "method=salun"], "mask of the optimiser's step would be lost"),
    ],
)
def test_a_composition_that_cannot_run_is_no_plan_either(in_process, words, said):
    status, out, err = in_process("sequence=smoke", *words, "dry_run=true", "wandb.mode=disabled")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err
