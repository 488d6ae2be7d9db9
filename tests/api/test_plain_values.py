"""Plain values become words that Hydra reads as the same values."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from cu_runner.api.settings import word
from cu_runner.schema.errors import ConfigError


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        2e-05,
        "a, b's {c} \\ [d]=$x",
        "",
        "ends in \\",
        "\\' and \\\\'",
        "null",
        [1, "a b", None, [True]],
        {"steps": 2, "scheduler": None, "an odd: key, [it]": "it's"},
        {},
        [],
    ],
)
def test_what_is_written_is_read_back(value):
    override = OverridesParser.create().parse_override(word("+a.b", value))
    assert override.key_or_group == "a.b"
    assert override.value() == value
    assert type(override.value()) is type(value)


def test_what_is_no_plain_value_is_refused():
    with pytest.raises(ConfigError, match="give plain values"):
        word("a", object())
