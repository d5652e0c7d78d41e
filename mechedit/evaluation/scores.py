"""Scores: a tidy table of measurements, and means over cases with bootstrap intervals.

In: one row a measurement. Out: for each measure its mean over cases (prompts are averaged within a case
first), a percentile bootstrap interval over cases, and the number of cases (MEMIT Appendix C.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechedit.artifacts import read_json, write_json, write_parquet
from mechedit.errors import InputError
from mechedit.tables import bootstrap_means, percentile_interval, read_table, where

Likelihood = Literal["joint", "normalised"]
EntropyForm = Literal["averaged", "sum"]

MEASURES = ("ES", "PS", "NS", "EM", "PM", "NM", "exact_match", "exact_match_paraphrase", "GE")
"""Measured prompt by prompt; S follows from the first three."""
ZSRE_MEASURES = (
    *("efficacy", "paraphrase", "specificity"),
    *("exact_match", "exact_match_paraphrase", "exact_match_neighborhood"),
)
"""Measured prompt by prompt by `evaluate_zsre`; again S follows from the first three."""
PUBLISHED_UNIT = 100.0
"""Summaries are in the papers' units: shares and probabilities in percent, entropies in bits × 100."""
TABLE_COLUMNS = ("case", "measure", "kind", "prompt", "value", "state")
ANSWER_COLUMNS = ("case", "kind", "prompt", "question", "expected", "answer", "state")

Summary = dict[str, dict[str, float | int]]


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
    """New tokens of the greedy answers kept as examples; 0 keeps none."""
    top_k: int = 5
    """Free text is sampled from this many likeliest tokens, as in the published code."""
    entropy: EntropyForm = "averaged"
    """Form of Eq. 27: `averaged` is what the published tables hold, `sum` what the equation says."""
    resamples: int = 2000
    """Bootstrap resamples of the cases."""
    confidence: float = 0.95
    """Coverage of the intervals."""

    def __post_init__(self) -> None:
        _one_of(self.likelihood, get_args(Likelihood), "likelihood")
        _one_of(self.entropy, get_args(EntropyForm), "entropy")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, expected at least {least}: choose a larger one")
        if not 0 < self.confidence < 1:
            raise InputError(f"confidence is {self.confidence}, expected a share such as 0.95: put it between 0 and 1")


_LEAST = {
    "batch_size": 1,
    "generation_tokens": 0,
    "generation_prompts": 1,
    "answer_tokens": 0,
    "top_k": 1,
    "resamples": 1,
}


def _one_of(value: str, choices: Sequence[str], name: str) -> None:
    if value not in choices:
        raise InputError(f"{name} is {value!r}, expected one of {', '.join(choices)}: choose one of them")


