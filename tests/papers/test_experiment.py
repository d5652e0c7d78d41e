"""What the scripts of the papers share: requests made from facts, variants of methods, results that are kept."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pandas as pd
import pytest

from analyses.common.command import open_experiment, options
from analyses.common.counterfacts import counterfacts
from analyses.common.experiment import Experiment
from analyses.common.variants import Variant
from mechedit import InputError, load_facts
from mechedit.data import check_requests

FACTS = load_facts("known")


def test_requests_ask_for_another_object_of_the_relation_and_neighbors_keep_theirs():
    requests = counterfacts(FACTS)
    check_requests(requests)
    assert len(requests) > 900
    objects = {(fact.subject, fact.relation): fact.object for fact in FACTS}
    for request in requests[:200]:
        assert request.target_true == objects[request.subject, request.relation] != request.target_new
        for neighbor in request.neighbors:
            before, after = request.prompt.split("{}")
            subject = neighbor.prompt.removeprefix(before).removesuffix(after)
            assert objects[subject, request.relation] == neighbor.object == request.target_true
        assert all(request.subject in text and text != request.text for text in request.paraphrases)


def test_no_neighbor_is_edited_however_many_requests_there_are():
    requests = counterfacts(FACTS)
    edited = {request.subject for request in requests}
    around = [text for request in requests for text in (*(n.prompt for n in request.neighbors), *request.attributes)]
    assert not [text for text in around if any(text.startswith(name) for name in edited)]
    # Without the split most of them would be: the almanac has eight facts of each subject.
    assert len(edited) > 100


def test_fewer_requests_are_the_first_of_more_and_a_seed_makes_others():
    assert counterfacts(FACTS, 20) == counterfacts(FACTS, 50)[:20]
    assert counterfacts(FACTS, 20, seed=1) != counterfacts(FACTS, 20)
    assert len({request.relation for request in counterfacts(FACTS, 20)}) > 4


def test_more_requests_than_the_facts_allow_are_refused():
    with pytest.raises(InputError, match="allow"):
        counterfacts(FACTS, 100_000)


def test_a_variant_reads_method_layers_and_settings():
    assert Variant.parse("memit", [1, 2]) == Variant(method="memit", layers=(1, 2))
    assert Variant.parse("rome@2", [1, 2]).layers == (2,)
    variant = Variant.parse("memit@1-3:strategy=sqrt;clamp=1", [0])
    assert (variant.layers, variant.settings) == ((1, 2, 3), {"strategy": "sqrt", "clamp": "1"})
    assert variant.name == "memit, strategy sqrt, clamp 1"
    with pytest.raises(InputError, match="nonsense"):
        Variant.parse("nonsense", [1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memit:clamp", "the setting 'clamp' of a method"),
        ("memit:lr:0.3", "the setting 'lr:0.3' of a method"),
        ("memit:strategy=sqrt;clamp", "the setting 'clamp' of a method"),
        ("memit:=1", "the setting '=1' of a method"),
        ("memit:clamp=", "the setting 'clamp=' of a method"),
        ("memit:clamp=1;clamp=2", "the setting 'clamp=2' of a method"),
        ("memit:", "the method 'memit:' ends with :"),
        ("strategy=sqrt", "the method is 'strategy=sqrt', .* between two of its settings stands ;"),
    ],
)
def test_a_setting_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    """The last one is what a comma between two settings leaves."""
    with pytest.raises(InputError, match=message):
        Variant.parse(text, [1])
    assert Variant.parse("memit: clamp=1; strategy=sqrt", [1]).settings == {"clamp": "1", "strategy": "sqrt"}


def test_a_setting_that_the_method_lacks_is_refused_before_layers_are_traced(tmp_path, monkeypatch):
    monkeypatch.setattr(Experiment, "trace", None)
    small = open_experiment("try", options("Try."), ["--out", str(tmp_path), "--no-tuned"])
    for text, message in (("memit:clmp=1", "'clmp=1' cannot be read"), ("memit@99", "layer 99 is not in the model")):
        with pytest.raises(InputError, match=message):
            small.variants([text])
    with pytest.raises(TypeError):  # the control: what can be read asks for the trace
        small.variants(["memit:clamp=1"])


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Experiment:
    out = tmp_path_factory.mktemp("papers")
    return open_experiment("try", options("Try."), ["--out", str(out), "--quick", "--count", "3"])


def test_a_request_that_contradicts_an_earlier_one_is_left_out(tmp_path):
    """As CounterFact has some: without it no script could read that file."""
    first, second, *_ = counterfacts(FACTS, 4)
    contradicting = replace(first, id="contradicting", target_new=second.target_new + "s")
    rows = [asdict(request) for request in (first, contradicting, second)]
    (tmp_path / "requests.json").write_text(json.dumps(rows, default=str), encoding="utf-8")
    arguments = ["--out", str(tmp_path), "--quick", "--count", "2", "--requests", str(tmp_path / "requests.json")]
    requests = open_experiment("try", options("Try."), arguments).requests
    assert [request.id for request in requests] == [first.id, second.id]
    check_requests(requests)
    with pytest.raises(InputError, match="conflict"):
        check_requests([first, contradicting, second])


def test_a_scored_edit_is_made_once_and_leaves_the_model_as_it_was(experiment, monkeypatch):
    before = experiment.model.provenance()
    unedited = experiment.scored(None, experiment.requests).set_index("measure")["mean"]
    variant = Variant(method="memit", layers=(1, 2, 3))
    scores = experiment.scored(variant, experiment.requests)
    assert unedited["ES"] == 0 < scores.set_index("measure")["mean"]["ES"]
    assert experiment.model.provenance() == before
    monkeypatch.setattr(Experiment, "score", None)  # what is kept needs no scoring
    pd.testing.assert_frame_equal(experiment.scored(variant, experiment.requests), scores)
    with pytest.raises(TypeError):
        experiment.scored(Variant(method="memit", layers=(1, 2)), experiment.requests)


def test_layers_come_from_the_trace_unless_they_are_given(experiment):
    assert experiment.layers == [1, 2, 3]
    assert (experiment.out / "selection" / "selection.json").is_file()
    with_layers = open_experiment("try", options("Try."), ["--out", str(experiment.out), "--layers", "2-4"])
    assert with_layers.layers == [2, 3, 4]


def test_more_requests_than_there_are_are_refused(tmp_path):
    too_many = open_experiment("try", options("Try."), ["--out", str(tmp_path), "--requests", "tiny", "--count", "101"])
    with pytest.raises(InputError, match="1 to 100"):
        _ = too_many.requests
