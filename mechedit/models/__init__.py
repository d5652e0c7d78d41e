"""The only place that imports transformer_lens or nnsight, or names a transformers class."""

from mechedit.models.loading import load_model
from mechedit.models.protocol import EMBED, KVCache, Model, Module, Part, Patch, Resume, Run, Site, Tokens, out_part

__all__ = [
    "EMBED",
    "KVCache",
    "Model",
    "Module",
    "Part",
    "Patch",
    "Resume",
    "Run",
    "Site",
    "Tokens",
    "load_model",
    "out_part",
]
