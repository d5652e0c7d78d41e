"""The edits that are applied to a model, and the copies of weights that taking them back needs.

A layer's weights are copied once, however many edits are applied to it: after the k-th edit they are the sum of the
copy and k deltas, rounded once. So rounding errors do not add up over edits, and undoing the last one means taking that
sum again without it. Layers that something else has changed in between start from a new copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechedit.edit.edit import Edit
from mechedit.edit.weights import copy_weights, digest, restore_
from mechedit.interrupts import insist
from mechedit.models import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class AppliedEdit:
    """An edit that is applied, with what undoing it needs."""

    edit: Edit
    bases: Mapping[int, Float[Tensor, "d_mlp d_model"]]
    """Copies of the weights before it, for the layers whose weights do not follow from earlier edits."""
    digests: Mapping[int, str]
    """SHA-256 of each of its layers' weights after it."""

    def __deepcopy__(self, memo: object) -> AppliedEdit:
        # Nothing in it is ever written to, and a copy of a model need not copy its former weights.
        return self


def applied_edits(model: Model) -> tuple[AppliedEdit, ...]:
    """The edits applied to this model, oldest first; stored on the module that owns the weights."""
    return model.edit_log


def edits_of_module(model: Model) -> tuple[AppliedEdit, ...]:
    """The applied edits of the module that the model writes into: each layer has one matrix of either module."""
    return tuple(applied for applied in applied_edits(model) if applied.edit.module == model.module)


def set_applied_edits_(model: Model, applied: tuple[AppliedEdit, ...]) -> None:
    """Replace the model's list of applied edits."""
    model.edit_log = applied


def base_and_edits(
    layer: int, applied: Sequence[AppliedEdit]
) -> tuple[Float[Tensor, "d_mlp d_model"] | None, list[Edit]]:
    """The copy of a layer's weights, and the edits to add to it, oldest first; their sum is the layer's weights.

    The copy is None when no edit touches the layer.
    """
    edits: list[Edit] = []
    for entry in reversed(applied):
        if layer in entry.digests:
            edits.insert(0, entry.edit)
        if layer in entry.bases:
            return entry.bases[layer], edits
    return None, []


def expected_digest(layer: int, applied: Sequence[AppliedEdit]) -> str | None:
    """The digest of a layer's weights after these edits; None when none of them touches the layer."""
    return next((entry.digests[layer] for entry in reversed(applied) if layer in entry.digests), None)


def is_as_applied(model: Model, layer: int) -> bool:
    """Whether the layer's weights are just what the applied edits left, so that they are known exactly."""
    expected = expected_digest(layer, edits_of_module(model))
    return expected is not None and expected == digest(model.projection(layer))


def exact_weights(model: Model, layer: int) -> tuple[Float[Tensor, "d_mlp d_model"], list[Edit]]:
    """A layer's weights before rounding, as a matrix and the edits to add to it, oldest first.

    The copy and the edits applied to it, where the layer's weights are as they left them; else the weights as they are.
    """
    base, edits = base_and_edits(layer, edits_of_module(model)) if is_as_applied(model, layer) else (None, [])
    return (model.projection(layer) if base is None else base), edits


@dataclass(kw_only=True, eq=False)
class Snapshot:
    """The weights that a block puts back when it is left."""

    module: str
    """The module that the model writes into."""
    originals: dict[int, Float[Tensor, "d_mlp d_model"]]
    """The down-projections by layer."""
    applied: tuple[AppliedEdit, ...]
    """The edits that were applied."""

    def inherit(self, outer: Snapshot) -> None:
        """Put back what an outer block would have, which was left before this one."""
        self.applied = outer.applied
        if self.module == outer.module:
            self.originals |= {layer: weight for layer, weight in outer.originals.items() if layer in self.originals}


@contextlib.contextmanager
def restoring(model: Model, layers: Sequence[int]) -> Iterator[None]:
    """On leaving, put the down-projections of `layers` back bit for bit, whatever was done to them.

    Nobody else uses the model within the block.

    Raises:
        InputError: as `Model.exclusive`; on leaving, another such block that began later has not ended yet. All weights
            are what they were when both have ended.
    """
    with model.exclusive() as region:
        snapshot = Snapshot(module=model.module, originals=copy_weights(model, layers), applied=applied_edits(model))
        region.snapshot = snapshot

        def put_back() -> None:
            restore_(model, snapshot.originals)
            set_applied_edits_(model, snapshot.applied)
            for later in region.inner:
                if later.snapshot is not None:
                    later.snapshot.inherit(snapshot)

        try:
            yield
        finally:
            try:
                region.settle()  # which Ctrl-C may end
            finally:
                insist(put_back)


@contextlib.contextmanager
def transaction(model: Model, layers: Sequence[int]) -> Iterator[Mapping[int, Float[Tensor, "d_mlp d_model"]]]:
    """Yield copies of `layers`; when the block fails or is interrupted, the weights and the applied edits are put back.

    When it succeeds, all changes stay. Nobody else uses the model within the block.
    """
    with model.exclusive(), contextlib.ExitStack() as on_failure:
        applied, originals = applied_edits(model), copy_weights(model, layers)
        on_failure.callback(set_applied_edits_, model, applied)
        on_failure.callback(restore_, model, originals)
        yield originals
        on_failure.pop_all()
