"""The steps of a run: trace, select, collect moments, edit, evaluate, each with its files in one run folder.

Every step states what goes into it, how its result is made, and how the result is kept in files; `RunFolder.step` makes
it once and reuses it when nothing that determines it has changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from mechedit import ranks
from mechedit.cache import Codec, codec_of
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
from mechedit.evaluation.baseline import FILE as STATES_FILE
from mechedit.evaluation.scores import SCORE_FILES
from mechedit.evaluation.summary_file import write_summary_file
from mechedit.locks import locked
from mechedit.methods import METHODS, MethodConfig
from mechedit.models import Model
from mechedit.moments import Convergence, MomentsConfig, SecondMoment, collect_dealt
from mechedit.provenance import ModelIdentity, value_hash
from mechedit.run_folder import RunFolder, check_step, sweep_run_folder
from mechedit.selection import SelectConfig, Selection, moving_width, select_layers, subject_effects
from mechedit.selection.select import layers_in_words
from mechedit.shards import Rank
from mechedit.sweep import (
    Sweep,
    SweepConfig,
    Window,
    decide_layers,
    finalists,
    held_out,
    short_sweep,
    sweep_windows,
    validate_selection,
)
from mechedit.tables import read_table, where
from mechedit.trace import TraceConfig, UntilSettled, Verdict, trace_until_settled
from mechedit.trace.folder import TRACE, TRACE_PARTS, trace_to_folder
from mechedit.trace.shards import merge_trace, merged_stamp, trace_shard, trace_stamp

Protocol = Literal["counterfact", "zsre"]
"""How requests are scored: by `evaluate`, or by `evaluate_zsre`."""

SWEEP: Codec[Sweep] = codec_of(Sweep, files=("sweep.parquet", "sweep_cases.parquet"))
FINALS = "finals"
MOST_REQUESTS = 3 * SweepConfig.requests
"""Requests of the last round of a short sweep, between the windows that the first could not tell apart."""
"""Folder of the sweep in which the best windows meet once more."""
EDIT: Codec[Edit] = codec_of(Edit, suffix=".safetensors")
SCORES: Codec[Scores] = codec_of(Scores, files=SCORE_FILES)
BASELINE: Codec[Baseline] = codec_of(Baseline, files=(*SCORE_FILES, STATES_FILE))


def trace_step(
    folder: RunFolder, model: Model, facts: Sequence[Fact], config: TraceConfig, *, least: int = 1
) -> dict[str, Any]:
    """Trace every kind whole, and single states at the subject's last token with modules severed.

    The model must know `least` of the facts.

    Writes effects.parquet (the cells, a group of facts after another) and facts.parquet (each fact, whether it was
    traced, and why not).

    Returns:
        What `DataFrame.attrs` of the effects holds, with `n_facts` and `dropped`.
    """
    stamp = trace_stamp(model.provenance(), [fact.plain() for fact in facts], config.plain())
    make = partial(trace_to_folder, model, facts, config, folder.path, least=least)
    return folder.step("trace", stamp, make, TRACE, parts=TRACE_PARTS)


def trace_shard_step(folder: RunFolder, model: Model, facts: Sequence[Fact], config: TraceConfig, rank: Rank) -> int:
    """Trace one process's shard of the facts into trace_parts/, for `merge_trace_step`.

    Returns:
        Number of groups of facts in the shard.

    Raises:
        InputError: as `trace_shard`; the folder holds a trace of other input, and may not be overwritten.
    """
    stamp = trace_stamp(model.provenance(), [fact.plain() for fact in facts], config.plain())
    folder.refuse_other("trace", stamp)
    return trace_shard(model, facts, config, folder.path, rank, overwrite=folder.overwrite)


def merge_trace_step(folder: RunFolder) -> dict[str, Any]:
    """Put together what the shards traced: the files and the stamp of `trace_step`; what was put together is read.

    Returns:
        As `trace_step`.

    Raises:
        InputError: as `merge_trace`; the folder holds a trace of other input, and may not be overwritten.
    """
    traced = folder.stamps().get("trace")
    if traced is not None and not (folder.path / TRACE_PARTS).exists():
        stamp = {name: value for name, value in traced.items() if name != "files"}
    else:
        stamp = merged_stamp(folder.path)
    return folder.step("trace", stamp, partial(merge_trace, folder.path), TRACE, parts=TRACE_PARTS)


def trace_until_settled_step(
    folder: RunFolder,
    model: Model,
    facts: Sequence[Fact],
    config: TraceConfig,
    until: UntilSettled,
    select: SelectConfig,
    notify: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """As `trace_step`, facts in random order until the selection settles, or all are traced, or time is up.

    Returns:
        As `trace_step`, with `rounds` (facts, layers, state, agreement and stability after each one) and `stopped`.

    Raises:
        InputError: fewer known facts than a selection needs; and as `trace_until_settled`.
    """
    stamp = {
        "model": model.provenance(),
        "facts": value_hash([fact.plain() for fact in facts]),
        "settings": config.plain(),
        "until": {**asdict(until), "select": asdict(select)},
    }

    def judge(effects: pd.DataFrame) -> Verdict:
        selection = select_layers(effects, config=select)
        shares = {"agreement": selection.agreement, "stability": selection.stability}
        return Verdict(settled=selection.state == "settled", record={**selection.short, **shares})

    make = partial(
        trace_until_settled,
        model,
        facts,
        config,
        until,
        judge,
        folder.path,
        least=select.min_facts,
        notify=lambda record: notify(round_in_words(record)),
    )
    return folder.step("trace", stamp, make, TRACE, parts=TRACE_PARTS)


def round_in_words(record: Mapping[str, Any]) -> str:
    """What a selection made of the facts so far, with the shares of resamples that agree and that give just this."""
    layers = layers_in_words(tuple(record["layers"]))
    shares = f"{record['agreement']:.0%} of resamples agree, {record['stability']:.0%} give just these layers"
    return f"{record['facts']} facts: {layers}, {record['state']} ({shares})"


def select_step(folder: RunFolder, config: SelectConfig, *, save: bool = True) -> Selection:
    """Select layers from the folder's effects and write selection.json.

    Args:
        folder: in which facts were traced.
        config: the rule and its settings.
        save: whether to write at once; not where `validate_step` follows, which may refuse, and then writes.

    Raises:
        InputError: the folder holds no effects, not those that selection needs, or damaged ones; another process
            selects layers there, by other settings.
    """

    def select() -> Selection:
        if not save:
            return _select(folder, config)
        with selecting(folder, {"settings": asdict(config)}):
            selection = _select(folder, config)
            selection.save(folder.path / "selection.json")
        return selection

    return ranks.current().from_first(select, "the selection of layers")


def selecting(folder: RunFolder, made_with: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Be the only process that selects layers in a folder; one that does so by the same input waits."""
    if not ranks.current().is_first:
        return contextlib.nullcontext()
    what = f"the selection in {str(folder.path)!r}"
    return locked(folder.path / "selection.json", what, made_with=value_hash(made_with))


