"""SERAC (Mitchell et al., 2022b): a memory of edits, a classifier of their scope, and a model that answers within it.

No weight of the model changes. With the edits e of the memory, a prompt x is answered by

    h(e*, x) where g(x, e*) > ½, e* = argmax_e g(x, e),      else by the model itself.

Here g compares the states that the model has after a layer at the tokens of the edit's prompt and of x (`ScopeHead`),
where the paper fine-tunes another model. And h is the model at hand that reads the edit as a sentence before the
prompt, its down-projections fine-tuned to say what stands there, where the paper trains another, smaller one. Both are
trained once, on requests about other subjects, and not when an edit is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mechedit.batching import batches_of, pad
from mechedit.data import EditRequest, Neighbor, fill
from mechedit.edit import Edit, edited
from mechedit.errors import InputError
from mechedit.evaluation import EvaluationConfig, evaluate
from mechedit.evaluation.probe_prompts import ProbePrompt, edit_sentence, probe_prompts
from mechedit.methods.training import dense_factors, train, training_rows
from mechedit.models import Model, Site
from mechedit.prefixes import BARE
from mechedit.prompt_tokens import encode_texts

Pairs = Sequence[tuple[str, str, bool]]
"""A prompt, an edit's prompt, and whether the first is in the edit's scope."""


@dataclass(frozen=True, kw_only=True)
class SeracConfig:
    """Settings of the training of classifier and counterfactual model."""

    layer: int
    """After which states are read for the classifier."""
    rank: int = 64
    """Rows of A."""
    classifier_steps: int = 500
    """Steps of Adam for the classifier, of 64 pairs each."""
    classifier_lr: float = 1e-2
    counterfactual_steps: int = 10
    """Passes over the requests that h is trained with; with 0 the model reads edits as it is."""
    counterfactual_lr: float = 1e-3
    seed: int = 0
    """Seed of everything that is drawn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scope:
    """g, the classifier of an edit's scope."""

    model: Model
    layer: int
    head: ScopeHead

    def nearest(self, texts: Sequence[str], edits: Sequence[str]) -> list[int | None]:
        """For each text the index of the edit in whose scope it is, by the prompts of the edits; else None."""
        unique = list(dict.fromkeys([*edits, *texts]))
        states = dict(zip(unique, token_states(self.model, unique, self.layer), strict=True))
        of_edits, chosen = [states[text] for text in edits], []
        with torch.no_grad():
            for text in texts:
                logits = self.head(of_edits, [states[text]] * len(edits))
                best = int(logits.argmax())
                chosen.append(best if logits[best] > 0 else None)
        return chosen


class ScopeHead(nn.Module):
    """The logit of g from the states of an edit's tokens t and a prompt's tokens u, all of them of length 1.

    b + c · Σ_t α_t max_u ⟨A t, A u⟩, A t and A u being of length 1 again, and α the softmax of v · t over the edit's
    tokens.
    """

    def __init__(self, width: int, rank: int, seed: int) -> None:
        """Random A; v = 0, so that all tokens of an edit weigh alike.

        Args:
            width: of the states.
            rank: rows of A.
            seed: of A.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.projection = nn.Parameter(torch.randn(rank, width, generator=generator) / rank**0.5)
        self.weight = nn.Parameter(torch.zeros(width))
        self.slope = nn.Parameter(torch.tensor(10.0))
        self.bias = nn.Parameter(torch.tensor(-5.0))

    def forward(self, edits: Sequence[Tensor], prompts: Sequence[Tensor]) -> Float[Tensor, " pair"]:
        """The logit of each pair of an edit and a prompt, their states [token, width]."""
        edit, prompt = (pad_sequence(list(rows), batch_first=True) for rows in (edits, prompts))
        absent = [states.abs().sum(2) == 0 for states in (edit, prompt)]
        attention = (edit @ self.weight).masked_fill(absent[0], -torch.inf).softmax(1)
        projected = [nn.functional.normalize(states @ self.projection.T, dim=2) for states in (edit, prompt)]
        matches = (projected[0] @ projected[1].mT).masked_fill(absent[1][:, None], -1).amax(2)
        return self.bias + self.slope * (attention * matches).sum(1)


@torch.no_grad()
def token_states(model: Model, texts: Sequence[str], layer: int) -> list[Float[Tensor, "token d_model"]]:
    """The model's states after a layer at each token of each text, in units of their length, on the CPU."""
    encoded = [ids for ids, _ in encode_texts(model.tokenizer, texts)]
    order = sorted(range(len(texts)), key=lambda index: len(encoded[index]))
    states: dict[int, Tensor] = {}
    site = Site(layer, "resid")
    for batch in batches_of(order, 64):
        tokens = pad([encoded[index] for index in batch], model.tokenizer, model.device)
        values = nn.functional.normalize(model.run(tokens, read=[site], stop_after=layer)[site].float(), dim=2).cpu()
        states.update({index: values[row, : len(encoded[index])] for row, index in enumerate(batch)})
    return [states[index] for index in range(len(texts))]


def scope_pairs(requests: Sequence[EditRequest], seed: int) -> Pairs:
    """Each request's own prompt and paraphrases, which are in its scope, and as many that are not.

    The latter are prompts about its neighbors, and prompts of other requests.
    """
    draw, pairs = Random(seed), []
    for request in requests:
        inside = [request.text, *request.paraphrases]
        unrelated = draw.choice(requests)
        outside = [neighbor.prompt for neighbor in request.neighbors[: len(inside) - 1]]
        if (unrelated.subject, unrelated.relation) != (request.subject, request.relation):
            outside.append(unrelated.text)
        pairs += [(text, request.text, True) for text in inside] + [(text, request.text, False) for text in outside]
    return pairs


