"""The model that both backends implement: weight-sharing copies, and the engines that run them.

`Model.run` makes a plan (`plan`) and hands it to the first engine that can run it: the fast one (`fast_engine`), the
unhooked copy's own forward, or the backend's hooks (`engines`).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mechedit.errors import InputError, check_choice
from mechedit.models.adapters import logits_with_adapter
from mechedit.models.display import html_summary, summary
from mechedit.models.edited_module import EditedModule
from mechedit.models.engines import HookedEngine, UnhookedEngine, max_positions, takes
from mechedit.models.families import attention_window, family_of, keeps_scores
from mechedit.models.fast_engine import FastEngine
from mechedit.models.kv_cache import KVCache
from mechedit.models.model_lock import ModelLock, Region, exclusive_method
from mechedit.models.plain_state import plain_state
from mechedit.models.projections import unwritable
from mechedit.models.protocol import LogitsToKeep, Patch, Resume, Run, Tokens
from mechedit.models.readout import Readout, WholeReadout, find_readout
from mechedit.models.run_again import run_again
from mechedit.models.run_plan import Engine, RunPlan, plan_run
from mechedit.models.saving import check_checkpoint, save_checkpoint
from mechedit.models.self_check import check_projection
from mechedit.models.shared_copy import share_parameters, with_fast_gelu
from mechedit.models.shortcuts import blocks_of, replace_forwards, skip_blocks
from mechedit.models.sites import MODULES, Module, Site
from mechedit.models.tokenizer_hash import tokenizer_hash
from mechedit.models.vocabulary import has_tokens_without_row, padded_with_rows
from mechedit.models.weights_hash import DTYPES, WeightsHash
from mechedit.provenance import VERSION, ModelIdentity

_EDIT_LOG = "_mechedit_applied"
_TEMPORARY_EDITS = "_mechedit_temporary_edits"
_CHECKPOINT_DTYPE = "_mechedit_checkpoint_dtype"
_LOCK = "_mechedit_lock"


class BackendModel(EditedModule):
    """A transformers model, run through copies that share its parameters; the base of both backends' models.

    The backend wraps a copy, never `hf`: edits in place are seen by both, while `hf` keeps its modules,
    so that `hf.save_pretrained` and `hf.generate` work. Sharing has one visible effect: `requires_grad` is
    switched off for the parameters of both.

    Raises:
        InputError: an architecture that is not supported (`family_of`), or MLP weights of another kind than
            floating-point Linear or Conv1D.
    """

    backend: str
    engine: ClassVar[type[HookedEngine]]
    """The backend's engine."""
    has_own_functions: ClassVar[bool] = True
    """Whether blocks may be computed by functions of our own in place of the modules'."""

    def __init__(self, hf: Any, tokenizer: Any, *, name: str) -> None:
        super().__init__(hf, family_of(hf), name)
        self.tokenizer = tokenizer
        self._weights_hash = WeightsHash()
        # In one step, as two threads may make models around the same weights.
        self._lock: ModelLock = vars(hf).setdefault(_LOCK, ModelLock())
        self.fast_engine: FastEngine | None = None
        """The fast engine, once `engine_check` has found a way of its own that gives the model's numbers."""
        self._engines = self._make_engines()
        self.n_heads: int = _n_heads(hf.config.get_text_config())
        self.vocab_size: int = hf.get_input_embeddings().weight.shape[0]
        self.max_positions: int = max_positions(hf.config)
        self._lacks_rows = has_tokens_without_row(tokenizer, self.vocab_size)
        self._readout: Readout | WholeReadout | None = None
        self.keeps_keys = True
        """Whether earlier positions are skipped by keeping attention's keys and values; else they are run again."""

    def _make_engines(self) -> tuple[Engine, ...]:
        """Make weight-sharing copies of the model, and the engines that run them, the fastest first."""
        self.unhooked_copy, self.hooked_copy = (share_parameters(self.hf) for _ in range(2))
        if self.has_own_functions:
            self.unhooked_copy, self.hooked_copy = map(with_fast_gelu, (self.unhooked_copy, self.hooked_copy))
        attention = getattr(self.hf.config, "_attn_implementation", None)
        # Other kinds of attention expect another mask than the one that the hooked copy makes.
        interchangeable = attention in (None, "eager", "sdpa")
        hooked = self.engine(self.hooked_copy, self.family, self.unhooked_copy if interchangeable else None)
        # After wrapping, because a backend may have made parameters of its own.
        self.hooked_copy.requires_grad_(False)
        if not interchangeable:
            return (hooked,)
        if attention is not None:
            self.unhooked_copy.config._attn_implementation = self.hooked_copy.config._attn_implementation
        unhooked = UnhookedEngine(self.unhooked_copy, self.family)
        if not self.has_own_functions:
            return (unhooked, hooked)
        self.fast_engine = FastEngine(self.unhooked_copy, self.family)
        return (self.fast_engine, unhooked, hooked)

    def __repr__(self) -> str:
        return summary(self)

    def _repr_html_(self) -> str:
        return html_summary(self)

    @property
    def mesh(self) -> DeviceMesh | None:
        """The processes over which the weights are split; see `mechedit.models.protocol.Model.mesh`."""
        return None

    @property
    def device(self) -> torch.device:
        """Device of the weights (of the token embedding, when they are spread)."""
        return self.hf.get_submodule(self.family.embedding).weight.device

    @property
    def keeps_scores(self) -> bool:
        """Whether attention's scores are all in memory at once; see `mechedit.models.protocol.Model.keeps_scores`."""
        return keeps_scores(self.hf.config)

    @property
    def checkpoint(self) -> str:
        """Hub name or folder that the weights were loaded from; empty for a model made in memory."""
        return str(getattr(self.hf, "name_or_path", "") or "")

    @property
    def edit_log(self) -> tuple[Any, ...]:
        """The edits applied to the weights, oldest first; kept on `hf`, which owns the weights."""
        return getattr(self.hf, _EDIT_LOG, ())

    @edit_log.setter
    def edit_log(self, entries: tuple[Any, ...]) -> None:
        setattr(self.hf, _EDIT_LOG, entries)

    @property
    def temporary_edits(self) -> int:
        """Number of edits that are on the weights within `edited` blocks only; counted on `hf`, as `edit_log` is."""
        return getattr(self.hf, _TEMPORARY_EDITS, 0)

    @temporary_edits.setter
    def temporary_edits(self, count: int) -> None:
        setattr(self.hf, _TEMPORARY_EDITS, count)

    def __copy__(self) -> BackendModel:
        view = object.__new__(type(self))
        vars(view).update(vars(self))
        return view

    def __reduce_ex__(self, protocol: object) -> Any:
        raise InputError(
            f"{self!r} is to be pickled or copied deeply, expected its transformers model: load_model(copy.deepcopy("
            f"model.hf), tokenizer=model.tokenizer) wraps a copy of it"
        )

    def exclusive(self) -> AbstractContextManager[Region]:
        """Nobody else uses the model within the block; see `mechedit.models.protocol.Model.exclusive`."""
        return self._lock.exclusive()

    def run(
        self,
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
    ) -> Run:
        """One forward pass; see `mechedit.models.protocol.Model.run`."""
        if self._lacks_rows:
            tokens = Tokens(padded_with_rows(tokens.ids, tokens.mask, self.vocab_size, self.tokenizer), tokens.mask)
        self._check_length(tokens.mask)
        plan = plan_run(
            self,
            tokens,
            patches,
            read,
            resume=resume,
            logits_to_keep=logits_to_keep,
            stop_after=stop_after,
            kv_cache=kv_cache,
            use_cache=use_cache,
            unembed=unembed,
        )
        with self._lock.running(lambda: self.runs_at_once), plain_state(self):
            if not self.keeps_keys and (plan.use_cache or plan.kv_cache is not None):
                run = run_again(plan, self._carry_out, self.n_layers)
            else:
                run = self._carry_out(plan)
        # Layers may be on several devices.
        return run.on(self.device)

    @property
    def runs_at_once(self) -> bool:
        """Whether several threads may call `run` at once; see `mechedit.models.protocol.Model.runs_at_once`."""
        return self.fast_engine is not None and self.fast_engine.runs_at_once and self.keeps_keys

    @property
    def skips_padding(self) -> bool:
        """Whether padding costs next to nothing; see `mechedit.models.protocol.Model.skips_padding`."""
        return self.fast_engine is not None and self.fast_engine.skips_padding

    def _check_length(self, mask: Int[Tensor, "batch pos"]) -> None:
        """Refuse a row of more tokens than the model has positions for, whose embedding would be looked up in vain.

        Raises:
            InputError: says how many tokens it has.
        """
        if mask.shape[1] <= self.max_positions:
            return
        longest = int((mask != 0).sum(1).max())
        if longest > self.max_positions:
            raise InputError(
                f"a text has {longest} tokens, expected at most {self.max_positions}, all that {self.name!r} can take: "
                f"shorten it"
            )

    def _carry_out(self, plan: RunPlan) -> Run:
        """Run the plan in the first engine that can."""
        return next(engine for engine in self._engines if engine.can_run(plan)).run(plan)

    @torch.no_grad()
    @exclusive_method
    def next_logits(
        self,
        ids: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch all"],
        cache: Any = None,
        rows: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Float[Tensor, "batch vocab"], Any]:
        """One step of text generation; see `mechedit.models.protocol.Model.next_logits`."""
        if self._lacks_rows:
            ids = padded_with_rows(ids, mask[:, -ids.shape[1] :], self.vocab_size, self.tokenizer)
        if rows is not None:
            cache.batch_select_indices(rows)
        last = {"logits_to_keep": 1} if takes(self.hf, "logits_to_keep") else {}
        output = self.hf(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **last)
        return output.logits[:, -1], output.past_key_values

    @property
    def end_tokens(self) -> list[int]:
        """Ids of the tokens that end a text, by the tokenizer and by the model's generation settings, ascending."""
        settings = getattr(self.hf, "generation_config", None)
        ids: set[int] = set()
        for entry in (self.tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)):
            ids.update(token for token in (entry if isinstance(entry, list) else [entry]) if token is not None)
        return sorted(ids)

    def writing(self, module: str) -> BackendModel:
        """The same model with edits written into `module`; see `mechedit.models.protocol.Model.writing`."""
        check_choice("the module", module, MODULES)
        view = copy.copy(self)
        view.module = cast(Module, module)
        view.d_key = view._key_width(view.module)
        if view.module == "attn" and not view.d_key:
            raise unwritable(view, 0, "attn")
        if view.module != self.module:
            check_projection(view)
        return view

    def window(self, layer: int) -> int | None:
        """Width of a block's attention window, the token itself included; None where all positions are seen."""
        return attention_window(self.hf.config, layer)

    @torch.no_grad()
    @exclusive_method
    def unembed(self, resid: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocab"]:
        """Next-token logits of residuals after the last block: final norm, unembedding and logit caps, as in `run`."""
        states = resid[:, None].to(self.device, self.dtype)
        # The model's own forward with every block skipped, so that caps and scales of logits are not forgotten.
        with replace_forwards(skip_blocks(blocks_of(self.unhooked_copy, self.family), states, self.family)):
            ids = torch.zeros(len(states), 1, dtype=torch.long, device=self.device)
            return self.unhooked_copy(input_ids=ids, use_cache=False).logits[:, 0]

    def readout(self) -> Readout | WholeReadout:
        """What reads log-probabilities off `Run.head_inputs`; see `mechedit.models.protocol.Model.readout`."""
        if self._readout is None:
            self._readout = self._find_readout()
        return self._readout

    @torch.inference_mode(False)
    @torch.no_grad()
    @exclusive_method
    def _find_readout(self) -> Readout | WholeReadout:
        """The readout, held against the model's own logits."""
        head = self.unhooked_copy.get_output_embeddings()
        if type(head) is not nn.Linear:
            return WholeReadout()
        ids = torch.arange(min(4, self.vocab_size), device=self.device)[None]
        tokens = Tokens(ids, torch.ones_like(ids))
        states, logits = self.run(tokens, unembed=False).head_inputs[0], self.run(tokens).logits[0]
        return find_readout(head, self.hf.config, states, logits)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The transformers model's parameters, with the names that its checkpoints use."""
        return self.hf.named_parameters()

    @property
    def checkpoint_dtype(self) -> torch.dtype:
        """Dtype in which the checkpoint holds the weights; that of the model, where it was not loaded from one."""
        return getattr(self.hf, _CHECKPOINT_DTYPE, None) or self.dtype

    @checkpoint_dtype.setter
    def checkpoint_dtype(self, dtype: torch.dtype | None) -> None:
        setattr(self.hf, _CHECKPOINT_DTYPE, dtype)

    @exclusive_method
    def save_pretrained(self, folder: str | Path, *, dtype: torch.dtype | None = None, text: str | None = None) -> None:
        """Write a transformers checkpoint and read it back; see `mechedit.models.protocol.Model.save_pretrained`."""
        save_checkpoint(self.hf, self.tokenizer, Path(folder), dtype or self.dtype)
        check_checkpoint(self.hf, self.tokenizer, Path(folder), text)

    @exclusive_method
    def logits_with_adapter(self, folder: str | Path, ids: Int[Tensor, "1 pos"]) -> Float[Tensor, "1 pos vocab"] | None:
        """Logits with an adapter of PEFT on the model; see `mechedit.models.protocol.Model.logits_with_adapter`."""
        return logits_with_adapter(self.hf, Path(folder), ids)

    @exclusive_method
    def weights_hash(self, *, blocks: bool = True) -> str:
        """SHA-256 over the parameters as they are now: all of them, or only those outside the blocks."""
        parameters = {
            name: parameter
            for name, parameter in self.hf.named_parameters()
            if blocks or not name.startswith(f"{self.family.blocks}.")
        }
        return self._weights_hash.of(parameters)

    @exclusive_method
    def cast_hashes(self, dtypes: Collection[str] | None = None) -> dict[str, str]:
        """Hashes of the weights as they are now, rounded to other dtypes; see `Model.cast_hashes`."""
        names = [name for name in dtypes or DTYPES if DTYPES[name] != self.dtype]
        hashes = self._weights_hash.as_cast(dict(self.hf.named_parameters()), [DTYPES[name] for name in names])
        return {name: hashes[DTYPES[name]] for name in names}

    def identity(self) -> ModelIdentity:
        """Weights, tokenizer, dtype and edited module as they are now: what decides whether a result may be reused."""
        return ModelIdentity(
            dtype=str(self.dtype).removeprefix("torch."),
            tokenizer=tokenizer_hash(self.tokenizer),
            weights=self.weights_hash(),
            module=self.module,
        )

    def provenance(self) -> dict[str, Any]:
        """Name, backend, weights hash, tokenizer hash, dtype, edited module, and mechedit version."""
        return {
            "mechedit": VERSION,
            "model": self.name,
            "backend": self.backend,
            **self.identity().record,
        }


def _n_heads(config: Any) -> int:
    """Attention heads per layer; the most of any layer where they differ."""
    layers = getattr(config, "per_layer_config", None)
    if layers is None:
        return getattr(config, "num_attention_heads", 1)
    return max(getattr(layers[layer], "num_attention_heads", 1) for layer in range(config.num_hidden_layers))
