"""What `${...}` may ask for in a configuration file, by name at the end; oc.env besides."""

from __future__ import annotations

from typing import get_args

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from cu_runner.schema.errors import ConfigError
from cu_runner.schema.secrets import names_secret
from cu_runner.schema.settings import WandbMode
from cu_runner.schema.validate import validate
from cu_runner.schema.values import ConfigTree

WANDB_MODES = get_args(WandbMode)


def choice(group: str) -> str:
    """Return the chosen file of a configuration group: `${choice:method}` is "conabl"."""
    return str(HydraConfig.get().runtime.choices[group])


def tuned(key: str, default: object, *, _root_: DictConfig) -> object:
    """Return a setting of conf/tuned for the chosen parts, or the default: `${tuned:KEY,2e-4}`.

    Between the two stands what conf/training has for the model. A default of ??? is a setting that
    each model has to bring.
    """
    value = {**training_cell(_root_), **tuned_cell(_root_)}.get(key, default)
    return OmegaConf.create(value) if isinstance(value, dict | list) else value


def tuned_cell(config: DictConfig) -> ConfigTree:
    """Return what conf/tuned has for the method: by default, its regularizers, its setting."""
    names = ("default", regularizer_entry(config), choice("setting"))
    return merged(config, names, "tuned", choice("method"))


def training_cell(config: DictConfig) -> ConfigTree:
    """Return what conf/training has for the model: by default, for the method, for the method with
    the regularizers, and for it in the setting.
    """
    method = choice("method")
    names = ("default", method, combination(config), f"{method}+{choice('setting')}")
    return merged(config, names, "training")


def combination(config: DictConfig) -> str:
    """Return the method and its regularizers as conf/training names them: "conabl+gradproj"."""
    return "+".join([choice("method"), *regularizers(config)])


def regularizers(config: DictConfig) -> list[str]:
    """Return the chosen regularizers by name, in their order; an entry without a class is none."""
    made = [name for name, node in config.reg.items() if OmegaConf.is_dict(node)]
    return [str(name) for name in made if "_target_" in config.reg[name]]


def merged(config: DictConfig, names: tuple[str, ...], *keys: str) -> ConfigTree:
    """Return what some cells of a part of conf/tuned or conf/training hold, the last first."""
    cells = (entry_of(config, name, *keys) for name in names)
    return {key: value for cell in cells for key, value in (cell or {}).items()}


def entry_of(config: DictConfig, name: str, *keys: str) -> ConfigTree | None:
    """Return a cell of a part of conf/tuned or conf/training; None where there is none.

    Settings of conf/tuned that were found on other models are those of nobody here.
    """
    if keys[0] == "tuned" and tuned_elsewhere(config):
        return None
    part, place = OmegaConf.select(config, ".".join(keys)), ".".join(keys)
    if not isinstance(part, DictConfig):
        validate(dict[str, object] | None, part, place)
        return None
    if name not in part:
        return None
    cell = part[name]
    plain = OmegaConf.to_container(cell) if OmegaConf.is_config(cell) else cell
    return validate(dict[str, object] | None, plain, f"{place}.{name}") or {}


def check_entries(config: DictConfig) -> None:
    """Raise ConfigError for a cell of conf/tuned or conf/training that is no mapping.

    Those that this run does not read are looked at too.
    """
    for place in (f"tuned.{choice('method')}", "training"):
        part = OmegaConf.select(config, place)
        entries = OmegaConf.to_container(part) if OmegaConf.is_config(part) else part
        validate(dict[str, dict[str, object] | None] | None, entries, place)


def tuned_elsewhere(config: DictConfig) -> tuple[str, ...]:
    """Return the models that conf/tuned was made on, where the chosen one is none of them."""
    given = OmegaConf.select(config, "tuned.models")
    models = OmegaConf.to_container(given) if OmegaConf.is_config(given) else given
    found = validate(list[str] | None, models, "tuned.models")
    return () if found is None or choice("model") in found else tuple(found)


def regularizer_entry(config: DictConfig) -> str:
    """Return the name of the entry for the chosen regularizers, in their order."""
    return "+".join(regularizers(config)) or "none"


def concepts(*, _root_: DictConfig) -> DictConfig:
    """Return the concepts of the chosen sequence by domain, as labels: `${concepts:}`."""
    sequence = _root_.sequence
    if "domains" in sequence:
        found: dict[str, list[str]] = {}
        for domain, lists in sequence.domains.items():
            own = [each[domain] for each in sequence.targets if domain in each]
            found[domain] = [*found.get(domain, []), *own, *lists.retain]
            found.setdefault(lists.cross_domain, []).extend(lists.cross_retain)
        return OmegaConf.create({name: list(dict.fromkeys(own)) for name, own in found.items()})
    kept = sequence.targets + sequence.retain
    return OmegaConf.create({sequence.domain: kept, sequence.cross_domain: sequence.cross_retain})


def paraphrases(*, _root_: DictConfig) -> object:
    """Return the shipped list of paraphrases of the sequence's vocabulary: `${paraphrases:}`.

    Of a mixed sequence those of every domain.
    """
    sequence = _root_.sequence
    parts = sequence.domains.values() if "domains" in sequence else [sequence]
    names = [part.vocabulary for part in parts]
    if not all(isinstance(name, str) for name in names):
        raise ConfigError(
            "sequence: a vocabulary is a list of names, for which no paraphrases ship; "
            "give recovery.paraphrase.prompts=FILE.csv with the columns concept, level, prompt, or "
            "leave paraphrase out"
        )
    found = [f"paraphrases_{name}" for name in dict.fromkeys(names)]
    return OmegaConf.create(found) if len(found) > 1 else found[0]


def environment(name: str, *default: str | None) -> str | None:
    """Return what OmegaConf's own `${oc.env:NAME,default}` does; a secret raises ConfigError.

    What is resolved is written to config.yaml.
    """
    if names_secret(name):
        raise ConfigError(
            f"oc.env:{name}: looks like a secret, and config.yaml would hold it; "
            "rename the variable if it is none"
        )
    value = oc.env(name, *default)
    if name == "WANDB_MODE" and value not in WANDB_MODES:
        raise ConfigError(
            f"the environment variable WANDB_MODE is {value!r}; allowed: "
            f"{', '.join(WANDB_MODES)}; set it to one of them, unset it, or give wandb.mode=..."
        )
    return value


for _name, _resolver in (
    ("oc.env", environment),
    ("choice", choice),
    ("concepts", concepts),
    ("paraphrases", paraphrases),
    ("tuned", tuned),
):
    OmegaConf.register_new_resolver(_name, _resolver, replace=True)
