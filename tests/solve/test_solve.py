"""Each update is the solution of the problem its method states, whichever way it is solved, and says so when not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from helpers.matrices import random_matrix, with_condition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mechedit.errors import InputError, check_finite
from mechedit.solve import (
    Factor,
    NullSpace,
    Update,
    equality_update,
    factorize,
    null_space,
    null_space_update,
    ridge_update,
)
from mechedit.solve.factor import gaussian_sketch

D_MLP, D_MODEL, OLD, FACTS = 12, 5, 40, 4
EPS = torch.finfo(torch.float64).eps
FORMS: dict[str, Callable[[Tensor], Tensor | Factor]] = {
    "matrix": lambda moment: moment,
    "factor": factorize,
    "mixed": lambda moment: factorize(moment, precision="mixed"),
}
few_examples = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def relative_error(solution: Tensor, expected: Tensor) -> float:
    return float((solution - expected).norm() / expected.norm())


@pytest.fixture
def old() -> Tensor:
    return random_matrix(D_MLP, OLD, seed=1)


@pytest.fixture
def moment(old: Tensor) -> Tensor:
    return old @ old.T


@pytest.fixture
def keys() -> Tensor:
    return random_matrix(D_MLP, FACTS, seed=2)


@pytest.fixture
def earlier() -> Tensor:
    return random_matrix(D_MLP, 3, seed=6)


@pytest.fixture
def residuals() -> Tensor:
    return random_matrix(D_MODEL, FACTS, seed=3)


@pytest.fixture(params=list(FORMS))
def form(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor | Factor]:
    return FORMS[request.param]


# --- the ridge (MEMIT) ---


def test_is_least_squares_over_old_and_new_keys(keys: Tensor, residuals: Tensor, old: Tensor, form: Callable) -> None:
    inputs = torch.cat([old, keys], 1).T
    outputs = torch.cat([torch.zeros(D_MODEL, OLD, dtype=torch.float64), residuals], 1).T
    plain = torch.linalg.lstsq(inputs, outputs).solution
    assert torch.allclose(ridge_update(keys, residuals, form(old @ old.T)).delta, plain, atol=1e-12)
    assert plain.abs().max() > 0.01


def test_gradient_vanishes_at_the_solution_only(
    keys: Tensor, residuals: Tensor, earlier: Tensor, old: Tensor, form: Callable
) -> None:
    """MEMIT Eq. 9, in terms of the change of W."""

    def objective(delta: Tensor) -> Tensor:
        preserved = 7 * (delta.T @ old).square().sum() + (delta.T @ earlier).square().sum()
        return preserved + (delta.T @ keys - residuals).square().sum()

    best = ridge_update(keys, residuals, form(old @ old.T), 7, previous=earlier).delta.requires_grad_()
    start = torch.zeros_like(best, requires_grad=True)
    at_best, at_start = (torch.autograd.grad(objective(delta), delta)[0] for delta in (best, start))
    assert at_best.abs().max() < 1e-10 < 0.1 < at_start.abs().max()
    for seed in range(5):
        assert objective(best + 1e-2 * random_matrix(D_MLP, D_MODEL, seed=seed)) > objective(best)


def test_rank_is_at_most_the_number_of_facts(residuals: Tensor, keys: Tensor, moment: Tensor, form: Callable) -> None:
    assert torch.linalg.matrix_rank(ridge_update(keys, residuals, form(moment)).delta) == FACTS
    repeated = keys[:, :1].expand(-1, FACTS).contiguous()
    assert torch.linalg.matrix_rank(ridge_update(repeated, residuals, form(moment)).delta) == 1


def test_weight_trades_new_against_old(keys: Tensor, residuals: Tensor, moment: Tensor, form: Callable) -> None:
    def missed(weight: float) -> float:
        delta = ridge_update(keys, residuals, form(moment), weight).delta
        return float((delta.T @ keys - residuals).norm() / residuals.norm())

    assert missed(1e-9) < 1e-6
    assert missed(1e9) > 1 - 1e-6
    assert missed(1e-9) < missed(1e-2) < missed(1) < missed(1e9)


def test_facts_may_come_in_any_order(keys: Tensor, residuals: Tensor, moment: Tensor, form: Callable) -> None:
    order = torch.tensor([2, 0, 3, 1])
    shuffled = ridge_update(keys[:, order], residuals[:, order], form(moment))
    plain = ridge_update(keys, residuals, form(moment))
    assert torch.allclose(shuffled.delta, plain.delta, atol=1e-12)
    assert not torch.allclose(shuffled.left, plain.left, atol=1e-3)


def test_previous_keys_count_as_old_ones(keys: Tensor, residuals: Tensor, earlier: Tensor, moment: Tensor) -> None:
    expected = ridge_update(keys, residuals, 3 * moment + earlier @ earlier.T).delta
    without = ridge_update(keys, residuals, moment, 3).delta
    assert relative_error(without, expected) > 1e-3
    for form in FORMS.values():
        assert relative_error(ridge_update(keys, residuals, form(moment), 3, previous=earlier).delta, expected) < 1e-12


@few_examples
@given(
    size=st.integers(2, 24),
    facts=st.integers(1, 30),
    rank=st.integers(1, 30),
    before=st.integers(0, 12),
    condition=st.floats(0, 9),
    weight=st.floats(-4, 6),
    seed=seeds,
)
def test_every_way_equals_a_dense_solve(
    size: int, facts: int, rank: int, before: int, condition: float, weight: float, seed: int
) -> None:
    """Keys of chosen rank (facts that repeat each other), moments of chosen condition, few facts or many."""
    moment, scale = with_condition(size, 10**condition, seed), 10**weight
    keys = random_matrix(size, rank, seed=seed + 1) @ random_matrix(rank, facts, seed=seed + 2)
    earlier = random_matrix(size, before, seed=seed + 3)
    system = scale * moment + earlier @ earlier.T + keys @ keys.T
    expected = torch.linalg.solve(system, keys)
    tolerance = 50 * size * EPS * float(torch.linalg.cond(system))
    for precision in ("float64", "mixed"):
        for given_as in (moment, factorize(moment, precision=precision)):
            update = ridge_update(keys, random_matrix(3, facts, seed=seed), given_as, scale, previous=earlier)
            assert relative_error(update.left, expected) < tolerance
            backward = system.norm() * update.left.norm() + keys.norm()
            assert (system @ update.left - keys).norm() < 100 * size * EPS * backward
            assert update.error * keys.norm() < 100 * size * EPS * backward


@pytest.mark.parametrize("facts", [D_MLP - FACTS, D_MLP])
def test_a_moment_may_be_singular_where_facts_make_up_for_it(facts: int) -> None:
    old, keys, residuals = (
        random_matrix(D_MLP, FACTS, seed=5),
        random_matrix(D_MLP, facts, seed=2),
        random_matrix(D_MODEL, facts, seed=3),
    )
    inputs = torch.cat([old, keys], 1).T
    outputs = torch.cat([torch.zeros(D_MODEL, FACTS, dtype=torch.float64), residuals], 1).T
    update = ridge_update(keys, residuals, old @ old.T)
    assert relative_error(update.delta, torch.linalg.lstsq(inputs, outputs).solution) < 1e-9
    assert torch.linalg.matrix_rank(old @ old.T) == FACTS


# --- equality (ROME, EMMET) ---


def test_equality_meets_the_targets_and_changes_old_keys_least(
    keys: Tensor, residuals: Tensor, old: Tensor, form: Callable
) -> None:
    delta = equality_update(keys, residuals, form(old @ old.T)).delta
    assert torch.allclose(delta.T @ keys, residuals, atol=1e-12)
    free = torch.linalg.qr(keys, mode="complete").Q[:, FACTS:]
    for seed in range(5):
        feasible = delta + 1e-2 * free @ random_matrix(D_MLP - FACTS, D_MODEL, seed=seed)
        assert torch.allclose(feasible.T @ keys, residuals, atol=1e-12)
        assert (feasible.T @ old).norm() > (delta.T @ old).norm()


def test_one_fact_is_romes_rank_one_formula(keys: Tensor, residuals: Tensor, moment: Tensor, form: Callable) -> None:
    key, residual = keys[:, :1], residuals[:, :1]
    direction = moment.inverse() @ key
    expected = residual @ direction.T / (direction.T @ key)
    update = equality_update(key, residual, form(moment))
    assert relative_error(update.delta.T, expected) < 1e-12
    assert relative_error(ridge_update(key, residual, form(moment)).delta.T, expected) > 1e-3


def test_slack_makes_it_the_ridge_and_no_slack_its_limit(
    keys: Tensor, residuals: Tensor, moment: Tensor, form: Callable
) -> None:
    for slack in (1e-3, 1, 50):
        emmet = equality_update(keys, residuals, form(moment), relaxation=slack)
        assert relative_error(emmet.delta, ridge_update(keys, residuals, form(moment), slack).delta) < 1e-10
    exact = equality_update(keys, residuals, form(moment)).delta
    distances = [
        relative_error(ridge_update(keys, residuals, form(moment), weight).delta, exact) for weight in (1, 1e-3, 1e-6)
    ]
    assert distances[0] > 1e-2
    assert distances[1] == pytest.approx(1e3 * distances[2], rel=0.1)
    assert distances[2] < 1e-4


@few_examples
@given(
    size=st.integers(4, 24),
    facts=st.integers(1, 4),
    before=st.integers(0, 30),
    condition=st.floats(0, 8),
    slack=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    seed=seeds,
)
def test_equality_equals_its_dense_formula(
    size: int, facts: int, before: int, condition: float, slack: float, seed: int
) -> None:
    moment, keys = with_condition(size, 10**condition, seed), random_matrix(size, facts, seed=seed + 1)
    earlier, residuals = random_matrix(size, before, seed=seed + 2), random_matrix(3, facts, seed=seed + 3)
    system = moment + earlier @ earlier.T
    solved = torch.linalg.solve(system, keys)
    inner = keys.T @ solved + slack * torch.eye(facts, dtype=torch.float64)
    expected = solved @ torch.linalg.solve(inner, residuals.T)
    tolerance = 1e3 * size * EPS * float(torch.linalg.cond(system) * torch.linalg.cond(inner))
    for form in FORMS.values():
        update = equality_update(keys, residuals, form(moment), relaxation=slack, previous=earlier)
        assert relative_error(update.delta, expected) < tolerance
        assert update.condition == pytest.approx(float(torch.linalg.cond(inner, p=1)), rel=0.7)
        if not slack:
            assert relative_error(update.delta.T @ keys, residuals) < tolerance
            assert update.error < tolerance


def test_dependent_keys_are_named(keys: Tensor, residuals: Tensor, moment: Tensor, form: Callable) -> None:
    keys[:, 2] = 2 * keys[:, 0] - keys[:, 1]
    with pytest.raises(InputError, match=r"column 2 is a combination of columns \[0, 1\].*share one subject"):
        equality_update(keys, residuals, form(moment))
    keys[:, 2] = 0
    with pytest.raises(InputError, match=r"column 2 is zero"):
        equality_update(keys, residuals, form(moment))
    assert equality_update(keys, residuals, form(moment), relaxation=1e-6).error < 1e-8


# --- the null space (AlphaEdit) ---


def published(keys: Tensor, residuals: Tensor, projection: Tensor, weight: float, earlier: Tensor) -> Tensor:
    """ΔWᵀ as AlphaEdit prints it: a dense, unsymmetric system."""
    gram = keys @ keys.T + earlier @ earlier.T
    system = projection @ gram + weight * torch.eye(len(keys), dtype=torch.float64)
    return torch.linalg.solve(system, projection @ keys @ residuals.T)


@few_examples
@given(
    size=st.integers(4, 24),
    facts=st.integers(1, 30),
    before=st.integers(0, 10),
    threshold=st.floats(-5, -0.5),
    weight=st.floats(-3, 3),
    seed=seeds,
)
def test_null_space_update_is_the_published_formula(
    size: int, facts: int, before: int, threshold: float, weight: float, seed: int
) -> None:
    moment, keys = with_condition(size, 1e6, seed), random_matrix(size, facts, seed=seed + 1)
    earlier, residuals = random_matrix(size, before, seed=seed + 2), random_matrix(3, facts, seed=seed + 3)
    space = null_space(moment, 10**threshold)
    assert relative_error(space.projection @ space.projection, space.projection) < 1e-12
    update = null_space_update(keys, residuals, space, weight=10**weight, previous=earlier)
    assert relative_error(update.delta, published(keys, residuals, space.projection, 10**weight, earlier)) < 1e-9
    assert update.error < 1e-9


def test_null_space_update_annihilates_old_keys_of_deficient_rank(keys: Tensor, residuals: Tensor) -> None:
    old = random_matrix(D_MLP, FACTS, seed=5)
    space = null_space(old @ old.T, 1e-10)
    assert space.dimension == D_MLP - FACTS
    delta = null_space_update(keys, residuals, space, weight=1e-9).delta
    assert (delta.T @ old).norm() < 1e-12 * delta.norm() * old.norm()
    assert relative_error(delta.T @ keys, residuals) < 1e-6
    ridge = ridge_update(keys, residuals, old @ old.T + 1e-3 * torch.eye(D_MLP)).delta
    assert (ridge.T @ old).norm() > 1e-5 * ridge.norm() * old.norm()


def test_null_space_does_not_depend_on_the_scale_of_keys(moment: Tensor) -> None:
    values = torch.linalg.eigvalsh(moment)
    threshold = float((values[4] + values[5]) / 2 / values[-1])
    small, large = (null_space(scale * moment, threshold) for scale in (1e-8, 1e8))
    assert small.dimension == large.dimension == 5
    assert torch.allclose(small.projection, large.projection, atol=1e-10)
    assert large.leak == pytest.approx(1e8 * float(values[4]))
    assert large.largest == pytest.approx(1e8 * float(values[-1]))


def test_null_space_refuses_what_it_cannot_keep(moment: Tensor) -> None:
    for threshold in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="threshold of the null space"):
            null_space(moment, threshold)
    for threshold, dimension in ((1e-6, 0), (1.0, D_MLP)):
        with pytest.raises(InputError, match=rf"has {dimension} of {D_MLP} dimensions.*choose a threshold"):
            null_space(moment, threshold)
    for matrix in (-moment, torch.zeros_like(moment)):
        with pytest.raises(InputError, match="expected none below zero"):
            null_space(matrix, 0.1)


# --- precision, conditioning, cost ---


def test_solves_in_float64_and_answers_in_the_dtype_of_the_keys(
    keys: Tensor, residuals: Tensor, moment: Tensor, form: Callable
) -> None:
    scale = torch.logspace(0, -3, D_MLP, dtype=torch.float64)
    given_as = form(moment * scale.outer(scale))
    exact = ridge_update(keys.float().double(), residuals.float().double(), given_as)
    single = ridge_update(keys.float(), residuals.float(), given_as)
    assert single.left.dtype == single.right.dtype == torch.float32
    assert torch.equal(single.left, exact.left.float())
    assert exact.condition > 1e4
    assert exact.error < 1e-12


@few_examples
@given(size=st.integers(2, 24), condition=st.floats(0, 5), scale=st.floats(-12, 12), seed=seeds)
def test_mixed_precision_is_float64_accuracy(size: int, condition: float, scale: float, seed: int) -> None:
    matrix, right = 10**scale * with_condition(size, 10**condition, seed), random_matrix(size, 3, seed=seed + 1)
    exact, mixed = factorize(matrix), factorize(matrix, precision="mixed")
    assert mixed.precision == "mixed"
    assert mixed.lower.dtype == torch.float32
    assert relative_error(mixed.solve(right), exact.solve(right)) < 1e-10
    assert mixed.condition == pytest.approx(exact.condition, rel=1e-6)
    assert (
        size < 8 or relative_error(torch.cholesky_solve(right.float(), mixed.lower).double(), exact.solve(right)) > 1e-9
    )


def test_mixed_precision_falls_back_to_float64() -> None:
    right = random_matrix(D_MLP, 3)
    singular_in_float32 = with_condition(D_MLP, 1e10)
    assert factorize(singular_in_float32, precision="mixed").precision == "float64"
    wrong = factorize(with_condition(D_MLP, 1e3, seed=7), precision="mixed").lower
    stuck = Factor(matrix=singular_in_float32, lower=wrong)
    for factor in (factorize(singular_in_float32, precision="mixed"), stuck):
        assert torch.equal(factor.solve(right), factorize(singular_in_float32).solve(right))


@pytest.mark.parametrize("facts", [FACTS, 9])
def test_an_inexact_factor_is_refined_and_a_wrong_one_shows(facts: int, moment: Tensor) -> None:
    keys, residuals = random_matrix(D_MLP, facts, seed=2), random_matrix(D_MODEL, facts, seed=3)
    sound, dense = factorize(moment), ridge_update(keys, residuals, moment, 2.0)
    inexact = dataclasses.replace(sound, lower=sound.lower * (1 + 1e-5))
    assert relative_error(inexact.solve(keys), sound.solve(keys)) > 1e-6
    refined = ridge_update(keys, residuals, inexact, 2.0)
    assert relative_error(refined.left, dense.left) < 1e-12
    assert refined.error < 1e-12
    wrong = ridge_update(keys, residuals, dataclasses.replace(sound, lower=torch.eye(D_MLP).double()), 2.0)
    true = float(((2 * moment + keys @ keys.T) @ wrong.left - keys).norm() / keys.norm())
    assert true > 0.1
    assert wrong.error == pytest.approx(true, rel=1e-9)


@pytest.mark.parametrize("row", [0, 31, 59])
def test_an_error_in_one_row_alone_shows_and_is_corrected(row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more rows than the sketch has, down to one wrong equation of sixty."""
    moment, keys, residuals = with_condition(60, 1e3), random_matrix(60, 9, seed=2), random_matrix(D_MODEL, 9, seed=3)
    lower = factorize(moment).lower.clone()
    lower[row, row] *= 1 + 1e-6
    wrong = dataclasses.replace(factorize(moment), lower=lower)
    exact = ridge_update(keys, residuals, moment, 2.0)
    forced = equality_update(keys, residuals, moment)
    assert relative_error(ridge_update(keys, residuals, wrong, 2.0).left, exact.left) < 1e-12
    assert relative_error(equality_update(keys, residuals, wrong).left, forced.left) < 1e-11
    monkeypatch.setattr("mechedit.solve.saddle_point.CORRECTIONS", 0)
    uncorrected = ridge_update(keys, residuals, wrong, 2.0)
    true = float(((2 * moment + keys @ keys.T) @ uncorrected.left - keys).norm() / keys.norm())
    assert true > 1e4 * exact.error
    assert uncorrected.error == pytest.approx(true, rel=0.7)
    assert equality_update(keys, residuals, wrong).error > 1e4 * max(forced.error, EPS)


