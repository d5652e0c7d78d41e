"""The checks of arguments: what each lets through, and that its message names value, expectation and remedy."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import mechedit
from mechedit.cli.app import LONGEST_LINE
from mechedit.errors import (
    InputError,
    brief,
    check_at_least,
    check_choice,
    check_finite,
    check_fraction,
    check_positive,
    count_not_finite,
)


@pytest.mark.parametrize(
    ("accepted", "refused", "check"),
    [
        ((1, 0.5, 1e-300, math.inf), (0, -1, math.nan, None, "1", True), lambda x: check_positive("x", x)),
        ((2, 2.5, math.inf), (1, 1.99, math.nan, None, "2"), lambda x: check_at_least("x", x, 2)),
        ((1e-9, 0.95), (0, 1, 1.5, -0.5, math.nan, None, "0.5"), lambda x: check_fraction("x", x)),
        (("a", "b"), ("c", "", None, 1), lambda x: check_choice("x", x, ("a", "b"))),
        ((0, -1.5), (math.inf, -math.inf, math.nan), lambda x: check_finite("x", x)),
    ],
)
def test_each_check_lets_through_what_it_says(
    accepted: tuple[object, ...], refused: tuple[object, ...], check: Callable[[object], None]
) -> None:
    for value in accepted:
        check(value)
    for value in refused:
        with pytest.raises(InputError, match=r"^x is .*, expected .*; choose "):
            check(value)


def test_none_passes_only_where_a_setting_may_be_left_out() -> None:
    check_positive("memory", None, optional=True)
    check_at_least("window", None, 1, optional=True)
    with pytest.raises(InputError, match="window is 0, expected at least 1; choose a larger number"):
        check_at_least("window", 0, 1, optional=True)


def test_a_message_lists_the_choices_and_ends_with_the_hint() -> None:
    with pytest.raises(InputError, match=r"^the rule is 'eye', expected one of a, b; ask a colleague$"):
        check_choice("the rule", "eye", {"a": 1, "b": 2}, "ask a colleague")


def test_a_value_is_cut_short_before_it_is_written_out() -> None:
    """A list that holds another one many times, and so on, is longer than memory when it is written."""
    for value in (1.5, "text", "it's", [], [1, "a"], (), (1,), (1, 2), {}, {"a": [1], 2: None}, {1}, None, True):
        assert brief(value) == repr(value), "the control: others are written as Python writes them"
    bomb: list[object] = ["x"]
    mapping: dict[str, object] = {}
    for _ in range(60):
        bomb, mapping = [bomb] * 10, {"a": mapping, "b": mapping}
    endless: list[object] = []
    endless.append(endless)
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for long in (bomb, mapping, endless, deep, "x" * 10**6, [10**5000], list(range(10**6))):
        assert len(brief(long)) < 90
    assert brief("x" * 100) == repr("x" * 100)[:80] + " …"
    assert brief(10**5000) == "a number of thousands of digits"


def test_tensors_are_checked_entry_by_entry() -> None:
    values = torch.tensor([[1.0, math.nan], [-math.inf, 2.0]])
    assert (count_not_finite(values), count_not_finite(values[:, :1].abs()[:1])) == (2, 0)
    # Finite numbers whose sum overflows are finite all the same.
    assert count_not_finite(torch.full((4,), 3e38)) == 0
    with pytest.raises(InputError, match="the keys hold 2 values of 4 that are not finite, expected none; look for"):
        check_finite("the keys", values)


def messages_of_errors(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """Line and characters of each message that an error is made with, of which each value takes a dozen."""
    for call in ast.walk(tree):
        name = getattr(call, "func", None)
        if (
            isinstance(call, ast.Call)
            and call.args
            and getattr(name, "id", getattr(name, "attr", "")).endswith("Error")
        ):
            parts = [
                12 if isinstance(part, ast.FormattedValue) else len(part.value)
                for part in ast.walk(call.args[0])
                if isinstance(part, ast.FormattedValue) or (isinstance(part, ast.Constant) and type(part.value) is str)
            ]
            yield call.lineno, sum(parts)


def test_no_message_is_so_long_that_its_middle_is_cut() -> None:
    """Of a line that is longer than `LONGEST_LINE` the middle is cut; values and an outer message need room too."""
    package = Path(mechedit.__file__).parent
    lengths = {
        f"{path.relative_to(package)}:{line}": length
        for path in package.rglob("*.py")
        for line, length in messages_of_errors(ast.parse(path.read_text()))
    }
    assert len(lengths) > 300, "the control"
    longest = 0.8 * LONGEST_LINE
    assert {place: length for place, length in lengths.items() if length > longest} == {}
