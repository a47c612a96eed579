"""compressed-tensors on disk: the form transformers, vLLM and SGLang read.

Names, shapes and arguments follow compressed-tensors 0.20 (``compressors/*``, ``quantization/quant_args.py``,
``quantization/quant_config.py``, ``quantization/quant_scheme.py``) and were loaded in transformers 5.23:

=============================  ====================  ===============================================================
schemes                        ``format``            tensors of a layer, beside ``weight`` in the dtype of the codes
=============================  ====================  ===============================================================
int8-dynamic[-asymmetric]      ``int-quantized``     ``weight_scale`` (out, 1)
int8-static                    ``int-quantized``     the same, ``input_scale`` (1)
int8-weight-only[-g*]          ``pack-quantized``    ``weight_packed`` I32 (out, in / 4) in its stead, ``weight_scale``
                                                     (out, groups), ``weight_shape`` I64 (2)
fp8-dynamic, fp8-weight-only   ``float-quantized``   ``weight_scale`` (out, 1)
fp8-static                     ``float-quantized``   ``weight_scale`` (1), ``input_scale`` (1)
fp8-block                      ``float-quantized``   ``weight_scale`` (out / 128, in / 128)
mxfp8                          ``mxfp8-quantized``   ``weight_scale`` U8 exponents (out, in / 32)
=============================  ====================  ===============================================================

Keys and values in FP8 add ``k_scale`` and ``v_scale`` to the attention: (1), or (heads, 1, 1). Other scales are stored in the dtype of
the model, which transformers casts them to at load anyway; they multiply. A symmetric scheme stores no zero point (vLLM refuses one).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formats.layer import Attention, Contents, LayerNames, LayerTensors, QuantizedLayer, static_scale
from formats.safetensors import TensorSpec
from formats.scheme import BLOCK_128, CACHES, PER_TENSOR, SCHEMES, Quantization, Scheme

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor

#: Codes in one element of ``weight_packed``.
_PACKED = 4


def refusal(scheme: Scheme, shape: tuple[int, int], *, transposed: bool) -> str | None:
    """Why this format cannot hold a layer of this scheme and shape (out, in), or None. ``transposed``: the source stores (in, out)."""
    if transposed:
        return (
            "its weight is stored transposed (Conv1D), and readers of compressed-tensors take codes of Linear modules only; "
            "bitsandbytes holds it (scheme llm-int8), or keep it with a rule"
        )
    if scheme.lookup:
        return "compressed-tensors has codes of Linear modules only; ONNX graphs look rows up among codes"
    if scheme.weight.scale == "F32":
        return "compressed-tensors keeps scales in the dtype of the model"
    if scheme.weight.scale == "absmax":
        return "compressed-tensors knows no LLM.int8(); int8-dynamic is the scheme nearest to it"
    rows, columns = shape
    tile = scheme.weight.tile
    if tile == BLOCK_128 and (rows % 128 or columns % 128):
        return f"{rows} x {columns} is not made of whole blocks of 128 x 128, and its readers refuse the rest of a block"
    if tile.rows == 1 and tile.columns is not None and columns % tile.columns:
        return f"its {columns} input features are no multiple of {tile.columns}, and its readers know no shorter group"
    return None


def layer_tensors(weight: TensorSpec, scheme: Scheme) -> LayerTensors:
    """What a linear layer becomes on disk; ``weight`` is called ``<module>.weight``, (out, in), in the dtype of the model."""
    names = LayerNames.of(weight.name)
    rows, columns = weight.matrix_shape
    tile = scheme.weight.tile
    scale_shape: tuple[int, ...] = (1,) if tile == PER_TENSOR else tile.scale_shape((rows, columns))
    scale = TensorSpec(names.scale, "U8" if scheme.weight.scale == "F8_E8M0" else weight.dtype, scale_shape)
    if _is_packed(scheme):
        packed = TensorSpec(f"{weight.name}_packed", "I32", (rows, -(-columns // _PACKED)))
        return LayerTensors((packed, scale), (TensorSpec(f"{weight.name}_shape", "I64", (2,)),))
    codes = TensorSpec(weight.name, scheme.weight.grid.dtype, (rows, columns))
    once = (TensorSpec(f"{names.module}.input_scale", weight.dtype, (1,)),) if scheme.static else ()
    return LayerTensors((codes, scale), once)


def encode(name: str, quantized: QTensor, scheme: Scheme) -> dict[str, torch.Tensor]:
    """The codes and scales of a weight called ``name``, or of any run of its rows that ends where a tile does: of :func:`layer_tensors`
    the ``rows``."""
    import torch

    scale = quantized.scale
    if scale.dtype == torch.float8_e8m0fnu:
        scale = scale.view(torch.uint8)
    if quantized.quantization.tile == PER_TENSOR:
        scale = scale.reshape(1)
    codes = {f"{name}_packed": _pack(quantized.values)} if _is_packed(scheme) else {name: quantized.values}
    return {**codes, LayerNames.of(name).scale: scale}


def constants(weight: TensorSpec, scheme: Scheme, input_absmax: float | None) -> dict[str, torch.Tensor]:
    """The tensors that are written once a layer. ``input_absmax``: the largest magnitude calibration saw come in, for a static scheme."""
    import torch

    if _is_packed(scheme):
        return {f"{weight.name}_shape": torch.tensor(weight.matrix_shape)}
    if not scheme.static:
        return {}
    return {f"{LayerNames.of(weight.name).module}.input_scale": static_scale(scheme, input_absmax, weight.dtype).reshape(1)}


def decode(weight: TensorSpec, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The inverse of :func:`encode`, from what lies on disk; ``weight`` has the shape of the rows that ``tensors`` are about."""
    import torch

    from formats.qtensor import QTensor

    rows, columns = weight.matrix_shape
    values = _unpack(tensors[f"{weight.name}_packed"], columns) if _is_packed(scheme) else tensors[weight.name]
    scale = tensors[LayerNames.of(weight.name).scale]
    if scheme.weight.scale == "F8_E8M0":
        scale = scale.view(torch.float8_e8m0fnu)
    return QTensor(values, scale.reshape(scheme.weight.tile.scale_shape((rows, columns))), scheme.weight)


