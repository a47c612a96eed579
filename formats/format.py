"""What a module must have to be a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from formats.layer import Attention, Contents, LayerTensors
from formats.safetensors import TensorSpec
from formats.scheme import Scheme

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor


class Format(Protocol):
    """A format is a module of pure functions; :mod:`formats.compressed_tensors` shows what each of them means."""

    def refusal(self, scheme: Scheme, shape: tuple[int, int], *, transposed: bool) -> str | None: ...

    def layer_tensors(self, weight: TensorSpec, scheme: Scheme) -> LayerTensors: ...

    def encode(self, name: str, quantized: QTensor, scheme: Scheme) -> dict[str, torch.Tensor]: ...

    def constants(self, weight: TensorSpec, scheme: Scheme, input_absmax: float | None) -> dict[str, torch.Tensor]: ...

    def decode(self, weight: TensorSpec, tensors: Mapping[str, torch.Tensor], scheme: Scheme) -> QTensor: ...

    def cache_tensors(self, attention: Attention, cache: str, dtype: str) -> tuple[TensorSpec, TensorSpec] | None: ...

    def config(self, contents: Contents) -> dict[str, Any] | None: ...

    def metadata(self, tensors: Sequence[TensorSpec], contents: Contents) -> dict[str, str]: ...

    def side_files(self, contents: Contents) -> dict[str, bytes]: ...
