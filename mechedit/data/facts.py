"""`Fact`: a fact to trace. `EditRequest`: a request to edit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mechedit.data.json_records import UnclearRecordError
from mechedit.errors import InputError, brief, check_characters

NO_TURN = "{}"
"""The turn of a prompt that stands alone."""

_LEFT_OUT: dict[str, Any] = {"joint": None, "turn": NO_TURN}
"""Fields that a record has only where they differ from this, so that what was made before they existed stays valid."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One (subject, relation, object) triple, with a prompt that the object completes (ROME §2)."""

    id: str
    """Unique name of the fact in its file."""
    subject: str
    """Text that is put into the prompt."""
    prompt: str
    """Template with exactly one `{}` where the subject goes."""
    object: str
    """Text that completes the prompt, without a leading space."""
    relation: str | None = None
    """Name of the relation, such as a Wikidata property."""
    foil: str | None = None
    """Another object, whose logit is subtracted from the object's in logit differences."""
    joint: str | None = None
    """Text between the prompt and the object; by default decided by the two characters that meet."""
    turn: str = NO_TURN
    """Text around the whole prompt, context template included, with `{}` for it: a chat template's user turn."""

    def __post_init__(self) -> None:
        check_text(self.id, "the id of a fact")
        check_template(self.prompt, f"fact {brief(self.id)}")
        check_surroundings(self.joint, self.turn, f"fact {brief(self.id)}")
        check_text(self.subject, f"fact {brief(self.id)}: the subject")
        check_text(self.object, f"fact {brief(self.id)}: the object")
        check_names(f"fact {brief(self.id)}", foil=self.foil, relation=self.relation)

    @property
    def template(self) -> str:
        """The prompt in its turn, with `{}` for the subject."""
        return fill(self.turn, self.prompt)

    @property
    def text(self) -> str:
        """The prompt with the subject in it, in its turn."""
        return fill(self.template, self.subject)

    def plain(self) -> dict[str, Any]:
        """The fact as JSON holds it and as it is hashed: without a joint or a turn where it has none of its own."""
        return asdict(self, dict_factory=_record)


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """A prompt about another subject with the same relation and true object, whose answer must not change."""

    prompt: str
    """Prompt with the subject filled in."""
    object: str
    """The true object, without a leading space."""
    joint: str | None = None
    """Text between the prompt and the object; by default decided by the two characters that meet."""

    def __post_init__(self) -> None:
        check_surroundings(self.joint, NO_TURN, "a neighbor")
        check_text(self.prompt, "a neighbor: the prompt")
        check_text(self.object, "a neighbor: the object")

    def plain(self) -> dict[str, Any]:
        """The neighbor as JSON holds it, without a joint where it has none of its own."""
        return asdict(self, dict_factory=_record)


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """One fact to write, and the prompts that evaluate the edit, named as in CounterFact."""

    id: str
    """Unique name of the request in its file."""
    subject: str
    """Text that is put into the prompt."""
    prompt: str
    """Template with exactly one `{}` where the subject goes."""
    target_new: str
    """Object to write, without a leading space."""
    target_true: str | None = None
    """Object that the edit replaces; needed for ES, PS and NS."""
    relation: str | None = None
    """Name of the relation, such as a Wikidata property."""
    paraphrases: tuple[str, ...] = ()
    """Other prompts for the same fact, with the subject filled in (for PS)."""
    neighbors: tuple[Neighbor, ...] = ()
    """Prompts about other subjects with the same true object (for NS)."""
    attributes: tuple[str, ...] = ()
    """Prompts about subjects for which the new object is true (for RS)."""
    generations: tuple[str, ...] = ()
    """Prompts that start free text about the subject (for GE)."""
    target_id: str | None = None
    """Id of the new object in the data set (a Wikidata id), by which its reference texts for RS are looked up."""
    joint: str | None = None
    """Text between a prompt and an object; by default decided by the two characters that meet."""
    turn: str = NO_TURN
    """Text around the whole prompt, context template included, with `{}` for it: a chat template's user turn."""

    def __post_init__(self) -> None:
        check_text(self.id, "the id of a request")
        check_template(self.prompt, f"request {brief(self.id)}")
        check_surroundings(self.joint, self.turn, f"request {brief(self.id)}")
        check_text(self.subject, f"request {brief(self.id)}: the subject")
        check_text(self.target_new, f"request {brief(self.id)}: target_new")
        names = {"target_true": self.target_true, "relation": self.relation, "target_id": self.target_id}
        check_names(f"request {brief(self.id)}", **names)
        for name in ("paraphrases", "attributes", "generations"):
            for text in _items(self, name, str):
                check_text(text, f"request {brief(self.id)}: one of its {name}")
                if name != "attributes":
                    self._check_place(text, name)
        _items(self, "neighbors", Neighbor)

    @property
    def template(self) -> str:
        """The prompt in its turn, with `{}` for the subject."""
        return fill(self.turn, self.prompt)

    @property
    def text(self) -> str:
        """The prompt with the subject in it, in its turn."""
        return fill(self.template, self.subject)

    def _check_place(self, text: str, name: str) -> None:
        """Refuse a prompt with several places for the subject; beside the subject itself, braces are text."""
        count = text.count("{}")
        if count > 1 and self.subject not in text:
            raise UnclearRecordError(
                f"request {brief(self.id)}: one of its {name}, {brief(text)}, holds {count} times '{{}}', expected "
                f"at most "
                f"one; put {{}} where the subject goes",
                f"no clear place for the subject in one of its {name}",
            )

    def plain(self) -> dict[str, Any]:
        """The request as JSON holds it and as it is hashed: without a joint or a turn where it has none of its own."""
        return asdict(self, dict_factory=_record)


