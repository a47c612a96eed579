"""How sure a number is that was measured on a sample: intervals, what a limit inside one means, and whether two numbers differ.

Neighbouring tokens are not independent, so what is drawn again is blocks of neighbours in one sequence, which do not overlap (Carlstein
1986). Intervals are bias-corrected and accelerated (Efron 1987, "Better bootstrap confidence intervals", section 4), because a KL
divergence leans to the right; drawn with a fixed seed, so that the same logits give the same report.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from convert.report import Blocks, Check, Interval

LEVEL = 0.95
#: Tokens in a block, at most. On 8,192 tokens of the sample, INT8 W8A8, the standard error of the mean KL is 0.0006 nats over single
#: tokens, 0.0010 over blocks of 32, 0.0012 over blocks of 64 and over sequences of 512: what tokens share reaches no further than that.
BLOCK = 64
RESAMPLES = 10_000
SEED = 0
#: Resamples drawn at a time: 250 x 4,096 blocks of 8 bytes are 8 MB.
CHUNK = 250


def block_lengths(length: int) -> list[int]:
    """Lengths of the blocks into which a sequence is cut: as even as possible, :data:`BLOCK` tokens at most."""
    count = -(-length // BLOCK)
    return [length // count + (i < length % count) for i in range(count)]


def bootstrap(sums: Sequence[float], counts: Sequence[float]) -> Interval | None:
    """Of ``sum(sums) / sum(counts)``, a mean over all tokens, from the sums and counts of each block.

    None with fewer than two blocks, or where a sum is not finite.
    """
    above, below = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    blocks = len(above)
    if blocks < 2 or not np.isfinite(above).all():
        return None
    mean = above.sum() / below.sum()
    draw = np.random.default_rng(SEED)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, CHUNK):
        drawn = draw.integers(0, blocks, (min(CHUNK, RESAMPLES - start), blocks))
        means[start : start + CHUNK] = above[drawn].sum(1) / below[drawn].sum(1)
    # Sums of the same blocks in another order differ in the last bits.
    if np.ptp(means) <= 1e-12 * abs(mean):
        return Interval(float(mean), float(mean))
    normal = NormalDist()
    share = ((means < mean).mean() + (means <= mean).mean()) / 2
    bias = normal.inv_cdf(float(np.clip(share, 0.5 / RESAMPLES, 1 - 0.5 / RESAMPLES)))
    without = (above.sum() - above) / (below.sum() - below)
    away = without.mean() - without
    acceleration = float((away**3).sum() / (6 * (away**2).sum() ** 1.5))
    ends = []
    for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        z = bias + normal.inv_cdf(tail)
        ends.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = np.quantile(means, ends)
    return Interval(float(low), float(high))


def kl_interval(blocks: Blocks) -> Interval | None:
    """Of the mean KL divergence, nats a token."""
    return bootstrap(blocks.kl_nats, blocks.tokens)


def top1_interval(blocks: Blocks) -> Interval | None:
    """Of the share of tokens with the same most likely successor."""
    return bootstrap(blocks.same, blocks.tokens)


def ratio_interval(blocks: Blocks) -> Interval | None:
    """Of the perplexity ratio: both models read the same tokens, so it is exp of the mean of what one loses more than the other."""
    found = bootstrap(blocks.excess_nats, blocks.predicted)
    return found and Interval(_exp(found.low), _exp(found.high))


def difference(one: Blocks, other: Blocks) -> Interval | None:
    """Of ``one``'s mean KL divergence less ``other``'s, on the same tokens: block by block, so that what is hard for both cancels out.

    Raises ValueError where the tokens cannot be the same.
    """
    if one.tokens != other.tokens:
        raise ValueError(f"{len(one.tokens)} and {len(other.tokens)} blocks of other lengths: not the same tokens")
    return bootstrap([a - b for a, b in zip(one.kl_nats, other.kl_nats, strict=True)], one.tokens)


def recovery(above: Sequence[float], below: Sequence[float]) -> Interval | None:
    """Of ``sum(above) / sum(below)``, scores of the same documents, which are drawn again in pairs.

    None where some draws have nothing below, so that the sample is too small to say anything.
    """
    if sum(value != 0 for value in below) < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        found = bootstrap(above, below)
    return found if found and math.isfinite(found.low) and math.isfinite(found.high) else None


def wilson(right: int, asked: int) -> Interval:
    """Of a share of independent trials (Wilson 1927); of none it is all there is."""
    if not asked:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    share = right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def drop(asked: int, lost: int, gained: int) -> Interval:
    """Of the share right before less the share right after, of the same trials, of which ``lost`` were right only before and ``gained``
    only after (Bonett & Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data")."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    before, after = (lost + 1) / (asked + 2), (gained + 1) / (asked + 2)
    half = z * math.sqrt((before + after - (before - after) ** 2) / (asked + 2))
    return Interval(max(-1.0, before - after - half), min(1.0, before - after + half))


def undecided(check: Check, sample: int, what: str) -> str:
    """What to say of a limit that lies inside the interval of a value measured on ``sample`` tokens or prompts (``what``), and how many of
    them would tell; empty where it lies outside. An interval shrinks with the square root of the sample."""
    if check.interval is None or not check.interval.low <= check.limit <= check.interval.high:
        return ""
    end = check.interval.high if check.limit >= check.value else check.interval.low
    away = abs(check.limit - check.value)
    needed = sample * ((end - check.value) / away) ** 2 if away else math.inf
    enough = f"about {float(f'{needed:.2g}'):,.0f} would" if needed < 1000 * sample else f"not even {1000 * sample:,} would"
    return f"too few {what} to tell: the limit lies within the noise of {sample:,}, {enough} tell"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
