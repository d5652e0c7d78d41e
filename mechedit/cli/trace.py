"""`mechedit trace`: causal tracing into a run folder."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mechedit import pipeline
from mechedit.cli.command import command, options_of
from mechedit.cli.options import ALL_SEVERED, ApproximateOption, FactsOptions, RunFolderOptions, say_agreement
from mechedit.cli.parsing import sampled
from mechedit.figures import run_figures
from mechedit.trace import Approximation, Corruption, TraceConfig


@dataclass(frozen=True, kw_only=True)
class TraceOptions(ApproximateOption, FactsOptions, RunFolderOptions):
    """Facts, model and folder."""


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
    """
    folder = options.run_folder()
    facts = sampled(options.read_facts(options.facts), options.max_facts, options.seed)
    model = options.load_model()
    config = options.trace_config(replace(trace, corruption=corruption), approximation)
    traced = pipeline.trace_step(folder, model, options.in_turns(model, facts), config)
    agreement = say_agreement(traced)
    run_figures(folder.path)
    summary = {"facts": traced["n_facts"], "dropped": len(traced["dropped"])}
    options.print_summary({**summary, "agreement": agreement} if agreement else summary)
    return 0
