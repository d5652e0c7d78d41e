"""What a margin that ends the search for z (`TargetSettings.margin`) changes: scores after editing, and time.

    python -m analyses.real_models.margin MODEL [--texts FILE] [--requests FILE] [--count N] [--layers 4-8] --out DIR

MODEL is `tiny`, smollm2, gemma3 or a folder. MEMIT edits the same requests with every margin, and the search alone is
timed. A row is written to DIR/margin.csv when it is measured and not measured again: a run that was ended goes on.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

import mechedit as me
from analyses.common.command import run_script
from analyses.common.csv_files import write_csv
from analyses.real_models.make import REAL_MODELS, make
from mechedit.cli.parsing import parse_layers
from mechedit.evaluation import QUICK
from mechedit.methods import recommended
from mechedit.prefixes import make_prefixes

LEARNING_RATE = 0.5
"""Absolute, as published."""
MARGINS = (None, 0.0, 1.0, 2.0, 4.0)
"""Margins in nats; None is off."""
MEASURES = ("ES", "PS", "NS", "exact_match")
"""What is measured after editing, in percent."""


def measure(
    model: me.Model,
    requests: Sequence[me.EditRequest],
    layers: Sequence[int],
    moments: dict[int, me.SecondMoment],
    prefixes: Sequence[str],
    config: me.MemitConfig,
) -> dict[str, Any]:
    """A row of the table: how the search went and how long it took, then the scores after editing."""
    start = time.perf_counter()
    targets = me.find_targets(model, requests, layers[-1], prefixes, config.targets)
    seconds = time.perf_counter() - start
    edit = me.memit(model, requests, layers, moments, prefixes, config, targets=targets)
    with me.edited(model, edit):
        summary = me.evaluate(model, requests, QUICK).summary()
    return {
        "margin": "off" if config.margin is None else f"{config.margin:g}",
        "requests": len(requests),
        "seconds": seconds,
        "updates": targets.summary["updates"].mean(),
        "probability": targets.summary["probability"].mean(),
        **{measure: summary[measure]["mean"] for measure in MEASURES if measure in summary},
    }


def rows(options: argparse.Namespace) -> Iterator[pd.DataFrame]:
    """The table so far, after each row."""
    source = make(options.model) if options.model in REAL_MODELS else options.model
    model = me.load_model(source, device=options.device)
    requests = me.load_requests(options.requests, conflicts="first")[: options.count]
    layers = parse_layers(options.layers)
    amount = me.MomentsConfig(tokens=options.tokens, max_length=options.max_length)
    moments = me.collect_moments(model, options.texts, layers, amount, options.out)
    prefixes = make_prefixes(model)
    file = options.out / "margin.csv"
    table = pd.read_csv(file, dtype={"margin": str}) if file.is_file() else pd.DataFrame({"margin": []})
    for margin in options.margins:
        if ("off" if margin is None else f"{margin:g}") in set(table["margin"]):
            continue
        settings = {"covariance_weight": options.covariance_weight, "lr": LEARNING_RATE, "margin": margin}
        config: Any = replace(recommended("memit", model), **settings)
        row = measure(model, requests, layers, moments, prefixes, config)
        table = pd.concat([table, pd.DataFrame([row])], ignore_index=True)
        write_csv(table, file)
        yield table
    yield table


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help=f"tiny, {', '.join(REAL_MODELS)}, or a folder")
    parser.add_argument("--requests", default="tiny")
    parser.add_argument("--count", type=int, default=100, help="requests, from the first")
    parser.add_argument("--texts", default="tiny", help="running text for second moments")
    parser.add_argument("--tokens", type=int, default=40_000, help="tokens of it")
    parser.add_argument("--max-length", type=int, default=256, help="tokens read at once")
    parser.add_argument("--layers", default="4-8")
    parser.add_argument("--covariance-weight", type=float, default=100.0)
    parser.add_argument("--margins", type=_margins, default=MARGINS, help="such as off,0,2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True, help="folder for moments and margin.csv")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    *_, table = rows(options)
    print(table.round(3).to_string(index=False))
    return 0


def _margins(text: str) -> tuple[float | None, ...]:
    return tuple(None if part == "off" else float(part) for part in text.split(","))


if __name__ == "__main__":
    run_script(main)
