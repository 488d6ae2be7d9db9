"""Random command lines and damaged configuration files: a plan that can run, or one line and exit
status 2; never a traceback.

A third of the examples; `make test-all` has them all.

CU_FUZZ=20 pytest tests/cli/test_fuzz.py    # twenty times as many as these, drawn anew each time
"""

import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cu_runner.cli.failures import explain_error
from cu_runner.concepts.requests import plan_requests
from cu_runner.config.compose import compose
from cu_runner.config.permissions import check_command
from cu_runner.config.targets import FILE_NAME
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.values import walk_leaves

TIMES = float(os.environ.get("CU_FUZZ", 1 / 3))
GROUPS = ("model", "evaluator", "sequence", "method", "reg", "setting", "experiment", "retention")


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=round(examples * TIMES),
        derandomize=TIMES <= 1,
        database=None,
        deadline=timedelta(seconds=30),
        suppress_health_check=list(HealthCheck),
    )


def assert_plan_or_complaint(arguments: list[str]) -> None:
    """What cu-run does before it loads a model: in `main`, in `run_job` and at the start of
    `execute`.
    """
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    try:
        check_command(arguments)
        plan = compose(overrides)
        requests = plan_requests(plan.sequence.build(), plan.setting.plan)
        for node in (plan.method, *plan.regularizers.values()):
            node.build()
    except Exception as error:
        status, message = explain_error(error, arguments)  # raises what is no complaint
        assert status == 2, message
        assert message.strip()
        assert len(message.splitlines()) == 1, message
        return
    assert requests
    assert FILE_NAME.fullmatch(plan.method_name)
    assert plan.directory.parent.parent == Path(plan.spine.paths.outputs) / "runs"
    assert len(plan.signature) == 64


# ------------------------------------------------------------------------------------ command lines
KEYS = sorted(
    {path for path, _ in walk_leaves(compose(["sequence=smoke", "reg=[l2,gradproj]"]).resolved)}
    | {f"{group}{end}" for group in GROUPS for end in ("", "._target_", ".x", "@x", "._args_")}
    | {
        "train",
        "wandb",
        "hydra",
        "hydra.searchpath",
        "hydra.job.name",
        "hydra.sweep.dir",
        "tuned",
        "local",
        "x",
        "x.y",
        "_target_",
    }
    | {
        "hydra/launcher",
        "hydra/sweeper",
        "allow_modules",
        "hydra.job.env_copy",
        "hydra.verbose",
        "sequence.anchors",
        "cluster.account",
    }
)
VALUES = [
    "",
    "null",
    "none",
    "true",
    "0",
    "1",
    "-1",
    "1e999",
    "nan",
    "-inf",
    "1e-320",
    "9" * 400,
    "0x10",
    "1_000",
    "'1'",
    "???",
    "[]",
    "{}",
    "[1,2]",
    "[a,b]",
    "[[[]]]",
    "{a:1}",
    "{1:2}",
    "{a:{b:[c]}}",
    "a,b",
    "range(3)",
    "choice(1,2)",
    "glob(*)",
    "interval(0,1)",
    "${seed}",
    "${x}",
    "${oc.env:HOME}",
    "${oc.env:HF_TOKEN}",
    "${oc.decode:1}",
    "${train}",
    "${method}",
    "${tuned:x,1}",
    "${tuned:seed}",
    "${choice:method}",
    "${choice:x}",
    "${now:%Y}",
    "${hydra:job.name}",
    "${seed",
    "\\${seed}",
    "../..",
    "/",
    "a/b",
    "a b",
    "'a b'",
    '"',
    "'",
    "\\",
    "\n",
    "\t",
    "%s",
    "{concept}",
    "os.system",
    "cu_runner",
    "cu_runner.methods.esd.ESD",
    "cu_runner.sweeps.make_runs.cu_run",
    "esd",
    "l2",
    "[l2,l2]",
    "smoke",
    "simultaneous",
    "shapecanvas",
    "file:///",
    "pkg://os",
    "\u00e4\u6f22\U0001f600",
    "a" * 5000,
    "=",
    "a=b",
]
override = st.builds(
    lambda sign, key, equals, value: f"{sign}{key}{equals}{value}",
    st.sampled_from(["", "", "", "+", "++", "~"]),
    st.sampled_from(KEYS) | st.text(max_size=12).filter(lambda text: not text.startswith("-")),
    st.sampled_from(["=", "=", "=", "=", ""]),
    st.sampled_from(VALUES) | st.integers().map(str) | st.floats().map(str) | st.text(max_size=12),
)


@fuzz(300)
@given(st.lists(override, min_size=1, max_size=4))
def test_command_lines(overrides):
    assert_plan_or_complaint(["sequence=smoke", *overrides])


