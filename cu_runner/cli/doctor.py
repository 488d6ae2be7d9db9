"""cu-doctor: is a finished run what it says, and would a run that is planned get to its end?

    cu-doctor outputs/runs/shapecanvas_style/conabl-none-sequential-s0-ec91c30b   # or packed: .zip
    cu-doctor RUN 'allow_modules=[my_methods]'                                    # of code of yours
    cu-doctor experiment=unlearncanvas_style model.path=DIR evaluator.paths.style=DIR \\
              evaluator.paths.object=DIR                                          # a plan

Every file of a run is held against its sha256 and every step against the one before it, down to the
weights of the untouched model; metrics are computed again from the predictions, drift from the
weights. What differs is printed; nothing is changed.
A plan is given as to cu-run: device, W&B login, model, evaluator, retention, labels, disk, base
accuracy of a few images, whether method and regularizers go together and can begin a request, two
training steps, memory and time.

Exit status: 0 all is well, 1 something is not, 2 bad input.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cu_runner.cli.console import (
    Parser,
    add_config_dir,
    is_permission,
    own_tree,
    quiet_libraries,
    say,
    without_permissions,
    without_reader,
)
from cu_runner.cli.failures import one_line_failures
from cu_runner.retention.base import Retention
from cu_runner.runtime import progress
from cu_runner.schema.errors import ModelError, WeightFileError
from cu_runner.store.archive import unpack
from cu_runner.store.files import has_intact_header
from cu_runner.store.layout import STEP, step_dir
from cu_runner.store.records import read_record
from cu_runner.store.run_record import read_config
from cu_runner.store.verify import Finding, verify_configuration, verify_run

if TYPE_CHECKING:
    from cu_runner.config.run_config import RunConfig
    from cu_runner.config.targets import Node

MARKS = {True: "ok", False: "WRONG", None: "not checked"}


@without_reader
def main() -> None:
    """Call `cu-doctor` with its command line."""
    parser = Parser(prog="cu-doctor", description=__doc__)
    parser.add_argument(
        "what",
        nargs="*",
        metavar="RUN | OVERRIDE",
        help="run directories or packed runs (cu-report --pack), and allow_modules=... of runs of "
        "your own code; or overrides, as to cu-run",
    )
    add_config_dir(parser)
    parser.add_argument(
        "--all", action="store_true", help="print the checks of a run that hold as well"
    )
    arguments = parser.parse_intermixed_args()
    if not arguments.what:
        parser.print_usage(sys.stderr)
        parser.error("give a run, or overrides as to cu-run: cu-doctor method=esd reg=l2")
    runs = [text for text in arguments.what if "=" not in text]
    if runs and without_permissions(arguments.what) != runs:
        parser.error("give runs or overrides, not both; beside a run stands allow_modules=... only")
    with one_line_failures("cu-doctor"), progress.on_stderr():
        if runs:
            allowing = [text for text in arguments.what if is_permission(text)]
            wrong = sum(examine_run(Path(path), allowing, not arguments.all) for path in runs)
        else:
            wrong = examine_plan([*own_tree(arguments), *arguments.what])
    sys.exit(1 if wrong else 0)


def examine_plan(words: list[str]) -> int:
    """Print every finding on a planned run; return how many are wrong."""
    from cu_runner.config.compose import compose
    from cu_runner.config.permissions import refuse_repeated_keys
    from cu_runner.runner.preflight import check_plan

    refuse_repeated_keys(words, sweep=False)
    plan = compose(words)
    quiet_libraries()
    for note in plan.notes:
        say(f"note: {note}")
    return report("plan", check_plan(plan), quiet=False)


def examine_run(path: Path, allowing: list[str], quiet: bool) -> int:
    """Print every finding on a run directory or a packed run; return how many are wrong.

    allowing: allow_modules=..., of runs of the user's own code.
    """
    from cu_runner.config.permissions import allowed_modules
    from cu_runner.config.revise import filled_in
    from cu_runner.config.run_config import check_run

    with tempfile.TemporaryDirectory() as folder:
        directory = unpack(path, Path(folder)) if path.is_file() else path
        config, _ = read_config(directory)
        try:
            name, allowed = directory.name.partition("-")[0], allowed_modules(allowing)
            plan = check_run(filled_in(config), name, allowed=allowed)
            sequence = plan.sequence.build()
        except ValueError:
            if has_intact_header((directory / "config.yaml").read_bytes()):
                raise
            # it is damaged, and nothing else can be told
            return report(str(path), verify_configuration(directory, config), quiet)
        quiet_libraries()
        findings = [*verify_run(directory, sequence, config), *verify_origin(directory, plan)]
    return report(str(path), findings, quiet)


def verify_origin(directory: Path, plan: RunConfig) -> Iterable[Finding]:
    """Find out whether what measures is, by this configuration, what the run began with.

    That is the model, the evaluator and what measures the retention.
    """
    record, problem = read_record(step_dir(directory, 0) / STEP)
    if record is None or problem is not None:  # said already
        return
    parts: dict[str, Node[Any]] = {"model": plan.model, "evaluator": plan.evaluator}
    if plan.retention is not None:
        parts["retention"] = plan.retention
    for name, node in parts.items():
        try:
            part = node.build(device="cpu")
            if isinstance(part, Retention):
                part.load()
            found = part.fingerprint()
        except (ModelError, WeightFileError, OSError) as error:
            yield Finding(f"weights of the {name}", None, str(error).splitlines()[0])
            continue
        same = found == vars(record)[f"{name}_sha256"]
        yield Finding(
            f"weights of the {name}", same, "" if same else "are not those that the run began with"
        )


def report(title: str, findings: Iterable[Finding], quiet: bool) -> int:
    """Print findings as they come, one line each; return how many are wrong.

    quiet: leaves out what is well.
    """
    say(title)
    verdicts: Counter[bool | None] = Counter()
    for finding in findings:
        verdicts[finding.ok] += 1
        if finding.ok is not True or not quiet:
            detail = f": {finding.detail}" if finding.detail else ""
            say(f"  {MARKS[finding.ok]:<11} {finding.what}{detail}")
    end = "all well"
    if verdicts[False]:
        end = f"{verdicts[False]} wrong"
    elif verdicts[None]:
        end = f"{verdicts[None]} could not be made, the others are well"
    say(f"  {verdicts.total()} checks, {end}")
    return verdicts[False]
