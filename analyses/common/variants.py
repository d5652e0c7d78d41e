"""Methods as the command line names them: which, in which layers, with which settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mechedit.cli import parse_layers
from mechedit.errors import InputError, brief, check_choice
from mechedit.methods import METHODS
from mechedit.report import span

SINGLE = frozenset({"rome", "ft", "ft_l", "ft_w"})
"""Methods that write into one layer: ROME can write no more, and the papers fine-tune one (MEMIT Appendix B.1)."""
EVERYWHERE = frozenset({"kn"})
"""Methods that look for where to write in all layers."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A method, the layers it writes to, and what is changed of the settings that ship with the model."""

    method: str
    layers: tuple[int, ...]
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The method and what is changed."""
        return ", ".join([self.method, *(f"{name} {value}" for name, value in self.settings.items())])

    @staticmethod
    def parse(text: str, layers: Sequence[int]) -> Variant:
        """Read `memit`, `rome@2` or `memit@1-4:strategy=sqrt;clamp=1`; `layers` are those of a method without any.

        Raises:
            InputError: an unknown method, or layers or settings that cannot be read.
        """
        head, colon, changes = text.partition(":")
        method, at, where = head.strip().partition("@")
        check_choice("the method", method, METHODS, "choose one; between two of its settings stands ; and no comma")
        if colon and not changes.strip():
            raise InputError(f"the method {brief(text)} ends with :, expected settings after it; leave it out")
        return Variant(method=method, layers=tuple(parse_layers(where) if at else layers), settings=_settings(changes))


def _settings(text: str) -> dict[str, str]:
    """Read `strategy=sqrt;clamp=1`, which may be empty.

    Raises:
        InputError: what stands between two ; is no setting, or one that was there before.
    """
    settings: dict[str, str] = {}
    for change in filter(None, map(str.strip, text.split(";"))):
        name, equals, value = (part.strip() for part in change.partition("="))
        if not (name and equals and value) or name in settings:
            raise InputError(
                f"the setting {brief(change)} of a method cannot be read, expected name=value with ; between two, "
                f"each once, as in memit:strategy=sqrt;clamp=1; see --methods"
            )
        settings[name] = value
    return settings


def by_name(variants: Sequence[Variant]) -> dict[str, Variant]:
    """Variants by their names, with their layers where the name alone does not tell them apart."""
    names = [variant.name for variant in variants]
    return {
        name
        if names.count(name) == 1
        else f"{name}, layer{'s'[: len(variant.layers) - 1]} {span(variant.layers)}": variant
        for name, variant in zip(names, variants, strict=True)
    }
