"""`load_model`: a name, a folder or a loaded transformers model becomes a checked `Model`."""

from __future__ import annotations

import contextlib
import fnmatch
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import torch

from mechedit.errors import InputError, brief, check_choice
from mechedit.models import adapters
from mechedit.models.backend import BackendModel
from mechedit.models.engine_check import settle_fast_engine
from mechedit.models.families import auto_class, check_config, check_loadable
from mechedit.models.forward_hooks import user_hooks
from mechedit.models.gguf import dequantized, gguf_file
from mechedit.models.protocol import Model
from mechedit.models.saving import source_file, stored_dtype
from mechedit.models.self_check import self_check
from mechedit.models.vocabulary import check_tokenizer
from mechedit.models.weights_hash import DTYPES
from mechedit.paths import expanded_path

Backend = Literal["transformer_lens", "nnsight"]
_UNPICKLED = (
    "where they are in pickle alone, save the model again with save_pretrained, or, if you trust its source, pass "
    "allow_pickle=True (--allow-pickle)"
)
"""What to do about a checkpoint without safetensors."""
_TINY = Path(__file__).parent / "tiny"
_MERGED = " with its adapter merged"
"""Ends the name of a model whose weights no checkpoint holds."""


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

    Raises:
        InputError: an unknown backend, model, device, dtype or module; weights in pickle alone; damaged files; no fast
            tokenizer, or one that does not fit;
            an architecture that is not supported; an adapter that is not to be merged, or cannot be; a failed
            self-check.
    """
    check_choice("the backend", backend, get_args(Backend))
    spread = device == "auto"
    target_device, target_dtype = _device(None if spread else device), _dtype(dtype)
    location = None
    if source == "":
        raise InputError('the name of the model is empty, expected "tiny", a hub name, a folder or a GGUF file')
    if isinstance(source, str | Path):
        name = str(source)
        location = _location(source) if gguf_file(source) is None else ""
        if target_dtype is None and (source == "tiny" or target_device.type == "cpu"):
            target_dtype = torch.float32
        placing = _device_map(target_device, spread)
        if (file := gguf_file(source)) is not None:
            with input_errors(name):
                location = str(dequantized(file, target_dtype))
        hf = _load(location, name, placing, target_dtype, merge_adapter, allow_pickle)
        _check_in_memory(hf)
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
        _check_loaded(hf, target_device if device and not spread else None, target_dtype)
    # Of a damaged checkpoint some settings are only read once the model runs.
    of_files = location is not None
    with input_errors(name) if of_files else contextlib.nullcontext():
        check_tokenizer(tokenizer, hf.get_input_embeddings().weight.shape[0], name)
    try:
        model = _wrap(hf, tokenizer, name, backend)
        self_check(model)
        settle_fast_engine(model)
        model = model.writing(module)
    except Exception as error:
        # A hook may make the model's own code or a backend fail with any error.
        if hooks := user_hooks(hf):
            shown = "; ".join(hooks[:3]) + (f"; {len(hooks) - 3} more" if len(hooks) > 3 else "")
            raise InputError(
                f"{_first_line(error)}. But {shown}: remove it (.remove() of its handle) and load again"
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
        location = name if Path(name).is_file() else _location(source)
        _check_reachable(location if not Path(name).is_file() else str(Path(name).parent))
        return AutoConfig.from_pretrained(location, trust_remote_code=False)


def shipped_tokenizer() -> Any:
    """The tokenizer of the model that ships with the package."""
    return _load_tokenizer(_location("tiny"), "tiny")


def transformers_model(model: Model) -> Any:
    """The clean transformers model inside a `Model`, for other libraries that take one."""
    return model.hf


def _wrap(hf: Any, tokenizer: Any, name: str, backend: str) -> BackendModel:
    # Imported here: importing TransformerLens takes seconds, and importing nnsight adds methods to all objects.
    if backend == "nnsight":
        from mechedit.models.nnsight_backend import NNsightModel as ModelClass
    else:
        from mechedit.models.transformer_lens_backend import TransformerLensModel as ModelClass
    return ModelClass(hf, tokenizer, name=name)


def _load(
    location: str, name: str, device_map: Any, dtype: torch.dtype | None, merge_adapter: bool, allow_pickle: bool
) -> Any:
    """Load weights to their device; the config is checked before, so that refusing a model costs no download."""
    from transformers import AutoConfig

    with input_errors(name):
        _check_reachable(location)
        if adapters.adapter_config(location) is not None:
            if not merge_adapter:
                raise InputError(
                    f"the model {name!r} is an adapter (adapter_config.json) for the base model "
                    f"{adapters.base_of(location)!r}; expected a plain model: load the base model, or pass "
                    f"merge_adapter=True (--merge-adapter) to edit the base model with the adapter merged"
                )
            if not allow_pickle:
                _refuse_pickle(location, name, "adapter_model.safetensors", "adapter_model.bin")
            adapted = adapters.load_adapter(
                location, lambda base: _load(_location(base), base, device_map, dtype, True, allow_pickle)
            )
            return adapters.merged(adapted, name)
        config = AutoConfig.from_pretrained(location, trust_remote_code=False)
        check_config(config)
        if not allow_pickle:
            _refuse_pickle(location, name, "model*.safetensors", "pytorch_model*.bin")
        try:
            loaded: Any = auto_class(config).from_pretrained(
                location,
                dtype=dtype or "auto",
                device_map=device_map,
                trust_remote_code=False,
                # None takes what there is, safetensors first.
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
        except OSError as error:
            if allow_pickle or "safetensors" not in str(error):
                raise
            raise InputError(
                f"the model {name!r} has no weights in safetensors ({_first_line(error)}); expected some: {_UNPICKLED}"
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
    names = _file_names(location)
    pickled = fnmatch.filter(names, pickle)
    if pickled and not fnmatch.filter(names, safetensors):
        raise InputError(
            f"the weights of {name!r} are in pickle ({pickled[0]}), which is a program and not only numbers; expected "
            f"safetensors: {_UNPICKLED}"
        )


def _file_names(location: str) -> list[str]:
    """Names of the files in a folder, or of those of a hub name that are in the cache."""
    config = source_file(location, "config.json") or source_file(location, "adapter_config.json")
    folder = Path(location) if Path(location).is_dir() else Path(config).parent if config else None
    return [] if folder is None else [path.name for path in folder.iterdir()]


def _load_tokenizer(location: str, name: str) -> Any:
    """The tokenizer of a checkpoint; an adapter without one has its base model's."""
    from transformers import AutoTokenizer

    with input_errors(name):
        if adapters.adapter_config(location) is not None and not _has_tokenizer(location):
            return _load_tokenizer(_location(adapters.base_of(location)), name)
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
            f'cannot load the model {name!r} ({_first_line(error)}); expected "tiny", a hub name or a folder '
            f"with config.json, weights and tokenizer: check the name, the folder or the network"
        ) from error


