"""Attribution patching: the effects of all cells at once, to first order, from one backward pass per severing.

Restoring an activation moves it from its corrupted value a* to its clean value a. To first order a metric m moves by

    δ = (a − a*) · ∂m/∂a*,   with the gradient taken in the corrupted run (Nanda 2023; Kramár et al. 2024),

so that one backward pass gives δ of every state, MLP output and attention output at every layer and position. With
more `points`, the mean is taken over gradients at subjects on the way from corrupted to clean (Hanna et al. 2024);
noise samples are dealt over the points, so that more of them take no more passes.

- A severed module is constant, and the gradient stops there, as the effect of a restored state does.
- A window is several restorations at once: δ = Σ (aₗ − aₗ*) · gₗ over its layers. While it restores MLP outputs at a
  token, later MLPs of the window no longer answer to earlier ones there; so gₗ leaves out paths through them. It is
  the gradient at the window's last MLP output, plus what attention passes on between: the gradient at the state before
  a block minus that at its attention's output. (Attention of a token to itself is taken as in the corrupted run. Where
  attention and MLP are parallel, this is the plain gradient.) Attention windows take the plain gradient.
- A probability saturates, and the line does not. So it is drawn for the log-odds, and bent there: P of a restored cell
  is σ(logit P* + T tanh(δ / T)) per noise sample, T = max(1, |logit P_clean − logit P*|). To first order this is the
  same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mechedit.batching import batches_of, run_in_halves
from mechedit.errors import InputError
from mechedit.models import EMBED, Part, Patch, Run, Site, Tokens
from mechedit.trace.config import PART_OF_KIND
from mechedit.trace.memory import max_gradient_rows
from mechedit.trace.metric_values import checked_values, metric_inputs
from mechedit.trace.metrics import NORMALIZED, MetricInputs, ObjectInputs, find_metric, metric_name
from mechedit.trace.restore import Cell
from mechedit.trace.runs import TraceRuns, slice_patch
from mechedit.trace.traced_fact import longest_of
from mechedit.trace.windows import window_span

CellScores = dict[tuple[str, str], Float[Tensor, "row layer pos"]]
"""Metric and kind → the score that each row is estimated to have once the cell at a layer and position is restored."""
Activations = Mapping[Site, Float[Tensor, "row pos d_model"]]
"""Activations, or gradients at them, at the positions of `restored_span`."""


@dataclass(frozen=True)
class Scale:
    """The scale on which a metric is taken to move along a straight line, and the way back from it."""

    value: Callable[[Any], Float[Tensor, " row"]]
    """Of `MetricInputs`; of `ObjectInputs` as well where the metric is of the object alone."""
    score: Callable[[Tensor], Tensor]
    bounded: bool
    """Whether the line is bent, so that a restored cell moves the value little further than to the clean run's."""

    def moved(
        self, corrupted: Float[Tensor, " row"], clean: Float[Tensor, " row"], change: Float[Tensor, "row layer pos"]
    ) -> Float[Tensor, "row layer pos"]:
        """Scores after a first-order change of the value."""
        if self.bounded:
            most = (clean - corrupted).abs().clamp(min=1)[:, None, None]
            change = most * torch.tanh(change / most)
        return self.score(corrupted[:, None, None] + change)


def log_odds(inputs: MetricInputs | ObjectInputs) -> Float[Tensor, " row"]:
    """Log-odds log P − log(1 − P) of the object; finite where P rounds to 1."""
    log_probability = inputs.log_probability
    return log_probability - torch.log(-torch.expm1(log_probability.clamp(max=-1e-6)))


SCALES: Mapping[str, Scale] = {
    "probability": Scale(log_odds, torch.sigmoid, bounded=True),
    "log_probability": Scale(log_odds, functional.logsigmoid, bounded=True),
}
"""Scales of metrics that saturate; others are taken to move along a straight line themselves."""


def estimate_cells(
    runs: TraceRuns, cells: Sequence[Cell], points: int = 1, *, all_samples: bool = False
) -> dict[Cell, dict[str, float]]:
    """Estimated scores of cells, by metric: means over noise samples, each with the gradient at one of the points.

    Args:
        runs: the clean and corrupted runs of the cells' facts, of a config with an `approximation`.
        cells: any cells of theirs, from their subjects on.
        points: from the corrupted subject on in steps of 1 / points to the clean one. Where there are more of them than
            samples, a sample has several.
        all_samples: whether each sample has the gradients at all points.
    """
    estimates: dict[Cell, dict[str, float]] = {}
    start = runs.restored_span.start
    for sever in dict.fromkeys(cell.sever for cell in cells):
        means = {key: scores.tolist() for key, scores in _mean_scores(runs, sever, points, all_samples).items()}
        names = list(dict.fromkeys(name for name, _ in means))
        estimates |= {
            cell: {name: means[name, cell.kind][cell.fact][cell.layer][cell.position - start] for name in names}
            for cell in cells
            if cell.sever == sever
        }
    return estimates


