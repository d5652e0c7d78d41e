"""Runs whose steps are hooks at points of a copy: those that TransformerLens makes, or a module's input and output."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mechedit.models.engines import HookedEngine
from mechedit.models.protocol import Run
from mechedit.models.run_plan import RunStopped, SiteStep
from mechedit.models.sites import Site

_LEVEL = 2_000
"""Level that marks our hooks, so that only they are removed afterwards."""
Visit = Callable[[Tensor, Any], Tensor | None]
"""What a hook does with an activation: None leaves it as it is."""


class HookPointEngine(HookedEngine):
    """Calls the copy with a hook for each step."""

    def forward(
        self, arguments: dict[str, Any], steps: Sequence[SiteStep], exit_site: Site | None, *, unembed: bool = True
    ) -> Run:
        """Call the copy with hooks; see `HookedEngine.forward`."""
        values: dict[Site, Tensor] = {}
        shape = tuple(arguments["input_ids"].shape)
        with self._hooks(steps, shape, values, exit_site), contextlib.suppress(RunStopped):
            # The copy is called and not what wraps it, such as a bridge: it takes ids and mask as they are.
            return Run(self.model(**arguments).logits, values)
        return Run(None, values)

    @contextlib.contextmanager
    def _hooks(
        self, steps: Sequence[SiteStep], shape: tuple[int, int], values: dict[Site, Tensor], exit_site: Site | None
    ) -> Iterator[None]:
        points = []
        try:
            for step in steps:
                points.append(self.point(step.site))
                points[-1].add_hook(_visitor(step, shape, values), level=_LEVEL)
            if exit_site is not None:
                # Registered last, so that it runs after the reads and writes of the same site.
                points.append(self.point(exit_site))
                points[-1].add_hook(_stop, level=_LEVEL)
            yield
        finally:
            for point in points:
                point.remove_hooks("fwd", level=_LEVEL)

    @abstractmethod
    def point(self, site: Site) -> Any:
        """The hook point of a site: something with the methods of `ModulePoint`."""


class ModulePoint:
    """The input or output of a plain module, with the methods of a `HookPoint` that are used here."""

    def __init__(self, module: nn.Module, side: str) -> None:
        self.module, self.side = module, side
        self.handles: list[RemovableHandle] = []

    def add_hook(self, visit: Visit, level: int) -> None:
        """Call `visit` on the module's first input, or on its output (the first item of a tuple)."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            after = visit(args[0], None)
            return None if after is None else (after, *args[1:])

        def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            after = visit(output[0] if isinstance(output, tuple) else output, None)
            return (after, *output[1:]) if isinstance(output, tuple) and after is not None else after

        if self.side == "hook_in":
            self.handles.append(self.module.register_forward_pre_hook(before))
        else:
            self.handles.append(self.module.register_forward_hook(behind))

    def remove_hooks(self, direction: str, level: int) -> None:
        """Remove what was added."""
        while self.handles:
            self.handles.pop().remove()


def _visitor(step: SiteStep, shape: tuple[int, int], values: dict[Site, Tensor]) -> Visit:
    def visit(activation: Tensor, hook: Any) -> Tensor | None:
        after = step.on_module(activation, shape, values)
        return after if step.writes else None

    return visit


def _stop(activation: Tensor, hook: Any) -> None:
    raise RunStopped
