"""Free text and what it is compared with: GE and RS for the scripts that ask for them (`--free`)."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd

from analyses.common.experiment import Experiment
from mechedit.data import EditRequest, Fact, load_facts, load_texts
from mechedit.evaluation import EvaluationConfig, References
from mechedit.evaluation.references import Key

OWN = "GE own"
"""The measure's name where no record brings prompts for free text, so that it is not taken for the papers'."""


@dataclass(frozen=True, kw_only=True)
class FreeText:
    """What the scores of free text are made of."""

    requests: Sequence[EditRequest]
    """The experiment's, with prompts for free text where `--free` asks for it."""
    config: EvaluationConfig
    """With GE for `--free` texts per case."""
    references: References | None
    """What RS compares with; None without free text, and where the text has nothing about the facts' subjects."""
    has_own_prompts: bool
    """Whether the prompts are the records' own."""

    def named(self, scores: pd.DataFrame) -> pd.DataFrame:
        """Scores with GE under the name that it has here."""
        return scores.replace({"measure": {"GE": OWN}}) if self.has_own_prompts else scores


def free_text(experiment: Experiment) -> FreeText:
    """What `--free` asks for: prompts, settings, and references for RS."""
    requests, config = experiment.requests, experiment.evaluation
    if not experiment.arguments.free:
        return FreeText(requests=requests, config=config, references=None, has_own_prompts=False)
    has_own_prompts = not any(request.generations for request in requests)
    return FreeText(
        requests=[with_own_prompts(request) for request in requests] if has_own_prompts else requests,
        config=replace(config, generation_tokens=100, generation_prompts=experiment.arguments.free),
        references=references_of(load_facts(experiment.arguments.facts), load_texts(experiment.arguments.texts)),
        has_own_prompts=has_own_prompts,
    )


def with_own_prompts(request: EditRequest) -> EditRequest:
    """The request, whose reworded prompts start free text; its own prompt where it has none."""
    return replace(request, generations=request.paraphrases or (request.text,))


def references_of(facts: Sequence[Fact], texts: Sequence[str], limit: int = 20) -> References | None:
    """For each relation and object, the first texts that start with a subject of which the facts say so.

    The published release has such texts from Wikipedia, for CounterFact's objects alone.

    Args:
        facts: with their relations.
        texts: one document each; what counts as one about a subject starts with its name.
        limit: most texts per object.

    Returns:
        None, with a warning, where no text is about any of the subjects.
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
        warnings.warn(
            "no text starts with a subject of the facts: RS is left out; it needs other --texts", stacklevel=2
        )
        return None
    return References.from_texts(texts_of)


def _subject(text: str, having: Mapping[str, Sequence[Key]]) -> str:
    """The longest subject that the text starts with; nothing when it starts with none."""
    words = text.split(" ", 12)[:12]
    starts = (" ".join(words[:count]) for count in range(len(words), 0, -1))
    candidates = (name for start in starts for name in (start, start.removesuffix("'s")))
    return next((name for name in candidates if name in having), "")
