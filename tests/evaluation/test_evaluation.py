from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.scoring import CONFIG, REQUESTS, naive

from mechedit.data import EditRequest, Neighbor
from mechedit.errors import InputError
from mechedit.evaluation import (
    EvaluationConfig,
    Scores,
    TargetScore,
    evaluate,
    generate,
    generation,
    ngram_entropy,
    score_targets,
    uniform_draws,
)
from mechedit.evaluation.generation import sample_top_k, split_words
from mechedit.evaluation.probe_prompts import ProbePrompt, edit_sentence, likelihood_rows, probe_prompts
from mechedit.prompt_tokens import continuation_ids, encode
from mechedit.statistics import bootstrap_means, harmonic_mean


def all_pairs():
    return [pair for request in REQUESTS for probe in probe_prompts(request) for pair in probe.pairs]


def test_targets_in_one_batched_pass_equal_one_at_a_time(family_model):
    pairs = all_pairs()
    expected = {pair: naive(family_model, *pair) for pair in pairs}
    for batch_size in (1, 3, 64):
        scores = score_targets(family_model, pairs, batch_size=batch_size)
        assert set(scores) == set(pairs)
        for pair, score in scores.items():
            log_prob, greedy = expected[pair]
            assert score.log_prob == pytest.approx(log_prob, abs=2e-4), batch_size
            assert score.greedy == greedy
            assert score.tokens == len(continuation_ids(family_model.tokenizer, pair[1]))
        assert len({score.tokens for score in scores.values()}) > 1  # objects of different length are padded together
        assert len({round(score.log_prob, 3) for score in scores.values()}) > 5


def test_a_pair_asked_for_twice_is_computed_once(lens_model, monkeypatch):
    rows = []
    run = type(lens_model).run
    monkeypatch.setattr(
        type(lens_model),
        "run",
        lambda self, tokens, **rest: rows.append(len(tokens.ids)) or run(self, tokens, **rest),
    )
    score_targets(lens_model, [("Paris is in", "France"), ("Paris is in", "Italy"), ("Paris is in", "France")])
    assert sum(rows) == 2


def test_greedy_flag_on_a_model_taught_one_word(lens_model):
    # Raising the score of one token everywhere makes greedy decoding repeat it.
    token = continuation_ids(lens_model.tokenizer, "the")
    assert len(token) == 1
    pair = ("Danielle Darrieux speaks", "the")
    assert not score_targets(lens_model, [pair])[pair].greedy
    head = lens_model.hf.get_output_embeddings().weight
    final = lens_model.hf.transformer.ln_f
    with torch.no_grad():
        final.bias.copy_(100 * head[token[0]] / head[token[0]].norm() ** 2)
    assert score_targets(lens_model, [pair])[pair].greedy
    assert score_targets(lens_model, [("Paris is", "the the")])["Paris is", "the the"].greedy
    scores = evaluate(lens_model, [replace(REQUESTS[0], target_new="the")], CONFIG)
    summary = scores.summary()
    assert summary["exact_match"]["mean"] == summary["exact_match_paraphrase"]["mean"] == 100
    assert summary["ES"]["mean"] == 100
    assert summary["NS"]["mean"] == 0
    assert scores.answers.query("kind == 'rewrite'")["answer"].item() == " the the the"


def score(log_prob, tokens, greedy=False):
    return TargetScore(log_prob=log_prob, tokens=tokens, hits=tokens if greedy else 0)


def rows_of(kind, new, true, likelihood="joint"):
    probe = ProbePrompt(case="c", kind=kind, index=0, text="t", target_new="new", target_true="true")
    scores = {("t", " new"): new, ("t", " true"): true}
    config = EvaluationConfig(likelihood=likelihood)
    return {row[1]: row[4] for row in likelihood_rows(probe, scores, config)}


