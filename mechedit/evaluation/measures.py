"""The measures of an edit: name, unit, titles, definition and meaning of each, for tables, figures and the report.

`MEASURES` holds one entry per measure. `COUNTERFACT` and `ZSRE` list those of each protocol, in the order of
summary.json; `TEXT_MEASURES` the two numbers per text from which the perplexity follows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["%", "nats", "bits × 100", "perplexity"]

PERCENT = 100.0
"""Summaries are in the papers' units: rates and probabilities × 100, and so are entropies in bits."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure: how to compute its interval, how to print it, and what it says."""

    name: str
    """Its name in tables and in summary.json."""
    unit: Unit = "%"
    """Unit of summaries and figures."""
    is_rate: bool = False
    """Whether a prompt succeeds (1), fails (0) or succeeds in part; the interval is then `statistics.rate_interval`."""
    title: str = ""
    """Title of a panel or of a line in the report; empty for the name itself."""
    short_title: str = ""
    """Label under a bar, where there is little room; empty for the name itself."""
    definition: str = ""
    """How it is computed, for readers of summary.json who do not have the code."""
    meaning: str = ""
    """Its meaning in a sentence, for readers of the report; empty where the report does not show it."""
    counted: str = "cases"
    """The things that the mean is over."""

    @property
    def factor(self) -> float:
        """Multiplier from a value as measured to the unit of the summaries."""
        return PERCENT if self.unit in ("%", "bits × 100") else 1.0

    @property
    def digits(self) -> int:
        """Decimals to print."""
        return 3 if self.unit == "nats" else 1

    @property
    def heading(self) -> str:
        """The title, or the name if there is none."""
        return self.title or self.name

    @property
    def axis_label(self) -> str:
        """Label of a figure's axis: the name, with its unit if that is percent."""
        return f"{self.name} (%)" if self.unit == "%" else self.name


