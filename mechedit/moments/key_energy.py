"""Are these moments of this model's layers? The energy of every unit, as a moment predicts it and as texts give it.

A moment predicts E[kᵢ²] of each unit i of a key by its diagonal. Which units are busy is the layer's own: between two
layers, or two models, their order has nothing in common. So few texts suffice, whichever they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import InputError
from mechedit.models import Model, exclusive
from mechedit.moments.key_reader import KeyReader
from mechedit.prompt_tokens import encode_documents

LEAST_CORRELATION = 0.25
"""Least correlation of the logarithms of predicted and measured energies over the units of a key.

Measured with `TEXTS` and moments of all layers over 40,000 tokens or more: 0.47 to 0.89 for the right layer of
SmolLM2-135M and at most 0.09 for another one; 0.53 to 0.89 and at most 0.07 for Gemma 3 270M; 0.69 to 0.94 and at most
0.10 for the tiny model. Where keys are narrow, chance correlates more: the bound is then 3/√width."""
MOST_RATIO = 5.0
"""Most that the median unit's measured energy may differ from the predicted, as a factor up or down.

Measured as above: 0.62 to 1.15. A sum that was not divided by its tokens is off by their number."""
TEXTS = (
    "The library on the corner opens at nine in the morning and closes when the last reader has gone home.",
    "Water boils at a lower temperature in the mountains, because the air presses less on its surface.",
    "In 1969 two people walked on the Moon while a third waited in orbit; they came back with stones and photographs.",
    "She asked the doctor how long it would take, and he said that nobody could promise anything before the spring.",
    "Trains between the two cities run every hour, except on Sundays and public holidays.",
    "A prime number has exactly two divisors: one and itself. There are infinitely many of them.",
    "The company was founded in a garage, sold its first machines by mail, and now employs forty thousand people.",
    "Mix the flour with salt and butter, add cold water, and let the dough rest for half an hour.",
    "Shakespeare wrote tragedies, comedies and histories, and acted in some of them at the Globe in London.",
    "The river rises in the hills, crosses three countries, and reaches the sea through a wide delta.",
    "If you lose the key, call the office before noon; otherwise a new one has to be ordered from abroad.",
    "Bees tell one another by a dance where flowers are, how far away, and in which direction from the sun.",
    "def area(width, height):\n    return width * height  # in square meters",
    "Parliament passed the law by a narrow majority, and the court confirmed it two years later.",
    "Mozart was born in Salzburg in 1756 and died in Vienna at the age of thirty-five.",
    "The patient was given 20 mg twice a day; after three weeks the fever had gone.",
    "\"Where have you been?\" \"At the market. They had no apples, so I bought pears.\"",
    "Iron rusts when it is wet, whereas gold stays as bright as on the day on which it was found.",
    "The team lost the final 2–1, although it had been ahead until the last minute of the second half.",
    "Many birds fly south in autumn and return in March or April, often to the very tree where they were hatched.",
    "Prices rose by 3.4 percent last year, mostly because of energy; wages followed with a delay.",
    "Tokyo, Lagos, São Paulo and Mumbai are among the largest cities on Earth.",
    "Light from the nearest star beyond the Sun takes more than four years to arrive here.",
    "To whom it may concern: please find enclosed the signed contract and a copy of my passport.",
)  # fmt: skip
"""The texts on which keys are measured where none are given."""


@dataclass(frozen=True, kw_only=True)
class EnergyMatch:
    """How well a moment predicts the energy of the units of a layer's keys."""

    correlation: float
    """Of the logarithms of predicted and measured energies, over units."""
    ratio: float
    """Median over units of measured over predicted energy."""

    @property
    def record(self) -> dict[str, float]:
        """The numbers as a provenance holds them."""
        return {"correlation": round(self.correlation, 4), "ratio": round(self.ratio, 4)}


@exclusive
@torch.no_grad()
def measured_energies(
    model: Model, layers: Sequence[int], texts: Sequence[str] = TEXTS
) -> dict[int, Float[Tensor, " d_mlp"]]:
    """Mean of kᵢ² over the tokens of the texts, per layer."""
    sequences = [ids for ids in encode_documents(model.tokenizer, texts, model.max_positions) if ids]
    reader = KeyReader(model, sorted(layers), batch_tokens=2048)
    keys = reader.read(sorted(sequences, key=len, reverse=True))
    return {layer: keys[layer].double().square().mean(0) for layer in layers}


def energy_match(predicted: Float[Tensor, " d_mlp"], measured: Float[Tensor, " d_mlp"]) -> EnergyMatch:
    """Compare two vectors of energies.

    Units that one of them says never fire have no logarithm; they count as firing at 1e-6 of the median.
    """
    logs = [
        energies.double().cpu().clamp_min(1e-6 * float(energies.median()) + 1e-300).log()
        for energies in (predicted, measured)
    ]
    correlation = float(torch.corrcoef(torch.stack(logs))[0, 1])
    return EnergyMatch(correlation=correlation, ratio=float((logs[1] - logs[0]).median().exp()))


@exclusive
def check_energies(
    predicted: Mapping[int, Float[Tensor, " d_mlp"]], model: Model, names: Mapping[int, str], texts: Sequence[str]
) -> dict[int, EnergyMatch]:
    """Refuse moments that do not predict the energies of their layers' keys on some texts.

    Args:
        predicted: E[kᵢ²] per layer, a moment's diagonal.
        model: the model that the moments should be of.
        names: how messages name each layer's moment.
        texts: texts on which keys are measured.

    Returns:
        How well each agrees.

    Raises:
        InputError: a moment is not of this layer of this model, or is not a mean over tokens.
    """
    measured = measured_energies(model, list(predicted), texts)
    matches = {}
    for layer, energies in predicted.items():
        match, least = energy_match(energies, measured[layer]), least_correlation(len(energies))
        if not match.correlation >= least:
            raise InputError(
                f"{names[layer]} is not of layer {layer} of {model.name!r}: the energies of the units that it predicts "
                f"and those measured on {len(texts)} texts correlate by {match.correlation:.2f}, expected at least "
                f"{least:.2f}; give moments of this model, layer and module, or collect them with mechedit moments"
            )
        if not 1 / MOST_RATIO <= match.ratio <= MOST_RATIO:
            raise InputError(
                f"{names[layer]} predicts other sizes than the keys of layer {layer} of {model.name!r} have: the "
                f"median unit's energy on {len(texts)} texts is {match.ratio:.3g} times as much, expected between "
                f"{1 / MOST_RATIO:g} and {MOST_RATIO:g}; give the sum of k kᵀ with its count of tokens, of this model"
            )
        matches[layer] = match
    return matches


def least_correlation(width: int) -> float:
    """The bound for keys of some width: `LEAST_CORRELATION`, or three standard deviations of chance if that is more."""
    return max(LEAST_CORRELATION, 3 / math.sqrt(width))
