"""Hydra reads what it has read before from memory: the tests compose some thousand configurations,
most of them from the same files and with the same overrides.

What is kept: how a text of YAML, an override and an interpolation were parsed, and what the files
of conf/ compose to for a choice of files. Every answer is a copy. A tree beside conf/ is read anew
each time, a changed file of conf/ too. What fails is never kept. The installed commands, which some
tests start, know nothing of this.
"""

import copy
import dataclasses
import functools
import io
import os
import pickle

import omegaconf
from hydra._internal import config_loader_impl, defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

KEPT_OF_OVERRIDES = ("known_choices", "known_choices_per_group")


def remember() -> None:
    """Begin, once for this process and those that it forks."""
    if not hasattr(OverridesParser.parse_rule, "__wrapped__"):
        _remember_interpolations()
        _remember_overrides()
        _remember_yaml()
        _remember_compositions()


def _remember_interpolations() -> None:
    parse = functools.cache(omegaconf.base.parse)  # a tree that is only read
    omegaconf.base.parse = omegaconf._utils.parse = parse


def _remember_overrides() -> None:
    parse_rule, known = OverridesParser.parse_rule, {}

    @functools.wraps(parse_rule)
    def remembered(self: OverridesParser, text: str, rule: str) -> object:
        if (text, rule) not in known:
            known[text, rule] = parse_rule(self, text, rule)
        return copy.deepcopy(known[text, rule])

    OverridesParser.parse_rule = remembered


def _remember_yaml() -> None:
    load, known = OmegaConf.load, {}
    omegaconf._utils.get_yaml_loader = functools.cache(omegaconf._utils.get_yaml_loader)

    @functools.wraps(load)
    def remembered(file: object) -> object:
        if not hasattr(file, "read"):
            return load(file)
        text = file.read()
        if text not in known:
            known[text] = pickle.dumps(load(io.StringIO(text)))
        return pickle.loads(known[text])

    OmegaConf.load = staticmethod(remembered)


def _state(repo: object) -> tuple | None:
    """What the sources of a composition are made of; None where one is neither conf/ nor code."""
    found = []
    for source in repo.get_sources():
        if source.scheme() == "file":
            if source.provider != "main":
                return None
            for folder, _, names in os.walk(source.path):
                for name in names:
                    path = f"{folder}/{name}"
                    about = os.stat(path)
                    found.append((path, about.st_mtime_ns, about.st_size))
        found.append((source.scheme(), source.path))
    return tuple(found)


def _remember_compositions() -> None:
    list_defaults, known_lists = defaults_list.create_defaults_list, {}
    merge, known_merges = ConfigLoaderImpl._compose_config_from_defaults_list, {}

    @functools.wraps(list_defaults)
    def listed(repo, config_name, overrides_list, prepend_hydra, skip_missing):
        options = (config_name, overrides_list, prepend_hydra, skip_missing)
        state = _state(repo)
        if state is None:
            return list_defaults(repo, *options)
        overrides = defaults_list.Overrides(repo=repo, overrides_list=overrides_list)
        settings = {id(override) for override in overrides.config_overrides}
        files = tuple(
            override.input_line for override in overrides_list if id(override) not in settings
        )
        key = (state, config_name, files, prepend_hydra, skip_missing)
        if key not in known_lists:
            made = list_defaults(repo, *options)
            choices = {name: getattr(made.overrides, name) for name in KEPT_OF_OVERRIDES}
            known_lists[key] = pickle.dumps((made.defaults, made.defaults_tree, choices))
        defaults, tree, choices = pickle.loads(known_lists[key])
        for name, value in choices.items():
            setattr(overrides, name, value)
        return defaults_list.DefaultsList(
            defaults=defaults,
            defaults_tree=tree,
            config_overrides=overrides.config_overrides,
            overrides=overrides,
        )

    @functools.wraps(merge)
    def merged(self: ConfigLoaderImpl, defaults, repo):
        state = _state(repo)
        if state is None:
            return merge(self, defaults, repo)
        key = (state, tuple(dataclasses.astuple(entry) for entry in defaults))
        if key not in known_merges:
            known_merges[key] = pickle.dumps(merge(self, defaults, repo))
        return pickle.loads(known_merges[key])

    config_loader_impl.create_defaults_list = listed
    ConfigLoaderImpl._compose_config_from_defaults_list = merged
