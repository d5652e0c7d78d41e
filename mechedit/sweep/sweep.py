"""Edit every window of layers with the same requests, each time from the unedited model, and score the results."""

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
from typing_extensions import TypedDict

from mechedit.cache import PARQUET, Cache
from mechedit.data import EditRequest, check_requests, records_of
from mechedit.edit import Edit, edited
from mechedit.errors import DiskError, InputError, check_choice
from mechedit.evaluation import PERCENT, QUICK, EvaluationConfig, Summary, evaluate, summarize_cases
from mechedit.files import write_parquet
from mechedit.methods import METHODS, MethodConfig, SearchConfig, by_layer, moment_matrices, recommended
from mechedit.models import Model, exclusive
from mechedit.moments import SecondMoment
from mechedit.provenance import ModelIdentity, determining, numbered, value_hash
from mechedit.records import Whole, check_record, read_record
from mechedit.shards import run_dealt
from mechedit.statistics import bootstrap_means, harmonic_mean
from mechedit.sweep.windows import Window, check_windows
from mechedit.tables import read_table, where
from mechedit.targets import Targets, find_targets

SUCCESSES = ("ES", "PS", "NS")
MAGNITUDES = ("EM", "PM", "NM")
TABLE_COLUMNS = ("first", "last", "width", "measure", "mean", "low", "high", "n")
CASE_COLUMNS = ("first", "last", "case", "measure", "value")


