"""Knowledge neurons: attributions add up to what the keys do, and their rows are rewritten as the method says."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mechedit.batching import pad
from mechedit.data import EditRequest
from mechedit.errors import InputError
from mechedit.methods import KnConfig, kn
from mechedit.methods.kn import integrated_gradients, knowledge_neurons
from mechedit.models import EMBED, Patch
from mechedit.prompt_tokens import complete

REQUEST = EditRequest(
    id="a", subject="Leon Blum", prompt="The mother tongue of {} is", target_new="Korean", target_true="French"
)
PREFIXES = ["{}", "The first thing. {}"]


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    """A model with larger weights, in which keys have much to say and P(o) is not nothing."""
    return make_model("gpt2", initializer_range=0.05)


def probability(model: Any, layer: int, key: Tensor | None = None) -> float:
    """P(true object) with a key at the prompt's last token in place of the model's own."""
    completion = complete(model.tokenizer, REQUEST.text, " French")
    tokens = pad([completion.ids[:-1]], model.tokenizer)
    last = len(completion.prompt) - 1
    patches = [] if key is None else [Patch(model.key_site(layer), torch.tensor([[last]]), key[None, None])]
    with torch.no_grad():
        scores = model.run(tokens, patches).logits[0, last:].log_softmax(-1)
    return float(scores[range(len(completion.target)), completion.target].sum().exp())


@pytest.mark.parametrize("layer", [0, 2])
def test_attributions_add_up_to_what_the_key_does(lively: Any, layer: int) -> None:
    """Completeness: the path from no key to the whole key, Σ aᵢ = P(k) − P(0)."""
    with_key, without = probability(lively, layer), probability(lively, layer, torch.zeros(lively.d_key))
    effect = with_key - without
    assert abs(effect) > 1e-3 * with_key, "the control: the key does something"
    errors = []
    for steps in (1, 4, 64):
        (attributions,) = integrated_gradients(lively, REQUEST, [layer], "{}", KnConfig(steps=steps))
        errors.append(abs(float(attributions.sum()) - effect) / abs(effect))
    assert errors[-1] < 1e-3 < errors[0], "and the sum over α converges"


def test_the_rows_of_the_facts_neurons_are_rewritten_and_no_others(lively: Any) -> None:
    config = KnConfig(steps=4, threshold=0.5, scale=3.0)
    with pytest.warns(UserWarning, match="larger than the weights .* choose a smaller scale, or a higher threshold"):
        edit = kn(lively, [REQUEST], [0, 1, 2], prefixes=PREFIXES, config=config)
    neurons = knowledge_neurons(lively, REQUEST, [0, 1, 2], PREFIXES, config)
    assert 0 < int(neurons.sum()) < neurons.numel() / 10
    assert edit.manifest["neurons"] == [int(neurons.sum())]
    assert edit.manifest["unconverged"] == ["a"], "a random model says something else"
    first = [complete(lively.tokenizer, REQUEST.text, text).target[0] for text in (" Korean", " French")]
    embedded = lively.run(pad([first], lively.tokenizer), read=[EMBED])[EMBED][0].detach()
    for layer in range(3):
        changed = edit.delta(layer).abs().sum(1) > 0
        assert torch.equal(changed.cpu(), neurons[layer].cpu())
        for row in edit.delta(layer)[changed]:
            assert torch.allclose(row.float(), 3.0 * (embedded[0] - embedded[1]).float(), atol=1e-5)


def test_the_gradient_is_a_difference_of_probabilities(lively: Any) -> None:
    """With one step, aᵢ = kᵢ ∂P/∂kᵢ at half of the key: held against P at that key with one coordinate moved."""
    (attributions,) = integrated_gradients(lively, REQUEST, [1], "{}", KnConfig(steps=1))
    completion = complete(lively.tokenizer, REQUEST.text, " French")
    tokens = pad([completion.ids[:-1]], lively.tokenizer)
    site = lively.key_site(1)
    key = lively.run(tokens, read=[site])[site][0, len(completion.prompt) - 1].detach()
    for index in attributions.abs().topk(3).indices.tolist():
        step = torch.zeros_like(key).index_fill(0, torch.tensor(index), 0.05)
        slope = (probability(lively, 1, key / 2 + step) - probability(lively, 1, key / 2 - step)) / 0.1
        assert float(attributions[index]) == pytest.approx(float(key[index]) * slope, rel=1e-2)


def test_an_edit_of_two_facts_is_the_sum_of_their_edits(lively: Any) -> None:
    second = dataclasses.replace(REQUEST, id="b", subject="Toko Yasuda")
    config = KnConfig(steps=2)
    edits = [kn(lively, requests, [0, 2], config=config) for requests in ([REQUEST], [second], [REQUEST, second])]
    first, other, together = ([edit.delta(layer) for layer in (0, 2)] for edit in edits)
    for of_first, of_other, of_both in zip(first, other, together, strict=True):
        assert torch.allclose(of_first + of_other, of_both, atol=1e-6)
    assert any(float((a - b).abs().max()) for a, b in zip(first, other, strict=True)), "the control: they differ"


def test_more_agreement_and_a_higher_threshold_leave_fewer_neurons(lively: Any) -> None:
    def count(**settings: Any) -> int:
        return int(knowledge_neurons(lively, REQUEST, [0, 1, 2], PREFIXES, KnConfig(steps=4, **settings)).sum())

    assert count(threshold=0.9) <= count(threshold=0.5) < count(threshold=0.05)
    assert count(threshold=0.05, agreement=0.9) <= count(threshold=0.05, agreement=0.4)


def test_a_fact_without_its_true_object_is_refused(lively: Any) -> None:
    with pytest.raises(
        InputError, match="the request 'a' has no target_true, expected the object that the model knows"
    ):
        kn(lively, [dataclasses.replace(REQUEST, target_true=None)], [1], prefixes=["{}"])
