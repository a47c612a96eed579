"""Weights of a source that is already quantized, read as the floats they stand for, or as the codes they are.

What the config says of them comes from :mod:`formats.existing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from formats.dtypes import DTYPES
from formats.errors import SourceError
from formats.existing import ExistingLayer, ExistingQuantization
from formats.safetensors import TensorSpec
from formats.scheme import PER_TENSOR, Quantization

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor


@dataclass(frozen=True)
class Coded:
    """How a source tensor is quantized: ``description`` for people; ``quantization`` and the dtype its scales are stored in where the codes
    can be had as they are, else None. ``input_scale``: the tensor that holds the scale of a static input."""

    description: str
    quantization: Quantization | None = None
    scale_dtype: str = "F32"
    input_scale: str | None = None


class _Reader(Protocol):
    def read(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    def path(self, file: str) -> Path: ...


class CodedReader:
    """Reads weights whose codes and scales are tensors of their own; everything else as ``inner`` does."""

    def __init__(self, inner: _Reader, layers: Mapping[str, ExistingLayer], specs: Mapping[str, TensorSpec]) -> None:
        self._inner = inner
        self._layers = layers
        self._specs = specs

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of a tensor; of a quantized weight in float32, codes times scales."""
        layer = self._layers.get(name)
        if layer is None:
            return self._inner.read(name, start, stop)
        assert layer.weight is not None
        multiple = layer.weight.tile.rows or 1
        aligned = start // multiple * multiple
        return self.codes(name, aligned, stop).dequantize()[start - aligned :]

    def codes(self, name: str, start: int, stop: int) -> QTensor:
        """Rows ``[start, stop)`` of a quantized weight as they are stored; ``start`` must be where a tile begins."""
        import torch

        from formats.qtensor import QTensor

        layer = self._layers[name]
        quantization = quantization_of(layer)
        assert layer.scale is not None
        values = self._inner.read(layer.codes, start, stop)
        if layer.packed:
            values = (values.view(torch.uint8).to(torch.int16) - 128).to(torch.int8)
        spec = self._specs[layer.scale]
        tile = quantization.tile
        low, high = (start // tile.rows, -(-stop // tile.rows)) if tile.rows else (0, spec.matrix_shape[0])
        scale = self._inner.read(layer.scale, low, high)
        if quantization.scale == "F8_E8M0":
            scale = scale.view(torch.float8_e8m0fnu)
        return QTensor(values, scale.reshape(tile.scale_shape((stop - start, values.shape[1]))), quantization)

    def scalar(self, name: str) -> float:
        """The value of a tensor of one element."""
        return float(self._inner.read(name, 0, 1))

    def path(self, file: str) -> Path:
        return self._inner.path(file)


def quantization_of(layer: ExistingLayer) -> Quantization:
    """As :class:`~formats.qtensor.QTensor` has it: scales of bitsandbytes are the largest magnitudes themselves."""
    assert layer.weight is not None
    return replace(layer.weight, scale="absmax") if layer.scale_divisor != 1 else layer.weight


def decoded_specs(existing: ExistingQuantization, specs: Mapping[str, TensorSpec], dtype: str, origin: str) -> dict[str, TensorSpec]:
    """The tensors of a quantized checkpoint as a reader of floats sees them: a weight of ``dtype`` (a safetensors name) in the place of its
    codes, no scales. Raises :class:`SourceError` for a layer that cannot be decoded."""
    if existing.undecodable:
        first = existing.undecodable[0]
        raise SourceError(
            f"{origin}: {first.module} (and {len(existing.undecodable) - 1} more) is quantized in a way that is not read here: "
            f"{first.unsupported}; convert the model it was made from"
        )
    codes = {layer.codes: layer for layer in existing.layers}
    beside = {
        name
        for layer in existing.layers
        for name in (layer.scale, layer.zero_point, layer.input_scale, layer.input_zero_point, *layer.others)
        if name
    } | set(existing.cache_scales)
    found = {}
    for name, spec in specs.items():
        if name in codes:
            layer = codes[name]
            found[f"{layer.module}.weight"] = TensorSpec(f"{layer.module}.weight", dtype, layer.shape)
        elif name not in beside:
            found[name] = spec
    return found


def describe_layer(existing: ExistingQuantization, layer: ExistingLayer, specs: Mapping[str, TensorSpec]) -> Coded:
    """What the plan must know of a quantized weight."""
    quantization = quantization_of(layer)
    tile = quantization.tile
    grain = "per tensor" if tile == PER_TENSOR else f"per {tile.rows or 'all'} x {tile.columns or 'all'}"
    assert layer.scale is not None
    return Coded(
        description=f"{existing.format} {DTYPES[quantization.grid.dtype].torch_name} {grain}",
        quantization=quantization,
        scale_dtype=specs[layer.scale].dtype,
        input_scale=layer.input_scale,
    )
