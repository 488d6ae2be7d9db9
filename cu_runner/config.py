"""From a composed Hydra configuration to checked plain values: the typed spine, the nodes to instantiate, the signature.

Only the files at the door (this one, trust.py, submission.py, cli.py) know Hydra and OmegaConf. Every complaint is a ConfigError
of one line: what was wrong, what is allowed, how to fix it. It is raised before a model is loaded.
"""

import dataclasses
import hashlib
import inspect
import math
from dataclasses import dataclass
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from cu_runner.credentials import names_secret, refuse_secrets
from cu_runner.help import config_dir
from cu_runner.nodes import ConfigError, Node, check, check_file_name, check_keys, make_node, make_regularizer
from cu_runner.settings import SettingChoice, Spine
from cu_runner.signature import NOT_SCIENTIFIC, Plain, drop, file_hashes, numbers_by_value, signature, walk
from cu_runner.trust import allowed_modules, refuse_unasked_pickles, searched_folders

MISSING = "???"
LONGEST = 128  # characters of a run directory's name, which is also the id of its W&B run


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
    setting: SettingChoice
    method_name: str
    tuned: bool  # whether conf/tuned has settings for this method with these regularizers, where it has any at all
    resolved: dict[str, Plain]

    @property
    def signature(self) -> str:
        return signature(self.resolved)

    @property
    def training_key(self) -> dict[str, Plain]:
        """What the training of a request from the base model depends on, besides the request and the model's weights."""
        # the weights behind the path are in the key by their fingerprint
        places = ("model.path", "model.revision", "model.config")
        science = drop(self.resolved, (*NOT_SCIENTIFIC, *places))
        settings = {key: science[key] for key in ("seed", "train", "anchors", "method", "sequence", "model")}
        settings["setting"] = {key: value for key, value in self.resolved["setting"].items() if key != "plan"}
        if self.setting.stop_at is not None:  # then the evaluation decides when training ends
            settings |= {"evaluator": self.resolved["evaluator"], "eval": self.resolved["eval"]}
        training = {name: node for name, node in self.regularizers.items() if node.function.acts_on != ("weights",)}
        settings["reg"] = [[name, self.resolved["reg"][name]] for name in training]
        settings["files"] = file_hashes(self.resolved)
        settings["code"] = {node.target: source_hash(node) for node in (self.method, *training.values())}
        return numbers_by_value(settings)

    @property
    def directory(self) -> Path:
        """outputs/runs/<sequence>/<method>-<reg+reg|none>-<setting>-s<seed>-<sig8>: a contract, other tools read it."""
        regularizers = "+".join(self.regularizers) or "none"
        name = f"{self.method_name}-{regularizers}-{self.setting.plan}-s{self.spine.seed}-{self.signature[:8]}"
        return Path(self.spine.paths.outputs) / "runs" / str(self.sequence.arguments["name"]) / name


# ----------------------------------------------------------------------------------------------------- resolvers
def _choice(group: str) -> str:
    """The chosen file of a configuration group: `${choice:method}` is "conabl"."""
    return str(HydraConfig.get().runtime.choices[group])


def _tuned(key: str, default: Plain, *, _root_: DictConfig) -> Plain:
    """A setting of conf/tuned for the chosen method and regularizers, else the default: `${tuned:train.lr,2e-4}`."""
    value = tuned_cell(_root_).get(key, default)
    return OmegaConf.create(value) if isinstance(value, dict | list) else value


def tuned_cell(config: DictConfig) -> dict[str, Plain]:
    """The entries of conf/tuned for the chosen method: those under "default", then those of its regularizers and its setting."""
    cells = method_cells(config)
    found = (cells.get("default"), regularizer_cell(config), cells.get(_choice("setting")))
    return {key: value for cell in found for key, value in (cell or {}).items()}


def method_cells(config: DictConfig) -> dict[str, Plain]:
    """All entries of conf/tuned for the chosen method."""
    method = _choice("method")
    cells = config.tuned.get(method) if "tuned" in config else None
    entries = OmegaConf.to_container(cells) if OmegaConf.is_config(cells) else cells
    found = check(dict[str, dict[str, object] | None], entries or {}, f"tuned.{method}")
    return {name: cell or {} for name, cell in found.items()}


def regularizer_cell(config: DictConfig) -> dict[str, Plain] | None:
    """The entry for the chosen regularizers, in their order; None if there is none."""
    return method_cells(config).get("+".join(str(name) for name in config.reg) or "none")


