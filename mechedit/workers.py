"""Passes that do not depend on each other, several at once on a CPU, with a part of its cores each.

Cores that compute one product together wait for each other at its end, and all but one are idle while Python runs
between two operations; cores that compute passes of their own are not.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from mechedit.batching import Result, Rows, block_parameters, run_in_halves
from mechedit.models import Model

MOST = 4
"""Most passes at once: between the operations of a pass runs Python, in one thread at a time."""
LARGE_BLOCK = 5e7
"""Parameters of a block from which on all cores compute one pass: its products are long, and passes of their own would
each read the weights from memory. All cores were faster at 2e8 (GPT-J's), and as fast at 1.5e7 (Qwen2-0.5B's)."""


def n_workers(model: Model) -> int:
    """How many passes run at once: as many as the CPU has threads for, up to `MOST`.

    One where blocks are large, on other devices, and where runs replace the forwards of modules that they share
    (`Model.runs_at_once`).
    """
    if model.device.type != "cpu" or not model.runs_at_once or block_parameters(model) >= LARGE_BLOCK:
        return 1
    return min(torch.get_num_threads(), MOST)


def run_batches(model: Model, batches: Iterable[Rows], run: Callable[[Rows], Result]) -> Iterator[Result]:
    """Run each of the batches, in halves where the device's memory does not hold it.

    Args:
        model: the model that is run.
        batches: do not depend on each other; the largest first keep all cores busy to the end.
        run: runs a batch, in whichever thread.

    Returns:
        The results in the order of the batches, whichever ended first.
    """
    batches = list(batches)
    workers = min(n_workers(model), len(batches))
    if workers <= 1:
        yield from run_in_halves(batches, run)
        return
    is_grad, is_inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def run_here(batch: Rows) -> list[Result]:
        # A thread begins with torch's defaults.
        with torch.inference_mode(is_inference), torch.set_grad_enabled(is_grad):
            return list(run_in_halves([batch], run))

    per_worker = torch.get_num_threads() // workers
    with _threads(per_worker):
        pool = ThreadPoolExecutor(workers, "mechedit", torch.set_num_threads, (per_worker,))
        try:
            # In the caller's context, so that the model knows the workers for those who hold it (`Model.exclusive`).
            for future in [pool.submit(contextvars.copy_context().run, run_here, batch) for batch in batches]:
                yield from future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch use so many threads for an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
