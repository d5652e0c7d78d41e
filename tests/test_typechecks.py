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


def test_a_nested_function_is_itself_at_every_call_and_always_checked() -> None:
    """Both ways in which a call may be wrong, at the first and at later calls of the outer function."""
    for number in (3, 2, 3):
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
