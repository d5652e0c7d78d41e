from __future__ import annotations

import base64
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from helpers.run_folder import (
    IDENTITY,
    PROVENANCE,
    make_effects,
    make_scores,
    write_edit,
    write_run,
    write_steps,
    write_trace,
)

from mechedit.errors import InputError
from mechedit.files import read_json, write_json, write_tensors
from mechedit.report import number, span, write_report
from mechedit.trace.site_effects import site_effects

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Collects addresses, headings and visible text, and checks that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.tags, self.text, self.ids = [], [], [], [], []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href")]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)


def read(path):
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    return page, re.sub(r"\s+", " ", " ".join(page.text)), text


FIGURES = ("severed", "roles", "roles_state", "roles_mlp", "fact", "fact_state", "selection", "scores")


def add_figures(folder, names=FIGURES):
    """Stand-ins for the images: the report only carries their bytes."""
    (folder / "figures").mkdir()
    for name in names:
        (folder / "figures" / f"{name}.png").write_bytes(b"image of " + name.encode())
        (folder / "figures" / f"{name}.pdf").write_bytes(b"not shown")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder)
    add_figures(folder)
    return folder


def test_one_layer_one_fact_and_only_measures_that_are_there_are_spoken_of(tmp_path):
    write_run(tmp_path)
    manifest = {"method": "memit", "layers": [3], "model": PROVENANCE, "requests": ["0"], "prefixes": ["{}"]}
    manifest |= {"probability": [0.25], "unconverged": ["0"], "settings_from": []}
    tensors = {f"layer.3.{side}": torch.ones(4, 4) for side in ("left", "right")}
    write_tensors(tmp_path / "edit.safetensors", tensors, "manifest", manifest)
    text = read(write_report(tmp_path))[1]
    assert "1 fact was rewritten in layer 3 by MEMIT" in text
    assert "MEMIT wrote 1 fact into the MLPs of layer 3." in text
    assert "Over all facts its probability there is 0.25 in the median" in text
    path = tmp_path / "summary.json"
    summary = read_json(path)
    assert ("PPL as it is" in text) == ("PPL" in summary["before"])
    entry = {"mean": 12.0, "low": 11.0, "high": 13.0, "n": 4}
    for has in (True, False):
        for state in ("before", "after"):
            summary[state].pop("PPL", None)
            summary[state] |= {"PPL": entry} if has else {}
        write_json(path, {name: value for name, value in summary.items() if name != "checksum"})
        text = read(write_report(tmp_path))[1]
        assert ("PPL as it is" in text, "over texts for PPL" in text) == (has, has)


def test_a_whole_run_tells_the_story_in_order_in_one_file(run):
    page, text, source = read(write_report(run))
    assert page.ids == ["trace", "selection", "moments", "edit", "evaluation", "examples", "provenance"]
    prefix = "data:image/png;base64,"
    assert all(address.startswith(prefix) for address in page.addresses)
    images = [base64.b64decode(address.removeprefix(prefix)).decode() for address in page.addresses]
    assert images == [f"image of {name}" for name in FIGURES]  # each once, in the order of the story
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "http" not in re.sub(r"data:image/png;base64,[\w+/=]+", "", source)
    assert 'name="viewport"' in source
    for said in ("tiny", "layers 2–5", "40 facts", "contribution", "210,345", "mechedit run --model tiny"):
        assert said in text
    assert PROVENANCE["weights_hash"] in text
    assert not list(run.glob(".report*"))


def test_every_number_of_the_summary_is_there_with_its_meaning(run):
    _, text, _ = read(write_report(run))
    summary = read_json(run / "summary.json")
    for state in ("before", "after"):
        for name, entry in summary[state].items():
            shown = f"{number(entry['mean'])} [{number(entry['low'])}, {number(entry['high'])}]"
            assert shown in text, (state, name)
    assert "Harmonic mean of ES, PS and NS" in text
    assert "Paraphrases (PS)" in text


def test_measures_have_the_unit_they_are_in(tmp_path):
    entries = {"KL": 0.01234, "KL+": 0.5, "top1": 98.7, "NS+": 71.25, "PPL": 12.34}
    summary = {name: {"mean": value, "low": value, "high": value, "n": 7} for name, value in entries.items()}
    write_json(tmp_path / "summary.json", {"after": summary, "protocol": {"model": "tiny"}, "counts": {}})
    _, text, _ = read(write_report(tmp_path))
    for shown in ("0.012", "0.500", "98.7", "71.2", "12.3", "7 texts", "7 cases", "KL in nats"):
        assert shown in text