def _concepts(*, _root_: DictConfig) -> DictConfig:
    """The concepts of the chosen sequence by domain, as labels of a judge that needs no training: `${concepts:}`."""
    sequence = _root_.sequence
    return OmegaConf.create({sequence.domain: sequence.targets + sequence.retain, sequence.cross_domain: sequence.cross_retain})


def _environment(name: str, *default: str | None) -> str | None:
    """OmegaConf's own `${oc.env:NAME,default}`, but for names of secrets: what is resolved is written to config.yaml."""
    if names_secret(name):
        raise ConfigError(f"oc.env:{name}: looks like a secret, and config.yaml would hold it; rename the variable if it is none")
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
OmegaConf.register_new_resolver("choice", _choice, replace=True)
OmegaConf.register_new_resolver("concepts", _concepts, replace=True)
OmegaConf.register_new_resolver("tuned", _tuned, replace=True)


# -------------------------------------------------------------------------------------------------------- parsing
def compose(overrides: list[str]) -> RunConfig:
    """The checked configuration that `cu-run` makes of a command line. Raises ConfigError, or an error of Hydra's own."""
    searched_folders(overrides)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_dir()), version_base="1.3"):
        config = hydra.compose("config", overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    return parse(OmegaConf.masked_copy(config, [key for key in config if key != "hydra"]))


# What decides how a run is measured and on what machine, not what it trained.
CHOICES = ("evaluator", "retention")  # groups of which cu-eval may take another file
SHOWN = ("seeds", "retain", "cross_retain", "prompt", "prompts")  # what a sequence says of evaluation images
MEASUREMENT = (*CHOICES, "eval", *(f"sequence.{key}" for key in SHOWN))
MACHINE = ("device", "num_threads", "model.path", "model.revision", "model.config", "model.allow_pickle", "model.precision")


def revise(resolved: dict[str, Plain], overrides: list[str]) -> dict[str, Plain]:
    """A run's resolved configuration with another way of measuring it.

    Args:
        overrides: evaluator=NAME, retention=NAME, or keys under MEASUREMENT and MACHINE: eval.steps=50, device=cpu.

    Raises:
        ConfigError: a key that shaped the training, or one that is not there.
    """
    config = OmegaConf.create(filled_in(resolved))
    OmegaConf.set_struct(config, True)
    for override in OverridesParser.create().parse_overrides(overrides):
        key = override.key_or_group
        if key == "allow_modules":
            continue
        if override.is_sweep_override() or override.is_delete():
            raise ConfigError(f"{override.input_line}: give one value, KEY=VALUE; a list is written 'KEY=[1,2]'")
        value = override.value()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in MEASUREMENT + MACHINE):
            raise ConfigError(f"{key}: shaped the training and cannot change here; allowed: {', '.join(MEASUREMENT + MACHINE)}")
        if key in CHOICES:
            path = Path(value) if str(value).endswith(".yaml") else config_dir() / key / f"{value}.yaml"
            if not path.is_file():
                known = ", ".join(sorted(entry.stem for entry in path.parent.glob("*.yaml")))
                raise ConfigError(f"{key}={value}: no such file; allowed: {known or 'the path of a YAML file'}")
            OmegaConf.update(config, key, OmegaConf.load(path), merge=False, force_add=True)
            continue
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException:
            raise ConfigError(f"unknown key {key}; the run's config.yaml holds every key") from None
    return OmegaConf.to_container(config, resolve=True)


def parse(config: DictConfig) -> RunConfig:
    """Check a composed configuration. Raises ConfigError."""
    for group in {"reg", "tuned"} & set(config):
        if not isinstance(config[group], DictConfig):
            raise ConfigError(f"{group}={config[group]}: is no mapping; a configuration file sets it as a whole")
    for key in tuned_cell(config):
        if OmegaConf.select(config, key, default=MISSING) == MISSING:
            raise ConfigError(f"conf/tuned: {key} is not a setting of this run; correct the name in the tuned file")
        chosen = [override.partition("=")[0].lstrip("+") for override in HydraConfig.get().overrides.task]
        if key not in chosen and not reads_tuned(config, key):
            raise ConfigError(f"conf/tuned: {key} does not read its tuned value; write it as ${{tuned:{key},DEFAULT}} in its file")
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    resolved.pop("tuned", None)
    allowed = allowed_modules(list(HydraConfig.get().overrides.task))
    if list(allowed) != resolved.pop("allow_modules"):  # a file must not vouch for itself
        raise ConfigError("allow_modules: set by a configuration file; only the command line may allow modules")
    refuse_unasked_pickles(resolved, list(HydraConfig.get().overrides.task))
    tuned = not config.reg or "tuned" not in config or regularizer_cell(config) is not None
    return check_run(resolved, _choice("method"), tuned, allowed)


