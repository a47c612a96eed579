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
    which further distributions it needs for each."""

    program: str
    formats: Mapping[str, tuple[str, ...]]
    needs: tuple[str, ...]


RUNTIMES = {
    "transformers": Runtime(
        "convert.runtimes.transformers",
        formats={"compressed-tensors": ("compressed-tensors",), "fp8": ("accelerate",), "torchao": ("torchao",)},
        needs=("transformers",),
    ),
    "bitsandbytes": Runtime("convert.runtimes.bitsandbytes", formats={"bitsandbytes": ("bitsandbytes",)}, needs=("transformers",)),
}
