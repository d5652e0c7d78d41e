"""What was read, in a line: how many records and prompts of each kind, what is absent, what is not scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mechedit.arguments import checked
from mechedit.data.facts import EditRequest, Fact


@checked
def describe_requests(requests: Sequence[EditRequest], not_scored: Mapping[str, int] | None = None) -> str:
    """Say in a line what requests hold.

    Example:
        >>> describe_requests(load_requests("tiny"))

    Args:
        requests: the requests.
        not_scored: number of prompts by kind that came with them and that no measure uses.
    """
    names = ("paraphrases", "neighbors", "attributes", "generations")
    counts = {name: sum(len(getattr(request, name)) for request in requests) for name in names}
    counts = {"true objects": sum(request.target_true is not None for request in requests), **counts}
    return _describe(len(requests), "request", counts, {name: n for name, n in (not_scored or {}).items() if n})


@checked
def describe_facts(facts: Sequence[Fact]) -> str:
    """Say in a line what facts hold.

    Example:
        >>> describe_facts(load_facts("known"))
    """
    counts = {
        "relations": len({fact.relation for fact in facts} - {None}),
        "foils": sum(fact.foil is not None for fact in facts),
    }
    return _describe(len(facts), "fact", counts, {})


def _describe(count: int, noun: str, counts: Mapping[str, int], not_scored: Mapping[str, int]) -> str:
    parts = {
        "": ", ".join(_counted(number, name) for name, number in counts.items() if number),
        "absent: ": ", ".join(name for name, number in counts.items() if not number),
        "not scored: ": ", ".join(_counted(number, name) for name, number in not_scored.items()),
    }
    return "; ".join([_counted(count, f"{noun}s"), *(name + text for name, text in parts.items() if text)])


def _counted(number: int, plural: str) -> str:
    return f"{number:,} {plural.removesuffix('s') if number == 1 else plural}"
