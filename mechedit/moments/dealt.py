"""Second moments by the processes of one command: the text is dealt out in shards, and the first process adds them up.

The number of shards is that of the processes when the collection begins, and is read from the checkpoints when it goes
on: so an interrupted collection that goes on with another number of processes gives the same matrices, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechedit import ranks
from mechedit.data import load_texts
from mechedit.errors import InputError
from mechedit.models import Model
from mechedit.moments.checkpoints import checkpoint_path, checkpoints_folder
from mechedit.moments.collect import collect_moments, collect_shard, finished_layers
from mechedit.moments.config import MomentsConfig
from mechedit.moments.convergence import Convergence
from mechedit.moments.load import load_moments
from mechedit.moments.merge import merge_moments, shard_counts
from mechedit.moments.second_moment import SecondMoment
from mechedit.notices import warn
from mechedit.shards import SINGLE_PROCESS, warn_if_idle


def collect_dealt(
    model: Model,
    texts: Sequence[str] | str | Path,
    layers: Sequence[int],
    config: MomentsConfig,
    out: Path,
    *,
    overwrite: bool = False,
    convergence: Convergence | None = None,
) -> dict[int, SecondMoment]:
    """Collect second moments with all processes of the command; one on its own does as `collect_moments`.

    The sums are those of one process up to the rounding of float64.

    Args:
        model: as in `collect_moments`.
        texts: as in `collect_moments`.
        layers: as in `collect_moments`.
        config: as in `collect_moments`.
        out: results folder, the same one for all processes.
        overwrite: as in `collect_moments`.
        convergence: settings of a convergence curve, which one process alone can measure.

    Raises:
        InputError: as `collect_moments`; a convergence curve of several processes.
    """
    group = ranks.current()
    if group.world_size == 1:
        counts = shard_counts(out) if checkpoints_folder(out).is_dir() and convergence is None else {}
        if not set(layers) & set(counts) or overwrite:
            return collect_moments(model, texts, layers, config, out, overwrite=overwrite, convergence=convergence)
    elif convergence is not None:
        raise InputError(
            f"--convergence needs the text in order, and {group.world_size} processes read a part each; collect with "
            f"one process, or leave it out"
        )
    texts = load_texts(texts) if isinstance(texts, (str, Path)) else texts
    record = finished_layers(model, texts, layers, config, out, overwrite=overwrite)
    group.agree("the second moments", record.provenance)
    finished = group.from_first(record.finished, "the finished layers")
    open_layers = [layer for layer in record.layers if layer not in finished]
    count = group.from_first(lambda: _shards(out, open_layers, group.world_size, overwrite), "the shards")
    if open_layers and count == 1:
        warn("what one process began is finished by one process")
        arguments = (model, texts, open_layers, config, out)
        group.from_first(lambda: list(collect_moments(*arguments, overwrite=overwrite)), "the second moments")
    elif open_layers:
        warn_if_idle(count, "shards of the text")
        for shard in range(group.rank, count, group.world_size):
            with ranks.alone():
                collect_shard(model, texts, open_layers, (shard, count), out, config, overwrite=overwrite)
        group.barrier("the sums of all shards")
        group.from_first(lambda: list(merge_moments(out, open_layers, overwrite=overwrite)), "the sum of the shards")
    return load_moments(out, record.layers, model)


def _shards(out: Path, layers: Sequence[int], world_size: int, overwrite: bool) -> int:
    """Number of shards of the text: that of the checkpoints that are there, else that of the processes."""
    if overwrite:
        for path in checkpoints_folder(out).glob("layer_*.shard_*_of_*.safetensors"):
            if any(path.name.startswith(f"layer_{layer}.") for layer in layers):
                path.unlink()
    counts = {count for layer, count in shard_counts(out).items() if layer in layers}
    if any(checkpoint_path(out, layer, SINGLE_PROCESS).is_file() for layer in layers):
        counts.add(1)
    if len(counts) > 1:
        raise InputError(
            f"{str(checkpoints_folder(out))!r} holds shards of {sorted(counts)} processes, expected those of one "
            f"number for all of the layers {list(layers)}; remove them, or pass --overwrite to begin anew"
        )
    return counts.pop() if counts else world_size
