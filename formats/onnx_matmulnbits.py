"""ONNX on disk for ONNX Runtime's own product, ``MatMulNBits`` of ``com.microsoft`` with 8 bits: what it makes of ``DequantizeLinear`` and
``MatMul`` while it loads, spelled out, for readers that do not (WebGPU, older ones).

A layer (out, in), its input features in blocks, the last of them filled up (``docs/ContribOperators.md`` of onnxruntime):

================  =====  ==================================================
tensor            dtype  shape and meaning
================  =====  ==================================================
``weight``        U8     (out, blocks, block): codes plus 128
``weight_scale``  F32    (out, blocks): what codes are multiplied by
================  =====  ==================================================

Files and metadata are those of :mod:`formats.onnx_graph`. Where a layer has one scale a channel, each of its blocks repeats it. A table of
embeddings lies as :mod:`formats.onnx` has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from formats import onnx
from formats.layer import LayerNames, LayerTensors
from formats.onnx import cache_tensors, config, metadata, side_files
from formats.safetensors import TensorSpec
from formats.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor

__all__ = ["cache_tensors", "config", "constants", "decode", "encode", "layer_tensors", "metadata", "refusal", "side_files"]

#: The block of layers that have one scale a channel; ONNX Runtime takes the same.
BLOCK = 32
#: A code of zero.
ZERO = 128


def block_size(scheme: Scheme) -> int:
    """Neighbours that share a scale."""
    return scheme.weight.tile.columns or BLOCK


def refusal(scheme: Scheme, shape: tuple[int, int], *, transposed: bool) -> str | None:  # noqa: ARG001
    """Why this format cannot hold a layer of this scheme and shape (out, in), or None; how the source stores it does not matter."""
    if scheme.lookup:
        return None
    if scheme.activation is not None or scheme.weight.grid.kind != "int" or scheme.weight.scale != "model" or scheme.weight.tile.rows != 1:
        return "MatMulNBits is for INT8 weights alone; use int8-weight-only, or one with groups"
    if shape[1] % block_size(scheme) and scheme.weight.tile.columns:
        return f"{scheme.weight.tile.columns} does not divide its {shape[1]} input features"
    return None


def layer_tensors(weight: TensorSpec, scheme: Scheme) -> LayerTensors:
    """What a linear layer becomes on disk; ``weight`` is called ``<module>.weight``, (out, in)."""
    if scheme.lookup:
        return onnx.layer_tensors(weight, scheme)
    rows, columns = weight.matrix_shape
    blocks = -(-columns // block_size(scheme))
    codes = TensorSpec(weight.name, "U8", (rows, blocks, block_size(scheme)))
    return LayerTensors((codes, TensorSpec(LayerNames.of(weight.name).scale, "F32", (rows, blocks))))


def encode(name: str, quantized: QTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The codes and scales of a weight called ``name``, or of any run of its rows."""
    import torch

    if scheme.lookup:
        return onnx.encode(name, quantized, scheme)
    rows, columns = quantized.values.shape
    size = block_size(scheme)
    blocks = -(-columns // size)
    codes = torch.full((rows, blocks * size), ZERO, dtype=torch.uint8, device=quantized.values.device)
    codes[:, :columns] = (quantized.values.to(torch.int16) + ZERO).to(torch.uint8)
    scale = quantized.scale.float().expand(rows, blocks)
    return {name: codes.reshape(rows, blocks, size), LayerNames.of(name).scale: scale}


def constants(weight: TensorSpec, scheme: Scheme, input_absmax: float | None) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """What is written once a layer: nothing."""
    return {}


def decode(weight: TensorSpec, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The inverse of :func:`encode`."""
    import torch

    from formats.qtensor import QTensor

    if scheme.lookup:
        return onnx.decode(weight, tensors, scheme)
    rows, columns = weight.matrix_shape
    codes = tensors[weight.name].reshape(rows, -1)[:, :columns].to(torch.int16) - ZERO
    scale = tensors[LayerNames.of(weight.name).scale].reshape(rows, -1)
    return QTensor(codes.to(torch.int8), scale if scheme.weight.tile.columns else scale[:, :1], scheme.weight)
