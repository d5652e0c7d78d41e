"""Models that run on a server (NDIF), through nnsight: reads and patches, no gradients, and nothing is written.

A run is one request: the tokens, the values to be written, and the block below, whose source nnsight sends. There are
neither shortcuts nor caches: a run that resumes at a block computes those below it as well, and writes the residual
over theirs; one behind a prefix computes the prefix again (`run_again`).
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal, NoReturn

import nnsight
import torch
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import override

from mechedit.errors import InputError
from mechedit.models.backend import BackendModel
from mechedit.models.engines import at_kept_positions
from mechedit.models.family import Family
from mechedit.models.protocol import Run
from mechedit.models.readout import WholeReadout
from mechedit.models.run_plan import Engine, RunPlan, SiteStep, Write
from mechedit.models.sites import Site

Remote = bool | Literal["local"] | str
"""Where a run goes: True to NDIF, a URL to another server, `local` the same way within this process."""


class RemoteEngine:
    """Carries out plans without caches in nnsight's remote traces."""

    def __init__(self, wrapped: Any, family: Family, remote: Remote) -> None:
        self.wrapped, self.family, self.remote = wrapped, family, remote

    def can_run(self, plan: RunPlan) -> bool:
        """Whether the plan neither has a cache nor asks for one."""
        return plan.kv_cache is None and not plan.use_cache

    def run(self, plan: RunPlan) -> Run:
        """Send one request.

        Raises:
            InputError: a gradient is asked for.
        """
        steps = _from_tokens(plan)
        if torch.is_grad_enabled() and any(write.value.requires_grad for step in steps for write in step.writes):
            raise InputError(
                "a run on a server gives no gradients, expected one that reads and patches; load the model without "
                "remote to search for targets, or to estimate effects"
            )
        # The server has no mechedit: the block may only name tensors, numbers, texts, and what nnsight resolves there.
        model, remote = self.wrapped, self.remote
        ids, mask = plan.tokens.ids, plan.tokens.mask
        visits = [self._visit(step) for step in steps]
        exit_path = None if plan.exit_site is None else self.family.path(plan.exit_site)
        exits_at_input = plan.exit_site is not None and _is_input(plan.exit_site)
        head_path = None if plan.unembed or exit_path is not None else _head_path(model)
        states: list[Tensor] = []
        results: list[Tensor] = []
        with model.trace(ids, attention_mask=mask, use_cache=False, remote=remote) as tracer:
            states = nnsight.save([])
            results = nnsight.save([])
            for path, is_input, writes, read in visits:
                envoy = model.get(path)
                activation = envoy.input if is_input else envoy.output
                state = activation[0] if isinstance(activation, tuple) else activation
                shape = state.shape
                state = state.reshape(ids.shape[0], ids.shape[1], -1).clone()
                for rows, columns, value, add in writes:
                    value = value.to(state)
                    state[rows, columns] = state[rows, columns] + value if add else value
                if read:
                    states.append(state.clone())
                if writes:
                    state = state.reshape(shape)
                    if is_input:
                        envoy.input = state
                    else:
                        envoy.output = (state, *activation[1:]) if isinstance(activation, tuple) else state
            if exit_path is not None:
                if not visits or visits[-1][0] != exit_path:
                    _ = model.get(exit_path).input if exits_at_input else model.get(exit_path).output
                tracer.stop()
            elif head_path is not None:
                results.append(model.get(head_path).input)
                tracer.stop()
            else:
                results.append(model.output.logits)
        reads = [step for step in steps if step.read]
        values = {step.site: value.detach() * step.scale for step, value in zip(reads, states, strict=True)}
        if not results:
            return Run(None, values)
        final = at_kept_positions(plan, {}, results[0].detach())
        if plan.positions_per_row is not None:
            final = final.take_along_dim(plan.positions_per_row[..., None].to(final.device), 1)
        return Run(final, values) if plan.unembed else Run(None, values, None, final)

    def _visit(self, step: SiteStep) -> tuple[str, bool, list[tuple[Tensor, Tensor, Tensor, bool]], bool]:
        """A step in plain values: module, whether its input is meant, what is written, whether it is read."""
        writes = [(write.rows, write.columns, write.value.detach(), write.add) for write in step.writes]
        return self.family.path(step.site), _is_input(step.site), writes, step.read


class RemoteModel(BackendModel):
    """A model on a server, whose sizes are known here, and whose weights are not."""

    backend = "nnsight"

    def __init__(self, wrapped: Any, tokenizer: Any, *, name: str, remote: Remote) -> None:
        self._wrapped, self._remote = wrapped, remote
        super().__init__(wrapped._module, tokenizer, name=name)
        self.keeps_keys = False

    @override
    def _make_engines(self) -> tuple[Engine, ...]:
        return (RemoteEngine(self._wrapped, self.family, self._remote),)

    @property
    @override
    def device(self) -> torch.device:
        """Where results are: the CPU."""
        return torch.device("cpu")

    @override
    def readout(self) -> WholeReadout:
        return WholeReadout()

    @override
    def weights_hash(self, *, blocks: bool = True) -> str:
        """SHA-256 of the name by which the server knows the weights, which are not seen here."""
        return hashlib.sha256(f"remote {self.name}".encode()).hexdigest()

    @override
    def cast_hashes(self, dtypes: Any = None) -> dict[str, str]:
        """None: the weights are not seen."""
        return {}

    @override
    def writing(self, module: str) -> RemoteModel:
        if module != "mlp":
            self._refuse("choose another module to write into")
        return self

    @override
    def projection(self, layer: int) -> NoReturn:
        self._refuse("read or write weights")

    @override
    def down_projection(self, layer: int) -> NoReturn:
        self._refuse("read or write weights")

    @override
    def write_projection_(self, layer: int, weight: Float[Tensor, "d_key d_model"]) -> NoReturn:
        self._refuse("read or write weights")

    @override
    def unembed(self, resid: Float[Tensor, "batch d_model"]) -> NoReturn:
        self._refuse("unembed states")

    @override
    def next_logits(self, ids: Any, mask: Any, cache: Any = None, rows: Any = None) -> NoReturn:
        self._refuse("generate text")

    @override
    def save_pretrained(self, folder: Any, *, dtype: Any = None, text: str | None = None) -> NoReturn:
        self._refuse("save weights")

    @override
    def logits_with_adapter(self, folder: Any, ids: Int[Tensor, "1 pos"]) -> NoReturn:
        self._refuse("add an adapter")

    def _refuse(self, what: str) -> NoReturn:
        raise InputError(
            f"the model {self.name!r} runs on a server that others use too, and its weights are not here: nothing but "
            f"reading and patching activations is possible, found an attempt to {what}; load the model without remote"
        )


def _from_tokens(plan: RunPlan) -> list[SiteStep]:
    """The steps of a run that starts with the tokens: a residual to resume from is written over the computed one."""
    if plan.resume is None:
        return list(plan.steps)
    rows, columns = torch.ones(plan.tokens.ids.shape, dtype=torch.bool).nonzero(as_tuple=True)
    write = Write(rows, columns, plan.resume.resid.flatten(0, 1))
    return [SiteStep(Site(plan.resume.layer - 1, "resid"), (write,), False), *plan.steps]


def _is_input(site: Site) -> bool:
    return site.part in ("attn_key", "mlp_key")


def _head_path(wrapped: Any) -> str:
    """The unembedding, from the model."""
    head = wrapped._module.get_output_embeddings()
    return next(name for name, module in wrapped._module.named_modules() if module is head)
