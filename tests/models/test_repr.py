"""A model presents itself in one line, and as a table in a notebook."""

from __future__ import annotations

from typing import Any

from helpers.edits import random_edit

from mechedit.edit import apply_, edited, undo_
from mechedit.models import load_model


def test_a_model_presents_itself_in_one_line(make_hf: Any, tokenizer: Any, backend: str) -> None:
    model = load_model(make_hf("gpt_neo"), tokenizer=tokenizer, backend=backend)
    assert repr(model) == (
        f"<Model 'GPTNeoForCausalLM': family GPT-Neo, layers 4, width 32 (MLP 96), dtype float32, device cpu, "
        f"backend {backend}, edits go into the MLPs, edited no>"
    )
    assert "edits go into attention" in repr(model.writing("attn"))


def test_it_says_whether_it_is_edited(lens_model: Any) -> None:
    first = random_edit(lens_model, layers=(0,), ranks=(1,))
    assert "edited no" in repr(lens_model)
    with edited(lens_model, first):
        assert "edited yes (1 edit applied)" in repr(lens_model)
        assert "edited yes (1 edit applied)" in repr(lens_model.writing("attn")), "the weights are the same"
    assert "edited no" in repr(lens_model)
    apply_(lens_model, first)
    second = random_edit(lens_model, layers=(2,), ranks=(1,))
    apply_(lens_model, second)
    assert "edited yes (2 edits applied)" in repr(lens_model)
    undo_(lens_model, second)
    undo_(lens_model, first)
    assert "edited no" in repr(lens_model)


def test_a_notebook_shows_the_same_as_a_table(lens_model: Any) -> None:
    page = lens_model._repr_html_()
    for text in ("GPT-2", "float32", "cpu", "transformer_lens", "32 (MLP 96)"):
        assert f">{text}</td>" in page
    assert page.count("<tr>") == page.count("</tr>") == 8
    lens_model.name, name = "<b>", lens_model.name
    try:
        assert "<caption>&lt;b&gt;</caption>" in lens_model._repr_html_()
    finally:
        lens_model.name = name
