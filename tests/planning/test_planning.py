"""What is stated beforehand is what a run takes: operations as torch counts them, memory as the system does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import call, complaint, limited_memory
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

import mechedit as me
from mechedit.models import DTYPES, ModelShapes
from mechedit.moments.accumulator import MomentAccumulator, product_entries
from mechedit.moments.key_reader import KeyReader
from mechedit.planning import Operations, PromptShape, plan_edit, plan_moments_step, plan_trace_step
from mechedit.planning.plan import fact_operations, search_operations, spread_operations
from mechedit.prompt_tokens import encode_documents
from mechedit.targets.prompt_batch import common_starts
from mechedit.targets.search_prompts import search_prompts
from mechedit.trace.cells import trace_group
from mechedit.trace.traced_fact import tokenize_fact

PREFIXES = ("{}", "The tower stands in the old city near the river. {}")
LLAMA_70B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """torch counts what its own thread runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny() -> me.Model:
    return me.load_model("tiny")


def counted(run: Callable[[], Any]) -> int:
    # torch counts sums in place as nothing.
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: addmm_flop(total, left, right)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        run()
    return counter.get_total_flops()


def test_a_search_takes_the_operations_that_were_stated(tiny: me.Model) -> None:
    requests, config = me.load_requests("tiny")[:48], me.TargetConfig(steps=2, threshold=1e-9)
    for layer in (2, tiny.n_layers - 2):
        rows = search_prompts(tiny, requests, range(len(requests)), PREFIXES, config)
        shared = common_starts(rows)
        assert shared[1] > 8
        stated = search_operations(Operations.of(tiny), rows, layer, config.updates, shared)
        taken = counted(lambda layer=layer: me.find_targets(tiny, requests, layer, PREFIXES, config))
        assert stated == pytest.approx(taken, rel=0.2)
        if layer == 2:
            other = search_operations(Operations.of(tiny), rows, layer, 2 * config.updates, shared)
            assert other != pytest.approx(taken, rel=0.2), "the control: twice the updates"
        else:
            apart = search_operations(Operations.of(tiny), rows, layer, config.updates, {})
            assert apart != pytest.approx(taken, rel=0.2), "the control: every prompt's beginning"


def test_a_trace_takes_the_operations_that_were_stated(tiny: me.Model) -> None:
    facts = [tokenize_fact(tiny, fact) for fact in me.load_facts("known")[:1]]
    # Few rows of a position run together with those of the next one, which computes more.
    for config in (me.TraceConfig(kinds=("state", "mlp")), me.TraceConfig(sever=("nothing", "mlp"), kinds=("state",))):
        stated = sum(fact_operations(Operations.of(tiny), fact, config) for fact in facts)
        taken = counted(lambda config=config: trace_group(tiny, facts, 0.1, config))
        assert stated == pytest.approx(taken, rel=0.2)


def test_moments_take_the_operations_that_were_stated(tiny: me.Model) -> None:
    ids = sorted(encode_documents(tiny.tokenizer, me.load_texts("tiny")[:256], 512), key=len, reverse=True)
    layers, tokens = [3, 5], sum(map(len, ids))

    def collect() -> None:
        keys = KeyReader(tiny, layers, 4096).read(ids)
        for layer in layers:
            MomentAccumulator(tiny.d_key).update(keys[layer])

    stated = Operations.of(tiny).text_pass(list(map(len, ids)), max(layers))
    stated += len(layers) * tokens * 2 * product_entries(tiny.d_key)
    with torch.no_grad():
        assert stated == pytest.approx(counted(collect), rel=0.2)


def test_spreading_takes_the_operations_that_were_stated(tiny: me.Model) -> None:
    requests, layers = me.load_requests("tiny")[:24], [2, 3, 5]
    # Of so few facts larger batches would be mostly padding.
    config = me.MemitConfig(steps=1, covariance_weight=1e3, batch_size=2)
    targets = me.find_targets(tiny, requests, layers[-1], PREFIXES, config.targets)
    moments = {layer: torch.eye(tiny.d_key, dtype=torch.float64) for layer in layers}
    rows = search_prompts(tiny, requests, range(len(requests)), PREFIXES, config.targets)
    taken = counted(lambda: me.memit(tiny, requests, layers, moments, config=config, targets=targets))
    system = len(layers) * 6 * len(requests) * tiny.d_key**2
    stated = spread_operations(Operations.of(tiny), rows, layers)
    assert stated + system == pytest.approx(taken, rel=0.25)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama", "qwen3", "gemma3"])
def test_a_config_has_the_sizes_of_its_model(make_hf: Any, tokenizer: Any, family: str, tmp_path: Path) -> None:
    hf = make_hf(family)
    of_model = ModelShapes.of(me.load_model(hf, tokenizer=tokenizer))
    hf.config.save_pretrained(tmp_path)
    of_config = ModelShapes.of_config(tmp_path, torch.float32)
    assert of_config.blocks == of_model.blocks
    for name in ("n_layers", "n_heads", "d_model", "d_mlp", "vocab_size", "max_positions", "parameters", "head"):
        assert getattr(of_config, name) == getattr(of_model, name), name
    assert of_config.parameters == sum(parameter.numel() for parameter in hf.parameters())


