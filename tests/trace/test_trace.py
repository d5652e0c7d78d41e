"""Causal tracing against plain hooks on the plain model, and the identities that make severing right."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.models import CountedProducts

from mechedit import Fact, InputError, Site, TraceConfig, trace_facts
from mechedit.models import EMBED, Patch, Resume
from mechedit.trace import (
    METRICS,
    Approximation,
    Corruption,
    EmbeddingStatistics,
    TracePlan,
    embedding_statistics,
    embedding_std,
    plan_trace,
    run_clean_and_corrupted,
    tokenize_fact,
    window_span,
)
from mechedit.trace.attribution import estimate_cells
from mechedit.trace.cells import all_cells, can_change, trace_group
from mechedit.trace.corruption import draw_noise as draw_unit
from mechedit.trace.corruption import unit_covariance_root
from mechedit.trace.labels import role_of
from mechedit.trace.metrics import find_metric
from mechedit.trace.restore import Cell, restore_cells
from mechedit.trace.runs import corruption_patch
from mechedit.trace.traced_fact import as_batch, known_facts, with_replacements

FACT = Fact(id="f", subject="Leon Blum", prompt="The mother tongue of {} is the", object="Korean guitar")
STD = 1.5
CONFIG = TraceConfig(samples=3, sever=("nothing", "mlp", "attn"), window=2)
FEW = TraceConfig(
    samples=3, kinds=("state", "attn"), sever=("nothing", "mlp"), window=2, roles=("subject_first", "subject_last")
)
"""Cells enough to compare two ways of batching them."""


def draw_noise(traced, config, width, noise=None):
    """Unit draws of one fact, as a trace makes them."""
    shape = (config.samples, len(traced.subject), width)
    return draw_unit(traced.fact, shape, config.corrupted_by, None, config.seed)


def cells(runs, kind, sever, layer, position, fact=0):
    """The cell that restores one place."""
    span = window_span(kind, layer, runs.model.n_layers, runs.config.window)
    return [Cell(kind, sever, layer, fact, position, span.start, span.stop)]


def relative(actual, expected):
    """|found − expected| / |expected|: objects of several tokens have tiny probabilities."""
    return float((actual - expected).abs().max() / expected.abs().max())


def with_hooks(model, traced, kind, sever, span, position, config=CONFIG):
    """The published schedule: one plain forward per cell, corrupted rows with hooks that restore and sever."""
    hf, blocks, subject = model.hf, model.hf.transformer.h, list(traced.subject)
    ids = torch.tensor([traced.ids])
    draws = draw_noise(traced, config, model.d_model, None)
    parts = {"state": lambda b: b, "mlp": lambda b: b.mlp, "attn": lambda b: b.attn}
    first = lambda out: out[0] if isinstance(out, tuple) else out  # noqa: E731
    again = lambda out, new: (new, *out[1:]) if isinstance(out, tuple) else new  # noqa: E731
    clean, cut, handles = {}, {}, []

    def keep(store, key):
        return lambda module, inputs, out: store.__setitem__(key, first(out).clone())

    def noisy(module, inputs, out):
        out = out.clone()
        out[:, subject] += STD * draws
        return out

    def write(positions, values):
        def hook(module, inputs, out):
            new = first(out).clone()
            new[:, positions] = values[:, positions]
            return again(out, new)

        return hook

    for layer, block in enumerate(blocks):
        handles.append(parts[kind](block).register_forward_hook(keep(clean, layer)))
    hf(ids)
    [handle.remove() for handle in handles]
    handles = [hf.transformer.wte.register_forward_hook(noisy)]
    if sever != "nothing":
        for layer, block in enumerate(blocks):
            handles.append(parts[sever](block).register_forward_hook(keep(cut, layer)))
    hf(ids.repeat(config.samples, 1))
    [handle.remove() for handle in handles[1:]]
    for layer in cut:
        hook = write([subject[-1]], cut[layer])
        handles.append(parts[sever](blocks[layer]).register_forward_hook(hook))
    for layer in span:
        handles.append(parts[kind](blocks[layer]).register_forward_hook(write([position], clean[layer])))
    logits = hf(ids.repeat(config.samples, 1)).logits[:, traced.prompt_length - 1 :]
    [handle.remove() for handle in handles]
    p = logits.log_softmax(-1)[:, range(len(traced.object_ids)), list(traced.object_ids)].sum(1).exp()
    return p.mean().item()


@torch.no_grad()
def test_every_cell_equals_plain_hooks(small_model):
    traced = tokenize_fact(small_model, FACT)
    assert len(traced.object_ids) > 1, "the object must have several tokens to test joint probability"
    frame = trace_group(small_model, [traced], STD, CONFIG)
    assert len(frame) == 3 * 3 * small_model.n_layers * traced.prompt_length
    for row in frame.sample(60, random_state=0).itertuples():
        span = window_span(row.kind, row.layer, small_model.n_layers, CONFIG.window)
        slow = with_hooks(small_model, traced, row.kind, row.sever, span, row.position)
        assert row.score == pytest.approx(slow, rel=1e-4, abs=0), row
    spread = frame[frame.role == "subject_last"]["effect"].abs().max()
    assert spread > 100 * 1e-4 * frame["score"].abs().max(), "restoring must matter, else equality says nothing"


@torch.no_grad()
@pytest.mark.parametrize("sever", ["mlp", "attn"])
def test_severing_with_nothing_restored_is_the_corrupted_baseline(small_model, sever):
    runs = run_clean_and_corrupted(small_model, [tokenize_fact(small_model, FACT)], STD, CONFIG, None)
    # Position 0 precedes the subject: it was never corrupted, so putting it back restores nothing.
    scores = restore_cells(runs, cells(runs, "state", sever, 0, 0))["probability"]
    assert relative(scores[0], runs.corrupted_scores["probability"][0]) < 1e-5
    # With another draw's outputs held instead (the published defect) the baseline is missed.
    other_draws = run_clean_and_corrupted(
        small_model, [tokenize_fact(small_model, FACT)], STD, TraceConfig(samples=3, sever=(sever,), seed=1), None
    )
    mixed = dataclasses.replace(runs, severed=other_draws.severed)
    wrong = restore_cells(mixed, cells(mixed, "state", sever, 0, 0))["probability"]
    assert relative(wrong[0], runs.corrupted_scores["probability"][0]) > 1e-4


@torch.no_grad()
def test_restoring_every_state_of_a_layer_gives_the_clean_score(small_model):
    # At the last layer only the position that is read matters, here the last prompt token.
    last = small_model.n_layers - 1
    fact = Fact(id="g", subject="Leon Blum", prompt="The mother tongue of {} is the", object="French")
    runs = run_clean_and_corrupted(small_model, [tokenize_fact(small_model, fact)], STD, CONFIG, None)
    assert len(runs.facts[0].object_ids) == 1
    clean, corrupted = runs.clean_scores["probability"], runs.corrupted_scores["probability"]
    score = restore_cells(runs, cells(runs, "state", "nothing", last, runs.facts[0].prompt_length - 1))["probability"]
    assert relative(score, clean) < 1e-5
    assert relative(corrupted, clean) > 1e-2


LIKE_FACTS = [
    Fact(id="0", subject="Miles Davis", prompt="{} plays the sport of", object="Paris"),
    Fact(id="1", subject="Toko Yasuda", prompt="It is said that {} plays the sport of", object="Paris"),
    Fact(id="2", subject="Leon Blum", prompt="The mother tongue of {} is the", object="Paris"),
    Fact(id="3", subject="Apple", prompt="{} is", object="Paris"),
    Fact(id="4", subject="Miles Davis", prompt="{} plays the sport of", object="Paris"),
]
"""Prompts of several lengths, whose subjects begin at several positions."""


@torch.no_grad()
def test_batching_and_grouping_change_nothing(small_model):
    """Facts alone, those of one shape together, and all together: shorter prompts are padded."""
    facts = [tokenize_fact(small_model, fact) for fact in LIKE_FACTS]
    shapes = {fact.shape for fact in facts}
    assert 1 < len(shapes) < len(facts), "some facts must share a shape, and not all"
    assert len({fact.subject.start for fact in facts}) > 2
    config = TraceConfig(
        samples=2, kinds=("state", "mlp", "attn"), sever=("nothing", "mlp", "attn:last", "attn:0+1"), window=2
    )
    narrow = TraceConfig(**{**vars(config), "batch_rows": 7})
    alone = pd.concat([trace_group(small_model, [fact], STD, config) for fact in facts])
    keys = ["fact", "kind", "sever", "layer", "position"]
    for settings, groups in (
        (narrow, [[fact for fact in facts if fact.shape == shape] for shape in sorted(shapes)]),
        (config, [facts]),
        (narrow, [facts]),
    ):
        grouped = pd.concat([trace_group(small_model, group, STD, settings) for group in groups])
        joined = alone.merge(grouped, on=keys, suffixes=("", "_other"))
        assert len(joined) == len(alone) == len(grouped)
        for name in ("score", "clean", "corrupted"):
            np.testing.assert_allclose(joined[name], joined[f"{name}_other"], rtol=1e-4, atol=0)
    assert (alone["effect"].abs() / alone["score"]).max() > 1e-2, "restoring must matter, else equality says nothing"


@torch.no_grad()
def test_estimates_of_facts_of_several_lengths_are_those_of_each_alone(small_model):
    facts = [tokenize_fact(small_model, fact) for fact in LIKE_FACTS]
    config = TraceConfig(samples=2, sever=("nothing", "mlp"), window=2, approximation=Approximation(points=2))
    estimates = {}
    for group in (facts, *([fact] for fact in facts)):
        runs = run_clean_and_corrupted(small_model, list(group), STD, config)
        changing = [c for c in all_cells(runs) if can_change(group[c.fact], c.position, c.first, small_model.n_layers)]
        of_group = estimate_cells(runs, changing, 2)
        estimates[len(group)] = estimates.get(len(group), []) + [
            (group[cell.fact].fact.id, dataclasses.astuple(dataclasses.replace(cell, fact=0)), score["probability"])
            for cell, score in of_group.items()
        ]
    together, alone = sorted(estimates[len(facts)]), sorted(estimates[1])
    assert [entry[:2] for entry in together] == [entry[:2] for entry in alone]
    scores, expected = (np.array([entry[2] for entry in entries]) for entries in (together, alone))
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=0)
    assert np.ptp(np.log(expected)) > 1e-2, "estimates must differ, else equality says nothing"


def test_groups_hold_facts_of_like_lengths(small_model, monkeypatch):
    """The longest first, no row more than half padding; of one length where padding costs something."""
    long = Fact(id="long", subject="Leon Blum", prompt="It is said, " * 5 + "that {} is", object="Paris")
    traced = [tokenize_fact(small_model, fact) for fact in (*LIKE_FACTS, long)]
    lengths = {fact.fact.id: len(fact.ids) for fact in traced}
    assert lengths["long"] > 2 * max(lengths[fact.id] for fact in LIKE_FACTS)

    def groups(skips, **settings):
        monkeypatch.setattr(type(small_model), "skips_padding", skips)
        plan = TracePlan(
            model=small_model, facts=traced, dropped=(), config=TraceConfig(samples=2, **settings), std=STD,
            statistics=None, noise=None, parts=None, provenance={},
        )  # fmt: skip
        return [[lengths[fact.fact.id] for fact in group] for group in plan.groups()]

    together = groups(True)
    assert together[0] == [lengths["long"]]
    assert sorted(length for group in together for length in group) == sorted(lengths.values())
    assert len(together) < len(set(lengths.values())), "lengths must be mixed"
    assert all(group == sorted(group, reverse=True) and 2 * group[-1] >= group[0] for group in together)
    assert all(len(group) <= 2 for group in groups(True, batch_rows=4))
    assert all(len(set(group)) == 1 for group in groups(False))


@torch.no_grad()
def test_explicit_noise_is_scaled_by_noise_std_and_checked(small_model):
    traced = tokenize_fact(small_model, FACT)
    mine = lambda fact, samples, tokens, width: draw_noise(traced, CONFIG, width, None).numpy()  # noqa: E731
    same = trace_group(small_model, [traced], STD, CONFIG, mine)
    pd.testing.assert_frame_equal(same, trace_group(small_model, [traced], STD, CONFIG))
    zero = trace_group(small_model, [traced], STD, CONFIG, lambda fact, *shape: np.zeros(shape))
    np.testing.assert_allclose(zero["corrupted"], zero["clean"], rtol=1e-4)
    with pytest.raises(InputError, match=r"expected finite draws of shape \(3"):
        trace_group(small_model, [traced], STD, CONFIG, lambda fact, samples, tokens, width: np.zeros((1, 1, 1)))


def test_draws_depend_on_seed_and_fact_and_on_nothing_else(lens_model):
    traced = tokenize_fact(lens_model, FACT)
    draws = draw_noise(traced, CONFIG, 8, None)
    assert torch.equal(draws, draw_noise(traced, TraceConfig(samples=3, window=1), 8, None))
    assert not torch.equal(draws, draw_noise(traced, TraceConfig(samples=3, seed=1), 8, None))
    renamed = tokenize_fact(lens_model, Fact(**{**vars(FACT), "id": "h"}))
    assert not torch.equal(draws, draw_noise(renamed, CONFIG, 8, None))


def test_sigma_is_the_spread_of_the_subjects_embeddings(lens_model):
    subjects = ["Leon Blum", "Apple"]
    rows = [lens_model.hf.transformer.wte.weight[lens_model.tokenizer(" " + s)["input_ids"]] for s in subjects]
    with torch.no_grad():
        assert embedding_std(lens_model, subjects) == pytest.approx(torch.cat(rows).std().item(), rel=1e-5)


def test_roles_name_each_token_once():
    roles = [role_of(i, range(2, 5), 9) for i in range(9)]
    assert roles == ["before"] * 2 + [
        "subject_first",
        "subject_middle",
        "subject_last",
        "after",
        "further",
        "further",
        "last",
    ]
    assert role_of(2, range(2, 3), 6) == "subject_last", "a one-token subject is not counted twice"
    assert role_of(3, range(2, 4), 4) == "subject_last", "a prompt may end in the subject"


def test_windows_are_centered_and_cut_at_the_edges():
    assert window_span("mlp", 5, 12, 4) == range(3, 7)
    assert window_span("attn", 0, 12, 4) == range(0, 2)
    assert window_span("mlp", 11, 12, 4) == range(9, 12)
    assert window_span("state", 3, 12, 4) == range(3, 4)
    assert len(window_span("mlp", 20, 48, None)) == 10, "the papers' width"


def test_only_known_facts_are_traced_and_the_others_are_named(lens_model):
    known = Fact(id="known", subject="Leon Blum", prompt="{} is", object="French")
    (token,) = tokenize_fact(lens_model, known).object_ids
    with torch.no_grad():  # a bias that makes the model say this token whatever it is asked
        lens_model.hf.transformer.ln_f.bias += 10 * lens_model.hf.transformer.wte.weight[token]
    frame = trace_facts(lens_model, [known, FACT], CONFIG)
    assert set(frame["fact"]) == {"known"}
    assert frame.attrs["n_facts"] == 1
    assert frame.attrs["dropped"][0][0] == "f"
    with pytest.raises(InputError, match="none of the 1 facts can be traced"):
        trace_facts(lens_model, [FACT], CONFIG)


def test_what_the_model_says_ends_where_it_says_something_else(lens_model):
    """Behind the object's tokens it might say anything, which it would not come to by itself."""
    fact = dataclasses.replace(FACT, object=f"{FACT.object} guitar in Seattle")
    (dropped,) = known_facts(lens_model, [fact])[1]
    traced = tokenize_fact(lens_model, fact)
    with torch.no_grad():
        logits = lens_model.hf(torch.tensor([traced.ids])).logits[0, traced.prompt_length - 1]
    assert int(logits.argmax()) != traced.object_ids[0], "the control"
    text = lens_model.tokenizer.decode(int(logits.argmax())).strip()
    assert dropped == (fact.id, f"the model says {text!r}, not {fact.object!r}")


