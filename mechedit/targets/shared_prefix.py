"""What rows begin with alike, the text of their prefix, which is run once for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile

import torch

from mechedit.batching import pad, spare_tokens
from mechedit.models import KVCache, Model
from mechedit.targets.prompts import Row


def lead_of(model: Model, rows: Sequence[Row]) -> tuple[KVCache | None, list[int]]:
    """Keys and values of what each row begins with, and how many tokens that is; nothing where it would not pay."""
    leads: dict[int, tuple[int, ...]] = {}
    for prefix, alike in _by_prefix(rows).items():
        together = zip(*(row.ids[: row.subject] for row in alike), strict=False)
        leads[prefix] = tuple(ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, together))
    cuts = [len(leads[row.prefix]) for row in rows]
    if sum(cuts) - sum(map(len, leads.values())) <= spare_tokens(model):
        return None, [0] * len(rows)
    # A row of no tokens cannot be run; what stands in its place is not kept.
    some = [list(ids) or [rows[0].ids[0]] for ids in leads.values()]
    run = model.run(pad(some, model.tokenizer, model.device), use_cache=True, stop_after=model.n_layers - 1)
    kept = run.kv_cache.before(torch.tensor([len(ids) for ids in leads.values()], device=model.device))
    places = {prefix: place for place, prefix in enumerate(leads)}
    index = torch.tensor([places[row.prefix] for row in rows], device=model.device)
    return kept.take(index, kept.length), cuts


def _by_prefix(rows: Sequence[Row]) -> dict[int, list[Row]]:
    found: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        found[row.prefix].append(row)
    return found
