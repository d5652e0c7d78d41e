# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Choose layers for a model
#
# **What you will learn**
#
# - how the program chooses the layers to edit, and what evidence it gives: gap, contribution, stability;
# - what other rules and other people choose, and why a range copied from another model is no evidence;
# - how to check a choice by *editing*: a sweep over windows of layers, on facts that were not traced;
# - when to trust neither.
#
# **For GPT-2 XL or Llama** change one line, the one that loads the model: `me.load_model("gpt2-xl", device="cuda")` or
# `me.load_model("meta-llama/Llama-3.1-8B", device="cuda", dtype="bfloat16")`. What else to expect:
#
# - *Facts, requests and texts* that suit the model in place of those of the tiny one: `me.load_facts(path)`,
#   `me.load_requests(path)` (CounterFact's records, say), and `"wikitext"` as the text of the second moments.
# - *Memory*: beside the weights, 8·d_mlp² bytes for the second moment of each layer: 0.3 GiB for each of GPT-2 XL's 48,
#   1.5 GiB for each of the 32 of Llama 3.1 8B. `me.plan_moments` tells before anything runs, and
#   `me.MomentsConfig(memory=...)` bounds it.
# - *Time*: this notebook traces few facts and edits few requests, to be quick. Take 200 facts, 10 samples, 20 requests
#   and two million tokens of text to decide anything: `python -m analyses.papers.select_layers MODEL` does that,
#   resumes where it stopped, and leaves a folder to cite.

# %%
import dataclasses
from functools import partial

import pandas as pd

import mechedit as me
from mechedit.figures import draw, plot_selection, sweep_figure
from mechedit.selection import SelectConfig, subject_effects
from mechedit.sweep import held_out, validate_selection

# %%
model = me.load_model("tiny")  # the line to change
facts = me.load_facts("known")[:400:10]  # every tenth: a mixture of subjects and relations
requests = me.load_requests("tiny")
print(f"{model.name}: {model.n_layers} layers; {len(facts)} facts to trace")

# %% [markdown]
# ## The trace
#
# Selection needs little of a trace: the state at the subject's last token, by layer, once with nothing severed and once
# with every MLP at that token held to its corrupted output. (Notebook 1 explains both.)

# %%
config = me.TraceConfig(kinds=("state",), sever=("nothing", "mlp"), roles=("subject_last",), samples=4)
effects = me.trace_facts(model, facts, config)
me.total_effects(effects)[["clean", "corrupted", "total", "facts"]].round(3)

# %% [markdown]
# ## The selection
#
# At layer *l*, with AIE the average indirect effect over facts:
#
# - the **gap** is what severing the MLPs takes: gap(*l*) = AIE of the state at *l* − the same with MLPs severed. It is
#   the work that the MLPs *above l* still have to do;
# - the **contribution** of layer *l* is the part of that work which its own MLP does: gap(*l* − 1) − gap(*l*).
#
# The default rule takes the shortest run of layers that makes at least 90% of the contributions. First, though, it
# tests whether there is an early site at all: whether the gap is above zero at some layer by more than chance allows.
# If not, it selects nothing and says so, which is an answer too.

# %%
selection = me.select_layers(effects)
print(f"layers {list(selection.layers)}: {selection.reason}")

# %%
evidence = pd.DataFrame(selection.evidence).set_index("layer")
evidence[["gap", "gap_low", "gap_high", "contribution", "membership"]].round(3)

# %% [markdown]
# `gap_low` and `gap_high` are 95% bootstrap intervals over facts. `membership` is the share of bootstrap resamples of
# the facts in which the rule takes that layer: near 1 inside and near 0 outside, the choice does not hang on which
# facts happened to be traced. `agreement` is the share of resamples whose range overlaps this one by 80% or more,
# `stability` the share of those that give exactly this range; `state` is `settled` from 80% on, if the range is narrow:

# %%
print(f"{selection.state}: agreement {selection.agreement:.2f}, stability {selection.stability:.2f}")
print(f"early site: p = {selection.early_site['p']:.4f}")

# %% [markdown]
# All of it in one figure. The rows at its foot are ranges: the chosen one, those of the other rules, and published ones
# where the model has any.

# %%
draw(partial(plot_selection, selection.plain()), height=2.7)

