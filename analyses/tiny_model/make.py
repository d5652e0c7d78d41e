"""Make the tiny model from nothing: data, training, measurements, card.

    python -m analyses.tiny_model.make [--seed 0] [--quick]

Writes the weights to mechedit/models/tiny, with the model card, and the facts, requests and texts to
mechedit/data/tiny. With `--out` all of these go to that folder, and nothing is measured; `--quick` trains three steps
only, to try the script there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from analyses.tiny_model import DATA_FOLDER, MODEL_FOLDER
from analyses.tiny_model.almanac import Entry, make_entries
from analyses.tiny_model.records import make_facts, make_requests, make_texts
from analyses.tiny_model.train import Recipe, train
from mechedit.files import write_json

TEXTS = 6000
"""Documents of running text."""


def make(recipe: Recipe, model_folder: Path, data_folder: Path) -> None:
    """Train the model and write weights, tokenizer and recipe to one folder, its data to the other."""
    model_folder.mkdir(parents=True, exist_ok=True)
    entries = make_entries(recipe.seed)
    begin = time.time()
    train(entries, recipe, model_folder)
    minutes = round((time.time() - begin) / 60, 1)
    write_json(model_folder / "recipe.json", {**dataclasses.asdict(recipe), "minutes": minutes})
    write_data(entries, recipe, data_folder)


def write_data(entries: list[Entry], recipe: Recipe, folder: Path) -> None:
    """Write facts.jsonl, requests.json and texts.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(fact, ensure_ascii=False) for fact in make_facts(entries, recipe.seed))
    (folder / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "requests.json", make_requests(entries, recipe.seed))
    texts = make_texts(entries, recipe.seed + 1, recipe.label_share, TEXTS)
    (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def main() -> None:
    """Train, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=Recipe().threads)
    parser.add_argument("--out", type=Path, help="folder for all files, in place of the package's own")
    parser.add_argument("--quick", action="store_true", help="three steps, no measurements")
    arguments = parser.parse_args()
    recipe = Recipe(seed=arguments.seed, threads=arguments.threads)
    if arguments.quick:
        recipe = dataclasses.replace(recipe, steps=3)
    make(recipe, arguments.out or MODEL_FOLDER, arguments.out or DATA_FOLDER)
    if arguments.out is None and not arguments.quick:
        from analyses.tiny_model.measure import main as measure

        measure([])  # the arguments of the command line are this script's


if __name__ == "__main__":
    main()
