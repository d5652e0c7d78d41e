"""One run folder as one web page: the steps, their results, and the meaning of each number.

In: the files of a folder that mechedit wrote, whichever are there. Out: report.html, a single file with its
images inside. Sections without data are left out.
"""

from __future__ import annotations

import base64
import functools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from typing_extensions import TypedDict

from mechedit.atomic import atomic
from mechedit.edit.manifest_record import ManifestRecord
from mechedit.errors import InputError
from mechedit.evaluation import MEASURES, Scores
from mechedit.evaluation.summary_file import read_summary_file
from mechedit.files import read_header
from mechedit.locks import locked
from mechedit.moments.second_moment import MomentRecord
from mechedit.provenance import VERSION, file_hash
from mechedit.records import ModelRecord, Number, Whole, check_record
from mechedit.reproduction import Reproduction
from mechedit.run_folder import as_written, check_step, read_stamps, sweep_run_folder
from mechedit.sweep.validation import read_selection_fields
from mechedit.tables import read_table, where
from mechedit.trace import clearest_fact
from mechedit.trace.site_effects import site_effects

SOURCES = ("effects.parquet", "selection.json", "edit.safetensors", "scores.parquet", "summary.json")
"""Files of results; a folder with none of them is not a run."""
EXAMPLES = 10
"""Number of greedy answers shown."""


FACT_COLUMNS = ("id", "subject", "prompt", "object")


class SeedRecord(TypedDict, total=False):
    """Settings with a seed."""

    seed: Whole | None


class TraceRecord(TypedDict, total=False):
    """The attributes of effects.parquet that a report reads."""

    noise_std: Number | None
    dropped: list[tuple[str, str]]
    provenance: ModelRecord
    config: SeedRecord


def write_report(folder: str | Path, draw: Callable[[Path], object] | None = None) -> Path:
    """Write `folder`/report.html from the results and figures that lie there, and return its path.

    Args:
        folder: where the results lie.
        draw: draws the figures in a folder, once its results are read, so that no figure of damaged ones is left there.

    Raises:
        InputError: no such folder, nothing in it that mechedit wrote, or a file that cannot be read or is not as its
            step wrote it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"there is no folder {str(folder)!r}, expected one that mechedit wrote: check the path")
    if not any((folder / name).is_file() for name in SOURCES):
        raise InputError(
            f"the folder {str(folder)!r} holds no results, expected some of {', '.join(SOURCES)}: "
            f"pass a folder that mechedit wrote"
        )
    with locked(folder / "report.html", f"the report in {str(folder)!r}", wait=True):
        return _write_report(folder, draw)


def _write_report(folder: Path, draw: Callable[[Path], object] | None) -> Path:
    sweep_run_folder(folder)
    # An edit holds its own checksums: it may be another one than the folder's step made.
    check_step(folder, "trace", "sweep", "evaluate")
    with as_written(folder, UndefinedError):
        results = read_results(folder)
        if draw:
            draw(folder)
        page = _template().render({**results, **read_files(folder)})
    with atomic(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


def read_results(folder: Path) -> dict[str, Any]:
    """What the template says of the results: one entry per section, None where its files are absent."""
    sections = {
        "trace": _if_present(folder / "effects.parquet", trace_section),
        "selection": _if_present(folder / "selection.json", selection_section),
        "moments": moments_section(sorted(folder.glob("moments/layer_*.safetensors"))),
        "edit": _if_present(folder / "edit.safetensors", edit_section),
        "evaluation": _if_present(folder / "summary.json", evaluation_section),
        "examples": _if_present(folder / "scores.json", examples_section),
    }
    steps = read_stamps(folder)
    card = model_card(sections, steps)
    return {
        **sections,
        "model": card,
        "reproduction": Reproduction.of(steps, sections, card),
        "steps": json.dumps(steps, indent=2, ensure_ascii=False) if steps else None,
        "version": VERSION,
    }


def read_files(folder: Path) -> dict[str, Any]:
    """What the template shows as it lies there: figures, and names, sizes and hashes of files."""
    return {
        "figures": {path.stem: inlined(path) for path in _visible(folder.glob("figures/*.png"))},
        "files": [
            {"name": path.name, "size": path.stat().st_size, "hash": file_hash(path)}
            for path in _visible(folder.iterdir())
            if path.suffix in (".parquet", ".json", ".safetensors") and path.is_file()
        ],
    }


def trace_section(path: Path) -> dict[str, Any]:
    """Effects at the papers' sites, and the fact whose heatmap is shown."""
    effects = read_table(path, ("fact", "layer", "position", "effect", "samples"))
    check_record(effects.attrs, TraceRecord, f"the attributes of {str(path)!r}", "trace again")
    if effects.empty:
        raise InputError(f"{str(path)!r} holds no effects, expected one row per restored cell: trace again")
    facts = path.parent / "facts.parquet"
    return {
        "facts": effects["fact"].nunique(),
        "samples": int(effects["samples"].iloc[0]),
        "noise_std": effects.attrs.get("noise_std"),
        "dropped": effects.attrs.get("dropped", []),
        "effects": site_effects(where(effects, metric="probability")),
        "fact": _fact_summary(
            clearest_fact(effects), read_table(facts, FACT_COLUMNS) if facts.is_file() else pd.DataFrame()
        ),
        "provenance": effects.attrs.get("provenance", {}),
        "seed": effects.attrs.get("config", {}).get("seed"),
    }


