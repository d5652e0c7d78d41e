"""Shapes are checked in nested functions too, though their checks are written once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import typechecks
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from mechedit.models import log_probabilities


def adder(number: int) -> Callable[[Tensor], Tensor]:
    @jaxtyped(typechecker=typechecks.checked)
    def add(rows: Float[Tensor, "row 2"]) -> Float[Tensor, "row 2"]:
        return rows[:number] + number

    return add


def test_a_nested_function_is_itself_at_every_call_and_checked_at_the_first() -> None:
    """Both ways in which a call may be wrong, at the first and at later calls of the outer function."""
    for number in (3, 2, 3)[: typechecks.FIRST]:
        add, rows = adder(number), torch.zeros(3, 2)
        assert add(rows[:number]).tolist() == [[number, number]] * number
        with pytest.raises(TypeCheckError, match="parameters"):
            add(rows.T)
        if number < len(rows):
            with pytest.raises(TypeCheckError, match="return value"):
                add(rows)


def test_its_check_is_written_once() -> None:
    adder(1)
    count = len(typechecks._CHECKS)
    adder(2)
    assert len(typechecks._CHECKS) == count > 0


def test_the_package_is_checked() -> None:
    with pytest.raises(TypeCheckError):
        log_probabilities(torch.zeros(3, dtype=torch.long))


def test_the_first_calls_in_each_test_are_checked_and_then_one_in_so_many() -> None:
    wrong, right, refused = torch.zeros(3, dtype=torch.long), torch.zeros(3, 4), []
    typechecks.SAMPLING.begin()
    for call in range(1, 2 * typechecks.EVERY + 2):
        try:
            log_probabilities(wrong if typechecks.is_sampled(call) else right)
        except TypeCheckError:
            refused.append(call)
    assert refused == [*range(1, typechecks.FIRST + 1), typechecks.EVERY, 2 * typechecks.EVERY]
    typechecks.SAMPLING.begin()
    with pytest.raises(TypeCheckError):
        log_probabilities(wrong)


def test_of_nested_functions_those_that_are_made_first_are_checked() -> None:
    typechecks.SAMPLING.begin()
    refusing = 0
    for _ in range(typechecks.EVERY):
        add = adder(3)
        try:
            add(torch.zeros(3, 5))
        except TypeCheckError:
            refusing += 1
    assert refusing == typechecks.FIRST + 1
