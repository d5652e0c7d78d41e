"""Steps that edit windows of layers, and let these edits judge the layers that the trace selects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from mechedit import ranks
from mechedit.cache import Codec, codec_of
from mechedit.data import EditRequest
from mechedit.evaluation import (
    QUICK,
)
from mechedit.methods import MethodConfig
from mechedit.models import Model
from mechedit.moments import MomentsConfig, SecondMoment
from mechedit.pipeline.editing import edit_stamp, moments_step
from mechedit.pipeline.selecting import selecting, traced_model
from mechedit.provenance import ModelIdentity
from mechedit.run_folder import RunFolder, check_step
from mechedit.selection import SelectConfig, Selection, moving_width, subject_effects
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

SWEEP: Codec[Sweep] = codec_of(Sweep, files=("sweep.parquet", "sweep_cases.parquet"))
FINALS = "finals"
"""Folder of the sweep in which the best windows meet once more."""
MOST_REQUESTS = 3 * SweepConfig.requests
"""Requests of the last round of a short sweep, between the windows that the first could not tell apart."""


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
        **edit_stamp(model, list(requests), moments, method, config),
        "windows": windows,
        "evaluation": evaluation.plain(),
    }
    settings = {"method": method, "config": config, "evaluation": evaluation}
    folders = {"parts": folder.path / "sweep_parts", "cache": folder.path / "targets"}
    make = partial(sweep_windows, model, requests, moments, windows, **settings, **folders)
    return folder.step(name, stamp, make, SWEEP, at="" if name == "sweep" else name)
