"""One ONNX artifact in the real runtimes that are not Python's ONNX Runtime, each in its environment, and in a real browser."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from browser_page import write_in_browser
from conftest import save_tokenizer

from convert import environments, pipeline
from convert.recipe import parse_recipe

ELSEWHERE = ("onnxruntime-genai", "openvino", "transformers.js")
JOB = """
model: {model}
validation: {{tokens: 64, length: 32}}
targets:
  - name: int8
    format: onnx
    rules: [{{match: lm_head, scheme: int8-weight-only-g32}}, {{match: linear, scheme: int8-weight-only-g32}}]
    runtimes: [{runtimes}]
    limits: {{kl_nats: 0.001, top1: 0.9, perplexity_ratio: 1.1}}
  - name: int8x2
    format: onnx
    options: {{inputs: int8x2}}
    rules: [{{match: lm_head, scheme: int8-weight-only}}, {{match: linear, scheme: int8-weight-only}}]
    runtimes: [{runtimes}]
    limits: {{kl_nats: 0.001, top1: 0.9, perplexity_ratio: 1.1}}
"""
#: One product for q, k, v and one for gate and up in each of two layers, two more in each, and the head.
PRODUCTS = 9


def needs(*runtimes: str) -> Callable[[Any], Any]:
    def mark(test: Any) -> Any:
        for name in runtimes:
            test = pytest.mark.runtime(name)(test)
        return pytest.mark.slow(test)

    return mark


@pytest.fixture(scope="module")
def proven(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of one conversion for those runtimes that are built here."""
    here = [name for name in ELSEWHERE if (environments.root() / name / environments.STAMP).is_file()]
    job = JOB.format(model=make_llama(), runtimes=", ".join(here or ["onnxruntime"]))
    return pipeline.convert(parse_recipe(job, "elsewhere.yaml", name="elsewhere"), tmp_path_factory.mktemp("out"))


@pytest.fixture
def artifact(proven: Any) -> Path:
    return Path(proven.artifacts[0].path)


#: Of int8x2 the codes of four inputs in each layer are floats again for a moment, and two rows of every product become one.
HALVES = {"MatMulInteger": PRODUCTS, "MatMul": PRODUCTS, "DequantizeLinear": PRODUCTS}


@pytest.mark.parametrize(
    ("runtime", "kernels", "halves"),
    [
        pytest.param("onnxruntime-genai", {"MatMulNBits": PRODUCTS}, HALVES, marks=pytest.mark.runtime("onnxruntime-genai")),
        pytest.param(
            "openvino", {"FullyConnected int8": PRODUCTS}, {"FullyConnected float32": PRODUCTS}, marks=pytest.mark.runtime("openvino")
        ),
        pytest.param("transformers.js", {"MatMulNBits": PRODUCTS}, HALVES, marks=pytest.mark.runtime("transformers.js")),
    ],
)
@pytest.mark.slow
def test_int8_passes_and_is_multiplied_in_int8(
    runtime: str, kernels: dict[str, int], halves: dict[str, int], proven: Any, artifact: Path
) -> None:
    reports = {report.target: report for report in proven.reports}
    for name, expected in (("int8", kernels), ("int8x2", halves)):
        report = reports[name]
        checks = [check for check in report.checks if check.name.startswith((f"{runtime}:", f"{runtime} ("))]
        assert checks
        assert all(check.passed for check in checks), [check for check in checks if not check.passed]
        (result,) = [result for result in report.runtimes if result.program == runtime]
        assert result.kernels == expected
        assert result.continuation == report.source.continuation
        assert 0 < result.divergence.kl_nats < 1e-4
        assert result.weight_bytes == next((artifact.parent / name).glob("onnx/*_data")).stat().st_size
        names = {check.name.partition(": ")[2] for check in checks}
        assert ("modules in 8 bit" in names) == (runtime == "openvino" and name == "int8"), "a session of ONNX Runtime does not say"
        assert ("prompt tokenized otherwise than by transformers" in names) == (runtime != "openvino")


