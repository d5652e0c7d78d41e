"""`mechedit plan`: what the steps will cost, before anything is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import typer

from mechedit.cli.app import one_line
from mechedit.cli.command import POSITIONAL, command, options_of
from mechedit.cli.idle import refuse_idle
from mechedit.cli.options import ALL_SEVERED, JsonOption
from mechedit.cli.parsing import parse_layers, quiet, require_layers
from mechedit.errors import check_at_least, check_choice, check_positive
from mechedit.models import DTYPES, ModelShapes
from mechedit.planning import (
    Plan,
    PromptShape,
    Rates,
    Step,
    in_units,
    measured_rates,
    plan_edit,
    plan_moments_step,
    plan_trace_step,
    surrounding_bytes,
)
from mechedit.trace import TraceConfig

DEPTH = 5
"""Layers of a range that is not given."""


@dataclass(frozen=True, kw_only=True)
class PlanOptions(JsonOption):
    """Model, amounts, and the rate."""

    model: Annotated[str | None, POSITIONAL] = "tiny"
    """tiny, a hub name, a folder or a config.json; weights need not be there."""
    facts: int = 1000
    """Facts to trace."""
    tokens: float | int = 100_000_000
    """Tokens of the text for second moments."""
    text_tokens: int | None = None
    """Tokens of one text; by default as many as are read at most."""
    edits: int = 10_000
    """Facts to write."""
    layers: str | None = None
    """Layers to edit, such as 3-8; by default five from a sixth of the depth on."""
    dtype: str | None = None
    """float32, bfloat16 or float16; by default float32 where the rate is measured on a CPU, else that of the config."""
    device: str | None = None
    """Device on which the rate is measured."""
    rate: float | int | None = None
    """Operations per second, such as 4e14; by default measured here, on a few random blocks of the model's sizes."""


@command(
    options=options_of(PlanOptions),
    prompt=options_of(
        PromptShape,
        rename={
            "before": "before_tokens",
            "subject": "subject_tokens",
            "after": "after_tokens",
            "target": "object_tokens",
            "prefix": "prefix_tokens",
        },
    ),
    trace=options_of(TraceConfig, only=("samples",), defaults=ALL_SEVERED),
)
def plan_command(options: PlanOptions, prompt: PromptShape, trace: TraceConfig) -> int:
    """Print what tracing, second moments and an edit will cost: operations, memory, disk and minutes.

    Nothing is computed, but for the rate where none is given.
    """
    if options.rate is not None:
        refuse_idle(
            options,
            names={"device"},
            reason="is where a rate is measured, and --rate gives one; leave one of them out",
        )
    for name in ("facts", "edits", "tokens"):
        check_at_least(name, getattr(options, name), 1)
    check_at_least("text_tokens", options.text_tokens, 1, optional=True)
    check_positive("rate", options.rate, optional=True)
    if options.dtype is not None:
        check_choice("the dtype", options.dtype, DTYPES)
    dtype = _dtype(options)
    with quiet():
        shapes = ModelShapes.of_config(options.model or "tiny", dtype)
    layers = _layers(options, shapes)
    prompt.require_room(shapes)
    device = "cpu" if _device(options) == "cpu" else "cuda"
    steps = (
        plan_trace_step(shapes, options.facts, prompt, trace),
        plan_moments_step(shapes, int(options.tokens), layers, text_tokens=options.text_tokens, device=device),
        *plan_edit(shapes, options.edits, layers, prompt, device=device),
    )
    plan = Plan(shapes=shapes, steps=steps)
    rates = _rates(options, dtype)
    record = {
        "model": shapes.name,
        "parameters": shapes.parameters,
        "dtype": str(shapes.dtype).removeprefix("torch."),
        "weights": shapes.weight_bytes,
        "peak": plan.peak,
        "layers": layers,
        "steps": {step.name: _record(step, rates) for step in steps},
        "rates": {"head": rates.head, "solving": rates.solving},
    }
    if options.json:
        options.print_summary(record)
    else:
        typer.echo(_table(plan, rates, options, layers))
    return 0


def _dtype(options: PlanOptions) -> torch.dtype | None:
    """The dtype in which the model would run, as `load_model` chooses it; None for the config's."""
    if options.dtype is not None:
        return DTYPES[options.dtype]
    is_measured = options.rate is None and _device(options) == "cpu"
    return torch.float32 if is_measured or options.model in (None, "tiny") else None


def _device(options: PlanOptions) -> str:
    """Type of the device on which the model would run."""
    return (options.device or ("cuda" if torch.cuda.is_available() else "cpu")).partition(":")[0]


def _layers(options: PlanOptions, shapes: ModelShapes) -> list[int]:
    """The layers of --layers, or five from a sixth of the depth on."""
    if options.layers is not None:
        layers = parse_layers(options.layers)
        require_layers(layers, shapes.n_layers)
        return layers
    first = shapes.n_layers // 6
    return list(range(first, min(first + DEPTH, shapes.n_layers)))


def _rates(options: PlanOptions, dtype: torch.dtype | None) -> Rates:
    """Operations per second: the rate that was given, or measured ones."""
    if options.rate is not None:
        return Rates.same(float(options.rate))
    with quiet():
        return measured_rates(options.model or "tiny", device=options.device, dtype=dtype)


def _record(step: Step, rates: Rates) -> dict[str, float | int]:
    """A step as JSON has it."""
    return {
        "operations": step.operations,
        "head": step.head,
        "solving": step.solving,
        "memory": step.memory,
        "disk": step.disk,
        "rate": rates.blocks[step.name],
        "minutes": step.minutes(rates),
    }


def _table(plan: Plan, rates: Rates, options: PlanOptions, layers: list[int]) -> str:
    """The plan as text for the terminal."""
    shapes, amounts = plan.shapes, {
        "trace": f"{options.facts:,} facts", "moments": f"{int(options.tokens):,} tokens",
        "targets": f"{options.edits:,} facts", "spreading": f"{options.edits:,} facts",
    }  # fmt: skip
    lines = [
        f"model   {one_line(shapes.name)}",
        f"weights {shapes.parameters:,} parameters in {str(shapes.dtype).removeprefix('torch.')}, "
        f"{in_units(shapes.weight_bytes)}",
        f"layers  {layers[0]} to {layers[-1]} of 0 to {shapes.n_layers - 1}",
        f"memory  {in_units(plan.peak)} at most, weights included; Python, its libraries and the tokenizer take "
        f"about {in_units(surrounding_bytes(shapes))} besides",
        "",
        f"{'step':<10} {'amount':>20} {'operations':>11} {'in float64':>11} {'memory':>10} {'disk':>10} {'minutes':>9}",
    ]
    for step in plan.steps:
        minutes = step.minutes(rates)
        lines.append(
            f"{step.name:<10} {amounts[step.name]:>20} {step.operations:>11.3g} {step.solving:>11.3g} "
            f"{in_units(step.memory):>10} {in_units(step.disk):>10} {minutes:>9.3g}"
        )
    source = "as given" if options.rate is not None else "measured on a few random blocks of these sizes"
    blocks = ", ".join(f"{rate:.3g}/s {name}" for name, rate in rates.blocks.items())
    others = f"{rates.head:.3g}/s unembedding, {rates.solving:.3g}/s linear systems"
    return "\n".join([*lines, "", f"rates   {source}:", f"        blocks {blocks}", f"        {others}"])
