"""compressed-tensors on disk: its own library parses the config and decodes the tensors."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, apply_quantization_config
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.algorithms.rtn import quantize
from formats.compressed_tensors import METADATA, config, decode, encode, layer_tensors, refusal
from formats.dtypes import DTYPES
from formats.layer import LayerNames, QuantizedLayer
from formats.qtensor import QTensor
from formats.safetensors import TensorSpec
from formats.scheme import FP8_E4M3, INT8, PER_CHANNEL, PER_TENSOR, PER_TOKEN, SCHEMES, Quality, Quantization, Scheme, Tile

NAME = "model.layers.0.mlp.down_proj.weight"
#: 1 x 1, a row, a column, primes, and nothing that is a multiple of anything.
SHAPES = [(1, 1), (1, 37), (37, 1), (13, 7), (64, 48), (127, 129)]
MODEL_DTYPES = ["BF16", "F16", "F32"]


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


def as_the_library_decodes(quantized: QTensor, scheme: QuantizationScheme) -> torch.Tensor:
    """The weight that the library's compressor for the group's ``format`` makes of what lies on disk."""
    prefix = LayerNames.of(NAME).module + "."
    stored = {name.removeprefix(prefix): tensor for name, tensor in encode(NAME, quantized).items()}
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert set(stored) == set(compressor.compression_param_names(scheme))
    return compressor.decompress(stored, scheme)["weight"]


def parsed(layers: Sequence[QuantizedLayer], kept: Sequence[str]) -> QuantizationConfig:
    return QuantizationConfig.model_validate(config(layers, kept))


def only_group(scheme: str) -> QuantizationScheme:
    (group,) = parsed([QuantizedLayer("down_proj", scheme)], []).config_groups.values()
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
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_library_decodes_exactly_what_dequantize_says(scheme: str, shape: tuple[int, int], dtype: str) -> None:
    quantized = press(weight(shape), scheme, dtype)
    decoded = as_the_library_decodes(quantized, only_group(scheme))
    # The library multiplies in the dtype of the scale; a product of two such codes is exact in float32, so rounding it once is the same.
    assert decoded.dtype == quantized.scale.dtype
    assert torch.equal(decoded, quantized.dequantize().to(decoded.dtype))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_library_decodes_every_code(scheme: str) -> None:
    """All codes of the grid under one scale, as no rounded weight would hold them."""
    grid = SCHEMES[scheme].weight.grid
    if grid.kind == "int":
        codes = torch.arange(int(grid.low), int(grid.high) + 1).to(torch.int8)
    else:
        codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn)
        codes = codes[~codes.float().isnan()]
    quantized = QTensor(codes[None], torch.tensor([[0.0123]]), SCHEMES[scheme].weight)
    decoded = as_the_library_decodes(quantized, only_group(scheme))
    assert torch.equal(decoded, quantized.dequantize())
    assert decoded.unique().numel() == len({float(code) for code in codes.float()})


@pytest.mark.parametrize("dtype", MODEL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_layer_tensors_promises_what_encode_writes(scheme: str, shape: tuple[int, int], dtype: str) -> None:
    torch_names = {getattr(torch, known.torch_name): name for name, known in DTYPES.items()}
    written = {
        name: TensorSpec(name, torch_names[tensor.dtype], tuple(tensor.shape))
        for name, tensor in encode(NAME, press(weight(shape), scheme, dtype)).items()
    }
    promised = layer_tensors(TensorSpec(NAME, dtype, shape), SCHEMES[scheme])
    assert written == {spec.name: spec for spec in promised}
    assert len(promised) == 2, "a symmetric scheme stores codes and scales, no zero point"
    assert {name.rpartition(".")[2] for name in written} == {"weight", "weight_scale"}


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from(MODEL_DTYPES))
def test_decode_is_the_inverse_of_encode(scheme: str, rows: int, columns: int, seed: int, dtype: str) -> None:
    quantized = press(weight((rows, columns), seed=seed), scheme, dtype)
    assert same(decode(NAME, encode(NAME, quantized), SCHEMES[scheme]), quantized)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(sorted(SCHEMES)), st.integers(1, 20), st.integers(1, 20), st.data())
def test_a_run_of_rows_is_encoded_as_it_is_within_the_whole(scheme: str, rows: int, columns: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    values = weight((rows, columns))
    whole = encode(NAME, press(values, scheme))
    part = encode(NAME, press(values[start:stop], scheme))
    assert same(
        decode(NAME, part, SCHEMES[scheme]), decode(NAME, {name: tensor[start:stop] for name, tensor in whole.items()}, SCHEMES[scheme])
    )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_row_of_zeros_stays_zero_and_has_a_scale_that_readers_can_divide_by(scheme: str) -> None:
    quantized = press(torch.zeros(3, 5), scheme)
    assert (quantized.scale == 1).all()
    assert torch.equal(as_the_library_decodes(quantized, only_group(scheme)), torch.zeros(3, 5, dtype=torch.bfloat16))


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
    found = schemes_by_module([QuantizedLayer(module, scheme, head=module == "lm_head") for module, scheme in assigned.items()], kept)
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
    whole = parsed([QuantizedLayer(module, scheme, head=module == "lm_head") for module, scheme in assigned.items()], kept)
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
    mine = parsed([QuantizedLayer(module, scheme, head=module == "lm_head") for module, scheme in assigned.items()], kept)
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
    (group,) = config([QuantizedLayer("down_proj", "int8-dynamic"), QuantizedLayer("lm_head", "int8-dynamic", head=True)], [])[
        "config_groups"
    ].values()
    assert group["targets"] == ["Linear", "lm_head"]


def test_a_tied_head_that_is_kept_is_named_so_that_readers_leave_it_alone() -> None:
    assert schemes_by_module([QuantizedLayer("down_proj", "int8-dynamic")], ["up_proj", "lm_head"]).keys() == {"down_proj"}


def test_every_file_says_the_format_that_transformers_asks_for() -> None:
    assert METADATA == {"format": "pt"}


# Refusals


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_a_named_scheme_has_a_spelling_unless_the_weight_lies_transposed(scheme: Scheme) -> None:
    assert refusal(scheme, transposed=False) is None
    assert "transposed" in (refusal(scheme, transposed=True) or "")


@pytest.mark.parametrize(
    "quantization",
    [
        Quantization(INT8, PER_TENSOR),
        Quantization(FP8_E4M3, Tile(128, 128)),
        Quantization(INT8, Tile(1, 32)),
        Quantization(INT8, PER_CHANNEL, symmetric=False),
    ],
    ids=["per tensor", "per block", "per group", "asymmetric"],
)
def test_what_has_no_spelling_is_refused_by_name(quantization: Quantization) -> None:
    scheme = Scheme("odd", quantization, Quantization(INT8, PER_TOKEN, dynamic=True), Quality(1, 0, 2))
    assert "odd" in (refusal(scheme, transposed=False) or "")
