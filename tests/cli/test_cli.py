"""The command line: what it refuses, in one line with exit code 2, and that the commands make their files."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest
import torch
import typer
from helpers.commands import call, complaint
from helpers.edits import random_edit
from matplotlib.figure import Figure
from peft import PeftModel
from transformers import AutoModelForCausalLM

import mechedit as me
from mechedit.cli import parse_layers, parse_windows
from mechedit.cli.app import app, plain_warnings
from mechedit.cli.command import command
from mechedit.data import tiny_data
from mechedit.files import read_json, write_json
from mechedit.notices import ImplausibleEditWarning
from mechedit.report import number
from mechedit.sweep import CLOSE

FACT = {"id": "1", "subject": "iPod Touch", "prompt": "{} goes with the color", "object": "teal"}

COMMON = "model backend device dtype merge-adapter allow-pickle seed overwrite verify json config"
OPTIONS = {
    "run": "facts requests joint strict chat texts out layers method rule max-facts max-requests samples set "
    "generation-prompts generation-tokens stop-words accept-unsettled approximate conflicts tuned no-tuned all-facts "
    "minutes by",
    "trace": "facts joint strict chat out kinds sever window roles samples noise corruption replace extra-tokens "
    "metrics memory max-facts approximate points all-samples largest exact-cells exact-facts least-correlation "
    "until-settled minutes shard merge",
    "select": "DIRECTORY rule share min-width max-width width validate by windows validate-requests requests "
    "joint strict chat texts tokens max-length method set tuned no-tuned accept-unsettled conflicts",
    "moments": "layers texts out tokens max-length documents memory checkpoint-seconds shard merge convergence npz "
    "weight",
    "tune": "MODEL requests joint strict chat texts tokens max-length method set out moments trace minutes edits "
    "windows width facts",
    "train-mend": "MODEL requests joint strict chat texts layers out steps batch-size rank lr rate rate-lr edit-weight "
    "clip text-tokens neighbors validation validate-every",
    "edit": "requests joint strict chat out show layers selection moments method set tuned no-tuned conflicts "
    "published without with targets-only shard merge",
    "evaluate": "requests joint strict chat out edit texts max-texts generation-prompts generation-tokens "
    "stop-words protocol references conflicts",
    "apply": "edit out format rank requests joint strict chat",
    "report": "DIRECTORY verify json config",
    "plan": "MODEL facts tokens text-tokens edits layers dtype device rate samples before-tokens subject-tokens "
    "after-tokens object-tokens prefix-tokens json config",
}
"""The options of every command beside the common ones; `report` has no model, and `plan` loads none."""


TRACE = ["trace", "--max-facts", 12, "--samples", 3, "--roles", "subject_last,last"]
"""A small trace, of the two roles that a selection reads."""


SHORT_TEXTS = ["--generation-prompts", 1, "--generation-tokens", 10]
"""Free text of an evaluation, of which it otherwise takes most of the time."""


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trace of the tiny model, by the command itself."""
    folder = tmp_path_factory.mktemp("traced") / "run"
    assert call(*TRACE, "--out", folder) == 0
    return folder


