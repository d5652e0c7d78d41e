"""Requests to write, and the states at their subjects."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mechedit.data import EditRequest
from mechedit.methods import KeyExtractor
from mechedit.models import Site

PREFIXES = ["{}", "The first thing. {}", "Because he said so many things. {}"]
REQUESTS = [
    EditRequest(id="a", subject="Danielle Darrieux", prompt="The mother tongue of {} is", target_new="Korean"),
    EditRequest(id="b", subject="Leon Blum", prompt="{} was born in", target_new="Paris"),
    EditRequest(id="c", subject="Toko Yasuda", prompt="They say that {}", target_new="plays"),
]


def states(model: Any, layer: int, part: Any = "resid") -> Tensor:
    """h at the subject's last token of each bare prompt."""
    site = Site(layer, part)
    return KeyExtractor(model, REQUESTS, ["{}"]).states([site])[site]
