"""One pass over the text: every batch runs up to the last layer and updates the sums of all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mechedit.models import Model
from mechedit.moments.checkpoints import Checkpoint
from mechedit.moments.chunks import CHUNK_SIZE, Chunk, TextPosition, batches, n_chunks, read_chunks
from mechedit.moments.config import MomentsConfig
from mechedit.moments.convergence import Convergence, ConvergenceTracker
from mechedit.moments.key_reader import KeyReader
from mechedit.moments.moments_folder import MomentsFolder
from mechedit.progress import progress_bar
from mechedit.shards import Rank


@dataclass(frozen=True, kw_only=True, eq=False)
class TextPass:
    """Sums k kᵀ of some layers over the chunks of one process."""

    model: Model
    texts: Sequence[str]
    """All of the text, the same for every process."""
    config: MomentsConfig
    rank: Rank
    batch_tokens: int
    """Tokens per batch and per forward pass."""
    convergence: Convergence | None

    @torch.no_grad()
    def run(self, checkpoints: Mapping[int, Checkpoint], folder: MomentsFolder) -> None:
        """Read from the position of the checkpoints to the end of the text, and update them.

        Args:
            checkpoints: the layers' sums so far, by layer; their positions may differ.
            folder: where they are saved from time to time.
        """
        start = min(checkpoint.position for checkpoint in checkpoints.values())
        reader = KeyReader(self.model, _layers_read(checkpoints), self.batch_tokens)
        max_length = self.config.text_length(self.model)
        chunks = read_chunks(self.model.tokenizer, self.texts, self.config, max_length, self.rank, start)
        count = min(checkpoint.accumulator.count for checkpoint in checkpoints.values())
        with self._progress_bar(start, count) as progress:
            for chunk in chunks:
                self._start_trackers(chunk, checkpoints)
                first = start.sequence if chunk.index == start.chunk else 0
                self._sum_chunk(chunk, first, checkpoints, reader, folder, progress)
        for checkpoint in checkpoints.values():
            checkpoint.done = True
            if checkpoint.tracker is not None:
                checkpoint.tracker.track(checkpoint.accumulator, final=True)

    def _sum_chunk(
        self,
        chunk: Chunk,
        first: int,
        checkpoints: Mapping[int, Checkpoint],
        reader: KeyReader,
        folder: MomentsFolder,
        progress: Any,
    ) -> None:
        """Add the sequences of a chunk from `first` on to each sum that does not hold them yet."""
        sums = checkpoints.values()
        stops = {summed.position.sequence for summed in sums if summed.position.chunk == chunk.index}
        for batch in batches(chunk, self.batch_tokens, first, stops):
            keys = reader.read(chunk.sequences[batch])
            for layer, checkpoint in checkpoints.items():
                if checkpoint.position[:2] <= (chunk.index, batch.start):
                    checkpoint.accumulator.update(keys[layer]).check_finite(layer)
                    checkpoint.position = TextPosition(chunk.index, batch.stop, chunk.tokens_before)
            n_tokens = len(next(iter(keys.values())))
            progress.update(n_tokens if self.config.tokens else batch.stop - batch.start)
            folder.save_if_due(sums)
        for checkpoint in sums:
            if checkpoint.tracker is not None and checkpoint.position[:2] == (chunk.index, len(chunk.sequences)):
                checkpoint.tracker.track(checkpoint.accumulator)

    def _start_trackers(self, chunk: Chunk, checkpoints: Mapping[int, Checkpoint]) -> None:
        """Choose the keys of the convergence curves, at the first chunk that has any."""
        untracked = [layer for layer, checkpoint in checkpoints.items() if checkpoint.tracker is None]
        if self.convergence is not None and untracked and chunk.sequences:
            keys = self.convergence.keys_of(self.model, chunk, _layers_read(checkpoints), untracked)
            for layer in untracked:
                checkpoints[layer].tracker = ConvergenceTracker(keys[layer], self.convergence)

    def _progress_bar(self, start: TextPosition, count: int) -> Any:
        """A bar in tokens if there is a budget of tokens, else in texts.

        Args:
            start: where reading begins.
            count: tokens summed already.
        """
        if self.config.tokens is not None:
            total = self.config.tokens if self.rank.world_size == 1 else None
            return progress_bar(total=total, initial=count, desc="second moments", unit="token", unit_scale=True)
        chunks = [index for index in range(n_chunks(self.texts)) if self.rank.reads(index)]
        total = sum(min(CHUNK_SIZE, len(self.texts) - index * CHUNK_SIZE) for index in chunks)
        done = sum(CHUNK_SIZE for index in chunks if index < start.chunk) + start.sequence
        return progress_bar(total=total, initial=done, desc="second moments", unit="text")


def _layers_read(checkpoints: Mapping[int, Checkpoint]) -> list[int]:
    """Layers whose keys are read in one run: those of the checkpoints, and others for the sake of equal rounding."""
    return sorted({layer for checkpoint in checkpoints.values() for layer in checkpoint.layers_read})
