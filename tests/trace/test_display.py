from __future__ import annotations

import copy
import html
import pickle
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from helpers.run_folder import PROVENANCE, make_effects

from mechedit.trace import Effects, unit_of
from mechedit.trace.display import ColorScale, effects_html, quantity

PLAIN = make_effects(facts=4, layers=4)
PLAIN.attrs = {"provenance": PROVENANCE, "n_facts": 4, "dropped": [["louvre", "said Rome"]]}
EFFECTS = Effects(PLAIN)


class Page(HTMLParser):
    """Heatmaps as they are read: title, row labels, and cells with their color and description."""

    VOID = frozenset(["br", "col", "img", "hr", "meta", "input"])

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.panels, self.caption, self.folded = [], [], [], "", ""
        self.feed(text)
        self.close()
        assert self.open == []  # well formed

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if tag not in self.VOID:
            self.open.append(tag)
        if "mechedit-panel" in attrs.get("class", "").split():
            self.panels.append({"title": "", "rows": [], "layers": ""})
        if tag == "th" and attrs.get("scope") == "row" and "details" not in self.open:
            self.panels[-1]["rows"].append({"label": "", "cells": []})
        if tag == "td" and "aria-label" in attrs:
            color = re.search(r"background:\s*([^;]+)", attrs["style"])[1]
            self.panels[-1]["rows"][-1]["cells"].append((color, attrs["aria-label"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "figcaption" in self.open:
            self.caption += data
        elif "details" in self.open:
            self.folded += data
        elif "h4" in self.open:
            self.panels[-1]["title"] += data
        elif "tbody" in self.open and "th" in self.open:
            self.panels[-1]["rows"][-1]["label"] += data


def page(effects):
    return Page(effects._repr_html_())


def is_plain(frame):
    """Whether a frame is shown as pandas shows it."""
    assert type(frame) is Effects
    return frame._repr_html_() == pd.DataFrame(frame)._repr_html_()


def strength(color):
    return float(re.fullmatch(r"rgba\((\d+),(\d+),(\d+),([\d.]+)\)", color)[4])


def test_a_trace_shows_the_clearest_fact_in_all_its_panels():
    shown = page(EFFECTS)
    assert [panel["title"] for panel in shown.panels] == [
        "single state",
        "MLP window",
        "attention window",
        "single state, attention severed",
        "single state, MLP severed",
    ]
    loss = (PLAIN["clean"] - PLAIN["corrupted"]).groupby(PLAIN["fact"]).first()
    fact = loss.idxmax()
    for text in (
        fact,
        "One of 4 facts",
        "tiny",
        quantity(PLAIN.set_index("fact")["clean"][fact].iloc[0], unit_of("probability")),
    ):
        assert text in shown.caption
    tokens = PLAIN[(PLAIN["fact"] == fact)].drop_duplicates("position")
    assert "".join(tokens["token"]).strip() in shown.caption
    labels = [row["label"] for row in shown.panels[0]["rows"]]
    assert [label.rstrip("*") for label in labels] == [token.strip() for token in tokens["token"]]
    assert [label.endswith("*") for label in labels] == [role.startswith("subject") for role in tokens["role"]]


def test_each_cell_says_its_token_layer_and_numbers():
    of_fact = EFFECTS[EFFECTS["fact"] == "eiffel-1"]
    shown = page(of_fact)
    assert "The only fact" in shown.caption
    rows = shown.panels[0]["rows"]
    assert [len(row["cells"]) for row in rows] == [4] * 10
    state = PLAIN[(PLAIN["fact"] == "eiffel-1") & (PLAIN["kind"] == "state") & (PLAIN["sever"] == "nothing")]
    for cell in state.itertuples():
        text = rows[cell.position]["cells"][cell.layer][1]
        assert f"“{cell.token.strip()}”" in text
        assert f"layer {cell.layer}:" in text
        expected = [f"{100 * value:.1f}".replace("-", "−") for value in (cell.score, cell.corrupted, cell.clean)]
        for name, value in zip(("score", "corrupted", "clean"), expected, strict=True):
            assert f"{name} {value}%" in text
    # The brightest cell is the largest effect.
    best = state.loc[state["effect"].abs().idxmax()]
    colors = {(p, layer): strength(c[0]) for p, row in enumerate(rows) for layer, c in enumerate(row["cells"])}
    assert max(colors, key=colors.get) == (best["position"], best["layer"])
    assert sorted(colors.values())[len(colors) // 2] < 0.3  # most cells are pale


def test_colors_are_opposite_around_a_transparent_zero():
    scale = ColorScale(low=-0.2, high=0.4, unit=unit_of("probability"))
    assert strength(scale.tint(0.0)) == 0
    assert strength(scale.tint(0.4)) == 1
    assert strength(scale.tint(-0.2)) == strength(scale.tint(0.2)) < 1
    assert scale.tint(0.2).rpartition(",")[0] != scale.tint(-0.2).rpartition(",")[0]
    assert scale.zero == pytest.approx(100 / 3)
    assert scale.ends == ("−20.0%", "+40.0%")
    # Where a fall helps, it has the color of help.
    kl = ColorScale(low=-0.2, high=0.4, unit=unit_of("kl"))
    assert kl.tint(-0.2) == scale.tint(0.2)
    assert "rgba" not in scale.tint(np.nan).partition("45deg")[0]  # hatched: unknown is not zero


def test_text_from_the_data_is_escaped_and_nothing_runs_or_loads():
    nasty = "\"><script>alert(1)</script><img src=x onerror=alert(2)> ' & {{ 7*7 }}"
    effects = EFFECTS[EFFECTS["fact"] == "brel-2"].assign(token=nasty, fact="<b>" + nasty)
    effects.attrs["provenance"] = {"model": nasty}
    shown = page(effects)
    names = [tag for tag, _ in shown.tags]
    assert not {"script", "img", "link", "iframe"} & set(names)
    assert not any(name.startswith("on") for _, attrs in shown.tags for name in attrs)
    assert "url(" not in effects._repr_html_()
    assert "http" not in effects._repr_html_()
    assert nasty in shown.caption  # shown as written
    assert shown.panels[0]["rows"][0]["cells"][0][1].startswith("“" + nasty[:13])


def test_styles_touch_nothing_else_on_the_page():
    text = EFFECTS._repr_html_()
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    selectors = [part.strip() for rule in re.findall(r"([^{}]+)\{", style) for part in rule.split(",")]
    assert len(selectors) > 10
    assert all(selector.startswith(".mechedit-trace") for selector in selectors)
    assert not re.search(r'\sid="', text.partition("<details>")[0])  # several on a page do not clash
    assert EFFECTS._repr_html_() == text


def test_heatmaps_are_named_for_those_who_do_not_see_them():
    shown = page(EFFECTS)
    grids = [attrs for tag, attrs in shown.tags if tag == "table" and attrs.get("class") == "mechedit-grid"]
    assert [grid["aria-label"].partition(":")[0] for grid in grids] == [panel["title"] for panel in shown.panels]
    assert ("figure", "Causal trace of") in {(tag, attrs.get("aria-label", "")[:15]) for tag, attrs in shown.tags}


def test_the_table_is_folded_below():
    assert "layer" in page(EFFECTS).folded
    assert str(len(EFFECTS)) in page(EFFECTS).folded


@pytest.mark.parametrize(
    "less",
    [
        lambda e: e.head(),
        lambda e: e.head(7),
        lambda e: e.sample(50, random_state=0),
        lambda e: e[e["effect"] > 0],
        lambda e: e[e["layer"] == 1],
        lambda e: e.iloc[:0],
        lambda e: e[["fact", "effect"]],
        lambda e: e.drop(columns="clean"),
        lambda e: e.groupby(["kind", "layer"], as_index=False)[["effect"]].mean(),
        lambda e: e.pivot_table(values="effect", index="position", columns="layer"),
        lambda e: pd.concat([e, e]),
        lambda e: pd.concat([e, e], axis=1),
        lambda e: e.T,
    ],
)
def test_what_is_no_whole_heatmap_is_a_plain_table(less):
    assert is_plain(less(EFFECTS))


def test_html_can_be_switched_off():
    with pd.option_context("display.notebook_repr_html", False):
        assert EFFECTS._repr_html_() is None


def test_probability_goes_first_among_metrics_and_the_others_are_named():
    both = pd.concat([EFFECTS.assign(metric="kl", effect=-3.0), EFFECTS])
    shown = page(both)
    assert "Also measured: kl" in shown.caption
    assert "%" in shown.panels[0]["rows"][0]["cells"][0][1]
    only = page(EFFECTS.assign(metric="kl", effect=-3.0, clean=0.0, corrupted=4.0))
    assert "effect −3 nats" in only.panels[0]["rows"][0]["cells"][0][1]


def test_unknown_and_equal_effects_are_shown():
    shown = page(EFFECTS.assign(effect=np.nan))
    assert "effect –;" in shown.panels[0]["rows"][0]["cells"][0][1]
    assert strength(page(EFFECTS.assign(effect=0.0)).panels[0]["rows"][0]["cells"][0][0]) == 0


def test_many_severings_do_not_flood_the_page():
    more = [EFFECTS[EFFECTS["sever"] == "mlp"].assign(sever=f"mlp@{layer}") for layer in range(4)]
    shown = page(pd.concat([EFFECTS, *more]))
    assert len(shown.panels) == 6
    assert shown.panels[-1]["title"] == "single state, MLP severed, layer 0"
    assert "3 more heatmaps" in shown.caption


def test_deep_models_have_narrow_cells_and_few_labels():
    deep = effects_html(make_effects(facts=1, layers=48))
    labels = re.findall(r"<b>(\d+)</b></span></th>", deep)
    assert [int(label) for label in labels[:10]] == list(range(0, 48, 5))
    assert 'style="width:7px"' in deep


def test_a_trace_of_one_role_is_one_row():
    shown = page(EFFECTS[EFFECTS["role"] == "subject_last"])
    assert [len(panel["rows"]) for panel in shown.panels] == [1] * 5
    assert "“The Eiffel" not in shown.caption


@pytest.mark.parametrize(
    "again",
    [
        lambda e: pickle.loads(pickle.dumps(e)),
        lambda e: copy.deepcopy(e),
        lambda e: e.copy(),
        lambda e: e[e["kind"] == "state"],
        lambda e: e.loc[e["layer"] > 1].reset_index(drop=True),
        lambda e: e.sort_values("effect"),
        lambda e: e.assign(twice=1),
        lambda e: pd.concat([e, e]),
        Effects,
    ],
)
def test_it_stays_what_it_is_with_its_attrs(again):
    copied = again(EFFECTS)
    assert type(copied) is Effects
    assert copied.attrs == EFFECTS.attrs
    assert type(copied["effect"]) is pd.Series


def test_groups_are_effects_too():
    assert all(type(group) is Effects for _, group in EFFECTS.groupby("fact"))
    assert "single state" in next(group for _, group in EFFECTS.groupby("fact"))._repr_html_()
    assert EFFECTS.groupby("layer")["effect"].mean().equals(PLAIN.groupby("layer")["effect"].mean())


def test_a_parquet_file_keeps_rows_and_attrs(tmp_path):
    EFFECTS.to_parquet(tmp_path / "effects.parquet", index=False)
    loaded = Effects(pd.read_parquet(tmp_path / "effects.parquet"))
    pd.testing.assert_frame_equal(loaded, EFFECTS)
    assert loaded.attrs == EFFECTS.attrs
    assert loaded._repr_html_() == EFFECTS._repr_html_()


def test_attrs_are_not_shared_with_what_it_was_made_of():
    effects = Effects(PLAIN)
    effects.attrs["dropped"].append("more")
    assert len(PLAIN.attrs["dropped"]) == 1


def test_numbers_are_typeset():
    percent, nats = unit_of("probability"), unit_of("log_probability")
    assert [quantity(x, percent) for x in (0.123, -0.02, 1e-5, np.nan)] == ["12.3%", "−2.0%", "0%", "–"]
    assert quantity(0.5, percent, signed=True) == "+50.0%"
    assert quantity(-1.2345, nats) == "−1.23 nats"
    assert html.escape(quantity(2.0, unit_of("my_own"))) == "2"
