"""What calibration keeps of the inputs of a linear layer: accumulators, each with ``update(x)``, x (tokens, in), and ``merge(other)``.

An update is ``add(reduce(x))``: reducing changes nothing, so that many may go on at once; adding is done in one order. Every one lives on
the device it was made for and never waits for it: nothing is read back until somebody asks. Maxima, counts and histograms do not depend on
the order of updates and merges; sums do in their last bits, so whoever wants the same bytes keeps one order. NaN and Inf are not looked
for: they stay visible in every result. An update with no tokens changes nothing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial

import torch

from convert.hardware import instructions

#: A bin for each magnitude of a bfloat16: eight bits of exponent, seven of mantissa.
MAGNITUDES = 1 << 15
#: Features to a panel of a Hessian on a CPU: 96 to 1,536 were tried, 384 was the fastest for 576 and 1,536 features.
_PANEL = 384


class OfChannels(ABC):
    """Accumulators that need to know no more of an update than the largest magnitude of each channel."""

    @staticmethod
    def reduce(x: torch.Tensor) -> torch.Tensor:
        """Of x (tokens, in), of any float dtype, with one token at least: the largest magnitude of each channel, (in,) float32."""
        if x.is_cuda:
            # It reads x once; on a CPU it takes ten times as long as the others.
            largest: torch.Tensor = torch.linalg.vector_norm(x, torch.inf, dim=0)
            return largest.float()
        if x.dtype in (torch.bfloat16, torch.float16):
            # Without their sign the bits of floats are in the order of their values, NaN last: a quarter of the time of floats.
            return (x.view(torch.int16) & 0x7FFF).amax(dim=0).view(x.dtype).float()
        # torch.aminmax along a dimension takes six times as long as both of these.
        return torch.maximum(x.amax(dim=0), -x.amin(dim=0)).float()

    @abstractmethod
    def add(self, largest: torch.Tensor) -> None:
        """Of what :meth:`reduce` returns."""

    def update(self, x: torch.Tensor) -> None:
        if x.numel():
            self.add(self.reduce(x))


class AbsMax(OfChannels):
    """The largest magnitude: ``value``, a float32 scalar, 0 before anything was seen."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros((), device=device)

    def add(self, largest: torch.Tensor) -> None:
        self.value = torch.maximum(self.value, largest.amax())

    def merge(self, other: AbsMax) -> None:
        self.value = torch.maximum(self.value, other.value.to(self.value.device))


class Maxima(OfChannels):
    """The largest magnitude of each update: ``kept``, float32 scalars in the order of updates."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def add(self, largest: torch.Tensor) -> None:
        self.kept.append(largest.amax())

    def merge(self, other: Maxima) -> None:
        self.kept += other.kept


class MinMax:
    """The smallest and the largest value: ``low`` and ``high``, float32 scalars, ``+inf`` and ``-inf`` before anything was seen."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.low = torch.full((), math.inf, device=device)
        self.high = torch.full((), -math.inf, device=device)

    def update(self, x: torch.Tensor) -> None:
        if x.numel():
            low, high = torch.aminmax(x)
            self.low, self.high = torch.minimum(self.low, low.float()), torch.maximum(self.high, high.float())

    def merge(self, other: MinMax) -> None:
        self.low = torch.minimum(self.low, other.low.to(self.low.device))
        self.high = torch.maximum(self.high, other.high.to(self.high.device))


class ChannelAbsMax(OfChannels):
    """The largest magnitude of each input feature: ``value`` (in,) float32, 0 before anything was seen."""

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.value = torch.zeros(features, device=device)

    def add(self, largest: torch.Tensor) -> None:
        torch.maximum(self.value, largest, out=self.value)

    def merge(self, other: ChannelAbsMax) -> None:
        torch.maximum(self.value, other.value.to(self.value.device), out=self.value)