def test_an_interrupted_trace_goes_on_where_it_stopped(lens_model, tmp_path, monkeypatch):
    facts = [Fact(id=str(i), subject="Leon Blum", prompt="{} is" + " a" * i, object="French") for i in range(3)]
    (token,) = tokenize_fact(lens_model, facts[0]).object_ids
    with torch.no_grad():
        lens_model.hf.transformer.ln_f.bias += 10 * lens_model.hf.transformer.wte.weight[token]
    uninterrupted = trace_facts(lens_model, facts, CONFIG)
    groups = []

    def counted(*arguments):
        if len(groups) == stop:
            raise KeyboardInterrupt
        groups.append(arguments)
        return trace_group(*arguments)

    monkeypatch.setattr("mechedit.trace.trace.trace_group", counted)
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        trace_facts(lens_model, facts, CONFIG, parts=tmp_path)
    stop = None
    pd.testing.assert_frame_equal(trace_facts(lens_model, facts, CONFIG, parts=tmp_path), uninterrupted)
    assert len(groups) == 3, "what was finished is not made again"
    trace_facts(lens_model, facts, TraceConfig(**{**vars(CONFIG), "seed": 1}), parts=tmp_path)
    assert len(groups) == 6, "other settings share nothing"
    with pytest.raises(ValueError, match="explicit noise"):
        trace_facts(lens_model, facts, CONFIG, noise=lambda *shape: None, parts=tmp_path)


