"""Traced graphs of models that are no decoders, against transformers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from conftest import GRAPH, KILLED
from decoded import put_back

from convert import pipeline
from convert.recipe import parse_recipe
from formats.errors import InputError, RecipeError
from formats.inspect import inspect
from formats.manifest import read_manifest
from formats.onnx_graph import find_graphs, metadata_of, read_folder, read_graph
from formats.verify import verify

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300, "intermediate_size": 96}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
PICTURE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 32, "patch_size": 8}

#: kind -> (model class, config class, settings)
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertModel", "BertConfig", SMALL),
    "masked": ("BertForMaskedLM", "BertConfig", SMALL),
    "classifier": ("RobertaForSequenceClassification", "RobertaConfig", {**SMALL, "type_vocab_size": 1, "num_labels": 3}),
    "distilbert": ("DistilBertModel", "DistilBertConfig", {"dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "vocab_size": 300}),
    "modernbert": ("ModernBertModel", "ModernBertConfig", {**SMALL, **SPECIAL, "local_attention": 8}),
    "t5": ("T5EncoderModel", "T5Config", {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 300}),
    "vit": ("ViTForImageClassification", "ViTConfig", {**PICTURE, "num_labels": 5}),
    "resnet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 2], "layer_type": "basic", "num_labels": 5},
    ),
}
TEXT = ("bert", "masked", "classifier", "distilbert", "modernbert", "t5")


@pytest.fixture
def export(tmp_path: Path, recipe_for: Callable[..., Any]) -> Callable[..., Path]:
    """``export(model, rules, **overrides)``: the folder of an artifact."""

    def make(model: Path, rules: str, out: str = "out", **overrides: str) -> Path:
        recipe = recipe_for(model, rules, text=GRAPH, **{key.replace("__", "."): value for key, value in overrides.items()})
        return pipeline.convert(recipe, tmp_path / out, check=False).artifacts[0].path

    return make


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """``saved(kind)``: the folder of a random model, its norms and biases away from their beginnings; and the model."""
    made: dict[str, tuple[Path, Any]] = {}

    def save(kind: str) -> tuple[Path, Any]:
        if kind not in made:
            model_class, config_class, settings = KINDS[kind]
            torch.manual_seed(0)
            model = getattr(transformers, model_class)(getattr(transformers, config_class)(**settings)).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 1 else 0.08)
                for name, buffer in model.named_buffers():
                    if name.endswith(("running_mean", "running_var")):
                        buffer.add_(torch.rand_like(buffer))
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            made[kind] = folder, model
        folder, model = made[kind]
        fresh = type(model).from_pretrained(folder).eval()
        return folder, fresh

    return save


def inputs_for(kind: str) -> dict[str, np.ndarray]:
    """Two sequences, one padded on the right, of a length that nothing was traced with; or three pictures."""
    draw = np.random.default_rng(0)
    if kind not in TEXT:
        return {"pixel_values": draw.normal(size=(3, 3, 32, 32)).astype(np.float32)}
    ids = draw.integers(3, 300, (3, 17))
    mask = np.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": np.where(mask, ids, 0), "attention_mask": mask}


def run(folder: Path, inputs: dict[str, np.ndarray], *, optimised: bool = False) -> dict[str, np.ndarray]:
    options = onnxruntime.SessionOptions()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / find_graphs(folder)[-1]), options, providers=["CPUExecutionProvider"])
    given = dict(inputs)
    if "token_type_ids" in {item.name for item in session.get_inputs()}:
        given["token_type_ids"] = np.zeros_like(inputs["input_ids"])
    return dict(zip([item.name for item in session.get_outputs()], session.run(None, given), strict=True))


def expect(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with torch.no_grad():
        output = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in output.items() if isinstance(value, torch.Tensor)}


def seen(value: np.ndarray, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Without the rows of the padding, which nobody looks at."""
    if "attention_mask" in inputs and value.ndim == 3:
        return value[inputs["attention_mask"].astype(bool)]
    return value


@pytest.fixture(scope="module")
def graphs(saved: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Path]]:
    """``graphs(kind)``: the ``float`` graph of a model and, where `linear` names a layer, that of its codes, ``int8``; traced once."""
    made: dict[str, dict[str, Path]] = {}

    def make(kind: str) -> dict[str, Path]:
        if kind not in made:
            float_ = {"match": "linear" if kind != "resnet" else "classifier.1", "keep": True, "why": "a float graph"}
            rules = {"float": float_} | ({"int8": {"match": "linear", "scheme": "int8-weight-only"}} if kind != "resnet" else {})
            targets = [{"name": name, "format": "onnx", "rules": [rule], "runtimes": ["onnxruntime"]} for name, rule in rules.items()]
            recipe = parse_recipe(json.dumps({"model": str(saved(kind)[0]), "targets": targets}), "test.yaml", name="test")
            outcome = pipeline.convert(recipe, tmp_path_factory.mktemp("graphs"), check=False)
            made[kind] = {artifact.path.name: artifact.path for artifact in outcome.artifacts}
        return made[kind]

    return make


