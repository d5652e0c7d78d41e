"""`mechedit trace`: causal tracing into a run folder."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from mechedit import pipeline, ranks
from mechedit.cli.app import say
from mechedit.cli.command import command, options_of
from mechedit.cli.idle import refuse_idle
from mechedit.cli.options import (
    ALL_SEVERED,
    STOPPED,
    ApproximateOption,
    FactsOptions,
    MinutesOption,
    RunFolderOptions,
    say_agreement,
    saying_disagreement,
)
from mechedit.cli.parsing import existing_folder, parse_shard, require_one_process, sampled
from mechedit.errors import InputError, brief
from mechedit.figures import refresh_figures
from mechedit.selection import SelectConfig
from mechedit.trace import Approximation, Corruption, TraceConfig, UntilSettled

REMEDY = "lower --least-correlation and trust no single cell"
"""What to do where an approximate trace is refused, but for tracing exactly."""


@dataclass(frozen=True, kw_only=True)
class TraceOptions(MinutesOption, ApproximateOption, FactsOptions, RunFolderOptions):
    """Facts, model and folder."""

    until_settled: bool = False
    """Trace facts in random order only until the selection of layers settles: resamples of the facts agree on them."""
    shard: str | None = None
    """Trace one process's part of the facts, such as 0/4; then --merge."""
    merge: bool = False
    """Put together what the processes traced into --out."""


@command(
    trace=options_of(
        TraceConfig,
        without=("corruption", "noise_std", "batch_rows", "approximation"),
        defaults=ALL_SEVERED,
        notes={
            "metrics": "probability, log_probability, logit_difference or kl, each also after normalized_.",
            "sever": "Modules to sever: nothing, mlp, attn, also of some layers or elsewhere (mlp@3, attn:last).",
        },
    ),
    corruption=options_of(
        Corruption,
        without=("degrees",),
        rename={"distribution": "corruption"},
        notes={"distribution": "gaussian, multivariate, student, uniform, or tokens (of another subject)."},
    ),
)
def trace_command(
    options: TraceOptions, trace: TraceConfig, corruption: Corruption, approximation: Approximation
) -> int:
    """Trace facts: effects.parquet, facts.parquet, config.json and figures.

    With --approximate, effects are estimated from gradients, and traced exactly only for the cells of the largest
    estimates and for drawn ones, which say how far the estimates can be trusted.

    With --shard each process traces its part of the facts into the same --out; when all have ended, --merge makes the
    files from these parts, without the model.
    """
    if options.merge and (options.shard or options.until_settled):
        raise InputError("--merge only puts together what lies in --out; leave --shard and --until-settled out")
    if options.shard and options.until_settled:
        raise InputError("--until-settled looks at the facts in order, and --shard at its part; leave one of them out")
    if options.minutes is not None and not options.until_settled:
        raise InputError(
            "--minutes is for a trace that ends when the selection settles, expected --until-settled; add it, or leave "
            "--minutes out"
        )
    if not options.approximate:
        refuse_idle(
            approximation,
            names={field.name for field in fields(approximation)},
            reason="is for an approximate trace, expected --approximate with it; add that, or leave it out",
        )
    if options.merge:
        existing_folder(options.out)
        return ranks.current().from_first(lambda: _merge(options), "the merge")
    shard = require_one_process(parse_shard(options.shard))
    folder = options.run_folder()
    facts = sampled(options.read_facts(options.facts), options.max_facts, options.seed)
    model = options.load_model()
    config = options.trace_config(replace(trace, corruption=corruption), approximation)
    facts = options.in_turns(model, facts)
    if shard is not None:
        groups = pipeline.trace_shard_step(folder, model, facts, config, shard)
        say(f"shard {shard} is finished; when all are: mechedit trace --merge --out {options.out}")
        options.print_summary({"shard": str(shard), "groups": groups})
        return 0
    if options.until_settled:
        until = UntilSettled(minutes=options.minutes)
        select = SelectConfig(seed=options.seed)
        traced = pipeline.trace_until_settled_step(folder, model, facts, config, until, select, say)
    else:
        with saying_disagreement(REMEDY):
            traced = pipeline.trace_step(folder, model, facts, config)
    return ranks.current().from_first(lambda: _finish(options, traced), "the figures")


def _merge(options: TraceOptions) -> int:
    """Put together what the shards traced."""
    with saying_disagreement(REMEDY):
        traced = pipeline.merge_trace_step(options.run_folder())
    return _finish(options, traced)


def _finish(options: TraceOptions, traced: dict[str, Any]) -> int:
    """Draw the figures, and say what was traced."""
    agreement = say_agreement(traced)
    refresh_figures(options.out)
    summary = {"facts": traced["n_facts"], "dropped": len(traced["dropped"])}
    if traced["dropped"]:
        (name, reason), *_ = traced["dropped"]
        say(f"{len(traced['dropped'])} facts are left out, such as {brief(name)}: {reason}")
    say(f"traced {traced['n_facts']} facts: {Path(options.out) / 'effects.parquet'}")
    if options.until_settled:
        say(f"stopped after {traced['n_facts']} facts: {STOPPED[traced['stopped']]}")
        summary["stopped"] = traced["stopped"]
    options.print_summary({**summary, "agreement": agreement} if agreement else summary)
    return 0
