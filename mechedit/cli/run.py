"""`mechedit run`: all steps, then the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mechedit import pipeline, ranks
from mechedit.cli.app import say
from mechedit.cli.command import command, options_of
from mechedit.cli.describe import say_unconverged
from mechedit.cli.idle import refuse_idle
from mechedit.cli.options import (
    ALL_SEVERED,
    EVALUATION_OPTIONS,
    RULE_NOTE,
    STOPPED,
    TINY_DATA,
    ApproximateOption,
    FactsOptions,
    MethodOptions,
    MinutesOption,
    RequestsOption,
    RunFolderOptions,
    TextsOption,
    say_agreement,
    saying_disagreement,
    suited_data,
)
from mechedit.cli.parsing import parse_layers, require_layers, sampled
from mechedit.data import Conflicts, EditRequest, Fact
from mechedit.errors import InputError
from mechedit.evaluation import EvaluationConfig
from mechedit.figures import run_figures
from mechedit.methods import with_sources
from mechedit.models import Model
from mechedit.moments import MomentsConfig
from mechedit.report import number, span, write_report
from mechedit.run_folder import RunFolder
from mechedit.selection import SelectConfig, Selection
from mechedit.sweep import By, SweepConfig
from mechedit.trace import TraceConfig, UntilSettled


@dataclass(frozen=True, kw_only=True)
class RunOptions(
    MinutesOption, ApproximateOption, FactsOptions, RequestsOption, TextsOption, MethodOptions, RunFolderOptions
):
    """Facts, requests, texts, model, method and folder."""

    max_facts: int | None = 100
    """Trace a seeded sample of this many facts."""
    max_requests: int | None = 100
    """Edit with a seeded sample of this many requests."""
    conflicts: Conflicts = "first"
    """Requests for different objects of one subject and relation, of which a sample is drawn: refuse, or keep the
    first."""
    all_facts: bool = False
    """Trace all facts of the sample, also where the selection has settled before; so it is with the tiny model and with
    --approximate."""
    by: By | None = None
    """How the layers are chosen: by the trace where it settles, by a short sweep of held-out edits, or by both: of the
    windows that edit as well as the best, the one that the trace prefers. By default by the trace with the tiny model,
    and by both with others, where tracing alone seldom says which layers edit well."""
    accept_unsettled: bool = False
    """Edit the layers that the trace selects though resamples of the facts do not agree on them; else held-out edits
    decide."""
    layers: str | None = None
    """Layers to edit, such as 3-8 or 3,5,7, in place of those tuned or selected. Several are separated by commas."""

    def sweeps(self, selection: Selection) -> bool:
        """Whether edits decide though the trace has selected layers."""
        by = self.by or ("trace" if suited_data(self.model) is TINY_DATA or self.accept_unsettled else "both")
        return by != "trace" and (selection.state != "no early site" or self.by == "sweep")


@command(
    trace=options_of(TraceConfig, only=("samples", "seed"), defaults=ALL_SEVERED),
    select=options_of(SelectConfig, only=("rule", "seed"), notes=RULE_NOTE),
    evaluation=options_of(EvaluationConfig, only=EVALUATION_OPTIONS, defaults={"generation_prompts": 2}),
)
def run_command(options: RunOptions, trace: TraceConfig, select: SelectConfig, evaluation: EvaluationConfig) -> int:
    """All the steps: trace, select, moments, edit, evaluate, then figures and the report.

    On every model but the tiny one, and where resamples of the facts do not agree on the layers, windows of layers are
    edited with requests about other subjects; of those that score as well as the best the one is taken that the trace
    prefers. It ends with 3 where there is no early
    site, or where no window can be told from the unedited model. Layers that were tuned for the model
    (`mechedit tune`) are edited whatever the trace selects.
    """
    # Whatever can be refused is refused before the long steps.
    if options.layers is not None:
        refuse_idle(
            options,
            names={"by", "accept_unsettled"},
            reason="says how the layers are chosen, and --layers names them; leave one of them out",
        )
    folder = options.run_folder()
    facts = sampled(options.read_facts(options.facts), options.max_facts, options.seed)
    all_requests = options.read_requests(options.requests, options.conflicts)
    requests = sampled(all_requests, options.max_requests, options.seed, "--max-requests")
    layers = None if options.layers is None else parse_layers(options.layers)
    model = options.load_model()
    judges = options.in_turns(model, others_than(requests, all_requests))
    facts, requests = options.in_turns(model, facts), options.in_turns(model, requests)
    settings = options.method_settings(model, own_layers=bool(layers))
    config, from_tuning = settings.config, not layers and settings.layers is not None
    layers = layers or (None if settings.layers is None else list(settings.layers))
    if layers:
        require_layers(layers, model.n_layers)

    _trace(folder, model, facts, options, trace, select)
    selection = pipeline.select_step(folder, select)
    say(selection.reason)
    unsettled = selection.state == "unsettled" and not options.accept_unsettled
    if not layers and (unsettled or options.sweeps(selection)):
        say(
            "the choice is unsettled: a short sweep of edits decides" if unsettled else "a short sweep of edits decides"
        )
        selection = pipeline.settle_step(
            folder,
            model,
            selection,
            judges,
            options.suited_texts,
            options.method,
            config,
            MomentsConfig(),
            by="sweep" if options.by == "sweep" else "both",
            seed=options.seed,
        )
        say(selection.reason)
        unsettled = selection.state == "unsettled"
    layers = layers or ([] if unsettled else list(selection.layers))
    if not layers:
        pipeline.write_summary(folder, None, selection)
        _draw(folder)
        return 3
    moments = (
        pipeline.moments_step(folder, model, options.suited_texts, layers, MomentsConfig())
        if config.preserves_keys
        else {}
    )
    sourced = partial(with_sources, recommended=settings, layers=from_tuning)
    edit = pipeline.edit_step(folder, model, requests, layers, moments, options.method, config, sourced=sourced)
    say_unconverged(edit)
    scores = pipeline.evaluate_step(folder, model, requests, edit, evaluation)
    summary = pipeline.write_summary(folder, scores, selection, edit)
    say(scores_in_words(layers, summary))
    say(f"the report is {_draw(folder)}")
    options.print_summary(summary)
    return 0


def scores_in_words(layers: Sequence[int], summary: Mapping[str, Any]) -> str:
    """The edited layers, and the scores before and after the edit that were measured, in a line."""
    states = [summary[state] for state in ("before", "after") if state in summary]
    scores = [
        f"{name} {' → '.join(number(state[name]['mean']) for state in states)}"
        for name in ("S", "ES", "PS", "NS")
        if all(name in state for state in states)
    ]
    return f"{'layer' if len(layers) == 1 else 'layers'} {span(layers)}: {', '.join(scores) or 'no scores'}"


def others_than(requests: Sequence[EditRequest], all_requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Requests to choose layers with: those about other subjects than `requests`, where a sweep has enough, else all.

    What layers are chosen by does not show what they are worth: the chosen are the best on these requests by luck too.
    """
    edited = {request.subject for request in requests}
    others = [request for request in all_requests if request.subject not in edited]
    return others if len(others) >= SweepConfig.requests else list(all_requests)


def _draw(folder: RunFolder) -> Path:
    """Draw the folder's figures and write its report."""
    return ranks.current().from_first(partial(write_report, folder.path, run_figures), "the report")


def _trace(
    folder: RunFolder, model: Model, facts: list[Fact], options: RunOptions, trace: TraceConfig, select: SelectConfig
) -> None:
    """Trace the facts: of other models than the tiny one until the selection settles."""
    config = options.trace_config(trace)
    if options.all_facts or options.approximate or suited_data(options.model) is TINY_DATA:
        if options.minutes is not None:
            raise InputError(
                "--minutes is for a trace that ends when the selection settles, and all facts are traced here; leave "
                "it out, or leave --all-facts and --approximate out"
            )
        with saying_disagreement("leave --approximate out"):
            traced = pipeline.trace_step(folder, model, facts, config, least=select.min_facts)
        say_agreement(traced)
        return
    until = UntilSettled(minutes=options.minutes)
    traced = pipeline.trace_until_settled_step(folder, model, facts, config, until, select, say)
    say(f"traced {traced['n_facts']} facts: {STOPPED[traced['stopped']]}")
