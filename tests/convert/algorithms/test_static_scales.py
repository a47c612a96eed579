from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.algorithms import static_scales
from convert.statistics import Histogram
from formats.scheme import FP8_E4M3, INT8, Grid


def counted(x: torch.Tensor) -> torch.Tensor:
    histogram = Histogram()
    histogram.update(x)
    return histogram.counts


@given(
    size=st.sampled_from([1, 2, 13, 1000]),
    percentile=st.sampled_from([0.0, 25.0, 50.0, 93.75, 99.21875, 99.993896484375, 100.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_percentiles_are_those_of_numpy(size: int, percentile: float, seed: int) -> None:
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).bfloat16()
    expected = np.percentile(x.float().abs().numpy(), percentile, method="inverted_cdf")
    assert static_scales.scale_by_percentile(counted(x), INT8, percentile=percentile) == pytest.approx(float(expected) / 127, rel=1e-6)


def test_a_percentile_of_nothing_but_zeros_takes_the_smallest_that_is_not() -> None:
    x = torch.zeros(1000)
    x[3], x[4] = 2.0, 5.0
    assert static_scales.scale_by_percentile(counted(x), INT8, percentile=50) == 2 / 127


@pytest.mark.parametrize("grid", [INT8, FP8_E4M3])
@pytest.mark.parametrize("tail", [1.0, 30.0, 1000.0])
def test_the_least_squared_error_is_found(grid: Grid, tail: float) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[0] = tail
    found = static_scales.scale_by_mse(counted(x), grid)

    def error(scale: float) -> float:
        codes = (x.float() / scale).clamp(grid.low, grid.high)
        codes = codes.round() if grid.kind == "int" else codes.to(torch.float8_e4m3fn).float()
        return float((codes * scale - x.float()).double().square().sum())

    absmax = x.float().abs().max().item() / grid.high
    assert error(found) <= 1.02 * min(error(absmax * share) for share in np.geomspace(0.003, 1, 400))
    assert error(found) <= error(absmax)
    if grid is INT8 and tail == 30:
        assert found < 0.95 * absmax


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_what_calibration_cannot_tell_is_an_error(bad: float) -> None:
    for function in (static_scales.scale_by_mse, lambda counts, grid: static_scales.scale_by_percentile(counts, grid, percentile=99)):
        with pytest.raises(ValueError, match="largest magnitude"):
            function(counted(torch.tensor([bad])), INT8)
    with pytest.raises(ValueError, match="percentile"):
        static_scales.scale_by_percentile(counted(torch.ones(3)), INT8, percentile=101)


def test_fused_layers_share_the_largest_and_clipping_is_counted() -> None:
    assert static_scales.shared([0.1, 0.3, 0.2]) == 0.3
    assert static_scales.clip_rate(counted(torch.tensor([1.0, -2.0, 3.0, 4.0])), INT8, scale=2 / 127) == 0.5