def _fact_summary(fact: str, facts: pd.DataFrame) -> dict[str, str]:
    """A fact's id, and its text and object when they are known."""
    rows = where(facts, id=fact) if "id" in facts else facts
    if rows.empty:
        return {"id": fact}
    row = rows.iloc[0]
    return {
        "id": fact,
        "text": str(row["prompt"]).replace("{}", str(row["subject"])),
        "object": str(row["object"]),
    }


def selection_section(path: Path) -> dict[str, Any]:
    """The content of selection.json, with the layers in words."""
    selection = read_selection_fields(path)
    alternatives = selection.get("alternatives") or {}
    return {
        **{
            "rule": None,
            "n_facts": None,
            "reason": None,
            "stability": None,
            "state": None,
            "candidates": [],
            "provenance": {},
            "evidence": [],
            "published": [],
            "metric": "probability",
        },
        **selection,
        "validation": {"by": None, "verdict": None, **(selection.get("validation") or {})},
        # Only probabilities are counted in percent.
        "scale": 100 if selection.get("metric", "probability") == "probability" else 1,
        "span": span(selection["layers"]),
        "alternatives": {rule: span(layers) for rule, layers in alternatives.items()},
    }


def span(layers: Sequence[int]) -> str:
    """Layers in words: `3–8`, `5`, `3, 8`, `none`."""
    if not layers:
        return "none"
    if len(layers) > 1 and list(layers) == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}–{layers[-1]}"
    return ", ".join(map(str, layers))


def moments_section(paths: Sequence[Path]) -> dict[str, Any] | None:
    """Layers of the second moments, with the text and the tokens that each was collected over."""
    if not paths:
        return None
    headers = [read_header(path, "provenance") for path in paths]
    for path, header in zip(paths, headers, strict=True):
        check_record(header, MomentRecord, f"the header of {str(path)!r}", "collect it again")
    headers.sort(key=lambda header: header["layer"])
    return {"layers": span([header["layer"] for header in headers]), "headers": headers}


def edit_section(path: Path) -> dict[str, Any]:
    """The edit's manifest."""
    manifest = read_header(path, "manifest")
    check_record(manifest, ManifestRecord, f"the manifest of {str(path)!r}", "make the edit again")
    return {
        **{
            "method": "?",
            "layers": [],
            "requests": [],
            "residuals": [],
            "unconverged": [],
            "probability": [],
            "settings": {},
            "settings_from": [],
            "warnings": [],
        },
        **manifest,
        "span": span(manifest.get("layers", [])),
        "size": path.stat().st_size,
    }


