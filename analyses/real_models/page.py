"""All that can be said of one model, in a folder to cite: how it recalls, which layers were chosen, what edits do.

    python -m analyses.real_models.page MODEL --facts FILE --requests FILE --texts FILE --out DIR [-- OPTION …]

Runs `mechedit run` on MODEL (smollm2, gemma3, a hub name or a folder) with untuned settings into DIR/run, with the
options behind `--`; then lets the model write after five of the edited prompts and their paraphrases, before the edit
and after it; and writes DIR/README.md, with figures, scores, minutes and peak memory. Run again, it goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mechedit as me
from analyses.common.command import run_script
from analyses.common.printing import markdown_table
from analyses.real_models.make import REAL_MODELS, make
from mechedit.atomic import atomic
from mechedit.data import load_requests
from mechedit.edit import edited
from mechedit.errors import InputError
from mechedit.evaluation import measure_named
from mechedit.evaluation.generation import generate
from mechedit.files import read_json, write_json
from mechedit.provenance import VERSION
from mechedit.report import span
from mechedit.run_folder import read_stamps

FIGURES = {
    "figures/roles.png": "Average indirect effect of states, MLP windows and attention windows, by layer and token.",
    "figures/severed.png": "The state at the subject's last token restored, with nothing severed, MLPs, and attention.",
    "figures/selection.png": "The layers that each rule selects from this.",
    "figures/sweep.png": "Scores of edits by window of layers.",
    "figures/scores.png": "Scores before and after the edit.",
}
MEASURES = ("S", "ES", "PS", "NS", "exact_match", "EM", "PM", "NM", "GE")
WRITTEN = 5
"""Edits after whose prompts the model writes."""
TOKENS = 12
"""Tokens that it writes."""


@dataclass
class Cost:
    """Minutes and memory of the command, over all calls that it took."""

    minutes: float | int = 0.0
    gib: float | int = 0.0
    """Peak resident memory of its process."""
    calls: int = 0

    def add(self, command: Sequence[str]) -> int:
        """Run a command and add what it took; its exit code."""
        begin, self.calls = time.monotonic(), self.calls + 1
        try:
            return subprocess.run(command, check=False).returncode
        finally:  # what an interrupted call took counts too
            self.minutes += (time.monotonic() - begin) / 60
            self.gib = max(self.gib, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20)


def run(options: argparse.Namespace, source: str) -> Cost:
    """`mechedit run`; what it took is kept in DIR/cost.json.

    Raises:
        InputError: it ended without an edit.
    """
    file = options.out / "cost.json"
    cost = Cost(**read_json(file)) if file.is_file() else Cost()
    command = [sys.executable, "-m", "mechedit", "run", "--no-tuned", "--model", source]
    command += ["--out", str(options.out / "run")]
    for name in ("facts", "requests", "texts"):
        if getattr(options, name):
            command += [f"--{name}", str(getattr(options, name))]
    try:
        code = cost.add([*command, *options.options])
    finally:
        write_json(file, vars(cost))
    if code:
        raise InputError(f"mechedit run ended with {code}, expected an edit; see what it said")
    return cost


def free_text(model: me.Model, folder: Path, requests: Sequence[me.EditRequest]) -> list[list[str]]:
    """Rows of prompt, new object, text before the edit and after it, for some of the edited requests."""
    edit = me.Edit.load(folder / "edit.safetensors")
    by_id = {request.id: request for request in requests}
    some_requests = [by_id[name] for name in random.Random(0).sample(list(edit.manifest["requests"]), WRITTEN)]
    pairs = [
        (prompt, request.target_new.strip())
        for request in some_requests
        for prompt in (request.prompt.replace("{}", request.subject), *request.paraphrases[:1])
    ]
    prompts = [prompt for prompt, _ in pairs]
    before = generate(model, prompts, tokens=TOKENS)
    with edited(model, edit):
        after = generate(model, prompts, tokens=TOKENS)
    return [
        [prompt, new, *(" ".join(text.split()) for text in texts)]
        for (prompt, new), *texts in zip(pairs, before, after, strict=True)
    ]


def page(options: argparse.Namespace, cost: Cost, texts: Sequence[Sequence[str]]) -> str:
    """The page, from the files of the run."""
    folder = options.out / "run"
    selection, summary = me.Selection.load(folder / "selection.json"), read_json(folder / "summary.json")
    model = read_stamps(folder)["trace"]["model"]
    edit = me.Edit.load(folder / "edit.safetensors")
    sections = [
        f"# {options.model}",
        f"Weights `{model['weights_hash'][:16]}`, {model['dtype']}, {selection.n_facts} known facts traced, "
        f"{len(edit.manifest['requests'])} edits with {edit.manifest['method']}. {cost.minutes:.0f} minutes in "
        f"{cost.calls} call{'s' if cost.calls > 1 else ''}, at most {cost.gib:.1f} GiB, on {os.cpu_count()} CPU cores "
        f"({platform.machine()}).",
        "## Layers",
        f"**Layers {span(selection.layers)}.** {selection.reason[:1].upper()}{selection.reason[1:]}.",
        markdown_table(
            ["rule", "layers", "agreement", "stability"],
            [[name, span(r.layers), f"{r.agreement:.0%}", f"{r.stability:.0%}"] for name, r in selection.rules.items()],
        ),
        *windows(selection.validation),
        "## Scores",
        scores(summary),
        "## What it writes",
        markdown_table(["prompt", "new object", "before", "after"], texts),
        "## Figures",
        *(f"![{caption}](run/{name})\n\n*{caption}*" for name, caption in FIGURES.items() if (folder / name).is_file()),
        "## Again",
        f"```sh\n{shlex.join(['python', '-m', 'analyses.real_models.page', *sys.argv[1:]])}\n```",
        f"mechedit {VERSION}, "
        + ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "transformer_lens", "nnsight")),
    ]
    return "\n\n".join(sections) + "\n"


def windows(validation: Mapping[str, Any]) -> list[str]:
    """The windows that were edited, the best first; those of the finals with more requests."""
    rounds = {f"{validation.get('n_requests')} requests": validation.get("windows", [])}
    if finals := validation.get("finals"):
        rounds[f"{finals['n_requests']} requests, the best once more"] = finals["windows"]
    tables = []
    for name, records in rounds.items():
        if records:
            ordered = sorted(records, key=lambda record: -record["score"])
            rows = [[span(r["layers"]), f"{r['score']:.1f} [{r['low']:.1f}, {r['high']:.1f}]"] for r in ordered]
            tables += [f"Edits by window, {name}:", markdown_table(["layers", validation["score"]], rows)]
    return tables


def scores(summary: Mapping[str, Any]) -> str:
    """The measures before and after, in percent."""
    states = ("before", "after")
    rows = [
        [name, *(entry(summary[state][name], name) for state in states)]
        for name in MEASURES
        if all(name in summary[state] for state in states)
    ]
    return markdown_table(["measure", *states], rows)


def entry(measured: Mapping[str, Any], name: str) -> str:
    """A mean with its interval."""
    digits = measure_named(name).digits
    return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*(measured[end] for end in ("mean", "low", "high")), d=digits)


def parser() -> argparse.ArgumentParser:
    """The options."""
    described = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    described.add_argument("model", help="smollm2, gemma3, a hub name or a folder")
    described.add_argument("--facts", help="as those of mechedit run")
    described.add_argument("--requests", help="as those of mechedit run")
    described.add_argument("--texts", help="as those of mechedit run")
    described.add_argument("--out", type=Path, required=True, help="folder for the run and the page")
    return described


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, and under `options` those of `mechedit run`, which stand behind `--`."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return argparse.Namespace(**vars(parser().parse_args(arguments[:end])), options=list(arguments[end + 1 :]))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write, and say where."""
    options = read_arguments(sys.argv[1:] if arguments is None else arguments)
    source = str(make(options.model)) if options.model in REAL_MODELS else options.model
    cost = run(options, source)
    model = me.load_model(source, device="cpu")
    requests = load_requests(options.requests or "multi_counterfact", conflicts="first")
    texts = free_text(model, options.out / "run", requests)
    with atomic(options.out / "README.md") as temporary:
        temporary.write_text(page(options, cost, texts), encoding="utf-8")
    print(f"see {options.out / 'README.md'}")
    return 0


if __name__ == "__main__":
    run_script(main)
