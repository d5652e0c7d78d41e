"""Where one architecture keeps its parts: module paths, and what stands between a module and the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mechedit.models.sites import Module, Site


@dataclass(frozen=True, kw_only=True)
class BlockParts:
    """Paths to the parts of a block, from the block.

    The orientation of a matrix is not among them: it follows from its module's type, Linear or Conv1D.
    """

    attn: str
    """The module that moves information between positions: attention, or in some blocks of a hybrid model a
    convolution, a linear attention or a state space. If its output is a tuple, the first item counts."""
    mlp: str
    """The MLP, or the mixture of experts."""
    down: str | None
    """The MLP's second matrix (down-projection); its input is the key. None where no single matrix is that."""
    attn_proj: str | None
    """Attention's output projection; its input is the heads' results, side by side. None as for `down`."""
    attn_norm: str | None = None
    """A norm between the attention module and the residual stream."""
    mlp_norm: str | None = None
    """A norm between the MLP and the residual stream."""
    attn_added: str | None = None
    """The module inside `attn` whose output is added, where `attn` adds it to the residual stream itself."""
    mlp_added: str | None = None
    """The module inside `mlp` whose output is added, where `mlp` adds it to the residual stream itself."""
    attn_scale: float | int = 1
    """Factor of attention's output as it is added to the residual stream."""
    mlp_scale: float | int = 1
    """Factor of the MLP's output as it is added to the residual stream."""
    unwritable: Mapping[Module, str] = field(default_factory=dict)
    """Why a module has no matrix that edits could be written into, for those that have none."""

    def projection(self, module: Module) -> str | None:
        """The matrix through which a module adds to the residual stream."""
        return {"mlp": self.down, "attn": self.attn_proj}[module]

    def norm_after(self, module: Module) -> str | None:
        """A norm between a module and the residual stream."""
        return {"mlp": self.mlp_norm, "attn": self.attn_norm}[module]

    def scale(self, module: Module) -> float | int:
        """Factor of a module's output as it is added to the residual stream."""
        return {"mlp": self.mlp_scale, "attn": self.attn_scale}[module]

    @property
    def attn_out(self) -> str:
        """The module whose output attention adds to the residual stream, but for `attn_scale`."""
        return self.attn_norm or self.attn_added or self.attn

    @property
    def mlp_out(self) -> str:
        """The module whose output the MLP adds to the residual stream, but for `mlp_scale`."""
        return self.mlp_norm or self.mlp_added or self.mlp

    @property
    def narrowed(self) -> str:
        """The module that may compute some positions alone: the MLP, or its matrix where that has all it adds."""
        return self.mlp_added or self.mlp

    def modules_of(self, part: str) -> set[str]:
        """The block's children that must run with the backend's hooks for a step at a part."""
        modules = {
            "attn_key": (self.attn,),
            "attn_out": (self.attn, self.attn_norm),
            "mlp_out": (self.mlp, self.mlp_norm),
            "mlp_key": (self.mlp,),
        }
        return {path.partition(".")[0] for path in modules.get(part, ()) if path is not None}


@dataclass(frozen=True, kw_only=True)
class Family(BlockParts):
    """Paths to the parts of one architecture: those of its usual block, and of the blocks that are built otherwise."""

    name: str
    """Usual name."""
    model_type: str
    """`config.model_type`."""
    architecture: str
    """The transformers class with the language-model head."""
    blocks: str
    """The list of blocks, from the model."""
    embedding: str
    """The token embedding, from the model."""
    overwrites: bool = False
    """Whether blocks change a module's output after its call, so that what is read there must be copied."""
    tuple_items: int = 0
    """Items of the tuple that a block returns, the residual first; 0 where it returns the residual alone."""
    other_blocks: Mapping[int, BlockParts] = field(default_factory=dict)
    """Parts of the blocks that differ from the usual one, by layer."""

    def parts(self, layer: int) -> BlockParts:
        """Paths to the parts of one block."""
        return self.other_blocks.get(layer, self)

    def path(self, site: Site) -> str:
        """The module at whose output a site lies, or at whose input if it is a key, from the model."""
        if site.part == "embed":
            return self.embedding
        parts, block = self.parts(site.layer), f"{self.blocks}.{site.layer}"
        paths = {
            "attn_key": parts.attn_proj,
            "attn_out": parts.attn_out,
            "mlp_key": parts.down,
            "mlp_out": parts.mlp_out,
        }
        return block if site.part == "resid" else f"{block}.{paths[site.part]}"
