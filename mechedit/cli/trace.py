"""`mechedit trace`: causal tracing into a run folder."""

from __future__ import annotations

from pathlib import Path

from mechedit import pipeline
from mechedit.cli import options
from mechedit.cli.app import print_json
from mechedit.cli.parsing import load, parse_names, sampled
from mechedit.data import load_facts
from mechedit.figures import run_figures
from mechedit.trace import Corruption, TraceConfig


def trace_command(
    facts: options.FactsFile = "known",
    out: options.Out = Path("run"),
    model: options.ModelName = "tiny",
    kinds: options.Kinds = "state,mlp,attn",
    sever: options.Sever = "nothing,mlp,attn",
    window: options.TraceWindow = None,
    roles: options.Roles = None,
    samples: options.Samples = 10,
    noise: options.Noise = 3.0,
    corruption: options.CorruptionName = "gaussian",
    replace: options.Replace = False,
    extra_tokens: options.ExtraTokens = 0,
    metrics: options.Metrics = "probability",
    memory: options.Memory = None,
    max_facts: options.MaxFacts = None,
    backend: options.Backend = "transformer_lens",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json_: options.Json = False,
    config: options.Config = None,
) -> int:
    """Trace facts: effects.parquet, facts.parquet, config.json and figures."""
    folder = pipeline.RunFolder.at(out, overwrite=overwrite)
    wanted = sampled(load_facts(facts), max_facts, seed)
    settings = TraceConfig(
        kinds=parse_names(kinds),
        sever=parse_names(sever),
        window=window,
        roles=None if roles is None else parse_names(roles),
        samples=samples,
        noise=noise,
        corruption=Corruption(distribution=corruption, replace=replace, extra_tokens=extra_tokens),
        metrics=parse_names(metrics),
        memory=memory,
        seed=seed,
    )
    traced = pipeline.trace_step(folder, load(model, backend, device, dtype), wanted, settings)
    run_figures(folder.path)
    print_json(json_, {"facts": traced["n_facts"], "dropped": len(traced["dropped"])})
    return 0
