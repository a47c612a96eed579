from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize as oracle_quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.algorithms.rtn import CLIP_RATIOS, quantize, round_to_grid, tile_scales
from convert.numbers import error_bound
from formats.scheme import FP8_E4M3, INT8, SCHEMES, Quantization, per_group

SHAPES = [(1, 1), (1, 64), (7, 13), (64, 1), (3, 576), (127, 129)]


def random_weight(shape: tuple[int, int], seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp2(torch.randint(-20, 10, (shape[0], 1), generator=generator).float())
    return (torch.randn(shape, generator=generator) * rows).to(dtype)


@pytest.mark.parametrize("name", ["int8-dynamic", "fp8-dynamic"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_are_those_of_compressed_tensors_for_the_same_scales(name: str, shape: tuple[int, int], scale_dtype: torch.dtype) -> None:
    scheme = SCHEMES[name].weight
    weight = random_weight(shape, 1).clamp(-1e3, 1e3)
    ours = quantize(weight, scheme, scale_dtype=scale_dtype)
    args = QuantizationArgs(num_bits=8, type=scheme.grid.kind, symmetric=True, strategy="channel")
    theirs = oracle_quantize(weight.float(), ours.scale.float(), torch.zeros(1, dtype=torch.int8), args, dtype=ours.values.dtype)
    if scheme.grid.kind == "int":
        # compressed-tensors also uses the code -128, which a symmetric grid has no mirror for
        theirs = theirs.clamp(min=-127)
    assert torch.equal(ours.values.float(), theirs.float())


@given(seed=st.integers(0, 10_000), shape=st.sampled_from(SHAPES), name=st.sampled_from(["int8-dynamic", "fp8-dynamic"]))
@settings(deadline=None, max_examples=60)
def test_no_element_is_further_off_than_its_scheme_implies(seed: int, shape: tuple[int, int], name: str) -> None:
    weight = random_weight(shape, seed)
    result = quantize(weight, SCHEMES[name].weight, scale_dtype=torch.bfloat16)
    error = (result.dequantize() - weight.float()).abs()
    assert bool((error <= error_bound(weight.float(), result.scale, result.quantization.grid) * (1 + 1e-6)).all())


@pytest.mark.parametrize("name", ["int8-dynamic", "fp8-dynamic"])
def test_the_bound_is_tight_enough_to_catch_a_code_that_is_off_by_one(name: str) -> None:
    weight = random_weight((16, 256), 3)
    result = quantize(weight, SCHEMES[name].weight, scale_dtype=torch.bfloat16)
    bound = error_bound(weight.float(), result.scale, result.quantization.grid)
    step = result.scale.float() if name.startswith("int8") else torch.maximum(weight.float().abs() / 8, result.scale.float() * 2**-9)
    off_by_one = (result.dequantize() + step - weight.float()).abs()
    assert bool((off_by_one > bound).float().mean() > 0.45), "half of the errors point the same way as the step"
    assert bool(((result.dequantize() - step - weight.float()).abs() > bound).logical_or(off_by_one > bound).float().mean() > 0.9)


def test_a_row_of_zeros_has_scale_one_and_stays_zero() -> None:
    for name in ("int8-dynamic", "fp8-dynamic"):
        result = quantize(torch.zeros(3, 8, dtype=torch.bfloat16), SCHEMES[name].weight, scale_dtype=torch.bfloat16)
        assert result.scale.tolist() == [[1.0]] * 3
        assert not result.dequantize().any()


def test_a_row_too_small_for_its_scale_becomes_zero_and_not_nan() -> None:
    weight = torch.full((1, 4), 1e-7, dtype=torch.float32)
    result = quantize(weight, SCHEMES["int8-dynamic"].weight, scale_dtype=torch.float16)
    assert torch.isfinite(result.scale).all()
    assert torch.isfinite(result.dequantize()).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_reaches_the_scale_of_its_row_and_no_other(bad: float) -> None:
    weight = torch.ones(3, 8)
    weight[1, 5] = bad
    scale = quantize(weight, SCHEMES["int8-dynamic"].weight, scale_dtype=torch.bfloat16).scale
    assert torch.isfinite(scale).flatten().tolist() == [True, False, True]


def test_ties_go_to_even_and_what_is_out_of_range_is_clamped() -> None:
    codes = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300.0, -300.0])
    assert round_to_grid(codes, INT8).tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -127]
    assert round_to_grid(torch.tensor([500.0, -1e9, 17.0, 2**-10]), FP8_E4M3).float().tolist() == [448.0, -448.0, 16.0, 0.0]


