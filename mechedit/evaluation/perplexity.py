"""How well a model predicts running text: the first thing to suffer when edits wear it out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mechedit.errors import InputError
from mechedit.models import Model, Tokens
from mechedit.prompts import pad


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
    if max_length < 2 or batch_tokens < 1:
        raise InputError(f"max_length is {max_length} and batch_tokens {batch_tokens}, expected at least 2 and 1")
    limit = min(max_length, model.max_positions)
    rows = [list(model.tokenizer(text, truncation=True, max_length=limit)["input_ids"]) for text in texts]
    rows = sorted((row for row in rows if len(row) > 1), key=len, reverse=True)
    if not rows:
        raise InputError(f"none of the {len(texts)} texts has two tokens, expected text to predict; give more of it")
    total = torch.zeros((), dtype=torch.float64)
    for batch in tqdm(list(_batches(rows, batch_tokens)), desc="perplexity", leave=False):
        total += _surprise(model, pad(batch, model.tokenizer, model.device)).sum(dtype=torch.float64).cpu()
    return float((total / sum(len(row) - 1 for row in rows)).exp())


@torch.no_grad()
def _surprise(model: Model, tokens: Tokens) -> Float[Tensor, "batch predicted"]:
    """−log P in nats of each token but the first; 0 at padding."""
    logits = model.run(tokens).logits
    assert logits is not None, "this run was not stopped early"
    # The logits at position p predict token p + 1.
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT.float(), tokens.ids[:, 1:], reduction="none")
    return loss.where(tokens.mask[:, 1:].bool(), 0)


def _batches(rows: Sequence[list[int]], batch_tokens: int) -> Iterator[Sequence[list[int]]]:
    """Rows, longest first, as many together as `batch_tokens` allows (at least one)."""
    start = 0
    while start < len(rows):
        end = start + max(1, batch_tokens // len(rows[start]))
        yield rows[start:end]
        start = end
