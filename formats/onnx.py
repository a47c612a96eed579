"""ONNX on disk: a linear layer as ``DequantizeLinear -> MatMul`` reads it; :mod:`formats.onnx_graph` is the files around it.

A layer (out, in) lies the other way round:

==================  ===============  =================================================================
tensor              dtype            shape and meaning
==================  ===============  =================================================================
``weight``          I8 or F8_E4M3    (in, out)
``weight_scale``    F32              (out,), () or (in / group, out): what codes are multiplied by
``input_scale``     F32              (): of static inputs, what their codes are multiplied by
==================  ===============  =================================================================

A table of embeddings (rows, features) lies as it is, so that a row can be taken out of it: ``weight`` I8, and ``weight_scale`` (rows,).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formats.layer import Attention, Contents, LayerNames, LayerTensors, static_scale
from formats.safetensors import TensorSpec
from formats.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor


def refusal(scheme: Scheme, shape: tuple[int, int], *, transposed: bool) -> str | None:  # noqa: ARG001
    """Why this format cannot hold a layer of this scheme and shape (out, in), or None; how the source stores it does not matter."""
    if scheme.weight.scale != "model" or scheme.weight.tile.rows not in (1, None):
        return "ONNX has one scale for a tensor, a channel, or neighbours along one axis"
    if scheme.activation is not None and not scheme.static and (scheme.weight.grid.kind == "float" or not scheme.activation.symmetric):
        return "ONNX has DynamicQuantizeLinear for inputs, which is for INT8 and chooses its zero point itself; use int8-dynamic"
    if scheme.weight.tile.columns and shape[1] % scheme.weight.tile.columns:
        return f"{scheme.weight.tile.columns} does not divide its {shape[1]} input features"
    return None


def layer_tensors(weight: TensorSpec, scheme: Scheme) -> LayerTensors:
    """What a linear layer becomes on disk; ``weight`` is called ``<module>.weight``, (out, in), of the dtype of scales."""
    names = LayerNames.of(weight.name)
    rows, columns = weight.matrix_shape
    if scheme.lookup:
        return LayerTensors((TensorSpec(weight.name, scheme.weight.grid.dtype, (rows, columns)), TensorSpec(names.scale, "F32", (rows,))))
    tiles = scheme.weight.tile.scale_shape((rows, columns))
    codes = TensorSpec(weight.name, scheme.weight.grid.dtype, (columns, rows))
    once = (TensorSpec(f"{names.module}.input_scale", "F32", ()),) if scheme.static else ()
    if scheme.weight.tile.columns:
        return LayerTensors((), once, columns=(codes, TensorSpec(names.scale, "F32", (tiles[1], tiles[0]))))
    return LayerTensors((TensorSpec(names.scale, "F32", (rows,) if scheme.weight.tile.rows else ()),), once, columns=(codes,))


def encode(name: str, quantized: QTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The codes and scales of a weight called ``name``, or of any run of its rows."""
    scale = quantized.scale.float()
    if scheme.lookup:
        return {name: quantized.values, LayerNames.of(name).scale: scale.reshape(-1)}
    return {name: quantized.values.T, LayerNames.of(name).scale: scale.T if scheme.weight.tile.columns else scale.reshape(-1)}


def constants(weight: TensorSpec, scheme: Scheme, input_absmax: float | None) -> dict[str, torch.Tensor]:
    """The scale of a static input, rounded to the dtype of scales, as every target has it."""
    if not scheme.static:
        return {}
    return {f"{LayerNames.of(weight.name).module}.input_scale": static_scale(scheme, input_absmax, weight.dtype).float()}


def decode(weight: TensorSpec, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The inverse of :func:`encode`."""
    from formats.qtensor import QTensor

    codes, scale = tensors[weight.name], tensors[LayerNames.of(weight.name).scale]
    if scheme.lookup:
        return QTensor(codes, scale.reshape(-1, 1), scheme.weight)
    codes = codes.T
    if scheme.weight.tile.columns:
        return QTensor(codes, scale.T, scheme.weight)
    return QTensor(codes, scale.reshape(-1, 1), scheme.weight)


def cache_tensors(attention: Attention, cache: str, dtype: str) -> None:  # noqa: ARG001
    """Nothing: keys and values are the graph's inputs and outputs, in floats."""
    return


def config(contents: Contents) -> dict[str, Any] | None:  # noqa: ARG001
    """No ``quantization_config``: the graph itself says what is quantized, and transformers must not look for codes in it."""
    return None


def metadata(tensors: Sequence[TensorSpec], contents: Contents) -> dict[str, str]:  # noqa: ARG001
    """Nothing: data files have no header."""
    return {}


def side_files(contents: Contents) -> dict[str, bytes]:  # noqa: ARG001
    """None: what lies beside the graph depends on the model, and on its tokenizer."""
    return {}
