"""Where a model keeps its parts, measured in one short run: the modules whose outputs add up to the residual stream.

For a block with input x and output y, every module inside it offers its output. The two with

    y = x + s · a + t · m,    s and t 1 or a factor that the config holds,

are attention's and the MLP's; a norm among them stands between a module and the residual stream. The MLP is the one
that treats positions alike: permuting them permutes its output. The projection of each is the matrix whose output is
the module's. So nothing is taken from names, and parallel blocks, norms after modules, residual multipliers, and hybrid
stacks, where what mixes positions is attention in some blocks only, are all read alike.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mechedit.errors import first_line
from mechedit.models.family import BlockParts, Family
from mechedit.models.shared_copy import share_parameters
from mechedit.models.unsupported import Category, UnsupportedModelError

_DEPTH = 3
"""Levels below a block at which an addend is looked for."""
_WIDTH = 6


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module."""

    order: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    items: int
    """Items of the output if it is a tuple, else 0."""
    original: Any = None
    """The output itself, of which `output` is a copy."""


@dataclass(frozen=True, eq=False)
class _Addend:
    """A module whose output, times a factor, is added to the residual stream."""

    path: str
    scale: float | int
    output: Tensor


def ordinary_ids(hf: Any, rows: int, width: int) -> Int[Tensor, "row width"]:
    """Random ids of text: no placeholder of images or sound, for which a model expects more input."""
    config = hf.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(hf.get_input_embeddings().weight.shape[0], (rows, width), generator=generator, device="cpu")
    if config.get_text_config() is config:
        return ids
    fields = config.to_dict()
    special = [value for name, value in fields.items() if name.endswith(("_token_id", "_token_index"))]
    placeholders = torch.tensor([value for value in special if isinstance(value, int)], dtype=torch.long, device="cpu")
    ordinary = torch.arange(len(hf.get_input_embeddings().weight), device="cpu")
    ordinary = ordinary[~torch.isin(ordinary, placeholders)]
    return torch.where(torch.isin(ids, placeholders), ordinary[ids % len(ordinary)], ids)


@torch.no_grad()
def find_family(hf: Any) -> Family:
    """Measure where a loaded causal language model keeps its parts.

    Raises:
        UnsupportedModelError: its blocks do not add attention's and an MLP's output to one residual stream.
    """
    model = share_parameters(hf)
    name = hf.config.model_type
    try:
        calls = _recorded_calls(model, ordinary_ids(hf, 2, _WIDTH).to(hf.get_input_embeddings().weight.device))
    except Exception as error:
        # The model's own code, which may raise anything.
        reason = f"it does not run on ids and a mask alone ({first_line(error)})"
        raise _unsupported("does not run on text alone", name, reason) from error
    blocks = _blocks_path(model, calls, name)
    layers = [f"{blocks}.{layer}" for layer in range(len(model.get_submodule(blocks)))]
    items = {calls[layer][0].items for layer in layers}
    for before, after in itertools.pairwise(layers):
        if not torch.equal(_states(calls[before][0].output), _input_states(calls[after][0])):
            raise _unsupported("blocks that do not add up", name, f"something stands between {before} and {after}")
    if len(items) > 1:
        raise _unsupported("blocks that do not add up", name, f"its blocks return tuples of {sorted(items)} items")
    scales = _scales(hf.config.get_text_config())
    measured: dict[tuple[Any, ...], BlockParts] = {}
    parts = []
    for layer in layers:
        block = model.get_submodule(layer)
        modules = tuple((path, type(module)) for path, module in block.named_modules())
        kind = (modules, tuple(path for path, _ in block.named_parameters()))
        if kind not in measured:
            measured[kind] = _block_parts(block, layer, calls, scales, name)
        parts.append(measured[kind])
    usual = parts[max(range(len(parts)), key=lambda layer: (_count(parts, parts[layer]), -layer))]
    embedding = next(path for path, module in model.named_modules() if module is model.get_input_embeddings())
    fields = {field.name: getattr(usual, field.name) for field in dataclasses.fields(BlockParts)}
    return Family(
        name=name,
        model_type=name,
        architecture=type(hf).__name__,
        blocks=blocks,
        embedding=embedding,
        overwrites=any(
            len(_states(call.output)) and not torch.equal(call.original, call.output)
            for path, entries in calls.items()
            if path.startswith(f"{blocks}.")
            for call in entries
        ),
        tuple_items=items.pop(),
        other_blocks={layer: entry for layer, entry in enumerate(parts) if entry != usual},
        **fields,
    )


def _count(parts: Sequence[BlockParts], usual: BlockParts) -> int:
    return sum(entry == usual for entry in parts)


