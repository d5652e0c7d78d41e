"""Commands whose options are the fields of dataclasses.

A command is a function of values: a dataclass of its own for files and flags, and the config dataclasses of the steps
that it runs, such as `TraceConfig`. `command` makes an option of every field: its name, type and default are the
field's, and its help text is the note below the field. A field added to a config is an option of every command that
takes this config, unless the command leaves it out (`options_of`).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import typer

from mechedit.bounds import check_numbers
from mechedit.checksums import verify_contents
from mechedit.cli.config_file import SEPARATED
from mechedit.cli.parsing import parse_names, parse_windows, read_path
from mechedit.sweep import Window

POSITIONAL: Final = "positional"
"""Marks a field as an argument without a name: `directory: Annotated[Path, POSITIONAL]`."""

_CONFIG_FILE = inspect.Parameter(
    "config",
    inspect.Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        Path | None, typer.Option("--config", help="YAML or JSON file with the same names; the command line wins.")
    ],
)
"""Read before the command line is parsed (`mechedit.cli.app`), so that no command sees it."""


def command(**option_sets: OptionSet) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Make a command of a function whose parameters are dataclasses.

    Args:
        **option_sets: for the parameters whose options are not simply all fields of the dataclass. Where two
            dataclasses have an option of one name, it is one option that fills both fields; the first one's type,
            default and note hold.

    Returns:
        A decorator; the decorated function has one keyword parameter per option, as typer reads them.
    """

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        hints = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
        sets = {name: option_sets.get(name) or options_of(hint) for name, hint in hints.items()}

        def run(**values: Any) -> int:
            arguments = {name: option_set.build(values) for name, option_set in sets.items()}
            with verify_contents(bool(values.get("verify"))):
                return function(**arguments)

        run.__doc__ = function.__doc__
        run.__signature__ = inspect.Signature(_parameters(list(sets.values())))  # type: ignore[attr-defined]
        return run

    return decorate


def options_of(
    kind: type,
    *,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    notes: Mapping[str, str] | None = None,
) -> OptionSet:
    """The options that make a dataclass.

    Args:
        kind: the dataclass.
        only: fields that have an option; by default all.
        without: fields that have none.
        rename: the option's name where it is not the field's.
        defaults: values in place of the dataclass's own defaults, also for fields without an option.
        notes: help texts in place of the notes in the source, where these speak of Python.
    """
    names = [item.name for item in dataclasses.fields(kind)]
    exposed = tuple(name for name in (names if only is None else only) if name not in without)
    return OptionSet(
        kind=kind,
        exposed=exposed,
        rename=rename or {},
        defaults=defaults or {},
        notes={**field_notes(kind), **(notes or {})},
    )


