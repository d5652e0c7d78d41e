"""Context templates: texts in front of a prompt, behind which a fact is to hold as well (MEMIT calls them prefixes).

A *prefix* is a text with `{}` for the whole prompt; the bare prompt is `{}` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from mechedit.batching import pad
from mechedit.data import EditRequest, check_template, fill
from mechedit.errors import InputError, brief
from mechedit.models import Model, exclusive
from mechedit.models.vocabulary import check_ids
from mechedit.prompt_tokens import WORD, Prompt, complete_facts, encode, tokenize_prompts

BARE = "{}"
"""The context template that leaves the prompt as it is."""
_GENERATED: WeakKeyDictionary[Model, dict[tuple[Any, ...], tuple[str, ...]]] = WeakKeyDictionary()
"""Context templates that were generated, by model, and then by its weights and by what was asked for."""
_STATES = 64
"""Context templates that are remembered of a model."""


@exclusive
def make_prefixes(
    model: Model,
    *,
    seed: int = 0,
    starts: Sequence[str] = ("The", "Therefore", "Because", "I", "You"),
    lengths: Sequence[int] = (10,),
    count: int = 5,
) -> tuple[str, ...]:
    """Context templates: the bare prompt, and short texts that the model generates, joined as `text. {}`.

    Each text begins with one of `starts` and has one of `lengths` tokens in all, each drawn from the five likeliest as
    in the published code; here the draws depend on `seed` alone. There are `count` texts; where these are more than
    `starts` or `lengths`, these take turns. An empty start is the tokenizer's beginning or end of text, which counts as
    a token and is not part of the text. The same call on the same weights generates once.
    """
    remembered = _GENERATED.setdefault(model, {})
    key = (model.identity(), seed, tuple(starts), tuple(lengths), count)
    if key not in remembered:
        generator = torch.Generator().manual_seed(seed)
        texts = [_generate(model, starts[i % len(starts)], lengths[i % len(lengths)], generator) for i in range(count)]
        while len(remembered) >= _STATES:
            remembered.pop(next(iter(remembered)))
        remembered[key] = (BARE, *(f"{text}. {BARE}" for text in texts))
    return remembered[key]


def check_prefixes(prefixes: Sequence[str]) -> tuple[str, ...]:
    """The context templates as a tuple.

    Raises:
        InputError: there are none, or one lacks its one {}.
    """
    if not isinstance(prefixes, list | tuple) or not prefixes:
        raise InputError(f"the prefixes are {brief(prefixes)}, expected a list of templates such as ['{{}}']")
    for prefix in prefixes:
        check_template(prefix, "prefix")
    return tuple(prefixes)


def prefixed_prompts(model: Model, request: EditRequest, prefixes: Sequence[str]) -> list[Prompt]:
    """The request's prompt in each context template, tokenized."""
    templates = [request_template(request, prefix) for prefix in prefixes]
    return tokenize_prompts(model.tokenizer, templates, request.subject)


def completed_prompts(model: Model, request: EditRequest, prefixes: Sequence[str]) -> list[tuple[Prompt, list[int]]]:
    """The request's prompt in each context template, with the new object's tokens behind it (`complete_fact`)."""
    templates = [request_template(request, prefix) for prefix in prefixes]
    completed = complete_facts(model.tokenizer, templates, request.subject, request.target_new, request.joint)
    for _, target in completed:
        check_ids(torch.tensor(target, device="cpu"), model.vocab_size, model.tokenizer)
    return completed


def request_template(request: EditRequest, prefix: str = BARE) -> str:
    """The request's prompt in a context template and in its turn, with `{}` for the subject."""
    return fill(request.turn, fill(prefix, request.prompt))


@torch.no_grad()
def _generate(model: Model, start: str, length: int, generator: torch.Generator) -> str:
    """Extend `start` to `length` tokens, without braces, which a template reserves for the prompt."""
    ids = encode(model.tokenizer, start)[0] or _beginning(model.tokenizer)
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


def _beginning(tokenizer: Any) -> list[int]:
    """The token that texts begin with, else the one that ends them, else a word."""
    special = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    return special[:1] or encode(tokenizer, WORD)[0]
