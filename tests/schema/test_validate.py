"""Values held against types: what YAML reads as no number is a text where a text is asked for."""

import math

import pytest

from cu_runner.schema.errors import ConfigError
from cu_runner.schema.settings import Fraction, StepSize
from cu_runner.schema.validate import validate


@pytest.mark.parametrize(
    ("kind", "value", "found"),
    [
        (str, math.nan, "nan"),
        (str | None, -math.inf, "-inf"),
        (list[str], ["a", math.inf], ["a", "inf"]),
        (dict[str, str], {"a": math.nan}, {"a": "nan"}),
    ],
)
def test_nan_is_a_text_where_one_is_asked_for(kind, value, found):
    assert validate(kind, value, "method.note") == found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "nan"])
@pytest.mark.parametrize("kind", [float, int, StepSize, float | None, tuple[Fraction, Fraction]])
def test_nan_is_no_number(kind, value):
    entries = [value, 0.5] if str(kind).startswith("tuple") else value
    with pytest.raises(ConfigError, match=r"^method.strength\S*: not a finite number; give a fin"):
        validate(kind, entries, "method.strength")
