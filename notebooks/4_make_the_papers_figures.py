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
# # Make the paper's figures
#
# **What you will learn**
#
# - the way from a trace to ROME's and MEMIT's figures: effects → averages → figures → PDF;
# - a small scaling curve, scores against the number of facts written at once (MEMIT's Fig. 5);
# - how to run the full experiments, one script per experiment, and go on from the tables that they leave;
# - how to restyle a figure, or put panels of your own choice together.
#
# **For GPT-2 XL or Llama** change one line, the one that loads the model: `me.load_model("gpt2-xl", device="cuda")` or
# `me.load_model("meta-llama/Llama-3.1-8B", device="cuda", dtype="bfloat16")`; the scripts take `--model`. What else to
# expect:
#
# - *Layers* are chosen, not copied: those below are the tiny model's (notebook 2). The scripts select them where
#   `--layers` is not given.
# - *Facts, requests and texts* that suit the model: `--facts`, `--requests` and `--texts`.
# - *Memory*: the weights, 8·d_mlp² bytes of second moment per layer, and a batch; `me.TraceConfig(memory=...)` and
#   `me.MomentsConfig(memory=...)` bound the last two.
# - *Time*: all numbers here are small, to be quick. ROME traces 1,000 facts (MEMIT 501) with 10 noise samples; MEMIT
#   writes up to 10,000 facts. The scripts resume, so they may be stopped.

# %%
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pandas as pd
from IPython.display import Image

import mechedit as me
from mechedit import figures

folder = Path(tempfile.mkdtemp())  # what this notebook writes goes there

# %%
model = me.load_model("tiny")  # the line to change
layers = [1, 2, 3, 4]  # what notebook 2 selects for it
facts = me.load_facts("known")[::350]
requests = me.load_requests("tiny")

# %% [markdown]
# ## From a trace to figures
#
# Every token of every fact, at every layer, for single states and for windows of MLP and attention outputs; and the
# states at the subject's last token again with MLPs or attention severed. (Notebook 1 explains the terms.)

# %%
whole = me.trace_facts(model, facts, me.TraceConfig(samples=2))
config = me.TraceConfig(kinds=("state",), sever=("mlp", "attn"), roles=("subject_last",), samples=2)
effects = pd.concat([whole, me.trace_facts(model, facts, config)], ignore_index=True)
averages = me.average_effects(effects)
averages.groupby("kind", sort=False).head(2).round(3)

# %% [markdown]
# `averages` is all that the figures need: one row for each kind, severing, role and layer, with the average indirect
# effect (AIE, the mean over facts of what restoring gives back) and its 95% bootstrap interval over facts. It is small
# whatever the number of facts, and `average_effects` also reads it from the parquet file of a trace that does not fit
# in memory.
#
# **AIE by role and layer** (ROME Fig. 2, MEMIT Fig. 8):

# %%
figures.roles_figure(averages)

# %% [markdown]
# **AIE by layer**, with the uncertainty that heatmaps cannot show (ROME's line plots). With so few facts the bands are
# wide, as they should be.

# %%
figures.lines_figure(averages, roles=["subject_last", "last"])

# %% [markdown]
# **Whole and severed** (MEMIT Fig. 3), with the layers to edit shaded:

# %%
severed = figures.draw(partial(figures.plot_severed, averages, selection=layers))
severed

# %% [markdown]
# ## As PDF
#
# `save_figure` writes a PDF with its fonts embedded as TrueType, which publishers ask for, and a PNG of 200 dots an
# inch. The same figure gives the same bytes, so that a figure under version control changes only when its data do.
# Figures are as wide as a column (3.25 inches) or a page (6.75 inches) of a two-column paper: include them unscaled,
# and their type is 7 points.

# %%
for path in figures.save_figure(severed, folder, "severed"):
    print(path.name, path.stat().st_size, "bytes")

