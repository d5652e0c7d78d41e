from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from helpers.run_folder import make_effects, make_selection, write_run, write_trace
from IPython.core.formatters import DisplayFormatter
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mechedit.errors import InputError
from mechedit.figures import (
    comparison_figure,
    comparison_lines,
    draw,
    fact_figure,
    lines_figure,
    paper_style,
    plot_fact,
    plot_lines,
    plot_role_grid,
    plot_scores,
    plot_selection,
    plot_severed,
    refresh_figures,
    roles_figure,
    run_figures,
    save_figure,
    trace_figures,
)
from mechedit.figures.selection import _ranges
from mechedit.figures.style import heat_colors, runs, wrapped
from mechedit.trace import average_effects

EFFECTS = make_effects(facts=8, layers=4)


@pytest.fixture
def ax():
    return Figure().subplots()


def bars(ax):
    """Heights by legend entry."""
    return {c.get_label(): [bar.get_height() for bar in c] for c in ax.containers if hasattr(c, "patches")}


def errorbars(ax):
    """(low, high) of every error bar, by drawing order."""
    return [[tuple(s[:, 1]) for s in c.lines[2][0].get_segments()] for c in ax.containers if hasattr(c, "has_yerr")]


def test_severed_bars_are_the_means_over_facts(ax):
    plot_severed(EFFECTS, ax, selection=[1, 2])
    drawn = bars(ax)
    for label, sever in (
        ("nothing severed", "nothing"),
        ("attention severed", "attn"),
        ("MLP severed", "mlp"),
    ):
        for layer in range(4):
            values = [
                row.effect
                for row in EFFECTS.itertuples()
                if (row.kind, row.sever, row.role, row.layer) == ("state", sever, "subject_last", layer)
            ]
            assert len(values) == 8
            assert drawn[label][layer] == pytest.approx(100 * sum(values) / 8)
    assert drawn["nothing severed"][0] > 1.5 * drawn["MLP severed"][0]  # there is something to see


def test_severed_intervals_cover_the_mean_and_shrink_with_more_facts(ax):
    def width(facts):
        axes = Figure().subplots()
        plot_severed(make_effects(facts=facts, layers=2), axes)
        means = bars(axes)["nothing severed"]
        ends = errorbars(axes)[0]
        assert all(low < mean < high for mean, (low, high) in zip(means, ends, strict=True))
        return ends[0][1] - ends[0][0]

    assert width(64) < 0.6 * width(8)


def test_role_grid_is_in_reading_order_and_holds_the_means(ax):
    plot_role_grid(EFFECTS, "state", ax)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == [
        "before the subject",
        "first subject token",
        "middle subject tokens",
        "last subject token",
        "first token after",
        "further tokens",
        "last token",
    ]
    grid = ax.images[0].get_array()
    rows = EFFECTS[(EFFECTS["kind"] == "state") & (EFFECTS["sever"] == "nothing")]
    assert grid[3, 0] == pytest.approx(
        100 * rows[(rows["role"] == "subject_last") & (rows["layer"] == 0)]["effect"].mean()
    )
    assert grid[3, 0] > 10 * abs(grid[4, 0])  # early site, and nothing at the token after it
    assert len(ax.figure.axes) == 2  # the panel and its color bar


def test_a_role_that_was_not_traced_has_no_row(ax):
    plot_role_grid(EFFECTS[EFFECTS["role"] != "before"], "attn", ax)
    assert len(ax.get_yticklabels()) == 6


def test_fact_heatmap_shows_tokens_with_the_subject_starred(ax):
    one = EFFECTS[(EFFECTS["fact"] == "eiffel-1") & (EFFECTS["kind"] == "state")]
    plot_fact(one, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "The", "E*", "iff*", "el*", "Tower*", "is", "in", "the", "city", "of",
    ]  # fmt: skip
    expected = one[(one["sever"] == "nothing") & (one["position"] == 4) & (one["layer"] == 2)]["effect"].item()
    assert ax.images[0].get_array()[4, 2] == pytest.approx(100 * expected)


