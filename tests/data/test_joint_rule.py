"""The joint of a prompt and its object, decided by the characters that meet."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

import mechedit as me
from mechedit.data.joint import following, joint_of
from mechedit.prompt_tokens import complete_pairs

DATA = Path(__file__).parents[3] / "shared" / "data"

SPACED = [
    ("The capital of France is", "Paris"), ("The answer:", "Paris"), ('She said "yes"', "and"), ("He said", '"yes"'),
    ("He said", "“yes”"), ("It is called (in French)", "Paris"), ("the Beatles'", "album"), ("the Beatles’", "album"),
    ("عاصمة فرنسا هي", "باريس"), ("फ्रांस की राजधानी", "पेरिस"), ("프랑스의 수도는", "파리"), ("The 🗼 is in", "Paris"),
    ("The tower 🗼", "stands"), ("It was 5", "o'clock"), ("USER: where? ASSISTANT:", "Paris"), ("Rome –", "Paris"),
    ("if a > b and c >", "d"), ("cafe\u0301", "noir"), ("It was", "-5"), ("It was", "– alas"),
    ("The capital of North Brabant is", "'s-Hertogenbosch"), ("The laureate is Gerard", "'t Hooft"),
    ("Microsoft's framework is", ".NET"), ("The chance is", ".5"), ("The password file is", "/etc/passwd"),
    ("The band is", "!!!"), ("The band is", "?uestlove"), ("The band is", "…And You Will Know Us"),
    ("The creator of C#", "is"), ("It costs 5 €", "today"), ("The price is 20$", "in"),
    ("The type is vector<int>", "and"),
    ("He moved to the [US]", "in"), ("They play rock 'n'", "roll"),
]  # fmt: skip
TIGHT = [
    ("The capital is ", "Paris"), ("Answer:\n", "Paris"), ("Answer:", "\nParis"), ('They call it "', "Paris"),
    ("They call it “", "Paris"), ("They call it '", "Paris"), ("Its seat (", "Paris"), ("Its seat [", "Paris"),
    ("pre-", "war"), ("and/", "or"), ("It costs $", "5"), ("It costs €", "5"), ("number #", "5"),
    ("mail to @", "paris"),
    ("x<|im_end|>", "Paris"), ("Where?<end_of_turn>", "Paris"), ("[INST] Where? [/INST]", "Paris"), ("</s>", "Paris"),
    ("The word", ", of course"), ("The king", "'s crown"), ("The king", "’s crown"), ("The king", ")"), ("50", "%"),
    ("The king", "'s"),
    ("It is", "... not"),
    ("It is", ". Then"), ("<｜Assistant｜>", "Paris"),
    ("法国的首都是", "巴黎"), ("法国的首都是", "Paris"), ("The capital of 法国", "Paris"), ("The name is", "巴黎"),
    ("パリは", "フランス"), ("他说：", "巴黎"), ("เมืองหลวงคือ", "ปารีส"), ("ເມືອງຫຼວງແມ່ນ", "ປາຣີ"), ("រដ្ឋធានីគឺ", "ប៉ារីស"),
    ("باريس", "، فرنسا"), ("पेरिस", "।"), ("राजधानी का नाम", "्य"), ("the city", "-state"),
    ("La capitale de l'", "Italie"), ("La capitale d’", "Italie"), ("¿", "Dónde"), ("", "Paris"),
]  # fmt: skip


@pytest.mark.parametrize(("prompt", "text"), SPACED)
def test_a_space_stands_between_words(prompt: str, text: str) -> None:
    assert joint_of(prompt, text) == " "


@pytest.mark.parametrize(("prompt", "text"), TIGHT)
def test_nothing_stands_where_writers_put_nothing(prompt: str, text: str) -> None:
    assert joint_of(prompt, text) == ""


def test_blanks_are_taken_off_and_line_breaks_kept() -> None:
    assert following("It is", "  Paris ") == " Paris"
    assert following("It is:", "\n\n  Paris\n") == "\n\n  Paris"
    assert following("It is:", " \nParis") == " \nParis"
    assert following("It is", "Paris", joint="") == "Paris"
    assert following("它是", "巴黎", joint=" ") == " 巴黎"


def test_published_facts_have_the_tokens_that_they_had(counterfact_short: list[me.EditRequest]) -> None:
    """Under GPT-2's tokenizer an English object has the tokens of ` object` by itself, as in the published code."""
    if not DATA.is_dir():
        pytest.skip("the published facts are not here; users do not have them either")
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "gpt2_tokenizer.json"))
    facts, requests = me.load_facts(DATA / "known_1000.json"), counterfact_short
    pairs = [(fact.text, fact.object) for fact in facts]
    pairs += [(request.text, request.target_new) for request in requests]
    assert len(facts) == 1209
    assert len(requests) > 4_900
    texts = sorted({text.strip() for _, text in pairs})
    alone = dict(zip(texts, tokenizer([" " + text for text in texts])["input_ids"], strict=True))
    completions = complete_pairs(tokenizer, [(prompt, following(prompt, text)) for prompt, text in pairs])
    for (_, text), completion in zip(pairs, completions, strict=True):
        assert completion.target == alone[text.strip()]
