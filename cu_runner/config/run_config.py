"""A whole run, checked: the typed settings, the parts to build, the signature and the directory."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cu_runner.concepts.requests import Request, plan_requests
from cu_runner.concepts.sequence import Concept, Sequence
from cu_runner.config.check_values import check_values, with_composed
from cu_runner.config.plan_setting import check_setting
from cu_runner.config.targets import Node, make_entry, make_node
from cu_runner.evaluators.base import Evaluator
from cu_runner.methods.base import Method
from cu_runner.models.diffusion import DiffusionModel
from cu_runner.models.unlearned import hash_checkpoint
from cu_runner.recovery.affordable import QUARTER, affordable
from cu_runner.recovery.base import Probe
from cu_runner.regularizers.base import Regularizer
from cu_runner.retention.base import Retention
from cu_runner.runtime.code_identity import CodeIdentity, identify
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.settings import PlanSettings, Spine
from cu_runner.schema.validate import validate
from cu_runner.schema.values import ConfigTree, numbers_by_value, walk_leaves, without_paths
from cu_runner.schema.words import did_you_mean
from cu_runner.store.directories import choose_directory
from cu_runner.store.signature import (
    NOT_SCIENTIFIC,
    PICTURES_OF,
    file_hashes,
    hashes_of,
    signature,
    without_unset,
)
from cu_runner.trackers.base import Tracker

GROUPS = (
    "model",
    "evaluator",
    "sequence",
    "method",
    "reg",
    "retention",
    "recovery",
    "setting",
    "tracker",
)
# The weights there have a fingerprint.
PLACES = ("model.path", "model.revision", "model.config", "model.shared")
# Characters of a run directory's name, which is also the id of its W&B run (128 at most); a number
# may follow.
LONGEST = 124


@dataclass(frozen=True)
class RunConfig:
    """A whole run, checked.

    retention: None where what general prompts keep is not measured. probes: of recovery, by name.
    tuned: whether conf/tuned, or conf/training, has settings for this method with these
    regularizers, where conf/tuned has any at all. resolved: what config.yaml of the run directory
    holds. allowed: the user's modules that a _target_ may name. notes: what whoever starts the run
    should know of where its settings come from. trackers: of the run, by name; they are no part of
    it.
    """

    spine: Spine
    model: Node[DiffusionModel]
    evaluator: Node[Evaluator]
    sequence: Node[Sequence]
    method: Node[Method[Any]]
    regularizers: dict[str, Node[Regularizer]]
    retention: Node[Retention] | None
    probes: dict[str, Node[Probe]]
    setting: PlanSettings
    method_name: str
    tuned: bool
    resolved: ConfigTree
    allowed: tuple[str, ...]
    notes: tuple[str, ...] = ()
    trackers: dict[str, Node[Tracker]] = field(default_factory=dict)

    @property
    def signature(self) -> str:
        """Return the hash that names the experiment."""
        return signature(self.resolved)

    @property
    def training_key(self) -> ConfigTree:
        """Return what the training of a request from the base model depends on.

        The request, the model's fingerprint and the code come on top.
        """
        science = without_paths(self.resolved, (*NOT_SCIENTIFIC, *PLACES))
        parts = ("seed", "train", "anchors", "method", "sequence", "model")
        settings = {key: science[key] for key in parts}
        settings["train"] = without_unset(science["train"])
        settings["setting"] = without_paths(self.resolved["setting"], ("plan",))
        if self.setting.stop_at is not None:  # then the evaluation decides when training ends
            settings |= {"evaluator": self.resolved["evaluator"], "eval": science["eval"]}
        settings["reg"] = [
            [name, self.resolved["reg"][name]]
            for name, node in self.regularizers.items()
            if node.made.acts_on != ("weights",)
        ]
        settings["files"] = file_hashes(self.resolved)
        return numbers_by_value(settings)

    def requests(self, sequence: Sequence) -> list[Request]:
        """Return the requests of the run.

        Raises:
            ConfigError: the images of one's own do not show, after one of them, all that RA_C is
                measured on; or eval.every names a request that there is not.
        """
        if sequence.parts and self.setting.plan == "simultaneous":
            raise ConfigError(
                f"setting=simultaneous: trains all targets with the prompts of one domain, and "
                f"those of {sequence.name} are of {' and '.join(sequence.parts)}; use "
                "setting=sequential or independent"
            )
        planned = plan_requests(sequence, self.setting.plan, self.setting.last_only)
        self.spine.eval.require_requests(len(planned))
        self.require_shown(sequence, "no request", sequence.targets)
        for request, concepts in zip(planned, self.unlearned(planned), strict=True):
            self.require_shown(sequence, request.label, concepts)
        return planned

    @property
    def merges(self) -> bool:
        """Tell whether a regularizer merges: two files of weights per request then."""
        return any(node.made.independent_starts for node in self.regularizers.values())

    def unlearned(self, requests: list[Request]) -> list[list[Concept]]:
        """Return what each request's measured weights have unlearned; merged: all so far."""
        return [list(each.requested if self.merges else each.erased) for each in requests]

    def require_shown(self, sequence: Sequence, label: str, concepts: Iterable[Concept]) -> None:
        """Raise ConfigError unless the images that measure these concepts are enough for RA-C."""
        if lacking := sequence.lacks(concepts):
            raise ConfigError(
                f"sequence.prompts={self.sequence.arguments['prompts']}: after {label}, no image "
                f"shows {sequence.cross_domain} {lacking[0]!r}, and RA-C needs every entry of "
                "sequence.cross_retain; add rows, best of retained concepts, or shorten "
                "sequence.cross_retain"
            )

    def files_of(self, node: Node[Any]) -> dict[str, str]:
        """Return the sha256 of every file that the arguments of a part name, by their value."""
        return hashes_of(value for _, value in walk_leaves(node.arguments))

    @property
    def name(self) -> str:
        """Return <method>-<reg+reg|none>-<setting>-s<seed>-<sig8>: other tools read it."""
        regularizers = "+".join(self.regularizers) or "none"
        start = f"{self.method_name}-{regularizers}-{self.setting.plan}"
        return f"{start}-s{self.spine.seed}-{self.signature[:8]}"

    @cached_property
    def directory(self) -> Path:
        """Return outputs/runs/<sequence>/<name>, chosen once.

        Where other code made the first, it is <name>-2, <name>-3, ... beside it.
        """
        folder = Path(self.spine.paths.outputs) / "runs" / str(self.sequence.arguments["name"])
        return choose_directory(folder / self.name, self.code, self.spine.fresh)

    @cached_property
    def code(self) -> CodeIdentity:
        """Return the code that decides its numbers: this package's and the user's that it names."""
        shown: list[Node[Any]] = [self.model, self.evaluator, self.sequence]
        shown += [self.retention] if self.retention else []
        shown += self.probes.values()
        trained: list[Node[Any]] = [self.method, *self.regularizers.values()]
        return identify(self._modules([*shown, *trained]), self._modules(shown))

    def _modules(self, nodes: list[Node[Any]]) -> tuple[str, ...]:
        """Return those of the allowed modules that hold one of these classes."""
        homes = {f"{home}." for node in nodes for home in (node.target, node.function.__module__)}
        return tuple(
            sorted(
                module
                for module in set(self.allowed)
                if any(home.startswith(f"{module}.") for home in homes)
            )
        )


