"""The self-check that every model must pass when it is loaded: no family is trusted by its name.

Short runs on random ids test what the rest of mechedit relies on: the backend computes what the model computes,
the residual stream adds up, the down-projection is the matrix between `mlp_key` and `mlp_out`, a write at each
part changes the logits of its own row alone, no position sees a later one, and the last residual decides the
logits. When attention is edited, its output projection is checked in the same way (`Model.writing`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mechedit.errors import InputError
from mechedit.models.protocol import Model, Patch, Run, Tokens
from mechedit.models.shared_copy import share_parameters
from mechedit.models.sites import EMBED, Part, Site, out_part

_WIDTH = 6
_REASONS = {"mlp": "its MLP is built otherwise", "attn": "its attention is built otherwise"}
_CHECKED_WRITES: tuple[Part, ...] = ("embed", "attn_out", "mlp_key", "mlp_out", "resid")


@torch.no_grad()
def self_check(model: Model) -> None:
    """Check that the sites of this model are where `Site` says, for reading and for writing.

    Raises:
        InputError: names the check that failed.
    """
    tokens = _random_tokens(model)
    parts: tuple[Part, ...] = ("attn_out", "mlp_key", "mlp_out", "resid")
    sites = [EMBED, *(Site(layer, part) for layer in range(model.n_layers) for part in parts)]
    clean = model.run(tokens, read=sites)
    if not torch.isfinite(clean.logits).all():
        raise _failed(model, "finite logits", "choose another dtype, such as float32 or bfloat16")
    _check_logits(model, tokens, clean)
    _check_residual(model, clean)
    _check_projection(model, clean)
    _check_writes(model, tokens, clean)


@torch.no_grad()
def check_projection(model: Model) -> None:
    """Check that the edited module's addition to the residual stream is its projection of its keys, and nothing else.

    Raises:
        InputError: names the check that failed.
    """
    tokens, layers = _random_tokens(model), range(model.n_layers)
    outs = [Site(layer, out_part(model.module)) for layer in layers]
    clean = model.run(tokens, read=[*outs, *(model.key_site(layer) for layer in layers)])
    _check_projection(model, clean)
    patches = [_row_patch(site, clean[site][1], 0, len(tokens.ids)) for site in map(model.key_site, layers)]
    written = model.run(tokens, patches, outs)
    for site in outs:
        if not _close(written[site][0], clean[site][1]):
            raise _failed(model, f"a write at {model.key_site(site.layer)} decides {site}", _REASONS[model.module])


def _random_tokens(model: Model) -> Tokens:
    """Two rows of random ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (2, min(_WIDTH, model.max_positions)), generator=generator)
    return Tokens(ids, torch.ones_like(ids))


def _check_logits(model: Model, tokens: Tokens, clean: Run) -> None:
    """The backend's logits are the transformers model's: TransformerLens computes attention by itself."""
    # Another copy, in evaluation mode whatever the user's model is.
    ids, mask = tokens.ids.to(model.device), tokens.mask.to(model.device)
    expected = share_parameters(model.hf)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if not _close(clean.logits, expected):
        raise _failed(model, "the backend gives the model's own logits", "the backend computes them otherwise")


def _check_residual(model: Model, clean: Run) -> None:
    """resid[l] = resid[l − 1] + attn_out[l] + mlp_out[l], up to a few roundings of each term."""
    for layer in range(model.n_layers):
        before = Site(layer - 1, "resid") if layer else EMBED
        sites = (Site(layer, "resid"), before, Site(layer, "attn_out"), Site(layer, "mlp_out"))
        after, *addends = (clean[site].float() for site in sites)
        difference = after - sum(addends)
        size = after.abs() + sum(addend.abs() for addend in addends)
        if layer == 0:
            # A position embedding may come between: the same in every row, so rows are compared.
            difference, size = difference[0] - difference[1], size[0] + size[1]
        if (difference.abs() > 16 * torch.finfo(clean[before].dtype).eps * size).any():
            raise _failed(model, f"the residual stream adds up at layer {layer}", "its blocks are built otherwise")


def _check_projection(model: Model, clean: Run) -> None:
    """The edited module adds key · W + b to the residual stream, after any post-norm."""
    for layer in range(model.n_layers):
        # In float32, because the sums of squares behind a post-norm may be too large for float16.
        output = model.module_output(layer, clean[model.key_site(layer)].float())
        if not _close(output, clean[Site(layer, out_part(model.module))]):
            name = {"mlp": "down-projection", "attn": "output projection"}[model.module]
            raise _failed(model, f"the {name} of layer {layer} is found", _REASONS[model.module])


def _check_writes(model: Model, tokens: Tokens, clean: Run) -> None:
    """Writes reach the logits of their own row, and of no earlier position.

    The batch has a row per part that is written, a row with another's last token, a row with another's last residual,
    and an unchanged row.
    """
    rows = torch.zeros(len(_CHECKED_WRITES) + 3, dtype=torch.long)
    batch = tokens.rows(rows)
    # Some blocks of trained models add next to nothing; the write goes where the MLP adds most.
    outputs = [clean[Site(layer, "mlp_out")].float().norm() for layer in range(model.n_layers)]
    busiest = int(torch.stack(outputs).argmax())
    patches = []
    for row, part in enumerate(_CHECKED_WRITES):
        site = EMBED if part == "embed" else Site(busiest, part)
        source = clean[Site(busiest, "resid") if part == "attn_out" else site]
        patches.append(_row_patch(site, source[1], row, len(rows)))
    final = tokens.ids.shape[1] - 1
    patches.append(_row_patch(EMBED, clean[EMBED][1, final:], len(_CHECKED_WRITES), len(rows), start=final))
    last = Site(model.n_layers - 1, "resid")
    patches.append(_row_patch(last, clean[last][1], len(_CHECKED_WRITES) + 1, len(rows)))
    logits = model.run(batch, patches).logits
    for row, part in enumerate(_CHECKED_WRITES):
        # One part of a deep model changes the logits little, but a lost write does not change them at all.
        if (logits[row] - logits[-1]).float().norm() <= 1e-6 * logits[-1].float().norm():
            raise _failed(model, f"a write at {part} changes the logits", "its parts lie elsewhere")
    if not _close(logits[-3, :final], clean.logits[0, :final]):
        raise _failed(model, "no position sees a later one", "its attention is not causal")
    if not _close(logits[-2], clean.logits[1]):
        raise _failed(model, "the last residual decides the logits", "its blocks are built otherwise")
    if not _close(logits[-1], clean.logits[0]):
        raise _failed(model, "a write leaves other rows alone", "its rows are not independent")


def _row_patch(site: Site, value: Tensor, row: int, batch: int, start: int = 0) -> Patch:
    """Write `value` [pos, width] at one row's positions from `start` on."""
    positions = torch.full((batch, len(value)), -1)
    positions[row] = torch.arange(start, start + len(value))
    return Patch(site, positions, value.expand(batch, *value.shape))


def _close(result: Tensor, expected: Tensor) -> bool:
    """Whether two results of one computation differ by rounding only, relative to their size."""
    tolerance = 2e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((result - expected).float().norm() <= tolerance * expected.float().norm())


def _failed(model: Model, check: str, reason: str) -> InputError:
    return InputError(
        f"the model {model.name!r} ({model.family.name}, {model.backend}) failed the self-check "
        f'"{check}"; {reason}, so mechedit cannot vouch for its results: use another model or backend'
    )
