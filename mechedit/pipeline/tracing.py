"""Steps of a trace: all facts at once, a shard of them, or facts until the selection settles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pandas as pd

from mechedit.data import Fact
from mechedit.models import Model
from mechedit.provenance import value_hash
from mechedit.run_folder import RunFolder, inputs_of
from mechedit.selection import SelectConfig, select_layers
from mechedit.selection.select import layers_in_words
from mechedit.shards import Rank
from mechedit.trace import TraceConfig, UntilSettled, Verdict, trace_until_settled
from mechedit.trace.folder import TRACE, TRACE_PARTS, trace_to_folder
from mechedit.trace.shards import merge_trace, merged_stamp, trace_shard, trace_stamp


def trace_step(
    folder: RunFolder, model: Model, facts: Sequence[Fact], config: TraceConfig, *, least: int = 1
) -> dict[str, Any]:
    """Trace every kind whole, and single states at the subject's last token with modules severed.

    The model must know `least` of the facts.

    Writes effects.parquet (the cells, a group of facts after another) and facts.parquet (each fact, whether it was
    traced, and why not).

    Returns:
        What `DataFrame.attrs` of the effects holds, with `n_facts` and `dropped`.
    """
    stamp = trace_stamp(model.provenance(), [fact.plain() for fact in facts], config.plain())
    make = partial(trace_to_folder, model, facts, config, folder.path, least=least)
    return folder.step("trace", stamp, make, TRACE, parts=TRACE_PARTS)


def trace_shard_step(folder: RunFolder, model: Model, facts: Sequence[Fact], config: TraceConfig, rank: Rank) -> int:
    """Trace one process's shard of the facts into trace_parts/, for `merge_trace_step`.

    Returns:
        Number of groups of facts in the shard.

    Raises:
        InputError: as `trace_shard`; the folder holds a trace of other input, and may not be overwritten.
    """
    stamp = trace_stamp(model.provenance(), [fact.plain() for fact in facts], config.plain())
    folder.refuse_other("trace", stamp)
    return trace_shard(model, facts, config, folder.path, rank, overwrite=folder.overwrite)


def merge_trace_step(folder: RunFolder) -> dict[str, Any]:
    """Put together what the shards traced: the files and the stamp of `trace_step`; what was put together is read.

    Returns:
        As `trace_step`.

    Raises:
        InputError: as `merge_trace`; the folder holds a trace of other input, and may not be overwritten.
    """
    traced = folder.stamps().get("trace")
    if traced is not None and not (folder.path / TRACE_PARTS).exists():
        stamp = inputs_of(traced)
    else:
        stamp = merged_stamp(folder.path)
    return folder.step("trace", stamp, partial(merge_trace, folder.path), TRACE, parts=TRACE_PARTS)


def trace_until_settled_step(
    folder: RunFolder,
    model: Model,
    facts: Sequence[Fact],
    config: TraceConfig,
    until: UntilSettled,
    select: SelectConfig,
    notify: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """As `trace_step`, facts in random order until the selection settles, or all are traced, or time is up.

    Returns:
        As `trace_step`, with `rounds` (facts, layers, state, agreement and stability after each one) and `stopped`.

    Raises:
        InputError: fewer known facts than a selection needs; and as `trace_until_settled`.
    """
    stamp = {
        "model": model.provenance(),
        "facts": value_hash([fact.plain() for fact in facts]),
        "settings": config.plain(),
        "until": {**asdict(until), "select": asdict(select)},
    }

    def judge(effects: pd.DataFrame) -> Verdict:
        selection = select_layers(effects, config=select)
        shares = {"agreement": selection.agreement, "stability": selection.stability}
        return Verdict(settled=selection.state == "settled", record={**selection.short, **shares})

    make = partial(
        trace_until_settled,
        model,
        facts,
        config,
        until,
        judge,
        folder.path,
        least=select.min_facts,
        notify=lambda record: notify(round_in_words(record)),
    )
    return folder.step("trace", stamp, make, TRACE, parts=TRACE_PARTS)


def round_in_words(record: Mapping[str, Any]) -> str:
    """What a selection made of the facts so far, with the shares of resamples that agree and that give just this."""
    layers = layers_in_words(tuple(record["layers"]))
    shares = f"{record['agreement']:.0%} of resamples agree, {record['stability']:.0%} give just these layers"
    return f"{record['facts']} facts: {layers}, {record['state']} ({shares})"
