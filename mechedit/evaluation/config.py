"""How to measure; the settings are written beside the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from mechedit.bounds import check_numbers, check_sequences
from mechedit.errors import InputError, brief, check_at_least, check_characters, check_choice, check_fraction

Likelihood = Literal["joint", "normalized"]
EntropyForm = Literal["averaged", "sum"]
FreeText = Literal["published", "natural"]
Words = Literal["nltk", "simple"]


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Settings of an evaluation; saved beside the scores."""

    seed: int = 0
    """Seed of the sampled text and of the bootstrap."""
    likelihood: Likelihood = "joint"
    """Probability of an object of several tokens: `joint`, the product of their probabilities (the paper's text), or
    `normalized`, its n-th root (the published code)."""
    batch_size: int = 64
    """Prompts per forward pass. Another one changes how float32 rounds, and scores by a few 1e-5 points of 100."""
    generation_tokens: int = 100
    """Tokens per free text for GE and RS, fewer where the model's context ends; 0 leaves both out."""
    free_text: FreeText = "published"
    """`published`: a text has `generation_tokens` tokens with its prompt, and goes on where the model would end it, as
    in the published code. `natural`: it has so many new tokens, and ends where the model ends it."""
    words: Words = "nltk"
    """The words of GE's n-grams: those of NLTK's tokenizer in each of Punkt's sentences, as in the published code, or
    `simple` ones, runs of letters and digits."""
    stop_words: Sequence[str] = ()
    """Texts that end a free text, which is cut before the first of them; by default none, as published."""
    generation_prompts: int | None = None
    """Free texts per request, from its first generation prompts; None writes one for each, as published. On a small
    machine these texts take most of the time."""
    answer_tokens: int = 10
    """New tokens per greedy answer shown as an example; 0 shows none. Exact match does not need them."""
    plus: bool = True
    """Whether to score CounterFact+'s prompts, too: the neighbors again, each after the edit's sentence."""
    text_tokens: int = 1024
    """Tokens read per text for PPL."""
    top_k: int = 5
    """Number of likeliest tokens from which free text is sampled, 5 in the published code."""
    entropy: EntropyForm = "averaged"
    """Form of Eq. 27: `averaged` is that of the published tables, `sum` that of the equation."""
    resamples: int = 2000
    """Bootstrap resamples of the requests."""
    confidence: float = 0.95
    """Coverage of the intervals, between 0 and 1."""

    def __post_init__(self) -> None:
        check_numbers(self, resamples=1_000_000, generation_tokens=1_000_000, answer_tokens=1_000_000)
        check_sequences(self)
        for word in self.stop_words:
            if not isinstance(word, str) or not word:
                raise InputError(
                    f"one of stop_words is {brief(word)}, expected a text that is not empty, such as '.'; drop it"
                )
            check_characters("one of stop_words", word)
        check_choice("likelihood", self.likelihood, get_args(Likelihood))
        check_choice("entropy", self.entropy, get_args(EntropyForm))
        check_choice("free_text", self.free_text, get_args(FreeText))
        check_choice("words", self.words, get_args(Words))
        for name, least in _LEAST.items():
            check_at_least(name, getattr(self, name), least, optional=name == "generation_prompts")
        check_fraction("confidence", self.confidence)

    def plain(self) -> dict[str, Any]:
        """The settings as results record them; without `stop_words` where there are none, as older results have it."""
        settings = asdict(self)
        return settings if self.stop_words else {name: settings[name] for name in settings if name != "stop_words"}


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
"""Success and exact match alone; free text takes most of an evaluation's time."""
