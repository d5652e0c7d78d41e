"""The inputs of the papers' scripts: model, facts, requests, layers and second moments, as the command line gives them.

Scripts with the same `--out` share the trace that selects layers and the second moments.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from analyses.common.checks import check_options
from analyses.common.counterfacts import counterfacts
from mechedit import pipeline
from mechedit.cli import parse_layers
from mechedit.cli.parsing import load_quietly, method_settings, require_layers, sampled
from mechedit.data import EditRequest, Fact, load_facts, load_requests
from mechedit.errors import InputError
from mechedit.methods import MethodConfig, Recommendation
from mechedit.models import Model
from mechedit.moments import MomentsConfig, SecondMoment
from mechedit.run_folder import RunFolder
from mechedit.selection import SelectConfig, Selection
from mechedit.trace import TraceConfig

QUICK_FACTS, QUICK_SAMPLES, QUICK_TOKENS = 20, 3, 20_000
"""Facts, noise samples and tokens of text with `--quick`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Inputs:
    """One script's command line, and what it stands for; each input is loaded or made at its first use."""

    name: str
    """Name of the script and of its files."""
    arguments: argparse.Namespace
    """The command line."""

    @cached_property
    def model(self) -> Model:
        """The model of `--model`; it is never left edited.

        Raises:
            InputError: it lacks a layer of `--layers`.
        """
        options, layers = self.arguments, self.requested_layers
        model = load_quietly(
            options.model, options.backend, options.device, options.dtype, allow_pickle=options.allow_pickle
        )
        if layers is not None:
            require_layers(layers, model.n_layers)
        return model

    @property
    def requested_layers(self) -> list[int] | None:
        """The layers of `--layers`; None without it."""
        text = self.arguments.layers
        return None if text is None else parse_layers(text)

    def check(self) -> None:
        """Refuse options before anything is loaded.

        Raises:
            InputError: a number that the option does not take, or layers that cannot be read.
        """
        check_options(self.arguments)
        _ = self.reading, self.requested_layers

    @property
    def out(self) -> Path:
        """Folder for all files."""
        return self.folder.path

    @cached_property
    def folder(self) -> RunFolder:
        """The same folder with the stamps of finished steps."""
        return RunFolder.at(self.arguments.out, overwrite=self.arguments.overwrite)

    @property
    def seed(self) -> int:
        """Seed of everything that is drawn at random."""
        return self.arguments.seed

    @property
    def quick(self) -> bool:
        """Whether `--quick` asks for a first look only."""
        return self.arguments.quick

    @property
    def samples(self) -> int:
        """Noise samples per fact."""
        return QUICK_SAMPLES if self.quick else self.arguments.samples

    @cached_property
    def facts(self) -> list[Fact]:
        """The facts to trace, a seeded sample of those given."""
        return sampled(
            load_facts(self.arguments.facts), QUICK_FACTS if self.quick else self.arguments.max_facts, self.seed
        )

    @cached_property
    def requests(self) -> list[EditRequest]:
        """The first `--count` requests of the source, without those that contradict an earlier one.

        `known` makes them from the facts that ship.
        """
        source, count = self.arguments.requests, self.arguments.count
        requests = (
            counterfacts(load_facts("known"), seed=self.seed)
            if source == "known"
            else load_requests(source, conflicts="first")
        )
        if count is not None and not 1 <= count <= len(requests):
            raise InputError(f"--count is {count}, expected 1 to {len(requests)}, the requests of {source!r}")
        return requests[:count]

    @cached_property
    def layers(self) -> list[int]:
        """The layers of `--layers`; without it, those tuned for MEMIT, else those that the trace of this model selects.

        Raises:
            InputError: the trace finds no early site.
        """
        if (layers := self.requested_layers) is not None:
            return layers
        if (tuned := self.recommended("memit").layers) is not None:
            return list(tuned)
        self.trace()
        selection = self.select()
        if not selection.layers:
            raise InputError(f"no layers are selected: {selection.reason}; give them by --layers")
        return list(selection.layers)

    @cached_property
    def selection_folder(self) -> RunFolder:
        """Folder of the trace that selects layers, apart from larger traces."""
        return RunFolder.at(self.out / "selection", overwrite=self.arguments.overwrite)

    def recommended(self, method: str, changes: Sequence[str] = ()) -> Recommendation[MethodConfig]:
        """The settings of a method for the model, and where they come from; a tuned.json is named at its first use.

        Args:
            method: name of the method.
            changes: name=value of settings in place of those.
        """
        tuned = not getattr(self.arguments, "no_tuned", False)
        settings = method_settings(method, self.model, self.seed, list(changes), tuned=tuned)
        for source in settings.sources:
            if source.name == "tuned.json" and source.hash not in self._named:
                self._named.add(source.hash)
                print(f"settings of {method}: {source.in_words()}")
        return settings

    @cached_property
    def _named(self) -> set[str]:
        """Hashes of the tuned settings that were named."""
        return set()

    def trace(self) -> dict[str, Any]:
        """Trace the subject's last token for the selection, in `selection/`; made once for all scripts."""
        config = TraceConfig(
            kinds=("state", "mlp"), sever=("nothing", "mlp", "attn"), roles=("subject_last",),
            samples=self.samples, seed=self.seed,
        )  # fmt: skip
        return pipeline.trace_step(self.selection_folder, self.model, self.facts, config)

    def select(self) -> Selection:
        """The selection from that trace, in `selection/selection.json`."""
        return pipeline.select_step(self.selection_folder, SelectConfig(seed=self.seed))

    @property
    def reading(self) -> MomentsConfig:
        """How the running text is read for second moments."""
        options = self.arguments
        tokens = QUICK_TOKENS if self.quick else options.tokens
        return MomentsConfig(
            tokens=tokens or None, documents=options.documents, seed=self.seed, max_length=options.max_length
        )

    def moments(self, layers: Sequence[int], module: str = "mlp") -> dict[int, SecondMoment]:
        """E[k kᵀ] of these layers, collected once for all scripts; that of attention's keys in `attn/`."""
        moments = self._moments.setdefault(module, {})
        if missing := sorted(set(layers) - set(moments)):
            path = self.out if module == "mlp" else self.out / module
            folder = RunFolder.at(path, overwrite=self.folder.overwrite)
            moments.update(
                pipeline.moments_step(folder, self.model.writing(module), self.arguments.texts, missing, self.reading)
            )
        return {layer: moments[layer] for layer in layers}

    @cached_property
    def _moments(self) -> dict[str, dict[int, SecondMoment]]:
        """The moments that this process has read, by module and layer."""
        return {}
