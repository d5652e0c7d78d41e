"""Why a model cannot be used, or used in part: the reasons, each with its category."""

from __future__ import annotations

from typing import Literal, get_args

from mechedit.errors import InputError

Category = Literal[
    "no causal language model",
    "encoder and decoder",
    "quantized",
    "norm on the residual stream",
    "several residual streams",
    "blocks that do not add up",
    "no MLP of its own",
    "state handed between blocks",
    "not causal",
    "does not run on text alone",
    "mixture of experts",
    "no matrix of its own",
    "no TransformerLens adapter",
    "no tensor parallel plan",
    "TransformerLens differs",
    "a package is absent",
    "failed self-check",
]
CATEGORIES: tuple[str, ...] = get_args(Category)


class UnsupportedModelError(InputError):
    """A model that cannot be used; `category` says in a few words why, the message what was found and what to do."""

    def __init__(self, category: Category, message: str) -> None:
        super().__init__(message)
        self.category = category