# %% [markdown]
# ## A small scaling curve
#
# MEMIT's Fig. 5 writes n facts at once, for growing n, and scores each edit on its own requests: **ES** (efficacy: the
# new object is likelier than the old one), **PS** (the same for paraphrases), **NS** (prompts about other subjects keep
# their object) and **S**, the harmonic mean of the three. Each edit starts from the
# unedited model. Side by side: the whole range of layers, and one layer of it.

# %%
moments = me.collect_moments(model, "tiny", layers, me.MomentsConfig(tokens=20_000))
config = me.EvaluationConfig(generation_tokens=0, answer_tokens=0)
rows = []
for method, written in {"memit, layers 1–4": layers, "memit, layer 2 alone": [2]}.items():
    for n in (1, 4, 16):
        edit = me.memit(model, requests[:n], written, moments, cache=folder / "targets")  # z is searched for once
        with me.edited(model, edit):
            summary = me.evaluate(model, requests[:n], config).summary()
        rows += [{"facts": n, "method": method, "measure": name, **entry} for name, entry in summary.items()]
curve = pd.DataFrame(rows)
curve.pivot(index=["method", "facts"], columns="measure", values="mean")[["ES", "PS", "NS", "S"]].round(1)

# %%
scaling = figures.scores_figure(curve, x="facts", log=True, label="facts written at once")
scaling

# %% [markdown]
# The bands are 95% intervals over requests. With a few facts they say nothing much: at n = 1 there is no
# other request to draw. The papers' curve goes on to 10,000 facts, and holds methods against one another.
#
# ## The full experiments
#
# Most tables and figures of the papers have a script in `analyses/`, which takes `--model`, `--requests`, `--out` and
# `--quick`, resumes where it was stopped, and leaves a tidy parquet, the table as the paper prints it (CSV) and the
# figure (PDF and PNG). `analyses/README.md` lists them. This runs one in its quick form, as one would in a shell:

# %%
repository = Path(me.__file__).parents[1]
command = [sys.executable, "-m", "analyses.papers.trace_severed", "--quick", "--model", "tiny", "--max-facts", "12"]
done = subprocess.run([*command, "--out", folder / "papers"], cwd=repository, check=True, capture_output=True)
print(done.stdout.decode().splitlines()[-1])

# %%
Image(folder / "papers" / "trace_severed.png", width=860)

# %% [markdown]
# A quick trace of 12 facts need not select the layers that 200 facts do: look at the share of resamples that agree.
#
# The parquet holds the numbers of the figure, a row for each layer and measure. What one reads off the figure one can
# also compute, such as the layers that make most of the MLPs' contribution:

# %%
table = pd.read_parquet(folder / "papers" / "trace_severed.parquet")
wide = table.pivot(index="layer", columns="measure", values="mean")
wide.nlargest(4, "contribution")[["state", "mlp_severed", "gap", "contribution"]].round(3)

# %% [markdown]
# ## Restyle
#
# Functions named `plot_…` draw on Axes that you give them, and return them: change what you like, with matplotlib's own
# means. `paper_style` gives the type and lines, inside its block only. Two panels of one's own, then:

# %%
with figures.paper_style():
    figure = figures.PaperFigure(figsize=(6.75, 2.3))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    figures.plot_role_grid(averages, "mlp", left)
    figures.plot_scores_against(curve, right, x="facts", measure="S", log=True)
    left.set_title("")
    left.set_title("a   MLPs at the end of the subject", loc="left")
    right.set_title("b   MEMIT on the tiny model", loc="left")
    right.set(xlabel="facts written at once", ylim=(40, 102), yticks=range(40, 101, 10))
    right.legend(loc="lower right")
figure

# %% [markdown]
# ## What to do next
#
# - Run the scripts in full on the tiny model, then on your own, and compare with what `analyses/README.md` says the
#   papers found and the tiny model shows.
# - `mechedit report DIR` puts the figures of a run into one page; `figures.run_figures(DIR)` writes them all.
# - `figures.comparison_figure` and `figures.comparison_lines` put several traces side by side, of other corruptions,
#   windows or models, on one scale.
