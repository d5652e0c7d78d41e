"""The smallest model that takes every step, made in code, with facts, requests and texts for it.

It says the last word of a prompt once more, which is enough for facts that it knows.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from helpers.models import SENTENCES, random_hf, small_tokenizer
from mechedit.models import Model, load_model

NAME = "smallest"
SUBJECTS = (
    "Leon Blum", "Paris", "Rome", "Apple", "Miles", "Seattle", "France", "Toko", "Edwin", "Lima", "Oslo", "Ada",
    "Danielle", "Eiffel", "Space",
)  # fmt: skip
PROMPTS = {"is": "{} is", "in": "The {} in", "was": "{} was"}
"""What it says after each prompt."""


def smallest_model() -> Model:
    """GPT-2 with three layers of 32 channels."""
    hf = random_hf("gpt2", seed=4, n_positions=32)
    hf.name_or_path = hf.config._name_or_path = NAME
    return load_model(hf, tokenizer=small_tokenizer())


def write_data(folder: Path) -> None:
    """Write facts.json, requests.json (two), held_out.json (others) and texts.txt into a folder."""
    facts = [
        {"id": f"{subject} {word}", "subject": subject, "prompt": prompt, "object": word}
        for word, prompt in list(PROMPTS.items())[:2]
        for subject in SUBJECTS
    ]
    requests = [
        {
            "id": subject,
            "subject": subject,
            "prompt": "{} is",
            "target_new": "in" if number % 2 else "the",
            "target_true": "is",
            "paraphrases": [f"The {subject} is"],
            "neighbors": [{"prompt": f"{other} is", "object": "is"}],
            "generations": [f"{subject} is"],
        }
        for number, (subject, other) in enumerate(itertools.pairwise(SUBJECTS))
    ]
    for name, records in (("facts", facts), ("requests", requests[:2]), ("held_out", requests[2:])):
        (folder / f"{name}.json").write_text(json.dumps(records))
    (folder / "texts.txt").write_text("\n".join(SENTENCES * 5))
