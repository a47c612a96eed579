"""Takes the mean error of a quantized weight out of the bias (Nagel et al. 2019, arXiv 1906.04721, section 4.2)."""

from __future__ import annotations

import torch


def correct_bias(bias: torch.Tensor, weight: torch.Tensor, quantized: torch.Tensor, *, input_mean: torch.Tensor) -> torch.Tensor:
    """``b + (W - W_q) E[x]``: (out,) in the dtype of ``bias``; weights (out, in), ``input_mean`` (in,). The output's mean is then kept."""
    lost = (weight.double() - quantized.double()) @ input_mean.double()
    return (bias.double() + lost).to(bias.dtype)
