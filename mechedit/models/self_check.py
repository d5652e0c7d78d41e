"""The self-check that every model must pass when it is loaded: no family is trusted by its name.

Short runs on random ids test what the rest of mechedit relies on: the backend computes what the model computes,
the residual stream adds up, the down-projection is the matrix between `mlp_key` and `mlp_out`, a write at each
part changes the logits of its own row alone, no position sees a later one, and the last residual decides the
logits. When attention is edited, its output projection is checked in the same way (`Model.writing`).
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from mechedit.errors import InputError, first_line
from mechedit.models.discovery import ordinary_ids
from mechedit.models.protocol import Model, Patch, Resume, Run, Tokens
from mechedit.models.shared_copy import share_parameters
from mechedit.models.sites import EMBED, Part, Site, key_part, out_part
from mechedit.models.unsupported import Category, UnsupportedModelError

_WIDTH = 6
_REASONS = {"mlp": "its MLP is built otherwise", "attn": "its attention is built otherwise"}


@torch.no_grad()
def self_check(model: Model) -> None:
    """Check that the sites of this model are where `Site` says, for reading and for writing.

    Raises:
        InputError: names the check that failed.
    """
    tokens = _random_tokens(model)
    parts: tuple[Part, ...] = ("attn_out", "mlp_out", "resid")
    sites = [EMBED, *(Site(layer, part) for layer in range(model.n_layers) for part in parts)]
    try:
        clean = model.run(tokens, read=[*sites, *map(model.key_site, writable_layers(model))])
    except InputError:
        raise
    except Exception as error:
        # The backend's and the model's own code, which may raise anything.
        reason = f"it raised {type(error).__name__}: {first_line(error)}"
        raise _failed(model, "a run of two short rows", reason, "TransformerLens differs") from error
    absent = [site for site in sites if site not in clean.values]
    if absent:
        raise _failed(model, f"{absent[0]} is run", "the backend does not pass there", "TransformerLens differs")
    if not torch.isfinite(clean.logits).all():
        raise _failed(model, "finite logits", "choose another dtype, such as float32 or bfloat16")
    _check_logits(model, tokens, clean)
    _check_residual(model, clean)
    _check_projection(model, clean)
    _check_writes(model, tokens, clean)
    _check_resume(model, tokens, clean)
    _settle_prefixes(model, tokens, clean)


def writable_layers(model: Model) -> list[int]:
    """Layers whose edited module has a matrix to write into."""
    return [layer for layer in range(model.n_layers) if model.family.parts(layer).projection(model.module) is not None]


@torch.no_grad()
def check_projection(model: Model) -> None:
    """Check that the edited module's addition to the residual stream is its projection of its keys, and nothing else.

    Raises:
        InputError: names the check that failed.
    """
    tokens, layers = _random_tokens(model), writable_layers(model)
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
    ids = ordinary_ids(model.hf, 2, min(_WIDTH, model.max_positions))
    # The rows differ in their first token and agree at some later positions.
    ids[1, 3:5] = ids[0, 3:5]
    return Tokens(ids, torch.ones_like(ids))


def _check_logits(model: Model, tokens: Tokens, clean: Run) -> None:
    """The backend's logits are the transformers model's: TransformerLens computes attention by itself."""
    # Another copy, in evaluation mode whatever the user's model is.
    ids, mask = tokens.ids.to(model.device), tokens.mask.to(model.device)
    expected = share_parameters(model.hf)(input_ids=ids, attention_mask=mask, use_cache=False).logits
    if not _close(clean.logits, expected):
        raise _failed(
            model,
            "the backend gives the model's own logits",
            "the backend computes them otherwise",
            "TransformerLens differs",
        )


def _check_residual(model: Model, clean: Run) -> None:
    """resid[l] = resid[l − 1] + attn_out[l] + mlp_out[l], up to a few roundings of each term."""
    for layer in range(model.n_layers):
        before = [Site(layer - 1, "resid")] if layer else []
        sites = (Site(layer, "resid"), *before, Site(layer, "attn_out"), Site(layer, "mlp_out"))
        after, *addends = (clean[site].to(torch.promote_types(clean[site].dtype, torch.float32)) for site in sites)
        difference = after - sum(addends)
        size = after.abs() + sum(addend.abs() for addend in addends)
        if layer == 0:
            # What stands before the first block, whatever an architecture does to the embedding, must depend on
            # token and position alone: it is the same where rows have the same token.
            same = slice(3, 5)
            difference, size = difference[0, same] - difference[1, same], size[0, same] + size[1, same]
        if (difference.abs() > 16 * torch.finfo(clean[sites[0]].dtype).eps * size).any():
            raise _failed(model, f"the residual stream adds up at layer {layer}", "its blocks are built otherwise")


def _check_projection(model: Model, clean: Run) -> None:
    """The edited module adds key · W + b to the residual stream, after any post-norm."""
    for layer in writable_layers(model):
        # In float32 at least, because the sums of squares behind a post-norm may be too large for float16.
        keys = clean[model.key_site(layer)]
        output = model.module_output(layer, keys.to(torch.promote_types(keys.dtype, torch.float32)))
        if not _close(output, clean[Site(layer, out_part(model.module))]):
            name = {"mlp": "down-projection", "attn": "output projection"}[model.module]
            raise _failed(model, f"the {name} of layer {layer} is found", _REASONS[model.module])


def _check_writes(model: Model, tokens: Tokens, clean: Run) -> None:
    """Writes reach the logits of their own row, and of no earlier position.

    The batch has a row per part that is written, a row with another's last token, a row with another's last residual,
    and an unchanged row.
    """
    # Some blocks of trained models add next to nothing; the write goes where the MLP adds most.
    outputs = [clean[Site(layer, "mlp_out")].float().norm() for layer in range(model.n_layers)]
    busiest = int(torch.stack(outputs).argmax())
    checked: list[tuple[Part, int]] = [("embed", 0), *((part, busiest) for part in ("attn_out", "mlp_out", "resid"))]
    keyed = writable_layers(model)
    if keyed:
        checked.insert(2, (key_part(model.module), max(keyed, key=lambda layer: float(outputs[layer]))))
    rows = torch.zeros(len(checked) + 3, dtype=torch.long, device="cpu")
    batch = tokens.rows(rows)
    patches = []
    for row, (part, layer) in enumerate(checked):
        site = Site(layer, part)
        source = clean[Site(busiest, "resid") if part == "attn_out" else site]
        patches.append(_row_patch(site, source[1], row, len(rows)))
    final = tokens.ids.shape[1] - 1
    patches.append(_row_patch(EMBED, clean[EMBED][1, final:], len(checked), len(rows), start=final))
    last = Site(model.n_layers - 1, "resid")
    patches.append(_row_patch(last, clean[last][1], len(checked) + 1, len(rows)))
    logits = model.run(batch, patches).logits
    for row, (part, _) in enumerate(checked):
        # One part of a deep model changes the logits little, but a lost write does not change them at all.
        if (logits[row] - logits[-1]).float().norm() <= 1e-6 * logits[-1].float().norm():
            raise _failed(model, f"a write at {part} changes the logits", "its parts lie elsewhere")
    if not _close(logits[-3, :final], clean.logits[0, :final]):
        raise _failed(model, "no position sees a later one", "its attention is not causal", "not causal")
    if not _close(logits[-2], clean.logits[1]):
        raise _failed(model, "the last residual decides the logits", "its blocks are built otherwise")
    if not _close(logits[-1], clean.logits[0]):
        raise _failed(model, "a write leaves other rows alone", "its rows are not independent")


def _check_resume(model: Model, tokens: Tokens, clean: Run) -> None:
    """The last block alone gives the logits, from the residual before it: blocks hand on nothing else."""
    last = model.n_layers - 1
    if last and not _close(model.run(tokens, resume=Resume(last, clean[Site(last - 1, "resid")])).logits, clean.logits):
        raise _failed(
            model, "a block needs the residual alone", "its blocks hand on more", "state handed between blocks"
        )


def _settle_prefixes(model: Model, tokens: Tokens, clean: Run) -> None:
    """Keep attention's keys and values of a prefix if they suffice, else let the model run prefixes again."""
    for keeps_keys in (True, False):
        model.keeps_keys = keeps_keys
        # The model's own code may raise anything on a cache that is not its own.
        with contextlib.suppress(Exception):
            if _prefixes_hold(model, tokens, clean):
                return
    raise _failed(model, "a run behind a prefix gives the same logits", "its blocks hand on more")


