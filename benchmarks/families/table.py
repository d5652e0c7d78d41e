"""The results of `benchmarks.families` as a page of the documentation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "reference" / "models.md"
Results = Mapping[str, list[dict[str, Any]]]
"""Outcomes by model type, one a backend."""
_NAMES = {"transformer_lens": "TransformerLens", "nnsight": "nnsight"}
_MEANINGS = {
    "mixture of experts": "traced and severed; each token passes some of many MLPs, so no single matrix can be written",
    "no matrix of its own": "traced and severed; no single matrix stands between the MLP's key and its output",
    "no TransformerLens adapter": "TransformerLens 4.3 has no adapter for the architecture; nnsight needs none",
    "TransformerLens differs": "TransformerLens cannot wrap the architecture, has no hook point there, or computes "
    "other logits than the model",
    "norm on the residual stream": "blocks norm the sum, as BERT's and BART's do, so nothing adds up to a stream",
    "several residual streams": "blocks pass on several streams side by side",
    "blocks that do not add up": "blocks rescale the stream, run more than once, or add something else besides",
    "no MLP of its own": "blocks without an MLP beside what mixes positions, as in a pure state-space model",
    "state handed between blocks": "blocks hand on more than the residual, such as keys that later blocks reuse",
    "not causal": "a position sees later ones",
    "does not run on text alone": "the model's forward needs more than ids and a mask",
    "failed self-check": "the measured parts do not pass the check at load",
    "not saved whole by transformers": "save_pretrained and from_pretrained alone change weights of the small model",
    "a package is absent": "transformers needs another package to build the model",
    "no small model": "no small random model of the type could be built from its config",
    "quantized": "quantized weights cannot be edited in place",
}


def read_results(path: Path = RESULTS) -> Results:
    """Outcomes by model type, as they are on disk; none when there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write_results(results: Results, path: Path = RESULTS) -> None:
    """Write outcomes by model type, in the order of their names."""
    ordered = {name: results[name] for name in sorted(results)}
    path.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n")


def editable_types(results: Results) -> list[str]:
    """Model types that some backend can take through all steps."""
    return [name for name, outcomes in results.items() if any(outcome["edited"] for outcome in outcomes)]


def traceable_types(results: Results) -> list[str]:
    """Model types that some backend can trace and sever."""
    return [name for name, outcomes in results.items() if any(outcome["severed"] for outcome in outcomes)]


def page(results: Results) -> str:
    """The page."""
    editable, traceable = editable_types(results), traceable_types(results)
    both = [name for name in editable if all(outcome["edited"] for outcome in results[name])]
    categories = Counter(outcome["category"] for outcomes in results.values() for outcome in outcomes)
    meanings = "\n".join(f"{name}\n: {_MEANINGS[name]}.\n" for name in _MEANINGS if categories[name])
    rows = "\n".join(_row(name, results[name]) for name in sorted(results))
    return f"""# Models

Of the {len(results)} model types (`config.model_type`) for which transformers has a causal language model,
**{len(editable)} can be edited** ({len(both)} by both backends, the others by nnsight alone), and
{len(traceable) - len(editable)} more can be traced and severed, but not edited.

For each type, a small random model is made from its config. It is loaded, which finds and checks its parts; one fact is
traced, whole and with MLPs and attention severed; another is written by MEMIT, undone bit for bit, exported, and
reloaded by transformers with the edited model's logits. Each step must also move something: the restored states, the
severings and the edit change the numbers. `make families` runs all types again and writes this page.

In hybrid stacks, whose blocks have attention only in part, `attn` stands for what mixes positions in a block:
attention, or a convolution, a linear attention or a state space. Severing `attn` holds that one's output, so nothing
moves between positions.

Where a type cannot do all of it, the table says why:

{meanings}
| type | edited by | traced and severed by | why not |
|---|---|---|---|
{rows}
"""


def write_page(results: Results, path: Path = PAGE) -> Path:
    """Write the page and return where it is."""
    path.write_text(page(results))
    return path


def _row(name: str, outcomes: list[dict[str, Any]]) -> str:
    edited, severed = (_backends(outcomes, step) for step in ("edited", "severed"))
    reasons = dict.fromkeys(
        outcome["category"]
        if len({entry["category"] for entry in outcomes}) == 1
        else f"{_NAMES[outcome['backend']]}: {outcome['category']}"
        for outcome in outcomes
        if outcome["category"]
    )
    return f"| `{name}` | {edited} | {severed} | {'; '.join(reasons)} |"


def _backends(outcomes: list[dict[str, Any]], step: str) -> str:
    names = [_NAMES[outcome["backend"]] for outcome in outcomes if outcome[step]]
    return "both" if len(names) == len(outcomes) > 1 else ", ".join(names)
