"""How likely a model finds each object after each prompt, all pairs in one batched pass.

A prompt's ids and an object's ids are joined as ids, never as text, so no merge across the boundary can
shift them. Rows are sorted by length and right-padded; a pair asked for twice is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from mechedit.batching import pad
from mechedit.errors import InputError
from mechedit.evaluation.config import Likelihood
from mechedit.models import Model, Site
from mechedit.prompts import continuation_ids, encode

Pair = tuple[str, str]
"""A prompt and the object that may follow it."""


@dataclass(frozen=True, kw_only=True)
class TargetScore:
    """What the model makes of one object after one prompt."""

    log_prob: float
    """Σ log P(token | prompt, earlier tokens), in nats."""
    tokens: int
    """Tokens of the object."""
    hits: int
    """How many of them are the argmax given the prompt and the tokens before."""

    @property
    def greedy(self) -> bool:
        """Whether greedy decoding from the prompt writes exactly this object.

        By induction that is the case if and only if each of its tokens is the argmax given those before it, so no
        text need be generated.
        """
        return self.hits == self.tokens

    def log_likelihood(self, likelihood: Likelihood) -> float:
        """The joint log-probability, or its mean over tokens (`normalized`)."""
        return self.log_prob if likelihood == "joint" else self.log_prob / self.tokens

    def probability(self, likelihood: Likelihood) -> float:
        """The exponential of `log_likelihood`."""
        return math.exp(self.log_likelihood(likelihood))


@dataclass(frozen=True)
class _Row:
    """A pair in tokens."""

    pair: Pair
    prompt: list[int]
    target: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.target


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """What one pass over all pairs found."""

    scores: Mapping[Pair, TargetScore]
    states: Mapping[str, Float[Tensor, " d_model"]]
    """Of each prompt that was watched, the residual state after the last block at its last token, on the CPU."""


def score_targets(model: Model, pairs: Iterable[Pair], *, batch_size: int = 64) -> dict[Pair, TargetScore]:
    """Score every (prompt, object) pair.

    Raises:
        InputError: a prompt or object without tokens, a pair longer than the model's context, or
            probabilities that are not finite.
    """
    return dict(answer(model, pairs, batch_size=batch_size).scores)


def answer(model: Model, pairs: Iterable[Pair], *, watched: Collection[str] = (), batch_size: int = 64) -> Answers:
    """Score every (prompt, object) pair, and in the same pass take the states of the prompts that are watched.

    Raises:
        InputError: as `score_targets`.
    """
    rows = sorted((_row(model, pair) for pair in dict.fromkeys(pairs)), key=lambda row: len(row.ids))
    scores: dict[Pair, TargetScore] = {}
    states: dict[str, Tensor] = {}
    for start in tqdm(range(0, len(rows), batch_size), desc="scoring objects", leave=False):
        chunk = rows[start : start + batch_size]
        wanted = {row.pair[0]: place for place, row in enumerate(chunk) if row.pair[0] in watched}
        for seen in states.keys() & wanted.keys():
            del wanted[seen]
        found, ends = _score_rows(model, chunk, list(wanted.values()))
        scores.update(zip([row.pair for row in chunk], found, strict=True))
        states.update(zip(wanted, ends, strict=True))
    return Answers(scores=scores, states=states)


def _row(model: Model, pair: Pair) -> _Row:
    prompt, _ = encode(model.tokenizer, pair[0])
    row = _Row(pair, prompt, continuation_ids(model.tokenizer, pair[1]))
    if not prompt:
        raise InputError(f"the prompt {pair[0]!r} gives no tokens; expected text that is not empty: fill it in")
    if len(row.ids) > model.max_positions:
        raise InputError(
            f"the prompt {pair[0]!r} with its object has {len(row.ids)} tokens, expected at most "
            f"{model.max_positions}, the context of {model.name}: shorten or drop it"
        )
    return row


@torch.no_grad()
def _score_rows(
    model: Model, rows: Sequence[_Row], watched: Sequence[int]
) -> tuple[list[TargetScore], Float[Tensor, "watched d_model"]]:
    """Score rows of about the same length in one forward pass; and the states at the prompts' ends of some rows."""
    tokens = pad([row.ids for row in rows], model.tokenizer, model.device)
    first = min(len(row.prompt) for row in rows)
    # The logits at position p predict token p + 1, and only the objects' tokens are asked about.
    keep = torch.arange(first - 1, tokens.ids.shape[1] - 1, device=model.device)
    last = Site(model.n_layers - 1, "resid")
    run = model.run(tokens, read=[last] if watched else [], logits_to_keep=keep)
    logits, states = run.logits, torch.empty(0, model.d_model)
    if watched:
        states = run[last][list(watched), [len(rows[place].prompt) - 1 for place in watched]].cpu()
    starts = torch.tensor([len(row.prompt) for row in rows], device=model.device)[:, None]
    inside = (keep + 1 >= starts) & (keep + 1 < tokens.lengths[:, None])
    log_probs, hits = _read(logits, tokens.ids[:, keep + 1], inside)
    scores = [
        TargetScore(log_prob=log_prob, tokens=len(row.target), hits=said)
        for row, log_prob, said in zip(rows, log_probs.tolist(), hits.tolist(), strict=True)
    ]
    for row, score in zip(rows, scores, strict=True):
        if not math.isfinite(score.log_prob):
            raise InputError(
                f"the log-probability of {row.pair[1]!r} after {row.pair[0]!r} is {score.log_prob}, "
                f"expected a finite number: load the model in float32, or check its weights and the edit"
            )
    return scores, states


def _read(
    logits: Float[Tensor, "batch kept vocab"],
    wanted: Int[Tensor, "batch kept"],
    inside: Bool[Tensor, "batch kept"],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Summed log-probability of the wanted tokens `inside` each object, and how many of them are the argmax."""
    logits = logits.float()
    chosen = logits.gather(-1, wanted[..., None])[..., 0] - logits.logsumexp(-1)
    hits = (logits.argmax(-1) == wanted) & inside
    return chosen.where(inside, chosen.new_zeros(())).sum(1), hits.sum(1)
