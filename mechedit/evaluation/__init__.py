"""Scores of an edit: CounterFact's and zsRE's measures, drift from the unedited model, free text and perplexity."""

from mechedit.evaluation.baseline import Baseline
from mechedit.evaluation.config import QUICK, EvaluationConfig
from mechedit.evaluation.counterfact import evaluate, measure_baseline
from mechedit.evaluation.generation import generate, ngram_entropy, uniform_draws
from mechedit.evaluation.likelihood import TargetScore, score_targets
from mechedit.evaluation.measures import MEASURES, PERCENT, Measure, measure_named
from mechedit.evaluation.perplexity import perplexity
from mechedit.evaluation.references import References, load_references
from mechedit.evaluation.scores import Scores
from mechedit.evaluation.summary import Entry, Summary, summarize_cases
from mechedit.evaluation.zsre import evaluate_zsre

__all__ = [
    "MEASURES",
    "PERCENT",
    "QUICK",
    "Baseline",
    "Entry",
    "EvaluationConfig",
    "Measure",
    "References",
    "Scores",
    "Summary",
    "TargetScore",
    "evaluate",
    "evaluate_zsre",
    "generate",
    "load_references",
    "measure_baseline",
    "measure_named",
    "ngram_entropy",
    "perplexity",
    "score_targets",
    "summarize_cases",
    "uniform_draws",
]
