"""One model, several threads, tasks and generators: one after another, with the results of one after another."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import pickle
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pandas as pd
import pytest
import torch
from helpers.edits import identical, logits, random_edit, weights
from torch import Tensor

import mechedit as me
from mechedit.errors import InputError
from mechedit.evaluation.generation import generate
from mechedit.evaluation.likelihood import score_targets
from mechedit.models import model_lock
from mechedit.models.model_lock import ModelLock
from mechedit.moments.key_energy import TEXTS
from mechedit.prefixes import make_prefixes
from mechedit.trace import tokenize_fact
from mechedit.workers import run_batches

REQUEST = me.EditRequest(id="1", subject="Miles Davis", prompt="{} plays the", target_new="guitar", target_true="piano")
OTHER = me.EditRequest(id="2", subject="Leon Blum", prompt="{} plays the", target_new="piano")
SAYS_FRENCH = me.EditRequest(id="1", subject="Miles Davis", prompt="{} plays the sport of", target_new="French")
FACT = me.Fact(id="1", subject="Miles Davis", prompt="{} plays the sport of", object="French")
SOON = 0.2
"""Seconds after which a thread is asked whether it waits."""
LONG = 60.0
"""Seconds after which a thread that has not ended hangs."""

pytestmark = pytest.mark.filterwarnings("ignore:the update is larger", "ignore:the second moment of layer")


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    """A model that knows `FACT`, and only just: an edit makes it say something else."""
    model = make_model("gpt2", "nnsight", initializer_range=0.05)
    traced = tokenize_fact(model, FACT)
    prompt = torch.tensor([traced.ids])
    for _ in range(50):
        if int(model.next_logits(prompt, torch.ones_like(prompt))[0].argmax()) == traced.object_ids[0]:
            break
        with torch.no_grad():
            model.hf.transformer.ln_f.bias += 0.3 * model.hf.transformer.wte.weight[traced.object_ids[0]]
    return model


@pytest.fixture
def edit(model: Any) -> me.Edit:
    return random_edit(model)


@pytest.fixture(autouse=True)
def weights_come_back(model: Any) -> Iterator[None]:
    before = weights(model)
    yield
    assert identical(model, before)


@pytest.fixture
def no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the lock away, as it was before there was one: what it keeps apart then meets."""
    region: Any = type("Region", (), {"settle": lambda self: None, "inner": [], "snapshot": None})
    monkeypatch.setattr(ModelLock, "exclusive", lambda self: contextlib.nullcontext(region()))
    monkeypatch.setattr(ModelLock, "running", lambda self, at_once: contextlib.nullcontext())


