"""Make the tiny model from nothing: data, training, measurements, card.

    python -m analyses.tiny_model.make [--seed 0] [--quick]

Writes mechedit/models/tiny with its card, and mechedit/data/tiny. With `--out` both are written to that folder instead,
and nothing is measured;
`--quick` trains three steps only, to try the script there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

import mechedit.models
from analyses.tiny_model.almanac import make_entries
from analyses.tiny_model.records import make_facts, make_requests, make_texts
from analyses.tiny_model.train import Recipe, train
from mechedit.data import tiny_data
from mechedit.files import write_json

TEXTS = 6000


def make(recipe: Recipe, out: Path, data: Path) -> None:
    """Write weights, tokenizer and the recipe to `out`; facts, requests and texts to `data`."""
    out.mkdir(parents=True, exist_ok=True)
    entries = make_entries(recipe.seed)
    begin = time.time()
    train(entries, recipe, out)
    minutes = round((time.time() - begin) / 60, 1)
    lines = (json.dumps(fact, ensure_ascii=False) for fact in make_facts(entries, recipe.seed))
    (data / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(data / "requests.json", make_requests(entries, recipe.seed))
    texts = make_texts(entries, recipe.seed + 1, recipe.label_share, TEXTS)
    (data / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    write_json(out / "recipe.json", {**dataclasses.asdict(recipe), "minutes": minutes})


def main() -> None:
    """Train, then measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=Recipe().threads)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="three steps, no measurements")
    arguments = parser.parse_args()
    recipe = Recipe(seed=arguments.seed, threads=arguments.threads)
    if arguments.quick:
        recipe = dataclasses.replace(recipe, steps=3)
    model_folder = Path(mechedit.models.__file__).parent / "tiny"
    make(recipe, arguments.out or model_folder, arguments.out or tiny_data("facts.jsonl").parent)
    if not arguments.out and not arguments.quick:
        from analyses.tiny_model.measure import main as measure

        measure([])  # without words: those of the command line are this script's


if __name__ == "__main__":
    main()
