"""``config.json``: one model, spelled so that old and new readers agree on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formats.dtypes import DTYPES


def spell(config: Mapping[str, Any], dtype: str, quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """``config`` for an artifact whose unquantized tensors are ``dtype`` (a safetensors name).

    transformers 5 writes only ``dtype`` and ``rope_parameters``; transformers 4 reads only ``torch_dtype``, ``rope_theta``,
    ``partial_rotary_factor`` and ``rope_scaling`` and falls back to theta 10,000 in silence. So the old spelling is added beside the
    new one, in nested text configs too, and ``head_dim`` is spelled out. Never the other way round: transformers 5 and those who
    build on it read the old spelling, each architecture in a way of its own (one theta a layer type, other keys, other defaults),
    and take a ``rope_parameters`` made up here for what it says. ``_name_or_path`` is dropped: it is a path of whoever saved the model.
    """
    spelled = _spell_section(_without_paths(config))
    spelled |= {"dtype": DTYPES[dtype].torch_name, "torch_dtype": DTYPES[dtype].torch_name}
    if quantization is not None:
        spelled["quantization_config"] = dict(quantization)
    return spelled


def _spell_section(section: Mapping[str, Any]) -> dict[str, Any]:
    spelled = dict(section)
    rope = spelled.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        spelled.setdefault("rope_theta", rope["rope_theta"])
        if "partial_rotary_factor" in rope:
            spelled.setdefault("partial_rotary_factor", rope["partial_rotary_factor"])
        scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        if scaling.get("rope_type", "default") != "default":
            spelled.setdefault("rope_scaling", scaling)
    if spelled.get("head_dim") is None and (head_dim := _head_dim(spelled)):
        spelled["head_dim"] = head_dim
    for name in ("text_config", "llm_config"):
        if isinstance(spelled.get(name), dict):
            spelled[name] = _spell_section(spelled[name])
    return spelled


def _head_dim(section: Mapping[str, Any]) -> int | None:
    """What every reader of a plain attention makes of a missing ``head_dim``; None where another key says how wide a head is
    (``qk_rope_head_dim``, ``attention_head_dim``, ``kv_channels``), for there transformers takes ``head_dim`` for that key."""
    hidden, heads = section.get("hidden_size"), section.get("num_attention_heads")
    if "num_key_value_heads" not in section or not isinstance(hidden, int) or not isinstance(heads, int) or not heads or hidden % heads:
        return None
    if any(key != "head_dim" and key.endswith(("head_dim", "kv_channels")) for key in section):
        return None
    return hidden // heads


def _without_paths(section: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in section.items() if key != "_name_or_path"}
    return {key: _without_paths(value) if isinstance(value, dict) else value for key, value in kept.items()}
