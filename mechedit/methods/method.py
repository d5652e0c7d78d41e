"""A `Method`: a name, its settings and its algorithm, called alike for MEMIT and for every rival and baseline.

A new method is a config and an algorithm, a function from an `EditTask` to an `Edit`:

    @edit_method(HalfConfig)
    def half(task: EditTask[HalfConfig]) -> Edit:
        "ΔW = R Kᵀ (½ E[k kᵀ] + K Kᵀ)⁻¹."
        rule = Ridge(moments=task.moments, weight=0.5, previous=task.previous)
        return spread_over_layers(task, targets_for(task), rule)

The function's docstring becomes the method's, with the arguments that all methods take. Entered in `METHODS`, it is
known to the command line, to sweeps, sessions and analyses.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from mechedit import ranks
from mechedit.chat import prompted
from mechedit.data import EditRequest, records_of, revised
from mechedit.edit import Edit, check_model
from mechedit.errors import InputError, brief_list
from mechedit.methods.checks import by_layer, check_input, check_target_settings
from mechedit.methods.manifest import search_record
from mechedit.methods.plausibility import WARNINGS, edit_warnings
from mechedit.methods.recommendation import SETTINGS_FROM, Recommendation, published_for, recommendation
from mechedit.methods.rules import EarlierKeys, Moments
from mechedit.methods.settings import MethodConfig, SearchConfig, SpreadMethodConfig
from mechedit.methods.spread import UpdateRule, spread
from mechedit.models import Model, exclusive
from mechedit.notices import ImplausibleEditWarning, warn
from mechedit.provenance import CAST_HASHES
from mechedit.published import PublishedSettings
from mechedit.targets import Targets, find_targets, regrouped

Config = TypeVar("Config", bound=MethodConfig)
TaskConfig = TypeVar("TaskConfig", bound=MethodConfig, covariant=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class EditTask(Generic[TaskConfig]):
    """One edit to be made: the arguments of a method's call, checked, and its settings."""

    method: str
    """Name of the method, for progress bars and messages."""
    model: Model
    """Model to be edited; an algorithm must leave it as it was."""
    requests: Sequence[EditRequest]
    layers: list[int]
    """The critical range, 0-based, ascending."""
    moments: Moments
    """E[k kᵀ] by layer; empty when the method preserves no old keys and none were passed."""
    previous: EarlierKeys
    """Keys of earlier edits by layer, [d_mlp, earlier facts]; empty when there are none."""
    prefixes: Sequence[str] | None
    """Templates with one {} for the whole prompt; None for the method's default."""
    config: TaskConfig
    targets: Targets | None
    """z that was found before; None when the method is to search for it."""
    cache: str | Path | None
    """Folder in which targets are kept, if any."""


Algorithm = Callable[[EditTask[Config]], Edit]


