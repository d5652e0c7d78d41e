"""The tiny model: its facts, its training, its measurements."""