def filled_in(resolved: dict[str, Plain]) -> dict[str, Plain]:
    """A run's configuration with the settings that it lacks because they are newer, and that are no part of an experiment."""
    defaults, filled = OmegaConf.to_container(OmegaConf.load(config_dir() / "config.yaml"), resolve=False), dict(resolved)
    for path in NOT_SCIENTIFIC:
        group, _, key = path.partition(".")
        if group not in defaults:  # of a chosen file, whose arguments have defaults of their own
            continue
        default = {key: defaults[group][key]} if key else defaults[group]
        if isinstance(default, dict) and not isinstance(filled.get(group, {}), dict):
            raise ConfigError(f"{group}={filled[group]}: is no mapping; config.yaml was changed")
        filled[group] = default | filled.get(group, {}) if isinstance(default, dict) else filled.get(group, default)
    return filled


def check_run(resolved: dict[str, Plain], method_name: str, tuned: bool = True, allowed: tuple[str, ...] = ()) -> RunConfig:
    """Check a resolved configuration, as config.yaml of a run directory holds one. Raises ConfigError.

    allowed: modules beside cu_runner that a `_target_` may name.
    """
    for group, name in [("method", method_name), *(("reg", name) for name in resolved["reg"])]:
        check_file_name(group, str(name))
    check_keys(resolved)
    refuse_secrets(walk(resolved))
    missing = [path for path, value in walk(resolved) if value == MISSING]
    if missing:
        raise ConfigError(f"not set, and without a default: {', '.join(missing)}; add {' '.join(f'{key}=...' for key in missing)}")
    for path, value in walk(resolved):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}={value}: not a finite number; give a finite one")
    if not resolved.get("retention"):  # off: then it is no part of the run, nor of its signature
        resolved.pop("retention", None)
    groups = {"model", "evaluator", "sequence", "method", "reg", "retention", "setting"}
    known = groups | {field.name for field in dataclasses.fields(Spine)}
    unknown = sorted(set(resolved) - known)
    if unknown:
        raise ConfigError(f"unknown key {unknown[0]!r}; allowed: {', '.join(sorted(known))}")
    spine = check(Spine, {key: resolved[key] for key in resolved if key not in groups}, "")
    regularizers = {name: make_regularizer(name, node, resolved["reg"], allowed) for name, node in resolved["reg"].items()}
    setting = check(SettingChoice, resolved["setting"], "setting")
    if setting.last_only and setting.plan != "simultaneous":
        raise ConfigError(f"setting.last_only: requests are {setting.plan}, and each needs its own; use setting=simultaneous")
    if not setting.last_only:  # as every run of earlier versions, whose signatures do not have it
        resolved["setting"] = drop(resolved["setting"], ("last_only",))
    merging = [name for name, node in regularizers.items() if node.function.independent_starts]
    if merging and setting.plan == "simultaneous":
        raise ConfigError(f"reg={merging[0]} merges requests that each start from the base model; use setting=independent")
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
        retention=make_node("retention", resolved["retention"], allowed) if "retention" in resolved else None,
        setting=setting,
        method_name=method_name,
        tuned=tuned,
        resolved=resolved,
    )
    if len(plan.directory.name) > LONGEST:
        raise ConfigError(f"reg: the run's directory would have a name of {len(plan.directory.name)} characters; at most {LONGEST}")
    return plan


def reads_tuned(config: DictConfig, key: str) -> bool:
    """True if the setting is written as `${tuned:KEY,default}` in its file."""
    parent, _, last = key.rpartition(".")
    raw = OmegaConf.to_container(OmegaConf.select(config, parent), resolve=False)
    return str(raw[last]).startswith(f"${{tuned:{key},")


def source_hash(node: Node) -> str:
    """sha256 of the file that defines a node's class: what other code has trained is not taken from the cache."""
    return hashlib.sha256(Path(inspect.getfile(node.function)).read_bytes()).hexdigest()
