"""Windows: the layers that the cell at a layer restores."""

from __future__ import annotations


def window_span(kind: str, layer: int, n_layers: int, width: int | None) -> range:
    """Layers restored by the cell at `layer`: itself for a state, else a centered window cut at the edges.

    The published code restores l − w/2 … l + w/2 − 1; so does this. The effects hold the number of layers left
    after the cut.
    """
    if kind == "state":
        return range(layer, layer + 1)
    width = width or default_window(n_layers)
    start = layer - width // 2
    return range(max(0, start), min(n_layers, start + width))


def default_window(n_layers: int) -> int:
    """10 layers from 28 up (the papers' choice), scaled to depth below, at least 1."""
    return 10 if n_layers >= 28 else max(1, round(10 * n_layers / 28))
