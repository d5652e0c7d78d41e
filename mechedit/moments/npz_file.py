"""Second moments in files of the code published with ROME and MEMIT, which EasyEdit and others took over: `.npz`.

Such a file holds Σ k kᵀ over tokens (`mom2.mom2`), the number of tokens (`mom2.count`) and the number of texts they are
from (`sample_size`); the moment is their quotient. Which model and which layer it is of stands in its path alone,
MODEL/DATASET_stats/MODULE_PRECISION_mom2_SAMPLES.npz, such as
gpt2-xl/wikipedia_stats/transformer.h.17.mlp.c_proj_float32_mom2_100000.npz.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.arguments import checked
from mechedit.atomic import atomic
from mechedit.bounds import LARGEST_WHOLE
from mechedit.errors import InputError, brief, brief_list, check_at_least
from mechedit.files import read_arrays
from mechedit.models import Model
from mechedit.moments.second_moment import SecondMoment, check_matrix, check_moments
from mechedit.paths import writable_folder
from mechedit.solve.checks import symmetrized
from mechedit.split_tensors import whole

SAMPLES = 100_000
"""Texts that the published settings ask for (`mom2_n_samples`)."""
_PREFIXES = ("mom2.", "")
"""Before the names in a file: a moment stored with other statistics (as all published ones are), or alone."""
_LAYER = re.compile(r"\.(\d+)\.")
_MODULE = re.compile(r"(?P<module>.+?)_float\d+_")


@dataclass(frozen=True, kw_only=True, eq=False)
class PublishedMoment:
    """What a published file holds."""

    matrix: Float[Tensor, "d_mlp d_mlp"]
    """Mean of k kᵀ over tokens, in float64, exactly symmetric."""
    count: int
    """Tokens in the mean."""
    samples: int | None
    """Texts that the tokens are from, if the file says it."""


def is_published(source: str | Path) -> bool:
    """Whether moments at a path are published ones: a file, a pattern with {} for the layer, or a folder of them."""
    path = Path(source)
    if path.suffix == ".npz":
        return True
    return path.is_dir() and not (path / "moments").is_dir() and any(_npz_files(path))


def npz_path(source: str | Path, layer: int, model: Model) -> Path:
    """The file of one layer.

    Args:
        source: the file; its path with {} in place of the layer's number; or a folder that holds it at any depth, as
            EasyEdit's data/stats does.
        layer: the layer.
        model: decides between files of several modules of the layer, by the name of the edited one.

    Raises:
        InputError: there is none, or there are several; the file's name speaks of another layer.
    """
    path = Path(source)
    if path.suffix != ".npz":
        return _file_in(path, layer, module_name(model, layer))
    path = Path(str(path).replace("{}", str(layer)))
    if not path.is_file():
        raise InputError(
            f"there is no file {str(path)!r}, expected the second moment of layer {layer}; check the path, in which "
            f"{{}} stands for the layer's number"
        )
    if _layer_in(path) not in (None, layer):
        raise InputError(
            f"{str(path)!r} is by its name of layer {_layer_in(path)}, expected layer {layer}; give the path with {{}} "
            f"in place of the layer's number, or the folder"
        )
    return path


def _npz_files(folder: Path) -> Iterator[Path]:
    """The .npz files in a folder at any depth, without those that are still being written, in hidden folders."""
    for path in folder.rglob("*.npz"):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            yield path


def _file_in(folder: Path, layer: int, module: str) -> Path:
    files = [path for path in sorted(_npz_files(folder)) if _layer_in(path) == layer]
    of_module = [path for path in files if (name := _MODULE.match(path.name)) and name["module"] == module]
    candidates = of_module or files
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        layers = sorted({number for path in _npz_files(folder) if (number := _layer_in(path)) is not None})
        raise InputError(
            f"the folder {str(folder)!r} holds moments of the layers {brief_list(layers)}, expected layer {layer}, in "
            f"a file such as {module}_float32_mom2_{SAMPLES}.npz; choose other layers, or collect it with mechedit "
            f"moments"
        )
    listed = brief_list(path.relative_to(folder) for path in candidates)
    raise InputError(
        f"the folder {str(folder)!r} holds {len(candidates)} moments of layer {layer} ({listed}), expected one; give "
        f"the path of a file, with {{}} in place of the layer's number"
    )


def _layer_in(path: Path) -> int | None:
    """The layer's number in a file's name, between the dots of its module's path."""
    number = _LAYER.search(path.name)
    return int(number[1]) if number else None


