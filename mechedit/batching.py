"""Batches of like length: rows grouped, right-padded, and run in halves where memory does not hold them.

Padding is computed for nothing, and so is starting another run: `length_batches` weighs one against the other.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from mechedit.models import Model, Tokens


@runtime_checkable
class Sliceable(Protocol):
    """Several items that can be cut: a sequence, or a batch of rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: slice, /) -> Any: ...


Item = TypeVar("Item")
Rows = TypeVar("Rows", bound=Sliceable)
Result = TypeVar("Result")

LAUNCH_COST = {"cpu": 1e8, "cuda": 1e11}
"""Operations that take about as long as starting a block's run, per type of device."""
WEIGHT_TOKENS: dict[str, float | int] = {"cpu": 64, "cuda": 128}
"""Tokens whose products with a matrix take as long as reading the matrix from memory, per type of device."""
GIB = 2**30
"""Bytes per GiB."""
HIDDEN_COPIES, MLP_COPIES = 12, 4
"""Activations of a block that are in memory at once, in multiples of d_model and of d_mlp."""


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Seconds of a pass over some blocks, in units of what one token takes in a large pass.

    A pass takes the time in which its operations are started, its weights come from memory, and its products are
    computed.
    """

    start: float
    """What starting a pass costs."""
    least: float | int
    """Tokens whose products take as long as reading the weights."""
    head: float
    """Parameters of the output embedding, as a multiple of those of the blocks that run."""

    @staticmethod
    def of(model: Model, blocks: int) -> PassCost:
        """The cost of a pass over so many blocks, on the model's device."""
        head = model.vocab_size * model.d_model / (blocks * block_parameters(model))
        least = WEIGHT_TOKENS.get(model.device.type, WEIGHT_TOKENS["cuda"])
        return PassCost(start=padding_budget(model), least=least, head=head)

    def of_pass(self, tokens: int, scored: int) -> float:
        """The cost of a pass with so many tokens, padding included, of which some are unembedded."""
        return self.start + tokens + self.least + self.head * (scored + self.least)


def block_parameters(model: Model) -> int:
    """Parameters of a block's matrices, the mean over blocks: the multiplications that a token takes."""
    matrices = (
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and name.startswith(f"{model.family.blocks}.")
    )
    return max(sum(matrices) // model.n_layers, 1)


def padding_budget(model: Model) -> float:
    """Padding tokens that cost as much as starting another run of a block."""
    return LAUNCH_COST.get(model.device.type, LAUNCH_COST["cuda"]) / (2 * block_parameters(model))


def length_batches(rows: Sequence[list[int]], padding: float | int, tokens: int) -> Iterator[Sequence[list[int]]]:
    """Consecutive rows as batches, each with at most `padding` padding tokens and at most `tokens` tokens in all.

    Args:
        rows: token ids, the longest row first.
        padding: see `padding_budget`.
        tokens: most tokens of a batch, padding included; a longer row makes a batch by itself.
    """
    begin, padded = 0, 0
    for end, row in enumerate(rows):
        width = len(rows[begin])
        padded += width - len(row)
        if end > begin and (padded > padding or width * (end - begin + 1) > tokens):
            yield rows[begin:end]
            begin, padded = end, 0
    if rows:
        yield rows[begin:]


def group_by_shape(items: Iterable[Item], size: int, shape: Callable[[Item], Hashable]) -> Iterator[list[Item]]:
    """Items of one shape as batches of at most `size`; shapes come in the order of their first items."""
    groups: dict[Hashable, list[Item]] = {}
    for item in items:
        groups.setdefault(shape(item), []).append(item)
    for group in groups.values():
        yield from batches_of(group, size)


def batches_of(items: Rows, size: int) -> Iterator[Rows]:
    """Consecutive items as batches of `size`; the last one may be smaller."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def run_in_halves(batches: Iterable[Rows], run: Callable[[Rows], Result]) -> Iterator[Result]:
    """Run each of the batches; one that the device's memory does not hold is run in halves."""
    for batch in batches:
        halves: tuple[Any, ...] = ()
        try:
            result = run(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            middle = len(batch) // 2
            halves = batch[:middle], batch[middle:]
        else:
            yield result
        # Outside the handler, which keeps alive the memory that the failed run allocated.
        yield from run_in_halves(halves, run)


def pad(rows: Sequence[Sequence[int]], tokenizer: Any, device: Any = "cpu") -> Tokens:
    """Right-pad rows of token ids to one batch."""
    width = max(len(row) for row in rows)
    filler = tokenizer.pad_token_id
    if filler is None:
        filler = tokenizer.eos_token_id or 0
    if filler >= getattr(tokenizer, "vocab_size", filler + 1):
        # A padding token that was added to the tokenizer may have no row in the embedding; the rows' tokens have.
        filler = min(filler, max(map(max, rows)))
    ids = torch.full((len(rows), width), filler, dtype=torch.long, device="cpu")
    mask = torch.zeros((len(rows), width), dtype=torch.long, device="cpu")
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(list(row), dtype=torch.long, device="cpu")
        mask[index, : len(row)] = 1
    return Tokens(ids.to(device), mask.to(device))
