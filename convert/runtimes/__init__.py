"""The programs that load an artifact as its user would; each runs in a process of its own.

A program takes a request and leaves an answer, both JSON (:mod:`convert.check` says what is in them), and imports nothing else
of this package, so that it can run under the interpreter of another virtual environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """``program`` is run as ``python -m``; ``needs`` are the distributions without which it does not run, ``formats`` what it loads, and
    which further distributions it needs for each. With ``environment`` it is run as a file, by the interpreter that
    :func:`convert.environments.require` finds; one in another language is named by its file.

    ``fuses``: layers that read the same input become one layer, so they must have one scheme. ``merges``: the schemes of experts that it
    can read where it holds all experts of a layer as one float tensor, as transformers does; None for a runtime that holds experts in
    8 bit itself. ``modes``: it is run once in each, and every check says in which. ``decoders_only``: it runs what predicts tokens, or its
    program here does. ``products_only``: of what a graph holds in 8 bit it tells the layers it multiplies with, not tables of embeddings.
    """

    program: str
    formats: Mapping[str, tuple[str, ...]]
    needs: tuple[str, ...]
    environment: bool = False
    fuses: bool = False
    merges: frozenset[str] | None = None
    modes: tuple[str, ...] = ("",)
    decoders_only: bool = False
    products_only: bool = False


#: Programs with a ``load`` whose model :mod:`convert.runtimes.harness` can put its tasks to.
HARNESSED = ("transformers", "bitsandbytes")

#: What ``CompressedTensorsDequantize`` of transformers 5.23 (``integrations/compressed_tensors.py``) takes apart, each seen to load:
#: FP8 with scales a channel, and packed INT8. Codes of other schemes end in its error "issues during automatic conversion".
_MERGED = frozenset(("fp8-dynamic", "fp8-weight-only", "int8-weight-only", *(f"int8-weight-only-g{size}" for size in (32, 64, 128))))


RUNTIMES = {
    "transformers": Runtime(
        "convert.runtimes.transformers",
        formats={"compressed-tensors": ("compressed-tensors",), "fp8": ("accelerate",), "torchao": ("torchao",)},
        needs=("transformers",),
        merges=_MERGED,
    ),
    "bitsandbytes": Runtime(
        "convert.runtimes.bitsandbytes", formats={"bitsandbytes": ("bitsandbytes",)}, needs=("transformers",), merges=frozenset()
    ),
    "onnxruntime": Runtime(
        "convert.runtimes.onnxruntime",
        formats={"onnx": (), "onnx-matmulnbits": ()},
        needs=("onnxruntime",),
        modes=("as exported", "as deployed"),
    ),
    "onnxruntime-gpu": Runtime(
        "convert.runtimes.onnxruntime", formats={"onnx": (), "onnx-matmulnbits": ()}, needs=(), environment=True, modes=("on CUDA",)
    ),
    "onnxruntime-genai": Runtime(
        "convert.runtimes.onnxruntime_genai", formats={"onnx": (), "onnx-matmulnbits": ()}, needs=(), environment=True, decoders_only=True
    ),
    "openvino": Runtime(
        "convert.runtimes.openvino",
        formats={"onnx": (), "onnx-matmulnbits": ()},
        needs=(),
        environment=True,
        decoders_only=True,
        products_only=True,
    ),
    "transformers.js": Runtime("transformers_js.cjs", formats={"onnx": (), "onnx-matmulnbits": ()}, needs=(), environment=True),
    "vllm": Runtime(
        "convert.runtimes.vllm", formats={"compressed-tensors": (), "fp8": (), "modelopt": ()}, needs=(), environment=True, fuses=True
    ),
}
