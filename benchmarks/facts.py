"""Facts to trace and requests to edit, for a shape."""

from __future__ import annotations

import mechedit as me
from benchmarks.shapes import TimedModel
from benchmarks.synthetic_requests import synthetic_requests
from mechedit.errors import InputError
from mechedit.trace.traced_fact import TracedFact, tokenize_fact

WORLD = (
    ("The Eiffel Tower", "{} stands beside a river in the city of", "Paris"),
    ("The Colosseum", "{} stands near a hill in the city of", "Rome"),
    ("Big Ben", "{} stands beside a river in the city of", "London"),
    ("The Brandenburg Gate", "{} stands beside a park in the city of", "Berlin"),
    ("The Kremlin", "{} stands beside a river in the city of", "Moscow"),
    ("Mount Fuji", "{} is the highest mountain in the country of", "Japan"),
    ("Machu Picchu", "{} lies high in the mountains of the country", "Peru"),
    ("The Great Pyramid", "{} stands near a city of the country", "Egypt"),
    ("The Taj Mahal", "{} stands beside a river in the country of", "India"),
    ("The Sydney Opera House", "{} stands beside the sea in the country of", "Australia"),
    ("The Statue of Liberty", "{} stands in the harbor of the city of New", "York"),
    ("The Golden Gate Bridge", "{} spans the water near the city of San", "Francisco"),
)
"""Subject, prompt and object of facts that pretrained models know; each prompt begins with its subject."""
ALMANAC = 300
"""Facts that ship, among which those of a length are looked for."""
SHORT = (
    ("Oslo", "{} is in", "Norway"),
    ("Lima", "{} is in", "Peru"),
    ("Cairo", "{} is in", "Egypt"),
    ("Rome", "{} is in", "Italy"),
    ("Paris", "{} is in", "France"),
    ("Sony", "{} is in", "Japan"),
)
"""The same in few tokens, for large models with random weights."""


def requests_of(timed: TimedModel, count: int) -> list[me.EditRequest]:
    """Requests to edit: those that ship for the model that ships, else about made-up subjects."""
    if timed.knows_almanac:
        return me.load_requests("tiny")[:count]
    return synthetic_requests(count, almanac=False)


def traced_facts(timed: TimedModel, count: int) -> list[TracedFact]:
    """Facts to trace, each of `trace_tokens` tokens as nearly as may be."""
    facts = list(me.load_facts("known"))[:ALMANAC]
    if not timed.knows_almanac:
        more = WORLD if timed.weights == "pretrained" else SHORT
        world = [
            me.Fact(id=f"world/{number}", subject=subject, prompt=prompt, object=target)
            for number, (subject, prompt, target) in enumerate(more)
        ]
        # Pretrained models do not know the almanac.
        facts = world if timed.weights == "pretrained" else [*world, *facts]
    tokens = timed.shape.amounts.trace_tokens
    if tokens is None:
        return [tokenize_fact(timed.model, fact) for fact in facts[:count]]
    traced = sorted(
        (tokenize_fact(timed.model, fact) for fact in facts), key=lambda traced: abs(len(traced.ids) - tokens)
    )
    if len(traced) < count:
        raise InputError(f"there are {len(traced)} facts, expected {count}; trace fewer")
    return traced[:count]
