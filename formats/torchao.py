"""torchao on disk: tensor subclasses taken apart, as transformers saves and loads them.

Names, dtypes, header metadata and config are those of ``save_pretrained`` in transformers 5.23 (``quantizers/quantizer_torchao.py``) with
torchao 0.18 (``prototype/safetensors``: ``flatten_tensor_state_dict``; ``quantize_/workflows``: ``Int8Tensor``, ``Float8Tensor``):

======================  ===============  ==================================================
tensor                  dtype            shape and meaning
======================  ===============  ==================================================
``_weight_qdata``       I8 or F8_E4M3    (out, in)
``_weight_scale``       F32              (out, 1): what codes are multiplied by
``_weight_zero_point``  I8               (out, 1): zeros; of INT8 only
======================  ===============  ==================================================

The header of every file says of every tensor of the model what it is put together from: transformers keeps what the last file says.
Scales hold what fits in the dtype of the model, to which torchao rounds them where it multiplies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formats.dtypes import DTYPES
from formats.errors import FormatError
from formats.layer import Attention, Contents, LayerNames, LayerTensors
from formats.safetensors import TensorSpec
from formats.scheme import Scheme
from formats.skips import skip_list

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor

_PER_ROW = {"_type": "PerRow", "_data": {"dim": -1}}
_VERSIONED_PER_ROW = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
_SYMMETRIC = {"_type": "MappingType", "_data": "SYMMETRIC"}
_DYNAMIC_INT8 = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {"granularity": _PER_ROW, "mapping_type": _SYMMETRIC, "reduce_range": False},
}

#: Scheme -> the class of torchao that quantizes like that, and its arguments.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "int8-weight-only": ("Int8WeightOnlyConfig", {"granularity": _VERSIONED_PER_ROW, "group_size": None, "set_inductor_config": True}),
    "int8-dynamic": (
        "Int8DynamicActivationInt8WeightConfig",
        {
            "act_mapping_type": _SYMMETRIC,
            "granularity": _VERSIONED_PER_ROW,
            "reduce_range": False,
            "set_inductor_config": True,
            "weight_only_decode": False,
        },
    ),
    "fp8-weight-only": (
        "Float8WeightOnlyConfig",
        {
            "granularity": _VERSIONED_PER_ROW,
            "set_inductor_config": True,
            "weight_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"},
        },
    ),
}


def refusal(scheme: Scheme, shape: tuple[int, int], *, transposed: bool) -> str | None:  # noqa: ARG001
    """Why this format cannot hold a layer of this scheme and shape (out, in), or None. ``transposed``: the source stores (in, out)."""
    if transposed:
        return "its weight is stored transposed (Conv1D), and torchao replaces the weights of Linear modules only"
    return None if scheme.name in _CONFIGS else f"torchao holds {', '.join(_CONFIGS)} only"


def layer_tensors(weight: TensorSpec, scheme: Scheme) -> LayerTensors:
    """What a linear layer becomes on disk; ``weight`` is called ``<module>.weight``, (out, in)."""
    rows, columns = weight.matrix_shape
    qdata, scale, zero_point = _names(weight.name)
    codes = (TensorSpec(qdata, scheme.weight.grid.dtype, (rows, columns)), TensorSpec(scale, "F32", (rows, 1)))
    return LayerTensors((*codes, TensorSpec(zero_point, "I8", (rows, 1))) if _has_zero_point(scheme) else codes)


def encode(name: str, quantized: QTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The codes, scales and zero points of a weight called ``name``, or of any run of its rows."""
    import torch

    qdata, scale, zero_point = _names(name)
    tensors = {qdata: quantized.values, scale: quantized.scale.float()}
    return {**tensors, zero_point: torch.zeros_like(quantized.scale, dtype=torch.int8)} if _has_zero_point(scheme) else tensors


def constants(weight: TensorSpec, scheme: Scheme, input_absmax: float | None) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """What is written once a layer: nothing."""
    return {}


def decode(weight: TensorSpec, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The inverse of :func:`encode`, the scales in float32."""
    from formats.qtensor import QTensor

    qdata, scale, _ = _names(weight.name)
    return QTensor(tensors[qdata], tensors[scale], scheme.weight)


def cache_tensors(attention: Attention, cache: str, dtype: str) -> None:  # noqa: ARG001
    """Nothing: torchao has no scales for keys and values."""
    return


def config(contents: Contents) -> dict[str, Any] | None:
    """``quantization_config`` for ``config.json``, as ``TorchAoConfig.to_dict`` spells it. Raises :class:`FormatError` for more than one
    scheme, and for a layer that is no Linear in transformers."""
    if not contents.layers:
        return None
    first = contents.layers[0]
    for layer in contents.layers:
        if layer.scheme != first.scheme:
            raise FormatError(
                f"{first.module} is {first.scheme} and {layer.module} {layer.scheme}, and a torchao checkpoint has one scheme; "
                "make a target of each"
            )
        if contents.replaceable is not None and layer.module not in contents.replaceable:
            raise FormatError(f"{layer.module} is no Linear in transformers, and torchao quantizes no other; keep it with a rule")
    name, arguments = _CONFIGS[first.scheme]
    return {
        "quant_method": "torchao",
        "quant_type": {"default": {"_type": name, "_version": 2, "_data": arguments}},
        "modules_to_not_convert": skip_list([layer.module for layer in contents.layers], contents.kept, contents.skipped),
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }


def metadata(tensors: Sequence[TensorSpec], contents: Contents) -> dict[str, str]:
    """``__metadata__`` of every file: of each tensor of the model, whether it is one or what it is put together from."""
    layers = {f"{layer.module}.weight": layer for layer in contents.layers}
    parts = {part: name for name in layers for part in _names(name)}
    found: dict[str, str] = {}
    for spec in tensors:
        name = parts.get(spec.name, spec.name)
        layer = layers.get(name)
        found[name] = json.dumps({"_type": "Tensor"} if layer is None else _subclass(layer.scheme, layer.shape[1], contents.dtype))
    return {"format": "pt", **found, "tensor_names": json.dumps(list(found))}


def side_files(contents: Contents) -> dict[str, bytes]:  # noqa: ARG001
    """Files beside ``config.json`` that a reader wants: none."""
    return {}


def _subclass(scheme: str, columns: int, dtype: str) -> dict[str, Any]:
    of_dtype = {"_type": "torch.dtype", "_data": DTYPES[dtype].torch_name}
    if scheme == "fp8-weight-only":
        kernels = {"mm_config": None, "act_quant_kwargs": None, "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"}}
        return {
            "_type": "Float8Tensor",
            "_data": {"block_size": [1, columns], **kernels, "dtype": of_dtype},
            "_tensor_data_names": ["qdata", "scale"],
        }
    inputs = _DYNAMIC_INT8 if scheme == "int8-dynamic" else None
    return {
        "_type": "Int8Tensor",
        "_data": {"act_quant_kwargs": inputs, "reduce_range": False, "block_size": [1, columns], "dtype": of_dtype},
        "_tensor_data_names": ["zero_point", "qdata", "scale"],
    }


def _has_zero_point(scheme: Scheme) -> bool:
    return scheme.weight.grid.kind == "int"


def _names(weight: str) -> tuple[str, str, str]:
    module = LayerNames.of(weight).module
    dot = "." if module else ""
    return f"{module}{dot}_weight_qdata", f"{module}{dot}_weight_scale", f"{module}{dot}_weight_zero_point"