def test_token_labels_leave_dollars_alone(ax):
    one = EFFECTS[(EFFECTS["fact"] == "eiffel-1") & (EFFECTS["kind"] == "attn")].assign(token="$\\frac$")
    plot_fact(one, ax)
    ax.figure.canvas.draw()  # as mathematics this would not parse


def test_several_facts_or_kinds_in_one_heatmap_are_refused(ax):
    with pytest.raises(InputError, match="8 facts"):
        plot_fact(EFFECTS, ax)
    with pytest.raises(InputError, match="3 kinds"):
        plot_fact(EFFECTS[EFFECTS["fact"] == "eiffel-1"], ax)
    one = EFFECTS[(EFFECTS["fact"] == "eiffel-1") & (EFFECTS["kind"] == "mlp")]
    with pytest.raises(InputError, match="a token twice"):
        plot_fact(pd.concat([one, one.assign(effect=0.5)]), ax)


@pytest.mark.parametrize(
    "draw",
    [
        plot_severed,
        plot_fact,
        lambda effects, ax: plot_role_grid(effects, "mlp", ax),
        lambda effects, ax: roles_figure(effects),
        lambda effects, ax: fact_figure(effects),
        lambda effects, ax: plot_lines(effects, ax),
        lambda effects, ax: lines_figure(effects),
        lambda effects, ax: comparison_figure({"a": EFFECTS, "b": effects}),
        lambda effects, ax: comparison_lines({"a": EFFECTS, "b": effects}),
        lambda effects, ax: comparison_figure({}),
        lambda effects, ax: plot_selection({"layers": [], "evidence": []}, ax),
        lambda effects, ax: plot_scores({}, {"GE": {"mean": 600, "low": 590, "high": 610, "n": 4}}, ax),
    ],
)
def test_nothing_to_draw_is_an_input_error(draw, ax):
    with pytest.raises(InputError, match="expected"):
        draw(EFFECTS.iloc[:0], ax)


def test_mixed_metrics_are_refused(ax):
    both = pd.concat([EFFECTS, EFFECTS.assign(metric="log_probability")])
    with pytest.raises(InputError, match="2 metrics"):
        plot_severed(both, ax)
    plot_severed(EFFECTS.assign(metric="log_probability"), ax)
    assert ax.get_ylabel() == "AIE (nats of log-probability)"  # and not in percent


def lines_of(ax):
    """Values by label."""
    return {line.get_label(): list(line.get_ydata()) for line in ax.lines if not line.get_label().startswith("_")}


def bands(ax):
    """(low, high) of each band, by layer, in drawing order."""
    found = []
    for band in ax.collections:
        points = band.get_paths()[0].vertices
        found.append([(points[points[:, 0] == x][:, 1].min(), points[points[:, 0] == x][:, 1].max()) for x in range(4)])
    return found


def average(effects=EFFECTS, **equal):
    """Rows of the averages, in percent."""
    table = average_effects(effects)
    for column, value in equal.items():
        table = table[table[column] == value]
    return table[["mean", "low", "high"]] * 100


def test_averages_draw_the_same_as_their_effects():
    table = average_effects(EFFECTS)
    for plot in (plot_severed, plot_lines_of_states, lambda e, ax: plot_role_grid(e, "mlp", ax)):
        first, second = Figure().subplots(), Figure().subplots()
        plot(EFFECTS, first)
        plot(table, second)
        assert bars(first) == bars(second)
        assert lines_of(first) == lines_of(second)
        for one, other in zip(first.images, second.images, strict=True):
            np.testing.assert_array_equal(one.get_array(), other.get_array())
        assert first.images or bars(first) or lines_of(first)


def plot_lines_of_states(effects, ax):
    return plot_lines(effects, ax, kinds=["state"])


