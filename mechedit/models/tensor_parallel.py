"""Which models transformers splits over processes (tensor parallel), and into how many parts.

A plan of transformers names the matrices that are split: the down-projection along d_mlp, attention's output
projection along its heads, what feeds them likewise. Each process computes with its part, and the parts' products are
summed.
"""

from __future__ import annotations

import math
import os
from typing import Any

from transformers import CONFIG_MAPPING
from transformers.distributed.configuration_utils import DistributedConfig

from mechedit.errors import InputError
from mechedit.models.families import FAMILIES
from mechedit.models.unsupported import UnsupportedModelError


def split_config(config: Any, name: str) -> DistributedConfig:
    """What `from_pretrained` takes to split a model over the processes that torchrun started.

    Args:
        config: the model's config.
        name: of the model, for messages.

    Raises:
        InputError: there is one process alone, or a number that does not divide heads, KV heads and d_mlp.
        UnsupportedModelError: a family without a plan.
    """
    if config.model_type not in planned_types():
        names = ", ".join(family.name for family in FAMILIES if family.model_type in planned_types())
        raise UnsupportedModelError(
            "no tensor parallel plan",
            f"the model {name!r} is a {config.model_type}, for which there is no plan to split it over processes; "
            f"expected one of {names}: load it without tp, on one device or with device='auto'",
        )
    degrees, count = split_degrees(config), int(os.environ.get("WORLD_SIZE") or 1)
    if count not in degrees:
        sizes = ", ".join(f"{size} {what}" for what, size in _sizes(config).items())
        expected = f"{' or '.join(map(str, degrees))} processes" if degrees else "one process, without tp"
        raise InputError(
            f"the model {name!r} has {sizes}, to be split evenly over {count} (WORLD_SIZE); expected {expected}: start "
            f"them by torchrun --nproc-per-node {degrees[0] if degrees else 1}"
        )
    return DistributedConfig(tp_size=count)


def split_degrees(config: Any) -> list[int]:
    """Numbers of processes over which heads, KV heads and d_mlp can be split evenly, ascending."""
    common = math.gcd(*_sizes(config).values())
    return [degree for degree in range(2, common + 1) if common % degree == 0]


def planned_types() -> list[str]:
    """The model types of our table for which transformers has a plan."""
    return [family.model_type for family in FAMILIES if CONFIG_MAPPING[family.model_type].base_model_tp_plan]


def _sizes(config: Any) -> dict[str, int]:
    """What is split."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    return {
        "heads": heads,
        "KV heads": getattr(text, "num_key_value_heads", None) or heads,
        "neurons": text.intermediate_size,
    }