class Worker(threading.Thread):
    """A thread whose result or error is kept."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.work, self.result, self.error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.work()
        except Exception as error:
            self.error = error

    def ended(self) -> Any:
        """The result, or the error raised."""
        self.join(LONG)
        assert not self.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error
        return self.result


def edited_logits(model: Any, seed: int = 3) -> Tensor:
    with me.edited(model, random_edit(model, seed)):
        return logits(model)


def applied_and_undone(model: Any) -> list[Tensor]:
    with model.exclusive():  # for a thread that comes between the two, the edit is on the model
        edit = random_edit(model, seed=5)
        me.apply_(model, edit)
        applied = logits(model)
        me.undo_(model, edit)
        return [applied, logits(model)]


def in_session(model: Any) -> list[Tensor]:
    settings = me.FineTuneConfig(steps=2)
    with me.EditSession(model, [0], {}, "ft", settings, prefixes=["{}"], rule=me.StopRule(perplexity=None)) as session:
        return [session.write([REQUEST]).edit.delta(0), logits(model)]


def units_of_a_trained_editor(model: Any) -> Tensor:
    settings = me.MendTrainingConfig(steps=1, batch_size=1, rank=2, text_tokens=8, validation=1)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/mend.safetensors"
        return me.train_mend(model, [REQUEST, OTHER], list(TEXTS), [0], settings, path).network.mean


CONFIG = me.EvaluationConfig(generation_prompts=1, generation_tokens=8)
ENTRIES: dict[str, Callable[[Any], Any]] = {
    "run": logits,
    "attention's view": lambda model: logits(model.writing("attn")),
    "next_logits": lambda model: model.next_logits(torch.ones(1, 2, dtype=torch.long), torch.ones(1, 2).long())[0],
    "module_output": lambda model: model.module_output(0, torch.ones(1, model.d_key)),
    "weights_hash": lambda model: model.weights_hash(),
    "cast_hashes": lambda model: model.cast_hashes(),
    "provenance": lambda model: model.provenance(),
    "edited": edited_logits,
    "apply_ and undo_": applied_and_undone,
    "EditSession": in_session,
    "evaluate": lambda model: me.evaluate(model, [REQUEST], CONFIG).table,
    "measure_baseline": lambda model: me.measure_baseline(model, [REQUEST], CONFIG).scores.table,
    "evaluate_zsre": lambda model: me.evaluate_zsre(model, [SAYS_FRENCH], CONFIG).table,
    "perplexity": lambda model: me.perplexity(model, list(TEXTS)),
    "generate": lambda model: generate(model, ["Miles Davis plays"], tokens=8),
    "score_targets": lambda model: str(score_targets(model, [("Miles Davis plays the", "guitar")])),
    "make_prefixes": make_prefixes,
    "trace_facts": lambda model: me.trace_facts(model, [FACT], me.TraceConfig(samples=2)),
    "find_targets": lambda model: me.find_targets(model, [REQUEST], 1, ["{}"], me.TargetConfig(steps=2)).z,
    "collect_moments": lambda model: me.collect_moments(model, list(TEXTS), [2])[2].matrix,
    "train_mend": units_of_a_trained_editor,
    "a method": lambda model: me.ft(model, [REQUEST], [0], config=me.FineTuneConfig(steps=2)).delta(0),
}
"""Public calls that read or write the weights; each depends on what `random_edit` changes."""


def same(first: Any, second: Any) -> bool:
    """Whether two results are equal, bit for bit."""
    if isinstance(first, pd.DataFrame) or isinstance(second, pd.DataFrame):
        return isinstance(first, pd.DataFrame) and first.equals(second)
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, list) and first and isinstance(first[0], Tensor):
        return isinstance(second, list) and all(map(same, first, second))
    return first == second


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_waits_until_an_edit_of_another_thread_has_ended(model: Any, edit: me.Edit, name: str) -> None:
    serial = ENTRIES[name](model)
    with me.edited(model, edit):
        worker = Worker(lambda: ENTRIES[name](model))
        worker.join(SOON)
        waits = worker.is_alive()
    assert waits
    assert same(worker.ended(), serial)


@pytest.mark.usefixtures("no_lock")
@pytest.mark.parametrize("name", ENTRIES)
def test_without_the_lock_every_entry_sees_the_edit_of_another_thread(model: Any, edit: me.Edit, name: str) -> None:
    serial = ENTRIES[name](model)
    result = None
    with me.edited(model, edit), contextlib.suppress(InputError):  # the edited model may not know the fact
        result = Worker(lambda: ENTRIES[name](model)).ended()
    assert not same(result, serial)


@pytest.mark.parametrize("name", ["evaluate", "trace_facts", "find_targets", "collect_moments", "a method"])
def test_an_edit_waits_until_a_call_of_another_thread_has_ended(
    model: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    serial, expected = ENTRIES[name](model), edited_logits(model)
    inside, go_on = threading.Event(), threading.Event()
    run = type(model)._carry_out

    def stopped(self: Any, plan: Any) -> Any:
        if threading.current_thread() is worker:
            inside.set()
            assert go_on.wait(LONG)
        return run(self, plan)

    monkeypatch.setattr(type(model), "_carry_out", stopped)
    worker: Any = None
    begin = threading.Event()
    worker = Worker(lambda: begin.wait(LONG) and ENTRIES[name](model))
    begin.set()
    assert inside.wait(LONG)
    other = Worker(lambda: edited_logits(model))
    other.join(SOON)
    assert other.is_alive(), "it waits"
    go_on.set()
    assert same(worker.ended(), serial)
    assert same(other.ended(), expected)


def test_five_threads_that_edit_one_model_leave_it_as_it_was(model: Any) -> None:
    seeds, interval = list(range(5)), sys.getswitchinterval()
    serial = {seed: edited_logits(model, seed) for seed in seeds}
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(5) as pool:
            results = list(pool.map(lambda seed: (seed, edited_logits(model, seed)), seeds * 8))
            undone = list(pool.map(lambda _: applied_and_undone(model), range(5)))
    finally:
        sys.setswitchinterval(interval)
    assert all(torch.equal(result, serial[seed]) for seed, result in results)
    assert all(same(result, undone[0]) for result in undone)


@pytest.mark.usefixtures("no_lock")
def test_without_the_lock_two_threads_leave_it_edited(model: Any, edit: me.Edit) -> None:
    before = weights(model)
    both, first_left = threading.Barrier(2), threading.Event()

    def first() -> None:
        with me.edited(model, edit):
            both.wait(LONG)
            both.wait(LONG)
        first_left.set()

    def second() -> None:
        both.wait(LONG)
        with me.edited(model, me.Edit(factors=edit.factors, manifest={"model": model.provenance()})):
            both.wait(LONG)
            assert first_left.wait(LONG)

    for worker in [Worker(first), Worker(second)]:
        worker.ended()
    assert not identical(model, before)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])


def test_a_session_holds_the_model_until_it_ends(model: Any) -> None:
    serial = logits(model)
    session = me.EditSession(
        model, [0], {}, "ft", me.FineTuneConfig(steps=2), prefixes=["{}"], rule=me.StopRule(perplexity=None)
    )
    with session:
        session.write([REQUEST])
        assert not torch.equal(logits(model), serial)
        worker = Worker(lambda: logits(model))
        worker.join(SOON)
        assert worker.is_alive()
    assert torch.equal(worker.ended(), serial)


def test_blocks_of_one_thread_lie_in_each_other(model: Any, edit: me.Edit) -> None:
    serial = logits(model)
    with model.exclusive(), me.edited(model, edit):
        once = logits(model)
        with me.edited(model, random_edit(model, seed=1)), model.writing("attn").exclusive():
            twice = logits(model)
        assert torch.equal(logits(model), once)
        assert same(me.perplexity(model, list(TEXTS)), me.perplexity(model, list(TEXTS)))
    assert torch.equal(logits(model), serial)
    assert not torch.equal(once, twice)
    assert not torch.equal(once, serial)


def test_two_models_do_not_wait_for_each_other(model: Any, edit: me.Edit, make_model: Any) -> None:
    other = make_model("gpt2", "nnsight")
    with me.edited(model, edit):
        Worker(lambda: logits(other)).ended()


def test_a_thread_in_the_context_of_an_edit_belongs_to_it(model: Any, edit: me.Edit) -> None:
    with me.edited(model, edit):
        inside = logits(model)
        context = contextvars.copy_context()
        assert torch.equal(Worker(lambda: context.run(logits, model)).ended(), inside)
        other = contextvars.copy_context()
        nested = Worker(lambda: other.run(edited_logits, model)).ended()
        assert torch.equal(logits(model), inside)
    assert not torch.equal(nested, inside)


def test_an_edit_waits_at_its_end_for_threads_that_belong_to_it(model: Any, edit: me.Edit) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def nested() -> None:
        with me.edited(model, random_edit(model, seed=1)):
            inside.set()
            while not go_on.is_set():
                sum(range(1000))

    with me.edited(model, edit):
        context = contextvars.copy_context()
        worker = Worker(lambda: context.run(nested))
        assert inside.wait(LONG)
        threading.Timer(SOON, go_on.set).start()
    worker.ended()


def test_a_thread_that_waits_for_one_that_waits_for_it_is_refused(
    model: Any, edit: me.Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_lock, "PATIENCE", SOON)
    with me.edited(model, edit), ThreadPoolExecutor(1) as pool:
        future = pool.submit(logits, model)
        with pytest.raises(InputError, match=r"holds the model .*only waited for 0\.2 seconds.*copy_context\(\)\.run"):
            future.result(LONG)


def test_tasks_of_one_thread_are_refused_and_their_children_are_not(model: Any, edit: me.Edit) -> None:
    serial = logits(model)

    async def hold(begun: asyncio.Event, end: asyncio.Event) -> Tensor:
        with me.edited(model, edit):
            begun.set()
            await end.wait()
            return logits(model)

    async def both() -> None:
        begun, end = asyncio.Event(), asyncio.Event()
        holder = asyncio.create_task(hold(begun, end))
        await begun.wait()
        for call in (logits, edited_logits, ENTRIES["evaluate"]):
            with pytest.raises(InputError, match=r"another task of the thread .* uses the model.*asyncio\.Lock"):
                call(model)
        end.set()
        assert not torch.equal(await holder, serial)
        assert torch.equal(logits(model), serial), "it has ended"

    async def family() -> None:
        with me.edited(model, edit):
            inside = logits(model)

            async def child() -> Tensor:
                return logits(model)

            for result in [*await asyncio.gather(child(), child()), await asyncio.to_thread(logits, model)]:
                assert torch.equal(result, inside)

    asyncio.run(both())
    asyncio.run(family())
    with me.edited(model, edit):
        asyncio.run(family_of(model))


async def family_of(model: Any) -> None:
    """A loop that runs within an edit belongs to it."""
    logits(model)


def test_edits_of_generators_that_overlap_are_an_error_and_are_both_undone(model: Any, edit: me.Edit) -> None:
    before = weights(model)

    def edits(seed: int) -> Iterator[None]:
        with me.edited(model, random_edit(model, seed, layers=(0, 1 + seed % 2))):
            yield

    first, second = edits(0), edits(1)
    next(first)
    next(second)
    with pytest.raises(InputError, match="two uses of one model overlap"):
        next(first)
    with pytest.raises(InputError, match="two uses of one model overlap"):
        next(second)
    assert identical(model, before)
    assert model.temporary_edits == 0
    first, second = edits(2), edits(4)
    next(first)
    next(second)
    assert list(second) == list(first) == []  # in order, all is well


def test_generators_that_apply_edits_and_overlap_leave_no_edit_applied(model: Any, edit: me.Edit) -> None:
    before = weights(model)

    def applies() -> Iterator[None]:
        with me.edited(model, edit):
            me.apply_(model, random_edit(model, 1))
            yield

    def edits() -> Iterator[None]:
        with me.edited(model, random_edit(model, 2)):
            yield

    first, second = applies(), edits()
    next(first)
    next(second)
    for generator in (first, second):
        with pytest.raises(InputError, match="overlap"):
            next(generator)
    assert identical(model, before)
    assert model.edit_log == ()


def test_passes_run_at_once_in_a_call_that_holds_the_model(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model.runs_at_once
    both, run = threading.Barrier(2), type(model)._carry_out

    def meeting(self: Any, plan: Any) -> Any:
        both.wait(LONG)  # breaks unless another pass is here as well
        return run(self, plan)

    expected = logits(model)
    monkeypatch.setattr(type(model), "_carry_out", meeting)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with model.exclusive():
            results = list(run_batches(model, [[1], [2], [3], [4]], lambda batch: logits(model)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, expected) for result in results)


def test_a_copy_of_a_model_has_a_lock_of_its_own(model: Any, edit: me.Edit) -> None:
    with me.edited(model, edit):
        twin = copy.deepcopy(model.hf)
        assert twin._mechedit_lock is not model.hf._mechedit_lock
        assert not twin._mechedit_lock.regions
        assert not pickle.loads(pickle.dumps(model.hf._mechedit_lock)).regions
