"""Log-probabilities of few tokens, read off the states that enter the output embedding.

Where log P of one token or one divergence is all that is asked of a state, its logits need not stand in memory at once.
`Readout` computes them for a part of the vocabulary at a time and keeps running sums, as one does for attention: the
highest logit m, Σᵥ exp(lᵥ − m) and, where a gradient is asked for, Σᵥ exp(lᵥ − m)·f'·Wᵥ, each rescaled when m rises.
One pass over the output embedding W thus gives the value and its gradient with respect to the state,

    ∇ log P(o) = f'ₒ Wₒ − Σᵥ Pᵥ f'ᵥ Wᵥ,      ∇ KL(P ‖ Q) = Σᵥ Pᵥ (Dᵥ − D̄) f'ᵥ Wᵥ,     D = l − l_Q,  D̄ = Σᵥ Pᵥ Dᵥ,

with two matrix products in place of three. Between the products and the logits, a model may scale and cap them (f):
`find_readout` holds f against the model's own logits, and falls back to whole logits where it does not agree.

Memory beyond inputs and results: at most four blocks of `CHUNK` numbers, and one [row, d_model] for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK = {"cpu": 2**21, "cuda": 2**24}
"""Logits in memory at once, per type of device: 8 and 64 MiB in float32."""
MAX_TOKENS = {"cpu": 2**14, "cuda": 2**18}
"""Most tokens of the vocabulary at once: on a CPU, their rows of W are still near when the gradient reads them."""
AGREEMENT = 1e-5
"""Largest difference in log P, in nats, between a readout and the model's own logits in float32."""


def log_probabilities(logits: Float[Tensor, "*row vocab"]) -> Float[Tensor, "*row vocab"]:
    """Log P of every token, l − log Σᵥ exp(lᵥ), in nats.

    Over 50,259 tokens, torch's log_softmax in float32 is off by 9e-5 on a CPU, and this by 9e-7.
    """
    return logits - logits.logsumexp(-1, keepdim=True)