@pytest.mark.parametrize("kind", KINDS)
def test_float_graph_is_the_model(kind: str, saved: Callable[..., Any], graphs: Callable[..., dict[str, Path]]) -> None:
    _, model = saved(kind)
    out = graphs(kind)["float"]
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    inputs = inputs_for(kind)
    expected, got = expect(model, inputs), run(out, inputs)
    assert set(got) == set(expected)
    for name, value in expected.items():
        difference = np.abs(seen(got[name], inputs) - seen(value, inputs)).max()
        assert difference < 2e-5 * max(1.0, np.abs(value).max()), name
        assert np.abs(value).max() > 0.05
    assert not verify(out).findings


@pytest.mark.parametrize("kind", ["bert", "masked", "classifier", "distilbert", "modernbert", "t5", "vit"])
def test_int8_graph_is_the_model_with_the_weights_it_decodes_to(
    kind: str, saved: Callable[..., Any], graphs: Callable[..., dict[str, Path]]
) -> None:
    _, model = saved(kind)
    out = graphs(kind)["int8"]
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    inputs = inputs_for(kind)
    plain = expect(model, inputs)
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    # An output head is not among the layers that `linear` names.
    assert put_back(model, out) == layers - (kind == "masked")
    expected, got = expect(model, inputs), run(out, inputs)
    for name, value in expected.items():
        scale = max(1.0, np.abs(value).max())
        assert np.abs(seen(got[name], inputs) - seen(value, inputs)).max() < 2e-5 * scale, name
        assert np.abs(seen(plain[name], inputs) - seen(value, inputs)).max() > 1e-4 * scale, name  # the codes did change something


def test_a_tied_head_is_codes_and_its_embedding_is_not(saved: Callable[..., Any], export: Callable[..., Path]) -> None:
    folder, model = saved("masked")
    out = export(folder, "[{match: cls.predictions.decoder, scheme: int8-weight-only}]")
    inputs = inputs_for("masked")
    embedding = model.get_input_embeddings().weight.detach().clone()
    assert put_back(model, out) == 1
    model.get_input_embeddings().weight = torch.nn.Parameter(embedding)
    expected, got = expect(model, inputs), run(out, inputs)
    assert np.abs(seen(got["logits"], inputs) - seen(expected["logits"], inputs)).max() < 2e-5 * np.abs(expected["logits"]).max()


#: name -> (format, scheme, the operator that there is one of a layer, how far hidden states are from those of the decoded weights)
FORMS = {
    "groups": ("onnx", "int8-weight-only-g32", "DequantizeLinear", 2e-5),
    # ONNX Runtime rounds the inputs of MatMulNBits to INT8 itself; the standard's operators are exact.
    "product": ("onnx-matmulnbits", "int8-weight-only", "MatMulNBits", 0.02),
    "product-groups": ("onnx-matmulnbits", "int8-weight-only-g32", "MatMulNBits", 0.02),
    "two-codes": ("onnx", "int8-weight-only", "MatMulInteger", 1e-3),
    "dynamic": ("onnx", "int8-dynamic", "DynamicQuantizeLinear", 0.05),
    "static": ("onnx", "int8-static", "QuantizeLinear", 0.1),
    "fp8-static": ("onnx", "fp8-static", "QuantizeLinear", 0.3),
    "fp8": ("onnx", "fp8-weight-only", "DequantizeLinear", 2e-5),
    "table": ("onnx", "int8-lookup", "", 2e-5),
    "product-table": ("onnx-matmulnbits", "int8-lookup", "", 2e-5),
}


