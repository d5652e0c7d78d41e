"""Objects are scored a part of the vocabulary at a time, with the numbers of whole logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mechedit.evaluation import score_targets
from mechedit.models import WholeReadout, load_model
from mechedit.models.readout import CHUNK
from mechedit.prompt_tokens import continuation_ids

PAIRS = [
    ("The mother tongue of Danielle Darrieux is", "Korean"),
    ("Leon Blum lived", "in Paris, and in Birmingham"),
    ("Toko Yasuda", "plays the guitar"),
]


class LargestTensor(TorchDispatchMode):
    """The most numbers in a tensor that an operation gives, views of parameters aside."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.numbers = 0
        self.parameters = {parameter.untyped_storage().data_ptr() for parameter in model.hf.parameters()}

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        results = operation(*arguments, **(options or {}))
        for tensor in results if isinstance(results, tuple | list) else [results]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.parameters:
                self.numbers = max(self.numbers, tensor.numel())
        return results


def test_no_tensor_of_rows_by_vocabulary_is_made(make_hf: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hf = make_hf("llama")
    hf.resize_token_embeddings(20_000, mean_resizing=False)
    model = load_model(hf, tokenizer=tokenizer)
    assert model.vocab_size == 20_000
    assert model.readout().chunked
    monkeypatch.setitem(CHUNK, "cpu", 30_000)
    with LargestTensor(model) as in_parts:
        score_targets(model, PAIRS)
    tokens = sum(len(continuation_ids(model.tokenizer, text)) for _, text in PAIRS)
    assert tokens * model.vocab_size > 5 * CHUNK["cpu"]
    assert in_parts.numbers <= CHUNK["cpu"]
    monkeypatch.setattr(type(model), "readout", lambda self: WholeReadout())
    with LargestTensor(model) as whole:
        score_targets(model, PAIRS)
    assert whole.numbers >= tokens * model.vocab_size


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_scores_are_those_of_whole_logits(make_model: Any, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model = make_model(kind)
    monkeypatch.setitem(CHUNK, "cpu", 700)
    in_parts = score_targets(model, PAIRS)
    assert model.readout().chunked
    monkeypatch.setattr(type(model), "readout", lambda self: WholeReadout())
    whole = score_targets(model, PAIRS)
    for pair in PAIRS:
        assert in_parts[pair].log_prob == pytest.approx(whole[pair].log_prob, rel=1e-6)
        assert (in_parts[pair].tokens, in_parts[pair].hits) == (whole[pair].tokens, whole[pair].hits)
    assert len({round(score.log_prob, 3) for score in whole.values()}) == len(PAIRS)


def test_of_equally_likely_tokens_greedy_decoding_writes_the_first(make_model: Any) -> None:
    model = make_model("gptj", seed=5)
    prompt, text = PAIRS[0]
    (token, *_) = continuation_ids(model.tokenizer, text)
    head = model.hf.get_output_embeddings()
    with torch.no_grad():
        # The object's first token and the one beside it become the likeliest, to the bit.
        head.bias[token] += 100
        for twin, hits in ((token + 1, True), (token - 1, False)):
            saved = head.weight[twin].clone(), head.bias[twin].clone()
            head.weight[twin], head.bias[twin] = head.weight[token], head.bias[token]
            score = score_targets(model, [(prompt, text)])[prompt, text]
            assert (score.hits > 0) == hits
            head.weight[twin], head.bias[twin] = saved
        assert score_targets(model, [(prompt, text)])[prompt, text].hits > 0
