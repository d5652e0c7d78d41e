"""Linear systems whose matrix is split in rows over processes have the solutions of the whole one."""

from __future__ import annotations

import pytest
import torch
from helpers.matrices import CONDITIONS, MOST, SIZE, random_matrix, solutions, with_condition
from helpers.ranks import launch
from torch import Tensor

from mechedit.moments.second_moment import load_moment
from mechedit.solve.factor import SKETCH_ROWS

EPS = torch.finfo(torch.float64).eps


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor | str]]:
    folder = tmp_path_factory.mktemp("rows")
    code = f"from pathlib import *\nfrom helpers.matrices import *\nsave_solutions({folder!r})"
    ended = launch(request.param, [], folder / "log", first=dict.fromkeys(range(request.param), code))
    assert [process.code for process in ended] == [0] * request.param, [process.err[-3000:] for process in ended]
    saved = [torch.load(folder / f"rank_{rank}.pt") for rank in range(request.param)]
    for found in saved:
        found["file"] = load_moment(folder / "moment", 0).matrix
    return saved


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor | str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("whole"))
        return solutions(lambda matrix: matrix)


def test_all_processes_have_the_same_bits(ranks: list[dict[str, Tensor | str]]) -> None:
    first, *others = ranks
    for other in others:
        assert all(
            torch.equal(other[name], value) if isinstance(value, Tensor) else other[name] == value
            for name, value in first.items()
        )


def test_they_are_those_of_one_process(ranks: list[dict[str, Tensor | str]], expected: dict[str, Tensor | str]) -> None:
    found = ranks[0]
    assert found["file"] is not None
    for name, value in expected.items():
        if isinstance(value, str):
            assert found[name] == value
            continue
        if name.endswith("largest"):  # which are to differ, see below
            continue
        if name.endswith("error"):  # of the linear system, which an ill-conditioned one leaves in one process, too
            assert found[name] <= 10 * value.clamp_min(SIZE * EPS)
            continue
        # What an ill-conditioned M gives is known to its condition alone; what that multiplies to is tested below.
        bound = CONDITIONS["ill"] * EPS if name.startswith("ill") else 1e-12
        torch.testing.assert_close(found[name], value, rtol=0, atol=bound * float(value.abs().max().clamp_min(1)))
    assert torch.equal(found["file"], found["mean"])


@pytest.mark.parametrize("name", CONDITIONS)
def test_no_process_holds_all_columns(
    name: str, ranks: list[dict[str, Tensor | str]], expected: dict[str, Tensor | str]
) -> None:
    fewer, more = SIZE * MOST, SIZE * (5 + 2 * SIZE)
    assert float(expected[f"{name}, fewer: largest"]) >= fewer
    assert float(expected[f"{name}, more: largest"]) >= more
    sketches = 2 * SKETCH_ROWS * SIZE
    for found in ranks:
        # The system of the facts themselves, and sketches, are whole.
        assert found[f"{name}, fewer: largest"] == max(MOST**2, sketches) < fewer
        assert found[f"{name}, more: largest"] == more / len(ranks) < more


@pytest.mark.parametrize("name", CONDITIONS)
def test_the_factor_multiplies_to_the_matrix_and_the_solution_to_the_right_side(
    name: str, ranks: list[dict[str, Tensor | str]]
) -> None:
    matrix, right_side = with_condition(SIZE, CONDITIONS[name]), random_matrix(SIZE, 5)
    found = ranks[0]
    lower, solution, refined = (found[f"{name}: {what}"] for what in ("factor", "solution", "refined"))
    assert isinstance(lower, Tensor)
    assert torch.equal(lower, lower.tril())
    assert (lower @ lower.T - matrix).abs().max() <= 10 * SIZE * EPS
    whole_lower = torch.linalg.cholesky(matrix)
    assert (lower - whole_lower).norm() <= 10 * SIZE * EPS * CONDITIONS[name] * whole_lower.norm()
    for found_solution in (solution, refined):
        assert isinstance(found_solution, Tensor)
        residual = matrix @ found_solution - right_side
        assert residual.norm() <= 10 * SIZE * EPS * (found_solution.norm() + right_side.norm())
    assert isinstance(solution, Tensor)
    assert not torch.allclose(matrix @ (1.001 * solution), right_side, rtol=1e-6)


def test_rows_that_processes_cannot_share_evenly_are_refused(ranks: list[dict[str, Tensor | str]]) -> None:
    assert ranks[0]["uneven"] == f"{SIZE + 1} rows are split over {len(ranks)} processes, expected as many in each"
