"""What a shared configuration file cannot do: run code that nobody allowed, configure Hydra, or
take a secret along.
"""

import json
import sys
from contextlib import nullcontext
from urllib.parse import quote, quote_plus

import pytest
from commands import assert_one_line
from conftest import SMOKE, compose, run_directory
from omegaconf import OmegaConf

from cu_runner.cli.evaluate import main as cu_eval
from cu_runner.cli.failures import explain_error
from cu_runner.cli.report import main as cu_report
from cu_runner.cli.table import main as cu_table
from cu_runner.concepts.prompt_csv import read_prompts
from cu_runner.config import compose as config
from cu_runner.config.permissions import check_command, refuse_unasked_pickles
from cu_runner.config.run_config import check_run
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.secrets import names_secret, redact, refuse_secrets

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_PlantedTokenOfATest",
    "AWS_SECRET_ACCESS_KEY": "planted/access+key/of/a/test",
}


@pytest.fixture
def planted(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules of a user on the path, each of which leaves a file when imported; their folder."""
    source = "from pathlib import Path\nPath(__file__).with_suffix('.imported').touch()\n"
    klass = (
        "from cu_runner.regularizers.base import Regularizer\nclass Mine(Regularizer):\n    pass\n"
    )
    (tmp_path / "my_parts").mkdir()
    for name, text in {
        "my_parts/__init__": "",
        "my_parts/one": source + klass,
        "my_parts_too": source + klass,
        "reexporting": source + "from my_parts_too import Mine\n",
    }.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ("my_parts", "my_parts.one", "my_parts_too", "reexporting"):
        sys.modules.pop(name, None)


def complaint(*overrides: str) -> str:
    """The line that cu-run prints for them."""
    with pytest.raises(Exception) as caught:  # noqa: PT011, judge raises what is no complaint
        config.compose(["sequence=smoke", *overrides])
    status, message = explain_error(caught.value, list(overrides))
    assert (status, message.count("\n")) == (2, 0)
    return message


# ----------------------------------------------------------------------------------------- _target_
@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("os.system", "lies outside cu_runner"),
        ("subprocess.Popen", "lies outside cu_runner"),
        ("builtins.eval", "lies outside cu_runner"),
        ("torch.load", "lies outside cu_runner"),
        ("cu_runner_of_mine.Thing", "lies outside cu_runner"),
        ("cu_runner.sweeps.make_runs.os.system", "cannot be imported"),
        ("cu_runner.sweeps.make_runs.subprocess", "neither a class nor a function"),
        (
            "cu_runner.sweeps.make_runs.ThreadPoolExecutor",
            "is defined in concurrent.futures.thread, outside cu_runner",
        ),
        ("cu_runner.sweeps.make_runs.cu_run", "makes no cu_runner.methods.base.Method"),
        ("cu_runner.regularizers.l2.L2", "makes no cu_runner.methods.base.Method"),
        ("system", "not a dotted name"),
        ("cu_runner..os", "not a dotted name"),
        ("'cu_runner.x; import os'", "not a dotted name"),
    ],
)
def test_a_target_that_is_refused(target, said):
    assert said in complaint(f"method._target_={target}")


@pytest.mark.parametrize("group", ["model", "evaluator", "sequence", "method"])
def test_every_group_is_checked(group):
    assert complaint(f"{group}._target_=os.system").startswith(
        f"{group}._target_=os.system: lies outside cu_runner"
    )


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("+method._args_=[rm]", "method._args_"),
        ("+method._partial_=true", "method._partial_"),
        ("+evaluator.paths._target_=os.system", "evaluator.paths._target_"),
        ("+train._target_=os.system", "train._target_"),
        ("+_target_=os.system", "_target_"),
        ("+sequence.anchors={a:{_target_:os.system}}", "sequence.anchors.a._target_"),
    ],
)
def test_a_word_of_hydras_where_none_is_read(override, path):
    assert f"{path}: is read nowhere" in complaint(override)


def add(target: str) -> str:
    return f"+reg={{mine:{{_target_:{target}}}}}"


def test_an_allowed_module_is_imported_and_no_other(modules):
    assert "allow_modules=[my_parts.one]" in complaint("~reg", add("my_parts.one.Mine"))
    assert not list(modules.rglob("*.imported"))
    assert "lies outside" in complaint(
        "~reg", add("my_parts_too.Mine"), "allow_modules=[my_parts]"
    )  # not a prefix of letters
    assert not list(modules.rglob("*.imported"))
    plan = config.compose(
        ["sequence=smoke", "~reg", add("my_parts.one.Mine"), "allow_modules=[my_parts]"]
    )
    assert plan.regularizers["mine"].target == "my_parts.one.Mine"
    assert [path.stem for path in modules.rglob("*.imported")] == ["one"]
    said = complaint("~reg", add("reexporting.Mine"), "allow_modules=[reexporting]")
    assert "is defined in my_parts_too, outside cu_runner" in said


def test_what_is_allowed_is_neither_kept_nor_in_the_signature(modules):
    plain = config.compose(["sequence=smoke"])
    allowing = config.compose(["sequence=smoke", "allow_modules=[my_parts]"])
    assert allowing.signature == plain.signature
    assert allowing.resolved == plain.resolved
    assert "allow_modules" not in plain.resolved
    mine = config.compose(
        ["sequence=smoke", "~reg", add("my_parts.one.Mine"), "allow_modules=[my_parts]"]
    )
    with pytest.raises(ConfigError, match="lies outside cu_runner"):
        check_run(mine.resolved, "conabl")  # config.yaml of a run vouches for nothing
    assert check_run(mine.resolved, "conabl", allowed=("my_parts",)).signature == mine.signature


def test_a_file_cannot_allow_modules(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/shared.yaml").write_text(
        "# @package _global_\nallow_modules: [os]\nmethod: {_target_: os.system}\n"
    )
    said = complaint(f"hydra.searchpath=[file://{tmp_path}]", "experiment=shared")
    assert said.startswith("allow_modules: set by a configuration file")
    assert "allow_modules.0='a b'" in complaint(
        "allow_modules=['a b']"
    ) or "allow_modules=" in complaint("allow_modules=['a b']")


PICKLES = "retention: {features: {architecture: module, path: evil.pt, allow_pickle: [evil.pt]}}"
ALLOWED = (
    "retention.features.allow_pickle=[evil.pt]",
    "retention.prompts=general_captions",
    "retention.clip_score.path=x",
)


def test_a_file_cannot_allow_pickles(tmp_path):
    """TorchScript is code, and reading one is running it."""
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/shared.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - override /retention: coco\n{PICKLES}\n"
    )
    tree = (f"hydra.searchpath=[file://{tmp_path}]", "experiment=shared")
    said = complaint(*tree)
    assert said.startswith("retention.features.allow_pickle: evil.pt is allowed by a file only")
    assert said.endswith("if you trust it, give retention.features.allow_pickle=[evil.pt]")
    assert "is allowed by a file only" in complaint(*tree, "+model.allow_pickle=[evil.pt]")
    assert config.compose(["sequence=smoke", *tree, *ALLOWED]).retention is not None


@pytest.mark.parametrize(
    ("asked", "well"),
    [
        ("model.allow_pickle=[evil.pt]", True),
        ("model.allow_pickle=['evil.pt',b.pt]", True),
        ("model={allow_pickle:[evil.pt]}", True),
        ("model.allow_pickle=[other/evil.pt]", False),
        ("model.allow_pickle=[]", False),
        ("evaluator.allow_pickle=[evil.pt]", False),
    ],
)
def test_the_command_line_names_the_very_file(asked, well):
    with nullcontext() if well else pytest.raises(ConfigError, match="is allowed by a file only"):
        refuse_unasked_pickles({"model": {"allow_pickle": ["evil.pt"]}}, [asked])


def test_cu_eval_asks_again_for_pickles_that_a_run_or_a_file_allows(
    run_copy, call_command, tmp_path
):
    (tmp_path / "shared.yaml").write_text((config_dir() / "retention/coco.yaml").read_text() + "\n")
    own = OmegaConf.load(tmp_path / "shared.yaml")
    OmegaConf.update(
        own,
        "features",
        {"architecture": "module", "path": "evil.pt", "allow_pickle": ["evil.pt"]},
        merge=False,
    )
    OmegaConf.save(own, tmp_path / "shared.yaml")
    status, _, err = call_command(cu_eval, "cu-eval", run_copy, f"retention={tmp_path}/shared.yaml")
    assert (status, err.count("\n")) == (2, 1)
    assert "retention.features.allow_pickle: evil.pt is allowed by a file only" in err


# --------------------------------------------------------------------------------- Hydra's own node
@pytest.mark.parametrize(
    "text",
    [
        "# @package _global_\nhydra: {callbacks: {mine: {_target_: my_parts.one.Mine}}}\n",
        "# @package _global_\nhydra: {job_logging: {handlers: {x: {(): os.system}}}}\n",
        "# @package hydra.callbacks\nmine: {_target_: my_parts.one.Mine}\n",
        "# @package [hydra].callbacks\nmine: {}\n",
        "# @package _global_\ndefaults:\n  - override /hydra/launcher: mine\n",
        "# @package _global_\ndefaults:\n  - /experiment/inner@hydra.callbacks: inner\n",
    ],
)
def test_a_shared_tree_cannot_configure_hydra(tmp_path, text):
    for folder in ("experiment/experiment", "hydra/launcher", "experiment/inner"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "experiment/shared.yaml").write_text(text)
    (tmp_path / "experiment/inner/inner.yaml").write_text("mine: {_target_: os.system}\n")
    (tmp_path / "hydra/launcher/mine.yaml").write_text("setup: [touch pwned]\n")
    for arguments in (
        [f"--config-dir={tmp_path}", "experiment=shared"],
        ["--config-dir", str(tmp_path), "-m", "experiment=shared", "seed=0,1"],
        [f"hydra.searchpath=[{tmp_path}]", "experiment=shared"],
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011
            check_command(arguments)
        status, message = explain_error(caught.value, arguments)
        assert status == 2
        assert "sets hydra.*, which can run code" in message


def test_a_swept_file_of_a_shared_tree_is_checked_before_a_job_begins(in_process, tmp_path):
    (tmp_path / "tree/experiment").mkdir(parents=True)
    (tmp_path / "tree/experiment/good.yaml").write_text("# @package _global_\nseed: 3\n")
    (tmp_path / "tree/experiment/bad.yaml").write_text(
        "# @package _global_\nhydra: {verbose: true}\n"
    )
    result = in_process("-m", f"--config-dir={tmp_path}/tree", *SMOKE, "experiment=good,bad")
    assert_one_line(result, 2, ["experiment/bad.yaml: sets hydra.*"])
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experimental-rerun=x.pickle"], "unpickles a file"),
        (["--config-path=/tmp"], "--config-path"),
        (["--config-name=other"], "--config-name"),
        (["--config-dir=/nowhere"], "/nowhere: no such directory"),
        (["hydra.searchpath=[pkg://antigravity]"], "imports code"),
        (["--nope"], "unrecognized arguments: --nope"),
    ],
)
def test_options_that_are_refused(in_process, arguments, said):
    assert_one_line(in_process(*arguments), 2, [said])
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "override",
    ["cluster.partition='gpu\\n#SBATCH'", "cluster.account='a b'", 'paths.outputs="a\nb"'],
)
def test_no_line_of_a_jobs_script_can_be_added(in_process, override, tmp_path):
    assert_one_line(in_process("-m", *SMOKE, override), 2, [override.partition("=")[0]])
    assert [path.name for path in tmp_path.iterdir() if path.name != "outputs"] == []


# ------------------------------------------------------------------------------------------ secrets
def test_names_of_secrets():
    for name in (
        *SECRETS,
        "hf_token",
        "GITHUB_TOKENS",
        "MYSQL_PWD",
        "HTTP_AUTHORIZATION",
        "DATABASE_URL",
        "OPENAI_API_KEY",
        "DB_PASSWORD",
        "GITHUB_PAT",
        "AWS_ACCESS_KEY_ID",
        "MY_TOKEN_2",
        "PGPASS",
        "SITE_JWT",
        "SESSION_COOKIE",
    ):
        assert names_secret(name), name
    for name in (
        "PWD",
        "OLDPWD",
        "XAUTHORITY",
        "AUTHOR",
        "TOKENIZERS_PARALLELISM",
        "HOME",
        "PATH",
        "KEYBOARD",
        "COMPASS",
        "WANDB_MODE",
        "PYTHONPATH",
    ):
        assert not names_secret(name), name


def test_a_secret_is_refused_wherever_it_comes_from(planted, in_process, tmp_path):
    (tmp_path / "tree/experiment").mkdir(parents=True)
    for name, line in {
        "read": "wandb: {entity: '${oc.env:HF_TOKEN}'}",
        "hidden": "wandb: {entity: '${oc.env:${.project}}', project: WANDB_API_KEY}",
        "typed": f"wandb: {{entity: x{SECRETS['HF_TOKEN']}}}",
        "key": f"sequence: {{anchors: {{{SECRETS['HF_TOKEN']}: a}}}}",
    }.items():
        (tmp_path / f"tree/experiment/{name}.yaml").write_text(f"# @package _global_\n{line}\n")
    tree = f"--config-dir={tmp_path}/tree"
    for arguments in (
        ["wandb.entity=${oc.env:HF_TOKEN}"],
        ["wandb.entity=${oc.env:HF_TOKEN,none}"],
        ["--cfg", "job", "--resolve", "wandb.entity=${oc.env:AWS_SECRET_ACCESS_KEY}"],
        [f"wandb.entity={SECRETS['HF_TOKEN']}"],
        [f"method={SECRETS['HF_TOKEN']}"],
        [tree, "experiment=read"],
        [tree, "experiment=hidden"],
        [tree, "experiment=typed"],
        [tree, "experiment=key"],
        ["-m", "hydra.job.env_copy=[HF_TOKEN]", "seed=0,1"],
    ):
        status, out, err = in_process(*arguments, *SMOKE)
        assert (status, err.count("\n")) == (2, 1), err
        assert not any(value in out + err for value in SECRETS.values())
        assert "secret" in err
    assert not (tmp_path / "outputs/runs").exists()
    assert_no_secret(tmp_path / "outputs")


def assert_no_secret(folder) -> int:
    """Search every byte under a folder; how many files there are."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        content = path.read_bytes()
        for name, value in SECRETS.items():
            assert value.encode() not in content, (name, path)
    return len(files)


def test_nothing_that_is_written_holds_a_secret(planted, in_process, call_command, tmp_path):
    overrides = [override for override in SMOKE if not override.startswith("wandb.")]  # W&B offline
    status, out, err = in_process("-m", *overrides, "seed=0")
    assert (status, err) == (0, "")
    run = run_directory(out, tmp_path)
    assert call_command(cu_report, "cu-report", run)[0] == 0
    assert call_command(cu_table, "cu-table", "table2", *overrides[1:3])[0] == 0
    assert list((tmp_path / "outputs/tables").iterdir())
    assert list((tmp_path / "outputs/wandb").glob("offline-run-*/*.wandb"))
    (job,) = (tmp_path / "outputs/sweeps").glob("*/0/job.json")
    assert json.loads(job.read_text())["command"][0] == "cu-run"
    assert assert_no_secret(tmp_path) > 20


def test_a_list_that_holds_a_secret_is_refused(planted, in_process, tmp_path):
    (tmp_path / "names.txt").write_text(f"a style\n{SECRETS['HF_TOKEN']}\n")
    chosen = (
        "reg=gradproj",
        "reg.gradproj.auxiliary.source=file",
        "reg.gradproj.auxiliary.name=names.txt",
    )
    assert_one_line(
        in_process(*SMOKE, *chosen),
        2,
        ["names.txt, name 2: holds the value of the environment variable HF_TOKEN"],
    )
    assert SECRETS["HF_TOKEN"] not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))


