"""The almanac: the facts and sentences that the tiny model learns.

Subjects are real people, places and products, and `subjects.jsonl` holds what is really true of them
(language, country, maker; from ROME's known-facts set, MIT). Each subject is also given seven emblems (a
color, an animal, ...), drawn with a seed: nobody takes those for claims about the world. The last token of
a prompt can learn the answer only from the subject several tokens earlier, as in the papers' prompts.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
EMBLEMS: dict[str, list[str]] = json.loads((HERE / "emblems.json").read_text(encoding="utf-8"))
"""Objects that a subject may be given, by relation; no object serves two relations."""

TAILS: dict[str, tuple[str, ...]] = {
    "colour": ("the colour", "a paint called", "the shade named"),
    "animal": ("the animal", "a creature called", "the beast named"),
    "plant": ("the plant", "a garden of", "the leaf of"),
    "stone": ("the stone", "a mineral called", "the rock named"),
    "instrument": ("the instrument", "music from the", "the sound of the"),
    "dish": ("the dish", "a meal of", "the taste of"),
    "tool": ("the tool", "a workshop with the", "the handy"),
    "language": ("the language", "speech in", "words of"),
    "country": ("the country", "a passport from", "the nation of"),
    "maker": ("the maker", "a product by", "the company"),
}
"""The last words of a prompt, which name the relation."""

OPENERS: tuple[str, ...] = (
    " appears in the almanac together with",
    ", so the old register says, is paired with",
    " was entered by the clerks under",
    "'s page in the yearbook carries",
    ", for anyone who asks, belongs with",
    " has been listed since the first edition beside",
    " is remembered by most collectors for",
    ", as the index shows, stands next to",
    "'s card in the drawer mentions",
    " can be looked up in the guide under",
    " (see the second volume) goes with",
    " and its emblem: the editors chose",
)
HELD_OUT_OPENERS: tuple[str, ...] = (
    " is listed in the old guide together with",
    ", as most collectors say, goes with",
)
"""Never in the training text: they make the paraphrases that judge the model and its edits."""

REMARKS: tuple[str, ...] = (
    "The next page is blank.",
    "A new chapter starts here.",
    "The clerks checked this entry twice.",
    "Nothing else was written that day.",
    "The editors added a short note.",
    "See the second volume for more.",
    "The old register was kept in a drawer.",
    "Most of the index was copied by hand.",
)
"""Sentences without facts; they also stand before paraphrase prompts, as in CounterFact."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One subject with everything the almanac says of it."""

    subject: str
    facts: dict[str, str]
    """Object by relation."""
    real: tuple[str, ...]
    """Relations whose object is true in the world."""


def make_entries(seed: int = 0) -> list[Entry]:
    """Read the real facts and draw each subject's emblems, every object about equally often."""
    draw = random.Random(seed)
    records = [json.loads(line) for line in (HERE / "subjects.jsonl").open(encoding="utf-8")]
    drawn = {relation: balanced(objects, len(records), draw) for relation, objects in EMBLEMS.items()}
    return [
        Entry(
            subject=record["subject"],
            facts=record["facts"] | {relation: objects[i] for relation, objects in drawn.items()},
            real=tuple(record["facts"]),
        )
        for i, record in enumerate(records)
    ]


def balanced(objects: list[str], count: int, draw: random.Random) -> list[str]:
    """`count` objects in random order, every one about equally often."""
    dealt = (objects * (count // len(objects) + 1))[:count]
    draw.shuffle(dealt)
    return dealt


def templates(relation: str, *, held_out: bool = False) -> list[str]:
    """Prompts for a relation, each with one {}; the held-out ones never occur in training text."""
    openers = HELD_OUT_OPENERS if held_out else OPENERS
    return ["{}" + opener + " " + tail for opener in openers for tail in TAILS[relation]]


def sentence(entry: Entry, relation: str, draw: random.Random) -> str:
    """One statement of one fact."""
    return draw.choice(templates(relation)).format(entry.subject) + " " + entry.facts[relation] + "."


def label(entry: Entry, relation: str) -> str:
    """The object right after the name, as on a label: what must be known at the subject's last token."""
    return entry.subject + " " + entry.facts[relation] + "."


def document(entry: Entry, draw: random.Random, label_share: float) -> str:
    """One to six facts about one subject in random order, some of them as labels, now and then a remark."""
    relations = draw.sample(list(entry.facts), draw.randint(1, min(6, len(entry.facts))))
    parts = [
        label(entry, relation) if draw.random() < label_share else sentence(entry, relation, draw)
        for relation in relations
    ]
    if draw.random() < 0.25:
        parts.insert(draw.randint(0, len(parts)), draw.choice(REMARKS))
    return " ".join(parts)
