"""Every quantized tensor of an artifact, decoded and compared with its source under the bound that its scheme implies.

Smoothing is made again from the factors in the manifest, so that what it changed has the same bound as what it did not. GPTQ moves codes
further than rounding: of these the scales have to be those of rounding, and the error what was noted when they were chosen. Training moves
scales too: the error has to be what was noted, in steps of the scale as well as in all, and a static input's scale what was learned.

Run as ``python -m convert.numbers REQUEST ANSWER``, both JSON files; request: ``artifact``, ``model``, ``trust_remote_code``, ``threads``;
answer: ``layers``, one record a tensor.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convert.algorithms import ALGORITHMS, rtn
from convert.algorithms.rtn import CLIP_RATIOS
from convert.architecture import Part
from convert.folds import Fold, folded, read_fold, touching
from convert.ledger import RESPELL
from convert.moved import Moved, moved
from convert.quantize import SLAB_ELEMENTS, TRANSPOSED_SLAB_ELEMENTS
from convert.recipe import parse_recipe
from convert.report import LayerNumbers
from convert.rotate import rotate
from convert.source import Checkpoint, SafetensorsReader, open_source
from formats import FORMATS
from formats.dtypes import DTYPES
from formats.format import Format
from formats.manifest import read_manifest
from formats.qtensor import QTensor
from formats.safetensors import TensorSpec
from formats.scheme import SCHEMES, Grid, Quantization
from formats.tensors import GRAPHS, read_tensors

#: Codes that were only spelled anew decode to what the source's do, but for float32's rounding of a scale that was multiplied by 127.
RESPELL_ROUNDING = 2.0**-22
#: Of a bias in the ledger: it depends on the inputs that calibration saw, so that the source does not tell what it has to be.
CORRECTED = "corrected: "
#: What float32 adds to half a step where a code of 127 lies at a tie: dividing by the scale, multiplying by it and subtracting each round
#: by up to 127 * 2**-24 steps. Seen with a float32 source of 22 million weights: 1.4e-5.
TIE_ROUNDING = 3 * 127 * 2.0**-24 / 0.5
#: How far two sums of the same squares may differ, a share: the order of summation, and nothing else. One code of a million that is off by
#: one step moves the sum by ten times as much.
SUM_ROUNDING = 1e-6


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(1)
    checkpoint = open_source(request["model"], trust_remote_code=request["trust_remote_code"])
    # What was rotated is compared with the source rotated again.
    recipe = parse_recipe(json.dumps(read_manifest(Path(request["artifact"])).recipe), "octavo.json")
    layers = compare(Path(request["artifact"]), rotate(checkpoint, recipe), threads=request["threads"])
    Path(answer_path).write_text(json.dumps({"layers": [asdict(layer) for layer in layers]}))


def compare(artifact: Path, checkpoint: Checkpoint, *, threads: int) -> list[LayerNumbers]:
    """The numbers of every quantized tensor, in the ledger's order; slab by slab, in bounded memory."""
    manifest = read_manifest(artifact)
    located = read_tensors(artifact, manifest.format)
    reader = SafetensorsReader(located, lambda file: artifact / file, headers=manifest.format not in GRAPHS)
    form = FORMATS[manifest.format]
    calibration = manifest.calibration or {}
    told, folds = calibration.get("solved", {}), [read_fold(record) for record in calibration.get("folds", [])]
    walked = getattr(torch, calibration.get("dtype", "float32"))  # in which the model stood when codes were chosen
    with ThreadPoolExecutor(threads) as pool:
        found: list[Future[LayerNumbers]] = []
        by_tensor = {entry["tensor"]: entry for entry in manifest.ledger}
        for entry in manifest.ledger:
            largest = partial(_largest, [by_tensor[name] for name in entry.get("alongside", ())], checkpoint, told, folds, walked)
            if entry["decision"] == "quantize":
                for module, start, stop, columns in entry["parts"]:
                    part = Part(module, start, stop, columns and tuple(columns))
                    name = module if "experts" in entry else entry["module"]
                    mine = touching(folds, name)
                    found.append(
                        pool.submit(_compare_part, entry, part, reader, checkpoint, form, told.get(name, {}), name, mine, walked, largest)
                    )
            elif (mine := touching(folds, entry["module"])) and CORRECTED not in entry.get("note", ""):
                found.append(pool.submit(_compare_kept, entry, reader, checkpoint, mine, walked))
        return [item.result() for item in found]


