"""The search runs only what δ reaches, shares δ among facts about one subject, and caches finished targets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import CountedProducts
from torch import Tensor

import mechedit.targets.search
from mechedit.batching import LAUNCH_COST, WEIGHT_TOKENS, pad
from mechedit.cache import Cache
from mechedit.data import EditRequest
from mechedit.errors import InputError
from mechedit.models import Patch, Site, WholeReadout, packing
from mechedit.prefixes import prefixed_prompts
from mechedit.prompt_tokens import continuation_ids, tokenize_prompt
from mechedit.targets import TargetConfig, Targets, find_targets
from mechedit.targets.cache import TargetCache
from mechedit.targets.prompt_batch import block_spans, shared_start_cache
from mechedit.targets.search_prompts import KL_PROMPT, LEAST_TOKENS, search_batches, search_prompts

PREFIXES = ["{}", "The first thing. {}", "Because he said so many things. {}"]
REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {}", target_new="Korean"),
    EditRequest(id="b", subject="Leon Blum", prompt="{} is", target_new="in Paris"),
    EditRequest(id="c", subject="Toko Yasuda", prompt="We heard that {}", target_new="plays"),
    EditRequest(id="d", subject="Leon Blum", prompt="They all met {}", target_new="French"),
]
BRISK = TargetConfig(lr=0.5, clamp=2.0)
PROVENANCE = {"weights_hash": "w", "tokenizer_hash": "t", "dtype": "float32", "module": "mlp"}


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    """A model with larger weights, in which one state has much to say."""
    return make_model("gpt2", initializer_range=0.05)


def distance(states: Tensor, expected: Tensor) -> float:
    return float((states - expected).norm() / expected.norm())


def naive(model: Any, facts: list[EditRequest], layer: int, config: TargetConfig) -> Tensor:
    """z − h of GPT-2 facts that share a δ: hooks, whole prompts, one row at a time, one parameter per part."""
    block = model.hf.transformer.h[layer]
    modules = {"resid": block, "mlp_out": block.mlp, "attn_out": block.attn}
    deltas = {part: torch.zeros(model.d_model, requires_grad=True) for part in config.parts("mlp")}

    def run(ids: list[int], at: int, states: dict[str, Tensor] | None = None) -> Tensor:
        def hook(part: str) -> Callable[..., Any]:
            def add(module: Any, inputs: Any, output: Any) -> Any:
                hidden = (output[0] if isinstance(output, tuple) else output).clone()
                if states is not None:
                    states[part] = hidden[0, at].detach().clone()
                hidden[0, at] = hidden[0, at] + deltas[part]
                return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

            return add

        handles = [modules[part].register_forward_hook(hook(part)) for part in config.parts("mlp")]
        logits = model.hf(torch.tensor([ids])).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        return logits

    prompts = [prefixed_prompts(model, fact, PREFIXES) for fact in facts]
    objects = [continuation_ids(model.tokenizer, fact.target_new) for fact in facts]
    kl = tokenize_prompt(model.tokenizer, config.kl_prompt, facts[0].subject)
    initial: list[dict[str, Tensor]] = [{} for _ in facts]
    for states, fact_prompts in zip(initial, prompts, strict=True):
        run(list(fact_prompts[0].ids), fact_prompts[0].last_subject, states)
    clean = run(list(kl.ids), kl.last_subject)[-1].detach()
    norms = {part: min(float(states[part].norm()) for states in initial) for part in deltas}
    typical = {part: min(float(states[part].abs().median()) for states in initial) / 0.6745 for part in deltas}
    rates = {part: config.lr or config.relative_lr * typical[part] for part in deltas}
    optimizer = torch.optim.Adam([{"params": [delta], "lr": rates[part]} for part, delta in deltas.items()])
    for _ in range(config.updates):
        loss = torch.zeros(())
        for states, fact_prompts, ids in zip(initial, prompts, objects, strict=True):
            for prompt in fact_prompts:
                logits = run([*prompt.ids, *ids[:-1]], prompt.last_subject)[len(prompt.ids) - 1 :]
                loss = loss - logits[range(len(ids)), ids].mean() / len(fact_prompts) / len(facts)
            for part, delta in deltas.items():
                loss = loss + config.weight_decay * (delta.norm() / states[part].norm()) ** 2 / len(facts)
        edited = run(list(kl.ids), kl.last_subject)[-1]
        loss = loss + config.kl_weight * (edited.exp() * (edited - clean)).sum()
        optimizer.zero_grad()
        for delta, gradient in zip(deltas.values(), torch.autograd.grad(loss, list(deltas.values())), strict=True):
            delta.grad = gradient
        optimizer.step()
        for part, delta in deltas.items():
            with torch.no_grad():
                delta.mul_((config.clamp * norms[part] / delta.norm()).clamp(max=1))
    return deltas[config.part].detach()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("rate", [{"lr": 0.5}, {"relative_lr": 0.3}])
@pytest.mark.parametrize("parts", [{}, {"part": "mlp_out"}, {"part": "mlp_out", "attention": True}])
def test_agrees_with_a_naive_search(
    small_model: Any, layer: int, parts: dict[str, Any], rate: dict[str, float]
) -> None:
    config = TargetConfig(steps=5, threshold=1e-9, clamp=2.0, **parts, **rate)
    targets = find_targets(small_model, REQUESTS, layer, PREFIXES, config)
    deltas = targets.z - targets.initial
    for facts in ((0,), (1, 3)):
        delta = naive(small_model, [REQUESTS[fact] for fact in facts], layer, config)
        for fact in facts:
            assert distance(deltas[fact], delta) < 1e-3
            assert targets.summary["norm_ratio"][fact] > 0.3
    assert targets.part == config.part


def test_z_is_a_state_of_its_part(small_model: Any) -> None:
    free: dict[str, Any] = {"steps": 4, "lr": 0.5, "clamp": 1e6, "weight_decay": 0}
    resid, mlp_out = (
        find_targets(small_model, REQUESTS, 1, PREFIXES, TargetConfig(part=part, **free))
        for part in ("resid", "mlp_out")
    )
    prompt = tokenize_prompt(small_model.tokenizer, REQUESTS[0].prompt, REQUESTS[0].subject)
    tokens = pad([prompt.ids], small_model.tokenizer)
    for targets, part in ((resid, "resid"), (mlp_out, "mlp_out")):
        site = Site(1, part)  # type: ignore[arg-type]
        state = small_model.run(tokens, read=[site])[site][0, prompt.last_subject]
        assert torch.allclose(targets.initial[0], state, atol=1e-5)
    # What is added to the MLP's output is added to the stream after it: only the ball and the decay differ.
    assert distance(mlp_out.z - mlp_out.initial, resid.z - resid.initial) < 1e-3
    assert distance(mlp_out.initial, resid.initial) > 0.1


def test_facts_about_one_subject_share_delta(lively: Any) -> None:
    joint = find_targets(lively, REQUESTS, 1, PREFIXES, BRISK)
    separate = find_targets(lively, REQUESTS, 1, PREFIXES, dataclasses.replace(BRISK, joint=False))
    joint_deltas, separate_deltas = joint.z - joint.initial, separate.z - separate.initial
    assert torch.allclose(joint_deltas[1], joint_deltas[3], atol=1e-5)
    assert distance(separate_deltas[1], separate_deltas[3]) > 0.5
    assert torch.allclose(joint_deltas[[0, 2]], separate_deltas[[0, 2]], atol=1e-3)
    rows = joint.summary.set_index("id")
    assert rows.loc["b"].updates == rows.loc["d"].updates
    assert rows.loc["b"].nll != pytest.approx(rows.loc["d"].nll, rel=0.01)
    literal = find_targets(lively, REQUESTS, 1, PREFIXES, dataclasses.replace(BRISK, convention="memit-2022"))
    assert distance((literal.z - literal.initial)[1], (literal.z - literal.initial)[3]) > 0.5


def test_facts_that_share_stop_together(lively: Any) -> None:
    free = find_targets(lively, REQUESTS, 1, PREFIXES, BRISK)
    nll = free.losses.pivot(index="step", columns="id", values="nll")[["b", "d"]]
    threshold = float(nll.max(axis=1).min()) + 1e-4
    both, first = (int((curve < threshold).idxmax()) for curve in (nll.max(axis=1), nll.min(axis=1)))
    targets = find_targets(lively, REQUESTS, 1, PREFIXES, dataclasses.replace(BRISK, threshold=threshold))
    assert first < both
    assert list(targets.summary.set_index("id").loc[["b", "d"]].updates) == [both, both]


def counted(model: Any) -> tuple[list[list[int]], list[Any]]:
    """Count the input numbers of each block's MLP: one list per block with one entry per run, and the hooks."""
    sizes: list[list[int]] = [[] for _ in model.unhooked_copy.transformer.h]
    handles = [
        block.mlp.c_fc.register_forward_pre_hook(lambda module, args, runs=runs: runs.append(args[0].numel()))
        for runs, block in zip(sizes, model.unhooked_copy.transformer.h, strict=True)
    ]
    return sizes, handles


