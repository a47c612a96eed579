"""Every quantized tensor of an artifact, decoded and compared with its source under the bound that its scheme implies.

Run as ``python -m convert.numbers REQUEST ANSWER``, both JSON files; request: ``artifact``, ``model``, ``trust_remote_code``, ``threads``;
answer: ``layers``, one record a tensor.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.architecture import Part
from convert.plan import RESPELL
from convert.quantize import SLAB_ELEMENTS, TURNED_SLAB_ELEMENTS
from convert.report import LayerNumbers
from convert.source import Checkpoint, SafetensorsReader, open_source
from formats import FORMATS
from formats.dtypes import DTYPES
from formats.format import Format
from formats.manifest import read_manifest
from formats.qtensor import QTensor
from formats.safetensors import TensorSpec
from formats.scheme import SCHEMES, Grid
from formats.tensors import GRAPHS, read_tensors

#: Codes that were only spelled anew decode to what the source's do, but for float32's rounding of a scale that was multiplied by 127.
RESPELL_ROUNDING = 2.0**-22


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(1)
    checkpoint = open_source(request["model"], trust_remote_code=request["trust_remote_code"])
    layers = compare(Path(request["artifact"]), checkpoint, threads=request["threads"])
    Path(answer_path).write_text(json.dumps({"layers": [asdict(layer) for layer in layers]}))


def compare(artifact: Path, checkpoint: Checkpoint, *, threads: int) -> list[LayerNumbers]:
    """The numbers of every quantized tensor, in the ledger's order; slab by slab, in bounded memory."""
    manifest = read_manifest(artifact)
    located = read_tensors(artifact, manifest.format)
    reader = SafetensorsReader(located, lambda file: artifact / file, headers=manifest.format not in GRAPHS)
    form = FORMATS[manifest.format]
    # A smoothed weight is no longer the source's.
    entries = [entry for entry in manifest.ledger if entry["decision"] == "quantize" and "+" not in str(entry["algorithm"])]
    parts = [
        (entry, Part(module, start, stop, columns and tuple(columns)))
        for entry in entries
        for module, start, stop, columns in entry["parts"]
    ]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda item: _compare_part(item[0], item[1], reader, checkpoint, form), parts))


def error_bound(weight: torch.Tensor, scale: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The largest error rounding can make of each element: half the distance between codes, plus what is clipped because the
    scale itself was rounded (half a unit in its last place).

    ``weight`` (out, in) float32; ``scale`` broadcasts over it, in the dtype it is stored in. Integers: ``scale / 2``.
    Floats: half a unit in the last place of ``weight / scale``, and of the smallest normal below it (OCP 8-bit Floating Point
    Specification 1.0).
    """
    rounding = torch.finfo(scale.dtype).eps / 2
    scale = scale.float()
    if grid.kind == "int":
        half_step = scale.expand_as(weight) / 2
    else:
        smallest = scale * 2.0 ** (grid.min_exponent - grid.mantissa_bits - 1)
        half_step = torch.maximum(weight.abs() * 2.0 ** -(grid.mantissa_bits + 1), smallest)
    clipped = (weight.abs() - grid.high * scale).clamp_(min=0)
    allowed = torch.minimum(clipped, grid.high * scale * rounding)
    return half_step + allowed


def _cast_bound(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    """How far LLM.int8() may move a weight before it quantizes it: cast to the dtype of the model, which rounds by half a unit in the last
    place of bfloat16 at most and a bfloat16 not at all, and then to float16, whose subnormals are 2**-24 apart."""
    return weight.abs() * (0 if dtype == "BF16" else 2.0**-8) + 2.0**-25


def _compare_part(entry: dict[str, Any], part: Part, artifact: SafetensorsReader, checkpoint: Checkpoint, form: Format) -> LayerNumbers:
    source = checkpoint.tensors[entry["tensor"]]
    scheme = SCHEMES[entry["scheme"]]
    outputs = {name: TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in entry["outputs"]}
    rows, columns = part.shape(source)
    mine = form.layer_tensors(TensorSpec(f"{part.module}.weight", "F32", (rows, columns)), scheme)
    signal = noise = worst = 0.0
    clipped = 0
    for start, stop in _slabs(part, rows, columns, scheme.weight.tile.rows, TURNED_SLAB_ELEMENTS if mine.columns else SLAB_ELEMENTS):
        if part.columns is None:
            weight = checkpoint.reader.read(source.name, part.start + start, part.start + stop).float()
        else:
            weight = checkpoint.reader.read(source.name, part.start, part.stop)[:, slice(*part.columns)].T.float()
        stored = {spec.name: _read_rows(artifact, outputs[spec.name], start, stop, rows) for spec in mine.rows}
        stored |= {spec.name: artifact.read_columns(spec.name, start, stop) for spec in mine.columns}
        decoded: QTensor = form.decode(TensorSpec(f"{part.module}.weight", "F32", (stop - start, columns)), stored, scheme)
        error = (decoded.dequantize() - weight).abs_()
        signal += float(weight.square().sum(dtype=torch.float64))
        noise += float(error.square().sum(dtype=torch.float64))
        if entry["algorithm"] == RESPELL:
            worst = _worse(worst, error, weight.abs() * RESPELL_ROUNDING)
            continue
        scale = decoded.spread_scale() if scheme.weight.unit == 1 else decoded.spread_scale() * scheme.weight.unit
        if scheme.weight.scale == "model":  # to whose dtype it was rounded, even where it is stored in float32
            scale = scale.to(getattr(torch, DTYPES[entry["scale_dtype"]].torch_name))
        # float32 rounding of the comparison itself is not the codes' fault
        bound = error_bound(weight, scale, scheme.weight.grid) * (1 + 1e-5)
        if scheme.weight.scale == "absmax":
            bound += _cast_bound(weight, source.dtype)
        if _rounds(entry):
            worst = _worse(worst, error, bound)
        clipped += int((weight.abs() > scheme.weight.grid.high * scale.float()).sum())
    snr = 10 * math.log10(signal / noise) if noise and signal else math.inf
    name = source.name if len(entry["parts"]) == 1 else f"{part.module}.weight"
    return LayerNumbers(name, scheme.name, min(snr, 999.0), worst if math.isfinite(worst) else 1e9, clipped / (rows * columns))


def _rounds(entry: dict[str, Any]) -> bool:
    """Whether each code is the nearest to its weight; GPTQ moves them further, and a searched scale clips, to lose less at the output."""
    options = entry.get("options", {})
    return entry["algorithm"] == "rtn" and not options.get("rtn", {}).get("clip")


def _worse(worst: float, error: torch.Tensor, bound: torch.Tensor) -> float:
    """The larger of ``worst`` and the largest error as a share of its bound; NaN stays NaN, which is no good number."""
    share = torch.where(error == 0, 0.0, error / bound)
    return float(np.maximum(worst, float(share.max()))) if share.numel() else worst


def _slabs(part: Part, rows: int, columns: int, multiple: int | None, elements: int) -> Iterator[tuple[int, int]]:
    step = rows if part.columns is not None or multiple is None else max(1, elements // columns // multiple) * multiple
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _read_rows(artifact: SafetensorsReader, spec: TensorSpec, start: int, stop: int, rows: int) -> torch.Tensor:
    """What a tensor beside a weight of ``rows`` rows says of those in ``[start, stop)``, which begins and ends where tiles do."""
    own = spec.matrix_shape[0]
    read = artifact.read(spec.name, own * start // rows, own if stop == rows else own * stop // rows)
    return read.reshape(-1) if len(spec.shape) == 1 else read


if __name__ == "__main__":
    main(*sys.argv[1:])