def _recorded_calls(model: Any, ids: Int[Tensor, "row width"]) -> dict[str, list[_Call]]:
    """Inputs and outputs of every call of every module in one run, by path."""
    calls: dict[str, list[_Call]] = {}
    handles = []
    begun: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    def copied(value: Any) -> Any:
        # Modules may overwrite their inputs.
        return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value

    def watch(path: str, module: nn.Module) -> None:
        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            entry = (tuple(map(copied, args)), {name: copied(value) for name, value in kwargs.items()})
            begun.setdefault(path, []).append(entry)

        def end(module: nn.Module, args: Any, output: Any) -> None:
            seen_args, seen_kwargs = begun[path].pop()
            items = len(output) if isinstance(output, tuple) else 0
            first = next(iter(output), None) if items else output
            order = sum(map(len, calls.values()))
            calls.setdefault(path, []).append(_Call(order, seen_args, seen_kwargs, copied(first), items, first))

        handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
        handles.append(module.register_forward_hook(end))

    try:
        for path, module in model.named_modules():
            if path:
                watch(path, module)
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _states(value: Any) -> Tensor:
    """A module's output if it holds states [row, width, channel], also with rows one after another; else nothing."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return torch.empty(0, device="cpu")
    if value.ndim == 2 and len(value) == 2 * _WIDTH:
        return value.unflatten(0, (2, _WIDTH))
    return value if value.ndim == 3 and tuple(value.shape[:2]) == (2, _WIDTH) else torch.empty(0, device="cpu")


def _input_states(call: _Call) -> Tensor:
    """A module's first input, or the one called hidden_states."""
    return _states(call.args[0] if call.args else call.kwargs.get("hidden_states"))


def _blocks_path(model: nn.Module, calls: dict[str, list[_Call]], name: str) -> str:
    """The list whose modules are called once each and pass states on."""
    counts: Counter[int] = Counter()
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        entries = [calls.get(f"{path}.{layer}", []) for layer in range(len(module))]
        counts.update(len(entry) for entry in entries)
        if not all(len(entry) == 1 for entry in entries):
            continue
        shapes = {tuple(_states(entry[0].output).shape) for entry in entries}
        shapes |= {tuple(_input_states(entry[0]).shape) for entry in entries}
        if len(shapes) == 1 and len(shapes.pop()) == 3:
            return path
        if any(isinstance(entry[0].output, Tensor) and entry[0].output.ndim == 4 for entry in entries):
            raise _unsupported("several residual streams", name, "its blocks pass on states with an axis more")
    reason = "its blocks run more than once" if any(count > 1 for count in counts) else "it has no list of blocks"
    raise _unsupported("blocks that do not add up", name, reason)


def _scales(config: Any) -> list[float | int]:
    """Factors by which outputs may be multiplied as they are added: 1, and what the config calls so."""
    fields = {name: value for name, value in config.to_dict().items() if "multiplier" in name or "scal" in name}
    numbers: list[float | int] = [1]
    for value in fields.values():
        entries = value if isinstance(value, list | tuple) else [value]
        numbers.extend(entry for entry in entries if isinstance(entry, float) and entry)
    if "scale_depth" in fields:
        numbers.append(fields["scale_depth"] / config.num_hidden_layers**0.5)
    return list(dict.fromkeys(numbers))


def _block_parts(
    block: nn.Module, prefix: str, calls: dict[str, list[_Call]], scales: list[float | int], name: str
) -> BlockParts:
    """The parts of one block."""
    inner = {path: calls[f"{prefix}.{path}"] for path, _ in block.named_modules() if f"{prefix}.{path}" in calls}
    once = {path: entries[0] for path, entries in inner.items() if path and len(entries) == 1}
    before, after = _input_states(calls[prefix][0]), _states(calls[prefix][0].output)
    addends = _addends(before, after, once, scales)
    if addends is None:
        raise _not_adding_up(block, after, once, before, scales, name)
    sources = [_source(block, addend, once) for addend in addends]
    roots = [source.partition(".")[0] for source in sources]
    if roots[0] == roots[1]:
        raise _unsupported("no MLP of its own", name, f"attention and MLP both lie in {roots[0]!r}")
    is_mlp = [_treats_positions_alike(block.get_submodule(root), once[root]) for root in roots]
    if is_mlp == [True, False]:
        addends, sources, roots = addends[::-1], sources[::-1], roots[::-1]
    elif is_mlp != [False, True]:
        raise _unsupported("no MLP of its own", name, f"{roots[0]!r} and {roots[1]!r} both mix positions")
    fields: dict[str, Any] = {}
    unwritable = {}
    matrices = {"attn": "attn_proj", "mlp": "down"}
    for part, addend, source, root in zip(("attn", "mlp"), addends, sources, roots, strict=True):
        matrix, factor = _matrix(block.get_submodule(root), root, _states(once[source].output), once, scales)
        if factor != 1 and source != addend.path:
            matrix = None
        if matrix is None:
            unwritable[part] = _no_matrix(block.get_submodule(root), part)
        scaled_inside = matrix is not None and factor != 1
        fields |= {
            part: root,
            f"{part}_norm": addend.path if source != addend.path else None,
            f"{part}_added": matrix if scaled_inside else None if source == root else source,
            f"{part}_scale": addend.scale * factor if scaled_inside else addend.scale,
            matrices[part]: matrix,
        }
        if fields[f"{part}_added"] is not None and torch.equal(
            _states(once[root].output), _states(once[fields[f"{part}_added"]].output)
        ):
            fields[f"{part}_added"] = None
    return BlockParts(**fields, unwritable=unwritable)


