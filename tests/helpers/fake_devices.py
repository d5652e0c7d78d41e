"""A device that a CPU pretends to have: tensors say that they are there, and computing with them and the CPU's fails.

It is one device, `fake:0`, as torch knows no second one that is written in Python; the CPU itself is the other.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

DEVICE = "fake:0"
_CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
"""What may have tensors of two devices."""
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}
"""What takes indices that are on the CPU, as CUDA does."""


class ElsewhereTensor(Tensor):
    """A tensor with its numbers on the CPU, which says that it is elsewhere."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor, device: torch.device) -> ElsewhereTensor:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, layout=numbers.layout, device=device, requires_grad=False,
        )  # fmt: skip
        made.numbers = numbers
        return made

    def __repr__(self, **_: Any) -> str:
        return f"ElsewhereTensor({self.numbers!r}, device={self.device})"

    def tolist(self) -> Any:
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """While it is on, tensors can be made on `fake:0`, and moved there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    here = {tensor.device for tensor in tensors if isinstance(tensor, ElsewhereTensor)}
    if not here and (wanted is None or wanted.type != "fake"):
        return func(*args, **kwargs)
    if func not in _CROSSING:
        strangers = [tensor for tensor in tensors if not isinstance(tensor, ElsewhereTensor) and tensor.ndim]
        if len(here) > 1 or (here and strangers and func not in _INDEXING):
            places = sorted({str(tensor.device) for tensor in tensors})
            raise RuntimeError(f"{func}: expected all tensors on the same device, found {' and '.join(places)}")
    device = wanted or next(iter(here))
    if func is torch.ops.aten.copy_.default:
        device = args[0].device
    if func is torch.ops.aten._fused_sdp_choice.default:
        return 0  # plain products
    plain = tree_map(lambda leaf: leaf.numbers if isinstance(leaf, ElsewhereTensor) else leaf, (args, dict(kwargs)))
    if wanted is not None:
        plain[1]["device"] = torch.device("cpu")
        plain[1].pop("pin_memory", None)
    out = func(*plain[0], **plain[1])
    if device.type != "fake":
        return out
    wrapped = tree_map(lambda leaf: ElsewhereTensor(leaf, device) if isinstance(leaf, Tensor) else leaf, out)
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


class _Backend(ModuleType):
    """What torch asks of the module of a type of device."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        pass


def register() -> None:
    """Make the device known to torch, for as long as the process lives."""
    # What `torch.tensor` makes is moved there by an operation that the mode sees.
    torch._C._set_only_lift_cpu_tensors(True)
    _setup_privateuseone_for_python_backend("fake", _Backend("fake"))
