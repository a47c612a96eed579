"""How codes are chosen: plain functions (weight, scheme) -> QTensor, one module an algorithm.

The modules import torch and are loaded when they are used, so that a recipe can be read without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor
    from formats.scheme import Quantization


@dataclass(frozen=True)
class Algorithm:
    """``module`` holds ``quantize``. ``calibrated``: it needs statistics of activations. ``row_wise``: rows do not see each other."""

    module: str
    calibrated: bool
    row_wise: bool

    @property
    def quantize(self) -> Callable[..., QTensor]:
        """``quantize(weight, quantization, *, scale_dtype) -> QTensor``, weight (out, in)."""
        from importlib import import_module

        function: Callable[[torch.Tensor, Quantization], QTensor] = import_module(self.module).quantize
        return function


ALGORITHMS = {
    "rtn": Algorithm("convert.algorithms.rtn", calibrated=False, row_wise=True),
    "gptq": Algorithm("convert.algorithms.gptq", calibrated=True, row_wise=False),
}

#: What changes weights, together with what comes before them, so that they are easier to quantize; codes are chosen afterwards.
TRANSFORMS = ("smoothquant", "awq")

#: What makes up for codes that were chosen.
CORRECTIONS = ("bias_correction", "recover")
