"""What stays in 16 bit, or takes another scheme, so that a budget is met with the fewest bytes: an exact choice of groups, under a model of
how losses add up that measurements correct."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@dataclass(frozen=True)
class Option:
    """What may become of a group: it then loses ``loss`` nats alone, and takes ``extra_bytes`` more than as it is."""

    loss: float
    extra_bytes: int


#: For each group the number of its option; 0 leaves it as it is.
Choice = list[int]


def choose(groups: Sequence[Sequence[Option]], *, allowed: float) -> Choice | None:
    """What becomes of each group, so that together they take the fewest bytes and their losses sum to at most ``allowed``; the first option
    of each is to leave it as it is. None where even the smallest losses sum to more. Of choices that take the same bytes it is one of which
    nothing can be left as it is.

    A multiple-choice knapsack, solved exactly by branch and bound (HiGHS, through ``scipy.optimize.milp``). A loss below zero is noise and
    counts as none.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    groups = [[Option(max(option.loss, 0.0), option.extra_bytes) for option in group] for group in groups]
    unchanged = [0] * len(groups)
    total = loss_of(groups, unchanged)
    if total <= allowed:
        return unchanged
    least = math.fsum(min(option.loss for option in group) for group in groups)
    if least > allowed:
        return None
    flat = [(i, j) for i, group in enumerate(groups) for j in range(len(group))]
    loss = np.array([groups[i][j].loss for i, j in flat])
    cost = np.array([groups[i][j].extra_bytes for i, j in flat], float)
    one_each = np.zeros((len(groups), len(flat)))
    for column, (i, _) in enumerate(flat):
        one_each[i, column] = 1
    # HiGHS lets a constraint be missed by 1e-6: in units of the whole loss, and asking for that much less, nothing is missed.
    bound = allowed / total - 2e-6
    if bound <= least / total:
        smallest = [min(range(len(group)), key=lambda j, group=group: (group[j].loss, group[j].extra_bytes)) for group in groups]  # type: ignore[misc]
        return _without_idle(groups, smallest, allowed)
    with _mute():
        found = milp(
            cost / max(np.abs(cost).max(), 1.0),
            constraints=[LinearConstraint(loss[None] / total, ub=bound), LinearConstraint(one_each, lb=1, ub=1)],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        return None
    choice = [max(range(len(group)), key=lambda j, i=i: found.x[flat.index((i, j))]) for i, group in enumerate(groups)]  # type: ignore[misc]
    return _without_idle(groups, choice, allowed)


@contextmanager
def _mute() -> Iterator[None]:
    """Nothing that C code prints reaches the user: HiGHS has a ``printf`` of its own in ``transformNewIntegerFeasibleSolution``, which no
    option silences, and which would end up in the JSON of a program that reads us."""
    libc = ctypes.CDLL(None)
    sys.stdout.flush()
    libc.fflush(None)
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        libc.fflush(None)  # into a pipe, it is printed when the process ends
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def loss_of(groups: Sequence[Sequence[Option]], choice: Sequence[int]) -> float:
    """The sum of what groups lose alone."""
    return math.fsum(group[j].loss for group, j in zip(groups, choice, strict=True))


def bytes_of(groups: Sequence[Sequence[Option]], choice: Sequence[int]) -> int:
    """What a choice takes more."""
    return sum(group[j].extra_bytes for group, j in zip(groups, choice, strict=True))


def _without_idle(groups: Sequence[Sequence[Option]], choice: Choice, allowed: float) -> Choice:
    """Leaves as it is what was changed for nothing: options of no cost, which a solver may take as it likes, and what the margin asked for
    too much. What wins least goes first."""
    choice = list(choice)
    changed = [i for i, j in enumerate(choice) if j and groups[i][j].extra_bytes >= groups[i][0].extra_bytes]
    for i in sorted(changed, key=lambda i: groups[i][0].loss - groups[i][choice[i]].loss):
        without = [*choice[:i], 0, *choice[i + 1 :]]
        if loss_of(groups, without) <= allowed:
            choice = without
    return choice


def frontier(groups: Sequence[Sequence[Option]], *, points: int = 16) -> list[Choice]:
    """The best choices from what there is to the smallest loss there can be, for losses evenly spaced."""
    total = math.fsum(max(group[0].loss, 0.0) for group in groups)
    found = [choose(groups, allowed=total * (points - i) / points) for i in range(points + 1)]
    return [choice for choice in found if choice is not None]


def filled(order: Sequence[int], groups: Sequence[Sequence[Option]], *, most: int) -> Choice:
    """Takes the last option of one group after the other in some order, leaving out what would take all of them beyond ``most`` bytes."""
    choice = [0] * len(groups)
    for i in order:
        tried = [*choice[:i], len(groups[i]) - 1, *choice[i + 1 :]]
        if bytes_of(groups, tried) <= most:
            choice = tried
    return choice


def by_order(order: Sequence[int], count: int) -> list[Choice]:
    """The choices that take the last option of one group after the other in some order, of ``count`` groups with two: what a frontier is
    compared with."""
    found, kept = [], [0] * count
    for i in order:
        kept = [*kept[:i], 1, *kept[i + 1 :]]
        found.append(kept)
    return found
