"""Drawings of losses: of each group of layers, and of size against loss with the frontier of what could be chosen."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from convert.panels import FAINT_INK, LINE_INK, TEXT_INK, inline, place

if TYPE_CHECKING:
    from convert.comparison import Row
    from convert.sensitivity import Loss

#: Lines of a drawing that stands alone; what a page colours takes the page's.
_COLOURS = ("#2a5f93", "#b5541c", "#1c6637", "#8a2f6b", "#6b6b1c", "#5d5a54")
#: Lines of a drawing within a page, told apart on light ground and on dark.
_MIDDLING = ("#3a82c8", "#c8702c", "#2f9a64", "#ab5aa5", "#8d8a2e", "#7d7a74")
_MARKERS = ("o", "s", "^", "D")
#: Inches; at 72 points each as wide as a phone shows, so that letters are as large there as they are drawn.
_NARROW = (5.0, 3.4)


def draw_losses(losses: Sequence[Loss], how: str) -> str:
    """An SVG file: the loss of every group by layer, on a logarithmic axis, a colour a kind of group and a marker a scheme; below it
    ``how`` they were measured."""
    schemes = list(dict.fromkeys(loss.scheme for loss in losses))
    kinds = list(dict.fromkeys(_kind(loss.modules) for loss in losses))
    last = max((index for loss in losses if (index := place(loss.modules[0])[1]) is not None), default=0)
    figure = _figure((8.0, 4.2))
    axes = figure.add_subplot()
    for i, kind in enumerate(kinds):
        for j, scheme in enumerate(schemes):
            points = sorted(
                (last + 1 if (index := place(loss.modules[0])[1]) is None else index, max(loss.kl_nats, 1e-12))
                for loss in losses
                if loss.scheme == scheme and _kind(loss.modules) == kind
            )
            axes.plot(
                *zip(*points, strict=True),
                color=_COLOURS[i % len(_COLOURS)],
                marker=_MARKERS[j % len(_MARKERS)],
                markersize=3.5,
                linewidth=0.9,
                linestyle="-" if j == 0 else (0, (4, 2)),
                label=f"{kind}, {scheme}",
            )
    axes.set_yscale("log")
    axes.set_xlabel("layer, and the head behind them" if any(place(loss.modules[0])[1] is None for loss in losses) else "layer")
    axes.set_ylabel("KL divergence of the output (nats a token)")
    axes.grid(axis="y", color="#dcd8d0", linewidth=0.6)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    figure.supxlabel(textwrap.fill(how, 130), fontsize=7, color="#5d5a54")
    return _svg(figure)


def draw_frontier(ladder: Mapping[str, Any]) -> Markup:
    """An SVG element for a page: size against KL, measured of every rung and expected of choices that ``mixed`` had, with the budget."""
    import matplotlib

    curves, limit = ladder["curves"], ladder["budget"].get("kl_nats")
    rungs = [rung for rung in ladder["rungs"] if rung["kl_nats"] is not None and math.isfinite(rung["kl_nats"])]
    styles: dict[str, tuple[str, Any, float]] = {"frontier": (LINE_INK, "-", 1.6)}
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "octavo", "svg.fonttype": "none", "font.size": 9.0, "text.color": TEXT_INK})
        figure = _figure(_NARROW)
        axes = figure.add_subplot(facecolor="none")
        for i, (name, points) in enumerate(curves.items()):
            ink, line, width = styles.get(name, (FAINT_INK, (0, (1 + 3 * i, 2)), 1.0))
            label = f"{name}, expected"
            axes.plot([x / 1e6 for x, _ in points], [y for _, y in points], color=ink, linestyle=line, linewidth=width, label=label)
        for rung in rungs:
            is_taken = rung["name"] == ladder["taken"]
            axes.plot(
                [rung["weight_bytes"] / 1e6],
                [rung["kl_nats"]],
                color=LINE_INK if is_taken else TEXT_INK,
                marker="D" if is_taken else "o",
                markersize=7 if is_taken else 4,
                linestyle="",
            )
        if limit is not None:
            axes.axhline(limit, color=FAINT_INK, linewidth=0.9, linestyle=(0, (4, 3)), label="budget")
        axes.set_ylim(bottom=0)
        _name_points(axes, [(rung["weight_bytes"] / 1e6, rung["kl_nats"], rung["name"]) for rung in rungs])
        axes.set_xlabel("all weights (MB)", color=TEXT_INK)
        axes.set_ylabel("KL (nats a token)", color=TEXT_INK)
        axes.tick_params(color=FAINT_INK, labelcolor=TEXT_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT_INK)
        if curves or limit is not None:
            axes.legend(frameon=False, fontsize=8)
        drawn = _svg(figure)
    return inline(drawn, "frontier")


def _name_points(axes: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """A name beside each point (x, y), on the side where there is room, and none over another."""
    # Sizes that are all but the same would be spread over the whole axis.
    low, high = axes.get_xlim()
    least = max(high - low, 0.1 * high)
    axes.set_xlim((low + high - least) / 2, (low + high + least) / 2)
    middle = (low + high) / 2
    below: dict[bool, float] = {}
    for x, y, name in sorted(points, key=lambda point: (-point[1], point[0])):
        left = x > middle
        # In points of a figure: its pixels are 72 an inch, or as many as its dpi says.
        height = axes.transData.transform((x, y))[1] * 72 / axes.figure.dpi
        moved = min(4.0, below.get(left, math.inf) - 10 - height)
        below[left] = height + moved
        axes.annotate(name, (x, y), (-6 if left else 6, moved), textcoords="offset points", fontsize=8, ha="right" if left else "left")


def draw_groups(groups: Sequence[Mapping[str, Any]]) -> Markup:
    """An SVG element for a page: what each group of layers loses alone, by layer, a line a kind; those kept in 16 bit are marked."""
    import matplotlib

    kinds = list(dict.fromkeys(_kind(group["modules"]) for group in groups))
    last = max((index for group in groups if (index := place(group["modules"][0])[1]) is not None), default=0)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "octavo", "svg.fonttype": "none", "font.size": 9.0, "text.color": TEXT_INK})
        figure = _figure(_NARROW)
        axes = figure.add_subplot(facecolor="none")
        for i, kind in enumerate(kinds[: len(_MIDDLING)]):
            points = sorted(
                (last + 1 if (index := place(group["modules"][0])[1]) is None else index, max(group["alone_nats"], 1e-12), group["kept"])
                for group in groups
                if _kind(group["modules"]) == kind
            )
            ink = _MIDDLING[i]
            axes.plot([x for x, *_ in points], [y for _, y, _ in points], color=ink, linewidth=1.0, marker="o", markersize=2.4, label=kind)
            kept = [(x, y) for x, y, is_kept in points if is_kept]
            axes.plot([x for x, _ in kept], [y for _, y in kept], color=ink, linestyle="", marker="D", markersize=6, markerfacecolor="none")
        axes.set_yscale("log")
        axes.set_xlabel("layer", color=TEXT_INK)
        axes.set_ylabel("KL alone (nats a token)", color=TEXT_INK)
        axes.tick_params(color=FAINT_INK, labelcolor=TEXT_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT_INK)
        axes.legend(frameon=False, fontsize=8, ncols=2)
        drawn = _svg(figure)
    return inline(drawn, "alone")


def draw_comparison(rows: Sequence[Row]) -> Markup:
    """An SVG element for a page: size against loss, an interval as a bar, and a line through the rows that nothing beats."""
    import matplotlib

    shown = [row for row in rows if math.isfinite(row.loss)]
    alone = len({row.run.name for row in rows}) == 1
    best = sorted((row.size_bytes / 1e6, row.loss) for row in shown if row.frontier)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "octavo", "svg.fonttype": "none", "font.size": 9.0, "text.color": TEXT_INK})
        figure = _figure(_NARROW)
        axes = figure.add_subplot(facecolor="none")
        axes.plot([x for x, _ in best], [y for _, y in best], color=FAINT_INK, linewidth=0.9, linestyle=(0, (4, 3)))
        names = []
        for row in shown:
            x, low, high = row.size_bytes / 1e6, *((row.interval.low, row.interval.high) if row.interval else (row.loss, row.loss))
            axes.plot([x, x], [low, high], color=LINE_INK, linewidth=1.3)
            axes.plot([x], [row.loss], color=LINE_INK, marker="D" if row.frontier else "o", markersize=4.5)
            label = row.name if alone else f"{row.name}, {row.run.name.partition(' (')[0]}"
            names.append((x, row.loss, label))
        axes.margins(x=0.25, y=0.15)
        axes.set_ylim(bottom=0)
        _name_points(axes, names)
        axes.set_xlabel("weights on disk (MB)", color=TEXT_INK)
        axes.set_ylabel("relative error" if any(row.run.drift for row in rows) else "KL (nats a token)", color=TEXT_INK)
        axes.tick_params(color=FAINT_INK, labelcolor=TEXT_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT_INK)
        drawn = _svg(figure)
    return inline(drawn, "comparison")


def _kind(modules: Sequence[str]) -> str:
    return "/".join(dict.fromkeys(place(module)[0] for module in modules))


def _figure(size: tuple[float, float]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained", facecolor="none")


def _svg(figure: Any) -> str:
    """The bytes do not depend on the user's matplotlibrc, nor on the day."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "octavo", "svg.fonttype": "none"})
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return buffer.getvalue()
