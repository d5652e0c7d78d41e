"""How the tiny model that ships was made: its facts and texts, its training, its measurements."""

from pathlib import Path

from mechedit import models
from mechedit.data import tiny_data

MODEL_FOLDER = Path(models.__file__).parent / "tiny"
"""Weights, tokenizer, recipe, settings and model card."""
DATA_FOLDER = tiny_data("facts.jsonl").parent
"""Facts, requests and texts."""