def _prefixes_hold(model: Model, tokens: Tokens, clean: Run) -> bool:
    """Whether runs behind a prefix give the whole run's logits: of one length, of a length per row, from a residual."""
    width, last = tokens.ids.shape[1], model.n_layers - 1
    # Read or not, blocks must fill and use the same cache: those with a step run in the backend, the others without.
    visited = [Site(layer, "attn_out") for layer in range(0, model.n_layers, 2)]
    cache = model.run(tokens, read=visited, use_cache=True).kv_cache
    start = width // 2
    rows, rest = torch.arange(2, device=model.device), Tokens(tokens.ids[:, start:], tokens.mask[:, start:])
    runs = [(model.run(rest, kv_cache=cache.take(rows, start)).logits, clean.logits[:, start:])]
    if last:
        resume = Resume(last, clean[Site(last - 1, "resid")][:, start:])
        run = model.run(rest, kv_cache=cache.take(rows, start, last, last), resume=resume)
        runs.append((run.logits, clean.logits[:, start:]))
    ends = torch.tensor([width // 3, width - width // 3], device="cpu")
    at = ends[:, None] + torch.arange(width // 3, device="cpu")
    rest = Tokens(tokens.ids.gather(1, at), torch.ones_like(at))
    cache = model.run(tokens, use_cache=True).kv_cache
    run = model.run(rest, read=visited, kv_cache=cache.before(ends.to(model.device)))
    runs.append((run.logits, clean.logits.take_along_dim(at[..., None].to(model.device), 1)))
    return all(result.shape == expected.shape and _close(result, expected) for result, expected in runs)


def _row_patch(site: Site, value: Tensor, row: int, batch: int, start: int = 0) -> Patch:
    """Write `value` [pos, width] at one row's positions from `start` on."""
    positions = torch.full((batch, len(value)), -1, device="cpu")
    positions[row] = torch.arange(start, start + len(value), device="cpu")
    return Patch(site, positions, value.expand(batch, *value.shape))


def _close(result: Tensor, expected: Tensor) -> bool:
    """Whether two results of one computation differ by rounding only, relative to their size."""
    tolerance = 2e-3 if expected.dtype in (torch.float32, torch.float64) else 5e-2
    return bool((result - expected).float().norm() <= tolerance * expected.float().norm())


def _failed(model: Model, check: str, reason: str, category: Category = "failed self-check") -> UnsupportedModelError:
    if category == "TransformerLens differs" and model.backend != "transformer_lens":
        category = "failed self-check"
    return UnsupportedModelError(
        category,
        f"the model {model.name!r} ({model.family.name}, {model.backend}) failed the self-check "
        f'"{check}"; {reason}, so mechedit cannot vouch for its results: use another model or backend',
    )
