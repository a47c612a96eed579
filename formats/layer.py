"""What layers have in common across formats: names beside a weight, and what the plan tells a format of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from formats.dtypes import DTYPES
from formats.safetensors import TensorSpec

if TYPE_CHECKING:
    import torch

    from formats.scheme import Scheme


@dataclass(frozen=True)
class LayerNames:
    """The names beside a weight ``<module>.weight``."""

    module: str
    scale: str

    @classmethod
    def of(cls, weight: str) -> LayerNames:
        """Of a weight tensor; raises ``ValueError`` when its name does not end in ``.weight``."""
        module, dot, last = weight.rpartition(".")
        if last != "weight":
            raise ValueError(f"{weight} is not the weight of a module")
        return cls(module, f"{module}{dot}weight_scale")


@dataclass(frozen=True)
class LayerTensors:
    """What a linear layer becomes on disk: tensors whose first axis follows the rows of the weight (or their tiles), tensors
    that are written once, whatever the codes, and those whose last axis follows the rows."""

    rows: tuple[TensorSpec, ...]
    once: tuple[TensorSpec, ...] = ()
    columns: tuple[TensorSpec, ...] = ()

    def __iter__(self) -> Iterator[TensorSpec]:
        yield from self.columns
        yield from self.rows
        yield from self.once


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized linear layer of an artifact: the runtime's module, its scheme's name, ``shape`` (out, in), and whether it is the
    output head. ``stored``: what its tensors are called on disk, where that is not the module. ``experts``: of an expert, what the name of
    every expert of its layer begins with; no module of transformers has such a name."""

    module: str
    scheme: str
    shape: tuple[int, int]
    head: bool = False
    stored: str = ""
    experts: str = ""


@dataclass(frozen=True)
class Attention:
    """An attention layer: its module, the index under which it writes to the cache, and how many heads of keys it keeps there."""

    module: str
    layer: int
    heads: int


@dataclass(frozen=True)
class Contents:
    """What a format must know of a whole artifact to describe it.

    ``kept``: modules of linear layers that stay in ``dtype`` (a safetensors name), routers too, under every name they have;
    ``kept_experts``: what the names of experts begin with that stay in it. ``cache``: a name of
    :data:`~formats.scheme.CACHES`, for ``attentions``. ``replaceable``: modules that readers of bitsandbytes may replace by 8-bit ones,
    None where that is not known; ``skipped``: patterns they leave alone unless told which. ``options``: what only this format can say.
    """

    layers: Sequence[QuantizedLayer]
    kept: Sequence[str]
    dtype: str
    cache: str | None = None
    attentions: Sequence[Attention] = ()
    replaceable: frozenset[str] | None = None
    skipped: Sequence[str] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    kept_experts: Sequence[str] = ()


def static_scale(scheme: Scheme, input_absmax: float | None, dtype: str) -> torch.Tensor:
    """(): what the codes of a static input are multiplied by, rounded to ``dtype`` (a safetensors name), which readers will do.
    ``input_absmax``: the largest magnitude that calibration saw come in."""
    import torch

    assert scheme.activation is not None
    assert input_absmax is not None
    # In float64, so that a scale that was multiplied by the largest code comes back as it was.
    scale = torch.tensor(input_absmax, dtype=torch.float64) / scheme.activation.grid.high
    return scale.to(getattr(torch, DTYPES[dtype].torch_name))
