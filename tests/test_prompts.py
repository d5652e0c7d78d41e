"""Token spans against a brute-force search, and the joins that peers get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from mechedit import InputError
from mechedit.prompt_tokens import continuation_ids, tokenize_prompt

GPT2 = Path(__file__).parents[2] / "shared" / "data" / "gpt2_tokenizer.json"
CASES = [
    ("The mother tongue of {} is", "Leon Blum"),
    ("{} is in the city of", "The Space Needle"),
    ('"{}" was written in', "Go Hyeon-jeong"),
    ("({}, who plays", "LeBron James"),
    ("{}'s capital,", "Apple"),
    ("What is {}", "Edwin"),
    ("作者 {} 的语言", "鲁迅"),
]


def brute_force(tokenizer, template, subject):
    """Tokens whose decoded text reaches into the subject, by decoding ever longer prefixes."""
    before = template.split("{}")[0]
    text = template.replace("{}", subject)
    ids = tokenizer(text)["input_ids"]
    raw = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    # A byte-level token is one character for each byte.
    sizes = [len(token) for token in raw]
    start, end = len(before.encode()), len((before + subject).encode())
    assert sum(sizes) == len(text.encode())
    spans = [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    return [i for i, (a, b) in enumerate(spans) if a < end and b > start]


@pytest.mark.parametrize(("template", "subject"), CASES)
def test_the_subjects_span_is_what_a_search_finds(tokenizer, template, subject):
    prompt = tokenize_prompt(tokenizer, template, subject)
    assert list(prompt.subject) == brute_force(tokenizer, template, subject)
    assert prompt.last_subject == prompt.subject[-1]


@pytest.mark.parametrize(("template", "subject"), CASES)
def test_the_same_on_a_real_vocabulary(template, subject):
    if not GPT2.is_file():
        pytest.skip("GPT-2's tokenizer is not here; users do not have it either")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(GPT2))
    assert list(tokenize_prompt(tokenizer, template, subject).subject) == brute_force(tokenizer, template, subject)


def test_a_word_that_holds_the_subject_earlier_does_not_mislead(tokenizer):
    """The published search takes the first substring, here inside another word."""
    prompt = tokenize_prompt(tokenizer, "Edwinson knew that {} is", "Edwin")
    first = tokenize_prompt(tokenizer, "{}son knew that Edwin is", "Edwin")
    assert prompt.subject[0] > first.subject[-1]


@pytest.mark.parametrize("template", ["no slot", "{} and {}"])
def test_a_template_needs_one_slot(tokenizer, template):
    with pytest.raises(InputError, match="expected exactly one"):
        tokenize_prompt(tokenizer, template, "Edwin")


def test_objects_follow_with_one_space_and_no_special_tokens(tokenizer):
    assert continuation_ids(tokenizer, "French") == continuation_ids(tokenizer, "  French ")
    assert tokenizer.decode(continuation_ids(tokenizer, "French")) == " French"
    for empty in ("", "  "):
        with pytest.raises(InputError, match="gives no tokens"):
            continuation_ids(tokenizer, empty)
