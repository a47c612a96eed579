"""Small drawings of the error of every layer, one for each kind of projection, as SVG that takes the colours of its page."""

from __future__ import annotations

import io
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from convert.report import LayerNumbers

#: From here on, decibels stand for "no error at all": the measure ends at 999.
EXACT_DB = 999.0
#: Panels beyond this share the last one, so that a model of odd names stays readable.
MAX_PANELS = 12
#: More points than this are drawn as a line alone: a marker each would make the page megabytes.
MAX_MARKERS = 100
#: matplotlib knows no CSS, so it draws in colours that occur nowhere else, and these take their place.
INKS = {"#010203": "currentColor", "#010204": "var(--accent)", "#010205": "var(--muted)"}
TEXT_INK, LINE_INK, FAINT_INK = INKS


@dataclass(frozen=True)
class Panel:
    """The tensors of one kind: ``low_db`` the lowest of them, in layer ``lowest``, ``high_db`` the highest."""

    kind: str
    tensors: int
    low_db: float
    high_db: float
    lowest: int | None
    svg: Markup


def is_drawable(layer: LayerNumbers) -> bool:
    """Whether its decibels are a place on an axis."""
    return math.isfinite(layer.snr_db) and layer.snr_db < EXACT_DB


def draw_panels(layers: Sequence[LayerNumbers]) -> list[Panel]:
    """One panel for each kind of projection, in the order of the ledger, all on the same axes."""
    if not layers:
        return []
    places = [place(layer.tensor) for layer in layers]
    common = {kind for kind, _ in Counter(kind for kind, index in places if index is not None).most_common(MAX_PANELS)}
    groups: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for layer, (kind, index) in zip(layers, places, strict=True):
        name = "outside the layers" if index is None else kind if kind in common else "all other kinds"
        groups[name][len(groups[name]) if index is None else index].append(layer.snr_db)
    values = [layer.snr_db for layer in layers]
    margin = max(0.06 * (max(values) - min(values)), 0.5)
    bounds = min(values) - margin, max(values) + margin
    last = max((index for _, index in places if index is not None), default=0)
    found = []
    for i, (name, points) in enumerate(groups.items()):
        outside = name == "outside the layers"
        svg = _draw(points, bounds, statistics.median(values), max(points) if outside else last, "tensor, by name" if outside else "layer")
        svg = inline(svg, f"panel{i}")
        low = min(points, key=lambda index: min(points[index]))
        flat = [value for group in points.values() for value in group]
        found.append(Panel(name, len(flat), min(flat), max(flat), None if outside else low, svg))
    return found


@dataclass(frozen=True)
class Ranges:
    """Inputs of the layers of some kinds, which read the same ones: the largest of all, in layer ``layer``, against the median there."""

    kinds: str
    largest: float
    typical: float
    layer: int
    outliers: int
    svg: Markup


