"""cu-export: the weights of a run's step for other programs: a diffusers directory, a single file
of the original layout, a LoRA, or the change alone. Each has a model card.

    cu-export outputs/runs/shapecanvas_style/conabl-gradproj-sequential-s0-0f1b6c4a \\
              --to diffusers my_model
    cu-export RUN --step 3 --to lora --keep 0.99 my_lora
    cu-export RUN --to delta my_delta --push-to-hub NAME      # of a run with reg=gate, too

The step is held against its hashes first, and the base model against that which the run began with;
where it lies elsewhere by now: model.path=DIR. DIR is written whole or not at all.

Exit status: 0 done, 1 the run is damaged or the hub took nothing, 2 bad input.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from cu_runner.cli.console import (
    Parser,
    add_config_dir,
    quiet_libraries,
    say,
    whole_number,
    without_reader,
)
from cu_runner.cli.failures import one_line_failures
from cu_runner.cli.report import writing_to
from cu_runner.runtime import progress
from cu_runner.store.run_record import read_run

if TYPE_CHECKING:
    from cu_runner.runner.export import Exported
    from cu_runner.schema.values import ConfigTree
    from cu_runner.store.run_record import RunRecord

FORMS = ("diffusers", "single-file", "lora", "delta")
TAKEN = (
    *("model.path", "model.revision", "model.config", "model.shared", "model.allow_pickle"),
    "allow_modules",
)


@without_reader
def main() -> None:
    """Call `cu-export` with its command line."""
    parser = Parser(prog="cu-export", description=__doc__)
    parser.add_argument(
        "run", type=Path, help="a run directory, or one of its evaluations: its metrics are told"
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the files go")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        help="where the base model lies by now: model.path=DIR; allow_modules=... of one that "
        "your own code loads",
    )
    parser.add_argument("--to", required=True, choices=FORMS, help="in which form")
    parser.add_argument(
        "--step", type=whole_number, metavar="N", help="after which request; default: the last"
    )
    parser.add_argument(
        "--rank", type=whole_number, metavar="R", help="of a LoRA: its rank, for all layers"
    )
    parser.add_argument(
        "--keep",
        type=part,
        metavar="PART",
        help="of a LoRA: the part of the change's squared norm that its rank has to keep; default: "
        "0.999, and all of it where that takes no more numbers than the change itself",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what cu-export wrote there before"
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="NAME",
        help="also upload it to the Hugging Face hub, as who is logged in there; a new repository "
        "is private",
    )
    add_config_dir(parser)
    arguments = parser.parse_intermixed_args()
    if "=" in arguments.directory.name and not arguments.directory.exists():
        parser.error(f"{arguments.directory}: is an override; give DIR before it")
    if arguments.to != "lora" and (arguments.rank or arguments.keep):
        parser.error("--rank and --keep are of --to lora")
    if arguments.rank and arguments.keep:
        parser.error("--rank and --keep both choose the rank; give one of them")
    with one_line_failures("cu-export"), progress.on_stderr():
        produce(arguments)


def part(text: str) -> float:
    """Read a number above 0 and up to 1, as the value of an option."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and up to 1")
    return value


def produce(arguments: argparse.Namespace) -> None:
    """Prove the step, write its files and its card, and push them if asked to."""
    run = read_run(arguments.run.resolve())
    index = chosen_step(run, arguments.step)

    from cu_runner.reporting.base_model import CARD
    from cu_runner.reporting.model_card import is_export, model_card
    from cu_runner.runner.export import refuse_gates
    from cu_runner.runner.finished import prove_step
    from cu_runner.runner.hub import check_login, push
    from cu_runner.store.whole_directory import refuse_taken, whole_directory

    directory = arguments.directory.expanduser()
    refuse_taken(directory, arguments.overwrite, is_export)
    config, allowed = own_place(run, arguments)
    prove_step(run, index)
    refuse_gates(run, index, arguments.to)
    if arguments.push_to_hub:
        check_login(arguments.push_to_hub)
    quiet_libraries()
    with (
        writing_to(directory, "DIR"),
        whole_directory(directory, arguments.overwrite, is_export) as folder,
    ):
        exported = write(run, index, arguments, config, allowed, folder)
        card = model_card(run, index, exported, folder)
        (folder / CARD).write_text(card, encoding="utf-8")
    say(describe(exported, run, index))
    if arguments.push_to_hub:
        said = f"cu-export --to {arguments.to}: {run.directory.name}, request {index}"
        told = {"overwrite": arguments.overwrite, "said": said}
        say(f"pushed: {push(directory, arguments.push_to_hub, **told)}")
    say(f"export: {shlex.quote(str(directory))}")


def chosen_step(run: RunRecord, asked: int | None) -> int:
    """Return the step to export. Raises ValueError for one that is not there."""
    last = len(run.records) - 1
    if not last:
        raise ValueError(f"{run.directory}: no request is finished; run its cu-run command first")
    if asked is not None and asked > last:
        raise ValueError(f"--step {asked}: the run has finished requests 1 to {last}")
    return last if asked is None else asked


def own_place(run: RunRecord, arguments: argparse.Namespace) -> tuple[ConfigTree, tuple[str, ...]]:
    """Return the run's configuration with the base model where it lies now, and allowed modules.

    Raises:
        ConfigError: an override of something else.
    """
    from cu_runner.config.command import key_of
    from cu_runner.config.permissions import allowed_modules, refuse_unasked_pickles
    from cu_runner.config.revise import revise
    from cu_runner.schema.errors import ConfigError

    for override in arguments.overrides:
        if key_of(override) not in TAKEN:
            said = "an export is of the weights as the run has them"
            raise ConfigError(f"{override}: {said}; allowed: {', '.join(TAKEN)}")
    allowed = allowed_modules(arguments.overrides)
    revised = revise(run.config, arguments.overrides, arguments.config_dir)
    refuse_unasked_pickles({"model": revised["model"]}, arguments.overrides)
    return revised, allowed


def write(
    run: RunRecord,
    index: int,
    arguments: argparse.Namespace,
    config: ConfigTree,
    allowed: tuple[str, ...],
    folder: Path,
) -> Exported:
    """Write the files of a step in the form that is asked for."""
    from cu_runner.runner.export import (
        write_delta,
        write_diffusers,
        write_lora,
        write_single_file,
    )
    from cu_runner.runner.finished import load_step

    if arguments.to == "delta":
        return write_delta(run, index, folder)
    model = load_step(run, index, config=config, allowed=allowed)
    if arguments.to == "lora":
        return write_lora(run, index, model, folder, rank=arguments.rank, keep=arguments.keep)
    return (write_diffusers if arguments.to == "diffusers" else write_single_file)(model, folder)


def describe(exported: Exported, run: RunRecord, index: int) -> str:
    """Return the line that says what was written."""
    from cu_runner.reporting.model_card import percent_kept

    concepts = ", ".join(run.unlearned(index))
    line = f"{exported.form}: {run.directory.name} after request {index}, without {concepts}"
    if exported.lora is None:
        return line
    found = exported.lora
    left = "all but rounding" if found.exact else f"{percent_kept(found.kept)} of the squared norm"
    return f"{line}\nlora: rank {found.rank}, {len(found.factors)} matrices; it keeps {left}"
