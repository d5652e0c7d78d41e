"""The module that edits are written into: its matrix, its keys, and what it adds to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechedit.models.family import Family
from mechedit.models.model_lock import exclusive_method
from mechedit.models.projections import projection_matrix
from mechedit.models.shortcuts import blocks_of
from mechedit.models.sites import Module, Site, key_part
from mechedit.split_tensors import whole


class EditedModule:
    """A transformers model as seen from the module that is edited; the base of `BackendModel`."""

    def __init__(self, hf: Any, family: Family, name: str) -> None:
        self.hf, self.family, self.name = hf, family, name
        self.n_layers = len(hf.get_submodule(family.blocks))
        self.d_model: int = hf.config.get_text_config().hidden_size
        self.module: Module = "mlp"
        self.d_mlp = self.d_key = self._key_width("mlp")

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.hf.get_submodule(self.family.embedding).weight.dtype

    def key_site(self, layer: int) -> Site:
        """Site of a layer's keys: the input of `projection`."""
        return Site(layer, key_part(self.module))

    def width(self, site: Site) -> int:
        """Width of the activation at a site.

        Raises:
            InputError: a key of a module that has no matrix between key and output.
        """
        if site.part in ("attn_key", "mlp_key"):
            return len(self._matrix(site.layer, "attn" if site.part == "attn_key" else "mlp"))
        return self.hf.get_input_embeddings().weight.shape[1] if site.part == "embed" else self.d_model

    def scale(self, site: Site) -> float | int:
        """Factor between what a module computes at a site and what is added to the residual stream."""
        if site.part not in ("attn_out", "mlp_out"):
            return 1
        return self.family.parts(site.layer).scale("attn" if site.part == "attn_out" else "mlp")

    def _key_width(self, module: Module) -> int:
        """Width of a module's keys in the first block that has a matrix to write into; 0 where none has."""
        layers = (layer for layer in range(self.n_layers) if self.family.parts(layer).projection(module) is not None)
        first = next(layers, None)
        return 0 if first is None else len(self._matrix(first, module))

    def projection(self, layer: int) -> Float[Tensor, "d_key d_model"]:
        """A live view of the edited module's matrix, always [d_key, d_model]; writing to it edits the model."""
        return self._matrix(layer, self.module)

    def down_projection(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """A live view of the MLP's second matrix, always [d_mlp, d_model], whichever module is edited."""
        return self._matrix(layer, "mlp")

    def write_projection_(self, layer: int, weight: Float[Tensor, "d_key d_model"]) -> None:
        """Put other numbers into the edited module's matrix; see `mechedit.models.protocol.Model.write_projection_`."""
        self.projection(layer).copy_(weight)

    def _matrix(self, layer: int, module: Module) -> Float[Tensor, "d_key d_model"]:
        """A live view of the matrix through which a module adds to the residual stream."""
        return projection_matrix(self, layer, module)

    @torch.no_grad()
    @exclusive_method
    def module_output(self, layer: int, keys: Float[Tensor, "*batch d_key"]) -> Float[Tensor, "*batch d_model"]:
        """The edited module's addition to the residual stream at these keys: keys · W + b, after any post-norm."""
        raw = self._raw_output(layer, keys)
        return (self._gain(layer, raw) * raw).to(keys.device)

    @torch.no_grad()
    def output_gain(self, layer: int, keys: Float[Tensor, "*batch d_key"]) -> Float[Tensor, "*batch d_model"]:
        """`module_output` in units of the projection's output: g / rms(keys · W + b) with a post-norm, else 1."""
        return self._gain(layer, self._raw_output(layer, keys)).to(keys.device)

    def _gain(self, layer: int, raw: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The gain at outputs of the projection, on the layer's device as they are."""
        parts = self.family.parts(layer)
        after, scale = parts.norm_after(self.module), parts.scale(self.module)
        if after is None:
            return torch.full_like(raw, scale)
        norm = blocks_of(self.hf, self.family)[layer].get_submodule(after)
        direction = self._norm_weight(norm, raw)
        # The norm's own output tells its scale, whatever it adds to rms(x) under the root.
        unit, out = direction * raw, norm(raw.to(self.dtype)).to(raw)
        return scale * direction * (out * unit).sum(-1, keepdim=True) / unit.square().sum(-1, keepdim=True)

    @torch.no_grad()
    def norm_gain(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """The norm's g where the edited module adds g ⊙ x / rms(x) of its projection's output x; None without one."""
        parts = self.family.parts(layer)
        after = parts.norm_after(self.module)
        if after is None:
            return None
        norm = blocks_of(self.hf, self.family)[layer].get_submodule(after)
        like = torch.empty(0, device=self._matrix(layer, self.module).device, dtype=torch.float32)
        return parts.scale(self.module) * self._norm_weight(norm, like)

    def _norm_weight(self, norm: nn.Module, like: Tensor) -> Float[Tensor, " d_model"]:
        """What a norm makes of ones, whose rms is 1."""
        return norm(torch.ones(self.d_model, device=like.device, dtype=self.dtype)).to(like)

    def _raw_output(self, layer: int, keys: Float[Tensor, "*batch d_key"]) -> Float[Tensor, "*batch d_model"]:
        """Keys · W + b, on the layer's device."""
        out = self._key_product(layer, keys)
        block = blocks_of(self.hf, self.family)[layer]
        path = self.family.parts(layer).projection(self.module)
        assert path is not None, "the projection exists"
        bias: Any = block.get_submodule(path).bias
        return out if bias is None else out + whole(bias).to(out)

    def _key_product(self, layer: int, keys: Float[Tensor, "*batch d_key"]) -> Float[Tensor, "*batch d_model"]:
        """Keys · W, on the layer's device."""
        weight = self.projection(layer)
        return keys.to(weight.device) @ weight.to(keys.dtype)
