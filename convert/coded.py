"""Weights of a source that is already quantized, read as the floats they stand for, or as the codes they are.

What the config says of them comes from :mod:`formats.existing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from formats.dtypes import DTYPES, FLOATS
from formats.errors import FormatError, SourceError
from formats.existing import SIDE_FILE, ExistingLayer, ExistingQuantization, is_conv1d, read_quantization, section_of
from formats.safetensors import TensorSpec
from formats.scheme import Quantization

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor


#: Last parts of the names of codes that no format read here has: GPTQ, AWQ, EETQ, HQQ, AQLM.
_FOREIGN_CODES = ("qweight", "W_q", "codes", "weights")
_SCALES = ("weight_scale", "weight_scale_inv", "SCB")
#: Tensors beside a weight that change nothing of what its codes mean.
_HARMLESS = ("weight_shape", "weight_format")


@dataclass(frozen=True)
class Coded:
    """How a source tensor is quantized: ``description`` for people; ``quantization`` and the dtype its scales are stored in where the codes
    can be had as they are, else None. ``activation`` and ``input_scale``: how its input is quantized, and the tensor that holds the scale
    of a static one."""

    description: str
    quantization: Quantization | None = None
    scale_dtype: str = "F32"
    activation: Quantization | None = None
    input_scale: str | None = None


@dataclass(frozen=True)
class Decoded:
    """A quantized checkpoint as one of floats: specs of the tensors that a reader of floats sees, in the order of the files, what is known
    of those that are codes, and in which dtype, shape and place their codes lie (``layers``, by the name of the weight; ``transposed``:
    of those, the ones whose model wants (in, out)). ``cache``, ``cache_scales``: of keys and values."""

    config: dict[str, Any]
    tensors: dict[str, TensorSpec]
    coded: dict[str, Coded]
    layers: dict[str, ExistingLayer]
    transposed: frozenset[str]
    cache: Quantization | None = None
    cache_scales: dict[str, TensorSpec] = field(default_factory=dict)


class _Reader(Protocol):
    def read(self, name: str, start: int, stop: int) -> torch.Tensor: ...

    def path(self, file: str) -> Path: ...


class CodedReader:
    """Reads weights whose codes and scales are tensors of their own; everything else as ``inner`` does."""

    def __init__(self, inner: _Reader, decoded: Decoded, specs: Mapping[str, TensorSpec]) -> None:
        self._inner = inner
        self._layers = decoded.layers
        self._transposed = decoded.transposed
        self._specs = specs

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of a tensor; of a quantized weight in float32, codes times scales."""
        layer = self._layers.get(name)
        if layer is None:
            return self._inner.read(name, start, stop)
        if name in self._transposed:  # its codes are (out, in): a row of the weight is a column of theirs
            return self.codes(name, 0, layer.shape[0]).dequantize().T[start:stop].contiguous()
        assert layer.weight is not None
        multiple = layer.weight.tile.rows or 1
        aligned = start // multiple * multiple
        return self.codes(name, aligned, stop).dequantize()[start - aligned :]

    def codes(self, name: str, start: int, stop: int) -> QTensor:
        """Output features ``[start, stop)`` of a quantized weight as they are stored; ``start`` must be where a tile begins.

        Raises :class:`SourceError` for zero points that are not zero and for codes in another order than rows."""
        import torch

        from formats.qtensor import QTensor

        layer = self._layers[name]
        quantization = quantization_of(layer)
        assert layer.scale is not None
        values = self._inner.read(layer.codes, start, stop)
        if layer.packed:
            values = (values.view(torch.uint8)[:, : layer.shape[1]].to(torch.int16) - 128).to(torch.int8)
        tile = quantization.tile
        rows, columns = tile.scale_shape((stop - start, values.shape[1]))
        low = start // tile.rows * columns if tile.rows else 0
        scale = self._read_flat(layer.scale, low, rows * columns)
        if quantization.scale == "F8_E8M0":
            scale = scale.view(torch.float8_e8m0fnu)
        if layer.zero_point is not None and self._read_flat(layer.zero_point, low, rows * columns).any():
            raise SourceError(f"{layer.zero_point}: zero points that are not zero are not read here; convert the model it was made from")
        for other in layer.others:
            if other.endswith("weight_format") and start == 0 and (order := int(self.scalar(other))) != 0:
                raise SourceError(f"{other} is {order}: only codes in the order of rows (0) are read; load the model and save it again")
        return QTensor(values, scale.reshape(rows, columns), quantization)

    def scalar(self, name: str) -> float:
        """The value of a tensor of one element."""
        return float(self._inner.read(name, 0, 1).float())

    def values(self, name: str) -> list[float]:
        """Every value of a small tensor."""
        return [float(value) for value in self._inner.read(name, 0, self._specs[name].matrix_shape[0]).float().reshape(-1)]

    def path(self, file: str) -> Path:
        return self._inner.path(file)

    def _read_flat(self, name: str, start: int, count: int) -> torch.Tensor:
        columns = max(self._specs[name].matrix_shape[1], 1)
        return self._inner.read(name, start // columns, -(-(start + count) // columns)).reshape(-1)


def quantization_of(layer: ExistingLayer) -> Quantization:
    """As :class:`~formats.qtensor.QTensor` has it: scales of bitsandbytes are the largest magnitudes themselves."""
    assert layer.weight is not None
    return replace(layer.weight, scale="absmax") if layer.scale_divisor != 1 else layer.weight


def decode(
    config: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    side: Mapping[str, Any] | None,
    origin: str,
    *,
    peek: Callable[[list[str]], list[bytes]],
) -> Decoded | None:
    """What ``config.json``, the names of tensors and ModelOpt's side file say of codes among ``specs``; None where there are none.

    ``peek`` gives the bytes of a few small tensors: of packed codes the shape is one. Raises :class:`SourceError` for a layer that
    cannot be decoded.
    """
    existing = _existing(config, specs, side, origin)
    if existing is None:
        return None
    if existing.undecodable:
        first = existing.undecodable[0]
        raise _unreadable(origin, first.module, f"{first.unsupported}", len(existing.undecodable) - 1)
    dtype = _kept_dtype(config, specs)
    packed = [name for layer in existing.layers if layer.packed for name in layer.others if name.endswith(".weight_shape")]
    shapes = dict(zip(packed, peek(packed), strict=True)) if packed else {}
    layers, coded = {}, {}
    for layer in existing.layers:
        shaped = replace(layer, shape=_shape(layer, shapes, specs, origin))
        _refuse(shaped, specs, origin)
        layers[f"{layer.module}.weight"] = shaped
        coded[f"{layer.module}.weight"] = _describe(existing, shaped, specs)
    transposed = frozenset(name for name in layers if existing.format == "bitsandbytes" and is_conv1d(config, name.removesuffix(".weight")))
    return Decoded(
        config=without_section(config),
        tensors=_float_specs(existing, layers, transposed, specs, dtype),
        coded=coded,
        layers=layers,
        transposed=transposed,
        cache=existing.cache,
        cache_scales={name: specs[name] for name in existing.cache_scales},
    )


def _existing(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec], side: Mapping[str, Any] | None, origin: str
) -> ExistingQuantization | None:
    foreign = next((name for name in specs if name.rpartition(".")[2] in _FOREIGN_CODES), None)
    section = config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    try:
        found = section_of(config, side)
    except FormatError as error:
        if not isinstance(method, str):
            raise
        module = (foreign or next(iter(specs), "")).rpartition(".")[0]
        raise SourceError(
            f"{origin}: already quantized ({method}), {module} for one, in a way that is not read here ({error}); "
            "convert the model it was made from"
        ) from None
    if found is not None:
        return read_quantization(config, specs, side)
    scale = next((name for name in specs if name.rpartition(".")[2] in _SCALES), None)
    if scale is not None or foreign is not None:
        raise SourceError(
            f"{origin}: {scale or foreign} goes with codes, but neither config.json nor {SIDE_FILE} says how they are quantized; "
            "restore its quantization_config"
        )
    return None


