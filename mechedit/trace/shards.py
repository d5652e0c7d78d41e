"""A trace by several processes: each traces some groups of facts, and the merged files are those of one process.

The groups are cut as one process cuts them, and dealt out by their cost. Finished ones lie in trace_parts/, as those of
an interrupted trace do; so a shard resumes after them, and the merge only reads them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.data import Fact
from mechedit.errors import InputError
from mechedit.locks import locked
from mechedit.models import Model
from mechedit.progress import progress_bar
from mechedit.provenance import ALGORITHMS, ModelIdentity, value_hash
from mechedit.shards import Rank, ShardRecords, pieces_of
from mechedit.trace.agreement import checked_agreement
from mechedit.trace.approximation import Approximation
from mechedit.trace.config import TraceConfig
from mechedit.trace.folder import TRACE_PARTS, trace_plans, write_trace
from mechedit.trace.parts import read_part
from mechedit.trace.trace import TracePlan
from mechedit.trace.traced_fact import require_known


def trace_shards(folder: Path) -> ShardRecords:
    """The records of the shards of a trace in a run folder."""
    return ShardRecords(folder=folder / TRACE_PARTS, command="mechedit trace")


def trace_shard(
    model: Model, facts: Sequence[Fact], config: TraceConfig, folder: Path, rank: Rank, *, overwrite: bool = False
) -> int:
    """Trace one shard of the groups of facts into trace_parts/, for `merge_trace`.

    Args:
        model: any `Model`.
        facts: all that are traced, the same for every process.
        config: of the trace.
        folder: the run folder.
        rank: the shard.
        overwrite: whether to replace the record of a shard of other work, instead of refusing it.

    Returns:
        Number of groups in the shard.

    Raises:
        InputError: no facts that the model knows; more shards than groups; a record of other work.
    """
    plans = trace_plans(model, facts, config, folder / TRACE_PARTS)
    require_known(len(plans[0].facts), len(facts), plans[0].dropped, 1)
    records, made_with = trace_shards(folder), _made_with(plans, facts, config)
    with locked(folder / f"trace_shard_{rank.index}_of_{rank.world_size}", f"the shard {rank} of the trace"):
        if not overwrite:
            records.check(rank, made_with)
        groups = [(plan, group) for plan in plans for group in plan.groups()]
        pieces = pieces_of([plan.cost(group) for plan, group in groups], rank, "groups of facts")
        total = sum(len(groups[piece][1]) for piece in pieces)
        with progress_bar(total=total, desc=f"tracing facts, shard {rank}", unit="fact") as progress:
            for piece in pieces:
                plan, group = groups[piece]
                plan.effects_of(group)
                progress.update(len(group))
        content = {
            "facts": [fact.plain() for fact in facts],
            "attrs": {**plans[0].attrs, "config": config.plain()},
            "parts": [[plan.part(group).name for group in plan.groups()] for plan in plans],
        }
        records.write(rank, made_with, content)
    return len(pieces)


def merge_trace(folder: Path) -> dict[str, Any]:
    """Write the files of a trace from the groups that its shards traced, bit for bit those of one process.

    Args:
        folder: the run folder of the shards.

    Returns:
        As `trace_to_folder`.

    Raises:
        InputError: a shard is missing or of other work, or a group's file is missing; estimates do not rank cells as
            exact effects do.
    """
    content = _finished(folder)
    parts = [[folder / TRACE_PARTS / name for name in names] for names in content["parts"]]
    attrs = dict(content["attrs"])
    if approximation := attrs["config"].get("approximation"):
        attrs |= checked_agreement(map(_frames, parts), Approximation(**approximation))
    facts = [Fact(**record) for record in content["facts"]]
    write_trace(folder, facts, _frames(itertools.chain.from_iterable(parts)), attrs)
    return attrs


def merged_stamp(folder: Path) -> dict[str, Any]:
    """What the shards in a run folder were made with: `model`, `facts`, `settings`, as a trace's stamp has them.

    Raises:
        InputError: as `merge_trace`.
    """
    content = _finished(folder)
    attrs = content["attrs"]
    return trace_stamp(attrs["provenance"], content["facts"], attrs["config"])


def trace_stamp(
    provenance: Mapping[str, Any], facts: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What a trace is made with.

    Args:
        provenance: of the model.
        facts: as JSON holds them.
        settings: of the trace, as JSON holds them.
    """
    return {"model": provenance, "facts": value_hash(facts), "settings": settings}


def _finished(folder: Path) -> Mapping[str, Any]:
    """What the shards left for the merge, after checking that all of it is there."""
    content = trace_shards(folder).merged()
    paths = [folder / TRACE_PARTS / name for names in content["parts"] for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise InputError(
            f"{str(missing[0])!r} is missing, which a finished shard wrote; make the shards again with mechedit trace "
            f"--shard I/N, which trace only what is missing"
        )
    return content


def _made_with(plans: Sequence[TracePlan], facts: Sequence[Fact], config: TraceConfig) -> dict[str, Any]:
    """All that determines the work, by name."""
    settings = {f"settings.{name}": value for name, value in config.plain().items()}
    return {
        "algorithm": ALGORITHMS["trace"],
        **{f"model.{name}": value for name, value in ModelIdentity.of(plans[0].provenance).record.items()},
        "facts": value_hash([fact.plain() for fact in facts]),
        **settings,
        # Which facts a model knows, and the scale of the noise, are measured by every shard.
        "facts that the model knows": value_hash([traced.fact.id for traced in plans[0].facts]),
        "noise_std": float(plans[0].std),
    }


def _frames(paths: Any) -> Iterator[pd.DataFrame]:
    return (read_part(path) for path in paths)
