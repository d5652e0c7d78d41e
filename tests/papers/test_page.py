"""The papers' tables on the page of the analyses are those that are published, to the letter."""

from __future__ import annotations

from analyses.page import BLOCK, PAGE, as_markdown, with_tables
from mechedit import published_table


def test_the_page_is_up_to_date() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_tables(page) == page, "run python -m analyses.page"
    assert {match[1] for match in BLOCK.finditer(page)} == {
        "memit_table_1", "memit_table_2", "memit_seconds", "memit_demonstrations", "rome_tracing",
        "rome_table_1", "rome_table_4", "rome_table_5", "rome_table_6",
    }  # fmt: skip
    assert with_tables(page.replace("| 619.9 (0.3) |", "| 620.0 (0.3) |")) == page, "the control: a changed cell"


def test_a_table_has_a_row_per_record_and_its_intervals_in_brackets() -> None:
    lines = as_markdown("rome_table_4").splitlines()
    assert len(lines) == 2 + len(published_table("rome_table_4"))
    assert lines[0].startswith("| model | method | edits | S | ES | EM |")
    assert "| GPT-J | rome | 1 | 91.5 | 99.9 (0.1) | 99.4 (0.3) |" in lines[-1]
