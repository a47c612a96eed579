"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, each error spread over those still to come.

Of a layer with inputs X (tokens, in) and a weight W (out, in) it lowers ``tr(dW H dW^T)``, ``H = X^T X``, not the error of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from convert.algorithms import rtn
from formats.qtensor import QTensor
from formats.scheme import Grid, Quantization

#: What a damping is multiplied with, one after the other, until the Hessian can be factorised.
ESCALATION = (1, 10, 100)
#: Columns of an inner block on a CPU, where a column costs calls and not arithmetic: of 4, 8, 16 and 32 the fastest.
_INNER = 16
#: Below this many columns a triangle is inverted by substitution.
_SMALL = 256
#: Parts in which a triangle is multiplied: 3 of 8 of the arithmetic are left out with four.
_PARTS = 4


class FactorisationError(ArithmeticError):
    """A Hessian that is not positive definite after the last damping, or not finite; the caller knows which tensor's."""


@dataclass(frozen=True)
class Factor:
    """What a Hessian says about the columns of every weight that it belongs to.

    ``steps`` (in, in) float32: ``T^-1`` of ``H = T D T^T`` with T upper triangular of unit diagonal and D diagonal, columns in ``order``;
    that is the upper Cholesky factor of ``H^-1`` (paper, section 3.4) with each row divided by its diagonal. ``order`` (in,): the column
    that comes i-th, None where they keep their places. ``damping``: the share of the mean diagonal that was added. ``dead`` (in,): inputs
    that were always zero. ``energy`` (in,): the diagonal of H before damping, columns in their places.
    """

    steps: torch.Tensor
    order: torch.Tensor | None
    damping: float
    dead: torch.Tensor
    energy: torch.Tensor


@dataclass(frozen=True)
class GptqResult:
    """``damping``: the share of the mean diagonal that was added in the end. ``dead``: columns whose input was always zero, now zero."""

    qtensor: QTensor
    damping: float
    dead: int


