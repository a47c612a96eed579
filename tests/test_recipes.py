"""The recipes that come with the tool, each on a small model whose widths fit every scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Make

from convert import pipeline
from convert.recipe import read_recipe
from formats import FORMATS
from formats.errors import RecipeError
from formats.verify import verify

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.yaml"))
WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_plans_on_a_model_that_fits(path: Path, make_llama: Make) -> None:
    encoder = path.stem.startswith("minilm")
    recipe = read_recipe(path) if encoder else read_recipe(path, model=str(make_llama(**WIDE)))
    job = pipeline.plan(recipe)
    quantizes = [any(rule.scheme for rule in target.rules) for target in recipe.targets]
    assert [bool(target.quantized) for target in job.targets] == quantizes


def test_a_model_whose_width_is_no_multiple_of_a_block_is_refused_with_the_recipe_s_line(make_llama: Make) -> None:
    path = next(path for path in RECIPES if path.stem == "llama-fp8-block")
    with pytest.raises(RecipeError, match=r"llama-fp8-block.yaml:11:9: model.layers.0.* 64 x 96 is not made of whole blocks of 128 x 128"):
        pipeline.plan(read_recipe(path, model=str(make_llama())))


def test_all_is_every_format_that_a_runtime_here_loads_but_for_blocks() -> None:
    path = next(path for path in RECIPES if path.stem == "llama-all")
    assert {target.format for target in read_recipe(path).targets} == set(FORMATS) - {"fp8", "modelopt", "onnx", "onnx-matmulnbits"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-all", "llama-fp8-block"])
def test_every_target_of_a_recipe_passes_in_its_runtime(name: str, make_llama: Make, tmp_path: Path) -> None:
    """``fp8`` is decoded while transformers loads it where there is no GPU, and the check says so instead of counting modules in 8 bit."""
    path = next(path for path in RECIPES if path.stem == name)
    overrides = ["validation={tokens: 128, length: 64}"] + (["calibration={sequences: 2, length: 32}"] if name == "llama-all" else [])
    recipe = read_recipe(path, overrides, model=str(make_llama(**WIDE)))
    outcome = pipeline.convert(recipe, tmp_path)
    failed = {report.target: [check for check in report.checks if not check.passed] for report in outcome.reports}
    # Random weights rank nothing clearly: top-1 is no measure of them.
    assert all(check.name.endswith("top1") for checks in failed.values() for check in checks), failed
    for artifact, report in zip(outcome.artifacts, outcome.reports, strict=True):
        assert verify(artifact.path).findings == ()
        named: dict[str, Any] = {check.name.partition(": ")[2]: check for check in report.checks}
        assert named["modules dequantized at load" if artifact.manifest.format == "fp8" else "modules in 8 bit"].value == 14
        assert json.loads((artifact.path / "config.json").read_text())["quantization_config"]["quant_method"] == artifact.manifest.format