def test_only_what_delta_reaches_runs_again(lively: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "LEAST_PADDING", 0.0)
    config = dataclasses.replace(BRISK, steps=6, threshold=1e-9)
    prompts = search_prompts(lively, REQUESTS, [0, 1, 2, 1], PREFIXES, config)
    lively.readout()
    sizes, handles = counted(lively)
    find_targets(lively, REQUESTS, 0, PREFIXES, config)
    for hook in handles:
        hook.remove()
    batches = list(search_batches(lively, prompts, config.pass_tokens, lively.n_layers - 1))
    before = sum(any(prompt.at for prompt in batch) for batch in batches)
    with_kl = sum(any(prompt.template == KL_PROMPT for prompt in batch) for batch in batches)
    # The clean run: tokens before the subjects' last ones, those from there on up to δ, the KL prompts' to the end.
    assert [len(runs) for runs in sizes] == [before + len(batches), *[before + with_kl + 7 * len(batches)] * 2]
    ended = sum(prompt.width for prompt in prompts if prompt.template != KL_PROMPT)
    assert sum(sizes[0]) - sum(sizes[1][: -7 * len(batches)]) == ended * lively.d_model > 0
    rerun = sum(prompt.width for prompt in prompts) * lively.d_model
    padded = sum(len(batch) * max(prompt.width for prompt in batch) for batch in batches) * lively.d_model
    assert rerun < padded, "padding is not run"
    assert sum(sizes[1][-len(batches) :]) == rerun
    assert rerun < 0.7 * sum(len(prompt.ids) for prompt in prompts) * lively.d_model
    # The last block's MLP runs at the scored positions alone, of which each row of a batch has as many, unless that
    # are more than all of its tokens.
    counts = [
        (len(batch) * max(len(prompt.scored) for prompt in batch), sum(prompt.width for prompt in batch))
        for batch in batches
    ]
    assert sum(sizes[2][-len(batches) :]) == sum(map(min, counts)) * lively.d_model


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", ["resid", "mlp_out"])
def test_with_local_attention_less_runs_again_and_z_is_the_same(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, layer: int, part: Any
) -> None:
    model = make_model("gpt_neo", initializer_range=0.05)
    config = dataclasses.replace(BRISK, steps=4, part=part, attention=part == "mlp_out")
    assert [model.window(block) for block in range(4)] == [3, 3, 3, None]
    requests = [dataclasses.replace(request, prompt=request.prompt + " of all things") for request in REQUESTS]
    spans = block_spans(model, layer, config, 9)
    widths = [span.reach for span in spans for _ in range(span.first, span.last + 1)]
    first = [1] if config.attention else []
    assert widths == [*first, *(min(9, 1 + 2 * (block - layer)) for block in range(layer + 1, 3)), 9]
    model.readout()  # Once per model, so that its runs are not counted.
    sizes, handles = counted(model)
    local = find_targets(model, requests, layer, PREFIXES, config)
    local_sizes = [sum(runs) for runs in sizes]
    for runs in sizes:
        runs.clear()
    monkeypatch.setattr(type(model), "window", lambda self, layer: None)
    everywhere = find_targets(model, requests, layer, PREFIXES, config)
    for hook in handles:
        hook.remove()
    assert distance(local.z - local.initial, everywhere.z - everywhere.initial) < 1e-4
    assert local_sizes[layer + 1] < sum(sizes[layer + 1])
    assert local_sizes[3] == sum(sizes[3])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "llama", "neox"])
