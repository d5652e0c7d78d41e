"""Groups of facts about one subject, which share one δ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mechedit.data import EditRequest
from mechedit.prompt_tokens import one_spelling
from mechedit.targets.config import TargetConfig

SubjectGroup = Sequence[EditRequest]
"""Requests that share one δ."""


def subject_groups(tokenizer: Any, requests: Sequence[EditRequest], config: TargetConfig) -> list[SubjectGroup]:
    """Group requests that share one δ, in the order of each group's first request.

    Args:
        tokenizer: subjects that give the same tokens are the same subject.
        requests: facts.
        config: whether facts about one subject share a δ at all.
    """
    groups: dict[str, list[EditRequest]] = {}
    for request, spelled in zip(requests, one_spelling(tokenizer, requests), strict=True):
        groups.setdefault(spelled.subject if config.joins_subjects else request.id, []).append(request)
    return list(groups.values())


def regrouped(
    tokenizer: Any, before: Sequence[EditRequest], after: Sequence[EditRequest], config: TargetConfig
) -> list[str]:
    """Ids of the requests in both lists that share their δ with others than before, so that it is searched for again.

    Args:
        tokenizer: see `subject_groups`.
        before: requests whose δ are known.
        after: requests to be written.
        config: of both searches.
    """
    known = {tuple(request.id for request in group) for group in subject_groups(tokenizer, before, config)}
    ids = {request.id for request in before}
    groups = [[request.id for request in group] for group in subject_groups(tokenizer, after, config)]
    return [name for group in groups if tuple(group) not in known for name in group if name in ids]
