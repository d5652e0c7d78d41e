"""The size of a typical fact, in tokens, and records of that size in place of facts that are not read yet."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mechedit.bounds import check_numbers
from mechedit.data import Fact
from mechedit.errors import InputError, check_at_least
from mechedit.models import ModelShapes
from mechedit.targets.search_prompts import KL_PROMPT, SearchPrompt
from mechedit.trace.labels import role_of
from mechedit.trace.traced_fact import TracedFact

LONGEST = 1000
"""Tokens of each part at most: the cells of each token are counted one by one."""
_KL_AFTER = 2
"""Tokens of the KL prompt after the subject, as of `{} is a`."""


@dataclass(frozen=True, kw_only=True)
class PromptShape:
    """Tokens of a typical fact; the defaults are those of a short sentence that begins with its subject."""

    before: int = 1
    """Tokens before the subject, one that begins the text among them."""
    subject: int = 4
    """Tokens of the subject."""
    after: int = 4
    """Tokens of the prompt after the subject."""
    target: int = 1
    """Tokens of the object."""
    prefix: int = 11
    """Tokens of a generated text in front of the prompt."""

    def __post_init__(self) -> None:
        check_numbers(self, **dict.fromkeys(("before", "subject", "after", "target", "prefix"), LONGEST))
        for name, least in (("before", 0), ("subject", 1), ("after", 0), ("target", 1), ("prefix", 0)):
            check_at_least(name, getattr(self, name), least)

    def require_room(self, shapes: ModelShapes) -> None:
        """Refuse a model whose context is shorter than such a fact behind a generated text.

        Raises:
            InputError: says how long both are.
        """
        length = self.prefix + self.prompt + self.target - 1
        if length > shapes.max_positions:
            raise InputError(
                f"a prompt of {length} tokens (with its prefix and its object) is longer than the context of "
                f"{shapes.name!r:.80}, expected at most {shapes.max_positions}; choose smaller numbers of tokens"
            )

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.before + self.subject + self.after

    @property
    def at(self) -> int:
        """Position of the subject's last token."""
        return self.before + self.subject - 1

    @staticmethod
    def of(facts: Sequence[TracedFact]) -> PromptShape:
        """The mean over facts."""
        before, subject, after, target = (
            round(statistics.mean(values))
            for values in zip(
                *(
                    (
                        fact.subject.start,
                        len(fact.subject),
                        fact.prompt_length - fact.subject.stop,
                        len(fact.object_ids),
                    )
                    for fact in facts
                ),
                strict=True,
            )
        )
        return PromptShape(before=before, subject=max(1, subject), after=after, target=max(1, target))

    def traced_fact(self) -> TracedFact:
        """A fact of this size."""
        subject = range(self.before, self.before + self.subject)
        return TracedFact(
            fact=Fact(id="typical", subject="subject", prompt="{}", object="object"),
            ids=(0,) * (self.prompt + self.target - 1),
            prompt_length=self.prompt,
            subject=subject,
            object_ids=(0,) * self.target,
            foil_id=None,
            roles=tuple(role_of(position, subject, self.prompt) for position in range(self.prompt)),
            tokens=("",) * self.prompt,
        )

    def search_prompts(self, prefixes: int, *, kl: bool) -> list[SearchPrompt]:
        """The prompts of one search for z: the bare one, those behind generated texts, and the KL prompt.

        Args:
            prefixes: number of generated texts.
            kl: whether there is a KL prompt.
        """
        rows = [
            SearchPrompt(
                ids=(0,) * (front + self.prompt + self.target - 1), at=front + self.at,
                scored=tuple(range(front + self.prompt - 1, front + self.prompt + self.target - 1)),
                labels=(0,) * self.target, fact=0, template=index, weight=1 / (prefixes + 1), bare=index == 0,
            )
            for index, front in enumerate([0, *[self.prefix] * prefixes])
        ]  # fmt: skip
        end = self.at + 1 + _KL_AFTER
        kl_row = SearchPrompt(
            ids=(0,) * end, at=self.at, scored=(end - 1,), labels=(), fact=0, template=KL_PROMPT, weight=0.0
        )
        return [*rows, kl_row] if kl else rows

    def shared(self, prefixes: int) -> dict[int, int]:
        """The tokens that all prompts behind each of so many generated texts begin with, by the text's index."""
        return dict.fromkeys(range(1, prefixes + 1), self.prefix)