@pytest.mark.parametrize(
    "bad", [{"kinds": ("resid",)}, {"sever": ("both",)}, {"roles": ("tail",)}, {"samples": 0}, {"kinds": ()}]
)
def test_settings_are_checked_at_the_door(bad):
    with pytest.raises(InputError):
        TraceConfig(**bad)


def test_site_order_is_the_forward_order():
    parts = ("attn_key", "attn_out", "mlp_key", "mlp_out", "resid")
    forward = [Site(0, "embed"), *(Site(layer, part) for layer in range(2) for part in parts)]
    assert sorted(reversed(forward), key=lambda site: site.order) == forward


def known_facts_of(model, count=3):
    """Facts that the model knows: its last norm's bias is moved so that it says one token whatever it is asked."""
    facts = [
        Fact(id=str(i), subject=name, prompt="{} plays the sport of", object="French", relation="sport")
        for i, name in enumerate(["Miles Davis", "Toko Yasuda", "Leon Blum", "Apple", "Danielle Darrieux"][:count])
    ]
    (token,) = tokenize_fact(model, facts[0]).object_ids
    with torch.no_grad():
        model.hf.transformer.ln_f.bias += 10 * model.hf.transformer.wte.weight[token]
    return facts


@torch.no_grad()
def test_severing_a_subset_of_layers_equals_plain_hooks_and_all_layers_equal_the_whole(small_model):
    traced = tokenize_fact(small_model, FACT)
    n = small_model.n_layers
    config = TraceConfig(samples=3, kinds=("state",), sever=("mlp", f"mlp@0-{n - 1}", "mlp@1", "mlp@2", "nothing"))
    frame = trace_group(small_model, [traced], STD, config).set_index(["sever", "layer", "position"])["score"]
    np.testing.assert_array_equal(frame["mlp"], frame[f"mlp@0-{n - 1}"])
    position = traced.subject[-1]
    alone, none, last = (float(frame[label, 0, position]) for label in ("mlp@1", "nothing", "mlp@2"))
    assert alone == pytest.approx(with_hooks(small_model, traced, "state", "mlp", range(1), position, config), rel=1e-4)
    assert abs(alone / none - 1) > 1e-3, "the cut must do something"
    assert last == pytest.approx(none, rel=1e-5), "the last block passes on the position that is read, and no other"
    # A layer's MLP below the restored state has its corrupted outputs anyway.
    np.testing.assert_allclose(frame["mlp@1"].loc[1:], frame["nothing"].loc[1:], rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("place", ["last", "after", "subject_first", "-2", "2"])
def test_severing_elsewhere_with_nothing_restored_is_the_corrupted_baseline(small_model, place):
    config = TraceConfig(samples=3, kinds=("state",), sever=(f"attn:{place}", "nothing"))
    runs = run_clean_and_corrupted(small_model, [tokenize_fact(small_model, FACT)], STD, config)
    score = restore_cells(runs, cells(runs, "state", f"attn:{place}", 0, 0))["probability"]
    assert relative(score[0], runs.corrupted_scores["probability"][0]) < 1e-5
    severed, unsevered = (
        restore_cells(runs, cells(runs, "state", label, 0, runs.facts[0].subject[-1]))["probability"]
        for label in (f"attn:{place}", "nothing")
    )
    if place not in ("subject_first", "2"):  # which precede the restored token: nothing there has changed
        assert relative(severed, unsevered) > 1e-5, "the cut must do something"


SHAPE = (4000, 2, 6)


@pytest.mark.parametrize("distribution", ["gaussian", "uniform", "student", "multivariate"])
def test_every_noise_has_mean_zero_and_the_same_standard_deviation(distribution):
    """They differ in shape: the largest draw, the covariance."""
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(1.0, 7.0))
    statistics = EmbeddingStatistics(std=1.0, mean=torch.zeros(6), covariance_root=unit_covariance_root(rows))
    corruption = Corruption(distribution=distribution, degrees=6)
    draws = draw_unit(FACT, SHAPE, corruption, statistics, seed=0)
    assert draws.shape == SHAPE
    assert draws.mean().abs() < 0.03
    assert draws.square().mean().sqrt().item() == pytest.approx(1, abs=0.03)
    spreads = draws.flatten(0, 1).std(0)
    if distribution == "multivariate":
        expected = rows.std(0) / rows.var(0).mean().sqrt()
        assert torch.allclose(spreads, expected.float(), atol=0.05)
        assert spreads.max() > 3 * spreads.min(), "the planted covariance is not round"
    else:
        assert torch.allclose(spreads, torch.ones(6), atol=0.06)
    largest = draws.abs().max().item()
    assert largest <= 3**0.5 if distribution == "uniform" else largest > 3
    if distribution == "student":
        norms = draws.norm(dim=-1)
        assert norms.max() > 2 * draw_unit(FACT, SHAPE, Corruption(), None, 0).norm(dim=-1).max(), "heavy tails"