def test_severings_of_some_layers_are_bars_only_when_asked_for(ax):
    some = EFFECTS[EFFECTS["sever"] == "mlp"].assign(sever="mlp@1-2", effect=0.07)
    both = pd.concat([EFFECTS, some])
    plot_severed(both, ax)
    assert list(bars(ax)) == ["nothing severed", "attention severed", "MLP severed"]
    asked = Figure().subplots()
    plot_severed(both, asked, severings=["nothing", "mlp@1-2"])
    assert list(bars(asked)) == ["nothing severed", "MLP severed, layers 1–2"]
    assert bars(asked)["MLP severed, layers 1–2"] == pytest.approx([7.0] * 4)
    with pytest.raises(InputError, match="mlp@3"):
        plot_severed(both, ax, severings=["mlp@3"])
    with pytest.raises(InputError, match="mlp@1-2 only"):
        plot_severed(some, ax)


def test_lines_are_the_averages_with_their_bands(ax):
    plot_lines(EFFECTS, ax, kinds=["state"], roles=["subject_last", "last"])
    drawn = lines_of(ax)
    assert list(drawn) == ["last subject token", "last token"]
    for (label, role), band in zip(
        (("last subject token", "subject_last"), ("last token", "last")), bands(ax), strict=True
    ):
        expected = average(kind="state", sever="nothing", role=role)
        assert drawn[label] == pytest.approx(list(expected["mean"]))
        assert [low for low, _ in band] == pytest.approx(list(expected["low"]))
        assert [high for _, high in band] == pytest.approx(list(expected["high"]))
    assert drawn["last subject token"][0] > 5 > drawn["last token"][0]  # there is something to see
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer of the state", "AIE (% of probability)")
    other = plot_lines(EFFECTS, Figure().subplots(), kinds=["attn"])
    assert other.get_xlabel() == "center of the attention window"  # a figure of one kind says which


def test_lines_that_differ_in_two_things_have_two_short_legends(ax):
    plot_lines(EFFECTS, ax, kinds=["state"], roles=["subject_last", "last"], severings=["nothing", "mlp"])
    assert len(lines_of(ax)) == 4
    assert lines_of(ax)["last subject token, MLP severed"] == pytest.approx(
        list(average(kind="state", sever="mlp", role="subject_last")["mean"])
    )
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "last subject token",
        "last token",
        "nothing severed",
        "MLP severed",
    ]
    by_label = {line.get_label(): line for line in ax.lines}
    whole, cut = (by_label[f"last token, {sever}"] for sever in ("nothing severed", "MLP severed"))
    assert whole.get_color() == cut.get_color() != by_label["last subject token, MLP severed"].get_color()
    assert whole.get_linestyle() != cut.get_linestyle()


def test_lines_of_one_role_are_colored_by_severing(ax):
    plot_lines(EFFECTS, ax, kinds=["state"], roles=["subject_last"], severings=["nothing", "attn", "mlp"])
    assert list(lines_of(ax)) == ["nothing severed", "attention severed", "MLP severed"]
    assert len({line.get_color() for line in ax.lines[:3]}) == 3


def test_lines_that_nobody_could_tell_apart_are_refused(ax):
    with pytest.raises(InputError, match="two at most"):
        plot_lines(EFFECTS, ax, severings=["nothing", "mlp"])
    with pytest.raises(InputError, match=r"no role 'first'.*subject_first"):
        plot_lines(EFFECTS, ax, kinds=["state"], roles=["first"])


def test_lines_figure_has_a_panel_a_kind_under_one_legend():
    figure = lines_figure(EFFECTS)
    assert [ax.get_title() for ax in figure.axes] == ["single state", "MLP window", "attention window"]
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    assert [ax.get_ylabel() for ax in figure.axes] == ["AIE (% of probability)", "", ""]
    assert [ax.get_legend() for ax in figure.axes] == [None] * 3
    assert len(figure.legends[0].get_texts()) == 7
    assert lines_of(figure.axes[2])["last token"] == pytest.approx(
        list(average(kind="attn", sever="nothing", role="last")["mean"])
    )
    severed = lines_figure(EFFECTS, roles=["subject_last"], severings=["nothing", "mlp"])
    assert [len(lines_of(ax)) for ax in severed.axes] == [2, 1, 1]  # states alone were severed


