"""Every editing method, and every way to share out MEMIT's residual, on the same requests of the tiny model.

    python analyses/compare_methods.py --out DIR [--quick]

Writes DIR/methods.csv and DIR/methods.md: one row a method, with ES, PS, NS and S (percent, MEMIT Appendix C), the
share of the residual that is left at the end, and seconds for search and writing. Run again, it goes on where it
stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from mechedit.artifacts import atomic, kept, value_hash
from mechedit.cli.inputs import load
from mechedit.edit import Edit, edited
from mechedit.evaluation import evaluate
from mechedit.facts import EditRequest, load_requests
from mechedit.methods import METHODS, MethodConfig, recommended
from mechedit.models import Model
from mechedit.moments import MomentsConfig, SecondMoment, collect_moments
from mechedit.pipeline import identity
from mechedit.sweep.measure import QUICK

RANGE = [1, 2, 3, 4]
"""What the trace selects on the tiny model."""
SINGLE = [2]
"""For methods that edit one layer: of the range, the one at which ROME scores best."""
MEASURES = ("ES", "PS", "NS", "S")


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table."""

    method: str
    layers: Sequence[int]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Changes of what ships with the model."""

    @property
    def name(self) -> str:
        """The method and what is changed."""
        return ", ".join([self.method, *(f"{name} {value}" for name, value in self.settings.items())])

    def config(self, model: Model) -> MethodConfig:
        """The method's settings for this model."""
        return replace(recommended(self.method, model), **self.settings)


VARIANTS = (
    *(
        Variant(method="memit", layers=RANGE, settings={"strategy": strategy})
        for strategy in ("uniform", "sqrt", "forward-replay", "last")
    ),
    Variant(method="pmet", layers=RANGE),
    Variant(method="alphaedit", layers=RANGE),
    Variant(method="alphaedit", layers=RANGE, settings={"strategy": "forward-replay"}),
    Variant(method="emmet", layers=SINGLE),
    Variant(method="emmet", layers=RANGE),
    Variant(method="rome", layers=SINGLE),
    Variant(method="rome", layers=SINGLE, settings={"keys": "published"}),
)


def main() -> None:
    """Measure every variant and write the table."""
    given = arguments()
    model = load("tiny", given.backend, None, None)
    requests = load_requests("tiny")[: 10 if given.quick else None]
    reading = MomentsConfig(tokens=20_000 if given.quick else None)
    moments = collect_moments(model, "tiny", RANGE, reading, given.out)
    rows = [measured(model, requests, moments, None, given.out)]
    rows += [measured(model, requests, moments, variant, given.out) for variant in VARIANTS]
    table = pd.concat(rows, ignore_index=True)
    with atomic(given.out / "methods.csv") as temporary:
        table.to_csv(temporary, index=False)
    with atomic(given.out / "methods.md") as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")
    print(markdown(table))
    print(f"wrote {given.out / 'methods.csv'} and {given.out / 'methods.md'}")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the table, and for what is finished")
    parser.add_argument("--quick", action="store_true", help="10 requests in place of all, moments over less text")
    parser.add_argument("--backend", default="transformer_lens")
    return parser.parse_args()


def measured(
    model: Model,
    requests: Sequence[EditRequest],
    moments: Mapping[int, SecondMoment],
    variant: Variant | None,
    out: Path,
) -> pd.DataFrame:
    """One row, kept in `out` once it is finished; without a variant, that of the unedited model."""
    key = {
        "model": identity(model),
        "requests": value_hash(list(requests)),
        "moments": value_hash({layer: moment.provenance for layer, moment in moments.items()}),
        "variant": None if variant is None else {**asdict(variant), "settings": asdict(variant.config(model))},
        "evaluation": asdict(QUICK),
    }
    return kept(out / "methods_parts", key, partial(row, model, requests, moments, variant))


def row(
    model: Model,
    requests: Sequence[EditRequest],
    moments: Mapping[int, SecondMoment],
    variant: Variant | None,
) -> pd.DataFrame:
    """Edit, score, and take the edit back."""
    if variant is None:
        scores = evaluate(model, requests, QUICK, state="before").summary("before")
        return frame("(unedited)", "", scores, None, 0.0)
    start = time.perf_counter()
    edit = METHODS[variant.method](model, requests, variant.layers, moments, config=variant.config(model))
    seconds = time.perf_counter() - start
    with edited(model, edit):
        scores = evaluate(model, requests, QUICK, state="after").summary("after")
    layers = ", ".join(map(str, edit.layers))
    return frame(variant.name, layers, scores, edit, seconds)


def frame(
    name: str, layers: str, scores: Mapping[str, Mapping[str, float]], edit: Edit | None, seconds: float
) -> pd.DataFrame:
    """`method, layers, ES, PS, NS, S, left, unconverged, seconds`."""
    return pd.DataFrame(
        [
            {
                "method": name,
                "layers": layers,
                **{measure: scores[measure]["mean"] for measure in MEASURES},
                "left": None if edit is None else 100 * edit.manifest["residuals"][-1]["after"],
                "unconverged": None if edit is None else len(edit.manifest["unconverged"]),
                "seconds": seconds,
            }
        ]
    )


def markdown(table: pd.DataFrame) -> str:
    """The table as it stands in analyses/README.md."""
    lines = ["| method | layers | ES | PS | NS | S | left, % | seconds |", "|---|---|---|---|---|---|---|---|"]
    for found in table.to_dict("records"):
        scores = " | ".join(f"{found[measure]:.1f}" for measure in MEASURES)
        left = "" if pd.isna(found["left"]) else f"{found['left']:.1f}"
        lines.append(f"| {found['method']} | {found['layers']} | {scores} | {left} | {found['seconds']:.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
