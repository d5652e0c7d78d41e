"""Any number of requests to edit, about made-up subjects."""

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


def synthetic_requests(count: int, almanac: bool) -> list[me.EditRequest]:
    """Requests about made-up subjects: first and last words of the almanac's names in new pairs.

    Prompts and objects are those of the almanac's requests, or `TEMPLATES` and any object.
    """
    shipped = me.load_requests("tiny")
    names = sorted({fact.subject for fact in me.load_facts("known")})
    words = [name.split() for name in names if " " in name]
    ends = ({name[0] for name in words}, {name[-1] for name in words})
    subjects = [name for pair in itertools.product(*map(sorted, ends)) if (name := " ".join(pair)) not in set(names)]
    chance = np.random.default_rng(0)
    objects = sorted({request.target_new for request in shipped})
    requests = []
    for number, subject_index in enumerate(chance.choice(len(subjects), count, replace=False)):
        template_request = shipped[chance.integers(len(shipped))]
        prompt = template_request.prompt if almanac else TEMPLATES[number % len(TEMPLATES)]
        objects_of_relation = sorted(
            {request.target_new for request in shipped if request.relation == template_request.relation}
        )
        new_object = chance.choice(objects_of_relation if almanac else objects)
        requests.append(
            me.EditRequest(id=f"{number}", subject=subjects[subject_index], prompt=prompt, target_new=str(new_object))
        )
    return requests
