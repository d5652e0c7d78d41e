"""Editing batch after batch: earlier keys are preserved, all requests scored again, and a rule stops in time."""

from mechedit.session.edited_batch import EditedBatch
from mechedit.session.metrics import HISTORY_COLUMNS, HistoryEntry
from mechedit.session.session import EditSession
from mechedit.session.stop_rule import StopRule

__all__ = ["HISTORY_COLUMNS", "EditSession", "EditedBatch", "HistoryEntry", "StopRule"]
