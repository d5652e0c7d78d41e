"""What each rule's choice costs on the models that `make.py` wrote: regret, as on pretrained models.

    python -m analyses.planted_truth.regret DIR --out DIR [--facts 100]

Of a model's 64 subjects some are traced, some are edited by the short sweep of `mechedit run`, and the others judge:
they chose nothing. See `analyses.real_models.regret` for how windows are screened and regret is measured. Prints one
row a rule over all models; what was finished before is read.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import mechedit as me
from analyses.common.command import run_script
from analyses.common.printing import markdown_table
from analyses.planted_truth.make import PLANS, Plan, draw_entries
from analyses.real_models.regret import Judge, table, windows_by_rule, write_rows
from analyses.tiny_model.almanac import Entry
from analyses.tiny_model.records import make_request, make_texts
from mechedit.cli import main as mechedit_command
from mechedit.data import load_requests
from mechedit.errors import InputError
from mechedit.files import read_json, write_json
from mechedit.methods import METHODS

TRACED, SWEPT = 20, 18
"""Subjects whose facts are traced, and those that the short sweep edits."""
TEXTS = 1000
"""Documents of running text for the second moments."""
SCREENED = 20
"""Requests of the screening."""
LOST = 3.0
"""Points of regret up to which a choice counts as good."""


def inputs(plan: Plan, entries: Sequence[Entry], facts: Path, folder: Path) -> None:
    """Write facts.jsonl, sweep.json, judges.json and texts.txt: each about other subjects than the others' edits."""
    draw = random.Random(plan.seed)
    drawn = draw.sample(entries, len(entries))
    traced, swept, judges = drawn[:TRACED], drawn[TRACED : TRACED + SWEPT], drawn[TRACED + SWEPT :]
    names = {entry.subject for entry in traced}
    lines = [line for line in facts.read_text(encoding="utf-8").splitlines() if json.loads(line)["subject"] in names]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "facts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, edited, others in (("sweep", swept, [*traced, *judges]), ("judges", judges, [*traced, *swept])):
        write_json(folder / f"{name}.json", requests(edited, others, draw))
    texts = make_texts(list(entries), plan.seed + 1, 0.5, TEXTS)
    (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")


def requests(edited: Sequence[Entry], others: Sequence[Entry], draw: random.Random) -> list[dict[str, Any]]:
    """An edit of every fact that has a neighbor among other subjects, which are not edited themselves."""
    edits = [make_request(0, entry, relation, [entry, *others], draw) for entry in edited for relation in entry.facts]
    useful = [record for record in edits if record["neighborhood_prompts"]]
    return [{**record, "case_id": number} for number, record in enumerate(draw.sample(useful, len(useful)))]


def judged(plan: Plan, models: Path, out: Path, count: int) -> pd.DataFrame:
    """Each rule's window on one model with its regret, as `analyses.real_models.regret.table` has it."""
    source, folder = models / plan.name, out / plan.name
    if (folder / "regret.json").is_file():
        return pd.DataFrame(read_json(folder / "regret.json")["rows"])
    inputs(plan, draw_entries(plan.seed), source / "facts.jsonl", folder)
    files = {name: str(folder / name) for name in ("facts.jsonl", "sweep.json", "judges.json", "texts.txt")}
    run(source, files, folder / "run")
    model = me.load_model(str(source), device="cpu")
    moments = me.collect_moments(model, files["texts.txt"], range(model.n_layers), out=folder / "moments")
    config: Any = METHODS["memit"].recommendation(model, tuned=False).config
    judge = Judge(
        model=model, requests=load_requests(files["judges.json"])[:count], moments=moments, config=config, out=folder
    )
    rules = windows_by_rule(folder / "run", model.n_layers)
    frame, by_count = table(judge, rules, judge.screened(SCREENED), len(judge.requests))
    write_rows(folder / "regret.json", plan.name, frame, by_count)
    return frame


def run(model: Path, files: Mapping[str, str], folder: Path) -> None:
    """`mechedit run` with the short sweep, of which all but one request are."""
    try:
        mechedit_command([
            "run", "--model", str(model), "--facts", files["facts.jsonl"], "--requests", files["sweep.json"],
            "--texts", files["texts.txt"], "--max-requests", "1", "--all-facts", "--generation-tokens", "0",
            "--no-tuned", "--out", str(folder),
        ])  # fmt: skip
    except SystemExit as leaving:
        # 3: no range, which is a result.
        if leaving.code not in (0, 3):
            raise


def by_rule(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a rule: on how many models it can be edited, regret on these, and how sure it is of itself.

    Args:
        frames: the rows of `judged` by model.

    Returns:
        Columns rule, `models` (on which its window can be edited), `good` (of these, regret at most `LOST`), S, regret,
        `worst`, stability and agreement; all but the counts are means over these models.
    """
    rows: Any = pd.concat([frame.assign(model=name) for name, frame in frames.items()], ignore_index=True)
    rows = rows[~rows["rule"].str.startswith("best of the screening")]
    columns = ["S", "regret", "stability", "agreement"]
    rows[columns] = rows[columns].astype(float)
    counted = []
    for rule, rule_rows in rows.groupby("rule", sort=False):
        edited = rule_rows.dropna(subset=["regret"])
        counted.append({
            "rule": rule, "models": len(edited), "good": int((edited["regret"] <= LOST).sum()),
            "S": edited["S"].mean(), "regret": edited["regret"].mean(), "worst": edited["regret"].max(),
            "stability": edited["stability"].mean(), "agreement": edited["agreement"].mean(),
        })  # fmt: skip
    return pd.DataFrame(counted)


def in_words(value: Any) -> str:
    """A cell of the table."""
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.2f}"
    return str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge all models, print a row for each rule and model, and then the rules over all models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", type=Path, help="folder of analyses.planted_truth.make")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--facts", type=int, default=100, help="requests that judge")
    options = parser.parse_args(arguments)
    frames = {}
    for plan in PLANS:
        if (options.models / plan.name / "truth.json").is_file():
            frames[plan.name] = judged(plan, options.models, options.out, options.facts)
            print(f"\n{plan.name}, planted {plan.first}–{plan.last}\n", flush=True)
            print(table_of(frames[plan.name]), flush=True)
    if not frames:
        raise InputError(
            f"there are no models in {str(options.models)!r}, expected those of analyses.planted_truth.make"
        )
    print(f"\n{len(frames)} models\n\n{table_of(by_rule(frames))}")
    return 0


def table_of(frame: pd.DataFrame) -> str:
    """The rows as markdown."""
    return markdown_table(list(frame.columns), [[in_words(cell) for cell in row] for row in frame.to_numpy()])


if __name__ == "__main__":
    run_script(main)
