"""Log-probability of each object after each prompt, all pairs in one batched pass.

A pair is a prompt and the text that follows it, joint included; `prompt_tokens.complete` tells their tokens apart.
Pairs are sorted by length and right-padded; a pair that occurs twice is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechedit.batching import batches_of, pad
from mechedit.data.joint import following
from mechedit.errors import InputError, brief
from mechedit.evaluation.config import Likelihood
from mechedit.models import Model, Readout, Site, WholeReadout, exclusive
from mechedit.models.vocabulary import check_ids
from mechedit.prompt_tokens import Completion, complete_pairs
from mechedit.shards import run_dealt

Pair = tuple[str, str]
"""A prompt and a text that may follow it, joint included (`following`)."""


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
    completion: Completion

    @property
    def ids(self) -> list[int]:
        """Tokens of prompt and object."""
        return self.completion.ids

    @property
    def start(self) -> int:
        """Index of the object's first token."""
        return len(self.completion.prompt)


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Scores of all pairs, and final states of some prompts, from one pass."""

    scores: Mapping[Pair, TargetScore]
    """Score of each (prompt, target) pair."""
    states: Mapping[str, Float[Tensor, " d_model"]]
    """Residual state after the last block at each prompt's last token, on the CPU."""


@exclusive
def score_targets(
    model: Model, pairs: Iterable[tuple[str, str]], *, joint: str | None = None, batch_size: int = 64
) -> dict[tuple[str, str], TargetScore]:
    """Score every (prompt, object) pair.

    Args:
        model: the model.
        pairs: prompts and objects.
        joint: text between them; None lets the two characters that meet decide (`joint_of`).
        batch_size: pairs in one forward pass.

    Raises:
        InputError: a prompt or object without tokens, a pair longer than the model's context, or
            probabilities that are not finite.
    """
    joined = {(prompt, target): (prompt, following(prompt, target, joint)) for prompt, target in pairs}
    scores = score_pairs(model, joined.values(), batch_size=batch_size).scores
    return {pair: scores[text] for pair, text in joined.items()}


@exclusive
def score_pairs(
    model: Model, pairs: Iterable[Pair], *, state_prompts: Collection[str] = (), batch_size: int = 64
) -> Answers:
    """Score every pair, and in the same pass read the final state of some of the prompts.

    Args:
        model: the model.
        pairs: prompts, and texts that follow them.
        state_prompts: prompts whose residual state after the last block is read at their last token.
        batch_size: pairs in one forward pass.

    Raises:
        InputError: as `score_targets`.
    """
    encoded = sorted(_encode(model, list(dict.fromkeys(pairs))), key=lambda row: len(row.ids))
    chunks, unread = [], set(state_prompts)
    for rows in batches_of(encoded, batch_size):
        indices = {row.pair[0]: index for index, row in enumerate(rows) if row.pair[0] in unread}
        unread -= indices.keys()
        chunks.append((rows, indices))
    results = run_dealt(
        chunks,
        lambda chunk: _score_chunk(model, chunk[0], list(chunk[1].values())),
        lambda chunk: sum(len(row.ids) for row in chunk[0]),
        "scoring objects",
        leave=False,
    )
    scores: dict[Pair, TargetScore] = {}
    states: dict[str, Tensor] = {}
    for (rows, indices), (chunk_scores, chunk_states) in zip(chunks, results, strict=True):
        scores.update(zip([row.pair for row in rows], chunk_scores, strict=True))
        states.update(zip(indices, chunk_states, strict=True))
    return Answers(scores=scores, states=states)


def _encode(model: Model, pairs: Sequence[Pair]) -> list[_PairTokens]:
    completions = complete_pairs(model.tokenizer, pairs)
    targets = [token for completion in completions for token in completion.target]
    check_ids(torch.tensor(targets, dtype=torch.long, device="cpu"), model.vocab_size, model.tokenizer)
    for (prompt, _), completion in zip(pairs, completions, strict=True):
        if len(completion.ids) > model.max_positions:
            raise InputError(
                f"the prompt {brief(prompt)} with its object has {len(completion.ids)} tokens, expected at most "
                f"{model.max_positions}, the context of {model.name}: shorten or drop it"
            )
    return [_PairTokens(pair, completion) for pair, completion in zip(pairs, completions, strict=True)]


@torch.no_grad()
def _score_chunk(
    model: Model, rows: Sequence[_PairTokens], state_rows: Sequence[int]
) -> tuple[list[TargetScore], Float[Tensor, "state d_model"]]:
    """Score pairs of about the same length in one forward pass, and read the states at some prompts' ends."""
    tokens = pad([row.ids for row in rows], model.tokenizer, model.device)
    first = min(row.start for row in rows)
    # The logits at position p predict token p + 1, and only those of the objects' tokens are needed.
    positions = torch.arange(first - 1, tokens.ids.shape[1] - 1, device=model.device)
    last = Site(model.n_layers - 1, "resid")
    readout = model.readout()
    run = model.run(tokens, read=[last] if state_rows else [], logits_to_keep=positions, unembed=not readout.chunked)
    outputs = run.head_inputs if readout.chunked else run.logits
    states = torch.empty(0, model.d_model, dtype=torch.float32, device="cpu")
    if state_rows:
        states = run[last][list(state_rows), [rows[index].start - 1 for index in state_rows]].cpu()
    starts = torch.tensor([row.start for row in rows], device=model.device)[:, None]
    inside = (positions + 1 >= starts) & (positions + 1 < tokens.lengths[:, None])
    log_probs, hits = _target_log_probs(readout, outputs, tokens.ids[:, positions + 1], inside)
    scores = [
        TargetScore(log_prob=log_prob, tokens=len(row.completion.target), hits=row_hits)
        for row, log_prob, row_hits in zip(rows, log_probs.tolist(), hits.tolist(), strict=True)
    ]
    for row, score in zip(rows, scores, strict=True):
        if not math.isfinite(score.log_prob):
            raise InputError(
                f"the log-probability of {brief(row.pair[1])} after {brief(row.pair[0])} is {score.log_prob}, "
                f"expected a finite number: load the model in float32, or check its weights and the edit"
            )
    return scores, states


def _target_log_probs(
    readout: Readout | WholeReadout,
    outputs: Float[Tensor, "batch position width"],
    targets: Int[Tensor, "batch position"],
    inside: Bool[Tensor, "batch position"],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Sum of the targets' log-probabilities `inside` each object, and how many of these targets are the argmax."""
    outputs, labels = outputs[inside.to(outputs.device)], targets[inside]
    scores = readout.score(outputs, labels)
    log_prob, hits = scores.log_prob.to(inside.device), (scores.log_prob > scores.runner_up).to(inside.device)
    ties = (scores.log_prob == scores.runner_up).nonzero()[:, 0]
    if len(ties):
        # Of tokens that are equally likely, greedy decoding writes the first.
        hits[ties.to(hits.device)] = (readout.logits(outputs[ties]).argmax(-1).to(labels.device) == labels[ties]).to(
            hits
        )
    zeros = log_prob.new_zeros(inside.shape)
    return zeros.masked_scatter(inside, log_prob).sum(1), zeros.long().masked_scatter(inside, hits.long()).sum(1)
