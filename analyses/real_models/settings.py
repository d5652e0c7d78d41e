"""Which learning rate finds z, and which λ writes it: MEMIT's two settings, measured in relative units and in absolute.

    python -m analyses.real_models.settings rates MODEL --requests FILE --layers 5 --rates 0.05 0.1 --out DIR
    python -m analyses.real_models.settings weights MODEL --requests FILE --layers 1-5 --moments DIR --out DIR
    python -m analyses.real_models.settings table --out DIR

MODEL is tiny, smollm2, gemma3 or a folder. `rates` searches for z at the last of the layers with each learning rate, in
units of the typical |hᵢ|, and with the published one, and counts the objects that become the likeliest answer.
`weights` searches once and writes what it found with each λ, for each number of facts; with one, as many single edits
as `--singles` are scored together. `table` holds rules for λ against each other: c; c · facts; c · d_mlp; c · the
facts' median kᵀM⁻¹k. All results are kept in DIR, so that what was interrupted goes on; `table` reads what is there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

import mechedit as me
from analyses.common.command import run_script
from analyses.real_models.make import REAL_MODELS, make
from mechedit.cache import Cache, Codec
from mechedit.cli.parsing import parse_layers
from mechedit.data import load_requests
from mechedit.edit import edited
from mechedit.errors import InputError
from mechedit.evaluation.config import QUICK
from mechedit.files import read_json, write_json
from mechedit.methods.rules import Moments, Ridge, key_strength, moment_factor
from mechedit.methods.settings import SpreadConfig
from mechedit.methods.spread import spread
from mechedit.provenance import ModelIdentity
from mechedit.solve import Update
from mechedit.statistics import harmonic_mean
from mechedit.tables import where

JSON: Codec[dict[str, Any]] = Codec(read=read_json, write=write_json, suffix=".json")
MEASURES = ("ES", "PS", "NS")
SCORES = ("S", *MEASURES, "exact_match")
RULES: dict[str, Callable[[pd.DataFrame], Any]] = {
    "c": lambda rows: 1.0,
    "c · facts": lambda rows: rows["facts"],
    "c · d_mlp": lambda rows: rows["d_mlp"],
    "c · median kᵀM⁻¹k": lambda rows: 1.0,
}
"""Rules for λ, and what each multiplies its constant by; the last is measured in its own unit."""
RELATIVE = "c · median kᵀM⁻¹k"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A model with the requests to be written, and the folder of the results."""

    model: me.Model
    requests: list[me.EditRequest]
    layers: list[int]
    config: me.MemitConfig
    out: Path

    @property
    def key(self) -> dict[str, Any]:
        """What determines the results, besides the requests."""
        identity = ModelIdentity.of(self.model.provenance()).record
        return {**identity, "layers": self.layers, "config": dataclasses.asdict(self.config.targets)}

    def targets(self, requests: Sequence[me.EditRequest], layer: int, config: me.MemitConfig) -> me.Targets:
        """Z of some requests; a search that was finished before is not repeated."""
        return me.find_targets(self.model, requests, layer, config=config.targets, cache=self.out / "targets")


@dataclass(frozen=True, kw_only=True)
class MeasuringRidge:
    """`Ridge`, with a note of each layer's median kᵀM⁻¹k."""

    ridge: Ridge
    strengths: dict[int, float] = field(default_factory=dict)

    def update(self, layer: int, keys: Float[Tensor, "d_mlp fact"], residuals: Float[Tensor, "d_model fact"]) -> Update:
        """As `Ridge.update`."""
        self.strengths[layer] = key_strength(keys, moment_factor(self.ridge.moments[layer], keys.device))
        return self.ridge.update(layer, keys, residuals)


def setting_of(options: argparse.Namespace) -> Setting:
    """The model and a seeded sample of the requests, in random order."""
    model = me.load_model(make(options.model) if options.model in REAL_MODELS else options.model, device="cpu")
    requests = [request for request in load_requests(options.requests, conflicts="first") if request.target_true]
    # The first of a larger sample are the smaller one, so that searches are shared.
    requests = random.Random(options.seed).sample(requests, len(requests))[: options.count]
    config = dataclasses.replace(me.memit.recommended(model), batch_size=options.batch_size, lr=None)
    layers = parse_layers(options.layers)
    return Setting(model=model, requests=requests, layers=layers, config=config, out=options.out)