def test_success_and_magnitude_by_hand():
    # P(new) = 0.5, P(true) = 0.2, one token each.
    new, true = score(math.log(0.5), 1, greedy=True), score(math.log(0.2), 1)
    assert rows_of("rewrite", new, true) == {"exact_match": 1.0, "ES": 1.0, "EM": pytest.approx(0.3)}
    assert rows_of("paraphrase", true, new) == {
        "exact_match_paraphrase": 0.0,
        "PS": 0.0,
        "PM": pytest.approx(-0.3),
    }
    # On neighbors the true object should win.
    assert rows_of("neighborhood", new, true) == {"NS": 0.0, "NM": pytest.approx(-0.3)}
    assert rows_of("neighborhood", true, new) == {"NS": 1.0, "NM": pytest.approx(0.3)}


def test_joint_and_normalized_likelihood_can_disagree():
    # new: two tokens of 0.5 each, joint 0.25, per token 0.5; true: one token of 0.4.
    new, true = score(2 * math.log(0.5), 2), score(math.log(0.4), 1)
    joint, normalized = rows_of("rewrite", new, true), rows_of("rewrite", new, true, "normalized")
    assert (joint["ES"], normalized["ES"]) == (0.0, 1.0)
    assert joint["EM"] == pytest.approx(0.25 - 0.4)
    assert normalized["EM"] == pytest.approx(0.5 - 0.4)


def test_success_is_decided_in_logarithms_and_a_tie_is_a_failure():
    assert rows_of("rewrite", score(-800.0, 9), score(-900.0, 9))["ES"] == 1.0  # both round to probability 0
    assert rows_of("rewrite", score(-1.0, 1), score(-1.0, 1))["ES"] == 0.0
    assert rows_of("neighborhood", score(-1.0, 1), score(-1.0, 1))["NS"] == 0.0


def table(values, state="after"):
    """Rows from {measure: {case: [value of each prompt]}}."""
    rows = [
        (case, measure, "rewrite", prompt, float(value), state)
        for measure, cases in values.items()
        for case, prompts in cases.items()
        for prompt, value in enumerate(prompts)
    ]
    return pd.DataFrame(rows, columns=["case", "measure", "kind", "prompt", "value", "state"])


ANSWERS = pd.DataFrame(columns=["case", "kind", "prompt", "question", "expected", "answer", "state"], dtype=object)


def make_scores(values, cases=("a", "b"), **config):
    return Scores(
        table=table(values),
        answers=ANSWERS,
        cases=tuple(cases),
        config=EvaluationConfig(**config),
        provenance={"after": {}},
    )


def test_prompts_are_averaged_within_a_case_first():
    # Case a: mean 0.25 over four prompts; case b: 1 over one. Over cases 0.625; over prompts it were 0.4.
    summary = make_scores({"PS": {"a": [1, 0, 0, 0], "b": [1]}}).summary()
    assert summary["PS"]["mean"] == pytest.approx(62.5)
    assert summary["PS"]["n"] == 2
    assert (summary["PS"]["low"], summary["PS"]["high"]) == (25, 100)  # resamples are aa, ab, ba, bb


def test_s_is_the_harmonic_mean_by_hand():
    # ES 1, PS 1/2, NS 1/4: 3 / (1 + 2 + 4) = 3/7.
    summary = make_scores({"ES": {"a": [1]}, "PS": {"a": [1, 0]}, "NS": {"a": [1, 0, 0, 0]}}, cases="a").summary()
    assert summary["S"]["mean"] == pytest.approx(100 * 3 / 7)
    assert harmonic_mean(np.array([[1.0, 1.0, 0.0], [0.5, 0.5, 0.5]])).tolist() == [0.0, 0.5]


def test_s_is_resampled_jointly():
    # In every case exactly one of ES and NS succeeds, so ES + NS = 1 in every resample, and S with PS = 1 is
    # at most 3 / (2 + 2 + 1) = 0.6, at ES = NS = 1/2. Resampled apart, it would exceed that.
    cases = [str(i) for i in range(12)]
    values = {
        "ES": {case: [i % 2] for i, case in enumerate(cases)},
        "NS": {case: [1 - i % 2] for i, case in enumerate(cases)},
        "PS": {case: [1] for case in cases},
    }
    summary = make_scores(values, cases).summary()
    assert summary["S"]["high"] <= 60 + 1e-9
    assert summary["ES"]["high"] > 70  # and the parts do vary


