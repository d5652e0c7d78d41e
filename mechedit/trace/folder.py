"""The files of a trace: effects.parquet and facts.parquet, and trace_parts/ until they are finished."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit import ranks
from mechedit.cache import Codec
from mechedit.data import Fact
from mechedit.files import write_parquet, write_parquet_parts
from mechedit.models import Model
from mechedit.shards import run_dealt, warn_if_idle
from mechedit.tables import where
from mechedit.trace.agreement import checked_agreement
from mechedit.trace.averages import fact_totals, main_metric
from mechedit.trace.config import TraceConfig
from mechedit.trace.corruption import EmbeddingStatistics, embedding_statistics
from mechedit.trace.trace import TracePlan, plan_trace
from mechedit.trace.traced_fact import TracedFact, require_known

TRACE_PARTS = "trace_parts"
"""Folder of finished groups of facts, from which an interrupted trace goes on."""


def trace_to_folder(
    model: Model, facts: Sequence[Fact], config: TraceConfig, folder: Path, *, least: int = 1
) -> dict[str, Any]:
    """Trace facts, and write the effects of one group of facts after another.

    Args:
        model: any `Model`.
        facts: to trace.
        config: of the trace.
        folder: for the files.
        least: fewest facts that the model must know.

    Single states are also traced with modules severed, but only at the subject's last token. Finished groups lie in
    trace_parts/ until the step is finished, so that an interrupted trace resumes after them.

    Returns:
        What `DataFrame.attrs` of the effects holds: settings, provenance, `n_facts`, `dropped`, and of an approximate
        trace `agreement`.

    Raises:
        InputError: estimates do not rank cells as exact effects do; fewer known facts than `least`.
    """
    plans = trace_plans(model, facts, config, folder / TRACE_PARTS)
    require_known(len(plans[0].facts), len(facts), plans[0].dropped, least)
    trace_dealt(plans)
    return ranks.current().from_first(lambda: _written(plans, facts, config, folder), "the files of the trace")


def trace_dealt(plans: Sequence[TracePlan]) -> None:
    """Let each of several processes trace its part of the groups of facts into the folder of finished ones.

    A process on its own traces them when the plans are read.
    """
    group = ranks.current()
    if group.world_size == 1:
        return
    pieces = [(plan, facts) for plan in plans for facts in plan.groups()]
    warn_if_idle(len(pieces), "groups of facts")

    def trace(piece: tuple[TracePlan, Sequence[TracedFact]]) -> None:
        piece[0].effects_of(piece[1])

    run_dealt(
        pieces,
        trace,
        lambda piece: piece[0].cost(piece[1]),
        "tracing facts",
        size=lambda piece: len(piece[1]),
        unit="fact",
    )


def _written(plans: Sequence[TracePlan], facts: Sequence[Fact], config: TraceConfig, folder: Path) -> dict[str, Any]:
    """Write the files of the plans, and return the attrs of the effects."""
    # An approximate trace is refused before anything is written; what this pass traced lies in trace_parts/.
    agreement = checked_agreement(plans, config.approximation)
    attrs = {**plans[0].attrs, "config": config.plain(), **agreement}
    write_trace(folder, facts, itertools.chain.from_iterable(plans), attrs)
    return attrs


def write_trace(folder: Path, facts: Sequence[Fact], frames: Iterable[pd.DataFrame], attrs: Mapping[str, Any]) -> None:
    """Write effects.parquet and facts.parquet.

    Args:
        folder: for the files.
        facts: all that were to be traced.
        frames: effects of one group after another.
        attrs: of the effects.
    """
    write_parquet_parts(folder / "effects.parquet", frames, attrs)
    write_parquet(folder / "facts.parquet", facts_frame(facts, folder / "effects.parquet", attrs["dropped"]))


def trace_plans(
    model: Model,
    facts: Sequence[Fact],
    config: TraceConfig,
    parts: Path,
    *,
    statistics: EmbeddingStatistics | None = None,
) -> list[TracePlan]:
    """The trace with nothing severed, and that with modules severed where there are any to sever.

    Args:
        model: any `Model`.
        facts: to trace.
        config: of the trace.
        parts: folder for finished groups.
        statistics: of the subjects' embeddings; by default measured on these facts' subjects.
    """
    if statistics is None:
        correlated = config.corrupted_by.distribution == "multivariate"
        subjects = [fact.subject for fact in facts]
        statistics = ranks.current().from_first(
            lambda: embedding_statistics(model, subjects, covariance_root=correlated), "the statistics of embeddings"
        )
    return [plan_trace(model, facts, part, statistics=statistics, parts=parts) for part in whole_and_severed(config)]


def whole_and_severed(config: TraceConfig) -> list[TraceConfig]:
    """The settings of a trace with nothing severed; and of single states at the subject's last token with the rest."""
    severed = tuple(sever for sever in config.sever if sever != "nothing")
    settings = [_changed(config, sever=("nothing",))]
    if severed:
        settings.append(_changed(config, kinds=("state",), sever=severed, roles=("subject_last",)))
    return settings


def facts_frame(facts: Sequence[Fact], effects: Path, dropped: Sequence[Sequence[str]]) -> pd.DataFrame:
    """One row per fact: its text, whether it was traced, why not, and its clean and corrupted score.

    Args:
        facts: all that were to be traced.
        effects: the file of the effects.
        dropped: id and reason of each fact that was not traced.
    """
    reasons = {name: reason for name, reason in dropped}
    totals = fact_totals(effects)
    scores = where(totals, metric=main_metric(totals["metric"])).set_index("fact")[["clean", "corrupted"]]
    frame = pd.DataFrame([fact.plain() for fact in facts])
    frame["traced"] = ~frame["id"].isin(list(reasons))
    frame["reason"] = [reasons.get(name) for name in frame["id"]]
    return frame.join(scores, on="id")


def _attrs(folder: Path) -> dict[str, Any]:
    return {str(name): value for name, value in fact_totals(folder / "effects.parquet").attrs.items()}


def _changed(config: TraceConfig, **changes: Any) -> TraceConfig:
    return TraceConfig(**{**vars(config), **changes})


TRACE: Codec[dict[str, Any]] = Codec(read=_attrs, files=("effects.parquet", "facts.parquet"))
"""The attrs of a trace in a folder, whose files `trace_to_folder` writes."""
