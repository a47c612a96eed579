"""Turns source tensors into the bytes of every target, a run of rows at a time.

A run of rows (a slab) is small enough to stay in a core's cache from the read to the write; where the algorithm and the tile treat
rows alone, which is every per-channel and per-group scheme, a tensor of any size passes through in slabs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from convert.algorithms import ALGORITHMS, rtn
from convert.algorithms.rtn import CLIP_RATIOS
from convert.ledger import RESPELL
from convert.respell import cache_sources
from formats import FORMATS
from formats.dtypes import DTYPES
from formats.errors import NumericsError
from formats.qtensor import QTensor
from formats.safetensors import TensorSpec
from formats.scheme import CACHES, Quantization

if TYPE_CHECKING:
    import numpy as np

    from convert.architecture import Part
    from convert.ledger import Entry, TargetPlan
    from convert.observe import Stats
    from convert.source import Checkpoint, SafetensorsReader

#: Elements of a slab. On 2 cores with 1 MiB of L2 each, 0.5 to 2 million ran equally fast, 8 million 20 % slower.
SLAB_ELEMENTS = 1 << 20
#: Where rows become columns, each of a slab's is a write of its own to every row: longer runs are fewer writes.
TRANSPOSED_SLAB_ELEMENTS = 1 << 22
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
        return self.spec.size_bytes * (self.stop - self.start) // max(self.spec.matrix_shape[0], 1)


@dataclass(frozen=True)
class Piece:
    """Bytes for a target: ``data`` goes ``offset_bytes`` into the tensor ``name``. Of two axes, its rows go each into one of the tensor's,
    so many bytes behind the row's beginning."""

    target: str
    name: str
    offset_bytes: int
    data: np.ndarray