# -------------------------------------------------------------------------------------------- files
FILES = sorted(path for group in GROUPS for path in (config_dir() / group).glob("*.yaml"))
JUNK = [
    ":",
    "-",
    "[",
    "]",
    "{",
    "}",
    "&a",
    "*a",
    "!!python/object/apply:os.system [true]",
    "!!binary x",
    "|",
    ">",
    "? ",
    "'",
    '"',
    "\t",
    "\0",
    "%",
    "# @package hydra",
    "# @package x.y",
    "defaults: [x]",
    "defaults:\n  - override hydra/launcher: x",
    "_target_: os.system",
    "1: 2",
    "null",
    "~",
    ".inf",
    "0o7",
    "2020-01-01",
    "${x}",
    "${method}",
    "<<: {a: 1}",
    "a: &a [*a]",
    "\ufeff",
    "\u00e4",
    "...",
    "---",
]
WHOLE = sorted(
    key
    for key in yaml.safe_load((config_dir() / "config.yaml").read_text(encoding="utf-8"))
    if key != "defaults"
)
WHOLE += ["model", "evaluator", "sequence", "method", "reg", "retention", "setting"]
NODES = [
    None,
    True,
    0,
    -1,
    1e300,
    [],
    {},
    [[]],
    {"a": 1},
    {1: 2},
    {True: {}},
    {"_target_": "os.system"},
    {"_args_": [1]},
]


@st.composite
def damaged_text(draw: st.DrawFn, path: Path) -> str:
    """A file's text after one to three changes of lines."""
    lines = path.read_text(encoding="utf-8").splitlines()
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(lines) - 1, 0)))
        line = lines[at] if lines else ""
        indent = line[: len(line) - len(line.lstrip())]
        junk = draw(st.sampled_from(JUNK + VALUES) | st.text(max_size=8))
        changes = [
            [],
            [line, line],
            [f"  {line}"],
            [line, indent + junk],
            [f"{line.partition(':')[0]}: {junk}"],
            [f"{indent}{junk}: 1"],
        ]
        lines[at : at + 1] = draw(st.sampled_from(changes))
    return "\n".join(lines) + "\n"


@st.composite
def damaged_tree(draw: st.DrawFn, path: Path) -> str:
    """A file's text after one to three of its values, at any depth, became something else, were
    dropped or got company.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    for _ in range(draw(st.integers(1, 3))):
        place = content
        while place and draw(st.booleans()):
            inner = [place[key] for key in place if isinstance(place[key], dict)]
            place = draw(st.sampled_from(inner)) if inner else {}
        key = draw(
            st.sampled_from([*place, "x"])
            | st.sampled_from(["defaults", "hydra", 3, None, "_target_", "a.b", "${x}"])
        )
        if draw(st.integers(0, 3)):
            place[key] = draw(st.sampled_from(NODES) | st.sampled_from(VALUES))
        else:
            place.pop(key, None)
    return yaml.safe_dump(content, sort_keys=False)


@fuzz(100)
@given(
    st.sampled_from(FILES).flatmap(
        lambda path: st.tuples(st.just(path), damaged_tree(path) | damaged_text(path))
    )
)
def test_files(tmp_path_factory, file):
    path, text = file
    tree = tmp_path_factory.mktemp("tree")
    target = tree / path.parent.name / "damaged.yaml"
    target.parent.mkdir()
    target.write_bytes(text.encode("utf-8", "surrogatepass"))
    assert_plan_or_complaint(
        [f"hydra.searchpath=[file://{tree}]", "sequence=smoke", f"{path.parent.name}=damaged"]
    )
    shutil.rmtree(tree)


KEYS_OF_FILES = [*WHOLE, "tuned", "defaults", "nokey"]


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(key, marks=[pytest.mark.slow] if number % 4 else [])
        for number, key in enumerate(KEYS_OF_FILES)
    ],
)
def test_a_file_that_replaces_a_whole_key(tmp_path, key):
    """Every key of the composed configuration, each kind of node in its place, or every third."""
    (tmp_path / "experiment").mkdir()
    every = 3 if TIMES < 1 else 1
    for node in NODES[KEYS_OF_FILES.index(key) % every :: every]:
        text = yaml.safe_dump({key: node}, sort_keys=False)
        (tmp_path / "experiment/odd.yaml").write_text(f"# @package _global_\n{text}")
        assert_plan_or_complaint(
            [f"hydra.searchpath=[file://{tmp_path}]", "sequence=smoke", "experiment=odd"]
        )


@pytest.mark.parametrize("end", ["\r", "\x85", "\u2028", "\x1c"])
def test_an_override_of_two_lines_is_answered_in_one(end):
    assert_plan_or_complaint(["sequence=smoke", f"x=[{end}"])
    assert_plan_or_complaint(["sequence=smoke", f"{end}="])