class ChannelMean:
    """The mean of each input feature, or of its magnitude: ``total`` (in,) float64, over ``tokens``."""

    def __init__(self, features: int, device: torch.device | str = "cpu", *, magnitude: bool = False) -> None:
        self.total = torch.zeros(features, dtype=torch.float64, device=device)
        self.tokens = 0
        self.magnitude = magnitude

    def reduce(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        return (x.abs() if self.magnitude else x).sum(dim=0, dtype=torch.float32), len(x)

    def add(self, reduced: tuple[torch.Tensor, int]) -> None:
        self.total += reduced[0]
        self.tokens += reduced[1]

    def update(self, x: torch.Tensor) -> None:
        self.add(self.reduce(x))

    def merge(self, other: ChannelMean) -> None:
        self.total += other.total.to(self.total.device)
        self.tokens += other.tokens

    @property
    def value(self) -> torch.Tensor:
        """E[x] or E[|x|], (in,) float32; NaN before anything was seen."""
        return (self.total / self.tokens if self.tokens else self.total * math.nan).float()


class Histogram:
    """How often each magnitude occurs, of x rounded to bfloat16: ``counts`` (:data:`MAGNITUDES`,) int64, by the bits without the sign.

    Exact for bfloat16; within 0.4 % of the value for other dtypes, however large the largest is. A fixed number of equally wide bins
    cannot do that: where one activation is a thousand times the others, all of these share two bins of 2,048. Nothing has to grow, so that
    merging is adding. On CUDA integers are added atomically, in any order to the same sums.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.counts = torch.zeros(MAGNITUDES, dtype=torch.int64, device=device)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        bits = x.to(torch.bfloat16).reshape(-1).view(torch.int16) & 0x7FFF
        return torch.bincount(bits, minlength=MAGNITUDES)

    def add(self, counts: torch.Tensor) -> None:
        self.counts += counts

    def update(self, x: torch.Tensor) -> None:
        self.add(self.reduce(x))

    def merge(self, other: Histogram) -> None:
        self.counts += other.counts.to(self.counts.device)


def magnitudes(device: torch.device | str = "cpu") -> torch.Tensor:
    """The magnitude that each bin of a :class:`Histogram` counts, float32, rising; the last 128 are Inf and NaN."""
    return torch.arange(MAGNITUDES, dtype=torch.int16, device=device).view(torch.bfloat16).float()


class Hessian:
    """``X^T X`` over all ``tokens``, not divided by their number.

    On CUDA the product of 16-bit matrices is taken in float32 at the speed of 16 bits. On a CPU inputs are multiplied in float32, which
    :func:`sixteen_bit_factors` makes the same for those of bfloat16.
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.features = features
        self._upper = torch.zeros(features, features, device=device)
        self.tokens = 0

    @staticmethod
    def reduce(x: torch.Tensor) -> torch.Tensor:
        """x (tokens, in) as it is multiplied: itself, 16-bit on CUDA, else float32."""
        return x if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else x.float()

    def add(self, x: torch.Tensor) -> None:
        for part in self.parts():
            part(x)

    def update(self, x: torch.Tensor) -> None:
        self.add(self.reduce(x))

    def parts(self) -> list[Callable[[torch.Tensor], None]]:
        """What :meth:`add` does, in parts that have nothing in common, so that each may run in a thread of its own."""
        return [partial(self._add, panel) for panel in self._panels()]

    def _add(self, panel: slice, x: torch.Tensor) -> None:
        if panel.start == 0:
            self.tokens += len(x)
        if not x.numel():
            return
        upper, left, right = self._upper[panel, panel.start :], x[:, panel].T, x[:, panel.start :]
        if x.dtype == torch.float32:
            upper.addmm_(left, right)
        else:
            upper += torch.mm(left, right, out_dtype=torch.float32)

    def merge(self, other: Hessian) -> None:
        self._upper += other._upper.to(self._upper.device)
        self.tokens += other.tokens

    @property
    def value(self) -> torch.Tensor:
        """(in, in) float32, symmetric to the bit; the accumulator itself, not a copy, so that it is not held twice."""
        for panel in self._panels():
            diagonal = self._upper[panel, panel]
            diagonal.copy_(diagonal.triu() + diagonal.triu(1).T)
            self._upper[panel.stop :, panel] = self._upper[panel, panel.stop :].T
        return self._upper

    def _panels(self) -> list[slice]:
        """Of each run of rows only the part from the diagonal on is multiplied, which saves up to half."""
        features = len(self._upper)
        size = max(_PANEL, -(-features // 4) if self._upper.is_cuda else 0)
        return [slice(start, min(start + size, features)) for start in range(0, features, size)]


@contextmanager
def sixteen_bit_factors() -> Iterator[None]:
    """While it lasts, factors of float32 products on a CPU are rounded to bfloat16, and still summed in float32 (oneDNN's ``fpmath`` mode):
    exact for inputs that were bfloat16, at the speed of :func:`multiplies_bfloat16`.

    It holds for all threads of the process, so nothing else may multiply meanwhile, and is entered by one at a time.
    """
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    was, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = was


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    return bool(instructions() & {"amx_bf16", "avx512_bf16"})


class Rows:
    """Some rows of x as they were: ``count`` evenly spaced ones of each update (all, where it has fewer), in the order of updates."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.kept: list[torch.Tensor] = []

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        index = torch.arange(min(self.count, len(x)), device=x.device) * len(x) // max(1, min(self.count, len(x)))
        return x[index]

    def add(self, rows: torch.Tensor) -> None:
        if len(rows):
            self.kept.append(rows)

    def update(self, x: torch.Tensor) -> None:
        self.add(self.reduce(x))

    def merge(self, other: Rows) -> None:
        self.kept += other.kept

    @property
    def value(self) -> torch.Tensor:
        """(rows, in) in the dtype of the updates. Raises ``ValueError`` before anything was seen."""
        if not self.kept:
            raise ValueError("no row was seen")
        return torch.cat(self.kept)
