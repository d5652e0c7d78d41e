"""The same command on N processes, as torchrun starts them: the results of one process, one log, and no hang.

Groups of facts, batches of targets and of prompts, and windows are cut before they are dealt out: with as many threads
per process the results are those of one process bit for bit. Second moments are sums in another order: float64's
rounding.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import Ended, launch, launch_by
from torch.distributed import HashStore

import mechedit as me
from mechedit import ranks
from mechedit.errors import InputError

TRACE = ["trace", "--max-facts", 5, "--samples", 1, "--roles", "subject_last,last", "--kinds", "state"]
TRACE += ["--memory", 0.0015]  # a fact at a time, so that there are several groups to deal out
EDIT = ["edit", "--layers", "3-4", "--set", "steps=3", "--set", "batch_size=2"]
SCORES = ["evaluate", "--generation-prompts", 1, "--generation-tokens", 5]
MOMENTS = ["moments", "--layers", "3-4", "--max-length", 16]
SWEEP = ["--validate", "--windows", "3-3,3-4,4-4", "--validate-requests", 3, "--set", "steps=2", "--accept-unsettled"]
IMPATIENT = {"MECHEDIT_RANK_TIMEOUT": "3"}
"""Seconds without a sign of life after which a process counts as dead."""
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes: a trace, moments, an edit, scores and a sweep."""
    folder = tmp_path_factory.mktemp("at_once")
    (folder / "texts.txt").write_text("\n".join(me.load_texts("tiny")[:520]))
    requests = [{**request.plain(), "generations": list(request.generations)} for request in me.load_requests("tiny")]
    (folder / "few.txt").write_text("\n".join(me.load_texts("tiny")[:200]))
    (folder / "requests.json").write_text(json.dumps([short(request) for request in requests[:7]]))
    for arguments in (
        [*TRACE, "--out", folder],
        [*MOMENTS, "--texts", folder / "texts.txt", "--out", folder],
        edit(folder, folder),
        scores(folder, folder),
    ):
        succeeded(launch(1, arguments, folder / "log"))
    return folder


def short(request: dict[str, Any]) -> dict[str, Any]:
    return {
        name: request[name] for name in ("id", "subject", "prompt", "target_new", "target_true") if request.get(name)
    }


def edit(made: Path, folder: Path, *options: object) -> list[object]:
    """An edit in a folder, by the moments of another."""
    folder.mkdir(exist_ok=True)
    if folder != made and not (folder / "moments").exists():
        (folder / "moments").symlink_to(made / "moments")
    paths = ["--requests", made / "requests.json", "--moments", folder, "--out", folder / "edit.safetensors"]
    return [*EDIT, *paths, *options]


def scores(made: Path, folder: Path) -> list[object]:
    return [*SCORES, "--requests", made / "requests.json", "--edit", made / "edit.safetensors", "--out", folder]


def succeeded(ended: Sequence[Ended]) -> Ended:
    """The first process of a command that has succeeded; the others have said nothing."""
    assert [process.code for process in ended] == [0] * len(ended), [process.err for process in ended]
    assert [process.out + process.err for process in ended[1:]] == [""] * (len(ended) - 1)
    return ended[0]


def failed(ended: Sequence[Ended]) -> str:
    """The one line that the processes have said, all of which end with its exit code."""
    assert [process.code for process in ended] == [2] * len(ended), [process.err for process in ended]
    (line,) = [line for process in ended for line in process.complaints]
    assert "".join(process.out for process in ended) == ""
    return line


