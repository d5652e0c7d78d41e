"""`mechedit run`: all steps, then the report."""

from __future__ import annotations

from pathlib import Path

from mechedit import pipeline
from mechedit.cli import options
from mechedit.cli.app import print_json, say
from mechedit.cli.describe import say_unconverged
from mechedit.cli.parsing import check_layers, load, method_config, parse_layers, sampled
from mechedit.data import load_facts, load_requests
from mechedit.evaluation import EvaluationConfig
from mechedit.figures import run_figures
from mechedit.moments import MomentsConfig
from mechedit.report import write_report
from mechedit.selection import SelectConfig
from mechedit.trace import TraceConfig


def run_command(
    model: options.ModelName = "tiny",
    facts: options.FactsFile = "known",
    requests: options.RequestsFile = "tiny",
    texts: options.Texts = "tiny",
    out: options.Out = Path("run"),
    layers: options.Layers = None,
    method: options.Method = "memit",
    rule: options.Rule = "contribution",
    max_facts: options.MaxFacts = 100,
    samples: options.Samples = 10,
    settings: options.Setting = None,
    generation_prompts: options.GenerationPrompts = 2,
    backend: options.Backend = "transformer_lens",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json_: options.Json = False,
    config: options.Config = None,
) -> int:
    """All the steps: trace, select, moments, edit, evaluate, then figures and the report."""
    # All that can be refused is refused before the long steps.
    folder = pipeline.RunFolder.at(out, overwrite=overwrite)
    wanted = sampled(load_facts(facts), max_facts, seed)
    edits = load_requests(requests)
    chosen = None if layers is None else parse_layers(layers)
    trace = TraceConfig(sever=("nothing", "mlp", "attn"), samples=samples, seed=seed)
    choice = SelectConfig(rule=rule, seed=seed)
    loaded = load(model, backend, device, dtype)
    how = method_config(method, loaded, seed, settings)
    if chosen:
        check_layers(chosen, loaded.n_layers)

    pipeline.trace_step(folder, loaded, wanted, trace)
    selection = pipeline.select_step(folder, choice)
    say(selection.reason)
    chosen = chosen or list(selection.layers)
    if not chosen:
        pipeline.write_summary(folder, None, selection)
        run_figures(folder.path)
        write_report(folder.path)
        return 3
    moments = pipeline.moments_step(folder, loaded, texts, chosen, MomentsConfig()) if how.preserves_keys else {}
    edit = pipeline.edit_step(folder, loaded, edits, chosen, moments, method, how)
    say_unconverged(edit)
    measure = EvaluationConfig(seed=seed, generation_prompts=generation_prompts)
    scores = pipeline.evaluate_step(folder, loaded, edits, edit, measure)
    summary = pipeline.write_summary(folder, scores, selection, edit)
    run_figures(folder.path)
    report = write_report(folder.path)
    say(f"the report is {report}")
    print_json(json_, summary)
    return 0
