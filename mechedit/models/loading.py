"""`load_model`: a name, a folder or a loaded transformers model becomes a checked `Model`."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from mechedit.arguments import checked
from mechedit.errors import InputError, check_choice, first_line
from mechedit.models import adapters
from mechedit.models.backend import BackendModel
from mechedit.models.engine_check import settle_fast_engine
from mechedit.models.families import auto_class, check_config, check_loadable, is_in_table
from mechedit.models.forward_hooks import user_hooks
from mechedit.models.gguf import dequantized, gguf_file
from mechedit.models.location import check_reachable, file_names, location_of
from mechedit.models.placement import check_in_memory, check_loaded, device_map_of, find_device, find_dtype
from mechedit.models.protocol import Model
from mechedit.models.saving import stored_dtype
from mechedit.models.self_check import self_check
from mechedit.models.tensor_parallel import split_config
from mechedit.models.vocabulary import check_tokenizer

Backend = Literal["transformer_lens", "nnsight"]
_UNPICKLED = (
    "where they are in pickle alone, save the model again with save_pretrained, or, if you trust its source, pass "
    "allow_pickle=True (--allow-pickle)"
)
"""What to do about a checkpoint without safetensors."""
_MERGED = " with its adapter merged"
"""Ends the name of a model whose weights no checkpoint holds."""


@checked
@torch.inference_mode(False)
def load_model(
    source: Any = "tiny",
    *,
    tokenizer: Any = None,
    backend: str = "transformer_lens",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    module: str = "mlp",
    merge_adapter: bool = False,
    allow_pickle: bool = False,
    tp: bool = False,
    remote: bool | str = False,
) -> Model:
    """Load a causal language model, find its parts and check that reading and writing them works.

    A loaded model stays as it is, with one exception: its parameters' `requires_grad` is switched off, since
    the backend runs a copy that shares them. Its tokenizer is not changed.

    Example:
        >>> import mechedit as me
        >>> from mechedit.batching import pad
        >>> model = me.load_model("tiny")  # or ("gpt2-xl", device="cuda", backend="nnsight"), or (hf, tokenizer=...)
        >>> tokens = pad([model.tokenizer("The Eiffel Tower is in")["input_ids"]], model.tokenizer, model.device)
        >>> run = model.run(tokens, read=[me.Site(5, "resid")])
        >>> run[me.Site(5, "resid")].shape == (*tokens.ids.shape, model.d_model)
        True
        >>> next_token = model.tokenizer.decode(run.logits[0, -1].argmax())

    Args:
        source: `tiny` (the model that ships with the package), a hub name, a folder with a checkpoint, a GGUF file or a
            folder with one, or a loaded transformers model. A folder called `tiny` is reached by `./tiny`. A GGUF file
            is dequantized once, into mechedit's cache folder (in `dtype` if it is given, else float32).
        tokenizer: a fast transformers tokenizer; needed with a loaded model, else the source's own.
        backend: `transformer_lens` or `nnsight`; both give the same numbers.
        device: device of the weights; by default the accelerator when there is one, else the CPU. `auto` spreads the
            layers over all accelerators (transformers' `device_map="auto"`). A loaded model is not moved; one that is
            spread over devices is used as it is.
        dtype: float32, bfloat16 or float16; by default float32 on the CPU and for `tiny`, else the
            checkpoint's. A loaded model is not converted.
        module: the module that edits are written into: `mlp`, or `attn` (see `Model.writing`).
        merge_adapter: accept a model that carries an adapter of PEFT (a `PeftModel`, a model after `add_adapter`, a
            folder or hub name with adapter_config.json), and merge the adapter into a copy of the matrices that it
            adapts. The edit is then one of the merged weights. A loaded model keeps its adapter.
        allow_pickle: read weights also from files of pickle (pytorch_model.bin), by torch's reader that makes tensors
            alone (`weights_only`). A pickle is a program; this reader refuses nearly all that one may say, but has had
            holes. Without it only safetensors are read, in which no program can be.
        tp: split each matrix over the processes that torchrun started (tensor parallel), by transformers' plan for the
            family; every process then makes the same calls. For a name or a folder, without `device`. It is run by
            torch's hooks on transformers' modules, whatever the backend.
        remote: run the model on NDIF (nnsight's servers), which needs neither its weights nor an accelerator here;
            a URL names another server, and `local` goes the same way within this process. For tracing: activations are
            read and patched, nothing is written, and no gradient is computed. The self-check is left out.

    Raises:
        InputError: an unknown backend, model, device, dtype or module; weights in pickle alone; damaged files; no fast
            tokenizer, or one that does not fit;
            an architecture that is not supported; an adapter that is not to be merged, or cannot be; a failed
            self-check.
    """
    check_choice("the backend", backend, get_args(Backend))
    if remote:
        return _load_remote(source, tokenizer, remote, dtype, {"device": device, "tp": tp, "module": module != "mlp"})
    if tp:
        _check_split(source, device)
    spread = device == "auto"
    target_device, target_dtype = find_device(None if spread else device), find_dtype(dtype)
    location = None
    if source == "":
        raise InputError('the name of the model is empty, expected "tiny", a hub name, a folder or a GGUF file')
    if isinstance(source, str | Path):
        name = str(source)
        location = location_of(source) if gguf_file(source) is None else ""
        if target_dtype is None and (source == "tiny" or target_device.type == "cpu"):
            target_dtype = torch.float32
        placing = device_map_of(target_device, spread)
        if (file := gguf_file(source)) is not None:
            with input_errors(name):
                location = str(dequantized(file, target_dtype))
        hf = _load(location, name, placing, target_dtype, merge_adapter, allow_pickle, tp)
        check_in_memory(hf)
        tokenizer = _load_tokenizer(location, name) if tokenizer is None else tokenizer
        if not hf.name_or_path:
            name = f"{name}{_MERGED}"
    elif not hasattr(source, "named_modules"):
        raise InputError(
            f"the model is {source!r:.80}, expected a name, a folder, a GGUF file or a loaded transformers model"
        )
    else:
        hf, name = source, _name(source)
        if merge_adapter and adapters.carries_adapter(hf):
            hf, name = adapters.merged(hf, name), f"{name}{_MERGED}"
        adapters.refuse_adapter(hf, name)
        check_loadable(hf)
        check_loaded(hf, target_device if device and not spread else None, target_dtype)
    # Of a damaged checkpoint some settings are only read once the model runs.
    of_files = location is not None
    with input_errors(name) if of_files else contextlib.nullcontext():
        check_tokenizer(tokenizer, hf.get_input_embeddings().weight.shape[0], name)
    try:
        model = _wrap(hf, tokenizer, name, "transformers" if tp else backend)
        self_check(model)
        settle_fast_engine(model)
        model = model.writing(module)
    except Exception as error:
        # A hook may make the model's own code or a backend fail with any error.
        if hooks := user_hooks(hf):
            shown = "; ".join(hooks[:3]) + (f"; {len(hooks) - 3} more" if len(hooks) > 3 else "")
            raise InputError(
                f"{first_line(error)}. But {shown}: remove it (.remove() of its handle) and load again"
            ) from error
        with input_errors(name) if of_files else contextlib.nullcontext():
            raise
    if location is not None:
        model.checkpoint_dtype = stored_dtype(location)
    return model


def checkpoint_config(source: str | Path) -> Any:
    """The config of a checkpoint, whose weights need not be there, or the config in a file.

    Raises:
        InputError: there is none, or it is damaged.
    """
    from transformers import AutoConfig

    name = str(source)
    with input_errors(name):
        location = name if Path(name).is_file() else location_of(source)
        check_reachable(location if not Path(name).is_file() else str(Path(name).parent))
        return AutoConfig.from_pretrained(location, trust_remote_code=False)


def shipped_tokenizer() -> Any:
    """The tokenizer of the model that ships with the package."""
    return _load_tokenizer(location_of("tiny"), "tiny")


def transformers_model(model: Model) -> Any:
    """The clean transformers model inside a `Model`, for other libraries that take one."""
    return model.hf


def _load_remote(
    source: Any, tokenizer: Any, remote: bool | str, dtype: Any, others: Mapping[str, object]
) -> BackendModel:
    """A model that runs on a server: config and tokenizer are read, weights are not.

    Raises:
        InputError: no name, options that do not go with it, or a family whose parts are only found by running it.
    """
    if not isinstance(source, str | Path) or gguf_file(source) is not None:
        raise InputError(f"the model is {source!r:.80}, expected a hub name with remote: the server has the weights")
    if conflicting := [name for name, value in others.items() if value]:
        raise InputError(
            f"remote is given together with {', '.join(conflicting)}, expected alone: the server decides these"
        )
    from nnsight import TransformersModel

    from mechedit.models.remote_backend import RemoteModel

    name, location = str(source), location_of(source)
    config = checkpoint_config(source)
    check_config(config)
    if not is_in_table(config):
        raise InputError(
            f"the parts of {name!r} ({config.model_type}) are only found by running it, expected a family that is "
            f"known beforehand with remote (such as Llama, Mistral, Qwen, Gemma, GPT-2, GPT-J)"
        )
    tokenizer = _load_tokenizer(location, name) if tokenizer is None else tokenizer
    with input_errors(name):
        placing: dict[str, Any] = (
            {"device": "cpu", "dtype": find_dtype(dtype) or torch.float32} if remote == "local" else {}
        )
        # It has a tokenizer of its own, since nnsight changes its padding.
        wrapped = TransformersModel(
            location, task="text-generation", tokenizer=_load_tokenizer(location, name), dispatch=False, **placing
        )
    check_tokenizer(tokenizer, wrapped._module.get_input_embeddings().weight.shape[0], name)
    return RemoteModel(wrapped, tokenizer, name=name, remote=remote)


def _check_split(source: Any, device: object) -> None:
    """Refuse what cannot be split over processes.

    Raises:
        InputError: no checkpoint of transformers, or a device, which each process has of its own.
    """
    if not isinstance(source, str | Path) or gguf_file(source) is not None:
        raise InputError(
            f"the model is {source!r:.80}, expected a hub name or a folder with tp, since each process reads its part "
            f"of the weights: save the model with save_pretrained, and pass the folder"
        )
    if device is not None:
        raise InputError(f"the device is {str(device)!r}, expected none with tp: each process has its own")


def _wrap(hf: Any, tokenizer: Any, name: str, backend: str) -> BackendModel:
    # Imported here: importing TransformerLens takes seconds, and importing nnsight adds methods to all objects.
    if backend == "transformers":
        from mechedit.models.tensor_parallel_backend import TensorParallelModel as ModelClass
    elif backend == "nnsight":
        from mechedit.models.nnsight_backend import NNsightModel as ModelClass
    else:
        from mechedit.models.transformer_lens_backend import TransformerLensModel as ModelClass
    return ModelClass(hf, tokenizer, name=name)


def _load(
    location: str,
    name: str,
    device_map: Any,
    dtype: torch.dtype | None,
    merge_adapter: bool,
    allow_pickle: bool,
    tp: bool = False,
) -> Any:
    """Load weights to their device; the config is checked before, so that refusing a model costs no download."""
    from transformers import AutoConfig

    with input_errors(name):
        check_reachable(location)
        if adapters.adapter_config(location) is not None:
            if tp:
                raise InputError(
                    f"the model {name!r} is an adapter, expected a whole model with tp: merge it and save it"
                )
            if not merge_adapter:
                raise InputError(
                    f"the model {name!r} is an adapter (adapter_config.json) for the base model "
                    f"{adapters.base_of(location)!r}; expected a plain model: load the base model, or pass "
                    f"merge_adapter=True (--merge-adapter) to edit the base model with the adapter merged"
                )
            if not allow_pickle:
                _refuse_pickle(location, name, "adapter_model.safetensors", "adapter_model.bin")
            adapted = adapters.load_adapter(
                location, lambda base: _load(location_of(base), base, device_map, dtype, True, allow_pickle)
            )
            return adapters.merged(adapted, name)
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        check_config(config)
        placing = {"distributed_config": split_config(config, name)} if tp else {"device_map": device_map}
        if not allow_pickle:
            _refuse_pickle(location, name, "model*.safetensors", "pytorch_model*.bin")
        try:
            loaded: Any = auto_class(config).from_pretrained(
                location,
                dtype=dtype or "auto",
                **placing,
                trust_remote_code=False,
                # None takes what there is, safetensors first.
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
        except OSError as error:
            if allow_pickle or "safetensors" not in str(error):
                raise
            raise InputError(
                f"the model {name!r} has no weights in safetensors ({first_line(error)}); expected some: {_UNPICKLED}"
            ) from error
    hf, report = loaded
    if report["missing_keys"]:
        # Such weights are drawn at random, with no more than a warning.
        raise InputError(
            f"the checkpoint of {name!r} lacks {len(report['missing_keys'])} of its weights (such as "
            f"{min(report['missing_keys'])!r}); expected a complete one: save it again with save_pretrained"
        )
    return hf


def _refuse_pickle(location: str, name: str, safetensors: str, pickle: str) -> None:
    """Refuse a checkpoint whose weights are in pickle alone.

    Args:
        location: a folder, or a hub name.
        name: of the model, for the message.
        safetensors: pattern of the files that are read.
        pickle: pattern of those that are not.

    Raises:
        InputError: says how to convert it, and how to read it all the same.
    """
    names = file_names(location)
    pickled = fnmatch.filter(names, pickle)
    if pickled and not fnmatch.filter(names, safetensors):
        raise InputError(
            f"the weights of {name!r} are in pickle ({pickled[0]}), which is a program and not only numbers; expected "
            f"safetensors: {_UNPICKLED}"
        )


def _load_tokenizer(location: str, name: str) -> Any:
    """The tokenizer of a checkpoint; an adapter without one has its base model's."""
    from transformers import AutoTokenizer

    with input_errors(name):
        if adapters.adapter_config(location) is not None and not _has_tokenizer(location):
            return _load_tokenizer(location_of(adapters.base_of(location)), name)
        return AutoTokenizer.from_pretrained(location, trust_remote_code=False)


def _has_tokenizer(location: str) -> bool:
    from transformers.utils.hub import cached_file

    return cached_file(location, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is not None


@contextlib.contextmanager
def input_errors(name: str) -> Iterator[None]:
    """Turn errors of files, network and checkpoints into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # Configs and checkpoints that are damaged fail with any error.
        raise InputError(
            f'cannot load the model {name!r} ({first_line(error)}); expected "tiny", a hub name or a folder '
            f"with config.json, weights and tokenizer: check the name, the folder or the network"
        ) from error


def _name(hf: Any) -> str:
    return getattr(hf, "name_or_path", "") or type(hf).__name__
