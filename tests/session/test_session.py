"""Sessions: each batch made on what earlier ones left, whatever was interrupted, and stopped before the collapse."""

from __future__ import annotations

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.edits import identical, random_edit, weights
from helpers.mend import identity_editor
from helpers.models import random_hf
from helpers.ranks import launch

import mechedit.session.batch_editor
import mechedit.session.session
from mechedit import EditSession, MemitConfig, StopRule
from mechedit.data import EditRequest, load_requests
from mechedit.edit import Edit, apply_, edited, undo_
from mechedit.errors import InputError
from mechedit.evaluation import QUICK, evaluate, perplexity
from mechedit.methods import METHODS, MendConfig, SearchConfig, edit_keys, memit, recommended
from mechedit.models import load_model
from mechedit.moments import collect_moments
from mechedit.provenance import ALGORITHMS
from mechedit.session import HistoryEntry

PREFIXES = ["{}", "The first thing. {}"]
TEXTS = [
    "The mother tongue of Leon Blum is French, and that of Go Hyeon-jeong is Korean.",
    "Apple A5 was created by Apple. Windows Media Player was created by Microsoft.",
    "The Space Needle is in downtown Seattle; LeBron James plays the sport of basketball in town.",
    "Toko Yasuda plays the instrument guitar, while Miles Davis plays the trumpet.",
    "Edwin of Northumbria's religious values strongly emphasize Christianity.",
]
HELD_OUT = ["The Eiffel Tower is located in the city of Paris.", "Anaal Nathrakh is a band from England."]
SUBJECTS = ("Danielle Darrieux", "Leon Blum", "Toko Yasuda", "Miles Davis", "LeBron James", "Go Hyeon-jeong")
REQUESTS = [
    EditRequest(id=subject, subject=subject, prompt="{} was born in", target_new=new, target_true="Paris")
    for subject, new in zip(SUBJECTS, ("Korea", "Seattle", "England", "Rome", "Birmingham", "town"), strict=True)
]
BATCHES = [REQUESTS[:2], REQUESTS[2:4], REQUESTS[4:]]
LAYERS = [0, 1]
CONFIG = MemitConfig(steps=5, clamp=4.0, covariance_weight=1.0, kl_weight=0.0, weight_decay=0.0)
FREE = StopRule(perplexity=None, earlier=None)


@pytest.fixture(scope="module")
def lively(make_model: Any) -> Any:
    """A model with larger weights, in which one state has much to say."""
    return make_model("gpt2", initializer_range=0.05)


@pytest.fixture(scope="module")
def moments(lively: Any) -> Any:
    return collect_moments(lively, TEXTS, [0, 1, 2])


@pytest.fixture
def begin(lively: Any, moments: Any) -> Any:
    """Start a session of the lively model; afterwards the model must be what it was."""
    before = weights(lively)

    def start(**changes: Any) -> EditSession:
        arguments = {"config": CONFIG, "prefixes": PREFIXES, "texts": HELD_OUT, "rule": FREE, **changes}
        return EditSession(arguments.pop("model", lively), LAYERS, arguments.pop("moments", moments), **arguments)

    yield start
    assert identical(lively, before)


@pytest.fixture(scope="module")
def uninterrupted(lively: Any, moments: Any) -> EditSession:
    """A session of all batches that nothing interrupted."""
    session = EditSession(lively, LAYERS, moments, config=CONFIG, prefixes=PREFIXES, texts=HELD_OUT, rule=FREE)
    with session:
        write_all(session)
    return session


def write_all(session: EditSession) -> None:
    for batch in BATCHES:
        session.write(batch)


def lasting(session: EditSession) -> pd.DataFrame:
    """The history but for the seconds, which no two runs share."""
    return session.history.query("measure != 'seconds'").reset_index(drop=True)


def values(session: EditSession, measure: str, scope: str, layer: int | None = None) -> list[float]:
    rows = session.history.query("measure == @measure and scope == @scope")
    return rows["value"].tolist() if layer is None else rows[rows["layer"] == layer]["value"].tolist()