@needs(*ELSEWHERE)
def test_frequencies_of_a_long_text_are_the_source_s_in_every_runtime(tmp_path: Path) -> None:
    """A Phi-3 whose texts are longer than the switch of its frequencies."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.0, 2, 3, 5, 7, 9, 12, 16]}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    lengths = {"max_position_embeddings": 512, "original_max_position_embeddings": 8}
    torch.manual_seed(0)
    model = transformers.Phi3ForCausalLM(transformers.Phi3Config(**sizes, **tokens, **lengths, rope_parameters=rope))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(tmp_path / "phi3")
    save_tokenizer(tmp_path / "phi3", 300)
    text = JOB.format(model=tmp_path / "phi3", runtimes=", ".join(("onnxruntime", *ELSEWHERE)))
    text = text[: text.index("  - name: int8x2")].replace("rules: [", "rules: [{match: '*', keep: true, why: floats}]  # [")
    (report,) = pipeline.convert(parse_recipe(text, "long.yaml", name="long"), tmp_path / "out").reports
    assert not [check for check in report.checks if not check.passed]
    assert {result.program for result in report.runtimes} == {"onnxruntime", *ELSEWHERE}
    assert all(result.divergence.kl_nats < 1e-6 for result in report.runtimes)


@needs("onnxruntime-gpu")
@pytest.mark.gpu
@pytest.mark.parametrize("form", ["onnx", "onnx-matmulnbits"])
def test_on_a_gpu_int8_passes_and_no_product_runs_beside_it(form: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    text = JOB.format(model=make_llama(), runtimes="onnxruntime-gpu").replace("format: onnx", f"format: {form}")
    text = text[: text.index("  - name: int8x2")]
    (report,) = pipeline.convert(parse_recipe(text, "gpu.yaml", name="gpu"), tmp_path).reports
    assert not [check for check in report.checks if not check.passed]
    (result,) = report.runtimes
    assert (result.program, result.device, result.version) == ("onnxruntime-gpu", "cuda", environments.PINS[result.program]["cuda"].version)
    assert result.kernels == {"MatMulNBits": PRODUCTS}
    assert any(check.name.endswith("products that ran beside the GPU") for check in report.checks)


@needs(*ELSEWHERE)
@pytest.mark.parametrize("kept_bytes", [1000, None])
def test_an_artifact_that_does_not_load_is_a_failed_check_in_its_own_words(kept_bytes: int | None, artifact: Path, tmp_path: Path) -> None:
    path = tmp_path / "int8"
    shutil.copytree(artifact, path)
    data = next(path.glob("onnx/*_data"))
    if kept_bytes is None:
        data.unlink()
    else:
        data.write_bytes(data.read_bytes()[:kept_bytes])
    (report,) = pipeline.prove([path])
    failed = {check.name.split(":")[0].split(" ")[0]: check.detail for check in report.checks if check.name.endswith("loads and runs")}
    assert set(failed) == set(ELSEWHERE)
    assert all(not check.passed for check in report.checks if check.name.endswith("loads and runs"))
    for runtime, detail in failed.items():
        assert re.match(rf"{runtime}( [0-9.]+)? raised ", detail, re.IGNORECASE), detail
        assert re.search(r"_proj\.weight|external data|model_quantized\.onnx_data", detail), detail


@needs("transformers.js")
def test_a_page_whose_data_file_is_missing_says_so_and_does_not_wait(artifact: Path, tmp_path: Path) -> None:
    """transformers.js itself waits for ever; a page that listens for rejections that nobody handles learns of it."""
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not on PATH; on Debian: apt-get install chromium")
    path = tmp_path / "int8"
    shutil.copytree(artifact, path)
    next(path.glob("onnx/*_data")).unlink()
    modules = environments.require("transformers.js").folder / "node_modules"
    with pytest.raises(RuntimeError, match=r"ModelFileNotFoundError: .*onnx/model_quantized.onnx_data"):
        write_in_browser(path, modules, {"ids": [1, 70], "count": 1, "dtype": "q8"}, timeout=60)


@needs("transformers.js")
def test_a_page_in_a_real_browser_writes_what_onnx_runtime_writes(artifact: Path) -> None:
    if shutil.which("chromium") is None:
        pytest.skip("chromium is not on PATH; on Debian: apt-get install chromium")
    ids = [1, 70, 80, 90, 100, 110]
    modules = environments.require("transformers.js").folder / "node_modules"
    found = write_in_browser(artifact, modules, {"ids": ids, "count": 6, "dtype": "q8"})
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the build for browsers rounds no inputs
    session = onnxruntime.InferenceSession(str(next(artifact.glob("onnx/*.onnx"))), options, providers=["CPUExecutionProvider"])
    past = {item.name: np.zeros((1, 2, 0, 16), np.float32) for item in session.get_inputs() if item.name.startswith("past")}
    expected: list[int] = []
    while len(expected) < 6:
        feeds = {"input_ids": np.array([ids + expected]), "attention_mask": np.ones((1, len(ids) + len(expected)), np.int64), **past}
        (logits,) = session.run(["logits"], feeds)
        if not expected:
            np.testing.assert_allclose(found["last_logits"], logits[0, -1], atol=1e-5)
        expected.append(int(logits[0, -1].argmax()))
    assert found["generated"] == expected
    assert "HeadlessChrome" in found["browser"]