def check_run(
    resolved: ConfigTree, method_name: str, tuned: bool = True, allowed: tuple[str, ...] = ()
) -> RunConfig:
    """Check a resolved configuration, as config.yaml of a run directory holds one.

    Args:
        resolved: is changed where settings follow from others.
        method_name: the public name of the method.
        tuned: as in RunConfig.
        allowed: modules beside cu_runner that a `_target_` may name.

    Raises:
        ConfigError: one line with what is wrong.
    """
    check_values(resolved, method_name)
    if isinstance(sequence := resolved["sequence"], dict):
        resolved["sequence"] = {
            key: value if key in PICTURES_OF else with_composed(value)
            for key, value in sequence.items()
            if value or key not in PICTURES_OF  # not given: as if it were not known
        }
    for group in ("retention", "recovery"):  # off: then no part of the run, nor of its signature
        if not resolved.get(group):
            resolved.pop(group, None)
    if isinstance(method := resolved["method"], dict) and method.get("also_called", "") is None:
        resolved["method"] = without_paths(method, ("also_called",))  # as if it were not known
    if isinstance(method, dict) and "checkpoint" in method and method.get("sha256") is None:
        resolved["method"] = method | {"sha256": hash_checkpoint(str(method["checkpoint"]))}
    # no part of the run: the same run may be followed by others when it is resumed
    followers = resolved.pop("tracker", None) or {}
    known = {*GROUPS, *(field.name for field in dataclasses.fields(Spine))}
    if unknown := sorted(set(resolved) - known):
        meant = did_you_mean(unknown[0], known)
        raise ConfigError(f"unknown key {unknown[0]!r}{meant}; allowed: {', '.join(sorted(known))}")
    trackers = {
        name: make_entry("tracker", name, followers, Tracker, allowed) for name in followers
    }
    spine = validate(Spine, {key: resolved[key] for key in resolved if key not in GROUPS}, "")
    if spine.fresh and spine.allow_other_code:
        raise ConfigError(
            "fresh and allow_other_code: one makes a new run, the other goes on with an old one; "
            "give one of them"
        )
    regularizers = {
        name: make_entry("reg", name, resolved["reg"], Regularizer, allowed)
        for name in resolved["reg"]
    }
    chosen = resolved.get("recovery", {})
    thinned = [name for name, entry in chosen.items() if asks_for_quarter(entry)]
    for name in thinned:
        chosen[name]["every"] = 1  # until the requests are known
    probes = {
        name: make_entry("recovery", name, chosen, Probe, allowed)  # type: ignore[type-abstract]
        for name in chosen
    }
    retention = None
    if "retention" in resolved:
        retention = make_node("retention", resolved["retention"], Retention, allowed)  # type: ignore[type-abstract]
    method_node = make_node("method", resolved["method"], Method, allowed)  # type: ignore[type-abstract]
    if method_node.made.whole_sequence:
        if regularizers:
            raise ConfigError(
                f"reg={'+'.join(regularizers)}: with method={method_name} nothing is trained; "
                "leave reg out"
            )
        whole = {"plan": "simultaneous", "last_only": True}
        resolved["setting"] = {**resolved["setting"], **whole}
    plan = RunConfig(
        spine=spine,
        model=make_node("model", resolved["model"], DiffusionModel, allowed),
        evaluator=make_node("evaluator", resolved["evaluator"], Evaluator, allowed),  # type: ignore[type-abstract]
        sequence=make_node("sequence", resolved["sequence"], Sequence, allowed),
        method=make_node("method", resolved["method"], Method, allowed),  # type: ignore[type-abstract]
        regularizers=regularizers,
        retention=retention,
        probes=probes,
        setting=check_setting(resolved, regularizers),
        method_name=method_name,
        tuned=tuned,
        resolved=resolved,
        allowed=allowed,
        trackers=trackers,
    )
    if thinned:
        plan = thin_out(plan, thinned)
    if len(plan.name) > LONGEST:
        raise ConfigError(
            f"reg: the run's directory would have a name of {len(plan.name)} characters; "
            f"at most {LONGEST}"
        )
    return plan


def asks_for_quarter(entry: object) -> bool:
    """Tell whether a probe shall measure as often as is affordable."""
    return isinstance(entry, dict) and entry.get("every") == QUARTER


def thin_out(plan: RunConfig, names: list[str]) -> RunConfig:
    """Return a plan in which these probes of recovery measure as often as is affordable."""
    sequence = plan.sequence.build()
    made = {name: plan.probes[name].build() for name in names}
    for probe, facing in itertools.product(made.values(), sequence.by_domain):
        probe.check(facing)
    every, said = affordable(made, plan.unlearned(plan.requests(sequence)), sequence)
    probes, chosen = dict(plan.probes), plan.resolved["recovery"]
    for name in names:
        chosen[name]["every"] = every
        probes[name] = make_entry("recovery", name, chosen, Probe, plan.allowed)  # type: ignore[type-abstract]
    return dataclasses.replace(plan, probes=probes, notes=(said,) if said else ())
