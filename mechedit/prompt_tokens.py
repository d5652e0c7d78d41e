"""From text to tokens: the subject's tokens in a prompt, and the object's tokens after it.

One function decides where a prompt meets its object, for tracing, targets, training and evaluation (`complete`): the
object's tokens are those that prompt + joint + object has after the prompt's. Spans come from the tokenizer's
character offsets, so merges across a boundary, BOS tokens and CJK text need no special care.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from mechedit.data import EditRequest, check_template, fill
from mechedit.data.characters import visible
from mechedit.data.joint import following
from mechedit.errors import InputError, brief
from mechedit.notices import warn

_SAID: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()
"""Warnings that were given, by tokenizer."""
TOKENS = ("subject_last", "subject_first", "after", "last")
"""The tokens at which a method can write: of the subject, the first after it, and the prompt's last one; these of the
roles of a trace (ROME Fig. 5)."""
WORD = "a"
"""A word that a text follows where its tokens in running text are looked for."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A tokenized prompt and the tokens of its subject."""

    ids: tuple[int, ...]
    subject: range
    """Token positions that hold any character of the subject."""

    @property
    def last_subject(self) -> int:
        """Position of the subject's last token, where MEMIT edits."""
        return self.subject[-1]

    def position(self, token: str) -> int:
        """Position of the token at which a method writes.

        Args:
            token: one of `TOKENS`, or a negative number that counts from the prompt's end, such as "-2".

        Raises:
            InputError: the prompt has no such token.
        """
        end = len(self.ids)
        index = int(token) if token.removeprefix("-").isdecimal() else None
        position = {
            "subject_first": self.subject[0], "subject_last": self.subject[-1], "after": self.subject[-1] + 1,
            "last": end - 1,
        }.get(token) if index is None else end + index  # fmt: skip
        if position is None or not 0 <= position < end:
            raise InputError(
                f"a prompt of {end} tokens, whose subject ends at the {self.subject[-1] + 1}. of them, has no token "
                f"{token!r}, expected one that it has: choose another of {', '.join(TOKENS)}, or reword the prompt"
            )
        return position


@dataclass(frozen=True)
class Completion:
    """The tokens of a text in two parts: those before the object, and the object's."""

    prompt: list[int]
    """The prompt's tokens; where the tokenizer merges across the joint, those of the joined text before the object."""
    target: list[int]
    """Tokens that hold the joint and the object."""

    @property
    def ids(self) -> list[int]:
        """Tokens of prompt and object."""
        return self.prompt + self.target


Encoded = tuple[list[int], list[tuple[int, int]]]
"""Token ids of a text, and each token's character span."""