def same(name: str, first: Path, second: Path) -> bool:
    return (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("count", [2, 3])
def test_a_trace_is_that_of_one_process(count: int, at_once: Path, tmp_path: Path) -> None:
    first = succeeded(launch(count, [*TRACE, "--out", tmp_path / "run", "--json"], tmp_path))
    for name in ("effects.parquet", "facts.parquet"):
        assert same(name, tmp_path / "run", at_once), name
    assert json.loads(first.out)["facts"] == 5
    assert first.err.count("tracing facts") >= 1
    assert "10/10" in first.err, "one bar counts the facts of all processes, whole and severed"
    assert not (tmp_path / "run" / "trace_parts").exists()
    stamps = [
        json.loads((folder / "config.json").read_text())["steps"]["trace"] for folder in (tmp_path / "run", at_once)
    ]
    assert stamps[0] == stamps[1]


def test_an_edit_is_that_of_one_process(at_once: Path, tmp_path: Path) -> None:
    succeeded(launch(2, edit(at_once, tmp_path / "run"), tmp_path, first=counting(tmp_path, 2)))
    assert same("edit.safetensors", tmp_path / "run", at_once)
    searched = searched_by(tmp_path, 2)
    assert sorted([*searched[0], *searched[1]]) == sorted(
        me.Edit.load(at_once / "edit.safetensors").manifest["requests"]
    )
    assert all(searched), "each process searches for some"


def test_an_edit_whose_process_dies_goes_on_with_another_number(at_once: Path, tmp_path: Path) -> None:
    dies = "import os, signal\nimport mechedit.targets.search as s\nplain, done = s.search_groups, []\n" + (
        "def deadly(*arguments):\n    if done: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done.append(1)\n    return plain(*arguments)\ns.search_groups = deadly"
    )
    assert died(launch(2, edit(at_once, tmp_path / "run"), tmp_path, first={1: dies}, environment=IMPATIENT), rank=1)
    assert not (tmp_path / "run" / "edit.safetensors").exists()
    succeeded(launch(3, edit(at_once, tmp_path / "run"), tmp_path, first=counting(tmp_path, 3)))
    assert same("edit.safetensors", tmp_path / "run", at_once)
    # Of four batches the dead process has left one undone, of two requests, or of the one that is left over.
    assert 1 <= sum(map(len, searched_by(tmp_path, 3))) <= 2


def counting(folder: Path, count: int) -> dict[int, str]:
    """Code by which each process notes what it searches for."""
    code = (
        "import os\nos.environ['SEEN'] = {!r}\nopen(os.environ['SEEN'], 'w').close()\n"
        "import mechedit.targets.search as search\nplain = search.search_groups\n"
        "def counted(model, groups, *rest):\n"
        "    print(*[r.id for g in groups for r in g], file=open(os.environ['SEEN'], 'a'))\n"
        "    return plain(model, groups, *rest)\n"
        "search.search_groups = counted"
    )
    return {rank: code.format(str(folder / f"seen_{rank}")) for rank in range(count)}


def searched_by(folder: Path, count: int) -> list[list[str]]:
    """The requests that each process has searched for."""
    return [(folder / f"seen_{rank}").read_text().split() for rank in range(count)]


def died(ended: Sequence[Ended], *, rank: int) -> bool:
    """Whether a process was killed, and the others have ended because of it, soon and with one line."""
    codes = [-signal.SIGKILL if number == rank else 2 for number in range(len(ended))]
    (line,) = [line for process in ended for line in process.complaints]
    said = f"the process of rank {rank} of {len(ended)} has given no sign of life for 3 s" in line
    return [process.code for process in ended] == codes and said and ended[0].seconds < 60


def test_scores_are_those_of_one_process(at_once: Path, tmp_path: Path) -> None:
    succeeded(launch(2, scores(at_once, tmp_path / "run"), tmp_path))
    for name in ("scores.parquet", "summary.json"):
        assert same(name, tmp_path / "run", at_once), name


def test_scores_whose_process_dies_go_on_with_another_number(at_once: Path, tmp_path: Path) -> None:
    dies = "import os, signal\nimport mechedit.pipeline.scoring as s\n" + (
        "def deadly(*a, **k): os.kill(os.getpid(), signal.SIGKILL)\ns.evaluate = deadly"
    )
    assert died(launch(2, scores(at_once, tmp_path / "run"), tmp_path, first={1: dies}, environment=IMPATIENT), rank=1)
    assert not (tmp_path / "run" / "scores.parquet").exists()
    measured_once = "import mechedit.pipeline.scoring as s\n" + (
        "def again(*a, **k): raise ValueError('the baseline is measured again')\ns.measure_baseline = again"
    )
    succeeded(launch(3, scores(at_once, tmp_path / "run"), tmp_path, first=dict.fromkeys(range(3), measured_once)))
    for name in ("scores.parquet", "summary.json"):
        assert same(name, tmp_path / "run", at_once), name


def moments_of(folder: Path) -> dict[int, torch.Tensor]:
    return {layer: moment.matrix for layer, moment in me.load_moments(folder, [3, 4]).items()}


def test_moments_are_those_of_one_process_and_go_on_with_another_number(at_once: Path, tmp_path: Path) -> None:
    arguments = [*MOMENTS, "--texts", at_once / "texts.txt", "--checkpoint-seconds", 0]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    succeeded(launch(3, [*arguments, "--out", whole], tmp_path))
    expected, three = moments_of(at_once), moments_of(whole)
    for layer, matrix in three.items():
        assert (matrix - expected[layer]).norm() < 1e-12 * expected[layer].norm()
        assert not torch.equal(matrix, torch.zeros_like(matrix))
    # Rank 2 dies in the middle of its part; two processes go on, and add up the same three parts.
    dies = "import os, signal\nfrom mechedit.moments.text_pass import TextPass as T\nplain = T._sum_chunk\n" + (
        "def deadly(self, *rest):\n    plain(self, *rest)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "T._sum_chunk = deadly"
    )
    assert died(launch(3, [*arguments, "--out", resumed], tmp_path, first={2: dies}, environment=IMPATIENT), rank=2)
    parts = sorted(path.name for path in (resumed / "moments" / "parts").glob("*.safetensors"))
    assert len(parts) == 6, parts
    succeeded(launch(2, [*arguments, "--out", resumed], tmp_path))
    assert all(torch.equal(matrix, three[layer]) for layer, matrix in moments_of(resumed).items())
    assert not (resumed / "moments" / "parts").exists()


def test_a_sweep_is_that_of_one_process(at_once: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    succeeded(launch(1, [*TRACE, "--max-facts", 10, "--out", folders[0]], tmp_path))
    folders[1].mkdir()
    for name in ("effects.parquet", "facts.parquet", "config.json"):
        (folders[1] / name).write_bytes((folders[0] / name).read_bytes())
    options = [*SWEEP, "--texts", at_once / "few.txt", "--max-length", 16]
    codes = [
        {process.code for process in launch(count, ["select", folder, *options], tmp_path)}
        for count, folder in enumerate(folders, 1)
    ]
    assert codes[0] == codes[1]
    assert codes[0] <= {0, 3}
    # The moments of two processes are rounded otherwise, and so are the edits.
    import pandas as pd

    tables = [pd.read_parquet(folder / "sweep_cases.parquet") for folder in folders]
    assert list(tables[0]["case"]) == list(tables[1]["case"])
    assert (tables[0]["value"] - tables[1]["value"]).abs().max() < 1e-3
    assert tables[0]["value"].std() > 0


def test_a_process_that_dies_ends_all_and_another_number_goes_on(at_once: Path, tmp_path: Path) -> None:
    dies = "import os, signal\nimport mechedit.trace.trace as t\nplain, done = t.trace_group, []\n" + (
        "def deadly(*arguments):\n    if done: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    done.append(1)\n    return plain(*arguments)\nt.trace_group = deadly"
    )
    out = [*TRACE, "--out", tmp_path / "run"]
    assert died(launch(2, out, tmp_path, first={1: dies}, environment=IMPATIENT), rank=1)
    assert not (tmp_path / "run" / "effects.parquet").exists()
    traced = len(list((tmp_path / "run" / "trace_parts").glob("*.parquet")))
    assert traced > 1
    succeeded(launch(3, out, tmp_path))
    assert same("effects.parquet", tmp_path / "run", at_once)


def test_an_error_of_one_process_ends_all_with_its_line(at_once: Path, tmp_path: Path) -> None:
    fails = "import mechedit.targets.search as s\nfrom mechedit.errors import InputError\n" + (
        "def failing(*arguments): raise InputError('this fails')\ns.search_groups = failing"
    )
    assert failed(launch(3, edit(at_once, tmp_path / "run"), tmp_path, first={1: fails})) == "mechedit: this fails"
    breaks = fails.replace("InputError('this fails')", "ZeroDivisionError('bug')")
    ended = launch(2, edit(at_once, tmp_path / "run"), tmp_path, first={1: breaks})
    assert [process.code for process in ended] == [1, 1]
    assert ["ZeroDivisionError: bug" in process.err for process in ended] == [False, True]
    assert not (tmp_path / "run" / "edit.safetensors").exists()


def test_processes_of_different_commands_are_refused(at_once: Path, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run"]
    line = failed(launch(2, [*TRACE, *out], tmp_path, instead={1: [*TRACE, *out, "--seed", 1]}))
    assert "the command: arguments is" in line
    version = "import sys\nsys.modules['mechedit.cli.app'].VERSION = '9.9'"
    assert "mechedit is '9.9' in the process of rank 1" in failed(
        launch(2, [*TRACE, *out], tmp_path, first={1: version})
    )
    other = "import mechedit.cli.options as o\nplain = o.read_facts\n" + (
        "def fewer(*a, **k):\n    r = plain(*a, **k)\n    r.records.reverse()\n    return r\no.read_facts = fewer"
    )
    assert "facts is" in failed(launch(2, [*TRACE, *out], tmp_path, first={1: other}))
    model = "import torch\nfrom mechedit.cli import options as o\nplain = o.load_quietly\n" + (
        "def load(*a):\n    m = plain(*a)\n    with torch.no_grad(): m.projection(0).add_(1e-3)\n    return m\n"
        "o.load_quietly = load"
    )
    assert "weights_hash" in failed(launch(2, [*TRACE, *out], tmp_path, first={1: model}))
    assert not list((tmp_path / "run").rglob("*.parquet"))


def test_bad_input_is_refused_once(at_once: Path, tmp_path: Path) -> None:
    assert "no-such-file" in failed(launch(2, ["trace", "--facts", "no-such-file.json"], tmp_path))
    assert "processes share this command" in failed(launch(2, [*TRACE, "--shard", "0/2", "--out", tmp_path], tmp_path))
    line = failed(launch(2, [*MOMENTS, "--convergence", "--texts", at_once / "texts.txt", "--out", tmp_path], tmp_path))
    assert "needs the text in order" in line


def test_more_processes_than_work_are_told_so(at_once: Path, tmp_path: Path) -> None:
    first = succeeded(launch(3, edit(at_once, tmp_path / "run", "--set", "batch_size=4"), tmp_path))
    assert "1 of the 3 processes have nothing to do: there are only 2 batches" in first.err


def test_commands_that_are_not_dealt_out_are_done_by_the_first(at_once: Path, tmp_path: Path) -> None:
    first = succeeded(launch(2, ["edit", "--show", at_once / "edit.safetensors", "--json"], tmp_path))
    assert json.loads(first.out)["method"] == "memit"
    checkpoint = ["apply", "--edit", at_once / "edit.safetensors", "--out", tmp_path / "checkpoint"]
    assert "wrote the edited model" in succeeded(launch(2, checkpoint, tmp_path)).err


def test_an_environment_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="start several processes by torchrun or accelerate launch"), ranks.joined():
        pass
    for variable, value in (
        ("RANK", "0"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "1"),
        (ranks.TIMEOUT_VARIABLE, "soon"),
    ):
        monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match="MECHEDIT_RANK_TIMEOUT is 'soon', expected seconds"), ranks.joined():
        pass
    for variable in ("WORLD_SIZE", "RANK", "MASTER_PORT"):
        for value in ("9" * 5000, "99999999", "-1", "x", ""):
            with monkeypatch.context() as changed:
                changed.setenv(variable, value)
                with pytest.raises(InputError, match=f"{variable} |MASTER_ADDR"), ranks.joined():
                    pass


def test_a_process_that_never_comes_is_missed(tmp_path: Path) -> None:
    environment = {"WORLD_SIZE": "2", "MECHEDIT_RANK_TIMEOUT": "1"}
    (ended,) = launch(1, ["trace"], tmp_path, environment=environment)
    assert ended.code == 2
    assert "rank 1 of 2 has given no sign of life for 1 s" in ended.complaints[0]


def test_the_bar_shows_what_others_do_last(capsys: pytest.CaptureFixture[str]) -> None:
    """What another process counts between the first one's last own piece and the meeting is in the bar in the end."""
    store = HashStore()
    first, second = (ranks.Processes(rank, 2, store, 5.0) for rank in (0, 1))
    try:
        with first.bar(2, desc="pieces", mininterval=0) as bar, second.bar(2) as hidden:
            bar.update(1)
            assert "1/2" in capsys.readouterr().err
            hidden.update(1)
            assert "2/2" not in capsys.readouterr().err
            other = threading.Thread(target=second.meet, args=("the end",))
            other.start()
            while store.add("turn/1", 0) == 0:
                time.sleep(0.01)
            first.meet("the end")
            other.join()
            assert "2/2" in capsys.readouterr().err
    finally:
        first._closing.set()
        second._closing.set()


TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# On a machine with accelerators, which need not be there for that; with --cpu it starts one process alone.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--main_process_port", "0"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


def by_launcher(launcher: Sequence[str], *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", *launcher, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_by_torchrun(at_once: Path, tmp_path: Path) -> None:
    """Its variables and its store, with processes of the server: others would have to import first."""
    arguments = [*TRACE, "--out", tmp_path / "run", "--json"]
    first = succeeded(launch_by(TORCHRUN, 2, arguments, tmp_path / "log"))
    assert json.loads(first.out)["facts"] == 5
    environment = json.loads((tmp_path / "log" / "environment_1").read_text())
    assert (environment["RANK"], environment["WORLD_SIZE"]) == ("1", "2")
    for name in ("effects.parquet", "facts.parquet"):
        assert same(name, tmp_path / "run", at_once), name


def test_by_accelerate(tmp_path: Path) -> None:
    (tmp_path / "meet.py").write_text(
        "from mechedit import ranks\n"
        "with ranks.joined() as group:\n"
        "    ranks_here = group.gather(group.rank, 'the meeting')\n"
        "    if group.is_first:\n"
        "        print('met', ranks_here)\n"
        "    group.leave(0)\n"
    )
    assert by_launcher(ACCELERATE, tmp_path / "meet.py", folder=tmp_path).stdout.splitlines()[-1] == "met [0, 1]"
