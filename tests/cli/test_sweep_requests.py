"""Which requests choose the layers of a run: others than those that it edits, while there are enough for a sweep."""

from __future__ import annotations

import mechedit as me
from mechedit.cli.run import others_than


def test_layers_are_chosen_by_others_however_few_are_edited_and_by_all_where_there_are_few() -> None:
    requests = [me.EditRequest(id=str(n), subject=f"S{n}", prompt="{} is", target_new="x") for n in range(21)]
    assert others_than(requests[:1], requests) == requests[1:]
    assert others_than(requests[:2], requests) == requests, "nineteen others are fewer than a sweep takes"
    namesake = me.EditRequest(id="again", subject="S0", prompt="{} was", target_new="x")
    assert namesake not in others_than(requests[:1], [*requests, namesake])
