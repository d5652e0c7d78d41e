"""An edit's description, as JSON (`describe_edit`) and as text for the terminal (`format_description`)."""

from __future__ import annotations

import dataclasses
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechedit.cli.app import escaped, say
from mechedit.edit import Edit, summarize
from mechedit.methods import METHODS, SETTINGS_FROM
from mechedit.methods.plausibility import WARNINGS
from mechedit.models import Model

_WIDTH = 100
_LISTED = 20
"""Requests that are printed; --json has all."""
_HEADINGS = {
    "layer": "layer",
    "rank": "rank",
    "norm": "‖ΔW‖",
    "relative": "‖ΔW‖/‖W‖",
    "left": "residual left",
    "error": "solver error",
    "condition": "condition",
    "truncation": "truncation",
}


def describe_edit(edit: Edit, model: Model | None = None) -> dict[str, Any]:
    """An edit's method and settings, its requests, and its change of each layer, as JSON can hold them.

    Raises:
        InputError: the edit was made for other weights than the model's.
    """
    manifest = edit.manifest
    rows: list[dict[str, Any]] = [
        {str(name): value for name, value in row.items() if value == value}  # NaN stands for an unknown value
        for row in summarize(edit, model).to_dict("records")
    ]
    ids = manifest.get("requests", [])
    texts = manifest.get("facts", [])
    if len(texts) != len(ids):
        texts = [None] * len(ids)
    trained = {"training": manifest["training"]} if "training" in manifest else {}
    return {
        "method": manifest.get("method"),
        "mechedit": manifest.get("mechedit"),
        "model": dict(manifest["model"]),
        "parts": [part.get("method") for part in manifest.get("parts", [])],
        "settings": manifest.get("settings", {}),
        "changed_settings": _changed(manifest),
        "settings_from": list(manifest.get(SETTINGS_FROM) or ()),
        **trained,
        "unconverged": list(manifest.get("unconverged", [])),
        "probability": list(manifest.get("probability", [])),
        "warnings": list(manifest.get(WARNINGS, [])),
        "requests": [{"id": name, "fact": text} for name, text in zip(ids, texts, strict=True)],
        "layers": rows,
    }


def format_description(path: Path, description: Mapping[str, Any]) -> str:
    """The description as text that fits into 100 columns."""
    model, requests = description["model"], description["requests"]
    method = description["method"] or "unknown"
    if description["parts"]:
        method += " of " + ", ".join(str(part or "unknown") for part in description["parts"])
    changed = description["changed_settings"]
    lines = [
        f"edit      {path}",
        f"method    {method} (mechedit {description['mechedit'] or 'unknown'})",
        f"model     {model.get('model')}, {model.get('dtype', 'unknown dtype')}",
        f"weights   {model['weights_hash']}",
    ]
    if description["settings"]:
        text = ", ".join(f"{name} = {value!r}" for name, value in changed.items()) or "the defaults"
        lines += textwrap.wrap(f"settings  {text}", _WIDTH, subsequent_indent=" " * 10)
    for source in description["settings_from"]:
        if not source["settings"]:
            continue
        text = f"{', '.join(source['settings'])} by {source['source']} ({source['hash'][:12]})"
        lines += textwrap.wrap(text, _WIDTH, initial_indent=" " * 10, subsequent_indent=" " * 10)
    training = description.get("training")
    if training:
        lines.append(f"training  {_training(training)}")
    if description["unconverged"]:
        text = _unconverged(description, [request["id"] for request in description["requests"]])
        head = " " * 10 if training else "search    "
        lines += textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * 10)
    for warning in description["warnings"]:
        lines += textwrap.wrap(f"warning   {warning}", _WIDTH, subsequent_indent=" " * 10)
    lines += ["", *_table(description["layers"])]
    if requests:
        lines += ["", *_requests(requests)]
    return "\n".join(map(escaped, lines))


def say_unconverged(edit: Edit) -> None:
    """Name the requests whose new object is not the likeliest answer, with z written or after the training."""
    if edit.manifest.get("unconverged"):
        say(_unconverged(edit.manifest, edit.manifest.get("requests", [])))


def _unconverged(record: Mapping[str, Any], requests: Sequence[str]) -> str:
    """How many new objects are not the answer, how likely they are, what may help, and which they are.

    Args:
        record: a manifest or its description.
        requests: ids of all requests.
    """
    ids = record["unconverged"]
    listed = ", ".join(ids[:_LISTED]) + (", …" if len(ids) > _LISTED else "")
    if record.get("training"):
        return f"{len(ids)} new objects are not yet the answer (more steps or a larger lr may help): {listed}"
    probability = dict(zip(requests, record.get("probability") or [], strict=False))
    values = [probability[name] for name in ids if probability.get(name) is not None]
    median = f", where P of these is {statistics.median(values):.2f} in the median" if values else ""
    return (
        f"{len(ids)} of {len(requests)} new objects are not the likeliest answer at their z{median} (more steps, a "
        f"larger clamp or another relative_lr may help): {listed}"
    )


def _training(record: Mapping[str, Any]) -> str:
    """How the loss went while a fine-tuning lasted."""
    losses = record["losses"]
    ended = "stopped early" if record["stopped_early"] else "all its passes"
    return f"loss {losses[0]:.3g} → {record['final_loss']:.3g} in {len(losses)} passes ({ended})"


def _changed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that differ from the method's defaults; all of them when those are not known."""
    settings = manifest.get("settings", {})
    method = METHODS.get(manifest.get("method") or "")
    if method is None:
        return dict(settings)
    defaults = {field.name: field.default for field in dataclasses.fields(method.config)}
    return {name: value for name, value in settings.items() if name not in defaults or defaults[name] != value}


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Right-aligned columns; columns without any value are left out."""
    names = [name for name in _HEADINGS if any(name in row for row in rows)]
    cells = [[_HEADINGS[name] for name in names]] + [[_number(row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3g}" if math.isfinite(value) else str(value)


def _requests(requests: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per request; without texts, the ids alone."""
    count = f"{len(requests)} request" + ("s" if len(requests) > 1 else "")
    if all(request["fact"] is None for request in requests):
        names = ", ".join(str(request["id"]) for request in requests[:_LISTED])
        more = ", …" if len(requests) > _LISTED else ""
        return textwrap.wrap(f"{count} (their texts are not in the file): {names}{more}", _WIDTH)
    shown = requests[:_LISTED]
    width = max(len(str(request["id"])) for request in shown)
    lines = [_cut(f"{str(request['id']).rjust(width)}  {request['fact']}", _WIDTH - 2) for request in shown]
    more = [f"  … and {len(requests) - _LISTED} more (--json lists all)"] if len(requests) > _LISTED else []
    return [count, *(f"  {line}" for line in lines), *more]


def _cut(text: str, width: int) -> str:
    """The text on one line of at most `width` characters."""
    line = text.replace("\n", " ")
    return line if len(line) <= width else line[: width - 2] + " …"