@torch.no_grad()
def test_replacing_puts_the_noise_where_the_embedding_was(small_model):
    traced = tokenize_fact(small_model, FACT)
    clean = small_model.run(as_batch([traced], small_model), read=[EMBED])[EMBED]
    statistics = embedding_statistics(small_model, [FACT.subject, "Apple", "Miles Davis"], covariance_root=True)

    def corrupted(**how):
        config = TraceConfig(samples=3, corruption=Corruption(**how))
        return corruption_patch(
            small_model, as_batch([traced], small_model), clean, [traced], STD, config, None, statistics
        ).value

    embeddings = clean[0, traced.subject.start : traced.subject.stop]
    for distribution in ("gaussian", "uniform", "student"):
        added, replacing = (corrupted(distribution=distribution, replace=replace) for replace in (False, True))
        torch.testing.assert_close(added - replacing, embeddings.expand_as(added), atol=1e-5, rtol=1e-4)
    added, replacing = (corrupted(distribution="multivariate", replace=replace) for replace in (False, True))
    # Added noise has mean zero (the published code adds the mean embedding here too); a replacement has the mean.
    torch.testing.assert_close(
        added - embeddings - (replacing - statistics.mean), torch.zeros_like(added), atol=1e-5, rtol=0
    )
    assert (embeddings - statistics.mean).abs().max() > 0.1


