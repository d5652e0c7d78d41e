"""A model that is split over processes gives what it gives in one: logits, effects, moments, z and ΔW."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import random_hf, small_tokenizer
from helpers.ranks import launch
from helpers.split import check_equal, check_held, results

import mechedit as me
from mechedit.errors import InputError
from mechedit.models.tensor_parallel import split_degrees

SHAPES = ("llama", "qwen2", "gemma3")
NINE_HEADS = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 36}


def saved(folder: Path, family: str, **changes: Any) -> Path:
    random_hf(family, **changes).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models; each process of a split one has left there what it found, or why it was refused."""
    root = tmp_path_factory.mktemp("split")
    made = {family: saved(root / family, family) for family in (*SHAPES, "gpt2", "gptj", "gpt_neo")}
    made["nine"] = saved(root / "nine", "llama", **NINE_HEADS)
    ran(2, [made[name] for name in SHAPES], [made[name] for name in ("gpt2", "gptj", "gpt_neo", "nine")], root)
    ran(3, [made["nine"]], [], root)
    return made


def ran(count: int, split: Sequence[Path], refused: Sequence[Path], folder: Path) -> None:
    code = f"from pathlib import *\nfrom helpers.split import *\nsave_results({[*split]!r}, {[*refused]!r})"
    ended = launch(count, [], folder / "log", first=dict.fromkeys(range(count), code))
    assert [process.code for process in ended] == [0] * count, [process.err[-3000:] for process in ended]


@pytest.mark.parametrize(("name", "count"), [*((family, 2) for family in SHAPES), ("nine", 3)])
def test_a_split_model_gives_what_the_whole_one_gives(name: str, count: int, folders: dict[str, Path]) -> None:
    model = me.load_model(folders[name])
    expected, ranks = results(model), [torch.load(folders[name] / f"rank_{rank}.pt") for rank in range(count)]
    check_equal(model, expected, ranks)
    check_held(model, expected, ranks)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "gpt_neo"])
def test_a_family_without_a_plan_is_refused_with_those_that_have_one(family: str, folders: dict[str, Path]) -> None:
    message = (folders[family] / "refused.txt").read_text()
    assert "there is no plan to split it over processes" in message
    assert "Llama" in message
    assert "Gemma 3" in message
    assert "GPT-2" not in message


def test_a_number_of_processes_that_does_not_divide_is_refused_with_those_that_do(folders: dict[str, Path]) -> None:
    message = (folders["nine"] / "refused.txt").read_text()
    assert "9 heads, 3 KV heads, 96 neurons, to be split evenly over 2 (WORLD_SIZE); expected 3 processes" in message
    assert split_degrees(random_hf("llama", num_attention_heads=8, num_key_value_heads=4).config) == [2, 4]
    with pytest.raises(InputError, match=r"evenly over 1 .*expected 2 processes.*torchrun --nproc-per-node 2"):
        me.load_model(folders["llama"], tp=True)


def test_what_cannot_be_split_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="expected a hub name or a folder with tp"):
        me.load_model(random_hf("llama"), tokenizer=small_tokenizer(), tp=True)
    with pytest.raises(InputError, match="expected none with tp"):
        me.load_model(folders["llama"], device="cpu", tp=True)
