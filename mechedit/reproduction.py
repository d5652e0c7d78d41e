"""How the results in a run folder are made again: a command with the main settings, and the names of all that is kept.

In: the stamps of config.json, and what a report says of each result. A stamp holds what went into a step, whoever made
it, and not the command line: so it is the same in each folder, of one process and of many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What is said of how the results in a folder are made again."""

    rebuilt: str
    """A command with the model and the main settings."""
    settings: dict[str, list[str]]
    """Names of the recorded settings of each step."""

    @staticmethod
    def of(steps: Mapping[str, Any], sections: Mapping[str, Any], card: Mapping[str, Any]) -> Reproduction:
        """Read the stamps.

        Args:
            steps: stamps of the finished steps.
            sections: of the report, None where there is no result.
            card: of the model.
        """
        return Reproduction(
            rebuilt=_rebuilt(steps, sections, card),
            settings={name: sorted(stamp["settings"]) for name, stamp in steps.items() if stamp.get("settings")},
        )


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