@few_examples
@given(size=st.integers(17, 400), width=st.integers(1, 30), seed=seeds)
def test_a_gaussian_sketch_measures_a_matrix(size: int, width: int, seed: int) -> None:
    """Dense matrices, and by the norms of its columns also those with one nonzero row."""
    # Seeds count modulo 2³² and Ω is drawn with 0: a matrix of the same numbers would not be independent of it.
    sketch, matrix = gaussian_sketch(size, random_matrix(1)), random_matrix(size, width, seed=1 + seed % (2**32 - 1))
    assert len(sketch) == 16
    assert float((sketch @ matrix).norm() / matrix.norm()) == pytest.approx(1, rel=0.8)
    assert torch.allclose(sketch.norm(dim=0), torch.ones(size, dtype=torch.float64), rtol=0, atol=0.8)
    assert torch.equal(gaussian_sketch(size, random_matrix(1)), sketch)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e9])
def test_condition_is_estimated_to_within_a_few_times(
    condition: float, keys: Tensor, residuals: Tensor, form: Callable
) -> None:
    matrix = 1e6 * with_condition(D_MLP, condition)
    expected = float(torch.linalg.cond(matrix, p=1))
    assert factorize(matrix).condition == pytest.approx(expected, rel=0.7)
    assert ridge_update(1e-9 * keys, residuals, form(matrix)).condition == pytest.approx(expected, rel=0.7)