def encode(tokenizer: Any, text: str) -> Encoded:
    """Token ids of `text` to be continued, and each token's character span.

    Special tokens that the tokenizer puts in front stay, unless the text brings its own; those that it appends, such as
    an end of text, are taken off, because the text goes on. A warning says so.
    """
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Any, texts: Sequence[str]) -> list[Encoded]:
    """`encode` of each text, in one call of the tokenizer."""
    if not len(texts):
        return []
    encoded = tokenizer(list(texts), return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [_continued(tokenizer, list(ids), [tuple(span) for span in spans]) for ids, spans in pairs]


def _continued(tokenizer: Any, ids: list[int], spans: list[tuple[int, int]]) -> Encoded:
    """A text's tokens and spans as far as it goes on (`continued`)."""
    chosen = continued(tokenizer, ids, spans)
    return ids[chosen], spans[chosen]


def encode_documents(tokenizer: Any, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Token ids of each text, of at most `max_length` tokens, with special tokens as by `encode`."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return [list(ids[continued(tokenizer, ids, spans)]) for ids, spans in pairs]


def continued(tokenizer: Any, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> slice:
    """The tokens of a text that goes on: without appended special tokens, and with one beginning token at most.

    Args:
        tokenizer: knows which ids are special.
        ids: of the text, with the special tokens that the tokenizer adds.
        spans: each token's characters; of an added token, none.
    """
    start, stop = 0, len(ids)
    if not ids or (spans[0][1] and spans[-1][1]):
        return slice(start, stop)
    special = set(tokenizer.all_special_ids)
    added = [token in special and not end for token, (_, end) in zip(ids, spans, strict=True)]
    while stop > 0 and added[stop - 1] and not all(added[:stop]):
        stop -= 1
    n_front = next((i for i, is_added in enumerate(added) if not is_added), stop)
    if n_front and list(ids[:n_front]) == list(ids[n_front : 2 * n_front]):
        start = n_front
        _say_once(tokenizer, "a text brings its own beginning token, so the tokenizer's is left out (said once)")
    if stop < len(ids):
        _say_once(
            tokenizer,
            f"the tokenizer appends {tokenizer.convert_ids_to_tokens(list(ids[stop:]))} to every text; it is taken "
            f"off, because prompts go on with their objects (said once)",
        )
    return slice(start, stop)


def tokenize_prompt(tokenizer: Any, template: str, subject: str) -> Prompt:
    """Tokenize `template` with `subject` in its `{}` and find the subject's tokens by character offsets.

    White space and invisible characters at the subject's ends are not the subject.

    Raises:
        InputError: the template lacks its one `{}`, or no token holds the subject.
    """
    return tokenize_prompts(tokenizer, [template], subject)[0]


def tokenize_prompts(tokenizer: Any, templates: Sequence[str], subject: str) -> list[Prompt]:
    """`tokenize_prompt` of each template, in one call of the tokenizer."""
    places = [_locate(template, subject) for template in templates]
    encoded = encode_texts(tokenizer, [text for text, _, _ in places])
    return [
        Prompt(ids=tuple(ids), subject=_holding(spans, start, end, text, subject))
        for (ids, spans), (text, start, end) in zip(encoded, places, strict=True)
    ]


def complete(tokenizer: Any, prompt: str, text: str) -> Completion:
    """Tokenize a prompt and the text that follows it, joint included (`following`), and tell the two apart.

    The text's tokens are those that prompt + text has after the prompt's. Where the tokenizer merges across the joint,
    they are the tokens of the joined text that hold any of its characters, and a warning says so.

    Raises:
        InputError: the prompt or the text gives no tokens.
    """
    return complete_pairs(tokenizer, [(prompt, text)])[0]


def complete_pairs(tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> list[Completion]:
    """`complete` of each prompt and text, in two calls of the tokenizer; a prompt of several pairs is read once.

    Raises:
        InputError: as `complete`, of the first pair that cannot be told apart.
    """
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    prompt_ids = {prompt: ids for prompt, (ids, _) in zip(prompts, encode_texts(tokenizer, prompts), strict=True)}
    joined = encode_texts(tokenizer, [prompt + text for prompt, text in pairs])
    return [
        _complete(tokenizer, prompt, prompt_ids[prompt], text, encoded)
        for (prompt, text), encoded in zip(pairs, joined, strict=True)
    ]


def complete_fact(
    tokenizer: Any, template: str, subject: str, target: str, joint: str | None = None
) -> tuple[Prompt, list[int]]:
    """Tokenize a prompt about a subject, and the object that follows it.

    Args:
        tokenizer: the model's.
        template: the prompt with one {} for the subject.
        subject: what to find in it.
        target: the object.
        joint: text between prompt and object; None lets the characters that meet decide.

    Returns:
        The prompt, whose tokens are those of the joined text before the object's, and the object's tokens.

    Raises:
        InputError: as `tokenize_prompt` and `complete`; or the tokenizer merges the subject's end with the object.
    """
    return complete_facts(tokenizer, [template], subject, target, joint)[0]


def complete_facts(
    tokenizer: Any, templates: Sequence[str], subject: str, target: str, joint: str | None
) -> list[tuple[Prompt, list[int]]]:
    """`complete_fact` of each template, in two calls of the tokenizer."""
    prompts, texts = tokenize_prompts(tokenizer, templates, subject), [fill(text, subject) for text in templates]
    endings = [following(text, _nonempty(target), joint) for text in texts]
    joined = encode_texts(tokenizer, [text + ending for text, ending in zip(texts, endings, strict=True)])
    completed = []
    for prompt, text, ending, encoded in zip(prompts, texts, endings, joined, strict=True):
        completion = _complete(tokenizer, text, list(prompt.ids), ending, encoded)
        if tuple(completion.prompt[: prompt.subject.stop]) != prompt.ids[: prompt.subject.stop]:
            raise InputError(
                f"the tokenizer merges the end of the subject {brief(subject)} in {brief(text)} with the object "
                f"{brief(target)}, so "
                f"neither has tokens of its own; expected text between them: end the prompt with another word, or "
                f"give a joint"
            )
        completed.append((Prompt(ids=tuple(completion.prompt), subject=prompt.subject), completion.target))
    return completed


def continuation_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids that a text has after a word of running text, without special tokens.

    The object of a prompt is tokenized behind that prompt (`complete`); this is for texts by themselves.

    Raises:
        InputError: the text gives no tokens.
    """
    return complete(tokenizer, WORD, following(WORD, _nonempty(text))).target


def one_spelling(tokenizer: Any, requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests with one spelling per subject: subjects that give the same tokens are the same subject."""
    tokens = {
        subject: tuple(continuation_ids(tokenizer, visible(subject) or subject))
        for subject in dict.fromkeys(request.subject for request in requests)
    }
    spelling = {ids: subject for subject, ids in reversed(tokens.items())}
    return [replace(request, subject=spelling[tokens[request.subject]]) for request in requests]


def _say_once(tokenizer: Any, message: str) -> None:
    """Warn of what a tokenizer does, once for each tokenizer: filters are put back between the calls of a step."""
    messages = _SAID.setdefault(tokenizer, set())
    if message not in messages:
        messages.add(message)
        warn(message)


def _nonempty(text: str) -> str:
    if not text.strip():
        raise InputError(f"the object {brief(text)} gives no tokens; expected text that is not empty")
    return text


def _complete(tokenizer: Any, prompt: str, prompt_ids: list[int], text: str, joined: Encoded) -> Completion:
    """The completion of a prompt whose ids are known, as are the tokens of prompt + text."""
    ids, spans = joined
    start = len(prompt_ids)
    # Two different words may both be unknown, and so have the same id: the characters are compared as well.
    if ids[:start] != prompt_ids or any(end > len(prompt) for _, end in spans[:start]):
        begin = len(prompt) + len(text) - len(text.lstrip(" \t"))
        start = next((i for i, (a, b) in enumerate(spans) if b > begin and b > a), len(ids))
        _say_once(
            tokenizer,
            "the tokenizer merges the end of a prompt with what follows: the tokens of the joined text that hold the "
            "object are scored; where that is not meant, end the prompt otherwise or give a joint (said once)",
        )
    if start >= len(ids):
        raise InputError(f"the object {brief(text)} gives no tokens; expected text that is not empty")
    if not start:
        raise InputError(
            f"the prompt {brief(prompt)} gives no tokens of its own before {brief(text)}; expected a prompt that is "
            f"not empty, "
            f"and that the tokenizer does not merge with what follows: fill it in, or end it with another word"
        )
    return Completion(ids[:start], ids[start:])


def _locate(template: str, subject: str) -> tuple[str, int, int]:
    """The text with the subject in it, and where the subject's visible characters begin and end."""
    check_template(template, "prompt")
    before, after = template.split("{}")
    shown = visible(subject)
    start = len(before) + (subject.index(shown) if shown else 0)
    return before + subject + after, start, start + len(shown)


def _holding(spans: Sequence[tuple[int, int]], start: int, end: int, text: str, subject: str) -> range:
    """Positions of the tokens that hold any of these characters.

    Raises:
        InputError: there is none.
    """
    positions = [i for i, (a, b) in enumerate(spans) if a < end and b > start and b > a]
    if not positions:
        raise InputError(
            f"no token of {brief(text)} holds the subject {brief(subject)}; expected a subject of at least one "
            f"token: check the "
            f"subject's text"
        )
    return range(positions[0], positions[-1] + 1)


def check_token(token: str, name: str = "token") -> None:
    """Refuse what names no token of a prompt, see `Prompt.position`; `name` is what the message calls it."""
    if token not in TOKENS and not (isinstance(token, str) and re.fullmatch("-[0-9]{1,6}", token)):
        raise InputError(
            f"{name} is {brief(token)}, expected one of {', '.join(TOKENS)}, or a negative number that counts from the "
            f"prompt's end, such as '-2'; choose one of them"
        )
