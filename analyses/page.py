"""Write the papers' tables into `analyses/README.md`, each between its marks.

    python -m analyses.page

A table stands where the page says `<!-- published NAME -->`, up to `<!-- end -->`; its numbers come from
`mechedit.published`, as those of the scripts' tables and figures do.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from analyses.common.printing import format_interval
from mechedit.atomic import atomic
from mechedit.published import published_table

PAGE = Path(__file__).with_name("README.md")
BLOCK = re.compile(r"<!-- published (\w+) -->\n.*?<!-- end -->", re.DOTALL)


def main() -> None:
    """Bring the page up to date."""
    page = with_tables(PAGE.read_text(encoding="utf-8"))
    with atomic(PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


def with_tables(page: str) -> str:
    """The page with every table as it is published."""
    return BLOCK.sub(lambda match: f"<!-- published {match[1]} -->\n{as_markdown(match[1])}\n<!-- end -->", page)


def as_markdown(name: str) -> str:
    """A published table: a column for each of its own, a measure and half its interval in one."""
    table = published_table(name)
    columns = [column for column in table if not str(column).endswith("_half")]
    lines = [columns, ["---"] * len(columns)]
    for record in table.to_dict("records"):
        lines.append([_cell(record, str(column)) for column in columns])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(record: dict, column: str) -> str:
    """A value as printed; with half its interval where the paper gives one."""
    value = record[column]
    if pd.isna(value):
        return ""
    if f"{column}_half" in record and not pd.isna(half := record[f"{column}_half"]):
        return format_interval(value, value - half, value + half)
    if isinstance(value, float) and value.is_integer() and column in ("layer", "before", "after"):
        return f"{value:.0f}"
    return f"{value:,}" if isinstance(value, int | float) else str(value)


if __name__ == "__main__":
    main()
