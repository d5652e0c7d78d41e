"""The steps of a run, each with its files in one folder: made once, reused when nothing has changed.

`config.json` holds a stamp for every finished step: what went in (model, input hashes, settings). A step
whose stamp is found again is read from its files; another stamp is an error, unless it may be overwritten.
A stamp is written after the step's files, so an interrupted step is made again.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from mechedit.data import EditRequest, Fact
from mechedit.edit import Edit, edited
from mechedit.errors import InputError
from mechedit.evaluation import (
    QUICK,
    Baseline,
    EvaluationConfig,
    References,
    Scores,
    evaluate,
    evaluate_zsre,
    measure_baseline,
)
from mechedit.files import plain_copy, write_json, write_parquet, write_parquet_parts
from mechedit.methods import METHODS, MethodConfig
from mechedit.models import Model
from mechedit.moments import Convergence, MomentsConfig, SecondMoment, collect_moments
from mechedit.provenance import check_provenance, value_hash
from mechedit.run_folder import RunFolder
from mechedit.selection import SelectConfig, Selection, select_layers
from mechedit.selection.curves import subject_effects
from mechedit.sweep import (
    Sweep,
    SweepConfig,
    Validation,
    Window,
    choose_window,
    held_out,
    sweep_windows,
    validate_selection,
)
from mechedit.tables import read_table, where
from mechedit.trace import TraceConfig, embedding_statistics, plan_trace
from mechedit.trace.averages import fact_totals, main_metric

Protocol = Literal["counterfact", "zsre"]
"""How requests are scored: by `evaluate`, or by `evaluate_zsre`."""


def trace_step(run: RunFolder, model: Model, facts: Sequence[Fact], config: TraceConfig) -> dict[str, Any]:
    """Trace every kind whole, and single states at the subject's last token with modules severed.

    Writes effects.parquet (the cells, a group of facts after another) and facts.parquet (each fact, whether it was
    traced, and why not); returns what `DataFrame.attrs` of the effects holds, with `n_facts` and `dropped`.
    """
    parts, file = run.path / "trace_parts", run.path / "effects.parquet"
    cut = tuple(sever for sever in config.sever if sever != "nothing")

    def make() -> dict[str, Any]:
        correlated = config.corrupted_by.distribution == "multivariate"
        statistics = embedding_statistics(model, [fact.subject for fact in facts], covariance_root=correlated)
        wanted = [_changed(config, sever=("nothing",))]
        if cut:
            wanted.append(_changed(config, kinds=("state",), sever=cut, roles=("subject_last",)))
        plans = [plan_trace(model, facts, settings, statistics=statistics, parts=parts) for settings in wanted]
        attrs = {**plans[0].attrs, "config": config.plain()}
        write_parquet_parts(file, itertools.chain.from_iterable(plans), attrs)
        return attrs

    def save(attrs: dict[str, Any]) -> None:
        write_parquet(run.path / "facts.parquet", facts_frame(facts, file, attrs["dropped"]))
        shutil.rmtree(parts, ignore_errors=True)

    stamp = {
        "model": identity(model),
        "facts": value_hash([asdict(fact) for fact in facts]),
        "settings": config.plain(),
    }
    return run.step(
        "trace",
        stamp,
        ["effects.parquet", "facts.parquet"],
        make,
        save,
        lambda: {str(name): value for name, value in fact_totals(file).attrs.items()},
    )


def facts_frame(facts: Sequence[Fact], effects: Path, dropped: Sequence[Sequence[str]]) -> pd.DataFrame:
    """One row a fact: its text, whether it was traced, why not, and its clean and corrupted score."""
    reasons = {name: reason for name, reason in dropped}
    totals = fact_totals(effects)
    of_main = where(totals, metric=main_metric(totals["metric"])).set_index("fact")[["clean", "corrupted"]]
    frame = pd.DataFrame([asdict(fact) for fact in facts])
    frame["traced"] = ~frame["id"].isin(list(reasons))
    frame["reason"] = [reasons.get(name) for name in frame["id"]]
    return frame.join(of_main, on="id")


def select_step(run: RunFolder, config: SelectConfig) -> Selection:
    """Select layers from the folder's effects and write selection.json.

    Raises:
        InputError: the folder holds no effects, or not those that selection needs.
    """
    file = run.path / "effects.parquet"
    if not file.is_file():
        raise InputError(
            f"{str(run.path)!r} holds no effects.parquet, expected a folder that `mechedit trace` wrote; trace first"
        )
    selection = select_layers(read_table(file, role="subject_last"), config=config)
    selection.save(run.path / "selection.json")
    return selection


def traced_model(run: RunFolder) -> dict[str, Any]:
    """Identity of the model that the folder's effects were traced on.

    Raises:
        InputError: nothing was traced here.
    """
    found = run.stamps().get("trace", {}).get("model")
    if not found:
        raise InputError(
            f"{str(run.path)!r} has no config.json that says which model was traced, expected a folder that "
            f"`mechedit trace` wrote; trace first"
        )
    return found


def validate_step(
    run: RunFolder,
    model: Model,
    selection: Selection,
    requests: Sequence[EditRequest],
    texts: str | Path,
    sweep: SweepConfig,
    method: str,
    config: MethodConfig,
    reading: MomentsConfig,
) -> Selection:
    """Sweep windows of layers with held-out edits, hold them against the selection, and choose by `sweep.by`.

    Writes sweep.parquet and sweep_cases.parquet, and selection.json again, with `validation` in it. Finished
    windows are kept in sweep_parts/, so that other windows can be added without editing those again.

    Raises:
        InputError: another model than was traced; a folder without facts.parquet; and as `sweep_windows`.
    """
    traced, own = traced_model(run), identity(model)
    fields = {name: own[name] for name in ("dtype", "tokenizer_hash", "weights_hash")}
    check_provenance(
        traced, fields, f"the trace in {str(run.path)!r}", f"sweep the model that was traced, {traced.get('model')!r}"
    )
    facts = read_table(run.path / "facts.parquet")
    sample = held_out(requests, set(where(facts, traced=True)["subject"]), sweep.requests, sweep.seed)
    windows = sweep.swept(selection.layers, model.n_layers)
    layers = sorted({layer for window in windows for layer in window.layers})
    moments = moments_step(run, model, texts, layers, reading)
    found = sweep_step(run, model, sample.requests, moments, windows, method, config, seed=sweep.seed)
    gap = subject_effects(read_table(run.path / "effects.parquet"), SelectConfig(**selection.settings)).gap
    notes = [sample.warning] if sample.warning else []
    n_held_out = len(sample.requests) - sample.traced
    validation = validate_selection(found, gap, selection.layers, held_out=n_held_out, notes=notes)
    chosen = settle(selection, validation, found, gap, sweep.by)
    chosen.save(run.path / "selection.json")
    return chosen


def settle(
    selection: Selection, validation: Validation, sweep: Sweep, gap: Float[np.ndarray, "fact layer"], by: str
) -> Selection:
    """The selection with its validation, and with the layers that `by` chooses (`mechedit.sweep.choose_window`).

    Without an early site `both` keeps to the trace and selects nothing.
    """
    if by == "trace" or (by == "both" and not selection.layers):
        return replace(selection, validation=plain_copy(replace(validation, by=by)))
    window, stability = choose_window(sweep, gap, selection.layers, by)
    layers = tuple(window.layers)
    why = {
        "sweep": f"{window}: the best-scoring of the windows edited ({validation.score})",
        "both": f"{window}: of the windows that cannot be told from the best-scoring ({validation.score}), the one "
        f"with the largest contribution in the trace",
    }
    settled = replace(validation, by=by, layers=layers, stability=stability)
    return replace(selection, layers=layers, reason=why[by], stability=stability, validation=plain_copy(settled))


def sweep_step(
    run: RunFolder,
    model: Model,
    requests: Sequence[EditRequest],
    moments: Mapping[int, SecondMoment],
    windows: Sequence[Window],
    method: str,
    config: MethodConfig,
    *,
    seed: int,
) -> Sweep:
    """Edit and score every window; those finished before an interrupt are not edited again."""
    evaluation = replace(QUICK, seed=seed)
    stamp = {
        "model": identity(model),
        "requests": value_hash(list(requests)),
        "windows": windows,
        "moments": value_hash({layer: moment.provenance for layer, moment in moments.items()}),
        "method": method,
        "settings": asdict(config),
        "evaluation": asdict(evaluation),
    }
    make = partial(
        sweep_windows, model, requests, moments, windows, method=method, config=config,
        evaluation=evaluation, parts=run.path / "sweep_parts",
    )  # fmt: skip
    return run.step(
        "sweep", stamp, ["sweep.parquet", "sweep_cases.parquet"], make,
        lambda sweep: sweep.save(run.path), lambda: Sweep.load(run.path),
    )  # fmt: skip


def moments_step(
    run: RunFolder,
    model: Model,
    texts: str | Path,
    layers: Sequence[int],
    config: MomentsConfig,
    convergence: Convergence | None = None,
) -> dict[int, SecondMoment]:
    """Collect second moments into moments/; files with the same provenance are reused."""
    return collect_moments(model, texts, layers, config, run.path, overwrite=run.overwrite, convergence=convergence)


def edit_step(
    run: RunFolder,
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment],
    method: str,
    config: MethodConfig,
    file: str = "edit.safetensors",
) -> Edit:
    """Make the edit with a named method; the model is left as it was."""
    stamp = {
        "model": identity(model),
        "requests": value_hash([asdict(request) for request in requests]),
        "layers": list(layers),
        "moments": value_hash({layer: moment.provenance for layer, moment in moments.items()}),
        "method": method,
        "settings": asdict(config),
    }
    path = run.path / file
    return run.step(
        "edit", stamp, [file],
        lambda: METHODS[method](model, requests, layers, moments, config=config, cache=run.path / "targets"),
        lambda edit: edit.save(path), lambda: Edit.load(path),
    )  # fmt: skip


def evaluate_step(
    run: RunFolder,
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
        InputError: references with zsRE's protocol, which has no free text; and as `evaluate`.
    """
    if references is not None and protocol == "zsre":
        raise InputError("references are given, and zsRE's protocol has no RS; leave them out, or use CounterFact's")
    stamp = {
        "model": identity(model),
        "requests": value_hash([asdict(request) for request in requests]),
        "settings": asdict(config),
        "texts": value_hash(list(texts)),
        "protocol": protocol,
        "references": references.hash if references else None,
    }
    folder = run.path / "baseline"

    def make() -> Scores:
        if protocol == "zsre":
            return _zsre_scores(run, model, requests, edit, config, texts, stamp)
        baseline = run.step(
            "baseline", stamp, ["baseline/scores.parquet"],
            lambda: measure_baseline(model, requests, config, texts=texts, references=references),
            lambda made: made.save(folder), lambda: Baseline.load(folder),
        )  # fmt: skip
        if edit is None:
            return baseline.scores
        with edited(model, edit):
            after = evaluate(model, requests, config, baseline=baseline, texts=texts, references=references)
        return baseline.scores.join(after)

    return run.step(
        "evaluate", {**stamp, "edit": None if edit is None else value_hash(dict(edit.manifest))}, ["scores.parquet"],
        make, lambda scores: _ignore(scores.save(run.path)), lambda: Scores.load(run.path),
    )  # fmt: skip


