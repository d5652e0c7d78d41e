"""Facts in tokens: where the subject lies, what each token is, which facts the model knows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechedit.batching import group_by_shape, pad
from mechedit.data import Fact
from mechedit.errors import InputError, brief, shortened_inside
from mechedit.models import Model, Tokens
from mechedit.models.vocabulary import check_ids
from mechedit.prompt_tokens import Prompt, complete_fact, tokenize_prompt
from mechedit.trace.config import TraceConfig
from mechedit.trace.corruption import ReplacementSubjects
from mechedit.trace.labels import role_of

KNOWN_ROWS = 64
"""Facts per forward pass when their greedy completions are read."""

_REASONS = 270
"""Characters of the reasons that a message gives why facts are not traced."""

Dropped = tuple[str, str]
"""A fact's id, and why it is not traced."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedFact:
    """A fact in tokens, ready to corrupt."""

    fact: Fact
    ids: tuple[int, ...]
    """Token ids of the prompt, then of the object but for its last token (teacher-forced)."""
    prompt_length: int
    """Tokens of the prompt."""
    subject: range
    """Positions of the subject."""
    object_ids: tuple[int, ...]
    foil_id: int | None
    """First token of the fact's own foil."""
    roles: tuple[str, ...]
    """Role of each prompt token."""
    tokens: tuple[str, ...]
    """Text of each prompt token."""
    replacements: tuple[tuple[int, ...], ...] = ()
    """Token ids of the replacement subject of each sample, where tokens are replaced."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of tokens and of object tokens; facts of one shape make a batch without padding."""
        return len(self.ids), len(self.object_ids)

    def corrupted(self, extra_tokens: int = 0) -> range:
        """Positions that are corrupted: the subject's, and those after it as far as the prompt goes."""
        return range(self.subject.start, min(self.subject.stop + extra_tokens, self.prompt_length))


