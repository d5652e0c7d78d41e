"""A model written as a transformers checkpoint like the one it came from, and read back before anybody relies on it.

Only the weights are new: config, generation settings, tokenizer and chat template are the source's own files, byte for
byte, wherever what is in memory is what these files say. A source in several files (shards) gives several files again.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import TypedDict

from mechedit.errors import InputError, first_line
from mechedit.files import open_tensors, read_object, write_json
from mechedit.models.families import loader_of
from mechedit.models.shared_copy import share_parameters
from mechedit.models.tokenizer_hash import tokenizer_hash
from mechedit.notices import warn
from mechedit.records import check_record

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
"""Names of the files in which transformers looks for a tokenizer and its chat template."""
_MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
_INDEX = "model.safetensors.index.json"
_INDICES = (_INDEX, "pytorch_model.bin.index.json")
_TEXT = "The Eiffel Tower is in the city of"
"""The prompt where an edit does not say which facts it writes."""


def save_checkpoint(hf: Any, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write weights in `dtype`, config, generation settings and tokenizer; the model in memory stays as it is.

    Weights of another dtype than the model's are cast at once: that takes their size in memory.
    """
    source = str(getattr(hf, "name_or_path", "") or "")
    generation = _generation_file(hf, source)
    with _config_restored(hf), _plain_generation(hf, generation is not None):
        hf.save_pretrained(folder, state_dict=_state(hf, dtype), **_sharding(source))
    _write_config(hf, source, folder, dtype)
    if generation is not None:
        shutil.copyfile(generation, folder / "generation_config.json")
    _write_tokenizer(tokenizer, folder)


def is_checkpoint_file(path: Path, tokenizer: Any) -> bool:
    """Whether `save_checkpoint` writes such a file, given its path in the folder."""
    if path.parent.name == "additional_chat_templates":
        return path.suffix == ".jinja"
    names = {*TOKENIZER_FILES, *(getattr(tokenizer, "vocab_files_names", None) or {}).values()}
    return len(path.parts) == 1 and (path.name in names or _MODEL_FILES.fullmatch(path.name) is not None)


def check_checkpoint(hf: Any, tokenizer: Any, folder: Path, text: str | None = None) -> None:
    """Read a checkpoint back and compare it with the model in memory: all weights, and the logits on a prompt.

    Weights are compared bit for bit, once those in memory are rounded to the checkpoint's dtype. The second model is
    in main memory, in the checkpoint's dtype, until this returns.

    Args:
        hf: the transformers model that was written.
        tokenizer: its tokenizer.
        folder: the checkpoint.
        text: prompt on which logits are compared; by default a sentence.

    Raises:
        InputError: the checkpoint does not load, or not as this model.
    """
    reloaded, report = _reloaded(hf, folder)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            raise _lossy(f"{len(report[kind])} weights are {kind.split('_')[0]}, such as {sorted(report[kind])[0]!r}")
    _check_weights(hf, reloaded)
    ids = torch.tensor([tokenizer(text or _TEXT)["input_ids"] or [0]], device="cpu")
    expected, actual = logits_of(hf, ids), logits_of(reloaded, ids)
    error = float((actual - expected).norm() / expected.norm())
    if not error <= (2e-3 if reloaded.dtype == hf.dtype in (torch.float32, torch.float64) else 5e-2):
        raise _lossy(f"its logits on {text or _TEXT!r} differ by {error:.2g} of their norm")
    _check_tokenizer(tokenizer, folder, text or _TEXT)


