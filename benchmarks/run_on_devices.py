"""One `mechedit run` on the tiny model on each of two devices, and how far the results differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import mechedit as me
from mechedit.cli import main as mechedit_command
from mechedit.selection import Selection

PROBABILITY_TOLERANCE = 1e-3
"""Largest difference of a traced probability, and of a mean magnitude, between devices in float32."""
RATE_TOLERANCE = 0.01
"""Largest difference of a rate of successes: one prompt in a hundred may lie where rounding decides."""
RATES, MAGNITUDES = ("ES", "PS", "NS"), ("EM", "PM", "NM")


@dataclass(frozen=True, kw_only=True)
class RunDifference:
    """How far two runs differ."""

    layers: tuple[tuple[int, ...], tuple[int, ...]]
    """Selected layers on both devices."""
    effects: float
    """Largest difference of a probability in the trace."""
    magnitudes: float
    """Largest difference of a mean magnitude (EM, PM, NM), before or after the edit."""
    rates: float
    """Largest difference of a rate (ES, PS, NS)."""

    @property
    def equal(self) -> bool:
        """Whether the selection is the same and all numbers are within the tolerances."""
        return (
            self.layers[0] == self.layers[1]
            and self.effects <= PROBABILITY_TOLERANCE
            and self.magnitudes <= PROBABILITY_TOLERANCE
            and self.rates <= RATE_TOLERANCE
        )

    def __str__(self) -> str:
        return (
            f"layers {list(self.layers[0])} and {list(self.layers[1])}; largest differences: of a traced probability "
            f"{self.effects:.1e} (at most {PROBABILITY_TOLERANCE:g}), of a mean magnitude {self.magnitudes:.1e} (at "
            f"most {PROBABILITY_TOLERANCE:g}), of a rate {self.rates:.1e} (at most {RATE_TOLERANCE:g})"
        )


def run_on(device: str, folder: Path, *, facts: int, samples: int, requests: int, texts: int) -> int:
    """Run all steps on the tiny model, on some of what ships; returns the exit code of the command.

    Args:
        device: where the model runs.
        folder: for the input and the results.
        facts: how many are traced, at least ten.
        samples: noise samples of the trace.
        requests: how many are edited.
        texts: how many the moments are over.
    """
    folder.mkdir(parents=True, exist_ok=True)
    request_file, text_file = folder / "requests.json", folder / "texts.txt"
    request_file.write_text(json.dumps([request.plain() for request in me.load_requests("tiny")[:requests]]))
    text_file.write_text("\n".join(list(me.load_texts("tiny"))[:texts]))
    arguments = ["run", "--model", "tiny", "--device", device, "--dtype", "float32", "--max-facts", str(facts)]
    # The edited layers are given, because few facts may not settle them; the selection is compared all the same.
    arguments += ["--samples", str(samples), "--layers", "2-4"]
    arguments += ["--requests", str(request_file), "--texts", str(text_file), "--generation-prompts", "1"]
    try:
        mechedit_command([*arguments, "--out", str(folder / "run")])
    except SystemExit as leaving:
        return int(leaving.code or 0)
    return 0


def difference(first: Path, second: Path) -> RunDifference:
    """Compare the folders of two runs."""
    folders = (first / "run", second / "run")
    selections = [Selection.load(folder / "selection.json") for folder in folders]
    effects = [pd.read_parquet(folder / "effects.parquet") for folder in folders]
    cells = ["fact", "kind", "sever", "layer", "position", "metric"]
    joined = effects[0].merge(effects[1], on=cells, suffixes=("", "_second"), validate="one_to_one")
    assert len(joined) == len(effects[0]) == len(effects[1]), "the runs traced other cells"
    columns = ("score", "corrupted", "clean")
    return RunDifference(
        layers=(selections[0].layers, selections[1].layers),
        effects=max(
            float(np.abs(joined[name].to_numpy() - joined[f"{name}_second"].to_numpy()).max()) for name in columns
        ),
        magnitudes=_means_difference(folders, MAGNITUDES),
        rates=_means_difference(folders, RATES),
    )


def _means_difference(folders: Sequence[Path], measures: Sequence[str]) -> float:
    """Largest difference of a measure's mean, in any state."""
    means = []
    for folder in folders:
        table = pd.read_parquet(folder / "scores.parquet").query("measure in @measures")
        means.append(table.groupby(["measure", "state"])["value"].mean())
    assert list(means[0].index) == list(means[1].index), "the runs measured other things"
    assert set(measures) <= set(means[0].index.get_level_values("measure")), "a measure is absent"
    return float((means[0] - means[1]).abs().max())
