"""Weights with one scale each that a runtime makes one layer have one scale together, so that nothing is rounded again there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.numbers import compare
from convert.pipeline import convert, plan
from convert.source import open_source

RECIPE = """\
model: {{model}}
calibration: {{{{sequences: 4, length: 32, dtype: float32}}}}
targets:
{targets}
"""
TARGET = "  - {{{{name: {name}, format: {format}, runtimes: [vllm], hardware: [sm_90], rules: [{rules}]}}}}\n"
FUSED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}


def _text(
    rules: str = "{{match: linear, scheme: fp8-static{more}}}", more: str = "", formats: tuple[str, ...] = ("compressed-tensors",)
) -> str:
    rules = rules.replace("{more}", more.replace("{", "{{").replace("}", "}}"))
    return RECIPE.format(targets="".join(TARGET.format(name=f"t{i}", format=form, rules=rules) for i, form in enumerate(formats)))


def _uneven(folder: Path) -> Path:
    """Weights of one layer that differ much in size, as a trained model's do."""
    tensors = load_file(folder / "model.safetensors")
    for name, factor in (("q_proj", 3.7), ("v_proj", 0.23), ("up_proj", 0.6)):
        for each in [each for each in tensors if f".{name}.weight" in each]:
            tensors[each] = (tensors[each].float() * factor).to(tensors[each].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _served_by_vllm(codes: list[torch.Tensor], scales: list[torch.Tensor]) -> list[torch.Tensor]:
    """``requantize_with_max_scale`` of vLLM 0.32 (layers/quantization/utils/w8a8_utils.py): each part is decoded in float16 and rounded
    again with the largest scale; its kernel for that is missing in its build for CPUs."""
    largest = torch.stack([scale.float().reshape(()) for scale in scales]).max()
    decoded = [code.to(torch.float16) * scale.float().reshape(()) for code, scale in zip(codes, scales, strict=True)]
    return [(each.float() / largest).clamp(-448, 448).to(torch.float8_e4m3fn) for each in decoded]


@pytest.mark.parametrize("algorithm", ["", ", algorithm: gptq", ", algorithm: [{smoothquant: {alpha: 0.5}}, gptq]"])
def test_what_vllm_makes_one_layer_has_one_scale_and_is_not_rounded_again(
    algorithm: str, make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    folder = _uneven(make_llama())
    made = convert(
        recipe_for(folder, text=_text(more=algorithm, formats=("compressed-tensors", "modelopt"))), tmp_path, check=False
    ).artifacts
    stored, other = (load_file(artifact.path / "model.safetensors") for artifact in made)
    source = load_file(folder / "model.safetensors")
    for layer in range(2):
        for parent, names in FUSED.items():
            full = [f"model.layers.{layer}.{parent}.{name}" for name in names]
            scales = [stored[f"{name}.weight_scale"] for name in full]
            assert all(torch.equal(scale, scales[0]) for scale in scales)
            if "smoothquant" not in algorithm:
                largest = max(source[f"{name}.weight"].abs().max() for name in full).float()
                assert scales[0].item() == (largest / 448).to(torch.bfloat16).item()
            codes = [stored[f"{name}.weight"] for name in full]
            for code, again in zip(codes, _served_by_vllm(codes, scales), strict=True):
                assert torch.equal(code.view(torch.uint8), again.view(torch.uint8))
            for name in full:
                assert torch.equal(other[f"{name}.weight"].view(torch.uint8), stored[f"{name}.weight"].view(torch.uint8))
        down = f"model.layers.{layer}.mlp.down_proj"
        if not algorithm:
            assert stored[f"{down}.weight_scale"].item() == (source[f"{down}.weight"].abs().max().float() / 448).to(torch.bfloat16).item()
    for artifact in made:
        assert max(item.worst for item in compare(artifact.path, open_source(str(folder)), threads=1)) <= 1


def test_a_scale_that_is_not_the_shared_one_is_found(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """Its own scale, with codes against that: what rounding alone would make of it."""
    folder = _uneven(make_llama())
    (made,) = convert(recipe_for(folder, text=_text()), tmp_path, check=False).artifacts
    stored, name = load_file(made.path / "model.safetensors"), "model.layers.0.self_attn.k_proj"
    weight = load_file(folder / "model.safetensors")[f"{name}.weight"].float()
    scale = (weight.abs().max() / 448).to(torch.bfloat16)
    assert scale.item() < stored[f"{name}.weight_scale"].item()
    stored[f"{name}.weight"] = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    stored[f"{name}.weight_scale"] = scale.reshape(stored[f"{name}.weight_scale"].shape)
    save_file(stored, made.path / "model.safetensors", metadata={"format": "pt"})
    worst = {item.tensor: item.worst for item in compare(made.path, open_source(str(folder)), threads=1)}
    assert worst.pop(f"{name}.weight") > 1
    assert max(worst.values()) <= 1


@pytest.mark.parametrize(
    ("rules", "together"),
    [
        ("{match: '*.v_proj', keep: true, why: w}, {match: linear, scheme: fp8-static}", {"q_proj", "k_proj"}),
        ("{match: '*.k_proj', scheme: fp8-dynamic}, {match: linear, scheme: fp8-static}", {"q_proj", "v_proj"}),
        ("{match: '*.q_proj', scheme: fp8-static, algorithm: gptq}, {match: linear, scheme: fp8-static}", {"k_proj", "v_proj"}),
        ("{match: linear, scheme: fp8-static, algorithm: {rtn: {clip: true}}}", set()),
        ("{match: linear, scheme: fp8-static, algorithm: [rtn, recover]}", set()),
        ("{match: '*.down_proj', scheme: fp8-static}, {match: linear, scheme: fp8-dynamic}", set()),
    ],
)
def test_only_what_is_quantized_alike_has_one_scale(rules: str, together: set[str], make_llama: Any, recipe_for: Any) -> None:
    text = _text(rules.replace("{", "{{").replace("}", "}}")).replace("runtimes: [vllm], hardware: [sm_90]", "runtimes: [transformers]")
    (target,) = plan(recipe_for(make_llama(), text=text)).targets
    attention = [entry for entry in target.entries if ".0.self_attn." in entry.tensor.name]
    names = {entry.tensor.name for entry in attention if entry.alongside}
    assert names == {f"model.layers.0.self_attn.{name}.weight" for name in together}
    assert all(set(entry.alongside) == names for entry in attention if entry.alongside)


@pytest.mark.parametrize("algorithm", ["", ", algorithm: gptq"])
def test_health_tells_of_the_scale_that_is_written(algorithm: str, make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    folder = _uneven(make_llama())
    made = convert(recipe_for(folder, text=_text(more=algorithm)), tmp_path, check=False).artifacts[0]
    stored, source = load_file(made.path / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, seen in made.manifest.calibration["health"].items():
        weight, scale = source[f"{name}.weight"].float(), stored[f"{name}.weight_scale"].float()
        decoded = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
        assert seen["errors"][0]["weight"] == pytest.approx(((decoded - weight).norm() / weight.norm()).item(), rel=1e-3)