def draw_ranges(layers: Mapping[str, Mapping[str, Any]]) -> list[Ranges]:
    """One panel for each input of a block, from :mod:`convert.health`: the largest and the median magnitude by layer, and the largest after
    smoothing, all on the same logarithmic axis."""
    found: dict[str, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for module, health in layers.items():
        kind, index = place(module)
        # Of experts, the one with the largest input stands for all.
        if index is not None and health["inputs"]["absmax"] >= found[kind].get(index, health)["inputs"]["absmax"]:
            found[kind][index] = health
    shared: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for kind, by_layer in found.items():
        if by_layer:
            shared[tuple((i, by_layer[i]["inputs"]["absmax"], by_layer[i]["inputs"]["typical"]) for i in sorted(by_layer))].append(kind)
    every = [value for points in shared for _, *both in points for value in both if value > 0]
    if not every:
        return []
    bounds = min(every) / 2, max(every) * 2
    last = max(i for points in shared for i, *_ in points)
    drawn = []
    for number, (points, kinds) in enumerate(list(shared.items())[:MAX_PANELS]):
        layer, largest, typical = max(points, key=lambda point: point[1])
        by_layer = found[kinds[0]]
        smoothed = [(i, by_layer[i]["smoothed"]["absmax"]) for i, *_ in points if by_layer[i].get("smoothed")]
        svg = inline(_draw_range(points, smoothed, bounds, last), f"range{number}")
        outliers = max(health["inputs"]["outliers"] for health in by_layer.values())
        drawn.append(Ranges(", ".join(kinds), largest, typical, layer, outliers, svg))
    return drawn


def _draw_range(points: Sequence[tuple[int, float, float]], smoothed: Sequence[tuple[int, float]], bounds: Any, last: int) -> str:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    layers, largest, typical = zip(*points, strict=True)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "octavo", "svg.fonttype": "none", "font.size": 9.0, "text.color": TEXT_INK})
        figure = Figure(figsize=(3.5, 2.0), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.fill_between(layers, typical, largest, color=LINE_INK, alpha=0.15, linewidth=0)
        axes.plot(layers, largest, color=LINE_INK, linewidth=1.4)
        axes.plot(layers, typical, color=FAINT_INK, linewidth=1.0)
        if smoothed:
            axes.plot(*zip(*smoothed, strict=True), color=LINE_INK, linewidth=1.0, linestyle=(0, (3, 2)))
        axes.set_yscale("log")
        axes.set(xlim=(-0.03 * last - 0.5, 1.03 * last + 0.5), ylim=bounds)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.minorticks_off()
        axes.set_xlabel("layer", color=TEXT_INK)
        axes.set_ylabel("magnitude", color=TEXT_INK)
        axes.tick_params(color=FAINT_INK, labelcolor=TEXT_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT_INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def place(tensor: str) -> tuple[str, int | None]:
    """The kind and the layer that a name tells: ``model.layers.7.mlp.up_proj.weight`` is an up_proj of layer 7."""
    parts = tensor.removesuffix(".weight").split(".")
    is_index = [re.fullmatch("[0-9]{1,6}", part) is not None for part in parts]
    kind = next((part for part, index in zip(reversed(parts), reversed(is_index), strict=True) if part and not index), "other")
    return kind, next((int(part) for part, index in zip(parts, is_index, strict=True) if index), None)


def _draw(points: dict[int, list[float]], bounds: tuple[float, float], median_db: float, last: int, label: str) -> str:
    """An SVG file: the lowest decibels of each layer as a line, a band up to the highest where a layer has several tensors."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    x = sorted(points)
    low, high = [min(points[i]) for i in x], [max(points[i]) for i in x]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's own matplotlibrc must not change the bytes
        matplotlib.rcParams.update({"svg.hashsalt": "octavo", "svg.fonttype": "none", "font.size": 9.0, "text.color": TEXT_INK})
        figure = Figure(figsize=(3.5, 2.0), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        axes.axhline(median_db, color=FAINT_INK, linewidth=0.8, linestyle=(0, (4, 3)))
        if low != high:
            axes.fill_between(x, low, high, color=LINE_INK, alpha=0.25, linewidth=0)
        axes.plot(x, low, color=LINE_INK, linewidth=1.3, marker="o" if len(x) <= MAX_MARKERS else None, markersize=2.6)
        axes.set(xlim=(-0.03 * last - 0.5, 1.03 * last + 0.5), ylim=bounds)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel(label, color=TEXT_INK)
        axes.set_ylabel("signal to noise (dB)", color=TEXT_INK)
        axes.tick_params(color=FAINT_INK, labelcolor=TEXT_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT_INK)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()


def inline(svg: str, name: str) -> Markup:
    """A drawing as an element of a page: in the page's colours, with names of its own, and without what would reach the whole page."""
    # A style element inside an inline drawing would reach the whole page; the page's own sheet has these rules.
    svg = re.sub(r"<style\b.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub("|".join(INKS), lambda found: INKS[found[0]], svg).replace("<svg ", '<svg aria-hidden="true" ', 1)
    # Every drawing numbers its parts from one; on one page their names must differ.
    return Markup(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg))
