"""How a subject is corrupted: noise on its embeddings, noise in their place, or another subject's tokens."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.bounds import check_numbers
from mechedit.data import Fact
from mechedit.errors import InputError, brief, check_at_least, check_choice
from mechedit.models import EMBED, Model, Tokens, exclusive
from mechedit.prompt_tokens import continuation_ids

Distribution = Literal["gaussian", "multivariate", "student", "uniform", "tokens"]

NoiseSource = Callable[[Fact, int, int, int], Any]
"""(fact, samples, tokens, width) → standard-normal draws of that shape, scaled by `noise_std`."""


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """What happens to the subject's embeddings in each noise sample; every noise has standard deviation `std`.

    With z ~ N(0, I) and std = k·σ (or `noise_std`), the noise ε of a token is
      `gaussian`: std·z (ROME §2.1 and Appendix B.1, k = 3);
      `multivariate`: std·R·z with R Rᵀ the covariance of the subjects' embeddings, scaled to mean variance 1;
      `student`: std·z / √(χ²_ν / (ν − 2)), one χ² per token: heavy tails;
      `uniform`: uniform on ±√3·std.
    (ROME's Fig. 13 has its uniform noise on ±3σ, which is k = √3 here, and its multivariate noise unscaled, k = 1; the
    published code adds the embeddings' mean to the latter besides.)
    `tokens` puts another subject of the same number of tokens in its place (symmetric token replacement, Zhang &
    Nanda 2024): another one for each sample, with another object, and of the same relation where there is one.
    """

    distribution: str = "gaussian"
    """gaussian, multivariate, student or uniform noise, or tokens of another subject."""
    replace: bool = False
    """The noise stands in place of the embedding; multivariate noise then has the subjects' mean."""
    degrees: float | int = 3
    """Degrees of freedom ν of `student`, above 2."""
    extra_tokens: int = 0
    """Tokens after the subject that are corrupted too."""

    def __post_init__(self) -> None:
        check_numbers(self, extra_tokens=1_000_000)
        check_choice("the corruption", self.distribution, get_args(Distribution))
        if self.degrees <= 2:
            raise InputError(f"degrees is {self.degrees}, expected more than 2: with less there is no variance")
        check_at_least("extra_tokens", self.extra_tokens, 0)
        if self.distribution == "tokens" and (self.replace or self.extra_tokens):
            raise InputError("token replacement takes neither replace nor extra_tokens: drop them")


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingStatistics:
    """Standard deviation, mean and covariance of the subjects' embeddings."""

    std: float
    """σ over all entries."""
    mean: Float[Tensor, " d_model"]
    covariance_root: Float[Tensor, "d_model d_model"] | None
    """Symmetric square root of the covariance, scaled to mean variance 1; None unless multivariate noise needs it."""


def embedding_std(model: Model, subjects: Sequence[str]) -> float:
    """σ: standard deviation of `embed` over all tokens of the subjects, tokenized by themselves.

    So does ROME's published code; its Appendix B.1 takes the tokens "as sampled over a body of text".
    """
    return embedding_statistics(model, subjects).std


@exclusive
@torch.no_grad()
def embedding_statistics(
    model: Model, subjects: Sequence[str], *, covariance_root: bool = False
) -> EmbeddingStatistics:
    """Statistics of `embed` over all tokens of the subjects, tokenized by themselves.

    Args:
        model: any `Model`.
        subjects: texts; a repeated one counts once.
        covariance_root: also compute the root of the covariance, [d_model, d_model] in fp64.
    """
    per_subject = []
    for subject in dict.fromkeys(subjects):
        ids = torch.tensor([continuation_ids(model.tokenizer, subject)], device=model.device)
        per_subject.append(model.run(Tokens(ids, torch.ones_like(ids)), read=[EMBED], stop_after=0)[EMBED][0].float())
    embeddings = torch.cat(per_subject)
    return EmbeddingStatistics(
        std=embeddings.std().item(),
        mean=embeddings.mean(0),
        covariance_root=unit_covariance_root(embeddings) if covariance_root else None,
    )


def unit_covariance_root(embeddings: Float[Tensor, "token d_model"]) -> Float[Tensor, "d_model d_model"]:
    """R with R Rᵀ = Σ·d / tr Σ; symmetric, so that fewer tokens than dimensions are no obstacle."""
    eigenvalues, eigenvectors = torch.linalg.eigh(embeddings.double().T.cov())
    lengths = eigenvalues.clamp(min=0).sqrt()
    scale = lengths.square().mean().sqrt().clamp(min=1e-30)
    return (eigenvectors * (lengths / scale)) @ eigenvectors.T


def fact_seed(seed: int, fact: str) -> int:
    """A fact's seed: the same for every cell, kind and severing, another for every fact."""
    digest = hashlib.sha256(f"{seed}:{fact}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def draw_noise(
    fact: Fact,
    shape: tuple[int, int, int],
    corruption: Corruption,
    statistics: EmbeddingStatistics | None,
    seed: int,
) -> Float[Tensor, "sample token d_model"]:
    """Draw the noise of one fact from its own seed, with mean 0 and standard deviation 1.

    Args:
        fact: its id determines the seed, with `seed`.
        shape: (samples, tokens, d_model).
        corruption: its distribution, not `tokens`.
        statistics: with the covariance's root, for multivariate noise.
        seed: shared by all facts.
    """
    own_seed = fact_seed(seed, fact.id)
    generator = torch.Generator().manual_seed(own_seed)
    if corruption.distribution == "uniform":
        return (2 * torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") - 1) * 3**0.5
    normal = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")
    if corruption.distribution == "multivariate":
        return correlate(normal, statistics)
    if corruption.distribution == "student":
        degrees = corruption.degrees
        chi = torch.from_numpy(np.random.default_rng(own_seed).chisquare(degrees, size=(*shape[:2], 1)))
        return normal / (chi / (degrees - 2)).sqrt().float()
    assert corruption.distribution == "gaussian"
    return normal


def correlate(normal: Float[Tensor, "sample token d_model"], statistics: EmbeddingStatistics | None) -> Tensor:
    """Give standard-normal draws the covariance of the subjects' embeddings, scaled to mean variance 1."""
    assert statistics is not None
    assert statistics.covariance_root is not None
    return (normal.double() @ statistics.covariance_root.to(normal.device)).float()


def checked_noise(
    fact: Fact,
    shape: tuple[int, int, int],
    corruption: Corruption,
    statistics: EmbeddingStatistics | None,
    noise: NoiseSource,
) -> Float[Tensor, "sample token d_model"]:
    """The explicit noise of one fact from the caller, checked.

    Raises:
        InputError: another shape, values that are not finite, or a corruption that is not made of normal draws.
    """
    if corruption.distribution not in ("gaussian", "multivariate"):
        raise InputError(
            f"explicit noise came with the corruption {brief(corruption.distribution)}, expected gaussian or "
            f"multivariate: explicit draws are standard-normal"
        )
    draws = torch.as_tensor(np.asarray(noise(fact, *shape)), dtype=torch.float32, device="cpu")
    if draws.shape != shape or not draws.isfinite().all():
        raise InputError(
            f"noise for fact {brief(fact.id)} has shape {tuple(draws.shape)}, expected finite draws of shape "
            f"{shape} (samples, subject tokens, width)"
        )
    return correlate(draws, statistics) if corruption.distribution == "multivariate" else draws


class ReplacementSubjects:
    """Facts whose subjects can replace others, grouped by the number of tokens of the subject."""

    def __init__(self, tokenizer: Any, facts: Sequence[Fact]):
        self.by_length: dict[int, list[Fact]] = {}
        for fact in {fact.subject: fact for fact in reversed(facts)}.values():
            self.by_length.setdefault(len(continuation_ids(tokenizer, fact.subject)), []).append(fact)
        self.lengths = {fact.subject: length for length, group in self.by_length.items() for fact in group}

    def of(self, fact: Fact, seed: int) -> list[Fact]:
        """Facts whose subjects could replace this one's, in a drawn order, those of its relation first."""
        object_text = fact.object.strip()
        candidates = [
            candidate
            for candidate in self.by_length.get(self.lengths.get(fact.subject, 0), [])
            if candidate.subject != fact.subject and candidate.object.strip() != object_text
        ]
        random.Random(fact_seed(seed, fact.id)).shuffle(candidates)
        return sorted(candidates, key=lambda candidate: candidate.relation != fact.relation)
