"""`mechedit evaluate`: scores of requests before and after an edit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mechedit import pipeline, ranks
from mechedit.cli.command import command, options_of
from mechedit.cli.idle import refuse_idle
from mechedit.cli.options import EVALUATION_OPTIONS, RequestsOption, RunFolderOptions
from mechedit.cli.parsing import first_texts
from mechedit.data import Conflicts, load_texts
from mechedit.edit import Edit, check_model
from mechedit.evaluation import EvaluationConfig, load_references
from mechedit.figures import run_figures


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(RequestsOption, RunFolderOptions):
    """Requests, edit, texts, protocol, model and folder."""

    edit: Path | None = None
    """An edit file."""
    texts: str | None = None
    """Texts to measure perplexity on, other than those of the moments."""
    max_texts: int = 100
    """How many of the texts are read, from the first."""
    protocol: pipeline.Protocol = "counterfact"
    """Measures of CounterFact, or those of zsRE."""
    references: str | None = None
    """Texts for RS: counterfact, a folder with its files, or a file of your own snippets."""
    conflicts: Conflicts = "refuse"
    """Requests for different objects of one subject and relation: refuse, or keep the first."""


@command(evaluation=options_of(EvaluationConfig, only=EVALUATION_OPTIONS))
def evaluate_command(options: EvaluateOptions, evaluation: EvaluationConfig) -> int:
    """Score requests before and after an edit: scores.parquet and summary.json.

    The unedited model's answers are kept in baseline/; another edit is compared with them (with --overwrite in the
    same folder).
    """
    if options.texts is None:
        refuse_idle(
            options,
            names={"max_texts"},
            reason="is how many of --texts are read; add --texts, or leave it out",
        )
    folder = options.run_folder()
    requests = options.read_named_requests(options.conflicts)
    references = None if options.references is None else load_references(options.references, requests)
    texts = [] if options.texts is None else first_texts(load_texts(options.texts), options.max_texts)
    edit = None if options.edit is None else Edit.load(options.edit)
    model = options.load_model()
    requests = options.in_turns(model, requests)
    if edit is not None:
        check_model(model, edit)
    scores = pipeline.evaluate_step(folder, model, requests, edit, evaluation, texts, options.protocol, references)
    summary = pipeline.write_summary(folder, scores, pipeline.saved_selection(folder), edit)
    ranks.current().from_first(lambda: run_figures(folder.path), "the figures")
    options.print_summary(summary)
    return 0
