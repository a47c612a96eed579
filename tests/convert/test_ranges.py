"""Crests against a plain model's inputs, and the law by which they tell INT8 from FP8 against values of known range."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from convert import ranges
from convert.algorithms import rtn
from convert.algorithms.smoothing import fake_quantize
from convert.calibrate import calibration_tokens
from convert.pipeline import plan
from convert.progress import QUIET
from convert.ranges import FP8_SHARE, INT8_STEPS, Range, by_kind, explain, observe
from convert.recipe import Calibration
from formats.scheme import SCHEMES

TEXT = "model: {model}\ntargets: [{{name: q, format: compressed-tensors, rules: [{{match: linear, scheme: int8-dynamic}}]}}]\n"
PAIR = ("int8-dynamic", "fp8-dynamic")


@pytest.mark.parametrize("crest", [4.0, 12.0, 40.0])
def test_int8_errs_by_the_crest_and_fp8_by_a_share(crest: float) -> None:
    """Weights in many powers of two, the largest of each row so many times its root mean square."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 4096, generator=generator).clamp(-3, 3)
    rows[:, 0] = rows[:, 1:].square().mean(-1).sqrt() * crest / math.sqrt(1 - crest**2 / rows.shape[1])
    assert rows.abs().amax(-1).div(rows.square().mean(-1).sqrt()).mean() == pytest.approx(crest, rel=1e-3)
    off = {}
    for name in PAIR:
        rounded = rtn.quantize(rows.clone(), SCHEMES[name].weight, scale_dtype=torch.float32).dequantize()
        off[name] = float((rounded - rows).norm() / rows.norm())
    assert off["int8-dynamic"] == pytest.approx(crest / INT8_STEPS, rel=0.03)
    # The largest value is a code of its own, without an error.
    assert off["fp8-dynamic"] == pytest.approx(FP8_SHARE * math.sqrt(1 - crest**2 / rows.shape[1]), rel=0.03)


def test_ranges_are_those_of_the_plain_model(make_llama: Any, recipe_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many rows kept as there are, against a hook in transformers."""
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(ranges, "SEQUENCES", 2)
    monkeypatch.setattr(ranges, "LENGTH", 8)
    monkeypatch.setattr("convert.observe.ROWS", 8)
    folder = make_llama(dtype="float32")
    job = plan(recipe_for(folder, text=TEXT))
    names = [entry.tensor.name for entry in job.targets[0].quantized]
    found = observe(job, dict.fromkeys(names, PAIR), QUIET)
    assert list(found) == names
    settings = Calibration(sequences=2, length=8)
    tokens, _ = calibration_tokens(replace(job, recipe=job.recipe.model_copy(update={"calibration": settings})), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    module: Any = model.model.layers[1].mlp.down_proj
    seen: list[torch.Tensor] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    with torch.no_grad():
        for sequence in tokens:
            model(input_ids=sequence[None])
        x, weight = torch.cat(seen), module.weight
        expected = x @ weight.T
        off = []
        for name in PAIR:
            rounded = rtn.quantize(weight.clone(), SCHEMES[name].weight, scale_dtype=torch.float32).dequantize()
            error = fake_quantize(x, SCHEMES[name].activation) @ rounded.T - expected
            off.append(float((error.norm(dim=-1) / expected.norm(dim=-1)).median()))
        crests = [float((y.abs().amax(-1) / y.square().mean(-1).sqrt()).median()) for y in (weight, x)]
    got = found["model.layers.1.mlp.down_proj.weight"]
    assert [got.weight_crest, got.input_crest] == pytest.approx(crests, rel=2e-3)
    assert [got.int8_off, got.fp8_off] == pytest.approx(off, rel=2e-2)


def test_what_is_said_of_ranges() -> None:
    wide, narrow = Range(4.0, 30.0, 0.06, 0.037), Range(4.0, 5.0, 0.015, 0.037)
    assert narrow.favours_int8
    assert not wide.favours_int8
    seen = {f"model.layers.{i}.mlp.{'down' if i % 2 else 'up'}_proj.weight": wide if i % 2 else narrow for i in range(6)}
    assert [(kind.name, kind.layers, kind.int8_wins) for kind in by_kind(seen)] == [("up_proj", 3, 3), ("down_proj", 3, 0)]
    law, up, down, told = explain(seen)
    assert "They meet where the largest value is 12 times" in law
    assert up.startswith("up_proj: crest 4 of weights and 5 of inputs; rounded, its output is off by 1.50% in INT8, 3.70% in FP8")
    assert down.endswith("INT8 is closer in 0 of 3.")
    assert "the ranges alone tell: so in 6 of 6 layers; rank correlation of crest and of INT8's error over FP8's 1.00." in told
    turned = {name: Range(one.weight_crest, one.input_crest, one.fp8_off, one.int8_off) for name, one in seen.items()}
    assert "do not always tell: so in 0 of 6 layers; rank correlation of crest and of INT8's error over FP8's -1.00." in explain(turned)[-1]
    assert explain({}) == []