@dataclass(frozen=True, eq=False, repr=False)
class Method(Generic[Config]):
    """An editing method, called as `method(model, requests, layers, moments, ...)`; see `edit_method`."""

    name: str
    """The name in `METHODS`, on the command line and in manifests."""
    config: type[Config]
    """Class of its settings."""
    algorithm: Algorithm[Config]
    """Makes the edit; the manifest of what it returns holds `unconverged`, the ids of facts whose new object is not the
    likeliest answer: with z written, or after the training."""

    def __post_init__(self) -> None:
        signature = inspect.signature(self.__call__)
        config = signature.parameters["config"].replace(annotation=f"{self.config.__name__} | None")
        parameters = {**signature.parameters, "config": config}
        arguments = (inspect.getdoc(Method.__call__) or "").partition("\n\n")[2]
        arguments = arguments.replace("config: settings;", f"config: settings, a `{self.config.__name__}`;")
        attributes = {
            "__name__": self.name,
            "__module__": self.algorithm.__module__,
            "__doc__": f"{inspect.getdoc(self.algorithm)}\n\n{arguments}",
            "__signature__": signature.replace(parameters=list(parameters.values())),
        }
        for attribute, value in attributes.items():
            object.__setattr__(self, attribute, value)

    def __repr__(self) -> str:
        return f"{self.name}{inspect.signature(self)}"

    def __reduce__(self) -> str:
        # Pickled and copied as functions are: by its name in the module of its algorithm.
        return self.name

    # Searches need gradients, whatever mode the caller is in.
    @torch.inference_mode(False)
    @exclusive
    def __call__(
        self,
        model: Model,
        requests: Sequence[EditRequest],
        layers: Sequence[int],
        moments: Moments | None = None,
        prefixes: Sequence[str] | None = None,
        config: Config | None = None,
        targets: Targets | None = None,
        previous: EarlierKeys | None = None,
        *,
        cache: str | Path | None = None,
        chat: bool = False,
        joint: str | None = None,
    ) -> Edit:
        """Make one edit that writes all `requests`; the model is left as it was, bit for bit.

        Args:
            model: to be edited (apply the result with `edited` or `apply_`).
            requests: what it should say; they must not conflict (MEMIT Eq. 5).
            layers: the critical range, 0-based, ascending.
            moments: for each layer E[k kᵀ] over running text, [d_mlp, d_mlp], as `collect_moments` or as matrices.
                Fine-tuning, which preserves no old keys, does not use them.
            prefixes: templates with one {} for the whole prompt; the default is the bare prompt and five short
                texts that the model generates (`make_prefixes`), and the bare prompt alone for fine-tuning.
            config: settings; the default is what was tuned for the model, or ships with the checkpoint
                (`recommended`), else those of its class.
            targets: z already found for these requests at the layer `config.target_layer(layers)`, with the settings
                `config.targets` and with `prefixes` where they are given; ranges with the same last layer share them.
            previous: for each layer the keys of earlier edits of this model, [d_mlp, earlier facts], which are
                preserved besides (`edit_keys`).
            cache: folder that keeps the targets found, so that an interrupted search goes on and other edits share
                them (`find_targets`). ROME, whose targets depend on the facts before, does not use it.
            chat: ask each prompt as a user's question, through the tokenizer's chat template; score the edit so too.
            joint: text between prompt and object where a request names none; by default the characters that meet
                decide.

        Returns:
            The edit. Its manifest holds what was asked for and how well it was written: see `spread`; and under
            `warnings`, which are also Python's, updates that are larger than their weights (‖ΔW‖ > ‖W‖, Frobenius),
            linear systems with a condition number above 1e12, and residuals more than half of which is left.

        Raises:
            InputError: conflicting requests; layers not ascending or not in the model; moments that are absent,
                of another model, or singular; weights that are not finite; targets of other requests, layer,
                settings, prefixes or weights; targets or earlier keys that the method would ignore; settings of
                another method.
        """
        sources = None
        if config is None:
            recommended = self.recommendation(model)
            config, sources = recommended.config, recommended.record
        self._check_arguments(config, targets, previous)
        moments, previous = by_layer("the second moments", moments), by_layer("the earlier keys", previous)
        requests = plain_requests = records_of(requests, EditRequest)
        requests = prompted(model.tokenizer, requests, chat=chat, joint=joint)
        task = EditTask(
            method=self.name, model=model, requests=requests, prefixes=prefixes, config=config, targets=targets,
            layers=check_input(model, requests, layers, moments, previous, config),
            moments=moments, previous=previous, cache=cache,
        )  # fmt: skip
        if config.shares_targets:  # they are dealt out to the processes of the command
            edit = self.algorithm(task)
        else:
            edit = ranks.current().from_first(lambda: self.algorithm(task), f"the edit by {self.name}")
        # The edit goes onto copies of the model in other dtypes, too.
        made_for = {**edit.manifest["model"], CAST_HASHES: model.cast_hashes()}
        manifest = {
            "method": self.name, **edit.manifest, "model": made_for, "settings": config.record,
        }  # fmt: skip
        if lines := edit_warnings(edit, model, config):
            manifest[WARNINGS] = lines
            for line in lines:
                warn(line, ImplausibleEditWarning)
        if sources is not None:
            manifest[SETTINGS_FROM] = sources

        def remake(ids: Sequence[str]) -> Edit:
            remaining = revised(plain_requests, without=ids)
            if cache is None or not (isinstance(config, SearchConfig) and config.shares_targets):
                shares = "shares them" if config.shares_targets else "finds each fact's on the model as edited so far"
                raise InputError(
                    f"the targets of the edit were {'not kept' if cache is None else 'kept'}, and its method "
                    f"{self.name} {shares}, expected a folder that keeps them and a method that shares them; make an "
                    f"edit with cache=FOLDER, or anew without these requests"
                )
            check_model(model, edit)
            again = regrouped(model.tokenizer, plain_requests, remaining, config.targets)
            if again:
                warn(f"searched for again, since they share a subject with those: {brief_list(again)}")
            return self(
                model, remaining, layers, moments, prefixes, config, None, previous,
                cache=cache, chat=chat, joint=joint,
            )  # fmt: skip

        return dataclasses.replace(edit, manifest=manifest, remake=remake)

    def recommended(self, model: Model) -> Config:
        """The settings tuned for the model, and those that ship with its checkpoint; without any, the defaults.

        Raises:
            InputError: a file of them is damaged, or names a setting that the method lacks.
        """
        return self.recommendation(model).config

    def recommendation(
        self, model: Model, *, tuned: bool = True, file: str | Path | None = None, published: bool = False
    ) -> Recommendation[Config]:
        """The same with the layers that were tuned, and with where they come from; see `recommendation`.

        Args:
            model: for which they are.
            tuned: whether to look for tuned settings.
            file: of tuned settings, in place of those found beside the checkpoint or in the folder of tuned settings.
            published: take layers and settings that were published for the model, in place of all files.

        Raises:
            InputError: as `recommended`; `file` is of another model or method; nothing was published for the model.
        """
        return recommendation(self.config, self.name, model, tuned=tuned, file=file, published=published)

    def published(self, model: Model) -> list[PublishedSettings]:
        """What papers and their code edit this model with, by its name, or else by its architecture and size."""
        return published_for(self.name, model)

    def _check_arguments(self, config: Config, targets: Targets | None, previous: EarlierKeys | None) -> None:
        """Refuse settings of another method, and what would be ignored although the caller counts on it."""
        if type(config) is not self.config:
            raise InputError(
                f"the settings are a {type(config).__name__}, expected a {self.config.__name__} for the method "
                f"{self.name!r}; pass that"
            )
        if targets is not None and not issubclass(self.config, SearchConfig):
            raise InputError(
                f"{self.name} was given targets, expected none: the method does not search for z; leave them out"
            )
        if previous and not config.preserves_keys:
            raise InputError(
                f"{self.name} was given keys of earlier edits (layers {sorted(previous)}), expected none: the method "
                f"cannot preserve them; leave `previous` out, or choose another method"
            )


