"""config.json: transformers reads the same model from it, whichever spelling it knows and whichever the source had."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from formats.model_config import spell

QUANTIZATION = {"quant_method": "compressed-tensors"}
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}

#: What is spelled twice on purpose, and so may be there and not have been.
ADDED = {"head_dim", "rope_theta", "rope_scaling", "partial_rotary_factor"}
RENAMED = {"dtype", "torch_dtype", "transformers_version"}


def read(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a ``config.json``, every default spelled out."""
    config = copy.deepcopy(config)
    return AutoConfig.for_model(config.pop("model_type"), **config).to_dict()


def rope_of(config: dict[str, Any]) -> object:
    return read(config)["rope_parameters"]


def without_new_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """What a reader sees that knows nothing of ``rope_parameters`` and ``dtype``."""
    return {
        key: without_new_spelling(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("rope_parameters", "dtype")
    }


def differences(expected: object, found: object, path: str = "") -> Iterator[str]:
    if not isinstance(expected, dict) or not isinstance(found, dict):
        if expected != found:
            yield f"{path}: {expected!r} became {found!r}"
        return
    for key in expected.keys() | found.keys():
        if key in RENAMED or (key in ADDED and expected.get(key) is None):
            continue
        yield from differences(expected.get(key, "nothing"), found.get(key, "nothing"), f"{path}.{key}")


# Rotary embeddings in both spellings

ROPES: dict[str, dict[str, Any]] = {
    "theta alone, old": {"rope_theta": 123_456.0},
    "theta alone, new": {"rope_parameters": {"rope_type": "default", "rope_theta": 123_456.0}},
    "theta in both": {"rope_theta": 123_456.0, "rope_parameters": {"rope_type": "default", "rope_theta": 123_456.0}},
    "Llama 3, old": {"rope_theta": 500_000.0, "rope_scaling": LLAMA_3},
    "Llama 3, new": {"rope_parameters": {**LLAMA_3, "rope_theta": 500_000.0}},
    "YaRN, new": {"rope_parameters": {**YARN, "rope_theta": 500_000.0}},
    "linear, as it was spelled before rope_type": {"rope_theta": 123_456.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "no scaling, spelled out": {"rope_theta": 123_456.0, "rope_scaling": None},
    "nothing": {},
}


@pytest.mark.parametrize("model_type", ["llama", "mistral", "mixtral", "qwen2", "qwen3", "granite", "smollm3"])
@pytest.mark.parametrize("case", ROPES)
def test_rotary_embeddings_are_the_same_for_readers_of_either_spelling(case: str, model_type: str) -> None:
    source = {**LLAMA, **ROPES[case], "model_type": model_type}
    spelled = spell(source, "BF16", None)
    assert rope_of(spelled) == rope_of(source)
    assert rope_of(without_new_spelling(spelled)) == rope_of(source)


@pytest.mark.parametrize("case", ["theta alone, new", "Llama 3, new", "YaRN, new"])
def test_what_transformers_4_reads_is_there_by_name(case: str) -> None:
    """transformers 4.57 LlamaConfig takes ``rope_theta``, ``rope_scaling`` and ``torch_dtype``, and 10,000 for a missing theta."""
    rope = ROPES[case]["rope_parameters"]
    spelled = spell({**LLAMA, **ROPES[case], "dtype": "float32"}, "BF16", None)
    assert spelled["rope_theta"] == rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    assert spelled.get("rope_scaling") == (None if scaling == {"rope_type": "default"} else scaling)
    assert spelled["torch_dtype"] == spelled["dtype"] == "bfloat16"


@pytest.mark.parametrize("model_type", ["stablelm", "glm", "phi", "persimmon"])
def test_a_rotary_embedding_of_a_part_of_the_head_is_the_same_for_readers_of_either_spelling(model_type: str) -> None:
    source = {
        **LLAMA,
        "model_type": model_type,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.75},
    }
    spelled = spell(source, "BF16", None)
    assert spelled["partial_rotary_factor"] == 0.75
    assert rope_of(without_new_spelling(spelled)) == rope_of(spelled) == rope_of(source)


PER_LAYER_TYPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma3n_text", "olmo3"])
def test_rotary_embeddings_of_each_layer_type_are_left_alone(model_type: str) -> None:
    source = {**LLAMA, "model_type": model_type, "rope_parameters": PER_LAYER_TYPE}
    spelled = spell(source, "BF16", None)
    assert spelled["rope_parameters"] == PER_LAYER_TYPE
    assert not {"rope_theta", "rope_scaling"} & spelled.keys()
    assert rope_of(spelled) == rope_of(source)


@pytest.mark.parametrize("model_type", ["gemma3_text", "gemma3n_text", "olmo3"])
@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, {"rope_scaling": None}], ids=str)
def test_rotary_embeddings_of_each_layer_type_in_their_old_spelling_are_left_alone(model_type: str, scaling: dict[str, Any]) -> None:
    """Gemma 3 on the Hub: one theta for global layers, another for local ones, and a scaling that only the former have."""
    source = {**LLAMA, "model_type": model_type, "rope_theta": 1e6, "rope_local_base_freq": 1e4, **scaling}
    assert rope_of(spell(source, "BF16", None)) == rope_of(source)


