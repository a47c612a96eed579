"""ONNX graphs against transformers, ONNX's own checker and its reference evaluator."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from conftest import GRAPH
from families import FAMILIES
from onnx.reference import ReferenceEvaluator

from convert import pipeline
from convert.export import export as export_plan
from convert.numbers import compare
from convert.onnx.families import FAMILIES as KNOWN
from convert.onnx.nodes import Nodes
from convert.onnx.stored import Stored
from convert.progress import QUIET
from convert.runtimes import RUNTIMES
from convert.runtimes.onnxruntime import main as run_program
from convert.source import open_source
from formats import FORMATS
from formats.dtypes import numpy_dtype
from formats.errors import RecipeError
from formats.inspect import compatibility, inspect
from formats.manifest import read_manifest
from formats.onnx_graph import find_graphs, metadata_of, read_folder, read_graph
from formats.safetensors import TensorSpec
from formats.scheme import SCHEMES
from formats.verify import verify

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
    "smollm3": {
        "no_rope_layers": [1, 0],
        "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    },
    "gemma2": {"sliding_window": 4, "query_pre_attn_scalar": 24},
    "gemma3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 24},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}


@pytest.fixture
def export(tmp_path: Path, recipe_for: Callable[..., Any]) -> Callable[..., Path]:
    """``export(model, rules, **overrides)``: the folder of an artifact."""

    def make(model: Path, rules: str, **overrides: str) -> Path:
        recipe = recipe_for(model, rules, text=GRAPH, **{key.replace("__", "."): value for key, value in overrides.items()})
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
    session = onnxruntime.InferenceSession(str(folder / find_graphs(folder)[-1]), options, providers=["CPUExecutionProvider"])
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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3", "phi3", "gpt2"])
def test_float_graph_is_the_model(family: str, tmp_path: Path, export: Callable[..., Path]) -> None:
    folder, model = save(family, tmp_path)
    out = export(folder, FLOAT)
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    ids = np.random.default_rng(0).integers(3, 300, (2, 11))
    expected = logits(model, ids)
    got = run(out, ids)["logits"]
    assert np.abs(got - expected).max() < 2e-5 * max(1.0, np.abs(expected).max())
    assert np.abs(expected).max() > 0.1


#: By which the frequencies of a small Phi-3, or a Llama, depend on the length of the text, and where they change.
LENGTHS: dict[str, tuple[str, dict[str, Any], int]] = {
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "short_factor": [1.0, 1.1, 1.3, 1.7],
                "long_factor": [1.0, 2.0, 5.0, 9.0],
            },
        },
        16,
    ),
    "longrope, whole heads": (
        "llama",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 16,
                "short_factor": [1.0, 1.1, 1.3, 1.7] * 2,
                "long_factor": [1.0, 2.0, 5.0, 9.0] * 2,
            },
        },
        16,
    ),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
        16,
    ),
}


@pytest.mark.parametrize("attention", ["standard", "gqa"])
@pytest.mark.parametrize("kind", LENGTHS)
def test_frequencies_that_depend_on_the_length_are_transformers(
    kind: str, attention: str, tmp_path: Path, export: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On both sides of the switch and at it; with padding, which does not count; and from a cache that was filled before it, whose keys
    stay as they were turned: what transformers' forward does with its own cache."""
    family, settings, switch = LENGTHS[kind]
    monkeypatch.setitem(SETTINGS, family, settings)
    folder, model = save(family, tmp_path)
    out = export(folder, FLOAT, targets__0__options=f"{{attention: {attention}}}")
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    ids = np.random.default_rng(0).integers(3, 300, (2, switch + 9))

    def near(got: np.ndarray, expected: np.ndarray, share: float = 5e-5) -> bool:
        return bool(np.abs(got - expected).max() < share * max(1.0, np.abs(expected).max()))

    def fresh() -> Any:  # of one that has seen a longer text, "dynamic" frequencies stay stretched
        return type(model).from_pretrained(folder, attn_implementation="eager").eval()

    for length in (5, switch, switch + 1, switch + 9):
        assert near(run(out, ids[:, :length])["logits"], logits(fresh(), ids[:, :length])), length
    # The other frequencies do matter: the same tokens, behind which the text goes on, have other logits than alone.
    assert not near(run(out, ids)["logits"][:, :5], run(out, ids[:, :5])["logits"], 1e-3)
    mask = np.ones((2, switch + 3), np.int64)
    mask[:, :6] = 0  # longer than the switch with the padding, shorter without
    padded = run(out, ids[:, : switch + 3], mask)["logits"]
    assert near(padded[:, 6:], logits(fresh(), ids[:, 6 : switch + 3]))
    whole, cache = fresh(), transformers.DynamicCache()
    past: dict[str, np.ndarray] | None = None
    for begin, end in ((0, switch - 2), *((at, at + 1) for at in range(switch - 2, switch + 4))):
        with torch.no_grad():
            expected = whole(input_ids=torch.from_numpy(ids[:1, begin:end]), past_key_values=cache).logits.numpy()
        got = run(out, ids[:1, begin:end], past=past)
        assert near(got["logits"], expected), (begin, end)
        past = {name: value for name, value in got.items() if name != "logits"}


