"""Arguments of another type are refused by name before anything is done; generators and arrays are read as lists."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.smallest import smallest_model

import mechedit as me
from mechedit.arguments import checked, fitted
from mechedit.data.facts import Fact
from mechedit.errors import InputError

WRONG: dict[Any, tuple[Any, ...]] = {
    "model": (None, 5, "tiny", torch.nn.Linear(1, 1)),
    "facts": (None, 5, "facts.json", [5], {}, pd.DataFrame()),
    "requests": (None, 5, "requests.json", [5], [Fact(id="a", subject="Rome", prompt="{} is", object="old")]),
    "layers": (5, "1-2", [1.5], [True], ["1"], {1: 2}, torch.zeros(2)),
    "layer": (None, "1", 1.0, True),
    "moments": (5, [], torch.eye(2), pd.DataFrame()),
    "prefixes": ("{}", [5], 5),
    "edit": (None, "edit.safetensors", [], {}),
    "prompts": (5, None, [5]),
    "edits": (None, "edit.safetensors", [5]),
    "config": (5, "fast", [], me.TraceConfig),
    "texts": (5, [5], None),
    "folder": (5, None, []),
    "method": (5, None),
    "name": (5, None, []),
    "resamples": ("5", 1.5, None, True),
    "rank": ("5", 1.5),
}
"""Values of other types, by the argument's name."""
FUNCTIONS = {name: value for name in me.__all__ if callable(value := getattr(me, name)) and not inspect.isclass(value)}


def cases() -> list[Any]:
    signatures = {name: inspect.signature(function).parameters for name, function in FUNCTIONS.items()}
    return [
        pytest.param(function, name, wrong, id=f"{function}-{name}-{index}")
        for function, parameters in signatures.items()
        for name in parameters
        if name in WRONG
        for index, wrong in enumerate(WRONG[name])
        if not (wrong is None and "None" in str(parameters[name].annotation))
        and function not in ("published_settings", "published_ranges", "published_scores")  # of a model by its name
    ]


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    """Values of the right types, by the argument's name."""
    moment = me.SecondMoment(layer=1, matrix=torch.eye(2, dtype=torch.float64), count=1, provenance={})
    edit = me.Edit(factors={}, manifest={})
    return {
        "model": smallest_model(),
        **dict.fromkeys(("source", "path", "out", "folder", "name", "method", "dtype"), "none"),
        **dict.fromkeys(("facts", "requests", "texts", "prompts", "edits", "windows"), ()),
        **{"layers": [1], "layer": 1, "moments": {}, "shard": (0, 1), "n_layers": 3, "rank": 1, "tokens": 1},
        **{"edit": edit, "subtrahend": edit, "moment": moment, "effects": pd.DataFrame()},
    }


@pytest.mark.parametrize(("function", "name", "wrong"), cases())
def test_an_argument_of_another_type_is_refused_by_its_name(
    good: dict[str, Any], function: str, name: str, wrong: Any
) -> None:
    parameters = inspect.signature(FUNCTIONS[function]).parameters
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    with pytest.raises(InputError, match=f"the argument {name} is .*expected"):
        FUNCTIONS[function](**{**{key: good[key] for key in required}, name: wrong})


def test_the_functions_are_all_there() -> None:
    """The control of the test above, which would pass without any."""
    assert {"trace_facts", "memit", "evaluate", "apply_", "load_facts", "select_layers", "truncate"} <= set(FUNCTIONS)
    assert len(cases()) > 150


def example(
    numbers: Sequence[int],
    pairs: Sequence[tuple[int, int]] = (),
    table: pd.DataFrame | str | Path | None = None,
    by_layer: Mapping[int, Any] | None = None,
    share: float | int = 0.5,
    told: Callable[[str], object] | None = None,
    on: bool = False,
) -> Any:
    return numbers


@pytest.mark.parametrize(
    "value", [np.array([1, 2]), torch.tensor([1, 2]), (n for n in (1, 2)), range(1, 3), pd.Series([1, 2]), {1: 0, 2: 0}]
)
def test_what_holds_several_values_is_read_as_a_list(value: Any) -> None:
    if isinstance(value, dict):  # of which the keys are given
        value = value.keys()
    assert list(checked(example)(value)) == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"numbers": "12"}, "the argument numbers is '12', expected a list of whole numbers"),
        ({"numbers": [1], "pairs": [(1, 2, 3)]}, "the argument pairs is .*expected a list of a list of whole numbers"),
        ({"numbers": [1], "table": 5}, "the argument table is 5, expected DataFrame or a text or Path or None"),
        ({"numbers": [1], "by_layer": [5]}, "the argument by_layer is .*expected a mapping or None"),
        ({"numbers": [1], "share": True}, "the argument share is True, expected a number or a whole number"),
        ({"numbers": [1], "told": 5}, "the argument told is 5, expected Callable or None"),
        ({"numbers": [1], "on": 1}, "the argument on is 1, expected True or False"),
    ],
)
def test_annotations_are_read(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        checked(example)(**arguments)


def test_what_fits_is_passed_on_as_it_is() -> None:
    table, pairs = pd.DataFrame(), [(1, 2), [3, 4]]
    given = {"numbers": [np.int64(3)], "pairs": pairs, "table": table, "by_layer": {}, "share": 1, "told": print}
    _, named = fitted(example, (), given)
    assert fitted(example, (), given)[0][0] == [3]
    assert not named
    passed = inspect.signature(example).bind(*fitted(example, (), given)[0]).arguments
    assert passed["pairs"] is pairs
    assert passed["table"] is table
    assert fitted(example, ([1],), {"on": np.True_})[1] == {"on": True}
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):  # Python's own
        checked(example)([1], other=2)  # type: ignore[call-arg]