_TABLE = (
    Measure(
        name="ES",
        is_rate=True,
        title="Efficacy (ES)",
        meaning="On the prompts of the edits themselves, the new object is more probable than the true one.",
    ),
    Measure(
        name="PS",
        is_rate=True,
        title="Paraphrases (PS)",
        meaning="The same on reworded prompts about the same subjects: the edit generalizes.",
    ),
    Measure(
        name="NS",
        is_rate=True,
        title="Neighbors (NS)",
        meaning="On prompts about other subjects with the same true object, that object stays the more probable: "
        "the edit is specific.",
    ),
    Measure(
        name="efficacy",
        is_rate=True,
        meaning="Tokens of the new object that are the likeliest next token, each after the edit’s prompt and the "
        "object’s tokens before it.",
    ),
    Measure(
        name="paraphrase",
        is_rate=True,
        short_title="para-\nphrase",
        meaning="The same after the reworded prompts.",
    ),
    Measure(
        name="specificity",
        is_rate=True,
        short_title="speci-\nficity",
        meaning="The same for the own answers of unrelated prompts, which the edit should leave as they are.",
    ),
    Measure(
        name="S",
        title="Score (S)",
        definition="harmonic mean of ES, PS and NS; by zsRE's protocol of efficacy, paraphrase and specificity",
        meaning="Harmonic mean of ES, PS and NS: high only when all three are.",
    ),
    Measure(
        name="exact_match",
        is_rate=True,
        title="Exact match",
        short_title="exact\nmatch",
        definition="greedy decoding from the prompt writes the new object: each of its tokens is the argmax after "
        "those before it, which by induction is the same",
        meaning="Left to write on from the edit’s prompt, the model says the new object, word for word.",
    ),
    Measure(
        name="exact_match_paraphrase",
        is_rate=True,
        title="Exact match, reworded",
        meaning="The same from the reworded prompts.",
    ),
    Measure(
        name="exact_match_neighborhood",
        is_rate=True,
        title="Exact match, unrelated",
        meaning="The same from unrelated prompts, with their own answers.",
    ),
    Measure(
        name="EM",
        meaning="By how much the new object’s probability exceeds the true one’s on the edits’ prompts.",
    ),
    Measure(name="PM", meaning="The same on reworded prompts."),
    Measure(
        name="NM",
        meaning="By how much the true object’s probability exceeds the new one’s on prompts about other subjects.",
    ),
    Measure(
        name="GE",
        unit="bits × 100",
        title="Fluency (GE, bits × 100)",
        definition="2/3 bigram and 4/3 trigram entropy of prompt and free text, halved (averaged) or not (sum)",
        meaning="How varied free text about the subjects is (entropy of its word pairs and triples, bits × 100): "
        "a fall means text that repeats itself.",
    ),
    Measure(
        name="GE own",
        unit="bits × 100",
        title="Fluency (GE own, bits × 100)",
        meaning="GE of text that the records' own prompts start, of records that bring none for free text; it compares "
        "with itself alone.",
    ),
    Measure(
        name="RS",
        title="Consistency (RS)",
        definition="cosine of the TF-IDF vectors of a case's free texts with their prompts, and of its references",
        meaning="How much free text about the subjects resembles reference texts about the new object.",
    ),
    Measure(
        name="NS+",
        is_rate=True,
        meaning="NS with the edit as a sentence before each prompt (CounterFact+): low where mentioning the edited "
        "subject changes what is said of others.",
    ),
    Measure(name="NM+", meaning="NM with the edit as a sentence before each prompt."),
    Measure(
        name="KL",
        unit="nats",
        definition="KL(unedited || edited) in nats of the next token after each neighborhood prompt; top1: the "
        "likeliest agree",
        meaning="How far the next word’s distribution on prompts about other subjects moved from the unedited model’s.",
    ),
    Measure(
        name="KL+",
        unit="nats",
        meaning="The same with the edit as a sentence before each prompt, for both models.",
    ),
    Measure(
        name="top1",
        is_rate=True,
        meaning="On prompts about other subjects, the likeliest next token is the unedited model’s.",
    ),
    Measure(
        name="top1+",
        is_rate=True,
        meaning="The same with the edit as a sentence before each prompt, for both models.",
    ),
    Measure(
        name="PPL",
        unit="perplexity",
        counted="texts",
        definition="exp of the mean of -log P(token) over all tokens of all texts but each text's first",
        meaning="Perplexity of held-out text: a rise means that the model wears out.",
    ),
    Measure(name="perplexity", unit="perplexity"),
    Measure(name="converged", is_rate=True),
    Measure(name="left"),
)
MEASURES: dict[str, Measure] = {measure.name: measure for measure in _TABLE}
"""Every measure by name, in the order of the report. The last three are of sessions and sweeps: the search for z
converged, and how much of ‖z − h‖ the edit left unwritten."""

COUNTERFACT = (
    *("ES", "PS", "NS", "NS+", "EM", "PM", "NM", "NM+", "exact_match", "exact_match_paraphrase"),
    *("KL", "top1", "KL+", "top1+", "GE", "RS"),
)
"""Measures of `evaluate`: prompt by prompt, RS case by case. S follows from the first three."""
ZSRE = (
    *("efficacy", "paraphrase", "specificity"),
    *("exact_match", "exact_match_paraphrase", "exact_match_neighborhood"),
)
"""Measures of `evaluate_zsre`, prompt by prompt. S follows from the first three."""
TEXT_MEASURES = ("NLL", "tokens")
"""Measured text by text; PPL follows from them."""


def measure_named(name: str) -> Measure:
    """The measure of this name; of an unknown name, one in percent without title and meaning."""
    return MEASURES.get(name) or Measure(name=name)


def definitions() -> dict[str, str]:
    """Definitions by measure or topic, for readers of summary.json who do not have the code."""
    return {
        **{name: measure.definition for name, measure in MEASURES.items() if measure.definition},
        "zsre": "efficacy, paraphrase, specificity: share of an answer's tokens that are the argmax after the prompt "
        "and the answer's true tokens before; specificity asks for the neighbor's own answer",
        "plus": "the edit's prompt, the new object and a full stop before each neighborhood prompt, for both models",
        "intervals": "over cases, for PPL over texts. Rates: Wilson's interval where every case is wholly a success "
        "or a failure, or all cases agree; else, and for magnitudes, the percentile bootstrap. S: percentile "
        "bootstrap; where that has width 0, the harmonic means of the ends of its three rates. A magnitude that is the "
        "same in all cases has an interval of width 0: nothing then says how far apart cases lie",
        "units": "percent; KL in nats, GE in bits x 100, PPL as it is",
    }
