"""Chat: prompts asked as a user's question, through the chat template that comes with a tokenizer.

A fact or request keeps its prompt; `turn` stands around it (system message, user's turn, begin of the assistant's) and
`joint` before its object, as the template writes them. So context templates stand within the question, and the subject
is found inside. A template that changes what it is given, as those that trim white space at its ends or write it as a
JSON string, changes the prompts, and where it must the subject.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeVar

from mechedit.data import EditRequest, Fact, fill, records_of
from mechedit.data.facts import NO_TURN
from mechedit.errors import InputError, brief
from mechedit.notices import warn

Prompted = TypeVar("Prompted", Fact, EditRequest)

_QUESTION, _ANSWER = "Where is it?", "Over there"
"""Stand for a question and its answer while the template is read."""
_OTHER_DAY = "{% macro strftime_now(format) %}another day{% endmacro %}"
"""In front of a template, it writes no date."""


def prompted(
    tokenizer: Any, items: Sequence[Prompted], *, chat: bool = False, joint: str | None = None
) -> list[Prompted]:
    """Facts or requests with the joint and the turn that a call asks for.

    Args:
        tokenizer: the model's; its chat template makes the turn.
        items: facts or requests. One that has a joint or a turn of its own keeps it.
        chat: ask each prompt as a user's question; the object begins the assistant's answer.
        joint: text between prompt and object; None lets the template, or the characters that meet, decide.

    Raises:
        InputError: `chat` with a tokenizer whose template does not show a question once, or that has none; a prompt
            that the template shows with something else around it, or in which it hides the subject.
    """
    known: Any = records_of(items, Fact, EditRequest)
    turn, turn_joint = chat_turn(tokenizer) if chat else (NO_TURN, None)
    default = turn_joint if joint is None else joint
    if chat:
        known = _as_shown(tokenizer, known, turn)
    return [
        dataclasses.replace(
            item,
            turn=turn if item.turn == NO_TURN else item.turn,
            joint=default if item.joint is None and item.turn in (NO_TURN, turn) else item.joint,
        )
        for item in known
    ]


def chat_turn(tokenizer: Any) -> tuple[str, str]:
    """The tokenizer's chat template around a question, with `{}` for it, and the text before the assistant's answer.

    A template that lets a model think first is asked not to (`enable_thinking=False`). A warning says where it writes
    the date, which makes the turn of another day another one; it comes once for each template.

    Raises:
        InputError: the tokenizer has no chat template, or one that does not show the question exactly once.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            "the tokenizer has no chat template, so prompts cannot be asked in a chat; expected an instruction-tuned "
            "model's: leave chat out, or write the turn into the prompts"
        )
    question = [{"role": "user", "content": _QUESTION}]
    shown = _render(tokenizer, question, generation=True)
    before, *after = shown.split(_QUESTION)
    if len(after) != 1 or "{}" in before + after[0]:
        raise InputError(
            f"the chat template makes {brief(shown)} of the question {_QUESTION!r}; expected it once, and no {{}} "
            f"beside "
            f"it: leave chat out, or write the turn into the prompts"
        )
    if _writes_date(tokenizer, question, shown):
        _warn_of_date(str(tokenizer.chat_template), f"{datetime.now():%d %b %Y}")
    answered = _render(tokenizer, [*question, {"role": "assistant", "content": _ANSWER}], generation=False)
    until_answer, answer, _ = answered.partition(_ANSWER)
    if not answer or until_answer.count(_QUESTION) != 1:
        return before + "{}" + after[0], ""
    if not until_answer.startswith(shown):
        # Where the turn begins otherwise, as with a thought, an answer stands where the history shows it.
        warn(
            f"the chat template begins an answer with {brief(after[0])}, and shows one that was given after "
            f"{brief(until_answer.partition(_QUESTION)[2])}; objects are put there"
        )
        return until_answer.replace(_QUESTION, "{}"), ""
    return before + "{}" + after[0], until_answer.removeprefix(shown)


@functools.cache
def _warn_of_date(template: str, day: str) -> None:
    """Say that a template writes the date, once a day for each template."""
    warn(
        f"the chat template writes the date into the turn ({day}), so what is computed today is of other prompts than "
        f"on another day, and is not reused then; to keep the day, give the records this turn as their `turn`"
    )


def _as_shown(tokenizer: Any, items: Sequence[Prompted], turn: str) -> list[Prompted]:
    """The items with their prompts as the template shows them; an item with a turn of its own stays.

    Raises:
        InputError: the template shows a prompt with something else around it, or hides the subject in it.
    """
    before, after = _render(tokenizer, [{"role": "user", "content": _QUESTION}], generation=True).split(_QUESTION)
    cache: dict[str, str] = {}

    def show(text: str) -> str:
        """What stands in the text's place."""
        if text not in cache:
            shown = _render(tokenizer, [{"role": "user", "content": text}], generation=True)
            if not (len(shown) >= len(before + after) and shown.startswith(before) and shown.endswith(after)):
                raise InputError(
                    f"the chat template makes {brief(shown)} of the question {brief(text)}; expected {brief(turn)}, as "
                    f"around another question: leave chat out, or write the turn into the records as their `turn`"
                )
            cache[text] = shown[len(before) : len(shown) - len(after)]
        return cache[text]

    return [item if item.turn != NO_TURN else _item_as_shown(item, show) for item in items]


def _item_as_shown(item: Prompted, show: Callable[[str], str]) -> Prompted:
    """The item, its prompts shown; its subject as it stands in them."""
    prompt, text = show(item.prompt), show(fill(item.prompt, item.subject))
    subjects = [item.subject, show(item.subject)] if item.subject.strip() else [item.subject]
    subject = next((s for s in subjects if prompt.count("{}") == 1 and s.strip() and fill(prompt, s) == text), None)
    if subject is None:
        raise InputError(
            f"{brief(item.id)}: the chat template makes {brief(text)} of the prompt {brief(item.prompt)} about "
            f"{brief(item.subject)}, in which the subject's place is not clear; expected the subject as it is, or as "
            f"the template shows it by itself: leave chat out, or write the turn into the records as their `turn`"
        )
    shown: dict[str, Any] = {"prompt": prompt, "subject": subject}
    if isinstance(item, EditRequest):
        shown |= {name: tuple(map(show, getattr(item, name))) for name in ("paraphrases", "generations")}
        shown["neighbors"] = tuple(
            dataclasses.replace(neighbor, prompt=show(neighbor.prompt)) for neighbor in item.neighbors
        )
    return dataclasses.replace(item, **shown)


def _writes_date(tokenizer: Any, messages: list[dict[str, str]], shown: str) -> bool:
    """Whether the template shows the messages otherwise on another day."""
    if "strftime_now" not in str(tokenizer.chat_template):
        return False
    template = _OTHER_DAY + tokenizer.get_chat_template(None, None)
    return _render(tokenizer, messages, generation=True, chat_template=template) != shown


def _render(tokenizer: Any, messages: list[dict[str, str]], *, generation: bool, **values: Any) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False, **values
        )
    except Exception as error:  # Templates are programs, and raise what they like.
        raise InputError(
            f"the chat template cannot show {messages} ({type(error).__name__}: {error!s:.300}); expected one that "
            f"takes a user's question as text: leave chat out, or write the turn into the prompts"
        ) from error