@torch.no_grad()
def test_extra_tokens_after_the_subject_are_corrupted_too(small_model):
    traced = tokenize_fact(small_model, FACT)
    assert list(traced.corrupted(1)) == [*traced.subject, traced.subject.stop]
    assert traced.corrupted(99).stop == traced.prompt_length, "never the object"
    plain, more = (
        run_clean_and_corrupted(
            small_model, [traced], STD, TraceConfig(samples=3, corruption=Corruption(extra_tokens=extra))
        )
        for extra in (0, 1)
    )
    after = slice(traced.subject.stop, traced.subject.stop + 1)
    changed = [(runs.corruption.positions == after.start).any().item() for runs in (plain, more)]
    assert changed == [False, True]
    # Restoring the states of all corrupted tokens at layer 0, one after the other, is what the averages are made of.
    frame = trace_group(small_model, [traced], STD, TraceConfig(samples=3, corruption=Corruption(extra_tokens=1)))
    assert frame[frame["role"] == "after"]["effect"].abs().max() > 0


@torch.no_grad()
def test_token_replacement_runs_the_other_subjects_prompt(small_model):
    facts = [
        Fact(id="a", subject="Toko Yasuda", prompt="The mother tongue of {} is the", object="French", relation="r"),
        Fact(id="b", subject="Kate Bush", prompt="{} speaks", object="Korean", relation="r"),
        Fact(id="c", subject="Omar Sy", prompt="{} speaks", object="French", relation="r"),
        Fact(id="d", subject="Lone Bulm", prompt="{} speaks", object="English", relation="other"),
        Fact(id="e", subject="Danielle Darrieux", prompt="{} speaks", object="English", relation="r"),
    ]
    config = TraceConfig(samples=3, corruption="tokens")
    (traced,), dropped = with_replacements(small_model, [tokenize_fact(small_model, facts[0])], facts, config)
    assert not dropped
    same_length = [
        fact for fact in facts[1:] if len(tokenize_fact(small_model, fact).subject) == len(traced.subject)
        and fact.object != "French"
    ]  # fmt: skip
    assert same_length, "the test needs a donor"
    runs = run_clean_and_corrupted(small_model, [traced], STD, config)
    expected = []
    for donor in traced.replacements:
        ids = list(traced.ids)
        ids[traced.subject.start : traced.subject.stop] = donor
        logits = small_model.hf(torch.tensor([ids])).logits[0, traced.prompt_length - 1 :]
        object_ids = list(traced.object_ids)
        expected.append(logits.log_softmax(-1)[range(len(object_ids)), object_ids].sum().exp().item())
    corrupted = runs.corrupted_scores["probability"][0].item()
    assert corrupted == pytest.approx(np.mean(expected), rel=1e-4)
    assert abs(corrupted / runs.clean_scores["probability"][0].item() - 1) > 1e-3
    texts = {small_model.tokenizer.decode(donor).strip() for donor in traced.replacements}
    assert texts <= {fact.subject for fact in same_length}
    lonely, why = with_replacements(small_model, [traced], facts[:1], config)
    assert not lonely
    assert "no other subject" in why[0][1]


def test_corruptions_that_make_no_sense_are_refused(small_model):
    for bad in ({"distribution": "pink"}, {"degrees": 2}, {"extra_tokens": -1}):
        with pytest.raises(InputError):
            Corruption(**bad)
    with pytest.raises(InputError, match="neither replace nor extra_tokens"):
        Corruption(distribution="tokens", replace=True)
    config, traced = TraceConfig(samples=2, corruption="uniform"), [tokenize_fact(small_model, FACT)]
    with pytest.raises(InputError, match="explicit draws are standard-normal"):
        run_clean_and_corrupted(small_model, traced, STD, config, lambda fact, *shape: np.zeros(shape))


EVERY_METRIC = ("probability", "log_probability", "logit_difference", "kl", "normalized_logit_difference")


