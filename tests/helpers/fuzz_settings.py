"""Settings of every kind with values that nobody would choose, made in Python: each is accepted, or an InputError.

A value is of the kind of its field: what a number is not is tried where a number belongs, and texts where a text does.
"""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from typing import Any, Literal, get_args, get_origin, get_type_hints

import mechedit as me
from helpers.fuzz_inputs import BAD_TEXT
from mechedit.errors import InputError, brief
from mechedit.methods import METHODS, SpreadConfig
from mechedit.planning import PromptShape
from mechedit.sweep import Window
from mechedit.trace import Approximation

KINDS: tuple[Any, ...] = tuple(
    dict.fromkeys(
        [
            *(getattr(me, name) for name in me.__all__ if name.endswith("Config")),
            *(method.config for method in METHODS.values()),
            SpreadConfig, me.Corruption, me.Convergence, me.StopRule, Approximation, PromptShape,
        ]
    )
)  # fmt: skip
"""All settings."""
NUMBERS = (
    0, 1, 2, 7, -1, 0.5, 1.5, -0.5, 1e-320, 1e-9, 1e30, 1e308, 10**6, 10**40, 10**5000, 2**63 - 1, 2**63, float("nan"),
    float("inf"), -float("inf"), True, "3", "", None, [1], (1, 2), {}, 1 + 2j, b"1",
)  # fmt: skip
"""Numbers, and what is none."""


def values_of(hint: Any) -> list[Any]:
    """Values to try in a field with this annotation; none for one that holds other settings."""
    if get_origin(hint) is Literal:
        return [*get_args(hint), "zzz", "", None, 5, "\ud800"]
    if hint in (int, float):
        return list(NUMBERS)
    if hint is bool:
        return [True, False]
    if hint is str:
        return [*BAD_TEXT, "mlp", "gaussian", "last", "probability", None]
    if hint is Window:
        return [Window(0, 1), Window(3, 3), Window(0, 9_999)]
    items = [value for part in get_args(hint) if part is not Ellipsis for value in values_of(part)]
    if get_origin(hint) in (tuple, list) or "Sequence" in str(get_origin(hint)):
        texts = [item for item in items if item is not None]
        return [(), *((item,) for item in texts), *((item, item) for item in texts), tuple(texts[:3])]
    return items


def fuzz_settings(seed: int, count: int) -> tuple[Counter[str], dict[str, str]]:
    """Make settings so many times, and say how often which were accepted or refused, and what else came of them.

    Args:
        seed: decides the values.
        count: how many settings of each kind.

    Returns:
        Counts of outcomes, and the first example of each fault.
    """
    draw, outcomes, faults = random.Random(seed), Counter[str](), dict[str, str]()
    for kind in KINDS:
        choices = {name: values for name, hint in get_type_hints(kind).items() if (values := values_of(hint))}
        names = [field.name for field in dataclasses.fields(kind) if field.name in choices]
        for _ in range(count):
            chosen = {
                name: draw.choice(choices[name]) for name in draw.sample(names, draw.randint(1, min(3, len(names))))
            }
            try:
                kind(**chosen)
                outcomes["accepted"] += 1
            except InputError as error:
                outcomes["refused"] += 1
                if len(str(error)) > 2000:
                    faults.setdefault(f"a message of {len(str(error))} characters", f"{kind.__name__}: {brief(chosen)}")
            except Exception as error:
                fault = f"{type(error).__name__} of {kind.__name__} ({error!s:.100})"
                faults.setdefault(fault, brief(chosen))
    return outcomes, faults