def fill(template: str, subject: str) -> str:
    """Put `subject` in the one `{}` of `template`; other braces in either are left alone."""
    before, after = template.split("{}")
    return before + subject + after


def check_template(template: str, where: str, name: str = "prompt", content: str = "subject") -> None:
    """Raise InputError unless `template` holds exactly one `{}`.

    Args:
        template: text with a `{}`.
        where: names the record in the message.
        name: what the template is.
        content: what is put into it.
    """
    if not isinstance(template, str):
        raise InputError(f"{where}: the {name} is {brief(template)}, expected text with one {{}}: fix it")
    count = template.count("{}")
    if count != 1:
        raise InputError(
            f"{where}: the {name} {brief(template)} holds {count} times '{{}}', expected exactly one; "
            f"put {{}} where the {content} goes"
        )
    check_characters(f"{where}: the {name}", template)


def check_surroundings(joint: str | None, turn: str, where: str) -> None:
    """Raise InputError unless the joint is text, of which any will do, and the turn holds one `{}`."""
    if joint is not None and not isinstance(joint, str):
        raise InputError(
            f"{where}: the joint is {brief(joint)}, expected text, such as ' ' or '', or None to have it decided by "
            f"the "
            f"characters that meet"
        )
    if joint is not None:
        check_characters(f"{where}: the joint", joint)
    check_template(turn, where, "turn", "prompt")


def check_text(text: str, where: str) -> None:
    """Raise InputError when `text` is empty or blank, or holds half a character."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where} is {brief(text)}, expected text that is not empty; fill it in or drop the record")
    check_characters(where, text)


def check_names(where: str, **texts: str | None) -> None:
    """As `check_text`, of fields by name that may be absent."""
    for name, text in texts.items():
        if text is not None:
            check_text(text, f"{where}: the {name}")


def _items(request: EditRequest, name: str, kind: type) -> Sequence[Any]:
    """The items of a field, of which a text would pass for its letters."""
    items = getattr(request, name)
    if not isinstance(items, tuple | list) or not all(isinstance(item, kind) for item in items):
        raise InputError(
            f"request {brief(request.id)}: the {name} are {brief(items)}, expected a tuple of "
            f"{'texts' if kind is str else kind.__name__}: put them in ( , )"
        )
    return items


def _record(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in pairs if name not in _LEFT_OUT or value != _LEFT_OUT[name]}
