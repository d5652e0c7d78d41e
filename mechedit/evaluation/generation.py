"""Text that the model writes, and how varied it is (GE: MEMIT Appendix C.2, Eq. 27).

Each text has random draws of its own, so it does not depend on what else is in the batch. Prompts of equal length
are batched together: nothing is padded, so no position can shift.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from mechedit.batching import group_by_shape
from mechedit.errors import InputError
from mechedit.evaluation.config import EntropyForm
from mechedit.models import Model
from mechedit.prompt_tokens import encode


def generate(
    model: Model,
    prompts: Sequence[str],
    *,
    tokens: int,
    top_k: int = 1,
    uniform: Float[np.ndarray, "prompt token"] | None = None,
    batch_size: int = 64,
) -> list[str]:
    """Continue each prompt by at most `tokens` new tokens; stops at the end-of-text token.

    The next token is drawn from the `top_k` likeliest, with their probabilities renormalized, by inverting
    their cumulative distribution at one uniform number; top_k = 1 is greedy decoding.

    Args:
        model: the model.
        prompts: texts to continue.
        tokens: new tokens per prompt; fewer where the model's context ends.
        top_k: number of likeliest tokens to draw from.
        uniform: numbers in [0, 1), one row per prompt (`uniform_draws`); not needed when top_k is 1.
        batch_size: prompts per forward pass.

    Returns:
        The continuations, without the prompts.

    Raises:
        InputError: a prompt without tokens, or one that fills the model's context.
    """
    if uniform is None:
        assert top_k == 1, "sampling needs uniform draws"
        uniform = np.zeros((len(prompts), tokens))
    encoded = [_prompt_ids(model, prompt) for prompt in prompts]
    chunks = list(group_by_shape(range(len(prompts)), batch_size, lambda index: len(encoded[index])))
    continuations = [""] * len(prompts)
    for chunk in tqdm(chunks, desc="writing text", leave=False):
        ids = torch.tensor([encoded[index] for index in chunk], device=model.device)
        for index, new_ids in zip(chunk, _continue(model, ids, tokens, top_k, uniform[chunk]), strict=True):
            continuations[index] = _decode(model, encoded[index], new_ids)
    return continuations


def uniform_draws(seed: int, names: Sequence[str], tokens: int) -> Float[np.ndarray, "name token"]:
    """Uniform numbers in [0, 1) for each name, which depend on the seed and that name alone."""
    seeds = [int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]) for name in names]
    return np.stack([np.random.default_rng(s).random(tokens) for s in seeds])


def _prompt_ids(model: Model, prompt: str) -> list[int]:
    ids, _ = encode(model.tokenizer, prompt)
    if not 0 < len(ids) < model.max_positions:
        raise InputError(
            f"the prompt {prompt!r} has {len(ids)} tokens, expected between 1 and "
            f"{model.max_positions - 1} (the context of {model.name}): fill it in, or shorten it"
        )
    return ids


@torch.no_grad()
def _continue(
    model: Model,
    ids: Int[Tensor, "batch pos"],
    tokens: int,
    top_k: int,
    uniform: Float[np.ndarray, "batch token"],
) -> list[list[int]]:
    """New token ids of each row, cut before its first stop token."""
    stop = torch.tensor(model.end_tokens, dtype=torch.long, device=ids.device)
    draws = torch.tensor(uniform, device=ids.device)
    mask, cache, step_ids, written = torch.ones_like(ids), None, ids, []
    running = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for step in range(min(tokens, model.max_positions - ids.shape[1])):
        logits, cache = model.next_logits(step_ids, mask, cache)
        step_ids = sample_top_k(logits, top_k, draws[:, step])
        written.append(step_ids)
        mask = torch.cat([mask, torch.ones_like(step_ids)], dim=1)
        running &= ~torch.isin(step_ids[:, 0], stop)
        if not running.any():
            break
    rows = torch.cat(written, dim=1).tolist() if written else [[] for _ in ids]
    stops = set(stop.tolist())
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in rows]


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


def words(text: str) -> list[str]:
    """Runs of letters and digits, and single punctuation marks.

    The published code uses NLTK's tokenizer, which also splits contractions (do|n't); entropies differ by
    little.
    """
    return re.findall(r"\w+|[^\w\s]", text)


def ngram_entropy(text: str, form: EntropyForm = "averaged") -> float:
    """Weighted bigram and trigram entropy of a text, in bits (MEMIT Eq. 27).

    H_n = −Σ f log2 f over the relative frequencies f of the text's n-grams of words. Repetitive text scores low.
    `sum` is the equation: 2/3 · H_2 + 4/3 · H_3. `averaged`, half of it, is what the published code
    computes and (× 100) what the published tables hold.
    """
    total = 2 / 3 * _entropy(text, 2) + 4 / 3 * _entropy(text, 3)
    return total / 2 if form == "averaged" else total


def _entropy(text: str, n: int) -> float:
    """Entropy of the text's n-grams in bits; 0 when it has fewer than n words."""
    tokens = words(text)
    counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
    frequencies = np.array(list(counts.values()), dtype=float) / max(counts.total(), 1)
    return float((frequencies * np.log2(1 / frequencies)).sum())
