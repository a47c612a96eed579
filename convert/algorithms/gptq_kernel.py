"""The column loop of GPTQ over one block, fused into one Triton kernel; imported only where a weight lies on CUDA."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from formats.scheme import Grid

#: Rows to a program: 16 rows of 128 columns, and their errors, are 32 registers for each of 128 threads.
_ROWS = 16


def launch(block: torch.Tensor, steps: torch.Tensor, grid: Grid, *, scale: torch.Tensor, groups: torch.Tensor, error: torch.Tensor) -> None:
    """Rounds ``block`` (out, columns), leaving codes in it and errors in ``error`` (out, at least columns), all float32 on CUDA.

    ``steps`` (columns, columns), of which the strict upper triangle is read; ``scale`` (groups, out) and ``groups`` (columns,) as in
    :func:`convert.algorithms.gptq.solve`. Rows of ``block`` and ``error`` lie in one piece, at any distance from each other.
    """
    rows, columns = block.shape
    steps = steps.contiguous()
    padded = max(16, triton.next_power_of_2(columns))
    _round_columns[(triton.cdiv(rows, _ROWS),)](
        block, steps, scale.contiguous(), groups, error,
        rows, columns, block.stride(0), steps.stride(0), error.stride(0),
        float(grid.low), float(grid.high),
        integers=grid.kind == "int", one_scale=len(scale) == 1, row_count=_ROWS, column_count=padded, num_warps=4,
    )  # fmt: skip


@triton.jit
def _round_columns(
    block,
    steps,
    scale,
    groups,
    error,
    rows,
    columns,
    block_stride,
    steps_stride,
    error_stride,
    low,
    high,
    integers: tl.constexpr,
    one_scale: tl.constexpr,
    row_count: tl.constexpr,
    column_count: tl.constexpr,
):
    """One program: some rows, all columns, in registers from the first column to the last. (Triton takes no other annotations.)"""
    row = tl.program_id(0) * row_count + tl.arange(0, row_count)
    column = tl.arange(0, column_count)
    inside = row < rows
    both = inside[:, None] & (column < columns)[None, :]
    # A row of the whole weight may begin beyond 2**31 elements.
    row_start = row.to(tl.int64)
    weight = tl.load(block + row_start[:, None] * block_stride + column[None, :], mask=both, other=0.0)
    errors = tl.zeros((row_count, column_count), tl.float32)
    of_row = tl.load(scale + row, mask=inside, other=1.0)
    for i in range(columns):
        here = (column == i)[None, :]
        value = tl.sum(tl.where(here, weight, 0.0), axis=1)
        step = tl.load(steps + i * steps_stride + column, mask=(column > i) & (column < columns), other=0.0)
        if not one_scale:
            of_row = tl.load(scale + tl.load(groups + i) * rows + row, mask=inside, other=1.0)
        code = tl.minimum(tl.maximum(value * (1.0 / of_row), low), high)
        if integers:
            # The sum has no bits after the point: the addition rounds, half to even.
            code = (code + 12582912.0) - 12582912.0
        else:
            # E4M3, on any device: to three bits of mantissa by an addition on the bits, below 2**-6 to multiples of 2**-9 as above.
            magnitude = tl.abs(code)
            bits = magnitude.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
            magnitude = tl.where(magnitude < 0.015625, (magnitude + 24576.0) - 24576.0, bits.to(tl.float32, bitcast=True))
            code = tl.where(code < 0, -magnitude, magnitude)
        left = value - code * of_row
        weight = tl.where(here, code[:, None], weight - left[:, None] * step[None, :])
        errors = tl.where(here, left[:, None], errors)
    tl.store(block + row_start[:, None] * block_stride + column[None, :], weight, mask=both)
    tl.store(error + row_start[:, None] * error_stride + column[None, :], errors, mask=both)