def rates(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How the searches end, per learning rate; None stands for the published one."""
    setting = setting_of(options)
    layer = setting.layers[-1]
    for rate in options.rates:
        changes = {"lr": setting.config.published_lr} if rate is None else {"relative_lr": rate}
        targets = setting.targets(setting.requests, layer, dataclasses.replace(setting.config, **changes))
        summary = targets.summary
        yield {
            "model": options.model,
            "layer": layer,
            "facts": len(summary),
            "learning rate": f"lr {setting.config.published_lr:g}" if rate is None else f"{rate:g}",
            "converged": 100.0 * summary["converged"].mean(),
            "P": summary["probability"].median(),
            "P, tenth lowest": summary["probability"].quantile(0.1),
            "updates": summary["updates"].mean(),
            "norm ratio": summary["norm_ratio"].median(),
            "loss": summary["loss"].mean(),
            **coordinates(targets.initial),
        }


def coordinates(states: Float[Tensor, "fact d_model"]) -> dict[str, float]:
    """What the unit of the learning rate is in units of ‖h‖/√d_model, and the largest hᵢ² in % of ‖h‖²; medians."""
    squares = states.square()
    typical = squares.median(1).values.sqrt() / 0.6745
    return {
        "typical": float((typical / squares.mean(1).sqrt()).median()),
        "largest": 100.0 * float((squares.amax(1) / squares.sum(1)).median()),
    }


def weights(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The scores, per number of facts and λ."""
    setting = setting_of(options)
    moments = load_or_collect(setting.model, setting.layers, options)
    setting = dataclasses.replace(
        setting, config=dataclasses.replace(setting.config, relative_lr=options.rate or setting.config.relative_lr)
    )
    setting.targets(setting.requests, setting.config.target_layer(setting.layers), setting.config)
    cache = Cache.at(options.out / "scores")
    weighted = [(True, value) for value in options.relative] + [(False, value) for value in options.absolute]
    for count in options.facts:
        for relative, value in [*weighted, (False, None)]:
            # Single edits are scored together: what one request says of a setting is 0 or 1.
            alone = count == 1
            requests = setting.requests[: options.singles if alone else count]
            if len(requests) < count:
                raise InputError(f"there are {len(requests)} requests, expected {count}; raise --count")
            key = {**setting.key, "facts": count, "relative": relative, "value": value, "seed": options.seed,
                   "requests": [request.plain() for request in requests]}  # fmt: skip
            # Without a weight, the model is not edited.
            ridge = None if value is None else Ridge(moments=moments, weight=value, relative=relative)
            batches = [[request] for request in requests] if alone else [requests]
            row = cache.get(key, lambda ridge=ridge, batches=batches: scored(setting, ridge, batches), JSON)
            yield {
                "model": options.model,
                "window": f"{setting.layers[0]}–{setting.layers[-1]}",
                "facts": count,
                "relative": relative,
                "value": value,
                "d_mlp": setting.model.d_key,
                **row,
            }


def load_or_collect(model: me.Model, layers: Sequence[int], options: argparse.Namespace) -> Moments:
    """The second moments in a folder, collected first over `--texts` where those are given."""
    if options.texts is None:
        return me.load_moments(options.moments, layers, model)
    texts = options.texts if not options.texts.endswith(".jsonl") else me.load_texts(options.texts)
    return me.collect_moments(model, texts, layers, me.MomentsConfig(tokens=options.tokens), out=options.moments)


def scored(setting: Setting, ridge: Ridge | None, batches: Sequence[Sequence[me.EditRequest]]) -> dict[str, Any]:
    """The scores of all batches' requests, each batch written into the unedited model and scored there.

    Args:
        setting: the model and its layers.
        ridge: how the batches are written; None to score the unedited model.
        batches: requests that are written at once.
    """
    begin, tables, strengths, unwritten = time.monotonic(), [], [], []
    for batch in batches:
        if ridge is None:
            tables.append(me.evaluate(setting.model, batch, QUICK).table)
            continue
        targets = setting.targets(batch, setting.config.target_layer(setting.layers), setting.config)
        rule = MeasuringRidge(ridge=ridge)
        edit = spread(setting.model, batch, targets, setting.layers, rule, config=SpreadConfig()).edit
        with edited(setting.model, edit):
            tables.append(me.evaluate(setting.model, batch, QUICK).table)
        strengths.append(list(rule.strengths.values()))
        unwritten += edit.manifest["left"]
    table: Any = pd.concat(tables)
    means: Any = 100.0 * table.groupby(["case", "measure"])["value"].mean().groupby("measure").mean()
    return {
        "S": float(harmonic_mean(means[list(MEASURES)].to_numpy()[None])[0]),
        **{name: float(means[name]) for name in (*MEASURES, "exact_match")},
        "left": 100.0 * float(np.mean(unwritten)) if unwritten else 100.0,
        "strength": np.median(strengths, axis=0).tolist() if strengths else [],
        "seconds": time.monotonic() - begin,
    }


def compared_rules(results: pd.DataFrame, score: str = "S") -> pd.DataFrame:
    """Each rule with the constant c at which it loses least: to the best λ of each model and number of facts.

    Scores between the λ that were measured are interpolated over log λ, and a constant counts only where it asks for no
    λ outside of them. Models and numbers of facts without both absolute and relative λ are left out.

    Args:
        results: rows of `weights`.
        score: the column that is compared.

    Returns:
        Columns rule, c, `loss` (points below the best, mean over models and numbers of facts) and `worst` (largest).

    Raises:
        InputError: there is no model with both.
    """
    groups = [
        rows
        for _, rows in results.dropna(subset=["value"]).groupby(["model", "window", "facts"])
        if {*rows["relative"]} == {True, False}
    ]
    if not groups:
        raise InputError("no model has scores by both --relative and --absolute λ, expected both; measure the others")
    best = [rows[score].max() for rows in groups]
    rows = []
    for rule, factor in RULES.items():
        curves = [_curve(rows, rule, factor, score) for rows in groups]
        low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        for exponent in np.arange(low, high + 1e-9, 1 / 12):
            losses = [top - np.interp(exponent, x, y) for (x, y), top in zip(curves, best, strict=True)]
            rows.append({"rule": rule, "c": 10**exponent, "loss": np.mean(losses), "worst": max(losses)})
    compared: Any = pd.DataFrame(rows, columns=["rule", "c", "loss", "worst"])
    return compared.loc[compared.groupby("rule", sort=False)["loss"].idxmin()].reset_index(drop=True)


def _curve(
    rows: pd.DataFrame, rule: str, factor: Callable[[pd.DataFrame], Any], score: str
) -> tuple[np.ndarray, np.ndarray]:
    """Log₁₀ of a rule's constant, ascending, and the scores there."""
    rows = where(rows, relative=rule == RELATIVE)
    constants = np.log10(rows["value"] / factor(rows)).to_numpy(dtype=float)
    order = constants.argsort()
    return constants[order], rows[score].to_numpy(dtype=float)[order]


def all_rows(out: Path, name: str) -> pd.DataFrame:
    """The rows that earlier calls wrote to a folder."""
    files = sorted(out.glob(f"{name}_*.json"))
    if not files:
        raise InputError(f"there are no results {name}_*.json in {str(out)!r}; measure first")
    return pd.DataFrame([row for file in files for row in read_json(file)])


def print_row(row: dict[str, Any]) -> None:
    """A row as markdown."""
    cells = [
        json.dumps(value) if isinstance(value, list) else f"{value:.4g}" if isinstance(value, float) else str(value)
        for value in row.values()
    ]
    print("| " + " | ".join(cells) + " |", flush=True)


def print_table(table: pd.DataFrame) -> None:
    """A table as markdown."""
    print("| " + " | ".join(map(str, table.columns)) + " |\n" + "|---" * len(table.columns) + "|")
    for row in table.to_dict("records"):
        print_row({str(name): value for name, value in row.items()})


def measure(options: argparse.Namespace) -> None:
    """Print rows as they are measured, and write them to the folder."""
    source, rows = {"rates": rates, "weights": weights}[options.what](options), []
    name = f"{options.what}_{Path(options.model).name}_{options.layers}_{options.count}.json"
    for row in source:
        if not rows:
            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
        rows.append(row)
        print_row(row)
        write_json(options.out / name, rows)


def show(options: argparse.Namespace) -> None:
    """Print all measurements, and the rules for λ held against each other."""
    if sorted(options.out.glob("rates_*.json")):
        print_table(all_rows(options.out, "rates"))
    results: Any = all_rows(options.out, "weights")
    rule = np.where(results["value"].isna(), "unedited", np.where(results["relative"], "relative", "absolute"))
    print_table(results.assign(rule=rule)[["model", "window", "facts", "rule", "value", *SCORES, "left"]])
    for score in ("S", "exact_match"):
        print(f"\n{score}")
        print_table(compared_rules(results, score))


def rate(text: str) -> float | None:
    """A learning rate in units of the typical |hᵢ|, or `published`."""
    return None if text == "published" else float(text)


def parser() -> argparse.ArgumentParser:
    """The options of the three commands."""
    described = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = described.add_subparsers(dest="what", required=True)
    for name in ("rates", "weights"):
        command = commands.add_parser(name)
        command.add_argument("model", help="tiny, smollm2, gemma3 or a folder")
        command.add_argument("--requests", default="counterfact", help="counterfact, tiny, or a file of requests")
        command.add_argument("--layers", required=True, help="such as 1-5; z is searched for at the last")
        command.add_argument("--count", type=int, default=100, help="requests, a seeded sample")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--batch-size", type=int, default=10, help="facts searched together, and then kept")
        command.add_argument("--out", type=Path, default=Path("settings"), help="folder for the results")
    commands.choices["rates"].add_argument("--rates", type=rate, nargs="+", default=[0.05, 0.1, 0.2, None])
    command = commands.choices["weights"]
    command.add_argument("--rate", type=float, help="relative_lr, by default the method's")
    command.add_argument("--facts", type=int, nargs="+", default=[1, 20, 100], help="facts written at once")
    command.add_argument("--singles", type=int, default=20, help="edits of one fact that are scored together")
    command.add_argument("--absolute", type=float, nargs="*", default=[1, 10, 100, 1000, 15000], help="values of λ")
    command.add_argument("--relative", type=float, nargs="*", default=[0.001, 0.01, 0.1, 1], help="values of c")
    command.add_argument("--moments", type=Path, default=Path("run"), help="folder of the second moments")
    command.add_argument("--texts", help="collect them first, over these texts")
    command.add_argument("--tokens", type=int, default=40_000, help="tokens of the texts")
    commands.add_parser("table").add_argument("--out", type=Path, default=Path("settings"))
    return described


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, or show what was measured."""
    options = parser().parse_args(arguments)
    (show if options.what == "table" else measure)(options)
    return 0


if __name__ == "__main__":
    run_script(main)