def _zsre_scores(
    run: RunFolder,
    model: Model,
    requests: Sequence[EditRequest],
    edit: Edit | None,
    config: EvaluationConfig,
    texts: Sequence[str],
    stamp: Mapping[str, Any],
) -> Scores:
    """The same by zsRE's protocol."""
    folder = run.path / "baseline_zsre"
    before = run.step(
        "baseline_zsre", stamp, ["baseline_zsre/scores.parquet"],
        lambda: evaluate_zsre(model, requests, config, state="before", texts=texts),
        lambda scores: _ignore(scores.save(folder)), lambda: Scores.load(folder),
    )  # fmt: skip
    if edit is None:
        return before
    with edited(model, edit):
        return before.join(evaluate_zsre(model, requests, config, texts=texts))


def write_summary(
    run: RunFolder, scores: Scores | None, selection: Selection | None, edit: Edit | None = None
) -> dict[str, Any]:
    """Write and return summary.json: the selected layers, each state's measures with intervals, protocol and counts."""
    summary: dict[str, Any] = {}
    if selection is not None:
        summary["selection"] = {"layers": list(selection.layers)}
    if scores is not None:
        summary |= {state: scores.summary(state) for state in scores.states}
        summary |= {"protocol": {**scores.protocol, "edit": _described(edit)}, "counts": scores.counts}
    summary = plain_copy(summary)
    write_json(run.path / "summary.json", summary)
    return summary


def _described(edit: Edit | None) -> dict[str, Any] | None:
    """What made an edit, for the protocol of its scores."""
    if edit is None:
        return None
    made = edit.manifest
    return {
        "method": made.get("method"),
        "layers": edit.layers,
        "requests": len(made.get("requests", ())),
        "manifest_hash": value_hash(dict(made)),
    }


def found_selection(run: RunFolder) -> Selection | None:
    """The folder's selection, when it has one."""
    file = run.path / "selection.json"
    return Selection.load(file) if file.is_file() else None


def identity(model: Model) -> dict[str, Any]:
    """The part of a model's provenance that decides whether a result may be reused."""
    return {key: value for key, value in model.provenance().items() if key != "backend"}


def _changed(config: TraceConfig, **changes: Any) -> TraceConfig:
    return TraceConfig(**{**vars(config), **changes})


def _ignore(_: object) -> None:
    return None