def _select(folder: RunFolder, config: SelectConfig) -> Selection:
    """Select layers from the folder's effects."""
    sweep_run_folder(folder.path)
    file = folder.path / "effects.parquet"
    if not file.is_file():
        raise InputError(
            f"{str(folder.path)!r} holds no effects.parquet, expected a folder that `mechedit trace` wrote; trace first"
        )
    check_step(folder.path, "trace")
    return select_layers(read_table(file, role="subject_last"), config=config)


def saved_selection(folder: RunFolder) -> Selection | None:
    """The folder's selection, when it has one."""
    file = folder.path / "selection.json"
    return Selection.load(file) if file.is_file() else None


def traced_model(folder: RunFolder) -> dict[str, Any]:
    """Provenance of the model that the folder's effects were traced on.

    Raises:
        InputError: nothing was traced here.
    """
    provenance = folder.stamps().get("trace", {}).get("model")
    if not provenance:
        raise InputError(
            f"{str(folder.path)!r} has no config.json that says which model was traced, expected a folder that "
            f"`mechedit trace` wrote; trace first"
        )
    return provenance


def validate_step(
    folder: RunFolder,
    model: Model,
    selection: Selection,
    requests: Sequence[EditRequest],
    texts: str | Path,
    sweep: SweepConfig,
    method: str,
    config: MethodConfig,
    reading: MomentsConfig,
    *,
    most_requests: int | None = None,
) -> Selection:
    """Sweep windows of layers with held-out edits, compare them with the selection, and choose by `sweep.by`.

    Where the edits are not sure of the best window (`Validation.agreement` below `SelectConfig.agreement`) and
    `most_requests` allows it, the best windows are edited once more, with so many requests, and chosen from by these.

    Writes sweep.parquet and sweep_cases.parquet, the same into finals/ where there were some, and at the end
    selection.json, with `validation` in it. Finished windows are kept in sweep_parts/, so that other windows can be
    added without editing those again, and z in targets/.

    Raises:
        InputError: another model than was traced; a folder without facts.parquet; another process selects layers there;
            and as `sweep_windows`.
    """
    made_with = {
        "selection": selection.plain(),
        "model": ModelIdentity.of(model.provenance()).record,
        "requests": [request.plain() for request in requests],
        "texts": str(texts),
        "method": method,
        "settings": [asdict(sweep), asdict(config), asdict(reading), most_requests],
    }
    with selecting(folder, made_with):
        check_traced(folder, model)
        check_step(folder.path, "trace")
        facts = read_table(folder.path / "facts.parquet", ("subject", "traced"))
        traced = set(where(facts, traced=True)["subject"])
        sample = held_out(requests, traced, sweep.requests, sweep.seed)
        windows = sweep.swept(selection.layers, model.n_layers)
        moments = moments_step(
            folder, model, texts, sorted({layer for window in windows for layer in window.layers}), reading
        )
        swept = sweep_step(folder, model, sample.requests, moments, windows, method, config, seed=sweep.seed)
        gap = subject_effects(read_table(folder.path / "effects.parquet"), SelectConfig(**selection.settings)).gap
        notes, n_held_out = [sample.warning] if sample.warning else [], len(sample.requests) - sample.traced
        validation = validate_selection(swept, gap, selection.layers, held_out=n_held_out, notes=notes)
        decided = decide_layers(selection, validation, swept, gap, sweep.by)
        unsure = (decided.validation["agreement"] or 0.0) < selection.settings["agreement"]
        if most_requests and unsure and decided.layers:
            best = finalists(swept, Window(decided.layers[0], decided.layers[-1]))
            more = held_out(requests, traced, most_requests, sweep.seed).requests
            if len(best) > 1 and len(more) > len(sample.requests):
                final = sweep_step(folder, model, more, moments, best, method, config, seed=sweep.seed, name=FINALS)
                decided = decide_layers(selection, validation, swept, gap, sweep.by, final)
        ranks.current().from_first(lambda: decided.save(folder.path / "selection.json"), "the selection of layers")
        return decided