@pytest.fixture(autouse=True)
def unwritten_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, and their files left empty; not those of `traced`, which is made before."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: Path(path).touch())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["find"], "No such command 'find'"),
        (["trace", "--color", "red"], "No such option"),
        (["plan", "--model", "tiny"], "MODEL comes first, without --model: mechedit plan MODEL"),
        (["tune", "--model=tiny"], "MODEL comes first, without --model: mechedit tune MODEL"),
        (["report", "--directory", "run"], "DIRECTORY comes first, without --directory"),
        (["trace", "--backend", "jax"], "the backend is 'jax', expected one of transformer_lens, nnsight"),
        (["trace", "--facts", "/no/such/file.jsonl"], "cannot read the file '/no/such/file.jsonl'"),
        (["trace", "--sever", "everything"], "sever holds 'everything', expected"),
        (["trace", "--samples", "0"], "samples is 0"),
        (["trace", "--kinds", "state,heads"], "an entry of kinds is 'heads', expected one of state, mlp, attn"),
        (["trace", "--roles", "first"], "an entry of roles is 'first'"),
        (["trace", "--window", "0"], "window is 0"),
        (["trace", "--corruption", "salt"], "the corruption is 'salt', expected one of gaussian"),
        (["trace", "--corruption", "tokens", "--replace"], "takes neither replace nor extra_tokens"),
        (["trace", "--extra-tokens", "-1"], "extra_tokens is -1"),
        (["trace", "--metrics", "recall"], "the metric is 'recall', expected one of probability"),
        (["trace", "--memory", "0"], "memory is 0"),
        (["select", "/no/such/folder"], "there is no folder '/no/such/folder'"),
        (["select", "."], "holds no effects.parquet"),
        (["select", ".", "--share", "2"], "share is 2.0, expected a number between 0 and 1; choose a number above 0"),
        (["select", ".", "--min-width", "4", "--max-width", "3"], "min_width is 4 and max_width 3"),
        (["select", ".", "--by", "eye"], "by is 'eye', expected one of trace, sweep, both"),
        (["select", ".", "--validate", "--windows", "5-3"], "the windows '5-3' run backwards"),
        (["select", ".", "--validate", "--windows", "all"], "the windows 'all' cannot be read"),
        (["select", ".", "--validate", "--validate-requests", "1"], "requests is 1, expected at least 2"),
        (["select", ".", "--validate", "--requests", "/no/such"], "says which model was traced"),
        (["run", "--method", "magic"], "the method is 'magic', expected one of memit"),
        (["run", "--rule", "by-eye"], "rule is 'by-eye', expected one of contribution"),
        (["run", "--layers", "8-3"], "run backwards"),
        (["run", "--layers", "3-30"], "layer 30 is not in the model, expected layers 0 to 9"),
        (["run", "--set", "lambda=3"], "--set 'lambda=3' cannot be read"),
        (["moments"], "give the layers whose moments are wanted by --layers"),
        (["moments", "--layers", "1", "--memory", "0"], "memory is 0"),
        (["moments", "--layers", "1", "--memory", "0.001"], "memory is 0.001 GiB, expected at least"),
        (["moments", "--layers", "1", "--tokens", "100"], "tokens is 100, expected at least d_mlp = 768"),
        (["moments", "--layers", "1", "--shard", "half"], "the shard 'half' cannot be read, expected such as 0/4"),
        (
            ["moments", "--layers", "1", "--shard", "0/0"],
            "whose number of shards is 0, expected at least 1; choose such",
        ),
        (
            ["tune", "--requests", "tiny", "--trace", "."],
            "has no selection.json, expected the folder of a selection; run ",
        ),
        (["moments", "--layers", "1", "--shard", "4/4"], "the shard is 4/4, expected one of 0/4 … 3/4"),
        (["moments", "--layers", "1", "--shard", "0/4", "--convergence"], "collect without --shard"),
        (["moments", "--merge", "--shard", "0/4"], "give it without --shard"),
        (["moments", "--shard", "0/4", "--npz", "stats"], "--npz needs the sum over all parts; give it with --merge"),
        (["moments", "--merge", "--out", "."], "holds no shards of the layers of a model, expected some; collect them"),
        (["edit", "--moments", "."], "give the layers, or tune them (mechedit tune)"),
        (["edit", "--layers", "1-2", "--moments", "/no/such"], "/no/such"),
        (["edit", "--show", "/no/such.safetensors"], "cannot read"),
        (["apply", "--edit", "/no/such.safetensors", "--out", "there"], "cannot read"),
        (["apply", "--edit", "/no/such.safetensors", "--out", "there", "--format", "zip"], "'zip'"),
        (["evaluate", "--texts", "tiny", "--max-texts", "0"], "--max-texts is 0, expected at least 1"),
        (["evaluate", "--references", "nowhere"], "cannot read the file 'nowhere'"),
        (["report", "/no/such/folder"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(capsys, *arguments)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files == [], "nothing half-written may stay"


def test_a_file_in_the_place_of_the_npz_folder_is_refused_before_the_text_is_read(capsys, tmp_path):
    (tmp_path / "stats").write_text("mine")
    arguments = ["moments", "--layers", "1", "--out", tmp_path / "out", "--npz", tmp_path / "stats"]
    assert "expected a folder that can be written to" in complaint(capsys, *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["stats"]


def test_an_unknown_model_is_named(capsys, tmp_path):
    arguments = ["--model", tmp_path / "no-such-model", "--facts", "known", "--out", tmp_path]
    assert "no-such-model" in complaint(capsys, "trace", *arguments)


@pytest.mark.parametrize(("model", "name"), [("tiny", "known"), ("/no/such/model", "known_1000")])
def test_where_no_facts_are_named_they_suit_the_model(capsys, monkeypatch, tmp_path, model, name):
    asked = []

    def refuse(source: str, **options: object) -> None:
        asked.append(source)
        raise me.InputError("enough")

    monkeypatch.setattr("mechedit.cli.options.read_facts", refuse)
    assert "enough" in complaint(capsys, "trace", "--model", model, "--out", tmp_path)
    assert asked == [name]


def test_whole_data_sets_are_not_edited_into_other_models_unasked(capsys, tmp_path):
    arguments = ["edit", "--model", "/no/such/model", "--layers", "1", "--out", tmp_path / "edit.safetensors"]
    assert "no requests are named for '/no/such/model'" in complaint(capsys, *arguments)
    arguments = ["evaluate", "--model", "/no/such/model", "--out", tmp_path]
    assert "no requests are named for '/no/such/model'" in complaint(capsys, *arguments)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(FACT) + "\nnot json", "line 2 is not JSON"),
        (json.dumps({**FACT, "prompt": "the color"}), "occurs 0 times in the prompt 'the color'"),
        (json.dumps({**FACT, "prompt": "{} and {}"}), "2 times '{}'"),
        (json.dumps({**FACT, "subject": ""}), "the subject is ''"),
        (json.dumps({**FACT, "object": " "}), "the object is ' '"),
        (json.dumps({**FACT, "object": "nonsense"}), "none of the 1 facts"),
    ],
)
def test_bad_facts_are_refused(capsys, tmp_path, content, message):
    file = tmp_path / "facts.jsonl"
    file.write_text(content)
    assert message in complaint(capsys, "trace", "--facts", file, "--out", tmp_path / "run")
    assert not (tmp_path / "run" / "effects.parquet").exists()


