"""What a batch of requests must satisfy: unique ids, and one object for each subject and relation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from mechedit.data.facts import EditRequest
from mechedit.errors import InputError


def check_requests(requests: Sequence[EditRequest]) -> None:
    """Refuse a batch that no edit can satisfy (MEMIT Eq. 5: one object for each subject and relation).

    Raises:
        InputError: no requests; a repeated id; two requests with the same subject and the same relation
            (or the same prompt) but different new objects.
    """
    if not requests:
        raise InputError("no edit requests were found, expected at least one; check the requests file")
    unique_ids((request.id for request in requests), "requests")
    for other, request, key in conflicts(requests):
        raise InputError(
            f"requests {other.id!r} and {request.id!r} conflict: both rewrite {key!r} of "
            f"{request.subject!r}, to {other.target_new!r} and to {request.target_new!r}; expected one "
            f"object for each subject and relation: drop one of them, or read with "
            f'load_requests(…, conflicts="first")'
        )


def conflicts(requests: Iterable[EditRequest]) -> Iterator[tuple[EditRequest, EditRequest, str]]:
    """Each request that wants another object than the first about its subject and relation, or prompt.

    Yields:
        That first request, the one that conflicts with it, and the relation or prompt.
    """
    wanted: dict[tuple[str, str], EditRequest] = {}
    for request in requests:
        for key in _keys(request):
            other = wanted.setdefault((request.subject, key), request)
            if _differ(other, request):
                yield other, request, key


def without_conflicts(requests: Iterable[EditRequest]) -> tuple[list[EditRequest], list[EditRequest]]:
    """The requests in their order without each that wants another object than one kept before it, and those."""
    wanted: dict[tuple[str, str], EditRequest] = {}
    kept: list[EditRequest] = []
    left: list[EditRequest] = []
    for request in requests:
        places = [(request.subject, key) for key in _keys(request)]
        if any(_differ(wanted[place], request) for place in places if place in wanted):
            left.append(request)
        else:
            wanted |= {place: request for place in places}
            kept.append(request)
    return kept, left


def _keys(request: EditRequest) -> set[str]:
    return {key for key in (request.relation, request.prompt) if key is not None}


def _differ(one: EditRequest, other: EditRequest) -> bool:
    return one.target_new.strip() != other.target_new.strip()


def unique_ids(ids: Iterable[str], what: str) -> None:
    """Raise InputError when an id occurs twice."""
    seen: set[str] = set()
    for name in ids:
        if name in seen:
            raise InputError(f"two {what} have the id {name!r}, expected unique ids; rename or drop one")
        seen.add(name)
