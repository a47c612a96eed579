"""bitsandbytes on disk: LLM.int8() as transformers saves and loads it.

Names, shapes, dtypes and config are those of ``save_pretrained`` in transformers 5.23 (``integrations/bitsandbytes.py``,
``quantizers/quantizer_bnb_8bit.py``) with bitsandbytes 0.50 (``nn/modules.py``: ``Linear8bitLt._save_to_state_dict``):

=================  =====  =============================================================
tensor             dtype  shape and meaning
=================  =====  =============================================================
``weight``         I8     (out, in), a Conv1D's too, which its source stores (in, out)
``SCB``            F32    (out,): the largest magnitude of each row, not divided by 127
``weight_format``  U8     (): 0, for rows; the only one that is accepted
=================  =====  =============================================================

Everything else is stored in the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from formats.errors import FormatError
from formats.layer import Attention, Contents, LayerNames, LayerTensors
from formats.safetensors import TensorSpec
from formats.scheme import Scheme
from formats.skips import skip_list

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor

#: Activations of at least this magnitude are multiplied in 16 bit (LLM.int8(), arXiv:2208.07339, section 3.2); only readers use it.
THRESHOLD = 6.0


def refusal(scheme: Scheme, shape: tuple[int, int], *, transposed: bool) -> str | None:  # noqa: ARG001
    """Why this format cannot hold a layer of this scheme and shape (out, in), or None; it holds any shape, and Conv1D too."""
    return None if scheme.weight.scale == "absmax" else "bitsandbytes holds llm-int8 only"


def layer_tensors(weight: TensorSpec, scheme: Scheme) -> LayerTensors:
    """What a linear layer becomes on disk; ``weight`` is called ``<module>.weight``, (out, in)."""
    names = _names(weight.name)
    rows, columns = weight.matrix_shape
    codes = TensorSpec(weight.name, scheme.weight.grid.dtype, (rows, columns))
    return LayerTensors((codes, TensorSpec(names[0], "F32", (rows,))), (TensorSpec(names[1], "U8", ()),))


def encode(name: str, quantized: QTensor, scheme: Scheme) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """The codes and largest magnitudes of a weight called ``name``, or of any run of its rows."""
    return {name: quantized.values, _names(name)[0]: quantized.scale.reshape(-1)}


def constants(weight: TensorSpec, scheme: Scheme, input_absmax: float | None) -> dict[str, torch.Tensor]:  # noqa: ARG001
    """``weight_format``: rows."""
    import torch

    return {_names(weight.name)[1]: torch.tensor(0, dtype=torch.uint8)}


def decode(weight: TensorSpec, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor:
    """The inverse of :func:`encode`."""
    from formats.qtensor import QTensor

    return QTensor(tensors[weight.name], tensors[_names(weight.name)[0]].reshape(-1, 1), scheme.weight)


def cache_tensors(attention: Attention, cache: str, dtype: str) -> None:  # noqa: ARG001
    """Nothing: bitsandbytes has no scales for keys and values."""
    return


def config(contents: Contents) -> dict[str, Any] | None:
    """``quantization_config`` for ``config.json``. Raises :class:`FormatError` for a layer that readers would not replace."""
    if not contents.layers:
        return None
    for layer in contents.layers:
        if contents.replaceable is not None and layer.module not in contents.replaceable:
            raise FormatError(
                f"{layer.module} is no torch.nn.Linear or Conv1D in transformers, "
                "and bitsandbytes replaces no other class; keep it with a rule"
            )
    kept = [module for module in contents.kept if contents.replaceable is None or module in contents.replaceable]
    skipped = skip_list([layer.module for layer in contents.layers], kept, contents.skipped)
    return quantization_config(skipped, **contents.options)


def metadata(tensors: Sequence[TensorSpec], contents: Contents) -> dict[str, str]:  # noqa: ARG001
    """``__metadata__`` of a file; transformers refuses one without it."""
    return {"format": "pt"}


def side_files(contents: Contents) -> dict[str, bytes]:  # noqa: ARG001
    """Files beside ``config.json`` that a reader wants: none."""
    return {}


def quantization_config(skipped: Sequence[str] | None, *, llm_int8_threshold: float = THRESHOLD) -> dict[str, Any]:
    """``quantization_config`` as ``BitsAndBytesConfig.to_dict`` spells it, key for key."""
    return {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": False,
        "_load_in_8bit": True,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None if skipped is None else list(skipped),
        "llm_int8_threshold": llm_int8_threshold,
        "load_in_4bit": False,
        "load_in_8bit": True,
    }


def _names(weight: str) -> tuple[str, str]:
    module = LayerNames.of(weight).module
    dot = "." if module else ""
    return f"{module}{dot}SCB", f"{module}{dot}weight_format"
