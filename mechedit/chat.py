"""Chat: prompts asked as a user's question, through the chat template that comes with a tokenizer.

A fact or request keeps its prompt; `turn` stands around it (system message, user's turn, begin of the assistant's) and
`joint` before its object, as the template writes them. So context templates stand within the question, and the subject
is found inside.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, TypeVar

from mechedit.data import EditRequest, Fact
from mechedit.data.facts import NO_TURN
from mechedit.errors import InputError

Prompted = TypeVar("Prompted", Fact, EditRequest)

_QUESTION, _ANSWER = "Where is it?", "Over there"
"""Stand for a question and its answer while the template is read."""


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
        InputError: `chat` with a tokenizer whose template does not show a question once, or that has none.
    """
    if isinstance(items, str) or not all(isinstance(item, Fact | EditRequest) for item in items):
        raise InputError(
            f"the facts or requests are {items!r:.80}, expected a list of Fact or EditRequest: read them with "
            f"load_facts or load_requests"
        )
    turn, turn_joint = chat_turn(tokenizer) if chat else (NO_TURN, None)
    default = turn_joint if joint is None else joint
    return [
        dataclasses.replace(
            item,
            turn=turn if item.turn == NO_TURN else item.turn,
            joint=default if item.joint is None and item.turn in (NO_TURN, turn) else item.joint,
        )
        for item in items
    ]


def chat_turn(tokenizer: Any) -> tuple[str, str]:
    """The tokenizer's chat template around a question, with `{}` for it, and the text before the assistant's answer.

    A template that lets a model think first is asked not to (`enable_thinking=False`).

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
            f"the chat template makes {shown!r} of the question {_QUESTION!r}; expected it once, and no {{}} beside "
            f"it: leave chat out, or write the turn into the prompts"
        )
    answered = _render(tokenizer, [*question, {"role": "assistant", "content": _ANSWER}], generation=False)
    until_answer, answer, _ = answered.partition(_ANSWER)
    if not answer or until_answer.count(_QUESTION) != 1:
        return before + "{}" + after[0], ""
    if not until_answer.startswith(shown):
        # Where the turn begins otherwise, as with a thought, an answer stands where the history shows it.
        warnings.warn(
            f"the chat template begins an answer with {after[0]!r}, and shows one that was given after "
            f"{until_answer.partition(_QUESTION)[2]!r}; objects are put there",
            stacklevel=2,
        )
        return until_answer.replace(_QUESTION, "{}"), ""
    return before + "{}" + after[0], until_answer.removeprefix(shown)


def _render(tokenizer: Any, messages: list[dict[str, str]], *, generation: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False
        )
    except Exception as error:  # Templates are programs, and raise what they like.
        raise InputError(
            f"the chat template cannot show {messages} ({type(error).__name__}: {error}); expected one that takes a "
            f"user's question as text: leave chat out, or write the turn into the prompts"
        ) from error
