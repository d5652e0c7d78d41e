"""How a model presents itself: one line at a prompt, a small table in a notebook."""

from __future__ import annotations

import html

from mechedit.models.protocol import Model

_MODULE_NAMES = {"mlp": "the MLPs", "attn": "attention"}


def summary(model: Model) -> str:
    """The model in one line."""
    facts = ", ".join(f"{label} {value}" for label, value in _properties(model).items())
    return f"<Model {model.name!r}: {facts}>"


def html_summary(model: Model) -> str:
    """The model as an HTML table."""
    rows = "".join(
        f'<tr><th style="text-align:left">{html.escape(label)}</th>'
        f'<td style="text-align:left">{html.escape(value)}</td></tr>'
        for label, value in _properties(model).items()
    )
    return f"<table><caption>{html.escape(model.name)}</caption>{rows}</table>"


def _properties(model: Model) -> dict[str, str]:
    """Properties of a model by label, as text."""
    count = len(model.edit_log) + model.temporary_edits
    return {
        "family": model.family.name,
        "layers": str(model.n_layers),
        "width": f"{model.d_model} ({f'MLP {model.d_mlp}' if model.d_mlp else 'experts'})",
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "backend": model.backend,
        "edits go into": _MODULE_NAMES[model.module],
        "edited": "no" if count == 0 else f"yes ({count} {'edit' if count == 1 else 'edits'} applied)",
    }
