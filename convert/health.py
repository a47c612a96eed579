"""What people should know of a quantized layer: how large its inputs are, and what each algorithm lost at its output.

Everything here is plain data, to four digits, taken from what calibration kept of the inputs anyway or from a few rows of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from convert.ledger import Entry
    from convert.observe import Observer
    from formats.qtensor import QTensor
    from formats.scheme import Quantization

#: What :class:`convert.observe.Observer` has to keep of an input.
KINDS = ("channels", "rows", "maxima")
#: A channel stands out from so many times the median channel's largest magnitude.
OUTLIER = 10.0
#: Rows on which errors at the output are measured.
ROWS = 64
#: From this share of the output on, a static scale ruins a layer: over a third of its energy is error, a typical token's or that of all
#: tokens. Found on the sample, INT8 and plain absmax, by quantizing the input of one layer at a time: the four of 120 inputs that cross it
#: (the down projections of layers 2, 9, 11 and 28: 0.69 to 1.00) are four of the five that alone move the logits by more than 0.065 nats of
#: KL (0.07 to 0.22). The fifth is the last block's (0.10), with nothing behind it: its own output is off by 0.18. Of the others the worst
#: two, 0.51 and 0.48, move them by 0.06 and 0.02, all below 0.35 by 0.02 at most. The largest magnitude over the median one tells them
#: less well apart: 1,600 to 54,700 for the four, 2,030 for the last block's.
RUINED = 0.6


def look(
    entry: Entry, module: str, weight: torch.Tensor, observer: Observer, limit: float | None, absmax: torch.Tensor | None = None
) -> dict[str, Any]:
    """``inputs``, what went into a layer (:func:`describe`), and ``errors``, what rounding its weight (out, in) as it is would lose. Empty
    where nothing came to it. ``limit``: what the input's static scale can hold, where it has one; ``absmax``: of weights that have one
    scale together, the largest magnitude."""
    import torch

    from convert.algorithms import rtn
    from formats.dtypes import DTYPES

    assert entry.scheme is not None
    if not all(observer.has(module, kind) for kind in KINDS):
        return {}
    limit = limit if entry.scheme.static else None
    rows, maxima = observer.get(module, "rows").value, torch.stack(observer.get(module, "maxima").kept)
    dtype = getattr(torch, DTYPES[entry.scale_dtype].torch_name)
    rounded = rtn.quantize(weight.clone(), entry.scheme.weight, scale_dtype=dtype, absmax=absmax)
    return {
        "inputs": {**describe(observer.get(module, "channels").value, rows, limit), "drift": _short(drift(maxima))},
        "errors": [lost("rtn", weight, rounded, few(rows), entry.scheme.activation, limit)],
    }


def describe(channels: torch.Tensor, rows: torch.Tensor, limit: float | None) -> dict[str, float]:
    """Of an input with these largest magnitudes (in,) and some rows (tokens, in): ``absmax``; ``typical``, the median magnitude;
    ``outliers``, how many of its ``channels`` stand out (:data:`OUTLIER`); and with a ``limit``, that, and the share ``clipped`` at it."""
    seen = {
        "absmax": _short(channels.max()),
        "typical": _short(few(rows).abs().median()),
        "outliers": int((channels > OUTLIER * channels.median()).sum()),
        "channels": len(channels),
    }
    # What lies at the limit was what set it: half a unit in the last place of bfloat16 is no clipping.
    beyond = {} if limit is None else {"limit": _short(limit), "clipped": _short((rows.abs() > limit * (1 + 2**-8)).float().mean())}
    return {**seen, **beyond}


def drift(maxima: torch.Tensor) -> float:
    """From the largest magnitude of each batch: how many times larger it is in one half of them than in the other, 1 for one batch."""
    half = len(maxima) // 2
    if not half:
        return 1.0
    first, second = float(maxima[:half].max()), float(maxima[half:].max())
    return max(first, second) / max(min(first, second), 1e-30)


def few(rows: torch.Tensor) -> torch.Tensor:
    """:data:`ROWS` of them in float32, drawn at random, the same on every device: what is evenly spaced would be the first token of a batch
    again and again."""
    return rows[_drawn(len(rows), rows.device)].float()


@cache
def _drawn(count: int, device: torch.device) -> torch.Tensor:
    import torch

    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:ROWS].sort().values.to(device)


def lost(
    after: str, weight: torch.Tensor, quantized: QTensor, x: torch.Tensor, activation: Quantization | None, limit: float | None
) -> dict[str, Any]:
    """What is lost ``after`` an algorithm, as shares: ``weight``, ``|Q - W| / |W|``; ``output``, ``|x' Q^T - x W^T| / |x W^T|`` with x' as
    the scheme quantizes ``x`` (tokens, in), over all rows, and ``typical``, the same for the median token."""
    import torch

    from convert.algorithms.rtn import to_nearest
    from convert.algorithms.smoothing import fake_quantize

    decoded = quantized.dequantize()
    if activation is not None and not activation.dynamic:
        scale = (limit or 0.0) / activation.grid.high
        seen = to_nearest(x / scale, activation.grid).mul_(scale)
    else:
        seen = fake_quantize(x, activation)
    expected = x @ weight.float().T
    error = (seen @ decoded.T).sub_(expected).square_().sum(dim=1)
    energy = expected.square_().sum(dim=1).clamp_(min=torch.finfo(torch.float32).tiny)
    return {
        "after": after,
        "weight": _short((decoded - weight).norm() / weight.float().norm().clamp(min=1e-30)),
        "output": _short((error.sum() / energy.sum()).sqrt()),
        "typical": _short((error / energy).median().sqrt()),
    }


def off(health: Mapping[str, Any], step: int = -1) -> float:
    """How far a layer's output is off in the end, of all tokens or of a typical one, whichever is more."""
    error = health["errors"][step]
    return float(max(error["output"], error["typical"]))