def test_conflicting_requests_are_refused(capsys, tmp_path):
    request = {"id": "a", "subject": "iPod Touch", "prompt": "{} has the color", "target_new": "teal"}
    file = tmp_path / "requests.jsonl"
    file.write_text(json.dumps(request) + "\n" + json.dumps({**request, "id": "b", "target_new": "amber"}))
    message = complaint(capsys, "run", "--requests", file, "--conflicts", "refuse", "--out", tmp_path / "run")
    assert "requests 'a' and 'b' conflict" in message
    # A run takes a sample of the requests: by default it goes on without what it cannot write, and says so.
    message = complaint(capsys, "run", "--requests", file, "--layers", "99", "--out", tmp_path / "run")
    assert "layer 99 is not in the model" in message


def test_a_folder_that_cannot_be_written_is_refused(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to the folder" in complaint(capsys, "trace", "--out", tmp_path / "file" / "run")


def test_trace_writes_what_the_contract_says(traced):
    effects = pd.read_parquet(traced / "effects.parquet")
    assert list(effects.columns) == [
        "fact", "kind", "window", "sever", "layer", "position", "token", "role",
        "metric", "score", "corrupted", "clean", "effect", "samples",
    ]  # fmt: skip
    assert effects.attrs["n_facts"] == effects["fact"].nunique() > 5
    assert set(effects["kind"]) == {"state", "mlp", "attn"}
    assert set(effects["sever"]) == {"nothing", "mlp", "attn"}
    facts = pd.read_parquet(traced / "facts.parquet")
    assert len(facts) == 12
    assert facts["traced"].sum() == effects["fact"].nunique()
    stamp = read_json(traced / "config.json")["steps"]["trace"]
    assert stamp["settings"]["samples"] == 3
    assert (traced / "figures" / "severed.pdf").is_file()


def test_trace_takes_what_a_trace_can_vary(tmp_path):
    """Each option reaches the trace: its settings are stamped, and its effects differ from the default ones."""
    few = [
        "--max-facts",
        3,
        "--samples",
        2,
        "--kinds",
        "state,mlp",
        "--roles",
        "subject_last,last",
        "--sever",
        "nothing",
    ]
    assert call("trace", *few, "--out", tmp_path / "plain") == 0
    varied = ["--window", 2, "--noise", 2, "--corruption", "uniform", "--replace", "--extra-tokens", 1]
    varied += ["--metrics", "probability,kl", "--memory", 1]
    assert call("trace", *few, *varied, "--out", tmp_path / "varied") == 0
    settings = read_json(tmp_path / "varied" / "config.json")["steps"]["trace"]["settings"]
    corruption = {"distribution": "uniform", "replace": True, "degrees": 3, "extra_tokens": 1}
    expected = {"window": 2, "noise": 2.0, "corruption": corruption, "metrics": ["probability", "kl"], "memory": 1.0}
    assert {name: settings[name] for name in expected} == expected
    plain, effects = (pd.read_parquet(tmp_path / name / "effects.parquet") for name in ("plain", "varied"))
    assert set(effects["metric"]) == {"probability", "kl"}
    assert set(plain["metric"]) == {"probability"}
    assert set(effects["role"]) == set(plain["role"]) == {"subject_last", "last"}
    assert set(effects["kind"]) == {"state", "mlp"}
    assert effects[effects["kind"] == "mlp"]["window"].max() == 2
    assert effects["corrupted"].nunique() > 1
    same = effects[effects["metric"] == "probability"].reset_index(drop=True)
    assert (same["corrupted"] - plain["corrupted"]).abs().max() > 1e-3


def test_an_approximate_trace_says_how_well_it_agrees_or_is_refused(tmp_path, capsys):
    few = ["--max-facts", 8, "--samples", 2, "--kinds", "state", "--sever", "nothing", "--approximate"]
    few += ["--exact-cells", 20, "--exact-facts", 2, "--out", tmp_path]
    message = complaint(capsys, "trace", *few, "--least-correlation", 0.9999)
    assert "estimates do not stand for exact effects here (single state" in message
    assert "trace state without approximation" in message
    assert "or lower --least-correlation and trust" in message
    assert not (tmp_path / "effects.parquet").exists()
    assert call("trace", *few, "--least-correlation", 0, "--json") == 0
    captured = capsys.readouterr()
    (record,) = json.loads(captured.out)["agreement"]
    assert record["cells"] == 20
    assert f"rank correlation {record['correlation']:.3f} on 20 cells" in captured.err
    effects = pd.read_parquet(tmp_path / "effects.parquet")
    assert 20 <= effects["exact"].sum() < len(effects)
    assert (effects["estimate"] != effects["effect"])[effects["drawn"]].any()


def test_a_step_is_reused_and_other_settings_are_refused(traced, capsys):
    effects = traced / "effects.parquet"
    before = effects.stat().st_mtime_ns
    assert call(*TRACE, "--out", traced) == 0
    assert effects.stat().st_mtime_ns == before
    message = complaint(capsys, *TRACE, "--samples", 4, "--out", traced)
    assert "settings.samples = 3, expected 4" in message
    assert effects.stat().st_mtime_ns == before


def test_both_backends_give_the_same_effects(traced, tmp_path):
    assert call(*TRACE, "--backend", "nnsight", "--out", tmp_path) == 0
    first, second = (pd.read_parquet(folder / "effects.parquet") for folder in (traced, tmp_path))
    assert (first["score"] - second["score"]).abs().max() < 1e-5
    assert first["effect"].abs().max() > 0.1


def test_a_config_file_gives_values_and_the_command_line_wins(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("samples: 2\nmax-facts: 3\nroles: subject_last\n")
    arguments = ["--config", tmp_path / "options.yaml", "--max-facts", 4, "--out", tmp_path / "run"]
    assert call("trace", *arguments) == 0
    assert pd.read_parquet(tmp_path / "run" / "effects.parquet")["samples"].unique().tolist() == [2]
    assert len(pd.read_parquet(tmp_path / "run" / "facts.parquet")) == 4
    (tmp_path / "options.yaml").write_text("sample: 2\n")
    assert "names the option 'sample'" in complaint(capsys, "trace", "--config", tmp_path / "options.yaml")


def test_the_steps_by_hand(tmp_path, traced, capsys):
    """Select, moments, edit, evaluate, apply: each reads what the one before it wrote."""
    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps(json.loads(tiny_data("requests.json").read_text())[:3]))
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(me.load_texts("tiny")[:80]))
    assert call("select", traced) == 0
    layers = read_json(traced / "selection.json")["layers"]
    assert layers
    span = f"{layers[0]}-{layers[-1]}"
    assert call("moments", "--texts", texts, "--layers", span, "--out", tmp_path, "--npz", tmp_path / "stats") == 0
    published = sorted((tmp_path / "stats").glob("transformer.h.*.mlp.c_proj_float32_mom2_100000.npz"))
    assert len(published) == len(layers)
    edit = tmp_path / "edit.safetensors"
    arguments = ["--requests", requests, "--moments", tmp_path, "--out", edit, "--set", "steps=8"]
    assert call("edit", *arguments, "--selection", traced / "selection.json") == 0
    assert "exists" in complaint(capsys, "edit", *arguments, "--layers", span)
    targets = sorted((tmp_path / "targets").iterdir())
    assert len(targets) == 3, "one file per subject"
    short = tmp_path / "short.safetensors"
    assert call("edit", *arguments[:-2], "--set", "steps=1", "--layers", span, "--out", short) == 0
    warned = capsys.readouterr().err
    assert re.search(
        r"3 of 3 new objects are not the likeliest answer at their z, where P of these is 0\.\d\d in the median \(more",
        warned,
    )
    assert len(list((tmp_path / "targets").iterdir())) == 6
    # Moments as the published code has them: with the same targets, all but the same edit.
    from_npz = [*arguments[:2], "--moments", tmp_path / "stats", "--set", "steps=8", "--layers", span]
    assert call("edit", *from_npz, "--out", tmp_path / "npz.safetensors") == 0
    assert len(list((tmp_path / "targets").iterdir())) == 6
    assert {path.suffix for path in (tmp_path / "stats").iterdir()} == {".npz"}
    ours, theirs = (me.Edit.load(path).delta(layers[0]) for path in (edit, tmp_path / "npz.safetensors"))
    assert (ours - theirs).norm() < 1e-3 * ours.norm()
    before = [file.stat().st_mtime_ns for file in targets]
    assert call("edit", *arguments, "--layers", span, "--set", "covariance_weight=50", "--overwrite") == 0
    # Other targets than those that are kept are not needed for another weight.
    assert len(list((tmp_path / "targets").iterdir())) == 6
    assert [file.stat().st_mtime_ns for file in targets] == before
    model = me.load_model("tiny")
    untouched = model.weights_hash()
    scores = tmp_path / "scores"
    evaluate = ["--requests", requests, "--texts", texts, "--max-texts", 5, "--out", scores, "--json", *SHORT_TEXTS]
    assert call("evaluate", *evaluate, "--edit", edit) == 0
    summary = json.loads(capsys.readouterr().out)
    saved = read_json(scores / "summary.json")
    assert len(saved.pop("sha256")) == 64
    assert summary == saved
    assert set(summary) == {"before", "after", "protocol", "counts"}
    assert summary["after"]["ES"]["mean"] > summary["before"]["ES"]["mean"]
    assert set(summary["before"]["ES"]) == {"mean", "low", "high", "n"}
    assert summary["after"]["KL"]["mean"] > 0
    assert "KL" not in summary["before"]
    assert summary["before"]["PPL"]["n"] == summary["protocol"]["texts"]["count"] == 5
    assert summary["counts"]["NS+"] == {"cases": 3, "missing": 0, "prompts": summary["counts"]["NS"]["prompts"]}
    protocol = summary["protocol"]
    assert (protocol["model"], protocol["likelihood"], protocol["edit"]["method"]) == ("tiny", "joint", "memit")
    assert protocol["weights_hash"]["before"] == untouched != protocol["weights_hash"]["after"]
    # Another edit is held against the same unedited answers, which are not asked for again.
    answers = scores / "baseline" / "states.safetensors"
    written_at = answers.stat().st_mtime_ns
    assert "made with edit" in complaint(capsys, "evaluate", *evaluate, "--edit", short)
    assert call("evaluate", *evaluate, "--edit", short, "--overwrite") == 0
    again = json.loads(capsys.readouterr().out)
    assert answers.stat().st_mtime_ns == written_at
    assert again["before"] == summary["before"]
    assert again["after"]["KL"] != summary["after"]["KL"]
    assert again["protocol"]["edit"] != protocol["edit"]
    assert call("edit", "--show", edit, "--model", "tiny") == 0
    shown = capsys.readouterr().out
    written = me.load_requests(requests)[0]
    assert f"{written.text} → {written.target_new}" in shown
    assert model.weights_hash() in shown
    assert call("edit", "--show", short) == 0
    assert (
        "search    3 of 3 new objects are not the likeliest answer at their z, where P of these"
        in capsys.readouterr().out
    )
    assert call("apply", "--edit", edit, "--out", tmp_path / "edited") == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad(), me.edited(model, me.Edit.load(edit)):
        expected = model.hf(ids).logits
    assert model.weights_hash() == untouched
    # The tiny checkpoint holds float16, and so does the exported one: the edit is there, rounded.
    assert again.dtype == torch.float16
    with torch.no_grad():
        logits, unedited = again.float()(ids).logits, model.hf(ids).logits
    assert (logits - expected).norm() < 0.1 * (expected - unedited).norm()


