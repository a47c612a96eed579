"""Round to nearest: the scale is the tile's largest magnitude over the grid's largest code."""

from __future__ import annotations

import torch

from formats.qtensor import QTensor
from formats.scheme import Grid, Quantization


def quantize(weight: torch.Tensor, quantization: Quantization, *, scale_dtype: torch.dtype) -> QTensor:
    """Rounds a weight (out, in) of any float dtype to ``quantization.grid``; symmetric, one scale a tile.

    ``scale = absmax(tile) / grid.high`` in float32, then rounded to what the reader will use: ``scale_dtype``, float32, or the power of
    two at or above it, as ``quantization.scale`` says; a tile of zeros has scale 1.
    ``code = clamp(round_half_even(weight / scale), low, high)`` against the rounded scale, in float32: IEEE division and rounding
    are exact on every device, so CPU and CUDA give the same bytes.

    A weight of NaN or Inf gives a scale that is not finite, which the caller reports under the tensor's name. Raises ``ValueError`` when
    tiles do not divide the weight; formats refuse such weights before.
    """
    if quantization.scale == "absmax":
        return _by_absmax(weight.to(scale_dtype), quantization)
    values = weight.float()
    rows, columns = weight.shape
    tile = quantization.tile
    tile_rows, tile_columns = tile.rows or rows, tile.columns or columns
    if rows % tile_rows or columns % tile_columns:
        raise ValueError(f"tiles of {tile_rows} x {tile_columns} do not divide a weight of {rows} x {columns}")
    tiles = values.view(rows // tile_rows, tile_rows, columns // tile_columns, tile_columns)
    # Two reductions and no temporary: fresh memory costs more than the second pass.
    absmax = torch.maximum(tiles.amax(dim=(1, 3), keepdim=True), tiles.amin(dim=(1, 3), keepdim=True).neg_())
    scale = absmax / quantization.grid.high
    if quantization.scale == "F8_E8M0":
        scale = _power_of_two_above(scale)
        stored = scale.to(torch.float8_e8m0fnu)
    else:
        scale = scale.to(torch.float32 if quantization.scale == "F32" else scale_dtype)
        # absmax / high may underflow to zero in scale_dtype: the tile is then as good as zero, and x / 1 rounds to zero.
        scale = stored = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = tiles.div_(scale.float()) if values is not weight else tiles / scale.float()
    return QTensor(
        round_to_grid(codes, quantization.grid).view(rows, columns), stored.view(rows // tile_rows, columns // tile_columns), quantization
    )


def _by_absmax(weight: torch.Tensor, quantization: Quantization) -> QTensor:
    """``LLM.int8()`` as bitsandbytes 0.50 computes it (``backends/default/ops.py``: ``int8_vectorwise_quant``), byte for byte.

    ``scale = absmax(row)`` and ``code = round_half_even(w * (127 / scale))`` of ``w`` in float16, multiplied in float32. A row of zeros has
    scale 0. What float16 cannot hold gives a scale of Inf.
    """
    values = weight.half().float()
    absmax = torch.maximum(values.amax(dim=1, keepdim=True), values.amin(dim=1, keepdim=True).neg_()).abs_()
    factor = torch.where(absmax == 0, absmax, quantization.grid.high / absmax)
    return QTensor(round_to_grid(values.mul_(factor), quantization.grid), absmax, quantization)


def _power_of_two_above(values: torch.Tensor) -> torch.Tensor:
    """The smallest power of two that is not below each positive float32, at least 2**-127; 1 for zero; what is not finite stays."""
    mantissa, exponent = torch.frexp(values)  # mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_(min=-127)
    powers = torch.ldexp(torch.ones_like(values), exponent)
    return torch.where(values == 0, 1.0, torch.where(torch.isfinite(values), powers, values))


def round_to_grid(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The nearest code to each float32, ties to even, clamped first: torch saturates a float8 cast, other libraries give NaN.

    Overwrites ``codes``.
    """
    codes.clamp_(grid.low, grid.high)
    if grid.kind == "int":
        return codes.round_().to(torch.int8)
    return codes.to(torch.float8_e4m3fn)
