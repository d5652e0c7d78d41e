"""Facts to trace, requests to edit and running text: text only, no tokens.

A fact is a subject, a prompt with one `{}` for it, and the object that completes the prompt (ROME §2). A
request is the same with the object to write instead (MEMIT §3, Eq. 5), and with the prompts that evaluate the edit.
"""

from mechedit.data.checks import check_requests, check_unique_ids, conflicts, records_of
from mechedit.data.facts import EditRequest, Fact, Neighbor, check_template, check_text, fill
from mechedit.data.json_files import read_records
from mechedit.data.loading import (
    Conflicts,
    Reading,
    load_facts,
    load_requests,
    read_edit_requests,
    read_facts,
    tiny_data,
)
from mechedit.data.published_data import PUBLISHED_DATASETS
from mechedit.data.reference_texts import Snippets, WordWeights, load_snippets, load_word_weights, texts_by_object
from mechedit.data.revision import revised
from mechedit.data.summary import describe_facts, describe_requests
from mechedit.data.texts import check_texts, load_texts, sample_documents, texts_hash

__all__ = [
    "PUBLISHED_DATASETS",
    "Conflicts",
    "EditRequest",
    "Fact",
    "Neighbor",
    "Reading",
    "Snippets",
    "WordWeights",
    "check_requests",
    "check_template",
    "check_text",
    "check_texts",
    "check_unique_ids",
    "conflicts",
    "describe_facts",
    "describe_requests",
    "fill",
    "load_facts",
    "load_requests",
    "load_snippets",
    "load_texts",
    "load_word_weights",
    "read_edit_requests",
    "read_facts",
    "read_records",
    "records_of",
    "revised",
    "sample_documents",
    "texts_by_object",
    "texts_hash",
    "tiny_data",
]
