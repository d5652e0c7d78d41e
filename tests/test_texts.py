"""Any text under any tokenizer: what mechedit scores is what the model itself writes, greedily, after the prompt.

For each kind of tokenizer a small model knows texts of many scripts and forms by heart. Its own
greedy continuation of a prompt *is* the object, so the exact match must be 1 and log P the sum of the greedy steps'.
"""

from __future__ import annotations

import dataclasses
import unicodedata
import warnings
from typing import Any

import pytest
import torch
from helpers.languages import FORMS, TOKENIZERS, Form, sentencepiece, speaker
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import mechedit as me
from mechedit.chat import chat_turn, prompted
from mechedit.data.joint import following
from mechedit.evaluation import score_targets
from mechedit.evaluation.probe_prompts import probe_prompts, prompt_text
from mechedit.prompt_tokens import (
    complete,
    complete_fact,
    complete_pairs,
    encode,
    encode_documents,
    encode_texts,
    tokenize_prompt,
)
from mechedit.targets.config import TargetConfig
from mechedit.targets.objective import prepare_objective

MERGING = {("own newline", kind) for kind in ("llama3-like", "gemma-like", "qwen-like")}
"""Forms whose joint these tokenizers merge into one token, as `:` and a line break: they do not round-trip."""
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEMPLATES = {
    "plain": CHAT,
    "trimmed": CHAT.replace("m.content", "m.content | trim"),
    "escaped": CHAT.replace("m.content", "m.content | tojson if m.role == 'user' else m.content"),
}
PROMPTS = [
    "Where is {} ruled?", "Where is {} ruled? ", " Where is {}\n", "{}", "\t{} is", "Is \"{}\" real\\?\n",
    "Où est {} née ?",
    "法国 {}：", 'It\'s <b>{}</b> & "more" {x}\n\n',
]  # fmt: skip
"""Prompts that begin or end in white space, or hold what a template may escape."""


def naive(tokenizer: Any, text: str) -> str:
    """What the tokenizer makes of a user's question."""
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


