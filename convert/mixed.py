"""What stays in 16 bit so that a budget is met with the fewest bytes: an exact choice of groups, under a model of how losses add up that
measurements correct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Measured:
    """What was measured of an artifact whose quantized groups lose ``alone`` nats together, each measured alone."""

    alone: float
    value: float


@dataclass(frozen=True)
class Line:
    """``value = floor + slope * alone``: what the sum of losses, each measured alone, lets expect of all together. ``floor`` is what does
    not go away with them: 16-bit arithmetic, and layers that nobody measured."""

    floor: float
    slope: float

    def expect(self, alone: float) -> float:
        return self.floor + self.slope * alone

    def allows(self, value: float) -> float:
        """How much groups may lose alone, together, so that ``value`` is expected; negative where no choice leads there."""
        if self.slope <= 0:
            return np.inf if self.floor <= value else -1.0
        return (value - self.floor) / self.slope


def line_through(points: Sequence[Measured]) -> Line:
    """Of one measurement, the line through it and zero; of more, that through the last two where it rises and begins at or above zero,
    else the one through zero and the last."""
    last = points[-1]
    if len(points) > 1 and points[-2].alone != last.alone:
        slope = (points[-2].value - last.value) / (points[-2].alone - last.alone)
        floor = last.value - slope * last.alone
        if slope > 0 and floor >= 0:
            return Line(floor, slope)
    return Line(0.0, max(last.value, 0.0) / last.alone if last.alone > 0 else 0.0)


def choose(losses: Sequence[float], extra_bytes: Sequence[int], *, allowed: float) -> list[bool] | None:
    """Which groups to keep in 16 bit: those that together take the fewest ``extra_bytes``, so that the losses of all others sum to at most
    ``allowed``. None where that is negative: not even keeping everything would do.

    A knapsack, solved exactly by branch and bound (HiGHS, through ``scipy.optimize.milp``). A loss below zero is noise and counts as none.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    loss = np.maximum(np.asarray(losses, float), 0.0)
    cost = np.asarray(extra_bytes, float)
    if allowed < 0:
        return None
    if loss.sum() <= allowed:
        return [False] * len(loss)
    # HiGHS lets a constraint be missed by 1e-6: in units of the whole loss, and asking for that much more, nothing is missed.
    total = loss.sum()
    wanted = min((total - allowed) / total + 2e-6, 1.0)
    found = milp(
        cost / max(cost.max(), 1.0),
        constraints=LinearConstraint(loss[None] / total, lb=wanted),
        integrality=np.ones(len(loss)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    kept = [True] * len(loss) if found.x is None else [bool(x > 0.5) for x in found.x]
    return _without_idle(kept, loss, allowed)


def _without_idle(kept: list[bool], loss: np.ndarray, allowed: float) -> list[bool]:
    """Gives up what is kept for nothing: groups of no cost, which a solver may set as it likes, and what the margin asked for too much."""
    kept = list(kept)
    for i in sorted((i for i, is_kept in enumerate(kept) if is_kept), key=lambda i: loss[i]):
        left = sum(value for value, is_kept in zip(loss, kept, strict=True) if not is_kept)
        if left + loss[i] <= allowed:
            kept[i] = False
    return kept


def frontier(losses: Sequence[float], extra_bytes: Sequence[int], *, points: int = 16) -> list[list[bool]]:
    """The best choices from nothing kept to everything kept, for losses evenly spaced."""
    total = sum(max(loss, 0.0) for loss in losses)
    found = [choose(losses, extra_bytes, allowed=total * (points - i) / points) for i in range(points + 1)]
    return [choice for choice in found if choice is not None]


def by_order(order: Sequence[int], count: int) -> list[list[bool]]:
    """The choices that keep one group after the other in some order: what a frontier is compared with."""
    found, kept = [], [False] * count
    for i in order:
        kept = [*kept[:i], True, *kept[i + 1 :]]
        found.append(kept)
    return found
