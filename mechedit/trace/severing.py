"""Severing: a module's outputs held to their corrupted values, in all layers or some, at some of the prompt's tokens.

`Sever.parse` is the only reader of severing labels, and `Sever.in_words` writes them for people.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mechedit.bounds import check_sequences
from mechedit.errors import InputError, brief, read_whole
from mechedit.models import read_layer_range
from mechedit.trace.labels import ROLES, SEVER_LABELS

MODULES = ("nothing", "mlp", "attn")
_MOST_POSITIONS = 100_000_000
_FORM = re.compile(r"(?P<module>[a-z]+)(@(?P<layers>[0-9+\-]+))?(:(?P<places>[a-z_0-9+\-]+))?")
_EXPECTED = "expected nothing, mlp or attn, such as mlp, mlp@3, mlp@2-4+7 or attn:last"
_PLACE_WORDS = {
    "before": "the tokens before the subject",
    "subject_first": "the first subject token",
    "subject_middle": "the middle subject tokens",
    "subject_last": "the last subject token",
    "after": "the first token after the subject",
    "further": "the further tokens",
    "last": "the last token",
}


@dataclass(frozen=True, kw_only=True)
class Sever:
    """Module outputs held to their values in the corrupted run of the same noise sample.

    Written as a label, `module[@layers][:places]`: `mlp` is every layer's MLP at the subject's last token (ROME
    §2.2, MEMIT Appendix A), `mlp@3` that of layer 3 alone, `mlp@2-4+7` those of layers 2, 3, 4 and 7, `attn:last`
    attention at the last prompt token, `mlp:subject_last+after` two places, `mlp:-2` the last prompt token but one.
    """

    module: str
    """`nothing`, `mlp` or `attn`."""
    layers: tuple[int, ...] | None = None
    """Layers that are severed; None means all."""
    places: tuple[str | int, ...] = ("subject_last",)
    """Roles, or positions in the prompt (negative ones from its end)."""

    def __post_init__(self) -> None:
        check_sequences(self)
        if not isinstance(self.module, str) or self.module not in MODULES:
            raise InputError(f"sever holds {brief(self.module)}, {_EXPECTED}")
        for role in self.places:
            if isinstance(role, str) and role not in ROLES:
                raise InputError(
                    f"sever holds the place {brief(role)}, expected a position or one of {', '.join(ROLES)}"
                )

    @staticmethod
    def parse(label: str) -> Sever:
        """Read a label.

        Raises:
            InputError: it cannot be read.
        """
        match = _FORM.fullmatch(label) if isinstance(label, str) else None
        if match is None or (match["module"] == "nothing" and match[0] != "nothing"):
            raise InputError(f"sever holds {brief(label)}, {_EXPECTED}")
        try:
            layers = None if match["layers"] is None else _layers(match["layers"])
            places = [_place(word) for word in (match["places"] or "subject_last").split("+")]
        except InputError as error:
            raise InputError(f"sever holds {brief(label)}: {error}; {_EXPECTED}") from error
        return Sever(module=match["module"], layers=layers, places=tuple(places))

    @staticmethod
    def parse_if_known(label: str) -> Sever | None:
        """Read a label of a table of effects; None where it is not one of ours."""
        try:
            return Sever.parse(label)
        except InputError:
            return None

    @property
    def label(self) -> str:
        """The shortest label that `parse` reads back as this; it stands in the column `sever` of effects."""
        layers = "" if self.layers is None else "@" + "+".join(_spans(self.layers, "-"))
        places = "" if self.places == ("subject_last",) else ":" + "+".join(map(str, self.places))
        return self.module + layers + places

    def in_words(self) -> str:
        """The severing for people, as in `MLP severed, layers 2–4 and 7, at the last token`.

        The subject's last token, where the papers sever, goes without saying.
        """
        words = SEVER_LABELS[self.module]
        if self.layers is not None:
            words += f", layer{'s' if len(self.layers) > 1 else ''} {_joined(_spans(self.layers, '–'))}"
        if self.places != ("subject_last",):
            words += f"{'' if self.layers is None else ','} at {_joined(list(map(_place_words, self.places)))}"
        return words

    def at(self, roles: Sequence[str]) -> tuple[int, ...]:
        """Positions that are severed in a prompt whose tokens have these roles.

        Raises:
            InputError: a position outside the prompt.
        """
        positions: set[int] = set()
        for role_or_position in self.places:
            if isinstance(role_or_position, str):
                positions |= {i for i, role in enumerate(roles) if role == role_or_position}
            elif -len(roles) <= role_or_position < len(roles):
                positions.add(role_or_position % len(roles))
            else:
                raise InputError(
                    f"sever {brief(self.label)} names position {role_or_position} of a prompt of {len(roles)} tokens"
                )
        return tuple(sorted(positions))

    def holds(self, layer: int) -> bool:
        """Whether a layer is severed."""
        return self.layers is None or layer in self.layers

    def through(self, n_layers: int) -> tuple[int, ...]:
        """Layers that are severed in a model of `n_layers`.

        Raises:
            InputError: a layer that the model lacks.
        """
        if self.layers is None:
            return tuple(range(n_layers))
        if max(self.layers) >= n_layers:
            raise InputError(f"sever {brief(self.label)} names layer {max(self.layers)}, expected 0 to {n_layers - 1}")
        return self.layers


def sever_in_words(label: str) -> str:
    """The severing of a label for people; a label that is not ours is shown as it is."""
    sever = Sever.parse_if_known(label)
    return f"{label} severed" if sever is None else sever.in_words()


def _layers(text: str) -> tuple[int, ...]:
    return tuple(sorted({layer for span in text.split("+") for layer in read_layer_range(span, repr(text))}))


def _place(word: str) -> str | int:
    if not re.fullmatch(r"-?[0-9]+", word):
        return word
    return (-1 if word.startswith("-") else 1) * read_whole("a position", word.removeprefix("-"), _MOST_POSITIONS)


def _place_words(role_or_position: str | int) -> str:
    if isinstance(role_or_position, str):
        return _PLACE_WORDS[role_or_position]
    from_end = role_or_position < 0
    return f"position {-role_or_position} from the end" if from_end else f"position {role_or_position}"


def _spans(layers: Sequence[int], dash: str) -> list[str]:
    present = set(layers)
    starts = [layer for layer in layers if layer - 1 not in present]
    ends = [layer for layer in layers if layer + 1 not in present]
    return [str(a) if a == b else f"{a}{dash}{b}" for a, b in zip(starts, ends, strict=True)]


def _joined(words: Sequence[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if len(words) > 1 else []), words[-1]])
