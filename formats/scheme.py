"""How a linear layer is quantized: grids of codes, tiles that share a scale, and the named schemes made of them."""

from __future__ import annotations

from dataclasses import dataclass, replace


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

    def __str__(self) -> str:
        """As people call it: ``per tensor``, ``per channel``, ``per 1 x 64``."""
        if (self.rows, self.columns) == (None, None):
            return "per tensor"
        return "per channel" if (self.rows, self.columns) == (1, None) else f"per {self.rows or 'all'} x {self.columns or 'all'}"


PER_TENSOR = Tile(None, None)
PER_CHANNEL = Tile(1, None)
PER_TOKEN = Tile(1, None)
BLOCK_128 = Tile(128, 128)


def per_group(columns: int) -> Tile:
    """One scale for ``columns`` neighbours along the input features of each row."""
    return Tile(1, columns)


@dataclass(frozen=True)
class Quantization:
    """What becomes of one operand of a matrix product. ``dynamic`` scales are computed by the runtime, nothing is stored.

    ``scale``: ``model`` rounds scales to the dtype of the model before they are used, because readers will; ``F32`` leaves them in
    float32; ``F8_E8M0`` takes the power of two at or above (OCP Microscaling Formats 1.0, section 5.4); ``absmax`` is the largest magnitude
    itself in float32, not divided by 127, as LLM.int8() keeps it.
    """

    grid: Grid
    tile: Tile
    symmetric: bool = True
    dynamic: bool = False
    scale: str = "model"

    @property
    def unit(self) -> float:
        """What a code of one is worth where the scale is one: bitsandbytes multiplies by this float, not by 1 / 127."""
        return 7.874015718698502e-3 if self.scale == "absmax" else 1.0


@dataclass(frozen=True)
class Quality:
    """Bounds on the difference between source and artifact, measured on held-out text.

    ``kl_nats``: mean over tokens of KL(source || artifact), at most. ``top1``: share of tokens whose most likely
    successor is the same, at least. ``perplexity_ratio``: artifact over source, at most. ``relative_error``: of a model that predicts no
    tokens, the mean error of its last hidden states as a share of their length, at most. ``answers``: how much smaller the share of the
    user's prompts that it answers may be than the source's, and ``recovery``: what share of the source's score it must reach in each task;
    None where it is not held to that.
    """

    kl_nats: float
    top1: float
    perplexity_ratio: float
    relative_error: float = 0.1
    answers: float | None = None
    recovery: float | None = None


@dataclass(frozen=True)
class Scheme:
    """A named way to quantize a linear layer. ``default_limits`` is what an artifact of it must meet unless told otherwise. ``lookup``: it
    is for a table of embeddings instead, (rows, features), of which some rows are read and none multiplied."""

    name: str
    weight: Quantization
    activation: Quantization | None
    default_limits: Quality
    lookup: bool = False

    @property
    def static(self) -> bool:
        """Whether it stores a scale for its input, which only calibration can tell."""
        return self.activation is not None and not self.activation.dynamic

    @property
    def halvable(self) -> bool:
        """Whether its products are sums of integers times one scale a channel: INT8 weights alone, whose inputs may be codes too."""
        return self.activation is None and self.weight.grid.kind == "int" and self.weight.tile == PER_CHANNEL and not self.lookup


_EIGHT_BY_EIGHT = Quality(kl_nats=0.05, top1=0.85, perplexity_ratio=1.05, relative_error=0.1)
_WEIGHT_ONLY = Quality(kl_nats=0.03, top1=0.88, perplexity_ratio=1.03, relative_error=0.05)
_INT8_CHANNEL = Quantization(INT8, PER_CHANNEL)
_FP8_CHANNEL = Quantization(FP8_E4M3, PER_CHANNEL)
_FP8_TENSOR = Quantization(FP8_E4M3, PER_TENSOR)
_MXFP8 = Quantization(FP8_E4M3, per_group(32), scale="F8_E8M0")


#: Scheme names are the field's. To add one is a line here and a golden test.
SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("int8-dynamic", _INT8_CHANNEL, Quantization(INT8, PER_TOKEN, dynamic=True), _EIGHT_BY_EIGHT),
        Scheme("int8-dynamic-asymmetric", _INT8_CHANNEL, Quantization(INT8, PER_TOKEN, symmetric=False, dynamic=True), _EIGHT_BY_EIGHT),
        Scheme("int8-static", _INT8_CHANNEL, Quantization(INT8, PER_TENSOR), _EIGHT_BY_EIGHT),
        Scheme("int8-weight-only", _INT8_CHANNEL, None, _WEIGHT_ONLY),
        *(Scheme(f"int8-weight-only-g{size}", Quantization(INT8, per_group(size)), None, _WEIGHT_ONLY) for size in (32, 64, 128)),
        Scheme("fp8-dynamic", _FP8_CHANNEL, Quantization(FP8_E4M3, PER_TOKEN, dynamic=True), _EIGHT_BY_EIGHT),
        Scheme("fp8-static", _FP8_TENSOR, _FP8_TENSOR, _EIGHT_BY_EIGHT),
        Scheme("fp8-block", Quantization(FP8_E4M3, BLOCK_128), Quantization(FP8_E4M3, per_group(128), dynamic=True), _EIGHT_BY_EIGHT),
        Scheme("fp8-weight-only", _FP8_CHANNEL, None, _WEIGHT_ONLY),
        Scheme("llm-int8", replace(_INT8_CHANNEL, scale="absmax"), Quantization(INT8, PER_TOKEN, dynamic=True), _EIGHT_BY_EIGHT),
        Scheme("mxfp8", _MXFP8, replace(_MXFP8, dynamic=True), _EIGHT_BY_EIGHT),
        Scheme("int8-lookup", _INT8_CHANNEL, None, _WEIGHT_ONLY, lookup=True),
    )
}

#: How keys and values are stored, as matrices (heads, everything else of a head): one scale a layer, or one a head.
CACHES = {
    "fp8": Quantization(FP8_E4M3, PER_TENSOR),
    "fp8-per-head": Quantization(FP8_E4M3, Tile(1, None)),
}


def _ceil_divide(extent: int, tile: int | None) -> int:
    return 1 if tile is None else -(-extent // tile)
