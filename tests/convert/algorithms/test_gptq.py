from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.algorithms import gptq, rtn
from convert.algorithms.output_error import output_error
from formats.scheme import BLOCK_128, FP8_E4M3, INT8, SCHEMES, Grid, Quantization, per_group

SCHEMES_TRIED = ["int8-dynamic", "fp8-dynamic", "fp8-static"]


def layer(out: int, columns: int, seed: int = 0, tokens: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the Hessian of correlated inputs, some channels of which are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    x = torch.randn(tokens or 4 * columns + 20, columns, generator=generator) @ mix * torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(out, columns, generator=generator), x.T @ x


def textbook(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, grid: Grid, *, damping: float, order: torch.Tensor
) -> torch.Tensor:
    """Optimal brain quantization in a fixed order, one column at a time, float64, the inverse updated by elimination
    (arXiv 2208.11580, equations 3 and 4; arXiv 2210.17323, section 3.2). Gives codes."""
    left, h = weight.double().clone(), hessian.double().clone()
    h.diagonal().add_(damping * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    codes = torch.zeros_like(left)
    for i in order.tolist():
        code = (left[:, i] / scale[:, i].double()).clamp(grid.low, grid.high)
        codes[:, i] = code.round() if grid.kind == "int" else code.float().to(torch.float8_e4m3fn).double()
        error = (left[:, i] - codes[:, i] * scale[:, i].double()) / inverse[i, i]
        left -= error[:, None] * inverse[i][None, :]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def order_of(hessian: torch.Tensor, activation_order: bool) -> torch.Tensor:
    return torch.argsort(hessian.diagonal(), descending=True, stable=True) if activation_order else torch.arange(len(hessian))


@given(
    out=st.integers(1, 9),
    columns=st.sampled_from([1, 2, 13, 16, 17, 40, 67]),
    block_size=st.sampled_from([1, 5, 16, 128]),
    name=st.sampled_from(SCHEMES_TRIED),
    activation_order=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_codes_are_those_of_the_textbook(out: int, columns: int, block_size: int, name: str, activation_order: bool, seed: int) -> None:
    weight, hessian = layer(out, columns, seed)
    scheme = SCHEMES[name].weight
    result = gptq.quantize(
        weight, scheme, scale_dtype=torch.float32, hessian=hessian, block_size=block_size, activation_order=activation_order
    ).qtensor
    scale = result.spread_scale().expand(weight.shape)
    expected = textbook(weight, hessian, scale, scheme.grid, damping=0.01, order=order_of(hessian, activation_order))
    # In float32 a value close to a tie may go the other way, and then the columns after it: hardly ever in so few elements.
    same = (result.values.double() == expected).all(dim=1)
    assert (~same).sum() <= 1
    ours, theirs = (output_error(weight, codes.float() * scale, hessian=hessian).item() for codes in (result.values, expected))
    assert ours == pytest.approx(theirs, rel=0.2, abs=1e-7)


@pytest.mark.parametrize("name", ["int8-dynamic", "fp8-dynamic", "fp8-static", "int8-weight-only-g32", "mxfp8"])
@pytest.mark.parametrize("activation_order", [True, False])
def test_the_weight_is_further_off_than_rounded_and_the_output_nearer(name: str, activation_order: bool) -> None:
    weight, hessian = layer(48, 192)
    scheme = SCHEMES[name].weight
    rounded = rtn.quantize(weight, scheme, scale_dtype=torch.bfloat16)
    result = gptq.quantize(weight, scheme, scale_dtype=torch.bfloat16, hessian=hessian, activation_order=activation_order)
    assert torch.equal(result.qtensor.scale.float(), rounded.scale.float())
    assert result.qtensor.scale.dtype == rounded.scale.dtype
    assert result.damping == 0.01
    ours, theirs = result.qtensor.dequantize(), rounded.dequantize()
    assert (ours - weight).norm() > 1.02 * (theirs - weight).norm()
    assert output_error(weight, ours, hessian=hessian) < 0.8 * output_error(weight, theirs, hessian=hessian)


def test_tiles_of_blocks_keep_their_scales() -> None:
    weight, hessian = layer(256, 256)
    scheme = Quantization(FP8_E4M3, BLOCK_128)
    rounded = rtn.quantize(weight, scheme, scale_dtype=torch.float32)
    result = gptq.quantize(weight, scheme, scale_dtype=torch.float32, hessian=hessian).qtensor
    assert torch.equal(result.scale, rounded.scale)
    errors = [output_error(weight, q.dequantize(), hessian=hessian) for q in (result, rounded)]
    assert errors[0] < 0.8 * errors[1]


def test_weights_with_the_same_input_are_what_each_would_be_alone() -> None:
    (q, hessian), (k, _), (v, _) = layer(48, 80), layer(16, 80, 1), layer(1, 80, 2)
    factor = gptq.factorise(hessian)
    for scheme in (SCHEMES["int8-dynamic"].weight, SCHEMES["fp8-static"].weight, Quantization(INT8, per_group(16))):
        together = gptq.quantize_together([q, k, v], scheme, scale_dtype=torch.bfloat16, factor=factor)
        for weight, result in zip((q, k, v), together, strict=True):
            alone = gptq.quantize(weight, scheme, scale_dtype=torch.bfloat16, hessian=hessian).qtensor
            assert torch.equal(alone.scale, result.qtensor.scale)
            # other shapes are summed in another order, so that ties may differ
            assert (alone.values.float() == result.qtensor.values.float()).all(dim=1).float().mean() > 0.9


def test_groups_taken_on_the_way_see_what_the_weight_has_become() -> None:
    weight, hessian = layer(24, 96)
    scheme = Quantization(INT8, per_group(32))
    arguments = {"scale_dtype": torch.float32, "hessian": hessian, "activation_order": False}
    still = gptq.quantize(weight, scheme, **arguments).qtensor
    moving = gptq.quantize(weight, scheme, static_groups=False, **arguments).qtensor
    assert torch.equal(moving.scale[:, 0], still.scale[:, 0])
    assert torch.equal(moving.values[:, :32], still.values[:, :32])
    assert not torch.equal(moving.scale[:, 1:], still.scale[:, 1:])
    # each group's largest magnitude is on the grid's last code, as the group was when it was reached
    assert (moving.values.view(24, 3, 32).abs().amax(dim=2) >= 120).float().mean() > 0.8
    with pytest.raises(ValueError, match="columns in their places"):
        gptq.quantize(weight, scheme, scale_dtype=torch.float32, hessian=hessian, static_groups=False)


def test_a_search_for_scales_helps_where_an_element_stands_out() -> None:
    weight, hessian = layer(16, 256)
    weight[:, 7] = 40  # a large weight on a channel that hardly ever speaks
    hessian[7, :] *= 1e-3
    hessian[:, 7] *= 1e-3
    scheme = SCHEMES["int8-dynamic"].weight
    plain, searched = (
        gptq.quantize(weight, scheme, scale_dtype=torch.float32, hessian=hessian, clip_search=ratios).qtensor
        for ratios in ((), rtn.CLIP_RATIOS)
    )
    assert (searched.scale < plain.scale).all()
    assert output_error(weight, searched.dequantize(), hessian=hessian) < 0.7 * output_error(weight, plain.dequantize(), hessian=hessian)


def test_a_dead_input_takes_part_in_nothing() -> None:
    weight, hessian = layer(8, 24)
    dead = [0, 11, 23]
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    alive = [i for i in range(24) if i not in dead]
    result = gptq.quantize(weight, SCHEMES["int8-dynamic"].weight, scale_dtype=torch.float32, hessian=hessian)
    assert result.dead == 3
    assert not result.qtensor.values[:, dead].any()
    small = hessian[alive][:, alive]
    expected = textbook(weight[:, alive], small, result.qtensor.scale.expand(8, 21), INT8, damping=0.01, order=order_of(small, True))
    assert (result.qtensor.values[:, alive].double() == expected).all()


def test_no_input_at_all_is_rounding_to_zero_and_not_nan() -> None:
    result = gptq.quantize(torch.ones(3, 5), SCHEMES["int8-dynamic"].weight, scale_dtype=torch.float32, hessian=torch.zeros(5, 5))
    assert result.dead == 5
    assert not result.qtensor.values.any()


@pytest.mark.parametrize(("off_diagonal", "expected"), [(0.5, 0.01), (1.05, 0.1), (1.5, 1.0)])
def test_the_damping_grows_until_it_is_enough_and_is_told(off_diagonal: float, expected: float) -> None:
    hessian = torch.tensor([[1.0, off_diagonal], [off_diagonal, 1.0]])
    assert gptq.factorise(hessian).damping == pytest.approx(expected)


@pytest.mark.parametrize("bad", [5.0, float("nan"), float("inf")])
def test_what_cannot_be_factorised_is_an_error_and_never_rounded(bad: float) -> None:
    hessian = torch.eye(40)
    hessian[3, 20] = hessian[20, 3] = bad
    with pytest.raises(gptq.FactorisationError, match=r"0\.01, 0\.1, 1 of its mean"):
        gptq.quantize(torch.ones(2, 40), SCHEMES["int8-dynamic"].weight, scale_dtype=torch.float32, hessian=hessian)


def test_what_is_not_finite_in_a_weight_reaches_its_scale() -> None:
    weight, hessian = layer(4, 16)
    weight[2, 5] = float("nan")
    result = gptq.quantize(weight, SCHEMES["int8-dynamic"].weight, scale_dtype=torch.bfloat16, hessian=hessian).qtensor
    assert result.scale.isfinite().flatten().tolist() == [True, True, False, True]


def test_llm_int8_has_no_choice_of_codes() -> None:
    weight, hessian = layer(4, 16)
    with pytest.raises(ValueError, match="magnitudes"):
        gptq.quantize(weight, SCHEMES["llm-int8"].weight, scale_dtype=torch.bfloat16, hessian=hessian)


def test_what_is_given_is_left_as_it_was_and_twice_is_the_same() -> None:
    weight, hessian = layer(20, 300)
    before = weight.clone(), hessian.clone()
    first, second = (gptq.quantize(weight, SCHEMES["fp8-dynamic"].weight, scale_dtype=torch.float32, hessian=hessian) for _ in range(2))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])
    assert torch.equal(first.qtensor.values.view(torch.uint8), second.qtensor.values.view(torch.uint8))


@pytest.mark.parametrize("size", [1, 2, 255, 257, 600])
def test_the_factor_is_the_row_scaled_cholesky_factor_of_the_inverse(size: int) -> None:
    _, hessian = layer(1, size)
    factor = gptq.factorise(hessian, activation_order=False)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(size)
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = expected / expected.diagonal()[:, None]
    torch.testing.assert_close(factor.steps.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("grid", [INT8, FP8_E4M3])
@pytest.mark.parametrize(
    ("out", "columns", "groups", "block_size"), [(5, 7, 1, 128), (33, 40, 1, 16), (17, 300, 3, 128), (576, 1536, 1, 128)]
)
def test_the_kernel_gives_what_the_calls_give(grid: Grid, out: int, columns: int, groups: int, block_size: int) -> None:
    weight, hessian = layer(out, columns)
    steps = gptq.factorise(hessian.cuda(), activation_order=False).steps
    scale = weight.abs().amax(dim=1).expand(groups, out).cuda() / grid.high * torch.linspace(0.7, 1, groups).cuda()[:, None]
    of_column = torch.randint(0, groups, (columns,), generator=torch.Generator().manual_seed(0)).cuda()
    fused, called = (
        gptq.solve(weight.cuda(), steps, grid, scale=scale, groups=of_column, block_size=block_size, fused=fused) for fused in (True, False)
    )
    # Sums in another order: a tie may go the other way, and with it later columns of its row.
    first = min(columns, block_size)
    assert (fused.float() == called.float())[:, :first].float().mean() > 0.99
    spread = scale[of_column].T
    errors = [output_error(weight.cuda(), codes.float() * spread, hessian=hessian.cuda()).item() for codes in (fused, called)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)


@pytest.mark.gpu
def test_cuda_is_as_good_as_the_cpu_and_the_same_twice() -> None:
    weight, hessian = layer(192, 576)
    for name in SCHEMES_TRIED:
        scheme = SCHEMES[name].weight
        here = gptq.quantize(weight, scheme, scale_dtype=torch.bfloat16, hessian=hessian).qtensor
        there, again = (gptq.quantize(weight.cuda(), scheme, scale_dtype=torch.bfloat16, hessian=hessian.cuda()).qtensor for _ in range(2))
        assert torch.equal(there.values.view(torch.uint8), again.values.view(torch.uint8))
        assert torch.equal(here.scale, there.scale.cpu())
        errors = [output_error(weight, q.dequantize().cpu(), hessian=hessian).item() for q in (here, there)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)