def assert_same_session(session: EditSession, expected: EditSession) -> None:
    """All that a session ends with, bit for bit."""
    assert len(session.batches) == len(expected.batches) == len(BATCHES)
    for mine, theirs in zip(session.batches, expected.batches, strict=True):
        assert mine.weights_hash == theirs.weights_hash
        assert mine.edit.manifest == theirs.edit.manifest
        assert mine.edit.layers == theirs.edit.layers
        for layer in mine.edit.layers:
            assert torch.equal(mine.edit.factors[layer].left, theirs.edit.factors[layer].left)
            assert torch.equal(mine.edit.factors[layer].right, theirs.edit.factors[layer].right)
            assert torch.equal(mine.keys[layer], theirs.keys[layer])
    pd.testing.assert_frame_equal(lasting(session), lasting(expected), check_exact=True)
    pd.testing.assert_frame_equal(session.scores, expected.scores, check_exact=True)
    assert session.edit.manifest == expected.edit.manifest


def test_one_batch_is_the_method_alone(lively: Any, moments: Any, uninterrupted: EditSession) -> None:
    matrices = {layer: moments[layer].matrix for layer in LAYERS}
    alone = memit(lively, BATCHES[0], LAYERS, matrices, PREFIXES, CONFIG)
    keys = edit_keys(lively, BATCHES[0], alone)
    first = uninterrupted.batches[0]
    for layer in LAYERS:
        assert torch.equal(first.edit.delta(layer), alone.delta(layer))
        assert torch.equal(first.keys[layer], keys[layer])


def test_each_batch_is_made_on_the_model_so_far_and_preserves_all_earlier_keys(
    lively: Any, moments: Any, uninterrupted: EditSession
) -> None:
    matrices, before = {layer: moments[layer].matrix for layer in LAYERS}, weights(lively)
    applied: list[Edit] = []
    previous: dict[int, torch.Tensor] = {}
    for requests, batch in zip(BATCHES, uninterrupted.batches, strict=True):
        edit = memit(lively, requests, LAYERS, matrices, PREFIXES, CONFIG, previous=previous)
        for layer in LAYERS:
            torch.testing.assert_close(batch.edit.delta(layer), edit.delta(layer), rtol=1e-4, atol=1e-6)
        if previous:
            careless = memit(lively, requests, LAYERS, matrices, PREFIXES, CONFIG)
            apart = (careless.delta(0) - edit.delta(0)).norm() / edit.delta(0).norm()
            assert apart > 1e-2, "keys of earlier batches make a difference"
        new = edit_keys(lively, requests, edit)
        previous = {layer: torch.cat([*([previous[layer]] if previous else []), new[layer]], 1) for layer in LAYERS}
        apply_(lively, edit)
        applied.append(edit)
    for edit in reversed(applied):
        undo_(lively, edit)
    assert identical(lively, before)
    for layer in LAYERS:
        torch.testing.assert_close(uninterrupted.edit.delta(layer), sum(edit.delta(layer) for edit in applied))
        torch.testing.assert_close(uninterrupted.keys[layer], previous[layer])