def test_a_measure_without_data_is_absent_and_counted():
    scores = make_scores({"ES": {"a": [1], "b": [0]}, "PS": {"a": [1, 1]}}, cases="abc")
    summary = scores.summary()
    assert set(summary) == {"ES", "PS"}  # no NS, hence no S
    assert summary["PS"]["n"] == 1
    assert scores.counts["PS"] == {"cases": 1, "missing": 2, "prompts": 2}
    assert scores.counts["NS"] == {"cases": 0, "missing": 3, "prompts": 0}
    assert make_scores({}, cases="ab").summary() == {}


def test_bootstrap_is_seeded_and_marks_resamples_without_data():
    values = np.array([[0.0, np.nan], [1.0, np.nan], [0.0, 3.0]])
    first, again, other = (bootstrap_means(values, seed=s, resamples=250) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (250, 2)
    # The second measure exists in one case of three: a resample misses it with probability (2/3)³ = 0.30.
    assert 0.2 < np.isnan(first[:, 1]).mean() < 0.4
    assert np.nanmax(first[:, 1]) == np.nanmin(first[:, 1]) == 3


def test_bootstrap_spread_is_that_of_the_mean():
    values = np.random.default_rng(0).normal(size=(400, 1))
    assert bootstrap_means(values, seed=0, resamples=4000).std() == pytest.approx(values.std() / 20, rel=0.05)


def test_entropy_by_hand():
    # a b a b a: bigrams ab ba ab ba (1/2, 1/2) → 1 bit; trigrams aba bab aba (2/3, 1/3) → 0.9183 bits.
    trigram = -(2 / 3) * math.log2(2 / 3) - (1 / 3) * math.log2(1 / 3)
    assert ngram_entropy("a b a b a", "sum") == pytest.approx(2 / 3 + 4 / 3 * trigram)
    assert ngram_entropy("a b a b a") == pytest.approx((2 / 3 + 4 / 3 * trigram) / 2)
    # Nine different words: 8 bigrams, 3 bits; 7 trigrams, log2 7 bits.
    assert ngram_entropy("a b c d e f g h i") == pytest.approx((2 / 3 * 3 + 4 / 3 * math.log2(7)) / 2)
    assert ngram_entropy("no no no no no no") == 0
    assert ngram_entropy("word") == ngram_entropy("") == 0
    assert split_words("It's naïve, isn’t it?", "simple") == ["It", "'", "s", "naïve", ",", "isn", "’", "t", "it", "?"]


def test_words_are_nltks_in_punkts_sentences() -> None:
    text = "The dog's bowl. It isn't here, Dr. Smith said (again)."
    assert split_words(text) == [
        *("The", "dog", "'s", "bowl", ".", "It", "is", "n't", "here", ",", "Dr.", "Smith", "said"),
        *("(", "again", ")", "."),
    ]
    assert split_words("Of Dr. Smith. Of it.") != split_words("Of Dr. Smith. Of it.", "simple"), "the control"
    assert ngram_entropy(text) != ngram_entropy(text, words="simple")


def test_published_free_text_counts_its_prompt_and_goes_on_past_the_end(small_model: Any) -> None:
    prompts, tokenizer = ["The mother tongue of Leon Blum is", "Toko"], small_model.tokenizer
    uniform = uniform_draws(0, prompts, 20)
    total = [
        len(tokenizer(prompt)["input_ids"]) + written
        for prompt, written in zip(
            prompts, _written(small_model, prompts, uniform, with_prompt=True, ends=False), strict=True
        )
    ]
    assert total == [20, 20]
    assert _written(small_model, prompts, uniform, with_prompt=False, ends=False) == [20, 20]


def _written(model: Any, prompts: list[str], uniform: Any, **how: Any) -> list[int]:
    """How many new tokens each text has."""
    counts: list[int] = []
    original = generation._Text.continuation.fget

    def counted(text: Any) -> str:
        counts.append(len(text.new_ids))
        return original(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation._Text, "continuation", property(counted))
        generate(model, prompts, tokens=20, top_k=5, uniform=uniform, **how)
    order = sorted(range(len(prompts)), key=lambda index: len(model.tokenizer(prompts[index])["input_ids"]))
    return [counts[order.index(index)] for index in range(len(prompts))]


def test_sampling_inverts_the_cumulative_distribution():
    # Shares 0.6, 0.3, 0.1 of tokens 2, 0, 3; token 1 is beyond the top three.
    logits = torch.log(torch.tensor([[0.3, 1e-6, 0.6, 0.1]])).expand(5, -1)
    picked = sample_top_k(logits, 3, torch.tensor([0.0, 0.59, 0.61, 0.89, 0.999999], dtype=torch.float64))
    assert picked[:, 0].tolist() == [2, 2, 0, 0, 3]
    assert sample_top_k(logits, 1, torch.full((5,), 0.99, dtype=torch.float64))[:, 0].tolist() == [2] * 5


def test_sampled_shares_are_the_probabilities():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.15, 0.1]])).expand(4000, -1)
    draws = uniform_draws(0, [str(i) for i in range(4000)], 1)[:, 0]
    shares = torch.bincount(sample_top_k(logits, 2, torch.tensor(draws))[:, 0], minlength=4) / 4000
    assert shares.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=0.03)


