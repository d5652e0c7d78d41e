"""ROME Figs. 17 and 18: fine-tuning by layer, and within a ball by layer and ε, each record alone.

    python -m analyses.papers.finetune_grid [--model tiny] [--requests tiny] [--count 50] [--bounds 5e-5,5e-4,1e-3]

Each record is trained at one layer, from the unedited model, and scored: without constraint (`ft`), and with every
weight held within ε of its value (`ft_l`). The paper chose its layers and ε in such sweeps, over 50 records of GPT-2 XL
and of GPT-J: FT at layers 1 and 21, FT+L at layer 0 with ε 5e-4 and 5e-5 (Appendix E.1). Writes, with 95 % intervals
over records:

- `finetune_grid.parquet`: method (ft, or ft_l with its ε), layer, measure, mean, low, high, n (records);
- `finetune_grid.csv`: one row per method and layer;
- `finetune_grid.pdf`, `.png`.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from tqdm import tqdm

from analyses.common.alone import scored_alone
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of
from analyses.common.printing import format_scores
from analyses.common.variants import Variant
from mechedit.cli import parse_names
from mechedit.errors import InputError
from mechedit.figures import scores_figure

MEASURES = ("ES", "PS", "NS", "S")
BOUNDS, QUICK_BOUNDS = "5e-5,2e-4,5e-4,2e-3,1e-2,5e-2", "1e-2"
"""Values of ε, by default and with `--quick`; the first three are the order of the paper's."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Train at every layer, with and without bounds, score, draw, write."""
    parser = options(__doc__, count=50, quick_count=2)
    parser.set_defaults(requests="tiny")
    parser.add_argument("--bounds", help=f"ε of ft_l (default {BOUNDS})")
    experiment = open_experiment("finetune_grid", parser, arguments)
    text = experiment.arguments.bounds
    bounds = parse_bounds((QUICK_BOUNDS if experiment.quick else BOUNDS) if text is None else text)
    layers = experiment.requested_layers or range(experiment.model.n_layers)
    table = pd.concat([scored(experiment, bound, layers) for bound in (None, *bounds)], ignore_index=True)
    experiment.write(table, format_table(table), scores_figure(table, MEASURES, x="layer", label="layer"))


def parse_bounds(text: str) -> list[float]:
    """Positive numbers between commas, ascending.

    Raises:
        InputError: anything else.
    """
    try:
        bounds = sorted({float(name) for name in filter(None, parse_names(text))})
    except ValueError:
        bounds = [0.0]
    if not all(0 < bound < float("inf") for bound in bounds):
        raise InputError(f"--bounds {text!r} cannot be read, expected positive numbers such as {BOUNDS}")
    return bounds


def scored(experiment: Experiment, bound: float | None, layers: Sequence[int]) -> pd.DataFrame:
    """`method, layer, measure, mean, low, high, n` of fine-tuning within a bound, or without one, layer by layer."""
    method, settings = ("ft", {}) if bound is None else ("ft_l", {"norm_bound": f"{bound:g}"})
    name = method if bound is None else f"{method}, ε {bound:g}"
    frames = []
    for layer in tqdm(layers, desc=name, unit="layer"):
        variant = Variant(method=method, layers=(layer,), settings=settings)
        rows = scored_alone(experiment, variant, experiment.requests, "counterfact")
        frames.append(rows.assign(method=name, layer=layer))
    return pd.concat(frames, ignore_index=True).loc[:, ["method", "layer", "measure", "mean", "low", "high", "n"]]


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per method and layer: each measure with half its interval."""
    return pd.DataFrame(
        [
            {"method": method, "layer": layer, **format_scores(scores, MEASURES)}
            for (method, layer), scores in groups_of(table, ["method", "layer"])
        ]
    )


if __name__ == "__main__":
    run_script(main)