def test_earlier_edits_last_longer_when_their_keys_are_preserved(begin: Any, uninterrupted: EditSession) -> None:
    with begin(accumulate=False) as careless:
        write_all(careless)

    def disturbed(session: EditSession) -> float:
        """How far later batches moved the values that the first wrote, relative to what it wrote."""
        first = session.batches[0]
        later = session.edit.delta(1) - first.edit.delta(1)
        return float((first.keys[1].T @ later).norm() / (first.keys[1].T @ first.edit.delta(1)).norm())

    assert disturbed(careless) > 0.1, "there is something to forget"
    assert disturbed(uninterrupted) < 0.7 * disturbed(careless)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_can_be_repeated(lively: Any, moments: Any, method: str, tmp_path: Path) -> None:
    before = weights(lively)
    shared = dataclasses.asdict(CONFIG)
    config: Any = recommended(method, lively)
    if isinstance(config, MendConfig):
        identity_editor(lively, (1,)).save(tmp_path / "mend.safetensors")
        config = MendConfig(editor=str(tmp_path / "mend.safetensors"))
    else:
        names = ("steps", "kl_weight", "weight_decay") if isinstance(config, SearchConfig) else ("steps",)
        config = dataclasses.replace(config, **{name: shared[name] for name in names})
    with EditSession(lively, [1], moments, method, config, prefixes=PREFIXES, rule=FREE) as session:
        for batch in BATCHES[:2]:
            session.write(batch)
        assert lively.weights_hash() == session.batches[-1].weights_hash != session.batches[0].weights_hash
    assert identical(lively, before)
    assert session.edit.manifest["method"] == method
    assert session.edit.manifest["requests"] == [request.id for request in REQUESTS[:4]]
    assert session.keys[1].shape == (lively.d_mlp, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_the_unedited_one_plus_the_edit_and_comes_back_bit_for_bit(tokenizer: Any, dtype: Any) -> None:
    model = load_model(random_hf("gpt2", initializer_range=0.05).to(dtype), tokenizer=tokenizer)
    before, moments = weights(model), collect_moments(model, TEXTS, LAYERS)
    with EditSession(model, LAYERS, moments, config=CONFIG, prefixes=PREFIXES, rule=FREE) as session:
        for batch in BATCHES:
            session.write(batch)
            inside = weights(model)
            assert not identical(model, before)
    assert identical(model, before)
    apply_(model, session.edit)
    assert identical(model, inside)
    undo_(model, session.edit)
    assert identical(model, before)


def test_the_edit_outlives_the_session(lively: Any, uninterrupted: EditSession, tmp_path: Path) -> None:
    uninterrupted.edit.save(tmp_path / "edit.safetensors")
    with edited(lively, Edit.load(tmp_path / "edit.safetensors")):
        assert lively.weights_hash() == uninterrupted.batches[-1].weights_hash
    assert [part["made_on"] for part in uninterrupted.edit.manifest["parts"]] == [
        lively.weights_hash(),
        *(batch.weights_hash for batch in uninterrupted.batches[:-1]),
    ]


def test_an_applied_edit_stays_below_the_session(begin: Any, lively: Any) -> None:
    """A session starts from whatever the model is, an applied edit included."""
    below = random_edit(lively, layers=(0,), ranks=(1,))
    below.factors[0].left.mul_(1e-3)
    apply_(lively, below)
    applied = weights(lively)
    matrices = {layer: moment.matrix for layer, moment in collect_moments(lively, TEXTS, LAYERS).items()}
    with begin(moments=matrices) as session:
        write_all(session)
    assert identical(lively, applied)
    with edited(lively, session.edit):
        assert lively.weights_hash() == session.batches[-1].weights_hash
    undo_(lively, below)


def test_history_is_what_the_model_does(lively: Any, uninterrupted: EditSession) -> None:
    for count, batch in enumerate(uninterrupted.batches, 1):
        requests = [request for written in BATCHES[:count] for request in written]
        with edited(lively, uninterrupted._editor.merge(uninterrupted.batches[:count])):
            evaluation = evaluate(lively, requests, QUICK)
            text = perplexity(lively, HELD_OUT)
            norm = float(lively.projection(1).double().norm())
        table = evaluation.table.pivot(index="case", columns="measure", values="value") * 100
        now = batch.history.set_index(["measure", "scope"])["value"]
        ids = {"batch": [request.id for request in BATCHES[count - 1]], "all": [request.id for request in requests]}
        ids["earlier"] = ids["all"][: -len(ids["batch"])]
        for scope, cases in ids.items():
            for measure in ("ES", "EM", "exact_match"):
                if cases:
                    assert now[measure, scope] == pytest.approx(table.loc[cases, measure].mean()), (measure, scope)
                else:
                    assert (measure, scope) not in now.index
        assert now["perplexity", "model"] == text
        assert values(uninterrupted, "weight_norm", "model", 1)[count] == norm
        assert batch.history["requests"].unique().tolist() == [2 * count]
    assert values(uninterrupted, "perplexity", "model")[0] == perplexity(lively, HELD_OUT)
    unedited = evaluate(lively, BATCHES[0], QUICK).table.query("measure == 'EM'")["value"].mean() * 100
    assert values(uninterrupted, "EM", "batch")[0] != pytest.approx(unedited, rel=0.1), "edits have an effect"


def test_the_edit_grows(uninterrupted: EditSession) -> None:
    sizes = values(uninterrupted, "update_norm", "all", 1)
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]
    assert sizes[-1] == pytest.approx(float(uninterrupted.edit.delta(1).norm()))
    assert values(uninterrupted, "update_norm", "batch", 1)[1] == pytest.approx(
        float(uninterrupted.batches[1].edit.delta(1).norm())
    )


