"""What tuned settings are worth on facts and relations that nobody tuned with, beside untuned ones.

    python -m analyses.real_models.tuned MODEL --tuned FILE --layers 3-8 --requests FILE --moments DIR --out DIR

MODEL is tiny, smollm2, gemma3 or a folder; `--tuned` what `mechedit tune` wrote; `--layers` those that are edited with
untuned settings, such as the choice of `mechedit run`. Requests are of relations, about subjects and in words that none
of the requests has with which the settings were tuned. Each choice edits all of them at once, from the unedited model.
Results are kept in `--out`: a call goes on where the last one stopped.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

import mechedit as me
from analyses.common.command import run_script
from analyses.common.frames import records
from analyses.real_models.make import REAL_MODELS, make
from analyses.real_models.regret import RESAMPLES, print_table, score
from mechedit.cli.parsing import parse_layers
from mechedit.data import load_requests
from mechedit.errors import InputError, brief, check_at_least
from mechedit.files import write_json
from mechedit.methods import METHODS, TunedSettings
from mechedit.sweep import Sweep, sweep_windows
from mechedit.sweep.sweep import by_case

METHOD = "memit"


@dataclass(frozen=True)
class Choice:
    """Layers, and the settings to edit them with."""

    layers: tuple[int, ...]
    config: Any


def choices(model: me.Model, file: Path, layers: Sequence[int]) -> dict[str, Choice]:
    """Tuned layers with tuned settings, with untuned ones, and other layers with untuned ones."""
    tuned: Any = METHODS[METHOD].recommendation(model, file=file)
    untuned: Any = METHODS[METHOD].recommendation(model, tuned=False).config
    return {
        "untuned": Choice(tuple(layers), untuned),
        "tuned layers, untuned settings": Choice(tuple(tuned.layers), untuned),
        "tuned": Choice(tuple(tuned.layers), tuned.config),
    }


def other_requests(
    requests: Sequence[me.EditRequest], tuned_with: Sequence[str], count: int, seed: int
) -> list[me.EditRequest]:
    """A seeded sample of requests with true objects, of which no subject, no prompt and no relation was tuned with.

    Args:
        requests: those that can be drawn, and those that were tuned with.
        tuned_with: ids of these.
        count: how many.
        seed: of the draw.

    Raises:
        InputError: there are fewer; or not all that was tuned with is there, so that the requests are of another file.
    """
    check_at_least("--facts", count, 1)
    used = [request for request in requests if request.id in set(tuned_with)]
    missing = sorted(set(tuned_with) - {request.id for request in used})
    if missing:
        raise InputError(
            f"{len(missing)} of the {len(set(tuned_with))} requests that were tuned with are not there, such as "
            f"{brief(missing[0])}; expected the file that `mechedit tune` took: give it as --requests"
        )
    subjects, prompts = ({getattr(request, name) for request in used} for name in ("subject", "prompt"))
    relations = {request.relation for request in used if request.relation}
    others = {
        request.subject: request
        for request in requests
        if request.target_true
        and request.subject not in subjects
        and request.prompt not in prompts
        and request.relation not in relations
    }
    if len(others) < count:
        raise InputError(
            f"there are {len(others)} requests of other relations, about other subjects and in other words than the "
            f"{len(used)} that were tuned with, expected {count}; lower --facts"
        )
    return random.Random(seed).sample(list(others.values()), count)


def cases_of(sweep: Sweep) -> Float[np.ndarray, "case measure"]:
    """Each request's measures of the score, of a sweep of one window."""
    return by_case(sweep.cases, list(dict.fromkeys(sweep.cases["case"])), sweep.score_measures)


def gain(
    values: Float[np.ndarray, "case measure"], untuned: Float[np.ndarray, "case measure"], seed: int = 0
) -> dict[str, float]:
    """Points of the score by which the one is better, with its 95 % interval over resamples of the requests."""
    both = np.stack([values, untuned])
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    scores = [score(measured[drawn]) for measured in both]
    low, high = np.quantile(scores[0] - scores[1], (0.025, 0.975))
    mine, others = score(both)
    return {"gain": float(mine - others), "low": float(low), "high": float(high)}


def table(sweeps: Mapping[str, Sweep]) -> pd.DataFrame:
    """One row a choice: layers, scores, and the gain over the first."""
    rows = []
    first = cases_of(next(iter(sweeps.values())))
    for name, sweep in sweeps.items():
        means: Any = sweep.table.set_index("measure")["mean"]
        (window,) = sweep.windows
        rows.append({
            "settings": name, "layers": f"{window.first}–{window.last}",
            **{measure: float(means[measure]) for measure in (sweep.score, *sweep.score_measures, "exact_match")},
            **gain(cases_of(sweep), first),
        })  # fmt: skip
    return pd.DataFrame(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Edit with each choice, score, print."""
    options = parser().parse_args(arguments)
    layers = parse_layers(options.layers)
    if layers[-1] - layers[0] + 1 != len(layers):
        raise InputError(f"--layers is {options.layers}, expected layers that follow each other; give them as 3-8")
    record = TunedSettings.load(options.tuned, METHOD).record
    requests = other_requests(
        load_requests(options.requests, conflicts="first"), record["requests"], options.facts, options.seed
    )
    model = me.load_model(make(options.model) if options.model in REAL_MODELS else options.model, device="cpu")
    tried = choices(model, options.tuned, layers)
    moments = me.load_moments(
        options.moments, sorted({layer for choice in tried.values() for layer in choice.layers}), model
    )
    sweeps = {
        name: sweep_windows(
            model, requests, moments, [(choice.layers[0], choice.layers[-1])], config=choice.config,
            parts=options.out / "parts", cache=options.out / "targets",
        )
        for name, choice in tried.items()
    }  # fmt: skip
    frame = table(sweeps)
    write_json(options.out / "gains.json", {"model": options.model, "rows": records(frame)})
    print_table(frame)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    described = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    described.add_argument("model", help="tiny, smollm2, gemma3 or a folder")
    described.add_argument("--tuned", type=Path, required=True, help="file of mechedit tune")
    described.add_argument("--layers", required=True, help="layers of the untuned edit, such as 3-8")
    described.add_argument("--requests", default="counterfact", help="the file or name that was tuned with")
    described.add_argument("--moments", type=Path, required=True, help="folder of the second moments")
    described.add_argument("--out", type=Path, default=Path("tuned"), help="folder for the results")
    described.add_argument("--facts", type=int, default=100, help="requests")
    described.add_argument("--seed", type=int, default=1)
    return described


if __name__ == "__main__":
    run_script(main)