# Every architecture


def known_configs(model_types: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for model_type in model_types:
        try:
            config = transformers.CONFIG_MAPPING[model_type]().to_dict()
            config = json.loads(json.dumps(config))
            read(config)
        except Exception:  # noqa: BLE001  some have no defaults; what they raise is theirs to choose
            continue
        yield model_type, config


@pytest.fixture(scope="module")
def architectures() -> dict[str, dict[str, Any]]:
    """``config.json`` of every causal language model transformers knows, and of those that also see, as transformers 5 writes it."""
    names = dict.fromkeys([*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES])
    configs = dict(known_configs(iter(names)))
    assert len(configs) > 100
    return configs


def as_transformers_4_wrote(config: dict[str, Any]) -> dict[str, Any]:
    """The same without ``rope_parameters``: one theta, where there was one, is a key of its own."""
    rope = config.get("rope_parameters")
    old = {
        key: as_transformers_4_wrote(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key != "rope_parameters"
    }
    return {**old, "rope_theta": 123_456.0} if isinstance(rope, dict) else old


@pytest.mark.parametrize("writer", [dict, as_transformers_4_wrote], ids=["transformers 5", "transformers 4"])
def test_no_architecture_is_another_one_after_spelling(
    architectures: dict[str, dict[str, Any]], writer: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    changed = {}
    compared = 0
    for model_type, written in architectures.items():
        config = writer(written)
        try:
            expected = read(config)
        except Exception:  # noqa: BLE001  not every architecture had an old spelling
            continue
        compared += 1
        if found := list(differences(expected, read(spell(config, "BF16", QUANTIZATION)) | {"quantization_config": "nothing"})):
            changed[model_type] = found[:3]
    assert compared > 100
    assert changed == {}


# head_dim


def test_the_width_of_a_head_is_spelled_out() -> None:
    assert spell(LLAMA, "BF16", None)["head_dim"] == 16
    assert spell({**LLAMA, "head_dim": None}, "BF16", None)["head_dim"] == 16
    assert spell({**LLAMA, "head_dim": 20}, "BF16", None)["head_dim"] == 20


@pytest.mark.parametrize(
    "config",
    [
        {"hidden_size": 64, "num_attention_heads": 4},  # no grouped-query attention: GPT-2 and its like have no such key
        {**LLAMA, "hidden_size": 65},
        {**LLAMA, "num_attention_heads": 0},
        {**LLAMA, "num_attention_heads": None},
        {"d_model": 64, "num_attention_heads": 4, "num_key_value_heads": 4},
        {**LLAMA, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        {**LLAMA, "attention_head_dim": 32},
        {**LLAMA, "kv_channels": 32},
    ],
    ids=str,
)
def test_the_width_of_a_head_is_not_made_up(config: dict[str, Any]) -> None:
    assert "head_dim" not in spell(config, "BF16", None)


# Nested configs


@pytest.mark.parametrize("model_type", ["gemma3", "llava", "mistral3", "qwen2_vl"])
def test_the_text_part_of_a_model_that_also_sees_is_the_same_after_spelling(model_type: str) -> None:
    source = json.loads(json.dumps(transformers.CONFIG_MAPPING[model_type]().to_dict()))
    assert list(differences(read(source), read(spell(source, "BF16", None)))) == []


@pytest.mark.parametrize("section", ["text_config", "llm_config"])
def test_the_text_part_is_spelled_in_both_ways_too(section: str) -> None:
    rope = {**LLAMA_3, "rope_theta": 500_000.0}
    spelled = spell(
        {"model_type": "llava", section: {**LLAMA, "rope_parameters": rope}, "vision_config": {**LLAMA, "rope_parameters": rope}},
        "BF16",
        None,
    )
    assert (spelled[section]["rope_theta"], spelled[section]["rope_scaling"], spelled[section]["head_dim"]) == (500_000.0, LLAMA_3, 16)
    assert spelled["vision_config"] == {**LLAMA, "rope_parameters": rope}
    assert "rope_theta" not in spelled


# What else is there

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
configs = st.dictionaries(
    st.sampled_from(
        [
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "text_config",
            "head_dim",
            "num_attention_heads",
            "num_key_value_heads",
            "hidden_size",
            "_name_or_path",
            "x",
        ]
    )
    | st.text(max_size=5),
    json_values | st.just({"rope_theta": 1.0, "rope_type": "yarn"}) | st.just(LLAMA),
    max_size=8,
)


@settings(deadline=None, max_examples=200)
@given(configs, st.sampled_from(["BF16", "F16", "F32"]), st.none() | st.just(QUANTIZATION))
def test_any_config_keeps_what_it_had_and_is_not_written_to(
    config: dict[str, Any], dtype: str, quantization: dict[str, Any] | None
) -> None:
    before = copy.deepcopy(config)
    spelled = spell(config, dtype, quantization)
    assert config == before
    for key, value in config.items():
        if key == "_name_or_path":
            assert key not in spelled
        elif (
            key not in ("dtype", "torch_dtype", "text_config") and not (key == "head_dim" and value is None) and not isinstance(value, dict)
        ):
            assert spelled[key] == value
    assert spelled.keys() - config.keys() <= ADDED | {"dtype", "torch_dtype", "quantization_config"}
    assert spelled.get("quantization_config", config.get("quantization_config")) == (quantization or config.get("quantization_config"))


def test_spelling_twice_is_spelling_once() -> None:
    for rope in ROPES.values():
        once = spell({**LLAMA, **rope}, "F16", QUANTIZATION)
        assert spell(once, "F16", QUANTIZATION) == once


def test_nobodys_paths_are_published() -> None:
    mine = "/home/me/secret-project"
    source = {"_name_or_path": mine, "text_config": {**LLAMA, "_name_or_path": mine}, "vision_config": {"_name_or_path": mine, "depth": 3}}
    spelled = spell(source, "BF16", None)
    assert mine not in json.dumps(spelled)
    assert spelled["vision_config"] == {"depth": 3}


def test_the_dtype_is_that_of_the_unquantized_tensors_not_of_the_source() -> None:
    spelled = spell({**LLAMA, "dtype": "float32", "torch_dtype": "float32"}, "F16", QUANTIZATION)
    assert (spelled["dtype"], spelled["torch_dtype"]) == ("float16", "float16")
    assert read(spelled)["dtype"] == "float16"


def test_the_quantization_is_a_copy() -> None:
    spelled = spell(LLAMA, "BF16", QUANTIZATION)
    assert spelled["quantization_config"] == QUANTIZATION
    spelled["quantization_config"]["quant_method"] = "other"
    assert QUANTIZATION == {"quant_method": "compressed-tensors"}
    assert "quantization_config" not in spell(LLAMA, "BF16", None)
