"""A model in training mode, and a caller within autocast: results are those of the model as it is, and both stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.smallest import smallest_model
from torch import Tensor, nn

from mechedit.models import Model, Site, Tokens

IDS = torch.tensor([[5, 6, 7, 8]])
TOKENS = Tokens(IDS, torch.ones_like(IDS))
COMPUTED: dict[str, Callable[[Model], Tensor]] = {
    "run": lambda model: model.run(TOKENS, read=[Site(1, "mlp_out")]).logits,
    "next_logits": lambda model: model.next_logits(IDS, torch.ones_like(IDS))[0],
}


@pytest.fixture(scope="module")
def model() -> Any:
    model = smallest_model()
    for module in model.hf.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    return model


@pytest.mark.parametrize("name", COMPUTED)
def test_dropout_is_off_and_the_mode_stays(model: Any, name: str) -> None:
    expected = COMPUTED[name](model)
    model.hf.train()
    model.hf.transformer.h[1].eval()
    modes = [module.training for module in model.hf.modules()]
    try:
        assert not torch.equal(*(model.hf(IDS).logits for _ in range(2))), "the control: dropout is there"
        assert torch.equal(COMPUTED[name](model), expected)
        assert [module.training for module in model.hf.modules()] == modes
    finally:
        model.hf.eval()


@pytest.mark.parametrize("name", COMPUTED)
def test_autocast_changes_nothing_and_stays(model: Any, name: str) -> None:
    expected = COMPUTED[name](model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hf(IDS).logits.dtype == torch.bfloat16, "the control: it is on"
        assert torch.equal(COMPUTED[name](model), expected)
        assert torch.is_autocast_enabled("cpu")
