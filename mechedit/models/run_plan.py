"""The plan of a forward pass and the engines that carry it out.

`plan_run` checks the arguments of `Model.run` once and sorts patches and reads into forward order. An `Engine` is one
way to carry out a plan; a model tries its engines in order, and the first that can run the plan runs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechedit.models.family import Family
from mechedit.models.kv_cache import KVCache
from mechedit.models.protocol import LogitsToKeep, Patch, Resume, Run, Tokens
from mechedit.models.sites import Site


@dataclass(frozen=True, eq=False)
class Write:
    """Values to write at chosen (row, position) pairs of one activation."""

    rows: Int[Tensor, " entry"]
    columns: Int[Tensor, " entry"]
    value: Float[Tensor, "entry width"]
    add: bool = False

    def __call__(self, activation: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """Write into a copy where gradients must reach the value, else in place: sites are modules' fresh outputs."""
        written = activation.clone() if torch.is_grad_enabled() else activation
        at = (self.rows.to(activation.device), self.columns.to(activation.device))
        value = self.value.to(activation)
        written[at] = activation[at] + value if self.add else value
        return written


@dataclass(frozen=True, eq=False)
class SiteStep:
    """The writes and the read of a run at one site."""

    site: Site
    writes: tuple[Write, ...]
    """Writes, in the order of the patches."""
    read: bool
    copy: bool = False
    """Whether what is read must be copied, because the block goes on to overwrite it."""
    scale: float | int = 1
    """Factor of the activation as it is added to the residual stream: what is read is scaled, and writes are undone."""

    def __call__(self, activation: Tensor, values: dict[Site, Tensor]) -> Tensor:
        """Apply the writes, store the result in `values` if the site is read, and return it."""
        for write in self.writes:
            activation = write(activation)
        if self.read:
            states = activation.clone() if self.copy else activation
            values[self.site] = states if self.scale == 1 else states * self.scale
        return activation

    def on_module(self, activation: Tensor, shape: tuple[int, int], values: dict[Site, Tensor]) -> Tensor:
        """As a call, for what a module computes: its heads may have an axis of their own, its rows may be joined.

        Args:
            activation: [batch, pos, width], [batch, pos, head, d_head] or [batch · pos, width].
            shape: batch and pos.
            values: receives the activation if the site is read.
        """
        if activation.ndim == 4:
            return self(activation.flatten(2), values).unflatten(2, activation.shape[2:])
        if activation.ndim == 2:
            return self(activation.unflatten(0, shape), values).flatten(0, 1)
        return self(activation, values)


@dataclass(frozen=True, eq=False, kw_only=True)
class RunPlan:
    """One forward pass, checked; its tensors are on the model's device."""

    tokens: Tokens
    steps: tuple[SiteStep, ...]
    """Steps in forward order, one per site that is written or read."""
    resume: Resume | None
    """Cached residual to start from, in the model's dtype; None to start from the tokens."""
    logits_to_keep: LogitsToKeep
    stop_after: int | None
    kv_cache: KVCache | None
    use_cache: bool
    unembed: bool = True
    """Whether a run that is not stopped goes on to the logits; else it ends with the unembedding's input."""

    @property
    def first_layer(self) -> int:
        """The first block that is computed."""
        return 0 if self.resume is None else self.resume.layer

    @property
    def positions_per_row(self) -> Int[Tensor, "batch kept"] | None:
        """`logits_to_keep` where each row has positions of its own."""
        keep = self.logits_to_keep
        return keep if isinstance(keep, Tensor) and keep.ndim == 2 else None

    @property
    def exit_site(self) -> Site | None:
        """Site after which a stopped run may end: its last step's, if that is in the block after which it stops."""
        if self.stop_after is None:
            return None
        last = self.steps[-1].site if self.steps else None
        in_last_block = last is not None and last.part != "embed" and last.layer == self.stop_after
        # In a block whose attention and MLP are parallel, the keys and values may not be computed yet.
        return last if in_last_block and not self.use_cache else Site(self.stop_after, "resid")

    @property
    def reads_final_residual_only(self) -> bool:
        """Whether nothing is written, and nothing is read but the residual that a stopped run ends with."""
        return all(
            self.stop_after is not None and not step.writes and step.site == Site(self.stop_after, "resid")
            for step in self.steps
        )

    def finished(self, run: Run, cache: KVCache | None) -> Run:
        """The run with the cache in it, if one was asked for."""
        return dataclasses.replace(run, final_cache=cache) if self.use_cache else run


@runtime_checkable
class Engine(Protocol):
    """One way to carry out a plan on a model."""

    def can_run(self, plan: RunPlan) -> bool:
        """Whether the engine gives this plan's results on its model."""
        ...

    def run(self, plan: RunPlan) -> Run:
        """Carry out a plan for which `can_run` is true."""
        ...


class RunStopped(Exception):  # noqa: N818 - the intended end of a run, not an error
    """Leaves the forward pass of a run that stops early."""


@runtime_checkable
class PlannedModel(Protocol):
    """The properties of a model that a plan is checked against."""

    n_layers: int
    family: Family

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        ...

    def width(self, site: Site) -> int:
        """Width of the activation at a site."""
        ...

    def scale(self, site: Site) -> float | int:
        """Factor between what a module computes at a site and what is added to the residual stream."""
        ...


