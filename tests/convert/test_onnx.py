"""ONNX graphs against transformers, ONNX's own checker and its reference evaluator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from families import FAMILIES

from convert import pipeline
from convert.onnx.families import FAMILIES as KNOWN
from formats.onnx_graph import find_graph

RECIPE = """\
model: {model}
validation: {{tokens: 64, length: 32}}
targets:
  - name: q
    format: onnx
    rules: {scheme}
    runtimes: [onnxruntime]
"""
FLOAT = "[{match: linear, keep: true, why: a float graph}]"
INT8 = "[{match: lm_head, scheme: int8-weight-only}, {match: linear, scheme: int8-weight-only}]"

#: What only shows when it is there: shorter windows than the text, soft caps, shifted norms, partial rotations.
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 24},
    "gemma3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 24},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}


@pytest.fixture
def export(tmp_path: Path, recipe_for: Callable[..., Any]) -> Callable[..., Path]:
    """``export(model, rules, **overrides)``: the folder of an artifact."""

    def make(model: Path, rules: str, **overrides: str) -> Path:
        recipe = recipe_for(model, rules, text=RECIPE, **{key.replace("__", "."): value for key, value in overrides.items()})
        return pipeline.convert(recipe, tmp_path / "out", check=False).artifacts[0].path

    return make


def save(family: str, folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Path, Any]:
    """A random model of a family, its norms and biases away from their beginnings; and the model."""
    model_class, config_class, settings = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**settings, **SETTINGS.get(family, {})}, attn_implementation="eager")
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 1 else 0.08)
    model.save_pretrained(folder / family)
    return folder / family, model


def run(folder: Path, ids: np.ndarray, mask: np.ndarray | None = None, past: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """What the graph returns, as exported."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / find_graph(folder)), options, providers=["CPUExecutionProvider"])
    return dict(
        zip([item.name for item in session.get_outputs()], session.run(None, feeds(session.get_inputs(), ids, mask, past)), strict=True)
    )


def feeds(inputs: Any, ids: np.ndarray, mask: np.ndarray | None, past: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    total = ids.shape[1] + (next(iter(past.values())).shape[2] if past else 0)
    found = {"input_ids": ids, "attention_mask": np.ones((len(ids), total), np.int64) if mask is None else mask}
    for item in inputs:
        if item.name.startswith("past"):
            kind = np.float16 if item.type == "tensor(float16)" else np.float32
            found[item.name] = (
                past[item.name.replace("past_key_values", "present")]
                if past
                else np.zeros((len(ids), item.shape[1], 0, item.shape[3]), kind)
            )
    return found


def logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.from_numpy(ids)).logits.float().numpy()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"])
def test_float_graph_is_the_model(family: str, tmp_path: Path, export: Callable[..., Path]) -> None:
    folder, model = save(family, tmp_path)
    out = export(folder, FLOAT)
    onnx.checker.check_model(out / find_graph(out), full_check=True)
    ids = np.random.default_rng(0).integers(3, 300, (2, 11))
    expected = logits(model, ids)
    got = run(out, ids)["logits"]
    assert np.abs(got - expected).max() < 2e-5 * max(1.0, np.abs(expected).max())
    assert np.abs(expected).max() > 0.1


def test_every_family_is_tested() -> None:
    tested = {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2"}
    assert set(KNOWN) - tested == {"gemma", "smollm3"}  # llama and gemma2 without what they add