def settle_step(
    folder: RunFolder,
    model: Model,
    selection: Selection,
    requests: Sequence[EditRequest],
    texts: str | Path,
    method: str,
    config: MethodConfig,
    reading: MomentsConfig,
    *,
    by: str,
    seed: int,
) -> Selection:
    """Let edits decide: a short sweep (`short_sweep`), and the best of its windows again with three times the requests.

    Of windows that score alike the one is taken that the trace prefers, unless `by` is `sweep`
    (`choose_window`). The windows are the ranges that resamples and other rules give, and the depth in steps; the
    requests are about subjects that were not traced. What it writes, and its errors, are those of `validate_step`.
    """
    ranges = [selection.layers, *(candidate.layers for candidate in selection.candidates)]
    width = moving_width(model.n_layers, SelectConfig(**selection.settings))
    windows = tuple(short_sweep([*ranges, *selection.alternatives.values()], model.n_layers, width))
    sweep = SweepConfig(by=by if selection.layers else "sweep", windows=windows, seed=seed)
    return validate_step(
        folder, model, selection, requests, texts, sweep, method, config, reading, most_requests=MOST_REQUESTS
    )


def check_traced(folder: RunFolder, model: Model) -> None:
    """Refuse another model than the folder's effects were traced on.

    Raises:
        InputError: names the field that differs.
    """
    traced = traced_model(folder)
    what, remedy = f"the trace in {str(folder.path)!r}", f"sweep the model that was traced, {traced.get('model')!r}"
    # A trace is the same whichever module is written.
    model.identity().require(ModelIdentity.of(traced), what, remedy, ignoring=("module",))


