"""How much old keys should count: scores against λ, the weight of the second moments (MEMIT Fig. 13).

    python -m analyses.papers.ablate_lambda [--model M] [--requests R] [--layers 3-8] [--decades 3] [--quick]

λ runs over decades on both sides of the model's own, in its unit: of one new fact (`covariance_weight`), or of the
facts' median kᵀM⁻¹k (`relative_covariance_weight`). GE, of `--free` texts per case, rises with λ in the paper. z does
not depend on λ, so all edits share one search.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analyses.common.checks import check_number
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.free_text import OWN, free_text
from analyses.common.printing import format_scores
from analyses.common.variants import Variant
from mechedit.errors import InputError
from mechedit.figures import GRAY, scores_figure

MOST_DECADES = 20
"""Beyond them λ is no number that a setting takes."""
MEASURES = ("ES", "PS", "NS", "S", "exact_match", "GE", OWN)


def main(arguments: Sequence[str] | None = None) -> None:
    """Edit and score with each λ, write the table and the figure."""
    parser = options(__doc__, count=300, quick_count=10)
    parser.add_argument("--method", default="memit")
    parser.add_argument("--free", type=int, help="free texts per case, for GE (default 1; with --quick 0)")
    parser.add_argument("--decades", type=float, default=3.0, help="of λ, on each side of the model's own (default 3)")
    experiment = open_experiment("ablate_lambda", parser, arguments)
    check_number("--decades", experiment.arguments.decades, least=0.5, most=MOST_DECADES)
    if experiment.arguments.free is None:
        experiment.arguments.free = 0 if experiment.quick else 1
    name, default = weight_setting(experiment)
    free = free_text(experiment)
    score = partial(experiment.scored, requests=free.requests, evaluation=free.config, references=free.references)
    scores = [score(None).assign(model="unedited")]
    scores += [
        score(variant(experiment, {name: weight})).assign(weight=weight, model="edited")
        for weight in weights(experiment, default)
    ]
    table = free.named(pd.concat(scores, ignore_index=True))
    experiment.write(table, format_table(table), figure(table, default))


def weight_setting(experiment: Experiment) -> tuple[str, float]:
    """The model's λ: the setting that holds it, which is its unit, and its value.

    Raises:
        InputError: the method has none.
    """
    settings = dataclasses.asdict(experiment.config(variant(experiment)))
    for name in ("covariance_weight", "relative_covariance_weight"):
        if settings.get(name) is not None:
            return name, float(settings[name])
    raise InputError(f"the method {experiment.arguments.method!r} has no λ, expected one such as memit; choose another")


def variant(experiment: Experiment, weight: Mapping[str, float] = MappingProxyType({})) -> Variant:
    """The method with this λ, by its setting; by default the model's own."""
    settings = {name: f"{value:g}" for name, value in weight.items()}
    return Variant(method=experiment.arguments.method, layers=tuple(experiment.layers), settings=settings)


def weights(experiment: Experiment, default_weight: float) -> list[float]:
    """λ in half decades, or with `--quick` in steps of the whole way."""
    decades = experiment.arguments.decades
    count = 3 if experiment.quick else 1 + round(4 * decades)
    return [float(f"{default_weight * 10**step:.4g}") for step in np.linspace(-decades, decades, count)]


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """The table as a paper would print it: one line per λ, each score with half its interval, in percent."""
    rows = []
    weight_of_row = table["weight"].fillna(-1.0)
    for weight in sorted(set(weight_of_row.tolist())):
        scores = format_scores(table.loc[weight_of_row == weight, :], (*MEASURES, "left"))
        rows.append({"λ": "unedited" if weight < 0 else f"{weight:g}", **scores})
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame, default_weight: float) -> Figure:
    """Each score against λ; the dotted line is the model's own."""
    shown = [measure for measure in MEASURES if measure in set(table["measure"])]
    drawn = scores_figure(table, shown, x="weight", hue="model", log=True, label="λ")
    for ax in drawn.axes:
        ax.axvline(default_weight, color=GRAY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=0)
    return drawn


if __name__ == "__main__":
    run_script(main)
