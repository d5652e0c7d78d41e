"""One block of a run, computed by few operations of its own instead of its modules' forwards.

Products add to the residual stream where nothing stands between, keys and values of grouped queries are not copied,
rotary tables and masks are made once for all blocks, activations overwrite their input where no gradient needs it,
padding is left out but in attention (`packing`), and the last block computes the kept positions alone: of the others it
needs keys and values only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mechedit.models.block_arguments import BlockArguments, BlockMask
from mechedit.models.block_layout import BlockLayout, matrix
from mechedit.models.packing import Packing
from mechedit.models.run_plan import SiteStep, Write
from mechedit.models.sites import Site

KeysValues = tuple[Float[Tensor, "batch kv_head _ d_head"], Float[Tensor, "batch kv_head _ d_head"]]


@dataclass(frozen=True, eq=False)
class FastBlock:
    """One block of a run, with the steps in it."""

    layout: BlockLayout
    layer: int
    arguments: BlockArguments
    steps: Mapping[str, SiteStep]
    """Steps at the sites of the block, by part."""
    values: dict[Site, Tensor]
    """Receives the activations that are read."""
    positions: Int[Tensor, "*batch kept"] | None
    """The positions that go on from this block; None means all."""
    packing: Packing | None = None
    """Where the batch's tokens stand if its padding is left out: the residual is then one row of all of them, up to
    the choice of the positions that go on."""

    def run(
        self, hidden: Float[Tensor, "_ _ d_model"], cached: KeysValues | None, exit_part: str, *, use_cache: bool
    ) -> tuple[Float[Tensor, "_ _ d_model"], KeysValues | None]:
        """The residual after the block, or at the part after which the run stops, and all keys and values if asked."""
        layout = self.layout
        normed = hidden if layout.attn_input is None else layout.attn_input(hidden)
        queries, keys, values = self.project(normed)
        before = hidden = self.at_kept(hidden)
        mask = self.arguments.mask(self.layer, layout.window)
        begin, computed = 0 if use_cache else mask.first, None
        if cached is not None:
            keys, values = (
                _joined([earlier[:, :, begin:], later], mask.spare)
                for earlier, later in zip(cached, (keys, values), strict=True)
            )
        elif mask.spare:
            keys, values = (_joined([states], mask.spare) for states in (keys, values))
        if use_cache:
            count = keys.shape[2] - mask.spare
            computed = keys[:, :, :count], values[:, :, :count]
            keys, values = keys[:, :, mask.first :], values[:, :, mask.first :]
        attn_key = self.attend(queries, keys, values, mask)
        attn_key = attn_key if self.packed is None else self.packed.pack(attn_key)
        attn_key = self.visit("attn_key", attn_key)
        if exit_part == "attn_key":
            return hidden, computed
        hidden = self.add_output(hidden, layout.attn_output, attn_key, "attn_out", layout.attn_after)
        if exit_part == "attn_out":
            return hidden, computed
        if layout.mlp_input is layout.attn_input and layout.is_parallel:
            mlp_input = self.at_kept(normed)
        else:
            states = before if layout.is_parallel else hidden
            mlp_input = states if layout.mlp_input is None else layout.mlp_input(states)
        mlp_key = self.visit("mlp_key", self.first_half(mlp_input))
        if exit_part == "mlp_key":
            return hidden, computed
        hidden = self.add_output(hidden, layout.down, mlp_key, "mlp_out", layout.mlp_after)
        return self.visit("resid", hidden), computed

    @property
    def packed(self) -> Packing | None:
        """The packing of what comes after attention."""
        return self.packing if self.positions is None else None

    def at_kept(self, states: Float[Tensor, "_ _ width"]) -> Float[Tensor, "_ _ width"]:
        """States at the positions that go on."""
        if self.positions is None:
            return states
        return select(states, self.positions) if self.packing is None else self.packing.select(states, self.positions)

    def in_rows(self, states: Float[Tensor, "_ _ width"]) -> Float[Tensor, "batch pos width"]:
        """States of all positions, laid out in rows."""
        return states if self.packing is None else self.packing.unpack(states)

    def project(self, normed: Float[Tensor, "_ _ d_model"]) -> list[Float[Tensor, "batch _ _ d_head"]]:
        """Queries at the kept positions, keys and values at all."""
        layout, positions = self.layout, self.positions
        if len(layout.inputs) == 3:
            queries, *keys_and_values = layout.inputs
            at_kept = queries(self.at_kept(normed))
            parts = [self.in_rows(at_kept) if positions is None else at_kept]
            parts += [self.in_rows(project(normed)) for project in keys_and_values]
        elif layout.by_head:
            joint = self.in_rows(layout.inputs[0](normed))
            parts = list(joint.unflatten(-1, (layout.n_heads, 3, -1)).unbind(3))
            parts[0] = parts[0] if positions is None else select(parts[0].flatten(2), positions)
            parts = [part if part.ndim == 3 else part.flatten(2) for part in parts]
        else:
            parts = self._joint_projection(normed)
        if not layout.norms_heads:
            parts = self._normed(parts)
        counts = (layout.n_heads, layout.n_kv_heads, layout.n_kv_heads)
        parts = [part.unflatten(-1, (count, -1)) for part, count in zip(parts, counts, strict=True)]
        if layout.norms_heads:
            parts = self._normed(parts)
        if layout.rotary is not None:
            tables = layout.rotary(self.arguments, self.layer)
            parts[0] = (tables if positions is None else tables.at(positions)).rotate(parts[0])
            parts[1] = tables.rotate(parts[1])
        return [part.transpose(1, 2) for part in parts]

    def _joint_projection(self, normed: Float[Tensor, "_ _ d_model"]) -> list[Tensor]:
        """Queries, keys and values from the one matrix that holds all three."""
        (joint,), layout = self.layout.inputs, self.layout
        weight = matrix(joint)
        d_head = weight.shape[1] // (layout.n_heads + 2 * layout.n_kv_heads)
        widths = [layout.n_heads * d_head, layout.n_kv_heads * d_head, layout.n_kv_heads * d_head]
        if self.positions is None:
            return list(self.in_rows(joint(normed)).split(widths, dim=-1))
        ends = [widths[0], sum(widths[1:])]
        biases = (None, None) if joint.bias is None else joint.bias.split(ends)
        queries, keys_and_values = (
            functional.linear(states, part.T, bias)
            for states, part, bias in zip(
                (self.at_kept(normed), normed), weight.split(ends, dim=1), biases, strict=True
            )
        )
        return [queries, *self.in_rows(keys_and_values).split(widths[1:], dim=-1)]

    def _normed(self, parts: list[Tensor]) -> list[Tensor]:
        norms = (self.layout.query_norm, self.layout.key_norm, None)
        return [part if norm is None else norm(part) for part, norm in zip(parts, norms, strict=True)]

    def attend(
        self,
        queries: Float[Tensor, "batch head kept d_head"],
        keys: Float[Tensor, "batch kv_head key d_head"],
        values: Float[Tensor, "batch kv_head key d_head"],
        mask: BlockMask,
    ) -> Float[Tensor, "batch kept attn_key"]:
        """The heads' results, side by side."""
        layout = self.layout
        n_queries, groups = queries.shape[2], layout.n_heads // layout.n_kv_heads
        additive, is_causal = self._additive(mask, groups, queries)
        if groups > 1:
            # Queries that share a key stand one after another, as if they were later positions.
            queries = queries.unflatten(1, (layout.n_kv_heads, groups)).flatten(2, 3)
        by_products = layout.softcap is not None or (
            torch.is_grad_enabled() and not is_causal and queries.device.type == "cpu" and queries.dtype.itemsize >= 4
        )
        if by_products:
            # For rows this short the fused kernel's backward pass takes longer than that of two batched products.
            scores = torch.matmul(queries if layout.scale == 1 else queries * layout.scale, keys.mT)
            if layout.softcap is not None:
                scores = torch.tanh(scores / layout.softcap) * layout.softcap
            scores = scores if additive is None else scores.add_(additive)
            results = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(values.dtype) @ values
        else:
            results = functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=additive, is_causal=is_causal, scale=layout.scale
            )
        if groups > 1:
            results = results.unflatten(2, (groups, n_queries)).flatten(1, 2)
        return results.transpose(1, 2).flatten(2)

    def _additive(self, mask: BlockMask, groups: int, queries: Tensor) -> tuple[Tensor | None, bool]:
        """The mask of the queries at hand, and whether the kernel's own causal mask stands for it."""
        if mask.additive is None and not mask.is_causal:
            return None, False
        explicit = self.positions is not None or groups > 1 or self.layout.softcap is not None
        if mask.additive is None and not explicit:
            return None, True

        def repeated() -> Tensor:
            full = mask.additive
            if full is None:
                count = self.arguments.tokens_mask.shape[1]
                full = queries.new_full((1, 1, count, count), -torch.inf).triu_(1)
            full = full.to(queries.dtype)
            if self.positions is not None:
                full = _select_queries(full, self.positions)
            return full if groups == 1 else full.repeat(1, 1, groups, 1)

        if self.positions is not None:
            return repeated(), False
        return self.arguments.once(("additive", id(mask), groups, queries.dtype), repeated), False

    def first_half(self, states: Float[Tensor, "_ _ d_model"]) -> Float[Tensor, "_ _ d_mlp"]:
        """The MLP up to the input of its second matrix."""
        layout = self.layout
        if not layout.is_gated:
            return layout.activation(layout.first[0](states))
        if len(layout.first) == 2:
            gate, up = (project(states) for project in layout.first)
        else:
            gate, up = (part.contiguous() for part in layout.first[0](states).chunk(2, dim=-1))
        active = layout.activation(gate)
        return active * up if active.requires_grad or up.requires_grad else active.mul_(up)

    def add_output(
        self,
        hidden: Float[Tensor, "_ _ d_model"],
        projection: Any,
        inputs: Float[Tensor, "_ _ d_in"],
        part: str,
        after: Any,
    ) -> Float[Tensor, "_ _ d_model"]:
        """The residual plus a module's output, in one product where nothing stands between and nothing is read."""
        step = self.steps.get(part)
        if after is not None or (step is not None and step.read):
            out = projection(inputs)
            return hidden + self.visit(part, out if after is None else after(out))
        flat = hidden.flatten(0, 1)
        if projection.bias is None:
            total = torch.addmm(flat, inputs.flatten(0, 1), matrix(projection))
        else:
            total = (flat + projection.bias).addmm_(inputs.flatten(0, 1), matrix(projection))
        total = total.unflatten(0, hidden.shape[:2])
        for write in self.writes(part):
            at = (write.rows.to(total.device), write.columns.to(total.device))
            total[at] = (total if write.add else hidden)[at] + write.value.to(total)
        return total

    def visit(self, part: str, activation: Tensor) -> Tensor:
        """Run the step at a site, if there is one."""
        step = self.steps.get(part)
        if step is None:
            return activation
        activation = SiteStep(step.site, tuple(self.writes(part)), step.read, step.copy)(activation, self.values)
        if step.read and self.packed is not None:
            self.values[step.site] = self.packed.unpack(self.values[step.site])
        return activation

    def writes(self, part: str) -> Sequence[Write]:
        """The writes at a site, their columns counted among the kept positions, or among all real tokens."""
        step = self.steps.get(part)
        if step is None:
            return ()
        if self.positions is None:
            return step.writes if self.packing is None else [self.packing.write(write) for write in step.writes]
        return [_among_kept(write, self.positions) for write in step.writes]


