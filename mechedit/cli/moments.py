"""`mechedit moments`: second moments of keys over text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mechedit import pipeline, ranks
from mechedit.cli.app import say
from mechedit.cli.command import command, options_of
from mechedit.cli.idle import refuse_idle
from mechedit.cli.options import RunFolderOptions, TextsOption
from mechedit.cli.parsing import existing_folder, parse_layers, parse_shard, require_layers, require_one_process
from mechedit.errors import InputError
from mechedit.models import Model
from mechedit.moments import (
    Convergence,
    MomentsConfig,
    SecondMoment,
    collect_shard,
    merge_moments,
    plan_moments,
    write_npz,
)
from mechedit.paths import writable_folder


@dataclass(frozen=True, kw_only=True)
class MomentsOptions(TextsOption, RunFolderOptions):
    """Layers, texts, model and folder, and what to do with them."""

    layers: str | None = None
    """Layers, such as 3-8. Several are separated by commas."""
    shard: str | None = None
    """Collect one process's part of the text, such as 0/4; then --merge."""
    merge: bool = False
    """Add up the parts of all processes that lie in --out."""
    convergence: bool = False
    """Also write how the moments settle: moments/convergence.parquet."""
    npz: Path | None = None
    """Also write them into this folder as the code published with MEMIT reads them."""


@command(
    settings=options_of(MomentsConfig, without=("batch_tokens",)),
    curve=options_of(
        Convergence,
        only=("weight", "seed"),
        notes={"weight": "Weight of the second moment in the update that --convergence measures."},
    ),
)
def moments_command(options: MomentsOptions, settings: MomentsConfig, curve: Convergence) -> int:
    """Collect the second moments of MLP keys over text: moments/layer_L.safetensors.

    A killed run goes on from its last checkpoint. With --shard each process reads its part of the text; when all have
    ended, --merge makes the files from these parts.
    """
    if not options.convergence:
        refuse_idle(
            curve,
            names={"weight"},
            reason="is that of the update which --convergence measures; add --convergence, or leave it out",
        )
    if options.npz is not None:
        writable_folder(options.npz)
    if options.merge:
        return ranks.current().from_first(lambda: _merge(options), "the merge")
    if options.shard and options.npz:
        raise InputError("--npz needs the sum over all parts; give it with --merge")
    if options.layers is None:
        raise InputError("give the layers whose moments are wanted by --layers, such as --layers 3-8")
    layers, shard = parse_layers(options.layers), require_one_process(parse_shard(options.shard))
    if shard and options.convergence:
        raise InputError("--convergence needs the text in order; collect without --shard")
    folder = options.run_folder()
    model = options.load_model()
    require_layers(layers, model.n_layers)
    say(str(plan_moments(model, layers, settings, convergence=options.convergence)))
    if shard is None:
        convergence = curve if options.convergence else None
        moments = pipeline.moments_step(folder, model, options.suited_texts, layers, settings, convergence)
        return ranks.current().from_first(lambda: _finish(options, moments, model), "the files")
    files = collect_shard(
        model, options.suited_texts, layers, shard, options.out, settings, overwrite=options.overwrite
    )
    say(f"part {shard} is finished; when all are: mechedit moments --merge --out {options.out}")
    options.print_summary({"parts": {layer: str(file) for layer, file in files.items()}})
    return 0


def _merge(options: MomentsOptions) -> int:
    """Add up the parts that the processes wrote."""
    if options.shard or options.convergence:
        raise InputError("--merge only adds up what lies in --out; give it without --shard and --convergence")
    layers = None if options.layers is None else parse_layers(options.layers)
    model = options.load_model() if options.npz else None
    return _finish(options, merge_moments(existing_folder(options.out), layers, overwrite=options.overwrite), model)


def _finish(options: MomentsOptions, moments: Mapping[int, SecondMoment], model: Model | None) -> int:
    """Write the moments as the published code reads them, where that is wanted, and print the summary."""
    if options.npz is not None and model is not None:
        for moment in moments.values():
            say(f"wrote {write_npz(moment, model, options.npz)}")
    conditionings = {layer: moment.conditioning for layer, moment in moments.items()}
    for conditioning in conditionings.values():
        say(conditioning.in_words())
    ranks = {layer: {"rank": item.rank, "of": item.width} for layer, item in conditionings.items()}
    options.print_summary({"moments": {layer: moment.count for layer, moment in moments.items()}, "directions": ranks})
    return 0
