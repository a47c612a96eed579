"""Products of INT8 codes on a CPU that has instructions for them (VNNI, AMX), by oneDNN: four times the speed of float32 or more."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Inputs of a product whose sums int32 is sure to hold, of codes up to 255 and 127.
MOST_INPUTS = 1 << 16
#: Added to a float32 below 2**22 in magnitude it rounds that to an integer, half to even, and has it in its last bits, two's complement.
_INTEGERS = 1.5 * 2**23


def pays(device: str) -> bool:
    """Whether products in INT8 are the faster ones."""
    return device == "cpu" and _multiplies_codes()


@cache
def _multiplies_codes() -> bool:
    """Older CPUs add pairs of products in 16 bits, and cut these off."""
    import torch

    from convert.hardware import cpu_tag, instructions

    return cpu_tag(instructions()) != "cpu" and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Packed:
    """A weight (out, in): ``codes``, int8 as oneDNN packs it, times ``scale`` (out,) float32."""

    codes: torch.Tensor
    scale: torch.Tensor
    zeros: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, scale: torch.Tensor) -> Packed:
        """Of ``values`` (out, in) int8 and ``scale`` (out, 1)."""
        import torch

        # What lies the other way in memory it would pack as if it did not.
        codes = torch.ops.onednn.qlinear_prepack.default(values.contiguous(), None)
        return cls(codes, scale[:, 0].float().contiguous(), torch.zeros(len(values), dtype=torch.int64))

    def product(self, codes: torch.Tensor) -> torch.Tensor:
        """(tokens, out) float32: of ``codes`` (tokens, in), uint8 with zero at 128, times the weight; summed exactly."""
        import torch

        product: torch.Tensor = torch.ops.onednn.qlinear_pointwise.default(
            codes, 1.0, 128, self.codes, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product


def largest(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each row of x (..., in), (..., 1). A temporary of its size, or aminmax, would take longer."""
    import torch

    return torch.maximum(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True).neg_())


def codes_of(ratios: torch.Tensor) -> torch.Tensor:
    """Of float32 between -127 and 127, which is overwritten: the nearest integer, half to even, as uint8 with zero at 128.

    By passes that torch has vectors for: with :func:`largest` and a division 0.20 ms of a core for 512 x 576, where abs, addcdiv and a cast
    from float to uint8 took 0.58.
    """
    import torch

    return ratios.add_(_INTEGERS + 128).view(torch.int32).to(torch.uint8)
