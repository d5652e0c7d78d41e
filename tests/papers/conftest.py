"""What all scripts of the papers read, made once: second moments of the tiny model; and what makes tests short."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from analyses.common import inputs
from analyses.common.experiment import Experiment
from analyses.common.inputs import QUICK_TOKENS
from analyses.common.variants import Variant
from mechedit import MomentsConfig, collect_moments, load_model
from mechedit.methods import MethodConfig, SearchConfig

STEPS, PREFIXES = 10, 2
"""Of each search in these tests, which are about what scripts do with edits and not about how good they are."""
SAMPLES = 2
"""Of noise per fact, with `--quick`."""


@pytest.fixture(scope="module", autouse=True)
def _short_searches() -> Iterator[None]:
    """Searches take few steps behind few texts, traces few samples: in scripts and in what they are compared with."""
    config_of = Experiment.config

    def config(experiment: Experiment, variant: Variant) -> MethodConfig:
        settings = config_of(experiment, variant)
        if not isinstance(settings, SearchConfig):
            return settings
        return dataclasses.replace(settings, steps=min(settings.steps, STEPS), generated_prefixes=PREFIXES)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Experiment, "config", config)
        patch.setattr(inputs, "QUICK_SAMPLES", SAMPLES)
        yield


@pytest.fixture(scope="module")
def light_figures() -> Iterator[Callable[..., None]]:
    """Figures are rendered small, as PNG alone: that `save_figure` writes PDF too has tests of its own.

    It holds the `savefig` that renders them whole.
    """
    savefig = Figure.savefig

    def save(figure: Figure, path: Path, **options: Any) -> None:
        if path.suffix == ".pdf":
            path.write_bytes(b"%PDF" + bytes(200))
        else:
            savefig(figure, path, **{**options, "dpi": 40})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield savefig


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on figures are not rendered: for runs that come after one whose figures were checked."""

    def stop() -> None:
        monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).write_bytes(b""))

    return stop


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
