"""What the server of `helpers.ranks` has at hand: imports, and the tiny model, of which each process gets a copy."""

from __future__ import annotations

import importlib
import os
import threading
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import torch.distributed
import torch.distributed.tensor
from tqdm.std import tqdm

import mechedit.cli
import mechedit.cli.options
from mechedit.models import load_model

torch.set_num_threads(1)
tqdm.set_lock(threading.RLock())  # the one that it has is shared by all forked processes, and some are killed
_TINY = load_model("tiny")
_load_quietly = mechedit.cli.options.load_quietly


def _load(name: str, backend: str, *rest: Any) -> Any:
    """The tiny model is there; others are loaded."""
    is_tiny = (name, backend, *map(bool, rest)) == ("tiny", "transformer_lens", False, False, False, False)
    return _TINY if is_tiny else _load_quietly(name, backend, *rest)


mechedit.cli.options.load_quietly = _load
# Figures take most of the time of a small command, and are drawn by the first process alone.
for _module, _name in (("trace", "refresh_figures"), ("evaluate", "run_figures"), ("select", "run_figures")):
    setattr(importlib.import_module(f"mechedit.cli.{_module}"), _name, lambda folder: None)
