"""MEMIT agrees with a plain transcription of the published algorithm, and does what it is for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mechedit.methods.method
from mechedit.batching import pad
from mechedit.data import EditRequest
from mechedit.edit import Edit, edited
from mechedit.errors import InputError
from mechedit.methods import KeyExtractor, MemitConfig, SpreadConfig
from mechedit.methods.memit import memit
from mechedit.moments import collect_moments
from mechedit.prompt_tokens import continuation_ids, encode
from mechedit.targets import TargetConfig, find_targets

PREFIXES = ["{}", "The first thing. {}", "Because he said so many things. {}"]
REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {}", target_new="Korean"),
    EditRequest(id="b", subject="Leon Blum", prompt="{} is", target_new="in Paris"),
    EditRequest(id="c", subject="Toko Yasuda", prompt="We heard that {}", target_new="plays"),
    EditRequest(id="d", subject="Leon Blum", prompt="They all met {}", target_new="French"),
]
TEXTS = [
    "The mother tongue of Leon Blum is French, and that of Go Hyeon-jeong is Korean.",
    "Apple A5 was created by Apple. Windows Media Player was created by Microsoft.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball in town.",
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
    "Edwin of Northumbria's religious values strongly emphasize Christianity.",
]
# Facts about one subject apart: a random model has no room for two of them in one state.
SETTINGS: dict[str, Any] = {"lr": 0.5, "clamp": 2.0, "steps": 12, "joint": False}


# Where each architecture has its blocks, and the MLP's second matrix in a block.
PLACES = {
    "gpt2": ("transformer.h", "mlp.c_proj"),
    "gptj": ("transformer.h", "mlp.fc_out"),
    "llama": ("model.layers", "mlp.down_proj"),
}


class Published:
    """The published algorithm on a plain model, one fact at a time, with torch hooks and nothing of ours."""

    def __init__(self, hf: Any, tokenizer: Any, config: MemitConfig, prefixes: list[str]) -> None:
        self.hf, self.tokenizer, self.config, self.prefixes = hf, tokenizer, config, prefixes
        blocks, down = PLACES[hf.config.model_type]
        self.blocks = hf.get_submodule(blocks)
        self.downs = [block.get_submodule(down) for block in self.blocks]

    def edit(
        self, requests: list[EditRequest], layers: list[int], moments: dict[int, Tensor]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """z, one column per fact, and ΔW for each layer, as [d_mlp, d_model]."""
        matrices = {layer: self.matrix(layer) for layer in layers}
        saved = {layer: matrix.detach().clone() for layer, matrix in matrices.items()}
        z = torch.stack([self.target(request, layers[-1]) for request in requests], 1)
        deltas = {}
        for index, layer in enumerate(layers):
            keys = torch.stack([self.key(request, layer) for request in requests], 1).double()
            now = torch.stack([self.state(request, layers[-1]) for request in requests], 1)
            residual = (z - now).double() / (len(layers) - index)
            solved = torch.linalg.solve(self.config.covariance_weight * moments[layer] + keys @ keys.T, keys)
            deltas[layer] = (residual @ solved.T).T
            matrices[layer].data.add_(deltas[layer].float())
        for layer, matrix in matrices.items():
            matrix.data.copy_(saved[layer])
        return z, deltas

    def matrix(self, layer: int) -> Tensor:
        """A live view, [d_mlp, d_model]: GPT-2's lies so, the others' Linear is transposed."""
        weight = self.downs[layer].weight
        return weight if self.hf.config.model_type == "gpt2" else weight.T

    def target(self, request: EditRequest, layer: int) -> Tensor:
        """compute_z of the published code."""
        object_ids = torch.tensor(self.tokenizer(" " + request.target_new)["input_ids"])
        fed = self.tokenizer.decode(object_ids[:-1])
        templates = [prefix.replace("{}", request.prompt) + fed for prefix in self.prefixes] + ["{} is a"]
        batch = self.padded([template.replace("{}", request.subject) for template in templates])
        at = [self.lookup(template, request.subject) for template in templates]
        delta = torch.zeros(self.hf.config.hidden_size, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=self.config.lr)
        start: Any = None
        kl_start: Any = None

        def add(module: Any, inputs: Any, output: Any) -> Any:
            nonlocal start
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            start = hidden[0, at[0]].detach().clone() if start is None else start
            for row, index in enumerate(at):
                hidden[row, index] = hidden[row, index] + delta
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = self.blocks[layer].register_forward_hook(add)
        for step in range(self.config.steps):
            logits = self.hf(**batch).logits.log_softmax(-1)
            nll = torch.zeros(())
            for row in range(len(self.prefixes)):
                end = int(batch["attention_mask"][row].sum())
                places = range(end - len(object_ids), end)
                nll = nll - logits[row, places, object_ids].sum() / len(object_ids) / len(self.prefixes)
            kl_now = logits[-1, at[-1]]
            kl_start = kl_now.detach().clone() if kl_start is None else kl_start
            kl = torch.nn.functional.kl_div(kl_start, kl_now, log_target=True, reduction="sum")
            decay = delta.norm() / start.norm() ** 2
            loss = nll + self.config.kl_weight * kl + self.config.weight_decay * decay
            if loss < self.config.threshold or step == self.config.steps - 1:
                break
            (delta.grad,) = torch.autograd.grad(loss, [delta])
            optimizer.step()
            most = self.config.clamp * start.norm()
            if delta.norm() > most:
                delta.data.mul_(most / delta.data.norm())
        handle.remove()
        return (start + delta).detach()

    def key(self, request: EditRequest, layer: int) -> Tensor:
        """compute_ks: the mean within each kind of prefix (bare; made up), then over kinds."""
        keys = [self.read(request, prefix, self.downs[layer], 0) for prefix in self.prefixes]
        return (keys[0] + torch.stack(keys[1:]).mean(0)) / 2

    def state(self, request: EditRequest, layer: int) -> Tensor:
        return self.read(request, "{}", self.blocks[layer], 1)

    def read(self, request: EditRequest, prefix: str, module: Any, side: int) -> Tensor:
        caught: list[Any] = []
        handle = module.register_forward_hook(lambda module, inputs, output: caught.append((inputs[0], output)[side]))
        template = prefix.replace("{}", request.prompt)
        with torch.no_grad():
            self.hf(**self.padded([template.replace("{}", request.subject)]))
        handle.remove()
        value = caught[0][0] if isinstance(caught[0], tuple) else caught[0]
        return value[0, self.lookup(template, request.subject)]

    def lookup(self, template: str, subject: str) -> int:
        return len(self.tokenizer(template[: template.index("{}")] + subject)["input_ids"]) - 1

    def padded(self, texts: list[str]) -> dict[str, Tensor]:
        rows = self.tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        return {name: rows[name] for name in ("input_ids", "attention_mask")}


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    """A model with larger weights, in which one state has much to say."""
    return make_model("gpt2", initializer_range=0.05)


@pytest.fixture(scope="module")
def moments(lively: Any) -> dict[int, Any]:
    return collect_moments(lively, TEXTS, [0, 1, 2])


def distance(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


def likelihood(model: Any, request: EditRequest) -> float:
    """Log-probability of the new object after the prompt."""
    prompt, object_ids = (
        encode(model.tokenizer, request.text)[0],
        continuation_ids(model.tokenizer, request.target_new),
    )
    with torch.no_grad():
        logits = model.run(pad([prompt + object_ids], model.tokenizer)).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + index, token]) for index, token in enumerate(object_ids))


@pytest.mark.parametrize(
    ("family", "layers", "backend"),
    [
        ("gpt2", [0, 1], "transformer_lens"),
        ("gpt2", [0, 2], "nnsight"),
        ("gptj", [0, 1], "nnsight"),
        ("llama", [0, 1], "transformer_lens"),
    ],
)
def test_agrees_with_the_published_algorithm(make_model: Any, family: str, layers: list[int], backend: str) -> None:
    """Backends take turns: that both give the same keys and targets has tests of its own."""
    model = make_model(family, backend, initializer_range=0.05)
    requests = [request for request in REQUESTS if layers[-1] < 2 or request.prompt.endswith("{}")]
    # At 3.5 nats some facts stop early.
    config = MemitConfig(convention="memit-2022", covariance_weight=2.0, threshold=3.5, batch_size=3, **SETTINGS)
    matrices = {layer: moment.matrix for layer, moment in collect_moments(model, TEXTS, layers).items()}
    z, deltas = Published(model.hf, model.tokenizer, config, PREFIXES).edit(requests, layers, matrices)
    targets = find_targets(model, requests, layers[-1], PREFIXES, config.targets)
    edit = memit(model, requests, layers, matrices, PREFIXES, config)
    assert targets.summary.updates.nunique() > 1
    assert distance(targets.z.T, z) < 1e-3
    assert distance(targets.initial.T, z) > 0.1
    for layer in layers:
        assert distance(edit.delta(layer), deltas[layer]) < 1e-3
    plain = memit(model, requests, layers, matrices, PREFIXES, dataclasses.replace(config, convention="default"))
    assert distance(plain.delta(0), deltas[0]) > 0.01


def test_makes_the_new_objects_likelier(lively: Any, moments: dict[int, Any]) -> None:
    before = [likelihood(lively, request) for request in REQUESTS]
    config = MemitConfig(covariance_weight=0.1, lr=0.5, clamp=2.0, joint=False)
    with edited(lively, memit(lively, REQUESTS, [0, 1], moments, PREFIXES, config)):
        after = [likelihood(lively, request) for request in REQUESTS]
    with edited(
        lively,
        memit(lively, REQUESTS, [0, 1], moments, PREFIXES, dataclasses.replace(config, covariance_weight=1e6)),
    ):
        unchanged = [likelihood(lively, request) for request in REQUESTS]
    assert all(new > old + 1 for new, old in zip(after, before, strict=True))
    assert unchanged == pytest.approx(before, abs=0.05)


def test_moments_may_be_matrices(lively: Any, moments: dict[int, Any]) -> None:
    config = MemitConfig(steps=2)
    first = memit(lively, REQUESTS, [1], moments, PREFIXES, config)
    second = memit(lively, REQUESTS, [1], {1: moments[1].matrix}, PREFIXES, config)
    assert distance(first.delta(1), second.delta(1)) < 1e-9


def test_default_prefixes_are_seeded(lively: Any, moments: dict[int, Any]) -> None:
    first, again, second = (
        memit(lively, REQUESTS, [1], moments, config=MemitConfig(steps=2, seed=seed)) for seed in (0, 0, 1)
    )
    assert first.manifest == again.manifest
    assert torch.equal(first.delta(1), again.delta(1))
    assert first.manifest["prefixes"][0] == "{}"
    assert first.manifest["prefixes"] != second.manifest["prefixes"]
    assert not torch.equal(first.delta(1), second.delta(1))


def test_edit_keeps_its_manifest_on_disk(lively: Any, moments: dict[int, Any], tmp_path: Path) -> None:
    config = MemitConfig(steps=2)
    edit = memit(lively, REQUESTS, [0, 1], moments, PREFIXES, config)
    edit.save(tmp_path / "edit.safetensors")
    manifest = Edit.load(tmp_path / "edit.safetensors").manifest
    assert manifest == edit.manifest
    assert manifest["method"] == "memit"
    assert manifest["layers"] == [0, 1]
    assert manifest["settings"] == dataclasses.asdict(config)
    assert manifest["unconverged"] == ["a", "b", "c", "d"]
    assert manifest["model"]["weights_hash"] == lively.weights_hash()


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_the_model_ends_as_it_began(
    lively: Any, moments: dict[int, Any], monkeypatch: pytest.MonkeyPatch, error: type[BaseException] | None
) -> None:
    before, plain = lively.weights_hash(), KeyExtractor.keys

    def interrupted(*args: Any) -> Tensor:
        if error is not None and lively.weights_hash() != before:
            raise error
        return plain(*args)

    monkeypatch.setattr(KeyExtractor, "keys", interrupted)
    if error is None:
        edit = memit(lively, REQUESTS, [0, 1], moments, PREFIXES, MemitConfig(steps=2))
        assert edit.delta(0).any()
    else:
        with pytest.raises(error):
            memit(lively, REQUESTS, [0, 1], moments, PREFIXES, MemitConfig(steps=2))
    assert lively.weights_hash() == before


def test_settings_reach_both_halves() -> None:
    config = MemitConfig(convention="memit-2022", covariance_weight=15000, lr=0.1, clamp=4.0, seed=3)
    assert config.targets == TargetConfig(convention="memit-2022", lr=0.1, clamp=4.0, seed=3)
    assert config.spread == SpreadConfig(convention="memit-2022")
    known = {field.name for field in dataclasses.fields(MemitConfig)}
    for kind in (TargetConfig, SpreadConfig):
        # MEMIT says itself what z is a state of; how many tokens fit in a pass is no matter of the method.
        fixed = {"part", "attention", "pass_tokens"}
        assert {field.name for field in dataclasses.fields(kind)} <= known | fixed
    assert MemitConfig().targets == TargetConfig()
    assert MemitConfig().spread == SpreadConfig()
    with pytest.raises(InputError, match="covariance_weight is 0"):
        MemitConfig(covariance_weight=0.0)


def test_bad_input_is_refused_before_the_search(
    lively: Any, moments: dict[int, Any], make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("searched")

    monkeypatch.setattr(mechedit.methods.method, "find_targets", never)

    def refused(
        match: str, model: Any = lively, requests: Any = REQUESTS, layers: Any = (0, 1), second_moments: Any = moments
    ) -> None:
        with pytest.raises(InputError, match=match):
            memit(model, requests, layers, second_moments, PREFIXES)

    for layers in ([], [1, 0], [1, 1], [2, 3]):
        refused("ascending and each once", layers=layers)
    refused("no edit requests", requests=[])
    refused("conflict", requests=[*REQUESTS, dataclasses.replace(REQUESTS[0], id="x", target_new="English")])
    refused("no second moment for layer 1", second_moments={0: moments[0]})
    refused("expected .96, 96.", second_moments={0: moments[0], 1: torch.eye(32)})
    broken = make_model("gpt2", initializer_range=0.05)
    refused("weights_hash", model=make_model("gpt2", seed=5))
    with torch.no_grad():
        broken.hf.transformer.h[2].mlp.c_fc.weight[3, 4] = torch.inf
    refused(
        r"the weights transformer.h.2.mlp.c_fc.weight hold 1 values",
        model=broken,
        second_moments={layer: moments[layer].matrix for layer in (0, 1)},
    )
    with pytest.raises(AssertionError, match="searched"):
        memit(lively, REQUESTS, [0, 1], moments, PREFIXES)
