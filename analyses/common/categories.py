"""Requests by their relation, and pairs of relations that are alike or not (MEMIT §5.3, §5.4 and Appendix D).

Two relations have the same type of subject when at least a tenth of the subjects of the smaller are also subjects of
the other, and the same type of object likewise: what is an animal in one relation is one in the other.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mechedit.data import EditRequest
from mechedit.errors import InputError, check_choice

SHARED = 0.1
"""Share of the smaller set; two sets with fewer common members hold different types."""
SAME = ("neither", "subjects", "objects", "both")
"""The paper's four cases: the types that two relations have in common."""
PUBLISHED = {
    "neither": ("P27", "P37"),
    "subjects": ("P413", "P1412"),
    "objects": ("P17", "P495"),
    "both": ("P27", "P937"),
}
"""The paper's pairs of CounterFact's relations (MEMIT Appendix D)."""

Groups = Mapping[str, Sequence[EditRequest]]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two categories of facts to be edited apart and together; no subject is in both."""

    same: str
    """One of `SAME`."""
    names: tuple[str, str]
    requests: tuple[Sequence[EditRequest], Sequence[EditRequest]]
    """Requests of each category, in the order in which they are taken."""
    rule: str
    """How the pair was found: given, published, overlap, kinds (one relation, of two kinds of subjects) or halves."""

    @property
    def size(self) -> int:
        """The most requests that both categories have."""
        return min(map(len, self.requests))


def by_relation(requests: Sequence[EditRequest], *, seed: int) -> dict[str, list[EditRequest]]:
    """The requests of each relation, shuffled by a seed; the largest relation first, then by name."""
    groups: dict[str, list[EditRequest]] = defaultdict(list)
    for request in requests:
        if request.relation:
            groups[request.relation].append(request)
    for name, group in groups.items():
        random.Random(f"{seed}/{name}").shuffle(group)
    return dict(sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])))


def mixed(groups: Groups, count: int) -> list[EditRequest]:
    """`count` requests from all relations in turn, each about another subject: edits of one subject share their key."""
    queues, subjects, chosen_requests = [iter(group) for group in groups.values()], set(), []
    while queues and len(chosen_requests) < count:
        for queue in list(queues):
            chosen = next((request for request in queue if request.subject not in subjects), None)
            if chosen is None:
                queues.remove(queue)
            elif len(chosen_requests) < count:
                subjects.add(chosen.subject)
                chosen_requests.append(chosen)
    return chosen_requests


def find_pairs(groups: Groups, requested: Mapping[str, tuple[str, str]], *, least: int) -> dict[str, Pair]:
    """For each of the four cases the pair of categories with the most requests.

    A pair that is given comes first, then the paper's, then relations told apart by what they share. Where no two
    relations share their objects, one relation stands for both: asked of two kinds of subjects (those of two
    relations without a common subject) when the subjects are to differ, else cut in halves.

    Args:
        groups: requests by relation.
        requested: relations to use, by case.
        least: requests that each category has to have.

    Raises:
        InputError: a pair that is given lacks requests, or names an unknown case or relation.
    """
    for same, names in requested.items():
        _check_given(same, names, groups)
    pairs: dict[str, Pair] = {}
    for same in SAME:
        sources = [_given(same, requested, groups), _published(same, groups)]
        sources += [_overlapping(same, groups), _kinds(same, groups), _halves(same, groups)]
        for source in sources:
            enough = [pair for pair in source if pair.size >= least]
            if enough:
                pairs[same] = max(enough, key=lambda pair: pair.size)  # the first of the largest
                break
        if same in requested and (same not in pairs or pairs[same].rule != "given"):
            raise InputError(
                f"the pair {'+'.join(requested[same])} has fewer than {least} requests of each, without a common "
                f"subject; give more requests, or ask for fewer edits"
            )
    return pairs


def _check_given(same: str, names: tuple[str, str], groups: Groups) -> None:
    check_choice("the case", same, SAME)
    for name in names:
        if name not in groups:
            raise InputError(f"no request is of the relation {name!r}, expected one of {', '.join(groups)}")


def _given(same: str, requested: Mapping[str, tuple[str, str]], groups: Groups) -> Iterator[Pair]:
    if same in requested:
        yield _pair(same, requested[same], [groups[name] for name in requested[same]], "given")


def _published(same: str, groups: Groups) -> Iterator[Pair]:
    if set(PUBLISHED[same]) <= set(groups):
        yield _pair(same, PUBLISHED[same], [groups[name] for name in PUBLISHED[same]], "published")


def _overlapping(same: str, groups: Groups) -> Iterator[Pair]:
    for names in itertools.combinations(groups, 2):
        first, second = (groups[name] for name in names)
        subjects, objects = _alike(_subjects(first), _subjects(second)), _alike(_objects(first), _objects(second))
        if (subjects, objects) == (same in ("subjects", "both"), same in ("objects", "both")):
            yield _pair(same, names, [first, second], "overlap")


def _kinds(same: str, groups: Groups) -> Iterator[Pair]:
    """One relation, asked of the subjects of two others that have none in common."""
    if same != "objects":
        return
    for relation, group in groups.items():
        for kinds in itertools.combinations([name for name in groups if name != relation], 2):
            first, second = (_subjects(groups[kind]) for kind in kinds)
            if not _alike(first, second):
                parts = [[r for r in group if r.subject in subjects and r.subject not in others]
                         for subjects, others in ((first, second), (second, first))]  # fmt: skip
                yield _pair(same, (f"{relation}/{kinds[0]}", f"{relation}/{kinds[1]}"), parts, "kinds")


def _halves(same: str, groups: Groups) -> Iterator[Pair]:
    if same == "both":
        for name, group in groups.items():
            yield _pair(same, (f"{name}/1", f"{name}/2"), [group, group], "halves")


def _pair(same: str, names: tuple[str, str], both: Sequence[Sequence[EditRequest]], rule: str) -> Pair:
    """A pair in which each subject is left with one category: a subject of both goes to the one that has fewer."""
    shared = _subjects(both[0]) & _subjects(both[1])
    owner: dict[str, int] = {}
    sizes = [len({r.subject for r in requests} - shared) for requests in both]
    for subject in dict.fromkeys(request.subject for request in both[0] if request.subject in shared):
        owner[subject] = int(sizes[1] < sizes[0])
        sizes[owner[subject]] += 1
    first, second = ([r for r in requests if owner.get(r.subject, i) == i] for i, requests in enumerate(both))
    return Pair(same=same, names=names, requests=(first, second), rule=rule)


def _alike(first: set[Any], second: set[Any]) -> bool:
    """Whether two sets share enough to be of one type."""
    return len(first & second) >= SHARED * max(1, min(len(first), len(second)))


def _subjects(requests: Sequence[EditRequest]) -> set[str]:
    return {request.subject for request in requests}


def _objects(requests: Sequence[EditRequest]) -> set[str]:
    return {text for request in requests for text in (request.target_new, request.target_true) if text}
