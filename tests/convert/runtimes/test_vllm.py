"""Artifacts in the real vLLM, each in a process of its environment."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from convert import pipeline
from convert.runtimes.vllm import _in_order


def needs_vllm(test: Any) -> Any:
    return pytest.mark.runtime("vllm")(pytest.mark.slow(test))


#: Heads of 64, which vLLM's attention on a CPU has; two of them share keys and values; a tied head.
SHAPE = {"hidden_size": 128, "intermediate_size": 224, "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def proven(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from convert.recipe import parse_recipe

    target = "format: compressed-tensors, runtimes: [transformers, vllm]"
    limits = "limits: {kl_nats: 0.01, top1: 0.2, perplexity_ratio: 1.1}"
    job = f"""
model: {make_llama(**SHAPE)}
validation: {{tokens: 64, length: 32}}
calibration: {{sequences: 4, length: 32}}
targets:
  - {{name: int8, {target}, {limits}}}
  - {{name: int8-cache, {target}, kv_cache: fp8, {limits}}}
  - {{name: fp8-cache, {target}, kv_cache: fp8, rules: [{{match: linear, scheme: fp8-dynamic}}], limits: {{kl_nats: 1.0e-9}}}}
"""
    return pipeline.convert(parse_recipe(job, "vllm.yaml", name="vllm"), tmp_path_factory.mktemp("out"))


def result(report: Any, name: str = "vllm") -> Any:
    return next(run for run in report.runtimes if run.name == name)


@needs_vllm
@pytest.mark.parametrize("index", [0, 1])
def test_int8_passes_in_vllm_and_every_module_is_held_in_int8(proven: Any, index: int) -> None:
    report = proven.reports[index]
    assert report.passed, [check for check in report.checks if not check.passed]
    counted = next(check for check in report.checks if check.name == "vllm: modules in 8 bit")
    assert (counted.value, counted.limit) == (14, 14), "fused layers count as what they were fused of"
    assert result(report).kernels == {"CPUInt8ScaledMMLinearKernel": 8} or result(report).device != "cpu"
    assert result(report).versions["vllm"]
    assert result(report).divergence.kl_nats == pytest.approx(result(report, "transformers").divergence.kl_nats, abs=5e-4)


@needs_vllm
@pytest.mark.parametrize("index", [1, 2])
def test_scales_of_keys_and_values_arrive_in_vllm(proven: Any, index: int) -> None:
    cache = next(check for check in proven.reports[index].checks if check.name == "vllm: layers with an 8-bit cache")
    assert cache.passed
    assert (cache.value, cache.limit) == (2, 2)
    assert not any("cache" in check.name for check in proven.reports[0].checks)


@needs_vllm
def test_fp8_runs_in_vllm_and_its_limit_is_held(proven: Any) -> None:
    report = proven.reports[2]
    assert {check.name for check in report.checks if not check.passed} >= {"vllm: kl_nats", "transformers: kl_nats"}
    assert next(check for check in report.checks if check.name == "vllm: modules in 8 bit").passed
    assert result(report).divergence.kl_nats == pytest.approx(result(report, "transformers").divergence.kl_nats, abs=1e-3)


@needs_vllm
def test_an_artifact_that_vllm_cannot_load_is_a_failed_check_with_its_own_words(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    recipe = recipe_for(make_llama(**SHAPE), **{"targets.0.runtimes": "[vllm]"})
    artifact = pipeline.convert(recipe, tmp_path / "out", check=False).artifacts[0].path
    config = (artifact / "config.json").read_text()
    (artifact / "config.json").write_text(config.replace('"compressed-tensors"', '"bitsandbytes"'))
    (report,) = pipeline.prove([artifact])
    failed = next(check for check in report.checks if check.name == "vllm: loads and runs")
    assert not failed.passed
    assert "Unknown quantization method: bitsandbytes" in failed.detail
    assert re.match(r"vLLM [0-9.]+ raised ", failed.detail), "the end alone, not vLLM's log"


@needs_vllm
def test_a_mixture_of_experts_runs_in_vllm_where_its_experts_are_kept(recipe_for: Any, tmp_path: Path) -> None:
    """vLLM 0.32 has no 8-bit experts on a CPU: it refuses codes of INT8 and of FP8."""
    from conftest import save_tokenizer
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(**SHAPE, num_hidden_layers=2, num_local_experts=4, vocab_size=300, max_position_embeddings=512)
    MixtralForCausalLM(config).bfloat16().save_pretrained(tmp_path / "mixtral")
    save_tokenizer(tmp_path / "mixtral", 300)
    rules = "[{match: '*experts*', keep: true, why: no kernel}, {match: linear, scheme: int8-dynamic}]"
    recipe = recipe_for(tmp_path / "mixtral", **{"targets.0.runtimes": "[vllm]", "targets.0.rules": rules})
    (report,) = pipeline.convert(recipe, tmp_path / "out").reports
    assert report.passed, [check for check in report.checks if not check.passed]
    assert next(check for check in report.checks if check.name == "vllm: modules in 8 bit").value == 8
    assert result(report).divergence.kl_nats < 0.001


def test_rows_that_do_not_give_the_log_probabilities_vllm_returned_are_refused() -> None:
    """vLLM computes the last position first; what it returned for the prompt says whether the rows were put in order."""
    rows, sequence = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)), [3, 1, 4, 1, 5]
    returned = torch.log_softmax(rows, -1)
    entries = [None, *({token: SimpleNamespace(logprob=float(returned[i, token]))} for i, token in enumerate(sequence[1:]))]
    output = SimpleNamespace(prompt_logprobs=entries)
    assert torch.equal(_in_order([rows[4:], rows[:4]], sequence, output), rows)
    assert torch.equal(_in_order([rows[4:], rows[:2], rows[2:4]], sequence, output), rows)
    with pytest.raises(ValueError, match="nats apart"):
        _in_order([rows[:4], rows[4:]], sequence, output)
    with pytest.raises(ValueError, match=r"\[1, 3\] rows of logits for 5 tokens"):
        _in_order([rows[4:], rows[:3]], sequence, output)
