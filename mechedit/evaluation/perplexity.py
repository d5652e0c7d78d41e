"""Perplexity of running text: it rises first when many edits damage a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.batching import length_batches, pad, padding_budget
from mechedit.errors import InputError, check_at_least
from mechedit.models import Model, Tokens, exclusive
from mechedit.prompt_tokens import encode_documents
from mechedit.shards import run_dealt


@exclusive
def perplexity(model: Model, texts: Sequence[str], *, max_length: int = 1024, batch_tokens: int = 4096) -> float:
    """Measure exp(mean of −log P(token | the text before it)) over every token of `texts` but each text's first.

    Long texts thus count for more than short ones, as in one loss over all of them.

    Args:
        model: the model, edited or not.
        texts: held-out documents, best none of those that second moments were collected over.
        max_length: tokens read per text, fewer where the model's context ends; the rest is dropped.
        batch_tokens: tokens per forward pass, padding included.

    Returns:
        A number of at least 1; infinity or NaN when the model's logits are no longer finite.

    Raises:
        InputError: no text has two tokens; a `max_length` below 2.
    """
    losses, tokens = text_losses(model, texts, max_length=max_length, batch_tokens=batch_tokens)
    return float(np.exp(losses.sum() / tokens.sum()))


@exclusive
def text_losses(
    model: Model, texts: Sequence[str], *, max_length: int = 1024, batch_tokens: int = 4096
) -> tuple[Float[np.ndarray, " text"], Int[np.ndarray, " text"]]:
    """Negative log-likelihood of each text, Σ −log P(token | the text before it) in nats, and its number of terms.

    Both are 0 for a text of fewer than two tokens.

    Raises:
        InputError: as `perplexity`, with the same arguments.
    """
    check_at_least("max_length", max_length, 2)
    check_at_least("batch_tokens", batch_tokens, 1)
    limit = min(max_length, model.max_positions)
    rows = encode_documents(model.tokenizer, texts, limit)
    tokens = np.array([max(len(row) - 1, 0) for row in rows], dtype=np.int64)
    if not tokens.any():
        raise InputError(f"none of the {len(texts)} texts has two tokens, expected text to predict; give more of it")
    order = [index for index in sorted(range(len(rows)), key=lambda index: -len(rows[index])) if tokens[index]]
    losses, start = np.zeros(len(rows)), 0
    batches = list(length_batches([rows[index] for index in order], padding_budget(model), batch_tokens))

    def measure(batch: Sequence[Sequence[int]]) -> Tensor:
        return _token_losses(model, pad(batch, model.tokenizer, model.device)).sum(1, dtype=torch.float64).cpu()

    measured = run_dealt(batches, measure, lambda batch: sum(map(len, batch)), "perplexity", leave=False)
    for batch, batch_losses in zip(batches, measured, strict=True):
        losses[order[start : start + len(batch)]] = batch_losses.numpy()
        start += len(batch)
    return losses, tokens


@torch.no_grad()
def _token_losses(model: Model, tokens: Tokens) -> Float[Tensor, "batch predicted"]:
    """−log P in nats of each token but the first; 0 at padding."""
    logits = model.run(tokens).logits
    # The logits at position p predict token p + 1.
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT.float(), tokens.ids[:, 1:], reduction="none")
    return loss.where(tokens.mask[:, 1:].bool(), 0)
