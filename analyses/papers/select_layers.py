"""Which layers of a model hold its facts: everything that speaks for the answer, in a folder that can be cited.

    python -m analyses.papers.select_layers MODEL [--facts F] [--requests R] [--texts T] [--out DIR] [--quick]

MODEL is `tiny`, a hub name or a folder with a checkpoint of any shape that mechedit loads. The folder gets the
trace (states, MLP windows and attention windows at every token; states at the subject's last token with MLPs or
attention severed), the selection by every rule beside the ranges published for the model, a sweep of held-out edits
over windows of layers, figures, report.html, and a README.md that says what was found, from what, and how to make
it again. Run again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from analyses.common.checks import check_options
from analyses.common.command import run_script
from analyses.common.frames import groups_of, records
from analyses.common.printing import markdown_table
from mechedit import pipeline
from mechedit.atomic import atomic
from mechedit.cli.options import suited_data
from mechedit.cli.parsing import load_quietly, sampled
from mechedit.data import load_facts, load_requests, tiny_data
from mechedit.evaluation import Summary
from mechedit.figures import run_figures
from mechedit.methods import METHODS
from mechedit.moments import MomentsConfig
from mechedit.provenance import VERSION, file_hash
from mechedit.report import span, write_report
from mechedit.run_folder import RunFolder
from mechedit.selection import SelectConfig, Selection
from mechedit.sweep import Sweep, SweepConfig, windows_of
from mechedit.trace import TraceConfig

LIBRARIES = ("torch", "transformers", "transformer_lens", "nnsight", "numpy", "pandas")
QUICK = {"facts": 20, "samples": 3, "requests": 8, "tokens": 20_000}
FULL = {"facts": 200, "samples": 10, "requests": 20, "tokens": 2_000_000}


def main() -> int:
    """Trace, select, sweep, draw, write; the exit code is that of `mechedit select`."""
    options = read_arguments()
    size = QUICK if options.quick else FULL
    check_options(options)
    select = SelectConfig(rule=options.rule, seed=options.seed)
    sweep = SweepConfig(by=options.by, width=options.width, requests=size["requests"], seed=options.seed)
    reading = MomentsConfig(tokens=(size["tokens"] if options.tokens is None else options.tokens) or None)
    run = RunFolder.at(options.out or f"select_{Path(options.model).name}", overwrite=options.overwrite)
    facts = sampled(
        load_facts(options.facts), size["facts"] if options.max_facts is None else options.max_facts, options.seed
    )
    requests = load_requests(options.requests, conflicts="first")
    model = load_quietly(
        options.model, options.backend, options.device, options.dtype, allow_pickle=options.allow_pickle
    )

    if options.width is not None:
        windows_of(model.n_layers, options.width)  # refuses a width that the model lacks
    severed = TraceConfig(sever=("nothing", "mlp", "attn"), samples=size["samples"], seed=options.seed)
    pipeline.trace_step(run, model, facts, severed, least=select.min_facts)
    selection = pipeline.select_step(run, select)
    print(selection.reason)
    if selection.layers or options.width:
        settings = METHODS["memit"].recommendation(model, tuned=not options.no_tuned)
        for source in settings.sources:
            print(f"settings of memit: {source.in_words()}")
        selection = pipeline.validate_step(
            run, model, selection, requests, options.texts, sweep, "memit", settings.config, reading
        )
        print(selection.validation["verdict"])
    write_report(run.path, draw=run_figures)
    card = write_card(run, selection, options)
    print(f"see {card} and {run.path / 'report.html'}")
    return 0 if selection.layers else 3


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="tiny, a hub name or a folder")
    suited = "; by default as `mechedit run` takes them for this model"
    parser.add_argument("--facts", help=f"facts to trace{suited}")
    parser.add_argument("--requests", help=f"edit requests for the sweep{suited}")
    parser.add_argument("--texts", help=f"running text for second moments{suited}")
    parser.add_argument("--out", type=Path, help="by default select_MODEL")
    parser.add_argument("--quick", action="store_true", help=f"a first look: {QUICK} in place of {FULL}")
    parser.add_argument("--max-facts", type=int, help="trace a seeded sample of so many facts")
    parser.add_argument("--tokens", type=int, help="tokens of text for second moments; 0 for all")
    parser.add_argument("--rule", default="contribution")
    parser.add_argument("--by", default="trace", help="trace, sweep or both")
    parser.add_argument("--width", type=int, help="of the windows swept; by default that of the selected range")
    parser.add_argument("--backend", default="transformer_lens")
    parser.add_argument("--device")
    parser.add_argument("--dtype")
    parser.add_argument("--allow-pickle", action="store_true", help="read weights in pickle, as those of GPT-J are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-tuned", action="store_true", help="leave settings out that mechedit tune chose")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args()
    for name, source in suited_data(options.model).items():
        setattr(options, name, getattr(options, name) or source)
    return options


def write_card(run: RunFolder, selection: Selection, options: argparse.Namespace) -> Path:
    """Write README.md: what was found, from what, and how to make it again."""
    sections = [
        f"# Layers of {options.model}",
        answer(selection),
        "## Ranges by rule",
        rules(selection),
        *(["## Edits by window", edits(run, selection)] if selection.validation else []),
        "## Made from",
        made_from(run, options),
        "## Again",
        again(),
    ]
    with atomic(run.path / "README.md") as temporary:
        temporary.write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return run.path / "README.md"


def answer(selection: Selection) -> str:
    """The answer, how stable it is, and what edits say of it."""
    by = selection.validation.get("by", "trace")
    drawn = "requests" if by == "sweep" else "facts"
    chosen = {"trace": f"the rule {selection.rule}", "sweep": "the scores of edits"}.get(by, "edits and trace")
    lines = [
        f"**{'Layers ' + span(selection.layers) if selection.layers else 'No layers'}** (counted from 0), by {chosen}, "
        f"on {selection.n_facts} facts. {sentence(selection.reason)}",
        f"Stability: {selection.stability:.0%} of bootstrap resamples of the {drawn} give exactly this range.",
    ]
    if selection.validation:
        lines += [sentence(line) for line in (selection.validation["verdict"], *notes(selection))]
    else:
        lines += ["No range was swept with edits, since none was selected."]
    return "\n\n".join(lines)


def notes(selection: Selection) -> list[str]:
    """The warnings of the sweep, but for the verdict."""
    return [line for line in selection.validation["warnings"] if line != selection.validation["verdict"]]


def sentence(text: str) -> str:
    """The text with a capital and a full stop."""
    return f"{text[:1].upper()}{text[1:]}."


def rules(selection: Selection) -> str:
    """The range that each rule selects, beside the ranges published for this model."""
    rows = [
        [name, span(rule.layers), f"{rule.stability:.0%}", span(rule.modal)] for name, rule in selection.rules.items()
    ]
    text = markdown_table(["rule", "layers", "resamples that agree", "most frequent"], rows)
    if not selection.published:
        return text + "\n\nNo range is published for a model of this name."
    published = [
        [f"{entry.method} ({entry.model})", span(entry.layers), entry.source, entry.note]
        for entry in selection.published
    ]
    return text + "\n\nPublished:\n\n" + markdown_table(["method", "layers", "source", "note"], published)


def edits(run: RunFolder, selection: Selection) -> str:
    """Every window's scores, in percent with 95% intervals over requests."""
    sweep = Sweep.load(run.path)
    measures = [name for name in ("ES", "PS", "NS", sweep.score, "left") if name in set(sweep.table["measure"])]
    measures = list(dict.fromkeys(measures))
    by_window = {
        ends: {row["measure"]: row for row in records(rows)} for ends, rows in groups_of(sweep.table, ["first", "last"])
    }
    rows = [["unedited", "", *(interval(sweep.before, name) for name in measures)]]
    for record in selection.validation["windows"]:
        window = by_window[record["layers"][0], record["layers"][-1]]
        contribution = f"{100 * record['contribution']:.1f}"
        rows.append([span(record["layers"]), contribution, *(interval(window, name) for name in measures)])
    validation = selection.validation
    return (
        f"{validation['method'].upper()} with {validation['n_requests']} requests at once, "
        f"{validation['held_out']} of them about subjects that were not traced.\n\n"
        + markdown_table(["layers", "contribution", *measures], rows)
        + "\n\nContribution: what the MLPs of the window add in the trace, in percent of probability. left: how much "
        "of the change wanted of the hidden states was not reached, in percent. Brackets: 95% intervals over requests."
    )