def _shape(layer: ExistingLayer, shapes: Mapping[str, bytes], specs: Mapping[str, TensorSpec], origin: str) -> tuple[int, int]:
    """(out, in) of a layer; of packed codes as ``weight_shape`` has it, for what they were rounded up to is all that a header says."""
    if not layer.packed:
        return layer.shape
    name = f"{layer.module}.weight_shape"
    if name not in shapes:
        return layer.shape
    width = DTYPES[specs[name].dtype].bits // 8
    raw = shapes[name]
    said = tuple(int.from_bytes(raw[i : i + width], "little") for i in range(0, len(raw), width))
    if len(said) != 2 or said[0] != layer.shape[0] or -(-said[1] // 4) * 4 != layer.shape[1]:
        raise SourceError(f"{origin}: {name} says {said}, its codes are those of {layer.shape}; the checkpoint is damaged")
    return said[0], said[1]


def _refuse(layer: ExistingLayer, specs: Mapping[str, TensorSpec], origin: str) -> None:
    """Raises :class:`SourceError` for what would be decoded to something else."""
    strange = [name for name in layer.others if name.rpartition(".")[2] not in _HARMLESS]
    if strange:
        raise _unreadable(origin, layer.module, f"{strange[0]} changes what its codes mean", 0)
    if layer.packed and layer.zero_point is not None:
        raise _unreadable(origin, layer.module, "packed zero points", 0)
    assert layer.weight is not None
    assert layer.scale is not None
    expected = layer.weight.tile.scale_shape(layer.shape)
    for name in (layer.scale, layer.zero_point):
        if name is not None and specs[name].elements != expected[0] * expected[1]:
            raise SourceError(
                f"{origin}: {name} has shape {list(specs[name].shape)}, where {layer.rule} needs {expected[0]} x {expected[1]} of them; "
                "convert the model it was made from"
            )


def _float_specs(
    existing: ExistingQuantization,
    layers: Mapping[str, ExistingLayer],
    transposed: frozenset[str],
    specs: Mapping[str, TensorSpec],
    dtype: str,
) -> dict[str, TensorSpec]:
    codes = {layer.codes: name for name, layer in layers.items()}
    beside = {
        name
        for layer in layers.values()
        for name in (layer.scale, layer.zero_point, layer.input_scale, layer.input_zero_point, *layer.others)
        if name
    } | set(existing.cache_scales)
    found = {}
    for name, spec in specs.items():
        if name in codes:
            weight = codes[name]
            shape = layers[weight].shape
            found[weight] = TensorSpec(weight, dtype, shape[::-1] if weight in transposed else shape)
        elif name not in beside:
            found[name] = spec
    return found


def _describe(existing: ExistingQuantization, layer: ExistingLayer, specs: Mapping[str, TensorSpec]) -> Coded:
    quantization = quantization_of(layer)
    assert layer.scale is not None
    return Coded(
        description=f"{existing.format} {DTYPES[quantization.grid.dtype].torch_name} {quantization.tile}",
        quantization=quantization,
        scale_dtype=specs[layer.scale].dtype,
        activation=layer.activation,
        input_scale=layer.input_scale if layer.input_zero_point is None else None,
    )


def _kept_dtype(config: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> str:
    """What a quantized model's weights were, and its activations are: what the config says, or most of its embeddings and norms are in."""
    said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    spelled = {DTYPES[name].torch_name: name for name in FLOATS}
    if said in spelled:
        return spelled[said]
    counted = Counter({name: sum(spec.elements for spec in specs.values() if spec.dtype == name) for name in FLOATS})
    return counted.most_common(1)[0][0] if counted.total() else "BF16"


def without_section(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says nothing of quantization, nor in the part that is about text."""
    text = config.get("text_config")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    return {**plain, "text_config": without_section(text)} if isinstance(text, Mapping) else plain


def _unreadable(origin: str, module: str, why: str, more: int) -> SourceError:
    others = f" (and {more} more)" if more else ""
    return SourceError(f"{origin}: {module}{others} is quantized in a way that is not read here: {why}; convert the model it was made from")
