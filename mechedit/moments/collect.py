"""`collect_moments` and `collect_shard`: second moments of several layers, in as few passes over the text as fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechedit.data import check_texts, load_texts, sample_documents, texts_hash
from mechedit.errors import InputError, brief
from mechedit.models import Model, exclusive, layer_numbers
from mechedit.moments.checkpoints import Checkpoint
from mechedit.moments.conditioning import warn_if_singular
from mechedit.moments.config import MomentsConfig
from mechedit.moments.convergence import Convergence
from mechedit.moments.memory import MomentsPlan, plan_moments
from mechedit.moments.moments_folder import MomentsFolder
from mechedit.moments.second_moment import SecondMoment
from mechedit.moments.text_pass import TextPass
from mechedit.provenance import ALGORITHMS
from mechedit.shards import SINGLE_PROCESS, Rank


@exclusive
def collect_moments(
    model: Model,
    texts: Sequence[str] | str | Path,
    layers: Sequence[int],
    config: MomentsConfig | None = None,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    convergence: Convergence | None = None,
) -> dict[int, SecondMoment]:
    """Collect E[k kᵀ] of the MLP keys over running text, all layers in one pass if memory allows (MEMIT §4.2).

    Padding and special tokens are left out of the mean. A moment that comes out singular, or nearly so, is warned of.

    With `out`, the sums so far are saved there from time to time: killed at any moment, the same call goes on from
    there to the same matrices, bit for bit on the same machine.

    Example:
        >>> model = load_model("tiny")
        >>> moments = collect_moments(model, "tiny", layers=[1, 2], config=MomentsConfig(tokens=20_000))
        >>> moments[1].matrix.shape  # [d_mlp, d_mlp]

    Args:
        model: model whose keys are read.
        texts: documents, or a source for `load_texts`.
        layers: layers to collect, 0-based.
        config: how to read the text.
        out: results folder; finished moments there with the same provenance are reused, the others are written there.
        overwrite: whether to replace files in `out` that have another provenance, instead of refusing them.
        convergence: settings of a convergence curve to measure too: see `SecondMoment.curve`; with `out` it is also
            written to moments/convergence.parquet.

    Returns:
        The second moment of each layer.

    Raises:
        InputError: a layer that the model does not have; too few tokens, or keys that overflow; too little memory;
            files in `out` of another provenance; another process that collects the same there from other input.
    """
    collection = _prepare(model, texts, layers, config, out, SINGLE_PROCESS, overwrite, convergence)
    with collection.folder.locked(collection.layers):
        moments = collection.folder.finished(collection.layers)
        unfinished = [layer for layer in collection.layers if layer not in moments]
        collection.folder.remove_checkpoints(moments)
        for pass_layers in collection.plan.passes:
            checkpoints = collection.sum_keys(pass_layers, finished=moments)
            for layer in sorted(checkpoints):
                # Layers that do not fit in memory together need not lie there together at the end.
                mapped = len(collection.plan.passes) > 1
                moments[layer] = collection.folder.finish(checkpoints.pop(layer), mapped=mapped)
        # Of all that this call made; what was finished before was warned of then.
        warn_if_singular(*(moments[layer].conditioning for layer in unfinished))
    return {layer: moments[layer] for layer in collection.layers}


@exclusive
def collect_shard(
    model: Model,
    texts: Sequence[str] | str | Path,
    layers: Sequence[int],
    shard: tuple[int, int],
    out: str | Path,
    config: MomentsConfig | None = None,
    *,
    overwrite: bool = False,
) -> dict[int, Path]:
    """Sum k kᵀ over one process's shard of the text, and leave the sums in `out` for `merge_moments`.

    Args:
        model: model whose keys are read.
        texts: all of the text, the same for every process.
        layers: layers to collect, 0-based.
        shard: (i, n) for process i of n, which reads every n-th chunk of 256 texts.
        out: results folder; killed at any moment, the same call goes on from the checkpoints there.
        config: how to read the text; its budget of tokens is that of all processes together.
        overwrite: whether to replace checkpoints in `out` of another provenance, instead of refusing them.

    Returns:
        The file of each layer's sum.

    Raises:
        InputError: as `collect_moments`; or there is no such shard.
    """
    collection = _prepare(model, texts, layers, config, out, Rank.of(*shard), overwrite, None)
    paths: dict[int, Path] = {}
    with collection.folder.locked(collection.layers):
        for pass_layers in collection.plan.passes:
            checkpoints = collection.sum_keys(pass_layers)
            for layer in sorted(checkpoints):
                paths[layer] = checkpoints.pop(layer).save(Path(out))
    return paths


@dataclass(frozen=True, kw_only=True)
class FinishedLayers:
    """Which moments of a collection are finished."""

    layers: list[int]
    """The layers of the collection, ascending."""
    provenance: Mapping[str, Any]
    """Model, text and settings."""
    finished: Callable[[], list[int]]
    """Reads which layers are finished; refuses moments of another provenance."""


def finished_layers(
    model: Model,
    texts: Sequence[str],
    layers: Sequence[int],
    config: MomentsConfig,
    out: Path,
    *,
    overwrite: bool = False,
) -> FinishedLayers:
    """What of a collection is finished; the arguments are those of `collect_moments`.

    Raises:
        InputError: as `collect_moments`.
    """
    collection = _prepare(model, texts, layers, config, out, SINGLE_PROCESS, overwrite, None)
    return FinishedLayers(
        layers=collection.layers,
        provenance=collection.folder.provenance,
        finished=lambda: list(collection.folder.finished(collection.layers)),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Collection:
    """One call's layers, its passes over the text, and its files."""

    layers: list[int]
    plan: MomentsPlan
    text_pass: TextPass
    folder: MomentsFolder

    def sum_keys(self, pass_layers: Sequence[int], finished: Collection[int] = ()) -> dict[int, Checkpoint]:
        """The complete sums of the layers of one pass, except those that are finished already."""
        model = self.text_pass.model
        checkpoints = {
            layer: self.folder.load_checkpoint(layer, model, pass_layers)
            for layer in pass_layers
            if layer not in finished
        }
        if not all(checkpoint.done for checkpoint in checkpoints.values()):
            self.text_pass.run(checkpoints, self.folder)
        return checkpoints


