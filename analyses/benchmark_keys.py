"""Times the recollection of keys and states against the published schedule, and asserts that both agree.

    python analyses/benchmark_keys.py [--shape tiny|gpt2] [--requests 64] [--repeats 3]

Five layers, six prefixes. The published schedule runs the whole model over every whole prompt for each layer's keys,
and over the bare prompts for the states; it is given plain forward passes of the transformers model in batches of 128,
as published. `tiny` is the model that ships; `gpt2` a random one of GPT-2's shape (d 768, 12 layers).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mechedit.facts import EditRequest, load_requests
from mechedit.keys import Recollection
from mechedit.models import Model, Site, load_model
from mechedit.prompts import BARE, make_prefixes, pad, prefixed_prompts

LAYERS = {"tiny": [1, 2, 3, 4, 5], "gpt2": [3, 4, 5, 6, 7]}
PUBLISHED_BATCH = 128


def main() -> None:
    """Time both, in turns, and print the ratio of the fastest."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=list(LAYERS), default="tiny")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    model = made(given.shape)
    requests, prefixes = load_requests("tiny")[: given.requests], make_prefixes(load_model("tiny"))
    layers = LAYERS[given.shape]
    times: dict[str, list[float]] = {"published": [], "mechedit": []}
    found: dict[str, list[Tensor]] = {}
    for _ in range(given.repeats):
        for name, schedule in (("published", published), ("mechedit", recollected)):
            seconds, found[name] = timed(schedule, model, requests, prefixes, layers)
            times[name].append(seconds)
    gaps = [float((a - b).norm() / a.norm()) for a, b in zip(found["published"], found["mechedit"], strict=True)]
    assert max(gaps) < 1e-4, f"the two disagree: {gaps}"
    best = {name: min(seconds) for name, seconds in times.items()}
    print(
        f"{given.shape}: published {best['published']:.2f} s, mechedit {best['mechedit']:.2f} s, ratio "
        f"{best['published'] / best['mechedit']:.1f} (fastest of {given.repeats}; largest difference {max(gaps):.1e})"
    )


def made(shape: str) -> Model:
    """The model to time."""
    tiny = load_model("tiny")
    if shape == "tiny":
        return tiny
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0)).eval()
    return load_model(hf, tokenizer=tiny.tokenizer)


def timed(schedule: Callable[..., list[Tensor]], *arguments: object) -> tuple[float, list[Tensor]]:
    """Seconds and what came out."""
    start = time.perf_counter()
    found = schedule(*arguments)
    return time.perf_counter() - start, found


@torch.no_grad()
def recollected(
    model: Model, requests: Sequence[EditRequest], prefixes: Sequence[str], layers: Sequence[int]
) -> list[Tensor]:
    """Keys and states as `spread` asks for them: the states once before the first layer, then after each."""
    prompts, last = Recollection(model, requests, prefixes), Site(layers[-1], "resid")
    prompts.move_(layers[0])
    found = [prompts.states([last])[last]]
    for layer in layers:
        found += [prompts.keys(layer), prompts.states([last])[last]]
    return found


@torch.no_grad()
def published(
    model: Model, requests: Sequence[EditRequest], prefixes: Sequence[str], layers: Sequence[int]
) -> list[Tensor]:
    """The same by whole forward passes of whole prompts."""

    def at(module: torch.nn.Module, given: Sequence[str], side: int) -> Tensor:
        caught: list[Tensor] = []
        handle = module.register_forward_hook(lambda module, inputs, output: caught.append((inputs[0], output)[side]))
        prompts = [prompt for request in requests for prompt in prefixed_prompts(model, request, given)]
        rows = []
        for start in range(0, len(prompts), PUBLISHED_BATCH):
            chunk = prompts[start : start + PUBLISHED_BATCH]
            tokens = pad([prompt.ids for prompt in chunk], model.tokenizer, model.device)
            model.hf(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False)
            values = caught.pop()
            values = values[0] if isinstance(values, tuple) else values
            places = torch.tensor([prompt.last_subject for prompt in chunk])
            rows.append(values[torch.arange(len(chunk)), places])
        handle.remove()
        return torch.cat(rows).unflatten(0, (len(requests), len(given)))

    blocks = model.hf.transformer.h
    found = [at(blocks[layers[-1]], [BARE], 1)[:, 0]]
    for layer in layers:
        found += [at(blocks[layer].mlp.c_proj, prefixes, 0), at(blocks[layers[-1]], [BARE], 1)[:, 0]]
    return found


if __name__ == "__main__":
    main()
