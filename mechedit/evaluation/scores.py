"""Scores: a tidy table of measurements, and means over cases with intervals.

In: one row per measurement. Out: for each measure its mean over cases (prompts are averaged within a case first), an
interval over cases, and the number of cases (MEMIT Appendix C.2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from typing_extensions import TypedDict

from mechedit.errors import InputError, brief, brief_list, check_choice
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.measures import COUNTERFACT, TEXT_MEASURES, ZSRE, definitions
from mechedit.evaluation.summary import Summary, summarize_cases, summarize_texts
from mechedit.files import read_object, write_json, write_parquet
from mechedit.provenance import VERSION, ModelIdentity, check_provenance
from mechedit.records import ModelRecord, check_record, read_record
from mechedit.tables import read_table, where

TABLE_COLUMNS = ("case", "measure", "kind", "prompt", "value", "state")
ANSWER_COLUMNS = ("case", "kind", "prompt", "question", "expected", "answer", "state")

SCORE_FILES = ("scores.parquet", "answers.parquet", "scores.json")
"""The files of scores in their folder."""
SAME_INPUT = ("outer_hash", "requests", "texts", "references")
"""Fields of a state's provenance that no edit changes: the model outside its blocks, and the input."""


class StateRecord(ModelRecord, total=False):
    """The provenance of one state in scores.json: the model measured, and the input."""

    requests: str
    texts: dict[str, Any] | None
    references: str | None


