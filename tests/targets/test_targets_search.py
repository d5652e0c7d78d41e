"""The search runs only what δ reaches, shares δ among facts about one subject, and keeps what it has found."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mechedit.targets.search
from mechedit.batching import STARTING, pad
from mechedit.data import EditRequest
from mechedit.errors import InputError
from mechedit.models import Site
from mechedit.prompts import continuation_ids, prefixed_prompts, tokenize_prompt
from mechedit.targets import TargetConfig, Targets, find_targets
from mechedit.targets.passes import stretches_of
from mechedit.targets.prompts import passes, rows_of
from mechedit.targets.shared_prefix import lead_of

PREFIXES = ["{}", "The first thing. {}", "Because he said so many things. {}"]
REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {}", target_new="Korean"),
    EditRequest(id="b", subject="Leon Blum", prompt="{} is", target_new="in Paris"),
    EditRequest(id="c", subject="Toko Yasuda", prompt="We heard that {}", target_new="plays"),
    EditRequest(id="d", subject="Leon Blum", prompt="They all met {}", target_new="French"),
]
BRISK = TargetConfig(lr=0.5, clamp=2.0)


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    """A model with larger weights, in which one state has much to say."""
    return make_model("gpt2", initializer_range=0.05)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def naive(model: Any, facts: list[EditRequest], layer: int, config: TargetConfig) -> Tensor:
    """z − h of GPT-2 facts that share a δ: hooks, whole prompts, one row at a time, one parameter a part."""
    block = model.hf.transformer.h[layer]
    modules = {"resid": block, "mlp_out": block.mlp, "attn_out": block.attn}
    deltas = {part: torch.zeros(model.d_model, requires_grad=True) for part in config.parts("mlp")}
    optimizer = torch.optim.Adam(list(deltas.values()), lr=config.lr)

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
    wanted = [continuation_ids(model.tokenizer, fact.target_new) for fact in facts]
    kl = tokenize_prompt(model.tokenizer, config.kl_prompt, facts[0].subject)
    initial: list[dict[str, Tensor]] = [{} for _ in facts]
    for states, own in zip(initial, prompts, strict=True):
        run(list(own[0].ids), own[0].last_subject, states)
    clean = run(list(kl.ids), kl.last_subject)[-1].detach()
    for _ in range(config.updates):
        loss = torch.zeros(())
        for states, own, objects in zip(initial, prompts, wanted, strict=True):
            for prompt in own:
                logits = run([*prompt.ids, *objects[:-1]], prompt.last_subject)[len(prompt.ids) - 1 :]
                loss = loss - logits[range(len(objects)), objects].mean() / len(own) / len(facts)
            for part, delta in deltas.items():
                loss = loss + config.weight_decay * (delta.norm() / states[part].norm()) ** 2 / len(facts)
        now = run(list(kl.ids), kl.last_subject)[-1]
        loss = loss + config.kl_weight * (now.exp() * (now - clean)).sum()
        optimizer.zero_grad()
        for delta, slope in zip(deltas.values(), torch.autograd.grad(loss, list(deltas.values())), strict=True):
            delta.grad = slope
        optimizer.step()
        for part, delta in deltas.items():
            limit = config.clamp * min(states[part].norm() for states in initial)
            with torch.no_grad():
                delta.mul_((limit / delta.norm()).clamp(max=1))
    return deltas[config.part].detach()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("parts", [{}, {"part": "mlp_out"}, {"part": "mlp_out", "attention": True}])
def test_agrees_with_a_naive_search(small_model: Any, layer: int, parts: dict[str, Any]) -> None:
    config = TargetConfig(steps=5, threshold=1e-9, clamp=2.0, **parts)
    targets = find_targets(small_model, REQUESTS, layer, PREFIXES, config)
    found = targets.z - targets.initial
    blum = [REQUESTS[1], REQUESTS[3]]
    for place, sharing in ((0, REQUESTS[:1]), (1, blum), (3, blum)):
        assert distance(found[place], naive(small_model, sharing, layer, config)) < 1e-3
        assert found[place].norm() > 0.5
    assert targets.part == config.part


def test_z_is_a_state_of_its_part(small_model: Any) -> None:
    free: dict[str, Any] = {"steps": 4, "clamp": 1e6, "weight_decay": 0}
    whole, added = (
        find_targets(small_model, REQUESTS, 1, PREFIXES, TargetConfig(part=part, **free))
        for part in ("resid", "mlp_out")
    )
    prompt = tokenize_prompt(small_model.tokenizer, REQUESTS[0].prompt, REQUESTS[0].subject)
    tokens = pad([prompt.ids], small_model.tokenizer)
    for targets, part in ((whole, "resid"), (added, "mlp_out")):
        site = Site(1, part)  # type: ignore[arg-type]
        state = small_model.run(tokens, read=[site])[site][0, prompt.last_subject]
        assert torch.allclose(targets.initial[0], state, atol=1e-5)
    # What is added to the MLP's output is added to the stream after it: only the ball and the decay differ.
    assert distance(added.z - added.initial, whole.z - whole.initial) < 1e-3
    assert distance(added.initial, whole.initial) > 0.1


def test_facts_about_one_subject_share_what_is_added(lively: Any) -> None:
    joint = find_targets(lively, REQUESTS, 1, PREFIXES, BRISK)
    apart = find_targets(lively, REQUESTS, 1, PREFIXES, dataclasses.replace(BRISK, joint=False))
    added, own = joint.z - joint.initial, apart.z - apart.initial
    assert torch.allclose(added[1], added[3], atol=1e-5)
    assert distance(own[1], own[3]) > 0.5
    assert torch.allclose(added[[0, 2]], own[[0, 2]], atol=1e-3)
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
    """Numbers that each block's MLP is given, a list a block and an entry a run, and the hooks that count."""
    seen: list[list[int]] = [[] for _ in model.unhooked_copy.transformer.h]
    handles = [
        block.mlp.c_fc.register_forward_pre_hook(lambda module, args, own=own: own.append(args[0].numel()))
        for own, block in zip(seen, model.unhooked_copy.transformer.h, strict=True)
    ]
    return seen, handles


