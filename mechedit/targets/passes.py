"""A pass of the search: some rows from their subjects' last tokens on, with all that δ leaves as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit.batching import pad
from mechedit.models import KVCache, Model, Patch, Resume, Site, Tokens
from mechedit.targets.config import TargetConfig
from mechedit.targets.prompts import Row
from mechedit.targets.shared_prefix import lead_of

Rows = TypeVar("Rows", list[Row], "Pass")
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Blocks in which δ is felt at the same positions, which alone have to run."""

    first: int
    last: int
    reach: int
    """How many positions, from the subject's last token on."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """Rows of like shape. Each begins where δ goes, at its subject's last token, and positions count from there."""

    tokens: Tokens
    kv_cache: KVCache | None
    """Keys and values of the positions before; None when no row has any."""
    stretches: tuple[Stretch, ...]
    """All blocks that feel δ, in order."""
    entering: tuple[Float[Tensor, "row _ d_model"] | None, ...]
    """Clean residual stream where each stretch begins; None before the first block."""
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
            if isinstance(value, KVCache):
                return value.take(index, value.length)
            if isinstance(value, Tokens):
                return value.rows(index)
            if isinstance(value, tuple):
                return tuple(map(chosen, value))
            return value[index] if isinstance(value, Tensor) else value

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


def stretches_of(model: Model, layer: int, config: TargetConfig, width: int) -> tuple[Stretch, ...]:
    """Which blocks run again when δ moves, and at which of the `width` positions.

    The first is the one after δ, unless δ goes inside a block or after the last. With local attention (GPT-Neo) what
    happens at one position reaches window − 1 positions further in each block.
    """
    inside = config.parts(model.module)[0] == "attn_out"
    last, reach, found = model.n_layers - 1, 1, []
    for block in range(layer if inside or layer == last else layer + 1, model.n_layers):
        if block == last:
            # Any of its positions may be asked for.
            reach = width
        elif block > layer:
            reach = min(width, reach + (model.window(block) or width) - 1)
        if found and found[-1].reach == reach:
            found[-1] = Stretch(first=found[-1].first, last=block, reach=reach)
        else:
            found.append(Stretch(first=block, last=block, reach=reach))
    return tuple(found)


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
    device, scored = model.device, not rows[0].labels
    reads = [Site(layer, part) for part in config.parts(model.module)]
    stretches = stretches_of(model, layer, config, max(row.width for row in rows))
    entering = [Site(stretch.first - 1, "resid") if stretch.first else None for stretch in stretches]
    subject, asked, fact = (
        torch.tensor(values, device=device)
        for values in zip(*((row.subject, row.asked, row.fact) for row in rows), strict=True)
    )
    lead, cuts = lead_of(model, rows)
    cut = torch.tensor(cuts, device=device)
    run = model.run(
        pad([row.ids[count:] for row, count in zip(rows, cuts, strict=True)], model.tokenizer, device),
        read=[*reads, *filter(None, entering)],
        logits_to_keep=asked - cut[:, None] if scored else 0,
        stop_after=None if scored else model.n_layers - 1,
        kv_cache=lead,
        use_cache=True,
    )
    tokens = pad([row.ids[row.subject :] for row in rows], model.tokenizer, device)
    made = Pass(
        tokens=tokens,
        kv_cache=run.kv_cache.before(subject, stretches[0].first) if subject.any() else None,
        stretches=stretches,
        entering=tuple(
            None if site is None else _from(subject - cut, run[site], stretch.reach)
            for site, stretch in zip(entering, stretches, strict=True)
        ),
        asked=asked - subject[:, None],
        labels=None if scored else torch.tensor([row.labels for row in rows], device=device),
        clean=None if run.final_logits is None else run.final_logits[:, 0].float().log_softmax(-1),
        fact=fact,
        weight=torch.tensor([row.weight for row in rows], device=device),
    )
    bare = torch.tensor([row.prefix == 0 for row in rows], device=device)
    states = [_from(subject - cut, run[site], 1)[bare, 0].float() for site in reads]
    return made, bare, torch.stack(states, 1)


def _from(
    starts: Int[Tensor, " row"], states: Float[Tensor, "row pos d_model"], width: int
) -> Float[Tensor, "row width d_model"]:
    """The states from each row's own start on; what lies past the end repeats the last one."""
    at = starts[:, None] + torch.arange(width, device=starts.device)
    return states[torch.arange(len(starts), device=starts.device)[:, None], at.clamp(max=states.shape[1] - 1)]


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
    state: Tensor | None = None
    patches: list[Patch] = []
    if rows.stretches[0].first > layer:
        # Nothing of the block that δ follows is left to compute, so δ goes into what the next one gets.
        assert rows.entering[0] is not None
        state = (rows.entering[0][:, :1].float() + delta).to(rows.entering[0].dtype)
    else:
        here = torch.zeros(len(rows), 1, dtype=torch.long, device=delta.device)
        sites = [Site(layer, part) for part in config.parts(model.module)]
        patches = [Patch(site, here, delta[:, [place]], add=True) for place, site in enumerate(sites)]
    logits: Tensor | None = None
    for stretch, clean in zip(rows.stretches, rows.entering, strict=True):
        if state is not None and clean is not None:
            state = torch.cat([state, clean[:, state.shape[1] :]], 1)
        entering = clean if state is None else state
        end, goes_on = Site(stretch.last, "resid"), stretch.last < model.n_layers - 1
        run = model.run(
            rows.tokens.first(stretch.reach),
            patches if stretch.first <= layer else (),
            read=[end] if goes_on else (),
            resume=None if entering is None else Resume(stretch.first, entering),
            stop_after=stretch.last if goes_on else None,
            kv_cache=rows.kv_cache,
            logits_to_keep=0 if goes_on else rows.asked,
        )
        state, logits = run.values.get(end), run.final_logits
    assert logits is not None, "the last stretch is not stopped early"
    return logits
