"""The one language of severing labels: read by `Sever.parse`, written by `label` and, for people, by `in_words`."""

from __future__ import annotations

import pytest

from mechedit import InputError
from mechedit.trace import ROLES, Sever, sever_in_words


def test_severing_labels_are_read_back() -> None:
    for label in ("nothing", "mlp", "attn", "mlp@3", "mlp@2-4+7", "attn:last", "mlp@1:subject_last+after", "mlp:-2"):
        assert Sever.parse(label).label == label
    assert Sever.parse("mlp@4+2+3").label == "mlp@2-4"
    assert Sever(module="mlp", layers=(1, 2)).label == "mlp@1-2"
    assert Sever.parse("mlp:-2+subject_last").at(["subject_first", "subject_last", "after", "last"]) == (1, 2)
    for bad in ("both", "mlp@", "mlp@3-1", "mlp:tail", "nothing@2", "mlp@x", "mlp@1,3", "mlp@-1", "mlp@3--1", "mlp:"):
        with pytest.raises(InputError, match="sever holds"):
            Sever.parse(bad)
    with pytest.raises(InputError, match="names layer 9, expected 0 to 2"):
        Sever.parse("mlp@9").through(3)
    with pytest.raises(InputError, match="position 9 of a prompt of 4"):
        Sever.parse("mlp:9").at(["before"] * 4)


def test_severings_in_words() -> None:
    words = {
        "nothing": "nothing severed",
        "mlp": "MLP severed",
        "attn": "attention severed",
        "mlp@3": "MLP severed, layer 3",
        "attn@2-4": "attention severed, layers 2–4",
        "mlp@2+7": "MLP severed, layers 2 and 7",
        "mlp@1+3": "MLP severed, layers 1 and 3",
        "mlp@2-4+7": "MLP severed, layers 2–4 and 7",
        "mlp@1+3+5-6": "MLP severed, layers 1, 3 and 5–6",
        "mlp@3:after": "MLP severed, layer 3, at the first token after the subject",
        "attn:last": "attention severed at the last token",
        "attn:subject_last": "attention severed",
        "mlp:subject_last+after": "MLP severed at the last subject token and the first token after the subject",
        "mlp@1-2:before+2+last": "MLP severed, layers 1–2, "
        "at the tokens before the subject, position 2 and the last token",
        "mlp:0": "MLP severed at position 0",
        "mlp:-2": "MLP severed at position 2 from the end",
        "custom": "custom severed",
        "mlp@1,3": "mlp@1,3 severed",
    }
    assert {label: sever_in_words(label) for label in words} == words


@pytest.mark.parametrize("module", ["mlp", "attn"])
def test_every_place_has_words_of_its_own(module: str) -> None:
    places = [*ROLES, 0, 3, -1, -3]
    words = [Sever.parse(f"{module}:{role_or_position}").in_words() for role_or_position in places]
    assert len(set(words)) == len(places)
    for role_or_position, text in zip(places, words, strict=True):
        assert "_" not in text
        assert text.startswith({"mlp": "MLP severed", "attn": "attention severed"}[module])
        assert Sever(module=module, places=(role_or_position,)).in_words() == text