def test_comparison_has_a_column_a_trace_and_a_row_a_kind_on_one_scale():
    half = EFFECTS.assign(effect=EFFECTS["effect"] / 2)
    figure = comparison_figure({"3σ": EFFECTS, "half": average_effects(half)})
    panels = figure.axes[:6]
    assert [ax.get_title() for ax in panels] == ["3σ", "half", "", "", "", ""]
    assert [text.get_text() for ax in panels for text in ax.texts] == [
        "single state",
        "MLP window",
        "attention window",
    ]
    assert len({ax.images[0].norm for ax in panels}) == 1
    for left, right in zip(panels[::2], panels[1::2], strict=True):
        np.testing.assert_allclose(left.images[0].get_array(), 2 * right.images[0].get_array())
    assert panels[0].images[0].get_array()[3, 0] == pytest.approx(
        average(kind="state", sever="nothing", role="subject_last")["mean"].iloc[0]
    )
    assert figure.axes[6].get_ylabel() == "AIE (% of probability)"


def test_comparison_says_what_was_not_traced():
    less = EFFECTS[(EFFECTS["kind"] != "attn") & (EFFECTS["role"] != "before")]
    figure = comparison_figure({"all": EFFECTS, "less": less})
    assert next(text.get_text() for text in figure.axes[5].texts) == "not traced"
    assert not figure.axes[5].images
    left, right = (figure.axes[i].images[0].get_array() for i in (0, 1))
    assert np.ma.getmaskarray(right)[0].all()  # the row is there, empty, so that rows stay level
    np.testing.assert_allclose(left[1:], right[1:])
    only = comparison_figure({"all": EFFECTS, "less": less}, kinds=["mlp"])
    assert len(only.axes) == 3
    with pytest.raises(InputError, match="no trace holds the kind 'attn'"):
        comparison_figure({"less": less}, kinds=["attn"])


def test_compared_lines_share_panels_and_axis():
    half = EFFECTS.assign(effect=EFFECTS["effect"] / 2)
    figure = comparison_lines({"3σ": EFFECTS, "half": half}, role="last")
    assert [ax.get_title() for ax in figure.axes] == ["single state", "MLP window", "attention window"]
    for kind, ax in zip(("state", "mlp", "attn"), figure.axes, strict=True):
        expected = list(average(kind=kind, sever="nothing", role="last")["mean"])
        assert lines_of(ax)["3σ"] == pytest.approx(expected)
        assert lines_of(ax)["half"] == pytest.approx([value / 2 for value in expected])
    assert len({ax.get_ylim() for ax in figure.axes}) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["3σ", "half"]
    assert figure.axes[0].get_ylabel() == "AIE at the last token\n(% of probability)"
    severed = comparison_lines({"3σ": EFFECTS, "half": half}, sever="mlp")
    assert [ax.get_title() for ax in severed.axes] == ["single state"]


def test_traces_in_different_metrics_cannot_be_compared():
    for compare in (comparison_figure, comparison_lines):
        with pytest.raises(InputError, match=r"several metrics.*b: kl"):
            compare({"a": EFFECTS, "b": EFFECTS.assign(metric="kl")})


def test_units_follow_the_metric():
    for metric, factor, label in (
        ("logit_difference", 1, "AIE (logits)"),
        ("normalized_probability", 100, "AIE (% of the total effect)"),
        ("my_own", 1, "AIE (my_own)"),
        ("kl", 1, "AIE (nats of KL; negative helps)"),
    ):
        ax = Figure().subplots()
        plot_severed(EFFECTS.assign(metric=metric), ax)
        assert ax.get_ylabel().replace("\n", " ") == label
        assert bars(ax)["nothing severed"][0] == pytest.approx(
            factor * average(kind="state", sever="nothing", role="subject_last")["mean"].iloc[0] / 100
        )


def test_blue_helps_in_every_metric():
    def color_of_the_early_site(effects):
        ax = Figure().subplots()
        image = plot_role_grid(effects, "state", ax).images[0]
        return image.cmap(image.norm(image.get_array()[3, 0]))

    helps = color_of_the_early_site(EFFECTS)
    assert helps[2] > helps[0] + 0.2
    # The divergence from the clean run falls where restoring helps.
    falls = EFFECTS.assign(metric="kl", effect=-EFFECTS["effect"])
    assert color_of_the_early_site(falls) == pytest.approx(helps, abs=0.02)
    red = color_of_the_early_site(falls.assign(metric="probability"))
    assert red[0] > red[2] + 0.2


