"""Adds up the sums that several processes left: moments/parts/* → moments/layer_L.safetensors."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mechedit.arguments import checked
from mechedit.errors import InputError
from mechedit.files import read_header
from mechedit.locks import remove_free_locks
from mechedit.moments.checkpoints import (
    checkpoint_path,
    checkpoints_folder,
    load_checkpoint,
    remove_checkpoint,
    shard_lock,
    sweep_moments,
)
from mechedit.moments.conditioning import warn_if_singular
from mechedit.moments.second_moment import (
    METADATA_KEY,
    REPLACE,
    SecondMoment,
    check_header,
    load_moment,
    moment_path,
)
from mechedit.shards import SINGLE_PROCESS, Rank

_NUMBER = "0|[1-9][0-9]*"
_FILE_NAME = re.compile(
    rf"layer_(?P<layer>{_NUMBER})\.shard_(?P<index>{_NUMBER})_of_(?P<world_size>{_NUMBER})\.safetensors"
)


@checked
def merge_moments(
    folder: str | Path, layers: Sequence[int] | None = None, *, overwrite: bool = False
) -> dict[int, SecondMoment]:
    """Add up the sums that `collect_shard` left in `folder`, write the moments, and remove the sums' files.

    Sums are added in the order of their ranks. The result is that of one process, up to the rounding of float64. Where
    a merge was killed, or ran before, the moments that it left are read.

    Args:
        folder: the `out` of the processes.
        layers: layers to merge; by default all that have sums there, or a moment made with the same.
        overwrite: whether to replace moments of another provenance, instead of refusing them.

    Returns:
        The second moment of each layer.

    Raises:
        InputError: a shard's sum is missing, not finished, or of another model or text; there are none; too few
            tokens.
    """
    world_sizes = shard_counts(folder)
    merged = _merged_layers(folder, world_sizes)
    present = merged | world_sizes.keys()
    layers_to_merge = sorted(present if layers is None else set(layers))
    if not layers_to_merge or not set(layers_to_merge) <= present:
        raise InputError(
            f"{str(checkpoints_folder(folder))!r} holds {_in_words(sorted(world_sizes))}, expected "
            f"{'some' if layers is None else layers_to_merge}; collect them with mechedit moments --shard I/N"
        )
    for layer in layers_to_merge:  # before each of them has a lock: there may be more that are missing than can be open
        if layer not in merged:
            _checked_header(folder, layer, world_sizes[layer])
    with contextlib.ExitStack() as stack:
        for layer in layers_to_merge:
            for rank in dict.fromkeys((SINGLE_PROCESS, *_present(folder, layer, world_sizes.get(layer, 0)))):
                stack.enter_context(shard_lock(folder, layer, rank))
        sweep_moments(folder)
        moments = _merge(folder, layers_to_merge, merged, world_sizes, overwrite)
    for layer in layers_to_merge:
        remove_free_locks(folder, f"moments_layer_{layer}.shard_*")
    return moments


def _in_words(layers: Sequence[int]) -> str:
    return f"shards of the layers {layers}" if layers else "no shards of the layers of a model"


def _present(folder: str | Path, layer: int, world_size: int) -> list[Rank]:
    """The shards of a layer whose sums are there, by rank."""
    pattern = f"layer_{layer}.shard_*_of_{world_size}.safetensors"
    names = [_FILE_NAME.fullmatch(path.name) for path in checkpoints_folder(folder).glob(pattern)]
    return sorted(
        Rank(index, world_size) for name in names if name is not None and (index := int(name["index"])) < world_size
    )


def _merge(
    folder: str | Path,
    layers_to_merge: Sequence[int],
    merged: Collection[int],
    world_sizes: Mapping[int, int],
    overwrite: bool,
) -> dict[int, SecondMoment]:
    """Add up the sums of some layers, which no other process changes meanwhile; those of `merged` have been."""
    # All is checked before anything is written.
    headers = {
        layer: _checked_header(folder, layer, world_sizes[layer]) for layer in layers_to_merge if layer not in merged
    }
    for layer in headers:
        check_alike(headers[layer], next(iter(headers.values())), f"the shard of layer {layer}", ("layer",))
        if moment_path(folder, layer).exists() and not overwrite:
            header = read_header(moment_path(folder, layer), METADATA_KEY)
            check_alike(header, headers[layer], f"{str(moment_path(folder, layer))!r}", remedy=REPLACE)
    moments = {}
    for layer in layers_to_merge:
        if layer in merged:
            moments[layer] = load_moment(folder, layer)
            _remove_sums(folder, layer, world_sizes.get(layer, 0))
        else:
            moments[layer] = _merge_layer(folder, layer, world_sizes[layer])
    warn_if_singular(*(moment.conditioning for moment in moments.values()))
    return moments


def _merge_layer(folder: str | Path, layer: int, world_size: int) -> SecondMoment:
    """Add one layer's sums, write its moment, and remove the sums' files."""
    first, *others = _present(folder, layer, world_size)
    merged = load_checkpoint(checkpoint_path(folder, layer, first), "cpu")
    for rank in others:
        checkpoint = load_checkpoint(checkpoint_path(folder, layer, rank), "cpu")
        merged.accumulator.add(checkpoint.accumulator.total, checkpoint.accumulator.count)
    moment = merged.accumulator.finalize(layer, merged.provenance)
    moment.save(folder)
    _remove_sums(folder, layer, world_size)
    return moment


def _remove_sums(folder: str | Path, layer: int, world_size: int) -> None:
    """Remove the files of one layer's sums, and their folder when it is then empty."""
    for rank in _present(folder, layer, world_size):
        remove_checkpoint(folder, layer, rank)
    with contextlib.suppress(OSError):
        checkpoints_folder(folder).rmdir()