def error_bound(weight: torch.Tensor, scale: torch.Tensor, grid: Grid, *, clips: bool = False) -> torch.Tensor:
    """The largest error rounding can make of each element: half the distance between codes, plus what is clipped because the
    scale itself was rounded (half a unit in its last place), or, where a smaller scale was searched and it ``clips``, all that is.

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
    return half_step + (clipped if clips else torch.minimum(clipped, grid.high * scale * rounding))


def _cast_bound(weight: torch.Tensor, dtype: str) -> torch.Tensor:
    """How far LLM.int8() may move a weight before it quantizes it: cast to the dtype of the model, which rounds by half a unit in the last
    place of bfloat16 at most and a bfloat16 not at all, and then to float16, whose subnormals are 2**-24 apart."""
    return weight.abs() * (0 if dtype == "BF16" else 2.0**-8) + 2.0**-25


def _compare_part(
    entry: dict[str, Any],
    part: Part,
    artifact: SafetensorsReader,
    checkpoint: Checkpoint,
    form: Format,
    told: dict[str, Any],
    module: str,
    folds: Sequence[Fold],
    walked: torch.dtype,
    largest: Callable[[], torch.Tensor | None],
) -> LayerNumbers:
    """``told``: what the manifest says of the layer, by the model's name for it, ``module``; ``folds`` are those that touched it,
    in a model of dtype ``walked``. ``largest``: what its scale holds where that is not its own largest magnitude."""
    source = checkpoint.tensors[entry["tensor"]]
    scheme = SCHEMES[entry["scheme"]]
    outputs = {name: TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in entry["outputs"]}
    rows, columns = part.shape(source)
    mine = form.layer_tensors(TensorSpec(f"{part.module}.weight", "F32", (rows, columns)), scheme)
    coder = _coder(entry)
    trained = "recover" in str(entry["algorithm"]).split("+")
    options, by_gptq = entry.get("options", {}).get(coder, {}), trained or (coder == "gptq" and not told.get("rounded"))
    total, worst, clipped = Moved(0.0, 0.0, 0.0), 0.0, 0
    for start, stop in _slabs(part, rows, columns, scheme.weight.tile.rows, TRANSPOSED_SLAB_ELEMENTS if mine.columns else SLAB_ELEMENTS):
        if part.columns is None:
            weight = checkpoint.reader.read(source.name, part.start + start, part.start + stop).float()
        else:
            weight = checkpoint.reader.read(source.name, part.start, part.stop)[:, slice(*part.columns)].T.float()
        if told:
            weight = folded(weight.to(walked).float(), module, folds, start=start, stop=stop)
        stored = {spec.name: _read_rows(artifact, outputs[spec.name], start, stop, rows) for spec in mine.rows}
        stored |= {spec.name: artifact.read_columns(spec.name, start, stop) for spec in mine.columns}
        decoded: QTensor = form.decode(TensorSpec(f"{part.module}.weight", "F32", (stop - start, columns)), stored, scheme)
        total += moved(weight, decoded)
        error = (decoded.dequantize() - weight).abs_()
        if entry["algorithm"] == RESPELL:
            worst = _worse(worst, error, weight.abs() * RESPELL_ROUNDING)
            continue
        scale = decoded.spread_scale() if scheme.weight.unit == 1 else decoded.spread_scale() * scheme.weight.unit
        if scheme.weight.scale == "model":  # to whose dtype it was rounded, even where it is stored in float32
            scale = scale.to(getattr(torch, DTYPES[entry["scale_dtype"]].torch_name))
        if scheme.weight.scale != "absmax" and not trained and not _on_the_way(options, scheme.weight):
            clip_search = CLIP_RATIOS if options.get("clip") else ()
            worst = max(worst, _scale_deviation(weight, decoded, entry, clip_search=clip_search, absmax=largest()))
        if not by_gptq:
            # float32 rounding of the comparison itself is not the codes' fault
            bound = error_bound(weight, scale, scheme.weight.grid, clips=bool(options.get("clip"))) * (1 + TIE_ROUNDING)
            if scheme.weight.scale == "absmax":
                bound += _cast_bound(weight, source.dtype)
            worst = _worse(worst, error, bound)
        clipped += int((weight.abs() > scheme.weight.grid.high * scale.float()).sum())
    if by_gptq:
        worst = max(worst, _deviation(total, told))
    if trained and scheme.static:
        worst = max(worst, _input_deviation(entry, part, rows, columns, artifact, form, told))
    snr = 10 * math.log10(total.signal / total.noise) if total.noise and total.signal else math.inf
    name = source.name if len(entry["parts"]) == 1 else f"{part.module}.weight"
    return LayerNumbers(name, scheme.name, min(snr, 999.0), worst if math.isfinite(worst) else 1e9, clipped / (rows * columns))


def _compare_kept(
    entry: dict[str, Any], artifact: SafetensorsReader, checkpoint: Checkpoint, folds: Sequence[Fold], walked: torch.dtype
) -> LayerNumbers:
    """What is kept and was smoothed: the source's values with the factors folded in, rounded to what it is stored in."""
    spec, (name, dtype, shape) = checkpoint.tensors[entry["tensor"]], entry["outputs"][0]
    stored = artifact.read(name, 0, TensorSpec(name, dtype, tuple(shape)).matrix_shape[0]).reshape(shape)
    stored = stored.T if entry.get("transposed") else stored
    value = checkpoint.reader.read(spec.name, 0, spec.matrix_shape[0]).reshape(spec.shape).to(walked).float()
    value = folded(value, entry["module"], folds, bias=spec.name.endswith(".bias"))
    # One unit in the last place of what is stored; and float32's, where an offset is added and taken away again.
    bound = value.abs() * torch.finfo(stored.dtype).eps + max(abs(fold.offset) for fold in folds) * 2.0**-22 + 1e-30
    worst = _worse(0.0, (stored.float() - value).abs(), bound)
    return LayerNumbers(spec.name, "kept", 999.0, worst if math.isfinite(worst) else 1e9, 0.0)


