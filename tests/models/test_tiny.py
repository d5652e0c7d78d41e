"""The model that ships: its files are whole, and what its card claims can be found in it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

import mechedit as me
import mechedit.models
from mechedit.batching import pad
from mechedit.data import tiny_data
from mechedit.prompt_tokens import continuation_ids, encode
from mechedit.provenance import file_hash

FOLDER = Path(mechedit.models.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def tiny():
    return me.load_model("tiny", backend="nnsight")


def greedy(model, prompts):
    tokens = pad([encode(model.tokenizer, prompt)[0] for prompt in prompts], model.tokenizer)
    with torch.no_grad():
        logits = model.run(tokens).logits
    return logits[torch.arange(len(prompts)), tokens.lengths - 1].argmax(-1).tolist()


def test_facts_and_requests_fit_each_other(tiny):
    facts, requests = me.load_facts("known"), me.load_requests("tiny")
    assert len({fact.subject for fact in facts}) >= 250
    assert len(facts) >= 2000
    assert len({fact.relation for fact in facts}) >= 8
    assert min(len(continuation_ids(tiny.tokenizer, fact.subject)) for fact in facts) >= 2
    assert len(requests) == 100
    true = {(fact.subject, fact.relation): fact.object for fact in facts}
    for request in requests:
        assert true[request.subject, request.relation] == request.target_true != request.target_new
        assert request.paraphrases
        assert request.neighbors
        assert request.attributes
        assert len(request.generations) == 10
        for neighbor in request.neighbors:
            (subject,) = [
                s for s, r in true if r == request.relation and request.prompt.replace("{}", s) == neighbor.prompt
            ]
            assert subject != request.subject
            assert true[subject, request.relation] == neighbor.object


def agreeing(tokens, objects):
    """How many objects are the one token that the model says."""
    return sum([token] == ids for token, ids in zip(tokens, objects, strict=True))


def test_it_recalls_facts_and_paraphrases_and_not_by_chance(tiny):
    facts = random.Random(2).sample(me.load_facts("known"), 200)
    objects = [continuation_ids(tiny.tokenizer, fact.object) for fact in facts]
    assert agreeing(greedy(tiny, [f.text for f in facts]), objects) >= 194
    requests = me.load_requests("tiny")
    right = [continuation_ids(tiny.tokenizer, request.target_true) for request in requests]
    assert agreeing(greedy(tiny, [request.paraphrases[0] for request in requests]), right) >= 95
    others = greedy(
        tiny, [request.neighbors[0].prompt.replace(request.neighbors[0].object, "") for request in requests[1:]]
    )
    assert agreeing(others, right[:-1]) < 20


def test_paraphrases_and_training_text_share_no_opener():
    texts = tiny_data("texts.txt").read_text(encoding="utf-8")
    for request in me.load_requests("tiny"):
        for paraphrase in request.paraphrases:
            after = paraphrase.split(request.subject, 1)[1]
            assert after not in texts
        assert request.prompt.split("{}")[1] in texts


def test_the_card_names_these_weights_and_no_claim_fails():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert file_hash(FOLDER / "model.safetensors") in card
    measured = json.loads((FOLDER / "measured.json").read_text())
    assert len(measured) > 12
    assert all(line["holds"] for line in measured)


def test_the_site_is_at_the_subjects_last_token_and_made_by_mlps(tiny):
    facts = random.Random(3).sample(me.load_facts("known"), 12)
    config = me.TraceConfig(kinds=("state",), sever=("nothing", "mlp"), roles=("subject_last", "after"), samples=4)
    effects = me.trace_facts(tiny, facts, config)
    first = effects[effects.layer == 0].groupby(["role", "sever"])["effect"].mean()
    assert first["subject_last", "nothing"] > 0.1
    assert first["subject_last", "mlp"] < first["subject_last", "nothing"] / 2
    assert abs(first["after", "nothing"]) < first["subject_last", "nothing"] / 4


def test_it_never_makes_token_type_ids(tiny):
    assert set(tiny.tokenizer("a colour")) == {"input_ids", "attention_mask"}


def test_its_own_settings_are_used_when_none_are_given(tiny, lens_model):
    shipped_settings = json.loads((FOLDER / "editing.json").read_text())["memit"]
    config = me.recommended("memit", tiny)
    assert {name: getattr(config, name) for name in shipped_settings} == shipped_settings
    assert config != me.MemitConfig() == me.recommended("memit", lens_model)
    request = me.load_requests("tiny")[:1]
    moments = {1: torch.eye(tiny.d_mlp, dtype=torch.float64)}
    edit = me.memit(tiny, request, layers=[1], moments=moments, prefixes=["{}"])
    assert edit.manifest["settings"]["covariance_weight"] == shipped_settings["covariance_weight"]