@torch.no_grad()
def test_metrics_equal_a_naive_reading_of_the_logits(small_model):
    fact = Fact(**{**vars(FACT), "foil": "English"})
    traced = tokenize_fact(small_model, fact)
    config = TraceConfig(samples=3, kinds=("state",), metrics=EVERY_METRIC)
    frame = trace_group(small_model, [traced], STD, config).set_index(["metric", "layer", "position"])
    ids = torch.tensor([traced.ids])
    logits = small_model.hf(ids).logits[0, traced.prompt_length - 1 :].double()
    o, f = traced.object_ids, tokenize_fact(small_model, fact).foil_id
    p = torch.stack([logits[i].softmax(-1)[token] for i, token in enumerate(o)]).prod()
    clean = frame.groupby("metric")["clean"].first()
    assert clean["probability"] == pytest.approx(p.item(), rel=1e-4)
    assert clean["log_probability"] == pytest.approx(p.log().item(), rel=1e-5)
    assert clean["logit_difference"] == pytest.approx((logits[0, o[0]] - logits[0, f]).item(), rel=1e-4)
    assert clean["kl"] == pytest.approx(0, abs=1e-6)
    assert clean["normalized_logit_difference"] == 1
    kl = frame.loc["kl"]
    assert (kl["score"] > -1e-6).all()
    assert kl["corrupted"].iloc[0] > 1e-3
    frame = frame.sort_index()
    recovered = frame.loc["normalized_logit_difference"]["score"]
    rows = frame.loc["logit_difference"]
    np.testing.assert_allclose(recovered, rows["effect"] / (rows["clean"] - rows["corrupted"]), rtol=1e-6)
    assert recovered.std() > 0


@torch.no_grad()
def test_many_metrics_take_no_more_passes_and_any_function_is_one(small_model):
    def last_logit(answers):
        return answers.logits[:, -1, 7].float()

    traced, passes = tokenize_fact(small_model, FACT), []
    trace_group(small_model, [traced], STD, TraceConfig(samples=3))  # what happens once has happened
    run = small_model.run
    small_model.run = lambda *args, **kwargs: (passes.append(1), run(*args, **kwargs))[1]
    try:
        single_metric = trace_group(small_model, [traced], STD, TraceConfig(samples=3))
        single = len(passes)
        many_metrics = trace_group(
            small_model, [traced], STD, TraceConfig(samples=3, metrics=(*EVERY_METRIC, last_logit))
        )
    finally:
        del small_model.run
    assert len(passes) == 2 * single
    assert set(many_metrics["metric"]) == {*EVERY_METRIC, "last_logit"}
    pd.testing.assert_frame_equal(
        many_metrics[many_metrics["metric"] == "probability"].reset_index(drop=True), single_metric
    )
    with pytest.raises(InputError, match="the metric is 'accuracy'"):
        TraceConfig(metrics=("accuracy",))


@torch.no_grad()
@pytest.mark.parametrize(
    ("given", "read"),
    [
        (r"a tensor of shape \(\d+,\) and dtype int64", lambda answers: answers.logits[:, -1].argmax(-1)),
        (r"a tensor of shape \(\d+, \d+\) and dtype float32", lambda answers: answers.logits[:, -1]),
        (r"a tensor of shape \(\) and dtype float32", lambda answers: answers.logits.mean()),
        ("a list", lambda answers: answers.logits[:, -1, 7].tolist()),
    ],
    ids=["integers", "too much", "one number", "a list"],
)
def test_a_metric_that_gives_no_number_per_row_is_refused(small_model, given, read):
    def mine(answers):
        return read(answers)

    with pytest.raises(InputError, match=f"the metric 'mine' gives {given} for [0-9]+ rows, expected"):
        trace_group(small_model, [tokenize_fact(small_model, FACT)], STD, TraceConfig(samples=3, metrics=(mine,)))


@torch.no_grad()
def test_metrics_of_the_object_alone_take_no_logits_but_the_clean_runs(small_model):
    """All that is larger than a batch's states is read off a part of the vocabulary at a time."""
    traced, rows_with_logits, run = tokenize_fact(small_model, FACT), [], small_model.run

    def watched(*args, **kwargs):
        result = run(*args, **kwargs)
        if result.final_logits is not None:
            rows_with_logits.append(len(result.logits))
        return result

    small_model.readout()
    small_model.run = watched
    try:
        of_object = ("probability", "normalized_log_probability")
        without = trace_group(small_model, [traced], STD, TraceConfig(samples=3, metrics=of_object))
        assert rows_with_logits == [1], "the clean run's"
        with_logits = trace_group(small_model, [traced], STD, TraceConfig(samples=3, metrics=(*of_object, "kl")))
        assert max(rows_with_logits) > 3, "the control: a divergence needs them"
    finally:
        del small_model.run
    expected = with_logits[with_logits["metric"] != "kl"].reset_index(drop=True)
    pd.testing.assert_frame_equal(without, expected, rtol=1e-5)
    assert without.groupby("metric")["effect"].std().min() > 0


def test_the_earlier_spelling_of_normalized_metrics_is_accepted():
    earlier, present = (TraceConfig(metrics=("kl", f"{word}_kl")) for word in ("normalised", "normalized"))
    assert earlier == present
    assert earlier.plain()["metrics"] == ["kl", "normalized_kl"]
    assert find_metric("normalised_kl") is METRICS["kl"]
    with pytest.raises(InputError, match="each once"):
        TraceConfig(metrics=("normalised_kl", "normalized_kl"))


@torch.no_grad()
def test_a_foil_that_is_not_given_is_the_strongest_rival(small_model):
    config = TraceConfig(samples=2, metrics=("logit_difference",))
    runs = run_clean_and_corrupted(small_model, [tokenize_fact(small_model, FACT)], STD, config)
    logits = small_model.hf(torch.tensor([runs.facts[0].ids])).logits[0, runs.facts[0].prompt_length - 1].clone()
    logits[runs.facts[0].object_ids[0]] = -torch.inf
    assert runs.foils.item() == logits.argmax().item()
    with pytest.raises(InputError, match="starts with the same token"):
        tokenize_fact(small_model, Fact(**{**vars(FACT), "foil": FACT.object}))