def plan_run(
    model: PlannedModel,
    tokens: Tokens,
    patches: Sequence[Patch] = (),
    read: Sequence[Site] = (),
    *,
    resume: Resume | None = None,
    logits_to_keep: LogitsToKeep = 0,
    stop_after: int | None = None,
    kv_cache: KVCache | None = None,
    use_cache: bool = False,
    unembed: bool = True,
) -> RunPlan:
    """Check the arguments of `Model.run`, sort them into forward order and move them to the model's device.

    Raises:
        ValueError: as `Model.run`.
    """
    if resume is not None:
        _check_resume(model, tokens, resume)
        resume = Resume(resume.layer, resume.resid.to(model.device, model.dtype))
    steps = _steps(model, tokens, patches, read, 0 if resume is None else resume.layer, stop_after)
    keep = _checked_positions(logits_to_keep, tokens)
    _check_cache(model, tokens, kv_cache)
    return RunPlan(
        tokens=Tokens(tokens.ids.to(model.device), tokens.mask.to(model.device)),
        steps=tuple(steps),
        resume=resume,
        logits_to_keep=keep.to(model.device) if isinstance(keep, Tensor) else keep,
        stop_after=stop_after,
        kv_cache=kv_cache,
        use_cache=use_cache,
        unembed=unembed,
    )


def _steps(
    model: PlannedModel,
    tokens: Tokens,
    patches: Sequence[Patch],
    read: Sequence[Site],
    first: int,
    stop_after: int | None,
) -> list[SiteStep]:
    """The steps of a run that starts at block `first`."""
    last = model.n_layers - 1 if stop_after is None else stop_after
    if not first <= last < model.n_layers:
        raise ValueError(f"stop_after is {stop_after}, expected a layer from {first} to {model.n_layers - 1}")
    for site in [patch.site for patch in patches] + list(read):
        _check_site(model, site, first)
        model.width(site)
    late = [site for site in read if site.layer > last]
    if late:
        raise ValueError(f"{late[0]} cannot be read: the run stops after layer {last}")
    writes: dict[Site, list[Write]] = {}
    entries: dict[int, tuple[Tensor, ...]] = {}
    for patch in patches:
        # Severing passes one tensor of positions for many sites; it is checked once.
        if id(patch.positions) not in entries:
            entries[id(patch.positions)] = _entries(patch.positions, tokens)
        if patch.site.layer <= last:
            writes.setdefault(patch.site, []).append(_write(model, patch, entries[id(patch.positions)]))
    reads = set(read)
    return [
        SiteStep(site, tuple(writes.get(site, ())), site in reads, model.family.overwrites, model.scale(site))
        for site in sorted(reads | writes.keys(), key=lambda site: site.order)
    ]


def _check_resume(model: PlannedModel, tokens: Tokens, resume: Resume) -> None:
    if not 1 <= resume.layer < model.n_layers:
        raise ValueError(f"cannot resume at layer {resume.layer}, expected 1 to {model.n_layers - 1}")
    expected = (*tokens.ids.shape, model.width(Site(resume.layer, "resid")))
    if tuple(resume.resid.shape) != expected:
        raise ValueError(f"the residual to resume from is {tuple(resume.resid.shape)}, expected {expected}")


def _check_site(model: PlannedModel, site: Site, first: int) -> None:
    if not 0 <= site.layer < model.n_layers or (site.part == "embed" and site.layer != 0):
        raise ValueError(f"{site} is outside the model of {model.n_layers} layers")
    if site.order < (first, 0) and first > 0:
        raise ValueError(f"{site} is not computed: the run resumes at layer {first}")


def _check_cache(model: PlannedModel, tokens: Tokens, kv_cache: KVCache | None) -> None:
    """Raise ValueError unless the cache has the model's layers and the batch's rows."""
    if kv_cache is None:
        return
    cached_rows, rows = kv_cache.layers[0][0].shape[0], len(tokens.ids)
    if len(kv_cache.layers) != model.n_layers or cached_rows != rows:
        raise ValueError(
            f"the KV cache has {len(kv_cache.layers)} layers and {cached_rows} rows, "
            f"expected {model.n_layers} and {rows}"
        )


def _write(model: PlannedModel, patch: Patch, entries: tuple[Tensor, ...]) -> Write:
    expected = (*patch.positions.shape, model.width(patch.site))
    if tuple(patch.value.shape) != expected:
        raise ValueError(f"the value for {patch.site} is {tuple(patch.value.shape)}, expected {expected}")
    rows, slots, columns = entries
    value, scale = patch.value[rows, slots], model.scale(patch.site)
    return Write(rows, columns, value if scale == 1 else value / scale, patch.add)


def _entries(positions: Int[Tensor, "batch slot"], tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, slots and positions of the entries to write (those not −1)."""
    batch, width = tokens.ids.shape
    if positions.shape[0] != batch:
        raise ValueError(f"a patch has positions for {positions.shape[0]} rows, expected {batch}")
    # On the CPU, so that the checks do not each wait for the accelerator.
    where = positions.cpu()
    if where.numel() and not -1 <= int(where.min()) <= int(where.max()) < width:
        raise ValueError(f"a patch has positions outside −1 to {width - 1}, the batch's width")
    rows, slots = (where >= 0).nonzero(as_tuple=True)
    columns = where[rows, slots]
    if len(torch.unique(rows * width + columns)) != len(rows):
        raise ValueError("a patch writes one position of a row twice; use a patch for each")
    return rows, slots, columns


def _checked_positions(keep: LogitsToKeep, tokens: Tokens) -> LogitsToKeep:
    """`logits_to_keep`, once the positions of each row are known to be in the batch and different.

    A position that stands there twice would get its gradient twice.
    """
    if isinstance(keep, Tensor) and keep.ndim == 2:
        batch, width = tokens.ids.shape
        rows = keep.cpu().sort(dim=1).values
        if len(rows) != batch or not 0 <= int(rows.min()) <= int(rows.max()) < width or (rows.diff(dim=1) == 0).any():
            raise ValueError(f"kept positions {rows.tolist()} are not {batch} rows of different ones below {width}")
    return keep