def test_all_prompts_can_be_scored(begin: Any) -> None:
    full = [dataclasses.replace(request, paraphrases=("They say {} came from",)) for request in BATCHES[0]]
    with begin(scored_prompts="all") as session:
        assert "PS" in set(session.write(full).history["measure"])
    with begin() as session:
        assert "PS" not in set(session.write(full).history["measure"])


def test_one_session_knows_nothing_of_another(begin: Any, uninterrupted: EditSession) -> None:
    with begin() as unrelated:
        unrelated.write(BATCHES[2])
    with begin() as again:
        write_all(again)
    assert_same_session(again, uninterrupted)


# A batch that the rule does not let pass.


@pytest.fixture(scope="module")
def hopeless() -> MemitConfig:
    return dataclasses.replace(CONFIG, covariance_weight=1e-6, clamp=100.0, lr=5.0)


def test_a_batch_that_ruins_the_model_is_taken_back(
    begin: Any, lively: Any, hopeless: MemitConfig, tmp_path: Path
) -> None:
    with begin(config=hopeless) as unbounded:
        write_all(unbounded)
    start, first, second, _ = values(unbounded, "perplexity", "model")
    assert second > 1.05 * first, "the setting is hopeless"
    rule = StopRule(perplexity=(first * second) ** 0.5 / start, earlier=None)
    with begin(config=hopeless, rule=rule, folder=tmp_path) as session:
        assert session.write(BATCHES[0]).rejected is None
        good = weights(lively)
        batch = session.write(BATCHES[1])
        assert identical(lively, good), "the model is the last good one"
        assert "perplexity" in str(batch.rejected)
        assert session.stopped == batch.rejected
        with pytest.raises(InputError, match="stopped at batch 2"):
            session.write(BATCHES[2])
    assert session.requests == BATCHES[0]
    assert session.edit.manifest["requests"] == [request.id for request in BATCHES[0]]
    assert session.history.query("rejected")["batch"].unique().tolist() == [2]
    assert values(session, "perplexity", "model") == [start, first, second]
    with begin(config=hopeless, rule=rule, folder=tmp_path) as again:
        assert again.stopped == session.stopped
        again.write(BATCHES[0])
        again.write(BATCHES[1])
        with pytest.raises(InputError, match="stopped at batch 2"):
            again.write(BATCHES[2])


@pytest.mark.parametrize(
    ("rule", "passes"),
    [
        (StopRule(perplexity=2.0, earlier=None), "perplexity"),
        (StopRule(perplexity=None, earlier=80.0), "ES"),
        (StopRule(perplexity=None, earlier=None, norm=1.2), "layer 3"),
        (StopRule(perplexity=2.2, earlier=70.0, norm=1.4), None),
        (StopRule(perplexity=None, earlier=None, norm=None), None),
    ],
)
def test_each_limit_holds(rule: StopRule, passes: str | None) -> None:
    start = [
        HistoryEntry("perplexity", "model", 10.0),
        HistoryEntry("weight_norm", "model", 4.0, 2),
        HistoryEntry("weight_norm", "model", 2.0, 3),
    ]
    now = [
        HistoryEntry("perplexity", "model", 21.0),
        HistoryEntry("ES", "earlier", 75.0),
        HistoryEntry("exact_match", "earlier", 10.0),
        HistoryEntry("ES", "batch", 0.0),
        HistoryEntry("weight_norm", "model", 4.4, 2),
        HistoryEntry("weight_norm", "model", 2.6, 3),
    ]
    reason = rule.reason(now, start)
    assert reason is None if passes is None else passes in str(reason)


def test_exact_match_stands_in_where_nothing_can_be_compared() -> None:
    rule = StopRule(perplexity=None, earlier=50.0)
    assert "exact_match" in str(rule.reason([HistoryEntry("exact_match", "earlier", 10.0)], []))
    assert rule.reason([HistoryEntry("exact_match", "batch", 10.0)], []) is None


def test_text_without_a_finite_likelihood_is_refused_whatever_the_rule() -> None:
    nothing = [HistoryEntry("perplexity", "model", None)]
    assert "finite" in str(FREE.reason(nothing, [HistoryEntry("perplexity", "model", 3.0)]))


# Interrupts.

