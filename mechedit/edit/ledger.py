"""The ledger of a model: which edits are applied to it, and what is needed to take them back.

A layer's weights are kept once, however many edits are applied to it: the k-th edit's weights are the sum of the
copy and k deltas, rounded once. So edits in a row do not gather rounding errors, and taking back the last one is
taking that sum again without it. Layers that something else has changed in between start a new copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from mechedit.edit.value import Edit
from mechedit.edit.weights import copies, digest, restore_
from mechedit.models import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """An edit that is applied."""

    edit: Edit
    bases: Mapping[int, Float[Tensor, "d_mlp d_model"]]
    """Copies of weights as they were before it, of the layers whose weights no earlier entry accounts for."""
    digests: Mapping[int, str]
    """Of each of its layers' weights as it left them."""

    def __deepcopy__(self, memo: object) -> Entry:
        # Nothing in it is ever written to, and a copy of a model need not copy its former weights.
        return self


def ledger(model: Model) -> tuple[Entry, ...]:
    """The edits applied to this model, oldest first; kept on the module that owns the weights."""
    return model.edit_log


def own_ledger(model: Model) -> tuple[Entry, ...]:
    """Those edits that are in the module that the model writes into: each layer has a matrix of either."""
    return tuple(entry for entry in ledger(model) if entry.edit.module == model.module)


def note_(model: Model, entries: tuple[Entry, ...]) -> None:
    """Replace the model's ledger."""
    model.edit_log = entries


def account(layer: int, entries: Sequence[Entry]) -> tuple[Float[Tensor, "d_mlp d_model"] | None, list[Edit]]:
    """What a layer's weights are by these entries: a copy and the edits to add to it, oldest first.

    The copy is None when the entries do not reach the layer.
    """
    edits: list[Edit] = []
    for entry in reversed(entries):
        if layer in entry.digests:
            edits.insert(0, entry.edit)
        if layer in entry.bases:
            return entry.bases[layer], edits
    return None, []


def noted_digest(layer: int, entries: Sequence[Entry]) -> str | None:
    """The digest that a layer's weights have by these entries."""
    return next((entry.digests[layer] for entry in reversed(entries) if layer in entry.digests), None)


def accounted(model: Model, layer: int) -> bool:
    """Whether the layer's weights are what the ledger says, so that they are known exactly."""
    noted = noted_digest(layer, own_ledger(model))
    return noted is not None and noted == digest(model.projection(layer))


@contextlib.contextmanager
def preserved(model: Model, layers: Sequence[int]) -> Iterator[None]:
    """On leaving, put the down-projections of `layers` back bit for bit, whatever was done to them."""
    originals, entries = copies(model, layers), ledger(model)
    try:
        yield
    finally:
        restore_(model, originals)
        note_(model, entries)


@contextlib.contextmanager
def all_or_nothing(model: Model, layers: Sequence[int]) -> Iterator[Mapping[int, Float[Tensor, "d_mlp d_model"]]]:
    """Yield copies of `layers`; when the block fails or is interrupted, they and the ledger are put back."""
    with contextlib.ExitStack() as failure:
        entries, originals = ledger(model), copies(model, layers)
        failure.callback(note_, model, entries)
        failure.callback(restore_, model, originals)
        yield originals
        failure.pop_all()