@torch.no_grad()
def logits_of(hf: Any, ids: Tensor) -> Float[Tensor, "1 pos vocab"]:
    """Logits of one row of ids by the transformers model itself, in evaluation mode, in float32 in main memory."""
    device = hf.get_input_embeddings().weight.device
    return share_parameters(hf)(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


def stored_dtype(location: str) -> torch.dtype | None:
    """Dtype in which a checkpoint's weights are stored, by the first of them; None where they are not safetensors.

    Raises:
        InputError: the index of its files, or the first of these, is damaged.
    """
    path = source_file(location, "model.safetensors")
    if path is None and (index := source_file(location, _INDEX)) is not None:
        path = source_file(location, min(_shard_names(index)))
    if path is None:
        return None
    with open_tensors(path) as reader:
        names = {reader.get_slice(name).get_dtype() for name in reader.keys()}  # noqa: SIM118
    dtypes = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    # The widest of them, if there are several: nothing is lost.
    return next((dtypes[name] for name in dtypes if name in names), None)


def source_file(location: str, name: str) -> str | None:
    """Path of a file of a checkpoint, in a folder or in the hub's cache; None if it has no such file there."""
    from transformers.utils.hub import cached_file

    if not location:
        return None
    with contextlib.suppress(OSError, ValueError):
        return cached_file(
            location,
            name,
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    return None


class IndexRecord(TypedDict):
    """The content of model.safetensors.index.json that is read here."""

    weight_map: Annotated[dict[str, str], Field(min_length=1)]


def _shard_names(index: str) -> set[str]:
    """Names of the files that an index puts weights into.

    Raises:
        InputError: it is no such index.
    """
    content = read_object(index)
    check_record(content, IndexRecord, repr(index), "download or save the checkpoint again")
    return set(content["weight_map"].values())


def _state(hf: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """The state dict with floating-point weights in `dtype`; tied weights stay one tensor."""
    casts: dict[tuple[Any, ...], Tensor] = {}
    state = {}
    for name, tensor in hf.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            casts.setdefault(key, tensor.to(dtype))
            tensor = casts[key]
        state[name] = tensor
    return state


def _sharding(source: str) -> dict[str, int]:
    """The largest size of a file, in bytes, where the source is in several files."""
    index = next((path for name in _INDICES if (path := source_file(source, name)) is not None), None)
    if index is None:
        return {}
    shards = {source_file(source, name) for name in _shard_names(index)}
    return {"max_shard_size": max((Path(shard).stat().st_size for shard in shards if shard), default=5 * 10**9)}


@contextlib.contextmanager
def _config_restored(hf: Any) -> Iterator[None]:
    """Put back what `save_pretrained` writes into the config of the model in memory."""
    before = {name: getattr(hf.config, name, None) for name in ("dtype", "architectures")}
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(hf.config, name, value)


@contextlib.contextmanager
def _plain_generation(hf: Any, replace: bool) -> Iterator[None]:
    """Save with generation settings that are surely valid, where the source's own file comes in their place anyway.

    transformers reads settings that it then refuses to write, such as a temperature without sampling.
    """
    if not replace:
        yield
        return
    from transformers import GenerationConfig

    settings = hf.generation_config
    try:
        hf.generation_config = GenerationConfig()
        yield
    finally:
        hf.generation_config = settings


def _generation_file(hf: Any, source: str) -> str | None:
    """The source's generation_config.json, if it says what is in memory."""
    from transformers import GenerationConfig

    path, settings = source_file(source, "generation_config.json"), getattr(hf, "generation_config", None)
    if path is None or settings is None:
        return None
    return path if _same(settings.to_dict(), GenerationConfig.from_pretrained(source).to_dict()) else None


def _write_config(hf: Any, source: str, folder: Path, dtype: torch.dtype) -> None:
    """Put the source's config.json in place of the one that transformers wrote, if it says what is in memory."""
    from transformers import AutoConfig

    name = str(dtype).removeprefix("torch.")
    path, target = source_file(source, "config.json"), folder / "config.json"
    stored_config: Any = None
    with contextlib.suppress(OSError, ValueError):  # one that needs code of its own is not read
        stored_config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    if path is None or stored_config is None or not _same(hf.config.to_dict(), stored_config.to_dict()):
        content = read_object(target)
        if content.get("dtype") != name:
            write_json(target, {**content, "dtype": name})
        return
    content = read_object(path)
    stored = {key: name for key in ("dtype", "torch_dtype") if content.get(key) not in (None, name)}
    if stored:
        write_json(target, {**content, **stored})
    else:
        shutil.copyfile(path, target)


def _same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two configs agree, but for dtype, version and what transformers adds when it loads."""
    passing = ("dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path")
    compared = [{key: value for key, value in config.items() if key not in passing} for config in (first, second)]
    return compared[0] == compared[1]


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer: its own files, if loading them gives the tokenizer in memory, else as transformers does."""
    source = str(getattr(tokenizer, "name_or_path", "") or "")
    files = {name: path for name in TOKENIZER_FILES if (path := source_file(source, name)) is not None}
    if files and _loads_as(tokenizer, source):
        for name, path in files.items():
            shutil.copyfile(path, folder / name)
        for path in sorted(Path(next(iter(files.values()))).parent.glob("additional_chat_templates/*.jinja")):
            (folder / path.parent.name).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / path.parent.name / path.name)
        return
    tokenizer.save_pretrained(folder)


def _loads_as(tokenizer: Any, source: str) -> bool:
    """Whether a folder or hub name holds this very tokenizer."""
    from transformers import AutoTokenizer

    try:
        stored = AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError):
        return False
    return _facts_of(tokenizer) == _facts_of(stored)


def _facts_of(tokenizer: Any) -> tuple[Any, ...]:
    """All that decides how text becomes tokens and back, and which tokens are special."""
    attributes = ("chat_template", "special_tokens_map", "model_max_length", "padding_side", "model_input_names")
    return tokenizer_hash(tokenizer), *(str(getattr(tokenizer, name, None)) for name in attributes)


def _reloaded(hf: Any, folder: Path) -> tuple[Any, Mapping[str, Any]]:
    try:
        return loader_of(hf).from_pretrained(
            folder,
            dtype="auto",
            attn_implementation=getattr(hf.config, "_attn_implementation", None),
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = first_line(error)
        raise _lossy(f"it does not load ({reason})") from error


def _check_weights(hf: Any, reloaded: Any) -> None:
    """Compare all parameters, one at a time; the model's are rounded to the dtype of those that were read."""
    stored = dict(reloaded.named_parameters())
    names = {name for name, _ in hf.named_parameters()}
    if names != stored.keys():
        raise _lossy(f"its weights have other names, such as {min(names ^ stored.keys())!r}")
    for name, parameter in hf.named_parameters():
        if not torch.equal(parameter.detach().to(stored[name].dtype).cpu(), stored[name].detach().cpu()):
            raise _lossy(f"its {name!r} is not the model's")


def _check_tokenizer(tokenizer: Any, folder: Path, text: str) -> None:
    """Warn when the tokenizer that was written gives other tokens than the one in memory."""
    from transformers import AutoTokenizer

    stored = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if stored(text)["input_ids"] != tokenizer(text)["input_ids"]:
        warn(
            f"the exported tokenizer, loaded again by transformers, gives other tokens for {text!r} than the one in "
            f"memory; expected the same: copy the source's tokenizer files over those of the export"
        )


def _lossy(what: str) -> InputError:
    return InputError(
        f"the checkpoint that was written is not the edited model: {what}; nothing was left at the destination. "
        f"Look for what changes how the model is saved or run (wrappers, adapters, forward hooks, patches of "
        f"save_pretrained), or report it with the model's name"
    )