def test_text_does_not_depend_on_the_batch(small_model):
    prompts = ["Danielle Darrieux was", "The Eiffel Tower is in", "The Space Needle was", "Toko Yasuda plays"]
    draws = uniform_draws(3, prompts, 8)
    together = generate(small_model, prompts, tokens=8, top_k=5, uniform=draws)
    alone = [
        generate(small_model, [prompt], tokens=8, top_k=5, uniform=draws[i : i + 1])[0]
        for i, prompt in enumerate(prompts)
    ]
    shuffled = generate(small_model, prompts[::-1], tokens=8, top_k=5, uniform=draws[::-1].copy(), batch_size=2)
    assert together == alone == shuffled[::-1]
    assert generate(small_model, prompts, tokens=8, top_k=5, uniform=uniform_draws(4, prompts, 8)) != together


def test_draws_belong_to_their_name():
    both, one = uniform_draws(0, ["a", "b"], 4), uniform_draws(0, ["b"], 4)
    np.testing.assert_array_equal(both[1], one[0])
    assert not np.array_equal(both[0], both[1])


def test_greedy_text_is_that_of_transformers(family_model):
    prompt = "The mother tongue of Leon Blum is"
    ids = torch.tensor([encode(family_model.tokenizer, prompt)[0]])
    with torch.no_grad():
        expected = family_model.hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=6,
            pad_token_id=1,
            use_cache=False,
        )
    text = family_model.tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)
    assert generate(family_model, [prompt], tokens=6) == [text]
    assert text


def test_text_stops_at_the_end_token_and_at_the_context(lens_model):
    prompt = "Danielle Darrieux was"
    length = len(encode(lens_model.tokenizer, prompt)[0])
    full = generate(lens_model, [prompt], tokens=1000)[0]
    room = lens_model.max_positions - length
    assert 0 < len(encode(lens_model.tokenizer, prompt + full)[0]) - length <= room
    # Make the end token likeliest from some step on: nothing is written.
    head, end = lens_model.hf.get_output_embeddings().weight, lens_model.tokenizer.eos_token_id
    with torch.no_grad():
        lens_model.hf.transformer.ln_f.bias.copy_(100 * head[end] / head[end].norm() ** 2)
    assert generate(lens_model, [prompt], tokens=20) == [""]