def test_site_effects_are_the_means_at_the_best_layer():
    effects = make_effects(facts=6, layers=5)
    found = {effect.name: effect for effect in site_effects(effects)}
    first = effects.groupby("fact")[["clean", "corrupted"]].first()
    total = found["Total effect"]
    assert total.mean == pytest.approx(100 * (first["clean"] - first["corrupted"]).mean())
    assert total.low < total.mean < total.high
    early = effects[(effects["kind"] == "state") & (effects["role"] == "subject_last")]
    whole = early[early["sever"] == "nothing"].groupby("layer")["effect"].mean()
    best = whole.idxmax()
    assert found[f"Last subject token, state of layer {best}"].mean == pytest.approx(100 * whole[best])
    cut = early[(early["sever"] == "mlp") & (early["layer"] == best)]["effect"].mean()
    assert found["… with MLPs severed"].mean == pytest.approx(100 * cut)
    assert cut < 0.7 * whole[best]  # severing shows
    assert any(name.startswith("Last token, attention window around layer") for name in found)


def test_a_trace_alone_gives_a_report_without_the_rest(tmp_path):
    write_trace(tmp_path)
    page, text, _ = read(write_report(tmp_path))
    assert page.ids == ["trace", "provenance"]
    assert "24 facts were traced" in text
    assert "the model says 'Rome'" in text  # why a fact was left out
    assert "img" not in page.tags
    assert "mechedit trace --model tiny" in text


def test_states_alone_without_severing_give_a_report(tmp_path):
    write_trace(tmp_path)
    effects = pd.read_parquet(tmp_path / "effects.parquet")
    whole = effects[(effects["kind"] == "state") & (effects["sever"] == "nothing")]
    whole.to_parquet(tmp_path / "effects.parquet")
    _, text, _ = read(write_report(tmp_path))
    assert "Last subject token, state of layer" in text
    assert "… with" not in text
    assert "attention window around" not in text


def test_scores_of_the_unedited_model_alone(tmp_path):
    scores = make_scores("before", 0.05)
    scores.save(tmp_path)
    write_json(tmp_path / "summary.json", {"before": scores.summary()})
    page, text, _ = read(write_report(tmp_path))
    assert page.ids == ["evaluation", "examples", "provenance"]
    assert "After" not in text
    assert "Before" in text


@pytest.mark.parametrize("baseline", ["baseline", "baseline_zsre"])
def test_the_command_of_an_evaluation_is_one_that_mechedit_has(tmp_path, baseline):
    scores = make_scores("before", 0.05)
    scores.save(tmp_path)
    write_json(tmp_path / "summary.json", {"before": scores.summary()})
    stamp = {"model": IDENTITY, "settings": {"seed": 0}}
    write_steps(tmp_path, **{baseline: stamp, "evaluate": stamp})
    _, text, _ = read(write_report(tmp_path))
    assert "mechedit evaluate --model tiny" in text
    assert f"mechedit {baseline}" not in text


def test_the_page_names_all_settings_that_were_recorded(tmp_path):
    write_run(tmp_path)
    _, text, _ = read(write_report(tmp_path))
    assert "of edit clamp, covariance_weight, seed, steps" in text
    assert "and is not all that determines the numbers" in text


def test_an_edit_alone(tmp_path):
    write_edit(tmp_path)
    page, text, _ = read(write_report(tmp_path))
    assert page.ids == ["edit", "provenance"]
    assert "MEMIT wrote 40 facts" in text
    assert "12.0" in text  # per cent of the residual that is left
    assert "arning" not in text


def test_warnings_of_an_edit_are_said_at_the_top_and_where_it_is_described(tmp_path):
    write_edit(tmp_path, warnings=["the update is larger than <the weights>", "4 of 40 were not reached"])
    _, text, _ = read(write_report(tmp_path))
    assert text.index("The edit comes with warnings") < text.index("MEMIT wrote 40 facts")
    for line in ("the update is larger than <the weights>.", "4 of 40 were not reached."):
        assert f"Warning: {line}" in text
    write_edit(tmp_path, warnings=["the update is larger"])
    assert "The edit comes with a warning" in read(write_report(tmp_path))[1]


def test_no_early_site_is_said(tmp_path):
    write_run(tmp_path)
    selection = read_json(tmp_path / "selection.json")
    nothing = {"layers": [], "reason": "no early site: the gap is 0.1%"}
    write_json(tmp_path / "selection.json", selection | nothing)
    _, text, _ = read(write_report(tmp_path))
    assert "No layer range was found" in text
    assert "No layers , by the rule" in text
    assert "no early site" in text


