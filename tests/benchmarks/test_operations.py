"""The multiply-adds counted from shapes are those that torch counts while the model runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.operations import moment_operations
from mechedit.planning import Operations

LENGTH = 11


def counted_by_torch(model: Any) -> list[int]:
    """Multiply-adds of each block in a pass over one text; torch counts attention at all pairs of positions."""
    model.hf.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        model.hf(input_ids=torch.arange(3, 3 + LENGTH)[None], use_cache=False)
    counts = mode.get_flop_counts()
    path = f"{type(model.hf).__name__}.{model.family.blocks}"
    return [sum(counts[f"{path}.{layer}"].values()) // 2 for layer in range(model.n_layers)]


def test_a_block_costs_what_torch_counts(make_model, family):
    model = make_model(family, "transformer_lens")
    blocks = Operations.of(model).blocks
    for layer, count in enumerate(counted_by_torch(model)):
        # Eager attention multiplies all pairs of positions, seen or not.
        pairs = 2 * len(model.writing("attn").projection(layer)) * LENGTH**2
        assert count == LENGTH * blocks[layer].matrices // 2 + pairs


def test_a_gate_and_a_window_count(make_model):
    gated, window = make_model("llama"), make_model("gpt_neo")
    matrices = 4 * gated.d_model**2 + 2 * gated.d_model * gated.d_mlp
    assert Operations.of(gated).blocks[0].matrices // 2 == matrices + gated.d_model * gated.d_mlp - (
        # Grouped queries have narrower keys and values.
        2 * gated.d_model**2 - 2 * gated.hf.model.layers[0].self_attn.k_proj.weight.numel()
    )
    # Local layers see three positions: 1 + 2 + 9 · 3 pairs of 11 tokens; the global one 66.
    assert window.window(0) == 3
    of_window = Operations.of(window)
    passes = [of_window.text_pass([LENGTH], last) // 2 for last in range(4)]
    matrices = LENGTH * (of_window.blocks[0].matrices // 2)
    local = passes[0] - matrices + LENGTH * window.d_model * window.d_mlp
    everywhere = passes[3] - passes[2] - matrices
    assert (local, everywhere) == (2 * window.d_model * 30, 2 * window.d_model * 66)


def test_the_quotient_by_hand(make_model):
    model, lengths = make_model("gpt2"), [5, LENGTH]
    tokens, d, d_mlp = 16, model.d_model, model.d_mlp
    block = tokens * (4 * d * d + 2 * d * d_mlp) + 2 * d * (15 + 66)
    to_keys = block - tokens * d * d_mlp
    assert Operations.of(model).text_pass(lengths, 0) == 2 * to_keys
    operations = moment_operations(model, lengths, [0, 2])
    assert operations.published == to_keys + (2 * block + to_keys) + 2 * tokens * d_mlp**2
    assert operations.necessary == 2 * block + to_keys + 2 * (tokens * d_mlp * (d_mlp + 1) // 2)
    assert operations.quotient == pytest.approx(operations.published / operations.necessary)
    assert operations.seconds(4.0) == operations.necessary / 2
    # One layer alone saves half of its k kᵀ and nothing else.
    alone = moment_operations(model, lengths, [2])
    assert alone.published - alone.necessary == tokens * d_mlp * (d_mlp - 1) // 2