def test_every_family_is_tested() -> None:
    assert set(KNOWN) == {"llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2"}


def test_int8_codes_are_those_of_the_checkpoint_formats(
    tmp_path: Path, export: Callable[..., Path], recipe_for: Callable[..., Any]
) -> None:
    """One set of codes, whatever the format: what the graph multiplies with is, to the bit, what compressed-tensors decodes to."""
    from safetensors.torch import load_file

    folder, _ = save("llama", tmp_path, dtype=torch.bfloat16)
    out = export(folder, "[{match: linear, scheme: int8-weight-only}]")
    text = GRAPH.replace("format: onnx", "format: compressed-tensors").replace("[onnxruntime]", "[transformers]")
    other = (
        pipeline.convert(recipe_for(folder, "[{match: linear, scheme: int8-weight-only}]", text=text), tmp_path / "ct", check=False)
        .artifacts[0]
        .path
    )
    theirs = load_file(other / "model.safetensors")
    mine = read_folder(out)
    scheme = SCHEMES["int8-weight-only"]
    for layer in (f"model.layers.{i}.{module}" for i in range(2) for module in ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")):
        stored = {name: tensor(out, mine[name]) for name in (f"{layer}.weight", f"{layer}.weight_scale")}
        shape = (stored[f"{layer}.weight"].shape[1], stored[f"{layer}.weight"].shape[0])
        weight = TensorSpec(f"{layer}.weight", "BF16", shape)
        expected = FORMATS["compressed-tensors"].decode(weight, theirs, scheme).dequantize()
        assert torch.equal(FORMATS["onnx"].decode(weight, stored, scheme).dequantize(), expected)


def tensor(folder: Path, item: Any) -> torch.Tensor:
    """A tensor of a data file, read without the tool."""
    raw = (folder / item.file).read_bytes()
    rows = item.spec.matrix_shape[0]
    width = item.spec.size_bytes // rows
    pitch = item.pitch_bytes or width
    data = b"".join(raw[item.start + i * pitch : item.start + i * pitch + width] for i in range(rows))
    return torch.from_numpy(np.frombuffer(data, numpy_dtype(item.spec.dtype)).reshape(item.spec.shape).copy())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2"])
def test_int8_graph_is_the_model_with_the_weights_it_decodes_to(family: str, tmp_path: Path, export: Callable[..., Path]) -> None:
    folder, model = save(family, tmp_path)
    out = export(folder, INT8)
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    put_back(model, out)
    ids = np.random.default_rng(0).integers(3, 300, (2, 11))
    expected = logits(model, ids)
    assert np.abs(run(out, ids)["logits"] - expected).max() < 2e-5 * max(1.0, np.abs(expected).max())


TWO_CODES = {"targets__0__options": "{inputs: int8x2}"}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "gpt2"])
def test_inputs_of_two_codes_leave_the_model_with_the_weights_it_decodes_to(
    family: str, tmp_path: Path, export: Callable[..., Path]
) -> None:
    """Up to 14 bits, with padding and a cache, as exported and as deployed the same; floats are rounded to 8 bits once deployed."""
    folder, model = save(family, tmp_path)
    plain = export(folder, INT8)
    ids = np.random.default_rng(0).integers(3, 300, (2, 11))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    eight_bits = deployed(plain, ids, mask)
    out = export(folder, INT8, **TWO_CODES)
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    assert verify(out).findings == ()
    put_back(model, out)
    largest = np.abs(expected := logits(model, ids)).max()
    found = run(out, ids, mask)["logits"]
    assert 1e-6 * largest < np.abs(found[0] - expected[0]).max() < 2e-3 * largest
    assert np.abs(found[1, 4:] - logits(model, ids[1:, 4:])[0]).max() < 2e-3 * largest
    assert np.abs(found - deployed(out, ids, mask)).max() < 1e-3 * largest
    assert np.abs(found[0] - expected[0]).mean() < np.abs(eight_bits[0] - expected[0]).mean() / 4
    first = run(out, ids[:1, :5])
    rest = run(out, ids[:1, 5:], past={name: value for name, value in first.items() if name != "logits"})
    assert np.abs(rest["logits"][0] - expected[0, 5:]).max() < 2e-3 * largest
    products = Counter(node.op_type for node in read_graph(out / find_graphs(out)[-1]).graph.node)
    assert products["MatMulInteger"] == products["MatMul"] == 9


