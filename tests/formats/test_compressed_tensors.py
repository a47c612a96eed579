"""compressed-tensors on disk: its own library parses the config and decodes the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config, preset_name_to_scheme
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.algorithms.rtn import quantize
from formats.compressed_tensors import cache_tensors, config, constants, decode, encode, layer_tensors, metadata, refusal
from formats.dtypes import DTYPES
from formats.layer import Attention, Contents, LayerNames, QuantizedLayer
from formats.qtensor import QTensor
from formats.safetensors import TensorSpec
from formats.scheme import INT8, PER_CHANNEL, PER_TOKEN, SCHEMES, Quality, Quantization, Scheme

NAME = "model.layers.0.mlp.down_proj.weight"
#: 1 x 1, a row, a column, primes, and nothing that is a multiple of anything.
SHAPES = [(1, 1), (1, 37), (37, 1), (13, 7), (64, 48), (127, 129), (128, 256), (384, 128)]
MODEL_DTYPES = ["BF16", "F16", "F32"]


#: What the library's own presets call the schemes it has presets for.
PRESETS = {
    "int8-dynamic": "W8A8",
    "fp8-dynamic": "FP8_DYNAMIC",
    "fp8-static": "FP8",
    "fp8-block": "FP8_BLOCK",
    "mxfp8": "MXFP8",
}
#: LLM.int8() is bitsandbytes' alone.
SPELLED = {name: scheme for name, scheme in SCHEMES.items() if scheme.weight.scale != "absmax" and not scheme.lookup}
CASES = [(scheme, shape) for scheme in SPELLED for shape in SHAPES if refusal(SCHEMES[scheme], shape, transposed=False) is None]


def of(layers: Sequence[QuantizedLayer], kept: Sequence[str] = (), cache: str | None = None) -> Contents:
    return Contents(layers, kept, "BF16", cache)


def layer(module: str, scheme: str) -> QuantizedLayer:
    return QuantizedLayer(module, scheme, (128, 128), head=module == "lm_head")


class Block(torch.nn.Module):
    """Two linear layers, a head and an embedding, named as a model names them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(16, 8)
        self.up_proj = torch.nn.Linear(8, 12, bias=False)
        self.down_proj = torch.nn.Linear(12, 8, bias=False)
        self.lm_head = torch.nn.Linear(8, 16, bias=False)


