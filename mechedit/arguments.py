"""Arguments of the functions that users call, held against their annotations before anything is done.

An argument of another type is refused by its name. Where several values belong, a text does not pass for its letters;
what can be read once, such as a generator, and numbers in an array or a tensor become a list.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from mechedit.errors import InputError, brief, check_characters

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")
_LISTS = (collections.abc.Sequence, list, tuple)
_NO_LISTS = (str, bytes, bytearray, memoryview, Mapping)


class _Misfit(Exception):  # noqa: N818 (never seen outside)
    """A value is not what an annotation says."""


def checked(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function refuse arguments of other types than it is annotated with."""

    @functools.wraps(function)
    def checking(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        positional, keywords = fitted(function, args, kwargs)
        return function(*positional, **keywords)

    return checking


def fitted(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments as the function takes them.

    Raises:
        InputError: names one of another type.
    """
    signature, hints = _annotations(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:  # too many or too few of them, which Python says in the call
        return args, kwargs
    for name, value in bound.arguments.items():
        if name in hints:
            try:
                bound.arguments[name] = _fitted(value, hints[name])
            except _Misfit as misfit:
                raise InputError(
                    f"the argument {name} is {brief(value)}, expected {_in_words(hints[name])}: pass one"
                ) from misfit
    return bound.args, bound.kwargs


@functools.cache
def _annotations(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any]]:
    """The parameters of a function, and what those with a name are annotated as."""
    signature = inspect.signature(function)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    hints = get_type_hints(function)
    return signature, {
        name: hints[name]
        for name, parameter in signature.parameters.items()
        if name in hints and parameter.kind not in several
    }


def _fitted(value: Any, hint: Any) -> Any:
    """The value as an annotation says; what it says nothing about, and what others check, is left as it is."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _first_fit(value, options)
    if origin is Annotated:
        return _fitted(value, options[0])
    if isinstance(hint, TypeVar) and inspect.isclass(hint.__bound__):
        return _fitted(value, hint.__bound__)
    if origin in _LISTS:
        return _listed(value, options)
    if hint is Any:
        fits = True
    elif hint in (None, NoneType):
        fits = value is None
    elif hint is int:
        fits = isinstance(value, Integral) and not isinstance(value, bool)
        value = int(value) if fits else value
    elif hint is float:
        fits = isinstance(value, Real) and not isinstance(value, bool)
    elif hint is bool:
        fits = isinstance(value, bool | np.bool_)
        value = bool(value) if fits else value
    elif hint is Path:
        fits = isinstance(value, os.PathLike)
        value = Path(value) if fits and not isinstance(value, Path) else value
    elif hint is str and isinstance(value, str):
        check_characters("a text in an argument", value)
        fits = True
    elif origin is collections.abc.Callable:
        fits = callable(value)
    elif origin is collections.abc.Iterable:
        fits = isinstance(value, Iterable) and not isinstance(value, _NO_LISTS)
    elif origin in (collections.abc.Mapping, dict):
        fits = isinstance(value, Mapping)
    elif inspect.isclass(hint) and origin is None and not hasattr(hint, "array_type"):  # jaxtyping's name tensors
        fits = _has_methods(value, hint) if getattr(hint, "_is_protocol", False) else isinstance(value, hint)
    else:
        fits = True
    if not fits:
        raise _Misfit
    return value


def _first_fit(value: Any, options: tuple[Any, ...]) -> Any:
    for option in options:
        try:
            return _fitted(value, option)
        except _Misfit:
            pass
    raise _Misfit


def _listed(value: Any, items: tuple[Any, ...]) -> Any:
    """Several values: themselves if they lie in a sequence, else as a list."""
    if isinstance(value, _NO_LISTS) or hasattr(value, "columns"):  # a table
        raise _Misfit
    if callable(to_list := getattr(value, "tolist", None)):
        try:
            value = to_list()
        except NotImplementedError as error:  # a tensor without values, on the device "meta"
            raise _Misfit from error
    if not (hasattr(value, "__len__") and hasattr(value, "__getitem__")):
        if not isinstance(value, Iterable):
            raise _Misfit
        value = list(value)
    if not isinstance(value, list | tuple) or not items:  # others may be as long as a disk
        return value
    item_hints = items * len(value) if len(items) == 1 else items[:1] * len(value) if items[-1] is Ellipsis else items
    if len(item_hints) != len(value):
        raise _Misfit
    read = [_fitted(item, hint) for item, hint in zip(value, item_hints, strict=True)]
    if all(after is before for after, before in zip(read, value, strict=True)):
        return value
    return tuple(read) if isinstance(value, tuple) else read


def _has_methods(value: Any, protocol: type) -> bool:
    """Whether a value's class has the public methods of a protocol."""
    names = [name for name, member in vars(protocol).items() if inspect.isfunction(member) and name[0] != "_"]
    return all(hasattr(type(value), name) for name in names)


def _in_words(hint: Any) -> str:
    """An annotation for a message."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, options)))
    if origin in _LISTS:
        return f"a list of {_SEVERAL.get(options[0]) or _in_words(options[0])}" if options else "a list"
    if origin in (collections.abc.Mapping, dict):
        return "a mapping"
    if hint in (None, NoneType):
        return "None"
    if isinstance(hint, TypeVar):
        return _in_words(hint.__bound__ or Any)
    return _ONE.get(hint) or str(getattr(hint, "__name__", hint))


_ONE = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
_SEVERAL = {int: "whole numbers", float: "numbers", str: "texts"}
