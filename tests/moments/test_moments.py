"""Second moments equal a plain sum over tokens, whatever the batches, and know whose they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mechedit.data import load_texts, sample_documents
from mechedit.errors import InputError
from mechedit.models import load_model
from mechedit.moments import MomentAccumulator, MomentsConfig, collect_moments, load_moments, moment_path

TEXTS = [
    "The mother tongue of Leon Blum is French, and that of Go Hyeon-jeong is Korean.",
    "Seattle",
    "Apple A5 was created by Apple.<|endoftext|>Windows Media Player was created by Microsoft.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball in town.",
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
]
LAYERS = [0, 2]


def plain_sum(model: Any, layer: int, texts: list[str], special: bool = False) -> tuple[Tensor, int]:
    """E[k kᵀ] by a hook on the plain model, one text and one token at a time."""
    caught: list[Tensor] = []
    module = model.hf.transformer.h[layer].mlp.c_proj
    handle = module.register_forward_pre_hook(lambda module, args: caught.append(args[0][0].double()))
    total, count = torch.zeros(model.d_mlp, model.d_mlp, dtype=torch.float64), 0
    for text in texts:
        ids = model.tokenizer(text)["input_ids"]
        with torch.no_grad():
            model.hf(torch.tensor([ids]))
        for token, key in zip(ids, caught.pop(), strict=True):
            if special or token != model.tokenizer.eos_token_id:
                total, count = total + torch.outer(key, key), count + 1
    handle.remove()
    return total / count, count


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() < 1e-5 * expected.norm())


def test_equals_a_plain_sum_over_tokens(small_model: Any) -> None:
    moments = collect_moments(small_model, TEXTS, LAYERS)
    for layer in LAYERS:
        matrix, count = plain_sum(small_model, layer, TEXTS)
        assert moments[layer].count == count == moments[layer].provenance["count"]
        assert moments[layer].matrix.dtype == torch.float64
        assert close(moments[layer].matrix, matrix)
    with_special, more = plain_sum(small_model, 0, TEXTS, special=True)
    assert more == moments[0].count + 1
    assert not close(moments[0].matrix, with_special)
    assert not close(moments[0].matrix, moments[2].matrix)


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_batches_and_padding_do_not_matter(lens_model: Any, batch_tokens: int) -> None:
    alone = collect_moments(lens_model, TEXTS, [1])[1]
    config = MomentsConfig(batch_tokens=batch_tokens)
    batched = collect_moments(lens_model, TEXTS[::-1], [0, 1], config)[1]
    assert batched.count == alone.count
    assert close(batched.matrix, alone.matrix)


def test_padding_is_left_out_whatever_token_fills_it(make_hf: Any, tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert (bare.pad_token_id, bare.all_special_ids) == (None, [])
    model = load_model(make_hf("gpt2"), tokenizer=bare)
    texts = [TEXTS[0], TEXTS[1], TEXTS[3], TEXTS[4]]
    padded = collect_moments(model, texts, [1])[1]
    assert padded.count == sum(len(bare(text)["input_ids"]) for text in texts)
    alone = collect_moments(model, texts, [1], MomentsConfig(batch_tokens=1))[1]
    assert close(padded.matrix, alone.matrix)


def test_keys_added_in_two_updates_give_the_same_as_in_one() -> None:
    keys = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    at_once = MomentAccumulator(6).update(keys).finalize(0, {})
    in_two = MomentAccumulator(6).update(keys[:7]).update(keys[7:]).finalize(0, {})
    assert torch.allclose(at_once.matrix, in_two.matrix, atol=1e-14)
    assert torch.allclose(at_once.matrix, (keys.double().T @ keys.double()) / 40)
    assert at_once.count == in_two.count == 40


def test_a_moment_is_factored_once_for_all_that_solve_with_it() -> None:
    keys = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    moment = MomentAccumulator(6).update(keys).finalize(3, {})
    assert moment.factor is moment.factor
    right = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(moment.matrix @ moment.factor.solve(right), right)
    dead = MomentAccumulator(6).update(keys * torch.tensor([1, 1, 1, 1, 1, 0])).finalize(3, {})
    with pytest.raises(InputError, match="the second moment of layer 3"):
        _ = dead.factor


def test_length_and_budget_cut_the_text(lens_model: Any) -> None:
    lengths = [len(lens_model.tokenizer(text)["input_ids"]) for text in TEXTS]
    assert max(lengths) > 30
    capped = collect_moments(lens_model, 3 * TEXTS, [0], MomentsConfig(max_length=30))[0]
    assert capped.count == 3 * (sum(min(length, 30) for length in lengths) - 1)
    budget = collect_moments(lens_model, TEXTS, [0], MomentsConfig(tokens=100, batch_tokens=64))[0]
    assert budget.count == 100
    cut = lens_model.tokenizer.decode([i for text in TEXTS[:2] for i in lens_model.tokenizer(text)["input_ids"]])
    assert len(lens_model.tokenizer(cut)["input_ids"]) < 100 < sum(lengths)


def test_documents_are_drawn_once_each_and_the_sample_is_written_down(lens_model: Any) -> None:
    texts = [*TEXTS, "The sport of LeBron James is basketball, and he plays it downtown, in Seattle, with Miles Davis."]
    order = list(sample_documents(texts, len(texts)))
    assert sorted(order) == sorted(texts)
    assert list(sample_documents(texts, 5)) == sample_documents(texts, len(texts))[:5] == order[:5]
    assert list(sample_documents(texts, len(texts), seed=1)) != order != texts
    moment = collect_moments(lens_model, texts, [1], MomentsConfig(documents=5))[1]
    plain = collect_moments(lens_model, order[:5], [1])[1]
    assert torch.equal(moment.matrix, plain.matrix)
    assert (moment.provenance["documents"], moment.provenance["seed"]) == (5, 0)
    assert not close(collect_moments(lens_model, texts, [1])[1].matrix, moment.matrix), "the control: one is left out"
    with pytest.raises(InputError, match="7 documents are to be drawn, expected at most 6"):
        collect_moments(lens_model, texts, [1], MomentsConfig(documents=7))


def test_files_come_back_and_are_reused(lens_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected = collect_moments(lens_model, TEXTS, LAYERS, out=tmp_path)
    assert sorted(path.name for path in (tmp_path / "moments").iterdir()) == [
        "layer_0.safetensors",
        "layer_2.safetensors",
    ]
    loaded = load_moments(tmp_path, LAYERS, lens_model)
    for layer in LAYERS:
        assert torch.equal(loaded[layer].matrix, collected[layer].matrix)
        assert loaded[layer].provenance == collected[layer].provenance
        assert loaded[layer].count == collected[layer].count

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model was run")

    monkeypatch.setattr(lens_model, "run", refuse)
    again = collect_moments(lens_model, TEXTS, [0], MomentsConfig(batch_tokens=99), out=tmp_path)
    assert torch.equal(again[0].matrix, collected[0].matrix)
    with pytest.raises(AssertionError, match="was run"):
        collect_moments(lens_model, TEXTS, [0, 1], out=tmp_path)


def test_other_provenance_in_the_folder_is_refused_or_replaced(lens_model: Any, tmp_path: Path) -> None:
    old = collect_moments(lens_model, TEXTS, [0], out=tmp_path)[0]
    with pytest.raises(InputError, match="made with texts = "):
        collect_moments(lens_model, TEXTS[:3], [0], out=tmp_path)
    assert torch.equal(load_moments(tmp_path, [0])[0].matrix, old.matrix)
    new = collect_moments(lens_model, TEXTS[:-1], [0], out=tmp_path, overwrite=True)[0]
    assert new.count < old.count
    assert load_moments(tmp_path, [0])[0].count == new.count


def test_moments_of_another_model_or_layer_are_refused(lens_model: Any, make_model: Any, tmp_path: Path) -> None:
    collect_moments(lens_model, TEXTS, [0], out=tmp_path)
    assert load_moments(tmp_path, [0], lens_model)
    with pytest.raises(InputError, match="weights_hash"):
        load_moments(tmp_path, [0], make_model("gpt2", seed=1))
    with pytest.raises(InputError, match="layer 1; collect it"):
        load_moments(tmp_path, [1])
    moment_path(tmp_path, 0).rename(moment_path(tmp_path, 1))
    with pytest.raises(InputError, match="not the second moment of layer 1"):
        load_moments(tmp_path, [1])


def test_damaged_files_are_refused(lens_model: Any, tmp_path: Path) -> None:
    collect_moments(lens_model, TEXTS, [0], out=tmp_path)
    path = moment_path(tmp_path, 0)
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(InputError, match="cut short"):
        load_moments(tmp_path, [0])
    path.write_bytes(content)
    save_file({"matrix": load_file(path)["matrix"].clone()}, path)
    with pytest.raises(InputError, match="no 'provenance' in its header"):
        load_moments(tmp_path, [0])


def test_too_little_text_is_refused_and_leaves_no_file(lens_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"hold \d+ tokens, expected at least d_mlp = 96.*several: \d+ tokens of each"):
        collect_moments(lens_model, TEXTS[:2], [0], out=tmp_path)
    assert not (tmp_path / "moments").exists()
    with pytest.raises(InputError, match="no text"):
        collect_moments(lens_model, ["", " "], [0])


@pytest.mark.parametrize("layers", [[], [3], [-1, 0]])
def test_layers_outside_the_model_are_refused(lens_model: Any, layers: list[int]) -> None:
    with pytest.raises(InputError, match="expected some of 0 … 2"):
        collect_moments(lens_model, TEXTS, layers)


def test_settings_below_one_are_refused() -> None:
    with pytest.raises(InputError, match="max_length is 0"):
        MomentsConfig(max_length=0)


def test_texts_are_read_from_files(tmp_path: Path, lens_model: Any) -> None:
    lines = tmp_path / "t.txt"
    lines.write_text("\n".join([*TEXTS, "", " "]), encoding="utf-8")
    assert load_texts(lines) == TEXTS
    records = tmp_path / "t.jsonl"
    records.write_text("\n".join(json.dumps({"text": text}) for text in TEXTS), encoding="utf-8")
    assert load_texts(str(records)) == TEXTS
    from_file = collect_moments(lens_model, str(lines), [0])[0]
    assert from_file.provenance["texts"] == collect_moments(lens_model, TEXTS, [0])[0].provenance["texts"]


def test_bad_text_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read"):
        load_texts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(InputError, match="no text"):
        load_texts(tmp_path / "empty.txt")
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    with pytest.raises(InputError, match="line 2 has no text in 'text'"):
        load_texts(tmp_path / "t.jsonl")
    for text, kind in (("5", "int"), ("null", "NoneType"), ('["a"]', "list")):
        (tmp_path / "t.jsonl").write_text('{"text": "a"}\n{"text": ' + text + "}\n")
        with pytest.raises(InputError, match=f"line 2 has .* in 'text', which is of type {kind}, expected a string"):
            load_texts(tmp_path / "t.jsonl")
    (tmp_path / "t.csv").write_text("a,b")
    with pytest.raises(InputError, match=r"expected \.txt or \.jsonl"):
        load_texts(tmp_path / "t.csv")


def test_texts_are_read_from_data_sets(monkeypatch: pytest.MonkeyPatch, lens_model: Any) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    loaded: list[tuple[str, str | None]] = []

    def load(name: str, configuration: str | None, split: str) -> datasets.Dataset:
        loaded.append((name, configuration))
        assert split == "train"
        if name == "absent":
            raise DatasetNotFoundError("no such thing\nsecond line")
        lines = [TEXTS[0], "", *TEXTS[1:]]
        return datasets.Dataset.from_dict({"body" if name == "other" else "text": lines})

    monkeypatch.setattr(datasets, "load_dataset", load)
    texts = load_texts("wiki:raw-v1")
    assert not isinstance(texts, list), "the data set stays on disk until it is read"
    from_data_set, from_list = collect_moments(lens_model, texts, [0])[0], collect_moments(lens_model, TEXTS, [0])[0]
    assert from_data_set.count == from_list.count
    assert from_data_set.provenance == from_list.provenance
    assert close(from_data_set.matrix, from_list.matrix)
    load_texts("wikitext")
    load_texts("wikimedia/wikipedia")
    load_texts("wikitext:wikitext-2-raw-v1")
    assert loaded == [
        ("wiki", "raw-v1"),
        ("Salesforce/wikitext", "wikitext-103-raw-v1"),
        ("wikimedia/wikipedia", "20231101.en"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    ]
    with pytest.raises(InputError, match=r"neither a file nor a data set that could be loaded \(no such thing\)"):
        load_texts("absent")
    with pytest.raises(InputError, match="columns"):
        load_texts("other:raw-v1")
