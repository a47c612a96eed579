"""Drawings of losses: of each group of layers, and of size against loss with the frontier of what could be chosen."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from convert.panels import place

if TYPE_CHECKING:
    from convert.sensitivity import Loss

#: Lines of a drawing that stands alone; what a page colours takes the page's.
_COLOURS = ("#2a5f93", "#b5541c", "#1c6637", "#8a2f6b", "#6b6b1c", "#5d5a54")
_MARKERS = ("o", "s", "^", "D")


def draw_losses(losses: Sequence[Loss]) -> str:
    """An SVG file: the loss of every group by layer, on a logarithmic axis, a colour a kind of group and a marker a scheme."""
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
    axes.set_xlabel("layer")
    axes.set_ylabel("KL divergence of the output (nats a token)")
    axes.grid(axis="y", color="#dcd8d0", linewidth=0.6)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    return _svg(figure)


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
