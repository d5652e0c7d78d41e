"""From text to tokens: where the subject lies, prompts joined with objects, right-padded batches.

Spans come from the tokenizer's character offsets, so merges across a boundary, BOS tokens and CJK text
need no special care (peers locate the subject by counting separately tokenised pieces, which shifts).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechedit.errors import InputError
from mechedit.facts import EditRequest, check_template, fill
from mechedit.models import Model, Tokens

BARE = "{}"
"""The prefix that leaves the prompt as it is."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A tokenised prompt and the tokens of its subject."""

    ids: tuple[int, ...]
    subject: range
    """Token positions that hold any character of the subject."""

    @property
    def last_subject(self) -> int:
        """Position of the subject's last token, where MEMIT edits."""
        return self.subject[-1]


def encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of `text`, with the tokenizer's own special tokens, and each token's character span."""
    encoded = tokenizer(text, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [tuple(span) for span in encoded["offset_mapping"]]


def tokenize_prompt(tokenizer: Any, template: str, subject: str) -> Prompt:
    """Tokenise `template` with `subject` in its `{}` and find the subject's tokens by character offsets.

    Raises:
        InputError: the template lacks its one `{}`, or no token holds the subject.
    """
    check_template(template, "prompt")
    before, after = template.split("{}")
    ids, spans = encode(tokenizer, before + subject + after)
    start, end = len(before), len(before) + len(subject.rstrip())
    inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]
    if not inside:
        raise InputError(
            f"no token of {before + subject + after!r} holds the subject {subject!r}; expected a subject of "
            f"at least one token: check the subject's text"
        )
    return Prompt(ids=tuple(ids), subject=range(inside[0], inside[-1] + 1))


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an object that follows a prompt: with one leading space, without special tokens.

    Raises:
        InputError: the text gives no tokens.
    """
    ids = list(tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"])
    if not text.strip() or not ids:
        raise InputError(f"the object {text!r} gives no tokens; expected text that is not empty")
    return ids


def pieces(rows: Sequence[list[int]], spare: float | int, most: int) -> Iterator[Sequence[list[int]]]:
    """Rows, longest first, that run together: as long as padding stays within `spare` tokens, and all within `most`."""
    begin, wasted = 0, 0
    for end, row in enumerate(rows):
        width = len(rows[begin])
        wasted += width - len(row)
        if end > begin and (wasted > spare or width * (end - begin + 1) > most):
            yield rows[begin:end]
            begin, wasted = end, 0
    if rows:
        yield rows[begin:]


def pad(rows: Sequence[Sequence[int]], tokenizer: Any, device: Any = "cpu") -> Tokens:
    """Right-pad rows of token ids to one batch."""
    width = max(len(row) for row in rows)
    filler = tokenizer.pad_token_id
    if filler is None:
        filler = tokenizer.eos_token_id or 0
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(list(row), dtype=torch.long)
        mask[index, : len(row)] = 1
    return Tokens(ids.to(device), mask.to(device))


def column(positions: Sequence[int], device: Any = "cpu") -> Int[Tensor, "batch 1"]:
    """One position a row, in the form that `Patch.positions` takes."""
    return torch.tensor(list(positions), dtype=torch.long, device=device)[:, None]


def make_prefixes(
    model: Model,
    *,
    seed: int = 0,
    starts: Sequence[str] = ("The", "Therefore", "Because", "I", "You"),
    length: int = 10,
) -> tuple[str, ...]:
    """The bare prompt, and short texts that the model makes up itself, joined as `text. {}`.

    Each text begins with one of `starts` and has `length` tokens in all, drawn among the five likeliest as in
    the published code; here the draw depends on `seed` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [_continued(model, start, length, generator) for start in starts]
    return (BARE, *(f"{text}. {BARE}" for text in texts))


def check_prefixes(prefixes: Sequence[str]) -> tuple[str, ...]:
    """The prefixes as a tuple; InputError when there are none or one lacks its one {}."""
    if isinstance(prefixes, str) or not prefixes:
        raise InputError(f"the prefixes are {prefixes!r}, expected a list of templates such as ['{{}}']")
    for prefix in prefixes:
        check_template(prefix, "prefix")
    return tuple(prefixes)


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise InputError when `value` is none of `choices`."""
    if value not in choices:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(choices)}; choose one of them")


def prefixed_prompts(model: Model, request: EditRequest, prefixes: Sequence[str]) -> list[Prompt]:
    """The request's prompt behind each prefix, tokenised."""
    return [tokenize_prompt(model.tokenizer, fill(prefix, request.prompt), request.subject) for prefix in prefixes]


@torch.no_grad()
def _continued(model: Model, start: str, length: int, generator: torch.Generator) -> str:
    """Extend `start` to `length` tokens and make it safe to put in front of a prompt."""
    ids, _ = encode(model.tokenizer, start)
    for _ in range(length - len(ids)):
        last = torch.tensor([len(ids) - 1], device=model.device)
        logits = model.run(pad([ids], model.tokenizer, model.device), keep=last).logits
        assert logits is not None, "this run was not stopped early"
        scores = logits[0, -1].float().cpu()
        scores[model.tokenizer.all_special_ids] = -torch.inf
        best = scores.topk(5)
        ids.append(int(best.indices[torch.multinomial(best.values.softmax(-1), 1, generator=generator)]))
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    return " ".join(text.replace("{", " ").replace("}", " ").split())
