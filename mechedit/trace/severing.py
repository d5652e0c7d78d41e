"""What is cut: a module's outputs, in all layers or some, at the subject's last token or elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mechedit.errors import InputError
from mechedit.trace.labels import ROLES

MODULES = ("nothing", "mlp", "attn")
_FORM = re.compile(r"(?P<module>[a-z]+)(@(?P<layers>[0-9+\-]+))?(:(?P<places>[a-z_0-9+\-]+))?")
_WANTED = "expected nothing, mlp or attn, such as mlp, mlp@3, mlp@2-4+7 or attn:last"


@dataclass(frozen=True, kw_only=True)
class Sever:
    """Outputs held to their values in the corrupted run of the same noise draw.

    Written as a label, `module[@layers][:places]`: `mlp` is every layer's MLP at the subject's last token (MEMIT
    §3.2), `mlp@3` that of layer 3 alone, `mlp@2-4+7` those of layers 2, 3, 4 and 7, `attn:last` attention at the
    last prompt token, `mlp:subject_last+after` two places, `mlp:-2` the last prompt token but one.
    """

    module: str
    """`nothing`, `mlp` or `attn`."""
    layers: tuple[int, ...] | None = None
    """None means all."""
    places: tuple[str | int, ...] = ("subject_last",)
    """Roles, or positions in the prompt (negative ones from its end)."""

    def __post_init__(self) -> None:
        if self.module not in MODULES:
            raise InputError(f"sever holds {self.module!r}, {_WANTED}")
        for place in self.places:
            if isinstance(place, str) and place not in ROLES:
                raise InputError(f"sever holds the place {place!r}, expected a position or one of {', '.join(ROLES)}")

    @staticmethod
    def parse(label: str) -> Sever:
        """Read a label.

        Raises:
            InputError: it cannot be read.
        """
        match = _FORM.fullmatch(label)
        if match is None or (match["module"] == "nothing" and match[0] != "nothing"):
            raise InputError(f"sever holds {label!r}, {_WANTED}")
        try:
            layers = None if match["layers"] is None else _layers(match["layers"])
        except ValueError as error:
            raise InputError(f"sever holds {label!r}: its layers cannot be read, {_WANTED}") from error
        places = [_place(word) for word in (match["places"] or "subject_last").split("+")]
        return Sever(module=match["module"], layers=layers, places=tuple(places))

    @property
    def label(self) -> str:
        """The shortest label that `parse` reads back as this; it is what stands in `effects.sever`."""
        layers = "" if self.layers is None else "@" + _spans(self.layers)
        places = "" if self.places == ("subject_last",) else ":" + "+".join(map(str, self.places))
        return self.module + layers + places

    def at(self, roles: Sequence[str]) -> tuple[int, ...]:
        """Positions that are cut in a prompt whose tokens have these roles.

        Raises:
            InputError: a position outside the prompt.
        """
        found: set[int] = set()
        for place in self.places:
            if isinstance(place, str):
                found |= {i for i, role in enumerate(roles) if role == place}
            elif -len(roles) <= place < len(roles):
                found.add(place % len(roles))
            else:
                raise InputError(f"sever {self.label!r} names position {place} of a prompt of {len(roles)} tokens")
        return tuple(sorted(found))

    def through(self, n_layers: int) -> tuple[int, ...]:
        """Layers that are cut in a model of `n_layers`.

        Raises:
            InputError: a layer that the model lacks.
        """
        if self.layers is None:
            return tuple(range(n_layers))
        if max(self.layers) >= n_layers:
            raise InputError(f"sever {self.label!r} names layer {max(self.layers)}, expected 0 to {n_layers - 1}")
        return self.layers


def _layers(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for part in text.split("+"):
        first, *rest = (int(end) for end in part.split("-"))
        (last,) = rest or (first,)
        if last < first:
            raise ValueError(f"{part} runs backwards")
        found |= set(range(first, last + 1))
    return tuple(sorted(found))


def _place(word: str) -> str | int:
    return int(word) if re.fullmatch(r"-?[0-9]+", word) else word


def _spans(layers: Sequence[int]) -> str:
    starts = [layer for layer in layers if layer - 1 not in layers]
    ends = [layer for layer in layers if layer + 1 not in layers]
    return "+".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