def test_the_weight_given_is_left_as_it_was() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = random_weight((5, 7), 2, dtype)
        before = weight.clone()
        quantize(weight, SCHEMES["int8-dynamic"].weight, scale_dtype=torch.bfloat16)
        assert torch.equal(weight, before)


@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from(SHAPES),
    name=st.sampled_from(["int8-dynamic", "fp8-dynamic", "fp8-static"]),
    weighted=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_a_search_takes_the_best_of_what_it_tries(seed: int, shape: tuple[int, int], name: str, weighted: bool) -> None:
    weight = random_weight(shape, seed, torch.float32).clamp(-1e3, 1e3)
    energy = torch.rand(shape[1], generator=torch.Generator().manual_seed(seed)) if weighted else torch.ones(shape[1])
    scheme = SCHEMES[name].weight
    found = quantize(weight, scheme, scale_dtype=torch.float32, clip_search=CLIP_RATIOS, energy=energy if weighted else None)
    tried = []
    for ratio in (1.0, *CLIP_RATIOS):
        absmax = weight.abs().max() if name == "fp8-static" else weight.abs().amax(dim=1, keepdim=True)
        scale = (absmax.double() * ratio / scheme.grid.high).float()
        codes = (weight / scale).clamp(scheme.grid.low, scheme.grid.high)
        codes = codes.round() if scheme.grid.kind == "int" else codes.to(torch.float8_e4m3fn).float()
        tried.append((((codes * scale - weight).double() ** 2) * energy).sum(dim=1))
    least = torch.stack(tried).sum(dim=1).min() if name == "fp8-static" else torch.stack(tried).amin(dim=0)
    loss = (((found.dequantize() - weight).double() ** 2) * energy).sum(dim=1)
    assert torch.allclose(loss.sum() if name == "fp8-static" else loss, least, rtol=1e-4, atol=0)


def test_a_search_clips_what_stands_out_unless_it_matters() -> None:
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    weight[:, 9] = 12
    for scheme in (SCHEMES["int8-dynamic"].weight, Quantization(INT8, per_group(128))):
        plain, clipped = (tile_scales(weight, scheme, scale_dtype=torch.float32, clip_search=c, energy=e) for c, e in (
            ((), None), (CLIP_RATIOS, torch.where(torch.arange(512) == 9, 1e-6, 1.0))))  # fmt: skip
        assert (clipped[:, 0] <= 0.6 * plain[:, 0]).all()
        assert torch.equal(tile_scales(weight, scheme, scale_dtype=torch.float32, clip_search=CLIP_RATIOS)[:, 0], plain[:, 0])


def test_a_search_is_refused_where_the_scale_is_the_magnitude() -> None:
    with pytest.raises(ValueError, match="largest magnitude itself"):
        quantize(torch.ones(2, 2), SCHEMES["llm-int8"].weight, scale_dtype=torch.bfloat16, clip_search=(0.9,))


def test_a_search_over_powers_of_two_takes_one() -> None:
    weight = random_weight((4, 64), 1)
    scale = quantize(weight, SCHEMES["mxfp8"].weight, scale_dtype=torch.bfloat16, clip_search=(0.5, 0.25)).scale.float()
    plain = quantize(weight, SCHEMES["mxfp8"].weight, scale_dtype=torch.bfloat16).scale.float()
    assert ((scale == plain) | (scale == plain / 2) | (scale == plain / 4)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["int8-dynamic", "fp8-dynamic"])
def test_cuda_gives_the_same_bytes(name: str, scale_dtype: torch.dtype) -> None:
    # Of the last, row by row, absmax / high lies halfway between two bfloat16: a last bit of float32 decides.
    high = SCHEMES[name].weight.grid.high
    halfway = (torch.arange(257, 512, 2).float()[:, None] * high * 2.0**-16).expand(-1, 16).contiguous()
    for seed, shape in enumerate([*SHAPES, (1024, 4096), None]):
        weight = random_weight(shape, seed) if shape else halfway
        here = quantize(weight, SCHEMES[name].weight, scale_dtype=scale_dtype)
        there = quantize(weight.cuda(), SCHEMES[name].weight, scale_dtype=scale_dtype)
        assert torch.equal(here.scale, there.scale.cpu())
        assert torch.equal(here.values.view(torch.uint8), there.values.cpu().view(torch.uint8))
