"""The choice against every choice there is, and the line against numbers that lie on one."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.mixed import Line, Measured, Option, bytes_of, choose, filled, frontier, line_through, loss_of

GROUPS = st.lists(
    st.lists(st.tuples(st.floats(0, 1, width=32), st.integers(1, 10**9)), min_size=1, max_size=3).map(
        lambda found: [Option(found[0][0], 0), *(Option(loss * found[0][0], size * (i > 0)) for i, (loss, size) in enumerate(found))]
    ),
    min_size=1,
    max_size=5,
)


def _kept(groups: list[tuple[float, int]]) -> list[list[Option]]:
    return [[Option(loss, 0), Option(0.0, size)] for loss, size in groups]


@given(GROUPS, st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_no_other_choice_takes_fewer_bytes(groups: list[list[Option]], share: float) -> None:
    total = loss_of(groups, [0] * len(groups))
    allowed = share * total
    choice = choose(groups, allowed=allowed)
    every = list(itertools.product(*(range(len(group)) for group in groups)))
    if choice is None:
        assert min(loss_of(groups, other) for other in every) > allowed
        return
    assert loss_of(groups, choice) <= allowed * (1 + 1e-12) + 1e-300
    # The solver's own tolerance is asked for on top, so that a choice may be missed which meets the bound by less than that.
    clear = [other for other in every if loss_of(groups, other) <= allowed - 4e-6 * total]
    assert all(bytes_of(groups, choice) <= bytes_of(groups, other) for other in clear)
    for i in (i for i, j in enumerate(choice) if j):
        assert loss_of(groups, [*choice[:i], 0, *choice[i + 1 :]]) > allowed, "nothing is changed for nothing"


def test_what_cannot_be_is_none_and_what_need_not_be_is_nothing() -> None:
    groups = _kept([(0.1, 1), (0.2, 1)])
    assert choose(groups, allowed=-0.1) is None
    assert choose(groups, allowed=0.31) == [0, 0]
    assert choose(groups, allowed=0.0) == [1, 1]
    assert choose(_kept([(0.1, 1), (-0.2, 1)]), allowed=0.0) == [1, 0], "noise below zero is no loss"
    assert choose([[Option(0.1, 0), Option(0.05, 0)]], allowed=0.04) is None


def test_another_scheme_of_the_same_size_comes_before_sixteen_bits() -> None:
    groups = [[Option(0.2, 0), Option(0.05, 0), Option(0.0, 10)], [Option(0.1, 0), Option(0.3, 0), Option(0.0, 10)]]
    assert choose(groups, allowed=0.16) == [1, 0]
    assert choose(groups, allowed=0.06) == [1, 2]
    assert choose(groups, allowed=0.04) == [2, 2]


def test_the_frontier_only_falls() -> None:
    generator = np.random.default_rng(0)
    groups = _kept(list(zip(generator.exponential(size=40).tolist(), generator.integers(1, 9, 40).tolist(), strict=True)))
    found = frontier(groups)
    taken = [bytes_of(groups, choice) for choice in found]
    assert taken[0] == 0
    assert taken == sorted(taken)
    assert found[-1] == [1] * 40


def test_a_line_is_corrected_by_what_was_measured() -> None:
    assert line_through([Measured(2.0, 3.0)]) == Line(0.0, 1.5)
    line = line_through([Measured(2.0, 3.0), Measured(1.0, 1.75)])
    assert (line.floor, line.slope) == pytest.approx((0.5, 1.25))
    assert line.allows(line.expect(0.7)) == pytest.approx(0.7)
    assert line.allows(0.4) < 0
    assert line_through([Measured(2.0, 1.0), Measured(1.0, 1.5)]) == Line(0.0, 1.5), "one that falls is noise"


def test_what_the_solver_prints_of_its_own_is_not_seen(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS prints through C, in rare cases that no test can rely on: here it always does."""
    milp = scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", lambda *a, **k: (ctypes.CDLL(None).puts(b"HighsMipSolverData::"), milp(*a, **k))[1])
    assert choose(_kept([(3.0, 5), (2.0, 1), (1.0, 1)]), allowed=3.5) == [0, 1, 1]
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_groups_are_taken_in_order_until_the_bytes_are_spent() -> None:
    groups = _kept([(1.0, 4), (1.0, 3), (1.0, 2), (1.0, 1)])
    assert filled([1, 0, 3, 2], groups, most=6) == [0, 1, 1, 1]
    assert filled([0, 1, 2, 3], groups, most=5) == [1, 0, 0, 1]
    assert filled([2], groups, most=1) == [0, 0, 0, 0]
