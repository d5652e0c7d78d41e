"""The file that --config names: option names with values, as YAML or JSON."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from itertools import pairwise
from typing import Any

import yaml

from mechedit.errors import InputError, brief, brief_list, check_characters
from mechedit.files import read_text

SEPARATED = "Several are separated by commas."
"""Ends the help of an option that takes several values; in the file it may be a list of them."""
_HINT = "expected text, a number, true or false: fix it, or leave the option out for its default"


def config_defaults(group: Any, arguments: list[str]) -> dict[str, Any]:
    """Defaults for the command's options from the file that --config names; the command line wins.

    Raises:
        InputError: the file is not there, is neither YAML nor JSON, names an option the command lacks or one twice, or
            gives a value of another kind.
    """
    path = next((after for word, after in pairwise([*arguments, ""]) if word == "--config"), None)
    path = next((word.partition("=")[2] for word in arguments if word.startswith("--config=")), path)
    name = next((word for word in arguments if word in group.commands), None)
    if path is None or name is None:
        return {}
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise InputError(f"{path!r} holds a {type(content).__name__}, expected option names with values")
    # --max-facts is the parameter max_facts.
    options = {
        spelling.lstrip("-"): parameter for parameter in group.commands[name].params for spelling in parameter.opts
    }
    values: dict[str, Any] = {}
    for key, value in content.items():
        option = str(key).lstrip("-").replace("_", "-")
        if option not in options:
            likely = difflib.get_close_matches(option, sorted(options), cutoff=0.5)
            raise InputError(
                f"{path!r} names the option {brief(option)}, expected one of `mechedit {name}`, such as "
                f"{', '.join(likely) or brief_list(sorted(options))}"
            )
        if options[option].name in values:
            raise InputError(f"{path!r} gives the option {brief(option)} twice, expected it once; drop one")
        is_list = getattr(options[option], "multiple", False) and isinstance(value, list)
        if isinstance(value, list) and SEPARATED in (getattr(options[option], "help", None) or ""):
            value = _separated(value, f"{path!r}: the option {brief(option)}")
        for item in value if is_list else [value]:
            if not isinstance(item, str | int | float):
                raise InputError(f"{path!r}: the option {brief(option)} is {brief(item)}, {_HINT}")
            check_characters(f"{path!r}: the option {brief(option)}", str(item))
        values[options[option].name] = value
    return {name: values}


def _separated(items: list[Any], what: str) -> str:
    """The items between commas, as the option takes them.

    Raises:
        InputError: an item is no text or number, or holds a comma.
    """
    for item in items:
        if not isinstance(item, str | int | float) or isinstance(item, bool) or "," in str(item):
            raise InputError(f"{what} has {brief(item)} in its list, expected texts or numbers without commas; fix it")
    return ",".join(map(str, items))


def read_yaml(path: str) -> Any:
    """Read a YAML file, of which JSON is a part; an empty one is an empty object.

    Raises:
        InputError: there is no such file, or it is not YAML: the message names the line where YAML knows it. Also a key
            given twice, nesting too deep, a date that does not exist, or a number of thousands of digits.
    """
    text = read_text(path)
    try:
        content = yaml.load(text, _UniqueKeys)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        if not isinstance(error, yaml.YAMLError | ValueError | RecursionError):
            reason = "a value is not what its tag says"  # such as !!bool maybe, which YAML's reader takes for sure
        raise InputError(f"{path!r} is neither YAML nor JSON ({reason}); fix the file") from error
    return {} if content is None else content


class _UniqueKeys(yaml.SafeLoader):
    """YAML's own reader takes the last of two values for one key."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Read an object whose keys are all different."""
        keys: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                break  # refused by YAML's own reader
            if key in keys:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {brief(key)} is given twice", problem_mark=key_node.start_mark
                )
            keys.add(key)
        return super().construct_mapping(node, deep)
