"""zsRE's measures against numbers worked by hand and a naive loop, also where every text begins with BOS."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.edits import random_edit
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from mechedit import EditRequest, InputError, Neighbor, edited, evaluate_zsre, load_model
from mechedit.cli import main
from mechedit.evaluation import EvaluationConfig, Scores, score_targets
from mechedit.models import Model
from mechedit.pipeline import evaluate_step
from mechedit.prompt_tokens import continuation_ids, encode
from mechedit.run_folder import RunFolder

CONFIG = EvaluationConfig(batch_size=3, answer_tokens=0, resamples=200)
REQUESTS = [
    EditRequest(
        id="0",
        subject="Danielle Darrieux",
        prompt="What is the mother tongue of {}?",
        target_new="Korean Christianity",
        paraphrases=("Danielle Darrieux speaks?", "{} is a native of?"),
        neighbors=(Neighbor(prompt="nq question: where is the space needle?", object="Seattle"),),
    ),
    EditRequest(
        id="1",
        subject="Apple A5",
        prompt="Who created {}?",
        target_new="Microsoft",
        neighbors=(
            Neighbor(prompt="nq question: who plays guitar?", object="Miles Davis"),
            Neighbor(prompt="nq question: a band from England?", object="the"),
        ),
    ),
]


EXACT_MATCHES = ["exact_match", "exact_match_paraphrase", "exact_match_neighborhood"]


class Parrot(Model):
    """A model that finds token (id + 1) likeliest after each token."""

    name, backend, hf, device, dtype = "parrot", "transformer_lens", None, torch.device("cpu"), torch.float32
    checkpoint, checkpoint_dtype, end_tokens, edit_log, temporary_edits = "", torch.float32, [], (), 0
    max_positions, n_layers, d_model, vocab_size, runs_at_once = 64, 1, 1, 10, False

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def run(self, tokens, *, logits_to_keep, **_):
        after = (tokens.ids[:, logits_to_keep] + 1) % 10
        return SimpleNamespace(logits=torch.nn.functional.one_hot(after, 10).float())

    def weights_hash(self, **_):
        return "parrot"

    def provenance(self):
        return {"model": "parrot"}


class Letters:
    """Each digit is a token of its own number; spaces are none. `bos` stands before every text that asks for it."""

    pad_token_id = eos_token_id = 0

    def __init__(self, bos=None):
        self.front = self.all_special_ids = [] if bos is None else [bos]

    def __call__(self, text, *, add_special_tokens=True, return_offsets_mapping=False):
        if not isinstance(text, str):
            encoded = [self(entry, add_special_tokens=add_special_tokens) for entry in text]
            return {key: [entry[key] for entry in encoded] for key in ("input_ids", "offset_mapping")}
        front = self.front if add_special_tokens else []
        digits = {index: int(letter) for index, letter in enumerate(text) if letter.isdigit()}
        spans = [(0, 0)] * len(front) + [(index, index + 1) for index in digits]
        return {"input_ids": [*front, *digits.values()], "offset_mapping": spans}


def test_accuracy_worked_by_hand(monkeypatch):
    """After 3 the parrot says 4. Of `4 5 7`, 4 and 5 are said; 7 is not said after 5, but 8 is after 7."""
    request = EditRequest(
        id="a",
        subject="3",
        prompt="{}",
        target_new="4578",
        paraphrases=("13", "19"),
        neighbors=(
            Neighbor(prompt="6", object="78"),
            Neighbor(prompt="5", object="12"),
            Neighbor(prompt="5", object="7"),
        ),
    )
    scores = evaluate_zsre(Parrot(Letters()), [request], CONFIG)
    values = {
        measure: rows["value"].tolist() for measure, rows in scores.table.sort_values("prompt").groupby("measure")
    }
    assert values == {
        "efficacy": [3 / 4],  # 4 after 3, 5 after 4, not 7 after 5, 8 after 7
        "paraphrase": [3 / 4, 2 / 4],  # not 4 after 9
        "specificity": [1, 1 / 2, 0],  # 7 8 after 6; not 1 after 5, but 2 after 1; not 7 after 5
        "exact_match": [0],
        "exact_match_paraphrase": [0, 0],
        "exact_match_neighborhood": [1, 0, 0],
    }
    summary = scores.summary()
    assert list(summary)[:4] == ["efficacy", "paraphrase", "specificity", "S"]
    means = {name: summary[name]["mean"] for name in list(summary)[:4]}
    # S = 3 / (1/0.75 + 1/0.625 + 1/0.5) = 3 / (1.3333 + 1.6 + 2)
    assert means == pytest.approx({"efficacy": 75, "paraphrase": 62.5, "specificity": 50, "S": 60.8108108})
    assert summary["exact_match_neighborhood"]["mean"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("bos", [None, 0, 8])
def test_a_bos_token_changes_nothing(bos):
    """Measured by the first id of each answer token encoded by itself, as published, BOS would be every answer."""
    request = EditRequest(id="a", subject="3", prompt="{}", target_new="457")
    summary = evaluate_zsre(Parrot(Letters(bos)), [request], CONFIG).summary()
    assert summary["efficacy"]["mean"] == pytest.approx(200 / 3)
    published = [Letters(bos)(str(token))["input_ids"][0] for token in Letters()("457")["input_ids"]]
    assert published == ([4, 5, 7] if bos is None else [bos] * 3)


def naive(hf, tokenizer, prompt, answer):
    """Share of the answer's tokens that are the argmax, one forward pass per token, in plain transformers."""
    ids = tokenizer(prompt)["input_ids"]
    wanted = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
    right = []
    for token in wanted:
        with torch.no_grad():
            right.append(hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item() == token)
        ids = [*ids, token]
    return sum(right) / len(right), float(all(right))


