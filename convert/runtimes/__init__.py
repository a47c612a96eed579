"""The programs that load an artifact as its user would; each runs in a process of its own.

A program takes a request and leaves an answer, both JSON (:mod:`convert.check` says what is in them), and imports nothing else
of this package, so that it can run under the interpreter of another virtual environment.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """``program`` is run as ``python -m``; ``needs`` are the distributions without which it cannot load ``formats``. With ``environment``
    it is run as a file, by the interpreter that :func:`convert.environments.require` finds.

    ``fuses``: layers that read the same input become one layer, so they must have one scheme. ``merges``: the schemes of experts that it
    can read where it holds all experts of a layer as one float tensor, as transformers does; None for a runtime that holds experts in
    8 bit itself.
    """

    program: str
    formats: tuple[str, ...]
    needs: tuple[str, ...]
    environment: bool = False
    fuses: bool = False
    merges: frozenset[str] | None = None


#: What ``CompressedTensorsDequantize`` of transformers 5.23 (``integrations/compressed_tensors.py``) takes apart, each seen to load:
#: FP8 with scales a channel, and packed INT8. Codes of other schemes end in its error "issues during automatic conversion".
_MERGED = frozenset(("fp8-dynamic", "fp8-weight-only", "int8-weight-only", *(f"int8-weight-only-g{size}" for size in (32, 64, 128))))


RUNTIMES = {
    "transformers": Runtime(
        "convert.runtimes.transformers", formats=("compressed-tensors",), needs=("transformers", "compressed-tensors"), merges=_MERGED
    ),
    "bitsandbytes": Runtime(
        "convert.runtimes.bitsandbytes", formats=("bitsandbytes",), needs=("transformers", "bitsandbytes"), merges=frozenset()
    ),
    "vllm": Runtime("convert.runtimes.vllm", formats=("compressed-tensors",), needs=(), environment=True, fuses=True),
}
