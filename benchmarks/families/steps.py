"""The steps that a model type goes through: load, trace, sever, edit, undo, export, reload, each with its control.

A step holds when it gives the right numbers *and* moves something: a trace whose effects are all equal, or an edit that
leaves the logits where they were, would satisfy every equality.
"""

from __future__ import annotations

import contextlib
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

import mechedit as me
from benchmarks.families.small_models import VOCAB, small_model
from mechedit.models import UnsupportedModelError, loader_of

_TRACED = [("state", "nothing"), ("state", "mlp"), ("state", "attn"), ("mlp", "nothing"), ("attn", "nothing")]
_SEEDS = 4
"""Random models of a type that are tried, while nothing moves on them."""
_LEAST = 1e-4
"""Least relative change that counts as one: a hundred times that of rounding."""


@dataclass(frozen=True)
class Outcome:
    """What a model type can do by one backend."""

    backend: str
    traced: bool = False
    severed: bool = False
    edited: bool = False
    """Edited, undone bit for bit, exported and reloaded with equal logits."""
    category: str = ""
    """Why it cannot do all of it, in a few words; empty when it can."""
    reason: str = ""
    """The same, as the error says it."""

    @property
    def plain(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, so that every token is a text."""
    words = {"<end>": 0, "<pad>": 1, **{f"word{i}": i for i in range(2, VOCAB)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=64,
    )


class NothingMovesError(AssertionError):
    """A control failed: on this random model, a step has no effect that could be right or wrong."""


def outcome_of(model_type: str, backend: str) -> Outcome:
    """Take a small random model of a type through all steps by one backend; another one where nothing moves."""
    for seed in range(_SEEDS - 1):
        with contextlib.suppress(NothingMovesError):
            return _outcome(model_type, backend, seed)
    return _outcome(model_type, backend, _SEEDS - 1)


def _outcome(model_type: str, backend: str, seed: int) -> Outcome:
    try:
        hf = small_model(model_type, seed)
    except ImportError as error:
        return Outcome(backend, category="a package is absent", reason=_line(error))
    except Exception as error:
        return Outcome(backend, category="no small model", reason=_line(error))
    tokenizer = word_tokenizer()
    try:
        model = me.load_model(hf, tokenizer=tokenizer, backend=backend)
    except UnsupportedModelError as error:
        return Outcome(backend, category=error.category, reason=_line(error))
    check_trace(model)
    try:
        check_edit(model)
    except UnsupportedModelError as error:
        return Outcome(backend, True, True, category=error.category, reason=_line(error))
    except me.InputError as error:
        if saves_whole(hf):
            raise
        return Outcome(backend, True, True, category="not saved whole by transformers", reason=_line(error))
    return Outcome(backend, True, True, True)


def check_trace(model: me.Model) -> None:
    """Trace one fact, whole and with MLPs and attention severed; every restoration and severing must count."""
    fact = known_fact(model)
    effects = me.trace_facts(model, [fact], me.TraceConfig(sever=("nothing", "mlp", "attn"), samples=2, window=1))
    assert bool(effects["effect"].notna().all())
    scores = {(kind, sever): _scores(effects, kind, sever) for kind, sever in _TRACED}
    for kind in ("state", "mlp", "attn"):
        of_kind = scores[kind, "nothing"]
        _check_moves(float(of_kind.max() / of_kind.min()) - 1, f"restoring {kind}")
    for sever in ("mlp", "attn"):
        change = scores["state", sever] / scores["state", "nothing"] - 1
        _check_moves(float(abs(change).max()), f"severing {sever}")


def _scores(effects: Any, kind: str, sever: str) -> np.ndarray:
    """The scores of the cells of one kind and severing, by token and layer."""
    cells = effects[(effects["kind"] == kind) & (effects["sever"] == sever)]
    return cells.sort_values(["position", "layer"])["score"].to_numpy(dtype=float)


def check_edit(model: me.Model) -> None:
    """Write a fact, undo it bit for bit, export it, and reload it with the edited model's logits."""
    fact = known_fact(model)
    ids = torch.tensor([model.tokenizer(fact.prompt.replace("{}", fact.subject))["input_ids"]])
    before, weights = _logits(model.hf, ids), model.weights_hash()
    layers = writable_layers(model)
    request = me.EditRequest(id="r", subject=fact.subject, prompt=fact.prompt, target_new=_unlikely(before))
    moments = {layer: torch.eye(model.d_key, dtype=torch.float64) for layer in layers}
    config = me.MemitConfig(steps=20, lr=0.5, covariance_weight=0.01)
    edit = me.memit(model, [request], layers, moments=moments, prefixes=["{}"], config=config)
    assert model.weights_hash() == weights, "making an edit leaves the model alone"
    me.apply_(model, edit)
    after = _logits(model.hf, ids)
    _check_moves(_differ(after, before), "the edit")
    new = int(model.tokenizer.convert_tokens_to_ids(request.target_new))
    _check_moves(_gain(after, before, new), "the new object")
    me.undo_(model, edit)
    assert model.weights_hash() == weights, "undoing is exact"
    with tempfile.TemporaryDirectory() as folder:
        me.export(model, edit, Path(folder) / "edited")
        reloaded = loader_of(model.hf).from_pretrained(Path(folder) / "edited").eval()
    assert _differ(_logits(reloaded, ids), after) < 1e-5, "what was exported is the edited model"


def saves_whole(hf: Any) -> bool:
    """Whether transformers itself reads the model back as it wrote it."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        stored = dict(type(hf).from_pretrained(folder).named_parameters())
    return all(torch.equal(stored[name], parameter) for name, parameter in hf.named_parameters())


def writable_layers(model: me.Model) -> list[int]:
    """Up to two layers that can be written; not the last, whose output at the subject reaches no later token.

    Raises:
        UnsupportedModelError: there are none.
    """
    layers, refusal = [], None
    for layer in range(model.n_layers - 1):
        try:
            if len(model.projection(layer)) == model.d_key:
                layers.append(layer)
        except UnsupportedModelError as error:
            refusal = error
    if not layers and refusal is not None:
        raise refusal
    return layers[:2]


def known_fact(model: me.Model) -> me.Fact:
    """A made-up fact that the model knows: its object is what the model says next."""
    for first in range(2, VOCAB - 8):
        words = [f"word{first + i}" for i in range(5)]
        prompt, subject = f"{words[0]} {words[1]} {{}} {words[4]}", f"{words[2]} {words[3]}"
        ids = torch.tensor([model.tokenizer(prompt.replace("{}", subject))["input_ids"]])
        best = int(_logits(model.hf, ids)[0, -1].argmax())
        if 2 <= best < VOCAB:
            return me.Fact(id="f", subject=subject, prompt=prompt, object=f"word{best}")
    raise AssertionError("the model says no word")


@torch.no_grad()
def _logits(hf: Any, ids: Tensor) -> Tensor:
    return hf.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.float()


def _unlikely(logits: Tensor) -> str:
    """A word that the model would not say."""
    order = logits[0, -1, 2:VOCAB].argsort()
    return f"word{int(order[VOCAB // 4]) + 2}"


def _gain(after: Tensor, before: Tensor, token: int) -> float:
    """What a token's log-probability behind the prompt gains."""
    return float((after.log_softmax(-1) - before.log_softmax(-1))[0, -1, token])


def _check_moves(change: float, step: str) -> None:
    """The control of a step."""
    if not change > _LEAST:
        raise NothingMovesError(f"{step} moves nothing: by {change:.1g}, expected more than {_LEAST:g}")


def _differ(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def _line(error: Exception) -> str:
    """The error in a line that names no folder."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
