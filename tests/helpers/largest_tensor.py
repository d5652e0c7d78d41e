"""The size of what a process holds at once, by the largest floating-point tensor that it makes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor of some dtypes that this process makes within the block; views are such, too."""

    def __init__(self, dtypes: Collection[torch.dtype] = (torch.float32, torch.float64)) -> None:
        super().__init__()
        self.dtypes, self.numbers = dtypes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # its parts come by once it has taken itself apart
            return NotImplemented
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            is_real = isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor)  # by which shapes are found
            if is_real and tensor.dtype in self.dtypes:
                self.numbers = max(self.numbers, tensor.numel())
        return made
