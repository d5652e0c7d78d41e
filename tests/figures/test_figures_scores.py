"""Scores against a setting: what is drawn is what the table holds."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from mechedit.errors import InputError
from mechedit.figures import METHOD_COLORS, line_styles, plot_scores_against, save_figure, scores_figure

MEASURES = ("ES", "PS", "NS", "S", "GE")


def make_scores(settings, methods=("memit", "rome"), measures=MEASURES, name="edits"):
    """Means that are all different, and intervals that are not symmetric."""
    return pd.DataFrame(
        [
            {name: x, "method": method, "measure": measure, "mean": mean, "low": mean - 3, "high": mean + 1, "n": 10}
            for i, x in enumerate(settings)
            for j, method in enumerate(methods)
            for k, measure in enumerate(measures)
            for mean in [20.0 + 5 * i + 11 * j + 2 * k]
        ]
    )


@pytest.fixture
def ax():
    return Figure().subplots()


def lines(ax):
    """The points of each line by its name."""
    return {line.get_label(): line.get_xydata() for line in ax.lines if not line.get_label().startswith("_")}


def test_points_and_bands_are_the_rows_in_order_of_the_setting(ax):
    table = make_scores([1, 10, 100]).iloc[::-1]  # the order of rows does not matter
    plot_scores_against(table, ax, x="edits", measure="PS", log=True)
    drawn = lines(ax)
    np.testing.assert_allclose(drawn["memit"], [[1, 22], [10, 27], [100, 32]])
    np.testing.assert_allclose(drawn["rome"], [[1, 33], [10, 38], [100, 43]])
    bands = {tuple(band.get_facecolor()[0][:3]): band.get_paths()[0].get_extents() for band in ax.collections}
    memit = bands[mpl.colors.to_rgb(METHOD_COLORS["memit"])]
    assert (memit.y0, memit.y1) == (22 - 3, 32 + 1)
    assert ax.get_xscale() == "log"


def test_a_setting_without_a_number_has_places_in_order_of_appearance(ax):
    table = make_scores(["3-8", "1-4", "0"], name="layers")
    plot_scores_against(table, ax, x="layers", measure="ES")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["3-8", "1-4", "0"]
    segments = [container.lines[2][0].get_segments() for container in ax.containers]
    assert [tuple(s[:, 1]) for s in segments[0]] == [(17, 21), (22, 26), (27, 31)]
    at = [container.lines[0].get_xdata() for container in ax.containers]
    assert all(np.round(places).tolist() == [0, 1, 2] for places in at)
    assert not np.allclose(at[0], at[1])  # bars of two methods do not hide one another


@pytest.mark.parametrize(("layers", "whole"), [([0, 1, 2, 3], True), ([0.0, 1.5, 3.0], False)])
def test_ticks_stand_at_layers_and_not_between_them(ax, layers, whole):
    plot_scores_against(make_scores(layers, name="layer"), ax, x="layer", measure="ES")
    assert all(tick == round(tick) for tick in ax.get_xticks()) == whole


@pytest.mark.parametrize(("measure", "least", "bottom"), [("PM", -80.0, -100), ("PM", 10.0, 0), ("PS", 0.0, 0)])
def test_a_difference_below_zero_is_drawn(ax, measure, least, bottom):
    table = make_scores([1, 2], measures=(measure,))
    table.loc[0, "mean"] = least
    plot_scores_against(table, ax, x="edits", measure=measure)
    assert ax.get_yticks().min() == bottom
    assert ax.get_ylim()[0] < min(least, 0)


def test_rows_without_a_setting_are_level_lines(ax):
    table = make_scores([1.0, 10.0], methods=("memit",))
    table = pd.concat([table, make_scores([np.nan], methods=("unedited",))])
    plot_scores_against(table, ax, x="edits", measure="S", log=True)
    assert set(lines(ax)["unedited"][:, 1]) == {26.0}
    assert len(lines(ax)["memit"]) == 2


def test_a_method_looks_the_same_in_every_figure_and_no_two_lines_are_alike():
    one, other = line_styles(["rome", "ft", "memit"]), line_styles(["memit", "rome"])
    assert one["memit"] == other["memit"]
    assert one["rome"] == other["rome"]
    names = [*METHOD_COLORS, "memit, strategy sqrt", "memit, strategy last", "something", "else"]
    looks = [tuple(style[key] for key in ("color", "linestyle")) for style in line_styles(names).values()]
    assert len(set(looks)) == len(names)
    assert line_styles(names)["memit, strategy sqrt"]["color"] == METHOD_COLORS["memit"]


def test_many_variants_of_a_method_differ_by_shade_and_two_by_stroke() -> None:
    names = ["ft", *(f"ft_l, ε {bound}" for bound in (5e-5, 2e-4, 5e-4, 2e-3, 1e-2, 5e-2))]
    styles = line_styles(names)
    colors = [styles[name]["color"] for name in names]
    assert len(set(colors[1:])) == len(colors) - 1
    luminance = [sum(to_rgb(color)) for color in colors[1:]]
    assert luminance == sorted(luminance, reverse=True), "from pale to dark"
    assert max(luminance) < 2.7, "the palest is seen on white"
    assert colors[0] == METHOD_COLORS["ft"], "alone of its method, it has its own color"
    few = [style["linestyle"] for style in line_styles(["ft_l", "ft_l, ε 0.1", "ft_l, ε 0.2"]).values()]
    assert len(set(few)) == len(few)
    assert {style["color"] for style in line_styles(["ft_l", "ft_l, ε 0.1"]).values()} == {METHOD_COLORS["ft_l"]}


def test_a_figure_has_the_panels_that_have_data_under_one_legend(tmp_path):
    table = make_scores([1, 3, 30])
    figure = scores_figure(table, ("S", "ES", "PS", "NS", "GE", "RS"), x="edits", log=True, label="edits")
    assert [ax.get_title().split(" (")[0] for ax in figure.axes] == [
        "Score", "Efficacy", "Paraphrases", "Neighbors", "Fluency",
    ]  # fmt: skip
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["memit", "rome"]
    assert not any(ax.get_legend() for ax in figure.axes)
    assert figure.axes[4].get_ylim()[1] < 60 < figure.axes[0].get_ylim()[1]  # entropies have a scale of their own
    assert all(path.stat().st_size > 3000 for path in save_figure(figure, tmp_path, "scores"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"measure": "RS"}, "no rows of 'RS'"),
        ({"x": "lambda"}, "lacks lambda"),
        ({"hue": "model"}, "lacks model"),
    ],
)
def test_what_cannot_be_drawn_is_refused(ax, change, words):
    with pytest.raises(InputError, match=words):
        plot_scores_against(make_scores([1, 2]), ax, **{"x": "edits", "measure": "S", **change})


def test_zero_has_no_place_on_a_logarithmic_axis(ax):
    with pytest.raises(InputError, match="logarithmic"):
        plot_scores_against(make_scores([0, 2]), ax, x="edits", measure="S", log=True)
    plot_scores_against(make_scores([0, 2]), ax, x="edits", measure="S")
    with pytest.raises(InputError, match="expected some of"):
        scores_figure(make_scores([1, 2]), ("RS",), x="edits")