def weight(shape: tuple[int, int], *, seed: int = 0) -> torch.Tensor:
    """Rows of very different magnitude, the second of them all zeros."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    values *= 10.0 ** torch.linspace(-4, 2, shape[0])[:, None]
    values[1:2] = 0
    return values


def press(values: torch.Tensor, scheme: str, dtype: str = "BF16") -> QTensor:
    return quantize(values, SCHEMES[scheme].weight, scale_dtype=getattr(torch, DTYPES[dtype].torch_name))


def as_the_library_decodes(quantized: QTensor, scheme: QuantizationScheme, name: str) -> torch.Tensor:
    """The weight that the library's compressor for the group's ``format`` makes of what lies on disk."""
    mine = next(known for known in SCHEMES.values() if known.name == name)
    prefix = LayerNames.of(NAME).module + "."
    written = {**encode(NAME, quantized, mine), **constants(spec_of(quantized), mine, 1.0)}
    stored = {name.removeprefix(prefix): tensor for name, tensor in written.items()}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert set(stored) - {"input_scale"} == set(compressor.compression_param_names(scheme))
    decoded: torch.Tensor = compressor.decompress(stored, scheme)["weight"]
    return decoded


def spec_of(quantized: QTensor) -> TensorSpec:
    return TensorSpec(NAME, "BF16", tuple(quantized.values.shape))


def parsed(layers: Sequence[QuantizedLayer], kept: Sequence[str]) -> QuantizationConfig:
    return QuantizationConfig.model_validate(config(of(layers, kept)))


def only_group(scheme: str) -> QuantizationScheme:
    (group,) = parsed([layer("down_proj", scheme)], []).config_groups.values()
    assert isinstance(group, QuantizationScheme)
    return group


def same(a: QTensor, b: QTensor) -> bool:
    """Equal to the bit: NaN equals itself and -0 is not 0."""
    return a.quantization == b.quantization and all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))
        for x, y in ((a.values, b.values), (a.scale, b.scale))
    )


# Tensors


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_the_library_decodes_exactly_what_dequantize_says(scheme: str, shape: tuple[int, int], dtype: str) -> None:
    quantized = press(weight(shape), scheme, dtype)
    decoded = as_the_library_decodes(quantized, only_group(scheme), scheme)
    # The library multiplies in the dtype of the scale; a product of two such codes is exact in float32, so rounding it once is the same.
    assert decoded.dtype == (torch.bfloat16 if scheme == "mxfp8" else quantized.scale.dtype)
    assert torch.equal(decoded, quantized.dequantize().to(decoded.dtype))


@pytest.mark.parametrize("scheme", SPELLED)
def test_the_library_decodes_every_code(scheme: str) -> None:
    """All codes of the grid under one scale, as no rounded weight would hold them."""
    mine = SCHEMES[scheme].weight
    if mine.grid.kind == "int":
        codes = torch.arange(int(mine.grid.low) - 1, int(mine.grid.high) + 1).to(torch.int8)
    else:
        codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
        codes = torch.cat([codes[~codes.float().isnan()], codes[:2]])
    shape = mine.tile.scale_shape((128, 256))
    scale = torch.full(shape, 0.0123) if mine.scale == "model" else torch.full(shape, 0.25).to(torch.float8_e8m0fnu)
    quantized = QTensor(codes.expand(128, 256).contiguous(), scale, mine)
    decoded = as_the_library_decodes(quantized, only_group(scheme), scheme)
    assert torch.equal(decoded.float(), quantized.dequantize())
    assert decoded.unique().numel() == len({float(code) for code in codes.float()})


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
@pytest.mark.parametrize(("scheme", "shape"), CASES)
def test_layer_tensors_promises_what_is_written(scheme: str, shape: tuple[int, int], dtype: str) -> None:
    torch_names = {getattr(torch, known.torch_name): name for name, known in DTYPES.items()}
    spec = TensorSpec(NAME, dtype, shape)
    promised = layer_tensors(spec, SCHEMES[scheme])

    def specs(tensors: Mapping[str, torch.Tensor]) -> set[TensorSpec]:
        return {TensorSpec(name, torch_names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}

    assert specs(encode(NAME, press(weight(shape), scheme, dtype), SCHEMES[scheme])) == set(promised.rows)
    assert specs(constants(spec, SCHEMES[scheme], 3.0)) == set(promised.once)
    assert not any("zero_point" in spec.name for spec in promised), "vLLM refuses a zero point where the scheme is symmetric"


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(CASES), st.integers(0, 2**32 - 1), st.sampled_from(MODEL_DTYPES))
def test_decode_is_the_inverse_of_encode(case: tuple[str, tuple[int, int]], seed: int, dtype: str) -> None:
    scheme, shape = case
    quantized = press(weight(shape, seed=seed), scheme, dtype)
    assert same(decode(TensorSpec(NAME, dtype, shape), encode(NAME, quantized, SCHEMES[scheme]), SCHEMES[scheme]), quantized)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([name for name in SPELLED if SCHEMES[name].weight.tile.rows]), st.data())
def test_a_run_of_rows_is_encoded_as_it_is_within_the_whole(scheme: str, data: st.DataObject) -> None:
    """Runs begin and end where tiles do."""
    rows = SCHEMES[scheme].weight.tile.rows or 1
    start = data.draw(st.integers(0, 3))
    stop = data.draw(st.integers(start + 1, 4))
    values = weight((4 * rows, 128))
    whole = encode(NAME, press(values, scheme), SCHEMES[scheme])
    part = encode(NAME, press(values[start * rows : stop * rows], scheme), SCHEMES[scheme])
    for name, tensor in whole.items():
        step = tensor.shape[0] // 4
        assert torch.equal(part[name].view(torch.uint8), tensor[start * step : stop * step].view(torch.uint8)), name


@pytest.mark.parametrize("scheme", SPELLED)
def test_a_row_of_zeros_stays_zero_and_has_a_scale_that_readers_can_divide_by(scheme: str) -> None:
    quantized = press(torch.zeros(128, 128), scheme)
    assert (quantized.scale.float() == 1).all()
    assert not as_the_library_decodes(quantized, only_group(scheme), scheme).any()


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if SCHEMES[name].static])
def test_a_static_input_scale_takes_the_largest_input_to_the_largest_code(scheme: str) -> None:
    activation = SCHEMES[scheme].activation
    assert activation is not None
    ((_, scale),) = constants(TensorSpec(NAME, "F32", (2, 2)), SCHEMES[scheme], 12.5).items()
    assert float(scale) * activation.grid.high == pytest.approx(12.5)


@pytest.mark.parametrize(("cache", "shape"), [("fp8", (1,)), ("fp8-per-head", (3, 1, 1))])
def test_the_scales_of_a_cache_lie_where_the_library_looks_for_them(cache: str, shape: tuple[int, ...]) -> None:
    keys, values = cache_tensors(Attention("model.layers.0.self_attn", 0, 3), cache, "BF16") or ()
    assert (keys.name, values.name) == ("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_scale")
    assert keys.shape == values.shape == shape
    said = QuantizationConfig.model_validate(config(of([layer("down_proj", "int8-dynamic")], [], cache))).kv_cache_scheme
    assert said is not None
    assert (said.num_bits, said.type, said.symmetric, said.dynamic) == (8, "float", True, False)


@pytest.mark.parametrize("scheme", PRESETS)
def test_arguments_are_those_of_the_library_s_preset(scheme: str) -> None:
    """Observers aside, which say how a calibration should look for scales."""
    mine, theirs = only_group(scheme), preset_name_to_scheme(PRESETS[scheme], ["Linear"])
    for a, b in ((mine.weights, theirs.weights), (mine.input_activations, theirs.input_activations)):
        assert a is not None
        assert b is not None
        assert a.model_dump(exclude={"observer", "observer_kwargs"}) == b.model_dump(exclude={"observer", "observer_kwargs"})


def test_a_tensor_that_is_no_weight_has_no_layer_names() -> None:
    assert LayerNames.of("weight") == LayerNames("", "weight_scale")
    assert LayerNames.of("a.b.weight") == LayerNames("a.b", "a.b.weight_scale")
    for name in ("a.bias", "a.weight_scale", "a.myweight", ""):
        with pytest.raises(ValueError, match="not the weight"):
            LayerNames.of(name)


# Config


def schemes_by_module(layers: Sequence[QuantizedLayer], kept: Sequence[str]) -> dict[str, QuantizationScheme]:
    """What the library would attach to each module of a :class:`Block`."""
    model = Block()
    apply_quantization_config(model, parsed(layers, kept))
    return {name: module.quantization_scheme for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}


KINDS = {"int8-dynamic": ("int", "int-quantized"), "fp8-dynamic": ("float", "float-quantized")}

ASSIGNMENTS: dict[str, tuple[dict[str, str], list[str]]] = {
    "int8": ({"up_proj": "int8-dynamic", "down_proj": "int8-dynamic"}, ["lm_head"]),
    "fp8": ({"up_proj": "fp8-dynamic", "down_proj": "fp8-dynamic"}, ["lm_head"]),
    "both": ({"up_proj": "int8-dynamic", "down_proj": "fp8-dynamic"}, ["lm_head"]),
    "both, the other way round": ({"up_proj": "fp8-dynamic", "down_proj": "int8-dynamic"}, ["lm_head"]),
    "one of two": ({"down_proj": "int8-dynamic"}, ["up_proj", "lm_head"]),
    "with the head": ({"up_proj": "int8-dynamic", "down_proj": "int8-dynamic", "lm_head": "int8-dynamic"}, []),
    "both, and the head": ({"up_proj": "int8-dynamic", "down_proj": "fp8-dynamic", "lm_head": "fp8-dynamic"}, []),
    "only the head": ({"lm_head": "fp8-dynamic"}, ["up_proj", "down_proj"]),
}


@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_the_library_gives_every_module_the_scheme_it_was_quantized_with_and_no_other(case: str) -> None:
    assigned, kept = ASSIGNMENTS[case]
    found = schemes_by_module([layer(module, scheme) for module, scheme in assigned.items()], kept)
    assert found.keys() == assigned.keys()
    for module, scheme in assigned.items():
        kind, stored_as = KINDS[scheme]
        weights, activations = found[module].weights, found[module].input_activations
        assert (weights.type, weights.num_bits, weights.strategy, weights.symmetric, weights.dynamic) == (kind, 8, "channel", True, False)
        assert (activations.type, activations.num_bits, activations.strategy) == (kind, 8, "token")
        assert (activations.symmetric, activations.dynamic) == (True, True)
        assert found[module].output_activations is None
        assert found[module].format == stored_as


@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_the_config_says_what_the_library_would_infer_and_that_weights_are_compressed(case: str) -> None:
    assigned, kept = ASSIGNMENTS[case]
    whole = parsed([layer(module, scheme) for module, scheme in assigned.items()], kept)
    formats = {KINDS[scheme][1] for scheme in assigned.values()}
    assert whole.quant_method == "compressed-tensors"
    assert whole.quantization_status == "compressed"  # without it transformers 5 takes codes for weights
    assert whole.format == (formats.pop() if len(formats) == 1 else "mixed-precision")
    assert whole.ignore == kept
    assert whole.kv_cache_scheme is None
    assert not whole.requires_calibration_data()


@pytest.mark.parametrize("case", ASSIGNMENTS)
def test_the_library_reads_back_what_it_would_have_written_for_the_same_schemes(case: str) -> None:
    """``ignore`` and ``targets`` may be spelled in several ways; the schemes of the groups may not."""
    assigned, kept = ASSIGNMENTS[case]
    mine = parsed([layer(module, scheme) for module, scheme in assigned.items()], kept)
    model = Block()
    apply_quantization_config(model, mine)
    theirs = QuantizationConfig.from_pretrained(model)
    assert theirs is not None

    def arguments(whole: QuantizationConfig) -> list[object]:
        return sorted(
            repr((group.weights, group.input_activations, group.output_activations, group.format)) for group in whole.config_groups.values()
        )

    assert arguments(mine) == arguments(theirs)


def test_a_quantized_head_is_a_target_by_its_name() -> None:
    """vLLM's head is a ParallelLMHead, which "Linear" does not name: it would be looked for unquantized."""
    section = config(of([layer("down_proj", "int8-dynamic"), layer("lm_head", "int8-dynamic")]))
    assert section is not None
    (group,) = section["config_groups"].values()
    assert group["targets"] == ["Linear", "lm_head"]


