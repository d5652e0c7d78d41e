"""What both backends share: the twin, the plan of a run, resuming, and what identifies a model.

A run becomes a list of `Step`s in forward order, each writing and reading one site; the backends differ
only in how they reach a site.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from mechedit.errors import InputError, check_choice
from mechedit.models.families import attention_window, family_of
from mechedit.models.fast_gpt import run_fast, supports_model, supports_run
from mechedit.models.plan import Step, Stopped, Write, end_of, entries_of, looks_at_the_end
from mechedit.models.protocol import (
    MODULES,
    Keep,
    KVCache,
    Module,
    Part,
    Patch,
    Resume,
    Run,
    Site,
    Tokens,
    key_part,
    lengths_after,
)
from mechedit.models.shared_copy import Forwards, fused, replaced, share_parameters
from mechedit.provenance import VERSION, value_hash

_NAMES = {"mlp": "down-projection", "attn": "output projection of attention"}
_EDITABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Backbone:
    """A transformers model seen through a twin that shares its parameters.

    The backend wraps the twin, never `hf`: edits in place are seen by both, while `hf` keeps its modules,
    so that `hf.save_pretrained` and `hf.generate` work. Sharing has one visible effect: `requires_grad` is
    switched off for the parameters of both.

    Raises:
        InputError: an architecture that is not supported (`family_of`), or MLP weights of another kind than
            floating-point Linear or Conv1D.
    """

    backend: str

    def __init__(self, hf: Any, tokenizer: Any, *, name: str) -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.name = name
        self.family = family_of(hf)
        self.plain = fused(share_parameters(hf))
        self.twin = self._wrap(fused(share_parameters(hf)))
        # After wrapping, because a backend may have made parameters of its own.
        self.twin.requires_grad_(False)
        implementation = getattr(hf.config, "_attn_implementation", None)
        # Other kinds of attention want another mask than the one that the twin makes.
        self._plain_fits = implementation in (None, "eager", "sdpa")
        if self._plain_fits and implementation is not None:
            self.plain.config._attn_implementation = getattr(self.twin.config, "_attn_implementation")  # noqa: B009
        self._lean = self._plain_fits and supports_model(self.plain)
        self.n_layers = len(hf.get_submodule(self.family.blocks))
        self.max_positions: int = hf.config.max_position_embeddings
        self.module: Module = "mlp"
        self.d_mlp, self.d_model = self.projection(0).shape
        self.d_key = self.d_mlp

    @property
    def device(self) -> torch.device:
        """Where the weights are (the token embedding's, when they are spread)."""
        return self.hf.get_submodule(self.family.embedding).weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are."""
        return self.hf.get_submodule(self.family.embedding).weight.dtype

    def run(
        self,
        tokens: Tokens,
        patches: Sequence[Patch] = (),
        read: Sequence[Site] = (),
        *,
        resume: Resume | None = None,
        logits_to_keep: Keep = 0,
        stop_after: int | None = None,
        kv_cache: KVCache | None = None,
        use_cache: bool = False,
    ) -> Run:
        """One forward pass; see `mechedit.models.protocol.Model.run`."""
        steps = self._plan(tokens, patches, read, resume, stop_after)
        kept = _kept(logits_to_keep, tokens, self.device)
        if self._lean and supports_run(self.plain, steps, resume, kept, use_cache):
            self._check_prefix(tokens, kv_cache)
            end = end_of(steps, stop_after, use_cache)
            return run_fast(
                self.plain, tokens, steps, end, resume=resume, keep=kept, kv_cache=kv_cache, cache=use_cache
            )
        by_row = kept if isinstance(kept, Tensor) and kept.ndim == 2 else None
        inputs = {**self._inputs(tokens, kv_cache, use_cache), "logits_to_keep": kept if by_row is None else 0}
        if self._plain_fits and all(looks_at_the_end(step, stop_after) for step in steps):
            with self._kept_only(kept), self._unembedded(self.plain, by_row):
                run = self._forward_plain(inputs, steps, resume, stop_after)
        else:
            forwards = self._skipped(self.twin, resume) | self._unvisited(steps, resume, stop_after)
            unseen = forwards.get(self._blocks(self.twin)[-1]) is self._blocks(self.plain)[-1]
            with replaced(forwards), self._kept_only(kept if unseen else 0), self._unembedded(self.twin, by_row):
                run = self._forward(inputs, steps, end_of(steps, stop_after, use_cache))
        if not use_cache:
            return run
        layers = tuple((layer.keys, layer.values) for layer in inputs["past_key_values"].layers)
        return Run(run.logits, run.values, KVCache(layers, lengths_after(kv_cache, tokens)))

    def _inputs(self, tokens: Tokens, kv_cache: KVCache | None, cache: bool) -> dict[str, Any]:
        """What the twin is called with: ids and mask only, and keys and values where they are reused or kept."""
        mask = tokens.mask.to(self.device)
        self._check_prefix(tokens, kv_cache)
        if kv_cache is not None:
            mask = torch.cat([kv_cache.mask.to(mask), mask], dim=1)
        inputs = {"input_ids": tokens.ids.to(self.device), "attention_mask": mask, "use_cache": cache}
        if kv_cache is not None and kv_cache.lengths is not None:
            # Left to itself, the model would count the empty places before a shorter row's kv_cache.
            places = kv_cache.lengths[:, None] + torch.arange(tokens.ids.shape[1], device=kv_cache.lengths.device)
            inputs["position_ids"] = places.clamp(max=self.max_positions - 1).to(self.device)
        if kv_cache is not None or cache:
            inputs["past_key_values"] = _cache(kv_cache)
        return inputs

    def _check_prefix(self, tokens: Tokens, kv_cache: KVCache | None) -> None:
        """Raise ValueError unless the kv_cache has the model's layers and the batch's rows."""
        if kv_cache is None:
            return
        batch, rows = kv_cache.layers[0][0].shape[0], len(tokens.ids)
        if len(kv_cache.layers) != self.n_layers or batch != rows:
            raise ValueError(
                f"the KV cache has {len(kv_cache.layers)} layers and {batch} rows, expected {self.n_layers} and {rows}"
            )

    def writing(self, module: str) -> Backbone:
        """The same model with edits written into `module`; see `mechedit.models.protocol.Model.writing`."""
        # Imported here, since the check runs a model.
        from mechedit.models.self_check import projection_found

        check_choice("the module", module, MODULES)
        other = copy.copy(self)
        other.module = cast(Module, module)
        other.d_key = len(other.projection(0))
        if other.module != self.module:
            projection_found(other)
        return other

    def key_site(self, layer: int) -> Site:
        """Where a layer's keys are: the input of `projection`."""
        return Site(layer, key_part(self.module))

    def window(self, layer: int) -> int | None:
        """How many positions a token of this block sees, itself included; None where that may be all."""
        return attention_window(self.hf.config, layer)

    def projection(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """A live view of the written module's matrix, always [d_key, d_model]; writing to it edits the model."""
        return self._matrix(layer, self.module)

    def _matrix(self, layer: int, written: Module) -> Float[Tensor, "d_key d_model"]:
        """A live view of the matrix through which a module writes."""
        blocks = self.hf.get_submodule(self.family.blocks)
        if not 0 <= layer < len(blocks):
            raise ValueError(f"layer {layer} is outside the model: expected 0 to {len(blocks) - 1}")
        module = blocks[layer].get_submodule(self.family.projection(written))
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dtype in _EDITABLE:
            if isinstance(module, Conv1D):
                return weight.detach()
            if isinstance(module, nn.Linear):
                return weight.detach().T
        raise InputError(
            f"the {_NAMES[written]} of layer {layer} is a {type(module).__name__} of "
            f"{getattr(weight, 'dtype', 'no weight')}, expected Linear or Conv1D in floating point: load the "
            f"model unquantized and merge its adapters"
        )

    @torch.no_grad()
    def module_output(self, layer: int, keys: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """What the written module adds to the residual stream at these keys: keys · W + b, after any post-norm."""
        return self.output_gain(layer, keys) * self._raw_output(layer, keys)

    @torch.no_grad()
    def output_gain(self, layer: int, keys: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        """`module_output` in units of the projection's output: g / rms(keys · W + b) with a post-norm, else 1."""
        after = self.family.norm_after(self.module)
        if after is None:
            return keys.new_ones(*keys.shape[:-1], self.d_model)
        raw = self._raw_output(layer, keys)
        norm = self._blocks(self.hf)[layer].get_submodule(after)
        direction = norm(torch.ones(self.d_model, device=raw.device, dtype=self.dtype)).to(raw)
        # The norm's own output tells its scale, whatever it adds to rms(x) under the root.
        unit, out = direction * raw, norm(raw.to(self.dtype)).to(raw)
        return direction * (out * unit).sum(-1, keepdim=True) / unit.square().sum(-1, keepdim=True)

    def _raw_output(self, layer: int, keys: Float[Tensor, "*batch d_mlp"]) -> Float[Tensor, "*batch d_model"]:
        weight = self.projection(layer)
        bias: Any = self._blocks(self.hf)[layer].get_submodule(self.family.projection(self.module)).bias
        out = keys.to(weight.device) @ weight.to(keys.dtype)
        return out if bias is None else out + bias.to(out)

    @torch.no_grad()
    def unembed(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocab"]:
        """Next-token logits of states after the last block: final norm, unembedding and what follows, as in `run`."""
        states = resid[:, None].to(self.device, self.dtype)
        # The model's own forward with every block skipped, so that caps and scales of logits are not forgotten.
        with replaced(self._skipped(self.plain, Resume(self.n_layers, states))):
            return self.plain(inputs_embeds=states, use_cache=False).logits[:, 0]

    def weights_hash(self, *, blocks: bool = True) -> str:
        """SHA-256 over the parameters as they are now: all of them, or only those outside the blocks."""
        digest = hashlib.sha256()
        for name, parameter in sorted(self.hf.named_parameters()):
            if not blocks and name.startswith(f"{self.family.blocks}."):
                continue
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}\n".encode())
            content = parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(memoryview(content.numpy()))
        return digest.hexdigest()

    def provenance(self) -> dict[str, Any]:
        """Name, backend, weights hash, tokenizer hash, dtype, the module that is written, and mechedit version."""
        return {
            "mechedit": VERSION,
            "model": self.name,
            "backend": self.backend,
            "weights_hash": self.weights_hash(),
            "tokenizer_hash": tokenizer_hash(self.tokenizer),
            "dtype": str(self.dtype).removeprefix("torch."),
            "module": self.module,
        }

    def _wrap(self, twin: nn.Module) -> nn.Module:
        """Wrap the twin for the backend; return the module that `_forward` runs."""
        raise NotImplementedError

    def _forward(self, inputs: dict[str, Any], steps: Sequence[Step], end: Site | None) -> Run:
        """Run the twin on `inputs`, visiting the steps."""
        raise NotImplementedError

    def _plan(
        self,
        tokens: Tokens,
        patches: Sequence[Patch],
        read: Sequence[Site],
        resume: Resume | None,
        stop_after: int | None,
    ) -> list[Step]:
        """Check what is asked for and sort it into forward order."""
        first = self._check_resume(tokens, resume)
        last = self.n_layers - 1 if stop_after is None else stop_after
        if not first <= last < self.n_layers:
            raise ValueError(f"stop_after is {stop_after}, expected a layer from {first} to {self.n_layers - 1}")
        for site in [patch.site for patch in patches] + list(read):
            self._check_site(site, first)
        late = [site for site in read if site.layer > last]
        if late:
            raise ValueError(f"{late[0]} cannot be read: the run stops after layer {last}")
        writes: dict[Site, list[Write]] = {}
        places: dict[int, tuple[Tensor, ...]] = {}
        for patch in patches:
            # Severing passes one tensor of positions for many sites; look into it once.
            if id(patch.positions) not in places:
                places[id(patch.positions)] = entries_of(patch.positions, tokens)
            if patch.site.layer <= last:
                writes.setdefault(patch.site, []).append(self._write(patch, places[id(patch.positions)]))
        wanted = set(read)
        return [
            Step(site, tuple(writes.get(site, ())), site in wanted)
            for site in sorted(wanted | writes.keys(), key=lambda site: site.order)
        ]

    def _check_resume(self, tokens: Tokens, resume: Resume | None) -> int:
        """The first layer that is computed."""
        if resume is None:
            return 0
        if not 1 <= resume.layer < self.n_layers:
            raise ValueError(f"cannot resume at layer {resume.layer}, expected 1 to {self.n_layers - 1}")
        expected = (*tokens.ids.shape, self.d_model)
        if tuple(resume.resid.shape) != expected:
            raise ValueError(f"the residual to resume from is {tuple(resume.resid.shape)}, expected {expected}")
        return resume.layer

    def _check_site(self, site: Site, first: int) -> None:
        if not 0 <= site.layer < self.n_layers or (site.part == "embed" and site.layer != 0):
            raise ValueError(f"{site} is outside the model of {self.n_layers} layers")
        if site.order < (first, 0) and first > 0:
            raise ValueError(f"{site} is not computed: the run resumes at layer {first}")

    def _write(self, patch: Patch, entries: tuple[Tensor, ...]) -> Write:
        width = self._width(patch.site.part)
        expected = (*patch.positions.shape, width)
        if tuple(patch.value.shape) != expected:
            raise ValueError(f"the value for {patch.site} is {tuple(patch.value.shape)}, expected {expected}")
        rows, slots, columns = entries
        return Write(rows, columns, patch.value[rows, slots], patch.add)

    def _width(self, part: Part) -> int:
        """Of an activation."""
        if part == "attn_key":
            return len(self._matrix(0, "attn"))
        return self.d_mlp if part == "mlp_key" else self.d_model

    def _forward_plain(
        self, inputs: dict[str, Any], steps: Sequence[Step], resume: Resume | None, stop_after: int | None
    ) -> Run:
        """Run without the backend, whose hooks nobody needs: at most the last block's residual is looked at."""
        forwards, values = self._skipped(self.plain, resume), {}
        if resume is not None:
            # Looking up embeddings that no block takes would be work in vain.
            del inputs["input_ids"]
            inputs["inputs_embeds"] = resume.resid.to(self.device, self.dtype)
        if stop_after is not None:
            block = self._blocks(self.plain)[stop_after]
            compute = block.forward

            def forward(*args: Any, **kwargs: Any) -> None:
                output = compute(*args, **kwargs)
                for step in steps:
                    step(output[0] if isinstance(output, tuple) else output, values)
                raise Stopped

            forwards[block] = forward
        with replaced(forwards), contextlib.suppress(Stopped):
            return Run(self.plain(**inputs).logits, values)
        return Run(None, values)

    def _skipped(self, model: nn.Module, resume: Resume | None) -> Forwards:
        """The blocks below `resume.layer` return the cached residual instead of computing it."""
        if resume is None:
            return {}
        resid = resume.resid.to(self.device, self.dtype)
        output = (resid, None) if self.family.tuple_block else resid
        return dict.fromkeys(self._blocks(model)[: resume.layer], lambda *args, **kwargs: output)

    def _unvisited(self, steps: Sequence[Step], resume: Resume | None, stop_after: int | None) -> Forwards:
        """Blocks, and modules of other blocks, where nothing is looked at run without the backend's slower hooks."""
        if not self._plain_fits:
            return {}
        visited = {step.site.layer: set[str]() for step in steps if step.site.part != "embed"}
        if stop_after is not None:
            visited[stop_after] = set()
        for step in steps:
            visited.get(step.site.layer, set()).update(self.family.modules_of(step.site.part))
        forwards: Forwards = {}
        for layer in range(0 if resume is None else resume.layer, self.n_layers):
            plain, twin = self._blocks(self.plain)[layer], self._blocks(self.twin)[layer]
            if layer not in visited:
                forwards[twin] = plain
                continue
            names = [name for name, _ in plain.named_children() if name not in visited[layer]]
            forwards |= {twin.get_submodule(name): plain.get_submodule(name) for name in names}
        return forwards

    @contextlib.contextmanager
    def _kept_only(self, keep: Keep) -> Iterator[None]:
        """The plain last block's MLP computes the kept positions alone: no other is passed on."""
        if not isinstance(keep, Tensor):
            yield
            return
        mlp = self._blocks(self.plain)[-1].get_submodule(self.family.mlp)
        compute = mlp.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if keep.shape[-1] >= hidden.shape[1]:
                return compute(hidden, *args, **kwargs)
            at = keep.expand(len(hidden), -1)[..., None]
            kept = compute(hidden.take_along_dim(at, 1), *args, **kwargs)
            return hidden.new_zeros(*hidden.shape[:-1], kept.shape[-1]).scatter(1, at.expand_as(kept), kept)

        with replaced({mlp: forward}):
            yield

    @contextlib.contextmanager
    def _unembedded(self, model: Any, keep: Int[Tensor, "batch kept"] | None) -> Iterator[None]:
        """The unembedding sees each row's own kept positions alone; what follows it works position by position."""
        if keep is None:
            yield
            return
        head = model.get_output_embeddings()
        compute = head.forward

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return compute(hidden.take_along_dim(keep[..., None].to(hidden.device), 1), *args, **kwargs)

        with replaced({head: forward}):
            yield

    def _blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.family.blocks).children())


def _cache(kv_cache: KVCache | None) -> DynamicCache:
    """A cache that starts with a kv_cache's keys and values, without copying them."""
    # Without a config every layer keeps all positions, also those with a sliding window.
    cache = DynamicCache()
    for keys, values in kv_cache.layers if kv_cache is not None else ():
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of a fast tokenizer, without the padding and truncation that calls leave behind in it."""
    content: Mapping[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return value_hash({key: value for key, value in content.items() if key not in ("padding", "truncation")})


def _kept(keep: Keep, tokens: Tokens, device: torch.device) -> Keep:
    """The kept positions on the model's device, once those of each row are known to be there and different.

    Twice the same position would get its gradient twice.
    """
    if not isinstance(keep, Tensor):
        return keep
    if keep.ndim == 2:
        batch, width = tokens.ids.shape
        rows = keep.cpu().sort(dim=1).values
        if len(rows) != batch or not 0 <= int(rows.min()) <= int(rows.max()) < width or (rows.diff(dim=1) == 0).any():
            raise ValueError(f"kept positions {rows.tolist()} are not {batch} rows of different ones below {width}")
    return keep.to(device)
