"""GGUF files (llama.cpp's) as plain checkpoints: dequantized once by transformers, and kept in the cache folder.

Reading one takes minutes, since every matrix is dequantized; the checkpoint that is kept is mapped in seconds. It is
found again by the file's path, size and time of change, so that a file that was replaced is read anew.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from mechedit.atomic import atomic_folder
from mechedit.cache import cache_folder
from mechedit.errors import InputError, first_line
from mechedit.files import write_json
from mechedit.paths import expanded_path, writable_folder
from mechedit.provenance import value_hash

_MARK = "gguf.json"
"""File of a cached checkpoint that says what it was made of; written last."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_ALGORITHM = 1
"""Raised when the conversion changes, so that older ones are not reused."""


def gguf_file(source: str | Path) -> Path | None:
    """The GGUF file that a source names: the file itself, or the only one in a folder without other weights.

    Raises:
        InputError: a folder holds several of them and no other weights.
    """
    path = expanded_path(source)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    if not path.is_dir() or any(next(path.glob(pattern), None) for pattern in _WEIGHTS):
        return None
    candidates = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    if len(candidates) > 1:
        raise InputError(
            f"the folder {str(source)!r} holds {len(candidates)} GGUF files ({candidates[0].name}, "
            f"{candidates[1].name} …), expected one: pass the path of the file"
        )
    return candidates[0] if candidates else None


def dequantized(path: Path, dtype: torch.dtype | None) -> Path:
    """Folder of a plain checkpoint with a GGUF file's weights, made if it is not in the cache.

    Args:
        path: of the file.
        dtype: in which the weights are kept; by default float32, which holds all dequantized values.

    Raises:
        InputError: the package gguf is not installed, or transformers cannot read the file.
    """
    dtype = dtype or torch.float32
    stat = path.stat()
    made_of = {
        "file": str(path.resolve()),
        "size": stat.st_size,
        "changed": stat.st_mtime_ns,
        "dtype": str(dtype).removeprefix("torch."),
        "algorithm": _ALGORITHM,
    }
    folder = cache_folder() / "gguf" / f"{path.stem}-{value_hash(made_of)[:16]}"
    if (folder / _MARK).is_file():
        return folder
    _require_package(path)
    # The others wait, and then find it finished.
    with FileLock(writable_folder(folder.parent) / f".{folder.name}.lock"):
        if not (folder / _MARK).is_file():
            with atomic_folder(folder) as temporary:
                _convert(path, temporary, dtype)
                write_json(temporary / _MARK, made_of)
    return folder


def _require_package(path: Path) -> None:
    from transformers.utils.import_utils import is_gguf_available

    if not is_gguf_available():
        raise InputError(
            f"{str(path)!r} is a GGUF file, and reading it needs the package gguf, which is not installed: "
            f"pip install 'mechedit[gguf]' (or gguf)"
        )


@torch.no_grad()
def _convert(path: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the weights, as transformers dequantizes them, into a plain checkpoint with the file's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False}
    try:
        quantized: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=dtype, **arguments)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **arguments)
    except Exception as error:
        # The readers of a damaged file raise what they stumble over, such as struct.error or IndexError.
        reason = first_line(error)
        raise InputError(
            f"transformers cannot read the GGUF file {str(path)!r} ({reason}); expected one of an architecture that "
            f"it dequantizes: use the model's plain checkpoint"
        ) from error
    config = copy.deepcopy(quantized.config)
    # It would say that the plain weights are quantized.
    config.__dict__.pop("quantization_config", None)
    with torch.device("meta"):
        plain: Any = type(quantized)(config)
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = quantized.generation_config
    plain.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
