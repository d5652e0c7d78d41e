from __future__ import annotations

import gc
import tracemalloc
import weakref

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from helpers.run_folder import make_effects

from mechedit.errors import InputError
from mechedit.tables import iter_table
from mechedit.trace import (
    Effects,
    average_effects,
    clearest_fact,
    read_effects,
    token_label,
    total_effects,
    unit_of,
    with_present_metric_names,
)
from mechedit.trace.averages import fact_totals, role_means

EFFECTS = make_effects(facts=8, layers=4)
CELL = {"kind": "state", "sever": "nothing", "metric": "probability", "layer": 0}


def rows(fact, role, *values, **columns):
    """One row per token of a role."""
    return pd.DataFrame(
        [
            {**CELL, "fact": fact, "role": role, "position": i, "effect": value, **columns}
            for i, value in enumerate(values)
        ]
    )


def cell(table, **equal):
    selected = table
    for column, value in equal.items():
        selected = selected[selected[column] == value]
    assert len(selected) == 1
    return selected.iloc[0]


def test_averages_are_means_of_role_means_over_facts():
    table = average_effects(EFFECTS)
    assert list(table) == ["kind", "sever", "metric", "role", "layer", "mean", "low", "high", "facts"]
    by_hand = {}
    for row in EFFECTS.itertuples():
        by_hand.setdefault((row.kind, row.sever, row.metric, row.role, row.layer), {}).setdefault(row.fact, []).append(
            row.effect
        )
    assert len(table) == len(by_hand) == 5 * 7 * 4  # three kinds and two severings of states, roles, layers
    for row in table.itertuples():
        tokens = by_hand[row.kind, row.sever, row.metric, row.role, row.layer].values()
        assert row.facts == len(tokens)
        assert row.mean == pytest.approx(sum(sum(t) / len(t) for t in tokens) / len(tokens))
        assert row.low <= row.mean <= row.high
    early = cell(table, **CELL, role="subject_last")
    assert early["low"] > 10 * abs(cell(table, **CELL, role="after")["mean"])  # there is something to see


def test_a_long_subject_does_not_count_more():
    effects = pd.concat([rows("long", "subject_middle", *[0.1] * 9), rows("short", "subject_middle", 0.5)])
    average = average_effects(effects).iloc[0]
    assert average["mean"] == pytest.approx(0.3)  # by tokens it were 0.14
    assert average["facts"] == 2


def test_intervals_are_over_facts_not_tokens():
    # Two facts, 0 and 1: a quarter of resampled means are 0 and a quarter 1, so the interval is [0, 1],
    # however many tokens tell the same.
    effects = pd.concat([rows("no", "further", *[0.0] * 50), rows("yes", "further", *[1.0] * 50)])
    average = average_effects(effects).iloc[0]
    assert (average["mean"], average["low"], average["high"]) == (0.5, 0.0, 1.0)
    constant = average_effects(pd.concat([rows(str(i), "further", 1.0, 1.0) for i in range(7)])).iloc[0]
    assert constant["low"] == pytest.approx(1) == constant["high"]


def test_interval_coverage():
    covered = []
    for seed in range(150):
        sample = np.random.default_rng(seed).normal(1.0, 1.0, size=40)
        frame = pd.DataFrame({**CELL, "role": "last", "fact": [str(i) for i in range(40)], "effect": sample})
        average = average_effects(frame, resamples=400, seed=seed).iloc[0]
        covered.append(average["low"] <= 1.0 <= average["high"])
    assert 0.88 <= np.mean(covered) <= 0.99


def test_one_fact_says_nothing_of_the_spread():
    average = average_effects(rows("only", "last", -0.25)).iloc[0]
    assert average["mean"] == -0.25  # and is not clipped
    assert np.isnan(average["low"])
    assert np.isnan(average["high"])


def test_all_cells_share_the_draws_of_facts():
    noise = np.random.default_rng(0).normal(size=12)
    effects = pd.concat([rows(str(i), "last", float(x)) for i, x in enumerate(noise)])
    scaled = effects.assign(effect=effects["effect"] * -2 + 3, kind="mlp")
    first, second = (row for _, row in average_effects(pd.concat([effects, scaled])).iterrows())
    assert second["low"] == pytest.approx(3 - 2 * first["high"])
    assert second["high"] == pytest.approx(3 - 2 * first["low"])
    reseeded = average_effects(effects, seed=1).iloc[0]
    assert reseeded["low"] != first["low"]


def test_confidence_widens_the_interval():
    wide, narrow = (average_effects(EFFECTS, confidence=c) for c in (0.95, 0.5))
    assert ((wide["high"] - wide["low"]) > (narrow["high"] - narrow["low"])).all()
    assert wide["mean"].equals(narrow["mean"])


