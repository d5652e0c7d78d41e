"""ROME Fig. 16: integrated gradients of a fact's hidden states, beside its causal trace.

    python -m analyses.papers.integrated_gradients [--model tiny] [--facts known] [--cases 3] [--out papers] [--quick]

With h the states of all tokens after a layer in the clean run and h* those of the corrupted one, the attribution of
token i is (Sundararajan et al., 2017)

    aᵢ = (hᵢ − hᵢ*) · ∫₀¹ ∂P(o; h* + α (h − h*)) / ∂hᵢ dα,      Σᵢ aᵢ = P(o; h) − P(o; h*),

by Gauss and Legendre's rule with 50 points as in the paper, averaged over noise samples: every layer's attributions
add up to the total effect, of which a causal trace restores a part with each single state. Facts are those that the
corruption hurts most. Writes:

- `integrated_gradients.parquet`: fact, layer, position, token, role, attribution, effect (of the trace; both are parts
  of probability);
- `integrated_gradients.csv`: one row per fact: its total effect, how far a layer's sum is off it at most, the rank
  correlation of attributions and effects over tokens and layers, and where either is largest before the last token;
- `integrated_gradients.pdf`, `.png`: for each fact the trace above and the attributions below, each on its own scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure

from analyses.common.command import open_experiment, options, run_script
from analyses.common.frames import groups_of
from analyses.papers.trace_average import MAX_FACTS, traced
from mechedit.batching import batches_of
from mechedit.data import Fact
from mechedit.errors import InputError
from mechedit.figures import PAGE_WIDTH, paper_style, plot_fact
from mechedit.models import Model, Patch, Resume, Site
from mechedit.statistics import spearman
from mechedit.tables import read_table, where
from mechedit.trace import Approximation, TraceConfig, embedding_std, run_clean_and_corrupted, tokenize_fact

POINTS, QUICK_POINTS = 50, 5
"""Points of the rule, as in the paper."""
ROWS = 64
"""Rows per pass."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Trace, attribute, draw, write."""
    parser = options(__doc__, max_facts=MAX_FACTS)
    parser.add_argument("--cases", type=int, default=3, help="facts that are drawn (default 3)")
    experiment = open_experiment("integrated_gradients", parser, arguments)
    cases = experiment.arguments.cases
    check_cases(cases, len(experiment.facts))
    effects = read_table(traced(experiment) / "effects.parquet", kind="state", sever="nothing")
    names = hurt_most(effects, cases)
    facts = {fact.id: fact for fact in experiment.facts}
    noise_std = 3 * embedding_std(experiment.model, [fact.subject for fact in experiment.facts])
    points = QUICK_POINTS if experiment.quick else POINTS
    config = TraceConfig(kinds=("state",), samples=experiment.samples, noise_std=noise_std, seed=experiment.seed)
    tables = [
        beside_trace(attributions(experiment.model, facts[name], config, points), where(effects, fact=name))
        for name in names
    ]
    table = pd.concat(tables, ignore_index=True)
    columns = ["fact", "layer", "position", "token", "role", "attribution", "effect"]
    experiment.write(table.loc[:, columns], format_table(table), saliency_figure(table))


def hurt_most(effects: pd.DataFrame, count: int) -> list[str]:
    """Ids of the facts with the largest total effects.

    Raises:
        InputError: fewer were traced.
    """
    first = effects.drop_duplicates("fact").set_index("fact")
    totals: Any = first["clean"] - first["corrupted"]
    totals = totals.sort_values(ascending=False, kind="stable")
    check_cases(count, len(totals))
    return [str(name) for name in totals.index[:count]]


def check_cases(count: int, n_facts: int) -> None:
    """Refuse to draw more facts than there are, or none.

    Raises:
        InputError: names the option.
    """
    if not 1 <= count <= n_facts:
        raise InputError(f"--cases is {count}, expected 1 to {n_facts}, the facts traced; give other facts")


