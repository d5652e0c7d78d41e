"""The files of one collection: checkpoints while it runs, finished moments and convergence curves at its end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mechedit.errors import InputError
from mechedit.files import read_header
from mechedit.models import Model
from mechedit.moments.accumulator import MomentAccumulator
from mechedit.moments.checkpoints import (
    Checkpoint,
    check_checkpoint,
    checkpoint_path,
    checkpoints_folder,
    load_checkpoint,
    remove_checkpoint,
    remove_temporary_files,
    shard_lock,
    sweep_moments,
)
from mechedit.moments.convergence import Convergence
from mechedit.moments.convergence_file import ConvergenceFile
from mechedit.moments.second_moment import METADATA_KEY, REPLACE, SecondMoment, check_header, load_moment, moment_path
from mechedit.paths import check_folder
from mechedit.provenance import determining, numbered, value_hash
from mechedit.shards import Rank

CHECKPOINT_TIME_FRACTION = 0.02
"""Fraction of the time at most that is spent on writing checkpoints."""


@dataclass(kw_only=True, eq=False)
class MomentsFolder:
    """Loads and writes the files of one collection; without a path, nothing is ever written."""

    path: Path | None
    """The results folder."""
    provenance: Mapping[str, Any]
    """Model, text and settings of this collection."""
    rank: Rank
    overwrite: bool
    """Whether files of another provenance are replaced instead of refused."""
    convergence: Convergence | None
    checkpoint_seconds: float | int
    """Seconds between checkpoints at least."""
    _last_save: float = field(default_factory=lambda: time.monotonic())
    _save_seconds: float = 0.0

    @contextlib.contextmanager
    def locked(self, layers: Iterable[int]) -> Iterator[None]:
        """Be the only process that collects this shard of these layers here until the block ends.

        Raises:
            InputError: another process does, from other text or with another model.
        """
        with contextlib.ExitStack() as stack:
            if self.path is not None:
                check_folder(checkpoints_folder(self.path))
                made_with = value_hash(determining(self.provenance))
                for layer in sorted(set(layers)):
                    stack.enter_context(shard_lock(self.path, layer, self.rank, made_with=made_with))
                # A process that is killed after its last file leaves the folder in which it wrote it.
                sweep_moments(self.path)
            yield

    def finished(self, layers: Iterable[int]) -> dict[int, SecondMoment]:
        """The moments in the folder with this provenance, and with their curve if one is measured.

        Raises:
            InputError: a moment has another provenance, and `overwrite` is off.
        """
        if self.path is None:
            return {}
        moments = {}
        for layer in layers:
            path, expected = moment_path(self.path, layer), {**self.provenance, "layer": layer}
            if not path.exists() or (self.overwrite and not _has_provenance(path, expected)):
                continue
            check_header(read_header(path, METADATA_KEY), expected, repr(str(path)), REPLACE)
            curve = None if self._curves is None else self._curves.load(layer)
            if self._curves is None or curve is not None:
                moments[layer] = replace(load_moment(self.path, layer), curve=curve)
        return moments

    def remove_checkpoints(self, layers: Iterable[int]) -> None:
        """Remove what a killed process left of layers that it had finished."""
        if self.path is not None:
            for layer in layers:
                remove_checkpoint(self.path, layer, self.rank)

    def load_checkpoint(self, layer: int, model: Model, layers_read: Sequence[int]) -> Checkpoint:
        """The layer's checkpoint in the folder, or a new one at the beginning of the text.

        Args:
            layer: layer of the sum.
            model: gives the width of the keys, and the device of the sum.
            layers_read: layers whose keys are read in the same runs, for a new checkpoint.

        Raises:
            InputError: the checkpoint is of another model, text or curve, and `overwrite` is off.
        """
        new = Checkpoint(
            layer=layer,
            rank=self.rank,
            accumulator=MomentAccumulator(model.d_key, model.device, model.mesh),
            provenance=self.provenance,
            layers_read=tuple(layers_read),
        )
        if self.path is None:
            return new
        remove_temporary_files(self.path, layer, self.rank)
        path = checkpoint_path(self.path, layer, self.rank)
        if not path.exists():
            return new
        expected = {**self.provenance, "layer": layer}
        try:
            check_checkpoint(read_header(path, METADATA_KEY), expected, self.convergence, repr(str(path)))
        except InputError:
            if self.overwrite:
                return new
            raise
        return replace(load_checkpoint(path, model.device, self.convergence), provenance=self.provenance)

    def save_if_due(self, checkpoints: Iterable[Checkpoint]) -> None:
        """Save the checkpoints if the last were saved `checkpoint_seconds` ago.

        They are saved less often where that would take more than `CHECKPOINT_TIME_FRACTION` of the time.
        """
        start = time.monotonic()
        interval = max(self.checkpoint_seconds, self._save_seconds / CHECKPOINT_TIME_FRACTION)
        if self.path is None or start - self._last_save < interval:
            return
        for checkpoint in checkpoints:
            checkpoint.save(self.path)
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - start

    def finish(self, checkpoint: Checkpoint, *, mapped: bool) -> SecondMoment:
        """The second moment of a complete sum: its file is written, and then its checkpoint removed.

        Args:
            checkpoint: the sum over all of the text.
            mapped: whether to leave the matrix in its file, instead of in memory, until it is used.

        Raises:
            InputError: too few tokens, or values that are not finite; the checkpoint is removed then too.
        """
        try:
            moment = checkpoint.accumulator.finalize(checkpoint.layer, self.provenance)
        except InputError:
            if self.path is not None:
                checkpoint.remove(self.path)
            raise
        if checkpoint.tracker is not None:
            moment = replace(moment, curve=checkpoint.tracker.frame(checkpoint.layer))
        if self.path is None:
            return moment
        if moment.curve is not None and self._curves is not None:
            self._curves.save(moment.curve, checkpoint.layer)
        moment.save(self.path)
        checkpoint.remove(self.path)
        if not mapped:
            return moment
        return replace(load_moment(self.path, checkpoint.layer, mapped=True), curve=moment.curve)

    @property
    def _curves(self) -> ConvergenceFile | None:
        """The file of the convergence curves, if they are measured and written."""
        if self.path is None or self.convergence is None:
            return None
        fields = {name: value for name, value in determining(self.provenance).items() if name != "algorithm"}
        attrs = {"provenance": numbered("moments", fields), "settings": self.convergence.as_json()}
        return ConvergenceFile(self.path, attrs)


def _has_provenance(path: Path, provenance: Mapping[str, Any]) -> bool:
    try:
        check_header(read_header(path, METADATA_KEY), provenance, str(path))
    except InputError:
        return False
    return True
