"""The editor of MEND (Mitchell et al., 2022): the network that turns a gradient into an edit, and its file.

A loss has at a projection W the gradient Σ_t u_t δ_tᵀ over tokens t, u being the key and δ the gradient at the output.
With z = [û; δ̂], each coordinate in units of its mean and standard deviation over the requests that it is trained with,
the editor returns [ũ; δ̃] = g_l(z) at layer l (Eq. 3):

    h = z + σ(s¹_l ⊙ (U₁ V₁ z + b₁) + o¹_l),        g_l(z) = h + σ(s²_l ⊙ (U₂ V₂ h + b₂) + o²_l),

σ = max(·, 0), U and V of low rank and shared by the layers; scales s, offsets o and the rate α are each layer's own.
The edit is

    ΔW_l = −α_l Σ_t ũ_t δ̃_tᵀ.

U, b and o are zero at first and s is one, so that g_l is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import TypedDict

from mechedit.edit import Factors
from mechedit.errors import InputError, brief, check_finite
from mechedit.files import read_header, read_tensors, write_tensors
from mechedit.methods.tuned_settings import is_of_model, tuned_folder_of, unedited_identity
from mechedit.models import Model
from mechedit.notices import warn
from mechedit.provenance import ModelIdentity
from mechedit.records import ModelRecord, Number, Whole, check_record

MEND_FILE = "mend.safetensors"
"""Name of an editor's file beside the checkpoint that it is of, or in the folder of tuned settings."""
METADATA_KEY = "editor"
"""Name of the record in the file's metadata."""
REMEDY = "train one for this model with mechedit train-mend"
_LEAST_DEVIATION = 1e-2
"""Standard deviation that a coordinate has at least, in units of the mean one of its kind and layer."""


class CurveRow(TypedDict):
    """A validation."""

    step: Whole
    loss: Number
    edit: Number
    locality: Number
    exact_match: Number


class MendRecord(ModelRecord, total=False):
    """What an editor's file says of itself: the model that it is of, and how it was trained."""

    layers: Required[list[Whole]]
    rank: Required[Whole]
    d_key: Required[Whole]
    d_model: Required[Whole]
    steps: Required[Whole]
    trained: Whole
    curve: Required[list[CurveRow]]
    requests: str
    texts: str
    settings: dict[str, Any]


class ResidualBlock(nn.Module):
    """x + σ(s_l ⊙ (U V x + b) + o_l): the identity at first."""

    def __init__(self, width: int, layers: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(width, rank))
        # Xavier's normal initialization.
        scale = (2 / (width + rank)) ** 0.5
        self.right = nn.Parameter(scale * torch.randn(rank, width, generator=generator))
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(layers, width))
        self.shift = nn.Parameter(torch.zeros(layers, width))

    def forward(self, value: Float[Tensor, "token width"], index: int) -> Float[Tensor, "token width"]:
        """The block's output at the layer of this index."""
        product = value @ self.right.T @ self.left.T + self.bias
        # As a clamp, whose gradient at 0, where all begins, is not 0.
        return value + (self.scale[index] * product + self.shift[index]).clamp(min=0)


class EditorNetwork(nn.Module):
    """g of all layers, their rates α, and the means and deviations of what goes in."""

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, d_key: int, d_model: int, layers: int, rank: int, rate: float | int = 1e-4, seed: int = 0
    ) -> None:
        """An editor that returns what goes in.

        Args:
            d_key: width of u.
            d_model: width of δ.
            layers: number of layers.
            rank: of U V; at most d_key + d_model.
            rate: α of every layer at first.
            seed: of V.
        """
        super().__init__()
        generator, width = torch.Generator().manual_seed(seed), d_key + d_model
        self.d_key = d_key
        self.blocks = nn.ModuleList(ResidualBlock(width, layers, min(rank, width), generator) for _ in range(2))
        self.rates = nn.Parameter(torch.full((layers,), float(rate)))
        self.register_buffer("mean", torch.zeros(layers, width))
        self.register_buffer("deviation", torch.ones(layers, width))

    def forward(
        self, index: int, keys: Float[Tensor, "token d_key"], gradients: Float[Tensor, "token d_model"]
    ) -> tuple[Float[Tensor, "token d_key"], Float[Tensor, "token d_model"]]:
        """ũ and δ̃ at the layer of this index."""
        value = (torch.cat([keys, gradients], 1).to(self.mean) - self.mean[index]) / self.deviation[index]
        for block in self.blocks:
            value = block(value, index)
        return value[:, : self.d_key], value[:, self.d_key :]

    def factors(
        self, index: int, keys: Float[Tensor, "token d_key"], gradients: Float[Tensor, "token d_model"]
    ) -> Factors:
        """ΔW of the layer of this index, a column and a row for each token."""
        pseudo_keys, pseudo_gradients = self(index, keys, gradients)
        return Factors(left=pseudo_keys.T, right=-self.rates[index] * pseudo_gradients)

    @torch.no_grad()
    def fit_units(
        self, index: int, keys: Float[Tensor, "token d_key"], gradients: Float[Tensor, "token d_model"]
    ) -> None:
        """Take means and standard deviations of the layer of this index from these tokens."""
        for part, start in ((keys.double(), 0), (gradients.double(), self.d_key)):
            mean, deviation = part.mean(0), part.std(0, correction=0)
            least = _LEAST_DEVIATION * deviation.mean()
            deviation = deviation.clamp_min(least) if least > 0 else torch.ones_like(deviation)
            self.mean[index, start : start + part.shape[1]] = mean.to(self.mean)
            self.deviation[index, start : start + part.shape[1]] = deviation.to(self.mean)


