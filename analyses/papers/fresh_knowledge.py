"""MEMIT Appendix E: insert a list of new facts, and ask for them before and after.

    python -m analyses.papers.fresh_knowledge [--model MODEL] [--requests FACTS.csv] [--method memit]

The CSV has the columns subject, prompt (with {} for the subject) and target_new; it may have target_true, relation,
paraphrase, paraphrase_1 … Without a file fifty pieces of news about what the tiny model knows are made up, and left
as fresh_knowledge_facts.csv to be copied. A fact counts as known when greedy decoding writes its object: accuracy is
the share of such facts, on the prompt and on paraphrases. Where the former object is given, ES and PS too: whether
the new one is the likelier.

Writes fresh_knowledge.parquet (one row per fact), fresh_knowledge.csv (accuracy before and after, and the paper's), the
figure, fresh_knowledge_missed.csv (facts that did not take, with what the model says) and fresh_knowledge_said.csv
(what it writes after each prompt, before and after).
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analyses.common.beside import with_paper
from analyses.common.command import open_experiment, options, run_script
from analyses.common.csv_files import write_csv
from analyses.common.experiment import Experiment
from analyses.common.frames import columns_of, records
from analyses.common.printing import format_interval
from analyses.common.variants import Variant
from mechedit import pipeline
from mechedit.atomic import atomic
from mechedit.data import EditRequest
from mechedit.evaluation import PERCENT, Entry, EvaluationConfig, Scores
from mechedit.figures import draw, plot_scores
from mechedit.published import published_table
from mechedit.run_folder import RunFolder
from mechedit.tables import where

NEWS = 50
"""Facts that are made up where none are given."""
SHOWN = 5
"""Facts whose continuations are printed."""
SAID = ("subject", "prompt", "target_new", "said_before", "said_after")
"""Columns of the table of what is written."""
ROWS = {
    "exact_match": "accuracy",
    "exact_match_paraphrase": "accuracy, paraphrases",
    "ES": "efficacy (ES)",
    "PS": "paraphrases (PS)",
    "NS": "neighbors (NS)",
}
BARS = {
    "exact_match": "accuracy",
    "exact_match_paraphrase": "accuracy,\nparaphrases",
    "ES": "ES",
    "PS": "PS",
    "NS": "NS",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask, insert, ask again, write."""
    parser = options(__doc__, quick_count=6)
    parser.add_argument("--method", default="memit")
    parser.add_argument("--words", type=int, default=10, help="tokens written after each prompt (default 10)")
    experiment = open_experiment("fresh_knowledge", parser, arguments)
    if experiment.arguments.requests == "known" and experiment.arguments.count is None:
        experiment.arguments.count = NEWS
    requests = experiment.requests
    write_facts(experiment.out / "fresh_knowledge_facts.csv", requests)
    variant = experiment.variant(experiment.arguments.method)
    scores = scored(experiment, variant, requests)
    table = by_fact(scores, requests)
    show(table)
    write_csv(missed(table), experiment.out / f"{experiment.name}_missed.csv")
    write_csv(columns_of(table, SAID), experiment.out / f"{experiment.name}_said.csv")
    before, after = scores.summary("before"), scores.summary("after")
    figure = draw(lambda ax: plot_scores(before, after, ax, names=BARS), height=2.3)
    experiment.write(table, with_paper(format_table(scores), paper_table()), figure)


def write_facts(path: Path, requests: Sequence[EditRequest]) -> None:
    """The facts as CSV, in the form in which the script reads them."""
    most = max(len(request.paraphrases) for request in requests)
    names = [f"paraphrase_{i}" for i in range(1, most + 1)]
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as opened_file:
        writer = csv.writer(opened_file)
        writer.writerow(["id", "subject", "prompt", "target_new", "target_true", "relation", *names])
        for r in requests:
            paraphrases = [*r.paraphrases, *[""] * (most - len(r.paraphrases))]
            writer.writerow([r.id, r.subject, r.prompt, r.target_new, r.target_true, r.relation, *paraphrases])


def scored(experiment: Experiment, variant: Variant, requests: Sequence[EditRequest]) -> Scores:
    """The scores and greedy answers before and after the edit, kept in `fresh_knowledge_scores/`."""
    config = EvaluationConfig(seed=experiment.seed, generation_tokens=0, answer_tokens=experiment.arguments.words)
    folder = RunFolder.at(experiment.out / "fresh_knowledge_scores", overwrite=experiment.arguments.overwrite)
    edit = experiment.edit(variant, requests)
    return pipeline.evaluate_step(folder, experiment.model, requests, edit, config)


def by_fact(scores: Scores, requests: Sequence[EditRequest]) -> pd.DataFrame:
    """One row per fact: its text, whether it took, each measure and answer before and after (percent)."""
    rows = pd.DataFrame(
        {
            "case": [r.id for r in requests],
            "subject": [r.subject for r in requests],
            "prompt": [r.text for r in requests],
            "target_new": [r.target_new for r in requests],
            "target_true": [r.target_true for r in requests],
        }
    ).set_index("case")
    for state in ("before", "after"):
        rows_of_state = where(scores.table, state=state)
        wide = rows_of_state.pivot_table(values="value", index="case", columns="measure", aggfunc="mean") * PERCENT
        for measure in ROWS:
            if measure in wide:
                rows[f"{measure}_{state}"] = wide[measure].reindex(rows.index)
        answers = where(scores.answers, state=state, kind="rewrite").set_index("case")["answer"]
        rows[f"said_{state}"] = answers.reindex(rows.index)
    rows["took"] = rows["exact_match_after"] == PERCENT
    return rows.reset_index()


def missed(table: pd.DataFrame) -> pd.DataFrame:
    """The facts whose object the edited model does not write."""
    return table.loc[~table["took"], ["case", "subject", "prompt", "target_new", "target_true", "said_after"]]


def format_table(scores: Scores) -> pd.DataFrame:
    """One row per measure: before and after, with half their intervals, and the number of facts."""
    before, after = scores.summary("before"), scores.summary("after")
    rows = []
    for measure, name in ROWS.items():
        if measure in after:
            cells = {state: _cell(summary[measure]) for state, summary in (("before", before), ("after", after))}
            rows.append({"measure": name, "facts": after[measure]["n"], **cells})
    return pd.DataFrame(rows)


def paper_table() -> pd.DataFrame:
    """The paper's rows: elections and stars, before and after."""
    table = published_table("memit_demonstrations")
    names = [f"{row['measure']}, {row['facts']}, paper ({row['model']})" for row in records(table)]
    cells = {state: ["" if pd.isna(mean) else f"{mean:.1f}" for mean in table[state]] for state in ("before", "after")}
    return pd.DataFrame({"measure": names, **cells})


def _cell(entry: Entry) -> str:
    mean = entry["mean"]
    assert mean is not None
    return format_interval(mean, entry["low"], entry["high"])


def show(table: pd.DataFrame) -> None:
    """Print what the model writes of the first facts, before and after, and which did not take."""
    for row in records(table.head(SHOWN)):
        print(f"{row['prompt']} …\n  before:{row['said_before']}\n  after: {row['said_after']}")
    failures = records(missed(table))
    print(f"{len(failures)} of {len(table)} facts did not take" + (":" if failures else ""))
    for row in failures:
        print(f"  {row['prompt']} {row['target_new']}: the model writes{row['said_after']}")


if __name__ == "__main__":
    run_script(main)
