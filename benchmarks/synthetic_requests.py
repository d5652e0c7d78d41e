"""Requests to edit, as many as one likes, about subjects that nobody has heard of."""

from __future__ import annotations

import itertools

import numpy as np

import mechedit as me

TEMPLATES = (
    "The native language of {} is",
    "{} plays the",
    "{} was founded by",
    "{} was born in the city of",
    "The capital of {} is",
    "{} works in the field of",
    "{} is a citizen of",
    "The author of {} is",
    "The headquarters of {} are in",
    "{} is located in",
    "{} is produced by",
    "{} passed away in",
)
"""Short questions like those of CounterFact, for models that do not know the almanac."""


def invented(count: int, almanac: bool) -> list[me.EditRequest]:
    """Requests about subjects that nobody has heard of: first and last words of the almanac's names, put together.

    Questions and objects are those of the almanac's requests, or `TEMPLATES` and any object.
    """
    shipped = me.load_requests("tiny")
    names = sorted({fact.subject for fact in me.load_facts("known")})
    words = [name.split() for name in names if " " in name]
    ends = ({name[0] for name in words}, {name[-1] for name in words})
    subjects = [name for pair in itertools.product(*map(sorted, ends)) if (name := " ".join(pair)) not in set(names)]
    chance = np.random.default_rng(0)
    objects = sorted({request.target_new for request in shipped})
    found = []
    for number, place in enumerate(chance.choice(len(subjects), count, replace=False)):
        asked = shipped[chance.integers(len(shipped))]
        prompt = asked.prompt if almanac else TEMPLATES[number % len(TEMPLATES)]
        alike = sorted({other.target_new for other in shipped if other.relation == asked.relation})
        new = chance.choice(alike if almanac else objects)
        found.append(me.EditRequest(id=f"{number}", subject=subjects[place], prompt=prompt, target_new=str(new)))
    return found