@few_examples
@given(
    size=st.integers(12, 40), facts=st.integers(1, 11), condition=st.floats(0, 6), weight=st.floats(-3, 3), seed=seeds
)
def test_condition_of_a_sum(size: int, facts: int, condition: float, weight: float, seed: int) -> None:
    """Woodbury's estimate keeps within what 1-norms differ from 2-norms and what the facts lift of the spectrum."""
    moment, keys = with_condition(size, 10**condition, seed), random_matrix(size, facts, seed=seed + 1)
    true = float(torch.linalg.cond(10**weight * moment + keys @ keys.T, p=1))
    dense, cached = (ridge_update(keys, keys[:3], given_as, 10**weight) for given_as in (moment, factorize(moment)))
    lifted = 10 ** (condition * facts / (size - 1))
    assert 0.3 < dense.condition / true < 1.001
    assert 0.3 / size**0.5 < cached.condition / true < 2 * size**0.5 * lifted


def test_a_kept_factor_is_all_the_cubic_work(
    keys: Tensor, residuals: Tensor, moment: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    factored: list[int] = []
    plain = torch.linalg.cholesky_ex

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factored.append(len(matrix))
        return plain(matrix)

    factor = factorize(moment)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)
    ridge_update(keys, residuals, factor)
    equality_update(keys, residuals, factor)
    assert factored == [FACTS, FACTS]
    assert ridge_update(keys, residuals, factor).error < 1e-12
    ridge_update(keys, residuals, moment)
    assert factored == [FACTS, FACTS, FACTS, D_MLP]


