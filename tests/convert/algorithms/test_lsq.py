"""Learned steps: gradients against the paper's, torch's own fake quantization with a learned scale, and finite differences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.algorithms import lsq, rtn
from formats.qtensor import QTensor
from formats.scheme import FP8_E4M3, INT8, SCHEMES, Grid


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_int8_is_torchs_own_fake_quantization_with_a_learned_scale() -> None:
    x, step, weighing = _random(37, 13), torch.tensor([0.011]), _random(37, 13, seed=1)
    ours, theirs = [(x.clone().requires_grad_(), step.clone().requires_grad_()) for _ in range(2)]
    found = lsq.fake_quantize(ours[0], ours[1], INT8)
    expected = torch._fake_quantize_learnable_per_tensor_affine(theirs[0], theirs[1], torch.zeros(1), -127, 127, 1.0)
    (found * weighing).sum().backward()
    (expected * weighing).sum().backward()
    assert torch.allclose(found, expected, atol=1e-6)
    assert (x.abs() > 127 * step).any(), "something has to be clipped"
    assert torch.equal(ours[0].grad, theirs[0].grad)
    assert torch.allclose(ours[1].grad, theirs[1].grad, rtol=1e-4)


@pytest.mark.parametrize("grid", [INT8, FP8_E4M3], ids=["int8", "fp8"])
def test_the_scales_gradient_is_that_of_the_rounded_function_where_no_code_changes(grid: Grid) -> None:
    """With codes held, ``s * code`` has the slope ``code``; the paper's slope is that less ``v / s``, the part of the straight-through
    estimator, which is what moving ``v`` along with ``s`` takes away."""
    values = _random(64).double() * 3
    step = torch.tensor(0.02 if grid is INT8 else 0.004, dtype=torch.float64, requires_grad=True)
    h = 1e-7

    def loss(scale: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        return rtn.to_nearest((moved / scale).float().clone(), grid).double().mul(scale).square().sum() / 2

    inside = (values / step).abs() <= grid.high
    lsq.fake_quantize(values, step, grid).square().sum().div(2).backward()
    quantized = rtn.to_nearest((values / step.detach()).float(), grid).double() * step.detach()
    by_codes = (loss(step.detach() + h, values) - loss(step.detach() - h, values)) / (2 * h)
    through = (quantized * values / step.detach())[inside].sum()
    assert (~inside).any()
    assert step.grad.item() == pytest.approx((by_codes - through).item(), rel=1e-4)


@pytest.mark.parametrize("grid", [INT8, FP8_E4M3], ids=["int8", "fp8"])
def test_values_beyond_the_grid_have_no_gradient_and_the_scale_all_of_it(grid: Grid) -> None:
    values = torch.tensor([0.0, 3.0 * grid.high, -2.0 * grid.high], requires_grad=True)
    scale = torch.tensor(1.0, requires_grad=True)
    lsq.fake_quantize(values, scale, grid).backward(torch.tensor([1.0, 1.0, 10.0]))
    assert values.grad.tolist() == [1.0, 0.0, 0.0]
    assert scale.grad.item() == grid.high - 10 * grid.high


def test_tokens_that_are_scaled_as_they_come_pass_their_gradient() -> None:
    x = _random(2, 5, 8).requires_grad_()
    activation = SCHEMES["int8-dynamic"].activation
    assert activation is not None
    seen = lsq.pass_through(x, activation)
    seen.backward(torch.full_like(x, 2.0))
    expected = rtn.quantize(x.detach().reshape(10, 8), activation, scale_dtype=torch.float32).dequantize()
    assert torch.allclose(seen.detach().reshape(10, 8), expected)
    assert torch.equal(x.grad, torch.full_like(x, 2.0))


@given(seed=st.integers(0, 1000), name=st.sampled_from(["int8-dynamic", "int8-weight-only-g32", "fp8-static", "fp8-block"]))
@settings(deadline=None, max_examples=30)
def test_training_begins_at_the_codes_it_is_given_and_ends_in_what_it_computed(seed: int, name: str) -> None:
    quantization = SCHEMES[name].weight
    weight = _random(128, 128, seed=seed)
    rounded = rtn.quantize(weight.clone(), quantization, scale_dtype=torch.bfloat16)
    chosen = QTensor(rounded.values.roll(1, dims=1), rounded.scale, quantization)  # far from rounding, as GPTQ's may be
    for codes in (rounded, chosen):
        begun = lsq.within_codes(weight, codes)
        again = lsq.codes(begun, codes.scale, quantization)
        assert torch.equal(again.values.float(), codes.values.float())
        computed = lsq.fake_quantize_weight(begun, lsq.stored(codes.scale.float().log(), torch.bfloat16), quantization)
        assert torch.equal(computed, codes.dequantize())
    assert (lsq.within_codes(weight, rounded) == weight).float().mean() > 0.99
