"""The programs that load an artifact as its user would; each runs in a process of its own.

A program takes a request and leaves an answer, both JSON (:mod:`convert.check` says what is in them), and imports nothing else
of this package, so that it can run under the interpreter of another virtual environment.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Runtime:
    """``program`` is run as ``python -m``; ``needs`` are the distributions without which it cannot load ``formats``. With ``environment``
    it is run as a file, by the interpreter that :func:`convert.environments.require` finds."""

    program: str
    formats: tuple[str, ...]
    needs: tuple[str, ...]
    environment: bool = False


RUNTIMES = {
    "transformers": Runtime("convert.runtimes.transformers", formats=("compressed-tensors",), needs=("transformers", "compressed-tensors")),
    "bitsandbytes": Runtime("convert.runtimes.bitsandbytes", formats=("bitsandbytes",), needs=("transformers", "bitsandbytes")),
    "vllm": Runtime("convert.runtimes.vllm", formats=("compressed-tensors",), needs=(), environment=True),
}