def _merged_layers(folder: str | Path, world_sizes: Mapping[int, int]) -> set[int]:
    """Layers whose moment is there and was made with the same as the sums there, of which its own are not all there.

    A merge that was killed may have removed some of them, or all.
    """
    headers: dict[int, Mapping[str, Any]] = {}
    for layer, size in world_sizes.items():
        if present := _present(folder, layer, size):
            headers[layer] = read_header(checkpoint_path(folder, layer, present[0]), METADATA_KEY)
    merged = set()
    for path in sorted((Path(folder) / "moments").glob("layer_*.safetensors")):
        number = path.stem.removeprefix("layer_")
        if not number.isdecimal():
            continue
        layer = int(number)
        size = world_sizes.get(layer, 0)
        if size and len(_present(folder, layer, size)) == size:
            continue
        with contextlib.suppress(InputError):
            header = read_header(path, METADATA_KEY)
            for layer_of_sums, expected in headers.items():
                check_alike(header, expected, repr(str(path)), () if layer_of_sums == layer else ("layer",))
            merged.add(layer)
    return merged


def shard_counts(folder: str | Path) -> dict[int, int]:
    """For each layer, the number of shards of which sums are in the folder.

    Raises:
        InputError: sums of several numbers of shards.
    """
    names = [_FILE_NAME.fullmatch(path.name) for path in sorted(checkpoints_folder(folder).glob("layer_*.safetensors"))]
    sizes: dict[int, set[int]] = {}
    for name in names:
        # Process 0 of 1 is one on its own: its file is a checkpoint that nothing is merged with.
        if name is not None and int(name["world_size"]) > 1:
            sizes.setdefault(int(name["layer"]), set()).add(int(name["world_size"]))
    for layer, layer_sizes in sizes.items():
        if len(layer_sizes) > 1:
            raise InputError(
                f"{str(checkpoints_folder(folder))!r} holds shards of layer {layer} of {sorted(layer_sizes)} processes,"
                f" expected those of one number; remove the others"
            )
    return {layer: min(layer_sizes) for layer, layer_sizes in sizes.items()}


def _checked_header(folder: str | Path, layer: int, world_size: int) -> Mapping[str, Any]:
    """The header of a layer's first sum, after checking that all are there, finished and of one provenance."""
    first: Mapping[str, Any] = {}
    for index in range(world_size):
        path = checkpoint_path(folder, layer, Rank(index, world_size))
        header = read_header(path, METADATA_KEY) if path.exists() else None
        state = "missing" if header is None else "not finished" if not header.get("done") else ""
        if header is None or state:
            raise InputError(
                f"the shard {index}/{world_size} of layer {layer} is {state} ({str(path)!r}); collect it with "
                f"mechedit moments --shard {index}/{world_size}"
            )
        first = first or header
        check_alike(header, first, repr(str(path)))
    return first


def check_alike(
    header: Mapping[str, Any],
    expected: Mapping[str, Any],
    what: str,
    besides: tuple[str, ...] = (),
    remedy: str = "remove what is of other settings, or collect it again with --overwrite",
) -> None:
    """Refuse a file that was made with another model or text.

    Args:
        header: header of the file.
        expected: header of the file that it must agree with.
        what: name of the file for the message.
        besides: fields that may differ too.
        remedy: what to do about it.

    Raises:
        InputError: names the first field that differs.
    """
    fields = {name: value for name, value in expected.items() if name not in besides}
    check_header(header, fields, what, remedy)
