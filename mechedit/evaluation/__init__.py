"""What an edit did: CounterFact's measures, exact match, drift from the unedited model, free text and perplexity."""

from mechedit.evaluation.baseline import Baseline
from mechedit.evaluation.config import QUICK, EvaluationConfig
from mechedit.evaluation.counterfact import evaluate, measure_baseline
from mechedit.evaluation.generation import generate, ngram_entropy, uniform_draws
from mechedit.evaluation.likelihood import TargetScore, score_targets
from mechedit.evaluation.perplexity import perplexity
from mechedit.evaluation.references import References, load_references
from mechedit.evaluation.scores import Scores
from mechedit.evaluation.zsre import evaluate_zsre

__all__ = [
    "QUICK",
    "Baseline",
    "EvaluationConfig",
    "References",
    "Scores",
    "TargetScore",
    "evaluate",
    "evaluate_zsre",
    "generate",
    "load_references",
    "measure_baseline",
    "ngram_entropy",
    "perplexity",
    "score_targets",
    "uniform_draws",
]
