"""Round to nearest: the scale is the tile's largest magnitude over the grid's largest code, or a part of that which loses less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from formats.qtensor import QTensor
from formats.scheme import Grid, Quantization

#: Shares of the largest magnitude worth trying beside all of it: at eight bits, less loses more by clipping than it wins by finer steps
#: unless a few elements stand far out.
CLIP_RATIOS = (0.98, 0.96, 0.94, 0.92, 0.9, 0.87, 0.84, 0.8, 0.75, 0.7, 0.6, 0.5)


def quantize(
    weight: torch.Tensor,
    quantization: Quantization,
    *,
    scale_dtype: torch.dtype,
    clip_search: Sequence[float] = (),
    energy: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
) -> QTensor:
    """Rounds a weight (out, in) of any float dtype to ``quantization.grid``; symmetric, one scale a tile.

    ``scale = absmax(tile) / grid.high`` in float32, then rounded to what the reader will use: ``scale_dtype``, float32, or the power of
    two at or above it, as ``quantization.scale`` says; a tile of zeros has scale 1. With ``clip_search`` also these parts of it are
    tried, and the first with the smallest ``sum energy * (weight - code * scale)**2`` over the tile is taken; ``energy`` (in,) is how
    much each input feature weighs (its sum of squares), equal by default. ``absmax``, where all of the weight is one tile, stands for that
    of the tile: weights that are served as one have the largest of theirs.
    ``code = clamp(round_half_even(weight / scale), low, high)`` against the rounded scale, in float32: IEEE division and rounding
    are exact on every device, so CPU and CUDA give the same bytes, except that a search may settle ties differently.

    A weight of NaN or Inf gives a scale that is not finite, which the caller reports under the tensor's name. Raises ``ValueError`` when
    tiles do not divide the weight, which formats refuse before; or when a search is asked for where the scale is the magnitude itself.
    """
    if quantization.scale == "absmax":
        if clip_search:
            raise ValueError("LLM.int8() stores the largest magnitude itself: there is no other scale to search for")
        return _by_absmax(weight.to(scale_dtype), quantization)
    values = weight.float()
    rows, columns = weight.shape
    tiles = tiled(values, quantization)
    stored = _scales(tiles, quantization, scale_dtype, clip_search, energy, absmax)
    scale = stored.float()
    codes = tiles.div_(scale) if values is not weight else tiles / scale
    return QTensor(round_to_grid(codes, quantization.grid).view(rows, columns), stored[:, 0, :, 0], quantization)


def tile_scales(
    weight: torch.Tensor,
    quantization: Quantization,
    *,
    scale_dtype: torch.dtype,
    clip_search: Sequence[float] = (),
    energy: torch.Tensor | None = None,
    absmax: torch.Tensor | None = None,
) -> torch.Tensor:
    """The scales that :func:`quantize` would use, of shape ``tile.scale_shape(weight.shape)``, in the dtype a reader will use."""
    return _scales(tiled(weight.float(), quantization), quantization, scale_dtype, clip_search, energy, absmax)[:, 0, :, 0]


def scale_choices(
    weight: torch.Tensor,
    quantization: Quantization,
    *,
    scale_dtype: torch.dtype,
    clip_search: Sequence[float] = (),
    absmax: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every scale that :func:`quantize` may take for each tile: (1 + searched, tiles down, tiles across)."""
    found = _absmax(tiled(weight.float(), quantization)) if absmax is None else absmax.float().view(1, 1, 1, 1)
    return torch.stack([scale[:, 0, :, 0] for scale in _choices(found, quantization, scale_dtype, clip_search)])


def tiled(values: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """A view (tiles down, rows of a tile, tiles across, columns of a tile)."""
    rows, columns = values.shape
    tile_rows, tile_columns = quantization.tile.rows or rows, quantization.tile.columns or columns
    if rows % tile_rows or columns % tile_columns:
        raise ValueError(f"tiles of {tile_rows} x {tile_columns} do not divide a weight of {rows} x {columns}")
    return values.reshape(rows // tile_rows, tile_rows, columns // tile_columns, tile_columns)


def _scales(
    tiles: torch.Tensor,
    quantization: Quantization,
    scale_dtype: torch.dtype,
    clip_search: Sequence[float],
    energy: torch.Tensor | None,
    absmax: torch.Tensor | None,
) -> torch.Tensor:
    found = _absmax(tiles) if absmax is None else absmax.float().view(1, 1, 1, 1)
    choices = _choices(found, quantization, scale_dtype, clip_search)
    best = next(choices)
    if not clip_search:
        return best
    importance = None if energy is None else energy.float().view(1, 1, *tiles.shape[2:])
    least = _loss(tiles, best, quantization.grid, importance)
    for candidate in choices:
        loss = _loss(tiles, candidate, quantization.grid, importance)
        better = loss < least
        best, least = torch.where(better, candidate, best), torch.where(better, loss, least)
    return best


def _absmax(tiles: torch.Tensor) -> torch.Tensor:
    # Two reductions and no temporary: fresh memory costs more than the second pass.
    return torch.maximum(tiles.amax(dim=(1, 3), keepdim=True), tiles.amin(dim=(1, 3), keepdim=True).neg_())


def _choices(
    absmax: torch.Tensor, quantization: Quantization, scale_dtype: torch.dtype, clip_search: Sequence[float]
) -> Iterator[torch.Tensor]:
    # By a tensor: CUDA multiplies by the reciprocal of a number of Python, which is not IEEE division.
    yield _stored(absmax / torch.full_like(absmax, quantization.grid.high), quantization, scale_dtype)
    for ratio in clip_search:
        yield _stored(absmax * (ratio / quantization.grid.high), quantization, scale_dtype)


def _stored(scale: torch.Tensor, quantization: Quantization, scale_dtype: torch.dtype) -> torch.Tensor:
    if quantization.scale == "F8_E8M0":
        return _power_of_two_above(scale).to(torch.float8_e8m0fnu)
    scale = scale.to(torch.float32 if quantization.scale == "F32" else scale_dtype)
    # absmax / high may underflow to zero in scale_dtype: the tile is then as good as zero, and x / 1 rounds to zero.
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _loss(tiles: torch.Tensor, stored: torch.Tensor, grid: Grid, importance: torch.Tensor | None) -> torch.Tensor:
    scale = stored.float()
    error = to_nearest(tiles / scale, grid).mul_(scale).sub_(tiles).square_()
    if importance is not None:
        error.mul_(importance)
    return error.sum(dim=(1, 3), keepdim=True)


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


def to_nearest(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """:func:`round_to_grid` that stays in float32, in place."""
    codes.clamp_(grid.low, grid.high)
    return codes.round_() if grid.kind == "int" else codes.copy_(codes.to(torch.float8_e4m3fn))
