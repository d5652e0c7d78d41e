"""Damaged files are refused by name, whatever they hold; nothing ends in a traceback."""

from __future__ import annotations

import csv
import json
import os
import socket
import sys
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from helpers.commands import limited_memory
from helpers.mutations import refusal
from helpers.run_folder import make_effects

from mechedit import Edit, InputError, MemitConfig, Selection, load_facts, load_requests, load_texts, recommended
from mechedit.cli.config_file import config_defaults, read_yaml
from mechedit.edit.manifest_record import ManifestRecord
from mechedit.evaluation import Scores
from mechedit.figures import run_figures
from mechedit.files import (
    open_tensors,
    read_arrays,
    read_header,
    read_json,
    read_object,
    read_parquet,
    write_json,
    write_parquet,
    write_tensors,
)
from mechedit.moments.second_moment import load_moment
from mechedit.report import write_report
from mechedit.run_folder import RunFolder
from mechedit.selection import select_layers
from mechedit.tables import PLACES, iter_table, read_table
from mechedit.trace.columns import COLUMNS

DIGITS = "9" * 5000
"""More digits than Python reads."""
REQUEST = {"id": "1", "subject": "Rome", "prompt": "{} is in", "target_new": "France"}
NO_JSON = {
    "nested": '{"a": ' + "[" * 100_000,
    "closed": '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    "digits": '{"a": ' + DIGITS + "}",
    "cut": '{"a": [1, 2',
}
NO_OBJECT = ("null", "[]", "5", '"text"', "true")


@pytest.mark.parametrize("content", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(content)
    for read in (read_json, load_facts, load_requests, load_texts, Selection.load):
        with pytest.raises(InputError, match=r"file\.json"):
            read(file)


@pytest.mark.parametrize("content", NO_OBJECT)
def test_a_file_without_an_object_is_refused(tmp_path: Path, content: str) -> None:
    names = ("file.json", "config.json", "summary.json", "scores.json", "selection.json")
    for name in names:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=r"file\.json' is .*expected a JSON object"):
        read_object(tmp_path / "file.json")
    with pytest.raises(InputError, match=r"config\.json' is .*expected a JSON object"):
        RunFolder(tmp_path).stamps()
    with pytest.raises(InputError, match=r"selection\.json.*expected"):
        Selection.load(tmp_path / "selection.json")
    with pytest.raises(InputError, match=r"scores\.json' is .*expected a JSON object"):
        Scores.load(tmp_path)
    for write in (write_report, run_figures):
        with pytest.raises(InputError, match=r"\.json' is .*expected a JSON object"):
            write(tmp_path)
    for name in names[1:]:
        (tmp_path / name).unlink()
    (tmp_path / "summary.json").write_text("{}")  # the control: an object is read
    assert RunFolder(tmp_path).stamps() == {}
    assert run_figures(tmp_path) == []
    assert write_report(tmp_path).is_file()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", {"before": []}, "'before' in .*summary.json' is "),
        ("selection.json", {"layers": [1], "validation": [1]}, "'validation' in .*selection.json' is "),
        ("config.json", {"steps": [1]}, "'steps' in .*config.json' is "),
        ("config.json", {"steps": {"trace": None}}, "the step 'trace' in .*config.json' is None"),
        ("config.json", {"steps": {"trace": {"model": 5}}}, "the step 'trace.model' in .*config.json' is 5"),
    ],
)
def test_a_part_that_is_no_object_is_refused(tmp_path: Path, name: str, content: Any, message: str) -> None:
    (tmp_path / "summary.json").write_text("{}")
    write_json(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        write_report(tmp_path)
    write_json(tmp_path / name, {"layers": [1]} if name == "selection.json" else {})
    assert write_report(tmp_path).is_file()


@pytest.mark.parametrize("content", [*NO_OBJECT, '{"memit": []}', '{"memit": 3}', '{"memit": {"lr": null, "x": 1}}'])
def test_settings_that_ship_with_a_checkpoint_are_checked(
    lens_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    monkeypatch.setattr(type(lens_model), "checkpoint", str(tmp_path))
    (tmp_path / "editing.json").write_text('{"memit": {"steps": 7}}')
    assert recommended("memit", lens_model) == MemitConfig(steps=7)
    for text in (content, '{"memit": {"steps": -1}}', '{"memit": {"steps": "seven"}}', '{"memit": {"clamp": NaN}}'):
        (tmp_path / "editing.json").write_text(text)
        with pytest.raises(InputError, match=r"editing\.json"):
            recommended("memit", lens_model)


@pytest.mark.parametrize("header", [None, [], 5, "text"])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, header: Any) -> None:
    write_tensors(tmp_path / "file.safetensors", {"x": torch.ones(1)}, "about", header)
    with pytest.raises(InputError, match=r"the about in the header of .* is .*expected a JSON object"):
        read_header(tmp_path / "file.safetensors", "about")
    write_tensors(tmp_path / "file.safetensors", {"x": torch.ones(1)}, "about", {"a": 1})
    assert read_header(tmp_path / "file.safetensors", "about") == {"a": 1}


@pytest.mark.parametrize("name", ["id", "prompt", "relation", "paraphrases", "neighbors", "unread"])
def test_half_a_character_is_refused_by_the_loader(tmp_path: Path, name: str) -> None:
    file = tmp_path / "file.json"
    values = {"paraphrases": ["Rome\ud83d is in"], "neighbors": [{"prompt": "Paris\ud83d is in", "object": "France"}]}
    record = {**REQUEST, ("_unread" if name == "unread" else name): values.get(name, "{} \ud83d is in")}
    for text in (json.dumps([record]), json.dumps(record)):
        file.write_text(text)
        with pytest.raises(InputError, match=r"file\.json', (record|line) 1 holds .*half of a surrogate pair"):
            load_requests(file)
    file.write_text(json.dumps([{**REQUEST, "target_new": "\U0001f600"}]))  # the control: a whole pair of escapes
    assert "\\ud83d" in file.read_text()
    assert load_requests(file)[0].target_new == "\U0001f600"


@pytest.mark.parametrize("quote", ["", '"'])
def test_long_cells_are_read(tmp_path: Path, quote: str) -> None:
    file, prompt = tmp_path / "file.csv", "a " * 100_000 + "{} is"
    file.write_text(f"subject,prompt,target_new\nRome,{quote}{prompt}{quote},Ohio\n")
    limit = csv.field_size_limit()
    assert len(prompt) > limit  # the control: csv would refuse it
    assert load_requests(file)[0].prompt == prompt
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("name", ["layer", "effect", "value", "mean"])
def test_text_in_a_column_of_numbers_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "effects.parquet"
    pd.DataFrame({"fact": ["a", "b"], name: ["1", "text"]}).to_parquet(file)
    with pytest.raises(InputError, match=f"the column {name!r} of the table .*effects.parquet"):
        read_table(file)
    frame = pd.DataFrame({"fact": ["a", "b"], name: [1, 2]})
    frame.to_parquet(file)
    pd.testing.assert_frame_equal(read_table(file), frame)


@pytest.mark.parametrize("name", sorted(PLACES & {*COLUMNS}))
def test_whole_numbers_are_read_as_integers_however_they_are_stored(tmp_path: Path, name: str) -> None:
    file = tmp_path / "effects.parquet"
    effects = make_effects()
    effects.assign(**{name: effects[name].astype(float)}).to_parquet(file)
    assert pd.read_parquet(file)[name].dtype == float, "the file holds what other programs write"
    pd.testing.assert_frame_equal(read_table(file)[effects.columns], effects)
    pieces = pd.concat(iter_table(file, list(effects.columns)), ignore_index=True)
    pd.testing.assert_frame_equal(pieces, effects)
    assert select_layers(read_table(file)).layers == select_layers(effects).layers
    effects.assign(**{name: effects[name] + 0.5}).to_parquet(file)
    with pytest.raises(InputError, match=f"{name!r} of the table .* has gaps or fractions"):
        read_table(file)


@pytest.mark.parametrize("attrs", ["null", "[]", "5", "not JSON", "[" * 100_000])
def test_attributes_that_are_no_object_are_refused(tmp_path: Path, attrs: str) -> None:
    file = tmp_path / "effects.parquet"
    frame = pd.DataFrame({"layer": [1, 2]})
    frame.attrs = {"a": 1}
    frame.to_parquet(file)
    assert read_table(file).attrs == {"a": 1}
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"PANDAS_ATTRS": attrs.encode()}), file)
    with pytest.raises(InputError, match=r"effects\.parquet"):
        read_table(file)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e400"])
