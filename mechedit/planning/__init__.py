"""What a step will cost, before anything is started: operations, bytes and time, from the sizes of a model."""

from mechedit.planning.operations import Operations
from mechedit.planning.plan import (
    STEPS,
    Plan,
    Rates,
    Step,
    in_units,
    plan_edit,
    plan_moments_step,
    plan_trace_step,
    surrounding_bytes,
)
from mechedit.planning.prompt_shape import PromptShape
from mechedit.planning.rate import measured_rates

__all__ = [
    "STEPS",
    "Operations",
    "Plan",
    "PromptShape",
    "Rates",
    "Step",
    "in_units",
    "measured_rates",
    "plan_edit",
    "plan_moments_step",
    "plan_trace_step",
    "surrounding_bytes",
]
