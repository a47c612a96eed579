"""Products of codes on a CPU, against float64."""

from __future__ import annotations

import pytest
import torch

from convert.integers import Packed, codes_of, largest, pays


@pytest.mark.skipif(not pays("cpu"), reason="this processor does not multiply INT8 faster than float32")
@pytest.mark.parametrize("tokens", [1, 2, 13])
@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
def test_products_are_those_of_the_codes(tokens: int, turned: bool) -> None:
    """However the weight lies in memory."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-127, 128, (37, 48) if turned else (48, 37), generator=generator, dtype=torch.int8)
    values = values.T if turned else values
    codes = torch.randint(1, 256, (tokens, 37), generator=generator, dtype=torch.uint8)
    scale = torch.rand(48, 1, generator=generator)
    exact = (codes.double() - 128) @ (values.double() * scale.double()).T
    assert (Packed.of(values, scale).product(codes) - exact).norm() < 1e-6 * exact.norm()


def test_codes_are_rounded_half_to_even() -> None:
    ratios = torch.cat([torch.arange(-127, 127.5, 0.25), torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -126.5])])
    assert torch.equal(codes_of(ratios.clone()).int() - 128, ratios.double().round().int())
    assert torch.equal(largest(torch.tensor([[1.0, -3.0], [0.0, 0.0], [2.0, -1.0]])), torch.tensor([[3.0], [0.0], [2.0]]))
