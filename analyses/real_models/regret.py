"""What a choice of layers costs: the score of its edits against that of the best window, on requests that chose none.

    python -m analyses.real_models.regret MODEL --run DIR --requests FILE --moments DIR --out DIR

MODEL is tiny, smollm2, gemma3 or a folder; `--run` a folder of `mechedit run` or `select` on it, whose effects every
rule selects from, with its sweep where there is one.

1. Screening: windows of one width, ending at every second layer, and then all widths up to six at the best ends, are
   edited with a few requests.
2. The best three, the choice, the window of every rule, and ranges that others use are edited with `--facts` requests.
3. Regret: the window that is best on one half of these, minus the rule's, on the other half; both ways, and averaged.
4. What a choice by few costs: of the same windows, the one that is best on n requests is held against the one that is
   best on half of the others, by its score on the other half; the mean over draws.

Requests are about subjects that the run neither traced nor edited. Results are kept in `--out`: a call goes on where
the last one stopped, and prints one row a rule.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

import mechedit as me
from analyses.common.command import run_script
from analyses.common.frames import records
from analyses.common.printing import markdown_table
from analyses.real_models.make import REAL_MODELS, make
from mechedit.data import load_requests
from mechedit.errors import InputError
from mechedit.files import write_json
from mechedit.methods import METHODS
from mechedit.selection import SelectConfig, moving_width, subject_effects
from mechedit.statistics import harmonic_mean
from mechedit.sweep import Sweep, Window, choose_window, sweep_windows, window_agreement
from mechedit.sweep.sweep import by_case
from mechedit.tables import read_table, where

WIDEST = 6
"""Layers of the widest window that is screened."""
BEST = 3
"""Windows of the screening that are edited with all requests."""
CONSTANTS = {"layers 1–5": (1, 5), "layers 3–8 (GPT-J, MEMIT)": (3, 8), "layers 4–8 (Llama, others' presets)": (4, 8)}
"""Ranges that are copied from other models."""
SHARES = {
    "12–28 % of the depth (GPT-J, MEMIT)": (3 / 28, 8 / 28),
    "27–35 % of the depth (GPT-2 XL, MEMIT)": (13 / 48, 17 / 48),
}
"""The same, as parts of the depth: layer / number of layers."""
RESAMPLES = 2000
COUNTS = (5, 10, 20, 40)
"""Requests by which windows are chosen, to see what few of them cost."""


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A model with the requests that judge its windows, and the folder of the results."""

    model: me.Model
    requests: list[me.EditRequest]
    moments: Mapping[int, me.SecondMoment]
    config: me.MemitConfig
    out: Path

    def sweep(self, windows: Sequence[tuple[int, int]], count: int) -> Sweep:
        """Windows edited with the first requests; what was finished before is read."""
        return sweep_windows(
            self.model, self.requests[:count], self.moments, windows, config=self.config,
            parts=self.out / "parts", cache=self.out / "targets",
        )  # fmt: skip

    def screened(self, count: int) -> list[Window]:
        """The best windows: of one width over the depth, then of all widths at the best ends."""
        n_layers = self.model.n_layers
        width = moving_width(n_layers, SelectConfig())
        ends = range(width - 1, n_layers - 1, 2)
        first = self.sweep([(end - width + 1, end) for end in ends], count)
        best_ends = [window.last for window in ranked(first)[:BEST]]
        widths = range(1, min(WIDEST, n_layers) + 1)
        second = self.sweep(
            [(end - width + 1, end) for end in best_ends for width in widths if width <= end + 1], count
        )
        return ranked(second)[:BEST]


def ranked(sweep: Sweep) -> list[Window]:
    """The windows, the best score first; ties go to the larger probability differences."""
    return [sweep.windows[index] for index in np.lexsort((-sweep.margins, -sweep.scores))]


