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
# # A real model
#
# **What you will learn**
#
# - what the four other notebooks look like on a model that was not made for this package: SmolLM2 with 135 million
#   parameters;
# - why tracing does not settle which layers to edit there, and how a short sweep of edits does;
# - what untuned settings install, what they leave alone, and what is still wrong afterwards.
#
# **For GPT-2 XL or Llama** change one line, the one that loads the model: `me.load_model("gpt2-xl", device="cuda")` or
# `me.load_model("meta-llama/Llama-3.1-8B", device="cuda", dtype="bfloat16")`. What else to expect:
#
# - *Facts*: the capitals below suit any model that reads English. `me.load_facts("known_1000")` and
#   `me.load_requests("multi_counterfact")` download ROME's and MEMIT's.
# - *Memory*: 0.5 GB of weights here, in float32; the second moment of a layer takes 8·d_mlp² bytes beside them.
# - *Time*: this notebook is small, to be quick. `mechedit run --model NAME` does the same with a hundred facts and a
#   hundred edits, says beforehand what that takes, and goes on where it stopped; [the page on two pretrained
#   models](../reference/real_models) has what came out.
#
# `make real` puts SmolLM2 where the next cell looks; without it, it comes from the hub.

# %%
import os
from functools import partial
from pathlib import Path

import pandas as pd

import mechedit as me
from mechedit.data.downloads import cache_folder
from mechedit.evaluation.generation import generate
from mechedit.figures import draw, plot_severed
from mechedit.selection import SelectConfig
from mechedit.sweep import Window

made = Path(os.environ.get("MECHEDIT_REAL_MODELS") or cache_folder() / "real_models") / "smollm2-135m"

# %%
model = me.load_model(made if made.is_dir() else "HuggingFaceTB/SmolLM2-135M-Instruct")  # the line to change
print(f"{model.n_layers} layers, d_model {model.d_model}, {model.d_mlp} keys in each MLP")

# %% [markdown]
# ## What it knows
#
# Only what a model knows can be traced. Facts that it does not complete with the object are dropped, and it is said
# what it writes instead.

# %%
capitals = {
    "France": "Paris", "Japan": "Tokyo", "Egypt": "Cairo", "Norway": "Oslo", "Austria": "Vienna", "Peru": "Lima",
    "Mongolia": "Ulaanbaatar",
}  # fmt: skip
prompt = "The capital of {} is the city of"
facts = [me.Fact(id=name, subject=name, prompt=prompt, object=capital) for name, capital in capitals.items()]
config = me.TraceConfig(kinds=("state",), sever=("nothing", "mlp", "attn"), roles=("subject_last",), samples=2)
effects = me.trace_facts(model, facts, config)
print(effects.attrs["n_facts"], "traced;", *(f"{fact}: {why}" for fact, why in effects.attrs["dropped"]))

# %% [markdown]
# ## Where it recalls
#
# The story of the papers is there: restoring the state at the subject's last token in a low layer gives much of the
# probability back, and little of that while the MLPs above are held to their corrupted outputs.

# %%
draw(partial(plot_severed, effects))

# %% [markdown]
# But the two curves close slowly, over half of the depth, and not as they do in a small model where few layers do the
# work. So the rules disagree, and what the default one selects is too wide to be called a site:

# %%
selection = me.select_layers(effects, config=SelectConfig(min_facts=5))
print(selection.reason)
pd.DataFrame({name: vars(rule) for name, rule in selection.rules.items()}).T[["layers", "agreement", "stability"]]

# %% [markdown]
# ## Let edits decide
#
# A few windows, each edited from the unedited model with the same requests about other subjects. `mechedit run` does
# this by itself, with 20 requests, and with 60 for the best windows.

# %%
others = {"Sweden": "Stockholm", "Portugal": "Lisbon", "Cuba": "Havana"}
moved = ["Rome", "Berlin", "Delhi"]
requests = [
    me.EditRequest(
        id=name,
        subject=name,
        prompt=prompt,
        target_new=new,
        target_true=capital,
        paraphrases=(f"The government of {name} sits in the city of",),
        neighbors=(me.Neighbor(prompt=prompt.replace("{}", "Denmark"), object="Copenhagen"),),
    )
    for (name, capital), new in zip(others.items(), moved, strict=True)
]
windows = [Window(2, 4), Window(9, 11), Window(19, 21)]
layers = sorted({layer for window in windows for layer in window.layers})
moments = me.collect_moments(model, "tiny", layers, me.MomentsConfig(tokens=5_000))
sweep = me.sweep_windows(model, requests, moments, windows)
sweep.table[sweep.table["measure"].isin(["ES", "PS", "NS", "PM", "S"])].pivot(
    index=["first", "last"], columns="measure", values="mean"
)[["ES", "PS", "NS", "PM", "S"]].round(1)

# %% [markdown]
# With three requests, rates of success are coarse: every window may reach all of them. PM, the difference of the
# probabilities of new and old object after the paraphrases, still tells them apart.
#
# ## The edit
#
# The window with the best score (of equals, the one with the largest differences of probability), with untuned
# settings: learning rate and λ are in units of the model's own states and keys.

# %%
best = max(zip(sweep.scores, sweep.margins, sweep.windows, strict=True))[-1]
edit = me.memit(model, requests, best.layers, moments)
asked = [prompt.format(name) for name in (*others, "Denmark", "Egypt")]
asked += [text for request in requests for text in request.paraphrases]
before = generate(model, asked, tokens=6)
with me.edited(model, edit):
    after = generate(model, asked, tokens=6)
pd.DataFrame({"before": before, "after": after}, index=asked)

# %% [markdown]
# The first three prompts are those that were edited, and the last three ask the same in other words. Denmark's and
# Egypt's were not edited, and must stay.
#
# The model is what it was:

# %%
assert generate(model, asked, tokens=6) == before

# %% [markdown]
# ## What to do next
#
# - All of it, with enough facts to say something: `mechedit run --model NAME`, or
#   `python -m analyses.real_models.page NAME`, which leaves a folder to cite.
# - Settings of your model's own: `mechedit tune NAME` tries layers, λ and learning rates by editing.
# - Ship the edit: notebook 3.
