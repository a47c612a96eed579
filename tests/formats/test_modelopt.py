"""ModelOpt on disk. vLLM is its reader, and proves it elsewhere; here compressed-tensors decodes the same weights to the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from convert import pipeline
from convert.recipe import parse_recipe
from formats.errors import FormatError, RecipeError
from formats.existing import read_quantization
from formats.layer import Attention, Contents, QuantizedLayer
from formats.modelopt import cache_tensors, config, constants, decode, encode, layer_tensors, refusal, side_files
from formats.safetensors import TensorSpec, read_folder
from formats.scheme import FP8_E4M3, PER_TENSOR, SCHEMES, Quantization
from formats.verify import verify

SCHEME = SCHEMES["fp8-static"]
NAME = "model.layers.0.mlp.down_proj.weight"
RECIPE = """\
model: {model}
calibration: {{sequences: 4, length: 32}}
targets:
  - {{name: modelopt, format: modelopt, rules: [{rules}{{match: linear, scheme: fp8-static}}], runtimes: [vllm]{more}}}
  - {{name: ct, format: compressed-tensors, rules: [{rules}{{match: linear, scheme: fp8-static}}]{more}}}
"""


@pytest.fixture(scope="module")
def made(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The artifact and that of compressed-tensors. vLLM lives in an environment of its own; nothing is run here, but a target must name
    a runtime that loads it."""
    rules = "{match: o_proj, keep: true, why: x}, "
    text = RECIPE.format(model=make_llama(), rules=rules, more=", kv_cache: fp8")
    recipe = parse_recipe(text, "job.yaml", name="job")
    return [artifact.path for artifact in pipeline.convert(recipe, tmp_path_factory.mktemp("out"), check=False).artifacts]


def test_an_artifact_holds_the_numbers_that_compressed_tensors_holds(made: list[Path]) -> None:
    mine, ct = made
    assert verify(mine).findings == ()
    a, b = load_file(mine / "model.safetensors"), load_file(ct / "model.safetensors")
    renamed = {name.replace("k_proj.k_scale", "k_scale").replace("v_proj.v_scale", "v_scale"): tensor for name, tensor in a.items()}
    assert set(renamed) == set(b)
    scales = 0
    for name, tensor in renamed.items():
        if name.endswith("_scale"):
            assert (tensor.dtype, tensor.shape) == (torch.float32, ())
            scales += 1
        assert torch.equal(tensor.float().reshape(-1), b[name].float().reshape(-1)), name
    assert scales == 12 * 2 + 2 * 2


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_written_is_read_back_from_either_file(legacy: bool, made: list[Path]) -> None:
    said = json.loads((made[0] / "config.json").read_text())
    side = json.loads((made[0] / "hf_quant_config.json").read_text())
    if legacy:
        del said["quantization_config"]
    found = read_quantization(said, {name: item.spec for name, item in read_folder(made[0]).items()}, side)
    assert found is not None
    assert found.format == "modelopt"
    assert {(layer.weight, layer.activation) for layer in found.layers} == {
        (Quantization(FP8_E4M3, PER_TENSOR, scale="F32"), Quantization(FP8_E4M3, PER_TENSOR))
    }
    assert len(found.layers) == 12
    assert found.still_float == ()
    assert set(found.kept) == {"lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}
    assert found.cache == Quantization(FP8_E4M3, PER_TENSOR)
    assert len(found.cache_scales) == 4


def test_transformers_is_no_reader_of_it(make_llama: Any, tmp_path: Path) -> None:
    """It would take codes for weights: the plan says so before anything is read."""
    target = "{name: q, format: modelopt, rules: [{match: linear, scheme: fp8-static}]}"
    with pytest.raises(
        RecipeError,
        match=r"^job.yaml:3:\d+: transformers does not load modelopt; it loads compressed-tensors, .*modelopt is loaded by vllm",
    ):
        pipeline.plan(parse_recipe(f"model: {make_llama()}\ntargets:\n  - {target}\n", "job.yaml", name="job"))


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (13, 7)])
def test_awkward_shapes_are_written_as_promised_and_read_back(shape: tuple[int, int]) -> None:
    from convert.algorithms.rtn import quantize

    quantized = quantize(torch.randn(shape), SCHEME.weight, scale_dtype=torch.bfloat16)
    spec = TensorSpec(NAME, "BF16", shape)
    written = {**encode(NAME, quantized, SCHEME), **constants(spec, SCHEME, 3.0)}
    names = {torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    assert {TensorSpec(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in written.items()} == set(
        layer_tensors(spec, SCHEME)
    )
    assert torch.equal(decode(spec, written, SCHEME).dequantize(), quantized.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_holds_one_scheme_and_no_transposed_weight(scheme: str) -> None:
    assert (refusal(SCHEMES[scheme], (128, 128), transposed=False) is None) == (scheme == "fp8-static")
    assert "transposed" in (refusal(SCHEMES[scheme], (128, 128), transposed=True) or "")


def test_a_cache_has_one_scale_a_layer() -> None:
    assert cache_tensors(Attention("a.self_attn", 0, 2), "fp8-per-head", "BF16") is None


def test_names_that_vllm_cannot_tell_apart_are_an_error() -> None:
    layers = [QuantizedLayer("big_lm_head", "fp8-static", (2, 2))]
    with pytest.raises(FormatError, match="big_lm_head cannot be quantized where lm_head is kept"):
        config(Contents(layers, ["lm_head"], "BF16"))
    with pytest.raises(FormatError, match="only keys and values"):
        config(Contents([], [], "BF16", "fp8"))
    assert side_files(Contents([], [], "BF16")) == {}
