"""What an edit did: CounterFact's measures, greedy exact match, the entropy of free text and perplexity."""

from mechedit.evaluation.counterfact import evaluate
from mechedit.evaluation.generation import generate, ngram_entropy, uniform_draws
from mechedit.evaluation.likelihood import TargetScore, score_targets
from mechedit.evaluation.perplexity import perplexity
from mechedit.evaluation.scores import QUICK, EvaluationConfig, Scores
from mechedit.evaluation.zsre import evaluate_zsre

__all__ = [
    "QUICK",
    "EvaluationConfig",
    "Scores",
    "TargetScore",
    "evaluate",
    "evaluate_zsre",
    "generate",
    "ngram_entropy",
    "perplexity",
    "score_targets",
    "uniform_draws",
]
