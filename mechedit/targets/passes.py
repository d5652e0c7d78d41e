"""A pass of the search: some rows from their subjects' last tokens on, with all that δ leaves as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit.models import Model, Patch, Prefix, Resume, Site, Tokens
from mechedit.prompts import pad
from mechedit.targets.config import TargetConfig
from mechedit.targets.rows import Row

Rows = TypeVar("Rows", list[Row], "Pass")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """Rows of like shape. Each begins where δ goes, at its subject's last token, and positions count from there."""

    tokens: Tokens
    prefix: Prefix | None
    """Keys and values of the positions before; None when no row has any."""
    entering: Float[Tensor, "row pos d_model"] | None
    """Clean residual stream where the run resumes; None when it starts at the first block."""
    asked: Int[Tensor, "row token"]
    labels: Int[Tensor, "row token"] | None
    """What `asked` should predict; None for the KL term."""
    clean: Float[Tensor, "row vocab"] | None
    """Clean log-probabilities of the KL term."""
    fact: Int[Tensor, " row"]
    weight: Float[Tensor, " row"]

    def __len__(self) -> int:
        return len(self.fact)

    def kept(self, rows: Bool[Tensor, " row"]) -> Pass:
        """This pass with the chosen rows alone."""
        return self if rows.all() else self.take(rows.nonzero()[:, 0])

    def take(self, index: Int[Tensor, " chosen"]) -> Pass:
        """The rows of these numbers."""

        def chosen(value: object) -> object:
            if isinstance(value, Prefix):
                return value.take(index, value.length)
            if isinstance(value, Tokens):
                return value.rows(index)
            return value if value is None else value[index]  # type: ignore[index]

        return Pass(**{field.name: chosen(getattr(self, field.name)) for field in fields(self)})  # type: ignore[arg-type]

    def __getitem__(self, rows: slice) -> Pass:
        return self.take(torch.arange(len(self), device=self.fact.device)[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class Terms:
    """What a pass says of each of its rows."""

    nll: Float[Tensor, " row"]
    """−log P of the object, mean over its tokens; for the KL term 0, in nats."""
    kl: Float[Tensor, " row"]
    """KL(edited ‖ clean); 0 but for the KL term."""
    probability: Float[Tensor, " row"]
    """Of the whole object."""

    @property
    def detached(self) -> Terms:
        """Without the way back to δ."""
        return Terms(nll=self.nll.detach(), kl=self.kl.detach(), probability=self.probability.detach())


def resumes_at(model: Model, layer: int, config: TargetConfig) -> int:
    """The first block that runs: the one after δ, unless δ goes inside a block or after the last."""
    inside = config.parts(model.module)[0] == "attn_out"
    return layer if inside or layer + 1 == model.n_layers else layer + 1


def halving(items: Iterable[Rows], run: Callable[[Rows], Result]) -> Iterator[Result]:
    """Run each of the items; one that the device's memory does not hold is run in halves."""
    for item in items:
        try:
            result = run(item)
        except torch.OutOfMemoryError:
            if len(item) == 1:
                raise
            result = None
        # Outside the handler, which keeps alive what the failed run allocated.
        if result is None:
            yield from halving((item[: len(item) // 2], item[len(item) // 2 :]), run)
        else:
            yield result


@torch.no_grad()
def prepare(
    model: Model, rows: Sequence[Row], layer: int, config: TargetConfig
) -> tuple[Pass, Bool[Tensor, " row"], Float[Tensor, "bare part d_model"]]:
    """One clean run of some rows: what a pass starts from, which rows have the first prefix, and their clean states."""
    device, start, scored = model.device, resumes_at(model, layer, config), not rows[0].labels
    reads = [Site(layer, part) for part in config.parts(model.module)]
    entering = [Site(start - 1, "resid")] if start else []
    subject, asked, fact = (
        torch.tensor(values, device=device)
        for values in zip(*((row.subject, row.asked, row.fact) for row in rows), strict=True)
    )
    run = model.run(
        pad([row.ids for row in rows], model.tokenizer, device),
        read=[*reads, *entering],
        keep=asked if scored else 0,
        stop_after=None if scored else model.n_layers - 1,
        cache=True,
    )
    assert run.prefix is not None
    tokens = pad([row.ids[row.subject :] for row in rows], model.tokenizer, device)
    made = Pass(
        tokens=tokens,
        prefix=run.prefix.before(subject, start) if subject.any() else None,
        entering=_from(subject, run[entering[0]], tokens.ids.shape[1]) if entering else None,
        asked=asked - subject[:, None],
        labels=None if scored else torch.tensor([row.labels for row in rows], device=device),
        clean=None if run.logits is None else run.logits[:, 0].float().log_softmax(-1),
        fact=fact,
        weight=torch.tensor([row.weight for row in rows], device=device),
    )
    bare = torch.tensor([row.prefix == 0 for row in rows], device=device)
    states = [_from(subject, run[site], 1)[bare, 0].float() for site in reads]
    return made, bare, torch.stack(states, 1)


def _from(
    starts: Int[Tensor, " row"], states: Float[Tensor, "row pos d_model"], width: int
) -> Float[Tensor, "row width d_model"]:
    """The states from each row's own start on; what lies past the end repeats the last one."""
    at = starts[:, None] + torch.arange(width, device=starts.device)
    return states.take_along_dim(at.clamp(max=states.shape[1] - 1)[..., None], 1)


def judge(
    model: Model, rows: Pass, layer: int, delta: Float[Tensor, "row part d_model"], config: TargetConfig
) -> Terms:
    """The terms of every row with its δ added at the subject's last token (Eq. 16)."""
    logits = _logits(model, rows, layer, delta, config).float()
    zero = logits.new_zeros(len(logits))
    if rows.labels is None:
        assert rows.clean is not None
        changed = logits[:, 0].log_softmax(-1)
        # KL(edited ‖ clean), the direction of ROME's Eq. 4 and of both published codes.
        drift = (changed.exp() * (changed - rows.clean)).sum(-1)
        return Terms(nll=zero, kl=drift, probability=zero)
    picked = logits.gather(-1, rows.labels[..., None]).squeeze(-1) - logits.logsumexp(-1)
    return Terms(nll=-picked.mean(1), kl=zero, probability=picked.sum(1).exp())


def _logits(
    model: Model, rows: Pass, layer: int, delta: Float[Tensor, "row part d_model"], config: TargetConfig
) -> Float[Tensor, "row token vocab"]:
    start, entering, patches = resumes_at(model, layer, config), rows.entering, []
    if start > layer:
        # Nothing of the block that δ follows is left to compute, so δ goes into what the next one gets.
        assert entering is not None
        moved = entering[:, :1].float() + delta
        entering = torch.cat([moved.to(entering.dtype), entering[:, 1:]], 1)
    else:
        here = torch.zeros(len(rows), 1, dtype=torch.long, device=delta.device)
        sites = [Site(layer, part) for part in config.parts(model.module)]
        patches = [Patch(site, here, delta[:, [place]], add=True) for place, site in enumerate(sites)]
    resume = Resume(start, entering) if entering is not None else None
    run = model.run(rows.tokens, patches, resume=resume, prefix=rows.prefix, keep=rows.asked)
    assert run.logits is not None, "this run was not stopped early"
    return run.logits