def test_what_is_no_finite_number_is_refused(tmp_path: Path, number: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(f'{{"a": [{number}]}}')
    with pytest.raises(InputError, match=r"file\.json' holds the number .*expected finite ones"):
        read_json(file)
    file.write_text('{"a": [1e308]}')
    assert read_json(file) == {"a": [1e308]}


MANIFEST = {"method": "memit", "layers": [2], "model": {"weights_hash": "ab"}, "requests": ["1"], "facts": ["a → b"]}
OTHER_FIELDS = {
    "method": 5, "mechedit": [], "layers": "2", "model": [], "requests": [1], "facts": "a", "prefixes": [None],
    "targets": [], "settings": 3, "residuals": [{"layer": "a", "before": 1, "after": 0}], "left": ["a"],
    "unconverged": "1", "probability": [[1]], "training": {"losses": []}, "truncated": [{"rank": 1}], "parts": [[]],
    "warnings": "a", "settings_from": [{"source": "tuned.json", "hash": "ab", "settings": "lr"}],
}  # fmt: skip
"""For each field of a manifest a value of another type than it has."""


@pytest.mark.parametrize("name", OTHER_FIELDS)
@pytest.mark.parametrize("within", [False, True], ids=["outside", "in a part"])
def test_a_field_of_a_manifest_of_another_type_is_refused(tmp_path: Path, name: str, within: bool) -> None:
    file = tmp_path / "edit.safetensors"
    factors = {f"layer.2.{side}": torch.ones(2, 2) for side in ("left", "right")}
    write_tensors(file, factors, "manifest", {**MANIFEST, "parts": [MANIFEST]})
    assert Edit.load(file).layers == [2]  # the control
    damaged = {**MANIFEST, name: OTHER_FIELDS[name]}
    write_tensors(file, factors, "manifest", {**MANIFEST, "parts": [damaged]} if within else damaged)
    place = f"parts.0.{name}" if within else name
    with pytest.raises(
        InputError, match=rf"the manifest of .*edit\.safetensors' cannot be read: '{place}.*make the edit"
    ):
        Edit.load(file)


def test_a_manifest_names_every_field_that_is_checked() -> None:
    assert set(OTHER_FIELDS) | {"made_on"} == set(ManifestRecord.__annotations__)


OTHER_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int64, torch.bool)


