"""The element types of tensors on disk, under their safetensors names, and what NumPy and torch call them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DType:
    """One element type: ``bits`` an element, the NumPy (or ml_dtypes) name and the ``torch`` attribute."""

    bits: int
    numpy_name: str
    torch_name: str


#: safetensors 0.8 ``Dtype`` (safetensors/src/tensor.rs). Types of less than a byte are left out: nothing here reads them.
DTYPES = {
    "F64": DType(64, "float64", "float64"),
    "F32": DType(32, "float32", "float32"),
    "F16": DType(16, "float16", "float16"),
    "BF16": DType(16, "bfloat16", "bfloat16"),
    "F8_E4M3": DType(8, "float8_e4m3fn", "float8_e4m3fn"),
    "F8_E5M2": DType(8, "float8_e5m2", "float8_e5m2"),
    "F8_E8M0": DType(8, "float8_e8m0fnu", "float8_e8m0fnu"),
    "I64": DType(64, "int64", "int64"),
    "I32": DType(32, "int32", "int32"),
    "I16": DType(16, "int16", "int16"),
    "I8": DType(8, "int8", "int8"),
    "U64": DType(64, "uint64", "uint64"),
    "U32": DType(32, "uint32", "uint32"),
    "U16": DType(16, "uint16", "uint16"),
    "U8": DType(8, "uint8", "uint8"),
    "BOOL": DType(8, "bool", "bool"),
}

#: What a weight may be stored in before it is quantized.
FLOATS = ("F64", "F32", "F16", "BF16")

_BY_TORCH = {dtype.torch_name: name for name, dtype in DTYPES.items()}


def from_torch_name(name: str) -> str:
    """The safetensors name of a torch dtype given as ``"bfloat16"`` or ``"torch.bfloat16"``. Raises ``KeyError``."""
    return _BY_TORCH[name.removeprefix("torch.")]


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a safetensors name; the types NumPy lacks come from ml_dtypes."""
    import ml_dtypes
    import numpy as np

    numpy_name = DTYPES[name].numpy_name
    return np.dtype(getattr(ml_dtypes, numpy_name, numpy_name))
