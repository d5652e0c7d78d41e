"""Files that are damaged at random are accepted or refused with an InputError, by every loader and by what uses it."""

from __future__ import annotations

import functools
import json
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.mutations import json_text, mutated_bytes, mutated_json, mutated_parquet, mutated_safetensors, refusal
from helpers.run_folder import PROVENANCE, make_scores, write_run

from mechedit import Edit, EditRequest, Neighbor, Selection, load_facts, load_requests, load_texts
from mechedit.cli.config_file import config_defaults
from mechedit.cli.describe import describe_edit, format_description, say_unconverged
from mechedit.data.downloads import RemoteFile, fetch
from mechedit.data.reference_texts import load_snippets, load_word_weights
from mechedit.edit import Factors, merge, truncate
from mechedit.evaluation import EvaluationConfig, Scores
from mechedit.evaluation.baseline import Baseline
from mechedit.evaluation.summary_file import write_summary_file
from mechedit.figures import run_figures
from mechedit.files import read_json, write_json, write_tensors
from mechedit.methods import MendConfig, MendEditor, TunedSettings, recommended
from mechedit.methods.mend_editor import EditorNetwork, read_editor_record
from mechedit.methods.tuned_settings import is_of_model, record_hash
from mechedit.moments.accumulator import MomentAccumulator
from mechedit.moments.checkpoints import Checkpoint, load_checkpoint
from mechedit.moments.chunks import SINGLE_PROCESS
from mechedit.moments.convergence import Convergence, ConvergenceTracker
from mechedit.moments.convergence_file import ConvergenceFile
from mechedit.moments.npz_file import read_npz
from mechedit.moments.second_moment import load_moment
from mechedit.report import write_report
from mechedit.run_folder import RunFolder
from mechedit.selection import select_layers
from mechedit.session import EditedBatch, HistoryEntry
from mechedit.session.session_folder import SessionFolder
from mechedit.sweep import Sweep, Window
from mechedit.targets.cache import RESULTS, TargetResult
from mechedit.trace import read_effects
from mechedit.trace.until_settled import _Seconds
from mechedit.tuning.ledger import Ledger
from mechedit.tuning.plan import Speed

MUTATIONS = 16
"""Damaged copies of each file."""


@dataclass(frozen=True)
class Loader:
    """A file, how it is damaged, and what reads it."""

    file: Path
    mutate: Callable[[Path, Path, random.Random], None]
    use: Callable[[Path], Any]
    """Reads the file's folder, and does what commands do with what it read."""


def of_json(source: Path, target: Path, generator: random.Random) -> None:
    data = source.read_bytes()
    if generator.random() < 0.2:
        target.write_bytes(mutated_bytes(data, generator))
    else:
        target.write_text(json_text(mutated_json(json.loads(data), generator)))


def of_safetensors(source: Path, target: Path, generator: random.Random) -> None:
    target.write_bytes(mutated_safetensors(source.read_bytes(), generator))


def of_bytes(source: Path, target: Path, generator: random.Random) -> None:
    target.write_bytes(mutated_bytes(source.read_bytes(), generator))


def of_npy(source: Path, target: Path, generator: random.Random) -> None:
    size = 3
    arrays: list[Any] = [
        np.zeros(()), np.ones(size, dtype=complex), np.ones((size, size)), np.ones(size, dtype=object),
        np.ones(size, dtype=np.float16), np.full(size, 1e308), np.full(size, np.nan), np.ones(size, dtype="U3"),
        np.ones(size, dtype=[("a", float)]), np.ones(size, dtype=">f8"), np.ones(size, dtype=bool), np.ones(0),
        np.ones(size, dtype="M8[s]"),
    ]  # fmt: skip
    if generator.random() < 0.5:
        return of_bytes(source, target, generator)
    array = generator.choice(arrays)
    if source.suffix == ".npy":
        np.save(target, array, allow_pickle=True)
    else:
        with np.load(source) as archive:
            content = dict(archive)
        content[generator.choice(list(content))] = array
        np.savez(target, **content)
    return None


