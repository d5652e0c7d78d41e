"""Token ids and the rows of the embedding: a tokenizer may know more tokens than the model, as long as text gives none.

Gemma 3's text models have no row for the token of an image, and a padding token is often added to a tokenizer alone.
Padding is looked up all the same, so a run looks up id 0 there; positions that are masked decide nothing.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from mechedit.errors import InputError


def check_tokenizer(tokenizer: Any, rows: int, name: str) -> None:
    """Refuse a tokenizer that is none for this model.

    Args:
        tokenizer: a transformers tokenizer, or None.
        rows: of the model's embedding.
        name: of the model.

    Raises:
        InputError: none, or one without character offsets; ordinary text gives ids without a row, or no ids at all.
    """
    if tokenizer is None:
        raise InputError(
            f"the loaded model {name!r} came without its tokenizer; expected both: "
            f"call load_model(model, tokenizer=...)"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"the tokenizer of {name!r} is a {type(tokenizer).__name__} that gives no character offsets; "
            f"expected a fast tokenizer (with a tokenizer.json): convert it, or pass tokenizer=..."
        )
    without_row = [index for index in _ids_of_text(tokenizer) if index >= rows]
    if without_row:
        raise InputError(
            f"the tokenizer of {name!r} has {len(tokenizer)} tokens, but the model has {rows} embeddings, and text "
            f"gives ids without one (such as {min(without_row)}, {_token(tokenizer, min(without_row))!r}); expected "
            f"the model's own tokenizer: pass that one, or resize the model's embedding to it"
        )
    # From a folder without tokenizer files, transformers makes one with an empty vocabulary.
    if not tokenizer("The Eiffel Tower", add_special_tokens=False)["input_ids"]:
        raise InputError(
            f"the tokenizer of {name!r} turns text into no tokens; expected the model's own tokenizer: put "
            f"its files (tokenizer.json, tokenizer_config.json) into the folder, or pass tokenizer=..."
        )


def has_tokens_without_row(tokenizer: Any, rows: int) -> bool:
    """Whether the tokenizer has tokens that the embedding of so many rows lacks; ordinary text gives none of them."""
    return max(tokenizer.get_vocab().values(), default=0) >= rows


def check_ids(ids: Int[Tensor, "*batch"], rows: int, tokenizer: Any) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        ids: token ids, without padding.
        rows: of the model's embedding.
        tokenizer: names the token in the message.

    Raises:
        InputError: names the first such token.
    """
    without_row = ids[ids >= rows].tolist()
    if without_row:
        raise InputError(
            f"a text holds the token {_token(tokenizer, without_row[0])!r} (id {without_row[0]}), for which the model "
            f"has no embedding (it has {rows}); expected text without it: take it out of the prompt or object"
        )


def padded_with_rows(
    ids: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"], rows: int, tokenizer: Any
) -> Int[Tensor, "batch pos"]:
    """The ids with 0 in place of padding without a row.

    Raises:
        InputError: a token that is not padding has no row.
    """
    check_ids(ids[mask.to(ids.device) != 0], rows, tokenizer)
    return ids.masked_fill(ids >= rows, 0)


def _ids_of_text(tokenizer: Any) -> set[int]:
    """Ids that text without added tokens can give, and those that the tokenizer puts around every text."""
    backend = tokenizer.backend_tokenizer
    ordinary = set(backend.get_vocab(with_added_tokens=False).values()) - set(backend.get_added_tokens_decoder())
    return ordinary | set(tokenizer("The Eiffel Tower")["input_ids"])


def _token(tokenizer: Any, index: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(index))
