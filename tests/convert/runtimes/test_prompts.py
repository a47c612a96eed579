"""The user's own prompts in every real runtime that has an environment of its own: the same greedy decoding, the model's chat template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from convert import pipeline
from convert.recipe import parse_recipe

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
TOKENS = 6
JOB = """
model: {model}
validation: {{tokens: 64, length: 32, prompts: {prompts}, answer_tokens: {tokens}}}
targets:
  - name: q
    format: {format}
    rules: [{{match: lm_head, scheme: {scheme}}}, {{match: linear, scheme: {scheme}}}]
    runtimes: [{runtime}]
    limits: {{kl_nats: 0.1, top1: 0.1, perplexity_ratio: 1.5, answers: 0.25}}
"""
#: As in test_vllm: heads of 64, which vLLM's attention on a CPU has.
SHAPE = {"hidden_size": 128, "intermediate_size": 224, "num_attention_heads": 2, "num_key_value_heads": 1}


def make_prompts(model: Path, path: Path) -> None:
    """Eight questions whose answers are what transformers itself writes, half of them through the chat template, and two that no model
    answers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    source = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = []
    for i in range(8):
        asked = {"messages": [{"role": "user", "content": f"Question {i}"}]} if i % 2 else {"prompt": f"Prompt {i}"}
        text = tokenizer.apply_chat_template(asked["messages"], add_generation_prompt=True, tokenize=False) if i % 2 else asked["prompt"]
        ids = torch.tensor([tokenizer(text, add_special_tokens=not i % 2).input_ids])
        said = source.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True)
        rows.append({**asked, "pattern": f"^{re.escape(text)}$"})
    rows += [{"prompt": f"Prompt {i}", "pattern": "no model says this"} for i in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("runtime", "format_", "scheme"),
    [
        ("transformers", "compressed-tensors", "int8-weight-only"),
        ("onnxruntime", "onnx", "int8-weight-only-g32"),
        pytest.param("vllm", "compressed-tensors", "int8-dynamic", marks=pytest.mark.runtime("vllm")),
        *(
            pytest.param(name, "onnx", "int8-weight-only-g32", marks=pytest.mark.runtime(name))
            for name in ("onnxruntime-genai", "openvino", "transformers.js")
        ),
    ],
)
def test_every_runtime_answers_as_the_source_does(runtime: str, format_: str, scheme: str, make_llama: Any, tmp_path: Path) -> None:
    model = make_llama(**SHAPE)
    make_prompts(model, tmp_path / "p.jsonl")
    job = JOB.format(model=model, prompts=tmp_path / "p.jsonl", tokens=TOKENS, format=format_, scheme=scheme, runtime=runtime)
    if runtime == "vllm":  # whose 8-bit kernels hold no head
        job = job.replace(f"{{match: lm_head, scheme: {scheme}}}, ", "")
    (report,) = pipeline.convert(parse_recipe(job, "prompts.yaml", name="prompts"), tmp_path / "out").reports
    assert report.source.answers is not None
    assert report.source.answers.right == (True,) * 8 + (False,) * 2
    assert report.runtimes
    for run in report.runtimes:
        assert run.answers is not None, run.name
        assert run.answers.right[8:] == (False, False)
        # Of a model of random weights the first tokens lie close together: 8 bits may turn one or two answers, another template all.
        assert sum(run.answers.right[:8]) >= 6, run.name
        check = next(check for check in report.checks if check.name == f"{run.name}: answers")
        assert check.value == pytest.approx((8 - sum(run.answers.right)) / 10)
        assert check.passed
        assert len(run.passages) == 2
    assert len(report.source.passages) == len(report.passages) == 2
