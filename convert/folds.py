"""What smoothing folded into weights, kept as plain data, so that a source weight can be made again what was quantized, to the bit."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from convert.algorithms import smoothing


@dataclass(frozen=True)
class Fold:
    """``consumers`` read what ``producer`` makes; their columns were multiplied by ``scales`` (in,), and what the producer makes was
    divided by ``rows``, which are these scales, or one for each of its channels where several of theirs read the same one.

    Names are those of the model's modules. ``offset``: what a norm adds to its weight. ``order``: folds of a block were done in this order.
    ``dtype``: in which the block was walked, and each weight rounded after a fold.
    """

    producer: str
    consumers: tuple[str, ...]
    scales: torch.Tensor
    rows: torch.Tensor
    offset: float
    order: int
    dtype: torch.dtype

    def record(self) -> dict[str, Any]:
        """As plain data: the exponents, where scales are powers of two, at most 2**15 apart, else float32, little-endian; in base64."""
        tied = {} if self.rows is self.scales else {"rows": _to_text(self.rows)}
        return {
            "producer": self.producer,
            "consumers": list(self.consumers),
            "offset": self.offset,
            "order": self.order,
            "dtype": str(self.dtype).removeprefix("torch."),
            "scales": _to_text(self.scales),
            **tied,
        }


def read_fold(record: Mapping[str, Any]) -> Fold:
    """The inverse of :meth:`Fold.record`."""
    scales = _from_text(record["scales"])
    return Fold(
        producer=record["producer"],
        consumers=tuple(record["consumers"]),
        scales=scales,
        rows=_from_text(record["rows"]) if "rows" in record else scales,
        offset=record["offset"],
        order=record["order"],
        dtype=getattr(torch, record["dtype"]),
    )


def touching(folds: Iterable[Fold], module: str) -> list[Fold]:
    """Those that changed a module, in the order in which they did."""
    return sorted((fold for fold in folds if module == fold.producer or module in fold.consumers), key=lambda fold: fold.order)


def folded(
    value: torch.Tensor, module: str, folds: Sequence[Fold], *, start: int = 0, stop: int | None = None, bias: bool = False
) -> torch.Tensor:
    """Rows ``[start, stop)`` of a linear's weight (out, in), or a norm's weight or a ``bias`` whole (out,), as they were when they were
    quantized; float32 in and out. ``folds`` are those that touch the module."""
    for fold in folds:
        value = value.to(fold.dtype)
        if module in fold.consumers:
            value = smoothing.fold_into_consumer(value, fold.scales) if value.dim() == 2 else value
        elif value.dim() == 2:
            value, _ = smoothing.fold_into_producer(value, None, fold.rows[start:stop])
        else:
            value, _ = smoothing.fold_into_norm(value, None, fold.rows, offset=0.0 if bias else fold.offset)
    return value.float()


#: Powers of two: the lowest exponent, how many there are, and what each has more, in four bits, of two the first in the lower.
#: No compression: what it makes of the same bytes depends on the library that Python was built with.
_POWERS = re.compile(r"2\*\*(-?\d+)x(\d+):(.*)")


def _to_text(values: torch.Tensor) -> str:
    values = values.float().cpu()
    mantissas, exponents = torch.frexp(values)  # 2**e is 0.5 * 2**(e + 1)
    lowest = int(exponents.min())
    if bool((mantissas == 0.5).all()) and int(exponents.max()) - lowest < 16:
        more = np.zeros(2 * -(-len(exponents) // 2), np.uint8)
        more[: len(exponents)] = (exponents - lowest).numpy()
        return f"2**{lowest - 1}x{len(exponents)}:{base64.b64encode((more[::2] | more[1::2] << 4).tobytes()).decode()}"
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()


def _from_text(text: str) -> torch.Tensor:
    if powers := _POWERS.fullmatch(text):
        packed = np.frombuffer(base64.b64decode(powers[3]), np.uint8)
        more = np.stack([packed & 15, packed >> 4], -1).reshape(-1)[: int(powers[2])]
        return torch.from_numpy(np.ldexp(np.float32(1), int(powers[1]) + more.astype(np.int32)))
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32))
