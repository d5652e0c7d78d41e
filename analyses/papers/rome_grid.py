"""ROME Fig. 5: editing at every layer, at each of four tokens, each record alone.

    python -m analyses.papers.rome_grid [--model tiny] [--requests tiny] [--count 20] [--tokens-at subject_last,last]

For every layer and token ROME writes each record there, from the unedited model, and the record is scored. The paper
finds the best edits at the subject's last token in middle layers, with generalization highest at the 18th of GPT-2 XL's
48. Away from the layers that hold facts second moments may be singular: `--damping` times the mean of its diagonal is
added to the diagonal of each. Records whose prompt lacks a token (such as one after a subject at its end) are left out
of that token's row, which says how many it has. Writes, with 95 % intervals over records:

- `rome_grid.parquet`: token, layer, measure, mean, low, high, n (records);
- `rome_grid.csv`: one row per token and layer, EM, PM, NM and S;
- `rome_grid.pdf`, `.png`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from analyses.common.alone import scored_alone
from analyses.common.command import open_experiment, options, run_script
from analyses.common.experiment import Experiment
from analyses.common.frames import groups_of
from analyses.common.printing import format_scores
from analyses.common.variants import Variant
from mechedit.cli import parse_names
from mechedit.data import EditRequest
from mechedit.errors import InputError
from mechedit.figures import scores_figure
from mechedit.prefixes import prefixed_prompts
from mechedit.prompt_tokens import TOKENS, check_token

MEASURES = ("EM", "PM", "NM", "S")
LABELS = {
    "subject_first": "first subject token",
    "subject_last": "last subject token",
    "after": "first token after",
    "last": "last token",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Edit at every layer and token, score, draw, write."""
    parser = options(__doc__, count=20, quick_count=2)
    parser.set_defaults(requests="tiny")
    parser.add_argument("--tokens-at", default=",".join(TOKENS), help=f"(default {','.join(TOKENS)})")
    parser.add_argument("--damping", type=float, default=1e-6, help="see above (default 1e-6)")
    experiment = open_experiment("rome_grid", parser, arguments)
    tokens = parse_names(experiment.arguments.tokens_at)
    for token in tokens:
        check_token(token, "a token of --tokens-at")
    layers = experiment.requested_layers or range(experiment.model.n_layers)
    table = pd.concat([scored(experiment, token, layers) for token in tokens], ignore_index=True)
    experiment.write(table, format_table(table), grid_figure(table))


def scored(experiment: Experiment, token: str, layers: Sequence[int]) -> pd.DataFrame:
    """`token, layer, measure, mean, low, high, n` of ROME's edits at one token.

    Raises:
        InputError: no record's prompt has the token.
    """
    requests = [request for request in experiment.requests if has_token(experiment, request, token)]
    if not requests:
        raise InputError(f"none of the {len(experiment.requests)} prompts has a token {token!r}; choose another")
    if len(requests) < len(experiment.requests):
        print(f"{token}: {len(experiment.requests) - len(requests)} records have no such token, and are left out")
    frames, settings = [], {"token": token, "damping": f"{experiment.arguments.damping:g}"}
    for layer in tqdm(layers, desc=token, unit="layer"):
        variant = Variant(method="rome", layers=(layer,), settings=settings)
        frames.append(scored_alone(experiment, variant, requests, "counterfact").assign(token=token, layer=layer))
    return pd.concat(frames, ignore_index=True).loc[:, ["token", "layer", "measure", "mean", "low", "high", "n"]]


def has_token(experiment: Experiment, request: EditRequest, token: str) -> bool:
    """Whether the prompt has the token."""
    (prompt,) = prefixed_prompts(experiment.model, request, ["{}"])
    try:
        prompt.position(token)
    except InputError:
        return False
    return True


def format_table(table: pd.DataFrame) -> pd.DataFrame:
    """One row per token and layer: each measure with half its interval."""
    rows = []
    for (token, layer), scores in groups_of(table, ["token", "layer"]):
        most = int(np.max(scores["n"].to_numpy(dtype=float)))
        rows.append({"token": token, "layer": layer, "records": most, **format_scores(scores, MEASURES)})
    return pd.DataFrame(rows)


def grid_figure(table: pd.DataFrame) -> Figure:
    """A panel per measure, a line per token, against the layer."""
    shown = table.assign(method=[LABELS.get(token, token) for token in table["token"]])
    return scores_figure(shown, MEASURES, x="layer", label="layer")


if __name__ == "__main__":
    run_script(main)
