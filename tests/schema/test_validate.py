"""Values held against types: what YAML reads as no number is a text where a text is asked for."""

import math
from typing import Literal

import pytest
from pydantic import PositiveInt

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


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (PositiveInt | Literal["last"], 0, "p.k=0: input should be greater than 0 or 'last'"),
        (
            str | list[str],
            3,
            "p.k=3: input should be a valid string or a valid list; put it in quotes",
        ),
        (dict[str, str | list[str]], {"hot air": 3}, "p.k.hot air=3: input should be a valid str"),
        (dict[str, int], {"none": "x"}, "p.k.none='x': input should be a valid integer"),
        (dict[str, int], 5, "p.k=5: input should be a mapping of keys to values"),
        (dict[str, int], {"point": "x"}, "p.k.point='x': input should be a valid integer"),
    ],
)
def test_a_value_of_several_kinds_is_answered_with_all_of_them(kind, value, said):
    with pytest.raises(ConfigError) as error:
        validate(kind, value, "p.k")
    assert str(error.value).startswith(said)
