"""What all scripts of the papers read, made once: second moments of the tiny model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from analyses.common.inputs import QUICK_TOKENS
from mechedit import MomentsConfig, collect_moments, load_model


@pytest.fixture(scope="session")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The moments of all layers that a script with `--quick` collects."""
    folder, model = tmp_path_factory.mktemp("moments"), load_model("tiny")
    collect_moments(model, "tiny", range(model.n_layers), MomentsConfig(tokens=QUICK_TOKENS), folder)
    return folder / "moments"


@pytest.fixture(scope="session")
def papers_folder(moments: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes folders for scripts, with the moments in them."""

    def make() -> Path:
        folder = tmp_path_factory.mktemp("papers")
        shutil.copytree(moments, folder / "moments")
        return folder

    return make