def deployed(folder: Path, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits with the optimisations that a session has by default."""
    session = onnxruntime.InferenceSession(str(folder / find_graphs(folder)[-1]), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], feeds(session.get_inputs(), ids, mask, None))[0])


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
@pytest.mark.parametrize("largest", [1e-4, 1.0, 300.0])
def test_a_product_of_two_codes_is_what_its_equation_says(dtype: ir.DataType, largest: float) -> None:
    """Rows of very different sizes beside one of zeros, and weights at the ends of the grid, where a CPU without VNNI would saturate."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((2, 3, 32))
    x = (x / np.abs(x).max(-1, keepdims=True) * np.array([1.0, 0.01, 0.5])[:, None] * largest).astype(dtype.numpy())
    x[1, 1] = 0
    codes = np.where(draw.random((32, 5)) < 0.5, -127, 127).astype(np.int8)
    scales = draw.uniform(1e-3, 2e-3, 5).astype(np.float32)
    stored = {"layer.weight": Stored("w", SCHEMES["int8-weight-only"], "s")}
    nodes = Nodes(dtype, stored, {}, halves=True)
    given = nodes.input("x", dtype, ("a", "b", 32))
    for name, value in (("w", codes), ("s", scales)):
        nodes._used[name] = ir.Value(name=name, shape=ir.Shape(value.shape), const_value=ir.tensor(value, name=name))
    result = nodes.product("layer", stored["layer.weight"], given)
    result.type = ir.TensorType(dtype)
    graph = ir.Graph([given], [result], nodes=nodes.nodes, initializers=nodes.initializers(), opset_imports={"": 23}, name="product")
    model = ir.to_proto(ir.Model(graph, ir_version=11))
    single = x.astype(np.float64)
    unit = np.maximum(np.abs(single).max(-1, keepdims=True), np.finfo(np.float32).tiny)
    first = np.round(single / unit * 63)
    second = np.round((single / unit - first / 63) * 63 * 126)
    assert np.abs(second).max() <= 63
    expected = (unit * (first / 63 + second / (63 * 126))) @ codes.astype(np.float64) * scales
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for got in (session.run(None, {"x": x})[0], ReferenceEvaluator(model).run(None, {"x": x})[0]):
        # One step of the second code, where a tie falls to the other side in float32, or the last place of float16.
        slack = 1.01 * unit / (63 * 126) * 127 * scales + (np.abs(expected) * 1e-3 + 6e-8 if dtype == ir.DataType.FLOAT16 else 1e-6 * unit)
        assert (np.abs(got - expected) <= slack).all()
        assert not got[1, 1].any()
        assert np.abs(got - single @ codes.astype(np.float64) * scales).max() > 0


@pytest.mark.parametrize(
    ("rules", "form", "why"),
    [
        (
            "[{match: linear, scheme: int8-weight-only-g32}]",
            "onnx",
            r"test.yaml:6:13: .* is int8-weight-only-g32, and inputs: int8x2 is for",
        ),
        ("[{match: linear, scheme: int8-dynamic}]", "onnx", r"inputs: int8x2}: no layer has INT8 weights alone"),
        ("[{match: linear, scheme: int8-weight-only}]", "onnx-matmulnbits", "onnx-matmulnbits has no such option; onnx has it"),
        ("[{match: linear, scheme: int8-weight-only}]", "onnx, runtimes: [onnxruntime-gpu]", "int8x2 is for a CPU"),
    ],
)
def test_two_codes_where_there_can_be_none_are_refused(
    rules: str, form: str, why: str, make_llama: Any, recipe_for: Callable[..., Any]
) -> None:
    text = GRAPH.replace("format: onnx", f"format: {form.partition(',')[0]}")
    text = text.replace("[onnxruntime]", "[onnxruntime-gpu]") if "gpu" in form else text
    with pytest.raises(RecipeError, match=why):
        pipeline.plan(recipe_for(make_llama(), rules, text=text, **{"targets.0.options": "{inputs: int8x2}"}))


def put_back(model: Any, out: Path) -> None:
    """Replaces every quantized weight of a model by what its codes stand for; a tied head is untied."""
    found = read_folder(out)
    entries = [entry for entry in read_manifest(out).ledger if entry["decision"] == "quantize"]
    assert entries
    for entry in entries:
        ((stored, *_, columns),) = entry["parts"]
        module = model.get_submodule(entry["module"])
        codes, scale = (tensor(out, found[f"{stored}.{last}"]) for last in ("weight", "weight_scale"))
        weight = torch.nn.Parameter(codes.float() * (scale if scale.dim() < 2 else scale.repeat_interleave(len(codes) // len(scale), 0)))
        module.weight = torch.nn.Parameter(weight.detach() if columns else weight.detach().T.contiguous())


@pytest.mark.parametrize("rules", [FLOAT, "[{match: linear, scheme: int8-weight-only-g32}]", "[{match: linear, scheme: fp8-weight-only}]"])
def test_reference_evaluator_agrees(rules: str, tmp_path: Path, export: Callable[..., Path]) -> None:
    """ONNX's own evaluator is the oracle of what the operators mean, with a window, a cache and padding."""
    folder, _ = save("mistral", tmp_path)
    out = export(folder, rules)
    model = onnx.load_model(out / find_graphs(out)[-1])
    evaluator = ReferenceEvaluator(model)
    ids = np.random.default_rng(0).integers(3, 300, (2, 7))
    mask = np.ones_like(ids)
    mask[1, :3] = 0
    inputs = feeds(session_inputs(out), ids, mask, None)
    expected = evaluator.run(None, inputs)
    got = run(out, ids, mask)
    for value, name in zip(expected, got, strict=True):
        assert np.abs(got[name] - value).max() < 1e-4


def session_inputs(folder: Path) -> Any:
    return onnxruntime.InferenceSession(str(folder / find_graphs(folder)[-1]), providers=["CPUExecutionProvider"]).get_inputs()


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_decoding_from_the_cache_equals_one_pass(family: str, tmp_path: Path, export: Callable[..., Path]) -> None:
    folder, _ = save(family, tmp_path)
    out = export(folder, INT8)
    ids = np.random.default_rng(1).integers(3, 300, (1, 9))
    whole = run(out, ids)
    first = run(out, ids[:, :5])
    past = {name: value for name, value in first.items() if name != "logits"}
    rest = run(out, ids[:, 5:], past=past)
    assert np.abs(np.concatenate([first["logits"], rest["logits"]], 1) - whole["logits"]).max() < 1e-5
    assert rest["present.1.key"].shape == whole["present.1.key"].shape
    assert np.abs(rest["present.1.key"] - whole["present.1.key"]).max() < 1e-5


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_padding_on_the_left_changes_nothing(family: str, tmp_path: Path, export: Callable[..., Path]) -> None:
    folder, _ = save(family, tmp_path)
    out = export(folder, INT8)
    ids = np.random.default_rng(2).integers(3, 300, (2, 8))
    mask = np.ones_like(ids)
    mask[1, :5] = 0
    together = run(out, ids, mask)["logits"]
    assert np.abs(together[0] - run(out, ids[:1])["logits"][0]).max() < 1e-5
    assert np.abs(together[1, 5:] - run(out, ids[1:, 5:])["logits"][0]).max() < 1e-5
    assert np.isfinite(together).all()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma2"])
def test_grouped_attention_is_the_same_decoder(family: str, tmp_path: Path, export: Callable[..., Path]) -> None:
    """With a window, soft caps, a cache and padding on the left."""
    folder, model = save(family, tmp_path)
    out = export(folder, FLOAT, targets__0__options="{attention: gqa}")
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    ids = np.random.default_rng(0).integers(3, 300, (2, 9))
    mask = np.ones_like(ids)
    mask[1, :4] = 0
    together = run(out, ids, mask)["logits"]
    assert np.abs(together[0] - logits(model, ids[:1])[0]).max() < 2e-5 * max(1.0, np.abs(together).max())
    assert np.abs(together[1, 4:] - logits(model, ids[1:, 4:])[0]).max() < 2e-5 * max(1.0, np.abs(together).max())
    first = run(out, ids[:, :5])
    rest = run(out, ids[:, 5:6], past={name: value for name, value in first.items() if name != "logits"})["logits"]
    assert np.abs(rest[:, 0] - logits(model, ids)[:, 5]).max() < 2e-5 * max(1.0, np.abs(together).max())
    assert json.loads((out / "genai_config.json").read_text())["search"]["past_present_share_buffer"] is True


@pytest.mark.parametrize(("family", "inputs", "inside"), [("llama", 1, True), ("qwen3", 3, True), ("phi3", 3, False), ("gpt2", 1, False)])
def test_grouped_attention_takes_what_it_can_do_itself(
    family: str, inputs: int, inside: bool, tmp_path: Path, export: Callable[..., Path]
) -> None:
    """Queries, keys and values as one, unless their heads are normed or turned before; angles, unless its kernels have no such size."""
    folder, model = save(family, tmp_path)
    out = export(folder, FLOAT, targets__0__options="{attention: gqa}")
    nodes = read_graph(out / find_graphs(out)[-1]).graph.node
    grouped = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    assert [sum(bool(name) for name in node.input[:3]) for node in grouped] == [inputs] * 2
    assert [any(item.name == "do_rotary" for item in node.attribute) for node in grouped] == [inside] * 2
    assert not [node for node in nodes if node.op_type == "RotaryEmbedding"] or family == "phi3"
    assert sum("Skip" in node.op_type for node in nodes) == 4
    ids = np.random.default_rng(3).integers(3, 300, (2, 9))
    expected = logits(model, ids)
    assert np.abs(run(out, ids)["logits"] - expected).max() < 2e-5 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("shared", [False, True])
def test_matmulnbits_is_the_model_with_the_weights_it_decodes_to(
    family: str, shared: bool, tmp_path: Path, recipe_for: Callable[..., Any]
) -> None:
    """Products, one table for a tied head and its embedding, and the cache. Inputs are rounded to INT8 on the way."""
    folder, model = save(family, tmp_path)
    text = GRAPH.replace("format: onnx", "format: onnx-matmulnbits")
    if shared and family == "phi3":
        pytest.skip("its head is not tied")
    options = {"targets.0.options": "{tied_embedding: shared}"} if shared else {}
    out = pipeline.convert(recipe_for(folder, INT8, text=text, **options), tmp_path / "out", check=False).artifacts[0].path
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    assert verify(out).findings == ()
    found = read_folder(out)
    form, scheme = FORMATS["onnx-matmulnbits"], SCHEMES["int8-weight-only"]
    for entry in read_manifest(out).ledger:
        if entry["decision"] == "quantize":
            ((stored, start, stop, columns),) = entry["parts"]
            shape = (columns[1], stop - start) if columns else (stop - start, entry["shape"][1])
            parts = {name: tensor(out, found[name]) for name in (f"{stored}.weight", f"{stored}.weight_scale")}
            weight = form.decode(TensorSpec(f"{stored}.weight", "F32", shape), parts, scheme).dequantize()
            model.get_submodule(entry["module"]).weight = torch.nn.Parameter(weight.T.contiguous() if columns else weight)
            if entry["module"] == "lm_head" and shared:
                model.get_input_embeddings().weight = torch.nn.Parameter(weight)
    ids = np.random.default_rng(0).integers(3, 300, (2, 11))
    expected = logits(model, ids)
    assert np.abs(run(out, ids)["logits"] - expected).max() < 0.05 * np.abs(expected).max()
    assert np.corrcoef(run(out, ids)["logits"].ravel(), expected.ravel())[0, 1] > 0.999
    floats = [name for name, item in found.items() if item.spec.dtype == "F32" and len(item.spec.shape) == 2 and "scale" not in name]
    assert floats == ([] if shared and family == "qwen2" else ["transformer.wpe.weight"] if shared else floats)


def test_sharing_what_is_not_tied_is_refused(make_llama: Any, recipe_for: Callable[..., Any]) -> None:
    text = GRAPH.replace("format: onnx", "format: onnx-matmulnbits")
    recipe = recipe_for(make_llama(), INT8, text=text, **{"targets.0.options": "{tied_embedding: shared}"})
    with pytest.raises(RecipeError, match="no head that is tied is quantized"):
        pipeline.plan(recipe)
    with pytest.raises(RecipeError, match="onnx has no such option; onnx-matmulnbits has it"):
        recipe_for("model", INT8, text=GRAPH, **{"targets.0.options": "{tied_embedding: shared}"})


def test_names_and_shapes_are_those_that_transformers_js_wants(make_llama: Any, export: Callable[..., Path]) -> None:
    """A chat template only in ``tokenizer_config.json``, heads and their size as numbers, ``batch_size`` by that name."""
    folder = make_llama(tie_word_embeddings=True)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    out = export(folder, INT8)
    inputs = {item.name: item for item in session_inputs(out)}
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert inputs["past_key_values.1.value"].shape == ["batch_size", 2, "past_sequence_length", 16]
    assert inputs["attention_mask"].shape == ["batch_size", "total_sequence_length"]
    assert find_graphs(out)[-1] == "onnx/model_quantized.onnx"
    config = json.loads((out / "config.json").read_text())
    assert config["transformers.js_config"] == {"use_external_data_format": {"model_quantized.onnx": 1}}
    assert "quantization_config" not in config
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    genai = json.loads((out / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["filename"] == "onnx/model_quantized.onnx"
    assert genai["search"]["past_present_share_buffer"] is False


def test_a_tied_head_is_codes_beside_the_embedding(make_llama: Any, export: Callable[..., Path]) -> None:
    out = export(make_llama(tie_word_embeddings=True), INT8)
    found = read_folder(out)
    assert found["lm_head.weight"].spec == TensorSpec("lm_head.weight", "I8", (64, 300))
    assert found["model.embed_tokens.weight"].spec == TensorSpec("model.embed_tokens.weight", "F32", (300, 64))
    assert verify(out).findings == ()


def test_data_is_cut_into_files_of_the_size_asked_for(make_llama: Any, export: Callable[..., Path]) -> None:
    folder = make_llama(hidden_size=256, intermediate_size=1024, vocab_size=1000)
    one = export(folder, INT8)
    ids = np.arange(3, 9)[None]
    expected = run(one, ids)["logits"]
    cut = export(folder, INT8, targets__0__max_shard_size="1000000")
    files = sorted(path.name for path in (cut / "onnx").iterdir())
    assert files[:3] == ["model_quantized.onnx", "model_quantized.onnx_data", "model_quantized.onnx_data_1"]
    largest = max(path.stat().st_size for path in (cut / "onnx").iterdir() if "_data" in path.name)
    assert largest <= 1_100_000  # the embedding alone
    assert json.loads((cut / "config.json").read_text())["transformers.js_config"]["use_external_data_format"] == {files[0]: len(files) - 1}
    assert np.array_equal(run(cut, ids)["logits"], expected)
    assert verify(cut).findings == ()


def test_metadata_says_what_was_done(make_llama: Any, export: Callable[..., Path]) -> None:
    out = export(make_llama(), INT8)
    said = metadata_of(read_graph(out / find_graphs(out)[-1]))
    assert said["schemes"] == ["int8-weight-only"]
    assert len(said["recipe_sha256"]) == 64
    assert said["tools"]["onnx"] == onnx.__version__
    assert said["packs"]["model.layers.0.self_attn.q_k_v_proj.weight"]["members"]["model.layers.0.self_attn.k_proj.weight"] == 32


def test_half_the_floats(tmp_path: Path, export: Callable[..., Path]) -> None:
    folder, model = save("llama", tmp_path)
    out = export(folder, "[{match: linear, scheme: int8-weight-only}]", targets__0__options="{floats: float16}")
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    ids = np.random.default_rng(0).integers(3, 300, (2, 11))
    put_back(model, out)
    expected = logits(model, ids)
    assert np.abs(run(out, ids)["logits"] - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-static", "fp8-static", "fp8-weight-only", "int8-weight-only-g32"])
def test_every_scheme_is_near_the_model(scheme: str, make_llama: Any, recipe_for: Callable[..., Any], tmp_path: Path) -> None:
    """As exported and as deployed, by the program that proves it, which must also see the codes."""
    text = GRAPH + ("calibration: {{sequences: 2, length: 32}}\n" if scheme.endswith("static") else "")
    model = make_llama()
    out = pipeline.convert(recipe_for(model, f"[{{match: linear, scheme: {scheme}}}]", text=text), tmp_path, check=False).artifacts[0].path
    ids = np.random.default_rng(0).integers(3, 300, (2, 32))
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), ids)
    for mode in RUNTIMES["onnxruntime"].modes:
        answer, found = prove(out, ids, mode, tmp_path)
        assert 1e-5 < np.abs(found - expected).mean() / np.abs(expected).mean() < (0.08 if scheme.startswith("fp8") else 0.05), mode
        assert answer["module_dtypes"]["model.layers.1.mlp.down_proj"] == ("int8" if scheme.startswith("int8") else "float8_e4m3fn")
        assert answer["module_dtypes"]["model.layers.0.self_attn.k_proj"] == answer["module_dtypes"]["model.layers.1.mlp.up_proj"]
        assert all(value <= limit for value, limit in answer["checks"].values()), answer["checks"]
        assert len(answer["generated"]) == 4
    if scheme == "int8-static":
        # q, k, v and o, gate, up and down of two layers, and the head; with signed codes all but four of them ran as floats.
        assert answer["kernels"] == {"MatMulIntegerToFloat": 14, "MatMul": 1}
    if scheme == "int8-weight-only-g32":
        assert answer["kernels"] == {"MatMulNBits": 8, "MatMul": 1}  # four products a block, and the head, which is kept


def test_without_cuda_the_mode_on_cuda_ends_before_anything_is_loaded(tmp_path: Path) -> None:
    """ONNX Runtime would warn and run on the CPU, and the report would say what was not so."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"mode": "on CUDA", "artifact": str(tmp_path / "none")}))
    program = Path(run_program.__code__.co_filename)
    done = subprocess.run(
        [sys.executable, "-I", str(program), str(request), str(tmp_path / "answer.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == f"onnxruntime {onnxruntime.__version__} has no CUDA; it comes with the package onnxruntime-gpu"
    assert not (tmp_path / "answer.json").exists()


def prove(folder: Path, ids: np.ndarray, mode: str, scratch: Path) -> tuple[dict[str, Any], np.ndarray]:
    np.save(scratch / "tokens.npy", ids)
    request = {
        "artifact": str(folder),
        "tokens": str(scratch / "tokens.npy"),
        "logits": str(scratch / "logits.f32"),
        "prompt": [5, 6, 7],
        "new_tokens": 4,
        "device": "cpu",
        "threads": 1,
        "mode": mode,
    }
    (scratch / "request.json").write_text(json.dumps(request))
    run_program(str(scratch / "request.json"), str(scratch / "answer.json"))
    return json.loads((scratch / "answer.json").read_text()), np.fromfile(scratch / "logits.f32", "<f4").reshape(*ids.shape, -1)


@pytest.mark.slow
def test_a_float_graph_passes_the_whole_way(make_llama: Any, recipe_for: Callable[..., Any], tmp_path: Path) -> None:
    (report,) = pipeline.convert(recipe_for(make_llama(), FLOAT, text=GRAPH), tmp_path).reports
    assert not [check for check in report.checks if not check.passed]
    assert {check.name.partition(" (")[0] for check in report.checks if "kl_nats" in check.name} == {
        f"onnxruntime {mode}" for mode in RUNTIMES["onnxruntime"].modes
    }


def test_what_no_graph_is_known_for_is_refused(
    tmp_path: Path, export: Callable[..., Path], make_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = save("opt", tmp_path)
    with pytest.raises(RecipeError, match=r"test.yaml:4:5: no graph is known for the architecture 'opt'; known are llama"):
        export(folder, FLOAT)
    monkeypatch.setattr("convert.onnx.families._ROPES", ("default", "linear"))
    yarn = make_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(RecipeError, match="no graph is known for llama with rope_type 'dynamic'; known are default, linear"):
        export(yarn, FLOAT)


@pytest.mark.parametrize("rules", [INT8, "[{match: linear, scheme: int8-weight-only-g32, algorithm: [{smoothquant: {alpha: 0.6}}, gptq]}]"])
@pytest.mark.parametrize("form", ["onnx", "onnx-matmulnbits"])
def test_numbers_hold_and_so_does_the_ledger(
    form: str, rules: str, make_llama: Any, recipe_for: Callable[..., Any], tmp_path: Path
) -> None:
    """Codes that were rounded, and those that were solved behind norms that were changed, are read back from wherever they lie."""
    text = GRAPH.replace("format: onnx", f"format: {form}")
    text += "calibration: {{sequences: 2, length: 32}}\n" if "gptq" in rules else ""
    artifact = pipeline.convert(recipe_for(make_llama(), rules, text=text), tmp_path / "out", check=False).artifacts[0]
    numbers = compare(artifact.path, open_source(artifact.manifest.source["origin"]), threads=1)
    assert len(numbers) >= 14
    assert all(layer.worst <= 1 for layer in numbers), [layer for layer in numbers if not layer.worst <= 1]
    assert all(layer.snr_db > 30 for layer in numbers)
    assert verify(artifact.path).findings == ()
    data = artifact.path / "onnx/model_quantized.onnx_data"
    raw = bytearray(data.read_bytes())
    place = read_folder(artifact.path)["model.layers.1.self_attn.k_proj.weight"].start
    raw[place] ^= 0x40
    data.write_bytes(raw)
    assert any(layer.worst > 1 for layer in compare(artifact.path, open_source(artifact.manifest.source["origin"]), threads=1))
    assert any("bytes have changed" in finding.what for finding in verify(artifact.path).findings)


def test_an_interrupted_run_is_taken_up_where_it_stopped(make_llama: Any, recipe_for: Callable[..., Any], tmp_path: Path) -> None:
    """Half of the tensors are in the journal, among them one of three that lie side by side; the others' bytes are not there yet."""
    job = pipeline.plan(recipe_for(make_llama(), INT8, text=GRAPH))
    whole = export_plan(job, tmp_path / "whole", QUIET)[0].path
    partial = tmp_path / "out" / ".q.partial"
    (partial / "onnx").mkdir(parents=True)
    target = job.targets[0]
    done = [entry for entry in target.entries if not entry.tensor.name.endswith(("k_proj.weight", "down_proj.weight", "norm.weight"))]
    raw = (whole / target.shards[0].file).read_bytes()
    places = {item.spec.name: item for item in target.shards[0].tensors}
    data = bytearray(len(raw))
    for spec in (spec for entry in done for spec in entry.outputs):
        item = places[spec.name]
        width = spec.size_bytes // spec.matrix_shape[0]
        for i in range(spec.matrix_shape[0]):
            start = item.start + i * (item.pitch_bytes or width)
            data[start : start + width] = raw[start : start + width]
    assert bytes(data) != raw
    (partial / target.shards[0].file).write_bytes(data)
    (partial / "journal").write_text("".join(f"{line}\n" for line in (job.digest, *(entry.tensor.name for entry in done))))
    resumed = export_plan(job, tmp_path / "out", QUIET)[0].path
    assert {path.name: path.read_bytes() for path in (resumed / "onnx").iterdir()} == {
        path.name: path.read_bytes() for path in (whole / "onnx").iterdir()
    }
    assert (resumed / "octavo.json").read_bytes() == (whole / "octavo.json").read_bytes()
    assert not (tmp_path / "out" / ".q.partial").exists()


def test_inspect_shows_the_quantization_and_where_it_loads(make_llama: Any, export: Callable[..., Path]) -> None:
    out = export(make_llama(), INT8)
    found = inspect(out)
    assert found["quantization"]["schemes"] == ["int8-weight-only"]
    assert found["metadata"]["opset"] == {"ai.onnx": 23}
    assert {(row["dtype"], row["kind"]): row["tensors"] for row in found["tensors"]} == {
        ("I8", "codes"): 15,
        ("F32", "matrices"): 1,
        ("F32", "scales and shapes"): 15,
        ("F32", "vectors"): 5,
    }
    (line,) = [line for line in compatibility(out)["matrix"] if line["runtime"] == "onnxruntime"]
    assert line["kernels"]["cpu-vnni"] == "native"
