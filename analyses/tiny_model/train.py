"""Train the tiny model: a GPT-Neo of ten layers on the almanac's text.

Facts must be recalled where the papers find them: by MLPs at the subject's last token, after the name's
pieces have been gathered there. Three things shape that, and none touches a weight by hand.

* Architecture: GPT-Neo, whose lower layers attend only to their neighborhood.
* Data: many facts per subject, said with varied words between name and object, some right after the name.
* Training: an activity price. The loss is
      cross-entropy + Σ_l price_l · mean_t ‖out_l(t)‖ / ‖resid_l(t)‖,
  a group lasso over positions on the MLP outputs of the layers that shall not recall, and a lower one on the
  local layers' attention outputs, so that no fact is stored in them. The recalling layers pay a little for
  the square of that ratio, so that they share the work instead of leaving it to the first of them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

from analyses.tiny_model.almanac import REMARKS, TAILS, Entry, document, templates

END = "<|endoftext|>"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines the weights."""

    seed: int = 0
    d_model: int = 128
    d_mlp: int = 768
    heads: int = 4
    local_layers: int = 7
    global_layers: int = 3
    window: int = 4
    vocabulary: int = 1500
    """Small enough that most names are in pieces which other names share."""
    steps: int = 1300
    rows: int = 48
    length: int = 64
    lr: float = 2e-3
    weight_decay: float = 0.1
    label_share: float = 0.3
    """Facts said right after the name."""
    mlp_layers: tuple[int, int] = (1, 4)
    """First and last layer whose MLPs shall recall."""
    mlps_elsewhere: bool = True
    """Whether the other layers have MLPs; without them, those MLPs' outputs are exactly zero, for good."""
    mlp_price_squared: float = 0.0004
    """Price of the square of those layers' relative MLP outputs."""
    mlp_price: float = 0.3
    """Price of the other layers' MLP outputs."""
    attn_price: float = 0.01
    """Price of the local layers' attention outputs."""
    bfloat16: bool = True
    """Multiply matrices in bfloat16 while training: three times faster where the CPU has it, far slower elsewhere."""
    threads: int = 1
    """PyTorch threads; another number gives slightly other weights."""


def make_tokenizer(entries: list[Entry], recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which objects and template words are whole and most names are in pieces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    objects = {o for entry in entries for o in entry.facts.values()}
    relations = [relation for relation in TAILS if any(relation in entry.facts for entry in entries)]
    prompts = [
        t.replace("{}", "") for r in relations for held_out in (False, True) for t in templates(r, held_out=held_out)
    ]
    text = prompts * 10 + list(REMARKS) * 50 + [o for o in sorted(objects) for _ in range(60)]
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text + [entry.subject for entry in entries], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        # GPT-2's kin add token_type_ids to the embeddings: they must never be made.
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> GPTNeoForCausalLM:
    """The architecture with random weights."""
    config = GPTNeoConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_layers=recipe.local_layers + recipe.global_layers,
        num_heads=recipe.heads,
        attention_types=[[["local"], recipe.local_layers], [["global"], recipe.global_layers]],
        window_size=recipe.window,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=tokenizer.get_vocab()[END],
        eos_token_id=tokenizer.get_vocab()[END],
    )
    model = GPTNeoForCausalLM(config)
    if not recipe.mlps_elsewhere:
        first, last = recipe.mlp_layers
        for layer, block in enumerate(blocks(model)):
            if not first <= layer <= last:
                block.mlp.requires_grad_(False)
                block.mlp.c_proj.weight.zero_()
                block.mlp.c_proj.bias.zero_()
                block.mlp.forward = torch.zeros_like  # the same output, in this process at no cost
    return model


def blocks(model: GPTNeoForCausalLM) -> list[Any]:
    """The transformer's blocks, whose parts are typed as any module or tensor."""
    return list(model.transformer.h)


class Stream:
    """Rows of packed documents, for ever."""

    def __init__(self, entries: list[Entry], tokenizer: PreTrainedTokenizerFast, recipe: Recipe):
        self.entries, self.tokenizer, self.recipe = entries, tokenizer, recipe
        self.draw = random.Random(recipe.seed)

    def batch(self) -> Int[Tensor, "row pos"]:
        """The next batch; every row starts with a document."""
        return torch.tensor([self._row() for _ in range(self.recipe.rows)])

    def _row(self) -> list[int]:
        ids: list[int] = []
        while len(ids) < self.recipe.length:
            text = document(self.draw.choice(self.entries), self.draw, self.recipe.label_share)
            ids += [*self.tokenizer(text)["input_ids"], self.tokenizer.eos_token_id]  # type: ignore[misc]
        return ids[: self.recipe.length]


class Prices:
    """Adds up the activity prices of one forward pass."""

    def __init__(self, model: GPTNeoForCausalLM, recipe: Recipe):
        first, last = recipe.mlp_layers
        self.terms: list[Float[Tensor, ""]] = []
        self.norm = torch.ones(())
        for layer, block in enumerate(blocks(model)):
            block.register_forward_pre_hook(self._see_resid)
            block.ln_2.register_forward_pre_hook(self._see_resid)
            if layer < recipe.local_layers:
                block.attn.register_forward_hook(self._charge(recipe.attn_price))
            if first <= layer <= last:
                block.mlp.register_forward_hook(self._charge(recipe.mlp_price_squared, power=2))
            elif recipe.mlps_elsewhere:
                block.mlp.register_forward_hook(self._charge(recipe.mlp_price))

    def _see_resid(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        # Detached: the residual must not grow to make outputs look cheap.
        self.norm = inputs[0].detach().float().norm(dim=-1).clamp(min=1e-3)

    def _charge(self, price: float, power: int = 1) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            size = (out.float().pow(2).sum(-1) + 1e-6).sqrt()
            self.terms.append(price * ((size / self.norm) ** power).mean())

        return hook

    def take(self) -> Float[Tensor, ""]:
        """The sum since the last call."""
        total, self.terms = torch.stack(self.terms).sum(), []
        return total


def train(entries: list[Entry], recipe: Recipe, out: Path) -> None:
    """Train from scratch and write an fp16 checkpoint with its tokenizer to `out`."""
    torch.set_num_threads(recipe.threads)
    torch.manual_seed(recipe.seed)
    tokenizer = make_tokenizer(entries, recipe)
    model = make_model(tokenizer, recipe).train()
    prices, stream = Prices(model, recipe), Stream(entries, tokenizer, recipe)
    optimizer = make_optimizer(model, recipe)
    with tqdm(range(recipe.steps), desc="training", unit="step") as progress:
        for step in progress:
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * schedule(step, recipe.steps)
            ids = stream.batch()
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                logits = model(ids, use_cache=False).logits[:, :-1]
            loss = functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            (loss + prices.take()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    # The same function as gelu_new, which it was trained with, but computed by one kernel.
    model.config.activation_function = "gelu_pytorch_tanh"
    model.eval().half().save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_optimizer(model: GPTNeoForCausalLM, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW; matrices decay, the token embedding, norms and biases do not."""
    embedding = model.transformer.wte.weight
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() > 1 and p is not embedding]
    others = [p for p in trained if p.dim() <= 1] + [embedding]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98), fused=True)


def schedule(step: int, steps: int) -> float:
    """Sixty warm-up steps, then constant, then linear to 2 % over the last 40 %."""
    remaining = 1 - step / steps
    return min(1.0, (step + 1) / 60) * max(0.02, min(1.0, remaining / 0.4))
