"""Edits on a model: temporarily with `edited`, or until they are undone with `apply_` and `undo_`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.arguments import checked
from mechedit.edit.applied_edits import (
    AppliedEdit,
    applied_edits,
    base_and_edits,
    edits_of_module,
    exact_weights,
    expected_digest,
    is_as_applied,
    restoring,
    set_applied_edits_,
    transaction,
)
from mechedit.edit.edit import Edit, check_factors, has_same_factors
from mechedit.edit.weights import digest, rounded_sum
from mechedit.errors import InputError, brief
from mechedit.models import DTYPES, Model, exclusive
from mechedit.provenance import CAST_HASHES


@checked
@contextlib.contextmanager
def edited(model: Model, edit: Edit) -> Iterator[Model]:
    """Apply `edit` within a `with` block; on leaving, however it is left, the weights are what they were.

    Example:
        >>> with me.edited(model, edit):
        ...     scores = me.evaluate(model, requests)

    Nobody else uses the model within the block: other threads wait until it has ended, and see it unedited.

    Raises:
        InputError: the edit was made for other weights, or some weights would exceed the range of their dtype; another
            task of this thread uses the model (`Model.exclusive`).
    """
    with model.exclusive(), contextlib.ExitStack() as stack:
        check_model(model, edit)
        stack.enter_context(restoring(model, edit.layers))
        for layer in edit.layers:
            add_(model, layer, edit.delta(layer, model.mesh))
        model.temporary_edits += 1
        try:
            yield model
        finally:
            model.temporary_edits -= 1


@exclusive
def apply_(model: Model, edit: Edit) -> None:
    """Apply `edit` until `undo_`. One copy of each edited layer's original weights is kept beside the model.

    Edits may follow one another, each made on the model as the former left it. With W₀ the weights before the first,
    the k-th leaves W₀ + Σ ΔW rounded once, not the sum of k roundings.

    Example:
        >>> me.apply_(model, edit)
        >>> me.undo_(model, edit)  # the weights are again what they were, bit for bit

    Raises:
        InputError: the edit was made for other weights, or some weights would exceed the range of their dtype.
    """
    check_model(model, edit)
    with_base = [layer for layer in edit.layers if is_as_applied(model, layer)]
    with transaction(model, edit.layers) as originals:
        for layer in edit.layers:
            add_(model, layer, edit.delta(layer, model.mesh))
        bases = {layer: original for layer, original in originals.items() if layer not in with_base}
        digests = {layer: digest(model.projection(layer)) for layer in edit.layers}
        entry = AppliedEdit(edit=edit, bases=bases, digests=digests)
        set_applied_edits_(model, (*applied_edits(model), entry))


@exclusive
def undo_(model: Model, edit: Edit) -> None:
    """Take back the edit that was applied last: the weights come back bit for bit.

    Raises:
        InputError: `edit` is not applied, another was applied after it, or it is for another module.
    """
    check_module(model, edit)
    applied = applied_edits(model)
    matches = [index for index, entry in enumerate(applied) if has_same_factors(edit, entry.edit)]
    if not matches:
        raise InputError(
            f"the edit is not applied to {model.name!r} (applied here: {len(applied)}); expected one that apply_ put "
            f"on this model in this process: the original weights are kept in memory, and neither an edit file nor "
            f"an exported checkpoint holds them, so load the unedited model again"
        )
    if matches[-1] != len(applied) - 1:
        later = len(applied) - 1 - matches[-1]
        raise InputError(f"{later} edits were applied after this one, expected none; undo the last one first")
    with transaction(model, edit.layers):
        for layer in edit.layers:
            _write_(model, layer, _weights_before_last(model, layer, edits_of_module(model)))
        set_applied_edits_(model, applied[:-1])


def add_(model: Model, layer: int, delta: Float[Tensor, "d_mlp d_model"]) -> None:
    """Add `delta` to a layer's down-projection; the sum is taken in float64 and rounded once (`rounded_sum`).

    Where edits are applied, the sum starts from the weights before the first of them. An edit that is made on a model
    and applied to it afterwards leaves the same bits both times. Where the weights are split over processes, each adds
    its rows of `delta`, which may be split or whole.

    Raises:
        InputError: some weights would exceed the range of their dtype; the layer is left as it was.
    """
    base, edits = exact_weights(model, layer)
    # Computed one at a time, since each is as large as the layer.
    earlier = (edit.delta(layer, model.mesh) for edit in edits)
    _write_(model, layer, rounded_sum(base, itertools.chain(earlier, [delta]), f"layer {layer}", mesh=model.mesh))


def check_model(model: Model, edit: Edit) -> None:
    """Refuse a model that the edit was not made for: other weights, where the same ones in another dtype will do.

    Raises:
        InputError: another module is written, the weights differ from those in the manifest, a layer does not fit, or
            factors are not finite.
    """
    check_module(model, edit)
    made_for = edit.manifest.get("model") or {}
    if not _has_weights(model, made_for):
        raise InputError(
            f"the edit was made for {made_for.get('model')!r} with weights {made_for.get('weights_hash')} in "
            f"{made_for.get('dtype')}, found {model.name!r} with weights {model.weights_hash()} in "
            f"{str(model.dtype).removeprefix('torch.')}; load the model it was made for, or undo other edits first"
        )
    for layer in edit.layers:
        factors = edit.factors[layer]
        edit_shape = (len(factors.left), factors.right.shape[1])
        model_shape = tuple(model.projection(layer).shape) if 0 <= layer < model.n_layers else None
        if edit_shape != model_shape:
            raise InputError(
                f"the edit's layer {layer} is {edit_shape}, but the model's is {model_shape or 'absent'}; the edit "
                f"file is damaged or of another model"
            )
    check_factors(edit)


def _has_weights(model: Model, made_for: Mapping[str, Any]) -> bool:
    """Whether a model has the weights that an edit was made for, in the same dtype or rounded to another one.

    Rounded from the dtype that the edit was made in to the model's, or (in edits that do not record these hashes) from
    the model's to the edit's.
    """
    weights_hash, dtype = made_for.get("weights_hash"), made_for.get("dtype")
    model_dtype = str(model.dtype).removeprefix("torch.")
    casts = made_for.get(CAST_HASHES) or {}
    if model.weights_hash() in (weights_hash, casts.get(model_dtype)):
        return True
    if weights_hash is None or dtype not in DTYPES or dtype == model_dtype:
        return False
    return model.cast_hashes([dtype])[dtype] == weights_hash


def check_module(model: Model, edit: Edit) -> None:
    """Raise InputError when the model writes into another module than the edit does."""
    if not isinstance(edit, Edit):
        raise InputError(f"the edit is {brief(edit)}, expected an Edit, as a method returns it or Edit.load reads it")
    if edit.module != model.module:
        raise InputError(
            f"the edit was made for the module {edit.module!r}, found {model.name!r} writing into {model.module!r}, "
            f"whose matrices are others; use model.writing({edit.module!r})"
        )


def _weights_before_last(model: Model, layer: int, applied: Sequence[AppliedEdit]) -> Float[Tensor, "d_mlp d_model"]:
    """A layer's weights before the last of the applied edits.

    Raises:
        InputError: the sum does not have the digest that was recorded.
    """
    *earlier, last = applied
    if layer in last.bases:
        return last.bases[layer]
    base, edits = base_and_edits(layer, earlier)
    assert base is not None, layer
    deltas = (edit.delta(layer, model.mesh) for edit in edits)
    weight = rounded_sum(base, deltas, f"layer {layer}", mesh=model.mesh)
    if (actual := digest(weight)) != (expected := expected_digest(layer, earlier)):
        raise InputError(
            f"layer {layer} would come back with digest {actual[:12]}, expected {str(expected)[:12]}: float64 products "
            f"no longer give the same bits as when the edits were applied; set the number of threads "
            f"(torch.set_num_threads) to what it was then and undo again, or load the unedited model"
        )
    return weight


@torch.no_grad()
def _write_(model: Model, layer: int, weight: Float[Tensor, "d_mlp d_model"]) -> None:
    model.write_projection_(layer, weight)