def attributions(model: Model, fact: Fact, config: TraceConfig, points: int) -> Float[np.ndarray, "layer pos"]:
    """The aᵢ of every layer and token of the prompt with all tokens of its object but the last.

    Args:
        model: unedited.
        fact: whose object's probability is explained.
        config: of the corruption; its `noise_std` has to be set.
        points: of the rule.
    """
    assert config.noise_std is not None, "σ is of all facts, and so comes from outside"
    estimated = replace(config, approximation=Approximation())
    runs = run_clean_and_corrupted(model, [tokenize_fact(model, fact)], config.noise_std, estimated)
    nodes, weights = np.polynomial.legendre.leggauss(points)
    alphas = [(alpha, weight) for alpha, weight in zip((nodes + 1) / 2, weights / 2, strict=True)]
    places = [(sample, alpha, weight) for sample in range(runs.samples) for alpha, weight in alphas]
    labels = torch.tensor(runs.facts[0].object_ids, device=model.device)
    by_layer = []
    for layer in range(model.n_layers):
        site, total = Site(layer, "resid"), 0.0
        before = runs.clean[Site(layer - 1, "resid")] if layer else None
        for batch in batches_of(places, ROWS):
            samples = torch.tensor([sample for sample, _, _ in batch], device=model.device)
            alpha, weight = (torch.tensor([row[i] for row in batch], device=model.device) for i in (1, 2))
            corrupted = runs.corrupted[site][samples]
            step = runs.clean[site] - corrupted
            states = (corrupted + alpha[:, None, None].to(step) * step).detach().requires_grad_()
            positions = torch.arange(states.shape[1], device=model.device).repeat(len(batch), 1)
            resume = None if before is None else Resume(layer, before.expand(len(batch), -1, -1))
            with torch.enable_grad():
                logits = model.run(
                    runs.tokens.rows(samples), [Patch(site, positions, states)],
                    resume=resume, logits_to_keep=runs.read_at[0],
                ).logits  # fmt: skip
                chosen = logits.float().log_softmax(-1).gather(2, labels.expand(len(batch), -1)[..., None])
                (gradient,) = torch.autograd.grad(chosen[..., 0].sum(1).exp().sum(), states)
            parts = (step * gradient).sum(-1).double() * weight[:, None] / runs.samples
            total = total + parts.sum(0)
        by_layer.append(torch.as_tensor(total).cpu().numpy())
    return np.stack(by_layer)


def beside_trace(values: Float[np.ndarray, "layer pos"], effects: pd.DataFrame) -> pd.DataFrame:
    """The traced cells of a fact with their attributions; `missing` is what a layer's sum is off the total effect."""
    sums = values.sum(1)
    total = effects["clean"].iloc[0] - effects["corrupted"].iloc[0]
    attribution = [
        values[layer, position] for layer, position in zip(effects["layer"], effects["position"], strict=True)
    ]
    return effects.assign(attribution=attribution, total=total, missing=float(np.abs(sums - total).max()))


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per fact, in percent of probability."""
    rows = []
    for (fact,), cells in groups_of(table, ["fact"]):
        early = cells.loc[cells["role"] != "last", :]
        ranked = [cells[name].to_numpy(dtype=float)[None] for name in ("effect", "attribution")]
        best = {name: early.loc[early[name].idxmax()] for name in ("effect", "attribution")}
        rows.append(
            {
                "fact": fact,
                "total effect": round(100 * float(cells["total"].iloc[0]), 1),
                "sum off by": round(100 * float(cells["missing"].iloc[0]), 2),
                "rank correlation": round(float(spearman(*ranked)[0]), 2),
                **{f"largest {name}": f"{cell['token']!r}, layer {cell['layer']}" for name, cell in best.items()},
            }
        )
    return pd.DataFrame(rows)


def saliency_figure(table: pd.DataFrame) -> Figure:
    """For each fact, a column: its causal trace, and below it the attributions."""
    facts = list(groups_of(table, ["fact"]))
    with paper_style():
        figure = Figure(figsize=(PAGE_WIDTH, 4.6))
        grid = figure.subplots(2, len(facts), squeeze=False)
        for column, (_, cells) in enumerate(facts):
            for row, (title, values) in enumerate(
                (("causal trace", "effect"), ("integrated gradients", "attribution"))
            ):
                ax = plot_fact(cells.assign(effect=cells[values]), grid[row][column], bar=False)
                ax.set(title=title, xlabel="layer" if row else "")
                figure.colorbar(ax.images[0], ax=ax, label="% of probability", fraction=0.05, pad=0.02, aspect=18)
    return figure


if __name__ == "__main__":
    run_script(main)
