"""Texts that are written together are those that each prompt gives alone, and what it takes is said before."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from typing import Any

import pytest
from helpers.scoring import CONFIG, REQUESTS

from mechedit.errors import InputError
from mechedit.evaluation import EvaluationConfig, evaluate, generate, generation, generation_plan, uniform_draws
from mechedit.evaluation.generation_plan import plan_generation
from mechedit.prompt_tokens import encode


def test_texts_of_several_lengths_are_those_of_each_prompt_alone(family_model):
    prompts = ["The Space Needle was", "Toko Yasuda plays the", "Miles Davis plays the trumpet and"]
    lengths = [len(encode(family_model.tokenizer, prompt)[0]) for prompt in prompts]
    assert len(set(lengths)) > 1
    draws = uniform_draws(1, prompts, 24)
    options = {"tokens": 24, "top_k": 5}
    assert len(plan_generation(lengths, 24, 64).batches) == 1
    together = generate(family_model, prompts, uniform=draws, **options)
    alone = [generate(family_model, [prompts[i]], uniform=draws[i : i + 1], **options)[0] for i in range(3)]
    assert together == alone
    assert len(set(together)) == 3
    # Control: a prompt's own tokens are read; without its last one another text follows.
    cut = family_model.tokenizer.decode(encode(family_model.tokenizer, prompts[2])[0][:-1])
    assert generate(family_model, [*prompts[:2], cut], uniform=draws, **options)[2] != together[2]


@pytest.mark.parametrize("settings", [{"tokens": -1}, {"top_k": 0}, {"batch_size": 0}, {"top_k": 3}])
def test_numbers_that_no_text_can_be_written_by_are_refused(small_model, settings):
    with pytest.raises(InputError, match=rf"{next(iter(settings))} is {next(iter(settings.values()))}.*expected"):
        generate(small_model, ["Leon Blum is"], **{"tokens": 2, **settings})
    assert len(generate(small_model, ["Leon Blum is"], tokens=0)) == 1, "the control"


def test_a_stop_word_ends_its_own_text_and_its_runs(small_model, monkeypatch):
    prompts = ["Danielle Darrieux was", "The Eiffel Tower is in", "The Space Needle was"]
    draws = uniform_draws(3, prompts, 20)
    options = {"tokens": 20, "top_k": 5, "uniform": draws}
    rows: list[int] = []
    step = type(small_model).next_logits

    def counted(model: Any, ids: Any, *others: Any) -> Any:
        rows.append(len(ids))
        return step(model, ids, *others)

    def written(**stop: Any) -> tuple[list[str], list[int]]:
        rows.clear()
        return generate(small_model, prompts, **options, **stop), list(rows)

    monkeypatch.setattr(type(small_model), "next_logits", counted)
    full, rows_of_full = written()
    word = full[0][4:6]
    cut, rows_of_cut = written(stop_words=[word])
    assert cut == [text.split(word)[0] for text in full]
    assert cut[0] != full[0]
    # A text that has ended leaves the batch; with a word that nobody writes, all is as without.
    assert rows_of_cut[0] == rows_of_full[0] == 3
    assert rows_of_cut == sorted(rows_of_cut, reverse=True)
    assert sum(rows_of_cut) < sum(rows_of_full)
    assert written(stop_words=["never written"]) == (full, rows_of_full)


def test_a_stop_word_is_part_of_the_settings_and_of_the_scores(lens_model):
    # Every prompt is continued, however long it is.
    config = replace(CONFIG, free_text="natural")
    word = evaluate(lens_model, REQUESTS, config).answers.query("kind == 'generation'")["answer"].iloc[0][2:4]
    stopped = replace(config, stop_words=[word])
    assert word not in "".join(evaluate(lens_model, REQUESTS, stopped).answers.query("kind == 'generation'")["answer"])
    assert stopped == EvaluationConfig(**{**asdict(config), "stop_words": (word,)})
    # Results without stop words are recorded as they always were.
    assert "stop_words" not in CONFIG.plain()
    assert stopped.plain()["stop_words"] == (word,)
    for wrong in (".", ["a", ""]):
        with pytest.raises(InputError, match="stop_words is"):
            replace(CONFIG, stop_words=wrong)


def test_the_plan_puts_prompts_of_about_the_same_length_together():
    plan = plan_generation([9, 4, 5, 30, 8, 31], tokens=10, batch_size=64)
    # Up to five tokens apart: half of what is written.
    assert plan.batches == ((1, 2, 4, 0), (3, 5))
    assert plan.runs == (10 + 5) + (10 + 1)
    assert plan.tokens_run == 4 * 19 + 2 * 41
    assert str(plan) == "6 texts of up to 10 new tokens in 2 batches: at most 26 forward passes"
    assert plan_generation([4] * 5, tokens=10, batch_size=2).batches == ((0, 1), (2, 3), (4,))
    assert plan_generation([], tokens=10, batch_size=2).runs == 0


def test_what_takes_long_is_announced_before_it_starts(lens_model, monkeypatch, capsys):
    generate(lens_model, ["Danielle Darrieux was"], tokens=5)
    assert "at most" not in capsys.readouterr().err
    monkeypatch.setattr(generation_plan, "ANNOUNCED", 1)
    printed: list[str] = []
    monkeypatch.setattr(generation_plan.tqdm, "write", lambda text, **where: printed.append(text.rstrip()))
    monkeypatch.setattr(generation, "_write", lambda *_: printed.append("starts"))
    generate(lens_model, ["Danielle Darrieux was", "The Space Needle was"], tokens=5)
    assert re.fullmatch(r"writing 2 texts of up to 5 new tokens in .*: at most \d+ forward passes, .* 0 s", printed[0])
    assert printed[-1] == "starts"


def test_the_estimate_is_the_time_of_a_pass_times_the_passes(lens_model, monkeypatch):
    monkeypatch.setattr(generation_plan, "_seconds_per_run", lambda model, rows: 0.5 * rows)
    plan = plan_generation([4, 5, 6, 40], tokens=10, batch_size=64)
    assert [len(batch) for batch in plan.batches] == [3, 1]
    assert plan.seconds(lens_model) == 1.5 * 12 + 0.5 * 10
