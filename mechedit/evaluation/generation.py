"""Text that the model writes, and how varied it is (GE: MEMIT Appendix C.2, Eq. 27).

Each text has random draws of its own, so it does not depend on what else is in the batch. Prompts of about the same
length are written together (`generation_plan`), with a KV cache that texts leave as they end.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.errors import InputError, brief, check_at_least
from mechedit.evaluation.config import EntropyForm, Words
from mechedit.evaluation.generation_plan import plan_generation
from mechedit.models import Model, exclusive
from mechedit.prompt_tokens import encode_texts
from mechedit.shards import run_dealt


@exclusive
def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    tokens: int,
    top_k: int = 1,
    uniform: Float[np.ndarray, "prompt token"] | None = None,
    stop_words: Sequence[str] = (),
    batch_size: int = 64,
    with_prompt: bool = False,
    ends: bool = True,
) -> list[str]:
    """Continue each prompt by at most `tokens` new tokens; stops at the end-of-text token, or before a stop word.

    The next token is drawn from the `top_k` likeliest, with their probabilities renormalized, by inverting
    their cumulative distribution at one uniform number; top_k = 1 is greedy decoding. What takes long is announced on
    the standard error before it starts.

    Args:
        model: the model.
        prompts: texts to continue.
        tokens: new tokens per prompt; fewer where the model's context ends.
        top_k: number of likeliest tokens to draw from.
        uniform: numbers in [0, 1), one row per prompt (`uniform_draws`); not needed when top_k is 1.
        stop_words: texts that end a continuation, which is cut before the first of them.
        batch_size: prompts per forward pass.
        with_prompt: whether `tokens` counts those of the prompt as well.
        ends: whether a text ends at the end-of-text token; else that token is skipped and the text goes on.

    Returns:
        The continuations, without the prompts.

    Raises:
        InputError: a prompt without tokens, or one that fills the model's context; numbers out of range; no numbers to
            draw by.
    """
    for name, value, least in (("tokens", tokens, 0), ("top_k", top_k, 1), ("batch_size", batch_size, 1)):
        check_at_least(name, value, least)
    if uniform is None:
        if top_k > 1:
            raise InputError(
                f"top_k is {top_k} without uniform numbers, expected 1, the likeliest token, or a number in [0, 1) for "
                f"each prompt and token to draw by: pass uniform"
            )
        uniform = np.zeros((len(prompts), tokens))
    encoded = _prompt_ids(model, prompts)
    plan = plan_generation([len(ids) for ids in encoded], tokens, batch_size)
    plan.announce(model)
    continuations = [""] * len(prompts)

    def write(batch: Sequence[int]) -> list[str]:
        texts = [
            _Text(
                model, encoded[index], uniform[index],
                tokens - len(encoded[index]) if with_prompt else tokens, stop_words,
            )
            for index in batch
        ]  # fmt: skip
        _write(model, texts, top_k, set(model.end_tokens) if ends else set())
        return [text.continuation for text in texts]

    written = run_dealt(plan.batches, write, len, "writing text", leave=False)
    for batch, batch_texts in zip(plan.batches, written, strict=True):
        for index, text in zip(batch, batch_texts, strict=True):
            continuations[index] = text
    return continuations


def uniform_draws(seed: int, names: Sequence[str], tokens: int) -> Float[np.ndarray, "name token"]:
    """Uniform numbers in [0, 1) for each name, which depend on the seed and that name alone."""
    seeds = [int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) for name in names]
    return np.stack([np.random.default_rng(s).random(tokens) for s in seeds])


def _prompt_ids(model: Model, prompts: Sequence[str]) -> list[list[int]]:
    encoded = [ids for ids, _ in encode_texts(model.tokenizer, prompts)]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not 0 < len(ids) < model.max_positions:
            raise InputError(
                f"the prompt {brief(prompt)} has {len(ids)} tokens, expected between 1 and "
                f"{model.max_positions - 1} (the context of {model.name}): fill it in, or shorten it"
            )
    return encoded


class _Text:
    """A prompt and what has been written after it."""

    def __init__(
        self,
        model: Model,
        prompt: list[int],
        uniform: Float[np.ndarray, " token"],
        tokens: int,
        stop_words: Sequence[str],
    ) -> None:
        self.model, self.prompt, self.uniform, self.stop_words = model, prompt, uniform, stop_words
        self.limit = max(0, min(tokens, model.max_positions - len(prompt)))
        self.new_ids: list[int] = []
        self.ended = self.limit == 0

    @property
    def continuation(self) -> str:
        """Text of the new tokens, cut before the first stop word."""
        text = _decode(self.model, self.prompt, self.new_ids)
        return text[: min((text.index(word) for word in self.stop_words if word in text), default=len(text))]

    def draw(self, position: int) -> float:
        """The uniform number that decides the token at a position; 0 where none is written."""
        return float(self.uniform[position - len(self.prompt)]) if self._writes(position) else 0.0

    def next_id(self, position: int, sampled: int, end_tokens: Collection[int]) -> int:
        """The token at a position: the prompt's own, or the sampled one, which is written down."""
        if not self._writes(position):
            return sampled if self.ended else self.prompt[position]
        if sampled in end_tokens:
            self.ended = True
            return sampled
        self.new_ids.append(sampled)
        self.ended = len(self.new_ids) == self.limit or (bool(self.stop_words) and self._has_stop_word())
        return sampled

    def _writes(self, position: int) -> bool:
        return position >= len(self.prompt) and not self.ended

    def _has_stop_word(self) -> bool:
        text = _decode(self.model, self.prompt, self.new_ids)
        return any(word in text for word in self.stop_words)


