"""What a command line and the files that it brings in may do: run no foreign code, write no secret.

A configuration file may come from somebody else. Whoever types the command is trusted, and so is
conf/; other trees are not.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Annotated, NoReturn

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from cu_runner.config.command import key_of, refuse_long_keys
from cu_runner.runtime.paths import config_dir
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.secrets import refuse_secrets
from cu_runner.schema.validate import validate
from cu_runner.schema.values import ConfigTree, walk_leaves
from cu_runner.schema.words import Matches
from cu_runner.schema.yaml_files import check_depth, check_tree

MODULE = "the name of a module as Python imports it: package.module"
ModuleName = Annotated[str, Matches(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", MODULE)]


def check_command(arguments: list[str]) -> Namespace:
    """Return Hydra's options and the overrides of a command line, if it may be composed.

    One that would write a secret or run a file's code is refused with ConfigError.

    Hydra itself instantiates what its own node names (callbacks, launchers, logging, a shell's
    set-up lines) before a job begins. That node is for conf/ and the command line; the trees of
    --config-dir and hydra.searchpath may not touch it.
    """
    refuse_secrets(
        (f"argument {number}", argument) for number, argument in enumerate(arguments, start=1)
    )
    parser = get_args_parser()
    parser.error = complain
    options = parser.parse_args(arguments)
    if options.experimental_rerun:
        raise ConfigError(
            "--experimental-rerun: unpickles a file, which can run code; give the overrides instead"
        )
    if options.config_path or options.config_name:
        raise ConfigError(
            "--config-path and --config-name replace conf/config.yaml, which every run needs; "
            "add a tree by --config-dir"
        )
    if options.config_dir and not Path(options.config_dir).is_dir():
        raise ConfigError(f"--config-dir {options.config_dir}: no such directory")
    refuse_long_keys(options.overrides)
    for override in options.overrides:
        check_depth(key_of(override), override)
    for folder in (options.config_dir, *searched_folders(options.overrides)):
        if folder:
            check_tree(Path(folder.removeprefix("file://")))
    check_trees(
        ConfigLoaderImpl(search_path(options.config_dir)),
        options.overrides,
        RunMode.MULTIRUN if options.multirun else RunMode.RUN,
    )
    return options


def search_path(tree: str | None) -> ConfigSearchPath:
    """Return where Hydra looks for files: conf/, then the tree of --config-dir."""
    path = create_config_search_path(str(config_dir()))
    if tree:
        place = f"file://{Path(tree).absolute()}"
        path.prepend("command-line", place, SearchPathQuery(provider="schema"))  # as Hydra does
    return path


def refuse_repeated_keys(overrides: list[str], sweep: bool) -> None:
    """Refuse with ConfigError a key that is given twice with two values: the last alone counts."""
    # of `~reg +reg={...}` the second replaces what the first takes away
    setting = [text for text in dict.fromkeys(overrides) if not text.startswith("~")]
    given = Counter(map(key_of, setting))
    if repeated := [key for key, count in given.items() if count > 1]:
        said = [text for text in setting if key_of(text) == repeated[0]]
        values = [text.partition("=")[2] for text in said]
        once = f"{repeated[0]}={','.join(values) if sweep else values[-1]}"
        raise ConfigError(
            f"{' '.join(said)}: {repeated[0]} is given {len(said)} times, and the last alone would "
            f"count; give it once, as in {once}"
        )


def complain(message: str) -> NoReturn:
    """Raise Hydra's complaint about the options as a ConfigError."""
    raise ConfigError(
        f"{message}; options stand together, before the overrides or after them (`cu-run --help`)"
    )