POINTS = {
    "search": "mechedit.targets.objective.Objective.loss_terms",
    "writing": "mechedit.methods.spread.add_",
    "keys": "mechedit.session.batch_editor.edit_keys",
    "applying": "mechedit.edit.apply_undo.rounded_sum",
    "text": "mechedit.session.batch_editor.perplexity",
    "scoring": "mechedit.session.batch_editor.score_requests",
    "checkpoint": "mechedit.files.save_file",
}


@pytest.mark.parametrize(
    ("point", "saved"),
    [(point, saved) for saved in (True, False) for point in POINTS if saved or point != "checkpoint"],
)
def test_an_interrupted_write_leaves_all_as_it_was(
    begin: Any, lively: Any, uninterrupted: EditSession, point: str, saved: bool, tmp_path: Path, monkeypatch: Any
) -> None:
    with begin(folder=tmp_path if saved else None) as session:
        session.write(BATCHES[0])
        before, history, edit = weights(lively), session.history, session.edit
        files = sorted(tmp_path.rglob("*.safetensors"))
        with monkeypatch.context() as patched:
            patched.setattr(POINTS[point], interrupted)
            with pytest.raises(KeyboardInterrupt):
                session.write(BATCHES[1])
        assert identical(lively, before)
        pd.testing.assert_frame_equal(session.history, history)
        assert torch.equal(session.edit.delta(1), edit.delta(1))
        assert [file for file in sorted(tmp_path.rglob("*.safetensors")) if file.parent.name == "batches"] == files
        session.write(BATCHES[1])
        session.write(BATCHES[2])
    assert_same_session(session, uninterrupted)


