"""Facts in tokens: where the subject lies, what each token is, which facts the model knows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mechedit.data import Fact
from mechedit.errors import InputError
from mechedit.models import Model, Tokens
from mechedit.prompts import continuation_ids, tokenize_prompt
from mechedit.trace.config import TraceConfig
from mechedit.trace.corruption import Donors
from mechedit.trace.labels import role_of

KNOWN_ROWS = 64
"""Facts asked at once."""

Dropped = tuple[str, str]
"""A fact's id, and why it is not traced."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedFact:
    """A fact in tokens, ready to corrupt."""

    fact: Fact
    ids: tuple[int, ...]
    """Prompt, then all object tokens but the last (teacher-forced)."""
    prompt_length: int
    subject: range
    object_ids: tuple[int, ...]
    foil_id: int | None
    """First token of the fact's own foil."""
    roles: tuple[str, ...]
    """One a prompt token."""
    tokens: tuple[str, ...]
    """Text of each prompt token."""
    donors: tuple[tuple[int, ...], ...] = ()
    """Tokens of other subjects, one a sample, when token replacement corrupts."""

    @property
    def shape(self) -> tuple[int, int]:
        """Facts of one shape run in one batch: (tokens, object tokens)."""
        return len(self.ids), len(self.object_ids)

    def corrupted(self, extra_tokens: int = 0) -> range:
        """Positions that are corrupted: the subject's, and those after it as far as the prompt goes."""
        return range(self.subject.start, min(self.subject.stop + extra_tokens, self.prompt_length))


def prepare(model: Model, fact: Fact) -> TracedFact:
    """Tokenize a fact and name the role of each prompt token.

    Raises:
        InputError: a subject or object without tokens, a foil that starts as the object does, or more tokens than
            the model can take.
    """
    tokenizer = model.tokenizer
    prompt = tokenize_prompt(tokenizer, fact.prompt, fact.subject)
    object_ids = continuation_ids(tokenizer, fact.object)
    ids = (*prompt.ids, *object_ids[:-1])
    if len(ids) > model.max_positions:
        raise InputError(
            f"fact {fact.id!r} has {len(ids)} tokens, expected at most {model.max_positions}, all that {model.name!r} "
            f"can take: shorten its prompt"
        )
    foil_id = None if fact.foil is None else continuation_ids(tokenizer, fact.foil)[0]
    if foil_id == object_ids[0]:
        raise InputError(
            f"fact {fact.id!r}: the foil {fact.foil!r} starts with the same token as the object {fact.object!r}, "
            f"so their logits cannot differ: choose another foil"
        )
    return TracedFact(
        fact=fact,
        ids=ids,
        prompt_length=len(prompt.ids),
        subject=prompt.subject,
        object_ids=tuple(object_ids),
        foil_id=foil_id,
        roles=tuple(role_of(i, prompt.subject, len(prompt.ids)) for i in range(len(prompt.ids))),
        tokens=tuple(tokenizer.decode([token]) for token in prompt.ids),
    )


def known_facts(model: Model, facts: Sequence[Fact]) -> tuple[list[TracedFact], list[Dropped]]:
    """Split facts into those whose object the model says greedily, and (id, reason) of the others."""
    prepared = [prepare(model, fact) for fact in facts]
    said: dict[str, list[int]] = {}
    for group in alike(prepared, KNOWN_ROWS):
        logits = model.run(batch(group, model), logits_to_keep=read_positions(group[0], model)).logits
        said |= {traced.fact.id: ids for traced, ids in zip(group, logits.argmax(-1).tolist(), strict=True)}
    known, dropped = [], []
    for traced in prepared:
        says = said[traced.fact.id]
        if says == list(traced.object_ids):
            known.append(traced)
        else:
            text = model.tokenizer.decode(says).strip()
            dropped.append((traced.fact.id, f"the model says {text!r}, the object is {traced.fact.object!r}"))
    return known, dropped


def with_roles(known: Sequence[TracedFact], config: TraceConfig) -> tuple[list[TracedFact], list[Dropped]]:
    """Split facts into those with a token of a role that is restored, and (id, reason) of the others."""
    if config.roles is None:
        return list(known), []
    found = [traced for traced in known if set(config.roles) & set(traced.roles)]
    wanted = " or ".join(config.roles)
    return found, [
        (traced.fact.id, f"its prompt {traced.fact.text!r} has no token of the role {wanted}")
        for traced in known
        if not set(config.roles) & set(traced.roles)
    ]


def with_donors(
    model: Model, known: Sequence[TracedFact], facts: Sequence[Fact], config: TraceConfig
) -> tuple[list[TracedFact], list[Dropped]]:
    """Give every fact the tokens of other subjects, one a sample, and (id, reason) of those that find none.

    A donor must fill the subject's place token for token and leave the rest of the prompt as it is. With fewer of
    them than samples, they take turns.
    """
    pool = Donors(model.tokenizer, facts)
    found, dropped = [], []
    for traced in known:
        donors = []
        for other in pool.of(traced.fact, config.seed):
            prompt = tokenize_prompt(model.tokenizer, traced.fact.prompt, other.subject)
            rest = (*prompt.ids[: prompt.subject.start], *prompt.ids[prompt.subject.stop :])
            own = traced.ids[: traced.prompt_length]
            if prompt.subject == traced.subject and rest == (*own[: traced.subject.start], *own[traced.subject.stop :]):
                donors.append(tuple(prompt.ids[i] for i in prompt.subject))
            if len(donors) == config.samples:
                break
        if donors:
            turns = tuple(donors[i % len(donors)] for i in range(config.samples))
            found.append(replace(traced, donors=turns))
        else:
            count = len(traced.subject)
            dropped.append((traced.fact.id, f"no other subject of {count} tokens with another object can replace it"))
    return found, dropped


def wanted(traced: TracedFact, config: TraceConfig) -> list[int]:
    """Positions that are restored: all of the prompt's, or those of the roles asked for."""
    return [i for i, role in enumerate(traced.roles) if config.roles is None or role in config.roles]


def batch(facts: Sequence[TracedFact], model: Model) -> Tokens:
    """Facts of one shape as a batch without padding."""
    ids = torch.tensor([traced.ids for traced in facts], device=model.device)
    return Tokens(ids, torch.ones_like(ids))


def read_positions(traced: TracedFact, model: Model) -> Tensor:
    """Positions whose logits predict the object's tokens."""
    return torch.arange(traced.prompt_length - 1, len(traced.ids), device=model.device)


def alike(facts: Sequence[TracedFact], size: int) -> Iterator[list[TracedFact]]:
    """Groups of facts of one shape, at most `size` in each."""
    shapes: dict[tuple[int, int], list[TracedFact]] = {}
    for traced in facts:
        shapes.setdefault(traced.shape, []).append(traced)
    for group in shapes.values():
        for start in range(0, len(group), size):
            yield group[start : start + size]
