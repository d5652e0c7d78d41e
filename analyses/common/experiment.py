"""What the scripts of the papers' tables and figures share: inputs, edits that are scored once, and files.

All scripts may be given the same `--out`: what one has collected (trace, selection, second moments, targets) the next
finds there, and each leaves `NAME.parquet` (tidy), `NAME.csv` (as the paper prints it), `NAME.pdf` and `NAME.png`.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pandas as pd
from matplotlib.figure import Figure

from analyses.common.counterfacts import counterfacts
from analyses.common.printing import score_frame
from analyses.common.variants import SINGLE, Variant
from mechedit import pipeline
from mechedit.cache import PARQUET
from mechedit.cli.parsing import load_quietly, method_config, parse_layers, sampled
from mechedit.data import EditRequest, Fact, load_facts, load_requests
from mechedit.edit import Edit, edited
from mechedit.errors import InputError
from mechedit.evaluation import PERCENT, QUICK, Baseline, EvaluationConfig, References, evaluate, measure_baseline
from mechedit.figures import save_figure
from mechedit.files import atomic, write_parquet
from mechedit.methods import METHODS, MethodConfig, SearchConfig
from mechedit.models import Model
from mechedit.moments import MomentsConfig, SecondMoment
from mechedit.provenance import numbered, value_hash
from mechedit.selection import SelectConfig, Selection
from mechedit.targets import find_targets
from mechedit.trace import TraceConfig

QUICK_FACTS, QUICK_SAMPLES, QUICK_TOKENS = 20, 3, 20_000
"""What `--quick` traces and reads."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Experiment:
    """One script's inputs, and the edits, scores and files that it makes of them."""

    name: str
    """Of the script: that of its files."""
    given: argparse.Namespace
    """The command line."""

    @cached_property
    def model(self) -> Model:
        """As it is named, never left edited."""
        return load_quietly(self.given.model, self.given.backend, self.given.device, self.given.dtype)

    @property
    def out(self) -> Path:
        """Where everything goes."""
        return self.run.path

    @cached_property
    def run(self) -> pipeline.RunFolder:
        """The folder, with the stamps of steps that are finished."""
        return pipeline.RunFolder.at(self.given.out, overwrite=self.given.overwrite)

    @property
    def seed(self) -> int:
        """Of all that is drawn."""
        return self.given.seed

    @property
    def quick(self) -> bool:
        """Whether a first look is enough."""
        return self.given.quick

    @property
    def samples(self) -> int:
        """Noise draws a fact."""
        return QUICK_SAMPLES if self.quick else self.given.samples

    @cached_property
    def facts(self) -> list[Fact]:
        """The facts to trace, a seeded sample of those given."""
        return sampled(load_facts(self.given.facts), QUICK_FACTS if self.quick else self.given.max_facts, self.seed)

    @cached_property
    def requests(self) -> list[EditRequest]:
        """The first `--count` requests of the source; `known` makes them from the facts that ship."""
        source, count = self.given.requests, self.given.count
        found = counterfacts(load_facts("known"), seed=self.seed) if source == "known" else load_requests(source)
        if count is not None and not 1 <= count <= len(found):
            raise InputError(f"--count is {count}, expected 1 to {len(found)}, the requests of {source!r}")
        return found[:count]

    @cached_property
    def layers(self) -> list[int]:
        """Those of `--layers`; without them, what the trace of this model selects.

        Raises:
            InputError: the trace finds no early site.
        """
        if self.given.layers:
            return parse_layers(self.given.layers)
        self.trace()
        selection = self.select()
        if not selection.layers:
            raise InputError(f"no layers are selected: {selection.reason}; give them by --layers")
        return list(selection.layers)

    @cached_property
    def selecting(self) -> pipeline.RunFolder:
        """Where the trace that selects lies, apart from larger ones."""
        return pipeline.RunFolder.at(self.out / "selection", overwrite=self.given.overwrite)

    def trace(self) -> dict[str, Any]:
        """The trace that selection needs, of the subject's last token, in `selection/`: made once for all scripts."""
        config = TraceConfig(
            kinds=("state", "mlp"), sever=("nothing", "mlp", "attn"), roles=("subject_last",),
            samples=self.samples, seed=self.seed,
        )  # fmt: skip
        return pipeline.trace_step(self.selecting, self.model, self.facts, config)

    def select(self) -> Selection:
        """The selection from that trace, in `selection/selection.json`."""
        return pipeline.select_step(self.selecting, SelectConfig(seed=self.seed))

    def moments(self, layers: Sequence[int], module: str = "mlp") -> dict[int, SecondMoment]:
        """E[k kᵀ] of these layers; what an earlier script collected is read from the folder (or its own)."""
        found = self._moments.setdefault(module, {})
        if missing := sorted(set(layers) - set(found)):
            reading = MomentsConfig(tokens=QUICK_TOKENS if self.quick else self.given.tokens)
            run = (
                self.run if module == "mlp" else pipeline.RunFolder.at(self.out / module, overwrite=self.run.overwrite)
            )
            found.update(pipeline.moments_step(run, self.model.writing(module), self.given.texts, missing, reading))
        return {layer: found[layer] for layer in layers}

    @cached_property
    def _moments(self) -> dict[str, dict[int, SecondMoment]]:
        """Those that this run has read, by module and layer."""
        return {}

    def variants(self, texts: Sequence[str]) -> list[Variant]:
        """What `Variant.parse` reads, on the layers of this experiment; `emmet@middle` means the middle one of them.

        A method that writes into one layer takes the middle one (the lower of two) where its text names none.

        Raises:
            InputError: no methods, or the same twice; and as `Variant.parse`.
        """
        middle = self.layers[(len(self.layers) - 1) // 2]
        found = []
        for text in filter(None, (text.strip().replace("@middle", f"@{middle}") for text in texts)):
            variant = Variant.parse(text, self.layers)
            single = variant.method in SINGLE and "@" not in text
            found.append(dataclasses.replace(variant, layers=(middle,)) if single else variant)
        if not found or len({(variant.name, variant.layers) for variant in found}) < len(found):
            raise InputError(f"the methods are {', '.join(texts) or 'none'}, expected some, each once; see --methods")
        return found

    def config(self, variant: Variant) -> MethodConfig:
        """The settings that ship with the model, with the variant's changes."""
        changes = [f"{name}={value}" for name, value in variant.settings.items()]
        return method_config(variant.method, self.model, self.seed, changes)

    def edit(self, variant: Variant, requests: Sequence[EditRequest]) -> Edit:
        """Make one edit; targets that were found are kept in the folder, so that other edits may share them."""
        config = self.config(variant)
        moments = self.moments(variant.layers) if config.preserves_keys else {}
        method = METHODS[variant.method]
        return method(self.model, requests, variant.layers, moments, config=config, cache=self.out / "targets")

    def kept_edit(self, variant: Variant, requests: Sequence[EditRequest]) -> Edit:
        """As `edit`; what was made is left in `edits/` and found there again."""
        key = {**self.key(requests), "variant": self.variant_key(variant)}
        return self.run.cache("edits").get(numbered("edit", key), lambda: self.edit(variant, requests), pipeline.EDIT)

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
        evaluation: EvaluationConfig = QUICK,
        *,
        references: References | None = None,
        make: Callable[[], Edit] | None = None,
    ) -> pd.DataFrame:
        """Edit, score on these requests and take the edit back: `SCORE_COLUMNS`. Kept: made once for the same input.

        All that `evaluate` measures is there, also against the unedited model. A row `left` tells how much of the
        residual the edit left, in percent.

        Args:
            variant: the edit; None scores the unedited model.
            requests: to edit and to score on.
            evaluation: how to measure.
            references: for RS.
            make: another way to the edit that `self.edit` would make.
        """
        key = {
            **self.score_key(variant, requests, evaluation),
            "references": references.hash if references else None,
        }
        return self.kept("scores", key, lambda: self._score(variant, requests, evaluation, references, make))

    def _score(
        self,
        variant: Variant | None,
        requests: Sequence[EditRequest],
        evaluation: EvaluationConfig,
        references: References | None,
        make: Callable[[], Edit] | None,
    ) -> pd.DataFrame:
        baseline = self.baseline(requests, evaluation, references)
        if variant is None:
            return score_frame(baseline.scores.summary())
        edit = make() if make else self.edit(variant, requests)
        with edited(self.model, edit):
            scores = evaluate(self.model, requests, evaluation, baseline=baseline, references=references)
        found = score_frame(scores.summary())
        residuals = edit.manifest.get("residuals")
        if not residuals:
            return found
        left = {"measure": "left", "mean": 100 * residuals[-1]["after"], "n": len(requests)}
        return pd.concat([found, pd.DataFrame([left])], ignore_index=True)

    def baseline(
        self,
        requests: Sequence[EditRequest],
        evaluation: EvaluationConfig = QUICK,
        references: References | None = None,
    ) -> Baseline:
        """The unedited model's answers; those to the last requests stay, so ask for all edits of one set in turn."""
        key = value_hash([self.key(requests), dataclasses.asdict(evaluation), references.hash if references else None])
        if key not in self._baselines:
            self._baselines.clear()
            self._baselines[key] = measure_baseline(self.model, requests, evaluation, references=references)
        return self._baselines[key]

    @cached_property
    def _baselines(self) -> dict[str, Baseline]:
        """The last one, by all that determines it."""
        return {}

    def cases(
        self, variant: Variant | None, requests: Sequence[EditRequest], evaluation: EvaluationConfig = QUICK
    ) -> pd.DataFrame:
        """As `scored`, but each request's own values, meaned over its prompts: `case, measure, value`, in percent."""
        key = {**self.score_key(variant, requests, evaluation), "cases": True}
        return self.kept("cases", key, lambda: self._cases(variant, requests, evaluation))

    def _cases(
        self, variant: Variant | None, requests: Sequence[EditRequest], evaluation: EvaluationConfig
    ) -> pd.DataFrame:
        with edited(self.model, self.edit(variant, requests)) if variant else nullcontext():
            table = evaluate(self.model, requests, evaluation).table
        means = cast(pd.DataFrame, table.groupby(["case", "measure"], as_index=False)["value"].mean())
        return means.assign(value=means["value"] * PERCENT)

    def key(self, requests: Sequence[EditRequest]) -> dict[str, Any]:
        """What every result depends on: model, requests and seed."""
        return {
            "model": self.model.identity().record,
            "requests": value_hash([dataclasses.asdict(request) for request in requests]),
            "seed": self.seed,
        }

    def score_key(
        self, variant: Variant | None, requests: Sequence[EditRequest], evaluation: EvaluationConfig
    ) -> dict[str, Any]:
        """What the scores of an edit depend on."""
        return {
            **self.key(requests),
            "variant": None if variant is None else self.variant_key(variant),
            "evaluation": dataclasses.asdict(evaluation),
        }

    def variant_key(self, variant: Variant) -> dict[str, Any]:
        """What an edit depends on besides."""
        found = self.moments(variant.layers) if self.config(variant).preserves_keys else {}
        moments = {layer: moment.provenance for layer, moment in found.items()}
        return {
            "method": variant.method,
            "layers": list(variant.layers),
            "settings": dataclasses.asdict(self.config(variant)),
            "moments": value_hash(moments),
        }

    def kept(self, what: str, key: Mapping[str, Any], make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A table that an interrupted script finds again: read from the folder, or made and left there."""
        return self.run.cache(f"{what}_parts").get(numbered("evaluate", key), make, PARQUET)

    def write(self, table: pd.DataFrame, printed: pd.DataFrame, figure: Figure | None = None) -> None:
        """Leave the tidy table, the table as the paper prints it, and the figure, and say where they are."""
        write_parquet(self.out / f"{self.name}.parquet", table)
        with atomic(self.out / f"{self.name}.csv") as temporary:
            printed.to_csv(temporary, index=False)
        if figure is not None:
            save_figure(figure, self.out, self.name)
        print(printed.to_string(index=False))
        print(f"wrote {self.out / self.name}.parquet, .csv{'' if figure is None else ', .pdf and .png'}")
