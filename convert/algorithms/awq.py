"""Activation-aware scaling (Lin et al. 2023, arXiv 2306.00978), where weights alone are quantized: channels that matter get finer steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from convert.algorithms.smoothing import Mapped, Search, Shown, search, tied
from formats.scheme import Quantization

#: Exponents of the input's mean magnitude that are tried (paper, section 3.2: a grid of 20 from 0 to 1).
RATIOS = tuple(i / 20 for i in range(1, 20))


def awq_scales(input_mean: torch.Tensor, *, ratio: float, channels: torch.Tensor | None = None) -> torch.Tensor:
    """``s = E|x|**ratio`` (in,) float32, divided by ``sqrt(max s * min s)`` so that it leaves the middle alone; 1 where the input is zero.

    ``channels`` as in :func:`convert.algorithms.smoothing.smoothing_scales`.
    """
    mean = tied(input_mean.float(), channels)
    alive = torch.isfinite(mean) & (mean > 0)
    if not bool(alive.any()):
        return torch.ones_like(mean)
    scales = mean.double().pow(ratio)
    middle = (scales[alive].max() * scales[alive].min()).sqrt()
    return torch.where(alive, (scales / middle).float(), torch.ones_like(mean))


def search_scales(
    inputs: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *,
    input_mean: torch.Tensor,
    weight_quantization: Quantization,
    scale_dtype: torch.dtype,
    ratios: Sequence[float] = RATIOS,
    channels: torch.Tensor | None = None,
    others: Sequence[Shown] = (),
    mapped: Mapped = map,
) -> Search:
    """The exponent whose scales leave the smallest output error on ``inputs`` (tokens, in), a few hundred rows of X; ``input_mean`` (in,)
    is E|x|. Scales are folded as those of smoothing are. ``others`` share them and see other rows, as experts do. Exponents are tried by
    ``mapped``."""
    candidates: dict[float | None, torch.Tensor] = {ratio: awq_scales(input_mean, ratio=ratio, channels=channels) for ratio in ratios}
    return search(candidates, [(inputs, weights), *others], weight_quantization, None, scale_dtype, mapped)
