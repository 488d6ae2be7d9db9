"""cu-table: a table of a paper from run directories, beside the published numbers, and the command
of every run that is missing.

A table is a YAML file of scripts/tables: rows and columns are lists of overrides, a cell is the run
that they compose to. Its signature names one directory; that one is opened and no other, so that a
number can never come from another configuration. Numbers are percent.

Exit status: 0 done, 1 a run failed, 2 the table or the configuration of a cell is wrong, 130
interrupted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cu_runner.cli.console import Parser, add_config_dir, whole_number, without_reader
from cu_runner.cli.failures import one_line_failures
from cu_runner.runtime.paths import config_dir


@without_reader
def main() -> None:
    """Call `cu-table` with its command line."""
    launchers = sorted(path.stem for path in (config_dir() / "hydra/launcher").glob("*.yaml"))
    parser = Parser(prog="cu-table", description=__doc__)
    parser.add_argument("table", help="name of a file of scripts/tables, or path of your own")
    parser.add_argument(
        "overrides",
        nargs="*",
        default=[],
        help="KEY=VALUE for every run, as for cu-run: model.path=..., allow_modules=...",
    )
    add_config_dir(parser)
    parser.add_argument(
        "--experiment",
        help="which model and sequences, from the table's own list; default: the first",
    )
    parser.add_argument(
        "--seeds",
        type=seed_list,
        default=[],
        help="0,1,2: several seeds become mean and 95%% interval",
    )
    parser.add_argument("--run", action="store_true", help="make the runs that are missing")
    parser.add_argument(
        "--jobs",
        type=whole_number,
        help="runs side by side; default: one per core, or one on a GPU",
    )
    parser.add_argument(
        "--launcher",
        choices=launchers,
        help="make them on a cluster, by this file of conf/hydra/launcher",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/tables"), help="where the files go"
    )
    arguments = parser.parse_intermixed_args()
    with one_line_failures("cu-table"):
        from cu_runner.cli.fill_table import produce

        produce(arguments)


def seed_list(text: str) -> list[int]:
    """Return the seeds of an option: "0,1,2". Raises ArgumentTypeError."""
    try:
        seeds = [int(entry) for entry in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers; give 0,1,2"
        ) from None
    if len(set(seeds)) < len(seeds):
        raise argparse.ArgumentTypeError(
            f"{text!r} names a seed twice, which is one run; give each once"
        )
    return seeds
