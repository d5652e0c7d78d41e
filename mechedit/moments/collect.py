"""The pass over the text: every batch runs up to the last layer and feeds the sums of all."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mechedit.data.texts import check_texts, load_texts, texts_hash
from mechedit.errors import InputError
from mechedit.files import read_header
from mechedit.models import Model
from mechedit.moments.accumulator import MomentAccumulator
from mechedit.moments.checkpoints import (
    SAME_KEYS,
    Checkpoints,
    Part,
    check_part,
    clear_leftovers,
    load_part,
    part_path,
)
from mechedit.moments.config import MomentsConfig
from mechedit.moments.convergence import Convergence, Curve
from mechedit.moments.convergence_file import CurveFile
from mechedit.moments.key_reader import KeyReader
from mechedit.moments.memory import MomentsPlan, plan_moments
from mechedit.moments.second_moment import KEY, SecondMoment, load_moment, moment_path
from mechedit.moments.shards import SHARD, WHOLE, Place, Shard, Share, batches, read_shards
from mechedit.provenance import check_provenance


def collect_moments(
    model: Model,
    texts: Sequence[str] | str | Path,
    layers: Sequence[int],
    config: MomentsConfig | None = None,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    convergence: Convergence | None = None,
) -> dict[int, SecondMoment]:
    """Collect E[k kᵀ] of the MLP keys over running text, all layers in one pass if memory allows (MEMIT §4.2).

    Padding and special tokens are left out of the mean. With `out`, what has been summed is kept there from time to
    time; killed at any moment, the same call goes on from there to the same matrices, bit for bit on the same
    machine.

    Args:
        model: whose keys.
        texts: documents, or a source for `load_texts`.
        layers: 0-based.
        config: how to read the text.
        out: a folder; what is found there with the same provenance is reused, the rest is written there.
        overwrite: replace files in `out` that have another provenance, instead of refusing.
        convergence: also measure how the moments settle: `SecondMoment.curve`, and moments/convergence.parquet.

    Raises:
        InputError: a layer the model lacks; too few tokens, or keys that overflow; too little memory; files in
            `out` of another provenance.
    """
    job = _job(model, texts, layers, config, out, WHOLE, overwrite, convergence)
    found = job.found()
    for together in job.plan.passes:
        parts = job.collect(together, found)
        for layer in sorted(parts):
            found[layer] = job.finish(parts.pop(layer))
    return {layer: found[layer] for layer in job.layers}


def collect_shard(
    model: Model,
    texts: Sequence[str] | str | Path,
    layers: Sequence[int],
    shard: tuple[int, int],
    out: str | Path,
    config: MomentsConfig | None = None,
    *,
    overwrite: bool = False,
) -> dict[int, Path]:
    """Sum k kᵀ over one process's share of the text, and leave it in `out` for `merge_moments`.

    Args:
        model: whose keys.
        texts: all of the text, the same for every process.
        layers: 0-based.
        shard: (i, n): the i-th of n processes, which reads every n-th 256 texts.
        out: a folder; killed at any moment, the same call goes on from what is there.
        config: how to read the text; the budget of tokens is that of all processes together.
        overwrite: replace what is in `out` of another provenance, instead of refusing.

    Returns:
        The file of each layer.

    Raises:
        InputError: as `collect_moments`, or no such shard.
    """
    job = _job(model, texts, layers, config, out, Share.of(*shard), overwrite, None)
    written: dict[int, Path] = {}
    for together in job.plan.passes:
        parts = job.collect(together)
        for layer in sorted(parts):
            written[layer] = parts.pop(layer).save(Path(out))
    return written


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What one call collects: the text and how it is read, and where its files lie."""

    model: Model
    texts: Sequence[str]
    layers: list[int]
    config: MomentsConfig
    plan: MomentsPlan
    provenance: dict[str, Any]
    share: Share
    out: Path | None
    overwrite: bool
    convergence: Convergence | None

    @property
    def longest(self) -> int:
        """Tokens of a text that are read."""
        return self.provenance["max_length"]

    @property
    def curves(self) -> CurveFile | None:
        """The file of the curves, when they are measured and kept."""
        if self.out is None or self.convergence is None:
            return None
        fields = {name: value for name, value in self.provenance.items() if name not in SAME_KEYS}
        return CurveFile(self.out, {"provenance": fields, "settings": self.convergence.plain()})

    def found(self) -> dict[int, SecondMoment]:
        """The moments that lie in `out` already with the same provenance, and with the curve when it is wanted."""
        if self.out is None:
            return {}
        fields = {name: value for name, value in self.provenance.items() if name not in SAME_KEYS}
        found = {}
        for layer in self.layers:
            path = moment_path(self.out, layer)
            if not path.exists() or (self.overwrite and not _same(path, {**fields, "layer": layer})):
                continue
            check_provenance(read_header(path, KEY), {**fields, "layer": layer}, repr(str(path)))
            curve = None if self.curves is None else self.curves.layer(layer)
            if self.curves is None or curve is not None:
                found[layer] = replace(load_moment(self.out, layer), curve=curve)
        return found

    def collect(self, together: Sequence[int], found: Collection[int] = ()) -> dict[int, Part]:
        """The sums of the layers of one pass over the share of the text, but for those that were found."""
        parts = {layer: self.part(layer, together) for layer in together if layer not in found}
        if not all(part.done for part in parts.values()):
            with torch.no_grad():
                self.read(parts)
        return parts

    def part(self, layer: int, together: Sequence[int]) -> Part:
        """The layer's checkpoint, or a sum of nothing."""
        new = Part(
            layer=layer,
            share=self.share,
            fitter=MomentAccumulator(self.model.d_key, self.model.device),
            provenance=self.provenance,
            read=tuple(together),
        )
        if self.out is None:
            return new
        clear_leftovers(self.out, layer, self.share)
        path = part_path(self.out, layer, self.share)
        if not path.exists():
            return new
        try:
            check_part(read_header(path, KEY), {**self.provenance, "layer": layer}, self.convergence, repr(str(path)))
        except InputError:
            if self.overwrite:
                return new
            raise
        return replace(load_part(path, self.model.device, self.convergence), provenance=self.provenance)

    def read(self, parts: Mapping[int, Part]) -> None:
        """Read the text from where the sums stand to its end."""
        start = min(part.place for part in parts.values())
        checkpoints = Checkpoints(self.out, self.config.checkpoint_seconds)
        reader = KeyReader(self.model, _read_layers(parts), self.plan.batch_tokens)
        shards = read_shards(self.model.tokenizer, self.texts, self.config, self.longest, self.share, start)
        with self.progress(start, min(part.fitter.count for part in parts.values())) as progress:
            for shard in shards:
                self.begin_curves(shard, parts)
                self.read_shard(shard, parts, start, reader, checkpoints, progress)
        for part in parts.values():
            part.done = True
            if part.curve is not None:
                part.curve.watch(part.fitter, final=True)

    def read_shard(
        self,
        shard: Shard,
        parts: Mapping[int, Part],
        start: Place,
        reader: KeyReader,
        checkpoints: Checkpoints,
        progress: Any,
    ) -> None:
        """Add the rows of a shard that the sums do not hold yet."""
        first = start.row if shard.index == start.shard else 0
        stops = {part.place.row for part in parts.values() if part.place.shard == shard.index}
        for rows in batches(shard, self.plan.batch_tokens, first, stops):
            keys = reader.read(shard.rows[rows])
            for layer, part in parts.items():
                if part.place[:2] <= (shard.index, rows.start):
                    part.fitter.update(keys[layer]).check_finite(layer)
                    part.place = Place(shard.index, rows.stop, shard.before)
            counted = len(next(iter(keys.values())))
            progress.update(counted if self.config.tokens else rows.stop - rows.start)
            checkpoints.tick(parts.values())
        for part in parts.values():
            if part.curve is not None and part.place[:2] == (shard.index, len(shard.rows)):
                part.curve.watch(part.fitter)

    def begin_curves(self, shard: Shard, parts: Mapping[int, Part]) -> None:
        """Choose the keys of the curves, at the first shard."""
        bare = [layer for layer, part in parts.items() if part.curve is None]
        if self.convergence is not None and bare and shard.rows:
            keys = self.convergence.chosen(self.model, shard, _read_layers(parts), bare)
            for layer in bare:
                parts[layer].curve = Curve(keys[layer], self.convergence)

    def progress(self, start: Place, count: int) -> Any:
        """A bar in tokens when their number is known, else in texts."""
        if self.config.tokens is not None:
            total = self.config.tokens if self.share.count == 1 else None
            return tqdm(total=total, initial=count, desc="second moments", unit="token", unit_scale=True)
        own = range(self.share.index, -(-len(self.texts) // SHARD), self.share.count)
        total = sum(min(SHARD, len(self.texts) - i * SHARD) for i in own)
        done = sum(SHARD for i in own if i < start.shard) + start.row
        return tqdm(total=total, initial=done, desc="second moments", unit="text")

    def finish(self, part: Part) -> SecondMoment:
        """The mean; with `out` its file is written, and then its checkpoint removed."""
        try:
            moment = part.fitter.result(part.layer, self.provenance)
        except InputError:
            if self.out is not None:
                part.remove(self.out)
            raise
        if part.curve is not None:
            moment = replace(moment, curve=part.curve.frame(part.layer))
        if self.out is not None:
            if moment.curve is not None and self.curves is not None:
                self.curves.save(moment.curve, part.layer)
            moment.save(self.out)
            part.remove(self.out)
            if len(self.plan.passes) > 1:
                # Layers that do not fit in memory together need not lie there together at the end.
                moment = replace(load_moment(self.out, part.layer, mapped=True), curve=moment.curve)
        return moment


def _job(
    model: Model,
    texts: Sequence[str] | str | Path,
    layers: Sequence[int],
    config: MomentsConfig | None,
    out: str | Path | None,
    share: Share,
    overwrite: bool,
    convergence: Convergence | None,
) -> Job:
    """Refuse what can be refused before the text is read."""
    config = config or MomentsConfig()
    wanted = sorted(set(layers))
    if not wanted or not 0 <= wanted[0] <= wanted[-1] < model.n_layers:
        raise InputError(f"the layers are {list(layers)}, expected some of 0 … {model.n_layers - 1} of {model.name!r}")
    if config.tokens is not None and config.tokens < model.d_key:
        raise InputError(
            f"tokens is {config.tokens}, expected at least d_mlp = {model.d_key} (better {100 * model.d_key}), else "
            f"the second moments are singular"
        )
    plan = plan_moments(model, wanted, config, convergence=convergence is not None)
    texts = load_texts(texts) if isinstance(texts, (str, Path)) else texts
    check_texts(texts)
    provenance = {
        **model.provenance(),
        "texts": texts_hash(texts),
        "max_length": min(config.max_length, model.max_positions),
        "tokens": config.tokens,
    }
    return Job(
        model=model, texts=texts, layers=wanted, config=config, plan=plan, provenance=provenance, share=share,
        out=None if out is None else Path(out), overwrite=overwrite, convergence=convergence,
    )  # fmt: skip


def _read_layers(parts: Mapping[int, Part]) -> list[int]:
    """Layers whose keys are read together."""
    return sorted({layer for part in parts.values() for layer in part.read})


def _same(path: Path, fields: Mapping[str, Any]) -> bool:
    try:
        check_provenance(read_header(path, KEY), fields, str(path))
    except InputError:
        return False
    return True
