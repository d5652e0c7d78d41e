"""Work for several processes that share nothing but a folder: who does what, and the records of what is finished.

The work is cut into pieces before it is dealt out, and a piece is computed as one process would; so the results do not
depend on the number of processes. Each process leaves a record when it has finished its shard, and whoever puts the
pieces together looks at the records first: all of them must be there, and of the same work.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mechedit import ranks
from mechedit.errors import InputError
from mechedit.files import plain_copy, read_checked_object, write_checked_json
from mechedit.notices import warn
from mechedit.provenance import check_provenance

Item = TypeVar("Item")
Result = TypeVar("Result")

_FILE_NAME = re.compile(r"shard_(?P<index>0|[1-9][0-9]*)_of_(?P<world_size>[1-9][0-9]*)\.json")


class Rank(NamedTuple):
    """Index of a process and number of processes, as in torch.distributed."""

    index: int = 0
    world_size: int = 1

    @staticmethod
    def of(index: int, world_size: int) -> Rank:
        """A rank, checked.

        Raises:
            InputError: the index is not among those of `world_size` processes.
        """
        if world_size < 1:
            raise InputError(
                f"the shard is {index}/{world_size}, whose number of shards is {world_size}, expected at least 1; "
                f"choose such as 0/4, the first of four"
            )
        if not 0 <= index < world_size:
            last = world_size - 1
            raise InputError(f"the shard is {index}/{world_size}, expected one of 0/{world_size} … {last}/{world_size}")
        return Rank(index, world_size)

    def reads(self, index: int) -> bool:
        """Whether this process takes a piece where pieces are dealt out in turns."""
        return index % self.world_size == self.index

    def __str__(self) -> str:
        return f"{self.index}/{self.world_size}"


SINGLE_PROCESS = Rank()
"""A process that does all of the work."""


def deal(costs: Sequence[float | int], world_size: int) -> list[int]:
    """For each piece of work the index of the process that does it, so that all have about as much to do.

    The dearest piece goes first, each to the process that has least to do so far (Graham, 1969: at most 4/3 of the
    shortest time possible).

    Args:
        costs: of the pieces, in any unit.
        world_size: number of processes.
    """
    loads, owners = [0.0] * world_size, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        owners[piece] = loads.index(min(loads))
        loads[owners[piece]] += costs[piece]
    return owners


def pieces_of(costs: Sequence[float | int], rank: Rank, what: str) -> list[int]:
    """Indices of the pieces of work that a shard holds.

    Args:
        costs: of all pieces.
        rank: the shard.
        what: the pieces in the plural, for the message.

    Raises:
        InputError: there are fewer pieces than shards.
    """
    if rank.world_size > len(costs):
        raise InputError(
            f"the shard is {rank}, expected at most {len(costs)} shards, as many as there are {what}; choose fewer"
        )
    return [piece for piece, owner in enumerate(deal(costs, rank.world_size)) if owner == rank.index]


def run_dealt(
    items: Sequence[Item],
    run: Callable[[Item], Result],
    cost: Callable[[Item], float | int],
    step: str,
    *,
    size: Callable[[Item], int] = lambda item: 1,
    **bar: Any,
) -> list[Result]:
    """The results of all items, in order, on all processes of the command; each item is run by one of them.

    Args:
        items: pieces of work, the same on all processes.
        run: does one of them, on its own.
        cost: of an item, in any unit.
        step: names what is done, for messages and the progress bar.
        size: what an item counts in the progress bar.
        **bar: options of the progress bar; see `tqdm`.

    Raises:
        InputError: the processes have cut the work into different pieces.
    """
    group = ranks.current()
    costs = [cost(item) for item in items]
    group.agree(step, {"the cost of each piece of work": costs})
    owners = deal(costs, group.world_size)
    results: dict[int, Result] = {}
    with group.bar(sum(map(size, items)), desc=step, **bar) as progress:
        for index, item in enumerate(items):
            if owners[index] == group.rank:
                with ranks.alone():
                    results[index] = run(item)
                progress.update(size(item))
        gathered = group.gather(results, step)
    merged = {index: result for part in gathered for index, result in part.items()}
    return [merged[index] for index in range(len(items))]


def warn_if_idle(n_pieces: int, what: str) -> None:
    """Say that there is less work than processes.

    Args:
        n_pieces: number of pieces of work.
        what: the pieces in the plural.
    """
    world_size = ranks.current().world_size
    if n_pieces < world_size:
        warn(
            f"{world_size - n_pieces} of the {world_size} processes have nothing to do: there are only {n_pieces} "
            f"{what}"
        )


@dataclass(frozen=True, kw_only=True)
class ShardRecords:
    """The records in a folder, `shard_I_of_N.json`, of the shards that are finished."""

    folder: Path
    """Folder of the records."""
    command: str
    """What makes a shard, such as `mechedit trace`, for messages."""

    def path(self, rank: Rank) -> Path:
        """The record of a shard."""
        return self.folder / f"shard_{rank.index}_of_{rank.world_size}.json"

    def write(self, rank: Rank, made_with: Mapping[str, Any], content: Mapping[str, Any]) -> None:
        """Say that a shard is finished.

        Args:
            rank: the shard.
            made_with: all that determines the work, the same for every shard; by name, for messages.
            content: what the merge needs besides.
        """
        write_checked_json(self.path(rank), {"made_with": made_with, "content": content})

    def check(self, rank: Rank, made_with: Mapping[str, Any]) -> None:
        """Refuse to go on where the record of this shard is of other work.

        Raises:
            InputError: names the first field that differs.
        """
        if self.path(rank).is_file():
            remedy = "choose another --out, or pass --overwrite to begin anew"
            check_provenance(self._read(rank)["made_with"], plain_copy(made_with), repr(str(self.path(rank))), remedy)

    def merged(self, made_with: Mapping[str, Any] | None = None, *, partly: bool = False) -> Mapping[str, Any]:
        """What the shards left for the merge, after checking that all are there, and of the same work.

        Args:
            made_with: of the work that is expected; by default that of the first shard.
            partly: whether records may be missing, because all that the shards make is there.

        Raises:
            InputError: no shards, shards of several numbers of processes, one that is missing, or one of other work.
        """
        ranks = self._ranks(partly)
        expected = None if made_with is None else plain_copy(made_with)
        content: Mapping[str, Any] = {}
        for rank in ranks:
            record = self._read(rank)
            expected = record["made_with"] if expected is None else expected
            content = content or record["content"]
            what = f"the shard {rank} ({str(self.path(rank))!r})"
            remedy = f"remove it, and make it again with {self.command} --shard {rank}"
            check_provenance(record["made_with"], expected, what, remedy)
            check_provenance(expected, record["made_with"], "what is merged", remedy)
        return content

    def remove(self) -> None:
        """Remove all records, and the folder when it is then empty."""
        for path in self.folder.glob("shard_*_of_*.json"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _ranks(self, partly: bool) -> list[Rank]:
        """The shards that must be there, or with `partly` those that are."""
        names = [_FILE_NAME.fullmatch(path.name) for path in sorted(self.folder.glob("shard_*_of_*.json"))]
        listed = [Rank(int(name["index"]), int(name["world_size"])) for name in names if name is not None]
        present = {rank for rank in listed if rank.index < rank.world_size}
        sizes = sorted({rank.world_size for rank in present})
        if not sizes and not partly:
            raise InputError(
                f"{str(self.folder)!r} holds no finished shards, expected those of all processes; make them with "
                f"{self.command} --shard I/N"
            )
        if len(sizes) > 1:
            raise InputError(
                f"{str(self.folder)!r} holds shards of {sizes} processes, expected those of one number, or the same "
                f"work counts twice; remove the others"
            )
        if not partly and len(present) < sizes[0]:
            missing = next(rank for rank in map(Rank, count(), repeat(sizes[0])) if rank not in present)
            raise InputError(
                f"the shard {missing} is missing ({str(self.path(missing))!r}); make it with {self.command} "
                f"--shard {missing}"
            )
        return sorted(present)

    def _read(self, rank: Rank) -> Mapping[str, Any]:
        remedy = f"remove it, and make it again with {self.command} --shard {rank}"
        record = read_checked_object(self.path(rank), "made_with", "content", remedy=remedy)
        if not (record.get("made_with") and isinstance(record.get("content"), dict)):
            raise InputError(f"{str(self.path(rank))!r} is not the record of a shard; {remedy}")
        return record