def interrupted(*args: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


KILLED = """
import os, signal, sys
import mechedit.session.batch_editor as batch_editor
sys.path.insert(0, {tests!r})
from test_session import tiny_session

score_requests, calls = batch_editor.score_requests, []

def kills(*args):
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return score_requests(*args)

batch_editor.score_requests = kills
tiny_session({folder!r})
"""


def tiny_session(folder: Path | str | None) -> EditSession:
    """Three batches on the model that ships, the same in any process."""
    torch.set_num_threads(1)
    model, requests = load_model("tiny"), load_requests("tiny")
    moments = {layer: torch.eye(model.d_mlp, dtype=torch.float64) for layer in (1, 2)}
    config = MemitConfig(steps=2, covariance_weight=10.0)
    with EditSession(
        model, [1, 2], moments, config=config, prefixes=PREFIXES, texts=HELD_OUT, rule=FREE, folder=folder
    ) as session:
        for start in range(0, 6, 2):
            session.write(requests[start : start + 2])
    return session


def test_a_killed_session_goes_on_to_the_same_results(tmp_path: Path, monkeypatch: Any) -> None:
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    (child,) = launch(1, [], tmp_path.with_name("printed"), first={0: code})
    assert child.code == -signal.SIGKILL, f"it was not killed in its midst: {child.err}"
    first = tmp_path / "batches" / "0001.safetensors"
    assert list((tmp_path / "batches").iterdir()) == [first]
    assert list((tmp_path / "targets").iterdir()), "the z that were found for the second batch are cached"
    written, scored = first.read_bytes(), []
    real = mechedit.session.batch_editor.score_requests
    monkeypatch.setattr(
        mechedit.session.batch_editor, "score_requests", lambda *args: scored.append(args) or real(*args)
    )
    resumed = tiny_session(tmp_path)
    assert len(scored) == 2, "the first batch is skipped"
    assert first.read_bytes() == written
    assert not (tmp_path / "targets").exists()
    assert_same_session(resumed, tiny_session(None))
    assert len(scored) == 5


def test_a_half_written_checkpoint_is_cleared_away(begin: Any, uninterrupted: EditSession, tmp_path: Path) -> None:
    with begin(folder=tmp_path) as session:
        session.write(BATCHES[0])
    half = tmp_path / "batches" / ".0002.abc.safetensors"
    half.write_bytes(b"half")
    with begin(folder=tmp_path) as session:
        write_all(session)
    assert not half.exists()
    assert_same_session(session, uninterrupted)


def test_targets_of_finished_batches_go_and_those_of_the_next_stay(begin: Any, tmp_path: Path) -> None:
    """As a process leaves them that was killed when it had saved a batch, or while it searched for the next."""
    with begin(folder=tmp_path) as session:
        session.write(BATCHES[0])
    assert not (tmp_path / "targets").exists()
    for number in (1, 2):
        (tmp_path / "targets" / f"000{number}").mkdir(parents=True)
        (tmp_path / "targets" / f"000{number}" / "z.safetensors").write_bytes(b"z")
    begin(folder=tmp_path)
    assert [path.name for path in (tmp_path / "targets").iterdir()] == ["0002"]


def test_a_folder_can_be_read_and_gone_on_with_in_another_session(
    begin: Any, lively: Any, uninterrupted: EditSession, tmp_path: Path
) -> None:
    with begin(folder=tmp_path) as first:
        first.write(BATCHES[0])
    # Prefixes of the folder are used again when none are given.
    second = begin(folder=tmp_path, prefixes=None)
    pd.testing.assert_frame_equal(second.history, first.history)
    with second:
        assert lively.weights_hash() == first.batches[-1].weights_hash, "it starts where the first ended"
        batch = second.write(second.batches[0].requests)
        assert batch is second.batches[0]
        second.write(BATCHES[1])
        second.write(BATCHES[2])
    assert_same_session(second, uninterrupted)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"config": dataclasses.replace(CONFIG, covariance_weight=2.0)}, "settings.covariance_weight"),
        ({"method": "pmet", "config": None}, "method"),
        ({"prefixes": ["{}"]}, "prefixes"),
        ({"texts": HELD_OUT[:1]}, "texts"),
        ({"rule": StopRule(perplexity=None, earlier=None, norm=3.0)}, "rule.norm"),
        ({"accumulate": False}, "accumulate"),
        ({"scored_prompts": "all"}, "judged"),
        ({"moments": {layer: torch.eye(96, dtype=torch.float64) for layer in LAYERS}}, "moments.0"),
    ],
)
def test_a_folder_of_another_session_is_refused(
    begin: Any, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    begin(folder=tmp_path)
    with pytest.raises(InputError, match=f"made with {field} = "):
        begin(folder=tmp_path, **changes)


def test_a_folder_without_an_algorithm_number_counts_as_of_algorithm_1(
    begin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ALGORITHMS, "session", 1)
    begin(folder=tmp_path)
    content = json.loads((tmp_path / "session.json").read_text())
    assert content["made_with"].pop("algorithm") == 1
    (tmp_path / "session.json").write_text(json.dumps(content))
    begin(folder=tmp_path)
    monkeypatch.setitem(ALGORITHMS, "session", 2)
    with pytest.raises(InputError, match="made with algorithm = 1, expected 2"):
        begin(folder=tmp_path)


def test_a_folder_of_another_model_is_refused(make_model: Any, begin: Any, tmp_path: Path) -> None:
    begin(folder=tmp_path)
    another_model = make_model("gpt2", seed=1)
    with pytest.raises(InputError, match="weights_hash"):
        begin(model=another_model, moments={layer: torch.eye(96) for layer in LAYERS}, folder=tmp_path)


def test_a_damaged_folder_is_refused(begin: Any, tmp_path: Path) -> None:
    with begin(folder=tmp_path) as session:
        write_all(session)
    first, second, _ = sorted((tmp_path / "batches").iterdir())
    content = second.read_bytes()
    second.write_bytes(content[:-8])
    with pytest.raises(InputError, match="cut short"):
        begin(folder=tmp_path)
    second.write_bytes(first.read_bytes())
    with pytest.raises(InputError, match="number = 1, expected 2"):
        begin(folder=tmp_path)
    # One number of a factor is another: the weights do not become what they were.
    second.write_bytes(content[:-8] + bytes(8))
    with pytest.raises(InputError, match="not as the session left them"), begin(folder=tmp_path):
        pass
    second.unlink()
    with pytest.raises(InputError, match="number = 3, expected 2"):
        begin(folder=tmp_path)
    (tmp_path / "session.json").write_text("{}")
    with pytest.raises(InputError, match="'made_with' is absent"):
        begin(folder=tmp_path)
    (tmp_path / "session.json").unlink()
    with pytest.raises(InputError, match=r"no session\.json"):
        begin(folder=tmp_path)


def test_another_batch_in_the_place_of_a_finished_one_is_refused(begin: Any, tmp_path: Path) -> None:
    with begin(folder=tmp_path) as session:
        session.write(BATCHES[0])
    with begin(folder=tmp_path) as session:
        with pytest.raises(InputError, match="batch 1 is finished"):
            session.write(BATCHES[1])
        session.write(BATCHES[0])


# Requests that contradict earlier ones.


def test_a_later_request_overrides_an_earlier_one_only_when_asked_to(begin: Any, tmp_path: Path) -> None:
    new = dataclasses.replace(REQUESTS[0], id="later", target_new="Birmingham")
    with begin(folder=tmp_path) as session:
        session.write(BATCHES[0])
        with pytest.raises(InputError, match="'Danielle Darrieux' by 'later'"):
            session.write([new])
        batch = session.write([new], overwrite=True)
    assert batch.overridden == ("Danielle Darrieux",)
    assert session.requests == [REQUESTS[1], new]
    assert sorted(batch.scores["case"].unique()) == ["Leon Blum", "later"]
    first, second = session.batches
    for layer in LAYERS:
        assert torch.equal(session.keys[layer], torch.cat([first.keys[layer][:, 1:], second.keys[layer]], 1))
    assert session.edit.manifest["superseded"] == ["Danielle Darrieux"]
    assert begin(folder=tmp_path).requests == session.requests


def test_preserved_keys_of_an_overridden_request_would_hold_the_new_fact_back(begin: Any, monkeypatch: Any) -> None:
    """Both have one key, so that preserving the earlier value would keep the later one out."""
    new = dataclasses.replace(REQUESTS[0], id="later", target_new="Birmingham")
    seen = []
    for held_back in (False, True):
        with begin() as session, monkeypatch.context() as patched:
            session.write(BATCHES[0])
            if held_back:
                real = mechedit.session.session.active_keys
                patched.setattr(
                    mechedit.session.session, "active_keys", lambda batches, exclude=(), real=real: real(batches)
                )
            batch = session.write([new], overwrite=True)
        # At the first layer, whose keys no edit moves.
        written = batch.keys[0][:, 0] @ batch.edit.delta(0)
        seen.append(float(written.norm() / batch.edit.factors[0].right.norm()))
    assert seen[1] < 0.75 * seen[0]


# What is refused at the door.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "memo"}, "the method is 'memo', expected one of memit"),
        ({"texts": None, "rule": StopRule()}, "there are no texts"),
        ({"texts": []}, "none of the 0 texts"),
        ({"moments": {0: torch.eye(96)}}, "no second moment for layer 1"),
        ({"prefixes": ["none"]}, "exactly one"),
    ],
)
def test_bad_arguments_are_refused_at_once(begin: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        begin(**changes)


def test_settings_of_another_method_are_refused(begin: Any) -> None:
    with pytest.raises(InputError, match="MemitConfig, expected a RomeConfig"):
        begin(method="rome")


@pytest.mark.parametrize("name", ["perplexity", "earlier", "norm"])
def test_limits_are_above_nothing(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0"):
        StopRule(**{name: 0})


def test_misuse_is_refused_and_changes_nothing(begin: Any, lively: Any) -> None:
    session = begin()
    with pytest.raises(InputError, match="not open"):
        session.write(BATCHES[0])
    with pytest.raises(InputError, match="no batch stands"):
        _ = session.edit
    assert session.requests == []
    assert session.keys == {}
    with session:
        with pytest.raises(InputError, match="open already"):
            session.__enter__()
        session.write(BATCHES[0])
        before = weights(lively)
        with pytest.raises(InputError, match="'Danielle Darrieux'"):
            session.write(BATCHES[0])
        with pytest.raises(InputError, match="at least one"):
            session.write([])
        assert identical(lively, before)
        with torch.no_grad():
            lively.projection(2).add_(1)
        with pytest.raises(InputError, match="not as the session left them"):
            session.write(BATCHES[1])
        with torch.no_grad():
            lively.projection(2).copy_(before["transformer.h.2.mlp.c_proj.weight"])
    with pytest.raises(InputError, match="not open"):
        session.write(BATCHES[1])
    with session:
        session.write(BATCHES[1])
    assert len(session.batches) == 2


def test_the_folder_says_what_the_session_is_of(begin: Any, tmp_path: Path) -> None:
    begin(folder=tmp_path)
    about = json.loads((tmp_path / "session.json").read_text())
    assert about["made_with"]["settings.steps"] == CONFIG.steps
    assert about["made_with"]["prefixes"] == PREFIXES
