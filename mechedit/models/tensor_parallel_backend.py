"""The backend of models whose weights are split over processes: transformers' own modules, with torch's hooks.

TransformerLens and nnsight call a module's own forward, and pass by the one in which transformers brings the parts
together: their products then mix whole tensors and split ones. A hook on a module leaves its forward as it is.

The residual stream, and what attention and MLPs add to it, are whole in each process. The keys of a down-projection are
split along d_mlp; a hook there gathers those of a batch, and each process takes its columns of what is written. Second
moments and the keys of an edit are split in rows (`Model.mesh`). All else in mechedit works on whole tensors, in each
process the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from typing_extensions import override

from mechedit.errors import InputError
from mechedit.models.backend import BackendModel
from mechedit.models.hook_points import HookPointEngine, ModulePoint, Visit
from mechedit.models.readout import WholeReadout
from mechedit.models.sites import Site
from mechedit.split_tensors import columns_here, gathered_columns, is_split, part_here, rows_of, summed, whole, write_


class SplitEngine(HookPointEngine):
    """Calls the copy with hooks on its modules."""

    @override
    def point(self, site: Site) -> ModulePoint:
        module = self.model.get_submodule(self.family.path(site))
        return _KeyPoint(module, "hook_in") if site.part in ("attn_key", "mlp_key") else ModulePoint(module, "hook_out")


class _KeyPoint(ModulePoint):
    """The input of a projection, of which each process has its columns."""

    @override
    def add_hook(self, visit: Visit, level: int) -> None:
        weight: Any = self.module.weight

        def on_part(part: Tensor, hook: Any) -> Tensor | None:
            if not is_split(weight) or part.shape[-1] == weight.shape[1]:
                return visit(part, hook)
            after = visit(gathered_columns(part, weight), hook)
            return None if after is None else columns_here(after, weight)

        super().add_hook(on_part, level)


class TensorParallelModel(BackendModel):
    """A model whose weights are split over processes, which all call the same methods in the same order."""

    backend = "transformers"
    engine = SplitEngine
    has_fast_engine = False

    @property
    @override
    def mesh(self) -> DeviceMesh:
        return next(weight for _, weight in self.named_parameters() if is_split(weight)).device_mesh

    @override
    def projection(self, layer: int) -> Float[Tensor, "d_key d_model"]:
        """A copy of the edited module's matrix, gathered; `write_projection_` writes it."""
        return whole(super().projection(layer))

    @override
    def down_projection(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """A copy of the MLP's second matrix, gathered."""
        return whole(super().down_projection(layer))

    @override
    @torch.no_grad()
    def write_projection_(self, layer: int, weight: Float[Tensor, "d_key d_model"]) -> None:
        write_(self._matrix(layer, self.module), weight)

    @override
    def _key_product(self, layer: int, keys: Float[Tensor, "*batch d_key"]) -> Float[Tensor, "*batch d_model"]:
        """Keys · W, whole; of keys that are split along d_key, the sum of what each process makes of its part."""
        if not is_split(keys):
            return super()._key_product(layer, keys)
        weight = self._matrix(layer, self.module)
        has_rows_here = is_split(weight) and weight.placements == (Shard(0),)
        in_rows = weight if has_rows_here else rows_of(whole(weight), keys.device_mesh)
        return summed(part_here(keys) @ part_here(in_rows).to(keys.dtype), keys)

    @override
    def readout(self) -> WholeReadout:
        return WholeReadout()

    @override
    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None, text: str | None = None) -> None:
        """Refuse.

        Raises:
            InputError: says what to do instead.
        """
        raise self._refused("cannot be exported")

    @override
    def logits_with_adapter(self, folder: str | Path, ids: Int[Tensor, "1 pos"]) -> None:
        """Refuse.

        Raises:
            InputError: says what to do instead.
        """
        raise self._refused("cannot take an adapter")

    def _refused(self, what: str) -> InputError:
        return InputError(
            f"the model {self.name!r} is split over processes and {what}; expected one in a single process: save the "
            f"edit (Edit.save) in the first process, load the model without tp and export the edit there"
        )