QUICK = EvaluationConfig(generation_tokens=0, answer_tokens=0)
"""Success and exact match alone: free text takes most of an evaluation's time."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Measurements of one or more model states on the same cases."""

    table: pd.DataFrame
    """One row a measurement: case, measure, kind (rewrite, paraphrase, neighborhood, generation), prompt
    (index within the kind), value (1 or 0, a probability difference, or bits), state (before, after, now)."""
    answers: pd.DataFrame
    """Text the model wrote: case, kind (rewrite: greedy; generation: sampled), prompt, question, expected,
    answer (the continuation alone), state."""
    cases: tuple[str, ...]
    """Every case evaluated, also those that lack some measure."""
    config: EvaluationConfig = field(default_factory=EvaluationConfig)
    """How it was measured."""
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each state, the model measured."""

    def __post_init__(self) -> None:
        _check_columns(self.table, TABLE_COLUMNS, "the scores table")
        _check_columns(self.answers, ANSWER_COLUMNS, "the table of answers")

    @property
    def states(self) -> tuple[str, ...]:
        """Model states measured, in the order they were added."""
        return tuple(self.provenance) or tuple(self.table["state"].unique())

    @property
    def measures(self) -> tuple[str, ...]:
        """Those of the protocol, CounterFact's or zsRE's, with data or not."""
        return ZSRE_MEASURES if ZSRE_MEASURES[0] in set(self.table["measure"]) else MEASURES

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For each measure: cases with data, cases `missing` it, and prompts measured (one state)."""
        state = where(self.table, state=self.states[0]) if self.states else self.table
        by_measure = {measure: where(state, measure=measure) for measure in self.measures}
        return {
            measure: {
                "cases": len(set(rows["case"])),
                "missing": len(self.cases) - len(set(rows["case"])),
                "prompts": len(rows),
            }
            for measure, rows in by_measure.items()
        }

    def summary(self, state: str | None = None) -> Summary:
        """Mean, interval and number of cases of each measure, in the papers' units (× 100).

        Prompts are averaged within a case, then cases. The interval is the percentile bootstrap over
        cases. S is the harmonic mean of ES, PS and NS, or of zsRE's three, with the three resampled together.
        A measure without data is absent.

        Args:
            state: which model state; may be left out when there is only one.

        Raises:
            InputError: `state` was not measured, or several were and none is named.
        """
        measures, values = case_values(where(self.table, state=self._state(state)))
        if not measures:
            return {}
        draws = bootstrap_means(values, seed=self.config.seed, resamples=self.config.resamples)
        means, counts = np.nanmean(values, axis=0), (~np.isnan(values)).sum(axis=0).tolist()
        entries = {measure: self._entry(means[i], draws[:, i], counts[i]) for i, measure in enumerate(measures)}
        joined, others = self.measures[:3], self.measures[3:]
        if set(joined) <= set(measures):
            parts = [measures.index(measure) for measure in joined]
            mean, joint = harmonic_mean(means[None, parts])[0], harmonic_mean(draws[:, parts])
            entries["S"] = self._entry(mean, joint, min(counts[part] for part in parts))
        return {measure: entries[measure] for measure in (*joined, "S", *others) if measure in entries}

    def _entry(self, mean: float, draws: Float[np.ndarray, " resample"], n: int) -> dict[str, float | int]:
        low, high = percentile_interval(draws[:, None] * PUBLISHED_UNIT, self.config.confidence)
        return {"mean": float(mean) * PUBLISHED_UNIT, "low": float(low[0]), "high": float(high[0]), "n": n}

    def _state(self, state: str | None) -> str:
        if state is None and len(self.states) == 1:
            return self.states[0]
        if state not in self.states:
            raise InputError(f"state is {state!r}, expected one of {', '.join(self.states)}: name the one to summarise")
        return state

    def join(self, other: Scores) -> Scores:
        """These scores and those of another state of the model, measured alike on the same cases.

        Raises:
            InputError: other settings, other cases, or a state that is already here.
        """
        if self.config != other.config or set(self.cases) != set(other.cases):
            raise InputError(
                "these scores were measured with other settings or on other cases, expected the same for "
                "both states: evaluate both again with one configuration"
            )
        if again := set(self.states) & set(other.states):
            raise InputError(f"both scores hold the state {again.pop()!r}, expected different states: drop one")
        return Scores(
            table=pd.concat([self.table, other.table], ignore_index=True),
            answers=pd.concat([self.answers, other.answers], ignore_index=True),
            cases=self.cases,
            config=self.config,
            provenance={**self.provenance, **other.provenance},
        )

    def save(self, folder: str | Path) -> Path:
        """Write scores.parquet, answers.parquet and scores.json to `folder`; returns the first's path."""
        folder = Path(folder)
        write_parquet(folder / "answers.parquet", self.answers)
        about = {
            "cases": self.cases,
            "counts": self.counts,
            "config": asdict(self.config),
            "provenance": self.provenance,
        }
        write_json(folder / "scores.json", about)
        write_parquet(folder / "scores.parquet", self.table)
        return folder / "scores.parquet"

    @staticmethod
    def load(folder: str | Path) -> Scores:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or holds something else.
        """
        folder = Path(folder)
        about = read_json(folder / "scores.json")
        try:
            return Scores(
                table=read_table(folder / "scores.parquet"),
                answers=read_table(folder / "answers.parquet"),
                cases=tuple(about["cases"]),
                config=EvaluationConfig(**about["config"]),
                provenance=about["provenance"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{str(folder / 'scores.json')!r} does not describe scores ({error}); expected what evaluate "
                f"writes: evaluate again"
            ) from error


def case_values(rows: pd.DataFrame) -> tuple[list[str], Float[np.ndarray, "case measure"]]:
    """The measures found, and each case's mean over prompts; NaN where a case lacks one."""
    wide = rows.pivot_table(values="value", index="case", columns="measure", aggfunc="mean")
    return [str(measure) for measure in wide.columns], wide.to_numpy(dtype=float)


def harmonic_mean(values: Float[np.ndarray, "row part"]) -> Float[np.ndarray, " row"]:
    """Harmonic mean of each row; 0 when any part is 0."""
    with np.errstate(divide="ignore"):
        return values.shape[1] / (1 / values).sum(axis=1)


def _check_columns(frame: pd.DataFrame, expected: Sequence[str], what: str) -> None:
    missing = [column for column in expected if column not in frame.columns]
    if missing:
        raise InputError(
            f"{what} has no column {missing[0]!r} (found: {', '.join(map(str, frame.columns)) or 'none'}), "
            f"expected {', '.join(expected)}: evaluate again"
        )
