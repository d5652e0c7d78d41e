"""The search for z of many requests: in batches of groups of one subject, cached, and dealt out over processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mechedit import ranks
from mechedit.data import EditRequest, check_requests, records_of
from mechedit.errors import InputError
from mechedit.locks import locked
from mechedit.models import Model, exclusive, layer_numbers
from mechedit.prefixes import check_prefixes, make_prefixes
from mechedit.progress import progress_bar
from mechedit.prompt_tokens import one_spelling
from mechedit.provenance import value_hash
from mechedit.shards import Rank, ShardRecords, deal, pieces_of, warn_if_idle
from mechedit.targets.cache import TargetCache, TargetResult, terms_by_step
from mechedit.targets.config import TargetConfig
from mechedit.targets.descent import search_groups
from mechedit.targets.search_prompts import search_prompts
from mechedit.targets.subject_groups import SubjectGroup, subject_groups
from mechedit.targets.targets import Targets


@exclusive
@torch.inference_mode(False)
def find_targets(
    model: Model,
    requests: Sequence[EditRequest],
    layer: int,
    prefixes: Sequence[str] | None = None,
    config: TargetConfig | None = None,
    *,
    cache: str | Path | None = None,
) -> Targets:
    """Search for z, the state that makes the model say the new object, for every request (MEMIT Eq. 16).

    The weights are not changed. Facts do not affect each other, except those about one subject
    (`TargetConfig.joint`): these share one z − h, found for the mean of their losses within the smallest of their
    balls.

    Args:
        model: the model to be edited.
        requests: the facts it should state.
        layer: 0-based; z is a state at this block, the last of the range to be edited.
        prefixes: context templates with one {} for the whole prompt; by default the bare prompt and those of
            `make_prefixes`.
        config: settings of the search.
        cache: a folder for finished targets, under the hash of all that determines them. Targets that are there are
            not searched for again, so an interrupted search resumes after its last finished batch.

    Returns:
        z and h per request, [fact, d_model], with the loss at every step.

    Raises:
        InputError: conflicting requests; a layer that the model lacks; a prefix without its {}; a prompt too long; an
            object that gives no tokens.

    Example:
        >>> import mechedit as me
        >>> model, requests = me.load_model("tiny"), me.load_requests("tiny")
        >>> config = me.TargetConfig(clamp=2.0, kl_prompt="{}", kl_weight=0.25)
        >>> targets = me.find_targets(model, requests, layer=5, config=config)
        >>> targets.z.shape == (len(requests), model.d_model)
        True
        >>> targets.summary[["id", "converged", "probability", "updates", "stopped"]]  # how each search ended
    """
    search = TargetSearch.of(model, requests, layer, prefixes, config, cache)
    group = ranks.current()
    group.agree("the search for targets", search.made_with)
    results = group.from_first(search.cached, "the targets that are known")
    search.check_prompts(results)
    batches = search.batches()
    costs = [search.cost(batch) if group.world_size > 1 else 0 for batch in batches]
    warn_if_idle(len(batches), "batches of facts (batch_size)")
    with group.bar(len(requests), desc="targets z", unit="fact", leave=None) as bar:
        bar.update(sum(map(len, results.values())) if group.is_first else 0)
        new: dict[str, list[TargetResult]] = {}
        for batch, owner in zip(batches, deal(costs, group.world_size), strict=True):
            if owner == group.rank:
                with ranks.alone():
                    new |= search.run(batch, results, bar)
        for gathered in group.gather(new, "the search for targets"):
            results |= gathered
    return search.targets(results)


@exclusive
@torch.inference_mode(False)
def find_target_shard(
    model: Model,
    requests: Sequence[EditRequest],
    layer: int,
    rank: Rank,
    *,
    cache: str | Path,
    prefixes: Sequence[str] | None = None,
    config: TargetConfig | None = None,
    overwrite: bool = False,
) -> int:
    """Search for the targets of one process's shard of the batches, and leave them in `cache`.

    The batches are cut as one process cuts them, and dealt out by the tokens of their prompts. When all shards are
    there (`check_target_shards`), `find_targets` with the same `cache` searches no more.

    Args:
        model: as in `find_targets`.
        requests: all of them, the same for every process.
        layer: as in `find_targets`.
        rank: the shard.
        cache: folder for the targets.
        prefixes: as in `find_targets`.
        config: as in `find_targets`.
        overwrite: whether to replace the record of a shard of other work, instead of refusing it.

    Returns:
        Number of facts in the shard.

    Raises:
        InputError: as `find_targets`; more shards than batches; a record of other work.
    """
    search = TargetSearch.of(model, requests, layer, prefixes, config, cache)
    records = target_shards(cache)
    with locked(Path(cache) / f"shard_{rank.index}_of_{rank.world_size}", f"the shard {rank} of the targets"):
        if not overwrite:
            records.check(rank, search.made_with)
        results = search.cached()
        search.check_prompts(results)
        batches = search.batches()
        pieces = pieces_of([search.cost(batch) for batch in batches], rank, "batches of facts (batch_size)")
        n_facts = sum(len(group) for piece in pieces for group in batches[piece])
        with progress_bar(total=n_facts, desc=f"targets z, shard {rank}", unit="fact", leave=None) as bar:
            for piece in pieces:
                bar.update(sum(len(group) for group in batches[piece] if search.cache.key(group) in results))
                results |= search.run(batches[piece], results, bar)
        records.write(rank, search.made_with, {})
    return n_facts


def check_target_shards(
    model: Model,
    requests: Sequence[EditRequest],
    layer: int,
    *,
    cache: str | Path,
    prefixes: Sequence[str] | None = None,
    config: TargetConfig | None = None,
) -> None:
    """Refuse to go on unless all shards of a search are finished; the arguments are those of `find_target_shard`.

    Raises:
        InputError: a shard is missing, or of other requests, settings or weights; the file of a target is missing.
    """
    search = TargetSearch.of(model, requests, layer, prefixes, config, cache)
    finished = search.cached()
    missing = [group[0].id for group in search.groups if search.cache.key(group) not in finished]
    # Where all targets are there, a merge that was killed may have removed records.
    target_shards(cache).merged(search.made_with, partly=not missing)
    if missing:
        raise InputError(
            f"the target of {missing[0]!r} is not in {str(cache)!r}, though all shards are finished; make the shards "
            f"again with mechedit edit --targets-only --shard I/N, which search only for what is missing"
        )


def target_shards(cache: str | Path) -> ShardRecords:
    """The records of the shards of a search in its folder."""
    return ShardRecords(folder=Path(cache), command="mechedit edit --targets-only")


@dataclass(frozen=True, kw_only=True, eq=False)
class TargetSearch:
    """A search that is ready to run: its groups of facts in batches, and those that are finished."""

    model: Model
    requests: Sequence[EditRequest]
    layer: int
    prefixes: tuple[str, ...]
    config: TargetConfig
    cache: TargetCache
    groups: Sequence[SubjectGroup]
    provenance: Mapping[str, Any]
    """Of the model."""

    @staticmethod
    def of(
        model: Model,
        requests: Sequence[EditRequest],
        layer: int,
        prefixes: Sequence[str] | None,
        config: TargetConfig | None,
        cache: str | Path | None,
    ) -> TargetSearch:
        """A search whose arguments, those of `find_targets`, are checked."""
        config = config or TargetConfig()
        requests, (layer,) = records_of(requests, EditRequest), layer_numbers([layer])
        check_requests(one_spelling(model.tokenizer, requests))
        config.parts(model.module)
        if not 0 <= layer < model.n_layers:
            raise InputError(
                f"the layer is {layer}, expected one of 0 … {model.n_layers - 1} of {model.name!r}; choose another"
            )
        prefixes = check_prefixes(
            prefixes
            or ranks.current().from_first(
                lambda: make_prefixes(model, seed=config.seed, count=config.generated_prefixes), "the prefixes"
            )
        )
        provenance = model.provenance()
        return TargetSearch(
            model=model,
            requests=requests,
            layer=layer,
            prefixes=prefixes,
            config=config,
            cache=TargetCache.at(cache, provenance, layer, prefixes, config),
            groups=subject_groups(model.tokenizer, requests, config),
            provenance=provenance,
        )

    @property
    def made_with(self) -> dict[str, Any]:
        """All that determines the targets and their division into batches, by name."""
        keys = [self.cache.key(group) for group in self.groups]
        settings = {f"settings.{name}": value for name, value in self.cache.made_with["settings"].items()}
        fields = {name: value for name, value in self.cache.made_with.items() if name != "settings"}
        return {**fields, **settings, "batch_size": self.config.batch_size, "requests": value_hash(keys)}

    def cached(self) -> dict[str, list[TargetResult]]:
        """The results that are finished, by key."""
        return self.cache.read(self.groups)

    def check_prompts(self, finished: Collection[str]) -> None:
        """Tokenize what is not finished: whatever can be refused is refused before the long search."""
        missing = [request for group in self.groups if self.cache.key(group) not in finished for request in group]
        search_prompts(self.model, missing, range(len(missing)), self.prefixes, self.config)

    def batches(self) -> list[list[SubjectGroup]]:
        """Batches of whole groups, finished ones too, each with at least `batch_size` facts but for the last.

        Which groups run together does not depend on what is finished, nor on who does it.
        """
        batches: list[list[SubjectGroup]] = [[]]
        for group in self.groups:
            if sum(map(len, batches[-1])) >= self.config.batch_size:
                batches.append([])
            batches[-1].append(group)
        return batches

    def cost(self, batch: Sequence[SubjectGroup]) -> int:
        """What a batch costs: the tokens of its prompts that run at every step."""
        requests = [request for group in batch for request in group]
        index = [number for number, group in enumerate(batch) for _ in group]
        prompts = search_prompts(self.model, requests, index, self.prefixes, self.config)
        return sum(prompt.width for prompt in prompts)

    def run(self, batch: Sequence[SubjectGroup], finished: Collection[str], bar: tqdm) -> dict[str, list[TargetResult]]:
        """Search for those of a batch that are not finished, store their results, and return them by key."""
        open_groups = [group for group in batch if self.cache.key(group) not in finished]
        if not open_groups:
            return {}
        results = search_groups(self.model, open_groups, self.layer, self.prefixes, self.config, bar)
        self.cache.write(open_groups, results)
        return {self.cache.key(group): result for group, result in zip(open_groups, results, strict=True)}

    def targets(self, results: Mapping[str, list[TargetResult]]) -> Targets:
        """The results of all groups as `Targets`, in the order of the requests."""
        by_id = {
            request.id: result
            for group in self.groups
            for request, result in zip(group, results[self.cache.key(group)], strict=True)
        }
        provenance = {
            "model": self.provenance,
            "requests": value_hash([request.plain() for request in self.requests]),
            "settings": dataclasses.asdict(self.config),
        }
        in_order = {request.id: by_id[request.id] for request in self.requests}
        return _targets(self.model, in_order, self.layer, self.prefixes, self.config, provenance)


def _targets(
    model: Model,
    results: Mapping[str, TargetResult],
    layer: int,
    prefixes: tuple[str, ...],
    config: TargetConfig,
    provenance: Mapping[str, Any],
) -> Targets:
    """The results of all requests as `Targets`, in order."""
    losses = terms_by_step(results)
    # The last step that was evaluated is the state returned, since nothing moves after it.
    summary = losses.groupby("id", sort=False).last().reset_index().rename(columns={"step": "updates"})
    return Targets(
        z=torch.stack([result.z for result in results.values()]).to(model.device),
        initial=torch.stack([result.initial for result in results.values()]).to(model.device),
        ids=tuple(results),
        layer=layer,
        part=config.parts(model.module)[-1],
        prefixes=prefixes,
        losses=losses,
        summary=summary.assign(
            norm_ratio=[result.norm_ratio for result in results.values()],
            stopped=[result.stopped for result in results.values()],
            converged=[result.converged for result in results.values()],
        ),
        provenance=provenance,
    )
