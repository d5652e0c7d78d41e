"""The data that ship with the tiny model: facts to trace, requests in CounterFact's form, running text."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from analyses.tiny_model.almanac import EMBLEMS, HELD_OUT_OPENERS, OPENERS, REMARKS, TAILS, Entry, document, templates


def make_facts(entries: list[Entry], seed: int) -> list[dict[str, str]]:
    """Every fact once, with one of the statement prompts that the training text uses."""
    draw = random.Random(seed)
    return [
        {
            "id": f"{slug(entry.subject)}/{relation}",
            "subject": entry.subject,
            "prompt": draw.choice(templates(relation)),
            "object": entry.facts[relation],
            "relation": relation,
        }
        for entry in entries
        for relation in entry.facts
    ]


def make_requests(entries: list[Entry], seed: int, count: int = 100) -> list[dict[str, Any]]:
    """Edits of `count` different subjects, spread over the relations, as CounterFact records.

    Neighbors share the relation and the true object; attribute prompts are about subjects for which the new
    object is true; paraphrases use openers that training never saw, after an unrelated sentence.
    """
    draw = random.Random(seed)
    shuffled = draw.sample(entries, len(entries))
    relations = list(TAILS)
    records: list[dict[str, Any]] = []
    for entry in shuffled:
        next_relation = relations[len(records) % len(relations)]
        relation = next_relation if next_relation in entry.facts else draw.choice(list(EMBLEMS))
        record = make_request(len(records), entry, relation, entries, draw)
        if record["neighborhood_prompts"]:
            records.append(record)
        if len(records) == count:
            break
    return records


def make_request(
    case: int, entry: Entry, relation: str, entries: Sequence[Entry], draw: random.Random
) -> dict[str, Any]:
    """An edit of one fact as a CounterFact record; neighbors and attribute prompts are about others of `entries`."""
    true = entry.facts[relation]
    others = [candidate for candidate in entries if candidate is not entry and relation in candidate.facts]
    new = draw.choice(sorted({candidate.facts[relation] for candidate in others} - {true}))
    prompt = draw.choice(templates(relation))
    paraphrases = draw.sample(templates(relation, held_out=True), 2)
    return {
        "case_id": case,
        "requested_rewrite": {
            "prompt": prompt,
            "relation_id": relation,
            "target_new": {"str": new, "id": f"{relation}/{new}"},
            "target_true": {"str": true, "id": f"{relation}/{true}"},
            "subject": entry.subject,
        },
        "paraphrase_prompts": [
            draw.choice(REMARKS) + " " + paraphrase.format(entry.subject) for paraphrase in paraphrases
        ],
        "neighborhood_prompts": _about(others, relation, true, prompt, draw),
        "attribute_prompts": _about(others, relation, new, prompt, draw),
        "generation_prompts": [entry.subject + opener for opener in draw.sample((*OPENERS, *HELD_OUT_OPENERS), 10)],
    }


def _about(others: list[Entry], relation: str, value: str, prompt: str, draw: random.Random) -> list[str]:
    """Up to ten prompts about other subjects that have this object."""
    subjects = [entry.subject for entry in others if entry.facts[relation] == value]
    return [prompt.format(subject) for subject in draw.sample(subjects, min(10, len(subjects)))]


def make_texts(entries: list[Entry], seed: int, label_share: float, count: int) -> list[str]:
    """Running text like the training text, but drawn with another seed: one document per line."""
    draw = random.Random(seed)
    return [document(draw.choice(entries), draw, label_share) for _ in range(count)]


def slug(subject: str) -> str:
    """The subject as a part of an id."""
    return "-".join("".join(c if c.isalnum() else " " for c in subject).lower().split())
