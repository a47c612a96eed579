"""Configs are read as their readers read them: compressed-tensors' and transformers' own functions are the oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
from compressed_tensors.utils.match import is_match
from hypothesis import given
from hypothesis import strategies as st
from transformers.quantizers.quantizers_utils import should_convert_module

from formats.errors import FormatError
from formats.existing import ExistingQuantization, is_head, is_tied, linear_modules, matches_name, read_quantization, skips
from formats.safetensors import TensorSpec
from formats.scheme import BLOCK_128, FP8_E4M3, INT8, PER_CHANNEL, PER_TENSOR, PER_TOKEN, SCHEMES, Quantization, Tile

MODULES = [
    "lm_head",
    *(f"model.layers.{i}.{name}" for i in (0, 1, 11) for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.gate", "mlp.fc1")),
]
PATTERNS = [
    *MODULES,
    *("model.layers.1", "model.layers.1.mlp", "up_proj", "fc1", "mlp.gate", "head", "layers.*", "model.layers.*.mlp"),
]
REGEXES = ["re:.*self_attn.*", "re:.*up_proj$", "re:model.layers.1", "re:up_proj", "re:.*layers.1.*(gate|fc1)$", "re:lm_head"]


def specs(*rows: tuple[str, str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {name: TensorSpec(name, dtype, shape) for name, dtype, shape in rows}


def read(section: dict[str, Any], tensors: dict[str, TensorSpec], **config: Any) -> ExistingQuantization:
    found = read_quantization({"quantization_config": section, **config}, tensors)
    assert found is not None
    return found


def grouped(targets: list[str], **weights: Any) -> dict[str, Any]:
    group = {"targets": targets, "weights": {"num_bits": 8, "type": "int", "strategy": "channel", **weights}}
    return {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}


# Names


@given(st.sampled_from(MODULES), st.lists(st.sampled_from(PATTERNS), max_size=3))
def test_lists_of_modules_to_leave_alone_mean_what_transformers_takes_them_for(module: str, patterns: list[str]) -> None:
    assert skips(module, patterns) == (not should_convert_module(module, patterns))


@given(st.sampled_from(MODULES), st.sampled_from([*PATTERNS, *REGEXES]))
def test_names_match_as_in_compressed_tensors(module: str, pattern: str) -> None:
    assert matches_name(module, pattern) == is_match(module, torch.nn.Embedding(1, 1), pattern)


@given(
    st.lists(st.sampled_from([*MODULES, *REGEXES, "Linear", "Embedding"]), min_size=1, max_size=3),
    st.lists(st.sampled_from([*PATTERNS, *REGEXES, "Linear"]), max_size=2),
)
def test_targets_and_ignore_choose_the_modules_that_compressed_tensors_chooses(targets: list[str], ignore: list[str]) -> None:
    tensors = specs(*((f"{module}.weight", "BF16", (4, 4)) for module in MODULES))
    found = read({**grouped(list(targets)), "ignore": ignore}, tensors)
    linear = torch.nn.Linear(1, 1)
    assert set(found.still_float) == {module for module in MODULES if is_match(module, linear, targets, ignore)}
    assert set(found.kept) == set(MODULES) - set(found.still_float)


def test_a_name_outdoes_a_pattern_and_a_pattern_outdoes_a_class() -> None:
    groups = {
        "by_class": {"targets": ["Linear"], "weights": {"type": "int", "strategy": "channel"}},
        "by_pattern": {"targets": ["re:.*b$"], "weights": {"type": "int", "strategy": "tensor"}},
        "by_name": {"targets": ["m.b"], "weights": {"type": "int", "strategy": "group", "group_size": 2}},
    }
    rows = [(f"m.{x}.weight", "I8", (4, 4)) for x in ("a", "bb", "b")] + [(f"m.{x}.weight_scale", "BF16", (4, 1)) for x in ("a", "bb", "b")]
    found = read({"quant_method": "compressed-tensors", "config_groups": groups}, specs(*rows))
    assert {layer.module: layer.rule.removeprefix("config_groups.") for layer in found.layers} == {
        "m.a": "by_class",
        "m.bb": "by_pattern",
        "m.b": "by_name",
    }


# Arguments


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "strategy": st.sampled_from(["tensor", "channel", "group", "block", None]),
            "group_size": st.sampled_from([None, -1, 32]),
            "block_structure": st.sampled_from([None, [128, 128], "128x128", [64, 0]]),
            "symmetric": st.booleans(),
            "type": st.sampled_from(["int", "float", "FLOAT"]),
        },
    )
)
def test_arguments_mean_what_compressed_tensors_takes_them_for(raw: dict[str, Any]) -> None:
    """Where the library accepts them; what it refuses the linter speaks of."""
    try:
        oracle = QuantizationArgs(**raw)
    except (ValueError, NotImplementedError):
        return
    codes = "I8" if oracle.type == "int" else "F8_E4M3"
    tensors = specs(("m.weight", codes, (128, 128)), ("m.weight_scale", "BF16", (1,)))
    section = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"], "weights": raw or {"num_bits": 8}}}}
    (layer,) = read(section, tensors).layers
    if not oracle.symmetric:
        assert (layer.weight, layer.unsupported) == (None, "asymmetric weights (zero points)")
        return
    tiles = {"tensor": PER_TENSOR, "channel": PER_CHANNEL, "group": Tile(1, oracle.group_size), "block": BLOCK_128}
    assert layer.weight == Quantization(INT8 if oracle.type == "int" else FP8_E4M3, tiles[QuantizationStrategy(oracle.strategy).value])


def test_four_bits_are_named_and_not_decoded() -> None:
    tensors = specs(("m.weight_packed", "I32", (8, 2)), ("m.weight_scale", "BF16", (8, 1)), ("m.weight_shape", "I64", (2,)))
    (layer,) = read(grouped(["Linear"], num_bits=4), tensors).layers
    assert (layer.weight, layer.unsupported, layer.packed) == (None, "4-bit int", True)


# One of each format


def test_compressed_tensors_packed_with_a_cache() -> None:
    tensors = specs(
        ("model.layers.0.self_attn.o_proj.weight_packed", "I32", (8, 16)),
        ("model.layers.0.self_attn.o_proj.weight_scale", "BF16", (8, 2)),
        ("model.layers.0.self_attn.o_proj.weight_shape", "I64", (2,)),
        ("model.layers.0.self_attn.k_scale", "BF16", (1,)),
        ("lm_head.weight", "BF16", (9, 8)),
    )
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    found = read({**grouped(["Linear"], strategy="group", group_size=32), "ignore": ["lm_head"], "kv_cache_scheme": cache}, tensors)
    (layer,) = found.layers
    assert layer.weight == SCHEMES["int8-weight-only-g32"].weight
    assert (layer.packed, layer.shape, layer.activation) == (True, (8, 64), None)
    assert layer.others == ("model.layers.0.self_attn.o_proj.weight_shape",)
    assert (found.kept, found.still_float, found.patterns) == (("lm_head",), (), ("lm_head",))
    assert (found.cache, found.cache_scales) == (Quantization(FP8_E4M3, PER_TENSOR), ("model.layers.0.self_attn.k_scale",))


def test_fine_grained_fp8() -> None:
    tensors = specs(("m.up.weight", "F8_E4M3", (256, 128)), ("m.up.weight_scale_inv", "F32", (2, 1)), ("m.gate.weight", "BF16", (4, 128)))
    section = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["gate"]}
    found = read(section, tensors)
    (layer,) = found.layers
    assert layer.weight == Quantization(FP8_E4M3, BLOCK_128, scale="F32")
    assert layer.activation == SCHEMES["fp8-block"].activation
    assert (layer.scale, layer.input_scale, found.kept) == ("m.up.weight_scale_inv", None, ("m.gate",))


@pytest.mark.parametrize("legacy", [False, True])
def test_modelopt(legacy: bool) -> None:
    tensors = specs(
        *(("m.up." + part, dtype, shape) for part, dtype, shape in (("weight", "F8_E4M3", (8, 8)), ("weight_scale", "F32", ()))),
        ("m.up.input_scale", "F32", ()),
        ("lm_head.weight", "BF16", (9, 8)),
        ("m.router.weight", "BF16", (2, 8)),
    )
    if legacy:
        body = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head", "*router*"]}
        found = read_quantization({}, tensors, {"producer": {}, "quantization": body})
    else:
        scheme = {"num_bits": 8, "type": "float"}
        section = {"quant_method": "modelopt", "quant_algo": "fp8", "kv_cache_scheme": scheme, "ignore": ["lm_head", "m.rout*"]}
        found = read_quantization({"quantization_config": section}, tensors)
    assert found is not None
    (layer,) = found.layers
    assert layer.weight == Quantization(FP8_E4M3, PER_TENSOR, scale="F32")
    assert layer.activation == Quantization(FP8_E4M3, PER_TENSOR)
    assert layer.input_scale == "m.up.input_scale"
    assert (found.kept, found.still_float) == (("lm_head", "m.router"), ())
    assert found.cache == Quantization(FP8_E4M3, PER_TENSOR)


def test_bitsandbytes() -> None:
    tensors = specs(
        ("m.up.weight", "I8", (8, 4)), ("m.up.SCB", "F32", (8,)), ("m.up.weight_format", "U8", ()), ("lm_head.weight", "BF16", (9, 4))
    )
    found = read({"load_in_8bit": True, "llm_int8_skip_modules": None}, tensors)  # quant_method is missing in old ones
    (layer,) = found.layers
    assert layer.weight == Quantization(INT8, PER_CHANNEL, scale="F32")
    assert (layer.scale, layer.scale_divisor, layer.others) == ("m.up.SCB", 127, ("m.up.weight_format",))
    assert (found.format, found.kept, found.patterns) == ("bitsandbytes", ("lm_head",), None)


def test_torchao() -> None:
    tensors = specs(("m.up._weight_qdata", "I8", (8, 4)), ("m.up._weight_scale", "F32", (8, 1)), ("m.up._weight_zero_point", "I8", (8, 1)))
    kind = {"default": {"_type": "Int8DynamicActivationInt8WeightConfig", "_data": {}}}
    (layer,) = read({"quant_method": "torchao", "quant_type": kind}, tensors).layers
    assert layer.weight == Quantization(INT8, PER_CHANNEL, scale="F32")
    assert layer.activation == Quantization(INT8, PER_TOKEN, dynamic=True)
    assert (layer.codes, layer.zero_point) == ("m.up._weight_qdata", "m.up._weight_zero_point")


# What is nothing, or cannot be understood


def test_what_is_not_quantized_is_none() -> None:
    assert read_quantization({"model_type": "llama"}, specs(("a.weight", "BF16", (2, 2)))) is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"quant_method": "awq"}, "quant_method 'awq' is none of"),
        (["fp8"], "not a JSON object"),
        ({"quant_method": "compressed-tensors"}, "no object config_groups"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {}}}}, "no list of targets"),
        ({**grouped(["Linear"]), "ignore": [3]}, "ignore must be a list of names"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "two natural numbers or null"),
        ({"quant_method": "fp8", "activation_scheme": "sometimes"}, "must be dynamic or static"),
        ({"quant_method": "modelopt"}, "quant_algo None"),
        ({"quant_method": "torchao", "quant_type": "int8_weight_only"}, "names no class of torchao"),
    ],
)
def test_what_cannot_be_understood_is_refused(section: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        read_quantization({"quantization_config": section}, specs(("m.weight", "I8", (2, 2))))


# Modules


def test_linear_modules_are_told_from_names_and_shapes() -> None:
    tensors = specs(
        *(
            (f"{name}.weight", "BF16", (4, 4))
            for name in ("model.embed_tokens", "transformer.wte", "embed_out", "score", "layers.0.mlp.gate")
        ),
        ("norm.weight", "BF16", (4,)),
        ("conv.weight", "BF16", (4, 4, 3)),
        ("up.weight", "I8", (4, 4)),
        ("h.0.attn.c_attn.weight", "BF16", (4, 12)),
    )
    assert linear_modules({}, tensors) == ("embed_out", "score", "layers.0.mlp.gate", "h.0.attn.c_attn")
    assert linear_modules({"model_type": "gpt2"}, tensors) == ("embed_out", "score", "layers.0.mlp.gate")


def test_heads_are_tied_where_none_is_stored() -> None:
    causal = {"architectures": ["LlamaForCausalLM"]}
    assert is_tied(causal, specs(("model.embed_tokens.weight", "BF16", (4, 4))))
    assert not is_tied(causal, specs(("lm_head.weight", "BF16", (4, 4))))
    assert not is_tied({"architectures": ["BertModel"]}, {})
    assert is_head("model.lm_head")
    assert not is_head("encoder.layer.0.output")