def test_every_metric_has_its_figures():
    logs = EFFECTS.assign(metric="kl", effect=-EFFECTS["effect"])
    unknown = EFFECTS.assign(metric="normalized_kl", effect=np.nan)
    figures = trace_figures(pd.concat([logs, EFFECTS, unknown]))
    one = {f"{name}{kind}" for name in ("roles", "fact", "lines") for kind in ("", "_state", "_mlp", "_attn")}
    of_kl = {f"{name}_kl" for name in ("severed", "roles", "fact", "lines")}
    assert set(figures) == one | {"severed"} | of_kl | {name.replace("kl", "normalized_kl") for name in of_kl}
    assert figures["roles"].axes[0].images[0].get_array().max() > 1  # probability, in percent
    assert figures["roles_kl"].axes[0].images[0].get_array().min() > -1
    for figure in figures.values():
        figure.canvas.draw()


def test_figures_of_a_file_are_those_of_its_effects(tmp_path):
    EFFECTS.to_parquet(tmp_path / "effects.parquet", row_group_size=100)
    expected = trace_figures(EFFECTS)
    for name, figure in trace_figures(tmp_path / "effects.parquet").items():
        for one, other in zip(figure.axes, expected[name].axes, strict=True):
            assert bars(one) == bars(other)
            assert lines_of(one) == lines_of(other)
            for first, second in zip(one.images, other.images, strict=True):
                np.testing.assert_array_equal(first.get_array(), second.get_array())
        if name == "severed":
            assert bars(figure.axes[0])


def test_long_labels_of_upright_axes_are_wrapped():
    assert wrapped("AIE (nats of KL; negative helps)", 1.6).count("\n") == 1
    assert wrapped("AIE (% of probability)", 1.6).count("\n") == 0


def test_side_by_side_panels_share_one_color_scale():
    for figure in (roles_figure(EFFECTS), fact_figure(EFFECTS)):
        images = [image for axes in figure.axes for image in axes.images]
        assert len(images) == 3
        assert len({image.norm for image in images}) == 1
        assert len(figure.axes) == 4  # three panels, one bar
        assert max(image.get_array().max() for image in images) == pytest.approx(images[0].norm.vmax)
        assert images[0].norm.vmin <= min(image.get_array().min() for image in images)


def test_zero_is_white_and_equal_sizes_are_equally_strong():
    norm = Normalize(-0.5, 2.0)
    colors = heat_colors(norm)
    strength = {x: 1 - np.mean(colors(norm(x))[:3]) for x in (-0.5, 0.0, 0.5, 2.0)}
    assert strength[0.0] < 0.05
    assert strength[-0.5] == pytest.approx(strength[0.5], abs=0.06)
    assert strength[2.0] > strength[0.5] + 0.2
    turned = heat_colors(Normalize(-2.0, 0.5), helps=-1)
    assert turned(0.0) == pytest.approx(colors(1.0))
    assert colors(np.nan) not in (colors(0.0), colors(norm(0.0)))  # what is unknown is not zero


def test_selection_draws_its_evidence(ax):
    selection = make_selection()
    plot_selection(selection, ax)
    assert bars(ax)["contribution of MLP"] == pytest.approx([100 * e["contribution"] for e in selection["evidence"]])
    gap = next(line for line in ax.lines if line.get_label() == "severed gap")
    assert gap.get_ydata() == pytest.approx([100 * e["gap"] for e in selection["evidence"]])