def _mean_scores(runs: TraceRuns, sever: str, points: int, all_samples: bool) -> CellScores:
    """Estimated scores of each fact: means over its samples, in as many passes as memory asks for."""
    count = points * runs.samples if all_samples else max(points, runs.samples)
    sums: CellScores = {}
    for point in range(points):
        samples = range(runs.samples) if all_samples else [i % runs.samples for i in range(point, count, points)]
        rows = [fact * runs.samples + sample for fact in range(len(runs.facts)) for sample in samples]
        for key, scores in _scores_of_rows(runs, sever, rows, point / points).items():
            total = scores.unflatten(0, (len(runs.facts), -1)).sum(1)
            sums[key] = sums[key] + total if key in sums else total
    return {key: total / count for key, total in sums.items()}


def _scores_of_rows(runs: TraceRuns, sever: str, rows: Sequence[int], part: float) -> CellScores:
    """Estimated scores of rows of the corrupted run, from gradients at a part of the way to the clean run."""
    batches = batches_of(
        torch.tensor(rows, device=runs.model.device), max_gradient_rows(runs.model, longest_of(runs.facts), runs.config)
    )

    def estimated(batch: Int[Tensor, " row"]) -> CellScores:
        return _Gradients(runs, sever, batch, part).scores()

    scores = list(run_in_halves(batches, estimated))
    return {key: torch.cat([of_batch[key] for of_batch in scores]) for key in scores[0]}


def _sum(name: str, scale: Scale, inputs: MetricInputs) -> Float[Tensor, ""]:
    """The sum of a scale's values over rows.

    Raises:
        InputError: it does not depend on the activations in a way that has a gradient.
    """
    total = checked_values(name, scale.value(inputs), inputs).sum()
    if not total.requires_grad:
        raise InputError(
            f"the metric {name!r} has no gradient (as a rank, a count or a detached number has none), so that its "
            f"effects cannot be estimated; trace it without approximation"
        )
    return total


class _Gradients:
    """Rows of the corrupted run, or of one part of the way to the clean run, with the gradients at their activations.

    Zeros that are added to every activation receive its gradient, whatever an engine does with it afterwards.
    """

    def __init__(self, runs: TraceRuns, sever: str, rows: Int[Tensor, " row"], part: float) -> None:
        self.runs, self.rows, self.facts = runs, rows, rows // runs.samples
        span, width, device = runs.restored_span, runs.model.d_model, rows.device
        zeros = {
            site: torch.zeros(len(rows), len(span), width, dtype=runs.model.dtype, device=device, requires_grad=True)
            for site in self._sites()
        }
        with torch.enable_grad():
            run = _run(runs, sever, rows, part, zeros)
            inputs = metric_inputs(run, runs.clean, self.facts, runs.facts, runs.foils)
            sums = {scale.value: _sum(name, scale, inputs) for name, scale in self.scales.items()}
        self.gradients = {
            value: dict(zip(zeros, torch.autograd.grad(total, list(zeros.values()), retain_graph=True), strict=True))
            for value, total in sums.items()
        }
        """Each scale's gradients at the sites."""

    @property
    def scales(self) -> dict[str, Scale]:
        """Every metric before normalization, with its scale."""
        metrics = {metric_name(metric).removeprefix(NORMALIZED): metric for metric in self.runs.config.metrics}
        return {
            name: SCALES.get(name) or Scale(find_metric(metric), lambda value: value, bounded=False)
            for name, metric in metrics.items()
        }

    def _sites(self) -> list[Site]:
        """Sites whose gradients are needed: those that are restored, and for windows of MLPs all that they reach."""
        kinds = self.runs.config.kinds
        parts: list[Part] = [PART_OF_KIND[kind] for kind in kinds]
        if "mlp" in kinds:
            parts = ["attn_out", "mlp_out", "resid"]
        return [Site(layer, part) for layer in range(self.runs.model.n_layers) for part in dict.fromkeys(parts)]

    def scores(self) -> CellScores:
        """Estimated scores of every cell, from these gradients and the activations and values of the corrupted run."""
        corrupted = self.runs.corrupted_inputs
        assert corrupted is not None, "the runs are of a config without approximation"
        clean_facts = torch.arange(len(self.runs.facts), device=self.facts.device)
        clean = metric_inputs(self.runs.clean, self.runs.clean, clean_facts, self.runs.facts, self.runs.foils)
        scores: CellScores = {}
        for kind in self.runs.config.kinds:
            differences = self._differences(kind)
            for name, scale in self.scales.items():
                change = self._changes(kind, differences, self.gradients[scale.value])
                before, after = scale.value(corrupted)[self.rows], scale.value(clean)[self.facts]
                scores[name, kind] = scale.moved(before, after, change)
        return scores

    def _differences(self, kind: str) -> list[Float[Tensor, "row pos d_model"]]:
        """The difference a − a* of every layer; what is severed has a*'s outputs, so that it leaves a* as it is."""
        span = self.runs.restored_span
        sites = [Site(layer, PART_OF_KIND[kind]) for layer in range(self.runs.model.n_layers)]
        return [
            self.runs.clean[site][self.facts, span.start : span.stop].float()
            - self.runs.corrupted[site][self.rows, span.start : span.stop].float()
            for site in sites
        ]

    def _changes(
        self, kind: str, differences: Sequence[Float[Tensor, "row pos d_model"]], gradients: Activations
    ) -> Float[Tensor, "row layer pos"]:
        """δ of the cells at every layer."""
        n_layers = self.runs.model.n_layers
        spans = [window_span(kind, layer, n_layers, self.runs.config.window) for layer in range(n_layers)]
        plain = [gradients[Site(layer, PART_OF_KIND[kind])].float() for layer in range(n_layers)]
        if kind != "mlp":
            by_layer = _running_sums([(a * g).sum(-1) for a, g in zip(differences, plain, strict=True)])
            return torch.stack([by_layer[span.stop] - by_layer[span.start] for span in spans], dim=1)
        attention = _attention_sums(gradients, n_layers)
        # g of layer l in a window that ends with layer e is plain[e] + attention[e] − attention[l].
        total = _running_sums(differences)
        passed = _running_sums([(a * c).sum(-1) for a, c in zip(differences, attention, strict=True)])
        return torch.stack(
            [
                ((total[span.stop] - total[span.start]) * (plain[span[-1]] + attention[span[-1]])).sum(-1)
                - (passed[span.stop] - passed[span.start])
                for span in spans
            ],
            dim=1,
        )