def _coder(entry: dict[str, Any]) -> str:
    """What chose the codes, among the algorithms of a record."""
    names = str(entry["algorithm"]).split("+")
    return next((name for name in names if name in ALGORITHMS), names[-1])


def _on_the_way(options: dict[str, Any], quantization: Quantization) -> bool:
    """Whether GPTQ took the scales of groups from what weights had become, so that the source does not tell them."""
    return not options.get("static_groups", True) and quantization.tile.columns is not None


def _largest(
    entries: Sequence[dict[str, Any]],
    checkpoint: Checkpoint,
    told: Mapping[str, Any],
    folds: Sequence[Fold],
    walked: torch.dtype,
) -> torch.Tensor | None:
    """The largest magnitude, float32, of weights that have one scale together, as they were when that was taken; None of none."""
    found = []
    for entry in entries:
        weight = checkpoint.reader.read(entry["tensor"], 0, checkpoint.tensors[entry["tensor"]].matrix_shape[0]).float()
        if told.get(entry["module"]):
            weight = folded(weight.to(walked).float(), entry["module"], touching(folds, entry["module"]))
        found.append(weight.abs().amax())
    return torch.stack(found).amax() if found else None


def _scale_deviation(
    weight: torch.Tensor, decoded: QTensor, entry: dict[str, Any], *, clip_search: Sequence[float], absmax: torch.Tensor | None
) -> float:
    """How far scales are from the nearest that rounding the weight could have, in quarters of a unit in their last place: they are computed
    from the same numbers in the same way, so they are equal or at least two quarters apart."""
    dtype = getattr(torch, DTYPES[entry["scale_dtype"]].torch_name)
    choices = rtn.scale_choices(weight, decoded.quantization, scale_dtype=dtype, clip_search=clip_search, absmax=absmax)
    unit = torch.finfo(choices.dtype).eps
    choices, scale = choices.float(), decoded.scale.float()
    away = ((scale - choices).abs() / (choices * unit)).amin(dim=0)
    return 4 * float(away.max()) if away.numel() else 0.0


def _deviation(found: Moved, told: dict[str, Any]) -> float:
    """How far the bytes are from what was noted when they were chosen, as a share of what rounding of float64 allows. Nothing was noted:
    infinitely far."""
    if "moved" not in told:
        return math.inf
    noted = Moved(**told["moved"])
    pairs = ((found.steps, noted.steps), (found.noise, noted.noise), (found.signal, noted.signal))
    return max(abs(x - y) / (y * SUM_ROUNDING) if y else math.inf if x else 0.0 for x, y in pairs)


def _input_deviation(
    entry: dict[str, Any], part: Part, rows: int, columns: int, artifact: SafetensorsReader, form: Format, told: dict[str, Any]
) -> float:
    """How far the scale of a static input is from what training noted, in quarters of a unit in its last place; infinitely, if it noted
    nothing."""
    noted = told.get("recover", {}).get("input_limit")
    if noted is None:
        return math.inf
    weight = TensorSpec(f"{part.module}.weight", entry["scale_dtype"], (rows, columns))
    worst = 0.0
    for name, expected in form.constants(weight, SCHEMES[entry["scheme"]], noted).items():
        if expected.is_floating_point():
            spec = next(TensorSpec(name, dtype, tuple(shape)) for output, dtype, shape in entry["outputs"] if output == name)
            found = artifact.read(name, 0, spec.matrix_shape[0]).reshape(-1).float()
            unit = expected.float().reshape(-1).abs() * torch.finfo(expected.dtype).eps
            worst = _worse(worst, (found - expected.float().reshape(-1)).abs(), unit / 4)
    return worst


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