# %% [markdown]
# An agreement well below 1 says that there is doubt, and membership where it is: look for layers whose membership is
# neither near 0 nor near 1. More facts settle them.
#
# ## Other rules, other people
#
# `gap-peak` is the papers' wording, the layers where the gap is largest. But where the gap is largest the MLPs' work is
# still *to be done*: on models trained so that only known layers can recall, it names the layers below them
# (`analyses/README.md`, Planted truth). Another rule, `mlp-window`, needs the kind `mlp` in the
# trace, and is left out here.

# %%
pd.DataFrame({name: vars(rule) for name, rule in selection.rules.items()}).T[
    ["layers", "agreement", "stability", "modal"]
]

# %% [markdown]
# What others edit in GPT-2 XL and Llama 3 8B, with the source. Such ranges are there to compare with: most were chosen
# by eye, or copied from a model of like size.

# %%
published = [*me.published_ranges("gpt2-xl"), *me.published_ranges("meta-llama/Llama-3.1-8B")]
published += me.published_ranges("meta-llama/Meta-Llama-3-8B")
pd.DataFrame(published)[["model", "method", "layers", "source"]]

# %% [markdown]
# ## Does the range also edit well?
#
# Where tracing finds a fact need not be where it is best edited (Hase et al., 2023). So measure it: edit windows of
# layers, each time from the unedited model, with the same requests about subjects that were **not** traced, and score
# each window. The score S is the harmonic mean of
#
# - **ES**, efficacy: the share of requests whose new object is likelier than the old after the edit;
# - **PS**, paraphrases: the same for prompts that say the same in other words;
# - **NS**, neighborhood: the share of prompts about *other* subjects whose own object is still likelier.
#
# An edit needs the second moments $E[k\,k^\top]$ of the MLP keys *k* over running text, of every layer that it changes.
# Here: every window of the selected width. The method is AlphaEdit, which writes in the null space of the old keys:
# MEMIT refuses layers whose second moments are singular, and in the tiny model some outside layers 1 to 4 are. For
# other models leave `method` out, for MEMIT.

# %%
sample = held_out(requests, {fact.subject for fact in facts}, count=8)
windows = me.windows_of(model.n_layers, len(selection.layers))
reading = me.MomentsConfig(tokens=20_000)
moments = me.collect_moments(model, "tiny", range(model.n_layers), reading)
sweep = me.sweep_windows(model, sample.requests, moments, windows, method="alphaedit")
sweep.table[sweep.table["measure"].isin(["ES", "PS", "NS", "S"])].pivot(
    index=["first", "last"], columns="measure", values="mean"
)[["ES", "PS", "NS", "S"]].round(1)

# %% [markdown]
# `validate_selection` compares the sweep with the trace: is the selected window among those that are not
# significantly worse than the best (multiple comparisons with the best, calibrated by bootstrap)? And do windows with
# a larger contribution edit better?

# %%
gap = subject_effects(effects, SelectConfig()).gap
validation = validate_selection(sweep, gap, selection.layers, held_out=len(sample.requests) - sample.traced)
print(validation.verdict)

# %%
checked = dataclasses.replace(selection, validation=dataclasses.asdict(validation))
sweep_figure(sweep.table, checked.plain())

# %% [markdown]
# Above: each window's S at its center with its interval over requests; filled marks cannot be told from the best, the
# star is the best; the gray band is what the trace selects. Below: what the trace says of the same windows.
#
# With eight requests the intervals are wide, and windows with different scores may not be told apart. The figure is
# there to say whether the data decide. `outcome` is `agree`, `disagree` or `undecided`, and `near_best` lists the
# windows that remain:

# %%
print(validation.outcome, [list(layers) for layers in validation.near_best])

# %% [markdown]
# ## What to do next
#
# - Use the layers: `3_edit_check_undo_ship.ipynb`.
# - Decide with more facts and requests: `python -m analyses.papers.select_layers MODEL`, or
#   `mechedit select DIR --validate`.
#   `--by both` takes, of the windows that cannot be told from the best, the one that the trace prefers.
# - Where trace and sweep disagree, believe the sweep if you want to edit, and the trace if you want to know where the
#   model recalls; report both.
