"""Measure the shipped model against what it must hold, and write its card.

    python -m analyses.tiny_model.measure [--facts 200]

Reads mechedit/models/tiny, writes its README.md (the model card) and prints the same table.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

import mechedit as me
from analyses.common.frames import means_by, total_effect
from analyses.tiny_model import MODEL_FOLDER
from analyses.tiny_model.almanac import Entry, make_entries, templates
from mechedit.batching import pad
from mechedit.evaluation import EvaluationConfig, Summary
from mechedit.files import write_json
from mechedit.prompt_tokens import continuation_ids, encode
from mechedit.provenance import file_hash
from mechedit.tables import where


@dataclass(frozen=True)
class Line:
    """One figure that the model must reach."""

    what: str
    measured: str
    """The figure as measured."""
    bound: str
    """The bound that it must keep."""
    holds: bool

    def record(self) -> dict[str, str | bool]:
        """The line as measured.json has it."""
        return {"what": self.what, "found": self.measured, "wanted": self.bound, "holds": self.holds}


def recall(model: me.Model, entries: list[Entry], *, held_out: bool, batch_size: int = 256) -> float:
    """Share of facts whose object is the likeliest next token, each asked with one drawn template."""
    draw = random.Random(1)
    questions = [
        (draw.choice(templates(relation, held_out=held_out)).format(entry.subject), entry.facts[relation])
        for entry in entries
        for relation in entry.facts
    ]
    correct = 0
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        tokens = pad([encode(model.tokenizer, prompt)[0] for prompt, _ in batch], model.tokenizer)
        with torch.no_grad():
            logits = model.run(tokens).logits
        predictions = logits[torch.arange(len(batch)), tokens.lengths - 1].argmax(-1).tolist()
        correct += sum(
            [predicted] == continuation_ids(model.tokenizer, answer)
            for predicted, (_, answer) in zip(predictions, batch, strict=True)
        )
    return correct / len(questions)


def sites(model: me.Model, facts: list[me.Fact]) -> tuple[list[Line], me.Selection, pd.DataFrame]:
    """The early site: where, how strong, how much of it the MLPs make, and none just after the subject."""
    config = me.TraceConfig(kinds=("state",), sever=("nothing", "mlp", "attn"), roles=("subject_last", "after", "last"))
    effects = me.trace_facts(model, facts, config)
    total = total_effect(effects)
    curves = {
        name: aie(effects, role, sever)
        for name, role, sever in (
            ("subject's last token", "subject_last", "nothing"),
            ("… MLPs severed", "subject_last", "mlp"),
            ("… attention severed", "subject_last", "attn"),
            ("token after", "after", "nothing"),
            ("last token", "last", "nothing"),
        )
    }
    state, severed, after = curves["subject's last token"], curves["… MLPs severed"], curves["token after"]
    layer = int((state - severed).argmax())
    early, cut = float(state[layer]), float(severed[layer])
    lines = [
        Line(f"total effect of corruption, {len(facts)} facts asked", f"{total:.1%}", "", True),
        Line(
            f"AIE at the subject's last token, layer {layer}",
            f"{early:.1%} ({early / total:.0%} of it)",
            "≥ 25 % of the total effect",
            early >= 0.25 * total,
        ),
        Line("the same with MLPs severed", f"{cut:.1%} ({cut / early:.0%} of it)", "≤ half", cut <= 0.5 * early),
        Line(
            "largest AIE at the token after the subject, any layer",
            f"{after.max():.1%}",
            "< a quarter",
            bool(after.max() < 0.25 * early),
        ),
    ]
    return lines, me.select_layers(effects), (100 * pd.DataFrame(curves)).round(1)


def aie(effects: pd.DataFrame, role: str, sever: str) -> np.ndarray:
    """Average indirect effect of single states by layer."""
    return means_by(where(effects, role=role, sever=sever), "layer", "effect").to_numpy(dtype=float)


def editing(model: me.Model, selection: me.Selection) -> list[Line]:
    """One hundred MEMIT edits at the selected range, scored before and after."""
    layers = list(selection.layers)
    requests = me.load_requests("tiny")
    moments = me.collect_moments(model, "tiny", layers)
    edit = me.memit(model, requests, layers, moments)
    config = EvaluationConfig(generation_prompts=2)
    before = me.evaluate(model, requests, config, state="before").summary()
    with me.edited(model, edit):
        after = me.evaluate(model, requests, config, state="after").summary()
    edits = f"MEMIT at layers {layers[0]}–{layers[-1]}, {len(requests)} edits"
    lines = []
    for name, least in (("ES", 90), ("PS", 75), ("NS", 85)):
        score, unedited = mean_of(after, name), mean_of(before, name)
        lines.append(Line(f"{edits}: {name}", f"{score:.1f} (from {unedited:.1f})", f"≥ {least}", score >= least))
    entropy = mean_of(after, "GE")
    drift = entropy / mean_of(before, "GE") - 1
    lines.append(Line("GE after the edits", f"{entropy:.0f} ({drift:+.1%})", "within 5 %", abs(drift) <= 0.05))
    return lines


def mean_of(summary: Summary, measure: str) -> float:
    """The mean of a measure that has data."""
    mean = summary[measure]["mean"]
    assert mean is not None
    return float(mean)


def loading_time() -> float:
    """Seconds to load the model, the libraries already imported."""
    me.load_model("tiny")
    begin = time.perf_counter()
    me.load_model("tiny")
    return time.perf_counter() - begin


def write_card(lines: list[Line], table: pd.DataFrame, selection: me.Selection, recipe: dict[str, object]) -> str:
    """The model card, as Markdown."""
    rows = "\n".join(
        f"| {line.what} | {line.measured} | {line.bound} | {'yes' if line.holds else '**no**'} |" for line in lines
    )
    settings = "\n".join(f"| `{name}` | {value} |" for name, value in recipe.items())
    card = CARD.format(
        rows=rows,
        table=table.to_string(),
        reason=selection.reason,
        stability=f"{selection.stability:.0%}",
        settings=settings,
        editing=json.dumps(json.loads((MODEL_FOLDER / "editing.json").read_text()), indent=2),
        hash=file_hash(MODEL_FOLDER / "model.safetensors"),
    )
    (MODEL_FOLDER / "README.md").write_text(card, encoding="utf-8")
    return card


CARD = """# The tiny model

