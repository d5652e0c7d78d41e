"""Log-probability of each object after each prompt, all pairs in one batched pass.

A prompt's ids and an object's ids are joined as ids, never as text, so no merge of tokens across the boundary can
shift them. Pairs are sorted by length and right-padded; a pair that occurs twice is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm import tqdm

from mechedit.batching import batches_of, pad
from mechedit.errors import InputError
from mechedit.evaluation.config import Likelihood
from mechedit.models import Model, Site
from mechedit.prompt_tokens import continuation_ids, encode

Pair = tuple[str, str]
"""A prompt and the object that may follow it."""


@dataclass(frozen=True, kw_only=True)
class TargetScore:
    """Likelihood of one object after one prompt."""

    log_prob: float
    """Σ log P(token | prompt, earlier tokens), in nats."""
    tokens: int
    """Tokens of the object."""
    hits: int
    """Tokens of the object that are the argmax given the prompt and the tokens before."""

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
class _PairTokens:
    """A pair in token ids."""

    pair: Pair
    prompt: list[int]
    target: list[int]

    @property
    def ids(self) -> list[int]:
        """Tokens of prompt and target."""
        return self.prompt + self.target


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Scores of all pairs, and final states of some prompts, from one pass."""

    scores: Mapping[Pair, TargetScore]
    """Score of each (prompt, target) pair."""
    states: Mapping[str, Float[Tensor, " d_model"]]
    """Residual state after the last block at each prompt's last token, on the CPU."""


def score_targets(model: Model, pairs: Iterable[Pair], *, batch_size: int = 64) -> dict[Pair, TargetScore]:
    """Score every (prompt, object) pair.

    Raises:
        InputError: a prompt or object without tokens, a pair longer than the model's context, or
            probabilities that are not finite.
    """
    return dict(score_pairs(model, pairs, batch_size=batch_size).scores)


def score_pairs(
    model: Model, pairs: Iterable[Pair], *, state_prompts: Collection[str] = (), batch_size: int = 64
) -> Answers:
    """Score every (prompt, object) pair, and in the same pass read the final state of some of the prompts.

    Args:
        model: the model.
        pairs: prompts and objects.
        state_prompts: prompts whose residual state after the last block is read at their last token.
        batch_size: pairs in one forward pass.

    Raises:
        InputError: as `score_targets`.
    """
    encoded = sorted((_encode(model, pair) for pair in dict.fromkeys(pairs)), key=lambda row: len(row.ids))
    scores: dict[Pair, TargetScore] = {}
    states: dict[str, Tensor] = {}
    for chunk in tqdm(list(batches_of(encoded, batch_size)), desc="scoring objects", leave=False):
        indices = {row.pair[0]: index for index, row in enumerate(chunk) if row.pair[0] in state_prompts}
        for prompt in states.keys() & indices.keys():
            del indices[prompt]
        chunk_scores, chunk_states = _score_chunk(model, chunk, list(indices.values()))
        scores.update(zip([row.pair for row in chunk], chunk_scores, strict=True))
        states.update(zip(indices, chunk_states, strict=True))
    return Answers(scores=scores, states=states)


def _encode(model: Model, pair: Pair) -> _PairTokens:
    prompt, _ = encode(model.tokenizer, pair[0])
    row = _PairTokens(pair, prompt, continuation_ids(model.tokenizer, pair[1]))
    if not prompt:
        raise InputError(f"the prompt {pair[0]!r} gives no tokens; expected text that is not empty: fill it in")
    if len(row.ids) > model.max_positions:
        raise InputError(
            f"the prompt {pair[0]!r} with its object has {len(row.ids)} tokens, expected at most "
            f"{model.max_positions}, the context of {model.name}: shorten or drop it"
        )
    return row


@torch.no_grad()
def _score_chunk(
    model: Model, rows: Sequence[_PairTokens], state_rows: Sequence[int]
) -> tuple[list[TargetScore], Float[Tensor, "state d_model"]]:
    """Score pairs of about the same length in one forward pass, and read the states at some prompts' ends."""
    tokens = pad([row.ids for row in rows], model.tokenizer, model.device)
    first = min(len(row.prompt) for row in rows)
    # The logits at position p predict token p + 1, and only those of the objects' tokens are needed.
    positions = torch.arange(first - 1, tokens.ids.shape[1] - 1, device=model.device)
    last = Site(model.n_layers - 1, "resid")
    run = model.run(tokens, read=[last] if state_rows else [], logits_to_keep=positions)
    logits, states = run.logits, torch.empty(0, model.d_model)
    if state_rows:
        states = run[last][list(state_rows), [len(rows[index].prompt) - 1 for index in state_rows]].cpu()
    starts = torch.tensor([len(row.prompt) for row in rows], device=model.device)[:, None]
    inside = (positions + 1 >= starts) & (positions + 1 < tokens.lengths[:, None])
    log_probs, hits = _target_log_probs(logits, tokens.ids[:, positions + 1], inside)
    scores = [
        TargetScore(log_prob=log_prob, tokens=len(row.target), hits=row_hits)
        for row, log_prob, row_hits in zip(rows, log_probs.tolist(), hits.tolist(), strict=True)
    ]
    for row, score in zip(rows, scores, strict=True):
        if not math.isfinite(score.log_prob):
            raise InputError(
                f"the log-probability of {row.pair[1]!r} after {row.pair[0]!r} is {score.log_prob}, "
                f"expected a finite number: load the model in float32, or check its weights and the edit"
            )
    return scores, states


def _target_log_probs(
    logits: Float[Tensor, "batch position vocab"],
    targets: Int[Tensor, "batch position"],
    inside: Bool[Tensor, "batch position"],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Sum of the targets' log-probabilities `inside` each object, and how many of these targets are the argmax."""
    logits = logits.float()
    log_probs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(-1)
    hits = (logits.argmax(-1) == targets) & inside
    return log_probs.where(inside, log_probs.new_zeros(())).sum(1), hits.sum(1)
