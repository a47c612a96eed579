"""NVIDIA ModelOpt on disk: FP8 with one scale a tensor, as vLLM and TensorRT-LLM read it.

Names, shapes and configs follow what vLLM 0.32 reads (``layers/quantization/modelopt.py``; ``maybe_remap_kv_scale_name`` in
``model_loader/weight_utils.py``) and ModelOpt's own export, which writes the config twice: ``quantization_config`` for newer
readers, ``hf_quant_config.json`` for older ones and TensorRT-LLM.

==========================  =======  ==========================================================
tensor                      dtype    shape and meaning
==========================  =======  ==========================================================
``weight``                  F8_E4M3  (out, in)
``weight_scale``            F32      (): what codes are multiplied by
``input_scale``             F32      (): of the layer's input
``k_proj.k_scale``          F32      (): of the keys, after the rotary embedding
``v_proj.v_scale``          F32      (): of the values
==========================  =======  ==========================================================

Scales hold what fits in the dtype of the model, so that these codes are those of the other formats. transformers has no reader: it
takes codes for weights without a word. vLLM gives layers that it fuses (q, k, v; gate, up) the largest of their scales and
rounds their codes anew, which costs a second rounding; a scale a channel (FP8 in compressed-tensors) does not have that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formats.errors import FormatError
from formats.existing import SIDE_FILE, excludes
from formats.layer import Attention, Contents, LayerNames, LayerTensors, static_scale
from formats.safetensors import TensorSpec, json_bytes
from formats.scheme import CACHES, FP8_E4M3, PER_TENSOR, Scheme

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor


def refusal(scheme: Scheme, shape: tuple[int, int], *, transposed: bool) -> str | None:  # noqa: ARG001
    """Why this format cannot hold a layer of this scheme and shape (out, in), or None. ``transposed``: the source stores (in, out)."""
    if transposed:
        return "its weight is stored transposed (Conv1D), and readers of ModelOpt replace Linear modules only"
    if (scheme.weight.grid, scheme.weight.tile, scheme.static) != (FP8_E4M3, PER_TENSOR, True):
        return "modelopt holds fp8-static only"
    return None


def layer_tensors(weight: TensorSpec, scheme: Scheme) -> LayerTensors:
    """What a linear layer becomes on disk; ``weight`` is called ``<module>.weight``, (out, in)."""
    names = LayerNames.of(weight.name)
    codes = TensorSpec(weight.name, scheme.weight.grid.dtype, weight.matrix_shape)
    return LayerTensors((codes, TensorSpec(names.scale, "F32", ())), (TensorSpec(f"{names.module}.input_scale", "F32", ()),))


def encode(name: str, quantized: QTensor, scheme: Scheme) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """The codes and the scale of a whole weight called ``name``."""
    return {name: quantized.values, LayerNames.of(name).scale: quantized.scale.float().reshape(())}


def constants(weight: TensorSpec, scheme: Scheme, input_absmax: float | None) -> dict[str, torch.Tensor]:
    """``input_scale``; ``input_absmax``: the largest magnitude calibration saw come in."""
    return {f"{LayerNames.of(weight.name).module}.input_scale": static_scale(scheme, input_absmax, weight.dtype).float()}


def decode(weight: TensorSpec, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The inverse of :func:`encode`, the scale in float32."""
    from formats.qtensor import QTensor

    return QTensor(tensors[weight.name], tensors[LayerNames.of(weight.name).scale].reshape(1, 1), scheme.weight)


def cache_tensors(attention: Attention, cache: str, dtype: str) -> tuple[TensorSpec, TensorSpec] | None:  # noqa: ARG001
    """The scales of an attention's keys and values, in this order; None for one a head, of which ModelOpt knows nothing."""
    if CACHES[cache].tile != PER_TENSOR:
        return None
    return TensorSpec(f"{attention.module}.k_proj.k_scale", "F32", ()), TensorSpec(f"{attention.module}.v_proj.v_scale", "F32", ())


def config(contents: Contents) -> dict[str, Any] | None:
    """``quantization_config`` for ``config.json``.

    Raises :class:`FormatError` where nothing is quantized but the cache, or where a kept module's name is part of a quantized one's:
    vLLM would leave both alone.
    """
    if not contents.layers:
        raise FormatError("modelopt cannot say that only keys and values are quantized; quantize a layer, or use compressed-tensors")
    for layer in contents.layers:
        caught = next((name for name in contents.kept if excludes(layer.module, [name])), None)
        if caught is not None:
            raise FormatError(f"{layer.module} cannot be quantized where {caught} is kept: readers of modelopt would leave both alone")
    return {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "kv_cache_scheme": None if contents.cache is None else {"num_bits": 8, "type": "float", "dynamic": False},
        "ignore": list(contents.kept),
    }


def metadata(tensors: Sequence[TensorSpec], contents: Contents) -> dict[str, str]:  # noqa: ARG001
    """``__metadata__`` of a file; transformers refuses one without it."""
    return {"format": "pt"}


def side_files(contents: Contents) -> dict[str, bytes]:
    """``hf_quant_config.json``, which says the same as :func:`config`."""
    if not contents.layers:
        return {}
    quantization = {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None if contents.cache is None else "FP8",
        "exclude_modules": list(contents.kept),
    }
    # vLLM takes the file for ModelOpt's by its producer (model_loader/weight_utils.py).
    return {SIDE_FILE: json_bytes({"producer": {"name": "modelopt"}, "quantization": quantization})}
