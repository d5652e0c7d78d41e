"""A pass is counted as torch counts it, and both schedules' work as a person would by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.models import SENTENCES, VOCAB, WIDTH
from torch.utils.flop_counter import FlopCounterMode

import mechedit as me
from benchmarks.necessary_work import keys_work, moments_work, targets_work, trace_work
from benchmarks.operations import moment_operations
from mechedit.planning import Operations
from mechedit.prefixes import prefixed_prompts
from mechedit.prompt_tokens import encode
from mechedit.trace.traced_fact import tokenize_fact

FAMILIES = ("gpt2", "gptj", "pythia", "llama", "qwen3", "gemma3")
MLP = 96
REQUEST = me.EditRequest(id="1", subject="Miles Davis", prompt="{} plays the", target_new="guitar")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pass_costs_what_torch_counts(make_model: Callable[..., Any], family: str) -> None:
    model, tokens = make_model(family), 7
    operations = Operations.of(model)
    model.hf.set_attn_implementation("eager")  # whose products are counted one by one
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.hf(input_ids=torch.arange(tokens)[None], use_cache=False)
    # torch counts every query with every key; causal attention needs those before it.
    masked = sum(block.per_key * (tokens**2 - tokens * (tokens + 1) // 2) for block in operations.blocks)
    counted = operations.through(range(model.n_layers), tokens) + tokens * operations.head + masked
    # The angles of rotary positions are a product as well, of a thousandth.
    assert counter.get_total_flops() == pytest.approx(counted, rel=2e-3)
    without_one = counted - tokens * 2 * WIDTH * WIDTH
    assert counter.get_total_flops() != pytest.approx(without_one, rel=2e-3)


def test_a_block_of_llama_by_hand(make_model: Callable[..., Any]) -> None:
    operations = Operations.of(make_model("llama"))
    queries_and_output = 2 * WIDTH * WIDTH
    keys_and_values = 2 * WIDTH * WIDTH // 2  # two of four heads
    block = operations.blocks[0]
    assert block.matrices == 2 * (queries_and_output + keys_and_values + 3 * WIDTH * MLP)
    assert block.keys_values == 2 * keys_and_values
    assert block.per_key == 4 * WIDTH
    assert operations.head == 2 * WIDTH * VOCAB
    # Two tokens behind three others see four and five keys.
    assert operations.through(range(1), 2, before=3) == 2 * block.matrices + (4 + 5) * block.per_key
    rest = block.matrices - block.keys_values + 5 * block.per_key
    assert operations.last_block(2, 1, before=3) == 2 * block.keys_values + rest + operations.head


def test_moments_are_counted_over_the_texts_tokens(make_model: Callable[..., Any]) -> None:
    model, texts = make_model("llama"), list(SENTENCES[:2])
    counted = moment_operations(model, [len(encode(model.tokenizer, text)[0]) for text in texts], [1, 2])
    work = moments_work(model, texts, [1, 2])
    assert (work.published, work.necessary) == (2 * counted.published, 2 * counted.necessary)
    assert work.quotient == counted.quotient > moments_work(model, texts, [2]).quotient


def test_keys_by_hand(make_model: Callable[..., Any]) -> None:
    model, prefixes = make_model("llama"), ["{}", "The city. {}"]
    operations = Operations.of(model)
    prompts = prefixed_prompts(model, REQUEST, prefixes)
    longest, bare = len(prompts[1].ids), len(prompts[0].ids)

    def row(tokens: int) -> int:
        return operations.through(range(model.n_layers), tokens) + tokens * operations.head

    work = keys_work(model, [REQUEST], [0, 1], prefixes, rows=128)
    assert work.published == 2 * (2 * row(longest) + row(bare))
    # The bare prompt is the first prefix's, and so is run once.
    up_to_subject = [prompt.last_subject + 1 for prompt in prompts]
    assert work.necessary == sum(operations.through(range(2), tokens) for tokens in up_to_subject)


def test_a_trace_by_hand(make_model: Callable[..., Any]) -> None:
    model = make_model("llama")
    operations = Operations.of(model)
    fact = me.Fact(id="1", subject="Miles Davis", prompt="{} plays the", object="guitar")
    traced = tokenize_fact(model, fact)
    config = me.TraceConfig(kinds=("state",), roles=("subject_last",), samples=2)
    tokens, position, read = len(traced.ids), traced.subject[-1], len(traced.object_ids)
    assert model.n_layers == 3
    work = trace_work(model, [traced], config)
    row = operations.through(range(3), tokens) + tokens * operations.head
    assert work.published == (3 + 1) * 3 * row, "three cells of three rows, and the clean and the corrupted rows"
    later = tokens - position
    last = operations.last_block(later, read, before=position)
    once = 3 * (operations.through(range(2), tokens) + operations.last_block(tokens, read))
    # Restored after block 0, blocks 1 and 2 change; after block 1, block 2; after block 2 nothing that is read.
    cells = operations.through(range(1, 2), later, before=position) + 2 * last
    assert work.necessary == once + 2 * cells
    severed = trace_work(
        model, [traced], me.TraceConfig(kinds=("state",), roles=("subject_last",), sever=("mlp", "attn"))
    )
    assert severed.published == 7 * 11 * row
    assert severed.necessary == pytest.approx(11 / 3 * once + 2 * 10 * cells)


def test_targets_by_hand(make_model: Callable[..., Any]) -> None:
    model, layer = make_model("llama"), 0
    operations = Operations.of(model)
    config = me.TargetConfig(convention="memit-2022", steps=3, kl_prompt="{}")
    work = targets_work(model, [REQUEST], layer, ["{}"], config)
    prompt = prefixed_prompts(model, REQUEST, ["{}"])[0]
    target = encode(model.tokenizer, "Miles Davis plays the guitar")[0][len(prompt.ids) :]
    tokens, subject = len(prompt.ids) + len(target) - 1, prompt.last_subject
    # Two rows, padded to the longer; the logits of both, and those of the object's row again; three evaluations, two
    # gradients, which end above the layer of δ.
    heads = 3 * tokens * operations.head
    forward, backward = (2 * operations.through(blocks, tokens) for blocks in (range(3), range(1, 3)))
    assert work.published == 3 * (forward + heads) + 2 * (backward + heads)
    later = tokens - subject
    rows = operations.through(range(1, 2), later, before=subject) + operations.last_block(
        later, len(target), before=subject
    )
    kl = operations.through(range(1, 2), 1, before=subject) + operations.last_block(1, 1, before=subject)
    clean = operations.through(range(2), tokens)  # the KL prompt begins it
    assert work.necessary == 5 * (rows + kl) + clean
