"""Learned step sizes: quantization that training can see through (LSQ, Esser et al. 2020, https://arxiv.org/abs/1902.08153).

Codes are rounded in the forward pass; in the backward pass rounding counts as the identity (the straight-through estimator), and scales
have a gradient of their own. The paper takes steps on the scale itself and so multiplies its gradient by ``1 / sqrt(N * high)``, to bring
scales and weights to one pace. Here steps are taken on the logarithm of the scale, by an optimizer that divides by the size of
gradients: a scale stays positive, and one learning rate, a relative change, does for scales of any size.
"""

from __future__ import annotations

from typing import Any

import torch

from convert.algorithms import rtn, smoothing
from formats.qtensor import QTensor
from formats.scheme import Grid, Quantization


def fake_quantize(values: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """``round(clamp(v / s, low, high)) * s`` in float32; ``scale`` broadcasts over ``values``. Gradients (paper, equations 3 and 5, for
    any grid):

    - ``d/dv = 1`` where ``low <= v / s <= high``, 0 beyond;
    - ``d/ds = round(v / s) - v / s`` there, and ``low`` or ``high`` beyond, summed over the elements that share ``s``.
    """
    quantized: torch.Tensor = _FakeQuantize.apply(values, scale, grid)  # type: ignore[no-untyped-call]
    return quantized


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
        ctx.save_for_backward(values, scale)
        ctx.grid = grid
        return rtn.to_nearest(values / scale, grid).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        (gradient,) = gradients
        values, scale = ctx.saved_tensors
        steps = values / scale
        inside = (steps >= ctx.grid.low) & (steps <= ctx.grid.high)
        by_scale = None
        if ctx.needs_input_grad[1]:
            slope = rtn.to_nearest(steps.clone(), ctx.grid).sub_(steps.mul_(inside))
            by_scale = slope.mul_(gradient).sum_to_size(scale.shape)
        return gradient * inside, by_scale, None


def pass_through(x: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """x (..., in) float32 with scales that the runtime takes from each row or tile: the gradient passes as if nothing was rounded."""
    with torch.no_grad():
        seen = smoothing.fake_quantize(x.reshape(-1, x.shape[-1]), quantization).reshape(x.shape)
    return x + (seen - x).detach()


def stored(log_scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale as a reader has it, rounded to ``dtype``, in float32; rounding counts as the identity in the backward pass."""
    scale = log_scale.exp()
    return scale + (scale.to(dtype).float() - scale).detach()


def within_codes(weight: torch.Tensor, codes: QTensor) -> torch.Tensor:
    """Where training begins: each element of a weight (out, in) that rounds to its code is what it is, any other is what the code stands
    for. float32; rounded, it gives ``codes`` again."""
    scale = codes.spread_scale().float()
    same = rtn.to_nearest(weight.float() / scale, codes.quantization.grid) == codes.values.float()
    return torch.where(same, weight.float(), codes.dequantize())


def fake_quantize_weight(weight: torch.Tensor, scale: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """:func:`fake_quantize` of a weight (out, in) with a scale a tile, ``scale`` in the shape of :class:`~formats.qtensor.QTensor`."""
    tiles = rtn.tiled(weight, quantization)
    return fake_quantize(tiles, scale[:, None, :, None], quantization.grid).reshape(weight.shape)


def codes(weight: torch.Tensor, scale: torch.Tensor, quantization: Quantization) -> QTensor:
    """What :func:`fake_quantize_weight` computes with, as codes; ``scale`` in the dtype in which it is stored."""
    values = rtn.tiled(weight, quantization) / scale.float()[:, None, :, None]
    return QTensor(rtn.round_to_grid(values, quantization.grid).view(weight.shape), scale, quantization)
