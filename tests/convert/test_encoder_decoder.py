"""Encoder-decoders as two graphs, in ONNX Runtime and in transformers.js, against transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from conftest import GRAPH, save_tokenizer
from decoded import put_back

from convert import pipeline
from convert.card import render_card
from convert.progress import QUIET
from convert.report import read_report, report_path
from convert.sensitivity import measure
from formats.errors import FormatError, InputError, RecipeError
from formats.inspect import inspect
from formats.manifest import read_manifest
from formats.onnx_graph import find_graphs, read_folder
from formats.verify import verify

RECIPE = f"{GRAPH}    limits: {{{{kl_nats: 0.05, top1: 0.7, perplexity_ratio: 1.1}}}}\n"
INT8 = "[{match: lm_head, scheme: int8-weight-only}, {match: linear, scheme: int8-weight-only}]"
TOKENS = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
SIZES = {
    f"{half}_{size}": count for half in ("encoder", "decoder") for size, count in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 96))
}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # One table of embeddings for both halves and the head, and more layers that read than that write.
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**TOKENS, "d_model": 64, "d_kv": 8, "d_ff": 96, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4},
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {**TOKENS, **SIZES, "d_model": 64, "max_position_embeddings": 128, "bos_token_id": 1, "forced_eos_token_id": None},
    ),
    # Its positions are in no file.
    "marian": (
        "MarianMTModel",
        "MarianConfig",
        {**TOKENS, **SIZES, "d_model": 64, "max_position_embeddings": 128, "forced_eos_token_id": None},
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """``made(kind)``: the folders of a random model and of its artifact, which was proven in every runtime that is built here."""
    from convert import environments
    from convert.recipe import parse_recipe

    found: dict[str, tuple[Path, Path]] = {}

    def make(kind: str) -> tuple[Path, Path]:
        if kind not in found:
            folder = save(kind, tmp_path_factory.mktemp(kind))
            node = environments.root() / "transformers.js" / environments.STAMP
            text = RECIPE.format(model=folder, scheme=INT8).replace(
                "[onnxruntime]", "[onnxruntime, transformers.js]" if node.is_file() else "[onnxruntime]"
            )
            outcome = pipeline.convert(parse_recipe(text, "pair.yaml", name="pair"), tmp_path_factory.mktemp("out"))
            found[kind] = folder, outcome.artifacts[0].path
        return found[kind]

    return make


def save(kind: str, folder: Path) -> Path:
    model_class, config_class, settings = KINDS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 1 else 0.08)
    model.save_pretrained(folder)
    save_tokenizer(folder, 300)
    return folder


class Graphs:
    """Both graphs of a folder without optimisation, called as Optimum does."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.encoder, self.decoder = (
            onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"]) for name in find_graphs(folder)
        )
        self.cache = [item for item in self.decoder.get_inputs() if item.name.startswith("past_key_values.")]

    def read(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        (states,) = self.encoder.run(None, {"input_ids": ids, "attention_mask": mask})
        return np.asarray(states)

    def write(
        self, ids: np.ndarray, states: np.ndarray, mask: np.ndarray, past: dict[str, np.ndarray] | None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        empty = {item.name: np.zeros((len(ids), item.shape[1], 0, item.shape[3]), np.float32) for item in self.cache}
        given = {
            "input_ids": ids,
            "encoder_hidden_states": states,
            "encoder_attention_mask": mask,
            "use_cache_branch": np.array([past is not None]),
        }
        logits, *present = self.decoder.run(None, {**given, **(past or empty)})
        names = [item.name.replace("present", "past_key_values") for item in self.decoder.get_outputs()[1:]]
        return np.asarray(logits), dict(zip(names, present, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_both_graphs_are_the_model_with_the_weights_they_decode_to(kind: str, made: Callable[..., Any]) -> None:
    """At once, and token by token: then keys and values of what was read come from the cache, for the states are no longer given."""
    folder, out = made(kind)
    for name in find_graphs(out):
        onnx.checker.check_model(out / name, full_check=True)
    model = getattr(transformers, KINDS[kind][0]).from_pretrained(folder).eval()
    embedding = model.get_input_embeddings().weight.detach().clone()
    plain = model.lm_head.weight.detach().clone()
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert put_back(model, out) == layers
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embedding)
    assert (model.lm_head.weight - plain).abs().max() > 1e-4  # its codes did change something
    draw = np.random.default_rng(0)
    ids, written = draw.integers(3, 300, (2, 13)), draw.integers(3, 300, (2, 7))
    mask = np.ones_like(ids)
    mask[1, 8:] = 0
    with torch.no_grad():
        given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": written}
        expected = model(**{name: torch.from_numpy(value) for name, value in given.items()}).logits.numpy()
    graphs = Graphs(out)
    states = graphs.read(ids, mask)
    whole, _ = graphs.write(written, states, mask, None)
    scale = np.abs(expected).max()
    assert np.abs(whole - expected).max() < 2e-5 * scale
    stepped, past = [], None
    for i in range(written.shape[1]):
        logits, past = graphs.write(written[:, i : i + 1], states if past is None else states * np.nan, mask, past)
        stepped.append(logits[:, 0])
    assert np.abs(np.stack(stepped, 1) - expected).max() < 2e-5 * scale
    assert past is not None
    assert {value.shape[2] for name, value in past.items() if ".encoder." in name} == {13}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_proven_in_every_runtime(kind: str, made: Callable[..., Any]) -> None:
    folder, out = made(kind)
    report = read_report(report_path(out))
    assert [check.name for check in report.checks if not check.passed] == []
    said = {check.name.partition("): ")[2] for check in report.checks if check.name.startswith("onnxruntime as deployed (")}
    assert {"decoding from the cache equals one pass", "padding of what is read, on the right, changes nothing", "kl_nats"} <= said
    deployed = next(run for run in report.runtimes if run.name.startswith("onnxruntime as deployed"))
    model = getattr(transformers, KINDS[kind][0]).from_pretrained(folder)
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    # Some of T5's products here, of 32 input features, stay what they are.
    assert deployed.kernels["MatMulNBits"] + (deployed.kernels.get("MatMul", 0) if kind == "t5" else 0) == layers
    assert deployed.divergence is not None
    assert 1e-7 < deployed.divergence.kl_nats < 0.05
    assert deployed.weight_bytes == sum(path.stat().st_size for path in out.glob("onnx/*_data"))
    for run in report.runtimes:
        if run.program == "transformers.js":
            assert run.divergence is not None
            assert run.divergence.kl_nats == pytest.approx(deployed.divergence.kl_nats, rel=0.05)
            assert run.continuation == deployed.continuation


def test_names_and_axes_are_those_that_optimum_and_transformers_js_look_for(made: Callable[..., Any]) -> None:
    _, out = made("t5")
    assert find_graphs(out) == ("onnx/encoder_model_quantized.onnx", "onnx/decoder_model_merged_quantized.onnx")
    graphs = Graphs(out)
    text = ["batch_size", "sequence_length"]
    assert {item.name: item.shape for item in graphs.encoder.get_inputs()} == {"input_ids": text, "attention_mask": text}
    assert {item.name: item.shape for item in graphs.encoder.get_outputs()} == {"last_hidden_state": [*text, 64]}
    inputs = {item.name: item.shape for item in graphs.decoder.get_inputs()}
    cache = [f"{i}.{half}.{part}" for i in range(2) for half in ("decoder", "encoder") for part in ("key", "value")]
    assert [*inputs] == [
        *("encoder_attention_mask", "input_ids", "encoder_hidden_states"),
        *(f"past_key_values.{name}" for name in cache),
        "use_cache_branch",
    ]
    assert inputs["past_key_values.1.encoder.value"] == ["batch_size", 4, "past_encoder_sequence_length", 8]
    assert inputs["past_key_values.0.decoder.key"] == ["batch_size", 4, "past_decoder_sequence_length", 8]
    assert [item.name for item in graphs.decoder.get_outputs()] == ["logits", *(f"present.{name}" for name in cache)]
    counts = json.loads((out / "config.json").read_text())["transformers.js_config"]["use_external_data_format"]
    assert counts == {"encoder_model_quantized.onnx": 1, "decoder_model_merged_quantized.onnx": 1}


def test_what_both_read_is_in_the_files_of_both_and_in_the_ledger(made: Callable[..., Any]) -> None:
    folder, out = made("t5")
    assert not verify(out).findings
    tensors = read_folder(out)
    outputs = {entry["tensor"]: [name for name, *_ in entry["outputs"]] for entry in read_manifest(out).ledger}
    assert outputs["shared.weight"] == ["lm_head.weight", "lm_head.weight_scale", "shared.weight", "encoder_model.shared.weight"]
    raw = {name: (out / tensors[name].file).read_bytes()[tensors[name].start : tensors[name].stop] for name in outputs["shared.weight"][2:]}
    assert len(set(raw.values())) == 1
    assert {tensors[name].file for name in raw} == {f"{graph}_data" for graph in find_graphs(out)}
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
    assert raw["shared.weight"] == model.shared.weight.detach().numpy().tobytes()
    found = inspect(out)
    assert found["quantization"]["schemes"] == ["int8-weight-only"]
    assert set(found["metadata"]) == set(find_graphs(out))
    (out / "onnx" / "third.onnx").write_bytes(b"")
    with pytest.raises(FormatError, match=r"several graphs.*third\.onnx"):
        find_graphs(out)
    (out / "onnx" / "third.onnx").unlink()


def test_the_card_shows_the_pipeline_that_writes_from_what_it_reads(made: Callable[..., Any]) -> None:
    _, out = made("t5")
    card = render_card(read_report(report_path(out)), read_manifest(out))
    assert 'await pipeline("text2text-generation"' in card
    assert "pipeline_tag: text2text-generation" in card
    assert "and with `genai_config.json`" not in card
    assert "The two graphs in `onnx/` run in ONNX Runtime" in card


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"targets.0.runtimes": "[onnxruntime-genai]"}, "runs decoders only"),
        ({"targets.0.options": "{attention: gqa}"}, "for decoders only"),
        ({"targets.0.rules": "[{match: linear, scheme: int8-static}]"}, "calibration gives a model text to read"),
        ({"targets.0.rules": "[{match: linear, scheme: int8-weight-only, algorithm: gptq}]"}, "calibration gives a model text to read"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_line(
    overrides: dict[str, str], said: str, recipe_for: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = recipe_for(save("t5", tmp_path), INT8, text=RECIPE, **overrides)
    with pytest.raises(RecipeError, match=said):
        pipeline.plan(recipe)


def test_its_sensitivity_is_refused(recipe_for: Callable[..., Any], tmp_path: Path) -> None:
    changed = {"targets.0.format": "compressed-tensors", "targets.0.runtimes": "[transformers]"}
    plan = pipeline.plan(recipe_for(save("t5", tmp_path), "[{match: linear, scheme: int8-dynamic}]", text=RECIPE, **changed))
    with pytest.raises(InputError, match="a stack of blocks, which this model is not"):
        measure(plan, [], QUIET)


def test_inputs_quantized_as_they_come(recipe_for: Callable[..., Any], tmp_path: Path) -> None:
    """A product of no states, where the cache has them, is quantized like any other."""
    rules = "[{match: linear, scheme: int8-dynamic}]"
    (report,) = pipeline.convert(recipe_for(save("t5", tmp_path / "model"), rules, text=RECIPE), tmp_path / "out").reports
    assert [check.name for check in report.checks if not check.passed] == []
    assert "decoding from the cache equals one pass" in {check.name.rpartition(": ")[2] for check in report.checks}