@pytest.fixture(scope="module")
def formed(saved: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A BERT in every form, by name, of one recipe: what differs in its codes alone is traced once."""
    folder, _ = saved("bert")
    _with_tokenizer(folder)
    targets = [
        {
            "name": name,
            "format": form,
            "rules": [{"match": "word_embeddings" if "lookup" in scheme else "linear", "scheme": scheme}],
            "runtimes": ["onnxruntime"],
            "options": {"inputs": "int8x2"} if name == "two-codes" else {},
        }
        for name, (form, scheme, _, _) in FORMS.items()
    ]
    text = {"model": str(folder), "calibration": {"text": "sample", "sequences": 8, "length": 64}, "targets": targets}
    recipe = parse_recipe(json.dumps(text), "test.yaml", name="test")
    return {
        artifact.path.name: artifact.path for artifact in pipeline.convert(recipe, tmp_path_factory.mktemp("forms"), check=False).artifacts
    }


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_layer(name: str, saved: Callable[..., Any], formed: dict[str, Path]) -> None:
    _, model = saved("bert")
    form, scheme, operator, tolerance = FORMS[name]
    inputs = inputs_for("bert")
    plain = expect(model, inputs)["last_hidden_state"]
    layers = 1 if "lookup" in scheme else sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    assert put_back(model, formed[name], form) == layers
    expected, got = expect(model, inputs)["last_hidden_state"], run(formed[name], inputs)["last_hidden_state"]
    state, found, source = seen(expected, inputs), seen(got, inputs), seen(plain, inputs)
    length = np.linalg.norm(state, axis=-1).mean()
    assert np.linalg.norm(found - state, axis=-1).mean() / length < tolerance
    assert np.linalg.norm(source - state, axis=-1).mean() / length > 1e-4  # the codes did change something
    graph = read_graph(formed[name] / find_graphs(formed[name])[-1])
    if operator:
        # Query, key and value read one input, whose codes are made once.
        together = 2 * model.config.num_hidden_layers if scheme == "int8-dynamic" else 0
        assert [node.op_type for node in graph.graph.node].count(operator) == layers - together
    else:
        table = read_folder(formed[name])["embeddings.word_embeddings.weight"].spec
        assert (table.dtype, table.shape) == ("I8", (300, 64))  # rows, so that one can be taken out
    assert metadata_of(graph)["schemes"] == [scheme]


def _with_tokenizer(folder: Path) -> None:
    from conftest import save_tokenizer

    save_tokenizer(folder, 300)


def test_the_ledger_accounts_for_every_tensor_and_every_initializer(saved: Callable[..., Any], export: Callable[..., Path]) -> None:
    folder, _ = saved("resnet")
    out = export(folder, "[{match: classifier.1, scheme: int8-weight-only}]")
    ledger = {entry["tensor"]: entry for entry in read_manifest(out).ledger}
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        assert set(ledger) == set(file.keys())
    dropped = {name: entry["why"] for name, entry in ledger.items() if entry["decision"] == "drop"}
    assert dropped
    assert all(name.endswith("num_batches_tracked") for name in dropped)
    assert set(dropped.values()) == {"nothing that the graph returns depends on it"}
    graph = read_graph(out / find_graphs(out)[-1])
    promised = {output[0] for entry in ledger.values() for output in entry["outputs"]}
    external = {item.name for item in graph.graph.initializer if item.data_location == item.EXTERNAL}
    assert external == promised
    assert sorted(item.name for item in graph.graph.initializer if item.name not in external) == metadata_of(graph)["computed"]


def test_nothing_of_this_machine_is_in_the_graph_and_its_bytes_are_always_the_same(
    saved: Callable[..., Any], export: Callable[..., Path]
) -> None:
    folder, _ = saved("distilbert")
    rules = "[{match: linear, scheme: int8-dynamic}]"
    first, second = export(folder, rules), export(folder, rules, out="again")
    raw = (first / "onnx" / "model_quantized.onnx").read_bytes()
    assert raw == (second / "onnx" / "model_quantized.onnx").read_bytes()
    assert read_manifest(first).files == read_manifest(second).files
    for word in (b"site-packages", b".py", b"stack_trace", b"pkg.torch", str(Path.home()).encode()):
        assert word not in raw


def test_a_graph_in_half_precision_is_the_model(saved: Callable[..., Any], export: Callable[..., Path]) -> None:
    folder, model = saved("distilbert")
    out = export(folder, "[{match: linear, scheme: int8-weight-only}]", targets__0__options="{floats: float16}")
    onnx.checker.check_model(out / find_graphs(out)[-1], full_check=True)
    inputs = inputs_for("distilbert")
    put_back(model, out)
    expected, got = expect(model, inputs)["last_hidden_state"], run(out, inputs)["last_hidden_state"]
    assert got.dtype == np.float16
    difference = np.abs(seen(got.astype(np.float32), inputs) - seen(expected, inputs)).max()
    assert 1e-6 < difference < 1e-2 * np.abs(expected).max()
    dtypes = {name: item.spec.dtype for name, item in read_folder(out).items()}
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("weight_scale")} == {"I8", "F16"}


def test_what_a_killed_export_left_is_taken_up(saved: Callable[..., Any], export: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = saved("distilbert")
    rules = "[{match: linear, scheme: int8-weight-only}]"
    whole = export(folder, rules)
    (tmp_path / "recipe.yaml").write_text(GRAPH.format(model=folder, scheme=rules))
    again = tmp_path / "again"
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "recipe.yaml"), str(again), "9"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (again / "q").exists()
    assert any(again.iterdir()), "nothing was begun"
    resumed = export(folder, rules, out="again")
    assert read_manifest(resumed).files == read_manifest(whole).files


def test_names_are_those_that_transformers_js_and_sentence_transformers_look_for(formed: dict[str, Path]) -> None:
    out = formed["dynamic"]
    graph = read_graph(out / "onnx" / "model_quantized.onnx").graph
    shapes = {
        item.name: [axis.dim_param or axis.dim_value for axis in item.type.tensor_type.shape.dim] for item in (*graph.input, *graph.output)
    }
    assert shapes == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "sequence_length"],
        "token_type_ids": ["batch_size", "sequence_length"],
        "last_hidden_state": ["batch_size", "sequence_length", 64],
        "pooler_output": ["batch_size", 64],
    }
    config = json.loads((out / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model_quantized.onnx": 1}
    assert inspect(out)["quantization"]["schemes"] == ["int8-dynamic"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"targets__0__runtimes": "[onnxruntime-genai]"}, "runs decoders only"),
        ({"targets__0__options": "{attention: gqa}"}, "for decoders only"),
        ({"targets__0__rules": "[{match: word_embeddings, scheme: int8-weight-only}]"}, "looked up, not multiplied"),
        ({"targets__0__limits": "{kl_nats: 0.1}"}, "predicts no tokens"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_line(
    overrides: dict[str, str], said: str, saved: Callable[..., Any], export: Callable[..., Path]
) -> None:
    folder, _ = saved("bert")
    with pytest.raises(RecipeError, match=rf"(?s):\d+:\d+.*{said}|{said}"):
        export(folder, "[{match: linear, scheme: int8-dynamic}]", **overrides)


def test_a_model_of_sound_is_refused_by_name(tmp_path: Path, export: Callable[..., Path]) -> None:
    config = transformers.Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, conv_dim=(16,), conv_kernel=(3,), conv_stride=(2,)
    )
    transformers.Wav2Vec2Model(config).save_pretrained(tmp_path / "sound")
    with pytest.raises(RecipeError, match="Wav2Vec2Model, which reads input_values"):
        export(tmp_path / "sound", "[{match: linear, scheme: int8-dynamic}]")


def test_only_graphs_look_codes_up(saved: Callable[..., Any], export: Callable[..., Path]) -> None:
    folder, _ = saved("bert")
    rules = "[{match: word_embeddings, scheme: int8-lookup}]"
    with pytest.raises(RecipeError, match="compressed-tensors has codes of Linear modules only"):
        export(folder, rules, targets__0__format="compressed-tensors", targets__0__runtimes="[transformers]")
    with pytest.raises(RecipeError, match="no table of embeddings"):
        export(folder, "[{match: linear, scheme: int8-lookup}]")


@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("transformers.js", marks=pytest.mark.runtime("transformers.js"))])
def test_an_encoder_is_proven_in_its_runtimes(
    runtime: str, saved: Callable[..., Any], recipe_for: Callable[..., Any], tmp_path: Path
) -> None:
    """Layers are checked by what is in the graph, hidden states against the source's; what sentence-transformers reads comes along."""
    folder, _ = saved("bert")
    _with_tokenizer(folder)
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    rules = "[{match: word_embeddings, scheme: int8-lookup}, {match: linear, scheme: int8-weight-only}]"
    recipe = recipe_for(folder, rules, text=GRAPH, **{"targets.0.runtimes": f"[{runtime}]"})
    outcome = pipeline.convert(recipe, tmp_path / "out")
    (report,) = outcome.reports
    assert (outcome.artifacts[0].path / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_mean_tokens": true}'
    assert [check.name for check in report.checks if not check.passed] == []
    errors = [check.value for check in report.checks if check.name.endswith(": relative_error")]
    assert len(errors) == (2 if runtime == "onnxruntime" else 1)
    assert all(0 < error < 0.05 for error in errors)


def test_a_model_of_pictures_is_not_checked_and_says_so(saved: Callable[..., Any], recipe_for: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = saved("vit")
    with pytest.raises(InputError, match=r"reads pixel_values.*--no-check"):
        pipeline.convert(recipe_for(folder, "[{match: linear, scheme: int8-dynamic}]", text=GRAPH), tmp_path / "out")
    assert not (tmp_path / "out" / "q").exists()