def is_ruined(health: Mapping[str, Any]) -> bool:
    """Whether a static scale leaves a layer's output off by :data:`RUINED` or more. Of a layer that was trained afterwards
    its own output does not tell: what it loses may be made up for elsewhere."""
    return "limit" in health["inputs"] and not health.get("trained") and off(health) >= RUINED


def ruined(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The layers that static scales ruin, the worst first."""
    return sorted((module for module, health in layers.items() if is_ruined(health)), key=lambda module: -off(layers[module]))


def remark(layers: Mapping[str, Mapping[str, Any]]) -> str:
    """What to say of layers that static scales ruin, and what to do; empty where there are none."""
    names = ruined(layers)
    if not names:
        return ""
    told = [described(name, layers[name]) for name in names[:6]]
    return (
        f"static activations ruin {', '.join(told)}{f' and {len(names) - 6} more' if len(names) > 6 else ''}: "
        "keep them with a rule (keep: true), or give them a dynamic scheme; "
        f"ruined: {{at_most: {len(names)}}} in the target has that done"
    )


def described(module: str, health: Mapping[str, Any]) -> str:
    """A layer that is ruined, and by what, for people."""
    seen = health.get("smoothed", health["inputs"])
    return f"{module} (output off by {off(health):.0%}, largest input {seen['absmax']:,g}, median {seen['typical']:,g})"


def summary(layers: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Two lines for people: what went in, and what is lost."""
    if not layers:
        return []
    largest = max(layers, key=lambda module: layers[module]["inputs"]["absmax"])
    drifting = max(layers, key=lambda module: layers[module]["inputs"]["drift"])
    seen = layers[largest]["inputs"]
    standing = sum(health["inputs"]["outliers"] > 0 for health in layers.values())
    weakest = max(layers, key=lambda module: off(layers[module]))
    steps: dict[str, list[float]] = {}
    for health in layers.values():
        for i, error in enumerate(health["errors"]):
            steps.setdefault(error["after"], []).append(off(health, i))
    means = ", ".join(f"{sum(values) / len(values):.2%} after {after}" for after, values in steps.items())
    return [
        (
            "inputs",
            f"largest {seen['absmax']:,g} in {largest} (median {seen['typical']:,g}); {standing} of {len(layers)} layers have outlier "
            f"channels; halves of the text differ by up to {layers[drifting]['inputs']['drift']:.3g} times ({drifting})",
        ),
        ("outputs", f"off by {means} (mean of layers); most in {weakest}, {off(layers[weakest]):.2%}"),
    ]


def _short(value: Any) -> float:
    return float(f"{float(value):.4g}")