def test_moments_of_shards_merge_and_settle(tmp_path, capsys):
    """--shard, --merge, and --convergence."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(me.load_texts("tiny")[:600]))
    options = ["--texts", texts, "--layers", "2-3", "--max-length", 16]
    at_once, merged = tmp_path / "whole", tmp_path / "parts"
    assert call("moments", *options, "--convergence", "--memory", 0.5, "--out", at_once) == 0
    assert "layers 2, 3 in one pass over the text: about 0." in capsys.readouterr().err
    curve = pd.read_parquet(at_once / "moments" / "convergence.parquet")
    assert set(curve["layer"]) == {2, 3}
    assert curve["matrix_change"].between(0, 1).all()
    assert call("moments", *options, "--shard", "1/2", "--out", merged) == 0
    message = complaint(capsys, "moments", "--merge", "--out", merged)
    assert "shard 0/2 of layer 2 is missing" in message
    assert call("moments", *options, "--shard", "0/2", "--out", merged) == 0
    assert "mechedit moments --merge" in capsys.readouterr().err
    assert call("moments", "--merge", "--out", merged, "--json") == 0
    counts = json.loads(capsys.readouterr().out)["moments"]
    reference, added_up = (me.load_moments(folder, [2, 3]) for folder in (at_once, merged))
    assert counts == {str(layer): reference[layer].count for layer in (2, 3)}
    for layer in (2, 3):
        assert (reference[layer].matrix - added_up[layer].matrix).norm() < 1e-12 * reference[layer].matrix.norm()


@pytest.fixture
def tiny_edit(tmp_path: Path) -> Path:
    """An edit of the tiny model, with settings, texts and residuals in its manifest."""
    model = me.load_model("tiny")
    settings = {**dataclasses.asdict(me.MemitConfig()), "steps": 7}
    residuals = [{"layer": layer, "before": 1.0, "after": 0.25, "error": 1e-15, "condition": 1e6} for layer in (0, 2)]
    edit = random_edit(model, ranks=(3, 1))
    facts = [f"Fact {number} about something rather long: {'so ' * 40} → end" for number in range(25)]
    manifest = {
        **edit.manifest, "method": "memit", "settings": settings, "residuals": residuals,
        "requests": [str(number) for number in range(25)], "facts": facts,
    }  # fmt: skip
    me.Edit(factors=edit.factors, manifest=manifest).save(tmp_path / "edit.safetensors")
    return tmp_path / "edit.safetensors"


def test_an_edit_is_shown_in_100_columns(tiny_edit, tmp_path, capsys):
    assert call("edit", "--show", tiny_edit) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "safetensors" not in line) <= 100
    text = "\n".join(lines)
    assert "method    memit" in text
    assert "model     tiny, float32" in text
    assert "settings  steps = 7" in lines
    table = next(i for i, line in enumerate(lines) if "‖ΔW‖" in line)
    assert lines[table].split() == ["layer", "rank", "‖ΔW‖", "residual", "left", "solver", "error", "condition"]
    norms = [float(me.Edit.load(tiny_edit).delta(layer).norm()) for layer in (0, 2)]
    for line, layer, rank, norm in zip(lines[table + 1 :], (0, 2), (3, 1), norms, strict=False):
        assert line.split() == [str(layer), str(rank), f"{norm:.3g}", "0.25", "1e-15", "1e+06"]
    assert "25 requests" in lines
    assert "… and 5 more" in lines[-1]
    assert not list(tmp_path.glob("*.json"))


def test_an_edit_is_shown_as_json_and_beside_its_model(tiny_edit, capsys):
    assert call("edit", "--show", tiny_edit, "--model", "tiny", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    model, edit = me.load_model("tiny"), me.Edit.load(tiny_edit)
    assert shown["model"] == model.provenance()
    assert shown["changed_settings"] == {"steps": 7}
    assert len(shown["requests"]) == 25
    assert shown["requests"][3] == {"id": "3", "fact": edit.manifest["facts"][3]}
    first, second = shown["layers"]
    size = float(model.projection(0).double().norm())
    assert first["relative"] == pytest.approx(float(edit.delta(0).norm()) / size)
    assert (second["layer"], second["rank"], second["left"]) == (2, 1, 0.25)
    assert "truncation" not in first


def test_older_and_combined_edits_are_shown(tiny_edit, tmp_path, capsys):
    edit = me.Edit.load(tiny_edit)
    older = {name: value for name, value in edit.manifest.items() if name not in ("facts", "residuals", "settings")}
    me.Edit(factors=edit.factors, manifest={**older, "method": "unheard-of"}).save(tiny_edit)
    assert call("edit", "--show", tiny_edit) == 0
    text = capsys.readouterr().out
    assert "25 requests (their texts are not in the file): 0, 1, 2," in text
    assert "residual" not in text
    me.truncate(me.merge([me.Edit.load(tiny_edit), edit]), 2).save(tmp_path / "merged.safetensors")
    assert call("edit", "--show", tmp_path / "merged.safetensors") == 0
    text = capsys.readouterr().out
    assert "merge of unheard-of, memit" in text
    assert "truncation" in text


def test_an_edit_is_refused_beside_another_model(tiny_edit, capsys, tmp_path):
    edit = me.Edit.load(tiny_edit)
    manifest = {**edit.manifest, "model": {**edit.manifest["model"], "weights_hash": "0" * 64}}
    me.Edit(factors=edit.factors, manifest=manifest).save(tiny_edit)
    assert "the edit was made for 'tiny' with weights 000" in complaint(
        capsys, "edit", "--show", tiny_edit, "--model", "tiny"
    )
    for kind in ("lora", "checkpoint"):
        arguments = ["--edit", tiny_edit, "--out", tmp_path / "out", "--format", kind]
        assert "made for" in complaint(capsys, "apply", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == [tiny_edit.name]


def test_apply_of_one_rank_states_what_is_lost(tmp_path, capsys):
    model, requests = me.load_model("tiny"), me.load_requests("tiny")[:6]
    moments = {4: torch.eye(model.d_mlp, dtype=torch.float64)}
    me.memit(model, requests, [4], moments, ["{}"], me.MemitConfig(covariance_weight=1e-3)).save(tmp_path / "edit")
    plain = [{**request.plain(), "neighbors": request.neighbors[:2]} for request in requests]
    write_json(tmp_path / "requests.json", plain)
    arguments = ["apply", "--edit", tmp_path / "edit", "--out", tmp_path / "adapter", "--format", "lora", "--overwrite"]
    lost, scores = {}, {}
    for rank in (1, 16):
        capsys.readouterr()
        assert call(*arguments, "--rank", rank, "--requests", tmp_path / "requests.json", "--json") == 0
        captured = capsys.readouterr()
        summary = json.loads(captured.out)
        lost[rank], scores[rank] = summary["lost"], summary["scores"]
        assert f"{summary['lost']:.2%} of the norm of ΔW is lost" in captured.err
        assert f"ES {scores[rank]['ES']['edit']:.1f} → {scores[rank]['ES']['rank']:.1f}" in captured.err
    assert 0 < lost[1] < 1
    assert lost[16] < 1e-6
    assert set(scores[1]) == {"ES", "PS", "NS"}
    assert all(entry["rank"] == entry["edit"] for entry in scores[16].values()), "nothing is lost"
    assert scores[1]["ES"]["rank"] < scores[1]["ES"]["edit"] == 100, "the control: one rank is too little for six facts"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rank", 4], "--rank is that of an adapter"),
        (["--format", "lora", "--requests", "tiny"], "add --rank, or leave --requests out"),
        (["--format", "lora", "--rank", 0], "the rank is 0, expected 1 to 128"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(tiny_edit, tmp_path, capsys, options, message):
    assert message in complaint(capsys, "apply", "--edit", tiny_edit, "--out", tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_apply_writes_a_lora_adapter(tiny_edit, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert call("apply", "--edit", tiny_edit, "--out", out, "--format", "lora", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"model": str(out), "format": "lora", "layers": [0, 2]}
    config = read_json(out / "adapter_config.json")
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, out)
    model, ids = me.load_model("tiny"), torch.arange(5, 15)[None]
    with torch.no_grad():
        base_logits = model.hf(ids).logits
        with me.edited(model, me.Edit.load(tiny_edit)):
            edited_logits = model.hf(ids).logits
        adapted_logits = adapted(ids).logits
    assert float((adapted_logits - edited_logits).norm() / edited_logits.norm()) < 1e-5
    assert float((base_logits - edited_logits).norm() / edited_logits.norm()) > 0.01


@pytest.fixture
def small_inputs(tmp_path: Path) -> list[object]:
    """Options that make a sweep of the tiny model short."""
    requests, texts = tmp_path / "requests.json", tmp_path / "texts.txt"
    requests.write_text(json.dumps(json.loads(tiny_data("requests.json").read_text())[:40]))
    texts.write_text("\n".join(me.load_texts("tiny")[:80]))
    return ["--requests", requests, "--texts", texts, "--validate-requests", 3, "--set", "steps=4"]


def test_select_validates_by_editing_and_chooses_by_it(traced, tmp_path, small_inputs, capsys):
    folder = tmp_path / "run"
    shutil.copytree(traced, folder)
    assert call("select", folder, "--validate", "--windows", "2-3,3", *small_inputs, "--json") == 0
    printed = capsys.readouterr()
    traced_layers = json.loads(printed.out)["selection"]["layers"]
    selection = read_json(folder / "selection.json")
    validation = selection["validation"]
    assert selection["layers"] == validation["traced"]["layers"] == traced_layers
    assert validation["verdict"] in printed.err
    assert validation["by"] == "trace"
    assert (validation["n_requests"], validation["held_out"]) == (3, 3)
    swept = pd.read_parquet(folder / "sweep.parquet")
    assert set(zip(swept["first"], swept["last"], strict=True)) == {
        (2, 3),
        (3, 3),
        (traced_layers[0], traced_layers[-1]),
    }
    scores = swept[swept["measure"] == "ES"]["mean"]
    assert scores.max() > swept.attrs["before"]["ES"]["mean"]
    assert (folder / "figures" / "sweep.pdf").is_file()
    assert call("report", folder) == 0
    assert "Do edits agree?" in (folder / "report.html").read_text()

    before = (folder / "sweep.parquet").stat().st_mtime_ns
    by_sweep = ["select", folder, "--by", "sweep", "--windows", "2-3,3", *small_inputs]
    assert call(*by_sweep) == 3, "three requests do not settle it"
    assert call(*by_sweep, "--accept-unsettled") == 0
    assert (folder / "sweep.parquet").stat().st_mtime_ns == before, "the same sweep is read, not made again"
    selection = read_json(folder / "selection.json")
    assert selection["layers"] == selection["validation"]["best"]["layers"] == selection["validation"]["layers"]
    assert "best-scoring" in selection["reason"]
    assert me.Selection.load(folder / "selection.json").validation["traced"]["layers"] == traced_layers

    other_settings = [*small_inputs[:-1], "steps=5"]
    message = complaint(capsys, "select", folder, "--validate", "--windows", "2-3,3", *other_settings)
    assert "the sweep in" in message
    assert "settings.steps = 4, expected 5" in message


@pytest.mark.parametrize(
    "refused",
    [
        ["--method", "zzz"],
        ["--set", "zzz=1"],
        ["--windows", "2-30"],
        ["--dtype", "bfloat16"],
        ["--requests", "/no/such/file"],
        ["--texts", "/no/such/file.txt"],
    ],
)
def test_a_refused_validation_leaves_the_selection_as_it_was(traced, tmp_path, capsys, small_inputs, refused):
    folder = tmp_path / "run"
    shutil.copytree(traced, folder)
    (folder / "selection.json").write_text("a validated selection")
    complaint(capsys, "select", folder, "--validate", *small_inputs, *refused)
    assert (folder / "selection.json").read_text() == "a validated selection"
    assert call("select", folder, "--accept-unsettled") == 0  # the control: one that is not refused replaces it
    assert me.Selection.load(folder / "selection.json").layers


@pytest.mark.parametrize(
    "idle",
    [
        ["--windows", "1-2"],
        ["--validate-requests", "3"],
        ["--requests", "requests.json"],
        ["--texts", "tiny"],
        ["--tokens", "2000"],
        ["--max-length", "20"],
        ["--method", "rome"],
        ["--set", "steps=3"],
        ["--chat"],
        ["--strict"],
    ],
)
def test_an_option_that_does_nothing_is_refused(traced, tmp_path, capsys, idle):
    folder = tmp_path / "run"
    shutil.copytree(traced, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert f"{idle[0]} is for the sweep of edits" in complaint(capsys, "select", folder, *idle)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_run_lets_edits_decide_where_the_facts_do_not(tmp_path, capsys):
    requests, texts = tmp_path / "requests.json", tmp_path / "texts.txt"
    requests.write_text(json.dumps(json.loads(tiny_data("requests.json").read_text())[:3]))
    texts.write_text("\n".join(me.load_texts("tiny")[:60]))
    run = ["run", "--max-facts", 10, "--samples", 1, "--requests", requests, "--texts", texts, *SHORT_TEXTS]
    run += ["--set", "steps=2"]
    folder, accepting = tmp_path / "run", tmp_path / "accepting"
    code = call(*run, "--out", folder)
    assert "the choice is unsettled: a short sweep of edits decides" in capsys.readouterr().err
    selection = me.Selection.load(folder / "selection.json")
    assert selection.validation["by"] == "both"
    decisive = (selection.validation["finals"] or selection.validation)["windows"]
    chosen = next(window for window in decisive if window["layers"] == list(selection.layers))
    assert max(window["score"] for window in decisive) - chosen["score"] <= CLOSE
    assert code == (0 if selection.state == "settled" else 3)
    assert (folder / "edit.safetensors").exists() == (code == 0)
    # The same trace, and nothing of what came after.
    accepting.mkdir()
    for name in ("effects.parquet", "facts.parquet"):
        shutil.copy(folder / name, accepting)
    config = read_json(folder / "config.json")
    write_json(accepting / "config.json", {**config, "steps": {"trace": config["steps"]["trace"]}})
    capsys.readouterr()
    assert call(*run, "--out", accepting, "--accept-unsettled") == 0
    *_, scores, report = capsys.readouterr().err.splitlines()
    assert report.startswith("the report is ")
    after = read_json(accepting / "summary.json")["after"]
    assert re.match(r"layers? [\d–]+: S \S+ → \S+, ES \S+ → \S+, PS \S+ → \S+, NS \S+ → \S+$", scores), scores
    assert f", ES {scores.split('ES ')[1].split(' ')[0]} → {number(after['ES']['mean'])}, PS" in scores
    accepted = me.Selection.load(accepting / "selection.json")
    assert (accepted.state, accepted.validation) == ("unsettled", {})
    assert me.Edit.load(accepting / "edit.safetensors").layers == list(accepted.layers)


def test_only_the_traced_model_is_swept(traced, tmp_path, small_inputs, capsys):
    folder = tmp_path / "run"
    shutil.copytree(traced, folder)
    message = complaint(capsys, "select", folder, "--validate", *small_inputs, "--dtype", "bfloat16")
    assert "was made with dtype = 'float32', expected 'bfloat16'" in message
    assert "sweep the model that was traced, 'tiny'" in message
    assert not (folder / "sweep.parquet").exists()
    (folder / "config.json").unlink()
    assert "says which model was traced" in complaint(capsys, "select", folder, "--validate", *small_inputs)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_command_has_the_options_of_the_contract(name: str):
    parameters = typer.main.get_command(app).commands[name].params
    spellings = [spelling for parameter in parameters for spelling in parameter.opts]
    positional = ("model",) if name in ("tune", "train-mend") else ()
    common = [] if name in ("report", "plan") else [option for option in COMMON.split() if option not in positional]
    expected = OPTIONS[name].split() + common
    assert sorted(spellings) == sorted(option.lower() if option.isupper() else f"--{option}" for option in expected)


def test_a_field_of_a_config_is_an_option_with_its_note_and_default():
    @dataclass(frozen=True, kw_only=True)
    class Files:
        seed: int = 5
        """Seed of all."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        steps: int = 3
        """Steps per
        request."""
        names: Sequence[str] = ("a", "b")
        """Names; None means all."""
        rate: float | int | None = None
        seed: int = 0
        """Seed of the sample."""

    def run(files: Files, config: Config) -> int:
        built.append((files, config))
        return 0

    built: list[tuple[Files, Config]] = []
    run.__annotations__ |= {"files": Files, "config": Config}
    parameters = inspect.signature(function := command()(run)).parameters
    assert list(parameters) == ["seed", "steps", "names", "rate", "config"]
    notes = {name: get_args(parameter.annotation)[1].help for name, parameter in parameters.items()}
    assert notes["seed"] == "Seed of all.", "the first of two dataclasses describes an option of both"
    assert (notes["steps"], notes["rate"]) == ("Steps per request.", "")
    assert notes["names"] == "Names; by default all. Several are separated by commas."
    assert (parameters["steps"].default, parameters["names"].default) == (3, "a,b")
    assert function(seed=7, steps=1, names="c, d", rate=0.5, config=None) == 0
    assert built == [(Files(seed=7), Config(steps=1, names=("c", "d"), rate=0.5, seed=7))]