def cache_tensors(attention: Attention, cache: str, dtype: str) -> tuple[TensorSpec, TensorSpec] | None:
    """The scales of an attention's keys and values, in this order. vLLM applies them to keys after the rotary embedding."""
    shape: tuple[int, ...] = (1,) if CACHES[cache].tile == PER_TENSOR else (attention.heads, 1, 1)
    return TensorSpec(f"{attention.module}.k_scale", dtype, shape), TensorSpec(f"{attention.module}.v_scale", dtype, shape)


def config(contents: Contents) -> dict[str, Any] | None:
    """``quantization_config`` for ``config.json``: one group a scheme, every linear that was kept named in ``ignore``.

    ``quantization_status`` must say ``compressed``: without it transformers 5 loads codes as weights and says nothing.
    A tied head must be among the kept, or transformers serves NaN.
    """
    layers = contents.layers
    names = list(dict.fromkeys(layer.scheme for layer in layers))
    groups = {}
    for i, name in enumerate(names):
        scheme = SCHEMES[name]
        # Experts by what they have in common: transformers finds their scheme by such a pattern, and vLLM asks for them under other
        # names than Mixtral's; and there may be thousands.
        modules = dict.fromkeys(target for layer in layers if layer.scheme == name for target in _names(layer))
        # vLLM's head is a ParallelLMHead, which "Linear" does not name.
        everywhere = ["Linear", *(target for layer in layers if layer.head for target in _names(layer))]
        groups[f"group_{i}"] = {
            "targets": everywhere if len(names) == 1 else list(modules),
            "weights": _arguments(scheme.weight),
            "input_activations": None if scheme.activation is None else _arguments(scheme.activation, activation=True),
            "output_activations": None,
            "format": _format(scheme),
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": "dense" if not formats else formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*contents.kept, *(_inside(experts) for experts in contents.kept_experts)],
        "kv_cache_scheme": None if contents.cache is None else _cache_arguments(CACHES[contents.cache]),
    }


def metadata(tensors: Sequence[TensorSpec], contents: Contents) -> dict[str, str]:  # noqa: ARG001
    """``__metadata__`` of a file; transformers refuses one without it."""
    return {"format": "pt"}


def side_files(contents: Contents) -> dict[str, bytes]:  # noqa: ARG001
    """Files beside ``config.json`` that a reader wants: none."""
    return {}


def _names(layer: QuantizedLayer) -> tuple[str, ...]:
    if layer.experts:
        return (_inside(layer.experts),)
    return (layer.module, layer.stored) if layer.stored not in ("", layer.module) else (layer.module,)


def _inside(module: str) -> str:
    return f"re:{re.escape(module)}\\..+"


def _is_packed(scheme: Scheme) -> bool:
    """INT8 codes without INT8 activations: vLLM reads them packed only (``compressed_tensors_wNa16.py``)."""
    return scheme.activation is None and scheme.weight.grid.kind == "int"


def _format(scheme: Scheme) -> str:
    if scheme.weight.scale == "F8_E8M0":
        return "mxfp8-quantized"
    return "pack-quantized" if _is_packed(scheme) else f"{scheme.weight.grid.kind}-quantized"


def _arguments(quantization: Quantization, *, activation: bool = False) -> dict[str, Any]:
    tile = quantization.tile
    arguments = {
        "num_bits": 8,
        "type": quantization.grid.kind,
        "symmetric": quantization.symmetric,
        "dynamic": quantization.dynamic,
    }
    if tile == PER_TENSOR:
        return {**arguments, "strategy": "tensor"}
    if tile.columns is None:
        return {**arguments, "strategy": "token" if activation else "channel"}
    if tile.rows != 1:
        return {**arguments, "strategy": "block", "block_structure": [tile.rows, tile.columns]}
    exponents = {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"} if quantization.scale == "F8_E8M0" else {}
    return {**arguments, "strategy": "group", "group_size": tile.columns, **exponents}


def _cache_arguments(quantization: Quantization) -> dict[str, Any]:
    return {**_arguments(quantization), "strategy": "tensor" if quantization.tile == PER_TENSOR else "attn_head"}


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """(out, in) int8 -> (out, in / 4) int32: code + 128 in the j-th byte, little-endian (``pack_quantized/helpers.py``)."""
    import torch

    rest = -codes.shape[1] % _PACKED
    unsigned = (codes.to(torch.int16) + 128).to(torch.uint8)
    if rest:
        unsigned = torch.nn.functional.pad(unsigned, (0, rest))
    return unsigned.contiguous().view(torch.int32)


def _unpack(packed: torch.Tensor, columns: int) -> torch.Tensor:
    import torch

    return (packed.contiguous().view(torch.uint8)[:, :columns].to(torch.int16) - 128).to(torch.int8)