def tokenize_fact(model: Model, fact: Fact) -> TracedFact:
    """Tokenize a fact and name the role of each prompt token.

    Raises:
        InputError: a subject or object without tokens, a foil that starts as the object does, or more tokens than
            the model can take.
    """
    tokenizer = model.tokenizer
    prompt, object_ids = complete_fact(tokenizer, fact.template, fact.subject, fact.object, fact.joint)
    check_ids(torch.tensor(object_ids, device="cpu"), model.vocab_size, tokenizer)
    ids = (*prompt.ids, *object_ids[:-1])
    if len(ids) > model.max_positions:
        raise InputError(
            f"fact {brief(fact.id)} has {len(ids)} tokens, expected at most {model.max_positions}, all that "
            f"{model.name!r} "
            f"can take: shorten its prompt"
        )
    foil_id = None if fact.foil is None else _foil_id(tokenizer, fact, prompt)
    if foil_id == object_ids[0]:
        raise InputError(
            f"fact {brief(fact.id)}: the foil {brief(fact.foil)} starts with the same token as the object "
            f"{brief(fact.object)}, "
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


def _foil_id(tokenizer: Any, fact: Fact, prompt: Prompt) -> int:
    """The first token that the foil has after the prompt.

    Raises:
        InputError: the tokenizer merges the prompt's end with the foil, but not with the object, or otherwise.
    """
    assert fact.foil is not None
    foil_prompt, foil_ids = complete_fact(tokenizer, fact.template, fact.subject, fact.foil, fact.joint)
    if foil_prompt.ids != prompt.ids:
        raise InputError(
            f"fact {brief(fact.id)}: the tokenizer merges the prompt's end with the foil {brief(fact.foil)} "
            f"otherwise than with "
            f"the object {brief(fact.object)}, so they do not follow the same tokens: end the prompt without white "
            f"space, "
            f"or choose another foil"
        )
    return foil_ids[0]


def known_facts(model: Model, facts: Sequence[Fact]) -> tuple[list[TracedFact], list[Dropped]]:
    """Split facts into those that the model completes greedily with their object, and (id, reason) of the others."""
    tokenized = [tokenize_fact(model, fact) for fact in facts]
    completions: dict[str, list[int]] = {}
    for group in group_by_shape(tokenized, KNOWN_ROWS, lambda traced: traced.shape):
        logits = model.run(as_batch(group, model), logits_to_keep=read_positions(group, model)).logits
        completions |= {traced.fact.id: ids for traced, ids in zip(group, logits.argmax(-1).tolist(), strict=True)}
    known, dropped = [], []
    for traced in tokenized:
        completion = completions[traced.fact.id]
        if completion == list(traced.object_ids):
            known.append(traced)
        else:
            # What comes behind the first other token was computed behind the object's, and is not what it would say.
            pairs = zip(completion, traced.object_ids, strict=True)
            wrong = next(index for index, (token, expected) in enumerate(pairs) if token != expected)
            text = model.tokenizer.decode(completion[: wrong + 1]).strip()
            dropped.append((traced.fact.id, f"the model says {brief(text)}, not {brief(traced.fact.object)}"))
    return known, dropped


def require_known(known: int, facts: int, dropped: Sequence[Dropped], least: int) -> None:
    """Refuse to go on with fewer facts than a trace needs.

    Args:
        known: number of facts that can be traced.
        facts: number of all facts.
        dropped: the others, with the reasons.
        least: fewest that are needed.

    Raises:
        InputError: says how many of how many can be traced, and of up to five others why not, each in a part of a line.
    """
    if known >= least:
        return
    reasons = [f"{brief(name)}: {reason}" for name, reason in dropped[:5]]
    if len("; ".join(reasons)) > _REASONS:
        reasons = [shortened_inside(reason, _REASONS // 3 - 2) for reason in reasons[:3]]
    shown = "; ".join(reasons) + ("; …" if len(reasons) < len(dropped) else "")
    raise InputError(
        f"{known or 'none'} of the {facts} facts can be traced, expected at least {least}"
        f"{f' ({shown})' if shown else ''}; give more facts that the model knows"
    )


def with_roles(known: Sequence[TracedFact], config: TraceConfig) -> tuple[list[TracedFact], list[Dropped]]:
    """Split facts into those with a token of a role that is restored, and (id, reason) of the others."""
    if config.roles is None:
        return list(known), []
    roles = set(config.roles)
    reason = f"has no token of the role {' or '.join(config.roles)}"
    return [traced for traced in known if roles & set(traced.roles)], [
        (traced.fact.id, f"its prompt {brief(traced.fact.text)} {reason}")
        for traced in known
        if not roles & set(traced.roles)
    ]


def with_replacements(
    model: Model, known: Sequence[TracedFact], facts: Sequence[Fact], config: TraceConfig
) -> tuple[list[TracedFact], list[Dropped]]:
    """Give each fact the tokens of another subject per sample, and (id, reason) of the facts that have none.

    A replacement must fill the subject's positions token for token and leave the rest of the prompt unchanged. With
    fewer of them than samples, they take turns.
    """
    pool = ReplacementSubjects(model.tokenizer, facts)
    replaceable, dropped = [], []
    for traced in known:
        replacements = []
        for candidate in pool.of(traced.fact, config.seed):
            prompt = tokenize_prompt(model.tokenizer, traced.fact.template, candidate.subject)
            rest = (*prompt.ids[: prompt.subject.start], *prompt.ids[prompt.subject.stop :])
            prompt_ids = traced.ids[: traced.prompt_length]
            expected_rest = (*prompt_ids[: traced.subject.start], *prompt_ids[traced.subject.stop :])
            if prompt.subject == traced.subject and rest == expected_rest:
                replacements.append(tuple(prompt.ids[i] for i in prompt.subject))
            if len(replacements) == config.samples:
                break
        if replacements:
            per_sample = tuple(replacements[i % len(replacements)] for i in range(config.samples))
            replaceable.append(replace(traced, replacements=per_sample))
        else:
            count = len(traced.subject)
            dropped.append((traced.fact.id, f"no other subject of {count} tokens with another object can replace it"))
    return replaceable, dropped


def restored_positions(traced: TracedFact, config: TraceConfig) -> list[int]:
    """Positions that are restored: all of the prompt's, or those of the roles asked for."""
    return [i for i, role in enumerate(traced.roles) if config.roles is None or role in config.roles]


def longest_of(facts: Sequence[TracedFact]) -> TracedFact:
    """The fact of the most tokens, which memory is reckoned for."""
    return max(facts, key=lambda traced: len(traced.ids))


def as_batch(facts: Sequence[TracedFact], model: Model) -> Tokens:
    """Facts as a batch; shorter ones are padded on the right."""
    return pad([traced.ids for traced in facts], model.tokenizer, model.device)


def read_positions(facts: Sequence[TracedFact], model: Model) -> Int[Tensor, "fact object"]:
    """Positions whose logits predict the tokens of the facts' objects, which all have equally many."""
    first = torch.tensor([traced.prompt_length - 1 for traced in facts], device=model.device)
    return first[:, None] + torch.arange(len(facts[0].object_ids), device=model.device)
