"""Editing batch after batch on the growing edit, with all that came before watched, and an end before the collapse."""

from mechedit.session.measures import HISTORY_COLUMNS
from mechedit.session.record import Record
from mechedit.session.rule import StopRule
from mechedit.session.session import EditSession

__all__ = ["HISTORY_COLUMNS", "EditSession", "Record", "StopRule"]
