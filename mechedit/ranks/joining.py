"""Processes that torchrun or accelerate launch started find each other, and leave."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch

from mechedit.errors import InputError, brief, read_whole
from mechedit.ranks.group import CURRENT, SINGLE, Group, current
from mechedit.ranks.processes import TIMEOUT_VARIABLE, Processes

TIMEOUT = 60.0
"""Seconds without a sign of life after which a process counts as dead."""
_JOIN_TIMEOUT = 600.0
"""Seconds for which the processes wait for each other at the start, where the variable is not set."""
_MOST = 1_000_000
"""Processes of one command at most."""
_TRANSFER = 1800.0
"""Seconds that one transfer between processes may take, all of which are there by then."""


@contextlib.contextmanager
def joined() -> Iterator[Group]:
    """Bring together the processes that `torchrun` or `accelerate launch` started, until the block ends.

    Other processes than the first print nothing; on a machine with accelerators each process has its own.

    Raises:
        InputError: the environment does not say how the processes find each other, or not all came in time.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size == "1" or current() is not SINGLE:
        yield current()
        return
    group = _join(_whole("WORLD_SIZE"), _whole("RANK"))
    token = CURRENT.set(group)
    try:
        with contextlib.ExitStack() as stack:
            if not group.is_first:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            yield group
    finally:
        CURRENT.reset(token)
        group.close()


def _whole(name: str, most: int = _MOST) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal() or "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise InputError(
            f"WORLD_SIZE is {brief(os.environ.get('WORLD_SIZE'))} in the environment, {name} is {brief(text)}, and "
            f"MASTER_ADDR and MASTER_PORT are {'there' if 'MASTER_ADDR' in os.environ else 'absent'}; start several "
            f"processes by torchrun or accelerate launch, or unset WORLD_SIZE"
        )
    return read_whole(f"{name} in the environment", text, most)


def _seconds(default: float) -> float:
    text = os.environ.get(TIMEOUT_VARIABLE)
    if text is None:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise InputError(f"{TIMEOUT_VARIABLE} is {brief(text)}, expected seconds, such as 60; choose another")
    return seconds


def _join(world_size: int, rank: int) -> Processes:
    """Find the other processes.

    Raises:
        InputError: they did not come in time.
    """
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
    from torch.distributed.rendezvous import rendezvous

    if not rank < world_size:
        raise InputError(f"RANK is {rank}, expected one of 0 … {world_size - 1}; start the processes by torchrun")
    _whole("MASTER_PORT", 65_535)
    patience = _seconds(_JOIN_TIMEOUT)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=datetime.timedelta(seconds=patience)))
        store = PrefixStore("mechedit", store)
        group = Processes(rank, world_size, store, _seconds(TIMEOUT))
        group.meet("the start", patience)
        dist.init_process_group(
            "gloo",
            store=PrefixStore("gloo", store),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=_TRANSFER),
        )
    except (RuntimeError, OSError, ValueError) as error:  # torch's errors of the network are RuntimeErrors
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"the {world_size} processes did not find each other at {address} within {patience:g} s "
            f"({' '.join(str(error).split())[:200]}); check that all were started, and that they can reach it"
        ) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)) % torch.cuda.device_count())
    return group
