"""KN, knowledge neurons (Dai et al., 2022): the neurons that say a fact, and what they write put in another's place.

A neuron is a coordinate i of an MLP's key k at the prompt's last token; row i of the down-projection is what it writes.
What it does for the known object o is its integrated gradient (Sundararajan et al., 2017),

    aᵢ = kᵢ ∫₀¹ ∂P(o | x; k := αk) / ∂kᵢ dα,

by a midpoint sum over α, a layer's whole key growing at once as in the published code; so Σ aᵢ = P(o) − P(o; k := 0).
Neurons with more than `threshold` of the largest aᵢ of all layers, behind more than `agreement` of the context
templates, are the fact's, and their rows are changed by

    ΔWᵢ = scale · (e_new − e_true),

e being the embedding of an object's first token.

Three things differ from the code that ROME's tables were made with. It looks for the neurons of an object without the
space before it; here they are those of the object as it follows the prompt, and P is that of all its tokens. It takes
e_true of the model's first answer, here it is of the true object. And its sum over α has both ends, 0 and 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechedit.batching import pad
from mechedit.bounds import check_numbers
from mechedit.data import EditRequest
from mechedit.edit import Edit, Factors
from mechedit.errors import InputError, check_fraction, check_positive
from mechedit.methods.manifest import edit_manifest
from mechedit.methods.method import EditTask, edit_method
from mechedit.methods.settings import MethodConfig
from mechedit.methods.training import evaluate_loss, training_rows, unwritten
from mechedit.models import EMBED, Model, Patch, Resume, Site
from mechedit.prefixes import BARE, check_prefixes, completed_prompts
from mechedit.progress import progress_bar
from mechedit.targets import check_length


@dataclass(frozen=True, kw_only=True)
class KnConfig(MethodConfig):
    """Settings of KN."""

    steps: int = 20
    """Points of the sum over α."""
    threshold: float | int = 0.2
    """aᵢ that a neuron must exceed, in units of the largest (0.2 in the paper and in ROME's code)."""
    agreement: float | int = 0.4
    """Part of the context templates that must be exceeded by those behind which a neuron reaches the threshold; with
    one template, as by default, it says nothing."""
    scale: float | int = 2.0
    """Change of what a neuron writes, in units of the difference of the objects' embeddings (2 in ROME's code)."""

    milder: ClassVar[str] = "choose a smaller scale, or a higher threshold"
    preserves_keys: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in ("steps", "batch_size", "scale"):
            check_positive(name, getattr(self, name))
        for name in ("threshold", "agreement"):
            check_fraction(name, getattr(self, name))

    def default_prefixes(self, model: Model) -> tuple[str, ...]:
        """The bare prompt, with which ROME's tables were made."""
        return (BARE,)


@edit_method(KnConfig)
def kn(task: EditTask[KnConfig]) -> Edit:
    """Rewrite what a fact's knowledge neurons write (KN; Dai et al., 2022): ΔWᵢ = scale · (e_new − e_true).

    They are looked for in the layers given; in the papers in all. Each request needs its true object, whose neurons
    they are, and requests do not see one another. The manifest's `neurons` holds how many each request has; where there
    are none, nothing is written for it. `unconverged` names the requests whose new object is not the greedy answer to
    every prompt afterwards.
    """
    model, config = task.model, task.config
    prefixes, provenance = check_prefixes(task.prefixes or config.default_prefixes(model)), model.provenance()
    rows = training_rows(model, task.requests, prefixes)
    columns: dict[int, list[Tensor]] = {layer: [] for layer in task.layers}
    changes = []
    for request in progress_bar(task.requests, desc=task.method, unit="fact", leave=None):
        neurons = knowledge_neurons(model, request, task.layers, prefixes, config)
        changes.append(config.scale * _difference(model, request))
        for layer, chosen in zip(task.layers, neurons, strict=True):
            columns[layer].append(chosen.double())
    right = torch.stack(changes).double()
    factors = {layer: Factors(left=torch.stack(columns[layer], 1), right=right) for layer in task.layers}
    greedy = evaluate_loss(model, rows, Edit(factors=factors, manifest={}), config.batch_size)[1]
    manifest = {
        **edit_manifest(provenance, task.layers, task.requests, None, prefixes),
        "neurons": [int(count) for count in torch.cat([part.left for part in factors.values()]).sum(0)],
        "unconverged": unwritten(task.requests, rows, greedy),
    }
    return Edit(factors=factors, manifest=manifest)


def knowledge_neurons(
    model: Model, request: EditRequest, layers: Sequence[int], prefixes: Sequence[str], config: KnConfig
) -> Bool[Tensor, "layer d_mlp"]:
    """Which neurons are the fact's: those with a large attribution behind many of the context templates."""
    reached = []
    for prefix in prefixes:
        attributions = integrated_gradients(model, request, layers, prefix, config)
        reached.append(attributions > config.threshold * attributions.max().clamp_min(0))
    return torch.stack(reached).double().mean(0) > config.agreement


def integrated_gradients(
    model: Model, request: EditRequest, layers: Sequence[int], prefix: str, config: KnConfig
) -> Float[Tensor, "layer d_mlp"]:
    """The aᵢ of every neuron of some layers, for the true object behind one context template.

    Raises:
        InputError: the request has no true object.
    """
    if request.target_true is None:
        raise InputError(
            f"the request {request.id!r} has no target_true, expected the object that the model knows: KN looks for "
            f"the neurons that say it; give it, or choose another method"
        )
    ((prompt, object_ids),) = completed_prompts(model, replace(request, target_new=request.target_true), [prefix])
    ids, position = check_length(model, request, [*prompt.ids, *object_ids[:-1]]), len(prompt.ids) - 1
    labels = torch.tensor(object_ids, device=model.device)
    scored = torch.arange(position, len(ids), device=model.device)
    keys = [model.key_site(layer) for layer in layers]
    inputs = [Site(layer - 1, "resid") for layer in layers if layer]
    with torch.no_grad():
        clean = model.run(pad([ids], model.tokenizer, model.device), read=[*inputs, *keys])
    alphas = (torch.arange(config.steps, device=model.device) + 0.5) / config.steps
    tokens = pad([ids] * config.steps, model.tokenizer, model.device)
    at = torch.full((config.steps, 1), position, device=model.device)
    attributions = []
    for layer, site in zip(layers, keys, strict=True):
        key = clean[site][0, position]
        value = (alphas[:, None, None].to(key) * key).detach().requires_grad_()
        stream = clean[Site(layer - 1, "resid")].expand(config.steps, -1, -1) if layer else None
        resume = None if stream is None else Resume(layer, stream)
        with torch.enable_grad():
            run = model.run(tokens, [Patch(site, at, value)], resume=resume, logits_to_keep=scored)
            log_probs = run.logits.float().log_softmax(-1)
            probability = log_probs.gather(2, labels.expand(config.steps, -1)[..., None])[..., 0].sum(1).exp()
            (gradient,) = torch.autograd.grad(probability.sum(), value)
        attributions.append((key * gradient[:, 0].mean(0)).float())
    return torch.stack(attributions)


@torch.no_grad()
def _difference(model: Model, request: EditRequest) -> Float[Tensor, " d_model"]:
    """e_new − e_true: the embeddings of the objects' first tokens, as they have them behind the prompt."""
    assert request.target_true is not None, "its neurons were looked for"
    first = [
        completed_prompts(model, replace(request, target_new=target), [BARE])[0][1][0]
        for target in (request.target_new, request.target_true)
    ]
    states = model.run(pad([[token] for token in first], model.tokenizer, model.device), read=[EMBED], stop_after=0)
    new, true = states[EMBED][:, 0].float()
    return new - true
