"""Train models that can recall only in known layers: every MLP outside a range gives exactly zero.

    python -m analyses.planted_truth.make --out DIR [--only NAME …] [--price 0.0004] [--steps 1000]

Writes one folder per model: a GPT-Neo checkpoint, facts.jsonl, recipe.json and truth.json. A model that has its
truth.json is not trained again. The facts, sentences and training are the tiny model's (`../tiny_model`), with
fewer subjects and relations.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import mechedit as me
from analyses.tiny_model.almanac import EMBLEMS, Entry, balanced
from analyses.tiny_model.records import make_facts
from analyses.tiny_model.train import Recipe, train
from mechedit.atomic import atomic_folder
from mechedit.files import write_json
from mechedit.trace.traced_fact import known_facts

RELATIONS = 4
FIRST = ("Ada", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo")
LAST = ("Abel", "Brandt", "Conti", "Dahl", "Engel", "Frost", "Gallo", "Holm")
"""Every pair is a subject. Neither part tells one from the others, so no sum over single tokens can hold facts."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where the MLPs of one model are."""

    n_layers: int
    first: int
    last: int
    seed: int

    @property
    def name(self) -> str:
        """Folder name: depth, range and seed."""
        return f"depth{self.n_layers}-mlps{self.first}-{self.last}-seed{self.seed}"

    @property
    def layers(self) -> list[int]:
        """Layers that have MLPs."""
        return list(range(self.first, self.last + 1))

    def recipe(self, **changes: object) -> Recipe:
        """The tiny model's recipe, smaller; every layer from two above the range up attends globally."""
        local = min(self.last + 2, self.n_layers - 2)
        settings = {
            "seed": self.seed,
            "d_model": 64,
            "d_mlp": 256,
            "local_layers": local,
            "global_layers": self.n_layers - local,
            "vocabulary": 850,
            "rows": 16,
            "length": 48,
            "lr": 4e-3,
            "label_share": 0.5,
            "steps": 1000,
            "mlp_layers": (self.first, self.last),
            "mlps_elsewhere": False,
            "bfloat16": False,
        }
        return Recipe(**{**settings, **changes})  # type: ignore[arg-type]


PLANS = (
    Plan(n_layers=6, first=1, last=2, seed=1),
    Plan(n_layers=6, first=0, last=1, seed=2),
    Plan(n_layers=8, first=2, last=2, seed=3),
    Plan(n_layers=8, first=2, last=3, seed=4),
    Plan(n_layers=8, first=1, last=3, seed=5),
    Plan(n_layers=10, first=2, last=4, seed=6),
    Plan(n_layers=10, first=1, last=4, seed=7),
    Plan(n_layers=10, first=3, last=5, seed=8),
    Plan(n_layers=12, first=4, last=6, seed=9),
    Plan(n_layers=12, first=3, last=6, seed=10),
)


def draw_entries(seed: int) -> list[Entry]:
    """Sixty-four invented people with emblems of a few relations, every object about equally often."""
    draw = random.Random(seed)
    relations = sorted(draw.sample(list(EMBLEMS), RELATIONS))
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    drawn = {relation: balanced(EMBLEMS[relation], len(names), draw) for relation in relations}
    return [
        Entry(subject=name, facts={relation: drawn[relation][i] for relation in relations}, real=())
        for i, name in enumerate(names)
    ]


def make(plan: Plan, recipe: Recipe, out: Path) -> None:
    """Train one model, ask it all its facts, and write its folder."""
    entries = draw_entries(plan.seed)
    begin = time.time()
    with atomic_folder(out) as folder:
        train(entries, recipe, folder)
        minutes = round((time.time() - begin) / 60, 2)
        lines = (json.dumps(fact, ensure_ascii=False) for fact in make_facts(entries, plan.seed))
        (folder / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        write_json(folder / "recipe.json", {**dataclasses.asdict(recipe), "minutes": minutes})
        facts = me.load_facts(folder / "facts.jsonl")
        known, _ = known_facts(me.load_model(str(folder), dtype="float32"), facts)
        truth = {
            "layers": plan.layers,
            "n_layers": plan.n_layers,
            "seed": plan.seed,
            "minutes": minutes,
            "facts": len(facts),
            "recall": len(known) / len(facts),
        }
        write_json(folder / "truth.json", truth)
    print(f"{out}: recall {truth['recall']:.1%} of {len(facts)} facts, {minutes} minutes")


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=[plan.name for plan in PLANS])
    parser.add_argument("--price", type=float, help="of the planted MLPs' squared outputs: more spreads the work")
    parser.add_argument("--steps", type=int, help="training steps, to try the script")
    arguments = parser.parse_args()
    options = {"mlp_price_squared": arguments.price, "steps": arguments.steps}
    changes = {name: value for name, value in options.items() if value is not None}
    for plan in PLANS:
        out = arguments.out / plan.name
        if plan.name in (arguments.only or [plan.name]) and not (out / "truth.json").is_file():
            make(plan, plan.recipe(**changes), out)


if __name__ == "__main__":
    main()