def test_cells_come_in_reading_order_with_layer_subsets_last():
    shuffled = EFFECTS.sample(frac=1, random_state=0)
    more = shuffled[shuffled["sever"] == "mlp"].assign(sever="mlp@10")
    table = average_effects(pd.concat([more, shuffled]))
    assert list(table["kind"].unique()) == ["state", "mlp", "attn"]
    assert list(table["sever"].unique()) == ["nothing", "attn", "mlp", "mlp@10"]
    roles = ["before", "subject_first", "subject_middle", "subject_last", "after", "further", "last"]
    assert list(table["role"].unique()) == roles
    assert list(table["layer"].head(4)) == [0, 1, 2, 3]


def test_facts_without_an_effect_do_not_count():
    effects = pd.concat([rows("a", "last", np.nan), rows("b", "last", 1.0), rows("c", "last", 3.0)])
    average = average_effects(effects).iloc[0]
    assert (average["mean"], average["facts"]) == (2.0, 2)
    unknown = average_effects(rows("a", "last", np.nan)).iloc[0]
    assert np.isnan(unknown["mean"])
    assert unknown["facts"] == 0


def test_a_token_with_some_effects_missing_is_meaned_over_the_others():
    means = role_means(rows("a", "further", 1.0, np.nan, 3.0))
    assert means.facts == ("a",)
    assert means.values.tolist() == [[2.0]]


@pytest.mark.parametrize("size", [1, 7, 400])
def test_frames_in_any_pieces_give_the_same(size):
    # Pieces cut facts and roles apart; of a row each, fewer rows of all facts.
    effects = EFFECTS.iloc[: 1200 : 6 if size == 1 else 1]
    pieces = (effects.iloc[i : i + size] for i in range(0, len(effects), size))
    pd.testing.assert_frame_equal(average_effects(pieces, resamples=50), average_effects(effects, resamples=50))
    pieces = (effects.iloc[i : i + size] for i in range(0, len(effects), size))
    pd.testing.assert_frame_equal(total_effects(pieces, resamples=50), total_effects(effects, resamples=50))


def test_a_file_gives_the_same_and_keeps_the_attrs(tmp_path):
    effects = EFFECTS.copy()
    effects.attrs = {"n_facts": 8, "dropped": [["louvre", "the model says 'Rome'"]]}
    path = tmp_path / "effects.parquet"
    effects.to_parquet(path, index=False, row_group_size=333)
    assert pq.ParquetFile(path).num_row_groups == 5
    for average in (average_effects, total_effects, fact_totals):
        averaged = average(path)
        pd.testing.assert_frame_equal(averaged, average(effects))
        assert averaged.attrs == effects.attrs == average([path]).attrs
    assert clearest_fact(str(path)) == clearest_fact(effects)


def test_attrs_are_those_that_all_frames_agree_on():
    frames = [EFFECTS.iloc[:200].copy(), EFFECTS.iloc[200:400].copy()]
    frames[0].attrs, frames[1].attrs = {"noise_std": 0.1, "n_facts": 3}, {"noise_std": 0.1, "n_facts": 5}
    assert average_effects(frames, resamples=10).attrs == {"noise_std": 0.1}


