"""How far a layer's output moves when its weight does, from the Hessian of its input: no input is needed any more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convert.statistics import multiplies_bfloat16

#: Rows of a Hessian that are multiplied at once, at least.
_PANEL = 384


def output_errors(weight: torch.Tensor, others: Sequence[torch.Tensor], *, hessian: torch.Tensor) -> list[torch.Tensor]:
    """``tr(dW H dW^T) / tr(W H W^T)``, ``dW = other - weight`` (out, in), ``H = X^T X`` (in, in), of each of ``others``: the squared error
    of ``X W^T`` as a share of its square. Scalars in float32; 0 / 0 is 0.

    On CUDA, and on a CPU that multiplies bfloat16, the factors are rounded to it, in a tenth of the time or a fifth; that moves the fourth
    digit, and nothing is decided by it.
    """
    original = weight.float()
    half = hessian.bfloat16() if hessian.is_cuda or multiplies_bfloat16() else hessian
    whole = _energy(original, half).clamp(min=torch.finfo(torch.float32).tiny)
    return [_energy(other.float() - original, half) / whole for other in others]


def output_error(weight: torch.Tensor, quantized: torch.Tensor, *, hessian: torch.Tensor) -> torch.Tensor:
    """:func:`output_errors` of one weight."""
    return output_errors(weight, [quantized], hessian=hessian)[0]


def _energy(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """``tr(W H W^T)``: of each run of rows of H only the part from the diagonal on is multiplied, for H is symmetric."""
    columns = len(hessian)
    size = max(_PANEL, -(-columns // 4))
    factor = weight.to(hessian.dtype)
    energies = [hessian.new_zeros((), dtype=torch.float32)]
    for start in range(0, columns, size):
        left, right = factor[:, start : start + size], hessian[start : start + size, start:]
        product = torch.mm(left, right, out_dtype=torch.float32) if hessian.is_cuda else left @ right
        product[:, size:].mul_(2)
        energies.append((product * weight[:, start:]).sum())
    return torch.stack(energies).sum().clamp(min=0)
