"""`mechedit apply`: the edited model as a checkpoint, or the edit as a LoRA adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mechedit.cli.app import say
from mechedit.cli.command import command
from mechedit.cli.options import RequestsOption
from mechedit.cli.parsing import quiet
from mechedit.data import EditRequest
from mechedit.edit import Edit, edited, export, export_lora, lost_fraction
from mechedit.errors import InputError
from mechedit.evaluation import evaluate
from mechedit.models import Model

SCORES = ("ES", "PS", "NS")
"""Measures whose change by a truncation is stated."""


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(RequestsOption):
    """Edit, model and folder; requests whose scores a truncation may change."""

    edit: Path
    """An edit file."""
    out: Path
    """Folder for the checkpoint or the adapter."""
    format: Literal["checkpoint", "lora"] = "checkpoint"
    """The whole model, or a LoRA adapter for PEFT."""
    rank: int | None = None
    """Rank of the adapter in all layers alike, such as 16, as serving engines want it; a higher one is truncated."""


@command()
def apply_command(options: ApplyOptions) -> int:
    """Write the edited model as a checkpoint that AutoModelForCausalLM loads, or the edit as a LoRA adapter.

    A checkpoint has the dtype of the one that the model was loaded from, or that of --dtype. It is read back and
    compared with the edited model before it appears; that takes the memory of a second model.
    """
    if options.rank is not None and options.format != "lora":
        raise InputError("--rank is that of an adapter, expected --format lora with it; add that, or leave --rank out")
    if options.requests is not None and options.rank is None:
        raise InputError("--requests is there for the scores that --rank changes; add --rank, or leave --requests out")
    edit = Edit.load(options.edit)
    requests = [] if options.requests is None else options.read_named_requests("refuse")
    model = options.load_model()
    requests = options.in_turns(model, requests)
    summary: dict[str, object] = {"model": str(options.out), "format": options.format, "layers": edit.layers}
    if options.format == "lora":
        with quiet():
            written = export_lora(model, edit, options.out, overwrite=options.overwrite, rank=options.rank)
        say(f"wrote the edit as a LoRA adapter to {options.out}")
        if options.rank is not None:
            fraction = lost_fraction(edit, written)
            summary |= {"rank": options.rank, "lost": fraction}
            say(f"rank {options.rank} in {len(edit.layers)} layers: {fraction:.2%} of the norm of ΔW is lost")
            if requests:
                summary["scores"] = _scores(model, requests, edit, written)
            else:
                say("with --requests FILE, the change of ES, PS and NS is stated as well")
    else:
        with quiet():
            export(model, edit, options.out, overwrite=options.overwrite, dtype=options.dtype)
        say(f"wrote the edited model to {options.out}; read back, it is the edited model")
    options.print_summary(summary)
    return 0


def _scores(model: Model, requests: list[EditRequest], edit: Edit, written: Edit) -> dict[str, dict[str, float]]:
    """Say how the scores of an edit and those of its truncation differ; both, in percent."""
    requests = [replace(request, generations=(), attributes=()) for request in requests]
    summaries = []
    for version in (edit, written):
        with quiet(), edited(model, version):
            summaries.append(evaluate(model, requests).summary())
    exact, truncated = summaries
    changes = {name: {"edit": exact[name]["mean"], "rank": truncated[name]["mean"]} for name in SCORES if name in exact}
    in_words = [f"{name} {entry['edit']:.1f} → {entry['rank']:.1f}" for name, entry in changes.items()]
    say(f"by that, over {len(requests)} requests: {', '.join(in_words)}")
    return changes
