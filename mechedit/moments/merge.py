"""The parts that several processes left, added up: moments/parts → moments/layer_L.safetensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechedit.errors import InputError
from mechedit.files import read_header
from mechedit.moments.checkpoints import SAME_KEYS, load_part, part_path, parts_folder
from mechedit.moments.second_moment import KEY, SecondMoment, moment_path
from mechedit.moments.shards import Share
from mechedit.provenance import check_provenance

_NAME = re.compile(r"layer_(\d+)\.shard_(\d+)_of_(\d+)\.safetensors")


def merge_moments(
    folder: str | Path, layers: Sequence[int] | None = None, *, overwrite: bool = False
) -> dict[int, SecondMoment]:
    """Add up what `collect_shard` left in `folder`, write the moments, and remove the parts.

    The parts are added in their order. The result is that of one process up to the rounding of float64 sums.

    Args:
        folder: the `out` of the processes.
        layers: which; None merges all that there are parts of.
        overwrite: replace moments of another provenance, instead of refusing.

    Raises:
        InputError: a part is missing, not finished, or of another model or text; there are none; too few tokens.
    """
    shares = _shares(folder)
    wanted = sorted(shares) if layers is None else sorted(set(layers))
    if not wanted or not set(wanted) <= set(shares):
        raise InputError(
            f"{str(parts_folder(folder))!r} holds parts of the layers {sorted(shares)}, expected "
            f"{'some' if layers is None else wanted}; collect them with mechedit moments --shard I/N"
        )
    # All is checked before anything is written.
    headers = {layer: _check_parts(folder, layer, shares[layer]) for layer in wanted}
    for layer in wanted:
        check_alike(headers[layer], headers[wanted[0]], f"the part of layer {layer}", ("layer",))
        if moment_path(folder, layer).exists() and not overwrite:
            found = read_header(moment_path(folder, layer), KEY)
            check_alike(found, headers[layer], f"{str(moment_path(folder, layer))!r}")
    return {layer: _merged(folder, layer, shares[layer]) for layer in wanted}


def _merged(folder: str | Path, layer: int, count: int) -> SecondMoment:
    """Add, write, and remove the parts of one layer."""
    whole = load_part(part_path(folder, layer, Share(0, count)), "cpu")
    for index in range(1, count):
        part = load_part(part_path(folder, layer, Share(index, count)), "cpu")
        whole.fitter.add(part.fitter.total, part.fitter.count)
    moment = whole.fitter.result(layer, whole.provenance)
    moment.save(folder)
    for index in range(count):
        part_path(folder, layer, Share(index, count)).unlink()
    whole.remove(Path(folder))
    return moment


def _shares(folder: str | Path) -> dict[int, int]:
    """For each layer, of how many processes there are parts."""
    names = [_NAME.fullmatch(path.name) for path in sorted(parts_folder(folder).glob("layer_*.safetensors"))]
    found: dict[int, set[int]] = {}
    for name in names:
        # One of one is the checkpoint of a process on its own.
        if name is not None and int(name[3]) > 1:
            found.setdefault(int(name[1]), set()).add(int(name[3]))
    for layer, counts in found.items():
        if len(counts) > 1:
            raise InputError(
                f"{str(parts_folder(folder))!r} holds parts of layer {layer} of {sorted(counts)} processes, expected "
                f"those of one number; remove the others"
            )
    return {layer: min(counts) for layer, counts in found.items()}


def _check_parts(folder: str | Path, layer: int, count: int) -> Mapping[str, Any]:
    """The header of a layer's first part, after all of them were found whole and alike."""
    first: Mapping[str, Any] = {}
    for index in range(count):
        path = part_path(folder, layer, Share(index, count))
        state = "missing" if not path.exists() else "not finished" if not read_header(path, KEY).get("done") else ""
        if state:
            raise InputError(
                f"the part {index}/{count} of layer {layer} is {state} ({str(path)!r}); collect it with "
                f"mechedit moments --shard {index}/{count}"
            )
        header = read_header(path, KEY)
        first = first or header
        check_alike(header, first, repr(str(path)))
    return first


def check_alike(
    found: Mapping[str, Any], expected: Mapping[str, Any], what: str, besides: tuple[str, ...] = ()
) -> None:
    """Refuse what was made with another model or text."""
    own = (*SAME_KEYS, "share", "place", "done", "read", *besides)
    fields = {name: value for name, value in expected.items() if name not in own}
    check_provenance(found, fields, what, "remove what is of other settings, or collect it again")
