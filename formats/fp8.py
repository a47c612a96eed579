"""Fine-grained FP8 on disk: blocks of 128 x 128 as DeepSeek-V3 stores them, and transformers, vLLM and SGLang read them.

Names, shapes and config follow transformers 5.23 (``integrations/finegrained_fp8.py``: ``FP8Linear``, ``Fp8Dequantize``;
``FineGrainedFP8Config``) and vLLM 0.32 (``layers/quantization/fp8.py``):

====================  =======  ==========================================================
tensor                dtype    shape and meaning
====================  =======  ==========================================================
``weight``            F8_E4M3  (out, in)
``weight_scale_inv``  F32      (out / 128, in / 128): what codes are multiplied by, despite its name
====================  =======  ==========================================================

Scales hold what fits in the dtype of the model, so that these codes are those of the other formats. Activations are quantized by the
runtime, a scale for 128 neighbours of a token; transformers without a GPU dequantizes the weights while it loads, and computes in the
dtype of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formats.errors import FormatError
from formats.layer import Attention, Contents, LayerNames, LayerTensors
from formats.safetensors import TensorSpec
from formats.scheme import BLOCK_128, FP8_E4M3, Scheme
from formats.skips import skip_list

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor


def refusal(scheme: Scheme, shape: tuple[int, int], *, transposed: bool) -> str | None:
    """Why this format cannot hold a layer of this scheme and shape (out, in), or None. ``transposed``: the source stores (in, out).

    Where blocks do not fill a matrix, transformers takes the block for its rows divided by the scale's: it refuses, or multiplies by wrong
    scales without a word (192 rows become two blocks of 96).
    """
    if transposed:
        return "its weight is stored transposed (Conv1D), and readers of fp8 replace Linear modules only"
    if (scheme.weight.grid, scheme.weight.tile) != (FP8_E4M3, BLOCK_128):
        return "fp8 holds fp8-block only"
    rows, columns = shape
    if rows % 128 or columns % 128:
        return f"{rows} x {columns} is not made of whole blocks of 128 x 128, and transformers would multiply by wrong scales, or refuse"
    return None


def layer_tensors(weight: TensorSpec, scheme: Scheme) -> LayerTensors:
    """What a linear layer becomes on disk; ``weight`` is called ``<module>.weight``, (out, in)."""
    codes = TensorSpec(weight.name, scheme.weight.grid.dtype, weight.matrix_shape)
    return LayerTensors((codes, TensorSpec(_scale(weight.name), "F32", scheme.weight.tile.scale_shape(weight.matrix_shape))))


def encode(name: str, quantized: QTensor, scheme: Scheme) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """The codes and scales of a weight called ``name``, or of any run of its rows that ends where a block does."""
    return {name: quantized.values, _scale(name): quantized.scale.float()}


def constants(weight: TensorSpec, scheme: Scheme, input_absmax: float | None) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """What is written once a layer: nothing."""
    return {}


def decode(weight: TensorSpec, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The inverse of :func:`encode`, the scales in float32; ``weight`` has the shape of the rows that ``tensors`` are about."""
    from formats.qtensor import QTensor

    scale = tensors[_scale(weight.name)].reshape(scheme.weight.tile.scale_shape(weight.matrix_shape))
    return QTensor(tensors[weight.name], scale, scheme.weight)


def cache_tensors(attention: Attention, cache: str, dtype: str) -> None:  # noqa: ARG001
    """Nothing: transformers' reader has no scales for keys and values."""
    return


def config(contents: Contents) -> dict[str, Any] | None:
    """``quantization_config`` for ``config.json``. Every linear that was kept is named: without a list vLLM leaves none alone.

    Raises :class:`FormatError` for a quantized output head.
    """
    if not contents.layers:
        return None
    head = next((layer for layer in contents.layers if layer.head), None)
    if head is not None:
        raise FormatError(f"{head.module} is the output head, and vLLM finds no place for a head's scale in fp8; keep it with a rule")
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": skip_list([layer.module for layer in contents.layers], contents.kept),
    }


def metadata(tensors: Sequence[TensorSpec], contents: Contents) -> dict[str, str]:  # noqa: ARG001
    """``__metadata__`` of a file; transformers refuses one without it."""
    return {"format": "pt"}


def side_files(contents: Contents) -> dict[str, bytes]:  # noqa: ARG001
    """Files beside ``config.json`` that a reader wants: none."""
    return {}


def _scale(weight: str) -> str:
    return f"{LayerNames.of(weight).scale}_inv"