def test_an_unsettled_choice_is_said_with_the_likeliest_ranges(tmp_path):
    write_run(tmp_path)
    _, text, _ = read(write_report(tmp_path))
    assert "unsettled" not in text
    selection = read_json(tmp_path / "selection.json")
    write_json(tmp_path / "selection.json", selection | {"state": "unsettled"})
    _, text, _ = read(write_report(tmp_path))
    assert "The choice is unsettled : trace more facts" in text
    assert "the share of resamples that give them: 2–5 (94%); 2–4 (3%)." in text


def test_published_ranges_are_shown_beside_the_chosen_one(tmp_path):
    write_run(tmp_path)
    entry = {"model": "gpt2-xl", "method": "MEMIT", "layers": [13, 14, 15, 16, 17], "source": "a file", "note": "x"}
    selection = read_json(tmp_path / "selection.json")
    write_json(tmp_path / "selection.json", selection | {"published": [entry, entry | {"layers": [5], "note": ""}]})
    _, text, _ = read(write_report(tmp_path))
    assert "Published for this model: MEMIT, layers 13–17 (gpt2-xl; a file; x) ; MEMIT, layer 5" in text


def test_a_selection_by_another_metric_is_not_in_percent(tmp_path):
    write_run(tmp_path)
    selection = read_json(tmp_path / "selection.json")
    _, percent, _ = read(write_report(tmp_path))
    write_json(tmp_path / "selection.json", selection | {"metric": "log_probability"})
    _, text, _ = read(write_report(tmp_path))
    assert ("Gap, %" in percent, "Gap, %" in text) == (True, False)
    assert "in log_probability" in text


def test_text_from_the_data_is_escaped(tmp_path):
    write_trace(tmp_path)
    add_figures(tmp_path, ["fact"])  # its caption names the subject
    facts = pd.read_parquet(tmp_path / "facts.parquet")
    facts["subject"] = '<script>alert(1)</script> & "Söhne"'
    facts.to_parquet(tmp_path / "facts.parquet")
    selection = {"layers": [1, 4], "rule": "<img src=x>", "alternatives": {"<b>": []}}
    write_json(tmp_path / "selection.json", selection)
    page, text, _ = read(write_report(tmp_path))
    assert "script" not in page.tags
    assert page.tags.count("img") == 1
    assert '<script>alert(1)</script> & "Söhne"' in text  # shown as written
    assert "Layers 1, 4" in text
    assert "<b> , none" in text


def test_the_same_folder_gives_the_same_page(run):
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_folders_that_are_no_run_are_refused(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        write_report(tmp_path / "absent")
    (tmp_path / "holiday.txt").write_text("sun")
    with pytest.raises(InputError, match="no results"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["effects.parquet", "selection.json", "edit.safetensors", "summary.json", "scores.json"]
)
def test_a_broken_file_is_named_and_no_report_is_left(tmp_path, name):
    write_run(tmp_path)
    (tmp_path / name).write_bytes(b"{ cut sho")
    with pytest.raises(InputError, match=name.partition(".")[0]):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_numbers_and_spans_are_typeset():
    assert [number(x) for x in (12.345, -0.04, -1.25)] == ["12.3", "0.0", "−1.2"]
    assert [number(x) for x in (None, float("nan"))] == ["–", "–"]
    assert number(99.5, 0) == "100"
    assert [span(x) for x in ([3, 4, 5], [5], [3, 8], [])] == ["3–5", "5", "3, 8", "none"]


def test_the_page_loads_nothing_from_elsewhere(tmp_path):
    write_trace(tmp_path)
    add_figures(tmp_path, ["fact"])
    page = write_report(tmp_path).read_text()
    sources = re.findall(r"""(?:src|href|srcset|action)\s*=\s*["']?([^"'\s>]+)|url\(([^)]+)\)|@import\s+(\S+)""", page)
    addresses = [address for groups in sources for address in groups if address]
    assert any(address.startswith("data:image/png") for address in addresses)  # the control: there is something to find
    assert all(address.startswith(("data:", "#")) for address in addresses)


@pytest.mark.parametrize("name", ["facts.parquet", "edit.safetensors", "scores.json"])
def test_no_figure_of_damaged_results_is_left(tmp_path, name):
    write_run(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])

    def draw(folder):
        (folder / "figures").mkdir()

    with pytest.raises(InputError, match=name):
        write_report(tmp_path, draw)
    assert not (tmp_path / "figures").exists()
    (tmp_path / name).write_bytes(whole)
    write_report(tmp_path, draw)
    assert (tmp_path / "figures").is_dir(), "the control: figures of whole results are drawn"