def test_selection_shows_every_range_by_name(ax):
    selection = make_selection()
    selection["alternatives"]["mlp-window"] = []
    selection["published"] = [
        {"method": "MEMIT", "layers": [3, 4, 5], "source": "a"},
        {"method": "PMET", "layers": [3, 4, 5], "source": "b"},
        {"method": "MEMIT", "layers": [7], "source": "c"},
    ]
    plot_selection(selection, ax)
    drawn = [(line.get_label(), list(line.get_xdata())) for line in ax.lines if line.get_label()[:2] != "_c"]
    ranges = {(text.lstrip("_"), *ends) for text, ends in drawn if text.startswith("_") and len(ends) == 2}
    assert ("gap-peak", -0.5, 2.5) in ranges
    assert ("published, MEMIT, PMET", 2.5, 5.5) in ranges
    assert ("published, MEMIT", 6.5, 7.5) in ranges
    chosen = next(line for line in ax.lines if line.get_label() == "_contribution (chosen)")
    assert list(chosen.get_xdata()) == [1.5, 5.5]
    assert {text.get_text() for text in ax.texts} == {
        "contribution (chosen)", "gap-peak", "moving-average", "none by mlp-window",
        "published, MEMIT, PMET", "published, MEMIT",
    }  # fmt: skip
    # The rows lie one under the other, below all that is measured.
    heights = [line.get_ydata()[0] for line in ax.lines if line.get_label()[:2] != "_c" and len(line.get_xdata()) == 2]
    bottom = ax.transLimits.transform((0, min(e["contribution_low"] for e in selection["evidence"]) * 100))[1]
    assert 0 < max(height for height in heights if height) < bottom


def test_selection_of_nothing_shades_nothing(ax):
    some = make_selection()
    plot_selection(some, ax)
    assert "chosen in resamples" in [text.get_text() for text in ax.get_legend().get_texts()]
    axes = Figure().subplots()
    plot_selection(some | {"layers": [], "alternatives": {"gap-peak": []}}, axes)
    assert "chosen in resamples" not in [text.get_text() for text in axes.get_legend().get_texts()]
    assert {text.get_text() for text in axes.texts} == {"none chosen"}


def test_selection_by_another_metric_is_not_in_percent(ax):
    selection = make_selection() | {"metric": "log_probability"}
    plot_selection(selection, ax)
    assert ax.get_ylabel() == "log_probability"
    assert bars(ax)["contribution of MLP"] == pytest.approx([e["contribution"] for e in selection["evidence"]])


def test_selection_with_unknown_values_is_drawn_with_gaps(ax):
    selection = make_selection()
    selection["evidence"][0] |= {"contribution": None, "contribution_low": None, "contribution_high": None}
    plot_selection(selection, ax)
    assert np.isnan(bars(ax)["contribution of MLP"][0])
    ax.figure.canvas.draw()


def test_runs_of_layers():
    assert runs([5, 3, 4, 8]) == [(3, 5), (8, 8)]
    assert runs([]) == []


def test_scores_draw_means_with_intervals_and_leave_out_what_is_absent(ax):
    before = {"ES": {"mean": 5.0, "low": 0.0, "high": 12.0, "n": 40}}
    after = {
        "ES": {"mean": 90.0, "low": 80.0, "high": 97.0, "n": 40},
        "NS": {"mean": 85.0, "low": 82.0, "high": 88.0, "n": 40},
    }
    plot_scores(before, after, ax)
    assert bars(ax) == {"before": [5.0], "after": [90.0, 85.0]}
    assert errorbars(ax)[1] == [pytest.approx((80, 97)), pytest.approx((82, 88))]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["ES", "NS"]
    assert {text.get_text() for text in ax.texts} == {"5", "90", "85"}


def test_style_leaves_the_caller_alone():
    mpl.rcParams["axes.linewidth"] = 3.0
    try:
        with paper_style():
            assert mpl.rcParams["pdf.fonttype"] == 42
            assert mpl.rcParams["axes.linewidth"] < 1
        assert mpl.rcParams["axes.linewidth"] == 3.0
        roles_figure(EFFECTS)
        assert mpl.rcParams["axes.linewidth"] == 3.0
    finally:
        mpl.rcdefaults()


def test_saved_files_embed_fonts_and_are_the_same_each_time(tmp_path):
    pdf, png = save_figure(roles_figure(EFFECTS), tmp_path / "new", "roles")
    assert b"/Subtype /TrueType" in pdf.read_bytes() or b"/CIDFontType2" in pdf.read_bytes()
    assert b"/Type3" not in pdf.read_bytes()
    assert int.from_bytes(png.read_bytes()[16:20]) == pytest.approx(200 * 6.75, abs=1)  # pixels across
    first = pdf.read_bytes()
    save_figure(roles_figure(EFFECTS), tmp_path / "new", "roles")
    assert pdf.read_bytes() == first
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["roles.pdf", "roles.png"]


