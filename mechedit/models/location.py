"""Where a model comes from: a folder, a hub name, or the package itself; and what lies there."""

from __future__ import annotations

import ssl
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from mechedit.errors import InputError
from mechedit.models.saving import source_file
from mechedit.paths import expanded_path

_TINY = Path(__file__).parent / "tiny"


def check_reachable(location: str) -> None:
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


def location_of(source: str | Path) -> str:
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


def file_names(location: str) -> list[str]:
    """Names of the files in a folder, or of those of a hub name that are in the cache."""
    config = source_file(location, "config.json") or source_file(location, "adapter_config.json")
    folder = Path(location) if Path(location).is_dir() else Path(config).parent if config else None
    return [] if folder is None else [path.name for path in folder.iterdir()]