def sweep_step(
    folder: RunFolder,
    model: Model,
    requests: Sequence[EditRequest],
    moments: Mapping[int, SecondMoment],
    windows: Sequence[Window],
    method: str,
    config: MethodConfig,
    *,
    seed: int,
    name: str = "sweep",
) -> Sweep:
    """Edit and score every window; those finished before an interrupt are not edited again."""
    evaluation = replace(QUICK, seed=seed)
    stamp = {
        **_edit_stamp(model, list(requests), moments, method, config),
        "windows": windows,
        "evaluation": evaluation.plain(),
    }
    settings = {"method": method, "config": config, "evaluation": evaluation}
    folders = {"parts": folder.path / "sweep_parts", "cache": folder.path / "targets"}
    make = partial(sweep_windows, model, requests, moments, windows, **settings, **folders)
    return folder.step(name, stamp, make, SWEEP, at="" if name == "sweep" else name)


def moments_step(
    folder: RunFolder,
    model: Model,
    texts: str | Path,
    layers: Sequence[int],
    config: MomentsConfig,
    convergence: Convergence | None = None,
) -> dict[int, SecondMoment]:
    """Collect second moments into moments/; files with the same provenance are reused."""
    return collect_dealt(model, texts, layers, config, folder.path, overwrite=folder.overwrite, convergence=convergence)


def edit_step(
    folder: RunFolder,
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Mapping[int, SecondMoment],
    method: str,
    config: MethodConfig,
    file: str = "edit.safetensors",
    sourced: Callable[[Edit], Edit] = lambda edit: edit,
) -> Edit:
    """Make the edit with a named method; the model is left as it was.

    `sourced` notes in its manifest where its settings come from.
    """
    stamp = {**_edit_stamp(model, requests, moments, method, config), "layers": list(layers)}
    make = partial(METHODS[method], model, requests, layers, moments, config=config, cache=folder.path / "targets")
    return folder.step("edit", stamp, lambda: sourced(make()), EDIT, at=file)


def _edit_stamp(
    model: Model,
    requests: Sequence[EditRequest],
    moments: Mapping[int, SecondMoment],
    method: str,
    config: MethodConfig,
) -> dict[str, Any]:
    """Stamp fields that edits and sweeps share."""
    return {
        "model": model.provenance(),
        "requests": value_hash([request.plain() for request in requests]),
        "moments": value_hash({layer: moment.provenance for layer, moment in moments.items()}),
        "method": method,
        "settings": asdict(config),
    }


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
        InputError: references with zsRE's protocol, which has no free text; and as `evaluate`.
    """
    if references is not None and protocol == "zsre":
        raise InputError("references are given, and zsRE's protocol has no RS; leave them out, or use CounterFact's")
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
        lambda: write_summary_file(folder.path / "summary.json", scores, selection and selection.short, edit),
        "the summary",
    )
