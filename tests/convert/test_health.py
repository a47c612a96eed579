"""The health of layers: what went in, what each algorithm lost, and which layers a static scale ruins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from convert.algorithms import rtn
from convert.health import ROWS, describe, drift, few, lost, summary
from convert.pipeline import convert
from convert.progress import Lines
from convert.report import read_report, report_path
from convert.text import load_tokenizer, take_tokens
from formats.scheme import SCHEMES

RECIPE = """
model: {{model}}
calibration: {{{{sequences: 16, length: 32, dtype: float32}}}}
targets:
  - name: q
    format: compressed-tensors
    rules:
      {rules}
"""


def plant(folder: Path) -> Path:
    """A channel before the second down projection becomes enormous, and is read with as much smaller weights."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5] *= 20_000
    tensors["model.layers.1.mlp.down_proj.weight"][:, 5] /= 20_000
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def seen_by_hooks(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    tokens, _ = take_tokens(
        "sample", load_tokenizer(folder, trust_remote_code=False), sequences=16, length=32, purpose="calibration", seed=0
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0][0]))
    with torch.no_grad():
        for sequence in torch.from_numpy(tokens):
            model(input_ids=sequence[None], use_cache=False)
    return {name: torch.stack(inputs) for name, inputs in seen.items()}


def test_what_a_static_scale_ruins_is_named_with_what_to_do(
    make_llama: Any, recipe_for: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = plant(make_llama())
    rules = "- {{match: linear, scheme: int8-static}}"
    made = convert(recipe_for(folder, text=RECIPE.format(rules=rules)), tmp_path / "all", check=False, progress=Lines()).artifacts[0]
    said = capsys.readouterr().err
    assert "warning: q: static activations ruin model.layers.1.mlp.down_proj (output off by " in said
    assert ": keep them with a rule (keep: true), or give them a dynamic scheme" in said
    assert said.count("output off by") == 1
    health = made.manifest.calibration["health"]
    inputs = seen_by_hooks(folder)
    assert set(health) == {name for name in inputs if name != "lm_head"}
    for name, seen in health.items():
        x = inputs[name]
        assert seen["inputs"]["absmax"] == seen["inputs"]["limit"] == pytest.approx(float(x.abs().max()), rel=1e-3)
        halves = float(x[:8].abs().max()), float(x[8:].abs().max())
        assert seen["inputs"]["drift"] == pytest.approx(max(halves) / min(halves), rel=1e-3)
        assert seen["inputs"]["outliers"] == (name == "model.layers.1.mlp.down_proj")
        assert seen["inputs"]["typical"] == pytest.approx(float(x.abs().median()), rel=0.2)
    for rules in (
        "- {{match: '*.1.mlp.down_proj', keep: true, why: static}}\n      - {{match: linear, scheme: int8-static}}",
        "- {{match: '*.1.mlp.down_proj', scheme: int8-dynamic}}\n      - {{match: linear, scheme: int8-static}}",
        "- {{match: linear, scheme: int8-static, algorithm: [{{smoothquant: {{alpha: 0.9}}}}, rtn]}}",
    ):
        convert(recipe_for(folder, text=RECIPE.format(rules=rules)), tmp_path / str(len(rules)), check=False, progress=Lines())
        assert "ruin" not in capsys.readouterr().err


def test_errors_before_and_after_each_algorithm_are_those_of_the_plain_model(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """Of the first block, whose inputs are the source's; the product of what is stored with a quantized input, against the source's."""
    from convert.algorithms.smoothing import fake_quantize

    folder = make_llama()
    rules = "- {{match: linear, scheme: int8-dynamic, algorithm: gptq}}"
    made = convert(recipe_for(folder, text=RECIPE.format(rules=rules)), tmp_path, check=False).artifacts[0]
    stored, source, inputs = load_file(made.path / "model.safetensors"), load_file(folder / "model.safetensors"), seen_by_hooks(folder)
    for name, health in made.manifest.calibration["health"].items():
        assert [error["after"] for error in health["errors"]] == ["rtn", "gptq"]
        assert "limit" not in health["inputs"]
        if not name.startswith("model.layers.0."):
            continue
        x, weight = inputs[name].flatten(0, 1), source[f"{name}.weight"].float()
        codes = stored[f"{name}.weight"].float() * stored[f"{name}.weight_scale"].float()
        expected = x @ weight.T
        error = (fake_quantize(x, SCHEMES["int8-dynamic"].activation) @ codes.T - expected).norm() / expected.norm()
        rounded, solved = health["errors"]
        assert solved["output"] == pytest.approx(float(error), rel=0.15), "64 of 512 rows"
        assert solved["weight"] == pytest.approx(float((codes - weight).norm() / weight.norm()), rel=1e-3)
        assert solved["weight"] > rounded["weight"]
        assert solved["output"] < rounded["output"]


def test_smoothing_is_seen_in_inputs_and_errors(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    rules = "- {{match: linear, scheme: int8-dynamic, algorithm: [{{smoothquant: {{alpha: 0.8}}}}, gptq]}}"
    made = convert(recipe_for(plant(make_llama()), text=RECIPE.format(rules=rules)), tmp_path, check=False).artifacts[0]
    down = made.manifest.calibration["health"]["model.layers.1.mlp.down_proj"]
    assert [error["after"] for error in down["errors"]] == ["rtn", "smoothquant", "gptq"]
    assert down["errors"][0]["typical"] > 10 * down["errors"][1]["typical"] > 0
    inputs, outputs = summary(made.manifest.calibration["health"])
    assert "model.layers.1.mlp.down_proj" in inputs[1]
    assert "after rtn" in outputs[1]
    assert "after smoothquant" in outputs[1]


def test_a_scale_that_clips_what_matters_is_as_bad_as_one_that_rounds_all_away() -> None:
    """Of one token in 64, whose magnitudes are a thousand times the others', and which is most of all energy."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 48, generator=generator), torch.randn(32, 48, generator=generator)
    x[9] *= 1000
    scheme = SCHEMES["int8-static"]
    quantized = rtn.quantize(weight.clone(), scheme.weight, scale_dtype=torch.float32)
    whole = lost("rtn", weight, quantized, x, scheme.activation, float(x.abs().max()))
    cut = lost("rtn", weight, quantized, x, scheme.activation, 4.0)
    dynamic = lost("rtn", weight, quantized, x, SCHEMES["int8-dynamic"].activation, None)
    assert (whole["typical"], whole["output"] < 0.1) == (1.0, True)
    assert (cut["typical"] < 0.1, cut["output"] > 0.9) == (True, True)
    assert max(dynamic["typical"], dynamic["output"]) < 0.03
    assert describe(x.abs().amax(dim=0), x, 4.0)["clipped"] == pytest.approx(float((x.abs() > 4).float().mean()), rel=1e-3)


@pytest.mark.parametrize("count", [1, 7, 64, 127, 128, 512, 1000])
def test_a_few_rows_come_from_all_batches_and_places(count: int) -> None:
    found = few(torch.arange(count)[:, None].bfloat16()) if count < 256 else few(torch.arange(count)[:, None])
    assert len(found) == min(ROWS, count)
    assert len(found.unique()) == len(found)
    if count >= 512:
        assert len(set((found.long() % 8).flatten().tolist())) == 8
        assert found.min() < count * 0.1
        assert found.max() > count * 0.9


def test_drift_of_nothing_to_compare_is_none() -> None:
    assert drift(torch.tensor([3.0])) == 1.0
    assert drift(torch.tensor([2.0, 8.0])) == drift(torch.tensor([8.0, 2.0])) == 4.0


def test_report_page_and_command_show_it(make_llama: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from convert.command import _show_artifact
    from convert.recipe import parse_recipe

    text = f"""
model: {plant(make_llama())}
calibration: {{sequences: 4, length: 32}}
validation: {{tokens: 64, length: 32}}
targets:
  - name: q
    format: compressed-tensors
    rules: [{{match: linear, scheme: int8-static}}]
    limits: {{kl_nats: 5.0, top1: 0.0, perplexity_ratio: 50.0}}
"""
    outcome = convert(parse_recipe(text, "test.yaml", name="test"), tmp_path)
    (artifact,) = outcome.artifacts
    report = read_report(report_path(artifact.path))
    assert report == outcome.reports[0]
    assert report.passed
    assert report.health == artifact.manifest.calibration["health"]
    page = report_path(artifact.path).with_suffix(".html").read_text()
    assert "<h2>Health of the layers</h2>" in page
    assert "static activations ruin" in page.lower()
    _show_artifact(artifact.path, None, report, reused=False)
    said = capsys.readouterr().out
    assert "  inputs     largest " in said
    assert "  outputs    off by " in said
    assert "  static     static activations ruin model.layers.1.mlp.down_proj" in said
