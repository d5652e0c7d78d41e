"""Trace the models that `make.py` wrote, ablate their layers one by one, and score every selection rule.

    python -m analyses.planted_truth.measure DIR [--facts 80] [--fixture FILE]

Writes effects.parquet and ablation.parquet into each model's folder (a model that has them is not measured again), then
DIR/rules.csv (one row per model and rule), DIR/models.csv and both as Markdown in DIR/table.md. `--fixture`
also packs the effects of all models that count, with their truth, into one small file for the tests.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

import mechedit as me
from analyses.common.csv_files import write_csv
from analyses.common.frames import means_by, total_effect
from analyses.common.printing import markdown_table
from mechedit.batching import group_by_shape
from mechedit.files import read_json, write_parquet
from mechedit.models import Patch
from mechedit.selection import RULES, SelectConfig
from mechedit.tables import read_table
from mechedit.trace import run_clean_and_corrupted
from mechedit.trace.runs import TraceRuns
from mechedit.trace.traced_fact import known_facts

TRACE = me.TraceConfig(kinds=("state", "mlp"), sever=("nothing", "mlp"), roles=("subject_last",))
LEAST_RECALL = 0.95
LEAST_SITE = 0.1
"""Largest gap, as a part of the total effect, from which a model has an early site."""
IMPORTANT = 0.1
"""Part of the summed drop from which ablation calls a layer important."""


def measure(folder: Path, count: int) -> None:
    """Trace and ablate one model, unless that has been done."""
    if (folder / "effects.parquet").is_file() and (folder / "ablation.parquet").is_file():
        return
    model = me.load_model(str(folder), dtype="float32")
    facts = me.load_facts(folder / "facts.jsonl")
    facts = random.Random(0).sample(facts, min(count, len(facts)))
    effects = me.trace_facts(model, facts, TRACE)
    write_parquet(folder / "ablation.parquet", ablate(model, facts, float(effects.attrs["noise_std"])))
    write_parquet(folder / "effects.parquet", effects)


@torch.no_grad()
def ablate(model: me.Model, facts: Sequence[me.Fact], std: float) -> pd.DataFrame:
    """The loss of P(object) when MLP outputs at the subject's last token are those of the corrupted run.

    One row per fact and layer, everything else as in the clean run; layer −1 is all layers at once.
    """
    known, _ = known_facts(model, facts)
    frames = []
    for group in tqdm(list(group_by_shape(known, 50, lambda traced: traced.shape)), desc="ablating", unit="group"):
        runs = run_clean_and_corrupted(model, group, std, TRACE)
        severed = severed_patches(runs)
        for layer in range(-1, model.n_layers):
            scores = ablated_scores(runs, severed if layer < 0 else [severed[layer]])
            frames.append(
                pd.DataFrame(
                    {
                        "fact": [traced.fact.id for traced in group],
                        "layer": layer,
                        "clean": runs.clean_scores["probability"].numpy(),
                        "ablated": scores.numpy(),
                    }
                )
            )
    frame = pd.concat(frames, ignore_index=True)
    return frame.assign(drop=frame["clean"] - frame["ablated"])


def severed_patches(runs: TraceRuns) -> list[Patch]:
    """For each layer, the patch that holds its MLP at the subject's last token to its corrupted output."""
    severed = runs.severed["mlp"]
    return [Patch(site, severed.positions, values) for site, values in severed.outputs.items()]


def ablated_scores(runs: TraceRuns, patches: Sequence[Patch]) -> torch.Tensor:
    """P(object) of each fact in the clean run with `patches` written, averaged over noise samples."""
    first = runs.facts[0]
    keep = torch.arange(first.prompt_length - 1, len(first.ids))
    run = runs.model.run(runs.tokens, patches, logits_to_keep=keep)
    fact = torch.arange(len(runs.facts)).repeat_interleave(runs.samples)
    return runs.metric_values(run, fact)["probability"].view(len(runs.facts), runs.samples).mean(1)


def precision_and_iou(chosen: Iterable[int], truth: Iterable[int]) -> tuple[float, float]:
    """Precision (share of chosen layers that are true; NaN when none is chosen) and intersection over union."""
    chosen, truth = set(chosen), set(truth)
    common = len(chosen & truth)
    return (common / len(chosen) if chosen else float("nan")), common / len(chosen | truth)


