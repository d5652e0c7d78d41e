"""The state in which a model computes what its numbers are said to be: without dropout, and in its own dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def plain_state(model: Any) -> Iterator[None]:
    """Let a model compute without dropout and without autocast; its mode and the caller's are theirs again afterwards.

    Args:
        model: of transformers inside, in training mode perhaps, as one is that was just made, or is being trained.
    """
    hf: Any = getattr(model, "hf", None)
    kind = model.device.type
    training = [module for module in hf.modules() if module.training] if getattr(hf, "training", False) else []
    with contextlib.ExitStack() as stack:
        if torch.is_autocast_enabled(kind):
            stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True
