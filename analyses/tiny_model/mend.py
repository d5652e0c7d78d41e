"""MEND's editor for the tiny model, trained on facts and relations that are not scored, and the scores of single edits.

    python -m analyses.tiny_model.mend --out mend [--steps 1000]

The requests that ship with the model are scored, each edited alone. The editor is trained on none of their subjects,
and on none of the relations in `UNSEEN`, so that the scores of requests of these are of facts and relations that it
never saw. An interrupted training goes on from its checkpoint. Writes into the folder:

- `mend.safetensors`: the editor, for layers 1 to 4;
- `mend.csv`: its validation curve;
- `mend_scores.csv`: ES, PS, NS and exact match, for all requests, those of seen and those of unseen relations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from analyses.common.command import run_script
from analyses.common.counterfacts import counterfacts
from analyses.common.csv_files import write_csv
from analyses.common.mend_scores import mend_scores
from mechedit.data import EditRequest, load_facts, load_requests
from mechedit.methods import MEND_FILE, MendTrainingConfig, train_mend
from mechedit.models import load_model

LAYERS = (1, 2, 3, 4)
"""Where the tiny model recalls."""
UNSEEN = ("colour", "dish", "stone")
"""Relations of which no fact is trained with."""
DRAWS = 10
"""Times that other new objects and neighbors are drawn for the facts that are trained with."""
SETTINGS = MendTrainingConfig(
    steps=1000,
    batch_size=4,
    rank=128,
    lr=1e-3,
    rate=1e-3,
    text_tokens=32,
    neighbors=2,
    validation=12,
    validate_every=100,
)
"""Settings for this model; the learning rate is larger than the default since the steps are few."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("mend"), help="folder for the files")
    parser.add_argument("--steps", type=int, default=SETTINGS.steps, help="steps of the training")
    parser.add_argument(
        "--neighbors", type=int, default=SETTINGS.neighbors, help="neighbors that each edit should leave"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a training of other settings")
    options = parser.parse_args(arguments)
    model = load_model("tiny")
    scored = load_requests("tiny")
    config = replace(SETTINGS, steps=options.steps, neighbors=options.neighbors)
    editor = train_mend(
        model, training_requests(scored), "tiny", LAYERS, config, options.out / MEND_FILE,
        overwrite=options.overwrite, notify=print,
    )  # fmt: skip
    write_csv(pd.DataFrame(editor.record["curve"]), options.out / "mend.csv")
    relations = ["unseen" if request.relation in UNSEEN else "seen" for request in scored]
    table = mend_scores(model, scored, LAYERS, options.out / MEND_FILE, relations)
    write_csv(table, options.out / "mend_scores.csv")
    print(table.to_string(index=False))
    return 0


def training_requests(scored: Sequence[EditRequest]) -> list[EditRequest]:
    """Requests about other subjects than those that are scored, of seen relations, with several new objects each."""
    subjects = {request.subject for request in scored}
    facts = [fact for fact in load_facts("known") if fact.subject not in subjects and fact.relation not in UNSEEN]
    return [
        replace(request, id=f"{request.id}/{draw}")
        for draw in range(DRAWS)
        for request in counterfacts(facts, seed=draw)
    ]


if __name__ == "__main__":
    run_script(main)