def select(
    states: Float[Tensor, "batch pos width"], positions: Int[Tensor, "*batch kept"]
) -> Float[Tensor, "batch kept width"]:
    """The states at the kept positions, the same ones of each row or each row's own."""
    return states.index_select(1, positions) if positions.ndim == 1 else states.take_along_dim(positions[..., None], 1)


def _joined(
    parts: Sequence[Float[Tensor, "batch kv_head _ d_head"]], spare: int
) -> Float[Tensor, "batch kv_head key d_head"]:
    """Keys or values of positions that follow one another, and so many zeros behind them."""
    rows, heads, _, width = parts[-1].shape
    if torch.is_grad_enabled():
        return torch.cat([*parts, parts[-1].new_zeros(rows, heads, spare, width)], 2)
    # With a position's heads side by side, as projections give them, all are copied at once.
    joined = parts[-1].new_empty(rows, sum(part.shape[2] for part in parts) + spare, heads, width)
    end = 0
    for part in parts:
        begin, end = end, end + part.shape[2]
        joined[:, begin:end] = part.transpose(1, 2)
    joined[:, end:] = 0
    return joined.transpose(1, 2)


def _select_queries(
    mask: Float[Tensor, "row 1 query key"], positions: Int[Tensor, "*batch kept"]
) -> Float[Tensor, "_ 1 kept key"]:
    """The mask of the kept positions."""
    if positions.ndim == 1:
        return mask.index_select(2, positions)
    return mask.expand(len(positions), -1, -1, -1).take_along_dim(positions[:, None, :, None], 2)


def _among_kept(write: Write, positions: Int[Tensor, "*batch kept"]) -> Write:
    """A write with its columns counted among the kept positions; the others are left out."""
    rows, columns = write.rows.to(positions.device), write.columns.to(positions.device)
    choices = positions[None] if positions.ndim == 1 else positions[rows]
    entries, index = (choices == columns[:, None]).nonzero(as_tuple=True)
    return Write(rows[entries], index, write.value.to(positions.device)[entries], write.add)
