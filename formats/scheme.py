"""How a linear layer is quantized: grids of codes, tiles that share a scale, and the named schemes made of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """The codes an element can take: ``dtype`` on disk, from ``low`` to ``high`` in units of the scale.

    ``kind`` is ``int`` (evenly spaced; round half to even) or ``float`` (``mantissa_bits`` after the point, smallest
    normal exponent ``min_exponent``; OCP 8-bit Floating Point Specification 1.0, section 5).
    """

    dtype: str
    kind: str
    low: float
    high: float
    mantissa_bits: int = 0
    min_exponent: int = 0


INT8 = Grid("I8", "int", -127, 127)
FP8_E4M3 = Grid("F8_E4M3", "float", -448, 448, mantissa_bits=3, min_exponent=-6)


@dataclass(frozen=True)
class Tile:
    """The part of a matrix that shares one scale: ``rows`` x ``columns`` elements, None meaning all of them.

    Of a weight (out, in) a row is an output channel; of an activation (tokens, in) it is a token.
    """

    rows: int | None
    columns: int | None

    def scale_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """How many tiles lie over a matrix of ``shape``, along each axis; ragged ends count."""
        return _ceil_divide(shape[0], self.rows), _ceil_divide(shape[1], self.columns)


PER_TENSOR = Tile(None, None)
PER_CHANNEL = Tile(1, None)
PER_TOKEN = Tile(1, None)


@dataclass(frozen=True)
class Quantization:
    """What becomes of one operand of a matrix product. ``dynamic`` scales are computed by the runtime, nothing is stored."""

    grid: Grid
    tile: Tile
    symmetric: bool = True
    dynamic: bool = False


@dataclass(frozen=True)
class Quality:
    """Bounds on the difference between source and artifact, measured on held-out text.

    ``kl_nats``: mean over tokens of KL(source || artifact), at most. ``top1``: share of tokens whose most likely
    successor is the same, at least. ``perplexity_ratio``: artifact over source, at most.
    """

    kl_nats: float
    top1: float
    perplexity_ratio: float


@dataclass(frozen=True)
class Scheme:
    """A named way to quantize a linear layer. ``default_limits`` is what an artifact of it must meet unless told otherwise."""

    name: str
    weight: Quantization
    activation: Quantization | None
    default_limits: Quality


#: Scheme names are the field's. To add one is a line here and a golden test.
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme(
            "int8-dynamic",
            weight=Quantization(INT8, PER_CHANNEL),
            activation=Quantization(INT8, PER_TOKEN, dynamic=True),
            default_limits=Quality(kl_nats=0.05, top1=0.85, perplexity_ratio=1.05),
        ),
        Scheme(
            "fp8-dynamic",
            weight=Quantization(FP8_E4M3, PER_CHANNEL),
            activation=Quantization(FP8_E4M3, PER_TOKEN, dynamic=True),
            default_limits=Quality(kl_nats=0.05, top1=0.85, perplexity_ratio=1.05),
        ),
    )
}


def _ceil_divide(extent: int, tile: int | None) -> int:
    return 1 if tile is None else -(-extent // tile)