def _addends(
    before: Tensor, after: Tensor, once: dict[str, _Call], scales: list[float | int]
) -> tuple[_Addend, _Addend] | None:
    """The two outputs that add up, in the order of their calls; None where no two do."""
    candidates: list[tuple[str, Tensor, int]] = []
    for path, call in sorted(once.items(), key=lambda item: (item[0].count("."), item[1].order)):
        output = _states(call.output)
        fits = path.count(".") < _DEPTH and output.shape == after.shape
        if fits and not any(torch.equal(output, earlier) for _, earlier, _ in candidates):
            candidates.append((path, output, call.order))
    candidates.sort(key=lambda candidate: candidate[2])
    difference = after.double() - before.double()
    rounding = torch.finfo(after.dtype).eps
    best, least = None, float("inf")
    for i, (first, a, _) in enumerate(candidates):
        for second, m, _ in candidates[i + 1 :]:
            for s in scales:
                for t in scales:
                    error = (difference - s * a.double() - t * m.double()).abs()
                    size = after.abs() + before.abs() + abs(s) * a.abs() + abs(t) * m.abs()
                    excess = float((error / (16 * rounding * size + 1e-30)).max())
                    if excess <= 1 and float(error.norm()) < least:
                        best, least = (_Addend(first, s, a), _Addend(second, t, m)), float(error.norm())
    return best


def _not_adding_up(
    block: nn.Module, after: Tensor, once: dict[str, _Call], before: Tensor, scales: list[float | int], name: str
) -> UnsupportedModelError:
    """Why no two outputs add up."""
    for path, call in once.items():
        output = _states(call.output)
        if output.shape != after.shape:
            continue
        if torch.equal(output, after) and not _has_matrix(block.get_submodule(path)):
            return _unsupported("norm on the residual stream", name, f"its blocks end with the norm {path!r}")
        for scale in scales:
            if torch.allclose(before + scale * output, after, rtol=1e-4, atol=1e-5):
                return _unsupported("no MLP of its own", name, f"its blocks add {path!r} alone")
    return _unsupported(
        "blocks that do not add up", name, "no two modules' outputs add up to what its blocks add to their input"
    )


def _source(block: nn.Module, addend: _Addend, once: dict[str, _Call]) -> str:
    """The module whose output is added, or is normed and then added."""
    module = block.get_submodule(addend.path)
    if _has_matrix(module) or isinstance(module, nn.Dropout | nn.Identity):
        return addend.path
    raw = _input_states(once[addend.path])
    for path, call in sorted(once.items(), key=lambda item: (item[0].count("."), item[1].order)):
        output = _states(call.output)
        if path != addend.path and output.shape == raw.shape and torch.equal(output, raw):
            return path
    return addend.path


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _treats_positions_alike(module: nn.Module, call: _Call) -> bool:
    """Whether permuting the positions of a module's inputs permutes its output."""
    order = torch.arange(_WIDTH - 1, -1, -1, device="cpu")

    def permuted(value: Any) -> Any:
        return _states(value)[:, order].reshape(value.shape) if len(_states(value)) else value

    output = module(*map(permuted, call.args), **{name: permuted(value) for name, value in call.kwargs.items()})
    states, expected = _states(output[0] if isinstance(output, tuple) else output), _states(call.output)
    if states.shape != expected.shape:
        return False
    difference = (states - expected[:, order]).float().norm()
    return bool(difference <= 50 * torch.finfo(states.dtype).eps * expected.float().norm())


def _matrix(
    root: nn.Module, prefix: str, raw: Tensor, once: dict[str, _Call], scales: list[float | int]
) -> tuple[str | None, float | int]:
    """The linear module whose output, times a factor, is a module's."""
    for scale in scales:
        for path, module in root.named_modules(prefix=prefix):
            call = once.get(path)
            if call is None or not isinstance(module, nn.Linear | Conv1D) or not len(_input_states(call)):
                continue
            output = _states(call.output)
            if output.shape == raw.shape and torch.allclose(scale * output, raw, rtol=1e-5, atol=1e-6):
                return path, scale
    return None, 1


def _no_matrix(root: nn.Module, part: str) -> str:
    """Why a module has no matrix to write into."""
    experts = any("expert" in path or "router" in path for path, _ in root.named_modules()) or any(
        parameter.ndim == 3 and "conv" not in path for path, parameter in root.named_parameters()
    )
    if part == "mlp" and experts:
        return "a mixture of experts: no single matrix stands between key and output"
    return "built otherwise: no single matrix stands between key and output"


def _unsupported(category: Category, name: str, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        category,
        f"the architecture {name!r} is not known to mechedit, and its parts cannot be told by measuring: {reason}; "
        f"expected blocks that add attention's and an MLP's output to one residual stream: choose another model",
    )
