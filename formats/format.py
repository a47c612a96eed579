"""What a module must have to be a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from formats.layer import QuantizedLayer
from formats.safetensors import TensorSpec
from formats.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor


class Format(Protocol):
    """A format is a module of pure functions; :mod:`formats.compressed_tensors` shows what each of them means."""

    @property
    def METADATA(self) -> Mapping[str, str]: ...  # noqa: N802  a constant of the module

    def refusal(self, scheme: Scheme, *, transposed: bool) -> str | None: ...

    def layer_tensors(self, weight: TensorSpec, scheme: Scheme) -> tuple[TensorSpec, ...]: ...

    def encode(self, name: str, quantized: QTensor) -> dict[str, torch.Tensor]: ...

    def decode(self, name: str, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor: ...

    def config(self, layers: Sequence[QuantizedLayer], kept_linears: Sequence[str]) -> dict[str, Any]: ...
