"""The step that scores the model before and after, and the summary of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from mechedit import ranks
from mechedit.cache import Codec, codec_of
from mechedit.data import EditRequest
from mechedit.edit import Edit, edited
from mechedit.errors import InputError
from mechedit.evaluation import (
    Baseline,
    EvaluationConfig,
    References,
    Scores,
    evaluate,
    evaluate_zsre,
    measure_baseline,
)
from mechedit.evaluation.baseline import FILE as STATES_FILE
from mechedit.evaluation.scores import SCORE_FILES
from mechedit.evaluation.summary_file import write_summary_file
from mechedit.models import Model
from mechedit.paths import writable_file
from mechedit.provenance import value_hash
from mechedit.run_folder import RunFolder
from mechedit.selection import Selection

Protocol = Literal["counterfact", "zsre"]
"""How requests are scored: by `evaluate`, or by `evaluate_zsre`."""
SCORES: Codec[Scores] = codec_of(Scores, files=SCORE_FILES)
BASELINE: Codec[Baseline] = codec_of(Baseline, files=(*SCORE_FILES, STATES_FILE))
SUMMARY = "summary.json"


def evaluate_step(
    folder: RunFolder,
    model: Model,
    requests: Sequence[EditRequest],
    edit: Edit | None,
    config: EvaluationConfig,
    texts: Sequence[str] = (),
    protocol: Protocol = "counterfact",
    references: References | None = None,
) -> Scores:
    """Score the requests before and, given an edit, after it. Writes scores.parquet and its companions.

    The unedited model's answers are kept in baseline/, or baseline_zsre/: evaluating another edit does not ask for
    them again.

    Raises:
        InputError: references with zsRE's protocol, which has no free text; something else in the place of the
            summary; and as `evaluate`.
    """
    if references is not None and protocol == "zsre":
        raise InputError("references are given, and zsRE's protocol has no RS; leave them out, or use CounterFact's")
    writable_file(folder.path / SUMMARY)  # which is written when all is scored
    stamp = {
        "model": model.provenance(),
        "requests": value_hash([request.plain() for request in requests]),
        "settings": config.plain(),
        "texts": value_hash(list(texts)),
        "protocol": protocol,
        "references": references.hash if references else None,
    }
    if protocol == "zsre":
        make = partial(_zsre_scores, folder, model, requests, edit, config, texts, stamp)
    else:
        make = partial(_counterfact_scores, folder, model, requests, edit, config, texts, references, stamp)
    return folder.step(
        "evaluate", {**stamp, "edit": None if edit is None else value_hash(dict(edit.manifest))}, make, SCORES
    )


def _counterfact_scores(
    folder: RunFolder,
    model: Model,
    requests: Sequence[EditRequest],
    edit: Edit | None,
    config: EvaluationConfig,
    texts: Sequence[str],
    references: References | None,
    stamp: Mapping[str, Any],
) -> Scores:
    """Scores by CounterFact's protocol, before the edit and after it."""
    measure = partial(measure_baseline, model, requests, config, texts=texts, references=references)
    baseline = folder.step("baseline", stamp, measure, BASELINE, at="baseline")
    if edit is None:
        return baseline.scores
    with edited(model, edit):
        after = evaluate(model, requests, config, baseline=baseline, texts=texts, references=references)
    return baseline.scores.join(after)


def _zsre_scores(
    folder: RunFolder,
    model: Model,
    requests: Sequence[EditRequest],
    edit: Edit | None,
    config: EvaluationConfig,
    texts: Sequence[str],
    stamp: Mapping[str, Any],
) -> Scores:
    """Scores by zsRE's protocol, before the edit and after it."""
    measure = partial(evaluate_zsre, model, requests, config, state="before", texts=texts)
    before = folder.step("baseline_zsre", stamp, measure, SCORES, at="baseline_zsre")
    if edit is None:
        return before
    with edited(model, edit):
        return before.join(evaluate_zsre(model, requests, config, texts=texts))


def write_summary(
    folder: RunFolder, scores: Scores | None, selection: Selection | None, edit: Edit | None = None
) -> dict[str, Any]:
    """Write and return summary.json; see `write_summary_file`."""
    return ranks.current().from_first(
        lambda: write_summary_file(folder.path / SUMMARY, scores, selection and selection.short, edit),
        "the summary",
    )
