"""Edit every window with the same requests, each time from the unedited model, and measure what came of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from mechedit.cache import kept
from mechedit.data import EditRequest, check_requests
from mechedit.edit import Edit, edited
from mechedit.errors import InputError, check_choice
from mechedit.evaluation import PERCENT, QUICK, EvaluationConfig, Summary, evaluate, summarize_cases
from mechedit.files import write_parquet
from mechedit.methods import METHODS, MethodConfig, SearchConfig, moment_matrices, recommended
from mechedit.models import Model
from mechedit.moments import SecondMoment
from mechedit.provenance import value_hash
from mechedit.statistics import bootstrap_means, harmonic_mean
from mechedit.sweep.windows import Window, check_windows
from mechedit.tables import read_table, where
from mechedit.targets import Targets, find_targets

SUCCESSES = ("ES", "PS", "NS")
MAGNITUDES = ("EM", "PM", "NM")
TABLE_COLUMNS = ("first", "last", "width", "measure", "mean", "low", "high", "n")
CASE_COLUMNS = ("first", "last", "case", "measure", "value")


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """What editing each window did, by request."""

    cases: pd.DataFrame
    """One row a window, request and measure: `first, last, case, measure, value` (percent, meaned over the
    request's prompts). Besides the measures of `evaluate`: `converged`, 100 where the search for z did, and
    `left`, how much of ‖z − h‖ the edit left unwritten."""
    before: Summary
    """The unedited model's measures on the same requests."""
    failed: Mapping[Window, str]
    """Windows that could not be edited, with the reason."""
    config: EvaluationConfig
    """How it was measured; its seed, resamples and confidence make the intervals."""
    provenance: Mapping[str, Any]
    """Model, requests, method and its settings."""

    @cached_property
    def windows(self) -> list[Window]:
        """The windows that were edited, by width and then by layer."""
        ends = self.cases[["first", "last"]].drop_duplicates().itertuples(index=False, name=None)
        return sorted((Window(int(first), int(last)) for first, last in ends), key=lambda w: (w.width, w.first))

    @property
    def score_measures(self) -> tuple[str, ...]:
        """The measures that the score joins: those of ES, PS and NS with data, else exact match."""
        return score_measures(self.cases["measure"])

    @property
    def score(self) -> str:
        """What windows are ranked by: S, or the harmonic mean of what there is of it."""
        return score_name(self.score_measures)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row a window and measure: `TABLE_COLUMNS`, in percent, with intervals as `summarize_cases` gives.

        Its attrs say what windows are ranked by, how the unedited model does, and how it was measured.
        """
        table = pd.DataFrame(
            [
                {"first": window.first, "last": window.last, "width": window.width, "measure": measure, **entry}
                for window in self.windows
                for measure, entry in summarize(self._rows(window), self._ids, self.config).items()
            ],
            columns=list(TABLE_COLUMNS),
        )
        table.attrs = {
            "score": self.score,
            "before": self.before,
            "refused": [[*window, reason] for window, reason in self.failed.items()],
            "config": dataclasses.asdict(self.config),
            "provenance": dict(self.provenance),
        }
        return table

    @cached_property
    def scores(self) -> Float[np.ndarray, " window"]:
        """The score of each window, in percent."""
        means = [
            np.nanmean(by_case(self._rows(window), self._ids, self.score_measures), axis=0) for window in self.windows
        ]
        return harmonic_mean(np.stack(means))

    @cached_property
    def draws(self) -> Float[np.ndarray, "resample window"]:
        """The score of each window on resamples of the requests, the same resample for all windows."""
        draw = partial(bootstrap_means, seed=self.config.seed, resamples=self.config.resamples)
        found = [draw(by_case(self._rows(window), self._ids, self.score_measures)) for window in self.windows]
        return np.stack([harmonic_mean(means) for means in found], axis=1)

    @cached_property
    def margins(self) -> Float[np.ndarray, " window"]:
        """Mean of the probability differences EM, PM and NM by window, in percent: it tells tied scores apart."""
        found = [name for name in MAGNITUDES if name in set(self.cases["measure"])]
        if not found:
            return np.zeros(len(self.windows))
        values = [by_case(self._rows(window), self._ids, found) for window in self.windows]
        return np.array([np.nanmean(one, axis=0).mean() for one in values])

    def save(self, folder: str | Path) -> None:
        """Write sweep_cases.parquet (by request) and sweep.parquet (by window), atomically."""
        folder = Path(folder)
        write_parquet(folder / "sweep_cases.parquet", self.cases)
        write_parquet(folder / "sweep.parquet", self.table)

    @staticmethod
    def load(folder: str | Path) -> Sweep:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or holds something else.
        """
        table, cases = (read_table(Path(folder) / name) for name in ("sweep.parquet", "sweep_cases.parquet"))
        try:
            return Sweep(
                cases=cases.loc[:, list(CASE_COLUMNS)],
                before=table.attrs["before"],
                failed={Window(first, last): reason for first, last, reason in table.attrs["refused"]},
                config=EvaluationConfig(**table.attrs["config"]),
                provenance=table.attrs["provenance"],
            )
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{str(folder)!r} does not hold a sweep ({error}); expected what `mechedit select --validate` "
                f"writes: sweep again"
            ) from error

    @cached_property
    def _ids(self) -> list[str]:
        return list(dict.fromkeys(self.cases["case"]))

    def _rows(self, window: Window) -> pd.DataFrame:
        return where(self.cases, first=window.first, last=window.last)


