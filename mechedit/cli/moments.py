"""`mechedit moments`: second moments of keys over text."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from mechedit import pipeline
from mechedit.cli import options
from mechedit.cli.app import print_json, say
from mechedit.cli.parsing import (
    check_layers,
    existing_folder,
    load,
    parse_layers,
    parse_shard,
)
from mechedit.errors import InputError
from mechedit.moments import (
    Convergence,
    MomentsConfig,
    SecondMoment,
    collect_shard,
    merge_moments,
    plan_moments,
)


def moments_command(
    layers: Annotated[str | None, typer.Option(help="such as 3-8")] = None,
    texts: options.Texts = "tiny",
    out: options.Out = Path("run"),
    model: options.ModelName = "tiny",
    tokens: options.MomentTokens = None,
    max_length: options.MaxLength = 1024,
    memory: options.Memory = None,
    checkpoint_seconds: options.CheckpointSeconds = 60,
    shard: options.Shard = None,
    merge: options.Merge = False,
    convergence: options.ConvergenceCurve = False,
    weight: options.Weight = 15_000,
    backend: options.Backend = "transformer_lens",
    device: options.Device = None,
    dtype: options.Dtype = None,
    seed: options.Seed = 0,
    overwrite: options.Overwrite = False,
    json_: options.Json = False,
    config: options.Config = None,
) -> int:
    """Collect the second moments of MLP keys over text: moments/layer_L.safetensors.

    A killed run goes on from its last checkpoint. With --shard, or under `accelerate launch`, each process reads its
    part of the text; when all have ended, --merge makes the files from what they left.
    """
    if merge and (shard or convergence):
        raise InputError("--merge only adds up what lies in --out; give it without --shard and --convergence")
    wanted = None if layers is None else parse_layers(layers)
    if merge:
        return _say_moments(merge_moments(existing_folder(out), wanted, overwrite=overwrite), json_)
    if wanted is None:
        raise InputError("give the layers whose moments are wanted by --layers, such as --layers 3-8")
    settings = MomentsConfig(tokens=tokens, max_length=max_length, memory=memory, checkpoint_seconds=checkpoint_seconds)
    part = parse_shard(shard, os.environ)
    curve = Convergence(weight=weight, seed=seed) if convergence else None
    if part and curve:
        raise InputError("--convergence needs the text in order; collect without --shard")
    folder = pipeline.RunFolder.at(out, overwrite=overwrite)
    loaded = load(model, backend, device, dtype)
    check_layers(wanted, loaded.n_layers)
    say(str(plan_moments(loaded, wanted, settings, convergence=convergence)))
    if part is None:
        return _say_moments(pipeline.moments_step(folder, loaded, texts, wanted, settings, curve), json_)
    files = collect_shard(loaded, texts, wanted, part, out, settings, overwrite=overwrite)
    say(f"part {part[0]}/{part[1]} is finished; when all are: mechedit moments --merge --out {out}")
    print_json(json_, {"parts": {layer: str(file) for layer, file in files.items()}})
    return 0


def _say_moments(found: Mapping[int, SecondMoment], json_: bool) -> int:
    print_json(json_, {"moments": {layer: moment.count for layer, moment in found.items()}})
    return 0