class ScoresRecord(TypedDict):
    """The content of scores.json, but for the counts, which are not read."""

    cases: list[str]
    config: dict[str, Any]
    provenance: dict[str, StateRecord]


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Measurements of one or more model states on the same cases."""

    table: pd.DataFrame
    """One row per measurement: case, measure, kind (rewrite, paraphrase, neighborhood, neighborhood_plus,
    generation, text), prompt (index within the kind), value (1 or 0, a probability difference, nats, bits, or a
    cosine), state (before, after, now). A text belongs to no case (`""`): its rows are NLL, the sum of
    −log P(token) in nats, and tokens, the number of its terms."""
    answers: pd.DataFrame
    """Text the model wrote: case, kind (rewrite: greedy; generation: sampled), prompt, question, expected,
    answer (the continuation alone), state."""
    cases: tuple[str, ...]
    """Every case evaluated, also those that lack some measure."""
    config: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Settings of the evaluation."""
    provenance: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Provenance of each state: the model measured, and the input."""

    def __post_init__(self) -> None:
        _check_columns(self.table, TABLE_COLUMNS, "the scores table")
        _check_columns(self.answers, ANSWER_COLUMNS, "the table of answers")

    @property
    def states(self) -> tuple[str, ...]:
        """Model states measured, in the order they were added."""
        return tuple(self.provenance) or tuple(self.table["state"].unique())

    @property
    def measures(self) -> tuple[str, ...]:
        """Measures of the protocol followed, CounterFact's or zsRE's, with data or not."""
        return ZSRE if ZSRE[0] in set(self.table["measure"]) else COUNTERFACT

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """For each measure of cases: cases with data, cases `missing` it, and prompts measured (one state)."""
        counts = {}
        for measure in self.measures:
            rows = where(self.table, measure=measure)
            # The unedited model is not compared with itself, so not every state has every measure.
            rows = where(rows, state=rows["state"].iloc[0]) if len(rows) else rows
            cases = len(set(rows["case"]))
            counts[measure] = {"cases": cases, "missing": len(self.cases) - cases, "prompts": len(rows)}
        return counts

    @property
    def protocol(self) -> dict[str, Any]:
        """Everything that determines the numbers: settings, definitions, the models measured, and the input."""
        shared = next(iter(self.provenance.values()), {})
        return {
            "mechedit": VERSION,
            "protocol": "zsre" if self.measures is ZSRE else "counterfact",
            **{
                name: shared.get(name)
                for name in ("model", "dtype", "tokenizer_hash", "requests", "texts", "references")
            },
            "weights_hash": {state: provenance.get("weights_hash") for state, provenance in self.provenance.items()},
            **asdict(self.config),
            "definitions": definitions(),
        }

    def summary(self, state: str | None = None) -> Summary:
        """Mean, interval and number of cases of each measure, in the papers' units (× 100; KL in nats).

        Prompts are averaged within a case, then cases. Rates have Wilson's interval where each case succeeds wholly
        or not at all or all cases agree, else the percentile bootstrap over cases, as magnitudes have
        (`summarize_cases` says why). S is the harmonic mean of ES, PS and NS, or of zsRE's three, with the three
        resampled together. A measure without data is absent. PPL = exp(Σ NLL / Σ tokens) over all texts, its
        interval over texts, its n their number.

        Args:
            state: which model state; may be left out when there is only one.

        Raises:
            InputError: `state` was not measured, or several were and none is named.
        """
        rows = where(self.table, state=self._state(state))
        of_text = rows["measure"].isin(TEXT_MEASURES)
        return {**self._summary_of_cases(rows.loc[~of_text]), **self._summary_of_texts(rows.loc[of_text])}

    def _summary_of_cases(self, rows: pd.DataFrame) -> Summary:
        measures, values = case_values(rows)
        if not measures:
            return {}
        joined, others = self.measures[:3], self.measures[3:]
        score = "S" if set(joined) <= set(measures) else None
        entries = summarize_cases(values, measures, self.config, score=score, score_measures=joined)
        return {name: entries[name] for name in (*joined, "S", *others) if name in entries}

    def _summary_of_texts(self, rows: pd.DataFrame) -> Summary:
        if rows.empty:
            return {}
        losses = rows.pivot(index="prompt", columns="measure", values="value")[list(TEXT_MEASURES)].to_numpy(float)
        return {"PPL": summarize_texts(losses, self.config)}

    def _state(self, state: str | None) -> str:
        if state is None and len(self.states) == 1:
            return self.states[0]
        check_choice("state", state, self.states, "name the one to summarize")
        return str(state)

    def join(self, other: Scores) -> Scores:
        """These scores and those of another state of the model, measured in the same way on the same cases.

        Raises:
            InputError: other settings, other cases, another model than an edit could have made of the first, or a
                state that is already here.
        """
        if self.config != other.config or set(self.cases) != set(other.cases):
            raise InputError(
                "these scores were measured with other settings or on other cases, expected the same for "
                "both states: evaluate both again with one configuration"
            )
        check_states([*self.provenance.items(), *other.provenance.items()])
        if repeated := set(self.states) & set(other.states):
            raise InputError(f"both scores hold the state {brief(repeated.pop())}, expected different states: drop one")
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
        about, what, remedy = read_object(folder / "scores.json"), repr(str(folder / "scores.json")), "evaluate again"
        check_record(about, ScoresRecord, what, remedy)
        scores = Scores(
            table=read_table(folder / "scores.parquet", TABLE_COLUMNS),
            answers=read_table(folder / "answers.parquet", ANSWER_COLUMNS),
            cases=tuple(about["cases"]),
            config=read_record(about["config"], EvaluationConfig, f"the settings in {what}", remedy),
            provenance=about["provenance"],
        )
        _check_rows(scores, str(folder), remedy)
        return scores


def _check_rows(scores: Scores, folder: str, remedy: str) -> None:
    """Refuse tables that hold other cases or states than their scores.json names, or an answer twice.

    Raises:
        InputError: says which.
    """
    allowed = {"case": {"", *scores.cases}, "state": set(scores.states)}
    for name, table in (("scores.parquet", scores.table), ("answers.parquet", scores.answers)):
        for column, values in allowed.items():
            if unknown := [value for value in table[column].unique() if value not in values]:
                raise InputError(
                    f"{name} in {folder!r} has the {column} {brief(unknown[0])}, expected those in scores.json: "
                    f"{remedy}"
                )
        columns = [column for column in ("case", "measure", "kind", "prompt", "state") if column in table]
        if table[columns].isna().to_numpy().any():
            raise InputError(f"{name} in {folder!r} has rows without a case, kind, prompt or state; {remedy}")
    if scores.answers.duplicated(["case", "kind", "prompt", "state"]).any():
        raise InputError(f"answers.parquet in {folder!r} holds an answer twice; {remedy}")


def check_states(states: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Check that the states differ at most in their blocks' weights, and were measured on the same input.

    Raises:
        InputError: names the first field that differs.
    """
    remedy = "measure both again, on one model, edited or not, and on the same requests"
    for (_, before), (state, after) in pairwise(states):
        # A field that only one of them records cannot differ.
        recorded = {name: value for name, value in before.items() if name in after}
        check_same_input(
            {name: after[name] for name in recorded}, recorded, f"the table of scores {brief(state)}", remedy
        )


def check_same_input(provenance: Mapping[str, Any], expected: Mapping[str, Any], what: str, remedy: str) -> None:
    """Check that an edit could have made this model of the expected one, and that the input is the same.

    Raises:
        InputError: names the first field that differs.
    """
    identity = ModelIdentity.of(expected)
    identity.require(ModelIdentity.of(provenance), what, remedy, ignoring=("weights", "module"))
    check_provenance(provenance, {name: expected[name] for name in SAME_INPUT if name in expected}, what, remedy)


def case_values(rows: pd.DataFrame) -> tuple[list[str], Float[np.ndarray, "case measure"]]:
    """The measures with data, and each case's mean over prompts; NaN where a case lacks one."""
    wide = rows.pivot_table(values="value", index="case", columns="measure", aggfunc="mean")
    return [str(measure) for measure in wide.columns], wide.to_numpy(dtype=float)


def _check_columns(frame: pd.DataFrame, expected: Sequence[str], what: str) -> None:
    missing = [column for column in expected if column not in frame.columns]
    if missing:
        raise InputError(
            f"{what} has no column {brief(missing[0])} (found: {brief_list(frame.columns)}), "
            f"expected {', '.join(expected)}: evaluate again"
        )