def interval(summary: Summary, measure: str) -> str:
    """Mean and interval of a measure; empty without data."""
    if measure not in summary:
        return ""
    mean, low, high = (summary[measure][end] for end in ("mean", "low", "high"))
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def made_from(run: RunFolder, options: argparse.Namespace) -> str:
    """Model, inputs and settings, with their hashes."""
    steps = run.stamps()
    model = steps["trace"]["model"]
    rows = [
        ["model", model["model"]],
        ["weights (SHA-256)", model["weights_hash"]],
        ["tokenizer (SHA-256)", model["tokenizer_hash"]],
        ["precision", model["dtype"]],
    ]
    for what, source, file in (
        ("facts", options.facts, "facts.jsonl" if options.facts == "known" else options.facts),
        ("requests", options.requests, "requests.json" if options.requests == "tiny" else options.requests),
        ("texts", options.texts, "texts.txt" if options.texts == "tiny" else options.texts),
    ):
        path = tiny_data(file) if source in ("known", "tiny") else Path(file)
        rows.append([what, f"{source}, SHA-256 {file_hash(path)}" if path.is_file() else source])
    for step, names in (
        ("trace", ("samples", "noise", "corruption", "window", "seed")),
        ("sweep", ("method", "settings")),
    ):
        stamp: dict[str, Any] = {**steps.get(step, {}), **(steps.get(step, {}).get("settings") or {})}
        rows += [[f"{step}: {name}", stamp[name]] for name in names if stamp.get(name) is not None]
    return markdown_table(["", ""], rows)


def again() -> str:
    """The command, and the versions it ran with."""
    versions = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    command = shlex.join(["python", "-m", "analyses.papers.select_layers", *sys.argv[1:]])
    return f"```sh\n{command}\n```\n\nmechedit {VERSION}, Python {platform.python_version()}, {versions}."


if __name__ == "__main__":
    run_script(main)
