"""The script that does it all, on a model of another shape than the one that ships."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch

from analyses.papers import select_layers
from mechedit import InputError, load_model
from mechedit.prompt_tokens import continuation_ids, encode

SUBJECTS = (
    "Danielle Darrieux", "Leon Blum", "Go Hyeon-jeong", "Eiffel Tower", "Space Needle", "LeBron James",
    "Toko Yasuda", "Miles Davis", "Apple A5", "Windows Media Player", "Anaal Nathrakh", "Edwin of Northumbria",
)  # fmt: skip
PROMPT = "The mother tongue of {} is"
OBJECT = "French"


@pytest.fixture
def script() -> Any:
    return select_layers


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def checkpoint(request, make_hf, tokenizer, tmp_path) -> Path:
    """A checkpoint that says the object of every fact, though its other weights are random."""
    hf = make_hf(request.param)
    prompts = [encode(tokenizer, PROMPT.format(subject))[0] for subject in SUBJECTS]
    with torch.no_grad():
        last = torch.stack([hf.model(torch.tensor([ids])).last_hidden_state[0, -1] for ids in prompts])
        for token in continuation_ids(tokenizer, OBJECT)[:1]:
            hf.lm_head.weight[token] = torch.linalg.lstsq(last, torch.full((len(last), 1), 30.0)).solution[:, 0]
    hf.save_pretrained(tmp_path / request.param)
    tokenizer.save_pretrained(tmp_path / request.param)
    return tmp_path / request.param


@pytest.fixture
def inputs(tmp_path) -> list[str]:
    facts = [{"id": str(i), "subject": name, "prompt": PROMPT, "object": OBJECT} for i, name in enumerate(SUBJECTS)]
    requests = [
        {"id": f"r{i}", "subject": name, "prompt": "They say {} has", "target_new": "Korean", "target_true": OBJECT}
        for i, name in enumerate(SUBJECTS[:4])
    ]
    texts = [f"The mother tongue of {name} is French, they say, and the sport is basketball." for name in SUBJECTS]
    for name, rows in (("facts.jsonl", facts), ("requests.jsonl", requests)):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    pairs = (("--facts", "facts.jsonl"), ("--requests", "requests.jsonl"), ("--texts", "texts.txt"))
    return [word for option, name in pairs for word in (option, str(tmp_path / name))]


def test_data_are_those_that_suit_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    for model, facts, texts in (("tiny", "known", "tiny"), ("gpt2-xl", "known_1000", "wikitext")):
        monkeypatch.setattr(sys, "argv", ["select_layers", model])
        options = select_layers.read_arguments()
        assert (options.facts, options.texts) == (facts, texts)
    monkeypatch.setattr(sys, "argv", ["select_layers", "gpt2-xl", "--facts", "mine.json"])
    assert select_layers.read_arguments().facts == "mine.json"


def test_it_leaves_a_folder_to_cite_for_models_of_other_shapes(
    script, checkpoint, inputs, tmp_path, light_figures, monkeypatch, capsys
):
    assert len(continuation_ids(load_model(str(checkpoint)).tokenizer, OBJECT)) == 1, "a single token is easily taught"
    out = tmp_path / "out"
    monkeypatch.setattr(
        sys, "argv", ["select_layers.py", str(checkpoint), *inputs, "--quick", "--width", "2", "--out", str(out)]
    )
    if checkpoint.name != "llama":  # figures take most of the time, and do not depend on the shape
        monkeypatch.setattr(script, "run_figures", lambda folder: [])
    assert script.main() in (0, 3)
    card = (out / "README.md").read_text()
    model = load_model(str(checkpoint))
    assert model.weights_hash() in card
    assert "8 requests" not in card
    assert f"analyses.papers.select_layers {checkpoint}" in card
    assert "No range is published for a model of this name." in card
    assert "of the 4 requests are about subjects that were traced" in card, "all subjects were traced"
    swept = pd.read_parquet(out / "sweep.parquet")
    assert {(0, 1), (1, 2), (0, 0), (1, 1), (2, 2)} <= set(zip(swept["first"], swept["last"], strict=True))
    for first, last in ((0, 1), (1, 2)):
        assert f"| {first}–{last} |" in card
    assert "Do edits agree?" in (out / "report.html").read_text()
    assert (out / "figures" / "sweep.pdf").is_file() == (checkpoint.name == "llama")
    effects = pd.read_parquet(out / "effects.parquet")
    assert effects["fact"].nunique() == len(SUBJECTS)
    assert set(effects["kind"]) == {"state", "mlp", "attn"}

    times = {path: path.stat().st_mtime_ns for path in (out / "effects.parquet", out / "sweep.parquet")}
    monkeypatch.setattr(script, "run_figures", lambda folder: [])
    assert script.main() in (0, 3)
    assert {path: path.stat().st_mtime_ns for path in times} == times, "run again, it makes nothing twice"


def test_a_model_that_knows_none_of_the_facts_is_refused(script, make_hf, tokenizer, inputs, tmp_path, monkeypatch):
    make_hf("llama").save_pretrained(tmp_path / "random")
    tokenizer.save_pretrained(tmp_path / "random")
    words = ["select_layers.py", str(tmp_path / "random"), *inputs, "--quick", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(InputError, match="none of the 12 facts can be traced"):
        script.main()


def test_fewer_facts_than_selecting_needs_are_refused_before_they_are_traced(script, tmp_path, monkeypatch):
    words = ["select_layers.py", "tiny", "--quick", "--max-facts", "5", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(InputError, match="5 of the 5 facts can be traced, expected at least 10"):
        script.main()
    assert not (tmp_path / "out" / "trace_parts").exists(), "a trace was begun"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--by", "nope"], "by is 'nope'"),
        (["--rule", "nope"], "rule is 'nope'"),
        (["--width", "0"], "width is 0"),
        (["--width", "11"], "the width is 11, expected 1 to 10"),
        (["--max-facts", "0"], "--max-facts is 0, expected at least 1"),
        (["--tokens", "-1"], "--tokens is -1"),
        (["--seed", "-1"], "--seed is -1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused_before_facts_are_traced(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(script.pipeline, "trace_step", None)
    for added in (words, []):
        monkeypatch.setattr(sys, "argv", ["select_layers", "tiny", "--quick", "--out", str(tmp_path), *added])
        if added:
            with pytest.raises(InputError, match=message):
                script.main()
        else:
            with pytest.raises(TypeError):  # the control: without the option facts are traced
                script.main()


@pytest.mark.parametrize(("words", "tokens"), [([], 20_000), (["--tokens", "0"], None), (["--tokens", "500"], 500)])
def test_no_number_of_tokens_is_the_default_and_0_all_the_text(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], tokens: int | None
) -> None:
    class ReachedError(Exception):
        pass

    def validate(*arguments: Any) -> None:
        raise ReachedError(arguments[-1].tokens)

    selection = SimpleNamespace(reason="", layers=(1, 2))
    for name, step in (("trace", None), ("select", selection)):
        monkeypatch.setattr(script.pipeline, f"{name}_step", lambda *_, answer=step, **__: answer)
    monkeypatch.setattr(script.pipeline, "validate_step", validate)
    monkeypatch.setattr(sys, "argv", ["select_layers", "tiny", "--quick", "--out", str(tmp_path), *words])
    with pytest.raises(ReachedError) as caught:
        script.main()
    assert caught.value.args == (tokens,)
