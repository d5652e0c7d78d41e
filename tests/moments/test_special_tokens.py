"""Special tokens do not count in moments: none that a tokenizer appends, and one beginning token in front of a text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import mechedit as me
from mechedit.moments.key_energy import TEXTS, measured_energies

BEGIN, END = "<|pad|>", "<|endoftext|>"
LENGTH = 40


def with_template(tokenizer: Any, template: str) -> PreTrainedTokenizerFast:
    """The tests' tokenizer, which puts special tokens around every text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    ids = [(token, backend.token_to_id(token)) for token in (BEGIN, END)]
    backend.post_processor = processors.TemplateProcessing(single=template, pair="$A $B", special_tokens=ids)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BEGIN, eos_token=END, pad_token=END, model_max_length=64
    )


def collected(hf: Any, tokenizer: Any, texts: list[str]) -> me.SecondMoment:
    model = me.load_model(hf, tokenizer=tokenizer)
    return me.collect_moments(model, texts, [1], me.MomentsConfig(max_length=LENGTH))[1]


def naive(hf: Any, tokenizer: Any, appended: int = 0) -> tuple[Tensor, int]:
    """E[k kᵀ] over the text's own tokens behind one beginning token, and over `appended` end tokens."""
    caught: list[Tensor] = []
    hook = hf.transformer.h[1].mlp.c_proj.register_forward_pre_hook(lambda module, args: caught.append(args[0][0]))
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"][: LENGTH - 1]
        with torch.no_grad():
            hf(torch.tensor([[begin, *ids, *appended * [end]]]))
        rows.append(caught.pop()[1:].double())
    hook.remove()
    keys = torch.cat(rows)
    return keys.T @ keys / len(keys), len(keys)


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() < 1e-5 * expected.norm())


@pytest.mark.filterwarnings("ignore:the tokenizer appends", "ignore:a text brings its own")
def test_appended_ends_and_second_beginnings_do_not_count(make_hf: Callable[..., Any], tokenizer: Any) -> None:
    hf = make_hf("gpt2")
    in_front, around = (with_template(tokenizer, f"{BEGIN} $A{end}") for end in ("", f" {END}"))
    expected, count = naive(hf, in_front)
    plain = collected(hf, in_front, list(TEXTS))
    assert plain.count == count
    assert close(plain.matrix, expected)
    # Of a text longer than the limit, an added token that is taken off takes a token's room; so here texts are shorter.
    short = [in_front.decode(in_front(text, add_special_tokens=False)["input_ids"][:20]) for text in TEXTS]
    alone = collected(hf, in_front, short)
    for other in (collected(hf, around, short), collected(hf, in_front, [BEGIN + text for text in short])):
        assert other.count == alone.count
        assert close(other.matrix, alone.matrix)
    # The control: counting end tokens would be seen.
    assert not close(naive(hf, in_front, appended=1)[0], expected)


@pytest.mark.filterwarnings("ignore:the tokenizer appends")
def test_published_moments_are_checked_on_the_same_tokens(make_hf: Callable[..., Any], tokenizer: Any) -> None:
    hf = make_hf("gpt2")
    in_front, around = (with_template(tokenizer, f"{BEGIN} $A{end}") for end in ("", f" {END}"))
    texts = [text[:40] for text in TEXTS]
    energies = [
        measured_energies(me.load_model(hf, tokenizer=variant), [1], texts)[1] for variant in (in_front, around)
    ]
    torch.testing.assert_close(energies[0], energies[1])