def fields(kind: str) -> Callable[[Path], Any]:
    """Read with a loader of facts, requests or texts, without its warnings of what is left out."""
    load: Any = {"facts": load_facts, "requests": load_requests, "texts": load_texts}[kind]
    return lambda path: [str(item) for item in load(path)]


def use_edit(path: Path) -> None:
    edit = Edit.load(path)
    description = describe_edit(edit)
    json.dumps(description)
    format_description(path, description)
    say_unconverged(edit)
    truncate(merge([edit, edit]), rank=1).save(path.with_name("merged.safetensors"))
    Edit.load(path.with_name("merged.safetensors"))
    write_summary_file(path.with_name("summary_of_edit.json"), None, None, edit)
    sorted(set(edit.manifest.get("unconverged", ())))


def use_editor(path: Path, model: Any) -> None:
    MendEditor.load(path)
    MendConfig(editor=str(path)).suited(model)
    is_of_model(read_editor_record(path), model)


def use_moment(path: Path) -> None:
    moment = load_moment(path.parent.parent, 2)
    moment.factor  # noqa: B018
    moment.null_space(0.02)


def use_scores(folder: Path) -> None:
    scores = Scores.load(folder)
    for state in scores.states:
        scores.summary(state)
    json.dumps(scores.protocol, default=str)
    scores.counts  # noqa: B018


def use_session(folder: Path) -> None:
    session = SessionFolder(path=folder)
    settings = session.load_settings()
    if settings is not None:
        session.check_settings(settings[0], {"method": "memit", "layers": [2]})
    for batch in session.load_batches("3f9c" * 16):
        batch.history  # noqa: B018
        batch.requests_hash  # noqa: B018


def use_sweep(folder: Path) -> None:
    sweep = Sweep.load(folder)
    sweep.table  # noqa: B018
    sweep.scores  # noqa: B018
    sweep.draws  # noqa: B018


def use_selection(path: Path) -> None:
    selection = Selection.load(path)
    selection.save(path.with_name("again.json"))
    Selection.load(path.with_name("again.json"))


def request(number: int = 1, **others: Any) -> EditRequest:
    return EditRequest(id=str(number), subject="Rome", prompt="{} is in", target_new="France", **others)


def write_session(folder: Path) -> None:
    keys = torch.ones(4, 1, dtype=torch.float64)
    manifest = {"method": "memit", "layers": [2], "model": PROVENANCE, "requests": ["1"], "prefixes": ["{}"]}
    edit = Edit(factors={2: Factors(left=torch.ones(4, 1), right=torch.ones(1, 4))}, manifest=manifest)
    neighbors = (Neighbor(prompt="Paris is in", object="France"),)
    batch = EditedBatch(
        number=1, requests=(request(paraphrases=("Rome lies in",), neighbors=neighbors),), edit=edit, keys={2: keys},
        overridden=(),
        scores=pd.DataFrame([("1", "ES", 100.0)], columns=["case", "measure", "value"]),
        entries=(HistoryEntry("ES", "all", 100.0), HistoryEntry("update_norm", "all", 1.0, 2)), n_active=1,
        weights_hash="ab" * 32,
    )  # fmt: skip
    session = SessionFolder(path=folder)
    session.save_settings({"method": "memit", "layers": [2]}, [HistoryEntry("ppl", "model", 1.5)])
    session.save_batch(batch)