@dataclass(frozen=True, kw_only=True, eq=False)
class MeasuredModel:
    """One model with everything measured on it."""

    name: str
    truth: dict[str, Any]
    drop: pd.Series
    """Mean loss of P(object) by ablated layer."""
    all_dropped: float
    """Mean loss with all layers ablated at once."""
    total: float
    """Total effect of the corruption."""
    selection: me.Selection
    """Selection by the default rule, with the ranges that the other rules select."""

    @staticmethod
    def read(folder: Path) -> MeasuredModel:
        """Read a measured model's folder and select."""
        effects = read_table(folder / "effects.parquet")
        drop = means_by(read_table(folder / "ablation.parquet"), "layer", "drop")
        return MeasuredModel(
            name=folder.name,
            truth=read_json(folder / "truth.json"),
            drop=drop.drop(-1),
            all_dropped=drop.to_dict()[-1],
            total=total_effect(effects),
            selection=me.select_layers(effects),
        )

    @property
    def important(self) -> list[int]:
        """Layers whose ablation makes at least a tenth of the summed drop."""
        shares = self.drop.clip(lower=0) / self.drop.clip(lower=0).sum()
        return [int(layer) for layer in shares.index[shares >= IMPORTANT]]

    @property
    def site(self) -> float:
        """The largest gap as a part of the total effect; 0 without an early site."""
        site = self.selection.early_site
        return site["gap"] / self.total if site["found"] else 0.0

    @property
    def counts(self) -> bool:
        """Whether it knows its facts and recalls them at the subject's last token."""
        return self.truth["recall"] >= LEAST_RECALL and self.site >= LEAST_SITE

    def row(self) -> dict[str, Any]:
        """Truth, ablation and curves; curves in percent of probability, one number per layer."""
        curves = {
            name: percents([getattr(record, name) for record in self.selection.evidence])
            for name in ("state", "gap", "contribution")
        }
        return {
            "model": self.name,
            "layers": self.truth["n_layers"],
            "planted": span(self.truth["layers"]),
            "facts": self.selection.n_facts,
            "recall": self.truth["recall"],
            "minutes": self.truth["minutes"],
            "site": self.site,
            "counts": "yes" if self.counts else "no",
            "all ablated": self.all_dropped,
            "important": span(self.important),
            "idle": span(sorted(set(self.truth["layers"]) - set(self.important))),
            "one ablated": percents(self.drop),
            **curves,
        }

    def judged(self) -> list[dict[str, Any]]:
        """Every rule's choice, against the planted layers and against ablation."""
        rows = []
        for rule, choice in self.selection.rules.items():
            layers = list(choice.layers)
            precision, iou = precision_and_iou(layers, self.truth["layers"])
            rows.append(
                {
                    "model": self.name,
                    "rule": rule,
                    "planted": span(self.truth["layers"]),
                    "important": span(self.important),
                    "chosen": span(layers),
                    "outside": len(set(layers) - set(self.truth["layers"])),
                    "precision": precision,
                    "IoU": iou,
                    "IoU with ablation": precision_and_iou(layers, self.important)[1],
                    "drop held": float(self.drop[layers].sum() / self.drop.clip(lower=0).sum()),
                    "stability": choice.stability,
                }
            )
        return rows


def summarize(rules: pd.DataFrame) -> pd.DataFrame:
    """Over models, by rule."""
    groups = rules.groupby("rule", sort=False)
    columns = {
        "models": groups.size(),
        "none outside": groups["outside"].agg(lambda n: int((n == 0).sum())),
        "precision": groups["precision"].mean(),
        "IoU": groups["IoU"].mean(),
        "least IoU": groups["IoU"].min(),
        "IoU with ablation": groups["IoU with ablation"].mean(),
        "drop held": groups["drop held"].mean(),
        "stability": groups["stability"].mean(),
    }
    return pd.DataFrame(columns).reset_index()


def span(layers: Sequence[int]) -> str:
    """`2–4`, or `1, 3` when there are holes."""
    layers = sorted(layers)
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers)) or "none"


def percents(curve: Iterable[float]) -> str:
    """A curve of probabilities in percent, one number per layer."""
    return " ".join(f"{100 * value:.1f}" for value in curve)


def markdown(frame: pd.DataFrame) -> str:
    """A frame as a Markdown table."""
    rows = [[f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row] for row in frame.to_numpy()]
    return markdown_table(list(map(str, frame.columns)), rows) + "\n"


def pack(folders: Sequence[Path], path: Path) -> None:
    """The models' effects in one file, with their truth in its attrs: percent of probability rounded to 0.01."""
    frames = []
    for folder in folders:
        effects = read_table(folder / "effects.parquet")
        effects = effects[(effects["kind"] == "state") | (effects["sever"] == "nothing")]
        numbers = {name: effects[name].round(4).astype("float32") for name in ("clean", "corrupted", "effect")}
        frames.append(effects.drop(columns=["score", "token"]).assign(model=folder.name, **numbers))
    frame = pd.concat(frames, ignore_index=True)
    frame.attrs = {"truth": {folder.name: read_json(folder / "truth.json")["layers"] for folder in folders}}
    write_parquet(path, frame)


def main() -> None:
    """Measure, score the rules, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--facts", type=int, default=80, help="facts traced a model")
    parser.add_argument("--fixture", type=Path, help="also pack the effects here, for the tests")
    arguments = parser.parse_args()
    folders = sorted(path.parent for path in arguments.dir.glob("*/truth.json"))
    for folder in folders:
        measure(folder, arguments.facts)
    measured = [MeasuredModel.read(folder) for folder in folders]
    counting = [model for model in measured if model.counts]
    models = pd.DataFrame([model.row() for model in measured])
    rules = pd.DataFrame([row for model in counting for row in model.judged()])
    write_csv(models, arguments.dir / "models.csv")
    write_csv(rules, arguments.dir / "rules.csv")
    chosen = rules.pivot(index=["model", "planted", "important"], columns="rule", values="chosen")[list(RULES)]
    text = "\n".join(map(markdown, (summarize(rules), chosen.reset_index(), models)))
    (arguments.dir / "table.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"default rule: {SelectConfig().rule}; tables in {arguments.dir}")
    if arguments.fixture:
        pack([arguments.dir / model.name for model in counting], arguments.fixture)


if __name__ == "__main__":
    main()
