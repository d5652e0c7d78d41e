"""The joint: the text between a prompt and the object that follows it, decided by the two characters that meet.

Most scripts put a space between words, but nothing follows an opening quote, and Chinese writes no spaces at all. An
object scored behind the wrong joint is another object to the model, so one rule serves every user of prompts.
"""

from __future__ import annotations

import re
import unicodedata

from mechedit.data.characters import writes_spaces

TIGHT_AFTER = frozenset("/\\@¿¡")
"""Characters, besides opening brackets and quotes, hyphens and currency signs, that nothing separates from the next."""
TIGHT_BEFORE = frozenset("!%,.:;?…‰/\\،؛؟।॥։·።፣")
"""Characters, besides closing brackets and quotes, that nothing separates from the one before."""
_STRAIGHT = "\"'`"
_SPACED_DASHES = "–—―"
_TURN_END = re.compile(
    r"<[|｜][^<>\s]{1,40}[|｜]>$|</?s>$|<[a-z]+(?:_[a-z]+)+>$|</?think>$|\[/?(?:INST|SYS|SYSTEM_PROMPT)\]$"
)
"""A control token at a prompt's end, such as <|im_end|>, </s>, <end_of_turn> or [/INST]."""
_ELISION = re.compile(
    r"(?<![\w'’])(?:[cdjlmnst]|qu|un|(?:dell|nell|all|dall|sull|jusqu|lorsqu|puisqu|quelqu))['’]$", re.I
)
"""An elided word of French or Italian at a prompt's end, such as the l' of l'Italie."""
_CLITIC = re.compile(r"['’](?:[sdmt]|ll|re|ve)(?:$|[.,;:!?]|\s+[^\W\dA-Z])")
"""An English ending that is written to the word before it, such as 's."""


def joint_of(prompt: str, text: str) -> str:
    """The joint of a prompt and the text that follows: one space, or nothing.

    A space stands between words of scripts that write spaces. Nothing stands after white space, an opening quote or
    bracket, a hyphen, `/ $ # @` and their like, an elision (l') or a chat template's control token; before white space,
    combining marks, closing punctuation and endings such as 's or -born; and next to a character of a script that
    writes no spaces (Chinese, Japanese, Thai, Lao, Khmer), whatever stands on the other side.
    """
    if not prompt or not text or prompt[-1].isspace() or text[0].isspace():
        return ""
    if unicodedata.category(text[0]) in ("Mn", "Mc", "Me"):
        return ""
    last, first = _letter(prompt[::-1]), _letter(text)
    if not writes_spaces(last) or not writes_spaces(first):
        return ""
    return "" if _is_tight_end(prompt, last) or _is_tight_start(text, first) else " "


def following(prompt: str, text: str, joint: str | None = None) -> str:
    """The text as it follows the prompt, joint included.

    Blanks around the text are taken off, but leading line breaks are kept, which their author wrote.

    Args:
        prompt: what stands before.
        text: an object.
        joint: text between the two; None lets `joint_of` decide.
    """
    blanks = text[: len(text) - len(text.lstrip())]
    text = text.rstrip() if "\n" in blanks else text.strip()
    return (joint_of(prompt, text) if joint is None else joint) + text


def _letter(text: str) -> str:
    """The first character that shows: marks and format characters stand on the letter beside them."""
    return next((letter for letter in text if unicodedata.category(letter) not in ("Mn", "Me", "Cf")), text[0])


def _is_tight_end(prompt: str, last: str) -> bool:
    if last in _STRAIGHT or last in "’”":
        # A straight quote opens where a word could begin, and so does a quote that no word stands before.
        before = prompt.rstrip()[:-1]
        opens = not before or before[-1].isspace() or unicodedata.category(before[-1]) in ("Ps", "Pi", "Pd", "Sc")
        return (opens and last in _STRAIGHT) or bool(_ELISION.search(prompt))
    category = unicodedata.category(last)
    if category == "Pd":
        return last not in _SPACED_DASHES or not prompt[:-1].endswith(" ")
    if category == "Sc" or last == "#":
        # `$` before a number, and `C#` or `5 €` before a word.
        return not re.search(r"(?:\w|\d\s)$", prompt[:-1])
    return category in ("Ps", "Pi") or last in TIGHT_AFTER or bool(_TURN_END.search(prompt))


def _is_tight_start(text: str, first: str) -> bool:
    category = unicodedata.category(first)
    if category == "Pf" or first in _STRAIGHT:
        return bool(_CLITIC.match(text)) or (category == "Pf" and len(text) == 1)
    if first in TIGHT_BEFORE and first in ".!?…/\\":
        # `.NET`, `.5` and `!!!` are words of their own, where `. Then` ends one.
        return not re.match(r"[.!?…/\\]+\w|[!?]{2}", text)
    # A minus stands before a number; a hyphen goes on with a word.
    return category in ("Pe", "Pf") or first in TIGHT_BEFORE or (category == "Pd" and text[1:2].isalpha())