def check_trees(loader: ConfigLoader, overrides: list[str], mode: RunMode) -> None:
    """Refuse with ConfigError a file outside conf/ that sets anything of Hydra's own node.

    So is a file outside of all trees, which would be written into config.yaml.

    Args:
        loader: knows conf/ and the tree of --config-dir.
        overrides: bring files in, and with hydra.searchpath further trees.
    """
    sources = [source for source in loader.get_sources() if source.scheme() == "file"]
    ours = next(source for source in sources if source.provider == "main")
    others = [source for source in sources if source is not ours]
    others += [
        FileConfigSource("hydra.searchpath", folder) for folder in searched_folders(overrides)
    ]
    if not others and not any(".." in override for override in overrides):
        return  # conf/ alone is read, which is trusted
    for entry in loader.compute_defaults_list("config", overrides, mode).defaults:
        file = entry.config_path or ""
        if ".." in Path(file).parts or Path(file).is_absolute():
            raise ConfigError(
                f"{file}: a defaults list reaches out of the configuration trees; name a file "
                "inside of them, and a tree of yours by --config-dir"
            )
        for source in [] if ours.is_config(file) else others:  # ours comes first
            if source.is_config(file):
                placed = OmegaConf.create({"_": {}})
                OmegaConf.update(placed, entry.package or "_", source.load_config(file).config)
                if "hydra" in placed or "hydra" in placed["_"]:
                    raise ConfigError(
                        f"{source.path}/{file}.yaml: sets hydra.*, which can run code; "
                        "set it on the command line"
                    )


def searched_folders(overrides: list[str]) -> list[str]:
    """Return what hydra.searchpath names; ConfigError for all but folders (pkg:// imports)."""
    folders: list[str] = []
    asking = [text for text in overrides if "searchpath" in text]
    for override in OverridesParser.create().parse_overrides(asking):
        if override.key_or_group == "hydra.searchpath":
            folders = validate(list[str], override.value(), "hydra.searchpath")
    for folder in folders:
        if "://" in folder and not folder.startswith("file://"):
            raise ConfigError(
                f"hydra.searchpath: {folder} imports code; name a folder, "
                "as in hydra.searchpath=[file://DIR]"
            )
    return folders


def refuse_permissions(overrides: list[str], file: str) -> None:
    """Refuse with ConfigError a file's overrides that allow modules or pickles, or set hydra.*.

    What is no override is refused, too.
    """
    for override in overrides:
        try:
            parsed = OverridesParser.create().parse_override(override)
        except HydraException:
            said = "is no override; give KEY=VALUE, with quotes around text that is no plain word"
            raise ConfigError(f"{file}: {override!r} {said}") from None
        nodes = [
            re.split(r"[./]", place)[0] for place in (parsed.key_or_group, parsed.package or "")
        ]
        if "allow_" in override or "hydra" in nodes:
            raise ConfigError(f"{file}: {override} can run code; only the command line may set it")


def refuse_unasked_pickles(resolved: ConfigTree, overrides: list[str]) -> None:
    """Refuse with ConfigError an allow_pickle that names a file which the command line does not.

    A file must not vouch for itself.
    """
    asking = [text for text in overrides if "allow_pickle" in text]
    asked = [
        (override.key_or_group, {leaf for _, leaf in walk_leaves(override.value())})
        for override in OverridesParser.create().parse_overrides(asking)
    ]
    for path, file in walk_leaves(resolved):
        setting, found, _ = path.rpartition(".allow_pickle.")
        key = f"{setting}.allow_pickle"
        by_command = any(
            f"{key}.".startswith(f"{asker}.") and file in named for asker, named in asked
        )
        if found and not by_command:
            raise ConfigError(
                f"{key}: {file} is allowed by a file only; a pickle can run code: "
                f"if you trust it, give {key}=[{file}]"
            )


def allowed_modules(overrides: list[str]) -> tuple[str, ...]:
    """Return the modules beside cu_runner whose classes a `_target_` may name. Raises ConfigError.

    It is a permission of whoever types the command, no setting: neither in config.yaml nor in the
    signature.
    """
    allowed: list[str] = []
    for override in OverridesParser.create().parse_overrides(overrides):
        if override.key_or_group == "allow_modules":
            allowed = validate(list[ModuleName], override.value(), "allow_modules")
    return tuple(allowed)
