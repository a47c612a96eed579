"""A model with the weights that an artifact's codes decode to, read from its files without the tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from formats import FORMATS
from formats.dtypes import numpy_dtype
from formats.manifest import read_manifest
from formats.onnx_graph import read_folder
from formats.safetensors import TensorSpec
from formats.scheme import SCHEMES


def put_back(model: Any, folder: Path, form: str = "onnx") -> int:
    """Gives the model the weights that its codes decode to; how many."""
    found = read_folder(folder)
    quantized = [entry for entry in read_manifest(folder).ledger if entry["decision"] == "quantize"]
    modules = dict(model.named_modules())
    for entry in quantized:
        stored = entry["parts"][0][0]
        weight = modules[entry["module"]].weight
        spec = TensorSpec(f"{stored}.weight", entry["scale_dtype"], tuple(weight.shape))
        tensors = {name: tensor(folder, found[name]) for name, _, _ in entry["outputs"]}
        with torch.no_grad():
            modules[entry["module"]].weight = torch.nn.Parameter(FORMATS[form].decode(spec, tensors, SCHEMES[entry["scheme"]]).dequantize())
    return len(quantized)


def tensor(folder: Path, item: Any) -> torch.Tensor:
    """A tensor of a data file, read without the tool."""
    raw = (folder / item.file).read_bytes()[item.start : item.stop]
    dtype = numpy_dtype(item.spec.dtype)
    array = np.frombuffer(raw, dtype).reshape(item.spec.shape).copy()
    if "float8" in str(dtype):  # torch takes no such array from NumPy
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)
