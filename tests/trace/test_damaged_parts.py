"""A finished group of a trace whose table is not as it was written: the file is named, and how it is made again."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from mechedit import InputError, TraceConfig, load_facts, load_model
from mechedit.shards import Rank
from mechedit.trace.folder import TRACE_PARTS, trace_to_folder
from mechedit.trace.parts import read_part
from mechedit.trace.shards import merge_trace, trace_shard

CONFIG = TraceConfig(samples=1, kinds=("state",), roles=("subject_last",))
FACTS = 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trace_shard(load_model("tiny"), load_facts("known")[:FACTS], CONFIG, tmp_path, Rank(0, 1))
    return tmp_path


def parts(folder: Path) -> list[Path]:
    return sorted((folder / TRACE_PARTS).glob("*.parquet"))


def with_flipped_bit(path: Path, name: str) -> None:
    """Flip the lowest bit of a column's last letter wherever the file names the column, as pyarrow wrote it."""
    other_name = name[:-1] + chr(ord(name[-1]) ^ 1)
    table = pq.read_table(path)
    pq.write_table(
        table.rename_columns([other_name if column == name else column for column in table.schema.names]), path
    )


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("name", ["effect", "token"])
def test_a_flipped_bit_in_a_name_is_damage_that_is_named(folder: Path, number: int, name: str) -> None:
    damaged = parts(folder)[number]
    content = damaged.read_bytes()
    with_flipped_bit(damaged, name)
    for run in (
        lambda: merge_trace(folder),
        lambda: trace_to_folder(load_model("tiny"), load_facts("known")[:FACTS], CONFIG, folder),
    ):
        with pytest.raises(InputError, match=rf"{damaged.name}' is damaged: .* lacks {name}, .* remove it"):
            run()
        assert not (folder / "effects.parquet").exists()
    damaged.write_bytes(content)
    merge_trace(folder)  # the control
    assert (folder / "effects.parquet").is_file()


@pytest.mark.parametrize(("name", "kind"), [("layer", "float64"), ("effect", "int64"), ("score", "str")])
def test_numbers_of_another_type_are_damage(folder: Path, name: str, kind: str) -> None:
    path = parts(folder)[0]
    frame = read_part(path)
    frame.astype({name: kind}).to_parquet(path)
    with pytest.raises(InputError, match=f"is damaged: its column '{name}' holds"):
        read_part(path)
    frame.to_parquet(path)
    pd.testing.assert_frame_equal(read_part(path), frame)
