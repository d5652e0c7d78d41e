"""What a search for settings may begin with: methods, facts, windows, and a budget that is large enough."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from mechedit.data import EditRequest
from mechedit.errors import InputError, brief_list, check_choice
from mechedit.methods import METHODS, MethodConfig, SearchConfig
from mechedit.models import Model
from mechedit.selection import SelectConfig, moving_width
from mechedit.sweep import Window
from mechedit.sweep.windows import check_windows
from mechedit.tuning.alternatives import SEARCHED, settable
from mechedit.tuning.config import TuneConfig
from mechedit.tuning.plan import FEWEST, Scope, make_plan


def check_method(method: str) -> None:
    """Refuse methods without windows of layers or without a search for z on the unedited model.

    Raises:
        InputError: names those that can be tuned.
    """
    check_choice("the method", method, METHODS)
    tunable = [name for name, entry in METHODS.items() if is_tunable(entry.config)]
    check_choice("the method", method, tunable, "others write one layer, or search for no z: set them by hand")


def is_tunable(kind: type[MethodConfig]) -> bool:
    """Whether a method searches for z on the unedited model and spreads it over a window."""
    return issubclass(kind, SearchConfig) and kind.shares_targets


def tuning_facts(requests: Sequence[EditRequest], tuning: TuneConfig) -> list[EditRequest]:
    """One request per subject, in seeded order, at most `tuning.facts`: the first of more are the same as fewer.

    Raises:
        InputError: fewer than a comparison needs.
    """
    order = list(requests)
    Random(tuning.seed).shuffle(order)
    by_subject: dict[str, EditRequest] = {}
    for request in order:
        by_subject.setdefault(request.subject, request)
    facts = list(by_subject.values())[: tuning.facts]
    if len(facts) < FEWEST:
        raise InputError(
            f"there are {len(facts)} subjects among the {len(requests)} requests, expected at least {FEWEST} "
            f"to tune with, better 24; give more requests"
        )
    return facts


def tuned_windows(
    model: Model, layers: Sequence[int], tuning: TuneConfig, candidates: Sequence[tuple[int, int]] = ()
) -> list[Window]:
    """The windows that a search may begin with: those of `tuning`, or all of a width and the candidates.

    The last layer is left out: what it writes at the subject reaches no later token.

    Args:
        model: its depth counts.
        layers: those with second moments.
        tuning: windows or width.
        candidates: taken besides where they fit.

    Raises:
        InputError: a window outside the model or the moments; a width that does not fit.
    """
    if tuning.windows is not None:
        windows = check_windows(tuning.windows, model.n_layers)
        for window in windows:
            if missing := sorted(set(window.layers) - set(layers)):
                raise InputError(
                    f"{window} is to be tried, and there are no second moments of {missing}, expected those of all its "
                    f"layers; collect them, or choose other windows"
                )
        return windows
    width = tuning.width or moving_width(model.n_layers, SelectConfig())
    last = max(model.n_layers - 2, width - 1)
    within = [Window(end - width + 1, end) for end in range(width - 1, last + 1)] if width <= model.n_layers else []
    fitting = [window for window in within if set(window.layers) <= set(layers)]
    if not within:
        raise InputError(f"no window of {width} layers fits into the model's {model.n_layers}; choose another --width")
    if not fitting:
        raise InputError(
            f"no window of {width} layers fits into the layers with second moments ({brief_list(sorted(layers))}); "
            f"choose another --width, or collect more moments"
        )
    extra = [Window(*ends) for ends in candidates]
    extra = [window for window in extra if set(window.layers) <= set(layers) and window.width <= 2 * width]
    return check_windows([*fitting, *extra], model.n_layers)


def check_budget(
    config: MethodConfig,
    windows: Sequence[Window],
    facts: int,
    tuning: TuneConfig,
    selected: tuple[int, int] | None = None,
) -> None:
    """Refuse a budget in edits with which no search can begin; minutes are held against the speed of the first ones.

    Args:
        config: settings to begin with.
        windows: that may be tried.
        facts: number of facts to tune with.
        tuning: the budget.
        selected: the window that a trace selected.

    Raises:
        InputError: says how many edits the smallest search takes.
    """
    if tuning.edits is not None:
        make_plan(tuning.edits, scope_of(config, windows, facts, tuning, selected))


def scope_of(
    config: MethodConfig,
    windows: Sequence[Window],
    facts: int,
    tuning: TuneConfig,
    selected: tuple[int, int] | None = None,
) -> Scope:
    """What there is to choose among; arguments as in `check_budget`."""
    return Scope(
        ends=len(end_layers(config, windows)),
        requests=facts,
        searched=tuple(name for name in SEARCHED if settable(config, name)),
        fixed=tuning.windows is not None,
        selected=selected in windows,
    )


def end_layers(config: Any, windows: Sequence[Window]) -> list[int]:
    """The layers at which windows search for z, ascending."""
    return sorted({config.target_layer(window.layers) for window in windows})