def test_only_role_means_are_held():
    tokens, layers, facts = 400, 30, 40
    living = []

    def frames():
        for fact in range(facts):
            gc.collect()
            assert not any(reference() is not None for reference in living)  # the earlier ones are gone
            frame = pd.DataFrame(
                {
                    **CELL,
                    "fact": f"fact-{fact}",
                    "layer": np.repeat(np.arange(layers), tokens),
                    "role": "further",
                    "effect": np.random.default_rng(fact).normal(size=tokens * layers),
                }
            )
            living.append(weakref.ref(frame))
            yield frame
            del frame

    frame_bytes = next(frames()).memory_usage(deep=True).sum()
    living.clear()
    gc.freeze()  # what was there before need not be looked through for every frame
    tracemalloc.start()
    try:
        table = average_effects(frames(), resamples=100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert len(living) == facts
    assert len(table) == layers
    assert peak < 6 * frame_bytes < 0.2 * facts * frame_bytes  # some copies of one frame, far from all of them


def test_a_file_is_read_in_parts(tmp_path):
    path = tmp_path / "effects.parquet"
    pd.concat([EFFECTS] * 100).to_parquet(path, index=False)
    pieces = [frame[["effect"]] for frame in iter_table(path, ["fact", "effect"])]
    assert pq.ParquetFile(path).num_row_groups == 1
    assert len(pieces) > 1
    assert max(map(len, pieces)) < len(EFFECTS) * 60
    assert np.array_equal(pd.concat(pieces)["effect"], np.tile(EFFECTS["effect"], 100))


def test_effects_of_two_traces_in_one_table_are_refused():
    with pytest.raises(InputError, match=r"2 effects of .*subject_last.*expected one"):
        average_effects(pd.concat([rows("a", "subject_last", 0.1), rows("a", "subject_last", 0.3)]))
    with pytest.raises(InputError, match="several traces"):
        average_effects([EFFECTS, EFFECTS])


@pytest.mark.parametrize("average", [average_effects, total_effects, fact_totals])
def test_what_cannot_be_averaged_is_an_input_error(average, tmp_path):
    with pytest.raises(InputError, match="no rows, expected"):
        average(EFFECTS.iloc[:0])
    with pytest.raises(InputError, match="no rows, expected"):
        average([])
    with pytest.raises(InputError, match=r"lack.*metric"):
        average(EFFECTS.drop(columns="metric"))
    with pytest.raises(InputError, match="cannot read"):
        average(tmp_path / "absent.parquet")
    EFFECTS.drop(columns="metric").to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="lacks metric"):
        average(tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(InputError, match="cannot read"):
        average(tmp_path / "cut.parquet")


@pytest.mark.parametrize("settings", [{"resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}])
def test_settings_out_of_range(settings):
    for average in (average_effects, total_effects):
        with pytest.raises(InputError, match="expected"):
            average(EFFECTS, **settings)


def test_total_effects_are_over_facts_by_metric():
    logs = EFFECTS.assign(metric="log_probability", clean=-1.0, corrupted=-4.0)
    table = total_effects(pd.concat([EFFECTS, logs]))
    assert list(table["metric"]) == ["probability", "log_probability"]
    assert list(table)[1:4] == ["clean", "clean_low", "clean_high"]
    first = EFFECTS.groupby("fact")[["clean", "corrupted"]].first()
    totals = table.iloc[0]
    assert totals["total"] == pytest.approx((first["clean"] - first["corrupted"]).mean())
    assert totals["total"] == pytest.approx(totals["clean"] - totals["corrupted"])
    assert totals["total_low"] < totals["total"] < totals["total_high"]
    assert (totals["corrupted_low"], totals["corrupted_high"]) == pytest.approx((0.1, 0.1))
    assert (table["total"].iloc[1], table["total_high"].iloc[1]) == pytest.approx((3.0, 3.0))
    assert list(table["facts"]) == [8, 8]


def test_the_clearest_fact_is_the_one_noise_hurts_most():
    loss = EFFECTS.groupby("fact")[["clean", "corrupted"]].first()
    most = (loss["clean"] - loss["corrupted"]).idxmax()
    assert clearest_fact(EFFECTS) == most
    # The divergence from the clean run grows with the damage, and is 0 for the clean run.
    kl = EFFECTS.assign(metric="kl", corrupted=EFFECTS["clean"] * 5, clean=0.0)
    assert clearest_fact(kl) == most
    assert clearest_fact(pd.concat([kl.assign(corrupted=1.0), EFFECTS])) == most  # probability goes first
    unknown = EFFECTS.assign(clean=EFFECTS["clean"].where(EFFECTS["fact"] == "brel-2"))
    assert clearest_fact(unknown) == "brel-2"


def test_units_say_what_an_effect_is_in():
    assert unit_of("probability").factor == unit_of("normalized_kl").factor == 100
    assert unit_of("normalized_probability").name == "% of the total effect"
    assert unit_of("normalized_log_probability").name == "% of the total effect on log-probability"
    assert unit_of("kl").helps == -1
    assert "negative helps" in unit_of("kl").name
    assert unit_of("normalized_kl").helps == 1  # divided by what the corruption does, which is negative too
    assert (unit_of("my_own").factor, unit_of("my_own").name) == (1, "my_own")


def test_effects_with_the_earlier_spelling_of_a_metric_are_read_as_the_present_one(tmp_path):
    old, new = (EFFECTS.assign(metric=f"{word}_probability") for word in ("normalised", "normalized"))
    old.to_parquet(tmp_path / "effects.parquet", index=False)
    for average in (average_effects, total_effects, fact_totals):
        for source in (old, tmp_path / "effects.parquet", [old.iloc[:500], new.iloc[500:]]):
            pd.testing.assert_frame_equal(average(source), average(new))
    read = read_effects(tmp_path / "effects.parquet", fact="brel-2")
    assert type(read) is Effects
    assert set(read["metric"]) == {"normalized_probability"}
    pd.testing.assert_frame_equal(pd.DataFrame(read), new[new["fact"] == "brel-2"].reset_index(drop=True))
    assert "% of the total effect" in Effects(old)._repr_html_()
    assert with_present_metric_names(EFFECTS) is EFFECTS


def test_token_labels_show_white_space_and_cut_long_tokens():
    assert [token_label(text, "further") for text in (" \n", "\t", " ", " a")] == ["↵", "→", "␣", "a"]
    assert token_label(" Tower", "subject_last") == "Tower*"
    assert token_label("=" * 64, "further") == "=" * 13 + "…"
