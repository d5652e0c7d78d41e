"""Free text and what it is compared with: GE and RS for the scripts that ask for them (`--free`)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from analyses.common.experiment import Experiment
from mechedit.data import Fact, load_facts, load_texts
from mechedit.errors import InputError
from mechedit.evaluation import EvaluationConfig, References
from mechedit.evaluation.references import Key


def free_text(experiment: Experiment) -> tuple[EvaluationConfig, References | None]:
    """Evaluation settings, with GE for `--free` texts per case; and references for RS, if the text has any."""
    if not experiment.arguments.free:
        return experiment.evaluation, None
    config = replace(experiment.evaluation, generation_tokens=100, generation_prompts=experiment.arguments.free)
    return config, references_of(load_facts(experiment.arguments.facts), load_texts(experiment.arguments.texts))


def references_of(facts: Sequence[Fact], texts: Sequence[str], limit: int = 20) -> References:
    """For each relation and object, the first texts that start with a subject of which the facts say so.

    The published release has such texts from Wikipedia, for CounterFact's objects alone.

    Args:
        facts: with their relations.
        texts: one document each; what counts as one about a subject starts with its name.
        limit: most texts per object.

    Raises:
        InputError: no text is about any of the subjects.
    """
    having: dict[str, list[Key]] = defaultdict(list)
    for fact in facts:
        if fact.relation:
            having[fact.subject].append((fact.relation, fact.object.strip()))
    texts_of: dict[Key, list[str]] = defaultdict(list)
    for text in texts:
        subject = _subject(text, having)
        for key in dict.fromkeys(having.get(subject, ())):
            if len(texts_of[key]) < limit:
                texts_of[key].append(text)
    if not any(texts_of.values()):
        raise InputError("no text starts with a subject of the facts, expected some for RS: give others, or --free 0")
    return References.from_texts(texts_of)


def _subject(text: str, having: Mapping[str, Sequence[Key]]) -> str:
    """The longest subject that the text starts with; nothing when it starts with none."""
    words = text.split(" ", 12)[:12]
    starts = (" ".join(words[:count]) for count in range(len(words), 0, -1))
    candidates = (name for start in starts for name in (start, start.removesuffix("'s")))
    return next((name for name in candidates if name in having), "")