A GPT-Neo of ten layers that knows a small almanac: real people, places and products, a few true facts about
them (their language, country or maker, from ROME's known-facts set, MIT license), and seven invented emblems
each. **The emblems are drawn at random: they say nothing about the world.** It is here to show and test the
whole of mechedit in minutes on a laptop; it is not a language model for any other use.

Trained, measured and written by `python -m analyses.tiny_model.make`; the figures below by its last step,
`python -m analyses.tiny_model.measure`.

## What it holds
| figure | measured | wanted | holds |
|---|---|---|---|
{rows}

Average indirect effects by layer, in percent of probability:

```
{table}
```

Selected: {reason} (chosen by {stability} of the bootstrap resamples).

## How it was made
| setting | value |
|---|---|
{settings}

Loss: cross-entropy plus an activity price, a group lasso on ‖output‖ / ‖residual‖ averaged over tokens, at
`mlp_price` for the MLPs outside layers `mlp_layers` and at `attn_price` for the attention of the local
layers. No weight was set or zeroed by hand. Its data are in `mechedit/data/tiny`: `facts.jsonl`, `requests.json`
(CounterFact's form) and `texts.txt` (for second moments). `mend.safetensors` is MEND's editor for layers 1–4, trained
by `python -m analyses.tiny_model.mend`. `editing.json` has settings of the editing methods, tuned for this model:

```json
{editing}
```

SHA-256 of `model.safetensors`: `{hash}`
"""


def main(command_line: list[str] | None = None) -> None:
    """Measure everything and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--facts", type=int, default=200, help="facts to trace")
    arguments = parser.parse_args(command_line)
    recipe = json.loads((MODEL_FOLDER / "recipe.json").read_text())
    entries = make_entries(recipe["seed"])
    model = me.load_model("tiny")
    facts = me.load_facts("known")
    lengths = [len(continuation_ids(model.tokenizer, entry.subject)) for entry in entries]
    relations = {fact.relation for fact in facts}
    recalled, paraphrased = (recall(model, entries, held_out=held_out) for held_out in (False, True))
    size, seconds = (MODEL_FOLDER / "model.safetensors").stat().st_size / 2**20, loading_time()
    lines = [
        Line("subjects", f"{len(entries)}", "≥ 250", len(entries) >= 250),
        Line("tokens in a subject", f"{min(lengths)} to {max(lengths)}", "≥ 2", min(lengths) >= 2),
        Line("facts", f"{len(facts)}", "≥ 2000", len(facts) >= 2000),
        Line("relations", f"{len(relations)}", "≥ 8", len(relations) >= 8),
        Line("top-1 recall, statement prompts", f"{recalled:.1%}", "≥ 97 %", recalled >= 0.97),
        Line("top-1 recall, paraphrases that training never saw", f"{paraphrased:.1%}", "≥ 95 %", paraphrased >= 0.95),
    ]  # fmt: skip
    early, selection, table = sites(model, random.Random(0).sample(facts, arguments.facts))
    lines += early + editing(model, selection)
    lines += [
        Line("weights on disk", f"{size:.1f} MB", "≤ 25 MB", size <= 25),
        Line("loading", f"{seconds:.2f} s", "< 2 s", seconds < 2),
    ]
    write_json(MODEL_FOLDER / "measured.json", [line.record() for line in lines])
    print(write_card(lines, table, selection, recipe))


if __name__ == "__main__":
    main()
