"""Drift from the unedited model: by hand, against a naive loop, and only between what can be compared."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.scoring import CONFIG, REQUESTS, naive

from mechedit.errors import InputError
from mechedit.evaluation import QUICK, Baseline, References, evaluate, measure_baseline
from mechedit.evaluation.drift import divergence, same_argmax
from mechedit.evaluation.likelihood import score_pairs
from mechedit.evaluation.probe_prompts import probe_prompts
from mechedit.prompt_tokens import encode

SHORT = replace(QUICK, plus=True)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def rows(scores: Any, measure: str) -> pd.Series:
    """The values of one measure by case and prompt."""
    return scores.table[scores.table["measure"] == measure].set_index(["case", "prompt"])["value"]


def next_token(model: Any, text: str) -> torch.Tensor:
    """Log-probabilities of the next token, one unpadded prompt."""
    with torch.no_grad():
        return model.hf(torch.tensor([encode(model.tokenizer, text)[0]])).logits[0, -1].double().log_softmax(-1)


def change(model: Any, factor: float = -3) -> None:
    with torch.no_grad():
        model.projection(1).mul_(factor)


def test_divergence_and_agreement_by_hand() -> None:
    # P = (1/2, 1/4, 1/4), P* = (1/4, 1/2, 1/4): 1/2 · ln 2 + 1/4 · ln 1/2 = 1/4 · ln 2.
    unedited, edited = logs(0.5, 0.25, 0.25), logs(0.25, 0.5, 0.25)
    assert divergence(unedited, edited).item() == pytest.approx(math.log(2) / 4, rel=1e-6)
    # It has a direction: P = (3/4, 1/4), P* = (1/2, 1/2), and the other way round.
    one, other = logs(0.75, 0.25), logs(0.5, 0.5)
    there = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    back = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert divergence(one, other).item() == pytest.approx(there, rel=1e-6)
    assert divergence(other, one).item() == pytest.approx(back, rel=1e-6)
    assert there != pytest.approx(back, rel=0.05)
    # Logits count up to a constant.
    assert divergence(one + 7, other - 2).item() == pytest.approx(there, rel=1e-5)
    assert divergence(one, one).item() == 0
    # The likeliest differ in the first pair, where P says token 0 and P* token 1, and agree in the second.
    assert same_argmax(torch.cat([unedited, edited]), torch.cat([edited, edited])).tolist() == [False, True]


def test_the_edit_goes_before_every_neighborhood_prompt() -> None:
    probes = list(probe_prompts(REQUESTS[1]))
    plus = [probe for probe in probes if probe.kind == "neighborhood_plus"]
    assert [(probe.text, probe.target_new, probe.target_true) for probe in plus] == [
        ("Space Needle is in downtown Northumbria. LeBron James is in downtown", "Northumbria", "Seattle"),
        ("Space Needle is in downtown Northumbria. The Eiffel Tower is in downtown", "Northumbria", "Paris"),
    ]
    assert [probe for probe in probes if probe not in plus] == list(probe_prompts(REQUESTS[1], plus=False))


def test_drift_and_counterfact_plus_against_a_naive_loop(small_model: Any) -> None:
    probes = [probe for request in REQUESTS for probe in probe_prompts(request)]
    asked = [probe for probe in probes if probe.kind.startswith("neighborhood")]
    before = {probe.text: next_token(small_model, probe.text) for probe in asked}
    baseline = measure_baseline(small_model, REQUESTS, SHORT)
    change(small_model)
    found = evaluate(small_model, REQUESTS, baseline=baseline)
    seen = {"KL": rows(found, "KL"), "KL+": rows(found, "KL+"), "top1": rows(found, "top1")}
    seen |= {"top1+": rows(found, "top1+"), "NS+": rows(found, "NS+"), "NM+": rows(found, "NM+")}
    for probe in asked:
        sign, place = "+" if probe.kind == "neighborhood_plus" else "", (probe.case, probe.index)
        p, q = before[probe.text], next_token(small_model, probe.text)
        assert seen["KL" + sign][place] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
        assert seen["top1" + sign][place] == float(p.argmax() == q.argmax())
        if sign:
            true, new = (naive(small_model, probe.text, target)[0] for target in (probe.target_true, probe.target_new))
            assert seen["NS+"][place] == float(true > new)
            assert seen["NM+"][place] == pytest.approx(math.exp(true) - math.exp(new), rel=1e-3, abs=1e-8)
    assert len(seen["KL"]) == len(seen["KL+"]) == 3
    assert seen["KL"].min() > 0.01  # the edit moves something
    assert not seen["KL"].equals(seen["KL+"])
    kinds = dict(zip(found.table["measure"], found.table["kind"], strict=True))
    assert kinds["NS+"] == kinds["NM+"] == kinds["KL+"] == "neighborhood_plus"
    assert kinds["KL"] == kinds["top1"] == "neighborhood"
    # In nats, not × 100; the share in percent. Case means: darrieux one prompt, needle two.
    summary = found.summary()
    by_case = seen["KL"].groupby("case").mean()
    assert summary["KL"]["mean"] == pytest.approx(by_case.mean())
    assert summary["top1"]["mean"] == pytest.approx(100 * seen["top1"].groupby("case").mean().mean())
    assert summary["KL"]["n"] == 2
    assert found.counts["KL"] == {"cases": 2, "missing": 1, "prompts": 3}


def test_the_unedited_model_has_not_moved(small_model: Any) -> None:
    baseline = measure_baseline(small_model, REQUESTS, SHORT)
    assert "KL" not in baseline.scores.summary()
    again = evaluate(small_model, REQUESTS, baseline=baseline).summary()
    assert again["KL"]["mean"] == again["KL+"]["mean"] == 0
    assert again["top1"]["mean"] == again["top1+"]["mean"] == 100
    change(small_model)
    assert evaluate(small_model, REQUESTS, baseline=baseline).summary()["KL"]["mean"] > 1e-4


def test_states_come_with_the_pass_that_scores(lens_model: Any) -> None:
    probes = [probe for request in REQUESTS for probe in probe_prompts(request)]
    pairs = [pair for probe in probes for pair in probe.pairs]
    watched = {probe.text for probe in probes if probe.kind == "neighborhood"}
    plain, both = score_pairs(lens_model, pairs), score_pairs(lens_model, pairs, state_prompts=watched, batch_size=2)
    assert set(both.states) == watched
    assert not plain.states
    for pair, score in plain.scores.items():
        assert both.scores[pair].log_prob == pytest.approx(score.log_prob, abs=1e-4)
    for text, state in both.states.items():
        expected = next_token(lens_model, text)
        torch.testing.assert_close(
            lens_model.unembed(state[None])[0].double().log_softmax(-1), expected, atol=1e-4, rtol=1e-4
        )


def test_a_baseline_is_made_once_and_comes_back_from_disk(lens_model: Any, tmp_path: Any, monkeypatch: Any) -> None:
    baseline = measure_baseline(lens_model, REQUESTS, CONFIG, texts=["The Eiffel Tower is in Paris."])
    baseline.save(tmp_path / "kept")
    loaded = Baseline.load(tmp_path / "kept")
    pd.testing.assert_frame_equal(loaded.scores.table, baseline.scores.table, check_dtype=False)
    torch.testing.assert_close(loaded.states, baseline.states, rtol=0, atol=0)
    assert loaded.prompts == baseline.prompts
    change(lens_model)
    runs = []
    run = type(lens_model).run
    monkeypatch.setattr(
        type(lens_model), "run", lambda self, tokens, **rest: runs.append(len(tokens.ids)) or run(self, tokens, **rest)
    )
    texts = ["The Eiffel Tower is in Paris."]
    first = evaluate(lens_model, REQUESTS, baseline=baseline, texts=texts)
    once = sum(runs)
    second = evaluate(lens_model, REQUESTS, baseline=loaded, texts=texts)
    assert sum(runs) == 2 * once
    # No row is run twice for the drift: as many as without a baseline.
    evaluate(lens_model, REQUESTS, CONFIG, texts=texts)
    assert sum(runs) == 3 * once
    pd.testing.assert_frame_equal(first.table, second.table, check_dtype=False)
    both = loaded.scores.join(second)
    assert both.states == ("before", "after")
    assert both.protocol["weights_hash"]["before"] != both.protocol["weights_hash"]["after"]
    baseline.save(tmp_path / "kept")  # replaced as a whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        baseline.save(tmp_path / "other")
    (tmp_path / "kept" / "states.safetensors").write_bytes(b"cut")
    with pytest.raises(InputError, match="safetensors"):
        Baseline.load(tmp_path / "kept")


def test_without_neighbors_there_is_nothing_to_compare(lens_model: Any, tmp_path: Any) -> None:
    measure_baseline(lens_model, REQUESTS[2:], SHORT).save(tmp_path / "kept")
    loaded = Baseline.load(tmp_path / "kept")
    assert loaded.prompts == ()
    change(lens_model)
    summary = evaluate(lens_model, REQUESTS[2:], baseline=loaded).summary()
    assert set(summary) == {"exact_match"}


def other_norm(model: Any) -> None:
    model.hf.transformer.ln_f.weight.mul_(2)


def other_head(model: Any) -> None:
    model.hf.get_output_embeddings().weight.mul_(2)


@pytest.mark.parametrize("change_outside", [other_norm, other_head])
def test_another_final_norm_or_unembedding_is_refused(lens_model: Any, change_outside: Any) -> None:
    baseline = measure_baseline(lens_model, REQUESTS, SHORT)
    with torch.no_grad():
        change_outside(lens_model)
    with pytest.raises(InputError, match="outer_hash"):
        evaluate(lens_model, REQUESTS, baseline=baseline)
    with pytest.raises(InputError, match="outer_hash"):
        baseline.scores.join(evaluate(lens_model, REQUESTS, SHORT))


REFERENCES = References.from_texts({("P1", "English"): ["She speaks English."]})


@pytest.mark.parametrize(
    ("field", "arguments"),
    [
        ("requests", {"requests": REQUESTS[:2]}),
        ("requests", {"requests": [replace(REQUESTS[0], target_new="Korean"), *REQUESTS[1:]]}),
        ("likelihood", {"config": replace(SHORT, likelihood="normalized")}),
        ("plus", {"config": QUICK}),
        ("texts", {"texts": ["Paris is in France."]}),
        ("references", {"references": REFERENCES}),
    ],
)
def test_a_baseline_of_something_else_is_refused(lens_model: Any, field: str, arguments: dict[str, Any]) -> None:
    baseline = measure_baseline(lens_model, REQUESTS, SHORT)
    with pytest.raises(InputError, match=f"made with {field} = .*measure_baseline"):
        evaluate(lens_model, **{"requests": REQUESTS, **arguments}, baseline=baseline)


def test_scores_of_another_model_are_refused(make_model: Any) -> None:
    one, other = make_model("gpt2", seed=0), make_model("gpt2", seed=1)
    baseline = measure_baseline(one, REQUESTS, SHORT)
    with pytest.raises(InputError, match="the baseline was made with outer_hash"):
        evaluate(other, REQUESTS, baseline=baseline)
    with pytest.raises(InputError, match="'after' was made with outer_hash"):
        baseline.scores.join(evaluate(other, REQUESTS, SHORT))
    renamed = [replace(REQUESTS[0], target_new="Korean"), *REQUESTS[1:]]
    with pytest.raises(InputError, match="'after' was made with requests"):
        baseline.scores.join(evaluate(one, renamed, SHORT))


@pytest.fixture
def without() -> list[Any]:
    """Requests that lack paraphrases, neighbors, true objects, or all."""
    full, _, bare = REQUESTS
    return [full, replace(full, id="no paraphrases", paraphrases=()), replace(full, id="no neighbors", neighbors=()),
            replace(full, id="no true object", target_true=None), bare]  # fmt: skip


def test_what_a_record_lacks_is_absent_not_zero_and_counted(lens_model: Any, without: list[Any]) -> None:
    baseline = measure_baseline(lens_model, without, CONFIG)
    change(lens_model)
    found = evaluate(lens_model, without, baseline=baseline)
    has = found.table.groupby("measure")["case"].agg(set)
    everyone = {request.id for request in without}
    assert has["exact_match"] == everyone
    assert has["ES"] == has["EM"] == everyone - {"no true object", "bare"}
    assert has["PS"] == everyone - {"no paraphrases", "no true object", "bare"}
    assert has["exact_match_paraphrase"] == everyone - {"no paraphrases", "bare"}
    for measure in ("NS", "NM", "NS+", "NM+", "KL", "KL+", "top1", "top1+"):
        assert has[measure] == everyone - {"no neighbors", "bare"}
    assert has["GE"] == everyone - {"bare"}
    missing = {measure: count["missing"] for measure, count in found.counts.items()}
    assert (missing["exact_match"], missing["ES"], missing["PS"], missing["NS"], missing["RS"]) == (0, 2, 3, 2, 5)
    summary = found.summary()
    assert summary["PS"]["n"] == 2
    assert "RS" not in summary
    assert "PPL" not in summary
    # The mean is over those that have it: the same as without the others.
    alone = evaluate(lens_model, without[:1], CONFIG).summary()
    assert summary["PS"]["mean"] == alone["PS"]["mean"]
    nobody = [replace(request, paraphrases=(), neighbors=()) for request in without]
    assert {"PS", "NS", "S", "KL"}.isdisjoint(evaluate(lens_model, nobody, CONFIG).summary())


def test_repeated_cases_are_refused(lens_model: Any) -> None:
    with pytest.raises(InputError, match="two requests have the id 'darrieux'"):
        measure_baseline(lens_model, [REQUESTS[0], REQUESTS[0]], SHORT)
