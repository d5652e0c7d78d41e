"""Causal tracing, with and without severing: which hidden states carry a fact (ROME §2, MEMIT Appendix A).

In: a model and facts. Out: tidy effects, one row per restored cell and metric. For each fact, the subject is
corrupted (with noise on its embeddings, or another subject's tokens; the object's probability falls from P to P*);
then one clean state, or a window of module outputs, is put back (P*,clean h). Total effect TE = P − P*, indirect
effect IE = P*,clean h − P*. Severing holds every MLP (or attention) output at the subject's last token, or
elsewhere, to its value in the corrupted run of the same noise sample, so that the restored state has no effect through
those modules.
"""

from mechedit.trace.agreement import Agreement, DisagreementError
from mechedit.trace.approximation import Approximation
from mechedit.trace.averages import average_effects, clearest_fact, total_effects
from mechedit.trace.columns import APPROXIMATE_COLUMNS, with_present_metric_names
from mechedit.trace.config import TraceConfig
from mechedit.trace.corruption import Corruption, EmbeddingStatistics, embedding_statistics, embedding_std
from mechedit.trace.effects import Effects, read_effects
from mechedit.trace.labels import KIND_LABELS, ROLE_LABELS, ROLES, SEVER_LABELS, token_label, unit_of
from mechedit.trace.metrics import METRICS, MetricInputs
from mechedit.trace.runs import run_clean_and_corrupted
from mechedit.trace.severing import Sever, sever_in_words
from mechedit.trace.trace import TracePlan, plan_trace, trace_facts
from mechedit.trace.traced_fact import tokenize_fact
from mechedit.trace.until_settled import UntilSettled, Verdict, trace_until_settled
from mechedit.trace.windows import window_span

__all__ = [
    "APPROXIMATE_COLUMNS",
    "KIND_LABELS",
    "METRICS",
    "ROLES",
    "ROLE_LABELS",
    "SEVER_LABELS",
    "Agreement",
    "Approximation",
    "Corruption",
    "DisagreementError",
    "Effects",
    "EmbeddingStatistics",
    "MetricInputs",
    "Sever",
    "TraceConfig",
    "TracePlan",
    "UntilSettled",
    "Verdict",
    "average_effects",
    "clearest_fact",
    "embedding_statistics",
    "embedding_std",
    "plan_trace",
    "read_effects",
    "run_clean_and_corrupted",
    "sever_in_words",
    "token_label",
    "tokenize_fact",
    "total_effects",
    "trace_facts",
    "trace_until_settled",
    "unit_of",
    "window_span",
    "with_present_metric_names",
]