def test_only_what_delta_reaches_runs_again(lively: Any) -> None:
    config = dataclasses.replace(BRISK, steps=6, threshold=1e-9)
    rows = rows_of(lively, REQUESTS, [0, 1, 2, 1], PREFIXES, config)
    seen, handles = counted(lively)
    find_targets(lively, REQUESTS, 0, PREFIXES, config)
    for hook in handles:
        hook.remove()
    together = list(passes(lively, rows, config.pass_tokens))
    assert [len(runs) for runs in seen] == [len(together), *[len(together) * (1 + 7)] * 2]
    again = sum(len(some) * max(row.width for row in some) for some in together) * lively.d_model
    assert sum(seen[1][-len(together) :]) == again
    assert again < 0.7 * sum(len(row.ids) for row in rows) * lively.d_model
    # The last block's MLP computes what is asked for alone.
    assert sum(seen[2][-len(together) :]) == sum(len(row.asked) for row in rows) * lively.d_model < again


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", ["resid", "mlp_out"])
def test_with_local_attention_less_runs_again_and_z_is_the_same(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, layer: int, part: Any
) -> None:
    model = make_model("gpt_neo", initializer_range=0.05)
    config = dataclasses.replace(BRISK, steps=4, part=part, attention=part == "mlp_out")
    assert [model.window(block) for block in range(4)] == [3, 3, 3, None]
    requests = [dataclasses.replace(request, prompt=request.prompt + " of all things") for request in REQUESTS]
    stretches = stretches_of(model, layer, config, 9)
    widths = [stretch.reach for stretch in stretches for _ in range(stretch.first, stretch.last + 1)]
    first = [1] if config.attention else []
    assert widths == [*first, *(min(9, 1 + 2 * (block - layer)) for block in range(layer + 1, 3)), 9]
    seen, handles = counted(model)
    local = find_targets(model, requests, layer, PREFIXES, config)
    runs = [sum(own) for own in seen]
    for own in seen:
        own.clear()
    monkeypatch.setattr(type(model), "window", lambda self, layer: None)
    everywhere = find_targets(model, requests, layer, PREFIXES, config)
    for hook in handles:
        hook.remove()
    assert distance(local.z - local.initial, everywhere.z - everywhere.initial) < 1e-4
    assert runs[layer + 1] < sum(seen[layer + 1])
    assert runs[3] == sum(seen[3])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "llama", "neox"])
