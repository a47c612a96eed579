from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import statistics

SHAPES = [(1, 1), (1, 13), (7, 1), (31, 17), (600, 40)]


def inputs(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * torch.exp(2 * torch.randn(shape[1], generator=generator)) + 0.3).to(dtype)


def seen(make: object, x: torch.Tensor, sizes: list[int]) -> object:
    """What ``make()`` holds after ``x`` in pieces of ``sizes``, the second half of the pieces by way of a merge."""
    first, second = make(), make()  # type: ignore[operator]
    pieces = x.split([*sizes, len(x) - sum(sizes)])
    for i, piece in enumerate(pieces):
        (first if i < len(pieces) / 2 else second).update(piece)
    first.merge(second)
    return first


@given(seed=st.integers(0, 1000), shape=st.sampled_from(SHAPES), dtype=st.sampled_from([torch.float32, torch.bfloat16]), data=st.data())
@settings(deadline=None, max_examples=40)
def test_in_pieces_and_merged_is_the_same_as_at_once(seed: int, shape: tuple[int, int], dtype: torch.dtype, data: st.DataObject) -> None:
    x = inputs(shape, seed, dtype)
    cut = data.draw(st.integers(0, len(x)))
    sizes = [cut, data.draw(st.integers(0, len(x) - cut))]
    f, numbers = x.float(), x.double()
    assert torch.equal(seen(statistics.AbsMax, x, sizes).value, f.abs().max())
    low_high = seen(statistics.MinMax, x, sizes)
    assert (low_high.low, low_high.high) == (f.min(), f.max())
    assert torch.equal(seen(lambda: statistics.ChannelAbsMax(shape[1]), x, sizes).value, f.abs().amax(dim=0))
    mean = seen(lambda: statistics.ChannelMean(shape[1]), x, sizes)
    torch.testing.assert_close(mean.value.double(), numbers.mean(dim=0), rtol=1e-4, atol=1e-5)
    mean = seen(lambda: statistics.ChannelMean(shape[1], magnitude=True), x, sizes)
    torch.testing.assert_close(mean.value.double(), numbers.abs().mean(dim=0), rtol=1e-4, atol=1e-5)
    whole = statistics.Histogram()
    whole.update(x)
    assert torch.equal(seen(statistics.Histogram, x, sizes).counts, whole.counts)
    assert whole.counts.sum() == x.numel()


@pytest.mark.parametrize("features", [1, 17, 384, 385, 801])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_hessian_is_the_explicit_product(features: int, dtype: torch.dtype) -> None:
    x = inputs((1500, features), dtype=dtype)
    hessian = seen(lambda: statistics.Hessian(features), x, [3, 600])
    expected = x.double().T @ x.double()
    assert (hessian.value.double() - expected).norm() < 5e-6 * expected.norm()
    assert torch.equal(hessian.value, hessian.value.T)
    # reading it does not disturb what comes after
    hessian.update(x)
    assert (hessian.value.double() - 2 * expected).norm() < 5e-6 * 2 * expected.norm()
    assert hessian.tokens == 3000


@pytest.mark.parametrize("percentile", [0, 10, 50, 99, 99.9, 100])
def test_a_histogram_has_the_percentiles_of_numpy(percentile: float) -> None:
    for dtype, tolerance in ((torch.bfloat16, 0), (torch.float32, 2**-8), (torch.float16, 2**-8)):
        x = inputs((600, 40), dtype=dtype)
        histogram = statistics.Histogram()
        histogram.update(x)
        rank = max(1, int(np.ceil(percentile / 100 * x.numel() - 1e-9)))
        ours = statistics.magnitudes()[torch.searchsorted(histogram.counts.cumsum(0), rank)].item()
        theirs = np.percentile(x.float().abs().numpy(), percentile, method="inverted_cdf")
        assert ours == pytest.approx(theirs, rel=tolerance, abs=0)


def test_what_is_not_finite_stays_visible() -> None:
    x = torch.ones(4, 3)
    x[2, 1] = float("nan")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        largest, channels, histogram = statistics.AbsMax(), statistics.ChannelAbsMax(3), statistics.Histogram()
        for observer in (largest, channels, histogram):
            observer.update(x.to(dtype))
        assert largest.value.isnan()
        assert channels.value.isnan().tolist() == [False, True, False]
        assert not statistics.magnitudes()[histogram.counts > 0].isfinite().all()


def test_rows_are_spaced_over_each_update() -> None:
    rows = statistics.Rows(3)
    rows.update(torch.arange(9).view(9, 1))
    rows.update(torch.arange(2).view(2, 1))
    rows.update(torch.empty(0, 1, dtype=torch.int64))
    assert rows.value.flatten().tolist() == [0, 3, 6, 0, 1]
    with pytest.raises(ValueError, match="no row"):
        statistics.Rows(3).value  # noqa: B018


@pytest.mark.parametrize("features", [1, 13, 700])
def test_factors_of_sixteen_bits_change_nothing_of_inputs_that_have_them(features: int) -> None:
    """Beside inputs in float32, and the setting is what it was behind it."""
    was = torch.backends.mkldnn.matmul.fp32_precision
    x = inputs((600, features), dtype=torch.bfloat16)
    kept = statistics.Hessian(features)
    with statistics.sixteen_bit_factors():
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        kept.update(x)
    assert torch.backends.mkldnn.matmul.fp32_precision == was
    expected = x.double().T @ x.double()
    assert (kept.value.double() - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize(("dtype", "has", "expected"), [("bfloat16", True, "bf16"), ("float32", True, "none"), ("bfloat16", False, "none")])
def test_an_observer_multiplies_inputs_of_bfloat16_alone_by_their_instructions(
    dtype: str, has: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from convert.crew import Crew
    from convert.observe import Observer

    seen: list[tuple[int, str]] = []
    update = statistics.Hessian._add

    def spy(self: Any, panel: slice, x: torch.Tensor) -> None:
        seen.append((len(x), torch.backends.mkldnn.matmul.fp32_precision))
        update(self, panel, x)

    monkeypatch.setattr(statistics.Hessian, "_add", spy)
    monkeypatch.setattr(statistics, "multiplies_bfloat16", lambda: has)
    model = torch.nn.Module()
    model.layer, model.other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    observer = Observer(SimpleNamespace(model=model, experts={}), None)  # type: ignore[arg-type]
    observer.want(["layer", "other"], "hessian")
    with observer.watching() as shown, torch.no_grad():
        model.layer.to(getattr(torch, dtype))(inputs((5, 4), dtype=getattr(torch, dtype)))
        model.other(inputs((6, 4)))
    observer.take([shown], Crew())
    assert sorted(seen) == [(5, expected), (6, "none")]


@pytest.mark.gpu
def test_cuda_sees_the_same() -> None:
    x = inputs((3000, 2500), dtype=torch.bfloat16)
    pairs = []
    for device in ("cpu", "cuda"):
        kept = [
            statistics.AbsMax(device),
            statistics.ChannelAbsMax(2500, device),
            statistics.Histogram(device),
            statistics.Hessian(2500, device),
        ]
        for observer in kept:
            observer.update(x.to(device))
        pairs.append(kept)
    for here, there in zip(*pairs, strict=True):
        if isinstance(here, statistics.Histogram):
            assert torch.equal(here.counts, there.counts.cpu())
        elif isinstance(here, statistics.Hessian):
            expected = x.double().T @ x.double()
            # 2.8e-6 on an H100, whose 16-bit units cut off where others round.
            assert (there.value.cpu().double() - expected).norm() < 1e-5 * expected.norm()
        else:
            assert torch.equal(here.value, there.value.cpu())