def test_evaluate_end_to_end(small_model):
    scores = evaluate(small_model, REQUESTS, CONFIG, state="before")
    assert scores.states == ("before",)
    assert set(scores.table["state"]) == {"before"}
    prompts = scores.table.groupby("measure").size().to_dict()
    assert prompts == {
        "ES": 2, "EM": 2, "exact_match": 3, "PS": 2, "PM": 2, "exact_match_paraphrase": 2,
        "NS": 3, "NM": 3, "NS+": 3, "NM+": 3, "GE": 2,
    }  # fmt: skip
    assert scores.counts["NS"] == {"cases": 2, "missing": 1, "prompts": 3}
    expected = {}
    for case, text, new, true in (
        ("darrieux", "The mother tongue of Danielle Darrieux is", "English", "French"),
        ("needle", "Space Needle is in downtown", "Northumbria", "Seattle"),
    ):
        expected[case] = math.exp(naive(small_model, text, new)[0]) - math.exp(naive(small_model, text, true)[0])
    found = scores.table[scores.table["measure"] == "EM"].set_index("case")["value"].to_dict()
    assert found == pytest.approx(expected, rel=1e-3)
    signs = scores.table[scores.table["measure"] == "ES"].set_index("case")["value"].to_dict()
    assert signs == {case: float(value > 0) for case, value in expected.items()}
    filled = scores.answers[scores.answers["kind"] == "generation"]
    assert len(filled) == 2
    assert len(scores.answers) == 5
    ge = scores.table[scores.table["measure"] == "GE"]["value"].tolist()
    assert ge == [ngram_entropy(q + a) for q, a in zip(filled["question"], filled["answer"], strict=True)]


def test_fewer_free_texts_are_the_first_of_all(lens_model):
    every = evaluate(lens_model, REQUESTS, CONFIG)
    first = evaluate(lens_model, REQUESTS, replace(CONFIG, generation_prompts=1))
    texts = [scores.answers.query("kind == 'generation'")["answer"].tolist() for scores in (every, first)]
    assert len(texts[0]) == 2
    assert texts[1] == texts[0][:1]


def test_templates_among_paraphrases_get_their_subject():
    texts = [probe.text for probe in probe_prompts(REQUESTS[0]) if probe.kind == "paraphrase"]
    assert texts == ["Danielle Darrieux, a native", "Danielle Darrieux speaks the language"]


def test_batch_size_and_backend_change_no_more_than_rounding_and_the_first_is_recorded(make_model):
    scores = [
        evaluate(make_model("gpt2", backend), REQUESTS, replace(CONFIG, batch_size=batch_size))
        for backend, batch_size in (("transformer_lens", 64), ("transformer_lens", 1), ("nnsight", 5))
    ]
    for others in scores[1:]:
        pd.testing.assert_frame_equal(scores[0].table, others.table, atol=1e-5)
    by_one = scores[1].summary()
    assert {name: entry["mean"] for name, entry in scores[0].summary().items()} == pytest.approx(
        {name: entry["mean"] for name, entry in by_one.items()}, abs=1e-3
    )
    assert [measured.protocol["batch_size"] for measured in scores] == [64, 1, 5]
    assert scores[0].table["value"].tolist() != scores[1].table["value"].tolist(), "so that it has to be recorded"


def test_evaluation_repeats_itself_and_sees_an_edit(lens_model):
    first, again = (evaluate(lens_model, REQUESTS, CONFIG) for _ in range(2))
    pd.testing.assert_frame_equal(first.table, again.table)
    pd.testing.assert_frame_equal(first.answers, again.answers)
    assert first.summary() == again.summary()
    with torch.no_grad():
        lens_model.projection(1).mul_(-3)
    edited = evaluate(lens_model, REQUESTS, CONFIG)
    assert not np.allclose(edited.table["value"], first.table["value"])
    assert edited.provenance["after"] != first.provenance["after"]


def test_scores_come_back_from_disk(lens_model, tmp_path):
    before = evaluate(lens_model, REQUESTS, CONFIG, state="before")
    both = before.join(evaluate(lens_model, REQUESTS, CONFIG, state="after"))
    both.save(tmp_path / "out")
    loaded = Scores.load(tmp_path / "out")
    pd.testing.assert_frame_equal(loaded.table, both.table, check_dtype=False)
    pd.testing.assert_frame_equal(loaded.answers, both.answers, check_dtype=False)
    assert (loaded.cases, loaded.config, loaded.provenance) == (both.cases, both.config, both.provenance)
    assert loaded.summary("before") == before.summary()
    with pytest.raises(InputError, match="before, after"):
        loaded.summary()
    (tmp_path / "out" / "scores.parquet").write_bytes(b"PAR1 cut sho")
    with pytest.raises(InputError, match="make it again"):
        Scores.load(tmp_path / "out")
    with pytest.raises(InputError, match="check the path"):
        Scores.load(tmp_path / "nowhere")