def test_a_shared_start_runs_once(make_model: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = make_model(kind, initializer_range=0.05)
    config = dataclasses.replace(BRISK, steps=3)
    separate = find_targets(model, REQUESTS, 1, PREFIXES, config)
    monkeypatch.setitem(LAUNCH_COST, "cpu", 0)
    prompts = search_prompts(model, REQUESTS, [0, 1, 2, 3], PREFIXES, config)
    monkeypatch.setitem(WEIGHT_TOKENS, "cpu", 1e6)
    (batch, *_) = sorted(search_batches(model, prompts, config.pass_tokens), key=len, reverse=True)
    cache, lengths = shared_start_cache(model, batch)
    assert cache is not None
    assert cache.lengths.tolist() == lengths
    for prompt, length in zip(batch, lengths, strict=True):
        siblings = [sibling for sibling in batch if sibling.template == prompt.template]
        assert all(sibling.ids[:length] == prompt.ids[:length] for sibling in siblings)
        assert length <= prompt.at
    assert max(lengths) > 3
    shared = find_targets(model, REQUESTS, 1, PREFIXES, config)
    assert distance(shared.z - shared.initial, separate.z - separate.initial) < 1e-3
    assert distance(shared.initial, separate.initial) < 1e-5
    # The shared tokens matter.
    elsewhere = find_targets(model, REQUESTS, 1, ["{}", "Another thing. {}", *PREFIXES[2:]], config)
    assert distance(elsewhere.z - elsewhere.initial, separate.z - separate.initial) > 1e-2


def test_passes_are_cut_for_workers_where_they_are_long(lively: Any) -> None:
    prompts = search_prompts(lively, REQUESTS, [0, 1, 2, 1], PREFIXES, BRISK)
    few, many = prompts, [prompt for prompt in prompts for _ in range(20)]

    def tokens(prompts: list[Any], workers: int) -> list[int]:
        batches = list(search_batches(lively, prompts, 10**6, workers=workers))
        assert sorted(map(id, itertools.chain(*batches))) == sorted(map(id, prompts)), "each is in one batch"
        return [sum(prompt.width for prompt in batch) for batch in batches]

    assert tokens(few, 2) == tokens(few, 1), "each of them is short"
    assert max(tokens(many, 2)) < 0.6 * max(tokens(many, 1))
    assert len(tokens(many, 100)) <= 1 + sum(tokens(many, 1)) / LEAST_TOKENS
    assert max(tokens(many, 3)) < 1.1 * min(tokens(many, 3)), "all workers have as much to do"


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "llama", "gemma3"])
def test_targets_without_padding_are_the_same(make_model: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = make_model(kind, initializer_range=0.05)
    products, targets = [], []
    for share in (2.0, 0.0):
        monkeypatch.setattr(packing, "LEAST_PADDING", share)
        model.fast_engine.prepare("operations")
        with CountedProducts(model) as counts:
            targets.append(find_targets(model, REQUESTS, 0, PREFIXES, dataclasses.replace(BRISK, steps=4)))
        products.append(counts.tokens[1])
    padded, packed = targets
    assert distance(packed.z - packed.initial, padded.z - padded.initial) < 1e-4
    assert products[1] < 0.95 * products[0], "there was padding to leave out"


def test_batches_that_do_not_fit_are_halved(lively: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(BRISK, steps=4)
    in_one_batch = find_targets(lively, REQUESTS, 1, PREFIXES, config)
    plain, most = type(lively).run, [2]

    def short(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if len(tokens.ids) > most[0]:
            refused.append(len(tokens.ids))
            raise torch.OutOfMemoryError("full")
        return plain(self, tokens, *args, **kwargs)

    refused: list[int] = []
    monkeypatch.setattr(type(lively), "run", short)
    assert distance(find_targets(lively, REQUESTS, 1, PREFIXES, config).z, in_one_batch.z) < 1e-4
    # Once halved they stay so: after the clean run nothing is tried in vain.
    assert 0 < len(refused) < 8
    most[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        find_targets(lively, REQUESTS, 1, PREFIXES, config)


def same(targets: Targets, expected: Targets) -> bool:
    return (
        torch.equal(targets.z, expected.z)
        and torch.equal(targets.initial, expected.initial)
        and targets.losses.equals(expected.losses)
        and targets.summary.equals(expected.summary)
    )


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_search_goes_on(
    lively: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    config = dataclasses.replace(BRISK, steps=4, batch_size=1)
    uninterrupted = find_targets(lively, REQUESTS, 1, PREFIXES, config)
    searched, plain = [], mechedit.targets.search.search_groups

    def interrupted(model: Any, groups: Any, *args: Any) -> Any:
        if len(searched) == after:
            raise KeyboardInterrupt
        searched.append(groups)
        return plain(model, groups, *args)

    with monkeypatch.context() as patched:
        patched.setattr(mechedit.targets.search, "search_groups", interrupted)
        with pytest.raises(KeyboardInterrupt):
            find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == after == len(list(tmp_path.iterdir()))
    assert same(find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path), uninterrupted)
    searched_again: list[Any] = []
    monkeypatch.setattr(
        mechedit.targets.search, "search_groups", lambda *args: searched_again.append(args) or plain(*args)
    )
    assert same(find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path), uninterrupted)
    assert not searched_again
    # Three δ in all, as two facts share one.
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_a_batch_that_was_half_written_is_searched_for_again(
    lively: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is searched for together rounds together."""
    config = dataclasses.replace(BRISK, steps=4)
    uninterrupted = find_targets(lively, REQUESTS, 1, PREFIXES, config)
    write, written = Cache.write, []

    def interrupted(self: Cache, *arguments: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(arguments)
        write(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Cache, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert len(list(tmp_path.glob("*.batch.json"))) == 1
    searched: list[int] = []
    plain = mechedit.targets.search.search_groups
    monkeypatch.setattr(
        mechedit.targets.search,
        "search_groups",
        lambda model, groups, *a: searched.append(len(groups)) or plain(model, groups, *a),
    )
    assert same(find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path), uninterrupted)
    assert searched == [3]
    assert not list(tmp_path.glob("*.json"))


def test_cached_targets_are_keyed_by_all_that_determines_them(
    lively: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(BRISK, steps=2)
    searched: list[int] = []
    plain = mechedit.targets.search.search_groups
    monkeypatch.setattr(
        mechedit.targets.search,
        "search_groups",
        lambda model, groups, *a: searched.append(len(groups)) or plain(model, groups, *a),
    )

    def look(
        model: Any = lively, requests: Any = REQUESTS, layer: int = 1, prefixes: Any = PREFIXES, **changes: Any
    ) -> int:
        searched.clear()
        find_targets(model, requests, layer, prefixes, dataclasses.replace(config, **changes), cache=tmp_path)
        return sum(searched)

    assert look() == 3
    assert look() == 0
    assert look(batch_size=1, pass_tokens=50, seed=4) == 0
    assert look(requests=list(reversed(REQUESTS))[1:3]) == 1
    assert look(requests=[dataclasses.replace(REQUESTS[0], id="other")]) == 0
    assert look(requests=[dataclasses.replace(REQUESTS[0], target_new="English")]) == 1
    assert look(layer=0) == 3
    assert look(prefixes=PREFIXES[:2]) == 3
    assert look(lr=0.25) == 3
    assert look(part="mlp_out") == 3
    assert look(joint=False) == 4
    assert look(make_model("gpt2", seed=1, initializer_range=0.05)) == 3


def test_files_of_several_groups_from_older_versions_are_not_read(lively: Any, tmp_path: Path) -> None:
    """They have other names: their facts are searched for again."""
    config = dataclasses.replace(BRISK, steps=1)
    (tmp_path / f"{'0' * 32}.safetensors").write_bytes(b"of all groups of a batch")
    find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1 + 3


def test_a_damaged_file_is_refused(lively: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(BRISK, steps=1)
    find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path)
    file, *_ = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="cut short"):
        find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path)


def least_margin(model: Any, request: EditRequest, layer: int, delta: Tensor) -> float:
    """Least log-odds of an object's token over any other, behind all prefixes, on whole prompts."""
    margins = []
    object_ids = continuation_ids(model.tokenizer, request.target_new)
    for prompt in prefixed_prompts(model, request, PREFIXES):
        tokens = pad([[*prompt.ids, *object_ids[:-1]]], model.tokenizer)
        patch = Patch(Site(layer, "resid"), torch.tensor([[prompt.last_subject]]), delta[None, None], add=True)
        with torch.no_grad():
            logits = model.run(tokens, [patch]).logits[0, len(prompt.ids) - 1 :].log_softmax(-1)
        for row, token in zip(logits, object_ids, strict=True):
            margins.append(float(row[token] - torch.cat([row[:token], row[token + 1 :]]).max()))
    return min(margins)


@pytest.mark.parametrize("convention", ["default", "memit-2022"])
def test_a_fact_leaves_when_its_object_is_ahead_by_the_margin(lively: Any, convention: Any) -> None:
    config = dataclasses.replace(BRISK, joint=False, convention=convention, threshold=0.0, steps=15)
    free = find_targets(lively, REQUESTS, 1, PREFIXES, config)
    assert set(free.summary.stopped) == {"steps"}
    stopping = find_targets(lively, REQUESTS, 1, PREFIXES, dataclasses.replace(config, margin=1.0))
    ahead = stopping.summary[stopping.summary.stopped == "margin"]
    assert len(ahead) >= 2
    assert not set(ahead.id) & set(stopping.unconverged)
    for row in ahead.itertuples():
        request = next(request for request in REQUESTS if request.id == row.id)
        margins = {}
        for updates in (row.updates - 1, row.updates):
            steps = updates + (convention == "memit-2022")
            cut = dataclasses.replace(config, steps=max(steps, 1))
            alone = find_targets(lively, [request], 1, PREFIXES, cut)
            margins[updates] = least_margin(lively, request, 1, alone.z[0] - alone.initial[0])
        # It stops where the condition holds first, and with the z that the search has there.
        assert margins[row.updates - 1] <= 1.0 < margins[row.updates]
        fact = stopping.ids.index(row.id)
        assert distance(stopping.z[fact], alone.z[0]) < 1e-4
        assert distance(stopping.z[fact], free.z[fact]) > 1e-2


def test_facts_that_share_wait_for_the_margin_of_all(lively: Any) -> None:
    config = dataclasses.replace(BRISK, threshold=0.0, margin=0.5)
    row = find_targets(lively, REQUESTS, 1, PREFIXES, config).summary.set_index("id")
    assert row.loc["b"].updates == row.loc["d"].updates
    alone = [find_targets(lively, [REQUESTS[fact]], 1, PREFIXES, config).summary.updates[0] for fact in (1, 3)]
    assert alone[0] != alone[1]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3"])
def test_objects_of_different_lengths_share_a_batch(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = make_model(kind, initializer_range=0.05)
    config = dataclasses.replace(BRISK, steps=3)
    monkeypatch.setitem(LAUNCH_COST, "cpu", 1e12)
    prompts = search_prompts(model, REQUESTS, [0, 1, 2, 1], PREFIXES, config)
    (batch,) = search_batches(model, prompts, config.pass_tokens)
    assert len({len(prompt.scored) for prompt in batch if prompt.labels}) > 1
    assert any(not prompt.labels for prompt in batch)
    shared = find_targets(model, REQUESTS, 1, PREFIXES, config)
    config = dataclasses.replace(config, pass_tokens=40)
    assert len(list(search_batches(model, prompts, config.pass_tokens))) > 1
    split = find_targets(model, REQUESTS, 1, PREFIXES, config)
    assert distance(split.z, shared.z) < 1e-5
    assert torch.allclose(
        torch.tensor(shared.losses[["loss", "nll", "kl", "probability"]].to_numpy()),
        torch.tensor(split.losses[["loss", "nll", "kl", "probability"]].to_numpy()), atol=1e-4,
    )  # fmt: skip
    blum = find_targets(model, [REQUESTS[1], REQUESTS[3]], 1, PREFIXES, config)
    assert distance(blum.z, shared.z[[1, 3]]) < 1e-5
    assert distance(shared.z, shared.initial) > 1e-2


def test_a_model_without_a_readout_of_its_own_gives_the_same(lively: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(BRISK, steps=3)
    chunked = find_targets(lively, REQUESTS, 1, PREFIXES, config)
    assert lively.readout().chunked
    monkeypatch.setattr(type(lively), "readout", lambda self: WholeReadout())
    assert not lively.readout().chunked
    whole = find_targets(lively, REQUESTS, 1, PREFIXES, config)
    assert distance(whole.z, chunked.z) < 1e-5
    assert distance(chunked.z, chunked.initial) > 1e-2


def test_the_margin_is_part_of_the_key_when_there_is_one() -> None:
    keys = {
        margin: TargetCache.at(None, PROVENANCE, 1, PREFIXES, TargetConfig(margin=margin)).key(REQUESTS[:1])
        for margin in (None, 0.5, 1.0)
    }
    assert len(set(keys.values())) == 3
    cache = TargetCache.at(None, PROVENANCE, 1, PREFIXES, TargetConfig())
    assert "margin" not in cache.made_with["settings"]


def test_bad_settings_are_refused() -> None:
    for wrong, match in (
        ({"attention": True}, 'attention is on with part "resid"'),
        ({"margin": -0.5}, "margin is -0.5, expected a number of at least 0 and at most"),
        ({"pass_tokens": 0}, "pass_tokens is 0"),
        ({"kl_weight": -1}, "kl_weight is -1, expected a number of at least 0 and at most"),
    ):
        with pytest.raises(InputError, match=match):
            TargetConfig(**wrong)  # type: ignore[arg-type]


def test_a_search_has_converged_when_the_object_is_the_likeliest_answer(lively: Any) -> None:
    """However it stopped: a loose threshold ends searches early, and a tight one does not end those that are done."""
    early, late = (
        find_targets(
            lively, REQUESTS, 1, PREFIXES, dataclasses.replace(BRISK, joint=False, threshold=threshold, steps=15)
        )
        for threshold in (3.5, 0.0)
    )
    assert set(late.summary.stopped) == {"steps"}
    assert "threshold" in set(early.summary.stopped)
    for targets in (early, late):
        margins = [
            least_margin(lively, request, 1, z - h)
            for request, z, h in zip(REQUESTS, targets.z, targets.initial, strict=True)
        ]
        assert targets.summary["margin"].tolist() == pytest.approx(margins, abs=1e-3)
        assert targets.summary["converged"].tolist() == [margin > 0 for margin in margins]
        assert targets.unconverged == tuple(targets.summary.id[[margin <= 0 for margin in margins]])
    # Both kinds of fact are there, and how a search stopped does not say of which kind a fact is.
    assert late.summary["converged"].any()
    assert not early.summary.loc[early.summary.stopped == "threshold", "converged"].all()
