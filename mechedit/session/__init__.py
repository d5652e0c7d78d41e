"""Editing batch after batch on the growing edit, with all that came before watched, and an end before the collapse."""

from mechedit.session.metrics import HISTORY_COLUMNS
from mechedit.session.record import Record
from mechedit.session.session import EditSession
from mechedit.session.stop_rule import StopRule

__all__ = ["HISTORY_COLUMNS", "EditSession", "Record", "StopRule"]