@pytest.mark.parametrize("dtype", OTHER_DTYPES)
@pytest.mark.parametrize("shape", [(4, 4), ()])
def test_tensors_that_are_no_matrices_of_numbers_are_refused(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    header = {"weights_hash": "ab", "layer": 2, "count": 100}
    for values in (
        torch.ones(shape).to(dtype),
        torch.ones(()),
        torch.ones(4),
        torch.full((4, 4), 1e308, dtype=torch.float64),
    ):
        path = tmp_path / "moments" / "layer_2.safetensors"
        write_tensors(path, {"matrix": values}, "provenance", header)
        with pytest.raises(InputError, match=r"layer_2\.safetensors"):
            load_moment(tmp_path, 2)
        factors = {"layer.2.left": values, "layer.2.right": torch.ones(4, 4)}
        write_tensors(tmp_path / "edit.safetensors", factors, "manifest", MANIFEST)
        with pytest.raises(InputError, match=r"edit"):
            Edit.load(tmp_path / "edit.safetensors")
    write_tensors(path, {"matrix": torch.eye(4).double()}, "provenance", header)
    assert load_moment(tmp_path, 2).count == 100
    write_tensors(tmp_path / "edit.safetensors", {**factors, "layer.2.left": torch.ones(4, 4)}, "manifest", MANIFEST)
    assert Edit.load(tmp_path / "edit.safetensors").layers == [2]


def test_a_small_file_that_stands_for_a_large_one_is_refused(tmp_path: Path) -> None:
    """Before it is read: equal rows and zeros are packed to nothing."""
    table, arrays = tmp_path / "effects.parquet", tmp_path / "moment.npz"
    write_parquet(table, pd.DataFrame({"effect": np.zeros(2_000_000)}))
    assert table.stat().st_size < 10_000
    with limited_memory(), pytest.raises(InputError, match=r"effects\.parquet' says that it has 2,000,000 rows"):
        read_parquet(table)
    with zipfile.ZipFile(arrays, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("mom2.mom2.npy", "w") as member:
        np.lib.format.write_array(member, np.zeros((4000, 2000)))
    assert arrays.stat().st_size < 100_000
    with limited_memory(), pytest.raises(InputError, match=r"moment\.npz' holds 64,000,128 bytes of arrays packed"):
        read_arrays(arrays)
    rows = np.random.default_rng(0).normal(size=1_200_000)
    write_parquet(table, pd.DataFrame({"effect": rows}))  # the controls: measurements
    assert len(read_parquet(table)) == len(rows)
    np.savez_compressed(arrays, mom2=rows)
    assert (read_arrays(arrays)["mom2"] == rows).all()


@pytest.mark.parametrize("layer", ["9" * 5000, "2\uff12", "2x", "-2", "02", ""])
def test_a_layer_that_is_no_number_is_refused(tmp_path: Path, layer: str) -> None:
    factors = {f"layer.{layer}.{side}": torch.ones(2, 2) for side in ("left", "right")}
    write_tensors(tmp_path / "edit.safetensors", factors, "manifest", MANIFEST)
    with pytest.raises(InputError, match=r"is not an edit \(unknown"):
        Edit.load(tmp_path / "edit.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_pipe_or_a_socket_is_refused_and_not_waited_for(tmp_path: Path, kind: str) -> None:
    def make(path: Path) -> Path:
        if kind == "pipe":
            os.mkfifo(path)
        else:
            socket.socket(socket.AF_UNIX).bind(str(path))
        return path

    data, table, tensors, array = (make(tmp_path / name) for name in ("a.json", "a.parquet", "a.safetensors", "a.npy"))
    readers = (
        *((read, data) for read in (read_json, load_facts, load_requests, load_texts, Selection.load, read_yaml)),
        (read_table, table), (Edit.load, tensors), (read_arrays, array),
    )  # fmt: skip
    for read, path in readers:
        with pytest.raises(InputError, match=r"is a pipe, a socket or a device, expected a file"):
            read(path if read is not read_yaml else str(path))
    data.unlink()
    data.write_text("{}")
    assert read_json(data) == {}  # the control


def test_what_another_library_says_is_cut(tmp_path: Path) -> None:
    header = json.dumps({"t" * 5000: {"dtype": "X" * 5000, "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with (
        pytest.raises(InputError, match=r"is not a safetensors file.*make it again") as caught,
        open_tensors(tmp_path / "a.safetensors"),
    ):
        pass
    assert len(str(caught.value.__cause__)) > 5000, "the control: it says much"
    assert len(str(caught.value).replace(str(tmp_path), "")) < 320


def test_messages_stay_short_whatever_is_quoted(tmp_path: Path) -> None:
    """Every loader is given values of 20,000 characters, one field after the other, and ids and keys as long."""
    huge = "Rome " * 4000
    fact = {"id": "1", "subject": "Rome", "prompt": "{} is in", "object": "Italy", "relation": "r", "foil": "France"}
    lists = {"paraphrases": ["Rome lies in"], "neighbors": [{"prompt": "Paris is in", "object": "France"}]}
    record = {**REQUEST, **lists, "target_true": "Italy", "joint": " ", "turn": "{}"}
    values: list[Any] = [huge, huge + "{} {}", [huge], {"a": huge}, [[huge]], {huge: 1}, huge + "\ud83d", "{}" * 10_000]
    refused = 0
    for load, base in ((load_facts, fact), (load_requests, record), (load_texts, {"text": "a"})):
        file = tmp_path / "file.json"
        for name in [*base, huge]:
            for value in values:
                file.write_text(json.dumps([{**base, name: value}]))
                message = refusal(partial(load, file) if load is load_texts else partial(load, file, strict=True))
                refused += message is not None
                assert len(message or "") < 1200, (load.__name__, name[:10], (message or "")[:300])
    assert refused > 100, "values like these must be refused, else nothing was tried"
    for name in ("--kinds", "--max-facts", huge):
        (tmp_path / "options.yaml").write_text(json.dumps({name.removeprefix("--"): {"a": huge}}))
        group = type("Group", (), {"commands": {"trace": type("Command", (), {"params": []})()}})()
        with pytest.raises(InputError) as caught:
            config_defaults(group, ["trace", "--config", str(tmp_path / "options.yaml")])
        assert len(str(caught.value)) < 1200
