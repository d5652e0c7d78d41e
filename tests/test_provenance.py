"""Whether two results are of the same model: what decides it, and how a write to the weights is noticed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.edits import random_edit
from torch import Tensor

from mechedit import MomentsConfig, apply_, collect_moments, edited, load_model, load_texts, undo_
from mechedit.cli import main
from mechedit.data import tiny_data
from mechedit.errors import InputError
from mechedit.models import weights_hash
from mechedit.models.tokenizer_hash import tokenizer_hash
from mechedit.models.weights_hash import WeightsHash, checksum, sha256_of, weighted_sums, words_of
from mechedit.provenance import ALGORITHMS, ModelIdentity, check_provenance, determining, numbered

IDENTITY = ModelIdentity(dtype="float32", tokenizer="t", weights="w", module="mlp")


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The SHA-256 hashes of weights that are taken, in order."""
    taken: list[str] = []

    def counting(parameters: Any) -> str:
        taken.append(sha256_of(parameters))
        return taken[-1]

    monkeypatch.setattr(weights_hash, "sha256_of", counting)
    return taken


@pytest.fixture
def fresh_model(make_model: Callable[..., Any]) -> Any:
    """A model whose weights have not been hashed yet."""
    return make_model()


def test_an_identity_survives_a_file_and_ignores_what_is_only_recorded(lens_model: Any) -> None:
    provenance = lens_model.provenance()
    assert ModelIdentity.of(provenance) == lens_model.identity() == ModelIdentity.of(lens_model.identity().record)
    renamed = {**provenance, "model": "elsewhere", "backend": "other", "mechedit": "9.9"}
    assert ModelIdentity.of(renamed) == lens_model.identity()
    assert set(provenance) - set(determining(provenance)) == {"model", "backend", "mechedit"}
    assert determining(renamed) == determining(provenance) == lens_model.identity().record


@pytest.mark.parametrize(
    ("name", "field"),
    [("weights", "weights_hash"), ("tokenizer", "tokenizer_hash"), ("dtype", "dtype"), ("module", "module")],
)
def test_another_model_is_refused_by_the_first_field_that_differs(name: str, field: str) -> None:
    other = replace(IDENTITY, **{name: "other"})
    with pytest.raises(InputError, match=f"the trace was made with {field} = 'other', expected .*; trace again"):
        IDENTITY.require(other, "the trace", "trace again")
    IDENTITY.require(other, "the trace", "trace again", ignoring=(name,))
    IDENTITY.require(replace(IDENTITY), "the trace")


def test_what_older_artifacts_lack_is_known() -> None:
    record = IDENTITY.record
    del record["module"]
    assert ModelIdentity.of(record) == IDENTITY
    check_provenance({}, {"algorithm": 1, "module": "mlp"}, "the trace")
    with pytest.raises(InputError, match="algorithm = 1, expected 2"):
        check_provenance({}, {"algorithm": 2}, "the trace")
    with pytest.raises(InputError, match="weights_hash = None"):
        IDENTITY.require(ModelIdentity.of({"dtype": "float32", "tokenizer_hash": "t"}), "the trace")


def test_a_key_holds_the_number_of_an_algorithm_that_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "trace", 1)
    assert numbered("trace", {"a": 1}) == {"a": 1}, "keys from before there were numbers stay valid"
    monkeypatch.setitem(ALGORITHMS, "trace", 2)
    assert numbered("trace", {"a": 1}) == {"a": 1, "algorithm": 2}
    assert numbered("moments", {"a": 1}) == {"a": 1}


def optimizer_step(model: Any) -> None:
    parameter = next(model.hf.parameters()).requires_grad_()
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()
    parameter.requires_grad_(False)


def load_state_dict(model: Any) -> None:
    state = {name: tensor.clone() for name, tensor in model.hf.state_dict().items()}
    next(tensor for name, tensor in state.items() if name.endswith("ln_f.bias"))[0] += 1
    model.hf.load_state_dict(state)


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.projection(1)[0, 0] += 1


def through_data(model: Any) -> None:
    parameter = next(model.hf.parameters())
    version = parameter._version
    parameter.data[3, 5] += 1e-6
    assert parameter._version == version, "the version counter does not tell"


def through_numpy(model: Any) -> None:
    next(model.hf.parameters()).detach().numpy()[0, 0] += 1


def other_tensor(model: Any) -> None:
    parameter = next(model.hf.parameters())
    parameter.data = parameter.data + 1


@pytest.mark.parametrize(
    "write", [optimizer_step, load_state_dict, in_place, through_data, through_numpy, other_tensor]
)
def test_every_way_of_writing_to_the_weights_is_noticed(
    fresh_model: Any, write: Callable[[Any], None], hashed: list[str]
) -> None:
    before = fresh_model.identity()
    assert fresh_model.identity() == before
    assert len(hashed) == 1
    write(fresh_model)
    after = fresh_model.identity()
    assert after.weights != before.weights
    assert after.weights == sha256_of(dict(fresh_model.hf.named_parameters()))
    assert len(hashed) == 2


