"""A tokenizer may know tokens that the embedding has no row for, as long as ordinary text gives none of them."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edits import identical, weights
from helpers.models import SENTENCES, VOCAB
from helpers.placement import tiny_hf, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from mechedit.batching import pad
from mechedit.data import EditRequest, Fact, load_facts, load_requests, load_texts
from mechedit.edit import edited
from mechedit.errors import InputError
from mechedit.evaluation import EvaluationConfig, evaluate, score_targets
from mechedit.methods import FineTuneConfig, ft
from mechedit.models import Tokens, load_model
from mechedit.moments import collect_moments
from mechedit.prefixes import make_prefixes
from mechedit.targets import find_targets
from mechedit.trace import TraceConfig, trace_facts


@pytest.fixture
def one_more(tokenizer: Any) -> Any:
    """As Gemma 3's: one special token more than the model has embeddings."""
    more = copy.deepcopy(tokenizer)
    more.add_tokens(["<image_soft_token>"], special_tokens=True)
    assert more.convert_tokens_to_ids("<image_soft_token>") == VOCAB == len(tokenizer)
    return more


@pytest.fixture
def padded_by_it(tokenizer: Any) -> Any:
    """As Llama 2's often is: a padding token was added to the tokenizer alone."""
    more = copy.deepcopy(tokenizer)
    more.add_special_tokens({"pad_token": "[PAD]"})
    assert more.pad_token_id == VOCAB
    return more


ADDITIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "image": {"additional_special_tokens": ["<image_soft_token>"]},
    "pad": {"pad_token": "[PAD]"},
}
"""What is added to the tokenizer alone."""


@cache
def every_step(backend: str, addition: str) -> tuple[list[torch.Tensor], tuple[str, ...]]:
    """Numbers of every step on the tiny model, and its prefixes."""
    facts, requests = load_facts("known")[:2], load_requests("tiny")[:2]
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_special_tokens(ADDITIONS[addition])
    model = load_model(tiny_hf(), tokenizer=tokenizer, backend=backend)
    assert (len(tokenizer) > model.vocab_size) == (addition != "none")
    before = weights(model)
    effects = trace_facts(model, facts, TraceConfig(samples=1, kinds=("state",)))
    moments = collect_moments(model, load_texts("tiny")[:20], layers=[2])
    edit = ft(model, requests, [2], config=FineTuneConfig(steps=5))
    with edited(model, edit):
        scores = evaluate(model, requests, EvaluationConfig(generation_tokens=5, generation_prompts=1, resamples=10))
    assert identical(model, before)
    assert float(edit.delta(2).norm()) > 0.01
    values = [effects["score"], moments[2].matrix, edit.delta(2), scores.table["value"]]
    return [torch.as_tensor(value) for value in values], make_prefixes(model)


@pytest.mark.parametrize(("backend", "addition"), [("transformer_lens", "image"), ("nnsight", "pad")])
def test_ordinary_text_goes_through_every_step(backend: str, addition: str) -> None:
    """With the numbers that the tokenizer without the token gives."""
    (expected, prefixes), (values, more_prefixes) = every_step(backend, "none"), every_step(backend, addition)
    assert prefixes == more_prefixes
    for value, number in zip(values, expected, strict=True):
        torch.testing.assert_close(value, number, rtol=1e-3, atol=1e-5)


def test_text_that_holds_the_token_is_refused(make_hf: Any, one_more: Any, backend: str) -> None:
    model = load_model(make_hf("llama"), tokenizer=one_more, backend=backend)
    rows = [one_more("The Eiffel Tower")["input_ids"], one_more("An <image_soft_token> is")["input_ids"]]
    with pytest.raises(InputError, match=r"the token '<image_soft_token>' \(id 384\).*it has 384"):
        model.run(pad(rows, one_more))
    with pytest.raises(InputError, match=r"the token '<image_soft_token>'"):
        model.next_logits(torch.tensor(rows[1:]), torch.ones(1, len(rows[1]), dtype=torch.long))
    assert torch.isfinite(model.run(pad(rows[:1], one_more)).logits).all()


def test_an_object_that_ends_in_the_token_is_refused(make_hf: Any, one_more: Any) -> None:
    """An object's last token is never run, only looked for among the logits."""
    model = load_model(make_hf("llama"), tokenizer=one_more)
    subject, prompt, target = "The Eiffel Tower", "{} is", "Paris<image_soft_token>"
    with pytest.raises(InputError, match=r"the token '<image_soft_token>'"):
        score_targets(model, [("The Eiffel Tower is", target)])
    with pytest.raises(InputError, match=r"the token '<image_soft_token>'"):
        trace_facts(model, [Fact(id="1", subject=subject, prompt=prompt, object=target)])
    with pytest.raises(InputError, match=r"the token '<image_soft_token>'"):
        find_targets(model, [EditRequest(id="1", subject=subject, prompt=prompt, target_new=target)], 1, ["{}"])
    assert score_targets(model, [("The Eiffel Tower is", "Paris")])


def test_padding_without_a_row_decides_nothing(make_hf: Any, padded_by_it: Any, backend: str) -> None:
    model = load_model(make_hf("llama"), tokenizer=padded_by_it, backend=backend)
    rows = [padded_by_it(text)["input_ids"] for text in ("The Eiffel Tower is", "Paris")]
    assert int(pad(rows, padded_by_it).ids.max()) < VOCAB, "targets may be looked up, too"
    tokens = pad(rows, padded_by_it)
    tokens.ids[tokens.mask == 0] = VOCAB
    alone = model.run(Tokens(torch.tensor(rows[1:]), torch.ones(1, len(rows[1]), dtype=torch.long))).logits
    torch.testing.assert_close(model.run(tokens).logits[1:, : len(rows[1])], alone, rtol=1e-4, atol=1e-4)
    assert int(tokens.ids.max()) == VOCAB, "the caller's batch stays as it is"


def test_a_tokenizer_whose_text_has_no_rows_is_refused(make_hf: Any, tokenizer: Any, tmp_path: Path) -> None:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB + 20, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    larger = PreTrainedTokenizerFast(tokenizer_object=bpe)
    assert len(larger) > VOCAB
    with pytest.raises(InputError, match=r"and text gives ids without one \(such as 384, .*resize the model"):
        load_model(make_hf("llama"), tokenizer=larger)
    begun = copy.deepcopy(tokenizer)
    begun.add_special_tokens({"bos_token": "<s>"})
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", VOCAB)])
    with pytest.raises(InputError, match=r"such as 384, '<s>'"):
        load_model(make_hf("llama"), tokenizer=begun)
