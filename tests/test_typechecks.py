"""Shapes are checked in nested functions too, though their checks are written once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import typechecks
from beartype.roar import BeartypeCallHintViolation
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from mechedit.data.joint import following
from mechedit.models import log_probabilities

Pair = tuple[Float[Tensor, " row"], Float[Tensor, " row"]]


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


def shaped(rows: Float[Tensor, " row"]) -> None: ...


def shaped_within(rows: list[Float[Tensor, " row"] | None]) -> None: ...


def shaped_by_name(pair: Pair) -> None: ...


def returned() -> Pair | None: ...


def shapeless(rows: Tensor, names: dict[str, int]) -> None: ...


def test_arrays_are_seen_wherever_they_are_annotated() -> None:
    assert all(map(typechecks.takes_arrays, (shaped, shaped_within, shaped_by_name, returned)))
    assert not typechecks.takes_arrays(shapeless)


def test_functions_without_arrays_are_checked_too() -> None:
    assert not typechecks.takes_arrays(following)
    assert following("in", " Rome") == " Rome"
    with pytest.raises(BeartypeCallHintViolation):
        following("in", 3)  # type: ignore[arg-type]


def test_both_arrays_of_a_name_are_held_together() -> None:
    check = jaxtyped(typechecker=typechecks.checked)(shaped_by_name)
    check((torch.zeros(2), torch.zeros(2)))
    with pytest.raises(TypeCheckError):
        check((torch.zeros(2), torch.zeros(3)))