def test_the_weights_are_hashed_once_per_edit_state(fresh_model: Any, hashed: list[str]) -> None:
    edit = random_edit(fresh_model)
    base = fresh_model.weights_hash()
    for _ in range(2):
        with edited(fresh_model, edit):
            assert fresh_model.identity().weights == fresh_model.provenance()["weights_hash"] != base
        assert fresh_model.identity().weights == base
    apply_(fresh_model, edit)
    assert fresh_model.writing("attn").identity().weights == fresh_model.weights_hash() != base
    undo_(fresh_model, edit)
    assert fresh_model.weights_hash() == base
    assert len(hashed) == len(set(hashed)) == 2, "the unedited and the edited state"


def on_a_gpu(weight: Tensor) -> bytes:
    return weighted_sums(words_of(weight)).numpy().tobytes()


def on_a_cpu(weight: Tensor) -> bytes:
    return checksum({"w": weight})


@pytest.mark.parametrize("take", [on_a_cpu, on_a_gpu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_a_checksum_sees_every_number_and_every_order(dtype: torch.dtype, take: Callable[[Tensor], bytes]) -> None:
    weight = torch.randn(5, 1717, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = take(weight)
    assert take(weight.clone()) == before

    def differs(change: Callable[[Tensor], object]) -> bool:
        written = weight.clone()
        change(written)
        assert not torch.equal(written, weight)
        return take(written) != before

    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for place in [0, 1, 2, 3, 4095, 4096, 5 * 1717 - 1, *range(100, 8000, 997)]:
        for bit in (0, 8 * dtype.itemsize - 1):
            mask = torch.tensor(1, dtype=whole) << bit
            assert differs(lambda w, place=place, mask=mask: w.view(whole).view(-1)[place].bitwise_xor_(mask))
    assert differs(lambda w: w.copy_(w.flip(0)))
    assert differs(lambda w: w.copy_(w.flip(1)))
    assert differs(lambda w: w.neg_())
    # Numbers in the upper half of a word, whose signs are its highest bit.
    assert differs(negate_two)


def test_a_checksum_is_of_names_and_shapes_too() -> None:
    weight = torch.arange(12.0).view(3, 4)
    assert len({checksum({"w": weight}), checksum({"v": weight}), checksum({"w": weight.view(4, 3)})}) == 3


def negate_two(weight: Tensor) -> None:
    weight[0, [3, 7]] = -weight[0, [3, 7]]


def test_only_the_last_states_are_remembered(hashed: list[str]) -> None:
    hashes, weights = WeightsHash(), [{"w": torch.full((3,), float(i))} for i in range(10)]
    first = [hashes.of(copy.deepcopy(weight)) for weight in weights]
    assert [hashes.of(weight) for weight in weights[-3:]] == first[-3:]
    assert len(hashed) == 10
    assert hashes.of(weights[0]) == first[0]
    assert len(hashed) == 11


def test_one_edit_command_hashes_the_weights_once(
    tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It checks moments and targets against the model, names it in two places, and used to hash five times."""
    monkeypatch.setattr("mechedit.cli.parsing.load_model", load_model)  # a model of its own, that nobody hashed before
    model = load_model("tiny")
    collect_moments(model, load_texts("tiny")[:600], [2, 3], MomentsConfig(max_length=16), tmp_path)
    hashed.clear()
    requests = tmp_path / "requests.json"
    requests.write_text(json.dumps(json.loads(tiny_data("requests.json").read_text())[:3]))
    arguments = ["edit", "--requests", str(requests), "--layers", "2-3", "--set", "steps=2", "--moments", str(tmp_path)]
    with pytest.raises(SystemExit) as leaving:
        main([*arguments, "--out", str(tmp_path / "edit.safetensors")])
    assert leaving.value.code == 0
    assert hashed == [model.weights_hash()], "the unedited weights, once"


def test_a_tokenizers_hash_follows_what_it_does_and_not_what_calls_leave_in_it(tokenizer: Any) -> None:
    changed = copy.deepcopy(tokenizer)
    before = tokenizer_hash(changed)
    changed(["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert json.loads(changed.backend_tokenizer.to_str())["truncation"], "the call leaves nothing behind"
    assert tokenizer_hash(changed) == before
    changed.add_tokens(["xyzzy"])
    assert tokenizer_hash(changed) != before
    assert tokenizer_hash(tokenizer) == before


def test_a_tokenizers_whole_json_is_read_once_whatever_calls_leave_in_it(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gemma's 262,144 tokens take seconds, which each length at which texts are cut would cost again."""
    hashed_values: list[object] = []
    monkeypatch.setattr("mechedit.models.tokenizer_hash.value_hash", lambda value: hashed_values.append(value) or "")
    monkeypatch.setattr("mechedit.models.tokenizer_hash._hashes", {})
    changed = copy.deepcopy(tokenizer)
    for length in (2, 3, 4):
        changed(["a", "a longer text"], padding=True, truncation=True, max_length=length)
        tokenizer_hash(changed)
    assert len(hashed_values) == 1
    changed.add_tokens(["xyzzy"])
    tokenizer_hash(changed)
    assert len(hashed_values) == 2, "nothing is ever read again"
