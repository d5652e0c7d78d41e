"""Log-probabilities read a part of the vocabulary at a time are those of the whole, with their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mechedit.batching import pad
from mechedit.models import CleanLogits, Readout, WholeReadout, log_probabilities
from mechedit.models.readout import CHUNK, LogitMap, find_readout
from mechedit.trace import MetricInputs

D_MODEL, VOCAB = 16, 301


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several parts, the last of them shorter.
    monkeypatch.setitem(CHUNK, "cpu", 500)


def head_of(dtype: torch.dtype, *, bias: bool, vocab: int = VOCAB) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(D_MODEL, vocab, bias=bias).to(dtype).requires_grad_(False)


def naive(logits: Tensor, labels: Tensor, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P, the best of the others, and KL, each by its definition."""
    log_probs, n = logits.log_softmax(-1), len(labels)
    others = torch.stack(
        [torch.cat([row[:at], row[at + 1 :]]).max() for row, at in zip(log_probs, labels, strict=False)]
    )
    edited, reference = log_probs[n:], clean.log_softmax(-1)
    return log_probs[:n].gather(1, labels[:, None])[:, 0], others, (edited.exp() * (edited - reference)).sum(1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("logit_map", [LogitMap(), LogitMap(scale=0.3), LogitMap(cap=2.0), LogitMap(scale=3, cap=2.0)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_whole_logits(dtype: torch.dtype, logit_map: LogitMap, bias: bool) -> None:
    head = head_of(dtype, bias=bias)
    readout = Readout(head, logit_map)
    assert len(list(readout.ranges(8))) > 3
    states = (3 * torch.randn(8, D_MODEL, dtype=dtype)).requires_grad_()
    labels, clean = torch.tensor([0, 5, 61, 62, 300]), torch.randn(3, VOCAB, dtype=dtype)
    upstream = torch.randn(8, dtype=dtype)
    products = head(states) * logit_map.scale
    logits = products if logit_map.cap is None else logit_map.cap * (products / logit_map.cap).tanh()
    log_prob, others, kl = naive(logits, labels, clean)
    (expected,) = torch.autograd.grad((torch.cat([log_prob, kl]) * upstream).sum(), states)
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for source, reader in ((states, readout), (logits, WholeReadout())):
        scores = reader.score(source, labels, CleanLogits(clean))
        for value, reference in ((scores.log_prob, log_prob), (scores.runner_up, others), (scores.kl, kl)):
            assert torch.allclose(value, reference, atol=tolerance)
    assert not scores.runner_up.requires_grad
    scores = readout.score(states, labels, CleanLogits(clean))
    (gradient,) = torch.autograd.grad((torch.cat([scores.log_prob, scores.kl]) * upstream).sum(), states)
    assert float((gradient - expected).norm() / expected.norm()) < tolerance
    # Without the cap or the scale the numbers are others.
    if logit_map != LogitMap():
        plain = Readout(head).score(states, labels, CleanLogits(clean))
        assert not torch.allclose(plain.log_prob, log_prob, atol=1e-2)


@pytest.mark.parametrize(("n_labels", "n_clean"), [(4, 0), (0, 3), (0, 0)])
def test_labels_or_divergences_may_be_lacking(n_labels: int, n_clean: int) -> None:
    head = head_of(torch.float64, bias=False)
    states = torch.randn(n_labels + n_clean, D_MODEL, dtype=torch.float64, requires_grad=True)
    labels, clean = torch.arange(n_labels), torch.randn(n_clean, VOCAB, dtype=torch.float64)
    scores = Readout(head).score(states, labels, CleanLogits(clean) if n_clean else None)
    whole = WholeReadout().score(head(states), labels, CleanLogits(clean) if n_clean else None)
    assert torch.allclose(scores.log_prob, whole.log_prob)
    assert torch.allclose(scores.kl, whole.kl)
    assert (len(scores.log_prob), len(scores.kl)) == (n_labels, n_clean)
    with pytest.raises(ValueError, match=r"states are for \d labels"):
        Readout(head).score(torch.randn(9, D_MODEL, dtype=torch.float64), labels)


def test_half_precision_sums_are_in_float32() -> None:
    head = head_of(torch.bfloat16, bias=False)
    states = torch.randn(6, D_MODEL, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(6)
    scores, whole = Readout(head).score(states, labels), WholeReadout().score(head(states), labels)
    assert scores.log_prob.dtype == torch.float32
    assert torch.allclose(scores.log_prob, whole.log_prob, atol=1e-5)
    gradient, expected = (torch.autograd.grad(s.log_prob.sum(), states)[0].float() for s in (scores, whole))
    assert float((gradient - expected).norm() / expected.norm()) < 2e-2
    summed_in_bf16 = head(states).log_softmax(-1).gather(1, labels[:, None])[:, 0].float()
    assert float((summed_in_bf16.detach() - whole.log_prob.detach()).abs().max()) > 1e-3


def test_the_gradient_of_a_small_divergence_does_not_cancel() -> None:
    head = head_of(torch.float32, bias=False)
    states = 20 * torch.randn(5, D_MODEL)
    moved = (states + 1e-3 * torch.randn(5, D_MODEL)).requires_grad_()
    exact = moved.detach().double().requires_grad_()
    weight = head.weight.double()
    edited, reference = ((at @ weight.T).log_softmax(-1) for at in (exact, states.double()))
    (expected,) = torch.autograd.grad((edited.exp() * (edited - reference)).sum(), exact)
    errors = []
    # Logits that differ by a constant tell the same, but their differences are no longer small.
    for shift in (0, 1000):
        kl = Readout(head).score(moved, torch.arange(0), CleanLogits(head(states) + shift)).kl
        errors.append(float((torch.autograd.grad(kl.sum(), moved)[0] - expected).norm() / expected.norm()))
    assert errors[0] < 0.02
    assert errors[1] > 0.1


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, views of weights and inputs apart."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known, self.elements = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_a_large_vocabulary_is_never_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK, "cpu", 2**18)
    rows, vocab = 40, 262_144
    head, states = head_of(torch.float32, bias=False, vocab=vocab), torch.randn(rows, D_MODEL, requires_grad=True)
    labels = torch.arange(rows)
    with Largest(head.weight) as chunked:
        Readout(head).score(states, labels).log_prob.sum().backward()
    assert 0 < chunked.elements <= 2**18
    with Largest(head.weight) as whole:
        head(states).log_softmax(-1)
    assert whole.elements == rows * vocab


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "gemma2", "gemma3"])
def test_a_models_readout_gives_its_log_probabilities(make_model: Any, kind: str) -> None:
    model = make_model(kind)
    readout = model.readout()
    assert isinstance(readout, Readout)
    assert (readout.logit_map.cap is not None) == (kind == "gemma2")
    tokens = pad([[5, 6, 7, 8], [9, 10, 11, 12]], model.tokenizer)
    with torch.no_grad():
        states = model.run(tokens, unembed=False).head_inputs.flatten(0, 1)
        expected = model.run(tokens).logits.flatten(0, 1).log_softmax(-1)
    labels = torch.arange(8)
    assert torch.allclose(readout.score(states, labels).log_prob, expected.gather(1, labels[:, None])[:, 0], atol=1e-5)


def test_a_map_that_is_not_known_is_read_from_whole_logits(make_model: Any) -> None:
    head, config = head_of(torch.float32, bias=False), make_model("gpt2").hf.config
    states = torch.randn(4, D_MODEL)
    assert isinstance(find_readout(head, config, states, head(states)), Readout)
    assert isinstance(find_readout(head, config, states, head(states) ** 3), WholeReadout)
    assert isinstance(find_readout(nn.Identity(), config, states, states), WholeReadout)


def test_log_probabilities_over_a_large_vocabulary_are_exact() -> None:
    """Of likely tokens too, whose log P is a small difference of large numbers."""
    logits = torch.randn(50, 50_259, generator=torch.Generator().manual_seed(0)) - 2
    logits[:, 7] += 16
    exact = logits.double().log_softmax(-1)[:, 7]
    assert (exact.exp() > 0.9).any(), "the token is likely"
    readout, states = WholeReadout(), logits
    inputs = MetricInputs(
        logits=logits[:, None], clean_runs=logits[:1, None], facts=torch.zeros(50, dtype=torch.long),
        objects=torch.full((50, 1), 7), foils=torch.zeros(50, dtype=torch.long),
    )  # fmt: skip
    for result in (
        log_probabilities(logits)[:, 7],
        readout.score(states, torch.full((50,), 7)).log_prob,
        inputs.log_probability,
    ):
        assert float((result - exact).abs().max()) < 1e-5
    # Control: rounding of one part in ten thousand would be seen.
    assert float((logits.softmax(-1)[:, 7].log() + 1e-4 - exact).abs().max()) > 1e-5
