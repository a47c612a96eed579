"""torchao on disk: what transformers with torchao saves of an artifact again must be the artifact, and its own classes decode it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torchao.quantization import Float8WeightOnlyConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from convert import pipeline
from convert.recipe import parse_recipe
from formats.errors import FormatError, RecipeError
from formats.existing import read_quantization
from formats.layer import Contents, QuantizedLayer
from formats.safetensors import TensorSpec, read_folder
from formats.scheme import SCHEMES
from formats.torchao import config, decode, encode, layer_tensors, metadata, refusal
from formats.verify import verify

#: scheme -> the class by which transformers with torchao quantizes alike.
OFFICIAL = {
    "int8-weight-only": lambda: Int8WeightOnlyConfig(version=2),
    "int8-dynamic": lambda: Int8DynamicActivationInt8WeightConfig(version=2),
    "fp8-weight-only": Float8WeightOnlyConfig,
}
NAME = "model.layers.0.mlp.down_proj.weight"


def make(model: Path, out: Path, scheme: str, *, rules: str = "", more: str = "") -> Path:
    target = f"{{name: q, format: torchao, rules: [{rules}{{match: linear, scheme: {scheme}}}]{more}}}"
    recipe = parse_recipe(f"model: {model}\ntargets:\n  - {target}\n", "job.yaml", name="job")
    return pipeline.convert(recipe, out / "ours", check=False).artifacts[0].path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def header(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: value if name == "format" else json.loads(value) for name, value in file.metadata().items()}
    return found


def assert_same(mine: Path, theirs: Path, *, tied: bool = False) -> None:
    a, b = tensors(mine), tensors(theirs)
    assert set(a) == set(b)
    for name in b:
        assert a[name].dtype == b[name].dtype, name
        assert a[name].shape == b[name].shape, name
        assert torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in (a[name].reshape(-1), b[name].reshape(-1)))), name
    said, official = header(mine), header(theirs)
    names = [set(found.pop("tensor_names")) for found in (said, official)]
    if tied:  # theirs lists the head too, of which no tensor is stored
        names[1].discard("lm_head.weight")
        official.pop("lm_head.weight")
    assert names[0] == names[1]
    assert said == official
    sections = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (mine, theirs)]
    assert sections[0] == sections[1]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", OFFICIAL)
def test_transformers_saves_an_artifact_again_as_it_is(scheme: str, tied: bool, make_llama: Any, tmp_path: Path) -> None:
    mine = make(make_llama(tie_word_embeddings=tied), tmp_path, scheme)
    assert verify(mine).findings == ()
    AutoModelForCausalLM.from_pretrained(mine, dtype="auto").save_pretrained(tmp_path / "again", save_original_format=False)
    assert_same(mine, tmp_path / "again", tied=tied)


@pytest.mark.parametrize("scheme", OFFICIAL)
def test_everything_but_the_numbers_is_what_torchao_writes_when_it_quantizes_itself(scheme: str, make_llama: Any, tmp_path: Path) -> None:
    """Its scales are absmax / 127.5 in float32 where all formats here share absmax / 127 rounded to the dtype of the model."""
    model = make_llama()
    mine = make(model, tmp_path, scheme)
    official = AutoModelForCausalLM.from_pretrained(model, dtype="auto", quantization_config=TorchAoConfig(OFFICIAL[scheme]()))
    official.save_pretrained(tmp_path / "official")
    a, b = tensors(mine), tensors(tmp_path / "official")
    assert {name: (t.dtype, t.shape) for name, t in a.items()} == {name: (t.dtype, t.shape) for name, t in b.items()}
    said, theirs = header(mine), header(tmp_path / "official")
    assert sorted(said.pop("tensor_names")) == sorted(theirs.pop("tensor_names"))
    assert said == theirs
    sections = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in (mine, tmp_path / "official")]
    assert sections[0] == sections[1]
    for name in a:
        if name.endswith("qdata"):
            scale = name.replace("qdata", "scale")
            off = (a[name].float() * a[scale] - b[name].float() * b[scale]).abs().amax(dim=1, keepdim=True)
            step = 1.1 if scheme.startswith("int8") else 36  # of E4M3 the widest gap is 32
            assert bool((off <= step * a[scale]).all()), name


@pytest.mark.parametrize("scheme", OFFICIAL)
def test_its_classes_decode_exactly_what_was_quantized(scheme: str, make_llama: Any, tmp_path: Path) -> None:
    mine = make(make_llama(), tmp_path, scheme)
    stored = tensors(mine)
    model = AutoModelForCausalLM.from_pretrained(mine, dtype="auto")
    seen = 0
    for name, module in model.named_modules():
        if f"{name}._weight_qdata" in stored:
            spec = TensorSpec(f"{name}.weight", "F32", tuple(module.weight.shape))
            ours = decode(spec, stored, SCHEMES[scheme]).dequantize()
            assert torch.equal(module.weight.dequantize(), ours.bfloat16())
            seen += 1
    assert seen == 14
    assert torch.isfinite(model(torch.arange(3, 40)[None]).logits).all()


def test_several_files_load_too(make_llama: Any, tmp_path: Path) -> None:
    """transformers keeps the list of tensors that the last file has, so each must have them all."""
    model = make_llama(hidden_size=512, intermediate_size=768, num_attention_heads=8)
    one = make(model, tmp_path / "one", "int8-weight-only")
    many = make(model, tmp_path / "many", "int8-weight-only", more=", max_shard_size: 1MB")
    assert len(list(many.glob("*.safetensors"))) > 3
    assert verify(many).findings == ()
    ids = torch.arange(3, 40)[None]
    assert torch.equal(*(AutoModelForCausalLM.from_pretrained(path, dtype="auto")(ids).logits for path in (one, many)))


def test_what_is_kept_is_listed_only_where_transformers_would_not_keep_it(make_llama: Any, tmp_path: Path) -> None:
    mine = make(make_llama(), tmp_path, "int8-dynamic", rules="{match: o_proj, keep: true, why: x}, ")
    said = json.loads((mine / "config.json").read_text())
    assert set(said["quantization_config"]["modules_to_not_convert"]) == {
        *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)),
        "lm_head",
    }
    found = read_quantization(said, {name: item.spec for name, item in read_folder(mine).items()})
    assert found is not None
    assert len(found.layers) == 12
    assert (found.still_float, set(found.kept)) == ((), set(found.patterns or ()))
    assert {(layer.weight.grid, layer.weight.tile, layer.activation) for layer in found.layers if layer.weight} == {
        (SCHEMES["int8-dynamic"].weight.grid, SCHEMES["int8-dynamic"].weight.tile, SCHEMES["int8-dynamic"].activation)
    }
    AutoModelForCausalLM.from_pretrained(mine, dtype="auto").save_pretrained(tmp_path / "again", save_original_format=False)
    assert_same(mine, tmp_path / "again")


def test_a_quantized_head_is_put_together_too(make_llama: Any, tmp_path: Path) -> None:
    mine = make(make_llama(), tmp_path, "int8-weight-only", rules="{match: lm_head, scheme: int8-weight-only}, ")
    assert json.loads((mine / "config.json").read_text())["quantization_config"]["modules_to_not_convert"] == []
    model = AutoModelForCausalLM.from_pretrained(mine, dtype="auto")
    assert type(model.lm_head.weight).__name__ == "Int8Tensor"
    assert verify(mine).findings == ()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("scheme", OFFICIAL)
@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (37, 1), (13, 7)])
def test_awkward_shapes_are_written_as_promised_and_read_back(shape: tuple[int, int], scheme: str, dtype: str) -> None:
    from convert.algorithms.rtn import quantize
    from formats.dtypes import DTYPES

    values = torch.randn(shape)
    values[0] = 0
    quantized = quantize(values, SCHEMES[scheme].weight, scale_dtype=getattr(torch, DTYPES[dtype].torch_name))
    written = encode(NAME, quantized, SCHEMES[scheme])
    names = {torch.int8: "I8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    promised = layer_tensors(TensorSpec(NAME, dtype, shape), SCHEMES[scheme])
    assert {TensorSpec(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in written.items()} == set(promised)
    assert torch.equal(decode(TensorSpec(NAME, dtype, shape), written, SCHEMES[scheme]).dequantize(), quantized.dequantize())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_holds_three_schemes_and_no_transposed_weight(scheme: str) -> None:
    assert (refusal(SCHEMES[scheme], (128, 128), transposed=False) is None) == (scheme in OFFICIAL)
    assert "transposed" in (refusal(SCHEMES[scheme], (128, 128), transposed=True) or "")


def test_a_checkpoint_has_one_scheme(make_llama: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^job.yaml:3:.*a torchao checkpoint has one scheme"):
        make(make_llama(), tmp_path, "int8-weight-only", rules="{match: o_proj, scheme: int8-dynamic}, ")


def test_a_layer_of_another_class_is_refused() -> None:
    layers = [QuantizedLayer("experts", "int8-dynamic", (2, 2))]
    with pytest.raises(FormatError, match="experts is no Linear"):
        config(Contents(layers, [], "BF16", replaceable=frozenset(["a"])))
    assert config(Contents([], ["a"], "BF16")) is None
    assert json.loads(metadata([], Contents([], [], "BF16"))["tensor_names"]) == []