def windows_by_rule(run: Path, n_layers: int) -> dict[str, Any]:
    """The layers of each rule and of each range that others use, and what the run's sweep chooses.

    Returns:
        By name: layers, stability and agreement where resamples of facts or requests say something of them.
    """
    effects = read_table(run / "effects.parquet", role="subject_last")
    selection = me.select_layers(effects)
    rules: dict[str, Any] = {
        f"trace: {name}": {"layers": list(rule.layers), "stability": rule.stability, "agreement": rule.agreement}
        for name, rule in selection.rules.items()
    }
    if (run / "sweep.parquet").is_file():
        gap = subject_effects(read_table(run / "effects.parquet"), SelectConfig()).gap
        swept = Sweep.load(run / "finals" if (run / "finals" / "sweep.parquet").is_file() else run)
        for name, by in {"short sweep and trace (default)": "both", "short sweep": "sweep"}.items():
            if by == "both" and not selection.layers:
                continue
            window, stability = choose_window(swept, gap, selection.layers, by)
            agreement = window_agreement(swept, window)
            rules[name] = {"layers": window.layers, "stability": stability, "agreement": agreement}
    shares = {name: (round(low * n_layers), round(high * n_layers)) for name, (low, high) in SHARES.items()}
    for name, (first, last) in {**CONSTANTS, **shares}.items():
        if last < n_layers:
            rules[name] = {"layers": list(range(first, last + 1)), "stability": None, "agreement": None}
    return rules


def judging_requests(path: str, run: Path, count: int, seed: int) -> list[me.EditRequest]:
    """A seeded sample of requests with true objects, about subjects that the run neither traced nor edited."""
    requests = load_requests(path, conflicts="first")
    facts = read_table(run / "facts.parquet")
    used = set(where(facts, traced=True)["subject"])
    ids: set[str] = set()
    for folder in (run, run / "finals"):
        if (folder / "sweep_cases.parquet").is_file():
            ids |= set(map(str, read_table(folder / "sweep_cases.parquet")["case"]))
    if (run / "edit.safetensors").is_file():
        ids |= set(me.Edit.load(run / "edit.safetensors").manifest["requests"])
    used |= {request.subject for request in requests if request.id in ids}
    others = [request for request in requests if request.target_true and request.subject not in used]
    others = list({request.subject: request for request in others}.values())
    if len(others) < count:
        raise InputError(
            f"there are {len(others)} requests about other subjects than the run's, expected {count}; lower --facts"
        )
    return random.Random(seed).sample(others, count)


def regret(sweep: Sweep, window: Window, seed: int = 0) -> dict[str, float]:
    """Points of the score that a window loses to the one that is best on the other half of the requests.

    Args:
        sweep: scores of all windows, with the same requests.
        window: of them.
        seed: of the halves and of the resamples.

    Returns:
        `mean` over both halves, and the ends of its 95 % interval over resamples of the requests within each half.
    """
    values = values_of(sweep)
    random_numbers = np.random.default_rng(seed)
    halves = np.array_split(random_numbers.permutation(values.shape[1]), 2)
    mine = sweep.windows.index(window)
    means, draws = [], []
    for choosing, judging in (halves, halves[::-1]):
        best = int(score(values[:, choosing]).argmax())
        pair = values[[best, mine]]
        measured = score(pair[:, judging])
        means.append(measured[0] - measured[1])
        resampled = random_numbers.choice(judging, (RESAMPLES, len(judging)))
        best_scores, my_scores = (score(of_window[resampled]) for of_window in pair)
        draws.append(best_scores - my_scores)
    low, high = np.quantile(np.mean(draws, axis=0), (0.025, 0.975))
    return {"mean": float(np.mean(means)), "low": float(low), "high": float(high)}


def values_of(sweep: Sweep) -> Float[np.ndarray, "window case measure"]:
    """The measures of the score of every window and request."""
    cases = list(dict.fromkeys(sweep.cases["case"]))
    return np.stack([
        by_case(where(sweep.cases, first=w.first, last=w.last), cases, sweep.score_measures) for w in sweep.windows
    ])  # fmt: skip


