"""How much weight decay fine-tuning wants: scores against λ of `ft_w` (MEMIT Fig. 9).

    python -m analyses.papers.finetune_decay [--model M] [--requests R] [--layers 21] [--out DIR] [--quick]

λ runs in half decades to both sides of the published 5e-4; the dashed lines are fine-tuning without decay (`ft`), which
is what the published code does, and the unedited model; the dotted one stands at 5e-4. As in the papers one layer is
trained, by default the middle one of what the trace selects.
"""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from analyses.common.checks import check_number
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of
from analyses.common.printing import format_scores
from analyses.common.variants import Variant
from mechedit.figures import GRAY, scores_figure
from mechedit.published import published_settings

MOST_DECADES = 20
"""Beyond them λ is no number that a setting takes."""
MEASURES = ("ES", "PS", "NS", "S", "exact_match")
PUBLISHED = float(published_settings("gpt-j", method="ft_w")[0].settings["weight_decay"])
"""λ of FT-W in MEMIT Appendix B.1, for 10,000 edits of GPT-J."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Fine-tune and score with each λ, write the table and the figure."""
    parser = options(__doc__, count=100, quick_count=10)
    parser.add_argument("--decades", type=float, default=3.5, help="of λ, up from 5e-4 (default 3.5)")
    parser.add_argument("--decades-below", type=float, default=1.0, help="of λ, down from 5e-4 (default 1)")
    experiment = open_experiment("finetune_decay", parser, arguments)
    for option, decades in (
        ("--decades", experiment.arguments.decades), ("--decades-below", experiment.arguments.decades_below)
    ):  # fmt: skip
        check_number(option, decades, most=MOST_DECADES)
    layers = trained(experiment)
    none = Variant(method="ft", layers=layers)
    scores = [
        experiment.scored(without, experiment.requests).assign(model=name)
        for name, without in (("unedited", None), ("no decay", none))
    ]
    for weight in weights(experiment):
        variant = Variant(method="ft_w", layers=layers, settings={"weight_decay": f"{weight:g}"})
        scores.append(experiment.scored(variant, experiment.requests).assign(weight=weight, model="ft_w"))
    table = pd.concat(scores, ignore_index=True)
    experiment.write(table, format_table(table), figure(table))


def trained(experiment: Experiment) -> tuple[int, ...]:
    """The layers given, or the middle one of those selected."""
    if (requested := experiment.requested_layers) is not None:
        return tuple(requested)
    layers = experiment.layers
    return (layers[(len(layers) - 1) // 2],)


def weights(experiment: Experiment) -> list[float]:
    """λ in half decades, or with `--quick` both ends."""
    least, most = -round(2 * experiment.arguments.decades_below), round(2 * experiment.arguments.decades)
    chosen = (least, most) if experiment.quick else range(least, most + 1)
    return [float(f"{PUBLISHED * 10 ** (step / 2):.3g}") for step in chosen]


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """A line for each λ: each score with half its interval, in percent."""
    rows = []
    names = [
        f"{weight:g}" if weight == weight else "none" if model == "no decay" else model
        for weight, model in zip(table["weight"], table["model"], strict=True)
    ]
    for (name,), scores in groups_of(table.assign(name=names), ["name"]):
        rows.append({"weight decay": name, **format_scores(scores, MEASURES)})
    return pd.DataFrame(rows)


def figure(table: pd.DataFrame) -> Figure:
    """Each score against λ; the dotted line is the published one."""
    drawn = scores_figure(table, x="weight", hue="model", log=True, label="weight decay λ")
    for ax in drawn.axes:
        ax.axvline(PUBLISHED, color=GRAY, linewidth=0.8, linestyle=(0, (1, 1)), zorder=0)
    return drawn


if __name__ == "__main__":
    run_script(main)
