"""mechedit finds where a language model stores its facts, and rewrites them there.

    facts      = load_facts("known")                         what the model should know
    model      = load_model("tiny")                          or "gpt2-xl", a folder, a loaded model
    effects    = trace_facts(model, facts, TraceConfig(sever=("nothing", "mlp", "attn")))
    selection  = select_layers(effects)                      the critical layers, with their evidence
    moments    = collect_moments(model, texts, selection.layers)          E[k kᵀ] of the MLP keys
    edit       = memit(model, requests, selection.layers, moments)        targets z, spread over the layers
    with edited(model, edit):                                exact restore on leaving
        scores = evaluate(model, requests)                   ES, PS, NS, S, GE, exact match, …
    apply_(model, edit); edit.save("edit.safetensors"); undo_(model, edit)

The papers: Locating and Editing Factual Associations in GPT (ROME, 2022) and Mass-Editing Memory in a
Transformer (MEMIT, 2023).
"""

from mechedit.data import (
    EditRequest,
    Fact,
    Neighbor,
    describe_facts,
    describe_requests,
    load_facts,
    load_requests,
    load_snippets,
    load_texts,
    load_word_weights,
)
from mechedit.edit import Edit, apply_, edited, export, export_lora, merge, subtract, summarize, truncate, undo_
from mechedit.errors import InputError
from mechedit.evaluation import (
    Baseline,
    EvaluationConfig,
    References,
    Scores,
    evaluate,
    evaluate_zsre,
    load_references,
    measure_baseline,
    perplexity,
)
from mechedit.methods import (
    AlphaEditConfig,
    EmmetConfig,
    FineTuneBallConfig,
    FineTuneConfig,
    FineTuneDecayConfig,
    MemitConfig,
    Method,
    PmetConfig,
    RomeConfig,
    alphaedit,
    edit_keys,
    emmet,
    ft,
    ft_l,
    ft_w,
    memit,
    pmet,
    recommended,
    rome,
)
from mechedit.models import EMBED, Model, Patch, Resume, Run, Site, Tokens, load_model
from mechedit.moments import (
    Convergence,
    MomentsConfig,
    SecondMoment,
    collect_moments,
    collect_shard,
    load_moments,
    merge_moments,
    plan_moments,
    write_npz,
)
from mechedit.provenance import VERSION
from mechedit.selection import SelectConfig, Selection, published_ranges, select_layers
from mechedit.session import EditSession, StopRule
from mechedit.sweep import Sweep, SweepConfig, Validation, sweep_windows, windows_of
from mechedit.targets import TargetConfig, Targets, find_targets
from mechedit.trace import Corruption, Sever, TraceConfig, average_effects, plan_trace, total_effects, trace_facts

__version__ = VERSION

__all__ = [
    "EMBED",
    "AlphaEditConfig",
    "Baseline",
    "Convergence",
    "Corruption",
    "Edit",
    "EditRequest",
    "EditSession",
    "EmmetConfig",
    "EvaluationConfig",
    "Fact",
    "FineTuneBallConfig",
    "FineTuneConfig",
    "FineTuneDecayConfig",
    "InputError",
    "MemitConfig",
    "Method",
    "Model",
    "MomentsConfig",
    "Neighbor",
    "Patch",
    "PmetConfig",
    "References",
    "Resume",
    "RomeConfig",
    "Run",
    "Scores",
    "SecondMoment",
    "SelectConfig",
    "Selection",
    "Sever",
    "Site",
    "StopRule",
    "Sweep",
    "SweepConfig",
    "TargetConfig",
    "Targets",
    "Tokens",
    "TraceConfig",
    "Validation",
    "__version__",
    "alphaedit",
    "apply_",
    "average_effects",
    "collect_moments",
    "collect_shard",
    "describe_facts",
    "describe_requests",
    "edit_keys",
    "edited",
    "emmet",
    "evaluate",
    "evaluate_zsre",
    "export",
    "export_lora",
    "find_targets",
    "ft",
    "ft_l",
    "ft_w",
    "load_facts",
    "load_model",
    "load_moments",
    "load_references",
    "load_requests",
    "load_snippets",
    "load_texts",
    "load_word_weights",
    "measure_baseline",
    "memit",
    "merge",
    "merge_moments",
    "perplexity",
    "plan_moments",
    "plan_trace",
    "pmet",
    "published_ranges",
    "recommended",
    "rome",
    "select_layers",
    "subtract",
    "summarize",
    "sweep_windows",
    "total_effects",
    "trace_facts",
    "truncate",
    "undo_",
    "windows_of",
    "write_npz",
]
