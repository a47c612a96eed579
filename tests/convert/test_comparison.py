"""Several recipes side by side: the whole way on a small model, and what is said of made-up rows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_html import Page, make_health, make_layers, make_pair, make_run

from convert import pipeline
from convert.comparison import Comparison, compare, explain
from convert.html import render_comparison
from convert.recipe import parse_recipe
from convert.report import Blocks, LayerNumbers
from formats.errors import InputError
from formats.manifest import FileRecord

LIMITS = "{kl_nats: 5.0, top1: 0.0, perplexity_ratio: 50.0}"


def recipe(model: Path, name: str, scheme: str, algorithm: str = "rtn", tokens: int = 512) -> Any:
    text = f"""
model: {model}
validation: {{tokens: {tokens}, length: 64}}
targets:
  - {{name: q, format: compressed-tensors, rules: [{{match: linear, scheme: {scheme}, algorithm: {algorithm}}}], limits: {LIMITS}}}
"""
    return parse_recipe(text, f"{name}.yaml", name=name)


def test_recipes_are_made_once_proven_together_and_told_apart(make_llama: Any, tmp_path: Path) -> None:
    model = make_llama()
    recipes = [
        recipe(model, "int8", "int8-dynamic"),
        recipe(model, "int8-again", "int8-dynamic"),
        recipe(model, "fp8", "fp8-dynamic"),
    ]
    first = pipeline.convert(recipes[0], tmp_path / "int8", check=False)
    made = (first.artifacts[0].path / "model.safetensors").stat()
    found = pipeline.compare(recipes, tmp_path)
    assert (first.artifacts[0].path / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns, "what was made is not made again"
    int8, again, fp8 = found.rows
    assert [row.name for row in found.rows] == ["int8/q", "int8-again/q", "fp8/q"]
    assert int8.loss == again.loss < fp8.loss, "FP8 has three bits of mantissa"
    assert int8.apart is None
    assert again.apart is not None
    assert (again.apart.low, again.apart.high) == (0.0, 0.0)
    assert again.in_noise
    assert fp8.apart is not None
    assert fp8.apart.low > 0
    assert not fp8.in_noise
    assert found.pair == ("int8/q", "fp8/q")
    assert len(found.layers) == 14
    assert all(layer.int8_db > layer.fp8_db for layer in found.layers)
    assert explain(found.layers, found.ranges)[0].startswith("Weights: 14 of 14 are closer to the source in INT8")
    assert found.ranges.keys() == {layer.tensor for layer in found.layers}
    assert json.loads((tmp_path / "compare.json").read_text())["ranges"]["model.layers.1.mlp.up_proj.weight"]["input_crest"] > 1
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["rows"][2]["interval"]["low"] < record["rows"][2]["loss"]
    text = Page((tmp_path / "compare.html").read_text()).text
    assert "int8-again/q" in text
    assert "not told apart from the least" in text
    assert (tmp_path / "fp8" / "q.report.html").exists()


def test_recipes_for_other_models_or_texts_are_refused_before_any_work(make_llama: Any, tmp_path: Path) -> None:
    model = make_llama()
    one = recipe(model, "a", "int8-dynamic")
    for other, message in (
        (recipe(make_llama(), "b", "int8-dynamic"), r"b\.yaml:2:1: b has another model than a"),
        (recipe(model, "b", "int8-dynamic", tokens=256), r"b\.yaml:3:1: b has another validation than a"),
        (recipe(model, "a", "fp8-dynamic"), "2 recipes are called a"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline.compare([one, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def made_up(name: str, size_bytes: int, kl: list[float], **report: Any) -> Any:
    """A report and manifest of an artifact of this size, whose blocks of 64 tokens have these mean KL divergences."""
    run = make_run("transformers", sum(kl) / len(kl))
    assert run.divergence is not None
    count = len(kl)
    blocks = Blocks((64,) * count, tuple(64 * value for value in kl), (60,) * count, (63,) * count, (0.1,) * count)
    run = replace(run, divergence=replace(run.divergence, blocks=None if math.isnan(sum(kl)) else blocks))
    files = (FileRecord("model.safetensors", size_bytes, "01" * 32),)
    made, manifest = make_pair(recipe=name, runtimes=(run,), manifest={"files": files}, **report)
    return manifest, made


def test_the_frontier_is_what_nothing_beats_and_noise_is_said() -> None:
    kl = [0.01 * (2 + i % 5) for i in range(64)]
    noisy = [value + (0.004 if i % 2 else -0.0036) for i, value in enumerate(kl)]
    rows = compare(
        [
            made_up("small", 100, [2 * value for value in kl]),
            made_up("large", 200, kl),
            made_up("same", 200, noisy),
            made_up("beaten", 210, [3 * value for value in kl]),
        ]
    ).rows
    assert [row.frontier for row in rows] == [True, True, False, False]
    assert [row.in_noise for row in rows] == [False, False, True, False]
    rows = compare([made_up("int8", 100_000, [0.2, 0.3]), made_up("fp8", 100_001, [0.1, 0.2])]).rows
    assert [row.frontier for row in rows] == [False, True], "a kilobyte of headers is no saving"


def test_rows_that_cannot_be_compared() -> None:
    nan = made_up("nan", 50, [math.nan] * 8)
    rows = compare([nan, made_up("good", 100, [0.1, 0.2, 0.3])]).rows
    assert [row.frontier for row in rows] == [False, True]
    assert [row.apart for row in rows] == [None, None]
    manifest, report = made_up("other", 100, [0.1, 0.2])
    with pytest.raises(InputError, match="different texts"):
        compare([nan, (manifest, replace(report, validation={**report.validation, "tokens_sha256": "00"}))])
    with pytest.raises(InputError, match="none of the artifacts ran"):
        compare([(manifest, replace(report, runtimes=()))])


def layers_in(scheme: str, db: float) -> tuple[LayerNumbers, ...]:
    return tuple(replace(layer, scheme=scheme, snr_db=db) for layer in make_layers(4))


def both(**change: Any) -> Comparison:
    """INT8 whose outputs static scales ruin in one layer, and FP8 whose do not suffer."""
    int8, fp8 = make_health(4), make_health(4)
    for health in fp8.values():
        health["errors"][-1] |= {"output": 0.03, "typical": 0.03}
    return compare(
        [
            made_up("int8", 100, [0.2, 0.3, 0.4], layers=layers_in("int8-static", 40.0), health=int8, **change),
            made_up("fp8", 100, [0.1, 0.2, 0.3], layers=layers_in("fp8-static", 31.5), health=fp8, **change),
        ]
    )


def test_int8_and_fp8_are_explained_by_what_calibration_saw() -> None:
    found = both()
    assert len(found.layers) == 28
    ruined = next(layer for layer in found.layers if layer.tensor == "model.layers.2.mlp.down_proj.weight")
    assert ruined.reach == 3000 / 0.05
    assert (ruined.int8_off, ruined.fp8_off) == (0.9, 0.03)
    weights, outputs = explain(found.layers, {})
    assert "28 of 28 are closer to the source in INT8 (median signal to noise 40.0 dB, in FP8 31.5 dB)" in weights
    assert "27 of 28 are closer to the source in INT8" in outputs
    assert "1 of 28 are closer to the source in FP8 (largest input 60,000 times the median one" in outputs
    assert explain([replace(layer, reach=None) for layer in found.layers], {}) == [weights]
    assert explain([], {}) == []


def test_the_page_stands_alone_and_escapes() -> None:
    found = both(target="<script>alert(1)</script>")
    written = render_comparison(found)
    assert render_comparison(found) == written
    page = Page(written)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "link", "iframe")]
    assert [tag for tag, _ in page.tags if tag in ("h1", "h2")] == ["h1", "h2", "h2"]
    assert "int8/<script>alert(1)</script>" in page.text
    assert "60,000" in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 1