def _check_reachable(location: str) -> None:
    """Fail at once when a hub name is not in the cache and there is no network.

    The hub's client would retry for half a minute.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    if Path(location).is_dir() or constants.HF_HUB_OFFLINE:
        return
    if isinstance(try_to_load_from_cache(location, "config.json"), str):
        return
    try:
        urlopen(constants.ENDPOINT, timeout=10).close()
    except HTTPError:
        return
    except URLError as error:
        # The hub's client has certificates of its own, which may work.
        if not isinstance(error.reason, ssl.SSLError):
            raise


def _location(source: str | Path) -> str:
    """The source as transformers takes it: an existing folder, or a hub name."""
    name = str(source)
    # The source itself is compared, so that Path("tiny") is a folder like any other.
    folder = _TINY if source == "tiny" else expanded_path(name)
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return str(folder)
    if source == "tiny":
        raise InputError(
            'the model "tiny" is missing from this installation (its folder holds no config.json); expected '
            "it to ship with the package: install mechedit again"
        )
    if folder.is_dir():
        raise InputError(
            f"the folder {name!r} holds no config.json, expected a transformers checkpoint (config, weights, "
            f"tokenizer): pass the folder that save_pretrained wrote"
        )
    if isinstance(source, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or folder.exists():
        raise InputError(
            f'there is no model folder {name!r}; expected "tiny", a hub name or an existing folder: check the path'
        )
    return name


def _device(device: str | torch.device | None) -> torch.device:
    if str(device).partition(":")[0] == "meta":
        raise InputError(
            "the device is 'meta', which holds no numbers; expected cpu or an accelerator of this machine: choose "
            "another with --device"
        )
    if device is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        # An empty tensor there shows that the device exists and works.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"the device {brief(str(device))} cannot be used ({_first_line(error):.120}); expected cpu or an "
            f"accelerator of this machine: choose another with --device"
        ) from error


def _device_map(device: torch.device, spread: bool) -> Any:
    """Where transformers puts weights while it reads them; None for the CPU, where it puts them by itself."""
    if device.type == "cpu":
        return None
    return "auto" if spread else {"": device}


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    check_choice("the dtype", name, DTYPES)
    return DTYPES[name]


def _check_in_memory(hf: Any) -> None:
    """Refuse weights that are elsewhere: an edit in place would not reach them."""
    if any(parameter.is_meta for parameter in hf.parameters()):
        raise InputError(
            "the loaded model has weights without data (on the device 'meta'), as when offloaded to disk; "
            "expected all of them in memory: load it without offloading, in a smaller dtype or on more devices"
        )


def _check_loaded(hf: Any, device: Any, dtype: torch.dtype | None) -> None:
    """A loaded model belongs to the caller: refuse to move or convert it."""
    _check_in_memory(hf)
    if any(parameter.is_inference() for parameter in hf.parameters()):
        raise InputError(
            "the loaded model was made under torch.inference_mode(), so its weights cannot be written to outside of "
            "it and give no gradients; expected ordinary weights: load it before, or pass its name or folder"
        )
    weight = hf.get_input_embeddings().weight
    if (device and device != weight.device) or (dtype and dtype != weight.dtype):
        raise InputError(
            f"the loaded model is {weight.dtype} on {weight.device}, but dtype {dtype} on device {device} "
            f"was asked for; a loaded model is used where it is: call .to(...) on it first"
        )


def _name(hf: Any) -> str:
    return getattr(hf, "name_or_path", "") or type(hf).__name__


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
