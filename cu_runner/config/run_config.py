"""A whole run, checked: the typed settings, the parts to build, the signature and the directory."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cu_runner.config.targets import Node, check_file_name, check_keys, make_node, make_regularizer
from cu_runner.runtime.code_identity import CodeIdentity, identify
from cu_runner.schema.errors import ConfigError
from cu_runner.schema.secrets import refuse_secrets
from cu_runner.schema.settings import PlanSettings, Spine
from cu_runner.schema.validate import validate
from cu_runner.schema.values import ConfigTree, numbers_by_value, walk_leaves, without_paths
from cu_runner.store.directories import choose_directory
from cu_runner.store.signature import NOT_SCIENTIFIC, file_hashes, signature

MISSING = "???"


LONGEST = 124  # characters of a run directory's name, which is also the id of its W&B run: 128, and a number may follow


@dataclass(frozen=True)
class RunConfig:
    """A whole run, checked. `resolved` is what config.yaml of the run directory holds."""

    spine: Spine
    model: Node
    evaluator: Node
    sequence: Node
    method: Node
    regularizers: dict[str, Node]
    retention: Node | None  # None: what general prompts keep is not measured
    setting: PlanSettings
    method_name: str
    tuned: bool  # whether conf/tuned has settings for this method with these regularizers, where it has any at all
    resolved: ConfigTree
    allowed: tuple[str, ...]  # modules of the user's that a _target_ may name

    @property
    def signature(self) -> str:
        return signature(self.resolved)

    @property
    def training_key(self) -> ConfigTree:
        """What the training of a request from the base model depends on, besides the request and the model's weights."""
        # the weights behind the path are in the key by their fingerprint
        places = ("model.path", "model.revision", "model.config")
        science = without_paths(self.resolved, (*NOT_SCIENTIFIC, *places))
        settings = {
            key: science[key] for key in ("seed", "train", "anchors", "method", "sequence", "model")
        }
        settings["setting"] = {
            key: value for key, value in self.resolved["setting"].items() if key != "plan"
        }
        if self.setting.stop_at is not None:  # then the evaluation decides when training ends
            settings |= {"evaluator": self.resolved["evaluator"], "eval": self.resolved["eval"]}
        training = {
            name: node
            for name, node in self.regularizers.items()
            if node.function.acts_on != ("weights",)
        }
        settings["reg"] = [[name, self.resolved["reg"][name]] for name in training]
        settings["files"] = file_hashes(self.resolved)
        settings["code"] = self.code.sha256
        return numbers_by_value(settings)

    @property
    def name(self) -> str:
        """<method>-<reg+reg|none>-<setting>-s<seed>-<sig8>: a contract, other tools read it."""
        regularizers = "+".join(self.regularizers) or "none"
        return f"{self.method_name}-{regularizers}-{self.setting.plan}-s{self.spine.seed}-{self.signature[:8]}"

    @cached_property
    def directory(self) -> Path:
        """outputs/runs/<sequence>/<name>, or <name>-2, <name>-3, ... beside it where other code made the first; chosen once."""
        folder = Path(self.spine.paths.outputs) / "runs" / str(self.sequence.arguments["name"])
        return choose_directory(folder / self.name, self.code, self.spine.fresh)

    @cached_property
    def code(self) -> CodeIdentity:
        """The code that decides its numbers: this package's, and that of the user's modules which it names."""
        shown = [
            self.model,
            self.evaluator,
            self.sequence,
            *([self.retention] if self.retention else []),
        ]
        return identify(
            self._modules([*shown, self.method, *self.regularizers.values()]), self._modules(shown)
        )

    def _modules(self, nodes: list[Node]) -> tuple[str, ...]:
        """Those of the allowed modules that hold one of these classes."""
        names = [
            name for node in nodes for name in (f"{node.target}.", f"{node.function.__module__}.")
        ]
        return tuple(
            sorted(
                {
                    module
                    for module in self.allowed
                    for name in names
                    if name.startswith(f"{module}.")
                }
            )
        )


CODE = ("fresh", "allow_other_code")  # not as the run itself had them


def check_run(
    resolved: ConfigTree,
    method_name: str,
    tuned: bool = True,
    allowed: tuple[str, ...] = (),
) -> RunConfig:
    """Check a resolved configuration, as config.yaml of a run directory holds one. Raises ConfigError.

    allowed: modules beside cu_runner that a `_target_` may name.
    """
    for group, name in [("method", method_name), *(("reg", name) for name in resolved["reg"])]:
        check_file_name(group, str(name))
    check_keys(resolved)
    refuse_secrets(walk_leaves(resolved))
    missing = [path for path, value in walk_leaves(resolved) if value == MISSING]
    if missing:
        raise ConfigError(
            f"not set, and without a default: {', '.join(missing)}; add {' '.join(f'{key}=...' for key in missing)}"
        )
    for path, value in walk_leaves(resolved):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}={value}: not a finite number; give a finite one")
    if not resolved.get("retention"):  # off: then it is no part of the run, nor of its signature
        resolved.pop("retention", None)
    groups = {"model", "evaluator", "sequence", "method", "reg", "retention", "setting"}
    known = groups | {field.name for field in dataclasses.fields(Spine)}
    unknown = sorted(set(resolved) - known)
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
    spine = validate(Spine, {key: resolved[key] for key in resolved if key not in groups}, "")
    if spine.fresh and spine.allow_other_code:
        raise ConfigError(
            "fresh and allow_other_code: one makes a new run, the other goes on with an old one; give one of them"
        )
    regularizers = {
        name: make_regularizer(name, node, resolved["reg"], allowed)
        for name, node in resolved["reg"].items()
    }
    setting = validate(PlanSettings, resolved["setting"], "setting")
    if setting.last_only and setting.plan != "simultaneous":
        raise ConfigError(
            f"setting.last_only: requests are {setting.plan}, and each needs its own; use setting=simultaneous"
        )
    if not setting.last_only:  # as every run of earlier versions, whose signatures do not have it
        resolved["setting"] = without_paths(resolved["setting"], ("last_only",))
    merging = [name for name, node in regularizers.items() if node.function.independent_starts]
    if merging and setting.plan == "simultaneous":
        raise ConfigError(
            f"reg={merging[0]} merges requests that each start from the base model; use setting=independent"
        )
    if merging and setting.plan == "sequential":
        resolved["setting"] = {**resolved["setting"], "plan": "independent"}
        setting = dataclasses.replace(setting, plan="independent")
    plan = RunConfig(
        spine=spine,
        model=make_node("model", resolved["model"], allowed),
        evaluator=make_node("evaluator", resolved["evaluator"], allowed),
        sequence=make_node("sequence", resolved["sequence"], allowed),
        method=make_node("method", resolved["method"], allowed),
        regularizers=regularizers,
        retention=make_node("retention", resolved["retention"], allowed)
        if "retention" in resolved
        else None,
        setting=setting,
        method_name=method_name,
        tuned=tuned,
        resolved=resolved,
        allowed=allowed,
    )
    if len(plan.name) > LONGEST:
        raise ConfigError(
            f"reg: the run's directory would have a name of {len(plan.name)} characters; at most {LONGEST}"
        )
    return plan