def test_what_rows_begin_with_alike_runs_once(make_model: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = make_model(kind, initializer_range=0.05)
    config = dataclasses.replace(BRISK, steps=3)
    apart = find_targets(model, REQUESTS, 1, PREFIXES, config)
    monkeypatch.setitem(STARTING, "cpu", 0)
    rows = rows_of(model, REQUESTS, [0, 1, 2, 3], PREFIXES, config)
    monkeypatch.setattr("mechedit.targets.shared_prefix.spare_tokens", lambda model: 1e6)
    (some, *_) = sorted(passes(model, rows, config.pass_tokens), key=len, reverse=True)
    lead, cuts = lead_of(model, some)
    assert lead is not None
    assert lead.lengths.tolist() == cuts
    for row, cut in zip(some, cuts, strict=True):
        same = [other.ids[:cut] == row.ids[:cut] for other in some if other.prefix == row.prefix]
        assert all(same)
        assert cut <= row.subject
    assert max(cuts) > 3
    shared = find_targets(model, REQUESTS, 1, PREFIXES, config)
    assert distance(shared.z - shared.initial, apart.z - apart.initial) < 1e-3
    assert distance(shared.initial, apart.initial) < 1e-5
    # It matters what the rows began with.
    elsewhere = find_targets(model, REQUESTS, 1, ["{}", "Another thing. {}", *PREFIXES[2:]], config)
    assert distance(elsewhere.z - elsewhere.initial, apart.z - apart.initial) > 1e-2


def test_passes_that_do_not_fit_are_halved(lively: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(BRISK, steps=4)
    whole = find_targets(lively, REQUESTS, 1, PREFIXES, config)
    plain, most = type(lively).run, [2]

    def short(self: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        if len(tokens.ids) > most[0]:
            refused.append(len(tokens.ids))
            raise torch.OutOfMemoryError("full")
        return plain(self, tokens, *args, **kwargs)

    refused: list[int] = []
    monkeypatch.setattr(type(lively), "run", short)
    assert distance(find_targets(lively, REQUESTS, 1, PREFIXES, config).z, whole.z) < 1e-4
    # Once halved they stay so: after the clean run nothing is tried in vain.
    assert 0 < len(refused) < 8
    most[0] = 0
    with pytest.raises(torch.OutOfMemoryError):
        find_targets(lively, REQUESTS, 1, PREFIXES, config)


def same(one: Targets, other: Targets) -> bool:
    return (
        torch.equal(one.z, other.z)
        and torch.equal(one.initial, other.initial)
        and one.losses.equals(other.losses)
        and one.summary.equals(other.summary)
    )


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_interrupted_search_goes_on(
    lively: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    config = dataclasses.replace(BRISK, steps=4, batch_size=1)
    whole = find_targets(lively, REQUESTS, 1, PREFIXES, config)
    searched, plain = [], mechedit.targets.search._search

    def interrupted(model: Any, units: Any, *args: Any) -> Any:
        if len(searched) == after:
            raise KeyboardInterrupt
        searched.append(units)
        return plain(model, units, *args)

    with monkeypatch.context() as patched:
        patched.setattr(mechedit.targets.search, "_search", interrupted)
        with pytest.raises(KeyboardInterrupt):
            find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == after == len(list(tmp_path.iterdir()))
    assert same(find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path), whole)
    rest: list[Any] = []
    monkeypatch.setattr(mechedit.targets.search, "_search", lambda *args: rest.append(args) or plain(*args))
    assert same(find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path), whole)
    assert not rest
    # Three δ in all, as two facts share one.
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_what_is_kept_is_known_by_all_that_determines_it(
    lively: Any, make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(BRISK, steps=2)
    searched: list[int] = []
    plain = mechedit.targets.search._search
    monkeypatch.setattr(
        mechedit.targets.search,
        "_search",
        lambda model, units, *a: searched.append(len(units)) or plain(model, units, *a),
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


def test_a_damaged_file_is_refused(lively: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(BRISK, steps=1)
    find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(InputError, match="cut short"):
        find_targets(lively, REQUESTS, 1, PREFIXES, config, cache=tmp_path)


def test_bad_settings_are_refused() -> None:
    for wrong, match in (
        ({"attention": True}, 'attention is on with part "resid"'),
        ({"pass_tokens": 0}, "pass_tokens is 0"),
        ({"kl_weight": -1}, "kl_weight is -1, expected at least 0; choose"),
    ):
        with pytest.raises(InputError, match=match):
            TargetConfig(**wrong)  # type: ignore[arg-type]
