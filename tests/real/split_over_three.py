"""SmolLM2-135M, whose 9 heads and 3 KV heads are split over three processes, against one process; run by hand.

    PYTHONPATH=.:tests python tests/real/split_over_three.py

It prints the largest difference of each result, as a fraction of the result's largest value, and fails above 1e-5.
"""

from __future__ import annotations

import random
import resource
import tempfile
from pathlib import Path

import torch
from helpers.ranks import launch
from helpers.split import WORDS, check_equal, results

import mechedit as me
from analyses.real_models.make import real_model_folder

LAYERS = [3, 4]
TEXTS = [" ".join(random.Random(seed).sample(WORDS, 14)) for seed in range(120)]
"""Enough tokens for moments that are 1,536 wide."""


def main() -> None:
    """Run both, and compare."""
    source = real_model_folder("smollm2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        code = (
            f"from pathlib import *\nfrom helpers.split import *\n"
            f"save_result({source!r}, {folder!r}, layers={LAYERS!r}, texts={TEXTS!r})"
        )
        ended = launch(3, [], folder / "log", first=dict.fromkeys(range(3), code), limit=1000)
        assert [process.code for process in ended] == [0] * 3, [process.err[-3000:] for process in ended]
        ranks = [torch.load(folder / f"rank_{rank}.pt") for rank in range(3)]
    model = me.load_model(source, device="cpu")
    expected = results(model, LAYERS, TEXTS)
    print(f"largest float64 tensor: {int(ranks[0]['largest float64']):,} numbers of {model.d_mlp**2:,}")
    for key, value in expected.items():
        if key in ranks[0] and not key.startswith("largest"):
            difference = (ranks[0][key] - value).abs().max() / value.abs().max().clamp_min(1)
            print(f"{key:<16} {float(difference):.1e}")
    check_equal(model, expected, ranks)
    seconds = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    print(f"equal; {seconds:.0f} s of a processor for the one process")


if __name__ == "__main__":
    main()
