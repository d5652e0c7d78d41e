"""Fine-tuning, the papers' baseline: the down-projections of the chosen layers learn the new objects by gradient.

Adam minimizes −log P(new object | prompt) over mini-batches of requests (ROME Appendix E.1, MEMIT Appendix B.1),

    ΔW = argmin  mean over requests of  −1/T · Σ_t log P(o_t | prompt, o_1 … o_{t−1}),

by itself (`ft`), with each entry of ΔW kept within ±ε (`ft_l`), or with weight decay (`ft_w`).

Three things differ from the published code. It scores all of an object's tokens at the prompt's last position; here
each is scored after those before it. Its FT-W has no decay at all: the law that sets it is read from a file as a list,
and only a tuple would count. And it trains every parameter of the module that its settings name, for FT-W the whole
block; here, as by every method, the down-projection alone changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from mechedit.data import EditRequest
from mechedit.edit import Edit
from mechedit.errors import InputError, check_at_least, check_positive
from mechedit.methods.rules import Moments, Previous
from mechedit.methods.settings import MethodConfig, configured
from mechedit.methods.spread import described
from mechedit.methods.steps import check_input, named
from mechedit.methods.training import dense_factors, judge, rows_of, train
from mechedit.models import Model
from mechedit.prompts import BARE, check_prefixes
from mechedit.targets import Targets


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(MethodConfig):
    """Settings of unconstrained fine-tuning; the defaults are those of the published code.

    `batch_size` counts the prompts of one update (64 in the published code), and `seed` shuffles them anew in every
    pass. GPT-2 XL was tuned at layer 1, GPT-J at layer 21 (ROME Appendix E.1).
    """

    steps: int = 25
    """Passes over the requests at most (both papers)."""
    lr: float | int = 5e-4
    """Adam's (both papers)."""
    stop_loss: float | int = 1e-2
    """The training ends after a pass whose mean loss is below it, and a batch below it is left alone; in nats a token
    (both papers)."""

    preserves_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lr"):
            check_positive(name, getattr(self, name))
        check_at_least("stop_loss", self.stop_loss, 0, "choose 0 (never stop early) or more")

    def default_prefixes(self, model: Model) -> tuple[str, ...]:
        """The bare prompt, as published."""
        return (BARE,)


@dataclass(frozen=True, kw_only=True)
class FineTuneBallConfig(FineTuneConfig):
    """Settings of fine-tuning within an L∞ ball; the defaults are those published for GPT-J at layer 0."""

    norm_bound: float | int = 5e-5
    """ε: how far any weight may move (ROME Appendix E.1: 5e-5 on GPT-J, 5e-4 on GPT-2 XL, at layer 0)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("norm_bound", self.norm_bound)


@dataclass(frozen=True, kw_only=True)
class FineTuneDecayConfig(FineTuneConfig):
    """Settings of fine-tuning with weight decay; the defaults are those published for GPT-J at layer 21."""

    weight_decay: float | int = 5e-4
    """λ of Adam's L2 penalty: λ·W is added to the gradient, as `torch.optim.Adam(weight_decay=λ)` does; it pulls at
    the weights themselves, not at ΔW (MEMIT Appendix B.1, tuned for 10,000 edits). 0 is `ft`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("weight_decay", self.weight_decay)


def ft(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments | None = None,
    prefixes: Sequence[str] | None = None,
    config: FineTuneConfig | None = None,
    targets: Targets | None = None,
    previous: Previous | None = None,
) -> Edit:
    """Fine-tune `layers` on the requests, without constraint. The model is left as it was, bit for bit.

    Args:
        model: to be edited (apply the result with `edited` or `apply_`). In half precision the training keeps ΔW in
            float32, and the passes see W + ΔW rounded.
        requests: what it should say; they must not conflict.
        layers: 0-based, ascending; all are trained together.
        moments: not used, as for no old keys: every method is called alike.
        prefixes: templates with one {} for the whole prompt; the default is the bare prompt alone, as published.
        config: settings; the default is what ships with the checkpoint (`configured`), else `FineTuneConfig()`.
        targets: must be None: fine-tuning searches for none.
        previous: must be empty: fine-tuning preserves no keys.

    Returns:
        The edit, whose factors hold all of ΔW. In its manifest `training` holds `losses` (the mean over each pass, as
        it went), `final_loss`, `updates` and `stopped_early`; `unconverged` names the requests whose new object is
        not the greedy answer to every prompt. `residuals` is absent, since nothing is spread.

    Raises:
        InputError: conflicting requests; layers not ascending or not in the model; targets or earlier keys; prompts
            longer than the model takes; weights that are not finite, or a loss that is not.
    """
    config = config or configured(FineTuneConfig, "ft", model)
    return _tuned("ft", model, requests, layers, prefixes, config, targets, previous)


def ft_l(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments | None = None,
    prefixes: Sequence[str] | None = None,
    config: FineTuneBallConfig | None = None,
    targets: Targets | None = None,
    previous: Previous | None = None,
) -> Edit:
    """Fine-tune with every entry of ΔW clamped to ±ε after each update; arguments and errors are those of `ft`."""
    config = config or configured(FineTuneBallConfig, "ft_l", model)
    return _tuned("ft_l", model, requests, layers, prefixes, config, targets, previous)


def ft_w(
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    moments: Moments | None = None,
    prefixes: Sequence[str] | None = None,
    config: FineTuneDecayConfig | None = None,
    targets: Targets | None = None,
    previous: Previous | None = None,
) -> Edit:
    """Fine-tune with weight decay; arguments and errors are those of `ft`."""
    config = config or configured(FineTuneDecayConfig, "ft_w", model)
    return _tuned("ft_w", model, requests, layers, prefixes, config, targets, previous)


def _tuned(
    method: str,
    model: Model,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    prefixes: Sequence[str] | None,
    config: FineTuneConfig,
    targets: Targets | None,
    previous: Previous | None,
) -> Edit:
    """Check, train, judge what came out, and write it all down."""
    _check_unused(method, targets, previous)
    layers = check_input(model, requests, layers, None, None, config)
    prefixes = check_prefixes(prefixes or config.default_prefixes(model))
    provenance = model.provenance()
    rows = rows_of(model, requests, prefixes)
    training = train(
        model, rows, layers, steps=config.steps, batch_size=config.batch_size, lr=config.lr, seed=config.seed,
        stop_loss=config.stop_loss, decay=getattr(config, "weight_decay", 0.0),
        bound=getattr(config, "norm_bound", None), name=method,
    )  # fmt: skip
    edit = Edit(factors={layer: dense_factors(delta) for layer, delta in training.deltas.items()}, manifest={})
    losses, said = judge(model, rows, edit, config.batch_size)
    missed = {row.request for row, greedy in zip(rows, said.tolist(), strict=True) if not greedy}
    manifest = {
        **described(provenance, layers, requests, None, prefixes),
        "training": {**training.record, "final_loss": float(losses.mean())},
    }
    unconverged = [request.id for place, request in enumerate(requests) if place in missed]
    return named(Edit(factors=edit.factors, manifest=manifest), method, config, unconverged)


def _check_unused(method: str, targets: Targets | None, previous: Previous | None) -> None:
    """Refuse what would be ignored although the caller counts on it; moments are not, since all methods get them."""
    if targets is not None:
        raise InputError(
            f"{method} was given targets, expected none: fine-tuning does not search for z; leave them out"
        )
    if previous:
        raise InputError(
            f"{method} was given keys of earlier edits (layers {sorted(previous)}), expected none: fine-tuning cannot "
            f"preserve them; leave `previous` out, or choose another method"
        )
