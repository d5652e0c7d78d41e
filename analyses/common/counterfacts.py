"""Requests in CounterFact's form, made from facts that a model knows.

The subjects are split in two by a seed: those of one half are edited, those of the other only serve as neighbors and
attribute prompts, so that no neighbor is itself edited, however many requests there are.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

from mechedit.data import EditRequest, Fact, Neighbor, fill
from mechedit.errors import InputError

PROMPTS = 10
"""Neighbors, attribute prompts and starts of free text per request, as in CounterFact."""
PARAPHRASES = 2


def counterfacts(facts: Sequence[Fact], count: int | None = None, *, seed: int = 0) -> list[EditRequest]:
    """Requests that give subjects another object of the same relation, in an order where every prefix is mixed.

    Paraphrases are prompts with which the facts ask for the relation elsewhere; neighbors share the prompt, the
    relation and the true object.

    Args:
        facts: with their relations.
        count: how many requests; None makes as many as the facts allow.
        seed: seed of the split of subjects and of everything that is drawn.

    Raises:
        InputError: the facts allow fewer.
    """
    draw = random.Random(seed)
    subjects = sorted({fact.subject for fact in facts})
    edited = set(draw.sample(subjects, len(subjects) // 2))
    unedited_facts: dict[str, list[Fact]] = defaultdict(list)
    prompts_of: dict[str, set[str]] = defaultdict(set)
    for fact in facts:
        prompts_of[fact.relation or ""].add(fact.prompt)
        if fact.subject not in edited:
            unedited_facts[fact.relation or ""].append(fact)
    candidates = [fact for fact in facts if fact.relation and fact.subject in edited]
    attempts = (_request(fact, unedited_facts, prompts_of, draw) for fact in draw.sample(candidates, len(candidates)))
    requests = [request for request in attempts if request is not None]
    if count is not None and len(requests) < count:
        raise InputError(
            f"{count} requests are wanted, and the facts allow {len(requests)}; ask for fewer, or give more facts"
        )
    return requests[:count]


def _request(
    fact: Fact, unedited_facts: Mapping[str, Sequence[Fact]], prompts_of: Mapping[str, set[str]], draw: random.Random
) -> EditRequest | None:
    """One request; None when no other object or no neighbor is known."""
    facts_of_relation = unedited_facts.get(fact.relation or "", ())
    objects = sorted({fact_of_relation.object for fact_of_relation in facts_of_relation} - {fact.object})
    neighbors = _subjects(facts_of_relation, fact.object, draw)
    if not objects or not neighbors:
        return None
    new, prompts = draw.choice(objects), sorted(prompts_of[fact.relation or ""] - {fact.prompt})
    return EditRequest(
        id=fact.id,
        subject=fact.subject,
        prompt=fact.prompt,
        target_new=new,
        target_true=fact.object,
        relation=fact.relation,
        paraphrases=_filled(draw.sample(prompts, min(PARAPHRASES, len(prompts))), fact.subject),
        neighbors=tuple(Neighbor(prompt=fill(fact.prompt, name), object=fact.object) for name in neighbors),
        attributes=tuple(fill(fact.prompt, name) for name in _subjects(facts_of_relation, new, draw)),
        generations=_filled(draw.sample(prompts, min(PROMPTS, len(prompts))), fact.subject),
    )


def _subjects(facts: Sequence[Fact], value: str, draw: random.Random) -> list[str]:
    """Up to ten subjects that have this object."""
    subjects = [fact.subject for fact in facts if fact.object == value]
    return draw.sample(subjects, min(PROMPTS, len(subjects)))


def _filled(prompts: Sequence[str], subject: str) -> tuple[str, ...]:
    return tuple(fill(prompt, subject) for prompt in prompts)