def test_typical_facts_have_the_mean_size(tiny: me.Model) -> None:
    facts = [tokenize_fact(tiny, fact) for fact in me.load_facts("known")[:50]]
    shape = PromptShape.of(facts)
    typical = shape.traced_fact()
    assert typical.prompt_length == pytest.approx(sum(fact.prompt_length for fact in facts) / 50, abs=1.6)
    config = me.TraceConfig(samples=2)
    stated = plan_trace_step(ModelShapes.of(tiny), len(facts), shape, config).operations
    exact = sum(fact_operations(Operations.of(tiny), fact, config) for fact in facts)
    assert stated == pytest.approx(exact, rel=0.2)


def test_what_seventy_billion_parameters_cost(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    assert call("plan", tmp_path / "config.json", "--layers", "13-17", "--rate", "2e14", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["parameters"] == pytest.approx(70.55e9, rel=1e-3)
    assert (record["dtype"], record["weights"]) == ("bfloat16", 2 * record["parameters"])
    moments = record["steps"]["moments"]
    # Two operations for each parameter of 17 blocks and of the last one's matrices before the down-projection, and
    # about d_mlp² for each layer.
    block = 8192 * (8192 * 2 + 2 * 1024 + 3 * 28672)
    by_hand = 1e8 * (2 * (18 * block - 8192 * 28672) + 5 * 28672**2)
    assert moments["operations"] == pytest.approx(by_hand, rel=0.05)
    assert moments["minutes"] == pytest.approx(moments["operations"] / 2e14 / 60)
    assert moments["disk"] == 5 * 8 * 28672**2
    assert record["peak"] > record["weights"] + 6 * 8 * 28672**2
    # 7 prompts, of which δ reaches five tokens, through 62 blocks behind the layer, 51 times, and clean runs before.
    targets = record["steps"]["targets"]["operations"]
    assert targets == pytest.approx(1e4 * 2 * block * 51 * 62 * (6 * 5 + 3), rel=0.25)
    assert call("plan", tmp_path / "config.json", "--rate", "2e14") == 0
    table = capsys.readouterr().out
    assert all(name in table for name in ("trace", "moments", "targets", "spreading", "10,000 facts"))
    assert max(len(line) for line in table.splitlines() if not line.startswith("model")) <= 120


def test_the_rate_is_measured_on_few_blocks(tmp_path: Path, capsys: Any) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 30, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 3000, "dtype": "float32"}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, **sizes}))
    assert call("plan", tmp_path, "--json") == 0
    steps = json.loads(capsys.readouterr().out)["steps"]
    for step in steps.values():
        assert 1e6 < step["rate"] < 1e14
        assert step["minutes"] > 0
    assert steps["moments"]["rate"] != steps["trace"]["rate"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no/such/folder"], "there is no model folder"),
        (["tiny", "--rate", 0], "rate is 0"),
        (["tiny", "--layers", "3-99"], "layer 99 is not in the model"),
        (["tiny", "--facts", 0], "facts is 0, expected at least 1"),
        (["tiny", "--dtype", "int8"], "the dtype is 'int8'"),
        (["tiny", "--subject-tokens", 0], "subject is 0, expected at least 1"),
        (["tiny", "--before-tokens", 10**9], "before is 1000000000, expected a whole number of at least 0 and at most"),
        (["tiny", "--prefix-tokens", 2**63 - 1], "prefix is 9223372036854775807, expected a whole number"),
        (["tiny", "--after-tokens", 900], "is longer than the context of 'tiny', expected at most"),
    ],
)
def test_bad_input_is_refused(capsys: Any, options: list[object], message: str) -> None:
    assert message in complaint(capsys, "plan", *options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**9), ("num_hidden_layers", "80"), ("num_hidden_layers", -1), ("hidden_size", 0),
        ("hidden_size", 2**62), ("num_attention_heads", 0), ("num_key_value_heads", "8"), ("intermediate_size", None),
        ("vocab_size", 2**63), ("vocab_size", [1]), ("hidden_act", "none"), ("model_type", 5), ("dtype", "text"),
        ("max_position_embeddings", -1),
    ],
)  # fmt: skip
def test_a_config_that_no_model_has_is_refused(tmp_path: Path, capsys: Any, name: str, value: Any) -> None:
    """Layers by the billion, before any of them is made."""
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_70B, "num_hidden_layers": 2, name: value}))
    with limited_memory():
        complaint(capsys, "plan", tmp_path, "--layers", "1", "--rate", "2e14")


def test_a_model_too_large_to_be_measured_is_refused(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    assert "give one by --rate" in complaint(capsys, "plan", tmp_path)


def test_steps_of_a_plan_grow_as_they_should(tiny: me.Model) -> None:
    shapes = ModelShapes.of(tiny)
    one, two = (plan_moments_step(shapes, tokens, [3]) for tokens in (10_000, 20_000))
    assert two.operations == pytest.approx(2 * one.operations, rel=0.05)
    assert one.memory == two.memory
    few, many = (plan_edit(shapes, facts, [3, 4]) for facts in (100, 1000))
    assert many[0].operations == 10 * few[0].operations
    assert many[0].memory == few[0].memory, "no more than a batch is searched for at once"
    assert many[1].memory > few[1].memory
    half = ModelShapes.of_config("tiny", DTYPES["bfloat16"])
    assert 2 * half.weight_bytes == shapes.weight_bytes
