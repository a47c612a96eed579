"""Turns source tensors into the bytes of every target, a run of rows at a time.

A run of rows (a slab) is small enough to stay in a core's cache from the read to the write; where the algorithm and the tile treat
rows alone, which is every per-channel and per-group scheme, a tensor of any size passes through in slabs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from convert.algorithms import ALGORITHMS
from formats import FORMATS
from formats.dtypes import DTYPES
from formats.errors import NumericsError
from formats.safetensors import TensorSpec

if TYPE_CHECKING:
    import numpy as np

    from convert.plan import Entry, TargetPlan
    from convert.source import Checkpoint
    from formats.qtensor import QTensor

#: Elements of a slab. On 2 cores with 1 MiB of L2 each, 0.5 to 2 million ran equally fast, 8 million 20 % slower.
SLAB_ELEMENTS = 1 << 20
#: On a GPU a slab is a transfer and a handful of kernels: larger ones hide the launches.
GPU_SLAB_ELEMENTS = 1 << 24

#: The bits of infinity; whatever has larger ones, sign aside, is NaN.
_EXPONENTS = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00}


@dataclass(frozen=True)
class Work:
    """Rows ``[start, stop)`` of a source tensor, and its entry in every target that wants them. ``last``: no rows come after."""

    spec: TensorSpec
    start: int
    stop: int
    entries: Mapping[str, Entry]
    last: bool

    @property
    def size_bytes(self) -> int:
        rows = max(self.spec.shape[0], 1) if self.spec.shape else 1
        return self.spec.size_bytes * (self.stop - self.start) // rows


@dataclass(frozen=True)
class Piece:
    """Bytes for a target: ``data`` goes ``offset_bytes`` into the tensor ``name``."""

    target: str
    name: str
    offset_bytes: int
    data: np.ndarray


def plan_work(
    targets: Sequence[TargetPlan], tensors: Sequence[TensorSpec], done: Mapping[str, frozenset[str]], *, gpu: bool
) -> Iterator[Work]:
    """Every slab that is still to do, in the order of the source. ``done``: by target, source tensors already written."""
    by_target = {target.name: {entry.tensor.name: entry for entry in target.entries} for target in targets}
    for spec in tensors:
        wanted = {name: of[spec.name] for name, of in by_target.items() if spec.name not in done[name]}
        if not wanted:
            continue
        rows = spec.shape[0] if spec.shape else 1
        step = rows
        if rows and all(_row_wise(entry) for entry in wanted.values()):
            step = max(1, (GPU_SLAB_ELEMENTS if gpu else SLAB_ELEMENTS) * rows // max(spec.elements, 1))
        starts = range(0, rows, max(step, 1)) if rows else (0,)
        for start in starts:
            stop = min(start + step, rows)
            yield Work(spec, start, stop, wanted, last=stop == rows)


def run(work: Work, checkpoint: Checkpoint, targets: Mapping[str, TargetPlan], *, device: str) -> list[Piece]:
    """Reads the rows, quantizes or copies them, and encodes them for each target.

    Targets that agree on scheme, algorithm and scale dtype share the codes.
    Raises :class:`NumericsError`, naming the tensor, on NaN or Inf.
    """
    values = checkpoint.reader.read(work.spec.name, work.start, work.stop)
    pieces: list[Piece] = []
    codes: dict[tuple[str, str, str], QTensor] = {}
    for name, entry in work.entries.items():
        target = targets[name]
        if entry.scheme is None:
            pieces.append(_piece(name, entry.plain, _cast(values, entry.plain, work), work))
            continue
        key = (entry.scheme.name, str(entry.algorithm), target.dtype)
        if key not in codes:
            codes[key] = _quantize(values.to(device), entry, target.dtype, work)
        encoded = FORMATS[target.format].encode(work.spec.name, codes[key])
        pieces += [_piece(name, spec, encoded[spec.name], work) for spec in entry.outputs]
    return pieces


def working_bytes(targets: Sequence[TargetPlan], workers: int, *, gpu: bool) -> int:
    """Host memory held while tensors stream: for each worker a slab as it was read, in float32, and as it is written."""
    slab = GPU_SLAB_ELEMENTS if gpu else SLAB_ELEMENTS
    whole = [entry.tensor.elements for target in targets for entry in target.entries if not _row_wise(entry)]
    return workers * max([slab, *whole]) * (4 + 4 + 4 + 4 * len(targets))


def is_finite(values: torch.Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor Inf; for 16-bit floats on their bits, 15 times faster than ``torch.isfinite``."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    if values.dtype in _EXPONENTS:
        magnitude, infinity = 0x7FFF, _EXPONENTS[values.dtype]
        return int((values.view(torch.int16) & magnitude).amax()) < infinity
    return bool(torch.isfinite(values).all())


def _quantize(values: torch.Tensor, entry: Entry, dtype: str, work: Work) -> QTensor:
    assert entry.scheme is not None
    scale_dtype = getattr(torch, DTYPES[dtype].torch_name)
    result = ALGORITHMS[str(entry.algorithm)].quantize(values, entry.scheme.weight, scale_dtype=scale_dtype)
    # NaN and Inf both reach the scale of their tile, so the weight needs no scan of its own.
    if not is_finite(result.scale):
        if is_finite(values):
            raise NumericsError(f"{work.spec.name}: a scale exceeds {dtype}; set dtype: bfloat16 or float32 in the recipe")
        raise NumericsError(_where_not_finite(values, work))
    return result


def _cast(values: torch.Tensor, plain: TensorSpec, work: Work) -> torch.Tensor:
    cast = values.to(getattr(torch, DTYPES[plain.dtype].torch_name))
    if not is_finite(cast):
        if is_finite(values):
            raise NumericsError(
                f"{work.spec.name}: values up to {values.abs().max().item():g} exceed {plain.dtype}; set dtype: bfloat16 in the recipe"
            )
        raise NumericsError(_where_not_finite(values, work))
    return cast


def _where_not_finite(values: torch.Tensor, work: Work) -> str:
    bad = torch.nonzero(~torch.isfinite(values.float()))
    index = bad[0].tolist()
    if index:
        index[0] += work.start
    value = values[tuple(bad[0].tolist())].item()
    return (
        f"{work.spec.name}: {value} at index {index} ({len(bad)} such values in rows {work.start} to {work.stop - 1}); "
        "the checkpoint is damaged, fetch or train it again"
    )


def _piece(target: str, spec: TensorSpec, values: torch.Tensor, work: Work) -> Piece:
    rows = work.spec.shape[0] if work.spec.shape else 1
    data = values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Piece(target, spec.name, spec.size_bytes // max(rows, 1) * work.start, data)


def _row_wise(entry: Entry) -> bool:
    return entry.scheme is None or (ALGORITHMS[str(entry.algorithm)].row_wise and entry.scheme.weight.tile.rows == 1)
