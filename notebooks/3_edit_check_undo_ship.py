# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     notebook_metadata_filter: -jupytext.text_representation.jupytext_version
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
# # Edit, check, undo, ship
#
# **What you will learn**
#
# - how to write facts into a model with MEMIT, and what an edit is: a value of its own, apart from the model;
# - how to check it: efficacy, paraphrases, neighbors, what the model writes, and how well it still predicts text;
# - how to take it back bit for bit;
# - how to keep it: as a small file, as a plain checkpoint, as a LoRA adapter.
#
# **For GPT-2 XL or Llama** change one line, the one that loads the model: `me.load_model("gpt2-xl", device="cuda")` or
# `me.load_model("meta-llama/Llama-3.1-8B", device="cuda", dtype="bfloat16")`. What else to expect:
#
# - *Layers* are chosen, not copied: those below are the tiny model's. Notebook 2 selects them for any model.
# - *Requests and texts* that suit the model: `me.load_requests(path)` reads CounterFact's records, `"wikitext"` is the
#   usual text for second moments. Held-out text should not be part of it.
# - *Memory*: beside the weights, 8·d_mlp² bytes of second moment per layer (0.3 GiB for GPT-2 XL, 1.5 GiB for Llama 3.1
#   8B), the search for targets, and one copy of each edited layer while an edit is applied.
# - *Time*: the search for targets takes most of it. It is done in batches, and kept on disk by `mechedit edit`.

# %%
import tempfile
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mechedit as me
from mechedit.figures import draw, plot_scores
from mechedit.tables import where

folder = Path(tempfile.mkdtemp())  # what this notebook writes goes there

# %%
model = me.load_model("tiny")  # the line to change
layers = [1, 2, 3, 4]  # what notebook 2 selects for it
requests = me.load_requests("tiny")[:20]
texts = me.load_texts("tiny")
collected, held_out = texts[:-100], texts[-100:]
original = model.weights_hash()

# %% [markdown]
# ## What is asked for
#
# A **request** names a subject, a prompt with a place for it, and the new object. CounterFact adds the prompts that
# judge an edit: paraphrases, which should change with it, and prompts about other subjects with the same true object
# (the neighborhood), which should not.

# %%
request = requests[0]
print("prompt:    ", request.text)
print("now:       ", request.target_true)
print("wanted:    ", request.target_new)
print("paraphrase:", request.paraphrases[0])
print("neighbor: ", request.neighbors[0].prompt, "→", request.neighbors[0].object)

# %% [markdown]
# ## Before
#
# Five measures, in percent, with 95% intervals over requests:
#
# - **ES**, efficacy: requests whose new object is likelier than the old one;
# - **PS**, paraphrases: the same for the paraphrases;
# - **NS**, neighborhood: prompts about other subjects whose own object is likelier than the new one;
# - **S**: the harmonic mean of the three, which is low as soon as one of them is;
# - **exact match**: requests where greedy decoding writes the new object. ES only compares two objects, and flatters.
#
# and beside them the perplexity of held-out text: what an edit does to everything else. (GE, the entropy of free text,
# is left out to be quick: `me.EvaluationConfig()` measures it too.)

# %%
config = me.EvaluationConfig(generation_tokens=0)
before = me.evaluate(model, requests, config, state="before")
perplexity = {"before": me.perplexity(model, held_out)}
pd.DataFrame(before.summary()).T.loc[["ES", "PS", "NS", "S", "exact_match"]].round(1)

# %% [markdown]
# ## The edit
#
# MEMIT takes three steps. It collects the **second moments** $C = E[k\,k^\top]$ of the MLP keys *k* over running text:
# what the layer is used for, and should go on doing. It searches, for each request, for the **target** *z*: the state
# at the subject's last token in the last layer of the range that makes the model say the new object. And it **spreads**
# the change to *z* over the layers, each by the least-squares update that maps the new keys to their part of it and
# disturbs the old ones least.

# %%
moments = me.collect_moments(model, collected, layers, me.MomentsConfig(tokens=50_000))
edit = me.memit(model, requests, layers, moments)
assert model.weights_hash() == original  # making an edit leaves the model as it was
me.summarize(edit, model).round(3)

# %% [markdown]
# An edit is two thin matrices per layer, whose product is added to the weights. `rank` is at most the number of
# requests, `norm` is ‖ΔW‖, `relative` is ‖ΔW‖ / ‖W‖, and `left` is the part of the way to the targets that is still
# open once the layer is written. In this tiny model ΔW is larger than W: twenty facts are much for 128 dimensions. In
# your own, look at `relative` first: it tells early of an edit that is too large. The manifest says what made it:

# %%
{name: edit.manifest[name] for name in ("method", "layers", "model")}

