"""The command line's frame: exit codes, the file that --config names, and what is printed."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Any

import typer
import yaml

from mechedit.errors import InputError
from mechedit.files import read_text
from mechedit.provenance import VERSION

app = typer.Typer(
    add_completion=False,
    no_args_is_help=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find where a language model stores its facts, and rewrite them there.",
)


# The base of all that typer complains of, wherever its version keeps it.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = typer.main.get_command(app)
    try:
        with plain_warnings():
            defaults = _config_defaults(command, arguments)
            code = command.main(args=arguments, prog_name="mechedit", standalone_mode=False, default_map=defaults)
    except UsageError as error:
        sys.exit(_complain(error.format_message()))  # type: ignore[attr-defined]
    except InputError as error:
        sys.exit(_complain(str(error)))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # typer may have turned the interrupt into this code
        say("mechedit: interrupted; the same command goes on from what is finished")
    sys.exit(code or 0)


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings meant for users as one line, without the place in the source that Python puts in front."""
    standard = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if category is not UserWarning:
            return standard(message, category, *where, **line)
        return "mechedit: warning: " + " ".join(str(message).split()) + "\n"

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = standard


def _complain(message: str) -> int:
    print("mechedit: " + " ".join(message.split()), file=sys.stderr)
    return 2


def _config_defaults(group: Any, arguments: list[str]) -> dict[str, Any]:
    """Defaults for the command's options from the file that --config names; the command line wins.

    Raises:
        InputError: the file is not there, is neither YAML nor JSON, or names an option the command lacks.
    """
    path = next((after for word, after in pairwise([*arguments, ""]) if word == "--config"), None)
    path = next((word.partition("=")[2] for word in arguments if word.startswith("--config=")), path)
    name = next((word for word in arguments if word in group.commands), None)
    if path is None or name is None:
        return {}
    try:
        content = yaml.safe_load(read_text(path)) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path!r} is neither YAML nor JSON ({error}); fix the file") from error
    if not isinstance(content, dict):
        raise InputError(f"{path!r} holds a {type(content).__name__}, expected option names with values")
    # --max-facts is the parameter max_facts.
    options = {
        spelling.lstrip("-"): parameter.name for parameter in group.commands[name].params for spelling in parameter.opts
    }
    values = {str(key).lstrip("-").replace("_", "-"): value for key, value in content.items()}
    for key in values:
        if key not in options:
            raise InputError(f"{path!r} names the option {key!r}, expected some of {', '.join(sorted(options))}")
    return {name: {options[key]: value for key, value in values.items()}}


def _print_version(requested: bool | None) -> None:
    if requested:
        print(VERSION)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool | None, typer.Option("--version", help="print the version", callback=_print_version, is_eager=True)
    ] = None,
) -> None:
    """Find where a language model stores its facts, and rewrite them there."""


def say(line: str) -> None:
    """Tell the person at the terminal."""
    print(line, file=sys.stderr)


def print_json(summary: dict[str, Any]) -> None:
    """Print a summary on stdout."""
    print(json.dumps(summary, indent=2))
