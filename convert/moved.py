"""How far codes lie from the weights they were chosen for: what GPTQ notes, and the check measures again from the bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from formats.qtensor import QTensor


@dataclass(frozen=True)
class Moved:
    """``steps``: the largest ``|q - w| / scale``. ``noise`` and ``signal``: the sums of ``(q - w)**2`` and ``w**2``."""

    steps: float
    noise: float
    signal: float

    def __add__(self, other: Moved) -> Moved:
        return Moved(max(self.steps, other.steps), self.noise + other.noise, self.signal + other.signal)


def moved(weight: torch.Tensor, quantized: QTensor) -> Moved:
    """Of a weight (out, in) in float32. Elements are float32 and sums float64, so that slabs add up to what the whole gives, but for the
    last bits of a float64."""
    error = quantized.dequantize() - weight
    steps = (error.abs() / quantized.spread_scale().float()).max() if weight.numel() else error.sum()
    return Moved(float(steps), float(error.square().sum(dtype=torch.float64)), float(weight.square().sum(dtype=torch.float64)))
