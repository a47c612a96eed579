"""Fine-grained FP8 on disk: transformers' own dequantizer is the oracle, and reads what is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from convert import pipeline
from convert.algorithms.rtn import quantize
from convert.recipe import parse_recipe
from formats.dtypes import DTYPES
from formats.errors import FormatError, RecipeError
from formats.existing import read_quantization
from formats.fp8 import config, decode, encode, layer_tensors, refusal
from formats.layer import Contents, QuantizedLayer
from formats.safetensors import TensorSpec, read_folder
from formats.scheme import BLOCK_128, FP8_E4M3, SCHEMES, Quantization
from formats.verify import verify

SCHEME = SCHEMES["fp8-block"]
NAME = "model.layers.0.mlp.down_proj.weight"
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


def press(shape: tuple[int, int], dtype: str = "BF16") -> Any:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.linspace(-4, 2, shape[0])[:, None]
    values[:128, :128] = 0
    return quantize(values, SCHEME.weight, scale_dtype=getattr(torch, DTYPES[dtype].torch_name))


def make(model: Path, out: Path, rules: str = "[{match: linear, scheme: fp8-block}]") -> Path:
    target = f"{{name: q, format: fp8, rules: {rules}}}"
    recipe = parse_recipe(f"model: {model}\ntargets:\n  - {target}\n", "job.yaml", name="job")
    return pipeline.convert(recipe, out, check=False).artifacts[0].path


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("shape", [(128, 128), (384, 128), (128, 640), (256, 384)])
def test_transformers_decodes_exactly_what_dequantize_says(shape: tuple[int, int], dtype: str) -> None:
    quantized = press(shape, dtype)
    written = encode(NAME, quantized, SCHEME)
    assert {
        TensorSpec(name, "F32" if tensor.dtype == torch.float32 else "F8_E4M3", tuple(tensor.shape)) for name, tensor in written.items()
    } == set(layer_tensors(TensorSpec(NAME, dtype, shape), SCHEME).rows)
    decoded = Fp8Dequantize(None)._dequantize_one(written[NAME], written[f"{NAME}_scale_inv"])
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, quantized.dequantize())
    assert torch.equal(decode(TensorSpec(NAME, dtype, shape), written, SCHEME).dequantize(), quantized.dequantize())
    assert not bool(written[f"{NAME}_scale_inv"].isnan().any())


def test_scales_are_those_of_the_dtype_of_the_model() -> None:
    """So that codes are those of the other formats, whose scales lie in it."""
    scale = encode(NAME, press((256, 256)), SCHEME)[f"{NAME}_scale_inv"]
    assert torch.equal(scale, scale.bfloat16().float())


@pytest.mark.parametrize("shape", [(576, 576), (192, 128), (128, 192), (1, 1), (127, 128)])
def test_shapes_that_blocks_do_not_fill_are_refused(shape: tuple[int, int]) -> None:
    assert f"{shape[0]} x {shape[1]} is not made of whole blocks" in (refusal(SCHEME, shape, transposed=False) or "")


def test_transformers_is_wrong_without_a_word_where_it_is_refused() -> None:
    """192 rows under two scales become blocks of 96: the reason for the refusal."""
    codes = torch.ones(192, 128).to(torch.float8_e4m3fn)
    decoded = Fp8Dequantize(None)._dequantize_one(codes, torch.tensor([[1.0], [100.0]]))
    assert decoded[:128].unique().tolist() == [1.0, 100.0]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_holds_blocks_alone_and_no_transposed_weight(scheme: str) -> None:
    assert (refusal(SCHEMES[scheme], (128, 128), transposed=False) is None) == (scheme == "fp8-block")
    assert "transposed" in (refusal(SCHEMES[scheme], (128, 128), transposed=True) or "")


@pytest.mark.parametrize("tied", [False, True])
def test_an_artifact_loads_as_the_weights_it_was_written_with(tied: bool, make_llama: Any, tmp_path: Path) -> None:
    path = make(make_llama(tie_word_embeddings=tied, **WIDE), tmp_path)
    verdict = verify(path)
    assert verdict.findings == ()
    stored = load_file(path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    for name, tensor in stored.items():
        if tensor.dtype == torch.float8_e4m3fn:
            weight = Fp8Dequantize(None)._dequantize_one(tensor, stored[f"{name}_scale_inv"]).bfloat16()
            assert torch.equal(model.get_parameter(name), weight), name
    assert sum(name.endswith("weight_scale_inv") for name in stored) == 14
    assert torch.isfinite(model(torch.arange(3, 40)[None]).logits).all()


def test_what_is_written_is_read_back(make_llama: Any, tmp_path: Path) -> None:
    rules = "[{match: o_proj, keep: true, why: x}, {match: linear, scheme: fp8-block}]"
    path = make(make_llama(**WIDE), tmp_path, rules)
    said = json.loads((path / "config.json").read_text())
    found = read_quantization(said, {name: item.spec for name, item in read_folder(path).items()})
    assert found is not None
    assert {(layer.weight, layer.activation, layer.unsupported) for layer in found.layers} == {
        (Quantization(FP8_E4M3, BLOCK_128, scale="F32"), SCHEME.activation, None)
    }
    assert set(found.kept) == {"lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}
    assert found.still_float == ()
    theirs = FineGrainedFP8Config.from_dict(said["quantization_config"])
    assert (theirs.weight_block_size, theirs.activation_scheme, theirs.modules_to_not_convert) == (
        [128, 128],
        "dynamic",
        list(found.patterns or ()),
    )


def test_a_shape_that_does_not_fit_names_the_line_of_the_recipe(make_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^job.yaml:3:\d+: model.layers.0.* cannot be fp8-block: 64 x 96 is not made of whole blocks"):
        make(make_llama(), tmp_path)


def test_a_quantized_head_is_refused(make_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="lm_head is the output head"):
        config(Contents([QuantizedLayer("lm_head", "fp8-block", (128, 128), head=True)], [], "BF16"))
    assert config(Contents([], ["a"], "BF16")) is None
