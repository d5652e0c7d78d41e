"""Training MEND's editor on edits of a model (Mitchell et al., 2022, Algorithm 1).

Each edit is made alone, of one request on the unedited model W, and scored with the edited weights W̃:

    L = c_edit · L_e + L_loc,        L_e = −log P_W̃(o | x'),        L_loc = KL(P_W(· | x_loc) ‖ P_W̃(· | x_loc)),

x' being the request's prompt and its paraphrases (the mean), x_loc running text and, where that is asked for, prompts
about other subjects with their objects (the mean over tokens). u and δ do not depend on the editor, so that ∂L/∂W̃ times
∂ΔW/∂editor is the whole gradient. Adam takes a step after `batch_size` edits.

Every `validate_every` steps the edits of requests about other subjects are scored, and the best editor is kept.
Requests and texts of a step depend on the seed and the step alone, so that an interrupted training goes on from its
last checkpoint to the same bits, also where it is to end earlier or later than at first.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechedit.batching import pad
from mechedit.bounds import check_numbers
from mechedit.data import EditRequest, load_texts, records_of, texts_hash
from mechedit.edit import Factors, copy_weights, restoring
from mechedit.errors import InputError, check_finite, check_positive
from mechedit.locks import locked
from mechedit.methods.block_inputs import RecentBlockInputs, resume_from
from mechedit.methods.checks import check_layers
from mechedit.methods.gradient_factors import GradientFactors, gradient_factors
from mechedit.methods.mend_checkpoint import copied, read_checkpoint, state_path, write_checkpoint
from mechedit.methods.mend_editor import EditorNetwork, MendEditor, read_editor_record
from mechedit.methods.mend_examples import MendExample, mend_example, split_by_subject
from mechedit.methods.training import projection_gradients, run_rows, trainable
from mechedit.models import Model, exclusive
from mechedit.paths import writable_file
from mechedit.progress import progress_bar
from mechedit.prompt_tokens import encode_documents
from mechedit.provenance import CAST_HASHES, ModelIdentity, check_provenance, value_hash

SECONDS = 20.0
"""Seconds between two checkpoints."""
_REMEDY = "choose another --out, or pass --overwrite to train anew"
_UNIT_REQUESTS = 256
"""Requests at most whose gradients give the means and deviations of what goes into the editor."""


@dataclass(frozen=True, kw_only=True)
class MendTrainingConfig:
    """Settings of the training of MEND's editor."""

    steps: int = 2000
    """Steps of Adam."""
    batch_size: int = 10
    """Edits of a step, each made alone (10 in the published code)."""
    rank: int = 1920
    """Rank of the editor's products, at most d_key + d_model (1,920 in the published code)."""
    lr: float | int = 1e-4
    """Adam's learning rate for the network (1e-6 in the published code, which takes up to a million steps)."""
    rate: float | int = 1e-4
    """α of every layer at first (published code)."""
    rate_lr: float | int = 1e-4
    """Adam's learning rate for α (published code)."""
    edit_weight: float | int = 0.1
    """Weight of L_e beside L_loc, c_edit (paper)."""
    clip: float | int = 100.0
    """Largest norm of a step's gradient (published code)."""
    text_tokens: int = 64
    """Tokens at most of the text that each edit should leave as it is."""
    neighbors: int = 0
    """Prompts about other subjects, of those that each request has for its neighbors, which its edit should leave as
    they are too; 0 as published."""
    validation: int = 20
    """Subjects at most, of no more than a tenth of all, whose requests are not trained with; one of each is edited to
    validate."""
    validate_every: int = 100
    """Steps between two validations."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        check_numbers(self, rank=2**16, text_tokens=2**16)
        for name in (
            "steps", "batch_size", "rank", "lr", "rate", "rate_lr", "edit_weight", "clip", "text_tokens",
            "validation", "validate_every",
        ):  # fmt: skip
            check_positive(name, getattr(self, name))


# Gradients are needed, whatever mode the caller is in.
@torch.inference_mode(False)
@exclusive
def train_mend(
    model: Model,
    requests: Sequence[EditRequest],
    texts: str | Path | Sequence[str],
    layers: Sequence[int],
    config: MendTrainingConfig | None = None,
    path: str | Path = "mend.safetensors",
    *,
    overwrite: bool = False,
    notify: Callable[[str], object] = lambda line: None,
) -> MendEditor:
    """Train an editor on edits of a model, which is left as it was, and write it to a file.

    Beside the file lies the training's checkpoint, `NAME.training.safetensors`, until it has ended: the same call goes
    on from there.

    Args:
        model: unedited.
        requests: to train with; some are validated with. They may contradict each other, since each is edited alone.
        texts: that edits should leave as they are, or their source (`load_texts`).
        layers: whose projections are edited, 0-based, ascending.
        config: settings.
        path: of the editor's file.
        overwrite: replace an editor or a training of other settings.
        notify: is told beforehand what the training will take, and how validations come out.

    Returns:
        The editor that was best in validation.

    Raises:
        InputError: too few requests or no text; a request that the model has no room for; layers that the model does
            not have; a file or a checkpoint of another model or of other settings; a loss that is not finite.
    """
    config, path = config or MendTrainingConfig(), writable_file(path)
    layers, requests = check_layers(layers, model), records_of(requests, EditRequest)
    texts = load_texts(texts) if isinstance(texts, str | Path) else texts
    # Where a training ends decides nothing before: a checkpoint is also one of a shorter or longer training.
    settings = {name: value for name, value in asdict(config).items() if name != "steps"}
    record = {
        **model.provenance(), CAST_HASHES: model.cast_hashes(), "layers": layers, "d_key": model.d_key,
        "d_model": model.d_model, "rank": min(config.rank, model.d_key + model.d_model), "settings": settings,
        "requests": value_hash([request.plain() for request in requests]), "texts": texts_hash(texts),
    }  # fmt: skip
    made_with = value_hash([ModelIdentity.of(record).record, *(record[name] for name in _DETERMINING)])
    with locked(path, f"the editor {str(path)!r}", made_with=made_with):
        if path.exists() and not overwrite:
            finished = read_editor_record(path)
            expected = {"made_with": made_with, "trained": config.steps}
            check_provenance(finished, expected, f"the editor {str(path)!r}", _REMEDY)
            state_path(path).unlink(missing_ok=True)  # of a call that was killed as it had written the editor
            return MendEditor.load(path)
        for name, parameter in model.named_parameters():
            check_finite(f"the weights {name}", parameter)
        training = _Training(model, requests, texts, layers, config, record, notify)
        state = state_path(path)
        if state.exists() and not overwrite:
            training.load(state, made_with)
        else:
            notify(training.plan())
            training.begin()
        training.run(state, made_with)
        editor = training.editor(made_with)
        editor.save(path)
        state.unlink(missing_ok=True)
    return editor


_DETERMINING = ("layers", "settings", "requests", "texts")
"""Fields of the record that decide a training besides the model."""


class _Training:
    """The state of a training: network, optimizer, step and curve."""

    def __init__(
        self,
        model: Model,
        requests: Sequence[EditRequest],
        texts: Sequence[str],
        layers: list[int],
        config: MendTrainingConfig,
        record: Mapping[str, Any],
        notify: Callable[[str], object],
    ) -> None:
        self.model, self.layers, self.config, self.record, self.notify = model, layers, config, record, notify
        trained, validated = split_by_subject(requests, config.validation, config.seed)
        self.examples = [mend_example(model, request) for request in trained]
        self.validated = [mend_example(model, request) for request in validated]
        self.texts = texts
        # Nothing below the lowest edited layer changes.
        self.block_inputs = RecentBlockInputs(model, layers[0])
        self.n_texts = len(texts)
        self.network = EditorNetwork(model.d_key, model.d_model, len(layers), config.rank, config.rate, config.seed)
        self.network.to(model.device)
        self.best = copied(self.network)
        others = [value for name, value in self.network.named_parameters() if name != "rates"]
        groups = [{"params": others, "lr": config.lr}, {"params": [self.network.rates], "lr": config.rate_lr}]
        self.optimizer = torch.optim.Adam(groups)
        self.weights = {
            layer: weight.to(torch.promote_types(weight.dtype, torch.float32))
            for layer, weight in copy_weights(model, layers).items()
        }
        self.step, self.curve, self.best_step = 0, [], 0

    def plan(self) -> str:
        """What the training will take, in words."""
        count = sum(value.numel() for value in self.network.parameters())
        edits = self.config.steps * self.config.batch_size
        return (
            f"MEND: {len(self.examples)} requests to train with and {len(self.validated)} to validate with; an editor "
            f"of {count:,} parameters for layers {self.layers} ({count * 4 / 2**20:.1f} MiB, four times that in the "
            f"checkpoint, and five times in memory); {self.config.steps} steps, {edits} edits"
        )

    def begin(self) -> None:
        """Take the units of what goes in from the requests."""
        chosen = Random(f"units {self.config.seed}").sample(self.examples, min(len(self.examples), _UNIT_REQUESTS))
        factors = self._factors(chosen)
        for index, layer in enumerate(self.layers):
            self.network.fit_units(
                index,
                torch.cat([row[layer].keys for row in factors]),
                torch.cat([row[layer].gradients for row in factors]),
            )
        self.best = copied(self.network)

    def run(self, state: Path, made_with: str) -> None:
        """Take the steps that are still to be taken, with checkpoints."""
        bar = progress_bar(total=self.config.steps, initial=self.step, desc="mend", unit="step", leave=None)
        saved, first = time.monotonic(), self.step
        with bar, restoring(self.model, self.layers), trainable(self.model, self.layers) as parameters:
            if not self.curve:
                self._validate()
            while self.step < self.config.steps:
                began = time.monotonic()
                self._take_step(parameters)
                bar.update()
                if self.step == first + 1:
                    seconds = time.monotonic() - began
                    minutes = seconds * (self.config.steps - first) / 60
                    self.notify(f"a step takes about {seconds:.2g} s, and so the training {minutes:.2g} min")
                if self.step % self.config.validate_every == 0 or self.step == self.config.steps:
                    self._validate()
                if time.monotonic() - saved > SECONDS:
                    self.save(state, made_with)
                    saved = time.monotonic()

    def editor(self, made_with: str) -> MendEditor:
        """The editor that was best in validation."""
        record = {
            **self.record, "steps": self.best_step, "trained": self.step, "curve": self.curve, "made_with": made_with,
        }  # fmt: skip
        network = EditorNetwork(self.model.d_key, self.model.d_model, len(self.layers), self.config.rank)
        network.load_state_dict(self.best)
        return MendEditor(network=network, layers=tuple(self.layers), record=record)

    def save(self, path: Path, made_with: str) -> None:
        """Write the checkpoint."""
        header = {
            **self.record, "steps": self.best_step, "curve": self.curve, "made_with": made_with, "step": self.step,
        }  # fmt: skip
        write_checkpoint(path, header, self.network, self.best, self.optimizer)

    def load(self, path: Path, made_with: str) -> None:
        """Go on from a checkpoint.

        Raises:
            InputError: it is of another model or of other settings, or damaged.
        """
        fields = (*_DETERMINING, "rank", "d_key", "d_model")
        expected = {**ModelIdentity.of(self.record).record, **{name: self.record[name] for name in fields}}
        expected["made_with"] = made_with
        header, self.best = read_checkpoint(path, expected, _REMEDY, self.network, self.optimizer)
        if header["step"] > self.config.steps:
            raise InputError(
                f"the training {str(path)!r} has come to step {header['step']}, expected at most {self.config.steps}, "
                f"where it is to end; ask for more steps, or pass --overwrite to train anew"
            )
        self.step, self.curve, self.best_step = header["step"], header["curve"], header["steps"]

    def _take_step(self, parameters: Mapping[int, tuple[nn.Parameter, bool]]) -> None:
        draw = Random(f"{self.config.seed} {self.step}")
        count = min(self.config.batch_size, len(self.examples))
        examples = draw.sample(self.examples, count)
        self.optimizer.zero_grad()
        for example, factors, texts, log_probs in self._prepared(examples, draw):
            changes = self._changes(factors)
            with self._written(changes), torch.enable_grad():
                edit, locality, _ = self._losses(example, texts, log_probs)
                gradients = projection_gradients((self.config.edit_weight * edit + locality) / count, parameters)
            products = [
                ((change.left.T @ gradients[layer].to(change.left)) * change.right).sum()
                for layer, change in changes.items()
            ]
            torch.stack(products).sum().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip)
        if not bool(torch.isfinite(norm)):
            raise InputError(
                f"the gradient of the training is {float(norm)} in step {self.step + 1}, expected a finite one: choose "
                f"a smaller lr, or load the model in float32 or bfloat16"
            )
        self.optimizer.step()
        self.step += 1

    def _prepared(
        self, examples: Sequence[MendExample], draw: Random
    ) -> Iterator[tuple[MendExample, Mapping[int, GradientFactors], list[Sequence[int]], Tensor]]:
        """Each example with its gradient's factors, the texts that it should leave, and these texts' log P before."""
        for example, of_example in zip(examples, self._factors(examples), strict=True):
            count = min(self.config.neighbors, len(example.neighbors))
            texts = [self._text(draw), *draw.sample(list(example.neighbors), count)]
            with torch.no_grad():
                log_probs = self._log_probs(texts)
            yield example, of_example, texts, log_probs

    def _factors(self, examples: Sequence[MendExample]) -> list[Mapping[int, GradientFactors]]:
        """The gradients of the unedited model."""
        streams = [self.block_inputs.of([_inputs(example)]) for example in examples]
        # The prompt is the first of what is scored.
        of_prompts = [stream[0] for stream in streams if stream is not None] or None
        return gradient_factors(self.model, [example.edit for example in examples], self.layers, _ROWS, of_prompts)

    def _changes(self, factors: Mapping[int, GradientFactors]) -> dict[int, Factors]:
        """ΔW of one example, with its graph."""
        with torch.enable_grad():
            return {
                layer: self.network.factors(index, factors[layer].keys, factors[layer].gradients)
                for index, layer in enumerate(self.layers)
            }

    def _losses(
        self, example: MendExample, texts: Sequence[Sequence[int]], log_probs: Float[Tensor, "text pos vocab"]
    ) -> tuple[Tensor, Tensor, bool]:
        """L_e, L_loc, and whether the object is the greedy answer to the prompt, on the model as it is now."""
        resume = resume_from(self.block_inputs.of([_inputs(example)]), self.layers[0], self.model)
        losses, greedy, _ = run_rows(self.model, example.scored, resume=resume)
        edited = self._log_probs(texts)
        present = pad(texts, self.model.tokenizer, self.model.device).mask.bool()
        divergence = (log_probs.exp() * (log_probs - edited)).sum(-1)[present].mean()
        return losses.mean(), divergence, bool(greedy[0])

    @contextlib.contextmanager
    def _written(self, changes: Mapping[int, Factors]) -> Iterator[None]:
        """ΔW on the weights within the block."""
        try:
            for layer, change in changes.items():
                delta = change.left.detach() @ change.right.detach()
                self.model.write_projection_(layer, self.weights[layer] + delta.to(self.weights[layer]))
            yield
        finally:
            for layer, weight in self.weights.items():
                self.model.write_projection_(layer, weight)

    def _log_probs(self, texts: Sequence[Sequence[int]]) -> Float[Tensor, "text pos vocab"]:
        resume = resume_from(self.block_inputs.of([[text] for text in texts]), self.layers[0], self.model)
        logits = self.model.run(pad(texts, self.model.tokenizer, self.model.device), resume=resume).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

    def _text(self, draw: Random) -> list[int]:
        """Tokens of a text that is drawn."""
        for _ in range(1000):
            text = self.texts[draw.randrange(self.n_texts)]
            length = min(self.config.text_tokens, self.model.max_positions)
            (ids,) = encode_documents(self.model.tokenizer, [text], length) if text.strip() else ([],)
            if ids:
                return ids
        raise InputError("a thousand texts that were drawn are empty, expected running text; give other texts")

    @torch.no_grad()
    def _validate(self) -> None:
        """Score edits of the requests that are not trained with, and keep the editor if it is the best so far."""
        draw = Random(f"validation {self.config.seed}")
        scores = []
        for example, factors, texts, log_probs in self._prepared(self.validated, draw):
            with self._written(self._changes(factors)):
                edit, locality, exact = self._losses(example, texts, log_probs)
            scores.append([float(edit), float(locality), 100.0 * exact])
        edit, locality, exact = (sum(column) / len(scores) for column in zip(*scores, strict=True))
        loss = self.config.edit_weight * edit + locality
        check_finite(f"the loss of the validation after step {self.step}", loss)
        best = min((row["loss"] for row in self.curve), default=float("inf"))
        self.curve.append({"step": self.step, "loss": loss, "edit": edit, "locality": locality, "exact_match": exact})
        if loss < best:
            self.best, self.best_step = copied(self.network), self.step
        self.notify(
            f"step {self.step}: loss {loss:.4g} (edit {edit:.4g}, locality {locality:.4g} nats), exact match "
            f"{exact:.0f} %"
        )


def _inputs(example: MendExample) -> list[Sequence[int]]:
    """The tokens that go in where an example is scored."""
    return [row.ids[:-1] for row in example.scored]


_ROWS = 64
"""Prompts per pass where gradients are taken."""
