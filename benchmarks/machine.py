"""The clock, the memory taken, and the machine's own speed."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")


@functools.lru_cache
def matrix_rate(device: str, dtype: str, seconds: float = 2.0) -> float:
    """Operations per second of large square matrix products; measured once."""
    size = 8192 if device.startswith("cuda") else 2048
    a, b = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    torch.matmul(a, b)
    wait(device)
    begin, done = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        torch.matmul(a, b)
        wait(device)
        done += 1
    return done * 2 * size**3 / (time.perf_counter() - begin)


def wait(device: str) -> None:
    """Let the accelerator finish."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(make: Callable[[], Result], device: str) -> tuple[Result, float]:
    """A result and the seconds that it took."""
    wait(device)
    begin = time.perf_counter()
    result = make()
    wait(device)
    return result, time.perf_counter() - begin


class Peak:
    """The most memory taken beyond what was there at the start."""

    def __init__(self, device: str):
        self.device = device
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # Linux: what was freed is given back, or it would hide what is taken
            Path("/proc/self/clear_refs").write_text("5")  # and the peak is forgotten
        self.start = self._now("VmRSS")

    def taken(self) -> float:
        """GiB beyond what was taken at the start."""
        return self._now("VmHWM") - self.start

    def _now(self, field: str) -> float:
        if self.device.startswith("cuda"):
            peak, now = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
            return (peak if field == "VmHWM" else now) / 2**30
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith(field))
