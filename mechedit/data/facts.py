"""`Fact`: a fact to trace. `EditRequest`: a request to edit."""

from __future__ import annotations

from dataclasses import dataclass

from mechedit.errors import InputError


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

    def __post_init__(self) -> None:
        check_template(self.prompt, f"fact {self.id!r}")
        check_text(self.subject, f"fact {self.id!r}: the subject")
        check_text(self.object, f"fact {self.id!r}: the object")
        if self.foil is not None:
            check_text(self.foil, f"fact {self.id!r}: the foil")

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return fill(self.prompt, self.subject)


@dataclass(frozen=True, kw_only=True)
class Neighbor:
    """A prompt about another subject with the same relation and true object, whose answer must not change."""

    prompt: str
    """Prompt with the subject filled in."""
    object: str
    """The true object, without a leading space."""


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

    def __post_init__(self) -> None:
        check_template(self.prompt, f"request {self.id!r}")
        check_text(self.subject, f"request {self.id!r}: the subject")
        check_text(self.target_new, f"request {self.id!r}: target_new")
        if self.target_true is not None:
            check_text(self.target_true, f"request {self.id!r}: target_true")

    @property
    def text(self) -> str:
        """The prompt with the subject in it."""
        return fill(self.prompt, self.subject)


def fill(template: str, subject: str) -> str:
    """Put `subject` in the one `{}` of `template`; other braces in either are left alone."""
    before, after = template.split("{}")
    return before + subject + after


def check_template(template: str, where: str) -> None:
    """Raise InputError unless `template` holds exactly one `{}`."""
    count = template.count("{}")
    if count != 1:
        raise InputError(
            f"{where}: the prompt {template!r} holds {count} times '{{}}', expected exactly one; "
            f"put {{}} where the subject goes"
        )


def check_text(text: str, where: str) -> None:
    """Raise InputError when `text` is empty or blank."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where} is {text!r}, expected text that is not empty; fill it in or drop the record")
