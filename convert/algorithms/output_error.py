"""How far a layer's output moves when its weight does, from the Hessian of its input: no input is needed any more."""

from __future__ import annotations

import torch


def output_error(weight: torch.Tensor, quantized: torch.Tensor, *, hessian: torch.Tensor) -> torch.Tensor:
    """``tr(dW H dW^T) / tr(W H W^T)``, ``dW = quantized - weight`` (out, in), ``H = X^T X`` (in, in): the squared error of ``X W^T``
    as a share of its square. A scalar in float32; 0 / 0 is 0."""
    original = weight.float()
    return _energy(quantized.float() - original, hessian) / _energy(original, hessian).clamp(min=torch.finfo(torch.float32).tiny)


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    return ((weight @ hessian) * weight).sum().clamp(min=0)