def regret_by_count(values: Float[np.ndarray, "window case measure"], seed: int = 0) -> dict[int, float]:
    """Mean points that a choice by n requests loses to one by half of the others, on the rest; by n.

    Args:
        values: of all windows and requests.
        seed: of the draws.
    """
    random_numbers, costs = np.random.default_rng(seed), {}
    for count in COUNTS:
        if values.shape[1] - count < count:
            break
        losses = []
        for _ in range(RESAMPLES):
            few, half, judging = np.split(
                random_numbers.permutation(values.shape[1]), [count, (values.shape[1] + count) // 2]
            )
            mine, best = (int(score(values[:, chosen]).argmax()) for chosen in (few, half))
            judged = score(values[[best, mine]][:, judging])
            losses.append(judged[0] - judged[1])
        costs[count] = float(np.mean(losses))
    return costs


def score(values: Float[np.ndarray, "row case measure"]) -> Float[np.ndarray, " row"]:
    """The harmonic mean of the measures' means, of each window or resample."""
    return harmonic_mean(np.nanmean(values, axis=1))


def table(
    judge: Judge, rules: Mapping[str, Any], best: Sequence[Window], count: int
) -> tuple[pd.DataFrame, dict[int, float]]:
    """One row a rule: layers, score, regret, and how sure the rule is; and what choices by few requests cost."""
    windows = {name: Window(rule["layers"][0], rule["layers"][-1]) for name, rule in rules.items() if rule["layers"]}
    swept = judge.sweep(sorted({*windows.values(), *best}), count)
    window_of = {**windows, **{f"best of the screening, {rank}": w for rank, w in enumerate(best, 1)}}
    summary: Any = swept.table.set_index(["first", "last", "measure"])["mean"]
    rows = []
    for name, window in window_of.items():
        if window in swept.failed:
            continue
        cost = regret(swept, window)
        measured = {m: float(summary[window.first, window.last, m]) for m in (swept.score, "ES", "PS", "NS")}
        rule = rules.get(name, {"stability": None, "agreement": None})
        rows.append({
            "rule": name, "layers": f"{window.first}–{window.last}", **measured,
            "exact": float(summary[window.first, window.last, "exact_match"]),
            "regret": cost["mean"], "low": cost["low"], "high": cost["high"],
            "stability": rule["stability"], "agreement": rule["agreement"],
        })  # fmt: skip
    rows += [{"rule": name, "layers": "none"} for name, rule in rules.items() if not rule["layers"]]
    return pd.DataFrame(rows), regret_by_count(values_of(swept))


def write_rows(path: Path, model: str, frame: pd.DataFrame, by_count: Mapping[int, float]) -> None:
    """Write the table as JSON, with null where a rule has no value."""
    rows = records(frame.astype(object).where(frame.notna(), None))
    write_json(path, {"model": model, "rows": rows, "by_count": dict(by_count)})


def print_table(frame: pd.DataFrame) -> None:
    """The table as markdown."""
    print(markdown_table(list(frame.columns), [[in_words(cell) for cell in row.values()] for row in records(frame)]))


def in_words(cell: Any) -> str:
    """A cell; empty where there is nothing."""
    if not isinstance(cell, float):
        return "" if cell is None else str(cell)
    return "" if np.isnan(cell) else f"{cell:.2f}"


def parser() -> argparse.ArgumentParser:
    """The options."""
    described = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    described.add_argument("model", help="tiny, smollm2, gemma3 or a folder")
    described.add_argument("--run", type=Path, required=True, help="folder of mechedit run or select")
    described.add_argument("--requests", default="counterfact", help="counterfact, tiny, or a file of requests")
    described.add_argument("--moments", type=Path, help="folder of the second moments; by default that of the run")
    described.add_argument("--out", type=Path, default=Path("regret"), help="folder for the results")
    described.add_argument("--screen", type=int, default=20, help="requests of the screening")
    described.add_argument("--facts", type=int, default=100, help="requests that judge")
    described.add_argument("--seed", type=int, default=1)
    return described


def main(arguments: Sequence[str] | None = None) -> int:
    """Screen, judge, print."""
    options = parser().parse_args(arguments)
    model = me.load_model(make(options.model) if options.model in REAL_MODELS else options.model, device="cpu")
    requests = judging_requests(options.requests, options.run, options.facts, options.seed)
    moments = me.load_moments(options.moments or options.run, range(model.n_layers), model)
    config: Any = METHODS["memit"].recommendation(model, tuned=False).config
    judge = Judge(model=model, requests=requests, moments=moments, config=config, out=options.out)
    rules = windows_by_rule(options.run, model.n_layers)
    best = judge.screened(min(options.screen, len(requests)))
    print("best of the screening:", ", ".join(map(str, best)), flush=True)
    frame, by_count = table(judge, rules, best, len(requests))
    write_rows(options.out / "regret.json", options.model, frame, by_count)
    print_table(frame)
    costs = ", ".join(f"{count}: {cost:.2f}" for count, cost in by_count.items())
    print(f"points lost where so many requests choose: {costs or 'too few requests to tell'}")
    return 0


if __name__ == "__main__":
    run_script(main)
