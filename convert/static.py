"""What a static scale can hold of each input, as its rule's observer chooses it from what calibration saw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from convert.ledger import RESPELL, Entry, TargetPlan
from convert.observe import Limit, Observer
from convert.runtimes import RUNTIMES
from formats.errors import NumericsError


def by_histogram(entries: Iterable[Entry]) -> list[Entry]:
    """The entries whose observer needs more of an input than its largest magnitude."""
    return [entry for entry in entries if entry.observer not in ("", "absmax") and entry.algorithm != RESPELL]


def find_limits(target: TargetPlan, entries: Sequence[Entry], observer: Observer) -> dict[str, Limit]:
    """By module, for entries of :func:`by_histogram`. Where a runtime of the target makes one layer of those that read one input, and so
    gives them the largest of their scales, all have that. Raises :class:`NumericsError` naming the module whose input was always zero or
    was not finite."""
    from convert.algorithms import static_scales

    scales: dict[str, float] = {}
    grids = {}
    for entry in entries:
        assert entry.scheme is not None
        assert entry.scheme.activation is not None
        kind, _, percentile = entry.observer.partition(" ")
        grid = entry.scheme.activation.grid
        for module in (entry.module(part) for part in entry.parts):
            counts = observer.get(module, "histogram").counts
            try:
                if kind == "mse":
                    scales[module] = static_scales.scale_by_mse(counts, grid)
                else:
                    scales[module] = static_scales.scale_by_percentile(counts, grid, percentile=float(percentile))
            except ValueError as error:
                raise NumericsError(f"{module}: {error}; give it other text, or a dynamic scheme") from None
            grids[module] = grid
    if any(RUNTIMES[name].fuses for name in target.runtimes):
        together: dict[str, list[str]] = {}
        for module in scales:
            together.setdefault(observer.leader.get(module, module), []).append(module)
        for group in together.values():
            scales |= dict.fromkeys(group, static_scales.shared([scales[module] for module in group]))
    return {
        module: Limit(
            scale * grids[module].high,
            static_scales.clip_rate(observer.get(module, "histogram").counts, grids[module], scale=scale),
            static_scales.error(observer.get(module, "histogram").counts, grids[module], scale=scale),
        )
        for module, scale in scales.items()
    }
