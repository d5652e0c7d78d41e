"""The only place that imports transformer_lens or nnsight, or names a transformers class."""

from mechedit.models.kv_cache import KVCache
from mechedit.models.loading import load_model, transformers_model
from mechedit.models.protocol import Model, Patch, Resume, Run, Tokens
from mechedit.models.sites import EMBED, Module, Part, Site, out_part

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
    "transformers_model",
]
