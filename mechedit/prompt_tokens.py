"""From text to tokens: the subject's tokens in a prompt, the tokens of an object, and context templates.

Spans come from the tokenizer's character offsets, so merges across a boundary, BOS tokens and CJK text
need no special care (other toolkits count the tokens of separately tokenized parts, which can be off by some).

A *prefix* is a context template of MEMIT: a text in front of the prompt, with `{}` for the whole prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mechedit.batching import pad
from mechedit.data import EditRequest, check_template, fill
from mechedit.errors import InputError
from mechedit.models import Model

BARE = "{}"
"""The context template that leaves the prompt as it is."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A tokenized prompt and the tokens of its subject."""

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
    """Tokenize `template` with `subject` in its `{}` and find the subject's tokens by character offsets.

    Raises:
        InputError: the template lacks its one `{}`, or no token holds the subject.
    """
    check_template(template, "prompt")
    before, after = template.split("{}")
    ids, spans = encode(tokenizer, before + subject + after)
    start, end = len(before), len(before) + len(subject.rstrip())
    subject_tokens = [i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]
    if not subject_tokens:
        raise InputError(
            f"no token of {before + subject + after!r} holds the subject {subject!r}; expected a subject of "
            f"at least one token: check the subject's text"
        )
    return Prompt(ids=tuple(ids), subject=range(subject_tokens[0], subject_tokens[-1] + 1))


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of an object that follows a prompt: with one leading space, without special tokens.

    Raises:
        InputError: the text gives no tokens.
    """
    ids = list(tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"])
    if not text.strip() or not ids:
        raise InputError(f"the object {text!r} gives no tokens; expected text that is not empty")
    return ids


def make_prefixes(
    model: Model,
    *,
    seed: int = 0,
    starts: Sequence[str] = ("The", "Therefore", "Because", "I", "You"),
    length: int = 10,
) -> tuple[str, ...]:
    """Context templates: the bare prompt, and short texts that the model generates, joined as `text. {}`.

    Each text begins with one of `starts` and has `length` tokens in all, each drawn from the five likeliest as in
    the published code; here the draws depend on `seed` alone.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = [_generate(model, start, length, generator) for start in starts]
    return (BARE, *(f"{text}. {BARE}" for text in texts))


def check_prefixes(prefixes: Sequence[str]) -> tuple[str, ...]:
    """The context templates as a tuple.

    Raises:
        InputError: there are none, or one lacks its one {}.
    """
    if isinstance(prefixes, str) or not prefixes:
        raise InputError(f"the prefixes are {prefixes!r}, expected a list of templates such as ['{{}}']")
    for prefix in prefixes:
        check_template(prefix, "prefix")
    return tuple(prefixes)


def prefixed_prompts(model: Model, request: EditRequest, prefixes: Sequence[str]) -> list[Prompt]:
    """The request's prompt in each context template, tokenized."""
    return [tokenize_prompt(model.tokenizer, fill(prefix, request.prompt), request.subject) for prefix in prefixes]


@torch.no_grad()
def _generate(model: Model, start: str, length: int, generator: torch.Generator) -> str:
    """Extend `start` to `length` tokens, without braces, which a template reserves for the prompt."""
    ids, _ = encode(model.tokenizer, start)
    for _ in range(length - len(ids)):
        last = torch.tensor([len(ids) - 1], device=model.device)
        logits = model.run(pad([ids], model.tokenizer, model.device), logits_to_keep=last).logits
        scores = logits[0, -1].float().cpu()
        scores[[special for special in model.tokenizer.all_special_ids if special < len(scores)]] = -torch.inf
        likeliest = scores.topk(5)
        choice = torch.multinomial(likeliest.values.softmax(-1), 1, generator=generator)
        ids.append(int(likeliest.indices[choice]))
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    return " ".join(text.replace("{", " ").replace("}", " ").split())