def write_files(folder: Path) -> None:
    """Files of every format that mechedit reads."""
    write_run(folder)
    truncate(Edit.load(folder / "edit.safetensors"), rank=1).save(folder / "truncated.safetensors")
    header = {**PROVENANCE, "texts": "cd34" * 16, "max_length": 128, "layer": 2, "count": 210_345}
    matrix = torch.diag(torch.tensor([1.0, 0.5, 1e-3, 1e-4], dtype=torch.float64))
    write_tensors(folder / "moments" / "layer_2.safetensors", {"matrix": matrix}, "provenance", header)
    accumulator = MomentAccumulator(4, "cpu")
    accumulator.update(torch.eye(4))
    tracker = ConvergenceTracker(torch.eye(4, dtype=torch.float64), Convergence())
    tracker.track(accumulator)
    tracker.changes.append([8, 0.5, 0.5])
    checkpoint = Checkpoint(
        layer=2, rank=SINGLE_PROCESS, accumulator=accumulator, provenance=header, layers_read=(2,), tracker=tracker
    )
    checkpoint.save(folder).rename(folder / "checkpoint.safetensors")
    ConvergenceFile(folder, {"provenance": PROVENANCE}).save(tracker.frame(2), 2)
    Baseline(scores=make_scores("before", 0.1, 3), prompts=("a", "b"), states=torch.ones(2, 4)).save(folder / "base")
    write_session(folder / "session")
    result = TargetResult(z=torch.ones(4), initial=torch.ones(4), terms=torch.ones(2, 6), stopped="steps")
    RESULTS.write(folder / "targets.safetensors", [result])  # type: ignore[misc]
    cases = pd.DataFrame(
        [
            (first, first + 1, case, measure, 50.0)
            for first in (1, 2)
            for case in "ab"
            for measure in ("ES", "PS", "NS")
        ],
        columns=["first", "last", "case", "measure", "value"],
    )
    before = make_scores("before", 0.1, 3).summary("before")
    config = EvaluationConfig(resamples=20)
    Sweep(cases=cases, before=before, failed={Window(0, 1): "no"}, config=config, provenance=PROVENANCE).save(
        folder / "sweep"
    )
    data = folder / "data"
    fact = {"id": "1", "subject": "Rome", "prompt": "{} is in", "object": "Italy", "relation": "in", "foil": "France"}
    write_json(data / "facts.json", [fact, {**fact, "id": "2"}])
    neighbor = {"prompt": "Paris is in", "object": "France"}
    plain = {"id": "1", "subject": "Rome", "prompt": "{} is in", "target_new": "France", "target_true": "Italy"}
    lists = {"paraphrases": ["Rome lies in"], "neighbors": [neighbor], "attributes": ["Nice is in"]}
    write_json(data / "requests.json", [{**plain, **lists, "generations": ["Rome"], "joint": " "}])
    rewrite = {"prompt": "{} is in", "subject": "Rome", "target_new": {"str": "France", "id": "Q1"}, "relation_id": "P"}
    counterfact = {"case_id": 1, "requested_rewrite": rewrite, "paraphrase_prompts": ["Rome lies in"]}
    write_json(data / "counterfact.json", [{**counterfact, "neighborhood_prompts": ["Paris is in"]}])
    mend = {"subject": "Rome", "src": "Where is Rome?", "answers": ["Italy"], "rephrase": "Rome is where?"}
    write_json(data / "mend.json", [{**mend, "alt": "France", "loc": "nq question: who", "loc_ans": "me", "pred": "x"}])
    locality = {"neighborhood": {"prompt": "Paris is in", "ground_truth": "France"}}
    easy = {"subject": "Rome", "prompt": "Rome is in", "target_new": "France", "ground_truth": ["Italy"]}
    write_json(data / "easyedit.json", [{**easy, "rephrase_prompt": "Rome lies in", "locality": locality}])
    mquake = {"case_id": 1, "requested_rewrite": [{**rewrite, "question": "Where is Rome?"}], "questions": ["Who?"]}
    write_json(data / "mquake.json", [mquake])
    (data / "requests.csv").write_text('subject,prompt,target_new\nRome,"{} is in",France\nParis,{} lies in,Italy\n')
    write_json(data / "texts.json", [{"text": "Rome is in Italy."}, {"text": "Paris is not."}])
    (data / "texts.txt").write_text("Rome is in Italy.\nParis is not.\n")
    write_json(data / "snippets.json", [{"relation_id": "P", "target_id": "Q1", "samples": [{"text": "Rome"}]}])
    write_json(data / "weights" / "tfidf_vocab.json", {"rome": 0, "paris": 1, "is": 2})
    np.save(data / "weights" / "idf.npy", np.array([1.0, 2.0, 3.0]))
    total = {"mom2.mom2": np.eye(4, dtype=np.float32), "mom2.count": 100, "sample_size": 10}
    np.savez(data / "moment.npz", mom2_constructor="x", **total)
    write_json(data / "options.yaml", {"max-facts": 5, "model": "tiny", "json": True, "kinds": "state,mlp"})
    write_json(folder / "editing.json", {"memit": {"steps": 7, "clamp": 0.5, "convention": "default"}})
    for name in ("selection.json", "summary.json"):
        write_json(folder / "drawn" / name, read_json(folder / name))
    ledger = Ledger.at(folder, {})
    ledger.speed = Speed(edit=0.5, low_edit=1.0, trial=0.25, fact=0.125)
    with ledger.timed("speed"):
        pass
    write_json(folder / "seconds.json", {"seconds": 1.5})
    section = {"layers": [1, 2], "settings": {"steps": 3}, "seed": 0, "trials": [{"seconds": 1.5}]}
    methods = {"memit": {**section, "hash": record_hash(section)}}
    write_json(folder / "tuned" / "tuned.json", {"model": {**PROVENANCE, "weights_hash_as": {}}, "methods": methods})
    curve = [{"step": 0, "loss": 0.5, "edit": 0.25, "locality": 0.25, "exact_match": 50.0}]
    record = {
        **PROVENANCE, "weights_hash_as": {"float16": "ab"}, "layers": [1, 2], "rank": 2, "d_key": 4, "d_model": 2,
        "steps": 3, "curve": curve, "settings": {},
    }  # fmt: skip
    network = EditorNetwork(4, 2, 2, 2)
    MendEditor(network=network, layers=(1, 2), record=record).save(folder / "tuned" / "mend.safetensors")
    (folder / "cache").mkdir()
    (folder / "cache" / "file.json").write_text("{}")
    url = "http://127.0.0.1:1/file.json"
    content = {"url": url, "size": 2, "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}
    write_json(folder / "cache" / "file.json.sha256.json", content)


def loaders(folder: Path, model: Any) -> dict[str, Loader]:
    """What reads each of these files."""
    group = type("Group", (), {"commands": _commands()})()
    data = folder / "data"

    def config(path: Path) -> Any:
        return config_defaults(group, ["trace", "--config", str(path)])

    def settings(path: Path) -> Any:
        return recommended("memit", model)

    of_data = {
        "facts.json": "facts", "requests.json": "requests", "counterfact.json": "requests", "mend.json": "requests",
        "easyedit.json": "requests", "mquake.json": "requests", "texts.json": "texts",
    }  # fmt: skip
    plain = {
        **{name: Loader(data / name, of_json, fields(kind)) for name, kind in of_data.items()},
        "requests.csv": Loader(data / "requests.csv", of_bytes, fields("requests")),
        "texts.txt": Loader(data / "texts.txt", of_bytes, fields("texts")),
        "snippets.json": Loader(data / "snippets.json", of_json, load_snippets),
        "tfidf_vocab.json": Loader(
            data / "weights" / "tfidf_vocab.json", of_json, lambda path: load_word_weights(path.parent)
        ),
        "idf.npy": Loader(data / "weights" / "idf.npy", of_npy, lambda path: load_word_weights(path.parent)),
        "moment.npz": Loader(data / "moment.npz", of_npy, lambda path: read_npz(path, 2, 4)),
        "options.yaml": Loader(data / "options.yaml", of_json, config),
        "editing.json": Loader(folder / "editing.json", of_json, settings),
        "sha256.json": Loader(
            folder / "cache" / "file.json.sha256.json", of_json,
            lambda path: fetch(RemoteFile(url="http://127.0.0.1:1/file.json"), path.parent),
        ),
    }  # fmt: skip
    of_runs = {
        "edit.safetensors": use_edit,
        "truncated.safetensors": use_edit,
        "tuned/mend.safetensors": partial(use_editor, model=model),
        "tuned/tuned.json": lambda path: TunedSettings.load(path, "memit").fits(model),
        "moments/layer_2.safetensors": use_moment,
        "checkpoint.safetensors": lambda path: load_checkpoint(path, "cpu", Convergence()),
        "targets.safetensors": RESULTS.read,
        "base/states.safetensors": lambda path: Baseline.load(path.parent).by_prompt,
        "session/batches/0001.safetensors": lambda path: use_session(path.parent.parent),
        "session/session.json": lambda path: use_session(path.parent),
        "base/scores.json": lambda path: use_scores(path.parent),
        "scores.json": lambda path: use_scores(path.parent),
        "scores.parquet": lambda path: use_scores(path.parent),
        "answers.parquet": lambda path: use_scores(path.parent),
        "selection.json": use_selection,
        "config.json": lambda path: RunFolder(path.parent).stamps(),
        "effects.parquet": lambda path: select_layers(read_effects(path, role="subject_last")),
        "sweep/sweep.parquet": lambda path: use_sweep(path.parent),
        "sweep/sweep_cases.parquet": lambda path: use_sweep(path.parent),
        "moments/convergence.parquet": lambda path: ConvergenceFile(
            path.parent.parent, {"provenance": PROVENANCE}
        ).load(2),
    }
    of_suffix = {".safetensors": of_safetensors, ".json": of_json, ".parquet": of_table}
    runs = {name: Loader(folder / name, of_suffix[Path(name).suffix], use) for name, use in of_runs.items()}
    reported = (
        "edit.safetensors", "moments/layer_3.safetensors", "scores.json", "scores.parquet", "answers.parquet",
        "selection.json", "config.json", "summary.json", "effects.parquet", "facts.parquet",
    )  # fmt: skip
    reports = {
        f"report of {name}": Loader(folder / name, of_suffix[Path(name).suffix], lambda path: write_report(folder))
        for name in reported
    }
    figures = {
        f"figures of {name}": Loader(folder / name, of_suffix[Path(name).suffix], lambda path: run_figures(path.parent))
        for name in ("drawn/selection.json", "drawn/summary.json", "sweep/sweep.parquet")
    }
    ledger = next(iter(folder.glob("ledger/*.json")), folder / "ledger" / "key.json")
    times = {
        "ledger": Loader(ledger, of_json, lambda path: Ledger.at(folder, {})),
        "seconds.json": Loader(folder / "seconds.json", of_json, _Seconds.at),
    }
    return {**plain, **runs, **reports, **figures, **times}


def of_table(source: Path, target: Path, generator: random.Random) -> None:
    mutated_parquet(source, target, generator)


@functools.cache
def _commands() -> Any:
    import typer

    from mechedit.cli import app

    return typer.main.get_command(app).commands  # type: ignore[attr-defined]


NAMES = tuple(loaders(Path(), None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files")
    write_files(path)
    return path


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_damaged_at_random_is_accepted_or_refused(
    folder: Path, name: str, tmp_path: Path, lens_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(lens_model), "checkpoint", str(folder))
    loader = loaders(folder, lens_model)[name]
    loader.use(loader.file)  # the control: it is read as it is
    original = loader.file.read_bytes()
    source = tmp_path / f"original{loader.file.suffix}"
    source.write_bytes(original)
    refused = 0
    try:
        # A report takes a third of a second.
        for seed in range(4 if name.startswith(("report", "figures")) else MUTATIONS):
            loader.mutate(source, loader.file, random.Random(f"{name} {seed}"))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                message = refusal(partial(loader.use, loader.file))
            refused += message is not None
            assert len(message or "") < 2000
    finally:
        loader.file.write_bytes(original)
    assert refused, "some damage must matter"