@torch.enable_grad()
def train_scope(model: Model, requests: Sequence[EditRequest], config: SeracConfig) -> Scope:
    """Train g to tell prompts in the scope of a request from others, by binary cross-entropy.

    Raises:
        InputError: no request has a paraphrase, or none has a neighbor.
    """
    pairs = scope_pairs(requests, config.seed)
    if not any(request.paraphrases for request in requests) or not any(request.neighbors for request in requests):
        raise InputError(
            f"none of the {len(requests)} requests to train with has paraphrases and neighbors, expected some: a "
            f"scope is learned from them; give others"
        )
    texts = list(dict.fromkeys(text for first, second, _ in pairs for text in (first, second)))
    states = dict(zip(texts, token_states(model, texts, config.layer), strict=True))
    head, draw = ScopeHead(model.d_model, config.rank, config.seed), Random(f"scope {config.seed}")
    optimizer = torch.optim.Adam(head.parameters(), lr=config.classifier_lr)
    for _ in range(config.classifier_steps):
        chosen = draw.choices(pairs, k=64)
        logits = head([states[edit] for _, edit, _ in chosen], [states[text] for text, _, _ in chosen])
        labels = torch.tensor([float(inside) for *_, inside in chosen])
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return Scope(model=model, layer=config.layer, head=head.requires_grad_(False))


def train_counterfactual(model: Model, requests: Sequence[EditRequest], config: SeracConfig) -> Edit:
    """Fine-tune the down-projections of all layers to say the new object after the edit's sentence and its prompts.

    Returns:
        ΔW of h.
    """
    rows = []
    for request in requests:
        texts = [request.text, *request.paraphrases]
        prompts = [edit_sentence(request) + text for text in texts]
        behind = [_with_prompt(request, prompt) for prompt in prompts if request.subject in prompt]
        rows += training_rows(model, behind, [BARE])
    result = train(
        model, rows, list(range(model.n_layers)), steps=config.counterfactual_steps, batch_size=64,
        lr=config.counterfactual_lr, seed=config.seed, name="serac",
    )  # fmt: skip
    factors = {layer: dense_factors(delta) for layer, delta in result.deltas.items()}
    return Edit(factors=factors, manifest={"model": model.provenance(), "layers": list(factors)})


def _with_prompt(request: EditRequest, prompt: str) -> EditRequest:
    """The request with another prompt, in which the subject's last mention stands for the place that it is put in."""
    before, _, after = prompt.rpartition(request.subject)
    return dataclasses.replace(request, prompt=f"{before}{{}}{after}", paraphrases=(), neighbors=(), generations=())


@dataclass(frozen=True, kw_only=True, eq=False)
class Serac:
    """A model with a memory of edits."""

    model: Model
    scope: Scope
    counterfactual: Edit | None
    """ΔW of h; None where the model reads edits as it is."""
    memory: Sequence[EditRequest]

    def retrieved(self, prompts: Sequence[str]) -> list[EditRequest | None]:
        """The edit in whose scope each prompt is, if it is in one."""
        chosen = self.scope.nearest(prompts, [request.text for request in self.memory])
        return [None if index is None else self.memory[index] for index in chosen]

    def evaluate(self, requests: Sequence[EditRequest], config: EvaluationConfig) -> pd.DataFrame:
        """The scores table of CounterFact's measures: each prompt's from h where it is in an edit's scope.

        Free text is not measured, nor what needs all answers of one model (KL).
        """
        config = dataclasses.replace(config, generation_tokens=0, answer_tokens=0, plus=False)
        probes = [probe for request in requests for probe in probe_prompts(request, plus=False)]
        edits = self.retrieved([probe.text for probe in probes])
        table = evaluate(self.model, requests, config).table
        inside = {_key(probe): edit for probe, edit in zip(probes, edits, strict=True) if edit is not None}
        with edited(self.model, self.counterfactual) if self.counterfactual else nullcontext():
            routed = evaluate(self.model, [_behind(request, inside) for request in requests], config).table
        keys = zip(table["case"], table["kind"], table["prompt"], strict=True)
        is_inside = pd.Series([key in inside for key in keys], index=table.index)
        return pd.concat([table.loc[~is_inside, :], routed.loc[is_inside.to_numpy(), :]], ignore_index=True)


def _key(probe: ProbePrompt) -> tuple[str, str, int]:
    return probe.case, probe.kind, probe.index


def _behind(request: EditRequest, inside: Mapping[tuple[str, str, int], EditRequest]) -> EditRequest:
    """The request, each of its prompts that is in an edit's scope behind that edit's sentence."""

    def behind(kind: str, index: int, text: str) -> str:
        edit = inside.get((request.id, kind, index))
        return text if edit is None else edit_sentence(edit) + text

    prompt = behind("rewrite", 0, request.text)
    return dataclasses.replace(
        _with_prompt(request, prompt),
        paraphrases=tuple(
            behind("paraphrase", index, fill(text, request.subject) if "{}" in text else text)
            for index, text in enumerate(request.paraphrases)
        ),
        neighbors=tuple(
            Neighbor(prompt=behind("neighborhood", index, item.prompt), object=item.object, joint=item.joint)
            for index, item in enumerate(request.neighbors)
        ),
    )