@dataclass(frozen=True, kw_only=True, eq=False)
class MendEditor:
    """A trained editor: its network, the layers that it edits, and where it comes from."""

    network: EditorNetwork
    layers: tuple[int, ...]
    """0-based, ascending."""
    record: Mapping[str, Any]
    """The model, the training's settings and data, and its validation curve."""

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically, with the record in its header."""
        write_tensors(path, self.network.state_dict(), METADATA_KEY, dict(self.record))

    @staticmethod
    def load(path: str | Path) -> MendEditor:
        """Read what `save` wrote.

        Raises:
            InputError: the file is absent, damaged or not an editor; its tensors do not fit its record or each other,
                or are not finite.
        """
        tensors, record = read_tensors(path, METADATA_KEY)
        check_record(record, MendRecord, f"the record of {str(path)!r}", REMEDY)
        network = network_of(tensors, record, path)
        return MendEditor(network=network, layers=tuple(record["layers"]), record=record)

    def require(self, model: Model, path: str | Path) -> None:
        """Refuse another model than the editor was trained for.

        Raises:
            InputError: names what differs.
        """
        if not is_of_model(self.record, model):
            unedited_identity(model).require(ModelIdentity.of(self.record), f"the editor {str(path)!r}", REMEDY)


def network_of(tensors: Mapping[str, Tensor], record: Mapping[str, Any], path: str | Path) -> EditorNetwork:
    """The network of some tensors.

    Args:
        tensors: by their names in the network.
        record: says the widths, the layers and the rank.
        path: of the file, for messages.

    Raises:
        InputError: they do not fit, or are not finite.
    """
    d_key, d_model, layers, rank = record["d_key"], record["d_model"], record["layers"], record["rank"]
    # Held against the tensors that are there before a network of these sizes is made.
    expected = _shapes(d_key + d_model, len(layers), rank)
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    if shapes != expected or layers != sorted(set(layers)) or not layers:
        differing = next((name for name in {**expected, **shapes} if shapes.get(name) != expected.get(name)), "layers")
        raise InputError(
            f"{str(path)!r} is no editor of its record: {differing!r:.80} is {shapes.get(differing, 'absent')}, "
            f"expected {expected.get(differing, 'none')}; {REMEDY}"
        )
    for name, value in tensors.items():
        check_finite(f"the values of {name!r} in {str(path)!r}", value)
    network = EditorNetwork(d_key, d_model, len(layers), rank)
    network.load_state_dict(dict(tensors))
    return network


def read_editor_record(path: str | Path) -> dict[str, Any]:
    """What an editor's file says of itself, without its network.

    Raises:
        InputError: the file is absent, damaged or not an editor.
    """
    record = read_header(path, METADATA_KEY)
    check_record(record, MendRecord, f"the record of {str(path)!r}", REMEDY)
    if not (layers := record["layers"]) or layers != sorted(set(layers)):
        raise InputError(
            f"the editor {str(path)!r} is of the layers {brief(layers)}, expected some, ascending; {REMEDY}"
        )
    return record


def find_editor(model: Model) -> Path | None:
    """The file of the model's editor: that beside its checkpoint, else that in the folder of tuned settings.

    One of another model is left out with a warning: a checkpoint that was trained on carries that of its source.
    """
    folders = [Path(model.checkpoint)] if model.checkpoint else []
    for path in [*(folder / MEND_FILE for folder in folders), tuned_folder_of(model) / MEND_FILE]:
        if path.is_file():
            if is_of_model(read_editor_record(path), model):
                return path
            warn(f"{str(path)!r} was trained for another model, and is left out: {REMEDY}")
    return None


def _shapes(width: int, layers: int, rank: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors by their names."""
    block = {
        "left": (width, rank), "right": (rank, width), "bias": (width,), "scale": (layers, width),
        "shift": (layers, width),
    }  # fmt: skip
    blocks = {f"blocks.{number}.{name}": shape for number in range(2) for name, shape in block.items()}
    return {"rates": (layers,), "mean": (layers, width), "deviation": (layers, width), **blocks}
