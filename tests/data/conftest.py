"""Published requests, read once."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechedit import EditRequest, load_requests

FILE = Path(__file__).parents[3] / "shared" / "data" / "counterfact_short_5000.json"


@pytest.fixture(scope="session")
def counterfact_short() -> list[EditRequest]:
    """Those of CounterFact in EasyEdit's short form; of requests that conflict, the first."""
    if not FILE.is_file():
        pytest.skip(f"{FILE.name} is not here; users do not have it either")
    with pytest.warns(UserWarning, match="of 5000 requests are left out"):
        return load_requests(FILE, conflicts="first")
