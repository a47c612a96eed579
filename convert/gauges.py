"""Small drawings for the report: a value in its interval against its limit, and errors as a map of layers and kinds, by algorithm."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup, escape

from convert.health import off
from convert.panels import MAX_PANELS, place
from convert.report import Check

#: Shades of a map: none up to an error of a thousandth, the last from all of the output on, in equal steps of its logarithm.
SHADES = 8
#: Layers of a map, at most: beyond that neighbours share a column, and it shows the worst of them.
MAX_COLUMNS = 160


def draw_gauge(check: Check) -> Markup:
    """An SVG element: the allowed side of the axis, the interval as a bar, the value as a dot and the limit as a line. Nothing where one
    of them is no place on an axis."""
    low, high = (check.interval.low, check.interval.high) if check.interval else (check.value, check.value)
    if check.bound == "holds" or not all(map(math.isfinite, (low, high, check.value, check.limit))):
        return Markup("")
    perfect = 1.0 if check.unit in ("ratio", "share", "of the source") else 0.0
    ends = (perfect, low, high, check.limit)
    margin = 0.12 * (max(ends) - min(ends)) or 1.0
    left, right = min(ends) - (margin if min(ends) != perfect else 0), max(ends) + (margin if max(ends) != perfect else 0)
    right = max(right, left + margin)  # where all of them are one place

    def x(value: float) -> float:
        return round(4 + 192 * (value - left) / (right - left), 1)

    good = (x(left), x(check.limit)) if check.bound == "at most" else (x(check.limit), x(right))
    shown = "pass" if check.passed else "fail"
    return Markup(
        f'<svg class="gauge" viewBox="0 0 200 20" aria-hidden="true">'
        f'<rect x="4" y="8" width="192" height="4" rx="2" class="track"/>'
        f'<rect x="{good[0]}" y="8" width="{good[1] - good[0]:.1f}" height="4" class="allowed"/>'
        f'<rect x="{x(low)}" y="6" width="{max(x(high) - x(low), 1):.1f}" height="8" rx="2" class="span {shown}"/>'
        f'<circle cx="{x(check.value)}" cy="10" r="4" class="dot {shown}"/>'
        f'<path d="M{x(check.limit)} 1V19" class="limit"/></svg>'
    )


@dataclass(frozen=True)
class Stage:
    """One map: the error at the output of every layer ``after`` an algorithm, and the median of all of them."""

    after: str
    median: float
    svg: Markup


def draw_stages(layers: Mapping[str, Mapping[str, Any]]) -> list[Stage]:
    """A map for each algorithm, in their order, from :mod:`convert.health`: layers from left to right, a row a kind of projection, each
    square the worst of its tensors."""
    placed = [(module, *place(module)) for module in layers]
    kinds = Counter(kind for _, kind, index in placed if index is not None)
    rows = [kind for kind in kinds if kind in dict(kinds.most_common(MAX_PANELS))]
    if not rows:
        return []
    last = max(index for _, _, index in placed if index is not None)
    merged = -(-(last + 1) // MAX_COLUMNS)
    orders = sorted({tuple(error["after"] for error in health["errors"]) for health in layers.values()}, key=len, reverse=True)
    names = list(dict.fromkeys(name for order in orders for name in order))
    found = []
    for number, name in enumerate(names):
        worst: dict[tuple[str, int], float] = {}
        every = []
        for module, kind, index in placed:
            errors = layers[module]["errors"]
            # A layer that an algorithm left alone is as it was before it.
            reached = [error for error in errors if error["after"] in names[: number + 1]]
            if index is None or not reached:
                continue
            value = off({"errors": reached})
            every.append(value)
            key = (kind, index // merged)
            worst[key] = max(worst.get(key, 0.0), value)
        found.append(Stage(name, sorted(every)[len(every) // 2] if every else math.nan, _draw_map(rows, worst, last // merged + 1)))
    return found


def shade(value: float) -> int:
    """0 (a thousandth of the output, or less) to :data:`SHADES`."""
    return min(SHADES, max(0, round((math.log10(max(value, 1e-9)) + 3) / 3 * SHADES)))


def _draw_map(rows: Sequence[str], worst: Mapping[tuple[str, int], float], columns: int) -> Markup:
    label, size = 62, 10
    parts = []
    for y, kind in enumerate(rows):
        parts.append(f'<text x="{label - 4}" y="{y * size + 7.6}">{escape(kind[:14])}</text>')
        # Neighbours of one shade are one rectangle: a page of a large model stays small.
        cells = [shade(worst[kind, i]) if (kind, i) in worst else -1 for i in range(columns)]
        start = 0
        for tone, run in groupby(cells):
            count = len(list(run))
            if tone >= 0:
                box = f'x="{label + start * size}" y="{y * size}" width="{count * size}" height="{size}"'
                parts.append(f'<rect {box} class="tone{tone}"/>')
            start += count
    height = len(rows) * size
    step = next(step for step in (1, 2, 5, 10, 20, 50) if columns / step <= 16)
    marks = "".join(f'<text x="{label + (i + 0.5) * size}" y="{height + 9}" class="mark">{i}</text>' for i in range(0, columns, step))
    grid = "".join(f"M{label} {y * size}h{columns * size}" for y in range(1, len(rows)))
    grid += "".join(f"M{label + i * size} 0v{height}" for i in range(1, columns))
    box = f'viewBox="0 0 {label + columns * size} {height + 12}"'
    return Markup(f'<svg class="map" {box} aria-hidden="true">{"".join(parts)}<path d="{grid}" class="mesh"/>{marks}</svg>')
