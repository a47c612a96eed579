"""compressed-tensors on disk: the form transformers, vLLM and SGLang read.

Names, shapes and arguments follow compressed-tensors 0.20 (``compressors/*``, ``quantization/quant_args.py``,
``quantization/quant_config.py``) and were loaded in transformers 5.23 and vLLM 0.32:

==================  =======================================  ==========================
scheme              ``format``                               tensors of a layer
==================  =======================================  ==========================
int8-dynamic        ``int-quantized``                        ``weight`` I8 (out, in), ``weight_scale`` (out, 1)
fp8-dynamic         ``float-quantized``                      ``weight`` F8_E4M3 (out, in), ``weight_scale`` (out, 1)
==================  =======================================  ==========================

Scales are stored in the dtype of the model, which transformers casts them to at load anyway; they multiply. A symmetric scheme
stores no zero point (vLLM refuses one).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formats.layer import LayerNames, QuantizedLayer
from formats.safetensors import TensorSpec
from formats.scheme import PER_CHANNEL, SCHEMES, Quantization, Scheme

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor

#: ``__metadata__`` of every file; transformers refuses one without it.
METADATA = {"format": "pt"}

_FORMATS = {"int": "int-quantized", "float": "float-quantized"}


def refusal(scheme: Scheme, *, transposed: bool) -> str | None:
    """Why this format cannot hold a layer of this scheme, or None. ``transposed``: the source stores (in, out)."""
    if transposed:
        return "its weight is stored transposed (Conv1D), and readers of compressed-tensors replace Linear modules only"
    if scheme.weight.tile != PER_CHANNEL or not scheme.weight.symmetric:
        return f"{scheme.name} has no spelling in compressed-tensors here"
    return None


def layer_tensors(weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """What a linear layer becomes on disk; ``weight`` is the source's (out, in) in the dtype of the model."""
    names = LayerNames.of(weight.name)
    rows, columns = weight.shape
    return (
        TensorSpec(weight.name, scheme.weight.grid.dtype, (rows, columns)),
        TensorSpec(names.scale, weight.dtype, scheme.weight.tile.scale_shape((rows, columns))),
    )


def encode(name: str, quantized: QTensor) -> dict[str, torch.Tensor]:
    """The tensors of :func:`layer_tensors` for a weight called ``name``, or for any run of its rows."""
    return {name: quantized.values, LayerNames.of(name).scale: quantized.scale}


def decode(name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The inverse of :func:`encode`, from what lies on disk."""
    from formats.qtensor import QTensor

    return QTensor(tensors[name], tensors[LayerNames.of(name).scale], scheme.weight)


def config(layers: Sequence[QuantizedLayer], kept_linears: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` for ``config.json``: one group a scheme, every linear that was kept named in ``ignore``.

    ``quantization_status`` must say ``compressed``: without it transformers 5 loads codes as weights and says nothing.
    A tied head must be in ``kept_linears``, or transformers serves NaN.
    """
    names = list(dict.fromkeys(layer.scheme for layer in layers))
    groups = {}
    for i, name in enumerate(names):
        scheme = SCHEMES[name]
        modules = [layer.module for layer in layers if layer.scheme == name]
        # vLLM's head is a ParallelLMHead, which "Linear" does not name.
        everywhere = ["Linear", *(layer.module for layer in layers if layer.head)]
        groups[f"group_{i}"] = {
            "targets": everywhere if len(names) == 1 else modules,
            "weights": _arguments(scheme.weight),
            "input_activations": None if scheme.activation is None else _arguments(scheme.activation, activation=True),
            "output_activations": None,
            "format": _FORMATS[scheme.weight.grid.kind],
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": list(kept_linears),
        "kv_cache_scheme": None,
    }


def _arguments(quantization: Quantization, *, activation: bool = False) -> dict[str, Any]:
    strategies = {PER_CHANNEL: "token" if activation else "channel"}
    return {
        "num_bits": 8,
        "type": quantization.grid.kind,
        "symmetric": quantization.symmetric,
        "strategy": strategies[quantization.tile],
        "dynamic": quantization.dynamic,
    }
