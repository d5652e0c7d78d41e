"""What a run costs beside its products, which decides when rows of unlike length are better run apart."""

from __future__ import annotations

from mechedit.models.base import Model

STARTING = {"cpu": 1e8, "cuda": 1e11}
"""Operations that take about as long as starting the run of a block does."""


def spare_tokens(model: Model) -> float:
    """Tokens that may go through a block for nothing before starting another run would cost less."""
    block = 2 * (4 * model.d_model**2 + 2 * model.d_model * model.d_mlp)
    return STARTING.get(model.device.type, STARTING["cuda"]) / block
