"""Rows of the search: every prompt that a δ is judged on, and which of them share a pass.

A row's tokens before the subject's last do not feel δ: their keys and values are computed once, and only what
follows runs again at every step. Rows with as much to run share a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mechedit.batching import spare_tokens
from mechedit.data import EditRequest
from mechedit.errors import InputError
from mechedit.models import Model
from mechedit.prompts import continuation_ids, prefixed_prompts, tokenize_prompt
from mechedit.targets.config import TargetConfig


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt with all of an object but its last token, or one prompt of the KL term."""

    ids: tuple[int, ...]
    subject: int
    """Position of the subject's last token, where δ goes."""
    asked: tuple[int, ...]
    """Positions whose logits count."""
    labels: tuple[int, ...]
    """The tokens that `asked` should predict; none for the KL term."""
    fact: int
    """Of the batch."""
    prefix: int
    """Which one; −1 for the KL term."""
    weight: float
    """Of the row among those of its fact."""

    @property
    def width(self) -> int:
        """Tokens that feel δ."""
        return len(self.ids) - self.subject


def rows_of(
    model: Model, requests: Sequence[EditRequest], units: Sequence[int], prefixes: Sequence[str], config: TargetConfig
) -> list[Row]:
    """The rows of some facts: one a prefix, and one for the KL term of each δ.

    Raises:
        InputError: one is longer than the model takes, or an object gives no tokens.
    """
    rows, seen = [], set()
    for fact, (request, unit) in enumerate(zip(requests, units, strict=True)):
        wanted = continuation_ids(model.tokenizer, request.target_new)
        for place, prompt in enumerate(prefixed_prompts(model, request, prefixes)):
            # Ids are joined, never text: the object's tokens are those that are scored.
            ids = check_length(model, request, [*prompt.ids, *wanted[:-1]])
            asked = range(len(prompt.ids) - 1, len(ids))
            rows.append(
                Row(
                    ids=tuple(ids), subject=prompt.last_subject, asked=tuple(asked), labels=tuple(wanted),
                    fact=fact, prefix=place, weight=1 / len(prefixes),
                )
            )  # fmt: skip
        if unit not in seen:
            seen.add(unit)
            kept = tokenize_prompt(model.tokenizer, config.kl_prompt, request.subject)
            place = len(kept.ids) - 1 if config.convention == "default" else kept.last_subject
            ids = tuple(check_length(model, request, kept.ids))
            rows.append(
                Row(ids=ids, subject=kept.last_subject, asked=(place,), labels=(), fact=fact, prefix=-1, weight=1.0)
            )
    return rows


def passes(model: Model, rows: Sequence[Row], pass_tokens: int) -> Iterator[list[Row]]:
    """Rows that run together: of like shape, as long as what padding wastes costs less than a pass."""
    allowance = spare_tokens(model)
    together: list[Row] = []
    wasted = 0
    for row in sorted(rows, key=lambda row: (len(row.asked), bool(row.labels), row.width)):
        if together:
            # Widths rise, so that every row before is padded to this one's.
            more = (row.width - together[-1].width) * len(together)
            alike = len(row.asked) == len(together[0].asked) and bool(row.labels) == bool(together[0].labels)
            if not alike or wasted + more > allowance or (len(together) + 1) * row.width > pass_tokens:
                yield together
                together, wasted, more = [], 0, 0
            wasted += more
        together.append(row)
    if together:
        yield together


def check_length(model: Model, request: EditRequest, ids: Sequence[int]) -> list[int]:
    """The ids as a list; InputError when the model has no room for them."""
    if len(ids) > model.max_positions:
        raise InputError(
            f"request {request.id!r} takes {len(ids)} tokens with its prefix and object, expected at most "
            f"{model.max_positions}; shorten the prompt or the prefixes"
        )
    return list(ids)
