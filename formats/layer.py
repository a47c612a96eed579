"""Names that quantized layers have in common across formats."""

from __future__ import annotations

from dataclasses import dataclass


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
class QuantizedLayer:
    """One quantized linear layer of an artifact: the runtime's module, its scheme's name, and whether it is the output head."""

    module: str
    scheme: str
    head: bool = False
