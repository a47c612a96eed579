"""A quantized matrix in memory: codes and scales, before a format spells them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from formats.scheme import Quantization

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class QTensor:
    """A weight (out, in) as codes on a grid: ``weight = values * scale * quantization.unit``, the scale repeated over its tile.

    ``values``: (out, in), int8 or float8, every code inside ``[grid.low, grid.high]``.
    ``scale``: ``tile.scale_shape((out, in))``, in the dtype a reader will use, positive and finite (zero for zeros, where it is their
    largest magnitude). The codes were rounded against exactly these scales, so that no reader's own rounding of them adds an error.
    Raises ``ValueError`` when the shapes do not fit each other: a defect of whoever made it, never of a user's input.
    """

    values: torch.Tensor
    scale: torch.Tensor
    quantization: Quantization

    def __post_init__(self) -> None:
        out_features, in_features = self.values.shape
        expected = self.quantization.tile.scale_shape((out_features, in_features))
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"a scale of shape {tuple(self.scale.shape)} over values {tuple(self.values.shape)}, expected {expected}")

    def spread_scale(self) -> torch.Tensor:
        """The scale of each element's tile, broadcastable over ``values``, in the dtype of ``scale``."""
        rows, columns = self.values.shape
        scale, tile = self.scale, self.quantization.tile
        if tile.rows is None and tile.columns is None:
            return scale
        if tile.rows not in (None, 1):
            scale = scale.repeat_interleave(tile.rows, dim=0)[:rows]
        if tile.columns is not None:
            scale = scale.repeat_interleave(tile.columns, dim=1)[:, :columns]
        return scale

    def dequantize(self) -> torch.Tensor:
        """float32 (out, in): codes times scales, times the unit last, as bitsandbytes does it."""
        weight = self.values.float() * self.spread_scale().float()
        return weight if self.quantization.unit == 1 else weight.mul_(self.quantization.unit)