def test_windows_are_read_as_people_write_them():
    assert parse_windows("2-5, 1-4,3") == [(2, 5), (1, 4), (3, 3)]


def test_layers_are_read_as_people_write_them():
    assert parse_layers("3-5") == [3, 4, 5]
    assert parse_layers("7,3-4") == [3, 4, 7]
    for bad in ("", "a", "3-", "1-2-3", "5-3", "3,3"):
        with pytest.raises(me.InputError, match="layers"):
            parse_layers(bad)


def test_as_a_module_and_interrupted_it_leaves_cleanly(tmp_path):
    command = [sys.executable, "-m", "mechedit", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == me.__version__


def test_an_interrupt_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mechedit.pipeline.trace_step", interrupt)
    assert call("trace", "--max-facts", 2, "--out", tmp_path) == 130
    assert "the same command goes on from" in capsys.readouterr().err


def test_warnings_are_a_line_without_the_place_in_the_source() -> None:
    standard = warnings.formatwarning
    with plain_warnings():
        assert warnings.formatwarning("a moment\nis singular", UserWarning, "f.py", 3) == (
            "mechedit: warning: a moment is singular\n"
        )
        of_an_edit = warnings.formatwarning("it is too large", ImplausibleEditWarning, "f.py", 3)
        assert of_an_edit == "mechedit: warning: it is too large\n"
        assert "f.py:3: DeprecationWarning: old" in warnings.formatwarning("old", DeprecationWarning, "f.py", 3)
    assert warnings.formatwarning is standard
    assert "f.py:3: UserWarning: new" in warnings.formatwarning("new", UserWarning, "f.py", 3)


def test_a_refused_command_leaves_no_empty_folder_and_no_other_is_removed(tmp_path, capsys):
    wrong = ["trace", "--facts", tmp_path / "none.json", "--out"]
    assert "none.json" in complaint(capsys, *wrong, tmp_path / "a" / "b" / "run")
    assert list(tmp_path.iterdir()) == [], "the folder and the parents that it was made with"
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for name in ("empty", "full", "full/run"):
        complaint(capsys, *wrong, tmp_path / name)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "full", "mine.txt"]
