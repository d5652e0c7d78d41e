"""mechedit finds where a language model stores its facts, and rewrites them there.

    facts      = load_facts("known")                         what the model should know
    model      = load_model("tiny")                          or "gpt2-xl", a folder, a loaded model
    effects    = trace_facts(model, facts, TraceConfig(sever=("nothing", "mlp", "attn")))
    selection  = select_layers(effects)                      the critical layers, with their evidence
    moments    = collect_moments(model, texts, selection.layers)          E[k kᵀ] of the MLP keys
    edit       = memit(model, requests, selection.layers, moments)        targets z, spread over the layers
    with edited(model, edit):                                exact restore on leaving
        scores = evaluate(model, requests)                   ES, PS, NS, S, GE, exact match, …
    apply_(model, edit); edit.save("edit.safetensors"); undo_(model, edit)

The papers: Locating and Editing Factual Associations in GPT (ROME, 2022) and Mass-Editing Memory in a
Transformer (MEMIT, 2023).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mechedit.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """A module of the package, or a name of `mechedit.api`.

        To import all of it takes seconds. So the package by itself imports nothing, and `python -m mechedit` comes at
        once to where it answers an interrupt.
        """
        from importlib import import_module
        from importlib.util import find_spec

        if not name.startswith("__") and find_spec(f"{__name__}.{name}") is not None:
            return import_module(f"{__name__}.{name}")
        if not name.startswith("__") or name in ("__all__", "__version__"):
            api = import_module(f"{__name__}.api")
            if hasattr(api, name):
                value = globals()[name] = getattr(api, name)
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        from mechedit import api

        return sorted({*globals(), *api.__all__})