# --- what is refused ---


def solvers(moment: Tensor) -> list[Callable[..., Update]]:
    space: NullSpace = null_space(moment, 0.3)
    return [
        lambda keys, residuals, **more: ridge_update(keys, residuals, moment, **more),
        lambda keys, residuals, **more: ridge_update(keys, residuals, factorize(moment), **more),
        lambda keys, residuals, **more: equality_update(keys, residuals, moment, **more),
        lambda keys, residuals, **more: null_space_update(keys, residuals, space, **more),
    ]


@pytest.mark.parametrize("which", ["keys", "residuals", "previous"])
def test_refuses_what_is_not_finite(
    which: str, keys: Tensor, residuals: Tensor, earlier: Tensor, moment: Tensor
) -> None:
    inputs = {"keys": keys, "residuals": residuals, "previous": earlier}
    for solver in solvers(moment):
        solver(**inputs)
    inputs[which][1, 2] = torch.nan
    for solver in solvers(moment):
        with pytest.raises(InputError, match=rf"the {which}.* of the linear system hold 1 values"):
            solver(**inputs)
    large = torch.full_like(keys, 1e308)
    check_finite("finite numbers whose sum is not", large)
    assert not large.sum().isfinite()
    moment[1, 2] = torch.inf
    for refused in (factorize, lambda matrix: ridge_update(keys, residuals, matrix)):
        with pytest.raises(InputError, match="entries of the second moment hold 1 values"):
            refused(moment)


