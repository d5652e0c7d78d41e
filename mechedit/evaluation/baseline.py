"""The unedited model's scores and final states: measured once, and compared with every edit on the same requests.

Logits for a whole vocabulary would be large. Edits leave the final norm and the unembedding alone, so the state
before them is enough: unembedded again it gives the unedited logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.atomic import atomic_folder
from mechedit.errors import InputError
from mechedit.evaluation.config import EvaluationConfig
from mechedit.evaluation.drift import States
from mechedit.evaluation.scores import Scores, check_same_input
from mechedit.files import read_tensors, write_tensors
from mechedit.provenance import check_provenance
from mechedit.records import check_record

FILE = "states.safetensors"


@dataclass(frozen=True, kw_only=True, eq=False)
class Baseline:
    """Scores of the unedited model, and its states before the unembedding at the end of each neighborhood prompt."""

    scores: Scores
    """Scores of that one state, with its provenance."""
    prompts: tuple[str, ...]
    """Neighborhood prompts, without and with the edit's sentence before them."""
    states: Float[Tensor, "prompt d_model"]
    """Residual states after the last block at each prompt's last token; in the model's dtype, on the CPU."""

    @property
    def by_prompt(self) -> States:
        """The state of each prompt."""
        return dict(zip(self.prompts, self.states, strict=True))

    @property
    def provenance(self) -> dict[str, Any]:
        """The model measured, and the input."""
        return self.scores.provenance[self.scores.states[0]]

    def check(self, made_with: Mapping[str, Any], config: EvaluationConfig) -> None:
        """Check that scores of the same requests under `config` can be compared with these.

        Raises:
            InputError: another tokenizer, dtype, embedding, final norm or unembedding; other requests, texts,
                references or settings. It names the first field that differs.
        """
        remedy = "measure the unedited model again with measure_baseline, on this model and with the same arguments"
        check_same_input(self.provenance, made_with, "the baseline", remedy)
        check_provenance(asdict(self.scores.config), asdict(config), "the baseline", remedy)

    def save(self, folder: str | Path) -> None:
        """Write states.safetensors and the scores' files to a folder, which appears complete or not at all.

        Raises:
            InputError: the folder holds something else than a baseline, or cannot be written to.
        """
        with atomic_folder(folder, replaces=FILE) as temporary:
            self.scores.save(temporary)
            write_tensors(temporary / FILE, {"states": self.states}, "prompts", list(self.prompts))

    @staticmethod
    def load(folder: str | Path) -> Baseline:
        """Read what `save` wrote.

        Raises:
            InputError: a file is missing or damaged.
        """
        scores = Scores.load(folder)
        tensors, prompts = read_tensors(Path(folder) / FILE, "prompts")
        what, remedy = f"the prompts of {str(Path(folder) / FILE)!r}", "measure the unedited model again"
        check_record(prompts, list[str], what, remedy)
        states = tensors.get("states", torch.empty(0, 0, dtype=torch.float32, device="cpu"))
        if states.ndim != 2 or len(states) != len(prompts) or len(scores.states) != 1:
            raise InputError(
                f"{str(folder)!r} holds states of shape {list(states.shape)} for {len(prompts)} prompts, and "
                f"{len(scores.states)} model states, expected a row per prompt and one model state: measure the "
                f"unedited model again"
            )
        return Baseline(scores=scores, prompts=tuple(prompts), states=states)
