"""The figures of a search show what was tried, and the choice."""

from __future__ import annotations

from typing import Any

import pytest

from mechedit import InputError
from mechedit.figures import draw, plot_tuned_setting, plot_tuned_windows, tuning_figures


def trial(stage: str, layers: list[int], score: float, facts: int = 24, **settings: float) -> dict[str, Any]:
    return {
        "stage": stage, "layers": layers, "settings": settings, "facts": facts, "score": score,
        "exact_match": score - 5, "objective": score + score / 10,
    }  # fmt: skip


RECORD = {
    "layers": [2, 3, 4],
    "settings": {"relative_covariance_weight": 0.03, "relative_lr": 0.2},
    "begun_with": {"relative_covariance_weight": 0.1, "relative_lr": 0.2},
    "chosen": trial("relative_covariance_weight", [2, 3, 4], 91.0, relative_covariance_weight=0.03),
    "unedited": {"S": {"mean": 30.0}},
    "trials": [
        trial("windows", [0, 1, 2], 70.0, facts=12),
        trial("windows", [2, 3, 4], 80.0, facts=12),
        trial("windows", [2, 3, 4], 78.0, facts=12, relative_covariance_weight=0.03),
        trial("windows", [2, 3, 4], 85.0),
        trial("windows", [4, 5, 6], 60.0),
        trial("relative_covariance_weight", [2, 3, 4], 91.0, relative_covariance_weight=0.03),
        trial("relative_covariance_weight", [2, 3, 4], 50.0, relative_covariance_weight=1.0),
        trial("relative_lr", [2, 3, 4], 20.0, relative_covariance_weight=0.03, relative_lr=0.4),
    ],
}


def legends(figure: Any) -> list[Any]:
    return [*figure.legends, *filter(None, (ax.get_legend() for ax in figure.axes))]


def lines(figure: Any) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in figure.axes[0].lines
    }


def test_windows_are_drawn_at_their_ends_with_the_best_weight_of_each() -> None:
    drawn = lines(draw(lambda ax: plot_tuned_windows(RECORD, ax)))
    assert drawn["12 facts"] == [(2, 70.0), (4, 80.0)]
    assert drawn["24 facts"] == [(4, 85.0), (6, 60.0)]
    assert drawn["unedited"][0][1] == 30.0


def test_a_setting_is_drawn_by_its_value_the_one_it_began_with_included() -> None:
    drawn = lines(draw(lambda ax: plot_tuned_setting(RECORD, "relative_covariance_weight", ax)))
    assert drawn["score"] == [(0.03, 91.0), (0.1, 85.0), (1.0, 50.0)]
    assert drawn["exact match"] == [(0.03, 86.0), (0.1, 80.0), (1.0, 45.0)]
    drawn = lines(draw(lambda ax: plot_tuned_setting(RECORD, "relative_lr", ax)))
    assert drawn["score"] == [(0.2, 91.0), (0.4, 20.0)]


def test_the_choice_is_named_and_one_in_another_unit_is_a_line() -> None:
    figure = draw(lambda ax: plot_tuned_windows(RECORD, ax))
    assert "chosen: 2–4" in {text.get_text() for legend in legends(figure) for text in legend.get_texts()}
    settings = {"covariance_weight": 15000, "relative_lr": 0.2}
    absolute = {**RECORD, "settings": settings, "begun_with": {"covariance_weight": 15000, "relative_lr": 0.2}}
    drawn = lines(draw(lambda ax: plot_tuned_setting(absolute, "relative_covariance_weight", ax)))
    assert drawn["score of the chosen λ = 15000 (units of one fact)"][0][1] == 91.0
    assert not [
        name for name in lines(draw(lambda ax: plot_tuned_setting(RECORD, "relative_lr", ax))) if "chosen" in name
    ]


def test_every_setting_with_two_values_has_a_figure() -> None:
    assert set(tuning_figures(RECORD)) == {"tuned_windows", "tuned_relative_covariance_weight", "tuned_relative_lr"}
    with pytest.raises(InputError, match="clamp was tried with 0 values"):
        draw(lambda ax: plot_tuned_setting(RECORD, "clamp", ax))
    with pytest.raises(InputError, match="no trials of windows"):
        draw(lambda ax: plot_tuned_windows({**RECORD, "trials": []}, ax))