def test_memory_bounds_the_rows_and_changes_nothing(lens_model):
    facts = known_facts_of(lens_model)
    free = trace_facts(lens_model, facts, FEW)
    largest = []
    run = lens_model.run
    lens_model.run = lambda tokens, *args, **kwargs: (largest.append(len(tokens.ids)), run(tokens, *args, **kwargs))[1]
    try:
        with pytest.raises(InputError, match="expected at least") as refused:
            trace_facts(lens_model, facts, TraceConfig(**{**vars(FEW), "memory": 1e-9}))
        need = float(str(refused.value).partition("at least ")[2].partition(" GiB")[0])
        largest.clear()
        tight = trace_facts(lens_model, facts, TraceConfig(**{**vars(FEW), "memory": need}))
    finally:
        del lens_model.run
    keys = ["fact", "kind", "sever", "layer", "position"]
    joined = free.merge(tight, on=keys, suffixes=("", "_tight"))
    assert len(joined) == len(free)
    np.testing.assert_allclose(joined["score"], joined["score_tight"], rtol=1e-4)


def test_a_pass_that_does_not_fit_is_halved(lens_model, monkeypatch):
    facts, tried = known_facts_of(lens_model), []
    unhalved = trace_facts(lens_model, facts, FEW)

    def small_device(runs, cell_batch):
        tried.append(len(cell_batch))
        if len(cell_batch) > 2:
            raise torch.OutOfMemoryError
        return restore_cells(runs, cell_batch)

    monkeypatch.setattr("mechedit.trace.cells.restore_cells", small_device)
    halved = trace_facts(lens_model, facts, FEW)
    assert max(tried) > 2
    keys = ["fact", "kind", "sever", "layer", "position"]
    joined = unhalved.merge(halved, on=keys, suffixes=("", "_halved"))
    np.testing.assert_allclose(joined["score"], joined["score_halved"], rtol=1e-4)


def test_a_plan_streams_one_group_after_another(lens_model):
    facts = known_facts_of(lens_model, 5)
    plan = plan_trace(lens_model, facts, TraceConfig(**{**vars(FEW), "batch_rows": FEW.samples}))
    frames = iter(plan)
    first = next(frames)
    assert set(first["fact"]) == {plan.facts[0].fact.id}, "one fact per group, and no more than that at once"
    streamed = pd.concat([first, *frames])
    effects = trace_facts(lens_model, facts, FEW)
    assert len(streamed) == len(effects)
    assert plan.attrs["n_facts"] == len(plan.facts) == effects.attrs["n_facts"]


def test_scores_that_are_not_finite_name_fact_and_layer(lens_model):
    facts = known_facts_of(lens_model, 1)

    def overflow(answers):
        return torch.full((len(answers.objects),), torch.inf)

    with pytest.raises(InputError, match=r"fact '0', \w+ at layer \d, position \d: the overflow is inf"):
        trace_facts(lens_model, facts, TraceConfig(samples=2, metrics=(overflow,)))


def test_facts_at_the_door(lens_model):
    facts = known_facts_of(lens_model, 1)
    with pytest.raises(InputError, match="two facts have the id '0'"):
        trace_facts(lens_model, [*facts, *facts])
    with pytest.raises(InputError, match="names layer 7, expected 0 to 2"):
        trace_facts(lens_model, facts, TraceConfig(sever=("mlp@7",)))
    long = Fact(id="long", subject="Leon Blum", prompt="{} " + "and so on " * 200, object="French")
    with pytest.raises(InputError, match=r"expected at most \d+, all that"):
        trace_facts(lens_model, [*facts, long])


def test_a_prompt_that_lacks_the_roles_asked_for_is_dropped_with_the_reason(lens_model):
    (fact,) = known_facts_of(lens_model, 1)
    ends = Fact(**{**vars(fact), "id": "ends", "prompt": "The sport of {}"})
    config = TraceConfig(samples=2, kinds=("state",), roles=("after", "last"))
    frame = trace_facts(lens_model, [fact, ends], config)
    assert set(frame["fact"]) == {"0"}
    assert frame.attrs["dropped"] == [
        ["ends", "its prompt 'The sport of Miles Davis' has no token of the role after or last"]
    ]
    with pytest.raises(InputError, match="no token of the role after or last"):
        trace_facts(lens_model, [ends], config)
    many = [dataclasses.replace(ends, id=f"a rather long name of a fact, number {i}") for i in range(8)]
    with pytest.raises(InputError, match=r"number 2.*no token of the role after or last"):
        trace_facts(lens_model, many, config)
    assert set(trace_facts(lens_model, [ends], TraceConfig(samples=2, kinds=("state",)))["fact"]) == {"ends"}


@torch.no_grad()
def test_a_pass_computes_what_its_cells_can_change_and_nothing_else(neo_model):
    """Tokens times layers of what one position's cells compute: those after each first block, from there on."""
    traced = tokenize_fact(neo_model, FACT)
    config = TraceConfig(samples=3, kinds=("state", "mlp"), sever=("nothing", "attn"), window=2)
    runs = run_clean_and_corrupted(neo_model, [traced], STD, config)
    position, n_layers = traced.subject[-1], neo_model.n_layers
    cell_batch = sorted(
        (cell for cell in all_cells(runs) if cell.position == position and cell.first < n_layers - 1),
        key=lambda cell: cell.first,
    )
    restore_cells(runs, cell_batch)  # which also finds the states that windows start from
    with CountedProducts(neo_model) as products:
        means = restore_cells(runs, cell_batch)["probability"]
    changed = 3 * (len(traced.ids) - position)
    expected = {layer: changed * sum(cell.first < layer for cell in cell_batch) for layer in range(1, n_layers)}
    assert expected[1] < expected[n_layers - 1], "rows must join on the way"
    # The last block passes on the positions that are read, and needs only keys and values of the others.
    expected[n_layers - 1] = 3 * runs.read_at.numel() * len(cell_batch)
    assert products.tokens == expected
    alone = torch.cat([restore_cells(runs, [cell])["probability"] for cell in cell_batch])
    assert relative(means, alone) < 1e-5
    assert relative(means[0], runs.corrupted_scores["probability"][0]) > 1e-3


