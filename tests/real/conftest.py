"""The pretrained models: the last that was loaded is kept for the next file of tests."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

import mechedit as me
from analyses.real_models.make import real_model_folder


@pytest.fixture(scope="session")
def load_real() -> Callable[[str], me.Model]:
    """Loads a model that is made; tests leave it as it was."""
    return functools.lru_cache(maxsize=1)(lambda name: me.load_model(real_model_folder(name), device="cpu"))
