"""`mechedit select`: the critical layers from a trace, checked by editing if asked."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated

from mechedit import pipeline, ranks
from mechedit.cli.app import say
from mechedit.cli.command import POSITIONAL, command, options_of
from mechedit.cli.idle import refuse_idle
from mechedit.cli.options import RULE_NOTE, MethodOptions, ModelOptions, RequestsOption, TextsOption
from mechedit.cli.parsing import existing_folder
from mechedit.data import Conflicts
from mechedit.figures import run_figures
from mechedit.moments import MomentsConfig
from mechedit.run_folder import RunFolder
from mechedit.selection import SelectConfig, Selection
from mechedit.sweep import SweepConfig


@dataclass(frozen=True, kw_only=True)
class SelectOptions(RequestsOption, TextsOption, MethodOptions):
    """The traced folder, and the inputs of a sweep."""

    directory: Annotated[Path, POSITIONAL]
    """Folder that `mechedit trace` wrote."""
    validate: bool = False
    """Sweep windows of layers with held-out edits."""
    conflicts: Conflicts = "first"
    """Requests for different objects of one subject and relation, of which a sample is drawn: refuse, or keep the
    first."""
    accept_unsettled: bool = False
    """Take the layers though resamples of the facts do not agree on them; else the command then exits with 3."""
    model: str | None = None
    """Model to sweep: tiny, a hub name or a folder; by default the one that was traced."""


_RENAMED = {"requests": "validate_requests"}
_ALWAYS_READ = ("directory", "validate", "accept_unsettled", "by")
"""Fields that the command reads also without a sweep, beside those of a model and of a selection."""


@command(
    select=options_of(
        SelectConfig,
        without=("metric", "resamples", "overlap", "agreement", "confidence", "min_facts"),
        notes={**RULE_NOTE, "width": "Layers that moving-average takes, and layers per window that is swept."},
    ),
    sweep=options_of(
        SweepConfig,
        rename=_RENAMED,
        notes={"windows": "Windows to sweep, such as 1-4,2-5; by default all that are as wide as the selected range."},
    ),
    moments=options_of(MomentsConfig, only=("tokens", "max_length")),
)
def select_command(options: SelectOptions, select: SelectConfig, sweep: SweepConfig, moments: MomentsConfig) -> int:
    """Choose the critical layers from a folder's effects: selection.json and its figure.

    With --validate, or --by sweep or both, windows of layers are edited with requests about other subjects and
    scored, beside what the trace says of them: sweep.parquet and its figure, and a verdict in selection.json.

    It ends with 3 where there is no early site, or where the choice is unsettled: resamples of the facts give other
    layers too often.
    """
    folder = RunFolder.at(existing_folder(options.directory), overwrite=options.overwrite)
    sweeping = options.validate or sweep.by != "trace"
    if sweeping:
        traced = pipeline.traced_model(folder)
        options = replace(options, model=options.model or traced["model"], dtype=options.dtype or traced["dtype"])
    else:
        _refuse_idle(options, sweep, moments)
    selection = pipeline.select_step(folder, select, save=not sweeping)
    summary = {}
    if sweeping:
        selection = _validate(folder, selection, options, sweep, moments)
        summary["validation"] = selection.validation
    ranks.current().from_first(lambda: run_figures(folder.path), "the figures")
    say(selection.reason)
    options.print_summary({"selection": {**selection.short, **summary}})
    accepted = selection.state == "settled" or (selection.state == "unsettled" and options.accept_unsettled)
    return 0 if accepted else 3


def _refuse_idle(options: SelectOptions, *settings: SweepConfig | MomentsConfig) -> None:
    """Refuse options that only a sweep reads, where there is none.

    Raises:
        InputError: names the first of them.
    """
    shared = {field.name for kind in (ModelOptions, SelectConfig) for field in fields(kind)}
    for chosen in (options, *settings):
        refuse_idle(
            chosen,
            names={field.name for field in fields(chosen)} - {*shared, *_ALWAYS_READ},
            reason="is for the sweep of edits, expected one; add --validate, or --by sweep or both, or leave it out",
            option_names=_RENAMED if isinstance(chosen, SweepConfig) else None,
        )


def _validate(
    folder: RunFolder,
    selection: Selection,
    options: SelectOptions,
    sweep: SweepConfig,
    moments: MomentsConfig,
) -> Selection:
    """Sweep the traced model and say how its edits agree with the trace."""
    requests = options.read_requests(options.requests, options.conflicts)
    model = options.load_model()
    requests = options.in_turns(model, requests)
    config = options.method_settings(model, own_layers=True).config
    validated = pipeline.validate_step(
        folder, model, selection, requests, options.suited_texts, sweep, options.method, config, moments
    )
    for line in dict.fromkeys([*validated.validation["warnings"], validated.validation["verdict"]]):
        say(line)
    return validated
