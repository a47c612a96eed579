"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): what is large in an input channel is moved into the weights that read it.

With s (in,) positive, ``X W^T = (X / s) (W * s)^T``. The division is folded into whatever makes X: a norm's weight, or the rows of a
linear; nothing remains to do at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from convert.algorithms import rtn
from convert.hardware import instructions
from formats.qtensor import QTensor
from formats.scheme import Quantization

#: Migration strengths worth trying; 0.5 is the paper's. Each costs as much as rounding the weights and multiplying the rows with them.
ALPHAS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
#: Inputs of a product of INT8 codes whose sums int32 is sure to hold.
_INT32_INPUTS = 1 << 17

#: ``map``, or one that shares the work out and keeps its order.
Mapped = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

#: Rows (tokens, in), and the weights (out_i, in) that read them.
Shown = tuple[torch.Tensor, Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Search:
    """The best strength, its ``scales`` (in,) float32, and the output error of each strength tried, as shares of the output's square.
    ``strength`` is None, and scales are ones, where nothing tried was better than leaving things as they are."""

    strength: float | None
    scales: torch.Tensor
    errors: dict[float | None, float]


def smoothing_scales(
    input_absmax: torch.Tensor, weights: Sequence[torch.Tensor], *, alpha: float, channels: torch.Tensor | None = None
) -> torch.Tensor:
    """``s = input_absmax**alpha / weight_absmax**(1 - alpha)`` (in,) float32 (paper, equation 4), weights (out_i, in) sharing the input.

    A channel whose input or whose weights are all zero has s = 1, and so has one whose s is no normal positive number. ``channels`` (in,):
    the producer's channel behind each input channel, where several share one (values behind query heads that share them): these get one s.
    """
    return _scales(input_absmax, _largest(weights), alpha=alpha, channels=channels)


def _largest(weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The largest magnitude of each column (in,) of all weights, float32."""
    return torch.stack([torch.maximum(weight.amax(dim=0), -weight.amin(dim=0)).float() for weight in weights]).amax(dim=0)


def _scales(input_absmax: torch.Tensor, weight_absmax: torch.Tensor, *, alpha: float, channels: torch.Tensor | None) -> torch.Tensor:
    inputs, of_weight = (tied(values, channels) for values in (input_absmax.float(), weight_absmax))
    scales = inputs.double().pow(alpha) / of_weight.double().pow(1 - alpha)
    return _usable(scales.float(), (inputs > 0) & (of_weight > 0))


def tied(values: torch.Tensor, channels: torch.Tensor | None) -> torch.Tensor:
    """Each of ``values`` (in,) raised to the largest of those with the same entry in ``channels`` (in,)."""
    if channels is None:
        return values
    largest = torch.full((int(channels.max()) + 1,), -torch.inf, device=values.device, dtype=values.dtype)
    return largest.scatter_reduce(0, channels, values, "amax")[channels]


def search_alpha(
    inputs: torch.Tensor,
    weights: Sequence[torch.Tensor],
    *,
    input_absmax: torch.Tensor,
    weight_quantization: Quantization,
    activation_quantization: Quantization | None,
    scale_dtype: torch.dtype,
    alphas: Sequence[float] = ALPHAS,
    channels: torch.Tensor | None = None,
    others: Sequence[Shown] = (),
    mapped: Mapped = map,
) -> Search:
    """The strength whose scales leave the smallest :func:`quantized_output_errors` on ``inputs`` (tokens, in), a few hundred rows of X.

    The first of equals, and no smoothing before any. Costs one product of ``inputs`` with all weights a strength. ``others`` share the
    scales and see other rows, as experts do. Strengths are tried by ``mapped``.
    """
    of_weights = _largest([*weights, *(weight for _, each in others for weight in each)])
    candidates = {alpha: _scales(input_absmax, of_weights, alpha=alpha, channels=channels) for alpha in alphas}
    return search(candidates, [(inputs, weights), *others], weight_quantization, activation_quantization, scale_dtype, mapped)


def search(
    candidates: dict[float, torch.Tensor],
    shown: Sequence[Shown],
    weight_quantization: Quantization,
    activation_quantization: Quantization | None,
    scale_dtype: torch.dtype,
    mapped: Mapped = map,
) -> Search:
    """The best of some scales (in,), by strength; the errors of all that is ``shown`` are added up."""
    scales = torch.ones(shown[0][0].shape[1], device=shown[0][0].device)
    tried = [(None, scales), *candidates.items()]
    errors: dict[float | None, float] = dict.fromkeys((strength for strength, _ in tried), 0.0)
    for inputs, weights in shown:
        x = inputs.float()

        def product(weight: torch.Tensor, x: torch.Tensor = x) -> torch.Tensor:
            return x @ weight.float().T

        expected = list(mapped(product, weights))

        def lost(scales: torch.Tensor, x: Any = x, weights: Any = weights, expected: Any = expected) -> torch.Tensor:
            return quantized_output_errors(
                x, weights, expected, scales=scales, weight_quantization=weight_quantization,
                activation_quantization=activation_quantization, scale_dtype=scale_dtype,
            )  # fmt: skip

        # A GPU is waited for when all of them are under way.
        for (strength, _), error in zip(tried, list(mapped(lost, [each for _, each in tried])), strict=True):
            errors[strength] += sum(error.tolist()) / max(len(weights), 1)
    best: float | None = None
    for strength, each in tried:
        if errors[strength] < errors[best]:
            best, scales = strength, each
    return Search(best, scales, errors)


def quantized_output_errors(
    inputs: torch.Tensor,
    weights: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    *,
    scales: torch.Tensor,
    weight_quantization: Quantization,
    activation_quantization: Quantization | None,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """``sum |Q(X / s) Q(W * s)^T - X W^T|**2 / sum |X W^T|**2`` of each weight (weights,); ``expected`` are the products ``X W^T``.

    Weights are rounded to nearest; activations, if they are quantized, with the scale of each row (or tile), whole tensors with that of
    these rows. Every layer of a group counts by its own output, so that none is lost beside a larger one.
    """
    x = _quantized(inputs.float() / scales, activation_quantization)
    errors = [torch.zeros(0, device=inputs.device)]
    for weight, output in zip(weights, expected, strict=True):
        quantized = rtn.quantize(weight.float() * scales, weight_quantization, scale_dtype=scale_dtype)
        lost = quantized_output(x, quantized).sub_(output).square_().sum()
        errors.append((lost / output.square().sum().clamp(min=torch.finfo(torch.float32).tiny))[None])
    return torch.cat(errors)


def quantized_output(x: QTensor | torch.Tensor, weight: QTensor) -> torch.Tensor:
    """``X W^T`` (tokens, out) float32 of what codes stand for; x (tokens, in) may be floats.

    Where the codes of a row have one scale on either side, codes are multiplied and scales behind that: on CUDA as bfloat16, which holds
    each code, summed in float32; INT8 on a CPU that has instructions for it as integers, exactly. Both take a fraction of the time of a
    product in float32.
    """
    if isinstance(x, torch.Tensor):
        return x @ weight.dequantize().T
    quantizations, values = (x.quantization, weight.quantization), (x.values, weight.values)
    if any(each.tile.columns is not None or each.unit != 1 for each in quantizations):
        return x.dequantize() @ weight.dequantize().T
    if x.values.is_cuda:
        product = torch.mm(x.values.bfloat16(), weight.values.bfloat16().T, out_dtype=torch.float32)
    elif all(each.dtype == torch.int8 for each in values) and x.values.shape[1] < _INT32_INPUTS and _multiplies_codes():
        product = torch._int_mm(x.values, weight.values.T).float()
    else:
        return x.dequantize() @ weight.dequantize().T
    return product.mul_(x.spread_scale().float()).mul_(weight.spread_scale().float().T)


@cache
def _multiplies_codes() -> bool:
    """Whether this CPU adds up products of INT8 in 32 bits; older ones add pairs of them in 16, and cut these off."""
    return bool(instructions() & {"avx512_vnni", "avx_vnni", "amx_int8"})


def _quantized(x: torch.Tensor, quantization: Quantization | None) -> QTensor | torch.Tensor:
    """x (tokens, in) float32 as codes where their grid is symmetric, else as :func:`fake_quantize` leaves it."""
    if quantization is None or not quantization.symmetric:
        return fake_quantize(x, quantization)
    return rtn.quantize(x, quantization, scale_dtype=torch.float32)


def fake_quantize(x: torch.Tensor, quantization: Quantization | None) -> torch.Tensor:
    """x (tokens, in) float32 as it is after quantizing it as ``quantization`` says and back; None leaves it."""
    if quantization is None:
        return x
    if quantization.symmetric:
        return rtn.quantize(x, quantization, scale_dtype=torch.float32).dequantize()
    # 255 steps from the row's smallest to its largest value, zero being one of the codes
    low, high = x.amin(dim=1, keepdim=True).clamp(max=0), x.amax(dim=1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale)
    return (torch.round(x / scale).add_(zero).clamp_(0, 255) - zero) * scale


def fold_into_norm(weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor, *, offset: float = 0.0) -> tuple[
    torch.Tensor, torch.Tensor | None
]:  # fmt: skip
    """A norm's weight (in,) and bias over s. ``offset`` is what the model adds to the weight before it multiplies (1 in Gemma)."""
    folded = ((weight.float() + offset) / scales - offset).to(weight.dtype)
    return folded, None if bias is None else (bias.float() / scales).to(bias.dtype)


def fold_into_producer(weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The rows of a linear (out, in) whose output is the input, and its bias, over s (out,)."""
    folded = (weight.float() / scales[:, None]).to(weight.dtype)
    return folded, None if bias is None else (bias.float() / scales).to(bias.dtype)


def fold_into_consumer(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The columns of a linear (out, in) times s (in,)."""
    return (weight.float() * scales).to(weight.dtype)


def of_producer(scales: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """s of the producer's channels, from tied s (in,) of the consumer's; ``channels`` (in,) names every one of them."""
    return scales.new_ones(int(channels.max()) + 1).scatter(0, channels, scales)


def smoothed_absmax(absmax: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What the largest magnitudes (in,), or means, become when X is divided by s."""
    return absmax / scales


def smoothed_hessian(hessian: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What ``X^T X`` (in, in) becomes when X is divided by s: ``H / (s s^T)``, symmetric to the bit if H is."""
    products = torch.outer(scales, scales)
    return torch.div(hessian, products, out=products)


def _usable(scales: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    normal = torch.isfinite(scales) & (scales >= torch.finfo(torch.float32).tiny)
    return torch.where(alive & normal, scales, torch.ones_like(scales))
