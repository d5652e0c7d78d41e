"""Characters: scripts that write spaces, and characters that nobody sees."""

import pytest

from mechedit.data.characters import visible, writes_spaces


@pytest.mark.parametrize("character", "aÉщعह한カ。國ไທខမ1?é😀𠀀")
def test_scripts_without_spaces(character: str) -> None:
    assert writes_spaces(character) == (character not in "カ。國ไທខမ𠀀")


@pytest.mark.parametrize(
    "edge", ["", " ", "\u200b", "\ufeff", "\u00ad", "\u200f", "\u00a0", "\u2060", "\n", " \u200b "]
)
def test_invisible_characters_at_the_ends_are_taken_off(edge: str) -> None:
    assert visible(f"{edge}New\u200b York{edge}") == "New\u200b York"
    assert visible(edge) == ""


@pytest.mark.parametrize("text", ["é", "e\u0301", "ไทยก็", "नि", "👩\u200d🔬", "a", "?"])
def test_marks_that_belong_to_a_letter_stay(text: str) -> None:
    assert visible(text) == text
