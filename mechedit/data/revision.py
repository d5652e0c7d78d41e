"""The requests of an edit that is made again: without some of them, or with others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mechedit.data.facts import EditRequest
from mechedit.errors import InputError, brief


def revised(
    requests: Sequence[EditRequest], *, without: Iterable[str] = (), added: Iterable[EditRequest] = ()
) -> list[EditRequest]:
    """The requests in their order but for those left out, and then those added.

    Args:
        requests: of the edit as it was.
        without: ids to leave out.
        added: further requests.

    Raises:
        InputError: an id that none of the requests has, or no request remains.
    """
    ids, left_out = {request.id for request in requests}, list(without)
    absent = [name for name in left_out if name not in ids]
    if absent:
        raise InputError(
            f"no request has the id {brief(absent[0])}, expected ids of the {len(ids)} requests to leave out; "
            f"`mechedit edit --show FILE` lists those of an edit"
        )
    remaining = [*(request for request in requests if request.id not in set(left_out)), *added]
    if not remaining:
        raise InputError(f"all {len(ids)} requests are left out, expected one to remain; leave fewer out")
    return remaining
