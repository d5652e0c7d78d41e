"""What a character is to the text around it: whether its script writes spaces, whether anyone sees it."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right

_UNSPACED = (
    (0x0E00, 0x0E7F),  # Thai
    (0x0E80, 0x0EFF),  # Lao
    (0x0F00, 0x0FFF),  # Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x1950, 0x19DF),  # Tai Le, New Tai Lue
    (0x19E0, 0x19FF),  # Khmer symbols
    (0x1A20, 0x1AAF),  # Tai Tham
    (0x1B00, 0x1B7F),  # Balinese
    (0x2E80, 0x2FDF),  # Han radicals
    (0x2FF0, 0x312F),  # CJK punctuation, Hiragana, Katakana, Bopomofo
    (0x3190, 0x4DBF),  # Han extension A, Kanbun, strokes, enclosed letters
    (0x4E00, 0xA4CF),  # Han, Yi
    (0xA980, 0xA9FF),  # Javanese, Myanmar extended B
    (0xAA60, 0xAADF),  # Myanmar extended A, Tai Viet
    (0xF900, 0xFAFF),  # Han compatibility
    (0xFE30, 0xFE4F),  # CJK compatibility forms
    (0xFF00, 0xFF9F),  # full-width and half-width forms
    (0xFFE0, 0xFFEF),  # full-width signs
    (0x1AFF0, 0x1B16F),  # kana extensions
    (0x20000, 0x3FFFF),  # Han extensions B and later
)
"""First and last code points of the scripts that write no spaces between words, ascending."""
_FIRST = [first for first, _ in _UNSPACED]


def writes_spaces(character: str) -> bool:
    """Whether the script of a character writes spaces between words.

    Han, kana, Thai, Lao, Khmer, Burmese, Tibetan and some others do not; Hangul does.
    """
    index = bisect_right(_FIRST, ord(character)) - 1
    return index < 0 or ord(character) > _UNSPACED[index][1]


def is_invisible(character: str) -> bool:
    """Whether a character shows nothing by itself: white space, a control or format character."""
    # Cc, Cf: controls and formats (zero-width spaces and joiners, byte-order and direction marks, soft hyphens);
    # the fillers of Hangul are letters by category.
    return (
        character.isspace()
        or unicodedata.category(character) in ("Cc", "Cf", "Zs", "Zl", "Zp")
        or character in "\u115f\u1160\u3164\uffa0"
    )


def visible(text: str) -> str:
    """The text without white space and invisible characters at its ends."""
    start, end = 0, len(text)
    while start < end and is_invisible(text[start]):
        start += 1
    while end > start and is_invisible(text[end - 1]):
        end -= 1
    return text[start:end]
