"""The one scale of an activation that a runtime is told in advance, from what calibration saw of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convert.algorithms.rtn import to_nearest
from convert.statistics import magnitudes
from formats.scheme import Grid

#: Shares of the largest magnitude that a search for the least squared error tries, 5 % apart, down to 1 / 200 of it.
_SHARES = tuple(0.95**i for i in range(104))


def scale_by_percentile(counts: torch.Tensor, grid: Grid, *, percentile: float) -> float:
    """The smallest magnitude that at least ``percentile`` % of those in a :class:`convert.statistics.Histogram` do not exceed, over
    ``grid.high``; the smallest that is not zero, where that is zero. Raises ``ValueError`` where the largest is zero or not finite; so do
    the others."""
    if not 0 <= percentile <= 100:
        raise ValueError(f"a percentile of {percentile:g}; it is a share in %, from 0 to 100")
    values, seen = _seen(counts)
    total = int(seen.sum())
    # In whole numbers, since counts may exceed what a float64 tells apart; millionths of a percent are kept.
    rank = max(1, -(-total * round(percentile * 10**6) // 10**8))
    value = values[torch.searchsorted(seen.cumsum(0), rank)]
    if value == 0:
        value = values[1]
    return float(value) / grid.high


def scale_by_mse(counts: torch.Tensor, grid: Grid) -> float:
    """The scale, of shares of the largest magnitude over ``grid.high``, with the smallest ``sum counts * (x - Q(x))**2``.

    Shares are 5 % apart and then 0.5 % around the best. Errors are summed in float64.
    """
    values, seen = _seen(counts)
    weights = seen.double()
    largest = float(values[-1])

    def loss(share: float) -> float:
        scale = largest * share / grid.high
        rounded = to_nearest((values / scale), grid).mul_(scale)
        return float((weights * (rounded - values).double().square()).sum())

    best = min(_SHARES, key=loss)
    best = min((best * (1 + i / 200) for i in range(-9, 10) if best * (1 + i / 200) <= 1), key=loss)
    return largest * best / grid.high


def shared(scales: Sequence[float]) -> float:
    """The scale of layers that a runtime fuses (q, k, v; gate, up): the largest, which clips none of them."""
    return max(scales)


def clip_rate(counts: torch.Tensor, grid: Grid, *, scale: float) -> float:
    """The share of magnitudes in a histogram that ``scale`` cuts off."""
    values, seen = _seen(counts)
    return float(seen[values > scale * grid.high * (1 + 2**-8)].sum() / seen.sum())


def error(counts: torch.Tensor, grid: Grid, *, scale: float) -> float:
    """``sqrt(sum counts * (x - Q(x))**2 / sum counts * x**2)``: what codes lose of an input, as a share of its length."""
    values, seen = _seen(counts)
    lost = to_nearest(values / scale, grid).mul_(scale) - values
    weights = seen.double()
    return float(((weights * lost.double().square()).sum() / (weights * values.double().square()).sum()).sqrt())


def _seen(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Magnitudes that occur, and 0, rising, with their counts."""
    occurs = counts > 0
    occurs[0] = True
    values, seen = magnitudes(counts.device)[occurs], counts[occurs]
    largest = float(values[-1])
    if not 0 < largest < float("inf"):
        raise ValueError(f"calibration saw a largest magnitude of {largest:g}")
    return values, seen
