"""Layers and settings of a method for a model, chosen by editing with held-out facts under a budget.

1. Windows by successive halving: end layers spread over the depth are tried with few facts, the better half with twice
   as many, and so on; then the layers beside the best end, and other widths at the best two.
2. λ on the best window, which costs no search for z.
3. The settings of the search, one after another, on the best window alone; then λ again.

Of the windows that score about as well as the best, that in the middle is taken. A setting, a width, and the window
that a trace selected are left where most resamples of the facts prefer another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mechedit.data import EditRequest, check_requests, records_of
from mechedit.methods import METHODS, MethodConfig, by_layer
from mechedit.models import Model, exclusive
from mechedit.moments import SecondMoment
from mechedit.sweep import Window
from mechedit.temporary_names import sweep
from mechedit.tuning.config import TuneConfig
from mechedit.tuning.inputs import check_method, tuned_windows, tuning_facts
from mechedit.tuning.search import Notify, Search
from mechedit.tuning.tuned import Tuned


@exclusive
def tune(
    model: Model,
    requests: Sequence[EditRequest],
    moments: Mapping[int, SecondMoment],
    *,
    method: str = "memit",
    config: MethodConfig | None = None,
    tuning: TuneConfig | None = None,
    candidates: Sequence[tuple[int, int]] = (),
    selected: tuple[int, int] | None = None,
    folder: str | Path | None = None,
    notify: Notify = lambda line: None,
) -> Tuned:
    """Choose layers and settings of a method for a model by editing with held-out facts; see the module's docstring.

    With a budget in edits, the result depends on the arguments alone, however often the search was interrupted. Minutes
    become a number of edits by the speed of the first ones, which is kept in `folder`: from then on it is the same. The
    model is left as it was, bit for bit.

    Args:
        model: unedited.
        requests: facts to edit with, about subjects that will not be used to judge the result; those with paraphrases
            and neighbors, without which S has no data. One per subject is taken.
        moments: E[k kᵀ] by layer; windows lie within these layers.
        method: one of `METHODS` that searches for z on the unedited model.
        config: settings to begin with; by default those that ship with the model (`recommended`, untuned).
        tuning: the budget, and windows to try.
        candidates: windows to try besides those spread over the depth, such as those of a trace.
        selected: the window that a trace selected, which is left only where most resamples of the facts prefer another.
        folder: for targets and finished trials, so that an interrupted search goes on.
        notify: told what the search will take, and what each step chose.

    Raises:
        InputError: an unknown method, or one that cannot be tuned; windows that do not fit into the model or the
            moments; too few facts; a budget too small to start; scores that are equal for all windows.

    Example:
        >>> tuned = me.tune(model, requests, moments, tuning=me.TuneConfig(edits=400), folder="tune")
        >>> tuned.save("tuned.json", model)
        >>> edit = me.memit(model, others, tuned.layers, moments, config=tuned.config)
    """
    tuning = tuning or TuneConfig()
    check_method(method)
    base: Any = config or METHODS[method].recommendation(model, tuned=False).config
    moments = by_layer("the second moments", moments)
    facts = tuning_facts(records_of(requests, EditRequest), tuning)
    check_requests(facts)
    candidates = [*candidates] if selected is None else [selected, *candidates]
    windows = tuned_windows(model, list(moments), tuning, candidates)
    if folder is not None:
        sweep(Path(folder) / name for name in ("parts", "targets", "ledger"))
    with contextlib.ExitStack() as stack:
        search = Search(
            model=model, facts=facts, moments=moments, method=method, base=base, tuning=tuning, windows=windows,
            candidates=[Window(*ends) for ends in candidates], notify=notify,
            selected=next((window for window in windows if window == selected), None),
            folder=Path(folder or stack.enter_context(TemporaryDirectory())),
        )  # fmt: skip
        return search.run()
