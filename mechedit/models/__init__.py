"""The only place that imports transformer_lens or nnsight, or names a transformers class."""

from mechedit.models.base import EMBED, Model, Module, Part, Patch, Prefix, Resume, Run, Site, Tokens, out_part
from mechedit.models.cost import spare_tokens
from mechedit.models.loading import load_model

__all__ = [
    "EMBED",
    "Model",
    "Module",
    "Part",
    "Patch",
    "Prefix",
    "Resume",
    "Run",
    "Site",
    "Tokens",
    "load_model",
    "out_part",
    "spare_tokens",
]
