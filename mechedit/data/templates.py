"""Prompts with `{}` for the subject, from prompts that hold it: once, and as whole words."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from mechedit.data.characters import writes_spaces
from mechedit.data.json_records import UnclearRecordError
from mechedit.errors import brief

JOINER = "\u200d"
"""Zero-width joiner, which makes one of the characters at its sides."""
GLUE = f"\u00ad\u200c{JOINER}\u2060\ufe0e\ufe0f"
"""Soft hyphen, zero-width non-joiner and joiners, variation selectors: they stand within words."""


def template_of(text: str, subject: str, location: str) -> str:
    """A prompt that holds either one `{}` or the subject, as a template.

    Raises:
        UnclearRecordError: it holds neither, or more than one of either.
    """
    count = text.count("{}")
    if count > 1:
        raise UnclearRecordError(
            f"{location}: the prompt {brief(text)} holds {count} times '{{}}', expected exactly one; put {{}} where "
            f"the "
            f"subject goes",
            "no clear place for the subject: more than one {}",
        )
    return text if count else make_template(text, subject, location)


def make_template(text: str, subject: str, location: str) -> str:
    """Put `{}` in place of the subject in a prompt, in which it must occur once as whole words.

    Args:
        text: prompt with the subject filled in.
        subject: the subject.
        location: location of the record, for messages.

    Raises:
        UnclearRecordError: the subject does not occur, only within longer words, or more than once.
    """
    starts = list(_occurrences(text, subject))
    words = [start for start in starts if _is_whole(text, start, start + len(subject))]
    if len(words) == 1:
        return text[: words[0]] + "{}" + text[words[0] + len(subject) :]
    remedy = "fix or drop the record, or give the prompt with {} for the subject"
    if starts and not words:
        longer = _surrounding_word(text, starts[0], starts[0] + len(subject))
        raise UnclearRecordError(
            f"{location}: the subject {brief(subject)} occurs in the prompt {brief(text)} only within the longer word "
            f"{brief(longer)}, expected whole words; {remedy}",
            "no clear place for the subject: within a longer word",
        )
    composed = [unicodedata.normalize("NFC", part) for part in (text, subject)]
    if not starts and composed[1] in composed[0]:
        raise UnclearRecordError(
            f"{location}: the subject {brief(subject)} is in the prompt {brief(text)} with its accents composed "
            f"otherwise "
            f"(Unicode's NFC and NFD look the same), expected one spelling; {remedy}",
            "no clear place for the subject: composed otherwise",
        )
    raise UnclearRecordError(
        f"{location}: the subject {brief(subject)} occurs {len(words)} times in the prompt {brief(text)}, expected "
        f"once; "
        f"{remedy}",
        f"no clear place for the subject: {len(words)} of them",
    )


def _occurrences(text: str, subject: str) -> Iterator[int]:
    """Where the subject begins in a text, overlapping occurrences included."""
    start = text.find(subject)
    while start >= 0:
        yield start
        start = text.find(subject, start + 1)


def _is_whole(text: str, start: int, end: int) -> bool:
    """Whether no word goes on across either end of text[start:end]."""
    # In Korean, particles follow a word directly.
    particle = _is_hangul(text[end : end + 1])
    return not _goes_on(text, start) and (particle or not _goes_on(text, end))


def _goes_on(text: str, index: int) -> bool:
    """Whether the characters before and after `index` are of one word.

    Where a script writes no spaces, words have no ends that could be seen.
    """
    before, after = text[:index].rstrip(GLUE), text[index:].lstrip(GLUE)
    if not before or not after:
        return False
    previous, following = _base(before), after[0]
    if _is_mark(following) or JOINER in text[len(before) : len(text) - len(after)]:
        return not (previous.isspace() or following.isspace())
    return all(_in_word(character) and writes_spaces(character) for character in (previous, following))


def _base(text: str) -> str:
    """The last character, or the letter that it is a mark on."""
    return next((character for character in reversed(text) if not _is_mark(character)), text[-1])


def _in_word(character: str) -> bool:
    return character.isalnum() or character == "_" or _is_mark(character)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _is_hangul(character: str) -> bool:
    return "\uac00" <= character <= "\ud7a3"


def _surrounding_word(text: str, start: int, end: int) -> str:
    while start > 0 and _in_word(text[start - 1]):
        start -= 1
    while end < len(text) and _in_word(text[end]):
        end += 1
    return text[start:end]