def plan_work(
    targets: Sequence[TargetPlan], tensors: Sequence[TensorSpec], done: Mapping[str, frozenset[str]], *, gpu: bool
) -> Iterator[Work]:
    """Every slab that is still to do, in the order of the source. ``done``: by target, source tensors already written.

    A slab never crosses the end of a part; it is a whole part where rows cannot be told apart (one scale for all, or transposed).
    """
    by_target = {target.name: {entry.tensor.name: entry for entry in target.entries} for target in targets}
    for spec in tensors:
        wanted = {name: of[spec.name] for name, of in by_target.items() if spec.name not in done[name]}
        if not wanted:
            continue
        rows, columns = spec.matrix_shape
        multiples = [_row_multiple(entry) for entry in wanted.values()]
        step = rows
        if None not in multiples:
            multiple = math.lcm(*(m for m in multiples if m))
            step = max(1, _slab_elements(wanted.values(), gpu=gpu) // max(columns, 1) // multiple) * multiple
        edges = sorted({0, rows, *(edge for entry in wanted.values() if entry.scheme for p in entry.parts for edge in (p.start, p.stop))})
        for low, high in pairwise(edges) if rows else [(0, 0)]:
            for start in range(low, high, step) if rows else (0,):
                stop = min(start + step, high)
                yield Work(spec, start, stop, wanted, last=stop == rows)


def run(
    work: Work,
    checkpoint: Checkpoint,
    targets: Mapping[str, TargetPlan],
    stats: Mapping[str, Stats],
    *,
    device: str,
    largest: Callable[[str], torch.Tensor],
) -> list[Piece]:
    """Reads the rows, quantizes or copies them, and encodes them for each target; ``stats`` by target. ``largest``: as
    :func:`largest_of`, for tensors that have one scale together.

    Targets that agree on how the weight is quantized, on the algorithm and on the dtype of scales share the codes.
    Raises :class:`NumericsError`, naming the tensor, on NaN or Inf.
    """
    if all(entry.algorithm == RESPELL for entry in work.entries.values()):
        values = torch.empty(0)  # nobody wants floats
    else:
        values = checkpoint.reader.read(work.spec.name, work.start, work.stop)
    pieces: list[Piece] = []
    codes: dict[tuple[str, Quantization, str, str, tuple[str, ...]], QTensor] = {}
    for name, entry in work.entries.items():
        if entry.scheme is None:
            if entry.outputs:  # a graph has constants of its own instead of some
                pieces.append(plain_piece(name, entry, work.start, _cast(values, entry.plain, work)))
            continue
        if entry.beside is not None:
            pieces.append(_piece(name, entry.beside, work.start, work.spec.matrix_shape[0], _cast(values, entry.beside, work)))
        dtype = entry.scale_dtype
        for part in entry.parts:
            if not part.start <= work.start < part.stop:
                continue
            key = (part.module, entry.scheme.weight, repr(entry.steps), dtype, entry.alongside)
            if key not in codes:
                if entry.algorithm == RESPELL:
                    stored = checkpoint.codes(work.spec.name, *(part.columns or (work.start, work.stop)))
                    codes[key] = respell(stored, entry.scheme.weight, dtype, work.spec.name)
                else:
                    weight = values if part.columns is None else values[:, slice(*part.columns)].T.contiguous()
                    absmax = torch.stack([largest(name) for name in entry.alongside]).amax().to(device) if entry.alongside else None
                    codes[key] = _quantize(weight.to(device), entry, dtype, work, absmax)
            pieces += encode(targets[name], entry, part, codes[key], work, stats[name])
    copies = {name: entry.copies for name, entry in work.entries.items()}
    return pieces + [replace(piece, name=copies[piece.target][piece.name]) for piece in pieces if piece.name in copies[piece.target]]


def largest_of(checkpoint: Checkpoint, tensor: str) -> torch.Tensor:
    """The largest magnitude of a source tensor, float32. Raises :class:`NumericsError` for NaN or Inf in it."""
    spec = checkpoint.tensors[tensor]
    rows = spec.matrix_shape[0]
    values = checkpoint.reader.read(tensor, 0, rows)
    if not is_finite(values):
        raise NumericsError(_where_not_finite(values, Work(spec, 0, rows, {}, last=True)))
    low, high = torch.aminmax(values)
    return torch.maximum(high, -low).float()


def encode(target: TargetPlan, entry: Entry, part: Part, quantized: QTensor, work: Work, stats: Stats) -> Iterator[Piece]:
    """The bytes of a run of rows of a part, and of what is written once a layer where it is the first."""
    assert entry.scheme is not None
    form = FORMATS[target.format]
    weight = TensorSpec(f"{part.module}.weight", entry.scale_dtype, part.shape(work.spec))
    tensors = form.encode(weight.name, quantized, entry.scheme)
    specs = form.layer_tensors(weight, entry.scheme)
    for spec in specs.rows:
        yield _piece(target.name, spec, work.start - part.start, weight.shape[0], tensors[spec.name])
    for spec in specs.columns:
        yield _column_piece(target.name, spec, work.start - part.start, tensors[spec.name])
    if work.start == part.start:
        once = form.constants(weight, entry.scheme, stats.inputs.get(entry.module(part)))
        for spec in specs.once:
            yield _piece(target.name, spec, 0, 1, once[spec.name])


def decoded_part(reader: SafetensorsReader, form: str, entry: Entry, part: Part) -> torch.Tensor:
    """What the codes of a part stand for, (out, in) float32, as they lie in files of a format."""
    assert entry.scheme is not None
    weight = TensorSpec(f"{part.module}.weight", entry.scale_dtype, part.shape(entry.tensor))
    specs = FORMATS[form].layer_tensors(weight, entry.scheme)
    stored = {spec.name: reader.read(spec.name, 0, spec.matrix_shape[0]).reshape(spec.shape) for spec in (*specs.columns, *specs.rows)}
    return FORMATS[form].decode(weight, stored, entry.scheme).dequantize()


def cache_pieces(target: TargetPlan, stats: Stats, checkpoint: Checkpoint) -> Iterator[tuple[Entry, Piece]]:
    """The scales of keys and values: the source's own where the plan takes them over, else the largest magnitude seen, a layer or a head,
    over the largest code. Raises :class:`NumericsError` where they are zero or not finite."""
    cache = target.contents.cache
    if cache is None:
        return
    quantization = CACHES[cache]
    entries = {entry.tensor.name: entry for entry in target.entries if entry.kind == "cache"}
    sources = cache_sources(checkpoint, target.contents.attentions, cache)
    for attention in target.contents.attentions:
        named = FORMATS[target.format].cache_tensors(attention, cache, target.dtype)
        assert named is not None
        for i, name in enumerate(named):
            entry = entries[name.name]
            if sources:
                scale = torch.tensor(checkpoint.scales(sources[attention.module][i]))
                remedy = f"that is what {sources[attention.module][i]} says; the checkpoint is damaged"
            else:
                seen = (stats.keys, stats.values)[i][attention.module]
                absmax = torch.tensor(seen if quantization.tile.rows == 1 else [max(seen)])
                # Rounded to the dtype of the model whatever it is stored in, so that all targets have one scale.
                scale = (absmax / quantization.grid.high).to(getattr(torch, DTYPES[target.dtype].torch_name))
                remedy = f"calibration saw magnitudes of {min(seen):g} to {max(seen):g}; give it other text"
            scale = scale.to(getattr(torch, DTYPES[entry.tensor.dtype].torch_name))
            if not is_finite(scale) or not bool((scale > 0).all()):
                raise NumericsError(f"{name.name}: a scale of zero or NaN: {remedy}")
            yield entry, _piece(target.name, entry.tensor, 0, 1, scale.reshape(entry.tensor.shape))


def working_bytes(targets: Sequence[TargetPlan], workers: int, *, gpu: bool) -> int:
    """Host memory held while tensors stream: for each worker a slab as it was read, in float32, and as it is written."""
    slab = _slab_elements((entry for target in targets for entry in target.entries), gpu=gpu)
    whole = [
        part.shape(entry.tensor)[0] * part.shape(entry.tensor)[1]
        for target in targets
        for entry in target.entries
        if _row_multiple(entry) is None
        for part in entry.parts
    ]
    return workers * max([slab, *whole]) * (4 + 4 + 4 + 4 * len(targets))


def is_finite(values: torch.Tensor) -> bool:
    """Whether a float tensor holds neither NaN nor Inf; for 16-bit floats on their bits, 15 times faster than ``torch.isfinite``."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    if values.dtype in _EXPONENTS:
        magnitude, infinity = 0x7FFF, _EXPONENTS[values.dtype]
        return int((values.view(torch.int16) & magnitude).amax()) < infinity
    return bool(torch.isfinite(values).all())


def _quantize(values: torch.Tensor, entry: Entry, dtype: str, work: Work, absmax: torch.Tensor | None) -> QTensor:
    assert entry.scheme is not None
    scale_dtype = getattr(torch, DTYPES[dtype].torch_name)
    rounding = entry.coding.rtn if entry.coding else None
    clip_search = CLIP_RATIOS if rounding and rounding.clip else ()
    result = rtn.quantize(values, entry.scheme.weight, scale_dtype=scale_dtype, clip_search=clip_search, absmax=absmax)
    # NaN and Inf both reach the scale of their tile, so the weight needs no scan of its own.
    if not is_finite(result.scale if result.scale.dtype != torch.float8_e8m0fnu else result.scale.float()):
        if is_finite(values) and entry.scheme.weight.scale == "absmax":
            largest = values.abs().max().item()
            raise NumericsError(
                f"{work.spec.name}: values up to {largest:g} exceed float16, in which LLM.int8() begins; keep it with a rule"
            )
        if is_finite(values):
            raise NumericsError(f"{work.spec.name}: a scale exceeds {dtype}; set dtype: bfloat16 or float32 in the recipe")
        raise NumericsError(_where_not_finite(values, work))
    return result


def respell(stored: QTensor, wanted: Quantization, dtype: str, name: str) -> QTensor:
    """The same codes under scales as another format has them: repeated where its tiles are smaller, in ``dtype`` (a safetensors name),
    which holds them exactly; between largest magnitudes and scales they are divided or multiplied by 127 in float64 and rounded to float32.

    INT8 codes of -128 stay what they are, though the grid ends at -127. Raises :class:`NumericsError` for NaN or Inf among scales or
    codes, and for a scale of zero over codes that are not.
    """
    before = stored.quantization
    scale = stored.scale.float() if wanted.scale != "F8_E8M0" else stored.scale
    if not is_finite(scale.float()):
        raise NumericsError(f"{name}: a scale is NaN or Inf; the checkpoint is damaged, fetch or make it again")
    if before.grid.kind == "float" and bool(((stored.values.view(torch.uint8) & 0x7F) == 0x7F).any()):
        raise NumericsError(f"{name}: a code is NaN; the checkpoint is damaged, fetch or make it again")
    rows, columns = wanted.tile.scale_shape((stored.values.shape[0], stored.values.shape[1]))
    scale = scale.expand(rows, columns)  # what tiles of the source have in common is one element along that axis
    if before.scale == "absmax" and wanted.scale != "absmax":
        scale = (scale.double() / wanted.grid.high).float()
    elif before.scale != "absmax" and wanted.scale == "absmax":
        scale = (scale.double() * wanted.grid.high).float()
    if wanted.scale not in ("absmax", "F8_E8M0"):
        zero = scale == 0
        if bool(zero.any()):
            if before.scale != "absmax" and bool((stored.values[(stored.spread_scale() == 0).expand_as(stored.values)].float() != 0).any()):
                raise NumericsError(f"{name}: a scale is zero over codes that are not; the checkpoint is damaged, fetch or make it again")
            scale = torch.where(zero, torch.ones_like(scale), scale)  # readers may divide by it
        if wanted.scale == "model":
            scale = scale.to(getattr(torch, DTYPES[dtype].torch_name))
    return QTensor(stored.values, scale.contiguous(), wanted)


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
    row, column = bad[0].tolist()
    value = values[row, column].item()
    place = torch.unravel_index(torch.tensor((work.start + row) * values.shape[1] + column), work.spec.shape) if work.spec.shape else ()
    index = [int(i) for i in place]
    return (
        f"{work.spec.name}: {value} at index {index} ({len(bad)} such values in rows {work.start} to {work.stop - 1}); "
        "the checkpoint is damaged, fetch or train it again"
    )


def _piece(target: str, spec: TensorSpec, start: int, rows: int, values: torch.Tensor) -> Piece:
    """Bytes of ``spec`` that begin where ``start`` of ``rows`` rows of the weight end; ``spec`` may have one row for several of them."""
    own = spec.matrix_shape[0]
    data = _on_host(values).contiguous().reshape(-1).view(torch.uint8).numpy()
    return Piece(target, spec.name, spec.size_bytes // max(own, 1) * (own * start // max(rows, 1)), data)


def plain_piece(target: str, entry: Entry, start: int, values: torch.Tensor) -> Piece:
    """Rows from ``start`` on of a tensor that is kept, in the dtype it is stored in."""
    if entry.transposed:
        return _column_piece(target, entry.plain, start, values.T)
    return _piece(target, entry.plain, start, entry.tensor.matrix_shape[0], values)


def _column_piece(target: str, spec: TensorSpec, start: int, values: torch.Tensor) -> Piece:
    """Columns of ``spec`` from ``start`` on: of each of its rows, some bytes."""
    data = _on_host(values).contiguous()
    return Piece(target, spec.name, start * data.element_size(), data.view(torch.uint8).numpy())


def _on_host(values: torch.Tensor) -> torch.Tensor:
    """The same on the CPU, from a GPU by way of pinned memory, which torch keeps for the next: many times as fast as into fresh pages."""
    if not values.is_cuda:
        return values.cpu()
    there = values.to("cpu", non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return there


def _slab_elements(entries: Iterable[Entry], *, gpu: bool) -> int:
    if gpu:
        return GPU_SLAB_ELEMENTS
    return TRANSPOSED_SLAB_ELEMENTS if any(entry.transposed for entry in entries) else SLAB_ELEMENTS


def _row_multiple(entry: Entry) -> int | None:
    """Slabs of an entry must begin at multiples of so many rows; None: it needs its parts whole."""
    if entry.scheme is None:
        return 1
    if any(part.columns for part in entry.parts) or (entry.algorithm != RESPELL and not ALGORITHMS[entry.coder].row_wise):
        return None
    return entry.scheme.weight.tile.rows