def test_a_tied_head_that_is_kept_is_named_so_that_readers_leave_it_alone() -> None:
    assert schemes_by_module([layer("down_proj", "int8-dynamic")], ["up_proj", "lm_head"]).keys() == {"down_proj"}


def test_every_file_says_the_format_that_transformers_asks_for() -> None:
    assert metadata([], of([])) == {"format": "pt"}


# Refusals


def test_llm_int8_is_refused_with_the_scheme_that_is_nearest() -> None:
    assert "int8-dynamic" in (refusal(SCHEMES["llm-int8"], (128, 128), transposed=False) or "")


@pytest.mark.parametrize("scheme", SPELLED.values(), ids=SPELLED)
def test_a_named_scheme_has_a_spelling_unless_the_weight_lies_transposed(scheme: Scheme) -> None:
    assert refusal(scheme, (128, 128), transposed=False) is None
    assert "transposed" in (refusal(scheme, (128, 128), transposed=True) or "")


@pytest.mark.parametrize("scheme", ["fp8-block", "int8-weight-only-g128", "mxfp8"])
def test_a_width_that_groups_do_not_divide_is_refused_as_the_library_does(scheme: str) -> None:
    assert "576" in (refusal(SCHEMES["fp8-block"], (192, 576), transposed=False) or "")
    assert "48" in (refusal(SCHEMES[scheme], (128, 48), transposed=False) or "")


def test_scales_in_float32_are_not_what_its_readers_use() -> None:
    scheme = Scheme("odd", Quantization(INT8, PER_CHANNEL, scale="F32"), Quantization(INT8, PER_TOKEN, dynamic=True), Quality(1, 0, 2))
    assert "dtype of the model" in (refusal(scheme, (128, 128), transposed=False) or "")
