"""The command line's frame: exit codes, the file that --config names, and what is printed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import typer

from mechedit import ranks
from mechedit.cli.config_file import config_defaults
from mechedit.cli.new_folders import no_empty_folders
from mechedit.disk_errors import disk_error
from mechedit.errors import InputError, check_characters, is_interrupt
from mechedit.notices import ImplausibleEditWarning
from mechedit.progress import end_bars
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


LONGEST_LINE = 400
"""Characters of a message's line at most; of a longer one its long values are cut, then its middle."""
CUT = " … "
"""Stands for the middle of a line that was cut."""
_LONG = re.compile(r"(?<!\w)(['\"])(.{50}).{3,}?(.{20})\1(?!\w)")
"""A long value that a message quotes whole, with its beginning and its end."""
_LONG_WORD = re.compile(r"(\S{50})\S{3,}(\S{20})")
"""One that it does not quote."""
_TURNING = frozenset(("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"))
"""Bidirectional classes of the characters that turn the direction of what follows them."""


GOES_ON = "interrupted; the same command goes on from what is finished"
"""What is said after Ctrl-C, behind the command's name."""
INTERRUPTED = f"mechedit: {GOES_ON}"
UNREAD = 141
"""Exit code where nobody reads what is printed any more, such as after `| head`: that of programs ended by SIGPIPE."""
DEALT = ("run", "trace", "select", "moments", "edit", "evaluate")
"""Commands whose work several processes share; of any other one the first process does all."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave with its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not os.environ.get("TERMINAL_WIDTH", "0").isdecimal():
        del os.environ["TERMINAL_WIDTH"]  # typer reads it as a number as it writes its help
    streams = (sys.stdout, sys.stderr)  # as they are: click has others in their place once nobody reads them
    try:
        with plain_warnings(), ranks.joined() as group:
            try:
                code = group.leave(*_run(group, arguments))
            except ranks.RankFailed as failed:
                code = failed.code
            except KeyboardInterrupt:
                code = group.leave(130, INTERRUPTED)
    except InputError as error:
        code = 2
        _print_whole(_complaint(str(error)))
    except BrokenPipeError:
        code = UNREAD
    sys.exit(_printed(code, streams))


def _printed(code: int, streams: Sequence[Any]) -> int:
    """The exit code, once all that was printed has left the process; another one where it cannot."""
    for stream in streams:
        try:
            stream.flush()
        except OSError as error:
            # What is left is given up, or Python would try it again as it ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if isinstance(error, BrokenPipeError):
                code = UNREAD
                continue
            line = f"what is printed cannot be written ({error.strerror}); check where it goes"
            _print_whole(_complaint(line))
            code = code or 2
    return code


def _run(group: ranks.Group, arguments: list[str]) -> tuple[int, str | None]:
    """The exit code of a command, and the line that says why it failed."""
    command = typer.main.get_command(app)
    try:
        for argument in arguments:
            check_characters("an argument", argument)
        group.agree("the command", {"arguments": shlex.join(arguments), **_versions()})
        defaults = config_defaults(command, arguments)
        run = partial(
            command.main,
            args=arguments,
            prog_name="mechedit",
            standalone_mode=False,
            default_map=defaults,
            complete_var="",
        )
        is_dealt = any(argument in DEALT for argument in arguments[:1])
        with no_empty_folders():
            code = run() if is_dealt else group.from_first(run, "mechedit")
    except UsageError as error:
        message: str = error.format_message()  # type: ignore[attr-defined]
        return 2, _complaint(_placed(error) or message.replace(" Value error,", ""))
    except InputError as error:
        if is_interrupt(error):
            end_bars()
            return 130, INTERRUPTED
        return 2, _complaint(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except (ranks.RankFailed, BrokenPipeError):
        raise
    except SystemExit as leaving:  # so click ends where nobody reads what is printed
        if isinstance(leaving.__context__, BrokenPipeError):
            raise leaving.__context__ from None
        raise
    except Exception as error:
        if is_interrupt(error):
            end_bars()
            return 130, INTERRUPTED
        reason = disk_error(error)
        if reason is not None:
            file = getattr(error, "filename", None)
            about = f"{str(file)!r} cannot be read or written" if file else "a file cannot be read or written"
            return 2, _complaint(f"{about} ({reason}); check the disk and the path, and run the same command again")
        if group is ranks.SINGLE:
            raise
        return 1, "".join(traceback.format_exception(error))
    if code == 130:  # typer may have turned the interrupt into this code
        end_bars()
        return 130, INTERRUPTED
    return code or 0, None


def _placed(error: Exception) -> str | None:
    """What to do about an argument that was given as if it were an option; None of any other error."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if option is None or context is None:
        return None
    arguments = [parameter for parameter in context.command.params if parameter.param_type_name == "argument"]
    for argument in arguments:
        if argument.name == str(option).lstrip("-").replace("-", "_"):
            word = argument.name.upper()
            return f"No such option: {option}; {word} comes first, without {option}: {context.command_path} {word}"
    return None


def _versions() -> dict[str, str]:
    """Releases that decide results."""
    return {"mechedit": VERSION, **{name: version(name) for name in ("torch", "transformers")}}


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings meant for users as one line, without the place in the source that Python puts in front."""
    standard = warnings.formatwarning

    def plain(message: Warning | str, category: type[Warning], *where: Any, **line: Any) -> str:
        if category not in (UserWarning, ImplausibleEditWarning):
            return standard(message, category, *where, **line)
        return _line(f"mechedit: warning: {message}") + "\n"

    warnings.formatwarning = plain
    try:
        yield
    finally:
        warnings.formatwarning = standard


def _complaint(message: str) -> str:
    end_bars()
    return _line(f"mechedit: {message}")


def one_line(message: str) -> str:
    """A message as one line, its words with one space between them, `escaped`."""
    return escaped(" ".join(message.split()))


def escaped(text: str) -> str:
    """A text in which control characters, those that turn its direction and halves of surrogate pairs are escaped."""
    return "".join(map(_visible, text))


def _visible(character: str) -> str:
    hidden = unicodedata.category(character) in ("Cc", "Cs") or unicodedata.bidirectional(character) in _TURNING
    return ascii(character)[1:-1] if hidden else character


def _line(message: str) -> str:
    """A message as one line of at most `LONGEST_LINE` characters, of which long values are cut first."""
    line = _without_middle(one_line(message), 10 * LONGEST_LINE)
    if len(line) > LONGEST_LINE:
        line = _LONG_WORD.sub(r"\1…\2", _LONG.sub(r"\1\2…\3\1", line))
    return _without_middle(line, LONGEST_LINE)


def _without_middle(line: str, most: int) -> str:
    """A line of at most so many characters: what was found comes first in it, what to do last."""
    half = (most - len(CUT)) // 2
    return line if len(line) <= most else f"{line[:half]}{CUT}{line[-half:]}"


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
    """Tell the person at the terminal, in one line."""
    _print_whole(one_line(line))


def _print_whole(line: str) -> None:
    """Print a line by one write: an interrupt between the two of `print` would let the next words follow on it."""
    print(f"{line}\n", end="", file=sys.stderr)


def print_json(summary: dict[str, Any]) -> None:
    """Print a summary on stdout."""
    print(json.dumps(summary, indent=2))
