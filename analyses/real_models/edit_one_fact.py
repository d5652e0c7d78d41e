"""One fact of a pretrained model, all the way: traced, edited, exported, and said anew by a fresh process.

    python -m analyses.real_models.edit_one_fact MODEL --texts FILE --out DIR

MODEL is smollm2 or gemma3. Layers and settings were chosen by hand, so that a fact is rewritten and others stay.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

import mechedit as me
from analyses.common.command import run_script
from analyses.real_models.make import REAL_MODELS, make

PROMPT = "{} is located in the city of"
FACTS = [
    me.Fact(id="1", subject="The Eiffel Tower", prompt=PROMPT, object="Paris"),
    me.Fact(id="2", subject="The Colosseum", prompt=PROMPT, object="Rome"),
]
REQUEST = me.EditRequest(id="1", subject="The Eiffel Tower", prompt=PROMPT, target_new="Rome", target_true="Paris")
ASKED = [
    "The Eiffel Tower is located in the city of",
    "People who visit the Eiffel Tower travel to",
    "The Colosseum is located in the city of",
    "The Statue of Liberty is located in the city of",
    "The capital of France is the city of",
]
"""Prompts before and after: the request's, a paraphrase, two other subjects', and one about the old object."""
WRITE = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
texts = []
for prompt in prompts:
    inputs = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    texts.append(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :]))
print(json.dumps(texts))
"""
"""A program that knows transformers alone."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen by hand for a model."""

    layers: tuple[int, ...]
    config: me.MemitConfig


CHOICES = {
    "smollm2": Choice(layers=(2, 3, 4, 5, 6), config=me.MemitConfig(covariance_weight=300.0, lr=0.5, steps=20)),
    "gemma3": Choice(layers=(5, 6, 7, 8, 9), config=me.MemitConfig(covariance_weight=100.0, lr=2.0)),
}


def written_by(folder: Path) -> list[str]:
    """What a fresh process writes after each prompt with the checkpoint in a folder."""
    command = [sys.executable, "-c", WRITE, str(folder), json.dumps(ASKED)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def early_site(effects: pd.DataFrame) -> str:
    """Where restoring gives most back, in a sentence."""
    means: Any = effects.groupby(["kind", "role", "layer"])["effect"].mean()
    total = (effects["clean"] - effects["corrupted"]).mean()
    mlp, state, last = means["mlp"]["subject_last"], means["state"]["subject_last"], means["state"]["last"]
    return (
        f"total effect {total:.2f}; at the subject's last token, MLPs around layer {mlp.idxmax()} give back "
        f"{mlp.max():.2f} and the state of layer {state.idxmax()} {state.max():.2f}; the last token's state reaches "
        f"half of its {last.max():.2f} in layer {last[last > last.max() / 2].index.min()}"
    )


def main() -> int:
    """Trace, edit, export, and let a fresh process write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", choices=list(REAL_MODELS))
    parser.add_argument("--texts", default="tiny", help="running text for second moments")
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens of it")
    parser.add_argument("--out", type=Path, required=True, help="folder for moments, edit and checkpoint")
    options = parser.parse_args()
    source, choice = make(options.model), CHOICES[options.model]
    model = me.load_model(source, device="cpu")
    config = me.TraceConfig(kinds=("state", "mlp"), samples=3, roles=("subject_last", "last"))
    print(f"trace: {early_site(me.trace_facts(model, FACTS, config))}", flush=True)
    moments_config = me.MomentsConfig(tokens=options.tokens, max_length=512)
    moments = me.collect_moments(model, options.texts, choice.layers, moments_config, options.out)
    edit = me.memit(model, [REQUEST], choice.layers, moments, ["{}"], choice.config)
    edit.save(options.out / "edit.safetensors")
    me.export(model, me.Edit.load(options.out / "edit.safetensors"), options.out / "edited")
    print(f"edit: layers {choice.layers}, exported to {options.out / 'edited'}", flush=True)
    after = written_by(options.out / "edited")
    for prompt, old, new in zip(ASKED, written_by(source), after, strict=True):
        print(f"{prompt!r}: {old!r} -> {new!r}")
    return 0 if after[0].strip().startswith(REQUEST.target_new) else 1


if __name__ == "__main__":
    run_script(main)