def test_refuses_other_widths_and_no_facts(keys: Tensor, residuals: Tensor, moment: Tensor) -> None:
    for solver in solvers(moment)[1::2]:
        with pytest.raises(InputError, match=r"the keys have 11 entries each, expected 12"):
            solver(keys[1:], residuals)
        with pytest.raises(InputError, match=r"there are 0 keys and 0 residuals"):
            solver(keys[:, :0], residuals[:, :0])


def test_refuses_weights_below_zero(keys: Tensor, residuals: Tensor, moment: Tensor) -> None:
    for weight in (-1, float("nan")):
        with pytest.raises(InputError, match="weight of the second moment is"):
            ridge_update(keys, residuals, moment, weight)
        with pytest.raises(InputError, match="relaxation of the equality constraint is"):
            equality_update(keys, residuals, moment, relaxation=weight)
    with pytest.raises(InputError, match="weight of the null-space update is 0, expected a number above 0"):
        null_space_update(keys, residuals, null_space(moment, 0.3), weight=0)


def test_refuses_a_moment_of_too_few_tokens(keys: Tensor, residuals: Tensor) -> None:
    enough, few = random_matrix(D_MLP, D_MLP - FACTS, seed=5), random_matrix(D_MLP, D_MLP - FACTS - 1, seed=5)
    assert ridge_update(keys, residuals, enough @ enough.T).error < 1e-8
    with pytest.raises(InputError, match=r"breaks down at 12 of 12.*too few tokens"):
        ridge_update(keys, residuals, few @ few.T)
    with pytest.raises(InputError, match=r"second moment is not positive definite.*breaks down at (8|9) of 12"):
        factorize(few @ few.T)
    few[[3, 5]] = 0
    with pytest.raises(InputError, match=r"2 diagonal entries are not positive \(units that never fire\)"):
        factorize(few @ few.T, precision="mixed")


def test_refuses_what_is_no_moment(keys: Tensor, residuals: Tensor, moment: Tensor) -> None:
    with pytest.raises(InputError, match="not symmetric"):
        ridge_update(keys, residuals, random_matrix(D_MLP, D_MLP))
    with pytest.raises(InputError, match="not positive definite"):
        ridge_update(keys, residuals, -moment)
    with pytest.raises(InputError, match="is empty"):
        factorize(random_matrix(0, 0))


def test_refuses_an_answer_beyond_the_dtype_of_the_keys(keys: Tensor, residuals: Tensor, moment: Tensor) -> None:
    assert equality_update(keys.half(), residuals.half(), moment).left.isfinite().all()
    with pytest.raises(InputError, match=r"values of 48 that are not finite in torch.float16.*wider dtype"):
        equality_update(1e-6 * keys.half(), residuals.half(), moment)