def test_a_notebook_shows_figures_that_pyplot_does_not_know():
    def shown(figure):
        pictures, about = DisplayFormatter().format(figure)
        return pictures.get("image/png", b""), about.get("image/png")

    for figure, inches in ((roles_figure(EFFECTS), 6.75), (draw(lambda ax: plot_lines(EFFECTS, ax)), 3.25)):
        picture, about = shown(figure)
        assert int.from_bytes(picture[16:20]) == pytest.approx(200 * inches, abs=1)  # pixels in the file
        assert about["width"] == pytest.approx(130 * inches, abs=1)  # and on the screen
    assert shown(Figure()) == (b"", None), "a figure of matplotlib's own is shown as text"


def test_every_figure_of_a_run_folder(tmp_path):
    write_run(tmp_path)
    written = run_figures(tmp_path)
    assert {path.stem for path in written} == {
        "severed", "roles", "roles_state", "roles_mlp", "roles_attn",
        "fact", "fact_state", "fact_mlp", "fact_attn",
        "lines", "lines_state", "lines_mlp", "lines_attn", "selection", "scores",
    }  # fmt: skip
    assert all(path.stat().st_size > 1000 and path.parent == tmp_path / "figures" for path in written)


def test_a_trace_alone_gives_its_own_figures_only(tmp_path):
    write_trace(tmp_path)
    effects = pd.read_parquet(tmp_path / "effects.parquet")
    effects[(effects["kind"] == "state") & (effects["role"] == "subject_last")].to_parquet(tmp_path / "effects.parquet")
    assert {path.stem for path in run_figures(tmp_path)} == {"severed"}


def test_no_folder_and_empty_folder(tmp_path):
    with pytest.raises(InputError, match="no folder"):
        run_figures(tmp_path / "absent")
    assert run_figures(tmp_path) == []
    assert not (tmp_path / "figures").exists()


def test_figures_are_drawn_again_only_where_their_results_or_files_changed(tmp_path, monkeypatch):
    write_trace(tmp_path)
    effects = pd.read_parquet(tmp_path / "effects.parquet")
    effects = effects[(effects["kind"] == "state") & (effects["role"] == "subject_last")]  # few figures
    effects.to_parquet(tmp_path / "effects.parquet")
    written = refresh_figures(tmp_path)
    assert {path.suffix for path in written} == {".pdf", ".png"}
    times = {path: path.stat().st_mtime_ns for path in written}
    assert refresh_figures(tmp_path) == []
    assert {path: path.stat().st_mtime_ns for path in written} == times
    # The controls: a figure that is gone, other results, another release, a damaged note.
    written[0].unlink()
    assert refresh_figures(tmp_path) == written
    effects.assign(effect=effects["effect"] * 0.5).to_parquet(tmp_path / "effects.parquet")
    assert len(refresh_figures(tmp_path)) == len(written)
    monkeypatch.setattr("mechedit.figures.run_folder.VERSION", "0.0.9")
    assert len(refresh_figures(tmp_path)) == len(written)
    assert refresh_figures(tmp_path) == []
    for note in ("null", '{"files": 5}'):
        (tmp_path / "figures" / "drawn.json").write_text(note)
        assert len(refresh_figures(tmp_path)) == len(written)


def test_layers_that_edits_chose_are_not_said_to_be_the_rules() -> None:
    selection = make_selection()
    assert _ranges(selection)[0][0] == "contribution (chosen)"
    by_edits = {
        **selection,
        "layers": [6, 7],
        "validation": {"by": "sweep"},
        "rules": {"contribution": {"layers": [2, 3, 4, 5]}},
    }
    ranges = {label: layers for label, layers, _ in _ranges(by_edits)}
    assert ranges["edits (chosen)"] == [6, 7]
    assert ranges["contribution"] == [2, 3, 4, 5]
