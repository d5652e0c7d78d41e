"""MEND's editor for a pretrained model, trained on facts that are not scored; scores of single edits.

    python -m analyses.real_models.mend MODEL --requests FILE --scored FILE --texts FILE --out DIR

MODEL is smollm2, gemma3 or a folder. Of the requests, two ask for one kind of object where a chain of requests with
objects in common joins them: relations whose objects are of different kinds are different ones. The editor is trained
on the largest kind, without the subjects of `--scored`. Each edited alone are the requests of `--scored`, of whatever
relations, and, as *unseen*, a sample of the requests of all other kinds. An interrupted training goes on from its
checkpoint. Writes into the folder:

- `mend.safetensors`: the editor, for the last three layers;
- `mend.csv`: its validation curve;
- `mend_scores.csv`: ES, PS, NS and exact match.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

import analyses.tiny_model.mend as tiny_model
import mechedit as me
from analyses.common.command import run_script
from analyses.common.csv_files import write_csv
from analyses.common.mend_scores import mend_scores
from analyses.real_models.make import REAL_MODELS, make
from analyses.real_models.regret import print_table
from mechedit.cli.train_mend import PUBLISHED_BLOCKS
from mechedit.data import load_requests
from mechedit.errors import InputError, check_at_least
from mechedit.methods import MEND_FILE

SETTINGS = replace(tiny_model.SETTINGS, steps=2000, rank=256, text_tokens=16, neighbors=1, validation=20)
"""Those of the tiny model's editor, but for more steps, a larger rank, shorter texts and a record's one neighbor."""


def kinds(requests: Sequence[me.EditRequest]) -> list[int]:
    """The kind of object that each request asks for, 0 being the most frequent."""
    old, new = [request.target_true or request.target_new for request in requests], [r.target_new for r in requests]
    objects = {text: index for index, text in enumerate(sorted({*old, *new}))}
    ends = [objects[text] for text in old], [objects[text] for text in new]
    joined = coo_array((np.ones(len(requests)), ends), shape=(len(objects), len(objects)))
    of_requests = connected_components(joined, directed=False)[1][ends[1]].tolist()
    order = {value: rank for rank, (value, _) in enumerate(Counter(of_requests).most_common())}
    return [order[value] for value in of_requests]


def divided(
    requests: Sequence[me.EditRequest], scored: Sequence[me.EditRequest], count: int, seed: int = 0
) -> tuple[list[me.EditRequest], list[me.EditRequest]]:
    """Those to train with, and a sample of `count` of those of unseen relations, about subjects of neither."""
    taken = {request.subject for request in scored}
    of_kind = list(zip(requests, kinds(requests), strict=True))
    trained = [request for request, kind in of_kind if kind == 0 and request.subject not in taken]
    taken |= {request.subject for request in trained}
    others = [request for request, kind in of_kind if kind > 0 and request.subject not in taken]
    return trained, random.Random(seed).sample(others, min(count, len(others)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, score, write."""
    options = parser().parse_args(arguments)
    check_at_least("--count", options.count, 0)
    requests, scored = (
        [request for request in load_requests(source, conflicts="first") if request.target_true]
        for source in (options.requests, options.scored)
    )
    if not scored:
        raise InputError(f"no request of {options.scored!r} has a true object, expected some: ES compares with it")
    trained, unseen = divided(requests, scored, options.count)
    if len(unseen) < options.count:
        print(f"{len(unseen)} requests are of unseen relations, of {options.count}")
    model = me.load_model(make(options.model) if options.model in REAL_MODELS else options.model, device="cpu")
    layers = list(range(max(model.n_layers - PUBLISHED_BLOCKS, 0), model.n_layers))
    changes = {name: getattr(options, name) for name in ("steps", "batch_size", "rank", "lr", "rate")}
    editor = me.train_mend(
        model, trained, options.texts, layers, replace(SETTINGS, **changes), options.out / MEND_FILE,
        overwrite=options.overwrite, notify=print,
    )  # fmt: skip
    write_csv(pd.DataFrame(editor.record["curve"]), options.out / "mend.csv")
    relations = ["scored"] * len(scored) + ["unseen"] * len(unseen)
    table = mend_scores(model, [*scored, *unseen], layers, options.out / MEND_FILE, relations)
    write_csv(table, options.out / "mend_scores.csv")
    print_table(table)
    return 0


def parser() -> argparse.ArgumentParser:
    """The options."""
    described = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described.add_argument("model", help="smollm2, gemma3 or a folder")
    described.add_argument("--requests", default="counterfact", help="to train with, and for unseen relations")
    described.add_argument("--scored", required=True, help="requests of which no subject is trained with")
    described.add_argument("--texts", default="wikitext", help="that edits should leave as they are")
    described.add_argument("--count", type=int, default=100, help="requests of unseen relations that are scored")
    described.add_argument("--steps", type=int, default=SETTINGS.steps)
    described.add_argument("--batch-size", type=int, default=SETTINGS.batch_size, help="edits of a step")
    described.add_argument("--rank", type=int, default=SETTINGS.rank)
    described.add_argument("--lr", type=float, default=SETTINGS.lr)
    described.add_argument("--rate", type=float, default=SETTINGS.rate, help="α at first")
    described.add_argument("--out", type=Path, default=Path("mend"), help="folder for the files")
    described.add_argument("--overwrite", action="store_true", help="replace a training of other settings")
    return described


if __name__ == "__main__":
    run_script(main)
