"""Edits of the papers' scripts, each made and scored once, and the files that a script leaves.

All scripts may be given the same `--out`: what one has collected (trace, selection, second moments, targets) the next
finds there, and each leaves `NAME.parquet` (tidy), `NAME.csv` (as the paper prints it), `NAME.pdf` and `NAME.png`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import pandas as pd
from matplotlib.figure import Figure

from analyses.common.csv_files import write_csv
from analyses.common.inputs import Inputs
from analyses.common.printing import score_frame
from analyses.common.variants import EVERYWHERE, SINGLE, Variant
from mechedit import pipeline
from mechedit.cache import PARQUET
from mechedit.cli.parsing import parse_names, require_layers
from mechedit.data import EditRequest
from mechedit.edit import Edit, edited
from mechedit.errors import InputError
from mechedit.evaluation import (
    PERCENT,
    QUICK,
    Baseline,
    EvaluationConfig,
    References,
    Scores,
    evaluate,
    measure_baseline,
)
from mechedit.figures import save_figure
from mechedit.files import write_parquet
from mechedit.methods import METHODS, MethodConfig, SearchConfig
from mechedit.provenance import numbered, value_hash
from mechedit.targets import find_targets

MIDDLE = "@middle"
"""Stands for the middle one of the experiment's layers."""
LEFT = "left"
"""What stands in place of a measure where a row tells how much of the residual an edit left, in percent."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment(Inputs):
    """One script's edits, scores and files. Scores and edits are cached in the folder, for all scripts."""

    @property
    def evaluation(self) -> EvaluationConfig:
        """How to measure, without free text."""
        return dataclasses.replace(QUICK, likelihood=self.arguments.likelihood)

    def variants(self, texts: Sequence[str]) -> list[Variant]:
        """Variants as `Variant.parse` reads them, on the experiment's layers; `emmet@middle` takes the middle one.

        Where its text names none, a method that writes into one layer takes the one published for it and the model,
        else the middle one (the lower of two), and KN takes all layers of the model.

        Raises:
            InputError: no methods, or the same twice; layers or settings that there are not; and as `Variant.parse`.
        """
        names = [text.strip() for text in texts if text.strip()]
        if not names:
            raise InputError("the methods are none, expected some, each once; see --methods")
        for name in names:
            self.check_variant(name.replace(MIDDLE, ""))
        middle = self.layers[(len(self.layers) - 1) // 2]
        variants = []
        for text in (name.replace(MIDDLE, f"@{middle}") for name in names):
            variant = Variant.parse(text, self.layers)
            variants.append(
                variant if "@" in text else dataclasses.replace(variant, layers=self._layers(variant.method))
            )
        if len({(variant.name, variant.layers) for variant in variants}) < len(variants):
            raise InputError(f"the methods are {', '.join(names)}, expected some, each once; see --methods")
        return variants

    def requested_variants(self, default: Callable[[], Sequence[str]]) -> list[Variant]:
        """The variants of `--methods`; without it the default ones.

        Raises:
            InputError: as `variants`.
        """
        text = self.arguments.methods
        return self.variants(default() if text is None else parse_names(text))

    def variant(self, text: str) -> Variant:
        """The one variant of a script, on the experiment's layers where its text names none.

        Raises:
            InputError: as `variants`.
        """
        self.check_variant(text)
        return Variant.parse(text, self.layers)

    def check_variant(self, text: str) -> None:
        """Refuse a variant whose layers or settings there are not, before layers are traced for it.

        Raises:
            InputError: as `variants`.
        """
        variant = Variant.parse(text, [])
        if variant.layers:
            require_layers(list(variant.layers), self.model.n_layers)
        self.config(variant)

    @property
    def methods(self) -> list[str]:
        """All methods, without MEND where the model has no editor of it."""
        return [name for name in METHODS if name != "mend" or self.recommended(name).layers]

    def _layers(self, method: str) -> tuple[int, ...]:
        """The layers of a method that names none.

        All, for one that looks everywhere; those of its editor, for MEND; for one that writes into one, that published
        for this model alone, else the middle one; else the experiment's.
        """
        if method in EVERYWHERE:
            return tuple(range(self.model.n_layers))
        if method == "mend":  # whose editor was trained for them
            return self.recommended(method).layers or tuple(self.layers)
        if method not in SINGLE:
            return tuple(self.layers)
        published = {entry.range.layers for entry in METHODS[method].published(self.model)}
        if len(published) == 1 and len(layers := published.pop()) == 1:
            return layers
        return (self.layers[(len(self.layers) - 1) // 2],)

    def config(self, variant: Variant) -> MethodConfig:
        """The settings tuned for the model or shipped with it, with the variant's changes."""
        changes = [f"{name}={value}" for name, value in variant.settings.items()]
        return self.recommended(variant.method, changes).config

    def edit(self, variant: Variant, requests: Sequence[EditRequest]) -> Edit:
        """Make one edit; its targets are cached in the folder, so that other edits may share them."""
        config = self.config(variant)
        moments = self.moments(variant.layers) if config.preserves_keys else {}
        method = METHODS[variant.method]
        return method(self.model, requests, variant.layers, moments, config=config, cache=self.out / "targets")

    def cached_edit(self, variant: Variant, requests: Sequence[EditRequest]) -> Edit:
        """As `edit`, with the edit cached in `edits/`."""
        key = {**self.key(requests), "variant": self.variant_key(variant)}
        return self.folder.cache("edits").get(
            numbered("edit", key), lambda: self.edit(variant, requests), pipeline.EDIT
        )

    def search(self, variant: Variant, requests: Sequence[EditRequest]) -> None:
        """Find the targets of many requests in one go, for edits of some of them: faster than a search for each.

        Requests about one subject that are edited together share their target; so those of this search should be
        about different subjects, or the edits find other ones.
        """
        config = self.config(variant)
        if isinstance(config, SearchConfig) and config.shares_targets:
            layer = config.target_layer(sorted(variant.layers))
            find_targets(self.model, requests, layer, config=config.targets, cache=self.out / "targets")

    def scored(
        self,
        variant: Variant | None,
        requests: Sequence[EditRequest],
        evaluation: EvaluationConfig | None = None,
        *,
        references: References | None = None,
        make: Callable[[], Edit] | None = None,
    ) -> pd.DataFrame:
        """Edit, score on these requests and take the edit back: `SCORE_COLUMNS`. Cached: made once for the same input.

        Every measure of `evaluate` is there, also those against the unedited model. A row `left` tells how much of the
        residual the edit left, in percent.

        Args:
            variant: the edit; None scores the unedited model.
            requests: to edit and to score on.
            evaluation: how to measure; by default success and exact match alone, with the likelihood of `--likelihood`.
            references: reference texts for RS.
            make: another way to make the edit of `self.edit`.
        """
        evaluation = evaluation or self.evaluation
        key = {
            **self.score_key(variant, requests, evaluation),
            "references": references.hash if references else None,
        }
        return self.cached("scores", key, lambda: self.score(variant, requests, evaluation, references, make))

    def score(
        self,
        variant: Variant | None,
        requests: Sequence[EditRequest],
        evaluation: EvaluationConfig,
        references: References | None,
        make: Callable[[], Edit] | None,
    ) -> pd.DataFrame:
        """As `scored`, without the cache."""
        scores, residual = self._measured(variant, requests, evaluation, references, make)
        frame = score_frame(scores.summary())
        if residual is None:
            return frame
        return pd.concat(
            [frame, pd.DataFrame([{"measure": LEFT, "mean": residual, "n": len(requests)}])], ignore_index=True
        )

    def score_rows(
        self,
        variant: Variant | None,
        requests: Sequence[EditRequest],
        evaluation: EvaluationConfig,
        references: References | None,
        make: Callable[[], Edit] | None,
    ) -> pd.DataFrame:
        """As `score`, but a row per prompt and measure, to be put together with those of other edits."""
        scores, residual = self._measured(variant, requests, evaluation, references, make)
        if residual is None:
            return scores.table
        row = {"case": "", "measure": LEFT, "kind": "", "prompt": 0, "value": residual, "state": "after"}
        return pd.concat([scores.table, pd.DataFrame([row])], ignore_index=True)

    def _measured(
        self,
        variant: Variant | None,
        requests: Sequence[EditRequest],
        evaluation: EvaluationConfig,
        references: References | None,
        make: Callable[[], Edit] | None,
    ) -> tuple[Scores, float | None]:
        """An edit's scores, and what it left of the residual in percent; None where nothing is spread."""
        baseline = self.baseline(requests, evaluation, references)
        if variant is None:
            return baseline.scores, None
        edit = make() if make else self.edit(variant, requests)
        with edited(self.model, edit):
            scores = evaluate(self.model, requests, evaluation, baseline=baseline, references=references)
        residuals = edit.manifest.get("residuals")
        return scores, 100 * residuals[-1]["after"] if residuals else None

    def baseline(
        self,
        requests: Sequence[EditRequest],
        evaluation: EvaluationConfig | None = None,
        references: References | None = None,
    ) -> Baseline:
        """The unedited model's answers. Only those to the last requests stay, so score all edits of one set in turn."""
        evaluation = evaluation or self.evaluation
        key = value_hash([self.key(requests), dataclasses.asdict(evaluation), references.hash if references else None])
        if key not in self._baselines:
            self._baselines.clear()
            self._baselines[key] = measure_baseline(self.model, requests, evaluation, references=references)
        return self._baselines[key]

    @cached_property
    def _baselines(self) -> dict[str, Baseline]:
        """The last baseline, by all that determines it."""
        return {}

    def cases(
        self, variant: Variant | None, requests: Sequence[EditRequest], evaluation: EvaluationConfig | None = None
    ) -> pd.DataFrame:
        """As `scored`, but each request's own values, averaged over its prompts: `case, measure, value`, in percent."""
        evaluation = evaluation or self.evaluation
        key = {**self.score_key(variant, requests, evaluation), "cases": True}
        return self.cached("cases", key, lambda: self.score_cases(variant, requests, evaluation))

    def score_cases(
        self, variant: Variant | None, requests: Sequence[EditRequest], evaluation: EvaluationConfig
    ) -> pd.DataFrame:
        """As `cases`, without the cache."""
        with edited(self.model, self.edit(variant, requests)) if variant else nullcontext():
            table = evaluate(self.model, requests, evaluation).table
        means = cast(pd.DataFrame, table.groupby(["case", "measure"], as_index=False)["value"].mean())
        return means.assign(value=means["value"] * PERCENT)

    def key(self, requests: Sequence[EditRequest]) -> dict[str, Any]:
        """The part of a cache key that every result has: model, requests and seed."""
        return {
            "model": self.model.identity().record,
            "requests": value_hash([request.plain() for request in requests]),
            "seed": self.seed,
        }

    def score_key(
        self, variant: Variant | None, requests: Sequence[EditRequest], evaluation: EvaluationConfig
    ) -> dict[str, Any]:
        """The cache key of an edit's scores."""
        return {
            **self.key(requests),
            "variant": None if variant is None else self.variant_key(variant),
            "evaluation": dataclasses.asdict(evaluation),
        }

    def variant_key(self, variant: Variant) -> dict[str, Any]:
        """The part of a cache key that describes an edit: method, layers, settings, moments."""
        moments = self.moments(variant.layers) if self.config(variant).preserves_keys else {}
        return {
            "method": variant.method,
            "layers": list(variant.layers),
            "settings": dataclasses.asdict(self.config(variant)),
            "moments": value_hash({layer: moment.provenance for layer, moment in moments.items()}),
        }

    def cached(self, what: str, key: Mapping[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A table read from the folder, or made and left there, so that an interrupted script goes on from it."""
        return self.folder.cache(f"{what}_parts").get(numbered("evaluate", key), make, PARQUET)

    def write(self, table: pd.DataFrame, paper_table: pd.DataFrame, figure: Figure | None = None) -> None:
        """Leave the tidy table, the table as the paper prints it, and the figure, and say where they are."""
        write_parquet(self.out / f"{self.name}.parquet", table)
        write_csv(paper_table, self.out / f"{self.name}.csv")
        if figure is not None:
            save_figure(figure, self.out, self.name)
        print(paper_table.to_string(index=False))
        print(f"wrote {self.out / self.name}.parquet, .csv{'' if figure is None else ', .pdf and .png'}")