def module_name(model: Model, layer: int) -> str:
    """The dotted path of the edited module's matrix in the transformers model, such as transformer.h.17.mlp.c_proj."""
    return f"{model.family.blocks}.{layer}.{model.family.parts(layer).projection(model.module)}"


def read_npz(path: Path, layer: int, width: int) -> PublishedMoment:
    """Read a published moment: its sum over its count.

    Args:
        path: the file.
        layer: its layer, for messages.
        width: width of the layer's keys.

    Raises:
        InputError: it is no such file, or is damaged; its matrix does not fit, is not symmetric, not finite, or of too
            few tokens.
    """
    arrays = read_arrays(path)
    prefix = next((prefix for prefix in _PREFIXES if f"{prefix}mom2" in arrays), None)
    if prefix is None or f"{prefix}count" not in arrays:
        raise InputError(
            f"{str(path)!r} holds {brief_list(arrays)}, expected mom2.mom2 (the sum of k kᵀ) and "
            f"mom2.count (the number of tokens), as the published code writes second moments; check the path"
        )
    sums, count = _numbers(arrays[f"{prefix}mom2"], "the sum", path), _whole(arrays[f"{prefix}count"], "count", path)
    total = torch.from_numpy(sums)
    if tuple(total.shape) != (width, width):
        raise InputError(
            f"{str(path)!r} holds a matrix of shape {list(total.shape)}, expected [{width}, {width}] as the keys of "
            f"layer {layer} are {width} wide; give moments of this model, or collect them with mechedit moments"
        )
    check_matrix(total, count, repr(str(path)))
    samples = _whole(arrays["sample_size"], "sample_size", path, absent=np.nan) if "sample_size" in arrays else None
    return PublishedMoment(matrix=symmetrized(total, repr(str(path))) / count, count=count, samples=samples)


def _numbers(array: np.ndarray, what: str, path: Path) -> np.ndarray:
    """The array in the machine's byte order.

    Raises:
        InputError: it holds anything but numbers with a floating point.
    """
    if not np.issubdtype(array.dtype, np.floating):
        raise InputError(
            f"{str(path)!r}: {what} is {array.dtype!s:.80}, expected numbers with a floating point; check it"
        )
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))


def _whole(array: np.ndarray, name: str, path: Path, absent: float | None = None) -> Any:
    """A single whole number; None where it is `absent`.

    Raises:
        InputError: it is anything else, or negative.
    """
    is_number = np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
    value = float(array.reshape(())) if is_number and array.size == 1 else -1.0
    if absent is not None and value != value:
        return None
    if not 0 <= value <= LARGEST_WHOLE or value != int(value):
        raise InputError(f"{str(path)!r}: {name} is {brief(array)}, expected a whole number; check the file")
    return int(value)


@checked
def write_npz(moment: SecondMoment, model: Model, folder: str | Path, *, samples: int = SAMPLES) -> Path:
    """Write a moment as the published code reads it, in float32, and return the file's path.

    Args:
        moment: the moment.
        model: the model that it is of, whose module names the file.
        folder: folder for the file; the code looks in data/stats/MODEL/wikipedia_stats of its own folder.
        samples: number of texts that the file states and its name ends with. The published code takes only a file that
            states its own setting `mom2_n_samples`, whatever it was collected over.

    Raises:
        InputError: the moment is of another model or layer; the folder cannot be written to.
    """
    check_at_least("samples", samples, 1)
    check_moments({moment.layer: moment}, model)
    path = writable_folder(folder) / f"{module_name(model, moment.layer)}_float32_mom2_{samples}.npz"
    arrays: dict[str, Any] = {
        "mom2.constructor": "util.runningstats.SecondMoment()",
        "mom2.count": moment.count,
        "mom2.mom2": (whole(moment.matrix) * moment.count).float().cpu().numpy(),
        "sample_size": samples,
    }
    with atomic(path) as temporary:
        np.savez(temporary, **arrays)
    return path