def factorise(hessian: torch.Tensor, *, damping: float = 0.01, activation_order: bool = True) -> Factor:
    """Factorises a Hessian (in, in), once for all weights with the same input; it is left as it was.

    ``damping`` times the mean of the diagonal, dead inputs aside, is added to the diagonal (paper, section 3.4), and ten and a hundred
    times as much where the sum is not positive definite. A dead input gets the mean as its diagonal. With ``activation_order`` the columns
    of the largest diagonal come first (the authors' ``--act-order``). Float32, on the device of the Hessian.

    One Cholesky factorisation of H with its rows and columns reversed, and one inverse of a triangle: ``H^-1`` itself, which takes twice as
    long, is never made. Raises :class:`FactorisationError` after the last damping, and for NaN or Inf.
    """
    energy = hessian.diagonal().float().clone()
    dead = energy == 0
    mean = energy.sum() / (~dead).sum().clamp(min=1)
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)
    order = torch.argsort(energy, descending=True, stable=True) if activation_order else None
    backwards = torch.arange(len(energy) - 1, -1, -1, device=hessian.device) if order is None else order.flip(0)
    # Rows and then columns: a fifth of the time of both at once.
    damped = hessian.float().index_select(0, backwards).index_select(1, backwards)
    diagonal = torch.where(dead, mean, energy)[backwards]
    for factor in ESCALATION:
        damped.diagonal().copy_(diagonal + damping * factor * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if bool((info == 0) & lower.diagonal().isfinite().all()):
            break
    else:
        tried = ", ".join(f"{damping * factor:g}" for factor in ESCALATION)
        smallest, largest = energy.min().item(), energy.max().item()
        raise FactorisationError(
            f"a Hessian of {len(energy)} inputs (diagonal {smallest:g} to {largest:g}) is not positive definite with {tried} of its mean "
            "diagonal added; give it more or other text, or a larger damping"
        )
    del damped
    lower /= lower.diagonal().clone()
    _invert_unit_lower(lower)
    steps = lower.flip(0, 1)
    del lower
    # LAPACK and cuSOLVER leave columns in one piece; the kernel reads rows.
    return Factor(steps.contiguous(), order, damping * factor, dead, energy)


def quantize(
    weight: torch.Tensor,
    quantization: Quantization,
    *,
    scale_dtype: torch.dtype,
    hessian: torch.Tensor,
    damping: float = 0.01,
    block_size: int = 128,
    activation_order: bool = True,
    static_groups: bool = True,
    clip_search: Sequence[float] = (),
) -> GptqResult:
    """:func:`factorise` and :func:`quantize_together` for one weight."""
    factor = factorise(hessian, damping=damping, activation_order=activation_order)
    (result,) = quantize_together(
        [weight], quantization, scale_dtype=scale_dtype, factor=factor, block_size=block_size, static_groups=static_groups,
        clip_search=clip_search,
    )  # fmt: skip
    return result


def quantize_together(
    weights: Sequence[torch.Tensor],
    quantization: Quantization,
    *,
    scale_dtype: torch.dtype,
    factor: Factor,
    block_size: int = 128,
    static_groups: bool = True,
    clip_search: Sequence[float] = (),
    absmax: torch.Tensor | None = None,
) -> list[GptqResult]:
    """Quantizes weights (out, in) that have the same input, each with scales of its own, as one of all their rows.

    Scales are those of rounding, of the weights as they were, so that any order of columns will do (``static_groups``); without it those of
    a group are taken when the first of its columns is reached, from what the weight has become, which needs columns in their places.
    ``clip_search`` and ``absmax`` as in :func:`convert.algorithms.rtn.quantize`, the former weighted by the diagonal of the Hessian.
    Columns of dead inputs are set to zero, as the paper's authors do.

    NaN or Inf in a weight reaches a scale, which the caller reports. Raises ``ValueError`` where scales are magnitudes (LLM.int8()), or
    groups are to be taken on the way and columns do not keep their places.
    """
    if quantization.scale == "absmax":
        raise ValueError("the scales of LLM.int8() are magnitudes of the rounded weight: GPTQ cannot choose its codes")
    group = quantization.tile.columns
    on_the_way = not static_groups and group is not None
    if on_the_way and factor.order is not None:
        raise ValueError("groups taken on the way need columns in their places; set static_groups, or unset activation_order")
    rows = [len(weight) for weight in weights]
    scales = [
        rtn.tile_scales(weight, quantization, scale_dtype=scale_dtype, clip_search=clip_search, energy=factor.energy, absmax=absmax)
        for weight in weights
    ]
    joined = torch.cat([weight.float() for weight in weights]).masked_fill_(factor.dead, 0)
    # From here on a CPU has a column in one piece.
    joined = joined if joined.is_cuda else joined.T.contiguous().T
    if factor.order is not None:
        joined = _pick_columns(joined, factor.order)
    tile_rows = quantization.tile.rows

    def spread(scales: Sequence[torch.Tensor]) -> torch.Tensor:
        """(groups, rows): the scale of every row, for each group of columns."""
        each = [scale.float().repeat_interleave(tile_rows or count, dim=0)[:count] for scale, count in zip(scales, rows, strict=True)]
        return torch.cat(each).T.contiguous()

    taken: list[list[torch.Tensor]] = []

    def take(block: torch.Tensor) -> torch.Tensor:
        parts = [rtn.tile_scales(part, quantization, scale_dtype=scale_dtype, clip_search=clip_search) for part in torch.split(block, rows)]
        taken.append(parts)
        return spread(parts)

    columns = joined.shape[1]
    places = torch.arange(columns, device=joined.device) if factor.order is None else factor.order
    groups = places // group if group else torch.zeros_like(places)
    codes = solve(
        joined, factor.steps, quantization.grid, scale=spread(scales), groups=groups,
        block_size=group if on_the_way and group else block_size, take=take if on_the_way else None,
    )  # fmt: skip
    if factor.order is not None:
        codes = _pick_columns(codes, torch.argsort(factor.order))
    if on_the_way:
        scales = [torch.cat([parts[i] for parts in taken], dim=1) for i in range(len(weights))]
    dead = int(factor.dead.sum())
    return [
        GptqResult(QTensor(part.contiguous(), scale, quantization), factor.damping, dead)
        for part, scale in zip(torch.split(codes, rows), scales, strict=True)
    ]


def solve(
    weight: torch.Tensor,
    steps: torch.Tensor,
    grid: Grid,
    *,
    scale: torch.Tensor,
    groups: torch.Tensor,
    block_size: int = 128,
    take: Callable[[torch.Tensor], torch.Tensor] | None = None,
    fused: bool | None = None,
) -> torch.Tensor:
    """The codes (out, in) of a weight (out, in) float32 whose columns are in the order in which they are rounded. It may be overwritten;
    codes lie as it does.

    Column i is rounded with ``scale[groups[i]]`` (out,), its error e times ``steps[i, j]`` is taken from each later column j: at once
    within ``block_size`` columns, for the others by one product a block (paper, section 3.4). ``take`` gives the scales of a block, as it
    has become, in place of ``scale``. ``fused``: one Triton kernel a block, by default where the weight lies on CUDA.
    """
    fused = weight.is_cuda if fused is None else fused
    # Seen from its columns. A CPU wants each in one piece; the kernel takes rows, as cuBLAS takes either.
    by_column = weight.T if fused else weight.T.contiguous()
    columns, rows = by_column.shape
    step = _fused_block if fused else _block
    error = weight.new_empty(rows, block_size).T if fused else weight.new_zeros(block_size, rows)
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block, of_block = by_column[start:stop], groups[start:stop]
        if take is not None:
            scale, of_block = take(block.T), torch.zeros_like(of_block)
        step(block, steps[start:stop, start:stop], grid, scale, of_block, error)
        if stop < columns:
            by_column[stop:].addmm_(steps[start:stop, stop:].T, error[: stop - start], alpha=-1)
    return rtn.round_to_grid(by_column.T, grid)


def _pick_columns(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Columns of ``values`` (out, in), which then lie as they did: in rows, or each in one piece, where whole pieces are copied."""
    return values.index_select(1, places) if values.is_contiguous() else values.T.index_select(0, places).T


def _block(block: torch.Tensor, steps: torch.Tensor, grid: Grid, scale: torch.Tensor, groups: torch.Tensor, error: torch.Tensor) -> None:
    """Rounds the columns ``block`` (columns, out), leaving codes in it and errors in ``error``, which may have more rows.

    A column is a handful of calls on tensors prepared before: its earlier neighbours' errors are taken from it in one product, and those of
    a whole inner block from the rest in another.
    """
    columns = len(block)
    of_column = groups.tolist()
    scales, inverses = scale.unbind(), scale.reciprocal().unbind()
    row, out = block.unbind(), error.unbind()
    for start in range(0, columns, _INNER):
        stop = min(start + _INNER, columns)
        # Row i of the strict triangle's transpose: what column i takes of each error before it; nothing of those not yet made.
        takes = steps[start:stop, start:stop].triu(1).T.contiguous().unbind()
        errors = error[start:stop].T
        for i in range(start, stop):
            group, column, left = of_column[i], row[i], out[i]
            torch.addmv(column, errors, takes[i - start], alpha=-1, out=left)
            rtn.to_nearest(torch.mul(left, inverses[group], out=column), grid)
            left.addcmul_(column, scales[group], value=-1)
        if stop < columns:
            block[stop:].addmm_(steps[start:stop, stop:].T, error[start:stop], alpha=-1)


def _fused_block(
    block: torch.Tensor, steps: torch.Tensor, grid: Grid, scale: torch.Tensor, groups: torch.Tensor, error: torch.Tensor
) -> None:
    """:func:`_block` in one kernel; ``block`` and ``error`` are transposed views of tensors with rows in one piece."""
    from convert.algorithms.gptq_kernel import launch

    launch(block.T, steps, grid, scale=scale, groups=groups, error=error.T)


def _invert_unit_lower(lower: torch.Tensor) -> None:
    """In place, by halves, nearly all of it in matrix products; what is known to be zero in these is left out of them, in parts."""
    size = len(lower)
    if size <= _SMALL:
        unit = torch.eye(size, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, unit, upper=False, unitriangular=True))
        return
    half = size // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert_unit_lower(first)
    _invert_unit_lower(second)
    # -second @ below @ first: column j of a lower triangle begins in row j, row i ends in column i.
    step = -(-len(second) // _PARTS)
    for start in range(0, half, step):
        below[:, start : start + step] = below[:, start:] @ first[start:, start : start + step]
    for start in reversed(range(0, len(second), step)):
        below[start : start + step] = -(second[start : start + step, : start + step] @ below[: start + step])
