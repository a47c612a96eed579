from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.algorithms import awq, smoothing
from convert.algorithms.bias_correction import correct_bias
from convert.algorithms.rtn import quantize
from convert.crew import crew
from formats.qtensor import QTensor
from formats.scheme import SCHEMES


def outliers(tokens: int, features: int, seed: int = 0) -> torch.Tensor:
    """Inputs of which a few channels are far larger than the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator)
    x[:, :: max(1, features // 3)] *= 60
    return x


@given(
    features=st.sampled_from([1, 2, 13, 64]), out=st.integers(1, 9), alpha=st.floats(0, 1), seed=st.integers(0, 1000), dead=st.booleans()
)
@settings(deadline=None, max_examples=60)
def test_smoothing_leaves_the_float_function_as_it_was(features: int, out: int, alpha: float, seed: int, dead: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(20, 7, generator=generator)
    norm, norm_bias = torch.randn(features, generator=generator), torch.randn(features, generator=generator)
    up, up_bias = torch.randn(features, 7, generator=generator), torch.randn(features, generator=generator)
    weights = [torch.randn(out, features, generator=generator), torch.randn(3, features, generator=generator)]
    hidden = z @ up.T + up_bias
    if dead:
        up[0], up_bias[0], weights[0][:, -1], weights[1][:, -1] = 0, 0, 0, 0
        hidden = z @ up.T + up_bias
    s = smoothing.smoothing_scales(hidden.abs().amax(dim=0), weights, alpha=alpha)
    assert (s > 0).all()
    assert s.isfinite().all()
    producer, producer_bias = smoothing.fold_into_producer(up, up_bias, s)
    assert producer_bias is not None
    smoothed = z @ producer.T + producer_bias
    torch.testing.assert_close(smoothed.abs().amax(dim=0), hidden.abs().amax(dim=0) / s)
    hessian = smoothing.smoothed_hessian(hidden.T @ hidden, s)
    assert (hessian - smoothed.T @ smoothed).norm() <= 1e-5 * hessian.norm()
    for weight in weights:
        before, after = hidden @ weight.T, smoothed @ smoothing.fold_into_consumer(weight, s).T
        assert (after - before).norm() <= 1e-5 * before.norm()
    for offset in (0.0, 1.0):
        folded, folded_bias = smoothing.fold_into_norm(norm, norm_bias, s, offset=offset)
        assert folded_bias is not None
        y = torch.randn(5, features, generator=generator)
        torch.testing.assert_close((y * (folded + offset) + folded_bias) * s, y * (norm + offset) + norm_bias, rtol=1e-4, atol=1e-4)


def test_scales_are_those_of_the_paper() -> None:
    s = smoothing.smoothing_scales(
        torch.tensor([16.0, 2.0]), [torch.tensor([[4.0, -1.0], [1.0, 8.0]]), torch.tensor([[1.0, 1.0]])], alpha=0.5
    )
    torch.testing.assert_close(s, torch.tensor([2.0, 0.5]))
    s = smoothing.smoothing_scales(torch.tensor([16.0, 2.0]), [torch.tensor([[4.0, 8.0]])], alpha=1.0)
    torch.testing.assert_close(s, torch.tensor([16.0, 2.0]))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_channels_of_zeros_and_of_what_is_not_normal_stay(alpha: float) -> None:
    s = smoothing.smoothing_scales(torch.tensor([0.0, 1.0, 1e30, 3.0]), [torch.tensor([[1.0, 0.0, 1e-38, 2.0]])], alpha=alpha)
    assert s[:2].tolist() == [1.0, 1.0]
    assert s.isfinite().all()
    assert (s > 0).all()


def test_values_behind_several_query_heads_get_one_scale() -> None:
    """Grouped-query attention: 4 query heads of size 3 read 2 heads of values."""
    assert smoothing.tied(torch.tensor([1.0, 5.0, 3.0, 2.0]), torch.tensor([1, 0, 1, 0])).tolist() == [3, 5, 3, 5]
    channels = torch.arange(6).view(2, 1, 3).expand(2, 2, 3).reshape(-1)
    v, o, x = torch.randn(6, 5), torch.randn(8, 12), torch.randn(30, 5)
    s = smoothing.smoothing_scales((x @ v.T)[:, channels].abs().amax(dim=0), [o], alpha=0.6, channels=channels)
    assert torch.equal(s.view(2, 2, 3)[:, 0], s.view(2, 2, 3)[:, 1])
    folded, _ = smoothing.fold_into_producer(v, None, smoothing.of_producer(s, channels))
    after = (x @ folded.T)[:, channels] @ smoothing.fold_into_consumer(o, s).T
    before = (x @ v.T)[:, channels] @ o.T
    assert (after - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-dynamic-asymmetric", "int8-static", "fp8-static"])
def test_the_searched_strength_is_the_best_tried_and_helps_with_outliers(name: str) -> None:
    x = outliers(200, 96)
    weights = [torch.randn(64, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    scheme = SCHEMES[name]
    found = smoothing.search_alpha(
        x, weights, input_absmax=x.abs().amax(dim=0), weight_quantization=scheme.weight,
        activation_quantization=scheme.activation, scale_dtype=torch.bfloat16,
    )  # fmt: skip
    assert min(found.errors, key=lambda strength: found.errors[strength]) == found.strength
    absmax = x.abs().amax(dim=0)
    every = {alpha: smoothing.smoothing_scales(absmax, weights, alpha=alpha) for alpha in smoothing.ALPHAS}
    all_tried = smoothing.search(every, [(x, weights)], scheme.weight, scheme.activation, torch.bfloat16)
    assert (found.strength, len(all_tried.errors)) == (all_tried.strength, 7)
    assert torch.equal(found.scales, all_tried.scales)
    assert found.errors.items() <= all_tried.errors.items()
    if name.startswith("int8"):
        assert found.strength is not None
        assert found.errors[found.strength] < 0.25 * found.errors[None]


@pytest.mark.parametrize(
    "name", ["int8-dynamic", "int8-dynamic-asymmetric", "int8-static", "fp8-dynamic", "fp8-block", "int8-weight-only-g32"]
)
@pytest.mark.parametrize(("tokens", "features", "out"), [(1, 128, 128), (17, 256, 128), (64, 128, 128), (5, 32, 1), (33, 96, 13)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_output_of_codes_is_that_of_what_they_stand_for(name: str, tokens: int, features: int, out: int, device: str) -> None:
    scheme = SCHEMES[name]
    if name == "fp8-block" and features % 128:
        pytest.skip("blocks of 128")
    x, weight = outliers(tokens, features).to(device), torch.randn(out, features, generator=torch.Generator().manual_seed(7)).to(device)
    codes = quantize(weight, scheme.weight, scale_dtype=torch.bfloat16)
    shown = smoothing._quantized(x, scheme.activation)
    expected = smoothing.fake_quantize(x, scheme.activation).double() @ codes.dequantize().double().T
    found = smoothing.quantized_output(shown, codes)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.skipif(not smoothing._multiplies_codes(), reason="this CPU has no instructions for it")
def test_products_of_int8_are_exact_at_their_largest() -> None:
    values = torch.full((3, 4096), 127, dtype=torch.int8)
    values[1] = -127
    codes = QTensor(values, torch.ones(3, 1), SCHEMES["int8-dynamic"].weight)
    assert smoothing.quantized_output(codes, codes).tolist() == (values.double() @ values.double().T).tolist()


def test_strengths_that_are_tried_by_several_threads_are_the_same() -> None:
    x = outliers(200, 96)
    weights = [torch.randn(64, 96, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    scheme = SCHEMES["int8-dynamic"]
    with crew(2) as hands:
        found = [
            smoothing.search_alpha(
                x, weights, input_absmax=x.abs().amax(dim=0), weight_quantization=scheme.weight,
                activation_quantization=scheme.activation, scale_dtype=torch.bfloat16, mapped=mapped,
            )
            for mapped in (map, hands.map)
        ]  # fmt: skip
    assert found[0].errors == found[1].errors
    assert torch.equal(found[0].scales, found[1].scales)


@pytest.mark.parametrize("best", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("flat", [False, True])
def test_a_valley_of_strengths_is_found_wherever_it_lies(best: int, count: int, flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    alphas = smoothing.ALPHAS[:count]
    best = min(best, count - 1)
    errors = {alpha: 0.1 * max(0, abs(i - best) - flat) for i, alpha in enumerate(alphas)} | {None: 1.0}
    tried: list[float | None] = []

    def errors_of(self: Any, scales: Any) -> Any:
        tried.extend(scales)
        return {strength: errors[strength] for strength in scales}

    monkeypatch.setattr(smoothing._Trials, "errors", errors_of)
    found = smoothing.search_alpha(
        torch.ones(2, 3), [torch.ones(2, 3)], input_absmax=torch.ones(3), weight_quantization=SCHEMES["int8-dynamic"].weight,
        activation_quantization=None, scale_dtype=torch.float32, alphas=alphas,
    )  # fmt: skip
    assert found.strength == min(alphas, key=lambda alpha: errors[alpha])
    assert len(tried) == len(set(tried)) <= 6
    assert None in tried


def test_nothing_to_gain_is_no_smoothing() -> None:
    weights = [torch.ones(8, 16)]
    found = smoothing.search_alpha(
        torch.ones(10, 16), weights, input_absmax=torch.ones(16), weight_quantization=SCHEMES["int8-dynamic"].weight,
        activation_quantization=SCHEMES["int8-dynamic"].activation, scale_dtype=torch.float32,
    )  # fmt: skip
    assert found.strength is None
    assert (found.scales == 1).all()


def test_awq_helps_a_weight_that_is_quantized_alone() -> None:
    x = outliers(200, 96)
    weights = [torch.randn(64, 96, generator=torch.Generator().manual_seed(3))]
    found = awq.search_scales(
        x, weights, input_mean=x.abs().mean(dim=0), weight_quantization=SCHEMES["int8-weight-only-g32"].weight, scale_dtype=torch.bfloat16
    )
    assert found.strength is not None
    assert found.errors[found.strength] < 0.9 * found.errors[None]
    assert found.scales.max() * found.scales.min() == pytest.approx(1, rel=1e-5)
    assert (awq.awq_scales(torch.zeros(4), ratio=0.5) == 1).all()


def test_a_corrected_bias_keeps_the_mean_of_the_output() -> None:
    x, weight, bias = outliers(500, 40) + 0.5, torch.randn(24, 40), torch.randn(24)
    quantized = quantize(weight, SCHEMES["fp8-dynamic"].weight, scale_dtype=torch.bfloat16).dequantize()
    corrected = correct_bias(bias, weight, quantized, input_mean=x.mean(dim=0))
    expected = (x @ weight.T + bias).mean(dim=0)
    assert ((x @ quantized.T + corrected).mean(dim=0) - expected).norm() < 1e-4 * expected.norm()
    assert ((x @ quantized.T + bias).mean(dim=0) - expected).norm() > 1e-3 * expected.norm()
