"""Intervals against scipy's own, on sums over blocks; and what a limit inside one is said to mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from convert.check import _with_doubt
from convert.divergence import compare_logits
from convert.intervals import block_lengths, bootstrap, difference, drop, undecided, wilson
from convert.report import Blocks, Interval, at_least, at_most


def skewed(blocks: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Sums of a skewed quantity over blocks of several lengths, as a KL divergence is."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(20, 33, blocks)
    return rng.lognormal(-4, 1, blocks) * counts, counts


@pytest.mark.parametrize("blocks", [7, 64, 130])
def test_a_bootstrap_is_that_of_scipy(blocks: int) -> None:
    sums, counts = skewed(blocks)
    found = bootstrap(sums.tolist(), counts.tolist())
    assert found is not None
    oracle = stats.bootstrap(
        (sums, counts),
        lambda s, c, axis=-1: s.sum(axis) / c.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="BCa",
        rng=np.random.default_rng(5),
    ).confidence_interval
    width = oracle.high - oracle.low
    assert found.low == pytest.approx(oracle.low, abs=0.04 * width)
    assert found.high == pytest.approx(oracle.high, abs=0.06 * width)
    assert bootstrap(sums.tolist(), counts.tolist()) == found


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Of 100 samples of 64 blocks of a quantity about as skewed as a KL divergence over 32 tokens."""
    truth = float(np.exp(-4 + 0.5**2 / 2))
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        found = bootstrap((rng.lognormal(-4, 0.5, 64) * 32).tolist(), [32] * 64)
        assert found is not None
        held += found.low <= truth <= found.high
    assert 90 <= held <= 99


def test_what_cannot_vary_or_cannot_be_drawn_again() -> None:
    assert bootstrap([0.0, 0.0, 0.0], [3, 3, 3]) == Interval(0.0, 0.0)
    assert bootstrap([0.3, 0.1 + 0.2], [3, 3]) is not None
    assert bootstrap([1.0], [3]) is None
    assert bootstrap([1.0, float("nan")], [3, 3]) is None


@pytest.mark.parametrize(("length", "expected"), [(1, [1]), (64, [64]), (65, [33, 32]), (193, [49, 48, 48, 48]), (512, [64] * 8)])
def test_blocks_are_as_even_as_they_can_be(length: int, expected: list[int]) -> None:
    assert block_lengths(length) == expected


@pytest.mark.parametrize(("right", "asked"), [(0, 1), (0, 40), (7, 40), (40, 40), (499, 1000)])
def test_wilson_is_that_of_scipy(right: int, asked: int) -> None:
    oracle = stats.binomtest(right, asked).proportion_ci(method="wilson")
    assert wilson(right, asked).low == pytest.approx(oracle.low, abs=1e-12)
    assert wilson(right, asked).high == pytest.approx(oracle.high, abs=1e-12)


def test_a_drop_is_held_as_often_as_it_says_and_is_never_certain() -> None:
    rng = np.random.default_rng(0)
    trials = rng.multinomial(50, [0.12, 0.04, 0.84], 2000)
    held = [found.low <= 0.08 <= found.high for lost, gained, _ in trials if (found := drop(50, int(lost), int(gained)))]
    assert 0.93 <= np.mean(held) <= 0.98
    assert drop(10, 0, 0).high == pytest.approx(1.959964 * np.sqrt(2 / 12 / 12))
    assert drop(10, 10, 0).high == 1.0


def test_a_limit_inside_the_interval_is_decided_by_the_value_and_said_to_be_noise() -> None:
    inside = _with_doubt(at_most("kl", 0.04, 0.05, "nats", "tail", Interval(0.035, 0.06)), 4096, "tokens")
    assert inside.passed
    assert inside.detail == "too few tokens to tell: the limit lies within the noise of 4,096, about 16,000 would tell; tail"
    missed = _with_doubt(at_least("top1", 0.84, 0.85, "share", interval=Interval(0.82, 0.87)), 4096, "tokens")
    assert not missed.passed
    assert "about 37,000 would tell" in missed.detail
    assert "not even 4,096,000 would" in undecided(at_most("kl", 0.05, 0.05, "nats", "", Interval(0.04, 0.06)), 4096, "tokens")
    for limit in (0.02, 0.07):
        check = at_most("kl", 0.04, limit, "nats", "tail", Interval(0.035, 0.06))
        assert _with_doubt(check, 4096, "tokens") == check


def test_what_is_hard_for_both_cancels_out_of_a_difference() -> None:
    rng = np.random.default_rng(0)
    hard = rng.lognormal(-4, 1, 64) * 32

    def blocks(kl: np.ndarray) -> Blocks:
        return Blocks((32,) * 64, tuple(kl), (30,) * 64, (31,) * 64, tuple(kl))

    one, other = blocks(hard), blocks(hard * 1.05 + rng.normal(0, 0.01, 64))
    found = difference(other, one)
    assert found is not None
    assert 0 < found.low < found.high < 0.1 * hard.mean()
    apart = [bootstrap(item.kl_nats, item.tokens) for item in (one, other)]
    assert apart[0] is not None
    assert apart[1] is not None
    assert apart[1].low < apart[0].high, "each by itself, they would be taken for the same"
    with pytest.raises(ValueError, match="not the same tokens"):
        difference(one, Blocks((16,) * 4, (0.0,) * 4, (0,) * 4, (0,) * 4, (0.0,) * 4))


def test_blocks_of_a_comparison_add_up_to_what_it_says(tmp_path: Path) -> None:
    """Sequences of 71 tokens are cut into blocks of 36 and 35; every mean is that of its blocks."""
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(3, 71, 7)).astype(np.float32), rng.integers(0, 7, (3, 71))
    (logits + rng.normal(size=logits.shape, scale=0.3)).astype(np.float32).tofile(tmp_path / "b")
    logits.tofile(tmp_path / "a")
    found = compare_logits(tmp_path / "a", tmp_path / "b", tokens, 7)
    assert found.blocks is not None
    assert found.blocks.tokens == (36, 35) * 3
    assert found.blocks.predicted == (36, 34) * 3
    assert sum(found.blocks.kl_nats) / 213 == pytest.approx(found.kl_nats, rel=1e-12)
    assert sum(found.blocks.same) / 213 == found.top1
    assert np.exp(sum(found.blocks.excess_nats) / 210) == pytest.approx(found.perplexity_ratio, rel=1e-12)
    for interval, value in (
        (found.kl_interval, found.kl_nats),
        (found.top1_interval, found.top1),
        (found.ratio_interval, found.perplexity_ratio),
    ):
        assert interval is not None
        assert interval.low < value < interval.high
