"""Approximate traces: estimates are exact to first order, hold against exact cells, and averages are unbiased."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
import torch

import mechedit as me
from mechedit import Fact, InputError, TraceConfig, trace_facts
from mechedit.cli.app import LONGEST_LINE
from mechedit.statistics import spearman
from mechedit.trace import (
    APPROXIMATE_COLUMNS,
    Approximation,
    approximate,
    average_effects,
    read_effects,
    run_clean_and_corrupted,
    tokenize_fact,
)
from mechedit.trace.agreement import Agreement, DisagreementError, check_agreement, measure_agreement
from mechedit.trace.approximation import draw_cells
from mechedit.trace.attribution import SCALES, estimate_cells
from mechedit.trace.averages import corrected_effects
from mechedit.trace.cells import all_cells, can_change, corrupted_scores, trace_cells
from mechedit.trace.folder import trace_to_folder

FACT = Fact(id="f", subject="Leon Blum", prompt="The mother tongue of {} is the", object="Korean guitar")
FACTS = [
    Fact(id=name, subject=name, prompt="The mother tongue of {} is the", object="Korean")
    for name in ("Leon Blum", "Miles Davis", "Toko Yasuda", "LeBron James", "Edwin", "Apple")
]
KEYS = ["fact", "kind", "sever", "layer", "position", "metric"]
ANY = Approximation(least_correlation=0, exact_cells=20, exact_facts=2)


def margin(inputs):
    """A metric that does not saturate, with as many digits as the logits have."""
    first = inputs.logits[:, 0].double()
    return first.gather(1, inputs.objects[:, :1])[:, 0] - first.gather(1, inputs.foils[:, None])[:, 0]


@torch.no_grad()
def both_effects(model, std, *, points=1, metric=margin, **changes):
    """Estimated and exact effects of all cells that can change, one row a cell."""
    config = TraceConfig(samples=2, metrics=(metric,), approximation=ANY, **changes)
    runs = run_clean_and_corrupted(model, [tokenize_fact(model, FACT)], std, config)
    cells = [c for c in all_cells(runs) if can_change(runs.facts[0], c.position, c.first, model.n_layers)]
    estimates, exact, (corrupted,) = (
        estimate_cells(runs, cells, points),
        trace_cells(runs, cells),
        corrupted_scores(runs),
    )
    (name,) = corrupted
    frame = pd.DataFrame([dataclasses.asdict(cell) for cell in cells])
    frame["estimate"] = [estimates[cell][name] - corrupted[name] for cell in cells]
    frame["effect"] = [exact[cell][name] - corrupted[name] for cell in cells]
    frame["role"] = [runs.facts[0].roles[cell.position] for cell in cells]
    return frame


def error(frame, estimate="estimate"):
    """Largest miss as a part of the largest effect, within each kind and severing; the worst of them."""
    groups = frame.groupby(["kind", "sever"])
    return max(float((rows[estimate] - rows["effect"]).abs().max() / rows["effect"].abs().max()) for _, rows in groups)


@pytest.mark.parametrize("points", [1, 2])
def test_an_estimate_is_exact_to_first_order(small_model, points):
    settings = {"window": 1, "points": points, "sever": ("nothing", "mlp", "attn")}
    near, far, large = (both_effects(small_model, std, **settings) for std in (0.02, 0.04, 1.5))
    assert error(near) < 0.03
    assert error(near) < 0.7 * error(far), "the miss must fall with the noise"
    # Control: with the noise that traces use, first order is not enough.
    assert error(large) > 0.2


@torch.no_grad()
@pytest.mark.parametrize("metric", ["probability", margin], ids=["read off states", "read off logits"])
def test_noise_samples_are_dealt_over_points(small_model, metric):
    traced = tokenize_fact(small_model, FACT)
    shape = 2, len(traced.subject), small_model.d_model
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def estimates(points, samples, **options):
        config = TraceConfig(samples=len(samples), metrics=(metric,), window=2, approximation=ANY)
        runs = run_clean_and_corrupted(small_model, [traced], 1.0, config, noise=lambda *_: noise[samples])
        cells = [c for c in all_cells(runs) if can_change(traced, c.position, c.first, small_model.n_layers)]
        return np.array(
            [*map(lambda scores: next(iter(scores.values())), estimate_cells(runs, cells, points, **options).values())]
        )

    first, second = estimates(1, [0]), estimates(1, [1])
    half_way = 2 * estimates(2, [1]) - second  # of one sample, the mean over both points
    dealt = estimates(2, [0, 1])
    np.testing.assert_allclose(dealt, (first + half_way) / 2, rtol=1e-4, atol=1e-6)
    every = estimates(2, [0, 1], all_samples=True)
    np.testing.assert_allclose(every, (estimates(2, [0]) + estimates(2, [1])) / 2, rtol=1e-4, atol=1e-6)
    # Control: all samples at one point, or dealt the other way, are something else.
    other = (2 * estimates(2, [0]) - first + second) / 2
    assert min(np.abs(dealt - wrong).max() for wrong in ((first + second) / 2, other)) > 1e-3 * np.abs(dealt).max()


@torch.no_grad()
def test_each_sample_takes_one_gradient_however_many_points(small_model, monkeypatch):
    rows = []
    real = small_model.run

    def counted(tokens, *args, **kwargs):
        if torch.is_grad_enabled():
            rows.append(len(tokens.ids))
        return real(tokens, *args, **kwargs)

    config = TraceConfig(samples=4, kinds=("state",), approximation=ANY)
    runs = run_clean_and_corrupted(small_model, [tokenize_fact(small_model, FACT)], 1.0, config)
    monkeypatch.setattr(small_model, "run", counted)
    for points, expected in ((1, [4]), (2, [2, 2]), (3, [2, 1, 1]), (6, [1] * 6)):
        rows.clear()
        estimate_cells(runs, all_cells(runs), points)
        assert rows == expected
        rows.clear()
        estimate_cells(runs, all_cells(runs), points, all_samples=True)
        assert rows == [4] * points


@torch.no_grad()
def test_a_metric_without_a_gradient_cannot_be_estimated(small_model):
    def is_right(answers):
        return (answers.logits[:, 0].argmax(-1) == answers.objects[:, 0]).float()

    def detached(answers):
        return answers.logits[:, 0, 7].detach()

    for metric in (is_right, detached, margin):
        config = TraceConfig(samples=2, kinds=("state",), metrics=(metric,), approximation=ANY)
        runs = run_clean_and_corrupted(small_model, [tokenize_fact(small_model, FACT)], 1.0, config)
        if metric is margin:
            assert estimate_cells(runs, all_cells(runs)), "the control"
            continue
        with pytest.raises(InputError, match=f"metric '{metric.__name__}' has no gradient.*without approximation"):
            estimate_cells(runs, all_cells(runs))


@pytest.fixture
def exact_model(make_model, monkeypatch, request):
    """A random model in float64, also inside norms, so that what is small is not lost in rounding."""
    to = torch.Tensor.to

    def not_down(x, *args, **kwargs):
        return x if x.dtype == torch.float64 and args == (torch.float32,) else to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", not_down)
    monkeypatch.setattr(torch.Tensor, "float", lambda x: not_down(x, torch.float32))
    model = make_model(request.param, "nnsight")
    way = model.fast_engine.way
    model.hf.double()
    assert model.fast_engine.prepare(way)
    assert model.dtype == torch.float64
    return model


@pytest.mark.parametrize("exact_model", ["gpt2", "llama", "gemma", "gemma3"], indirect=True)
@pytest.mark.parametrize("points", [1, 2])
def test_the_slope_tends_to_one_as_the_difference_shrinks(exact_model, points):
    settings = {"window": 1, "points": points, "sever": ("nothing", "mlp", "attn"), "roles": ("subject_last",)}
    far, near = (slopes(both_effects(exact_model, std, **settings)) for std in (1e-4, 1e-5))
    assert len(near) == 3 * 3, "state, MLP and attention, whole and with either severed"
    assert near == pytest.approx(1, abs=2e-3)
    # What is missing is of the second order: a tenth of the difference leaves about a tenth of it.
    assert np.abs(near - 1).max() < 0.2 * np.abs(far - 1).max()
    # Control: over the differences that traces restore, effects are no straight lines.
    assert np.abs(slopes(both_effects(exact_model, 1.5, **settings)) - 1).max() > 0.1


def slopes(frame):
    """By how much exact effects grow with their estimates, for every kind and severing."""
    return np.array(
        [
            (rows["estimate"] * rows["effect"]).sum() / (rows["estimate"] ** 2).sum()
            for _, rows in frame.groupby(["kind", "sever"])
        ]
    )


@pytest.mark.parametrize("exact_model", ["gpt2", "gemma3"], indirect=True)
@pytest.mark.parametrize("sever", ["mlp", "attn"])
def test_the_gradient_stops_at_severed_modules(exact_model, sever):
    settings = {"kinds": ("state",), "sever": ("nothing", sever, f"{sever}@1"), "roles": ("subject_last",)}
    frame = both_effects(exact_model, 1e-5, **settings)
    assert error(frame) < 2e-3
    # Control: the estimate of the unsevered model misses the severed effect.
    by_layer = frame.pivot_table(index="layer", columns="sever", values=["estimate", "effect"])
    unsevered, severed = by_layer["estimate"]["nothing"], by_layer["effect"][sever]
    assert (unsevered - severed).abs().max() > 0.05 * severed.abs().max()


@pytest.mark.parametrize("window", [2, 3])
def test_a_window_leaves_out_paths_between_its_own_mlps(small_model, window):
    frame = both_effects(small_model, 0.02, kinds=("mlp",), window=window)
    assert error(frame) < 0.03
    # Control: the sum of the layers' own estimates counts those paths twice.
    single = both_effects(small_model, 0.02, kinds=("mlp",), window=1).set_index(["layer", "position"])["estimate"]
    frame["summed"] = [
        sum(single.get((layer, row.position), 0.0) for layer in range(row.first, row.stop))
        for row in frame.itertuples()
    ]
    wide = frame[frame["stop"] - frame["first"] == window]
    assert error(wide, "summed") > 2 * error(wide)


def test_attention_windows_are_estimated_too(small_model):
    # To first order up to a token's attention to itself, which the estimate counts although it is restored.
    assert error(both_effects(small_model, 0.02, kinds=("attn",), window=3)) < 0.1


def test_a_probability_is_never_estimated_outside_what_it_can_be(small_model):
    frame = both_effects(small_model, 1.5, metric="probability", window=1)
    assert frame["estimate"].abs().max() < 1
    scale = SCALES["probability"]
    corrupted, clean = torch.tensor([-5.0, 2.0]), torch.tensor([3.0, -1.0])
    change = torch.tensor([[[1e-3, 1e3, -1e3]], [[1e-3, 1e3, -1e3]]])
    scores = scale.moved(corrupted, clean, change)
    small, reached = scores[:, 0, 0], torch.sigmoid(torch.tensor([[3.0, -13.0], [5.0, -1.0]]))
    torch.testing.assert_close(small, torch.sigmoid(corrupted + 1e-3), rtol=1e-5, atol=0)
    torch.testing.assert_close(scores[:, 0, 1:], reached)


def test_an_approximate_trace_holds_exact_cells_and_estimates(small_model):
    known = made_known(small_model)
    config = TraceConfig(samples=2, window=2, sever=("nothing", "mlp"))
    exact = trace_facts(small_model, known, config)
    approximate = trace_facts(small_model, known, dataclasses.replace(config, approximation=ANY))
    assert list(approximate.columns) == [*exact.columns, *APPROXIMATE_COLUMNS]
    joined = exact.merge(approximate, on=KEYS, suffixes=("", "_approximate"), validate="1:1")
    assert len(joined) == len(exact) == len(approximate)
    traced = joined["exact"]
    assert 0 < traced.mean() < 1
    np.testing.assert_allclose(joined["effect_approximate"][traced], joined["effect"][traced], atol=1e-6)
    assert (joined["effect_approximate"] == joined["estimate"])[~traced].all()
    # Control: what was not traced is not exact.
    assert (joined["estimate"] - joined["effect"])[~traced].abs().max() > 1e-3 * joined["effect"].abs().max()
    # The statement of agreement can be read off the table.
    for record in approximate.attrs["agreement"]:
        rows = approximate[
            (approximate["kind"] == record["kind"]) & (approximate["sever"] == record["sever"]) & approximate["drawn"]
        ]
        assert rows["exact"].all()
        assert record["cells"] == len(rows) == ANY.exact_cells
        rounding = 1e-5 * rows["score"].abs().max()
        assert record["rounding"] == pytest.approx(rounding)
        ranked = [[value if abs(value) > rounding else 0 for value in rows[name]] for name in ("estimate", "effect")]
        correlation = pd.Series(ranked[0]).corr(pd.Series(ranked[1]), method="spearman")
        assert record["correlation"] == pytest.approx(correlation)
        assert record["largest_miss"] == pytest.approx((rows["estimate"] - rows["effect"]).abs().max())


def made_known(model):
    """Facts whose objects are what the model says."""
    with torch.no_grad():
        known = []
        for fact in FACTS:
            traced = tokenize_fact(model, fact)
            run = model.run(me.Tokens(torch.tensor([traced.ids]), torch.ones(1, len(traced.ids), dtype=torch.long)))
            answer = model.tokenizer.decode([run.logits[0, traced.prompt_length - 1].argmax().item()])
            known.append(dataclasses.replace(fact, object=answer))
    return [fact for fact in known if fact.object.strip()]


@pytest.fixture
def known(small_model):
    return made_known(small_model)


def test_estimates_that_do_not_rank_cells_are_refused(small_model, known, monkeypatch):
    config = TraceConfig(samples=2, kinds=("state",), approximation=dataclasses.replace(ANY, least_correlation=0.5))
    assert trace_facts(small_model, known, config).attrs["agreement"][0]["correlation"] > 0.5
    # The same trace, with estimates that say nothing about effects.
    monkeypatch.setattr(
        "mechedit.trace.approximate.estimate_cells",
        lambda runs, cells, points, *, all_samples: {
            cell: {"probability": hash((cell.layer * 31 + cell.position) ** 3) % 101 / 101} for cell in cells
        },
    )
    with pytest.raises(InputError, match=r"state.*nothing severed.*rank correlation .* on 20 cells.*at least 0\.5"):
        trace_facts(small_model, known, config)


def drawn_rows(effects, estimates):
    """Drawn cells of one kind and severing whose scores are about 0.5."""
    rows = {"kind": "state", "sever": "attn:last", "metric": "probability", "drawn": True}
    return pd.DataFrame({**rows, "effect": effects, "estimate": estimates, "score": 0.5 + np.asarray(effects)})


def test_ranks_among_roundings_count_for_nothing():
    generator = np.random.default_rng(0)
    large, noise = np.array([0.3, -0.2, 0.1]), generator.normal(size=(2, 37)) * 1e-8
    effects, estimates = np.append(large, noise[0]), np.append(large * 0.7, noise[1])
    assert spearman(effects[None], estimates[None])[0] < 0.5, "the control: by all ranks they disagree"
    (agreement,) = measure_agreement([drawn_rows(effects, estimates)])
    assert agreement.correlation == pytest.approx(1)
    assert agreement.holds(0.99)
    # Where nothing but rounding is there, no rank is, and no estimate misses.
    (agreement,) = measure_agreement([drawn_rows(noise[0], noise[1])])
    assert np.isnan(agreement.correlation)
    assert agreement.holds(0.99)
    assert "no more than rounding" in agreement.in_words()
    check_agreement([agreement], Approximation(least_correlation=0.99))
    # An effect that the estimates do not see is no rounding.
    (agreement,) = measure_agreement([drawn_rows(np.append(0.01, noise[0]), np.append(0.0, noise[1]))])
    assert not agreement.holds(0.1)
    with pytest.raises(DisagreementError, match="nan"):
        check_agreement([agreement], Approximation(least_correlation=0.1))


def test_a_severing_that_leaves_no_path_is_not_refused(small_model, known):
    roles = ("subject_first", "subject_last")
    approximation = dataclasses.replace(ANY, least_correlation=0.9)
    config = TraceConfig(samples=2, kinds=("state",), sever=("attn:last",), roles=roles, approximation=approximation)
    effects = trace_facts(small_model, known, config)
    assert effects["effect"].abs().max() < 1e-5 * effects["score"].max()
    with pytest.raises(InputError, match="rank correlation"):  # the control: with paths, ranks are held to the bound
        trace_facts(small_model, known, dataclasses.replace(config, sever=("attn:further",)))


def test_a_refusal_states_all_that_fail_in_one_line():
    sizes = {"largest_miss": 0.1234, "mean_miss": 0.0123, "mean_effect": 0.00123, "metric": "normalized_probability"}
    agreements = [
        Agreement(kind=kind, sever=sever, correlation=correlation, cells=2000, **sizes)
        for kind in ("state", "mlp", "attn")
        for sever, correlation in (("mlp", 0.2), ("attn", 0.1), ("nothing", 0.9))
    ]
    severed = "attention severed 0.100/12%, MLP severed 0.200/12%"
    with pytest.raises(InputError) as raised:
        check_agreement(agreements, Approximation(least_correlation=0.5))
    assert f"(single state: {severed}; MLP window: {severed}; attention window: {severed}; rank" in str(raised.value)
    assert len(str(raised.value)) < LONGEST_LINE
    nan = dataclasses.replace(agreements[-1], correlation=float("nan"), metric="kl", cells=20)
    with pytest.raises(InputError) as raised:
        check_agreement([*agreements, nan], Approximation(least_correlation=0.5))
    assert f"attention window, normalized_probability: {severed}; " in str(raised.value)
    assert "; attention window, kl: nothing severed nan/0.12 nats; rank" in str(raised.value)
    assert "on 20 to 2000 cells" in str(raised.value)


def test_a_refusal_states_what_fails_with_nothing_severed_and_with_modules_severed(small_model, known, tmp_path):
    approximation = dataclasses.replace(ANY, least_correlation=0.9999)
    config = TraceConfig(samples=2, kinds=("state",), sever=("nothing", "mlp", "attn"), approximation=approximation)
    with pytest.raises(DisagreementError) as raised:
        trace_to_folder(small_model, known, config, tmp_path)
    assert [agreement.sever for agreement in raised.value.agreements] == ["nothing", "mlp", "attn"]
    for agreement in raised.value.agreements:
        assert f"{agreement.sever.replace('attn', 'attention').replace('mlp', 'MLP')} severed" in str(raised.value)
        assert f"{agreement.correlation:.3f}/" in str(raised.value)


def test_a_refused_trace_writes_no_effects_and_is_resumed(small_model, known, tmp_path, monkeypatch):
    config = TraceConfig(samples=2)
    strict = dataclasses.replace(ANY, least_correlation=0.9999)
    with pytest.raises(InputError, match="rank correlation"):
        trace_to_folder(small_model, known, dataclasses.replace(config, approximation=strict), tmp_path)
    assert not (tmp_path / "effects.parquet").exists()
    groups = len(list((tmp_path / "trace_parts").glob("*.parquet")))
    assert groups > 0

    # What was traced serves a trace that asks for less agreement: no group runs again.
    def refuse(*_):
        raise RuntimeError("a group runs")

    monkeypatch.setattr("mechedit.trace.trace.approximate_group", refuse)
    attrs = trace_to_folder(small_model, known, dataclasses.replace(config, approximation=ANY), tmp_path)
    assert [record["kind"] for record in attrs["agreement"]] == ["state", "mlp", "attn"]
    assert set(APPROXIMATE_COLUMNS) < set(read_effects(tmp_path / "effects.parquet").columns)
    # Control: what this trace left is no other draw's.
    with pytest.raises(RuntimeError, match="a group runs"):
        trace_to_folder(small_model, known, dataclasses.replace(config, seed=1, approximation=ANY), tmp_path)


def test_groups_of_another_algorithm_of_estimates_are_traced_again(small_model, known, tmp_path, monkeypatch):
    config = TraceConfig(samples=2, kinds=("state",), approximation=ANY)
    trace_facts(small_model, known, config, parts=tmp_path)
    counted = []
    real = approximate.approximate_group
    monkeypatch.setattr("mechedit.trace.trace.approximate_group", lambda *args: counted.append(args) or real(*args))
    trace_facts(small_model, known, config, parts=tmp_path)
    assert not counted
    exact = dataclasses.replace(config, approximation=None).plain()
    monkeypatch.setitem(me.provenance.ALGORITHMS, "estimates", 1)
    trace_facts(small_model, known, config, parts=tmp_path)
    assert counted, "old estimates stand for new ones"
    assert dataclasses.replace(config, approximation=None).plain() == exact, "an exact trace is not concerned"


def test_an_interrupted_trace_gives_what_an_uninterrupted_one_gives(small_model, known, tmp_path, monkeypatch):
    config = TraceConfig(samples=2, batch_rows=2, kinds=("state",), approximation=ANY)
    expected = trace_facts(small_model, known, config)
    parts, finished = tmp_path / "parts", []
    real = approximate.approximate_group

    def interrupted(*args):
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(args)
        return real(*args)

    monkeypatch.setattr("mechedit.trace.trace.approximate_group", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trace_facts(small_model, known, config, parts=parts)
    monkeypatch.setattr("mechedit.trace.trace.approximate_group", real)
    resumed = trace_facts(small_model, known, config, parts=parts)
    pd.testing.assert_frame_equal(pd.DataFrame(resumed), pd.DataFrame(expected), check_exact=False, atol=1e-7)
    for record, before in zip(resumed.attrs["agreement"], expected.attrs["agreement"], strict=True):
        assert record == pytest.approx(before)


def test_corrected_averages_are_exact_on_average_over_draws():
    """Twelve facts with known effects and biased estimates; every draw of three of them, each as likely."""
    rng = np.random.default_rng(0)
    effect = rng.normal(size=12)
    estimate = 0.5 * effect + 0.3 + 0.1 * rng.normal(size=12)
    plain, corrected = [], []
    for drawn in itertools.combinations(range(12), 3):
        exact = np.isin(np.arange(12), drawn)
        frame = pd.DataFrame({"estimate": estimate, "effect": np.where(exact, effect, estimate), "chance": 3 / 12})
        plain.append(frame["effect"].mean())
        corrected.append(corrected_effects(frame).mean())
    assert np.mean(corrected) == pytest.approx(effect.mean(), abs=1e-12)
    # Control: without correction the estimates' bias stays.
    assert abs(np.mean(plain) - effect.mean()) > 0.1


def test_averages_at_the_last_subject_token_are_exact_where_all_facts_are_drawn(small_model, known):
    config = TraceConfig(samples=2, kinds=("state",), roles=("subject_last", "last"))
    every = dataclasses.replace(ANY, largest=0, exact_facts=len(known))
    few = dataclasses.replace(every, exact_facts=2)
    expected, corrected, two = (
        average_effects(trace_facts(small_model, known, dataclasses.replace(config, approximation=approximation)))
        .query("role == 'subject_last'")["mean"]
        .to_numpy()
        for approximation in (None, every, few)
    )
    np.testing.assert_allclose(corrected, expected, atol=1e-7)
    # Control: where few are drawn, they are not the exact ones.
    assert np.abs(two - expected).max() > 1e-4 * np.abs(expected).max()


def test_cells_are_drawn_with_the_probabilities_that_correct_averages():
    sizes = {"a": 3, "b": 7, "c": 10, "d": 20}
    cells_of = {
        fact: {("mlp", "nothing"): [("mlp", "nothing", layer, 0) for layer in range(size)]}
        for fact, size in sizes.items()
    }
    draws = [draw_cells(cells_of, ANY, seed) for seed in range(400)]
    assert draws[0] != draws[1]
    assert draws[0] == draw_cells(cells_of, ANY, 0)
    for fact, size in sizes.items():
        assert draws[0][fact].cell_chances["mlp", "nothing"] == 20 / 40
        assert np.mean([len(draw[fact].cells) for draw in draws]) == pytest.approx(size / 2, rel=0.1)
        assert np.mean([draw[fact].fact for draw in draws]) == pytest.approx(draws[0][fact].fact_chance, abs=0.1)