@torch.no_grad()
def _write(model: Model, texts: Sequence[_Text], top_k: int, end_tokens: Collection[int]) -> None:
    """Write all texts of a batch, from the end of its shortest prompt on."""
    device = model.device
    running, rows, cache = [text for text in texts if not text.ended], None, None
    position = min((len(text.prompt) for text in running), default=0)
    ids = torch.tensor([text.prompt[:position] for text in running], dtype=torch.long, device=device)
    while not all(text.ended for text in running):
        mask = torch.ones(len(running), position, dtype=torch.long, device=device)
        logits, cache = model.next_logits(ids, mask, cache, rows)
        draws = [text.draw(position) for text in running]
        sampled = sample_top_k(logits, top_k, torch.tensor(draws, dtype=torch.float64, device=device))
        choices = sampled[:, 0].tolist()
        next_ids = [text.next_id(position, choice, end_tokens) for text, choice in zip(running, choices, strict=True)]
        position += 1
        rows, going = None, [row for row, text in enumerate(running) if not text.ended]
        # States of other blocks than attention cannot be cut out of a cache: such texts stay until the last one ends.
        if len(going) < len(running) and model.keeps_keys:
            rows = torch.tensor(going, dtype=torch.long, device=device)
            running, next_ids = [running[row] for row in going], [next_ids[row] for row in going]
        ids = torch.tensor(next_ids, dtype=torch.long, device=device)[:, None]


def sample_top_k(
    logits: Float[Tensor, "batch vocab"], top_k: int, uniform: Float[Tensor, " batch"]
) -> Int[Tensor, "batch 1"]:
    """Draw one of each row's `top_k` likeliest tokens: the first whose cumulative probability exceeds `uniform`."""
    top = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    cumulative = top.values.double().softmax(-1).cumsum(-1)
    # Rounding may leave the last cumulative probability below 1, so the last token takes all that lies above it.
    rank = (uniform[:, None] >= cumulative[:, :-1]).sum(1, keepdim=True)
    return top.indices.gather(1, rank)


def _decode(model: Model, prompt: Sequence[int], new_ids: Sequence[int]) -> str:
    """Text of the new tokens; decoded with the prompt, because some tokenizers drop a leading space."""
    prompt_text, full_text = (
        model.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids in (prompt, [*prompt, *new_ids])
    )
    return full_text[len(prompt_text) :]


def split_words(text: str, words: Words = "nltk") -> list[str]:
    """The words of a text and its punctuation marks.

    `nltk` is what the published code does: NLTK's tokenizer (do|n't) in each of Punkt's English sentences. `simple` are
    runs of letters and digits, and single marks.
    """
    if words == "simple":
        return re.findall(r"\w+|[^\w\s]", text)
    sentences, tokenizer = _nltk()
    return [word for sentence in sentences.tokenize(text) for word in tokenizer.tokenize(sentence)]


@cache
def _nltk() -> tuple[Any, Any]:
    """Punkt's English sentences, whose model comes with its package, and NLTK's words; imported when first needed."""
    from nltk.tokenize import NLTKWordTokenizer
    from punkt import PunktSentenceTokenizer, load_model

    return PunktSentenceTokenizer(load_model("english")), NLTKWordTokenizer()


def ngram_entropy(text: str, form: EntropyForm = "averaged", words: Words = "nltk") -> float:
    """Weighted bigram and trigram entropy of a text, in bits (MEMIT Eq. 27).

    H_n = −Σ f log2 f over the relative frequencies f of the text's n-grams of words. Repetitive text scores low.
    `sum` is the equation: 2/3 · H_2 + 4/3 · H_3. `averaged`, half of it, is what the published code
    computes and (× 100) what the published tables hold.
    """
    tokens = split_words(text, words)
    total = 2 / 3 * _entropy(tokens, 2) + 4 / 3 * _entropy(tokens, 3)
    return total / 2 if form == "averaged" else total


def _entropy(tokens: Sequence[str], n: int) -> float:
    """Entropy of the n-grams in bits; 0 where there are fewer than n words."""
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    frequencies = np.array(list(counts.values()), dtype=float) / max(counts.total(), 1)
    return float((frequencies * np.log2(1 / frequencies)).sum())
