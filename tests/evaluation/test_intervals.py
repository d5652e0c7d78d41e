"""Intervals of rates, of magnitudes and of S: by the formula, by simulation, and never certain after a few cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from mechedit.evaluation import EvaluationConfig, Scores, summarize_cases
from mechedit.files import read_json, write_json
from mechedit.statistics import bootstrap_means, percentile_interval, rate_interval, wilson_interval

Z = 1.959963984540054
CONFIG = EvaluationConfig(resamples=500)


def resampled(cases: np.ndarray, resamples: int = 300) -> np.ndarray:
    return bootstrap_means(cases[:, None], seed=0, resamples=resamples)[:, 0]


def bootstrapped(cases: np.ndarray) -> tuple[float, float]:
    low, high = percentile_interval(resampled(cases)[:, None])
    return float(low[0]), float(high[0])


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_wilsons_interval_is_scipys(confidence: float) -> None:
    for n in (1, 2, 7, 20, 150):
        for successes in range(n + 1):
            expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
            assert wilson_interval(successes / n, n, confidence) == pytest.approx((expected.low, expected.high))


def test_wilsons_interval_by_hand() -> None:
    # 20 of 20: (20 + z²/2 ± z √(z²/4)) / (20 + z²) = 20 / (20 + z²) and 1.
    assert wilson_interval(1.0, 20) == pytest.approx((20 / (20 + Z**2), 1.0))
    assert wilson_interval(0.0, 20) == pytest.approx((0.0, Z**2 / (20 + Z**2)))
    # 15 of 20: its ends are the p at which |0.75 − p| = z √(p (1 − p) / 20).
    for end in wilson_interval(0.75, 20):
        assert abs(0.75 - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / 20))


@pytest.mark.parametrize("successes", [0, 20])
def test_twenty_of_twenty_is_not_certain(successes: int) -> None:
    cases = np.repeat([1.0, 0.0], [successes, 20 - successes])
    low, high = rate_interval(cases, resampled(cases))
    assert (low, high) == wilson_interval(successes / 20, 20)
    assert high - low > 0.15
    control = bootstrapped(cases)
    assert control[0] == control[1] == successes / 20, "the percentile bootstrap, which this replaces, was certain"


def test_a_magnitude_of_one_case_among_others_has_equal_ends() -> None:
    """Means of resamples that hold the case several times round otherwise than the case."""
    values = np.full((3, 2), np.nan)
    values[:, 0], values[0, 1] = (0.1, 0.2, 0.3), 0.0014450582666751
    draws = bootstrap_means(values, seed=0, resamples=500)[:, 1]
    assert len(np.unique(draws[~np.isnan(draws)])) > 1, "the control: they do"
    summary = summarize_cases(values, ("ES", "NM"), CONFIG)
    assert summary["NM"]["low"] == summary["NM"]["mean"] == summary["NM"]["high"]
    assert summary["ES"]["low"] < summary["ES"]["high"]


@pytest.mark.parametrize("rate", [0.5, 0.9, 0.97])
def test_wilsons_interval_covers_the_truth(rate: float) -> None:
    generator = np.random.default_rng(0)
    samples = generator.binomial(1, rate, size=(1000, 20)).astype(float)
    ends = np.array([wilson_interval(float(cases.mean()), 20) for cases in samples])
    covered = (ends[:, 0] <= rate) & (rate <= ends[:, 1])
    assert 0.94 <= covered.mean() < 0.995


def test_the_percentile_bootstrap_of_a_high_rate_does_not() -> None:
    samples = np.random.default_rng(0).binomial(1, 0.97, size=(200, 20)).astype(float)
    ends = np.array([bootstrapped(cases) for cases in samples])
    assert ((ends[:, 0] <= 0.97) & (ends[:, 1] >= 0.97)).mean() < 0.6


@pytest.mark.parametrize("agreement", [0.5, 5.0])
def test_rates_of_cases_with_many_prompts_are_about_covered(agreement: float) -> None:
    """Each case has a rate of its own, drawn with mean 0.9: with 0.5 its ten prompts mostly agree, with 5 hardly."""
    generator = np.random.default_rng(1)
    chances = generator.beta(0.9 * agreement, 0.1 * agreement, size=(300, 20))
    samples = generator.binomial(10, chances) / 10
    ends = np.array([rate_interval(cases, resampled(cases)) for cases in samples])
    assert 0.84 <= ((ends[:, 0] <= 0.9) & (ends[:, 1] >= 0.9)).mean() <= 0.98
    assert (ends[:, 0] < ends[:, 1]).all()


def test_fractions_are_resampled_and_fractions_that_agree_count_once_a_case() -> None:
    cases = np.array([0.5, 1.0, 0.75, 1.0, 1.0, 0.0])
    assert rate_interval(cases, resampled(cases)) == bootstrapped(cases)
    agreeing = np.full(6, 0.5)
    assert rate_interval(agreeing, resampled(agreeing)) == wilson_interval(0.5, 6)


def scores(values: dict[str, list[float]]) -> Scores:
    """One prompt per case and measure."""
    rows = [
        (str(case), measure, "rewrite", 0, value, "after")
        for measure, cases in values.items()
        for case, value in enumerate(cases)
    ]
    table = pd.DataFrame(rows, columns=["case", "measure", "kind", "prompt", "value", "state"])
    answers = pd.DataFrame(columns=["case", "kind", "prompt", "question", "expected", "answer", "state"])
    cases = tuple(map(str, range(len(next(iter(values.values()))))))
    return Scores(table=table, answers=answers, cases=cases, config=CONFIG, provenance={"after": {}})


def test_s_is_not_certain_where_its_rates_are_not() -> None:
    whole = scores({"ES": [1.0] * 20, "PS": [1.0] * 20, "NS": [1.0] * 20}).summary()
    low = 100 * 20 / (20 + Z**2)
    for name in ("ES", "PS", "NS", "S"):
        assert whole[name] == {"mean": 100.0, "low": pytest.approx(low), "high": pytest.approx(100.0), "n": 20}
    # ES fails everywhere, so S is 0 in every resample, whatever NS does; at ES's upper end it is not.
    mixed = scores({"ES": [0.0] * 20, "PS": [1.0] * 20, "NS": [1.0] * 10 + [0.0] * 10}).summary()
    tops = [float(mixed[name]["high"]) for name in ("ES", "PS", "NS")]
    assert mixed["S"]["low"] == mixed["S"]["mean"] == 0
    assert mixed["S"]["high"] == pytest.approx(3 / sum(1 / top for top in tops))


def test_s_is_a_percentile_bootstrap_where_cases_differ() -> None:
    """Nine cases: their names sort as they were made, so the resamples are the same ones."""
    generator = np.random.default_rng(0)
    values = {name: generator.binomial(1, 0.7, 9).astype(float) for name in ("ES", "PS", "NS")}
    draws = bootstrap_means(np.column_stack(list(values.values())), seed=CONFIG.seed, resamples=CONFIG.resamples)
    with np.errstate(divide="ignore"):  # a resample without success has S = 3 / ∞
        low, high = percentile_interval((100 * 3 / (1 / draws).sum(1))[:, None])
    entry = scores({name: cases.tolist() for name, cases in values.items()}).summary()["S"]
    assert (entry["low"], entry["high"]) == pytest.approx((low[0], high[0]))


def test_a_magnitude_that_is_the_same_everywhere_has_an_interval_of_width_0(tmp_path: Any) -> None:
    varied = scores({"EM": [0.1, 0.4, 0.2], "KL": [0.0, 0.0, 0.0]}).summary()
    assert varied["KL"] == {"mean": 0.0, "low": 0.0, "high": 0.0, "n": 3}
    assert varied["EM"]["low"] < varied["EM"]["mean"] < varied["EM"]["high"]
    alone = scores({"EM": [0.25]}).summary()
    assert alone["EM"] == {"mean": 25.0, "low": 25.0, "high": 25.0, "n": 1}
    write_json(tmp_path / "summary.json", alone)
    assert read_json(tmp_path / "summary.json") == alone


def test_percent_in_gives_the_same_summary() -> None:
    values = np.random.default_rng(0).binomial(2, 0.8, size=(12, 3)) / 2
    names = ["ES", "PS", "NS"]
    plain = summarize_cases(values, names, CONFIG, score="S", score_measures=names)
    percent = summarize_cases(100 * values, names, CONFIG, score="S", score_measures=names, in_percent=True)
    assert list(percent) == list(plain) == [*names, "S"]
    for name, entry in plain.items():
        assert percent[name] == pytest.approx(entry)


def test_the_protocol_says_how() -> None:
    text = scores({"ES": [1.0, 0.0]}).protocol["definitions"]["intervals"]
    for word in ("Wilson", "bootstrap", "harmonic", "width"):
        assert word in text
