"""Selection on models whose recalling layers are known: all MLPs outside a planted range are exactly zero.

`planted_effects.parquet` holds the effects of the models of `analyses/planted_truth`, with the planted layers in
its attrs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mechedit as me
from analyses.planted_truth import make
from analyses.planted_truth.rules import FILE, compared, judged_rules
from analyses.tiny_model import train

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def planted():
    effects = pd.read_parquet(HERE / "planted_effects.parquet")
    truth = {name: set(layers) for name, layers in effects.attrs["truth"].items()}
    assert set(truth) == set(effects["model"])
    config = me.SelectConfig(resamples=200)  # they decide nothing asked here
    return truth, {name: me.select_layers(rows, config=config) for name, rows in effects.groupby("model")}


def score(chosen, truth):
    """How many models have no layer outside the truth, and the mean intersection over union."""
    clean = sum(bool(chosen[name]) and chosen[name] <= truth[name] for name in truth)
    return clean, np.mean([len(chosen[name] & truth[name]) / len(chosen[name] | truth[name]) for name in truth])


def test_the_default_rule_finds_the_planted_layers(planted):
    truth, selections = planted
    assert len(truth) == 10
    clean, iou = score({name: set(selection.layers) for name, selection in selections.items()}, truth)
    assert clean >= 9
    assert iou >= 0.6


def test_what_another_model_would_get_misses_the_target(planted):
    """Were ranges of one size fits all, the test above would show nothing."""
    truth, selections = planted
    names = list(truth)
    others = {name: set(selections[shifted].layers) for name, shifted in zip(names, names[3:] + names[:3], strict=True)}
    clean, iou = score(others, truth)
    assert clean < 9
    assert iou < 0.6


def test_no_constant_range_and_no_constant_share_of_the_depth_does_as_well_as_the_default_rule():
    table = compared(pd.read_parquet(FILE)).set_index("rule")
    default = table.loc[me.SelectConfig().rule]
    constants = table[[name.startswith("layers ") or "%" in name for name in table.index]]
    assert len(constants) == 8
    assert default["none outside"] == default["models"] == 10
    assert (constants["none outside"] < default["none outside"]).all()
    assert (constants["IoU"] < default["IoU"]).all()
    # Each is the best of its kind: of all ranges, here by brute force.
    truths, _ = judged_rules(pd.read_parquet(FILE))
    planted = {truth.name: set(truth.layers) for truth in truths}
    depths = {truth.name: truth.depth for truth in truths}
    best = max(
        score({name: set(range(a, min(b + 1, depth))) for name, depth in depths.items()}, planted)[1]
        for a in range(12)
        for b in range(a, 12)
    )
    assert best == pytest.approx(constants[["%" not in name for name in constants.index]]["IoU"].max())


def test_the_papers_wording_names_layers_without_mlps(planted):
    truth, selections = planted
    peaks = {name: set(selection.rules["gap-peak"].layers) for name, selection in selections.items()}
    assert score(peaks, truth)[0] <= 3


def test_every_planted_model_shows_its_site_clearly(planted):
    for selection in planted[1].values():
        assert selection.n_facts >= 60
        assert selection.early_site["gap"] > 0.1


def test_mlps_outside_the_range_stay_at_zero_when_the_others_are_trained(tmp_path):
    plan = make.PLANS[0]
    recipe = dataclasses.replace(plan.recipe(), steps=2, rows=2)
    train.train(make.draw_entries(plan.seed), recipe, tmp_path)
    model = me.load_model(str(tmp_path), dtype="float32")
    outputs = [me.Site(layer, "mlp_out") for layer in range(model.n_layers)]
    run = model.run(me.Tokens(torch.arange(5, 29).view(2, 12), torch.ones(2, 12, dtype=torch.long)), read=outputs)
    assert [site.layer for site in outputs if run[site].any()] == plan.layers
    assert all((run[site] == 0).all() for site in outputs if site.layer not in plan.layers)
