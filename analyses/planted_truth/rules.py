"""Every rule, every constant range and every constant share of the depth, against the layers that were planted.

    python -m analyses.planted_truth.rules [FILE]

FILE is what `measure --fixture` wrote; by default the file that the tests have. Of the constants, which look at no
model, those are printed that are best on these: no rule for other models may be worse.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import mechedit as me
from analyses.planted_truth.measure import markdown, precision_and_iou, summarize
from mechedit.tables import read_table

FILE = Path(__file__).parents[2] / "tests" / "selection" / "planted_effects.parquet"
SHARES = np.linspace(0, 1, 21)
"""Ends of the constant shares that are tried: first and last layer, as parts of the depth."""
BEST = 2
"""Constants of each kind that are printed."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What was planted in a model."""

    name: str
    depth: int
    layers: tuple[int, ...]

    def judge(self, rule: str, layers: Iterable[int], stability: float = 1.0) -> dict[str, Any]:
        """A choice of layers against those that were planted; a constant is always stable."""
        layers = [layer for layer in layers if layer < self.depth]
        precision, iou = precision_and_iou(layers, self.layers)
        outside = len(set(layers) - set(self.layers)) if layers else self.depth
        nothing = {"IoU with ablation": float("nan"), "drop held": float("nan")}
        return {
            "rule": rule, "model": self.name, "outside": outside, "precision": precision, "IoU": iou,
            "stability": stability, **nothing,
        }  # fmt: skip


def judged_rules(effects: pd.DataFrame) -> tuple[list[Truth], list[dict[str, Any]]]:
    """What was planted in each model, and every rule's choice there."""
    truths, rows = [], []
    for name, layers in effects.attrs["truth"].items():
        of_model: Any = effects[effects["model"] == name].drop(columns="model")
        of_model.attrs = {}
        selection = me.select_layers(of_model)
        truths.append(truth := Truth(name=name, depth=len(selection.evidence), layers=tuple(layers)))
        rows += [truth.judge(rule, choice.layers, choice.stability) for rule, choice in selection.rules.items()]
    return truths, rows


def constant_ranges(depth: int) -> Iterator[tuple[str, Callable[[int], Sequence[int]]]]:
    """Every range of layers, whatever the depth of the model."""
    for first in range(depth):
        for last in range(first, depth):
            yield f"layers {first}–{last}", lambda n, a=first, b=last: range(a, b + 1)


def constant_shares() -> Iterator[tuple[str, Callable[[int], Sequence[int]]]]:
    """Ranges between two parts of the depth."""
    for i, low in enumerate(SHARES):
        for high in SHARES[i:]:
            name = f"{100 * low:.0f}–{100 * high:.0f} % of the depth"
            yield name, lambda n, a=low, b=high: range(round(a * n), round(b * n) + 1)


def best_constants(truths: Sequence[Truth]) -> list[dict[str, Any]]:
    """The constants of both kinds with the highest mean IoU, and those that most seldom take a layer too many."""
    depth, best = max(truth.depth for truth in truths), []
    for constants in (constant_ranges(depth), constant_shares()):
        judged = [[truth.judge(name, choose(truth.depth)) for truth in truths] for name, choose in constants]
        by_iou = sorted(judged, key=lambda rows: -np.mean([row["IoU"] for row in rows]))
        by_outside = sorted(by_iou, key=lambda rows: -sum(row["outside"] == 0 for row in rows))
        for ranked in (by_iou, by_outside):
            best += [row for rows in ranked[:BEST] for row in rows]
    return list({(row["rule"], row["model"]): row for row in best}.values())


def compared(effects: pd.DataFrame) -> pd.DataFrame:
    """One line a rule or constant: columns as `summarize` gives, without those of ablation."""
    truths, rows = judged_rules(effects)
    table: Any = summarize(pd.DataFrame([*rows, *best_constants(truths)]))
    return table.drop(columns=["IoU with ablation", "drop held"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, nargs="?", default=FILE, help="effects of planted models, with their truth")
    table = compared(read_table(parser.parse_args(arguments).file))
    print(markdown(table), end="")


if __name__ == "__main__":
    main()