def evaluation_section(path: Path) -> dict[str, Any] | None:
    """The measures of each state, in the order of `MEASURES`; None when nothing was evaluated."""
    summary = read_summary_file(path)
    states = [state for state in ("before", "after", "now") if summary.get(state)]
    explained = {name: measure for name, measure in MEASURES.items() if measure.meaning}
    measures = [measure for name, measure in explained.items() if any(name in summary[state] for state in states)]
    if not measures:
        return None
    return {
        "states": states,
        "has_perplexity": any(measure.name == "PPL" for measure in measures),
        "rows": [
            {"measure": measure, "entries": [summary[state].get(measure.name) for state in states]}
            for measure in measures
        ],
        "headline": [
            {"title": MEASURES[name].heading, "entries": [summary[state].get(name) for state in states]}
            for name in ("ES", "PS", "NS", "S")
            if name in summary[states[-1]]
        ],
        "efficacy": [summary[state].get("ES") for state in states],
    }


def examples_section(path: Path) -> dict[str, Any] | None:
    """Texts that the model wrote, the states side by side, for the first cases; and the settings of the evaluation."""
    scores = Scores.load(path.parent)
    keys = ["case", "kind", "prompt", "question", "expected"]
    wide = scores.answers.pivot(index=keys, columns="state", values="answer").reset_index().fillna("")
    index = {case: i for i, case in enumerate(scores.cases)}
    wide = wide.assign(index=[index[case] for case in wide["case"]])
    wide = wide.sort_values(["index", "prompt"], kind="stable")
    answers = where(wide, kind="rewrite").head(EXAMPLES).to_dict("records")
    texts = where(wide, kind="generation").drop_duplicates("case").head(3).to_dict("records")
    missing = {name: count["missing"] for name, count in scores.counts.items() if count["cases"] and count["missing"]}
    return {
        "states": list(scores.states),
        "answers": answers,
        "texts": texts,
        "cases": len(scores.cases),
        "missing": missing,
        "config": scores.config,
        "provenance": next(iter(scores.provenance.values()), {}),
    }


def model_card(sections: Mapping[str, Any], steps: Mapping[str, Any]) -> dict[str, Any]:
    """The model that was measured: the first provenance among the results."""
    provenances = [(sections[name] or {}).get("provenance") for name in ("trace", "selection", "examples")]
    provenances += [(sections["edit"] or {}).get("model"), *(step.get("model") for step in steps.values())]
    card = next((provenance for provenance in provenances if provenance), {})
    check_record(card, ModelRecord, "the provenance of the model in these results", "make them again")
    settings = [step.get("settings", {}) for step in steps.values()]
    return {
        **{
            "model": "the model",
            "weights_hash": None,
            "tokenizer_hash": None,
            "dtype": None,
            "backend": None,
        },
        **card,
        "seed": next((setting["seed"] for setting in settings if "seed" in setting), None),
    }


def inlined(path: Path) -> str:
    """A PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def number(value: float | None, digits: int = 1) -> str:
    """A number for readers: fixed decimals, a true minus sign, a dash where there is none."""
    if value is None or not np.isfinite(value):
        return "–"
    text = f"{value:.{digits}f}"
    return text.replace("-", "−") if float(text) else text.lstrip("-")


def _visible(paths: Iterable[Path]) -> list[Path]:
    """The files among these, in order, without hidden ones: those are not finished."""
    return sorted(path for path in paths if path.is_file() and not path.name.startswith("."))


def _if_present(path: Path, section: Any) -> Any:
    if not path.is_file():
        return None
    with as_written(path, UndefinedError):
        return section(path)


@functools.cache
def _template() -> Any:
    # Facts and prompts are arbitrary text, so every value is escaped.
    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "span": span, "median": statistics.median}
    return environment.get_template("report.html")
