"""The choice against every choice there is, and the line against numbers that lie on one."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.mixed import Line, Measured, choose, frontier, line_through

GROUPS = st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(1, 10**9)), min_size=1, max_size=7)


@given(GROUPS, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_no_other_choice_takes_fewer_bytes(groups: list[tuple[float, int]], share: float) -> None:
    losses, sizes = [loss for loss, _ in groups], [size for _, size in groups]
    allowed = share * sum(losses)
    kept = choose(losses, sizes, allowed=allowed)
    assert kept is not None

    def left(choice: tuple[bool, ...] | list[bool]) -> float:
        return math.fsum(loss for loss, keep in zip(losses, choice, strict=True) if not keep)

    def taken(choice: tuple[bool, ...] | list[bool]) -> int:
        return sum(size for size, keep in zip(sizes, choice, strict=True) if keep)

    assert left(kept) <= allowed * (1 + 1e-12) + 1e-300
    # The solver's own tolerance is asked for on top, so that a choice may be missed which meets the bound by less than that.
    clear = [c for c in itertools.product((False, True), repeat=len(groups)) if left(c) <= allowed - 4e-6 * sum(losses)]
    assert all(taken(kept) <= taken(choice) for choice in clear)


def test_what_cannot_be_is_none_and_what_need_not_be_is_nothing() -> None:
    assert choose([0.1, 0.2], [1, 1], allowed=-0.1) is None
    assert choose([0.1, 0.2], [1, 1], allowed=0.31) == [False, False]
    assert choose([0.1, 0.2], [1, 1], allowed=0.0) == [True, True]
    assert choose([0.1, -0.2], [1, 1], allowed=0.0) == [True, False], "noise below zero is no loss"


def test_the_frontier_only_falls() -> None:
    generator = np.random.default_rng(0)
    losses, sizes = generator.exponential(size=40).tolist(), generator.integers(1, 9, 40).tolist()
    found = frontier(losses, sizes)
    taken = [sum(size for size, keep in zip(sizes, choice, strict=True) if keep) for choice in found]
    assert taken[0] == 0
    assert taken == sorted(taken)
    assert found[-1] == [True] * 40


def test_a_line_is_corrected_by_what_was_measured() -> None:
    assert line_through([Measured(2.0, 3.0)]) == Line(0.0, 1.5)
    line = line_through([Measured(2.0, 3.0), Measured(1.0, 1.75)])
    assert (line.floor, line.slope) == pytest.approx((0.5, 1.25))
    assert line.allows(line.expect(0.7)) == pytest.approx(0.7)
    assert line.allows(0.4) < 0
    assert line_through([Measured(2.0, 1.0), Measured(1.0, 1.5)]) == Line(0.0, 1.5), "one that falls is noise"
