"""What `${...}` may ask for in a configuration file: choice, tuned, concepts, oc.env."""

from __future__ import annotations

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from cu_runner.schema.errors import ConfigError
from cu_runner.schema.secrets import names_secret
from cu_runner.schema.validate import validate
from cu_runner.schema.values import ConfigValue


def _choice(group: str) -> str:
    """The chosen file of a configuration group: `${choice:method}` is "conabl"."""
    return str(HydraConfig.get().runtime.choices[group])


def _tuned(key: str, default: ConfigValue, *, _root_: DictConfig) -> ConfigValue:
    """A setting of conf/tuned for the chosen method and regularizers, else the default: `${tuned:train.lr,2e-4}`."""
    value = tuned_cell(_root_).get(key, default)
    return OmegaConf.create(value) if isinstance(value, dict | list) else value


def tuned_cell(config: DictConfig) -> dict[str, ConfigValue]:
    """The entries of conf/tuned for the chosen method: those under "default", then those of its regularizers and its setting."""
    cells = method_cells(config)
    found = (cells.get("default"), regularizer_cell(config), cells.get(_choice("setting")))
    return {key: value for cell in found for key, value in (cell or {}).items()}


def method_cells(config: DictConfig) -> dict[str, ConfigValue]:
    """All entries of conf/tuned for the chosen method."""
    method = _choice("method")
    cells = config.tuned.get(method) if "tuned" in config else None
    entries = OmegaConf.to_container(cells) if OmegaConf.is_config(cells) else cells
    found = validate(dict[str, dict[str, object] | None], entries or {}, f"tuned.{method}")
    return {name: cell or {} for name, cell in found.items()}


def regularizer_cell(config: DictConfig) -> dict[str, ConfigValue] | None:
    """The entry for the chosen regularizers, in their order; None if there is none."""
    return method_cells(config).get("+".join(str(name) for name in config.reg) or "none")


def _concepts(*, _root_: DictConfig) -> DictConfig:
    """The concepts of the chosen sequence by domain, as labels of a judge that needs no training: `${concepts:}`."""
    sequence = _root_.sequence
    return OmegaConf.create(
        {
            sequence.domain: sequence.targets + sequence.retain,
            sequence.cross_domain: sequence.cross_retain,
        }
    )


def _environment(name: str, *default: str | None) -> str | None:
    """OmegaConf's own `${oc.env:NAME,default}`, but for names of secrets: what is resolved is written to config.yaml."""
    if names_secret(name):
        raise ConfigError(
            f"oc.env:{name}: looks like a secret, and config.yaml would hold it; rename the variable if it is none"
        )
    return oc.env(name, *default)


OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


OmegaConf.register_new_resolver("choice", _choice, replace=True)


OmegaConf.register_new_resolver("concepts", _concepts, replace=True)


OmegaConf.register_new_resolver("tuned", _tuned, replace=True)
