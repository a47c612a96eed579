"""SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): what is large in an input channel is moved into the weights that read it.

With s (in,) positive, ``X W^T = (X / s) (W * s)^T``. The division is folded into whatever makes X: a norm's weight, or the rows of a
linear; nothing remains to do at run time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
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

    ``alphas`` rise. The two in the middle are tried, and on from the better one until the error grows again: of the sample's 120 groups all
    had one valley, and 3.7 of 6 were tried. The first of equals, and no smoothing before any. Costs one product of ``inputs`` with all
    weights a strength. ``others`` share the scales and see other rows, as experts do. Strengths are tried by ``mapped``.
    """
    of_weights = _largest([*weights, *(weight for _, each in others for weight in each)])
    candidates: dict[float | None, torch.Tensor] = {None: torch.ones_like(of_weights)}
    candidates |= {alpha: _scales(input_absmax, of_weights, alpha=alpha, channels=channels) for alpha in alphas}
    trials = _Trials([(inputs, weights), *others], weight_quantization, activation_quantization, scale_dtype, mapped)
    middle = (len(alphas) - 1) // 2
    errors = trials.errors({alpha: candidates[alpha] for alpha in alphas[middle : middle + 2]})
    rises = len(errors) > 1 and errors[alphas[middle + 1]] < errors[alphas[middle]]
    onwards = [*alphas[middle + 1 :]] if rises else [*reversed(alphas[: middle + 1])]
    untried = [None]  # beside the first step, so that two are under way
    for best, following in pairwise(onwards):
        errors |= trials.errors({strength: candidates[strength] for strength in (*untried, following)})
        untried = []
        if errors[following] > errors[best] or (rises and errors[following] == errors[best]):
            break
    errors |= trials.errors({strength: candidates[strength] for strength in untried})
    return _best(candidates, errors)


def search(
    candidates: dict[float | None, torch.Tensor],
    shown: Sequence[Shown],
    weight_quantization: Quantization,
    activation_quantization: Quantization | None,
    scale_dtype: torch.dtype,
    mapped: Mapped = map,
) -> Search:
    """The best of some scales (in,), by strength, all of which are tried."""
    tried = {None: torch.ones(shown[0][0].shape[1], device=shown[0][0].device), **candidates}
    return _best(tried, _Trials(shown, weight_quantization, activation_quantization, scale_dtype, mapped).errors(tried))


def _best(scales: Mapping[float | None, torch.Tensor], errors: dict[float | None, float]) -> Search:
    """The first with the smallest error, in the order of ``scales``."""
    best = min((strength for strength in scales if strength in errors), key=lambda strength: errors[strength])
    return Search(best, scales[best], errors)


class _Trials:
    """What scales of a group are compared on: rows, with the weights that read them."""

    def __init__(
        self,
        shown: Sequence[Shown],
        weight_quantization: Quantization,
        activation_quantization: Quantization | None,
        scale_dtype: torch.dtype,
        mapped: Mapped,
    ) -> None:
        self._mapped = mapped
        self._each = []
        for inputs, weights in shown:
            x = inputs.float()
            expected = list(mapped(partial(_product, x), weights))
            energies = torch.stack([output.square().sum() for output in expected]).clamp(min=torch.finfo(torch.float32).tiny)
            lost = partial(
                quantized_output_errors, inputs=x, weights=weights, expected=expected, weight_quantization=weight_quantization,
                activation_quantization=activation_quantization, scale_dtype=scale_dtype,
            )  # fmt: skip
            self._each.append((lost, energies))

    def errors(self, scales: Mapping[float | None, torch.Tensor]) -> dict[float | None, float]:
        """Of each of ``scales`` (in,), by strength: errors as shares of the output's square, added up. Every layer of a group counts by its
        own output, so that none is lost beside a larger one."""
        found = dict.fromkeys(scales, 0.0)
        for lost, energies in self._each:
            # A GPU is waited for when all of them are under way.
            for strength, error in zip(scales, list(self._mapped(lost, scales.values())), strict=True):
                found[strength] += sum((error / energies).tolist()) / len(energies)
        return found


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight.float().T


def quantized_output_errors(
    scales: torch.Tensor,
    *,
    inputs: torch.Tensor,
    weights: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
    weight_quantization: Quantization,
    activation_quantization: Quantization | None,
    scale_dtype: torch.dtype,
) -> torch.Tensor:
    """``sum |Q(X / s) Q(W * s)^T - X W^T|**2`` of each weight (weights,); ``scales`` (in,) are s, ``expected`` the products ``X W^T``.

    Weights are rounded to nearest; activations, if they are quantized, with the scale of each row (or tile), whole tensors with that of
    these rows.
    """
    x = _quantized(inputs.float() / scales, activation_quantization)
    errors = []
    for weight, output in zip(weights, expected, strict=True):
        quantized = rtn.quantize(weight.float() * scales, weight_quantization, scale_dtype=scale_dtype)
        errors.append(quantized_output(x, quantized).sub_(output).square_().sum())
    return torch.stack(errors)


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


def smoothed_hessian(hessian: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What ``X^T X`` (in, in) becomes when X is divided by s: ``H / (s s^T)``, symmetric to the bit if H is."""
    products = torch.outer(scales, scales)
    return torch.div(hessian, products, out=products)


def _usable(scales: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    normal = torch.isfinite(scales) & (scales >= torch.finfo(torch.float32).tiny)
    return torch.where(alive & normal, scales, torch.ones_like(scales))