@pytest.fixture(scope="module", params=TOKENIZERS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(kind: str) -> me.Model:
    hf, tokenizer = speaker(kind)
    return me.load_model(hf, tokenizer=tokenizer)


@torch.no_grad()
def greedy(model: me.Model, ids: list[int], count: int) -> tuple[list[int], float]:
    """The model's next tokens, one full pass each, and the sum of their log-probabilities."""
    total, written = 0.0, []
    for _ in range(count):
        logits = model.hf(torch.tensor([[*ids, *written]])).logits[0, -1].double()
        written.append(int(logits.argmax()))
        total += logits.log_softmax(-1).max().item()
    return written, total


def facts_of(form: Form) -> list[me.Fact]:
    return [
        me.Fact(id=subject, subject=subject, prompt=form.prompt, object=target.strip(" "))
        for subject, target in form.pairs
    ]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.filterwarnings("ignore:the tokenizer merges")
def test_scores_are_those_of_the_models_own_words(model: me.Model, kind: str, name: str) -> None:
    not_round_trip = 0
    for fact, (_, target) in zip(facts_of(FORMS[name]), FORMS[name].pairs, strict=True):
        assert following(fact.text, fact.object) == target, "the joint is the one that the text was written with"
        ids, _ = encode(model.tokenizer, fact.text)
        completion = complete(model.tokenizer, fact.text, target)
        # Tokens that exist only in the joined text cannot be written after the prompt's own.
        not_round_trip += completion.prompt != ids
        written, log_prob = greedy(model, completion.prompt, len(completion.target))
        assert written == completion.target, "the model knows the text"
        assert encode(model.tokenizer, fact.text + target)[0] == completion.prompt + written
        score = score_targets(model, [(fact.text, fact.object)])[fact.text, fact.object]
        assert score.greedy
        assert score.log_prob == pytest.approx(log_prob, abs=1e-5)
        # Control: behind another joint the object is another one to the model.
        wrong = "" if target.startswith(" ") else " "
        other = score_targets(model, [(fact.text, fact.object)], joint=wrong)[fact.text, fact.object]
        assert other.log_prob < score.log_prob - 1
    assert not_round_trip == (len(FORMS[name].pairs) if (name, kind) in MERGING else 0)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.filterwarnings("ignore:the tokenizer merges")
def test_the_subjects_tokens_hold_the_subject_and_no_word_more(model: me.Model, name: str) -> None:
    for fact in facts_of(FORMS[name]):
        prompt = tokenize_prompt(model.tokenizer, fact.prompt, fact.subject)
        _, spans = encode(model.tokenizer, fact.text)
        start = fact.prompt.index("{}")
        inside = [i for i, (a, b) in enumerate(spans) if b > a and a < start + len(fact.subject) and b > start]
        assert list(prompt.subject) == inside
        text = model.tokenizer.decode([prompt.ids[i] for i in prompt.subject])
        assert fact.subject in text or name == "emoji", "bytes of a part of an emoji do not decode"


@pytest.mark.filterwarnings("ignore:the tokenizer merges")
def test_tracing_editing_and_evaluation_score_the_same_tokens(model: me.Model) -> None:
    facts = [dataclasses.replace(fact, id=f"{name}/{fact.id}") for name in FORMS for fact in facts_of(FORMS[name])]
    effects = me.trace_facts(model, facts, me.TraceConfig(samples=1, kinds=("state",), window=1))
    assert effects.attrs["n_facts"] == len(facts), "each of them is known"
    clean = effects.groupby("fact")["clean"].first()
    scores = score_targets(model, [(fact.text, fact.object) for fact in facts])
    requests = [
        me.EditRequest(id=fact.id, subject=fact.subject, prompt=fact.prompt, target_new=fact.object) for fact in facts
    ]
    objective = prepare_objective(model, [[request] for request in requests], 1, ["{}"], TargetConfig())
    terms = objective.loss_terms(torch.zeros_like(objective.initial), gradient=False).values
    for index, fact in enumerate(facts):
        score = scores[fact.text, fact.object]
        assert clean[fact.id] == pytest.approx(score.probability("joint"), rel=1e-4)
        assert terms[index, 1].item() == pytest.approx(-score.log_prob / score.tokens, abs=1e-4)
    summary = me.evaluate(model, requests, me.EvaluationConfig(generation_tokens=0, answer_tokens=0)).summary()
    assert summary["exact_match"]["mean"] == 100


@pytest.mark.parametrize(
    ("method", "config"),
    [(me.ft, me.FineTuneConfig(steps=30)), (me.ft_l, me.FineTuneBallConfig(steps=30, norm_bound=0.05))],
)
def test_what_an_edit_reports_is_what_the_model_writes(method: me.Method, config: me.FineTuneConfig) -> None:
    """A chat model, edited and asked: exact match 1 only where it writes the new object at the assistant's turn."""
    hf, tokenizer = speaker("qwen-like")
    model = me.load_model(hf, tokenizer=tokenizer)
    request = me.EditRequest(
        id="0", subject="France", prompt=FORMS["chatml"].prompt, target_new="Lima", target_true="Paris"
    )
    edit = method(model, [request], [0, 1], config=config)
    for state in ("before", "after"):
        if state == "after":
            me.apply_(model, edit)
        scores = me.evaluate(model, [request], me.EvaluationConfig(generation_tokens=0)).summary()
        ids, _ = encode(tokenizer, request.text)
        target = complete(tokenizer, request.text, "Lima").target
        writes = greedy(model, ids, len(target))[0] == target
        assert writes == (scores["exact_match"]["mean"] == 100) == (state == "after")
        assert scores["ES"]["mean"] == (100 if state == "after" else 0)
    me.undo_(model, edit)


def test_the_qwen_like_tokenizer_is_of_transformers_class_and_does_what_only_qwens_does() -> None:
    tokenizer, gpt2_like = TOKENIZERS["qwen-like"](), TOKENIZERS["gpt2-like"]()
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
    composed, apart = unicodedata.normalize("NFC", "पेरू é"), unicodedata.normalize("NFD", "पेरू é")
    assert composed != apart
    assert tokenizer(apart)["input_ids"] == tokenizer(composed)["input_ids"]
    assert len(tokenizer("1984")["input_ids"]) == 4
    assert gpt2_like(apart)["input_ids"] != gpt2_like(composed)["input_ids"], "control: it leaves them as they are"
    assert tokenizer(":\n")["input_ids"] != [tokenizer(mark)["input_ids"][0] for mark in ":\n"], "it merges these"


def test_an_appended_end_token_is_taken_off_and_a_beginning_is_not_doubled() -> None:
    tokenizer, plain = sentencepiece(prepend=True, end=True), sentencepiece(prepend=True)
    text = "The capital of France is"
    assert tokenizer(text)["input_ids"] == [*plain(text)["input_ids"], tokenizer.eos_token_id], (
        "control: it appends one"
    )
    with pytest.warns(UserWarning, match="appends"):
        ids, _ = encode(tokenizer, text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, whatever filters are put back between
        assert encode_documents(tokenizer, [text, text], 64) == [ids] * 2
    assert ids == plain(text)["input_ids"]
    assert plain("<s>" + text)["input_ids"][:2] == [plain.bos_token_id] * 2, "control: it doubles it"
    with pytest.warns(UserWarning, match="its own beginning"):
        ids, _ = encode(plain, "<s>" + text)
    assert ids.count(plain.bos_token_id) == 1
    # A text that ends with the end token by its author's will keeps it.
    assert encode(tokenizer, text + "</s>")[0][-1] == tokenizer.eos_token_id


def test_merges_across_the_joint_are_said_and_never_eat_the_subject() -> None:
    tokenizer = TOKENIZERS["qwen-like"]()
    with pytest.warns(UserWarning, match="merges the end of a prompt"):
        completion = complete(tokenizer, "Name the town of Peru:", "\nLima")
    assert tokenizer.decode(completion.target) == ":\nLima"
    assert tokenizer.decode(completion.prompt) == "Name the town of Peru"
    with pytest.raises(me.InputError, match="the end of the subject 'Peru:'"):
        complete_fact(tokenizer, "Name the town of {}", "Peru:", "\nLima")
    complete_fact(tokenizer, "Name the town of {}", "Peru:", "\nLima", joint=" ")


class TestChat:
    """Prompts as questions through the tokenizer's own template."""

    @pytest.fixture
    def chat_model(self) -> me.Model:
        hf, tokenizer = speaker("qwen-like")
        tokenizer.chat_template = CHAT
        return me.load_model(hf, tokenizer=tokenizer)

    def test_a_question_is_asked_as_the_template_writes_it(self, chat_model: me.Model) -> None:
        fact = me.Fact(id="0", subject="France", prompt="Where is {} ruled?", object="Paris")
        (asked,) = prompted(chat_model.tokenizer, [fact], chat=True)
        assert asked.text == FORMS["chatml"].prompt.replace("{}", "France")
        assert asked.joint == ""
        config = me.TraceConfig(samples=1, kinds=("state",))
        asked_effects, bare_effects = (me.trace_facts(chat_model, [fact], config, chat=chat) for chat in (True, False))
        assert asked_effects["clean"].iloc[0] > 0.98
        traced = {effects["position"].nunique() for effects in (asked_effects, bare_effects)}
        bare = chat_model.tokenizer(fact.text)["input_ids"]
        assert traced == {len(encode(chat_model.tokenizer, asked.text)[0]), len(bare)}
        assert asked_effects["clean"].iloc[0] != bare_effects["clean"].iloc[0], "the control: it is another question"

    def test_edit_and_evaluation_ask_the_same_question(self, chat_model: me.Model) -> None:
        request = me.EditRequest(
            id="0", subject="France", prompt="Where is {} ruled?", target_new="Lima", target_true="Paris",
            paraphrases=("Where is France ruled?",),
            neighbors=(me.Neighbor(prompt="Where is Peru ruled?", object="Lima"),),
        )  # fmt: skip
        config = me.EvaluationConfig(generation_tokens=0)
        before = me.evaluate(chat_model, [request], config, chat=True)
        assert before.summary()["ES"]["mean"] == before.summary()["PS"]["mean"] == 0
        edit = me.ft(chat_model, [request], [0, 1], config=me.FineTuneConfig(steps=30), chat=True)
        with me.edited(chat_model, edit):
            after = me.evaluate(chat_model, [request], config, chat=True)
            answer = after.answers["answer"].iloc[0]
        assert after.summary()["exact_match"]["mean"] == after.summary()["PS"]["mean"] == 100
        assert answer.startswith("Lima")

    def test_context_templates_stand_within_the_question(self, chat_model: me.Model) -> None:
        from mechedit.prefixes import prefixed_prompts

        request = me.EditRequest(id="0", subject="France", prompt="Where is {} ruled?", target_new="Lima")
        (request,) = prompted(chat_model.tokenizer, [request], chat=True)
        (prompt,) = prefixed_prompts(chat_model, request, ["Well. {}"])
        text = chat_model.tokenizer.decode(list(prompt.ids))
        assert text.startswith("<|im_start|>user\nWell. Where is France")

    def test_a_template_may_write_a_space_before_the_answer(self) -> None:
        tokenizer = sentencepiece(prepend=True)
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
        )
        assert chat_turn(tokenizer) == ("[INST] {} [/INST]", " ")

    @pytest.mark.parametrize("template", TEMPLATES)
    @pytest.mark.parametrize("prompt", PROMPTS)
    @pytest.mark.filterwarnings("ignore:the tokenizer merges")
    def test_a_prompt_is_asked_as_the_template_shows_it(self, template: str, prompt: str) -> None:
        """Naively: the tokens of what the tokenizer makes of the filled prompt, with the object behind it."""
        tokenizer = TOKENIZERS["qwen-like"]()
        tokenizer.chat_template = TEMPLATES[template]
        for subject in ("France", 'the "Zürich" \\ 法国', "Peru "):
            text = prompt.replace("{}", subject)
            fact = me.Fact(id="0", subject=subject, prompt=prompt, object="Paris")
            request = me.EditRequest(
                id="0", subject=subject, prompt=prompt, target_new="Paris", paraphrases=(text, prompt),
                generations=(f" {text}",), neighbors=(me.Neighbor(prompt=f"{text}\n", object="Paris"),),
            )  # fmt: skip
            asked, of_request = (prompted(tokenizer, [item], chat=True)[0] for item in (fact, request))
            place, target = complete_fact(tokenizer, asked.template, asked.subject, asked.object, asked.joint)
            assert [*place.ids, *target] == tokenizer(naive(tokenizer, text) + "Paris")["input_ids"]
            shown = tokenizer.decode([place.ids[i] for i in place.subject])
            assert {"France": "France", "Peru ": "Peru"}.get(subject, "法国") in shown
            assert [probe.text for probe in probe_prompts(of_request, plus=False)] == [
                naive(tokenizer, question) for question in (text, text, text, f"{text}\n")
            ]
            assert prompt_text(of_request.generations[0], of_request) == naive(tokenizer, f" {text}")
            assert prompted(tokenizer, [asked], chat=True) == [asked]

    def test_templates_that_change_nothing_leave_the_records(self) -> None:
        """The control of the above: some templates change the prompts, and a plain one does not."""
        tokenizer = TOKENIZERS["qwen-like"]()
        asked = {}
        for name, template in TEMPLATES.items():
            tokenizer.chat_template = template
            fact = me.Fact(id="0", subject="France", prompt='\n"{}" is ', object="Paris")
            asked[name] = prompted(tokenizer, [fact], chat=True)[0].prompt
        assert asked == {"plain": '\n"{}" is ', "trimmed": '"{}" is', "escaped": '\\n\\"{}\\" is '}

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ messages[0].content | replace('is France', 'is it') }}", "the subject's place is not clear"),
            ("{{ messages[0].content | replace('{}', '') }}", "the subject's place is not clear"),
            ("{{ messages[0].content }}{{ '!' if 'Rome' not in messages[0].content }}", None),
            ("{{ messages[0].content }}{{ '!' if 'ruled' not in messages[0].content }}", "as around another question"),
        ],
    )
    def test_a_prompt_without_a_clear_place_is_refused(self, template: str, message: str | None) -> None:
        tokenizer = TOKENIZERS["qwen-like"]()
        tokenizer.chat_template = template
        fact = me.Fact(id="0", subject="France", prompt="Where is {} ruled", object="Paris")
        if message is None:
            assert prompted(tokenizer, [fact], chat=True)[0].text == "Where is France ruled!"
            return
        with pytest.raises(me.InputError, match=message):
            prompted(tokenizer, [fact], chat=True)

    def test_a_template_that_writes_the_date_is_said(self) -> None:
        tokenizer = TOKENIZERS["qwen-like"]()
        tokenizer.chat_template = "{{ strftime_now('%Y') }}" + CHAT
        fact = me.Fact(id="0", subject="France", prompt="Where is {} ruled", object="Paris")
        with pytest.warns(UserWarning, match="writes the date into the turn") as caught:
            asked, again = (item for _ in range(2) for item in prompted(tokenizer, [fact], chat=True))
        assert asked == again
        assert len(caught) == 1, "once for a template, however often it is used"
        tokenizer.chat_template = "{{ strftime_now('%Y') }}!" + CHAT
        with pytest.warns(UserWarning, match="writes the date into the turn"):
            prompted(tokenizer, [fact], chat=True)
        tokenizer.chat_template = "{{ strftime_now('%Y') }}" + CHAT
        assert asked.text == naive(tokenizer, "Where is France ruled"), "today's, as anyone's who uses the template"
        tokenizer.chat_template = CHAT
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prompted(tokenizer, [fact], chat=True)

    def test_an_answer_stands_where_the_history_shows_it_and_not_in_a_thought(self) -> None:
        tokenizer = sentencepiece(prepend=True)
        tokenizer.chat_template = (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
        )
        with pytest.warns(UserWarning, match="objects are put there"):
            assert chat_turn(tokenizer) == ("<user>{}\n<assistant>", "")

    @pytest.mark.parametrize(
        "template",
        [
            None,
            "{{ messages[0].role }}",
            "{} {{ messages[0].content }}",
            "{{ raise_exception('a system message is needed') }}",
            "{% for",
        ],
    )
    def test_what_cannot_be_a_turn_is_refused(self, template: str | None) -> None:
        tokenizer = sentencepiece(prepend=True)
        tokenizer.chat_template = template
        with pytest.raises(me.InputError, match="chat template"):
            chat_turn(tokenizer)

    def test_a_joint_or_turn_of_its_own_stays(self, chat_model: me.Model) -> None:
        fact = me.Fact(id="0", subject="France", prompt="Where is {}?", object="Paris", joint="*")
        (asked,) = prompted(chat_model.tokenizer, [fact], chat=True, joint="-")
        assert asked.joint == "*"
        (again,) = prompted(chat_model.tokenizer, [asked], chat=True)
        assert again == asked


