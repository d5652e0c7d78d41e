"""Where time goes: products are told from everything else, and their operations from the machine's rate."""

from __future__ import annotations

import pytest
import torch

from benchmarks.machine import matrix_rate
from benchmarks.necessary_work import Work
from benchmarks.one_thread import parts_of


def test_products_are_told_from_other_operations() -> None:
    a, b = torch.randn(2, 700, 700)
    products = parts_of(lambda: [a @ b for _ in range(30)], Work(necessary=30 * 2 * 700**3, published=1))
    assert products.products > 0.8 * products.seconds
    assert products.others < 0.2 * products.products
    assert products.rate == pytest.approx(30 * 2 * 700**3 / products.seconds / matrix_rate("cpu", "float32"))
    others = parts_of(lambda: [torch.exp(a) for _ in range(30)], Work(necessary=0, published=1))
    assert others.products == 0 < others.others
    queries = torch.randn(2, 4, 64, 32)
    attention = parts_of(
        lambda: torch.nn.functional.scaled_dot_product_attention(queries, queries, queries),
        Work(necessary=0, published=1),
    )
    assert attention.attention > 0
    assert "products" in str(products)
