"""What the numbers on disk mean: one module a format; headers, names, packing, metadata, verify.

Nothing here knows of recipes, calibration or model families, and nothing here imports torch at import time, so that
an artifact can be inspected and verified on a machine without it.
"""

from __future__ import annotations

from formats import bitsandbytes, compressed_tensors, fp8, modelopt, onnx, onnx_matmulnbits, torchao
from formats.format import Format

#: Format names are those of ``quant_method``, which graphs have not. To add one is a module, a line here and its test.
FORMATS: dict[str, Format] = {
    "compressed-tensors": compressed_tensors,
    "fp8": fp8,
    "modelopt": modelopt,
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
    "onnx": onnx,
    "onnx-matmulnbits": onnx_matmulnbits,
}
