"""Layers and settings of a method for a model, chosen by editing with held-out facts under a budget.

In: a model, requests, second moments. Out: a `Tuned`, which writes `tuned.json`; methods take it from there by
themselves (`mechedit.methods.recommendation`).
"""

from mechedit.tuning.config import TuneConfig
from mechedit.tuning.inputs import check_budget, check_method, tuned_windows, tuning_facts
from mechedit.tuning.plan import Plan, Rung, Scope, Speed, make_plan, plan_for_seconds
from mechedit.tuning.tune import tune
from mechedit.tuning.tuned import Tuned

__all__ = [
    "Plan",
    "Rung",
    "Scope",
    "Speed",
    "TuneConfig",
    "Tuned",
    "check_budget",
    "check_method",
    "make_plan",
    "plan_for_seconds",
    "tune",
    "tuned_windows",
    "tuning_facts",
]
