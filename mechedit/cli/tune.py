"""`mechedit tune`: layers and settings of a method for a model, chosen by editing under a budget."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from mechedit import pipeline
from mechedit.cli.app import say
from mechedit.cli.command import POSITIONAL, command, options_of
from mechedit.cli.idle import refuse_idle
from mechedit.cli.options import MethodOptions, RequestsOption, TextsOption
from mechedit.cli.parsing import existing_folder
from mechedit.errors import InputError
from mechedit.figures import save_figure, tuning_figures
from mechedit.methods import TUNED_FILE, tuned_folder_of
from mechedit.models import Model
from mechedit.moments import MomentsConfig, SecondMoment, is_published, load_moments, plan_moments
from mechedit.moments.second_moment import moment_path
from mechedit.paths import check_folder, writable_file
from mechedit.provenance import ModelIdentity
from mechedit.run_folder import RunFolder
from mechedit.selection import Selection
from mechedit.sweep import Window
from mechedit.tables import read_table, where
from mechedit.tuning import TuneConfig, check_budget, check_method, tune, tuned_windows, tuning_facts


@dataclass(frozen=True, kw_only=True)
class TuneOptions(RequestsOption, TextsOption, MethodOptions):
    """Model, requests, moments, method, trace and folder."""

    model: Annotated[str | None, POSITIONAL] = "tiny"
    """tiny, a hub name or a folder."""
    out: Path | None = None
    """Folder for tuned.json and all that is tried; by default tuned.json lies in the model's folder where that can be
    written to, else with all that is tried in the folder of tuned settings."""
    moments: Path | None = None
    """Folder that `mechedit moments` wrote; by default they are collected from --texts."""
    trace: Path | None = None
    """Folder of a selection: its candidates are tried too, its layers are left only where most resamples of the facts
    prefer others, and facts about its subjects are not tuned with."""


@command(
    options=options_of(TuneOptions, without=("tuned", "no_tuned")),
    tuning=options_of(TuneConfig),
    reading=options_of(MomentsConfig, only=("tokens", "max_length")),
)
def tune_command(options: TuneOptions, tuning: TuneConfig, reading: MomentsConfig) -> int:
    """Choose layers, λ and the settings of the search by editing with held-out facts, under a budget: tuned.json.

    `edit`, `run` and `select --validate` then take them by themselves. An interrupted search goes on where it stopped.
    """
    if options.moments is not None:
        refuse_idle(
            options,
            reading,
            names={"texts", "tokens", "max_length"},
            reason="is for collecting second moments, and --moments names those that are there; leave one of them out",
        )
    check_method(options.method)
    requests = options.read_requests(options.requests, "first")  # one per subject is taken in any case
    selection = None if options.trace is None else _selection(existing_folder(options.trace))
    traced = set() if options.trace is None else _traced(options.trace)
    model = options.load_model()
    if selection is not None:
        model.identity().require(
            ModelIdentity.of(selection.provenance),
            f"the selection in {str(options.trace)!r}",
            "trace this model, or leave --trace out",
            ignoring={"module"},
        )
    candidates, selected = _windows_of(selection)
    requests = options.in_turns(model, requests)
    held_out = [request for request in requests if request.subject not in traced]
    config = options.untuned(model)
    windows = tuned_windows(model, range(model.n_layers), tuning, candidates)
    check_budget(config, windows, len(tuning_facts(held_out, tuning)), tuning, selected)
    folder = RunFolder.at(options.out or tuned_folder_of(model) / "search", overwrite=options.overwrite)
    file = writable_file(tuned_file(options, model))
    check_folder(folder.path / "figures")
    moments = _moments(folder, model, options, windows, reading)
    tuned = tune(
        model, held_out, moments, method=options.method, tuning=tuning, candidates=candidates, selected=selected,
        folder=folder.path, config=config, notify=say,
    )  # fmt: skip
    for name, figure in tuning_figures(tuned.record).items():
        save_figure(figure, folder.path / "figures", name)
    settings = tuned.save(file, model)
    values = ", ".join(
        f"{name} {value:g}" for name, value in settings.settings.items() if isinstance(value, int | float)
    )
    say(f"wrote {file}: layers {list(tuned.layers)}, {values}; figures in {folder.path / 'figures'}")
    options.print_summary(
        {
            "tuned": str(file),
            "method": tuned.method,
            "layers": list(tuned.layers),
            "settings": dict(settings.settings),
            "score": tuned.record["chosen"]["score"],
            "edits": tuned.record["edits"],
            "warnings": list(tuned.warnings),
            "hash": settings.hash,
        }
    )
    return 0


def tuned_file(options: TuneOptions, model: Model) -> Path:
    """Where tuned.json is written: --out, the folder of the model, or that of tuned settings."""
    if options.out is not None:
        return options.out / TUNED_FILE
    folder = Path(options.model or "tiny")
    if options.model != "tiny" and folder.is_dir() and os.access(folder, os.W_OK):
        return folder / TUNED_FILE
    return tuned_folder_of(model) / TUNED_FILE


def _selection(folder: Path) -> Selection:
    """The selection in a folder.

    Raises:
        InputError: it has none; and as `Selection.load`.
    """
    if not (folder / "selection.json").is_file():
        raise InputError(
            f"{str(folder)!r} has no selection.json, expected the folder of a selection; run mechedit select "
            f"{str(folder)!r} first, or leave --trace out"
        )
    return Selection.load(folder / "selection.json")


def _windows_of(selection: Selection | None) -> tuple[list[Window], Window | None]:
    """The windows that a trace proposes, and the one that it selects, if it does."""
    if selection is None:
        return [], None
    ranges = [selection.layers, *(candidate.layers for candidate in selection.candidates)]
    ranges += [tuple(layers) for layers in selection.alternatives.values()]
    windows = dict.fromkeys(Window(layers[0], layers[-1]) for layers in ranges if layers)
    return list(windows), Window(selection.layers[0], selection.layers[-1]) if selection.layers else None


def _traced(folder: Path) -> set[str]:
    """The subjects that were traced."""
    if not (folder / "facts.parquet").is_file():
        return set()
    facts = read_table(folder / "facts.parquet", ("subject", "traced"))
    return set(where(facts, traced=True)["subject"])


def _moments(
    folder: RunFolder, model: Model, options: TuneOptions, windows: Sequence[Window], reading: MomentsConfig
) -> dict[int, SecondMoment]:
    """The second moments of all layers that may be edited, those in --moments or collected."""
    layers = sorted({layer for window in windows for layer in window.layers})
    source = options.moments
    if source is None:
        say(f"second moments first, which the budget does not count: {plan_moments(model, layers, reading)}")
        return pipeline.moments_step(folder, model, options.suited_texts, layers, reading)
    if not is_published(source):
        layers = [layer for layer in layers if moment_path(source, layer).is_file()]
        if not layers:
            raise InputError(
                f"{str(source)!r} holds no second moments of these layers, expected a folder that `mechedit moments` "
                f"wrote; collect them, or leave --moments out"
            )
    return load_moments(source, layers, model)