# %% [markdown]
# ## After
#
# `edited` puts the edit on the model inside the block only. On leaving it, also by an error, the weights are what they
# were.

# %%
with me.edited(model, edit):
    after = me.evaluate(model, requests, config, state="after")
    perplexity["after"] = me.perplexity(model, held_out)
assert model.weights_hash() == original
both = before.join(after)
draw(partial(plot_scores, both.summary("before"), both.summary("after")))

# %%
pd.Series(perplexity, name="perplexity of held-out text").to_frame().round(3)

# %% [markdown]
# What the model writes, before and after, for the first requests (greedy decoding; `expected` is the new object):

# %%
answers = where(both.answers, kind="rewrite").set_index(["case", "state"])[["question", "expected", "answer"]]
written = answers.xs("after", level="state").rename(columns={"answer": "after"})
written.insert(2, "before", answers.xs("before", level="state")["answer"])
written.loc[[request.id for request in requests[:6]]]

# %% [markdown]
# Where the new object comes first and the text goes on as before, the edit has done what it should. And what went
# wrong: prompts about other subjects, whose own object is no longer the likelier one. NS below 100 is *bleeding*: the
# edit reached subjects that it was not about.

# %%
rows = where(after.table, measure="NS")
flipped = rows[rows["value"] == 0]
print(f"flipped: {len(flipped)} of {len(rows)} prompts, in {flipped['case'].nunique()} of {len(requests)} requests")

# %% [markdown]
# ## For good, and back
#
# `apply_` changes the model until `undo_`. Undoing is exact: the original weights are kept aside and put back.
# Subtracting the update would not do, since floating-point sums are rounded. Here is the difference:

# %%
weight = model.projection(layers[0])  # a live view of the weights
untouched = weight.clone()
me.apply_(model, edit)
print("edited:           ", model.weights_hash() != original)

# %%
subtracted = weight - edit.delta(layers[0]).to(weight.dtype)
print("subtracting:      ", int((subtracted != untouched).sum()), "of", weight.numel(), "weights differ")
me.undo_(model, edit)
print("undo_:            ", int((weight != untouched).sum()), "of", weight.numel(), "weights differ")
print("hash of all bits: ", "the same" if model.weights_hash() == original else "another")

# %% [markdown]
# ## Ship it
#
# **As a file.** It holds two vectors for each fact and layer, and the hash of the weights that it was made for: put on
# any others, it is refused.

# %%
edit.save(folder / "edit.safetensors")
loaded = me.Edit.load(folder / "edit.safetensors")
print(f"{(folder / 'edit.safetensors').stat().st_size / 1024:.0f} KiB for {len(requests)} facts")
with me.edited(model, loaded):
    edited_hash = model.weights_hash()
    again = me.evaluate(model, requests, config, state="after")
print("the same scores:", again.summary() == after.summary())

# %% [markdown]
# **As a checkpoint** that `AutoModelForCausalLM` loads, without mechedit. Loaded again, it is bit for bit the edited
# model:

# %%
me.export(model, edit, folder / "checkpoint")
shipped = AutoModelForCausalLM.from_pretrained(folder / "checkpoint", dtype=model.dtype)
reloaded = me.load_model(shipped, tokenizer=model.tokenizer)
print("the edited model:", reloaded.weights_hash() == edited_hash)

# %% [markdown]
# **As a LoRA adapter** that PEFT puts on the unedited model, and takes off again. The update stays apart from the
# weights: the result is the edited model up to rounding.

# %%
me.export_lora(model, edit, folder / "adapter")
base = AutoModelForCausalLM.from_pretrained(model.hf.name_or_path, dtype=model.dtype)
adapted = PeftModel.from_pretrained(base, folder / "adapter")
tokens = model.tokenizer(request.text, return_tensors="pt").input_ids
with torch.no_grad():
    difference = (adapted(tokens).logits - shipped(tokens).logits).abs().max()
    answer = model.tokenizer.decode(adapted(tokens).logits[0, -1].argmax())
print(f"largest difference of a logit {float(difference):.1e}; says {answer!r}, wanted {request.target_new!r}")

# %% [markdown]
# ## What to do next
#
# - More facts, batch after batch, watched, with a rule that stops: `me.EditSession`.
# - Other methods take the same arguments: `me.rome`, `me.emmet`, `me.alphaedit`, `me.pmet`, and fine-tuning as `me.ft`,
#   `me.ft_l`, `me.ft_w`; `python -m analyses.papers.table_counterfact` scores them side by side.
# - Edits are values: `me.merge`, `me.subtract` and `me.truncate` make new ones of them.
# - The same from the command line: `mechedit edit`, `evaluate`, `apply --format checkpoint|lora`.
# - Before you trust an edit, look at more than ES: paraphrases, neighbors, free text and perplexity, on subjects that
#   matter to you.
