"""Facts to trace and requests to edit: text only, no tokens.

A fact is a subject, a prompt with one `{}` for it, and the object that completes the prompt (ROME §2). A
request is the same with the object to write instead (MEMIT §4), and the prompts that judge the edit.
"""

from mechedit.facts.checks import check_requests, conflicts, unique_ids
from mechedit.facts.fact import EditRequest, Fact, Neighbor, check_template, check_text, fill
from mechedit.facts.loading import load_facts, load_requests, shipped
from mechedit.facts.published import PUBLISHED
from mechedit.facts.records import read_records
from mechedit.facts.references import Snippets, WordWeights, load_snippets, load_word_weights, texts_by_object

__all__ = [
    "PUBLISHED",
    "EditRequest",
    "Fact",
    "Neighbor",
    "Snippets",
    "WordWeights",
    "check_requests",
    "check_template",
    "check_text",
    "conflicts",
    "fill",
    "load_facts",
    "load_requests",
    "load_snippets",
    "load_word_weights",
    "read_records",
    "shipped",
    "texts_by_object",
    "unique_ids",
]