def test_scores_measured_differently_are_not_joined():
    one = make_scores({"ES": {"a": [1], "b": [0]}})
    with pytest.raises(InputError, match="the state 'after'"):
        one.join(one)
    other = replace(one, provenance={"before": {}}, table=table({"ES": {"a": [1]}}, "before"))
    assert one.join(other).states == ("after", "before")
    with pytest.raises(InputError, match="other cases"):
        one.join(replace(other, cases=("a",)))
    with pytest.raises(InputError, match="other settings"):
        one.join(replace(other, config=EvaluationConfig(likelihood="normalized")))


@pytest.mark.parametrize(
    "changes",
    [
        {"likelihood": "mean"},
        {"entropy": "max"},
        {"batch_size": 0},
        {"resamples": 0},
        {"top_k": 0},
        {"confidence": 95.0},
    ],
)
def test_bad_settings_are_refused_with_the_choices(changes):
    with pytest.raises((InputError, TypeError), match=next(iter(changes))):
        EvaluationConfig(**changes)


def test_bad_requests_are_refused(lens_model):
    with pytest.raises(InputError, match="no edit requests"):
        evaluate(lens_model, [])
    with pytest.raises(InputError, match="darrieux"):
        evaluate(lens_model, [REQUESTS[0], REQUESTS[0]], CONFIG)
    with pytest.raises(InputError, match="at most 64"):
        score_targets(lens_model, [("the " * 100, "Paris")])
    with pytest.raises(InputError, match="no tokens"):
        score_targets(lens_model, [("", "Paris")])
    with pytest.raises(InputError, match="no tokens"):
        score_targets(lens_model, [("Paris is in", " ")])
    with pytest.raises(InputError, match="between 1 and 63"):
        generate(lens_model, ["the " * 100], tokens=3)


def test_probabilities_that_are_not_finite_are_refused(lens_model):
    with torch.no_grad():
        lens_model.projection(0).fill_(math.nan)
    with pytest.raises(InputError, match="finite"):
        evaluate(lens_model, REQUESTS, CONFIG)


def test_what_is_not_wanted_is_left_out(lens_model):
    scores = evaluate(lens_model, REQUESTS, replace(CONFIG, generation_tokens=0, answer_tokens=0))
    assert scores.answers.empty
    assert "GE" not in scores.summary()
    assert "ES" in scores.summary()


@pytest.mark.parametrize(
    ("prompt", "target", "sentence"),
    [
        ("{} lies in", "Italy", "Rome lies in Italy. "),
        ("{} lies near", "Washington, D.C.", "Rome lies near Washington, D.C. "),
        ("{} says", "Oh!", "Rome says Oh! "),
        ("{} asks", "Who?", "Rome asks Who? "),
        ("{} says", "Well…", "Rome says Well… "),
        ("{}は", "国です", "Romeは国です。"),
        ("{}は", "国です。", "Romeは国です。"),
    ],
)
def test_one_mark_ends_the_sentence_of_an_edit(prompt, target, sentence):
    assert edit_sentence(EditRequest(id="1", subject="Rome", prompt=prompt, target_new=target)) == sentence


def test_only_a_brace_that_stands_for_the_subject_is_filled():
    """A neighbor is about another subject, and a paraphrase that holds the subject is filled already."""
    request = EditRequest(
        id="1",
        subject="Foo {} Bar",
        prompt="{} prints",
        target_new="f{}",
        paraphrases=("The home of Foo {} Bar is", "The home of {} is"),
        neighbors=(Neighbor(prompt="Baz {} lives in", object="Paris"),),
    )
    texts = {(probe.kind, probe.index): probe.text for probe in probe_prompts(request)}
    assert texts == {
        ("rewrite", 0): "Foo {} Bar prints",
        ("paraphrase", 0): "The home of Foo {} Bar is",
        ("paraphrase", 1): "The home of Foo {} Bar is",
        ("neighborhood", 0): "Baz {} lives in",
        ("neighborhood_plus", 0): "Foo {} Bar prints f{}. Baz {} lives in",
    }
