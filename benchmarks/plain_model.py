"""A transformers model by its parts, for the published schedules: its own modules and hooks, none of our engines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import mechedit as me
from mechedit.models import Site
from mechedit.models.shortcuts import replace_forwards, skip_blocks

Hook = tuple[nn.Module, Callable[..., Any]]
"""A module, and what is called with it, its inputs and its output."""


@dataclass(frozen=True)
class PlainModel:
    """The modules of a transformers model, found as `model.family` says where they are."""

    model: me.Model

    @property
    def hf(self) -> Any:
        """The transformers model."""
        return self.model.hf

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.hf.get_submodule(self.model.family.blocks).children())

    def module(self, site: Site) -> nn.Module:
        """The module at whose output a site lies, or at whose input if it is a key."""
        return self.hf.get_submodule(self.model.family.path(site))

    @contextlib.contextmanager
    def in_float64(self) -> Iterator[None]:
        """Compute in float64 inside the block; float32 weights come back as they were."""
        dtype = self.model.dtype
        self.hf.double()
        try:
            yield
        finally:
            self.hf.to(dtype)

    @cached_property
    def final_norm(self) -> nn.Module | None:
        """The module between the last block and the unembedding, where logits are the unembedding of its output.

        None where the model does more: caps or scales of logits, another projection.
        """
        blocks, head = self.blocks, self.hf.get_output_embeddings()
        inside = {module for block in blocks for module in block.modules()}
        outputs: dict[nn.Module, Tensor] = {}
        states = head_input = torch.zeros(0)

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            nonlocal states, head_input
            if module is blocks[-1]:
                states = first_item(output)
            elif module is head:
                head_input = inputs[0]
            elif isinstance(output, Tensor):
                outputs[module] = output

        watched = [module for module in self.hf.modules() if module not in inside]
        with torch.no_grad(), hooks(*((module, keep) for module in [*watched, blocks[-1]])):
            logits = self.hf(input_ids=torch.tensor([[0, 1]], device=self.model.device)).logits
            norms = [module for module, output in outputs.items() if output.data_ptr() == head_input.data_ptr()]
        with torch.no_grad():
            fits = [norm for norm in norms if torch.equal(head(norm(states)), logits)]
        return fits[0] if fits else None

    def logits(self, states: Tensor) -> Tensor:
        """Logits of states after the last block, [row, position, d_model], with gradients, caps and scales."""
        if self.final_norm is not None:
            return self.hf.get_output_embeddings()(self.final_norm(states))
        # The model's own forward with every block skipped.
        with replace_forwards(skip_blocks(self.blocks, states, self.model.family)):
            ids = torch.zeros(states.shape[:2], dtype=torch.long, device=states.device)
            return self.hf(input_ids=ids, use_cache=False).logits


def first_item(output: Any) -> Tensor:
    """The states in what a module returns, which may be a tuple."""
    return output[0] if isinstance(output, tuple) else output


def with_first_item(output: Any, states: Tensor) -> Any:
    """What a module returns, with other states."""
    return (states, *output[1:]) if isinstance(output, tuple) else states


@contextlib.contextmanager
def hooks(*pairs: Hook) -> Iterator[None]:
    """Call functions after modules' forwards for a while."""
    handles = [module.register_forward_hook(function) for module, function in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
