"""`load_moments`: moments that mechedit wrote, or that the published code did, checked against the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.arguments import checked
from mechedit.errors import InputError
from mechedit.models import Model
from mechedit.moments.key_energy import TEXTS, check_energies
from mechedit.moments.npz_file import is_published, npz_path, read_npz
from mechedit.moments.second_moment import SecondMoment, check_moments, load_moment
from mechedit.provenance import ALGORITHMS, file_hash
from mechedit.split_tensors import rows_here, split_in_rows


@checked
def load_moments(
    source: str | Path, layers: Sequence[int], model: Model | None = None, *, texts: Sequence[str] = TEXTS
) -> dict[int, SecondMoment]:
    """Read the moments of `layers`: ours from `source`/moments, or published ones (.npz) of memit, rome or EasyEdit.

    Ours say what they were made with. Published ones do not: they are held against the model, whose keys are measured
    on a few texts (`mechedit.moments.key_energy`), and then count as this model's. What that cannot tell from the model
    is one that was fine-tuned a little from the same weights.

    Args:
        source: results folder; or a .npz file, its path with {} in place of the layer's number, or a folder that holds
            such files at any depth.
        layers: layers to read.
        model: if given, the moments are checked against it and put on its device. Published ones need it.
        texts: texts for the check of published moments.

    Raises:
        InputError: a file is absent, damaged, or of another model or layer; its matrix does not fit, is of too few
            tokens, or not finite; published moments without a model.
    """
    if is_published(source):
        if model is None:
            raise InputError(
                f"{str(source)!r} holds published moments, which do not say whose they are, and there is no model to "
                f"hold them against; pass it: load_moments(source, layers, model)"
            )
        moments = _published(source, layers, model, texts)
    else:
        mapped = model is not None and model.mesh is not None
        moments = {layer: load_moment(source, layer, mapped=mapped) for layer in layers}
    if model is None:
        return moments
    check_moments(moments, model)
    return {
        layer: dataclasses.replace(moment, matrix=_placed(moment.matrix, model)) for layer, moment in moments.items()
    }


def _placed(matrix: Float[Tensor, "d_mlp d_mlp"], model: Model) -> Float[Tensor, "d_mlp d_mlp"]:
    """The matrix on the model's device; of a model that is split over processes, the rows that belong here."""
    # MPS has no float64: there the moments stay on the CPU, and so does all that is solved with them.
    device = torch.device("cpu") if model.device.type == "mps" else model.device
    if model.mesh is None:
        return matrix.to(device)
    rows = rows_here(len(matrix), model.mesh)
    return split_in_rows(matrix[rows.start : rows.stop].to(device, copy=True), model.mesh)


def _published(
    source: str | Path, layers: Sequence[int], model: Model, texts: Sequence[str]
) -> dict[int, SecondMoment]:
    """Read published moments and hold them against the model."""
    paths = {layer: npz_path(source, layer, model) for layer in layers}
    published = {layer: read_npz(path, layer, model.d_key) for layer, path in paths.items()}
    energies = {layer: moment.matrix.diagonal() for layer, moment in published.items()}
    matches = check_energies(energies, model, {layer: repr(str(path)) for layer, path in paths.items()}, texts)
    return {
        layer: SecondMoment(
            layer=layer,
            matrix=moment.matrix,
            count=moment.count,
            provenance={
                **model.provenance(),
                "algorithm": ALGORITHMS["moments"],
                "layer": layer,
                "count": moment.count,
                "published": {
                    "file": paths[layer].name,
                    "sha256": file_hash(paths[layer]),
                    "samples": moment.samples,
                    **matches[layer].record,
                },
            },
        )
        for layer, moment in published.items()
    }