@torch.no_grad()
def test_a_pass_begins_each_row_at_its_own_token(neo_model):
    """Cells of all positions and of two facts in one pass compute their own tokens and those behind.

    They compute no padding where an engine leaves it out.
    """
    facts = [tokenize_fact(neo_model, fact) for fact in (LIKE_FACTS[1], LIKE_FACTS[3])]
    runs = run_clean_and_corrupted(neo_model, facts, STD, TraceConfig(samples=2, kinds=("state",)))
    n_layers = neo_model.n_layers
    cell_batch = sorted(
        (
            cell
            for cell in all_cells(runs)
            if cell.first < n_layers - 1 and cell.position >= facts[cell.fact].subject[0]
        ),
        key=lambda cell: cell.first,
    )
    changed = [len(facts[cell.fact].ids) - cell.position for cell in cell_batch]
    assert min(changed) * 2 < max(changed)
    with CountedProducts(neo_model) as products:
        restore_cells(runs, cell_batch)
    if not neo_model.skips_padding:
        changed = [max(changed)] * len(changed)
    for layer in range(1, n_layers - 1):
        joined = [count for count, cell in zip(changed, cell_batch, strict=True) if cell.first < layer]
        assert products.tokens[layer] == 2 * sum(joined)
    assert products.tokens[n_layers - 1] == 2 * runs.read_at.shape[1] * len(cell_batch)


@torch.no_grad()
def test_the_corrupted_run_computes_of_the_last_block_what_cells_need(neo_model):
    fact = tokenize_fact(neo_model, FACT)
    last, read = neo_model.n_layers - 1, len(fact.object_ids)
    every = len(fact.ids)
    for settings, expected in (
        ({"kinds": ("state",), "sever": ("nothing", "mlp", "attn")}, read),
        ({"kinds": ("state",), "sever": ("attn:last",)}, every),
        ({"kinds": ("state", "mlp")}, every),
        ({"kinds": ("attn",)}, read),
        ({"kinds": ("state",), "approximation": Approximation()}, every),
    ):
        config = TraceConfig(samples=3, **settings)
        with CountedProducts(neo_model) as products:
            runs = run_clean_and_corrupted(neo_model, [fact], STD, config)
        assert products.tokens[last] == every + 3 * expected, settings
        assert products.tokens[0] == every + 3 * every
        assert (Site(last, "resid") in runs.corrupted.values) == (expected == every and "attn:last" not in config.sever)


@torch.no_grad()
def test_a_window_of_mlps_begins_without_a_run(neo_model):
    runs = run_clean_and_corrupted(neo_model, [tokenize_fact(neo_model, FACT)], STD, TraceConfig(samples=3, window=2))
    rows, last = torch.arange(3), runs.facts[0].subject[-1]
    where = torch.full((3, 1), last)
    for layer in range(1, neo_model.n_layers):
        site, resid = Site(layer, "mlp_out"), Site(layer, "resid")
        patch = Patch(site, where, runs.clean[site][0, last].expand(3, 1, -1))
        resume = Resume(layer, runs.corrupted[Site(layer - 1, "resid")])
        run = neo_model.run(runs.tokens, [patch], [resid], resume=resume, stop_after=layer)
        with CountedProducts(neo_model) as products:
            states = runs.mlp_window_states(layer, rows, where[:, 0])
        assert not products.calls
        assert relative(states, run[resid][:, last]) < 1e-5
        assert relative(states, runs.corrupted[resid][:, last]) > 1e-3


@torch.no_grad()
def test_one_layer_and_windows_that_start_at_the_last_layer(make_model):
    """Rows that join at the last block, from the embedding or from the states before it."""
    for n_layer in (1, 2):
        model = make_model("gpt2", n_layer=n_layer)
        traced = tokenize_fact(model, FACT)
        config = TraceConfig(samples=3, sever=("nothing", "mlp"), window=1)
        frame = trace_group(model, [traced], STD, config)
        for row in frame[(frame["layer"] == n_layer - 1) & (frame["position"] >= traced.subject[-1])].itertuples():
            span = window_span(row.kind, row.layer, n_layer, 1)
            slow = with_hooks(model, traced, row.kind, row.sever, span, row.position, config)
            assert row.score == pytest.approx(slow, rel=1e-4, abs=0), row
        assert frame[frame["role"] == "last"]["effect"].abs().max() > 1e-3 * frame["score"].abs().max()


def test_a_model_that_keeps_no_keys_restores_behind_the_corrupted_prefix(lens_model, monkeypatch) -> None:
    """What stands before the restored token is run again, with the embeddings that it had: corrupted ones."""
    config = TraceConfig(samples=2, kinds=("mlp",), window=1, roles=("subject_last",), metrics=("log_probability",))
    effects = []
    for keeps_keys in (True, False):
        monkeypatch.setattr(lens_model, "keeps_keys", keeps_keys)
        frame = trace_group(lens_model, [tokenize_fact(lens_model, FACT)], STD, config)
        effects.append(torch.tensor(frame["effect"].to_numpy()))
    assert effects[0].abs().max() > 1e-4
    assert relative(effects[1], effects[0]) < 1e-2
