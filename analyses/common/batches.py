"""MEMIT's protocol at few edits: disjoint batches of n records, each edited from the unedited model, all averaged.

As in the published code the batches are those of the first records, of which there are at least as many as asked for;
the last batch may be smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import pandas as pd

from analyses.common.experiment import LEFT, Experiment
from analyses.common.printing import score_frame
from analyses.common.variants import Variant
from mechedit.batching import batches_of
from mechedit.data import EditRequest
from mechedit.edit import Edit
from mechedit.evaluation import EvaluationConfig, References, Scores
from mechedit.evaluation.scores import ANSWER_COLUMNS
from mechedit.tables import where

MakeEdit = Callable[[], Edit] | None


def disjoint_batches(requests: Sequence[EditRequest], size: int, records: int) -> list[Sequence[EditRequest]]:
    """The first requests in batches of `size`: `records` of them, or `size` where that is more, or all."""
    return list(batches_of(requests[: max(size, records)], size))


def scored_in_batches(
    experiment: Experiment,
    variants: Mapping[str, Variant | None],
    batches: Sequence[Sequence[EditRequest]],
    evaluation: EvaluationConfig,
    references: References | None = None,
    makes: Mapping[str, MakeEdit] | None = None,
) -> dict[str, pd.DataFrame]:
    """The scores of each variant over the records of all batches: `SCORE_COLUMNS` by name.

    What an edit leaves of its residual is the mean over batches.

    Args:
        experiment: model, second moments, and the folder of what is kept.
        variants: the edits by name; None scores the unedited model.
        batches: of records; each is edited at once.
        evaluation: how to measure.
        references: reference texts for RS.
        makes: how the first batch's edit is made, where not by `experiment.edit`.
    """
    rows: dict[str, list[pd.DataFrame]] = {name: [] for name in variants}
    for number, requests in enumerate(batches):  # all variants in turn, which share the unedited model's answers
        for name, variant in variants.items():
            key = {
                **experiment.score_key(variant, requests, evaluation),
                "rows": True,
                "references": references.hash if references else None,
            }
            make_edit = None if number or makes is None else makes.get(name)
            make = partial(experiment.score_rows, variant, requests, evaluation, references, make_edit)
            rows[name].append(experiment.cached("batches", key, make))
    cases = [request.id for requests in batches for request in requests]
    return {name: summarized(pd.concat(tables, ignore_index=True), cases, evaluation) for name, tables in rows.items()}


def summarized(rows: pd.DataFrame, cases: Sequence[str], evaluation: EvaluationConfig) -> pd.DataFrame:
    """`SCORE_COLUMNS` of the rows of several evaluations, with the mean of what their edits left."""
    residuals = where(rows, measure=LEFT)["value"].to_numpy(dtype=float)
    scores = Scores(
        table=rows.loc[rows["measure"] != LEFT, :], answers=pd.DataFrame(columns=list(ANSWER_COLUMNS)),
        cases=tuple(cases), config=evaluation,
    )  # fmt: skip
    frame = score_frame(scores.summary())
    if not len(residuals):
        return frame
    return pd.concat(
        [frame, pd.DataFrame([{"measure": LEFT, "mean": float(residuals.mean()), "n": len(cases)}])], ignore_index=True
    )