def test_unknown_words_do_not_hide_a_merge() -> None:
    """Two different words may both be unknown: as ids, the joined text then begins with the prompt's."""
    words = Tokenizer(WordLevel({"<unk>": 0, "It": 1, "is": 2}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert tokenizer("It is “")["input_ids"] == tokenizer("It is “born")["input_ids"], "control"
    with pytest.warns(UserWarning, match="merges"):
        completion = complete(tokenizer, "It is “", "born")
    assert (completion.prompt, completion.target) == ([1, 2], [0])


def test_half_a_character_is_refused() -> None:
    with pytest.raises(me.InputError, match="surrogate"):
        me.Fact(id="1", subject="France", prompt="{} is", object="Par\ud83dis")


def test_subjects_of_the_same_tokens_are_one_subject(tokenizer, make_model) -> None:
    model = make_model()
    request = me.EditRequest(id="a", subject="Leon Blum", prompt="{} speaks", target_new="French")
    for subject in ("Leon Blum ", "Leon Blum\u200b", "\ufeffLeon Blum", "\u00a0Leon Blum"):
        opposite = dataclasses.replace(request, id="b", subject=subject, target_new="Korean")
        with pytest.raises(me.InputError, match="conflict"):
            me.find_targets(model, [request, opposite], 1, ["{}"])
        prompt = tokenize_prompt(model.tokenizer, "{} speaks", subject)
        assert model.tokenizer.decode([prompt.ids[prompt.last_subject]]).endswith("um")
    # Control: another subject conflicts with nothing.
    me.find_targets(model, [request, dataclasses.replace(request, id="b", subject="Leon")], 1, ["{}"],
                    me.TargetConfig(steps=1))  # fmt: skip


@pytest.mark.filterwarnings("ignore:the tokenizer")
def test_many_texts_give_the_tokens_of_each_by_itself(kind: str) -> None:
    """In one call of the tokenizer, whichever texts are in it."""
    tokenizer = TOKENIZERS[kind]()
    pairs = [(form.prompt.format(subject), target) for form in FORMS.values() for subject, target in form.pairs]
    pairs = [(prompt, following(prompt, target)) for prompt, target in pairs]
    assert complete_pairs(tokenizer, pairs) == [complete(tokenizer, *pair) for pair in pairs]
    texts = [prompt for prompt, _ in pairs]
    encoded = encode_texts(tokenizer, texts)
    assert encoded == [encode(tokenizer, text) for text in texts]
    for text, (ids, _) in zip(texts, encoded, strict=True):
        by_itself = tokenizer(text)["input_ids"]
        assert ids in (by_itself, by_itself[1:], by_itself[:-1], by_itself[1:-1])  # but for tokens that are added
    assert len({len(ids) for ids, _ in encoded}) > 2  # and nothing is padded
    assert encode_texts(tokenizer, []) == []


def test_pairs_take_two_calls_of_the_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tokenizer = TOKENIZERS["gpt2-like"]()
    call = type(tokenizer).__call__

    def counted(self: object, text: object, **options: object) -> object:
        calls.append(1 if isinstance(text, str) else len(text))
        return call(self, text, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    prompts = ["ab", "cd", "ab"]
    complete_pairs(tokenizer, [(prompt, f" {target}") for prompt in prompts for target in ("x", "y")])
    assert calls == [2, 6]