def edit_method(config: type[Config]) -> Callable[[Algorithm[Config]], Method[Config]]:
    """Decorate an algorithm, `def name(task: EditTask[Config]) -> Edit`, so that it becomes a `Method` of that name.

    Args:
        config: class of the method's settings.
    """

    def decorate(algorithm: Algorithm[Config]) -> Method[Config]:
        return Method(algorithm.__name__, config, algorithm)

    return decorate


def targets_for(task: EditTask[SearchConfig]) -> Targets:
    """Z for every request at the layer of the range where the method searches for it (MEMIT Eq. 16).

    Targets that were passed are checked and returned.

    Raises:
        InputError: targets of other requests, settings or prefixes.
    """
    if task.targets is not None:
        check_target_settings(task.targets, task.requests, task.prefixes, task.config.targets)
        return task.targets
    layer = task.config.target_layer(task.layers)
    return find_targets(task.model, task.requests, layer, task.prefixes, task.config.targets, cache=task.cache)


def spread_over_layers(task: EditTask[SpreadMethodConfig], targets: Targets, rule: UpdateRule) -> Edit:
    """Write the targets into the task's layers by an update rule (MEMIT Algorithm 1; see `spread`).

    Raises:
        InputError: targets of another layer or of other weights; and what the rule refuses.
    """
    edit = ranks.current().from_first(
        lambda: spread(task.model, task.requests, targets, task.layers, rule, config=task.config.spread).edit,
        "the spreading over the layers",
    )
    return dataclasses.replace(edit, manifest={**edit.manifest, **search_record(targets)})
