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
# # Trace one fact
#
# **What you will learn**
#
# - how to ask where in a language model one fact is recalled (causal tracing, Meng et al., 2022);
# - how to read the heatmaps: the *early site* at the subject's last token, the *late site* at the last token;
# - what *severing* is, and how it shows that the early site is the work of MLPs (Meng et al., 2023);
# - what one fact cannot tell you, and what an average can.
#
# **For GPT-2 XL or Llama** change one line, the one that loads the model:
# `me.load_model("gpt2-xl", device="cuda")` or `me.load_model("meta-llama/Llama-3.1-8B", device="cuda",
# dtype="bfloat16")`. What else to expect:
#
# - *Facts*: the tiny model knows a small almanac, the others know the world. Give them facts of their own, such as
#   `me.Fact(id="jobs", subject="Steve Jobs", prompt="{} was the founder of", object="Apple")`, or a file of them:
#   `me.load_facts("known_1000.json")` reads ROME's set. Facts that the model does not complete with the object are
#   dropped, and named in `effects.attrs["dropped"]`.
# - *Memory*: the weights (GPT-2 XL: 1.56 billion parameters, 6.2 GB in float32; Llama 3.1 8B: 16 GB in bfloat16), and
#   what one batch takes beside them, which `me.TraceConfig(memory=8)` bounds, in GiB.
# - *Time*: one run of a prompt for every layer, token, kind and noise sample. GPT-2 XL has 48 layers where this model
#   has 10: use a GPU, and let `parts=` keep what is finished.

# %%
from functools import partial

import mechedit as me
from mechedit.figures import draw, fact_figure, plot_lines, plot_severed

# %%
model = me.load_model("tiny")  # the line to change
known = {fact.id: fact for fact in me.load_facts("known")}
fact = known["auguste-rodin/country"]
print(f"{model.name}: {model.n_layers} layers")
print(f"{fact.text!r} → {fact.object!r}")

# %% [markdown]
# The almanac's style is odd on purpose: many ways to say the same, so that no single word after the name gives the
# answer away. The fact itself is true, and the model knows it.
#
# ## Three runs
#
# A fact is a subject, a relation and an object. Causal tracing asks which *hidden states* carry it, by three runs of
# the prompt:
#
# 1. **clean**: the model says the object with probability $P(o)$;
# 2. **corrupted**: Gaussian noise is added to the embeddings of the subject's tokens, three standard deviations wide,
#    and the probability falls to $P_*(o)$;
# 3. **corrupted, one state restored**: as 2, but the hidden state $h$ of one token at one layer is put back to its
#    value in the clean run; what this gives is $P_{*,\,\text{clean}\,h}(o)$.
#
# The **total effect** is $P - P_*$: what corrupting the subject takes. The **indirect effect** of $h$ is
# $P_{*,\,\text{clean}\,h} - P_*$: what that one state gives back. All three are means over ten draws of the noise; each
# draw is the same for every state, so that states can be compared.

# %%
effects = me.trace_facts(model, [fact])
me.total_effects(effects)[["metric", "clean", "corrupted", "total", "facts"]].round(3)

# %% [markdown]
# ## The heatmaps
#
# `effects` is a table with one row for each state that was restored. In a notebook it shows itself as heatmaps; hover
# over a cell for its numbers. Down: the prompt's tokens, those of the subject starred and bold. Across: the layers,
# counted from 0.

# %%
effects

# %% [markdown]
# How to read them:
#
# - **Single state.** Two places are darkest. The *early site*: the subject's last token, from the first layer on. The
#   *late site*: the prompt's last token in the last layers. The late one is no surprise, since the answer is read off
#   there: restoring the last state of all gives back the total effect whole. The early one is the finding: at a token
#   where the relation has not been asked for yet, one state already gives back a good part of the answer. The other
#   tokens of the name give back less: they are pieces that several names share.
# - **MLP window** and **attention window.** Here a module's *outputs* are restored, over several consecutive layers at
#   once, since those of one layer rarely suffice. MLP outputs count at the subject and most at its last token,
#   attention outputs where the answer is read: the MLPs recall, attention carries.
# - **Red** cells, where there are any, are states whose restoring harms. Effects are never clipped.
# - The first seven layers of the tiny model attend to the last four tokens only. What passes from the subject to the
#   end of a longer prompt has to wait for layers 7 to 9, where attention reaches everywhere; this is why nothing is
#   seen at the tokens between. Other models have no such limit, and show more there.
#
# The same as a figure for a paper, all kinds on one color scale (`save_figure` writes it as PDF and PNG):

# %%
fact_figure(effects)

# %% [markdown]
# The largest effects of each kind, by role of the token (a *role* is the place of a token relative to the subject, so
# that prompts of different lengths can be compared):