def sweep_windows(
    model: Model,
    requests: Sequence[EditRequest],
    moments: Mapping[int, SecondMoment | Tensor],
    windows: Sequence[tuple[int, int]],
    *,
    method: str = "memit",
    config: MethodConfig | None = None,
    evaluation: EvaluationConfig = QUICK,
    parts: str | Path | None = None,
    cache: str | Path | None = None,
) -> Sweep:
    """Edit each window of layers with the same requests, always from the unedited model, and measure the result.

    Hase et al. (2023) found that where tracing localizes a fact says little about which layer is best edited:
    this measures the latter. z depends on a window's last layer alone, so windows that end alike share it. The
    model is left as it was, bit for bit, also on an interrupt.

    Args:
        model: unedited.
        requests: edited all at once; they should be about subjects that were not traced (`held_out`).
        moments: for each layer of any window, E[k kᵀ].
        windows: (first, last), both included; see `windows_of`.
        method: one of `METHODS`.
        config: its settings; by default those that ship with the model.
        evaluation: how to measure; by default without free text.
        parts: a folder for finished windows, so that an interrupted sweep goes on where it stopped.
        cache: a folder for the targets, so that other sweeps and edits may share them; see `find_targets`.

    Raises:
        ValueError: `parts` with bare matrices as moments, whose origin no file name can tell.
        InputError: no windows, or one outside the model; an unknown method; moments that are absent or of
            another model; conflicting requests; no window that can be edited.
    """
    check_choice("the method", method, METHODS)
    wanted = check_windows(windows, model.n_layers)
    config = config or recommended(method, model)
    layers = sorted({layer for window in wanted for layer in window.layers}) if config.preserves_keys else []
    if parts is not None and not all(isinstance(moments.get(layer), SecondMoment) for layer in layers):
        raise ValueError("parts can only be kept with second moments that say where they come from")
    # All that can be refused is refused before the long search.
    check_requests(requests)
    moment_matrices(moments, layers, model)
    sweeping = _Sweeping(
        model=model,
        requests=requests,
        moments=moments,
        method=method,
        config=config,
        evaluation=evaluation,
        cache=cache,
    )
    before = kept(parts, sweeping.key(None), partial(_measured, model, requests, evaluation))
    frames, failed = [], {}
    for window in tqdm(wanted, desc="sweep", unit="window"):
        frame = kept(parts, sweeping.key(window), partial(sweeping.measure, window))
        if "refused" in frame.attrs:
            failed[window] = frame.attrs["refused"]
        else:
            frames.append(frame.assign(first=window.first, last=window.last))
    if not frames:
        raise InputError(f"none of the {len(wanted)} windows can be edited; {wanted[0]}: {failed[wanted[0]]}")
    return Sweep(
        cases=pd.concat(frames, ignore_index=True).loc[:, list(CASE_COLUMNS)],
        before=summarize(before, [request.id for request in requests], evaluation),
        failed=failed,
        config=evaluation,
        provenance=sweeping.provenance,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sweeping:
    """What stays the same from window to window."""

    model: Model
    requests: Sequence[EditRequest]
    moments: Mapping[int, SecondMoment | Tensor]
    method: str
    config: MethodConfig
    evaluation: EvaluationConfig
    cache: str | Path | None

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Model, requests, method and settings."""
        return {
            "model": _identity(self.model.provenance()),
            "requests": value_hash(list(self.requests)),
            "method": self.method,
            "settings": dataclasses.asdict(self.config),
        }

    def key(self, window: Window | None) -> dict[str, Any]:
        """All that determines what is measured in a window; None is the unedited model."""
        layers = [] if window is None or not self.config.preserves_keys else window.layers
        origins = {layer: _identity(getattr(self.moments[layer], "provenance", {})) for layer in layers}
        evaluation = dataclasses.asdict(self.evaluation)
        return {**self.provenance, "evaluation": evaluation, "window": window, "moments": origins}

    def measure(self, window: Window) -> pd.DataFrame:
        """Edit one window, measure, and take the edit back: `case, measure, value`."""
        targets = None
        if isinstance(self.config, SearchConfig) and self.config.shares_targets:
            targets = self._targets(self.config.target_layer(window.layers))
        edit = METHODS[self.method]
        try:
            made = edit(self.model, self.requests, window.layers, self.moments, config=self.config, targets=targets)
        except InputError as error:  # a layer whose keys are singular must not end the sweep of the others
            return _refusal(str(error))
        with edited(self.model, made):
            measured = _measured(self.model, self.requests, self.evaluation)
        return pd.concat([measured, _written(made, self.requests)], ignore_index=True)

    @cached_property
    def _targets(self) -> Callable[[int], Targets]:
        """Finds the targets at a layer; the last ones stay, since windows come ordered by their last layer."""
        config = self.config
        assert isinstance(config, SearchConfig), "asked for by methods that share targets alone"
        return lru_cache(maxsize=1)(
            lambda layer: find_targets(self.model, self.requests, layer, config=config.targets, cache=self.cache)
        )


def score_measures(measures: Iterable[str]) -> tuple[str, ...]:
    """The measures that a window's score joins: those of ES, PS and NS with data, else exact match."""
    measured = set(measures)
    return tuple(name for name in SUCCESSES if name in measured) or ("exact_match",)


def score_name(joined: Sequence[str]) -> str:
    """S when its three measures have data (MEMIT Appendix C.2), else the measure or harmonic mean in its place."""
    if tuple(joined) == SUCCESSES:
        return "S"
    return joined[0] if len(joined) == 1 else f"harmonic mean of {' and '.join(joined)}"


def by_case(rows: pd.DataFrame, cases: Sequence[str], measures: Sequence[str]) -> Float[np.ndarray, "case measure"]:
    """Measures by request, NaN where a request lacks one."""
    wide = rows.pivot(index="case", columns="measure", values="value")
    return wide.reindex(index=list(cases), columns=list(measures)).to_numpy(dtype=float)


def summarize(rows: pd.DataFrame, cases: Sequence[str], config: EvaluationConfig) -> Summary:
    """Mean, interval over requests and number of requests, of each measure and of the score (`summarize_cases`)."""
    measures = list(dict.fromkeys(rows["measure"]))
    joined = score_measures(measures)
    values = by_case(rows, cases, measures)
    score = score_name(joined) if len(joined) > 1 else None
    return summarize_cases(values, measures, config, score=score, score_measures=joined, in_percent=True)


def _measured(model: Model, requests: Sequence[EditRequest], config: EvaluationConfig) -> pd.DataFrame:
    """Every measure of the model as it is now, by request: `case, measure, value` in percent."""
    table = evaluate(model, requests, config).table
    table = table.assign(value=table["value"] * PERCENT)
    return table.groupby(["case", "measure"], sort=False, as_index=False).agg({"value": "mean"})


def _written(edit: Edit, requests: Sequence[EditRequest]) -> pd.DataFrame:
    """How well each request was written, from the edit's manifest, in percent."""
    missed = set(edit.manifest.get("unconverged", ()))
    rows = [(request.id, "converged", 100.0 * (request.id not in missed)) for request in requests]
    shares = zip(requests, edit.manifest.get("left", ()), strict=False)
    rows += [(request.id, "left", 100.0 * left) for request, left in shares]
    return pd.DataFrame(rows, columns=["case", "measure", "value"])


def _refusal(reason: str) -> pd.DataFrame:
    """What is kept of a window that cannot be edited: no rows, and why."""
    frame = pd.DataFrame(
        {"case": pd.Series(dtype=str), "measure": pd.Series(dtype=str), "value": pd.Series(dtype=float)}
    )
    frame.attrs["refused"] = reason
    return frame


def _identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What of a provenance decides the result: not the backend, nor what the model is called."""
    return {name: value for name, value in provenance.items() if name not in ("backend", "model")}