def _prepare(
    model: Model,
    texts: Sequence[str] | str | Path,
    layers: Sequence[int],
    config: MomentsConfig | None,
    out: str | Path | None,
    rank: Rank,
    overwrite: bool,
    convergence: Convergence | None,
) -> _Collection:
    """Refuse bad input before the text is read, and plan the passes over the text."""
    config = config or MomentsConfig()
    unique_layers = _checked_layers(layers, model)
    if config.tokens is not None and config.tokens < model.d_key:
        raise InputError(
            f"tokens is {config.tokens}, expected at least d_mlp = {model.d_key} (better {100 * model.d_key}), else "
            f"the second moments are singular"
        )
    if model.mesh is not None and (out is not None or convergence is not None):
        raise InputError(
            f"the model {model.name!r} is split over processes, whose moments are neither written nor measured before "
            f"their end; expected no out and no convergence: write them by SecondMoment.save in all processes"
        )
    plan = plan_moments(model, unique_layers, config, convergence=convergence is not None)
    texts = load_texts(texts) if isinstance(texts, (str, Path)) else texts
    if config.documents is not None:
        texts = sample_documents(texts, config.documents, config.seed)
    check_texts(texts)
    provenance = {
        **model.provenance(),
        "algorithm": ALGORITHMS["moments"],
        "texts": texts_hash(texts),
        "max_length": config.text_length(model),
        "tokens": config.tokens,
        # Written down where they are drawn; the hash of the texts is that of these.
        **({} if config.documents is None else {"documents": config.documents, "seed": config.seed}),
    }
    text_pass = TextPass(
        model=model, texts=texts, config=config, rank=rank, batch_tokens=plan.batch_tokens, convergence=convergence
    )
    folder = MomentsFolder(
        path=None if out is None else Path(out), provenance=provenance, rank=rank, overwrite=overwrite,
        convergence=convergence, checkpoint_seconds=config.checkpoint_seconds,
    )  # fmt: skip
    return _Collection(layers=unique_layers, plan=plan, text_pass=text_pass, folder=folder)


def _checked_layers(layers: Sequence[int], model: Model) -> list[int]:
    unique_layers = sorted(set(layer_numbers(layers)))
    if not unique_layers or not 0 <= unique_layers[0] <= unique_layers[-1] < model.n_layers:
        raise InputError(
            f"the layers are {brief(unique_layers)}, expected some of 0 … {model.n_layers - 1} of {model.name!r}"
        )
    return unique_layers