def _attention_sums(gradients: Activations, n_layers: int) -> list[Float[Tensor, "row pos d_model"]]:
    """What attention in the layers up to each one adds to the gradient as it is passed down; nothing in layer 0."""
    before = [gradients[Site(layer, "resid")].float() for layer in range(n_layers)]
    after = [gradients[Site(layer, "attn_out")].float() for layer in range(n_layers)]
    return _running_sums([state - output for state, output in zip(before[:-1], after[1:], strict=True)], before[0])


def _running_sums(terms: Sequence[Tensor], like: Tensor | None = None) -> list[Tensor]:
    """0, t₀, t₀ + t₁, …: one more than there are terms."""
    sums = [torch.zeros_like(terms[0] if like is None else like)]
    for term in terms:
        sums.append(sums[-1] + term)
    return sums


def _run(runs: TraceRuns, sever: str, rows: Int[Tensor, " row"], part: float, zeros: Activations) -> Run:
    """Rows of the corrupted run with a severing's constants, plus the zeros.

    Args:
        runs: the group's runs.
        sever: label of the severing.
        rows: rows of the corrupted run.
        part: of the way from the corrupted embeddings to the clean ones.
        zeros: added to the activations at the restored positions.
    """
    span = runs.restored_span
    # What precedes the restored positions is that of the corrupted run, unless the subject is changed.
    start = min(span.start, *(traced.subject.start for traced in runs.facts)) if part else span.start
    corruption = slice_patch(runs.corruption, rows, start)
    if part:
        facts = rows // runs.samples
        clean = runs.clean[EMBED][facts[:, None], runs.corruption.positions[rows].clamp(min=0)]
        corruption = replace(corruption, value=torch.lerp(corruption.value, clean.to(corruption.value), part))
    positions = (torch.arange(span.start, span.stop, device=rows.device) - start).repeat(len(rows), 1)
    severed = [
        patch for layer in range(runs.model.n_layers) for patch in runs.severed[sever].patches(rows, layer, start)
    ]
    return runs.model.run(
        Tokens(runs.tokens.ids[rows, start:], runs.tokens.mask[rows, start:]),
        [corruption, *severed, *(Patch(site, positions, value, add=True) for site, value in zeros.items())],
        logits_to_keep=runs.read_at[rows // runs.samples] - start,
        kv_cache=runs.kv_cache.take(rows, start) if start else None,
    )
