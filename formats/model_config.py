"""``config.json``: one model, spelled so that old and new readers agree on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formats.dtypes import DTYPES


def spell(config: Mapping[str, Any], dtype: str, quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """``config`` for an artifact whose unquantized tensors are ``dtype`` (a safetensors name).

    transformers 5 writes only ``dtype`` and ``rope_parameters``; transformers 4 reads only ``torch_dtype``, ``rope_theta`` and
    ``rope_scaling`` and falls back to theta 10,000 in silence. Both spellings are kept, in nested text configs too, and ``head_dim`` is
    spelled out. ``_name_or_path`` is dropped: it is a path of whoever saved the model.
    """
    spelled = _spell_section(dict(config))
    spelled.pop("_name_or_path", None)
    spelled |= {"dtype": DTYPES[dtype].torch_name, "torch_dtype": DTYPES[dtype].torch_name}
    if quantization is not None:
        spelled["quantization_config"] = dict(quantization)
    return spelled


def _spell_section(section: dict[str, Any]) -> dict[str, Any]:
    rope = section.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        section.setdefault("rope_theta", rope["rope_theta"])
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        if scaling.get("rope_type", "default") != "default":
            section.setdefault("rope_scaling", scaling)
    elif rope is None and "rope_theta" in section:
        scaling = section.get("rope_scaling") or {"rope_type": "default"}
        section["rope_parameters"] = {"rope_theta": section["rope_theta"], **scaling}
    if "num_key_value_heads" in section and section.get("head_dim") is None and section.get("num_attention_heads"):
        section["head_dim"] = section["hidden_size"] // section["num_attention_heads"]
    for name in ("text_config", "llm_config"):
        if isinstance(section.get(name), dict):
            section[name] = _spell_section(dict(section[name]))
    return section
