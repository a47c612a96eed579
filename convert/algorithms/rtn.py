"""Round to nearest: the scale is the tile's largest magnitude over the grid's largest code."""

from __future__ import annotations

import torch

from formats.qtensor import QTensor
from formats.scheme import Grid, Quantization


def quantize(weight: torch.Tensor, quantization: Quantization, *, scale_dtype: torch.dtype) -> QTensor:
    """Rounds a weight (out, in) of any float dtype to ``quantization.grid``; symmetric, one scale a row.

    ``scale = absmax(row) / grid.high`` in float32, rounded to ``scale_dtype`` (what the reader will use); a row of zeros has scale 1.
    ``code = clamp(round_half_even(weight / scale), low, high)`` against the rounded scale, in float32: IEEE division and rounding
    are exact on every device, so CPU and CUDA give the same bytes.

    A weight of NaN or Inf gives a scale that is not finite, which the caller reports under the tensor's name.
    """
    values = weight.float()
    # Two reductions and no temporary: fresh memory costs more than the second pass.
    absmax = torch.maximum(values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True).neg_())
    scale = (absmax / quantization.grid.high).to(scale_dtype)
    # absmax / high may underflow to zero in scale_dtype: the row is then as good as zero, and x / 1 rounds to zero.
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = values.div_(scale.float()) if values is not weight else values / scale.float()
    return QTensor(round_to_grid(codes, quantization.grid), scale, quantization)


def round_to_grid(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The nearest code to each float32, ties to even, clamped first: torch saturates a float8 cast, other libraries give NaN.

    Overwrites ``codes``.
    """
    codes.clamp_(grid.low, grid.high)
    if grid.kind == "int":
        return codes.round_().to(torch.int8)
    return codes.to(torch.float8_e4m3fn)