# %%
largest = effects.loc[effects.groupby(["kind", "role"])["effect"].idxmax()]
largest.pivot(index="role", columns="kind", values="effect").reindex(
    ["subject_first", "subject_middle", "subject_last", "after", "further", "last"]
).round(3)

# %% [markdown]
# ## Severing: is it the MLPs?
#
# That a state early in the network suffices does not say which modules make it matter. MEMIT asks this by **severing**:
# restore the state at the subject's last token as before, but hold the output of *every MLP* at that token to its value
# in the corrupted run (of the same noise draw). The restored state can then act through attention and the residual
# stream, but no MLP at that token can respond to it. Severing attention is the same with attention outputs.

# %%
config = me.TraceConfig(kinds=("state",), sever=("nothing", "mlp", "attn"), roles=("subject_last",))
severed = me.trace_facts(model, [fact], config)
draw(partial(plot_severed, severed))

# %%
severed.pivot(index="layer", columns="sever", values="effect")[["nothing", "mlp", "attn"]].round(3)

# %% [markdown]
# (The axis says AIE, the average of the indirect effect over facts: here over one.) Read the bars from left to right.
#
# - With **nothing severed** the effect is nearly as large at layer 0 as at layer 4.
# - With **MLPs severed** hardly any of it is left at layer 0, and it comes back over the next layers. A restored state
#   at a low layer holds the subject's name but not yet what is known about it: without the MLPs above, it is of little
#   use. From the layer on where the bars are equal, the MLPs have done their work, and severing the rest takes nothing.
# - With **attention severed** little changes: once this state is restored, attention at this token adds nothing that
#   the answer needs.
#
# So the early site is a place where *the MLPs of a few early layers look the fact up*, with the end of the subject's
# name as the key. Those layers are the ones to edit; how to choose them properly is the next notebook.
#
# ## Which MLPs?
#
# A severing may name layers: `mlp@2` holds the MLP of layer 2 only. Restore the state at layer 0 and sever one layer's
# MLP at a time: what is lost is that MLP's part. (That of layer 0 itself lies below the restored state: severing it
# takes nothing, by construction.)

# %%
one_by_one = [f"mlp@{layer}" for layer in range(model.n_layers)]
config = me.TraceConfig(kinds=("state",), sever=("nothing", *one_by_one), roles=("subject_last",))
singly = me.trace_facts(model, [fact], config)
effect = singly[singly["layer"] == 0].set_index("sever")["effect"]
(effect["nothing"] - effect[one_by_one]).rename("effect lost").to_frame().round(3)

# %% [markdown]
# The parts need not add up to the whole: one MLP may need what an earlier one wrote, so that severing either takes what
# both make, or may stand in for another.
#
# ## One fact is an anecdote
#
# Everything above is one fact, chosen because it is clear. Here are twelve: the probability of the object clean and
# corrupted, and what the state at the subject's last token gives back at layer 4.

# %%
several = [item for item in known.values() if item.relation in ("country", "language")][:12]
config = me.TraceConfig(
    kinds=("state",), sever=("nothing", "mlp", "attn"), roles=("subject_last", "last"), samples=4
)  # fmt: skip
traced = me.trace_facts(model, several, config)
at_layer_4 = traced.query("sever == 'nothing' and role == 'subject_last' and layer == 4")
at_layer_4.set_index("fact")[["clean", "corrupted", "effect"]].sort_values("effect").round(3)

# %% [markdown]
# They differ, and for some this state does nothing, or harm. ROME averages over 1,000 facts, MEMIT over 501: the
# **average indirect effect (AIE)** is the mean over facts of the indirect effect of states of one role at one layer.
# The bands are 95% bootstrap intervals over facts; they say how much, or how little, twelve facts tell.

# %%
average = me.average_effects(traced)
draw(partial(plot_lines, average, roles=["subject_last"], severings=["nothing", "mlp", "attn"]))

# %%
draw(partial(plot_lines, average, roles=["subject_last", "last"]))

# %% [markdown]
# The first figure is the severing again, now with its uncertainty; the second the two sites, early and late, as they
# pass the fact on.
#
# ## What to do next
#
# - `2_choose_layers.ipynb`: from such averages to a range of layers, with its evidence.
# - Other corruptions and measures: `me.TraceConfig(corruption="tokens")` replaces the subject by another one of as many
#   tokens, `metrics=("probability", "logit_difference")` measures more than one thing in the same pass.
# - From the command line: `mechedit trace --model M --facts F --out DIR`; the whole of ROME's and MEMIT's tracing
#   figures: `analyses/papers/trace_average.py` and `analyses/papers/trace_severed.py`.
# - Tracing says which states *suffice* to recall, under one kind of corruption. It does not say where an edit works
#   best (Hase et al., 2023): that has to be measured, and the next notebook does.
