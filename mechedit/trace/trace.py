"""Trace facts: facts in, tidy effects out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from mechedit import ranks
from mechedit.batching import group_by_shape
from mechedit.cache import Cache
from mechedit.chat import prompted
from mechedit.data import Fact, check_unique_ids, records_of
from mechedit.errors import InputError
from mechedit.models import Model, exclusive
from mechedit.progress import progress_bar
from mechedit.provenance import ModelIdentity, numbered
from mechedit.trace.agreement import checked_agreement
from mechedit.trace.approximate import approximate_group, draw_for
from mechedit.trace.cells import trace_group
from mechedit.trace.config import TraceConfig
from mechedit.trace.corruption import EmbeddingStatistics, NoiseSource, embedding_statistics
from mechedit.trace.effects import Effects
from mechedit.trace.memory import max_group_rows
from mechedit.trace.parts import PART
from mechedit.trace.traced_fact import (
    Dropped,
    TracedFact,
    known_facts,
    require_known,
    restored_positions,
    with_replacements,
    with_roles,
)


@exclusive
def trace_facts(
    model: Model,
    facts: Sequence[Fact],
    config: TraceConfig | None = None,
    *,
    noise: NoiseSource | None = None,
    statistics: EmbeddingStatistics | None = None,
    parts: str | Path | None = None,
    chat: bool = False,
    joint: str | None = None,
) -> Effects:
    """Trace facts and return one row per restored cell and metric, averaged over noise samples.

    IE = P*,clean h(o) − P*(o) (ROME §2.1), with P the joint probability of the object's tokens, or another of
    `config.metrics`. Columns are `mechedit.trace.effects.COLUMNS`; `effect = score − corrupted`, in the metric's
    units, never clipped. Only facts that the model completes with the object (greedy, every token) are traced;
    `frame.attrs` holds the settings, provenance, `n_facts` and `dropped`, a list of [id, reason]; with
    `config.approximation` also `agreement`, and the frame has the columns of `mechedit.trace.APPROXIMATE_COLUMNS`.

    Args:
        model: any `Model`.
        facts: facts to trace.
        config: what to restore, sever, corrupt and measure.
        noise: explicit standard-normal draws, for replication; by default each fact's draws come from a seed
            made of `config.seed` and the fact's id, the same for every cell, kind and severing.
        statistics: of the subjects' embeddings, when they have been measured on a larger set of subjects.
        parts: folder for the effects of finished groups of facts, from which an interrupted trace continues.
        chat: ask each prompt as a user's question, through the tokenizer's chat template.
        joint: text between prompt and object where a fact names none; by default the characters that meet decide.

    Raises:
        InputError: no facts, none that the model knows, noise of the wrong shape, scores that are not finite, or
            estimates that do not rank cells as exact effects do (`config.approximation`); `parts` with explicit
            `noise`, whose draws no file name can tell apart.

    Example:
        >>> model, facts = me.load_model("tiny"), me.load_facts("known")
        >>> effects = me.trace_facts(model, facts, me.TraceConfig(sever=("nothing", "mlp", "attn")))
        >>> me.average_effects(effects)
    """
    facts = prompted(model.tokenizer, facts, chat=chat, joint=joint)
    plan = plan_trace(model, facts, config, noise=noise, statistics=statistics, parts=parts)
    frames = list(plan)
    agreement = plan.agreement(frames)
    frame = pd.concat(frames, ignore_index=True)
    order = {traced.fact.id: i for i, traced in enumerate(plan.facts)}
    frame = frame.sort_values("fact", key=lambda ids: ids.map(order), kind="stable", ignore_index=True)
    frame.attrs = {**plan.attrs, **agreement}
    return Effects(frame)


@dataclass(frozen=True, kw_only=True, eq=False)
class TracePlan:
    """A trace that is ready to run; iterate over it for the effects of one group of facts after another.

    A thousand facts need no more memory than one group. Effects of an approximate trace may be used once `agreement`
    has looked at them.
    """

    model: Model
    facts: Sequence[TracedFact]
    """Facts that will be traced."""
    dropped: Sequence[Dropped]
    """Facts that will not, with the reasons."""
    config: TraceConfig
    std: float
    """Standard deviation of the noise, in absolute units."""
    statistics: EmbeddingStatistics | None
    """Statistics of the subjects' embeddings; None where the noise needs none."""
    noise: NoiseSource | None
    """Explicit draws; None draws from each fact's seed."""
    parts: Path | None
    """Folder for the effects of finished groups."""
    provenance: dict[str, Any]

    @property
    def attrs(self) -> dict[str, Any]:
        """Settings and provenance, for `DataFrame.attrs`."""
        return {
            "config": self.config.plain(),
            "noise_std": float(self.std),
            "n_facts": len(self.facts),
            "dropped": [list(pair) for pair in self.dropped],
            "provenance": self.provenance,
        }

    def agreement(self, frames: Iterable[pd.DataFrame]) -> dict[str, Any]:
        """How well estimates agree with exact effects, as the entry `agreement` of attrs; empty for an exact trace.

        Args:
            frames: what iterating over the plan gives.

        Raises:
            DisagreementError: the rank correlation is below the bound in a kind and severing.
        """
        return checked_agreement([frames], self.config.approximation)

    def __iter__(self) -> Iterator[pd.DataFrame]:
        # What is only read takes no time.
        traced = self.parts is not None and all(self.part(group).is_file() for group in self.groups())
        severed = "" if "nothing" in self.config.sever else ", modules severed"
        description = f"tracing facts{severed}"
        with progress_bar(total=len(self.facts), desc=description, unit="fact", disable=traced) as progress:
            for group in self.groups():
                yield self.effects_of(group)
                progress.update(len(group))

    def effects_of(self, group: Sequence[TracedFact]) -> pd.DataFrame:
        """Effects of one of `groups`, from the folder of finished ones where they are there."""
        with torch.no_grad(), self.model.exclusive():
            arguments = (self.model, group, self.std, self.config, self.noise, self.statistics)
            if self.config.approximation is None:
                make = partial(trace_group, *arguments)
            else:
                make = partial(approximate_group, *arguments, self._drawn)
            return Cache(self.parts).get(self.key(group), make, PART)

    def key(self, group: Sequence[TracedFact]) -> dict[str, Any]:
        """All that determines the effects of a group."""
        key = {
            **self._group_key,
            "facts": [{**traced.fact.plain(), "replacements": traced.replacements} for traced in group],
        }
        if self.config.approximation is not None:
            key["drawn"] = [self._drawn[traced.fact.id].plain() for traced in group]
        return key

    def part(self, group: Sequence[TracedFact]) -> Path:
        """The file of a group in the folder of finished ones."""
        path = Cache(self.parts).path(self.key(group), PART)
        assert path is not None, "only with a folder"
        return path

    def cost(self, group: Sequence[TracedFact]) -> int:
        """What a group costs in units that all groups have in common: tokens in all runs that restore something."""
        per_position = len(self.config.kinds) * len(self.config.sever) * self.config.samples
        return per_position * sum(len(traced.ids) * len(restored_positions(traced, self.config)) for traced in group)

    @cached_property
    def _group_key(self) -> dict[str, Any]:
        """What determines the effects of all groups."""
        approximation = self.config.approximation
        if approximation is not None:
            # What was estimated and traced does not depend on how well the two must agree.
            approximation = replace(approximation, least_correlation=0)
        settings = replace(self.config, approximation=approximation).plain()
        model = ModelIdentity.of(self.provenance).record
        return numbered("trace", {"settings": settings, "std": self.std, "model": model})

    @cached_property
    def _drawn(self) -> Mapping[str, Any]:
        """The cells of each fact that are drawn to be traced exactly, in an approximate trace."""
        return {} if self.config.approximation is None else draw_for(self.facts, self.config, self.model.n_layers)

    def groups(self) -> Iterator[list[TracedFact]]:
        """Facts that share runs, as many as `max_group_rows` allows, the longest first.

        Their objects have equally many tokens. Their prompts do, too, unless padding costs next to nothing; then no
        row is padded by more than half.
        """
        skips = self.model.skips_padding
        in_order = sorted(self.facts, key=lambda traced: -len(traced.ids)) if skips else self.facts
        for like in group_by_shape(
            in_order, len(self.facts), lambda traced: len(traced.object_ids) if skips else traced.shape
        ):
            while like:
                longest = len(like[0].ids)
                size = max(1, max_group_rows(self.model, like[0], self.config) // self.config.samples)
                group = [traced for traced in like[:size] if 2 * len(traced.ids) >= longest]
                yield group
                like = like[len(group) :]


@exclusive
@torch.no_grad()
def plan_trace(
    model: Model,
    facts: Sequence[Fact],
    config: TraceConfig | None = None,
    *,
    noise: NoiseSource | None = None,
    statistics: EmbeddingStatistics | None = None,
    parts: str | Path | None = None,
) -> TracePlan:
    """Choose the scale of the noise, find the facts that the model knows, and refuse what cannot be traced.

    Arguments and errors are those of `trace_facts`.
    """
    config = config or TraceConfig()
    if parts is not None and noise is not None:
        raise InputError("parts cannot be kept with explicit noise, expected one of the two: leave the other out")
    facts = records_of(facts, Fact)
    if not facts:
        raise InputError("there are no facts to trace, expected at least one; check the facts file")
    check_unique_ids((fact.id for fact in facts), "facts")
    for sever in config.severed:
        sever.through(model.n_layers)
    distribution = config.corrupted_by.distribution
    correlated = distribution == "multivariate"
    group = ranks.current()
    if statistics is None and (config.noise_std is None or correlated):
        subjects = [fact.subject for fact in facts]
        statistics = group.from_first(
            lambda: embedding_statistics(model, subjects, covariance_root=correlated), "the statistics of embeddings"
        )
    std = config.noise_std
    if std is None:
        assert statistics is not None
        std = config.noise * statistics.std
    known, dropped = group.from_first(lambda: known_facts(model, facts), "the facts that the model knows")
    known, without_roles = with_roles(known, config)
    dropped = [*dropped, *without_roles]
    if known and distribution == "tokens":
        known, irreplaceable = with_replacements(model, known, facts, config)
        dropped = [*dropped, *irreplaceable]
    require_known(len(known), len(facts), dropped, 1)
    plan = TracePlan(
        model=model,
        facts=known,
        dropped=dropped,
        config=config,
        std=float(std),
        statistics=statistics,
        noise=noise,
        parts=None if parts is None else Path(parts),
        provenance=model.provenance(),
    )
    list(plan.groups())  # refuses a limit on memory that no group can keep
    return plan
