"""Where a model can be read and written: named sites in the forward pass, the same on every architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Part = Literal["embed", "attn_key", "attn_out", "mlp_key", "mlp_out", "resid"]
PARTS: tuple[Part, ...] = get_args(Part)
"""In forward order within a block; `embed` precedes every block."""
Module = Literal["mlp", "attn"]
"""The module that an edit is written into: the MLPs' second matrices, or attention's output projections."""
MODULES: tuple[str, ...] = get_args(Module)
_PARTS_OF_MODULE: dict[Module, tuple[Part, Part]] = {"mlp": ("mlp_key", "mlp_out"), "attn": ("attn_key", "attn_out")}


@dataclass(frozen=True)
class Site:
    """A place in the forward pass, the same on every architecture.

        tokens ── embed ─┬──────────────────────────────┬──────────────────────────────┬── resid ── next block
                         └ heads ─ attn_key ─ attn_out ─┘                              │
                                                        └ first ─ mlp_key ─ mlp_out ───┘

    (In parallel blocks, such as GPT-J's, the MLP reads what attention reads. In blocks of hybrid models that have no
    attention, what mixes positions stands in its place: a convolution, a linear attention or a state space. A mixture
    of experts stands in the MLP's, and has no `mlp_key`.) TransformerLens's hook points are named
    in brackets:

    - `embed`: output of the token embedding, after a scale that it applies itself (Gemma's) and before whatever follows
      it: position embeddings, a norm (BLOOM) or a multiplier (Granite) (`hook_embed`).
    - `attn_out`, `mlp_out`: the module's addition to the residual stream, after any post-norm (`hook_attn_out`,
      `hook_mlp_out`).
    - `mlp_key`: input of the MLP's second matrix, [d_mlp] (`mlp.hook_post`).
    - `attn_key`: input of attention's output projection: the heads' results side by side, [head · d_head]
      (`attn.hook_z`, flattened).
    - `resid`: the residual stream after the block (`hook_resid_post`).
    """

    layer: int
    """0-based index of the block; 0 for `embed`."""
    part: Part

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: forward order."""
        return (-1 if self.part == "embed" else self.layer, PARTS.index(self.part))


EMBED = Site(0, "embed")


def key_part(module: Module) -> Part:
    """The part that holds a module's keys: the input of the matrix that edits are written into."""
    return _PARTS_OF_MODULE[module][0]


def out_part(module: Module) -> Part:
    """The part that holds a module's addition to the residual stream."""
    return _PARTS_OF_MODULE[module][1]