def expected(hf, tokenizer, request):
    asked = [("efficacy", "exact_match", request.text, request.target_new)]
    for text in request.paraphrases:
        asked.append(("paraphrase", "exact_match_paraphrase", text.replace("{}", request.subject), request.target_new))
    for neighbor in request.neighbors:
        asked.append(("specificity", "exact_match_neighborhood", neighbor.prompt, neighbor.object))
    for accuracy, exact, prompt, answer in asked:
        share, strict = naive(hf, tokenizer, prompt, answer)
        yield request.id, accuracy, share
        yield request.id, exact, strict


@pytest.fixture(scope="module")
def bos_tokenizer(tokenizer):
    """Llama's way: every text begins with a token of its own."""
    copy = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        bos_token="<|endoftext|>",
        model_max_length=64,
    )
    copy.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return copy


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("with_bos", [False, True])
def test_one_batched_pass_equals_a_naive_loop(family, with_bos, make_hf, tokenizer, bos_tokenizer):
    chosen = bos_tokenizer if with_bos else tokenizer
    assert (encode(chosen, "Who")[0][0] == 0) == with_bos
    hf = make_hf(family, seed=3)
    model = load_model(hf, tokenizer=chosen)
    requests = [*REQUESTS, partly_known(model)]
    scores = evaluate_zsre(model, requests, CONFIG)
    found = list(scores.table[["case", "measure", "value"]].itertuples(index=False, name=None))
    assert found == [row for request in requests for row in expected(model.hf, chosen, request)]
    part = scores.table.query("case == 'part' and measure == 'efficacy'")["value"].tolist()
    assert part == [0.5]  # right in part, or all could be zeros


def partly_known(model):
    """A request of whose answer the model would say a later token, but not the first."""
    request = EditRequest(id="part", subject="Apple A5", prompt="Who created {}?", target_new="Microsoft")
    prompt, _ = encode(model.tokenizer, request.text)
    starts = torch.arange(2, len(model.tokenizer))[:, None]
    with torch.no_grad():
        logits = model.hf(input_ids=torch.cat([torch.tensor([prompt]).expand(len(starts), -1), starts], 1)).logits
    for first, second in zip(starts[:, 0].tolist(), logits[:, -1].argmax(-1).tolist(), strict=True):
        answer = model.tokenizer.decode([first, second])
        said = logits[0, -2].argmax() == first
        is_word = answer[:1] == " " and answer[1:2].isalpha()
        if not said and is_word and continuation_ids(model.tokenizer, answer) == [first, second]:
            return replace(request, target_new=answer.strip())
    raise AssertionError("no answer of two tokens ends as this model would go on")


