"""Checks of a batch of requests: unique ids, and one object for each subject and relation.

Texts that differ only in white space and invisible characters at their ends are the same text here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mechedit.data.characters import visible
from mechedit.data.facts import EditRequest, Fact
from mechedit.errors import InputError, brief

Record = TypeVar("Record", bound=Fact | EditRequest)


def records_of(records: Any, *kinds: type[Record]) -> list[Record]:
    """Facts or requests as a list, whatever holds them: what a generator gives can be looked at once.

    Args:
        records: of a caller.
        *kinds: of which they may be.

    Raises:
        InputError: something else is there.
    """
    several = isinstance(records, Iterable) and not isinstance(records, str | bytes | Mapping)
    items: list[Any] = list(records) if several else []
    if not several or not all(isinstance(item, kinds) for item in items):
        raise InputError(
            f"the facts or requests are {brief(items or records)}, expected a list of "
            f"{' or '.join(kind.__name__ for kind in kinds)}: read them with load_facts or load_requests"
        )
    return items


def check_requests(requests: Sequence[EditRequest]) -> None:
    """Refuse a batch that no edit can satisfy (MEMIT Eq. 5: one object for each subject and relation).

    Raises:
        InputError: no requests; a repeated id; two requests with the same subject and the same relation
            (or the same prompt) but different new objects.
    """
    if not requests:
        raise InputError("no edit requests were found, expected at least one; check the requests file")
    check_unique_ids((request.id for request in requests), "requests")
    for earlier, request, key in conflicts(requests):
        raise InputError(
            f"requests {brief(earlier.id)} and {brief(request.id)} conflict: both rewrite {brief(key)} of "
            f"{brief(request.subject)}, to {brief(earlier.target_new)} and to {brief(request.target_new)}; expected "
            f"one "
            f"object for each subject and relation: drop one of them, or read with "
            f'load_requests(…, conflicts="first") (on the command line --conflicts first)'
        )


def conflicts(requests: Iterable[EditRequest]) -> Iterator[tuple[EditRequest, EditRequest, str]]:
    """Yield each request that has another new object than the first with its subject and relation (or prompt).

    Yields:
        That first request, the one that conflicts with it, and the relation or prompt.
    """
    first_requests: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        for key in _keys(request):
            first = first_requests.setdefault((visible(request.subject), key), request)
            if _objects_differ(first, request):
                yield first, request, key


def without_conflicts(requests: Iterable[EditRequest]) -> tuple[list[EditRequest], list[EditRequest]]:
    """Drop each request that conflicts with an earlier one that is not dropped itself.

    Returns:
        The remaining requests and the dropped ones, both in their order.
    """
    first_requests: dict[tuple[str, str], EditRequest] = {}
    remaining: list[EditRequest] = []
    dropped: list[EditRequest] = []
    for request in requests:
        keys = [(visible(request.subject), key) for key in _keys(request)]
        if any(_objects_differ(first_requests[key], request) for key in keys if key in first_requests):
            dropped.append(request)
        else:
            first_requests |= {key: request for key in keys}
            remaining.append(request)
    return remaining, dropped


def check_unique_ids(ids: Iterable[str], what: str) -> None:
    """Raise InputError when an id occurs twice."""
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise InputError(f"two {what} have the id {brief(name)}, expected unique ids; rename or drop one")
        seen.add(name)


def _keys(request: EditRequest) -> set[str]:
    """The relation and the prompt, by either of which two requests may be about the same fact."""
    return {visible(key) for key in (request.relation, request.prompt) if key is not None}


def _objects_differ(first: EditRequest, second: EditRequest) -> bool:
    return visible(first.target_new) != visible(second.target_new)
