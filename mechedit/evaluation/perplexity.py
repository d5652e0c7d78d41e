"""How well a model predicts running text: the first thing to suffer when edits wear it out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from mechedit.batching import pad, pieces, spare_tokens
from mechedit.errors import InputError, check_at_least
from mechedit.models import Model, Tokens


def perplexity(model: Model, texts: Sequence[str], *, max_length: int = 1024, batch_tokens: int = 4096) -> float:
    """Measure exp(mean of −log P(token | the text before it)) over every token of `texts` but each text's first.

    Long texts thus count for more than short ones, as in one loss over all of them.

    Args:
        model: as it is now.
        texts: documents, best such that nothing was collected over them.
        max_length: tokens of a text that are read, fewer where the model's context ends; the rest is dropped.
        batch_tokens: tokens in one forward pass, padding included.

    Returns:
        A number of at least 1; infinity or NaN when the model's logits are no longer finite.

    Raises:
        InputError: no text has two tokens; a `max_length` below 2.
    """
    losses, tokens = surprises(model, texts, max_length=max_length, batch_tokens=batch_tokens)
    return float(np.exp(losses.sum() / tokens.sum()))


def surprises(
    model: Model, texts: Sequence[str], *, max_length: int = 1024, batch_tokens: int = 4096
) -> tuple[Float[np.ndarray, " text"], Int[np.ndarray, " text"]]:
    """Of each text, Σ −log P(token | the text before it) in nats, and the tokens it sums over; 0, 0 below two tokens.

    Raises:
        InputError: as `perplexity`, with the same arguments.
    """
    check_at_least("max_length", max_length, 2)
    check_at_least("batch_tokens", batch_tokens, 1)
    limit = min(max_length, model.max_positions)
    rows = [list(model.tokenizer(text, truncation=True, max_length=limit)["input_ids"]) for text in texts]
    tokens = np.array([max(len(row) - 1, 0) for row in rows], dtype=np.int64)
    if not tokens.any():
        raise InputError(f"none of the {len(texts)} texts has two tokens, expected text to predict; give more of it")
    order = [place for place in sorted(range(len(rows)), key=lambda place: -len(rows[place])) if tokens[place]]
    losses, start = np.zeros(len(rows)), 0
    together = list(pieces([rows[place] for place in order], spare_tokens(model), batch_tokens))
    for batch in tqdm(together, desc="perplexity", leave=False):
        found = _surprise(model, pad(batch, model.tokenizer, model.device)).sum(1, dtype=torch.float64)
        losses[order[start : start + len(batch)]] = found.cpu().numpy()
        start += len(batch)
    return losses, tokens


@torch.no_grad()
def _surprise(model: Model, tokens: Tokens) -> Float[Tensor, "batch predicted"]:
    """−log P in nats of each token but the first; 0 at padding."""
    logits = model.run(tokens).logits
    # The logits at position p predict token p + 1.
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT.float(), tokens.ids[:, 1:], reduction="none")
    return loss.where(tokens.mask[:, 1:].bool(), 0)
