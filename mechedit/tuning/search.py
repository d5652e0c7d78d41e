"""The stages of tuning one after another, and all that was tried."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mechedit.data import EditRequest
from mechedit.errors import DiskError, InputError, brief_list
from mechedit.evaluation import QUICK, EvaluationConfig, Summary
from mechedit.methods import METHODS
from mechedit.models import Model
from mechedit.moments import SecondMoment
from mechedit.notices import ImplausibleEditWarning
from mechedit.provenance import ModelIdentity, determining, value_hash
from mechedit.sweep import Sweep, Window, sweep_windows
from mechedit.tuning.alternatives import (
    WEIGHT,
    Changes,
    alternatives,
    changed,
    screening_weights,
    settable,
    unit_of,
    weights,
    wider_weight,
)
from mechedit.tuning.config import MINUTES, TuneConfig
from mechedit.tuning.ends import end_warnings, value_of
from mechedit.tuning.inputs import end_layers, scope_of
from mechedit.tuning.ledger import Ledger
from mechedit.tuning.plan import WIDE_ENDS, Plan, Speed, make_plan, plan_for_seconds
from mechedit.tuning.timing import measure_speed
from mechedit.tuning.trial import (
    Trial,
    best_of,
    central,
    check_not_equal,
    in_words,
    preferred,
    trials_of,
    weight_of,
    windows_of,
)
from mechedit.tuning.tried_windows import halfway_ends, spread_ends, widths_of
from mechedit.tuning.tuned import Tuned

Notify = Callable[[str], object]


@dataclass(kw_only=True, eq=False)
class Search:
    """A search for settings: its arguments, and what it has tried."""

    model: Model
    facts: list[EditRequest]
    moments: Mapping[int, SecondMoment]
    method: str
    base: Any
    tuning: TuneConfig
    windows: list[Window]
    candidates: list[Window]
    selected: Window | None
    """The window that a trace selected, where it can be tried."""
    folder: Path
    notify: Notify
    trials: list[Trial] = field(default_factory=list)
    searched: set[tuple[Any, ...]] = field(default_factory=set)
    """Searches for z that trials needed: layer, settings and number of the fact."""
    unedited: Summary | None = None
    """Scores of the unedited model on the facts of the last trial."""
    left_out: list[str] = field(default_factory=list)
    """What could not be edited, and why."""

    def run(self) -> Tuned:
        """The stages, one after another."""
        plan = self.plan()
        self.notify(f"tuning {self.method} with up to {plan.facts} facts: {plan.in_words()}")
        if self.tuning.windows is None and (lacking := set(range(self.model.n_layers - 1)) - set(self.moments)):
            self.notify(
                f"there are no second moments of layers {brief_list(sorted(lacking))}, so that they are not tried; "
                f"collect those of all layers but the last, which is never edited, to try them"
            )
        windows = self.try_windows_in_rounds(plan)
        current = self.choose_width(plan, self.choose_window(windows), windows)
        current = self.choose_weight(plan, current)
        before = current.changes
        for name in plan.searched:
            current = self.choose_setting(plan, current, name)
        if current.changes != before:
            current = self.choose_weight(plan, current)
        for warning in (warnings := end_warnings(self.base, self.trials, current, self.ends(), plan.searched)):
            self.notify(f"warning: {warning}")
        return self.tuned(plan, current, warnings)

    @cached_property
    def ledger(self) -> Ledger:
        """What earlier calls of the same search took."""
        return Ledger.at(self.folder, self.key)

    @cached_property
    def key(self) -> dict[str, Any]:
        """All that determines the search, but for its budget."""
        return {
            "model": ModelIdentity.of(self.model.provenance()).record,
            "requests": value_hash([request.plain() for request in self.facts]),
            "method": self.method,
            "settings": dataclasses.asdict(self.base),
            "windows": self.windows,
            "tuning": dataclasses.asdict(dataclasses.replace(self.tuning, minutes=None, edits=None)),
            "moments": value_hash(
                {layer: determining(getattr(moment, "provenance", {})) for layer, moment in self.moments.items()}
            ),
        }

    @property
    def evaluation(self) -> EvaluationConfig:
        """How trials are scored."""
        return dataclasses.replace(QUICK, seed=self.tuning.seed, batch_size=self.base.batch_size)

    def ends(self) -> list[int]:
        """Layers at which the windows search for z, ascending."""
        return end_layers(self.base, self.windows)

    def end(self, window: Window) -> int:
        """The layer at which z is searched for."""
        return self.base.target_layer(window.layers)

    def plan(self) -> Plan:
        """How the budget is dealt out."""
        scope = scope_of(self.base, self.windows, len(self.facts), self.tuning, self.selected)
        if self.tuning.edits is not None:
            return make_plan(self.tuning.edits, scope)
        speed = self.speed()
        plan = plan_for_seconds(60 * (self.tuning.minutes or MINUTES), speed, scope)
        self.notify(
            f"{speed.edit:.2g} to {speed.low_edit:.2g} seconds per edit by its layer, and {speed.trial:.2g} per trial "
            f"with {speed.fact:.2g} per fact in it: "
            f"at most some {plan.seconds(speed) / 60:.2g} minutes; --edits {plan.edits} gives the same"
        )
        return plan

    def speed(self) -> Speed:
        """How long an edit and a trial take, measured once and then kept."""
        if self.ledger.speed is None:
            with self.ledger.timed("speed"):
                self.ledger.speed = measure_speed(
                    self.sweep,
                    self.windows,
                    screening_weights(self.base),
                    len(self.facts),
                    lambda window: self.model.n_layers - self.end(window),
                )
        return self.ledger.speed

    def sweep(self, windows: Sequence[Window], changes: Changes, facts: int, apart: Path | None = None) -> Sweep:
        """Edit windows with some settings and the first facts; finished ones are read, unless in a folder apart."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImplausibleEditWarning)  # trials are there to tell, and are left again
            return sweep_windows(
                self.model,
                self.facts[:facts],
                self.moments,
                windows,
                method=self.method,
                config=changed(self.base, changes),
                evaluation=self.evaluation,
                parts=None if apart else self.folder / "parts",
                cache=apart or self.folder / "targets",
            )

    def measure(self, stage: str, windows: Sequence[Window], changes: Changes, facts: int) -> list[Trial]:
        """Trials of some windows with one choice of settings; those that cannot be edited so are left out."""
        spans = ",".join(f"{window.first}-{window.last}" for window in windows)
        name = f"{stage} {spans} {dict(changes)} {facts}"
        try:
            with self.ledger.timed(name):
                scored = self.sweep(windows, changes, facts)
        except DiskError:
            raise
        except InputError as error:  # a small λ may leave a system singular, which must not end the search
            self.leave_out(str(error))
            return []
        for window, reason in scored.failed.items():
            self.leave_out(f"{window}: {reason}")
        before = len(self.searched)
        settings = value_hash(
            {key: value for key, value in changes.items() if key not in (WEIGHT, "covariance_weight")}
        )
        self.searched |= {(self.end(window), settings, fact) for window in scored.windows for fact in range(facts)}
        trials = trials_of(scored, stage, changes, facts, len(self.searched) - before, self.ledger.seconds[name])
        self.unedited = scored.before
        self.trials += trials
        return trials

    def leave_out(self, what: str) -> None:
        """Say once what cannot be edited, and why."""
        if what not in self.left_out:
            self.notify(f"left out: {what}")
        self.left_out.append(what)

    def try_windows_in_rounds(self, plan: Plan) -> list[Trial]:
        """The best windows with all facts, by successive halving over end layers, and then beside the best.

        Each with the λ of the config, unless another is preferred.

        Raises:
            InputError: no window of a round can be edited; all score the same.
        """
        candidate_ends = [self.end(window) for window in self.candidates if window in self.windows]
        ends = spread_ends(self.ends(), plan.rungs[0].ends, candidate_ends)
        ranked: list[int] = []
        trials: list[Trial] = []
        for index, rung in enumerate(plan.rungs):
            ends = sorted(ends if not ranked else ranked[: rung.ends])
            trials = self.try_ends(ends, rung.facts)
            if not trials:
                raise InputError(f"no window can be edited with {rung.facts} facts: {self.left_out[-1]}")
            if index == 0:
                check_not_equal(trials)
            ranked = self.rank(trials)
        if plan.neighbors:
            tried = {self.end(trial.window) for trial in self.trials}
            beside = halfway_ends(ranked[0], self.ends(), tried, plan.neighbors)
            trials += self.try_ends(beside, plan.facts) if beside else []
        if self.selected is not None and self.selected not in windows_of(trials):
            trials += self.try_windows([self.selected], plan.facts)
        by_window = [[trial for trial in trials if trial.window == window] for window in windows_of(trials)]
        return [preferred(of_window[0], of_window[1:]) for of_window in by_window]

    def try_ends(self, ends: Sequence[int], facts: int) -> list[Trial]:
        """Trials of all windows with these ends, with each λ of the screening."""
        return self.try_windows([window for window in self.windows if self.end(window) in ends], facts)

    def try_windows(self, windows: Sequence[Window], facts: int) -> list[Trial]:
        """Trials of windows with each λ of the screening."""
        return [
            trial
            for changes in screening_weights(self.base)
            for trial in self.measure("windows", windows, changes, facts)
        ]

    def rank(self, trials: Sequence[Trial]) -> list[int]:
        """End layers by the objective of their best trial, the best first."""
        best: dict[int, float] = {}
        for trial in trials:
            best[self.end(trial.window)] = max(best.get(self.end(trial.window), -np.inf), trial.objective)
        return sorted(best, key=lambda end: (-best[end], end))

    def choose_window(self, trials: Sequence[Trial]) -> Trial:
        """The window that a trace selected unless another is preferred, else that in the middle of the best."""
        current = central(trials)
        for trial in trials:
            if trial.window == self.selected:
                current = preferred(trial, [current])
        self.notify(f"chosen of {len(windows_of(self.trials))} windows: {current.window}, {in_words(current)}")
        return current

    def choose_width(self, plan: Plan, current: Trial, trials: Sequence[Trial]) -> Trial:
        """The window chosen, or another width of one that ends like the best of some trials where that is preferred."""
        if self.tuning.windows is not None or self.base.target_layer([0, 1]) != 1:
            return current
        rivals: list[Trial] = []
        for end in self.rank(trials)[:WIDE_ENDS]:
            of_end = best_of([trial for trial in trials if self.end(trial.window) == end])
            wider = [window for window in widths_of(of_end.window, self.moments) if window not in windows_of(trials)]
            rivals += self.measure("widths", wider, of_end.changes, plan.facts) if wider else []
        if rivals:
            current = preferred(current, rivals)
            self.notify(f"best of {len(rivals) + 1} widths: {current.window}, {in_words(current)}")
        return current

    def choose_weight(self, plan: Plan, current: Trial) -> Trial:
        """The best λ on a window; values beyond the ends of the grid are tried while the best lies there."""
        if not settable(self.base, WEIGHT):
            return current
        rest = {name: value for name, value in current.changes.items() if name not in (WEIGHT, "covariance_weight")}
        choices = [rest, *({**rest, **change} for change in weights(self.base))]
        trials = [current]
        for changes in choices:
            if changes != dict(current.changes):
                trials += self.try_settings(WEIGHT, plan, current.window, changes)
        for _ in range(2):
            best = best_of(trials)
            weight = weight_of(best.changes)
            values = sorted(value for trial in trials if (value := weight_of(trial.changes)) is not None)
            if weight is None or weight not in (values[0], values[-1]):
                break
            wider = wider_weight(self.base, self.weight_change(best.changes), larger=weight == values[-1])
            trials += self.try_settings(WEIGHT, plan, current.window, {**rest, **wider})
        current = preferred(current, trials)
        self.notify(f"best of {len(trials)} λ: {value_of(self.base, current, WEIGHT)}, {in_words(current)}")
        return current

    def choose_setting(self, plan: Plan, current: Trial, name: str) -> Trial:
        """The current trial, or one with another value of a setting of the search where that is preferred."""
        rivals = [
            trial
            for change in alternatives(self.base, name)
            for trial in self.try_settings(name, plan, current.window, {**current.changes, **change})
        ]
        best = preferred(current, rivals)
        self.notify(f"best of {len(rivals) + 1} {name}: {value_of(self.base, best, name)}, {in_words(best)}")
        return best

    def try_settings(self, stage: str, plan: Plan, window: Window, changes: Changes) -> list[Trial]:
        """The trial of a window and settings with all facts, as a list that is empty where these cannot be edited.

        One that was made before is not repeated.
        """
        for trial in self.trials:
            if (trial.window, dict(trial.changes), trial.facts) == (window, dict(changes), plan.facts):
                return [trial]
        return self.measure(stage, [window], changes, plan.facts)

    def weight_change(self, changes: Changes) -> Changes:
        """The part of some changes that sets λ."""
        return {name: value for name, value in changes.items() if name in (WEIGHT, "covariance_weight")}

    def tuned(self, plan: Plan, chosen: Trial, warnings: Sequence[str]) -> Tuned:
        """The result, with all that was tried."""
        config = changed(self.base, chosen.changes)
        names = [name for name in (WEIGHT, *plan.searched) if settable(config, name)]
        own_config = METHODS[self.method].recommendation(self.model, tuned=False).config
        settings = {
            name: value
            for name, value in dataclasses.asdict(config).items()
            if name != "seed" and value != getattr(own_config, name)
        } | {unit_of(config, name): getattr(config, unit_of(config, name)) for name in names}
        record = {
            "layers": chosen.window.layers,
            "settings": {name: value for name, value in settings.items() if value is not None},
            "begun_with": {unit_of(self.base, name): getattr(self.base, unit_of(self.base, name)) for name in names},
            "chosen": chosen.plain(),
            "unedited": self.unedited,
            "seed": self.tuning.seed,
            "budget": {"edits": plan.edits, "minutes": None if self.tuning.edits else self.tuning.minutes or MINUTES},
            "plan": {**dataclasses.asdict(plan), "in_words": plan.in_words()},
            "made_with": {name: value for name, value in self.key.items() if name not in ("model", "windows")},
            "requests": [request.id for request in self.facts[: plan.facts]],
            "trials": [trial.plain() for trial in self.trials],
            "edits": len(self.searched),
            "warnings": list(warnings),
            "seconds": sum(self.ledger.seconds.values()),
        }
        return Tuned(method=self.method, layers=tuple(chosen.window.layers), config=config, record=record)
