"""Fine-tuning, the papers' baseline: the down-projections of the chosen layers learn the new objects by gradient.

Adam minimizes −log P(new object | prompt) over mini-batches of requests (ROME Appendix E.1, MEMIT Appendix B.1),

    ΔW = argmin  mean over requests of  −1/T · Σ_t log P(o_t | prompt, o_1 … o_{t−1}),

without constraint (`ft`), with each entry of ΔW kept within ±ε (`ft_l`), or with weight decay (`ft_w`).

Three things differ from the published code. It scores all of an object's tokens at the prompt's last position; here
each is scored after those before it. Its FT-W has no decay at all: the law that sets it is read from a file as a list,
and only a tuple would count. And it trains every parameter of the module that its settings name, for FT-W the whole
block; here, as by every method, the down-projection alone changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mechedit.bounds import check_numbers
from mechedit.edit import Edit
from mechedit.errors import check_at_least, check_positive
from mechedit.methods.manifest import edit_manifest
from mechedit.methods.method import EditTask, edit_method
from mechedit.methods.settings import MethodConfig
from mechedit.methods.training import dense_factors, evaluate_loss, train, training_rows, unwritten
from mechedit.models import Model
from mechedit.prefixes import BARE, check_prefixes


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(MethodConfig):
    """Settings of unconstrained fine-tuning; the defaults are those of the published code.

    `batch_size` counts the prompts of one update (64 in the published code), and `seed` shuffles them anew in every
    pass. GPT-2 XL was tuned at layer 1, GPT-J at layer 21 (ROME Appendix E.1).
    """

    steps: int = 25
    """Most passes over the requests (both papers)."""
    lr: float | int = 5e-4
    """Learning rate of Adam (both papers)."""
    stop_loss: float | int = 1e-2
    """The training ends after a pass whose mean loss is below it, and a batch below it makes no update; in nats per
    token (MEMIT Appendix B.1 and both published codes; ROME Appendix E.1 says 0.03)."""

    preserves_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_numbers(self)
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


@edit_method(FineTuneConfig)
def ft(task: EditTask[FineTuneConfig]) -> Edit:
    """Fine-tune the down-projections of the layers on the requests, without constraint (FT).

    Adam minimizes the mean over requests of −1/T · Σ_t log P(o_t | prompt, o_1 … o_{t−1}), all layers together. In
    half precision the training keeps ΔW in float32, and the forward passes see W + ΔW rounded.

    The factors of the edit hold all of ΔW. In its manifest `training` holds `losses` (the mean over each pass, before
    each batch's own update), `final_loss`, `updates` and `stopped_early`; `unconverged` names the requests whose new
    object is not the greedy answer to every prompt. `residuals` is absent, since nothing is spread. A prompt longer
    than the model takes, or a loss that is not finite, raises InputError.
    """
    return fine_tune(task)


@edit_method(FineTuneBallConfig)
def ft_l(task: EditTask[FineTuneBallConfig]) -> Edit:
    """Fine-tune as `ft` does, with every entry of ΔW clamped to ±ε after each update (FT+L)."""
    return fine_tune(task, bound=task.config.norm_bound)


@edit_method(FineTuneDecayConfig)
def ft_w(task: EditTask[FineTuneDecayConfig]) -> Edit:
    """Fine-tune as `ft` does, with weight decay: λ·(W + ΔW) is added to the gradient (FT-W)."""
    return fine_tune(task, decay=task.config.weight_decay)


def fine_tune(task: EditTask[FineTuneConfig], *, decay: float | int = 0.0, bound: float | int | None = None) -> Edit:
    """Train ΔW on the task's requests, measure the loss that it reaches, and record both.

    Args:
        task: what to learn, and how.
        decay: λ of the L2 penalty on W + ΔW.
        bound: largest absolute entry of ΔW; None for no bound.
    """
    model, config = task.model, task.config
    prefixes = check_prefixes(task.prefixes or config.default_prefixes(model))
    provenance = model.provenance()
    rows = training_rows(model, task.requests, prefixes)
    training = train(
        model, rows, task.layers, steps=config.steps, batch_size=config.batch_size, lr=config.lr, seed=config.seed,
        stop_loss=config.stop_loss, decay=decay, bound=bound, name=task.method,
    )  # fmt: skip
    factors = {layer: dense_factors(delta) for layer, delta in training.deltas.items()}
    losses, greedy = evaluate_loss(model, rows, Edit(factors=factors, manifest={}), config.batch_size)
    manifest = {
        **edit_manifest(provenance, task.layers, task.requests, None, prefixes),
        "training": {**training.record, "final_loss": float(losses.mean())},
        "unconverged": unwritten(task.requests, rows, greedy),
    }
    return Edit(factors=factors, manifest=manifest)