def test_measures_without_data_are_absent_and_counted(lens_model):
    bare = EditRequest(id="bare", subject="Apple A5", prompt="Who created {}?", target_new="Microsoft")
    alone = evaluate_zsre(lens_model, [bare], CONFIG)
    assert set(alone.summary()) == {"efficacy", "exact_match"}
    both = evaluate_zsre(lens_model, [bare, *REQUESTS], CONFIG)
    assert both.counts["specificity"] == {"cases": 2, "missing": 1, "prompts": 3}
    assert both.counts["paraphrase"] == {"cases": 1, "missing": 2, "prompts": 2}
    assert both.summary()["paraphrase"]["n"] == 1
    assert "ES" not in both.counts


def test_scores_of_two_states_are_joined_saved_and_read(lens_model, tmp_path):
    before = evaluate_zsre(lens_model, REQUESTS, CONFIG, state="before")
    scores = before.join(evaluate_zsre(lens_model, REQUESTS, CONFIG))
    scores.save(tmp_path)
    read = Scores.load(tmp_path)
    assert read.states == ("before", "after")
    assert read.summary("after") == scores.summary("after")
    assert scores.summary("after") == scores.summary("before")


def test_bad_requests_are_refused(lens_model):
    with pytest.raises(InputError, match="no edit requests"):
        evaluate_zsre(lens_model, [], CONFIG)
    with pytest.raises(InputError, match="two requests have the id '0'"):
        evaluate_zsre(lens_model, [REQUESTS[0], REQUESTS[0]], CONFIG)


def test_hits_are_counted_inside_the_object_alone():
    """Padding and the prompt are not asked about: right there, they would count."""
    found = score_targets(Parrot(Letters()), [("1", "2"), ("1", "2345"), ("5", "9123")])
    assert {pair: (score.hits, score.tokens, score.greedy) for pair, score in found.items()} == {
        ("1", "2"): (1, 1, True),
        ("1", "2345"): (4, 4, True),
        ("5", "9123"): (2, 4, False),
    }


def test_the_command_scores_by_zsres_protocol(tmp_path, capsys):
    """A folder holds scores of one protocol; what was measured is read again."""
    requests = tmp_path / "zsre.json"
    mend = {
        "subject": "iPod",
        "src": "What is the color of iPod?",
        "answers": ["teal"],
        "loc": "nq question: a",
        "loc_ans": "b",
    }
    requests.write_text(json.dumps([mend, {**mend, "rephrase": "Which color is iPod?"}]))

    def run(*more):
        arguments = ["evaluate", "--requests", requests, "--out", tmp_path / "run", "--json", *more]
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        return leaving.value.code or 0, capsys.readouterr()

    code, shown = run("--protocol", "zsre")
    assert code == 0
    summary = json.loads(shown.out)
    assert list(summary["before"]) == ["efficacy", "paraphrase", "specificity", "S", *EXACT_MATCHES]
    assert summary["protocol"]["protocol"] == "zsre"
    assert (summary["before"]["paraphrase"]["n"], summary["counts"]["paraphrase"]["missing"]) == (1, 1)
    assert run("--protocol", "zsre")[1].out == shown.out  # read again
    code, shown = run()
    assert code == 2
    assert "protocol = 'zsre', expected 'counterfact'" in shown.err
    assert run("--protocol", "squad")[0] == 2


def test_a_step_scores_before_and_after_an_edit_and_leaves_the_model(lens_model, tmp_path):
    edit, untouched = random_edit(lens_model), lens_model.weights_hash()
    folder = RunFolder.at(tmp_path)
    scores = evaluate_step(folder, lens_model, REQUESTS, edit, CONFIG, protocol="zsre")
    assert scores.states == ("before", "after")
    assert lens_model.weights_hash() == untouched
    with edited(lens_model, edit):
        inside = evaluate_zsre(lens_model, REQUESTS, CONFIG)
    assert scores.summary("after") == inside.summary()
    assert (tmp_path / "baseline_zsre" / "scores.parquet").is_file()