class SweepRecord(TypedDict):
    """The attributes of sweep.parquet."""

    before: dict[str, dict[str, float]]
    refused: list[tuple[Whole, Whole, str]]
    config: dict[str, Any]
    provenance: dict[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sweep:
    """Scores of the edit of each window, by request."""

    cases: pd.DataFrame
    """One row per window, request and measure: `first, last, case, measure, value` (percent, averaged over the
    request's prompts). Besides the measures of `evaluate`: `converged`, 100 where the new object is the
    likeliest answer with z written, and `left`, the part of ‖z − h‖ that the edit left unwritten."""
    before: Summary
    """The unedited model's measures on the same requests."""
    failed: Mapping[Window, str]
    """Windows that could not be edited, with the reason."""
    config: EvaluationConfig
    """Settings of the evaluation; its seed, resamples and confidence make the intervals."""
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
        """Name of the score that windows are ranked by: S, or the harmonic mean of those of its measures with data."""
        return score_name(self.score_measures)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per window and measure: `TABLE_COLUMNS`, in percent, with intervals as `summarize_cases` gives.

        Its attrs hold the name of the score, the unedited model's summary, the failed windows and the settings.
        """
        table = pd.DataFrame(
            [
                {"first": window.first, "last": window.last, "width": window.width, "measure": measure, **entry}
                for window in self.windows
                for measure, entry in window_summary(self._rows(window), self._ids, self.config).items()
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
        return harmonic_mean(np.stack(means)) if means else np.zeros(0)

    @cached_property
    def draws(self) -> Float[np.ndarray, "resample window"]:
        """The score of each window on resamples of the requests, the same resample for all windows."""
        draw = partial(bootstrap_means, seed=self.config.seed, resamples=self.config.resamples)
        means = [draw(by_case(self._rows(window), self._ids, self.score_measures)) for window in self.windows]
        if not means:
            return np.zeros((self.config.resamples, 0))
        return np.stack([harmonic_mean(window_means) for window_means in means], axis=1)

    @cached_property
    def margins(self) -> Float[np.ndarray, " window"]:
        """Mean of the probability differences EM, PM and NM by window, in percent; it breaks ties of the score."""
        measured = [name for name in MAGNITUDES if name in set(self.cases["measure"])]
        if not measured:
            return np.zeros(len(self.windows))
        values = [by_case(self._rows(window), self._ids, measured) for window in self.windows]
        return np.array([np.nanmean(window_values, axis=0).mean() for window_values in values])

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
        what, remedy = f"the sweep in {str(folder)!r}", "sweep again (mechedit select --validate)"
        attrs = read_table(Path(folder) / "sweep.parquet", TABLE_COLUMNS).attrs
        cases = read_table(Path(folder) / "sweep_cases.parquet", CASE_COLUMNS).loc[:, list(CASE_COLUMNS)]
        check_record(attrs, SweepRecord, what, remedy)
        places = list(CASE_COLUMNS[:-1])
        if cases.empty and not attrs["refused"]:
            raise InputError(f"{what} holds no windows, expected some; {remedy}")
        if cases[places].isna().to_numpy().any() or cases.duplicated(places).any():
            raise InputError(f"{what} has a row twice, or one without a case or measure, expected each once; {remedy}")
        return Sweep(
            cases=cases,
            before=attrs["before"],
            failed={Window(first, last): reason for first, last, reason in attrs["refused"]},
            config=read_record(attrs["config"], EvaluationConfig, f"the settings of {what}", remedy),
            provenance=attrs["provenance"],
        )

    @cached_property
    def _ids(self) -> list[str]:
        return list(dict.fromkeys(self.cases["case"]))

    def _rows(self, window: Window) -> pd.DataFrame:
        return where(self.cases, first=window.first, last=window.last)


@exclusive
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

    Hase et al. (2023) found that where tracing localizes a fact says little about which layer is best edited; a sweep
    measures which is. z depends on a window's last layer alone, so windows with the same last layer share it. The
    model is left as it was, bit for bit, also on an interrupt.

    Args:
        model: unedited.
        requests: edited all at once; their subjects should not be among those traced (`held_out`).
        moments: E[k kᵀ] of each layer of any window.
        windows: (first, last), both included; see `windows_of`.
        method: one of `METHODS`.
        config: settings of the method; by default those that ship with the model.
        evaluation: settings of the evaluation; by default without free text.
        parts: folder for finished windows, so that an interrupted sweep goes on where it stopped.
        cache: folder for the targets, so that other sweeps and edits can share them; see `find_targets`.

    Raises:
        InputError: no windows, or one outside the model; an unknown method; moments that are absent or of
            another model; conflicting requests; no window that can be edited; `parts` with bare matrices as moments,
            which do not say where they come from.
    """
    check_choice("the method", method, METHODS)
    checked = check_windows(windows, model.n_layers)
    config = config or recommended(method, model)
    layers = sorted({layer for window in checked for layer in window.layers}) if config.preserves_keys else []
    moments = by_layer("the second moments", moments)
    if parts is not None and not all(isinstance(moments.get(layer), SecondMoment) for layer in layers):
        raise InputError(
            "parts can only be kept with second moments that say where they come from, expected a SecondMoment for "
            "each layer: collect them with collect_moments, or leave parts out"
        )
    # Bad input is refused before the long search.
    requests = records_of(requests, EditRequest)
    check_requests(requests)
    moment_matrices(moments, layers, model)
    job = _SweepJob(
        model=model,
        requests=requests,
        moments=moments,
        method=method,
        config=config,
        evaluation=evaluation,
        cache=cache,
    )
    finished = Cache.at(parts)

    def measure_window(window: Window | None) -> pd.DataFrame:
        frame = finished.read(job.key(window), PARQUET)
        if frame is None:
            frame = _case_scores(model, requests, evaluation) if window is None else job.measure(window)
            if "refused" not in frame.attrs:  # what stands in the way, such as damaged moments, may be mended
                finished.write(job.key(window), frame, PARQUET)
        return frame

    def measure(piece: Sequence[Window | None]) -> list[pd.DataFrame]:
        return list(map(measure_window, piece))

    # Windows that share their targets are one piece of work; the unedited model is another one.
    pieces: dict[int | None, list[Window | None]] = {None: [None]}
    for window in checked:
        pieces.setdefault(job.target_layer(window), []).append(window)
    measured = run_dealt(
        list(pieces.values()),
        measure,
        lambda piece: len(piece) + (piece[0] is not None),
        "sweep",
        size=lambda piece: sum(window is not None for window in piece),
        unit="window",
    )
    by_window = {
        window: frame
        for piece, piece_frames in zip(pieces.values(), measured, strict=True)
        for window, frame in zip(piece, piece_frames, strict=True)
    }
    before = by_window[None]
    frames, failed = [], {}
    for window in checked:
        frame = by_window[window]
        if "refused" in frame.attrs:
            failed[window] = frame.attrs["refused"]
        else:
            frames.append(frame.assign(first=window.first, last=window.last))
    if not frames:
        raise InputError(f"none of the {len(checked)} windows can be edited; {checked[0]}: {failed[checked[0]]}")
    return Sweep(
        cases=pd.concat(frames, ignore_index=True).loc[:, list(CASE_COLUMNS)],
        before=window_summary(before, [request.id for request in requests], evaluation),
        failed=failed,
        config=evaluation,
        provenance=job.provenance,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _SweepJob:
    """The parts of a sweep that are the same for every window."""

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
            "model": self.model.provenance(),
            "requests": value_hash(list(self.requests)),
            "method": self.method,
            "settings": dataclasses.asdict(self.config),
        }

    def key(self, window: Window | None) -> dict[str, Any]:
        """All that determines what is measured in a window; None is the unedited model, the same for all settings."""
        layers = [] if window is None or not self.config.preserves_keys else window.layers
        unedited = {"method": None, "settings": None} if window is None else {}
        key = {
            **self.provenance,
            **unedited,
            "model": ModelIdentity.of(self.provenance["model"]).record,
            "evaluation": self.evaluation.plain(),
            "window": window,
            "moments": {layer: determining(getattr(self.moments[layer], "provenance", {})) for layer in layers},
        }
        return numbered("sweep", key)

    def target_layer(self, window: Window) -> int:
        """The layer of a window's targets; without any, its last one."""
        config = self.config
        return config.target_layer(window.layers) if isinstance(config, SearchConfig) else window.layers[-1]

    def measure(self, window: Window) -> pd.DataFrame:
        """Edit one window, measure, and take the edit back: `case, measure, value`."""
        targets = None
        if isinstance(self.config, SearchConfig) and self.config.shares_targets:
            targets = self._find_targets(self.config.target_layer(window.layers))
        method = METHODS[self.method]
        try:
            edit = method(self.model, self.requests, window.layers, self.moments, config=self.config, targets=targets)
        except DiskError:
            raise
        except InputError as error:  # a layer whose keys are singular must not end the sweep of the others
            return _failure(str(error))
        with edited(self.model, edit):
            scores = _case_scores(self.model, self.requests, self.evaluation)
        return pd.concat([scores, _written(edit, self.requests)], ignore_index=True)

    @cached_property
    def _find_targets(self) -> Callable[[int], Targets]:
        """A function that finds the targets at a layer; it caches the latest, as windows are ordered by last layer."""
        config = self.config
        assert isinstance(config, SearchConfig), "only methods that share targets need them"
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


def window_summary(rows: pd.DataFrame, cases: Sequence[str], config: EvaluationConfig) -> Summary:
    """Mean, interval over requests and number of requests, of each measure and of the score (`summarize_cases`)."""
    measures = list(dict.fromkeys(rows["measure"]))
    joined = score_measures(measures)
    values = by_case(rows, cases, measures)
    score = score_name(joined) if len(joined) > 1 else None
    return summarize_cases(values, measures, config, score=score, score_measures=joined, in_percent=True)


def _case_scores(model: Model, requests: Sequence[EditRequest], config: EvaluationConfig) -> pd.DataFrame:
    """Every measure of the model as it is now, by request: `case, measure, value` in percent."""
    table = evaluate(model, requests, config).table
    table = table.assign(value=table["value"] * PERCENT)
    return table.groupby(["case", "measure"], sort=False, as_index=False).agg({"value": "mean"})


def _written(edit: Edit, requests: Sequence[EditRequest]) -> pd.DataFrame:
    """Whether the object is the likeliest answer at its z, and how much was left unwritten, in percent by request."""
    unconverged = set(edit.manifest.get("unconverged", ()))
    rows = [(request.id, "converged", 100.0 * (request.id not in unconverged)) for request in requests]
    residuals = zip(requests, edit.manifest.get("left", ()), strict=False)
    rows += [(request.id, "left", 100.0 * residual) for request, residual in residuals]
    return pd.DataFrame(rows, columns=["case", "measure", "value"])


def _failure(reason: str) -> pd.DataFrame:
    """The table of a window that cannot be edited: no rows, and the reason in its attrs."""
    frame = pd.DataFrame(
        {"case": pd.Series(dtype=str), "measure": pd.Series(dtype=str), "value": pd.Series(dtype=float)}
    )
    frame.attrs["refused"] = reason
    return frame