@dataclass(frozen=True, kw_only=True)
class OptionSet:
    """Some fields of a dataclass as options."""

    kind: type
    """The dataclass that the options make."""
    exposed: tuple[str, ...]
    """Fields that have an option."""
    rename: Mapping[str, str]
    """Names of options that are not their fields'."""
    defaults: Mapping[str, Any]
    """Values in place of the dataclass's defaults."""
    notes: Mapping[str, str]
    """Help text per field."""

    @functools.cached_property
    def hints(self) -> Mapping[str, Any]:
        """Annotation per field."""
        return get_type_hints(self.kind, include_extras=True)

    def build(self, values: Mapping[str, Any]) -> Any:
        """The dataclass, its fields read from the values of all options by name.

        Raises:
            InputError: a value cannot be read, or the dataclass refuses it.
        """
        read = {name: self._read(name, values[self.option_name(name)]) for name in self.exposed}
        built = self.kind(**{**self.defaults, **read})
        check_numbers(built)
        return built

    def option_name(self, name: str) -> str:
        """The option of a field, as a parameter of the command."""
        return self.rename.get(name, name)

    def depth(self, name: str) -> int:
        """How far up the base classes the field is declared; 0 is the dataclass itself."""
        declares = [name in vars(base).get("__annotations__", ()) for base in self.kind.__mro__]
        return declares.index(True)

    def parameter(self, name: str) -> inspect.Parameter:
        """A field as the parameter that typer reads."""
        hint, option, note = self.hints[name], self.option_name(name), self._help(name)
        if get_origin(hint) is Annotated and POSITIONAL in get_args(hint):
            declared: Any = typer.Argument(help=note, **self._parser(name))
        else:
            declared = typer.Option("--" + option.rstrip("_").replace("_", "-"), help=note, **self._parser(name))
        return inspect.Parameter(
            option,
            inspect.Parameter.KEYWORD_ONLY,
            default=self._default(name),
            annotation=Annotated[self._option_type(name), declared],
        )

    def _parser(self, name: str) -> dict[str, Any]:
        """The reader of a path, of which typer would take an empty text for the current folder."""
        is_path = Path in (*_alternatives(self.hints[name]), *get_args(self.hints[name]))
        return {"parser": read_path, "metavar": "PATH"} if is_path else {}

    def _default(self, name: str) -> Any:
        declared = self.kind.__dataclass_fields__[name]
        declared_default = declared.default if declared.default_factory is MISSING else declared.default_factory()
        value = self.defaults.get(name, declared_default)
        if value is MISSING:
            return inspect.Parameter.empty
        return ",".join(map(str, value)) if _is_sequence(self.hints[name]) and value is not None else value

    def _option_type(self, name: str) -> Any:
        """The type that typer reads: text for several values between commas, and for choices that a config checks."""
        hint = self.hints[name]
        kinds = _alternatives(hint)
        checked = _is_choice(kinds) and hasattr(self.kind, "__post_init__")
        if checked or _is_sequence(hint):
            read: Any = str
        elif float in kinds or int in kinds:
            read = float if float in kinds else int
        else:
            return hint
        return read | None if NoneType in kinds else read

    def _read(self, name: str, value: Any) -> Any:
        if value is None or not _is_sequence(self.hints[name]):
            return value
        if value == self._default(name) == "":
            return ()
        windows = any(Window in get_args(kind) for kind in _alternatives(self.hints[name]))
        return tuple(parse_windows(value)) if windows else parse_names(value)

    def _help(self, name: str) -> str:
        """The field's note for someone at the command line, who leaves an option out where Python passes None."""
        note = re.sub(r"(^|[.] )None means", r"\1By default", self.notes.get(name, ""))
        note = re.sub(r"\bNone (means)?", lambda match: "by default" if match[1] else "by default it ", note)
        return f"{note} {SEPARATED}" if _is_sequence(self.hints[name]) else note


@functools.cache
def field_notes(kind: type) -> dict[str, str]:
    """The note below each field of a dataclass in its source, those of its base classes included."""
    notes: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        for statement, following in pairwise(definition.body):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(note))):
                    notes[name] = " ".join(note.split())
    return notes


def _parameters(option_sets: Sequence[OptionSet]) -> list[inspect.Parameter]:
    """All options of a command, each once: its own first, then those that it shares with other commands."""
    parameters: dict[str, tuple[int, inspect.Parameter]] = {}
    for option_set in option_sets:
        for name in option_set.exposed:
            parameter = option_set.parameter(name)
            parameters.setdefault(parameter.name, (option_set.depth(name), parameter))
    by_depth = sorted(parameters.values(), key=lambda item: item[0])
    return [*(parameter for _, parameter in by_depth), _CONFIG_FILE]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a union allows; any other type alone."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    if get_origin(hint) in (Literal, list) or _is_tuple_like(hint):
        return (hint,)
    return get_args(hint) or (hint,)


def _is_choice(kinds: Sequence[Any]) -> bool:
    return any(get_origin(kind) is Literal for kind in kinds)


def _is_sequence(hint: Any) -> bool:
    """Whether a field holds several values that an option separates by commas; a list repeats its option."""
    return any(_is_tuple_like(kind) for kind in _alternatives(hint))


def _is_tuple_like(hint: Any) -> bool:
    origin = get_origin(hint)
    return inspect.isclass(origin) and origin is not list and issubclass(origin, Sequence)
