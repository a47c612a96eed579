"""What a plan says of a graph and its tensors before there is one: records, so that a plan without graphs needs nothing that makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from formats.onnx_graph import PAIR
from formats.scheme import Scheme

#: What an encoder-decoder's graphs are called, beside :data:`WHOLE`, which any other model's is.
WHOLE, (ENCODER, DECODER) = "model", PAIR


@dataclass(frozen=True)
class Stored:
    """A parameter of the model as it lies on disk: ``name`` of its tensor, (in, out) of a linear layer; ``scheme`` of codes, whose scales
    are called ``scale`` and ``input_scale``. With ``block_size`` they lie as MatMulNBits reads them, of ``columns`` input features.
    ``transposed``: of one without a scheme, that it lies (in, out) and the source has it (out, in)."""

    name: str
    scheme: Scheme | None = None
    scale: str = ""
    input_scale: str = ""
    block_size: int = 0
    columns: int = 0
    transposed: bool = False


@dataclass(frozen=True)
class Placed:
    """A tensor of the checkpoint as it lies on disk. ``product``: as a linear layer multiplies with it; ``plain``: as everything else reads
    it, None where it is there as codes alone. ``columns``: the checkpoint has it as (in, out)."""

    product: Stored
    plain: Stored | None
    columns: bool = False


@dataclass(frozen=True)
class Traced:
    """``graph``: an onnx.proto3 model without weights, in which a parameter is an input of the name that the model has for it.
    ``parameters``: of each that the graph computes with, the tensor of the checkpoint that it is. ``dtype``: F32 or F16, of its floats.
    ``name``: what its file is called."""

    graph: bytes
    parameters: Mapping[str, str]
    dtype: str
    name: str = WHOLE

    @property
    def tensors(self) -> frozenset[str]:
        """The checkpoint's tensors that the graph computes with."""
        return frozenset(self.parameters.values())
