"""Which way of the fast engine gives a model's own numbers, measured when the model is loaded.

The same short runs go through the plain engines and through the fast one: rows of different lengths, a run behind
prefixes of different lengths, resumed and with a gradient, and one that reads and writes at every part. A block that
transformers computes otherwise than it is known here is noticed, whatever its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechedit.errors import first_line
from mechedit.models.discovery import ordinary_ids
from mechedit.models.fast_engine import Way
from mechedit.models.protocol import Patch, Resume, Tokens
from mechedit.models.sites import PARTS, Part, Site

SWITCH = "MECHEDIT_ENGINE"
"""Environment variable: `plain` leaves the fast engine off, `modules` computes blocks by their own modules."""
_WIDTH = 6
_LOGGER = logging.getLogger(__name__)


def settle_fast_engine(model: Any) -> None:
    """Let the fast engine run the model in the fastest way that agrees with the plain engines, or not at all."""
    engine = model.fast_engine
    if engine is None:
        return
    ways: tuple[Way, ...] = ("operations", "modules")
    chosen = os.environ.get(SWITCH)
    ways = {"plain": (), "modules": ("modules",)}.get(chosen or "", ways)
    engine.prepare("off")
    engine.reason = f"{SWITCH}={chosen}" if chosen else ""
    try:
        expected = probe(model) if ways else []
    except Exception as error:
        # Models may refuse what they are not asked for in a self-check, such as a gradient.
        engine.reason = f"the plain engines raised {type(error).__name__}"
        return
    for way in ways:
        with contextlib.suppress(_DiffersError):
            engine.reason = _agreement(model, way, expected) or engine.reason
            return
    engine.prepare("off")


class _DiffersError(Exception):
    """A way does not give the plain engines' numbers."""


def _agreement(model: Any, way: Way, expected: list[Tensor]) -> str:
    """Take a way, if it gives what is expected.

    Raises:
        _DiffersError: it does not; the engine says why.
    """
    engine = model.fast_engine
    try:
        if not engine.prepare(way):
            engine.reason = "no layout is known for its blocks"
            raise _DiffersError
        results = probe(model)
    except _DiffersError:
        raise
    except Exception as error:
        engine.reason = f"by {way}: {type(error).__name__}: {first_line(error)}"
        _LOGGER.info("%s: %s", model.name, engine.reason)
        raise _DiffersError from error
    worst = max(_distance(result, right) for result, right in zip(results, expected, strict=True))
    if not worst <= _tolerance(model.dtype):
        engine.reason = f"by {way}: differs by {worst:.1e} of what the plain engines give"
        _LOGGER.warning("%s: %s", model.name, engine.reason)
        raise _DiffersError
    return ""


def probe(model: Any) -> list[Tensor]:
    """Results of short runs that use everything an engine has to do."""
    width = min(_WIDTH, model.max_positions)
    ids = ordinary_ids(model.hf, 3, width)
    lengths = torch.tensor([width, max(width - 2, 1), width])
    columns = torch.arange(width)
    tokens = Tokens(ids, (columns < lengths[:, None]).long())
    real = tokens.mask.bool()
    last, middle = model.n_layers - 1, model.n_layers // 2
    resids = [Site(layer, "resid") for layer in sorted({0, last})]
    with torch.no_grad():
        unpatched = model.run(tokens, read=resids, use_cache=True)
        # Other tokens behind the same mask: what is remembered of a batch must not depend on its tokens.
        rolled = model.run(Tokens(ids.roll(1, 0), tokens.mask))
        read = [Site(middle, part) for part in PARTS if part not in ("embed", *_without_matrix(model, middle))]
        written: tuple[tuple[Part, bool], ...] = (("attn_out", False), ("mlp_out", True))
        patches = [_patch(model, Site(middle, part), width, add) for part, add in written]
        visited = model.run(tokens, patches, read, logits_to_keep=torch.tensor([width - 1, 0]))
    results = [unpatched.logits[real], rolled.logits[real], visited.logits[[0, 2]]]
    results += [run[site][real] for run, sites in ((unpatched, resids), (visited, read)) for site in sites]
    return results + _behind_prefixes(model, tokens, unpatched)


def _behind_prefixes(model: Any, tokens: Tokens, unpatched: Any) -> list[Tensor]:
    """Logits, the gradient for a value that is written, and the unembedding's input, behind prefixes."""
    width, last = tokens.ids.shape[1], model.n_layers - 1
    count = max(width // 3, 1)
    ends = torch.tensor([width - count, min(1, width - count), 0])
    at = ends[:, None] + torch.arange(count)
    later = Tokens(tokens.ids.gather(1, at), torch.ones_like(at))
    cache = unpatched.kv_cache.before(ends.to(model.device)) if int(ends.max()) else None
    resume = None
    if last:
        states = unpatched[Site(0, "resid")]
        resume = Resume(1, states.take_along_dim(at.to(states.device)[..., None], 1))
    with torch.enable_grad():
        patch = _patch(model, Site(max(last - 1, 0), "resid"), count, True)
        value = patch.value.requires_grad_()
        keep = torch.stack([torch.full((3,), count - 1), torch.zeros(3, dtype=torch.long)], 1)[:, : min(count, 2)]
        run = model.run(later, [patch], resume=resume, kv_cache=cache, logits_to_keep=keep)
        towards = torch.randn(run.logits.shape, generator=torch.Generator().manual_seed(1)).to(run.logits)
        (gradient,) = torch.autograd.grad((run.logits * towards).sum(), [value])
    with torch.no_grad():
        ended = model.run(later, resume=resume, kv_cache=cache, logits_to_keep=keep, unembed=False)
    return [run.logits.detach(), gradient, ended.head_inputs]


def _without_matrix(model: Any, layer: int) -> tuple[str, ...]:
    """Keys that a block has not, for want of a matrix behind them."""
    parts = model.family.parts(layer)
    return tuple(name for name, path in (("mlp_key", parts.down), ("attn_key", parts.attn_proj)) if path is None)


def _patch(model: Any, site: Site, width: int, add: bool) -> Patch:
    """Random values at one position of the first two rows."""
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(3, 1, model.d_model, generator=generator).to(model.device, model.dtype)
    return Patch(site, torch.tensor([[0], [width - 1], [-1]]), value, add)


def _distance(result: Float[Tensor, ...], expected: Float[Tensor, ...]) -> float:
    """Norm of the difference, in terms of the expected norm."""
    if result.shape != expected.shape:
        return float("inf")
    return float((result - expected).float().norm() / (expected.float().norm() + 1e-30))


def _tolerance(dtype: torch.dtype) -> float:
    return 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