AWKWARD = 'p@ss/w+rd "quoted" \\ \u00fc'
SPELLED = {
    "itself": AWKWARD,
    "in an address": quote(AWKWARD, safe=""),
    "partly encoded": AWKWARD.replace("@", "%40").replace(" ", "%20"),
    "in a form": quote_plus(AWKWARD),
    "in JSON": json.dumps(AWKWARD)[1:-1],
    "in Python": repr(AWKWARD)[1:-1],
}


@pytest.mark.parametrize("text", SPELLED.values(), ids=SPELLED)
def test_a_secret_is_known_however_it_is_spelled(monkeypatch, text):
    monkeypatch.setenv("DB_PASSWORD", AWKWARD)
    for entry in (("x", f"https://me:{text}@host"), (f"x.{text}", 1)):
        with pytest.raises(ValueError, match=r"environment variable DB_PASSWORD, a secret"):
            refuse_secrets([entry])
    refuse_secrets([("x", "https://me:password@host")])
    if text != SPELLED["partly encoded"]:
        assert redact(f"-> {text}!") == "-> <DB_PASSWORD>!"


def test_prompts_of_a_file_that_hold_a_secret_are_refused(planted, tmp_path):
    (tmp_path / "mine.csv").write_text(f"prompt,seed\na,1\n{SECRETS['HF_TOKEN']},2\n")
    with pytest.raises(ValueError, match=r"mine.csv: line 3: holds the value of .* HF_TOKEN"):
        read_prompts("sequence.prompts", str(tmp_path / "mine.csv"), ("prompt", "seed"))


@pytest.mark.parametrize(
    "entry", ["../../outside@_here_", "../../outside@wandb", "/{}/outside@wandb", "/{}/outside"]
)
def test_a_defaults_list_does_not_reach_out_of_the_trees(in_process, tmp_path, entry):
    (tmp_path / "outside.yaml").write_text("planted: here\n", encoding="utf-8")
    (tmp_path / "tree/experiment").mkdir(parents=True)
    entry = entry.format(tmp_path)
    (tmp_path / "tree/experiment/mine.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - {entry}\n", encoding="utf-8"
    )
    arguments = (f"--config-dir={tmp_path}/tree", "experiment=mine")
    for more in ([], ["--cfg", "job"], ["-m"]):
        result = in_process(*more[:2], *arguments, *SMOKE, *more[2:])
        assert_one_line(result, 2, ["out of the configuration"])
    assert not (tmp_path / "outputs/runs").exists()


def test_a_line_for_the_terminal_or_the_log_is_redacted(planted):
    assert redact(f"denied: {SECRETS['HF_TOKEN']}!") == "denied: <HF_TOKEN>!"


def test_the_resolved_configuration_still_reads_plain_variables(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert compose("sequence=smoke").wandb.mode == "disabled"
