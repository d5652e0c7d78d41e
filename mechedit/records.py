"""Records: what the JSON in mechedit's files must look like, as the annotations of a class, and the check against them.

A record is a `TypedDict`, whose fields may be absent where it says so and beside which a file may hold more; or a
dataclass, which is then made of the JSON.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from mechedit.bounds import LARGEST_WHOLE
from mechedit.errors import InputError, brief

Kind = TypeVar("Kind")

Whole = Annotated[int, Field(ge=0, le=LARGEST_WHOLE)]
"""A layer, a count, or a seed."""
Number = FiniteFloat
"""Any number that is neither NaN nor infinite."""


class ModelRecord(TypedDict, total=False):
    """The provenance of a model; of what else it may hold, nothing is read by name."""

    model: str | None
    backend: str | None
    dtype: str | None
    weights_hash: str | None
    tokenizer_hash: str | None
    outer_hash: str | None
    module: str
    weights_hash_as: dict[str, str]


def check_record(content: Any, record: Any, what: str, remedy: str) -> None:
    """Hold JSON against the annotations of a TypedDict, or against any other type.

    Args:
        content: as JSON was read.
        record: the type.
        what: names the file or its part in messages.
        remedy: what to do about content of another shape.

    Raises:
        InputError: names the first place that differs, what is there and what was expected.
    """
    _read(content, record, what, remedy)


def read_record(content: Any, kind: type[Kind], what: str, remedy: str) -> Kind:
    """Make a dataclass of the JSON object with its fields; lists become tuples where the dataclass has them.

    Args:
        content: as JSON was read.
        kind: the dataclass, which may hold others.
        what: names the file or its part in messages.
        remedy: what to do about content of another shape.

    Raises:
        InputError: as `check_record`; or a field that the dataclass lacks; or the dataclass refuses a value.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    unknown = [name for name in content if name not in names] if isinstance(content, Mapping) else []
    if unknown:
        raise InputError(f"{what} has a field {unknown[0]!r:.80}, expected some of {', '.join(names)}; {remedy}")
    return _read(content, kind, what, remedy)


@functools.cache
def partial_record(kind: type) -> Any:
    """The record of some fields of a dataclass, for readers that do without the others."""
    return TypedDict(kind.__name__, get_type_hints(kind), total=False)  # type: ignore[operator]


def _read(content: Any, record: Any, what: str, remedy: str) -> Any:
    try:
        # As JSON, since only there a list may stand for a tuple.
        return _adapter(record).validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise _mismatch(error, what, remedy) from error


@functools.cache
def _adapter(record: Any) -> Any:
    return TypeAdapter(record)


def _mismatch(error: ValidationError, what: str, remedy: str) -> InputError:
    first = error.errors(include_url=False, include_context=False)[0]
    # Of a union, names of types stand in the path too, which say nothing to a reader.
    path = ".".join(str(part) for part in first["loc"] if "[" not in str(part))
    if first["type"] == "missing":
        problem = f"{brief(path)} is absent"
    elif first["type"] == "value_error":
        problem = f"{brief(path)}: " * bool(path) + first["msg"].removeprefix("Value error, ")
    else:
        expected = first["msg"].removeprefix("Input should be ")
        problem = f"{brief(path)} is " * bool(path) + f"{brief(first['input'])}, expected {expected}"
    return InputError(f"{what} cannot be read: {problem}; {remedy}")
