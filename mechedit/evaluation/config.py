"""How to measure; the settings are written beside the results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mechedit.errors import check_at_least, check_choice, check_fraction

Likelihood = Literal["joint", "normalized"]
EntropyForm = Literal["averaged", "sum"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How to measure; saved beside the scores."""

    seed: int = 0
    """Of the sampled text and of the bootstrap."""
    likelihood: Likelihood = "joint"
    """Probability of an object of several tokens: their product (the paper's text), or its n-th root
    (the published code)."""
    batch_size: int = 64
    """Rows in one forward pass; the scores do not depend on it."""
    generation_tokens: int = 100
    """New tokens of free text for GE, fewer where the model stops or its context ends; 0 leaves GE out."""
    generation_prompts: int | None = None
    """Free texts a case, from its first generation prompts; None writes one for each, as published. On a
    small machine these texts take most of the time."""
    answer_tokens: int = 10
    """New tokens of the greedy answers kept as examples; 0 keeps none. Exact match does not need them."""
    plus: bool = True
    """Whether to ask CounterFact+'s prompts, too: the neighbors again, each behind the edit's sentence."""
    text_tokens: int = 1024
    """Tokens of each text that are read for PPL."""
    top_k: int = 5
    """Free text is sampled from this many likeliest tokens, as in the published code."""
    entropy: EntropyForm = "averaged"
    """Form of Eq. 27: `averaged` is what the published tables hold, `sum` what the equation says."""
    resamples: int = 2000
    """Bootstrap resamples of the cases."""
    confidence: float = 0.95
    """Coverage of the intervals."""

    def __post_init__(self) -> None:
        check_choice("likelihood", self.likelihood, get_args(Likelihood))
        check_choice("entropy", self.entropy, get_args(EntropyForm))
        for name, least in _LEAST.items():
            check_at_least(name, getattr(self, name), least, optional=name == "generation_prompts")
        check_fraction("confidence", self.confidence)


_LEAST = {
    "batch_size": 1,
    "generation_tokens": 0,
    "generation_prompts": 1,
    "answer_tokens": 0,
    "text_tokens": 2,
    "top_k": 1,
    "resamples": 1,
}


QUICK = EvaluationConfig(generation_tokens=0, answer_tokens=0, plus=False)
"""Success and exact match alone: free text takes most of an evaluation's time."""
