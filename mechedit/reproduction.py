"""How the results in a run folder are made again: the commands that made them, as their stamps hold them.

In: the stamps of config.json, and what a report says of each result. Out: the commands as they were typed. Steps that
were made from Python have none; for a folder of such steps a command is built from the main settings, and beside it
stand the names of all settings that were recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_STEPS = {
    "trace": ("trace",),
    "selection": ("sweep", "finals"),
    "moments": (),
    "edit": ("edit",),
    "evaluation": ("evaluate", "baseline", "baseline_zsre"),
}
"""The steps whose command made a section of the report."""
_SETTINGS = {
    "trace": "the trace (its settings are in effects.parquet)",
    "selection": "the selection (its settings are in selection.json)",
    "moments": "the second moments (each file's header has its settings)",
    "edit": "the edit (its manifest has its settings)",
    "evaluation": "the evaluation (its settings are in scores.json)",
}
"""Each section, and where its settings are kept if no command is."""
_RUN_SECTIONS = ("selection", "edit", "evaluation")
"""What a run makes after its trace."""


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """The commands that made the results in a folder."""

    commands: list[str]
    """Each once, in the order in which their steps were finished; empty where no step has its command."""
    without: list[str]
    """Results whose command is not kept, and where their settings are."""
    merged: bool
    """Whether a command put together what others had computed."""
    rebuilt: str
    """A command from the main settings, for where there are no others."""
    settings: dict[str, list[str]]
    """Names of the recorded settings of each step."""

    @staticmethod
    def of(steps: Mapping[str, Any], sections: Mapping[str, Any], card: Mapping[str, Any]) -> Reproduction:
        """Read the commands of the stamps.

        Args:
            steps: stamps of the finished steps.
            sections: of the report, None where there is no result.
            card: of the model.
        """
        commands = _commands(steps)
        unknown = [
            section
            for section, names in _STEPS.items()
            if sections[section] and not any(name in commands for name in names)
        ]
        return Reproduction(
            commands=list(dict.fromkeys(commands.values())),
            without=[] if _has_run(commands) else [_SETTINGS[section] for section in unknown],
            merged=any("--merge" in command.split() for command in commands.values()),
            rebuilt=_rebuilt(steps, sections, card),
            settings={name: sorted(stamp["settings"]) for name, stamp in steps.items() if stamp.get("settings")},
        )


def unfinished_parts(steps: Mapping[str, Any], sections: Mapping[str, Any], *, summarized: bool) -> list[str]:
    """What is missing where `mechedit run` made a step and has not come to its summary, which it writes at its end."""
    if summarized or not _has_run(_commands(steps)):
        return []
    return [section for section in _RUN_SECTIONS if not sections[section]]


def _commands(steps: Mapping[str, Any]) -> dict[str, str]:
    """The command of each step that has one."""
    return {name: stamp["command"] for name, stamp in steps.items() if isinstance(stamp.get("command"), str)}


def _has_run(commands: Mapping[str, str]) -> bool:
    """Whether one command made all steps."""
    return any(command.split()[:2] == ["mechedit", "run"] for command in commands.values())


def _rebuilt(steps: Mapping[str, Any], sections: Mapping[str, Any], card: Mapping[str, Any]) -> str:
    """A command of the kind that makes such a folder, with the main settings."""
    samples = steps.get("trace", {}).get("settings", {}).get("samples")
    # Measuring the unedited model is a step of its own, but not a command.
    names = ["evaluate" if step.startswith("baseline") else step for step in steps]
    name = "run" if "evaluate" in names and "trace" in names else next(iter(names), "trace")
    edit, selection = sections["edit"], sections["selection"]
    overruled = edit["layers"] if edit and selection and edit["layers"] != list(selection["layers"]) else []
    options = {
        "--model": card["model"],
        "--backend": card["backend"],
        "--seed": card["seed"],
        "--samples": samples if "trace" in steps else None,
        "--layers": ",".join(map(str, overruled)) or None,
        "--out": "NEW_FOLDER",
    }
    return " ".join(["mechedit", name, *(f"{key} {value}" for key, value in options.items() if value is not None)])