@dataclass(frozen=True, kw_only=True)
class LogitMap:
    """What a model makes of the products of states and output embedding: f(u) = cap · tanh(scale · u / cap)."""

    scale: float | int = 1
    """Factor of the products (Cohere's `logit_scale`, one over Granite's `logits_scaling`)."""
    cap: float | int | None = None
    """Bound that Gemma 2 puts on logits (`final_logit_softcapping`); None for f(u) = scale · u."""

    def __call__(self, products: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The logits."""
        scaled = products if self.scale == 1 else products * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap

    def slope(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"] | float | int:
        """Derivative f' where f has these values; a number where it is the same everywhere."""
        return self.scale if self.cap is None else (1 - (logits / self.cap).square()).mul_(self.scale)


@dataclass(frozen=True, eq=False)
class CleanLogits:
    """Logits of another run, from which a divergence is measured."""

    logits: Float[Tensor, "row vocab"]

    def __len__(self) -> int:
        return len(self.logits)

    def take(self, index: Int[Tensor, " chosen"]) -> CleanLogits:
        """The rows of these indices."""
        return CleanLogits(self.logits[index])


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenScores:
    """What was read off a batch of states."""

    log_prob: Float[Tensor, " label"]
    """log P of each label, in nats."""
    runner_up: Float[Tensor, " label"]
    """log P of the likeliest token but the label; no gradient flows through it."""
    kl: Float[Tensor, " clean"]
    """KL(P ‖ P_clean) of the states behind the labels', in nats."""


@dataclass(frozen=True, eq=False)
class Readout:
    """Reads states that enter the output embedding, a part of the vocabulary at a time."""

    head: nn.Linear
    """The output embedding; its weights are read where they are, so that edits are seen."""
    logit_map: LogitMap = LogitMap()

    chunked = True
    """`score` takes states, not logits."""

    def score(
        self, states: Float[Tensor, "row d_model"], labels: Int[Tensor, " label"], clean: CleanLogits | None = None
    ) -> TokenScores:
        """Read the labels' log P off the first states, and KL(P ‖ P_clean) off the others.

        Args:
            states: inputs of the output embedding; gradients flow to them, and to them alone.
            labels: a token for each of the first states.
            clean: logits of the clean run for each of the other states.
        """
        kl_rows = 0 if clean is None else len(clean)
        if len(states) != len(labels) + kl_rows:
            raise ValueError(f"{len(states)} states are for {len(labels)} labels and {kl_rows} divergences")
        log_prob, runner_up, kl = _Score.apply(states, self, labels, clean)  # type: ignore[misc]
        return TokenScores(log_prob=log_prob, runner_up=runner_up, kl=kl)

    def logits(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        """Logits of states, all at once, in float32."""
        return self.part(states, 0, self.head.out_features)

    def part(self, states: Float[Tensor, "row d_model"], begin: int, end: int) -> Float[Tensor, "row token"]:
        """Logits of a range of tokens, computed in the model's dtype and returned in float32 (float64 stays)."""
        bias = None if self.head.bias is None else self.head.bias[begin:end]
        logits = self.logit_map(functional.linear(states, self.head.weight[begin:end], bias))
        return logits.to(_precision(states))

    def ranges(self, rows: int) -> Iterator[tuple[int, int]]:
        """The vocabulary in parts, so that `rows` of logits are at most `CHUNK` numbers."""
        kind, vocab = self.head.weight.device.type, self.head.out_features
        size = CHUNK.get(kind, CHUNK["cuda"]) // max(rows, 1)
        size = min(max(size, 1), MAX_TOKENS.get(kind, MAX_TOKENS["cuda"]))
        for begin in range(0, vocab, size):
            yield begin, min(begin + size, vocab)


@dataclass(frozen=True, eq=False)
class WholeReadout:
    """As `Readout`, from logits that the model computed itself: for models whose logits are not a map of products."""

    chunked = False
    """`score` takes logits."""

    def score(
        self, states: Float[Tensor, "row vocab"], labels: Int[Tensor, " label"], clean: CleanLogits | None = None
    ) -> TokenScores:
        """As `Readout.score`, with logits in place of states."""
        log_probs = log_probabilities(states.to(_precision(states)))
        edited, kl_rows = log_probs[: len(labels)], log_probs[len(labels) :]
        log_prob = edited.gather(1, labels[:, None])[:, 0]
        runner_up = edited.detach().scatter(1, labels[:, None], -torch.inf).amax(1)
        kl = log_probs.new_zeros(0)
        if clean is not None:
            kl = (kl_rows.exp() * (kl_rows - log_probabilities(clean.logits))).sum(1)
        return TokenScores(log_prob=log_prob, runner_up=runner_up, kl=kl)

    def logits(self, states: Float[Tensor, "row vocab"]) -> Float[Tensor, "row vocab"]:
        """The logits, in float32."""
        return states.to(_precision(states))


class _Score(torch.autograd.Function):
    """log P, runner-up and KL in one pass over the output embedding, with the gradient taken along."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, readout: Readout, labels: Tensor, clean: CleanLogits | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        sums = _Sums.start(readout, states, labels, clean, gradient=ctx.needs_input_grad[0])
        for begin, end in readout.ranges(len(states)):
            sums.add_(begin, end)
        results, gradient = sums.results()
        ctx.save_for_backward(gradient)
        ctx.n_labels, ctx.dtype, ctx.device = len(labels), states.dtype, states.device
        ctx.mark_non_differentiable(results[1])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, log_prob: Tensor, runner_up: Tensor, kl: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        upstream = torch.cat([log_prob, kl])[:, None]
        return (upstream * gradient).to(ctx.device, ctx.dtype), None, None, None


@dataclass(eq=False)
class _Sums:
    """Running sums over the vocabulary, relative to the highest logit so far."""

    readout: Readout
    states: Tensor
    labels: Tensor
    clean: Tensor | None
    gradient: bool
    highest: Tensor
    """m, the highest logit so far [row, 1]."""
    total: Tensor
    """Σ exp(l − m) [row, 1]."""
    label_logit: Tensor
    runner_up: Tensor
    weighted: Tensor
    """Σ exp(l − m) f' W for all rows, then Σ exp(l − m) D f' W for those with a clean run; empty without gradient."""
    difference: Tensor
    """Σ exp(l − m) D for rows with a clean run [clean, 1]."""

    @staticmethod
    def start(readout: Readout, states: Tensor, labels: Tensor, clean: CleanLogits | None, *, gradient: bool) -> _Sums:
        weight, dtype = readout.head.weight, _precision(states)
        rows, kl_rows = len(states), 0 if clean is None else len(clean)

        def filled(*shape: int, value: float = 0.0) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=weight.device)

        # The lowest number and not −∞, so that a part of the vocabulary may be −∞ altogether.
        lowest = torch.finfo(dtype).min
        return _Sums(
            readout=readout,
            states=states.detach().to(weight.device),
            labels=labels.to(weight.device),
            clean=None if clean is None else clean.logits,
            gradient=gradient,
            highest=filled(rows, 1, value=lowest),
            total=filled(rows, 1),
            label_logit=filled(len(labels), 1),
            runner_up=filled(len(labels), 1, value=-torch.inf),
            weighted=filled(rows + kl_rows, states.shape[1]) if gradient else filled(0, 0),
            difference=filled(kl_rows, 1),
        )

    def add_(self, begin: int, end: int) -> None:
        """Add the tokens from `begin` to before `end`."""
        logits, n_labels = self.readout.part(self.states, begin, end), len(self.labels)
        at = (self.labels - begin).clamp(0, end - begin - 1)[:, None]
        inside = ((self.labels >= begin) & (self.labels < end))[:, None]
        labeled = logits[:n_labels]
        label_logit = labeled.gather(1, at)
        # Without the label for as long as the likeliest of the others is looked for.
        highest = torch.cat([
            labeled.scatter_(1, at, label_logit.masked_fill(inside, -torch.inf)).amax(1, keepdim=True),
            logits[n_labels:].amax(1, keepdim=True),
        ])  # fmt: skip
        labeled.scatter_(1, at, label_logit)
        self.runner_up = torch.maximum(self.runner_up, highest[:n_labels])
        self.label_logit = label_logit.where(inside, self.label_logit)
        highest[:n_labels] = torch.maximum(highest[:n_labels], label_logit.where(inside, highest[:n_labels]))
        highest = torch.maximum(highest, self.highest)
        shrink, self.highest = (self.highest - highest).exp_(), highest
        slope = self.readout.logit_map.slope(logits) if self.gradient else 1
        differences = None if self.clean is None else self._differences(logits[n_labels:], begin, end)
        weights = logits.sub_(highest).exp_()
        self.total.mul_(shrink).add_(weights.sum(1, keepdim=True))
        if differences is not None:
            differences.mul_(weights[n_labels:])
            self.difference.mul_(shrink[n_labels:]).add_(differences.sum(1, keepdim=True))
        if self.gradient:
            self._add_gradient_(weights, slope, differences, shrink, self.readout.head.weight[begin:end])

    def _differences(self, logits: Tensor, begin: int, end: int) -> Tensor:
        assert self.clean is not None
        difference = logits - self.clean[:, begin:end].to(logits)
        # A token that neither run can give adds nothing.
        return difference.masked_fill_(logits == -torch.inf, 0)

    def _add_gradient_(
        self, weights: Tensor, slope: Tensor | float | int, differences: Tensor | None, shrink: Tensor, matrix: Tensor
    ) -> None:
        if isinstance(slope, Tensor) or slope != 1:
            weights = weights.mul_(slope)
        if differences is not None:
            n_labels = len(self.labels)
            weights = torch.cat([weights, differences * (slope[n_labels:] if isinstance(slope, Tensor) else slope)])
            shrink = torch.cat([shrink, shrink[n_labels:]])
        self.weighted.mul_(shrink)
        if matrix.dtype == weights.dtype:
            self.weighted.addmm_(weights, matrix)
        else:
            self.weighted.add_(weights.to(matrix.dtype) @ matrix)

    def results(self) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
        """The scores, and the gradient of log P and KL with respect to each state."""
        n_labels, rows = len(self.labels), len(self.states)
        log_total = self.highest + self.total.log()
        log_prob = (self.label_logit - log_total[:n_labels])[:, 0]
        runner_up = (self.runner_up - log_total[:n_labels])[:, 0]
        difference = self.difference / self.total[n_labels:]
        kl = difference.new_zeros(0)
        if self.clean is not None:
            clean_total = self.clean.to(difference).logsumexp(1, keepdim=True)
            kl = (difference - log_total[n_labels:] + clean_total)[:, 0]
        if not self.gradient:
            return (log_prob, runner_up, kl), log_prob.new_zeros(0)
        mean = self.weighted[:rows] / self.total
        of_labels = self.readout.head.weight[self.labels].to(mean) * self.readout.logit_map.slope(self.label_logit)
        of_kl = self.weighted[rows:] / self.total[n_labels:] - difference * mean[n_labels:]
        return (log_prob, runner_up, kl), torch.cat([of_labels - mean[:n_labels], of_kl])


def _precision(states: Tensor) -> torch.dtype:
    """The dtype of sums: float32, or float64 where the model is in float64."""
    return torch.promote_types(states.dtype, torch.float32)


@torch.no_grad()
def find_readout(
    head: Any, config: Any, states: Float[Tensor, "row d_model"], logits: Float[Tensor, "row vocab"]
) -> Readout | WholeReadout:
    """The readout of a model, once it agrees with the model's own logits; else the one that takes whole logits.

    Args:
        head: the output embedding.
        config: the model's config, whose numbers may be scales and caps.
        states: inputs of the output embedding.
        logits: what the model made of them.
    """
    if type(head) is not nn.Linear or not head.weight.is_floating_point():
        return WholeReadout()
    expected = log_probabilities(logits.to(_precision(logits)))
    # In half precision logits are as far apart as their rounding.
    rounding = 0.0 if logits.dtype in (torch.float32, torch.float64) else torch.finfo(logits.dtype).eps
    bound = AGREEMENT + 2 * rounding * float(logits.float().abs().max())
    for logit_map in _logit_maps(config):
        readout = Readout(head, logit_map)
        log_probs = log_probabilities(readout.logits(states.to(head.weight.device)))
        if bool((log_probs.to(expected.device) - expected).abs().max() <= bound):
            return readout
    return WholeReadout()


def _logit_maps(config: Any) -> Iterator[LogitMap]:
    """Maps that a model may have by the numbers in its config, the plainest first."""
    numbers = {name: value for name, value in config.to_dict().items() if _is_positive(value)}
    scales = [1.0, *(entry for name, value in numbers.items() if _tells(name, "scal", "multiplier")
                     for entry in (value, 1 / value))]  # fmt: skip
    caps = [None, *(value for name, value in numbers.items() if _tells(name, "cap"))]
    for cap in dict.fromkeys(caps):
        for scale in dict.fromkeys(scales):
            yield LogitMap(scale=scale, cap=cap)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _tells(name: str, *words: str) -> bool:
    return any(word in name for word in words)
