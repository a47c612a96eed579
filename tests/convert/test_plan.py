from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Make
from families import FAMILIES, save_family

from convert import pipeline
from convert.architecture import describe
from convert.export import export
from convert.ledger import Plan
from convert.plan import make_plan
from convert.progress import QUIET
from convert.recipe import parse_recipe
from convert.source import open_source
from formats.errors import InputError, RecipeError, SourceError
from formats.safetensors import TensorSpec
from formats.verify import verify

HEAD_KEPT = """\
model: {model}
targets:
  - name: q
    format: compressed-tensors
    rules:
      - {{match: lm_head, keep: true, why: because}}
      - {{match: linear, scheme: {scheme}}}
"""


def plan_of(recipe: Any) -> Plan:
    return pipeline.plan(recipe)


def test_the_ledger_has_one_entry_for_every_tensor_of_the_source(make_llama: Any, recipe_for: Any) -> None:
    folder = make_llama()
    target = plan_of(recipe_for(folder)).targets[0]
    source = open_source(str(folder)).tensors
    assert [entry.tensor.name for entry in target.entries] == list(source)
    assert all((entry.scheme is None) != (entry.why == "") for entry in target.entries)
    assert sum(len(entry.outputs) for entry in target.entries) == sum(len(shard.tensors) for shard in target.shards)


def test_linears_are_quantized_and_everything_else_is_kept_with_a_reason(make_llama: Any, recipe_for: Any) -> None:
    entries = {entry.tensor.name: entry for entry in plan_of(recipe_for(make_llama())).targets[0].entries}
    quantized = {name for name, entry in entries.items() if entry.scheme}
    linears = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert quantized == {name for name in entries if name.split(".")[-2] in linears}
    assert entries["lm_head.weight"].why.startswith("the output head")
    assert entries["model.embed_tokens.weight"].why.startswith("an embedding")
    assert entries["model.norm.weight"].why.startswith("a vector")


def test_what_reads_the_same_input_is_seen_and_not_named(make_llama: Any, recipe_for: Any) -> None:
    groups = plan_of(recipe_for(make_llama())).architecture.groups
    assert ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj") in groups
    assert ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj") in groups


def test_a_tied_head_is_known_ignored_and_cannot_be_quantized(make_llama: Any, recipe_for: Any) -> None:
    folder = make_llama(tie_word_embeddings=True)
    job = plan_of(recipe_for(folder, text=HEAD_KEPT))
    assert job.architecture.tied
    assert job.architecture.head == "lm_head"
    assert job.targets[0].config["quantization_config"]["ignore"] == ["lm_head"]
    kept = next(entry for entry in job.targets[0].entries if entry.why == "because")
    assert kept.tensor.name == "model.embed_tokens.weight"
    with pytest.raises(
        RecipeError, match=r"test.yaml:6:9: model.embed_tokens.weight cannot be int8-dynamic: it is also model.embed_tokens"
    ):
        plan_of(recipe_for(folder, text=HEAD_KEPT.replace("keep: true, why: because", "scheme: int8-dynamic")))


def test_an_untied_head_is_quantized_only_when_named(make_llama: Any, recipe_for: Any) -> None:
    text = HEAD_KEPT.replace("keep: true, why: because", "scheme: int8-dynamic")
    config = plan_of(recipe_for(make_llama(), text=text)).targets[0].config["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear", "lm_head"]
    assert config["ignore"] == []


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        ("- {match: down_prj, scheme: int8-dynamic}", r"test.yaml:6:9: 'down_prj' matches nothing in .* \(did you mean down_proj\?\)"),
        (
            "- {match: linear, scheme: int8-dynamic}\n      - {match: down_proj, keep: true, why: x}",
            r"test.yaml:7:9: 'down_proj' matches 2 tensor\(s\), all taken",
        ),
        (
            "- {match: model.norm, scheme: int8-dynamic}",
            r"test.yaml:6:9: model.norm.weight cannot be int8-dynamic: it is not the weight of a linear",
        ),
        ("- {match: 're:(', scheme: int8-dynamic}", r"test.yaml:6:9: 're:\(' is no regular expression"),
    ],
)
def test_rules_that_cannot_hold_name_their_line(make_llama: Any, recipe_for: Any, rules: str, expected: str) -> None:
    text = "model: {model}\ntargets:\n  - name: q\n    format: compressed-tensors\n    rules:\n      " + rules.replace("{", "{{").replace(
        "}", "}}"
    )
    with pytest.raises(RecipeError, match=expected):
        plan_of(recipe_for(make_llama(), text=text))


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("linear", 14),
        ("down_proj", 2),
        ("mlp.down_proj", 2),
        ("model.layers.0.*", 7),
        ("re:.*\\.[01]\\.mlp\\..*", 6),
        ("*.layers.1.mlp.up_proj", 1),
    ],
)
def test_the_ways_to_name_a_module(make_llama: Any, recipe_for: Any, pattern: str, count: int) -> None:
    vectors = "- {{match: '*norm', keep: true, why: v}}\n      "
    text = (
        "model: {model}\ntargets:\n  - name: q\n    format: compressed-tensors\n    rules:\n      "
        + vectors
        + "- {{match: '"
        + pattern
        + "', scheme: fp8-dynamic}}\n"
    )
    assert len(plan_of(recipe_for(make_llama(), text=text)).targets[0].quantized) == count


@pytest.mark.parametrize(
    ("kind", "settings", "together"),
    [
        ("GPT2LMHeadModel", {"n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 300, "pad_token_id": 0}, ()),
        (
            "DebertaV2Model",
            {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 300},
            tuple(f"encoder.layer.0.attention.self.{name}_proj" for name in ("query", "key", "value")),
        ),
        (
            "BartForConditionalGeneration",
            {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
            | {"encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "vocab_size": 300},
            tuple(f"model.decoder.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v")),
        ),
    ],
)
def test_a_model_that_looks_for_padding_is_observed(kind: str, settings: dict[str, Any], together: tuple[str, ...], tmp_path: Path) -> None:
    """On the meta device there are no values to look at."""
    model_class = getattr(transformers, kind)
    model_class(model_class.config_class(**settings)).save_pretrained(tmp_path)
    checkpoint = open_source(str(tmp_path))
    groups = describe(checkpoint.config, checkpoint.tensors).groups
    assert groups is not None
    assert [set(together) <= set(group) for group in groups].count(True) >= 1


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_is_understood_by_asking_transformers(family: str, tmp_path: Path) -> None:
    folder = save_family(family, tmp_path)
    checkpoint = open_source(str(folder))
    found = describe(checkpoint.config, checkpoint.tensors)
    model = getattr(transformers, found.name).from_pretrained(folder, dtype="auto")
    assert found.missing == ()
    assert found.token_rows == model.get_input_embeddings().num_embeddings == 300
    assert not [name for name, parameter in found.parameters.items() if parameter.kind == "unused"]
    head = model.get_output_embeddings()
    assert (found.head is None) == (head is None)
    if head is not None:
        assert model.get_submodule(found.head) is head
        assert found.tied == (head.weight is model.get_input_embeddings().weight)
    expected = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, transformers.pytorch_utils.Conv1D)) and module is not head
    }
    of_kind = {
        kind: {parameter.modules[0] for parameter in found.parameters.values() if parameter.kind == kind} for kind in ("linear", "router")
    }
    assert of_kind["linear"] == expected - of_kind["router"]
    assert of_kind["router"] == {
        name for name, _ in model.named_modules() if re.search(r"(mlp|feed_forward)\.(router|gate|shared_expert_gate)$", name)
    }
    assert found.groups is not None
    assert {name for group in found.groups for name in group} == set(found.linears)


def test_a_cache_of_layers_that_are_not_alike_is_what_each_writes(tmp_path: Path) -> None:
    """Of Gemma 4, whose layers have heads of two sizes, and the last of which read what others wrote."""
    folder = save_family("gemma4", tmp_path)
    checkpoint = open_source(str(folder))
    found = describe(checkpoint.config, checkpoint.tensors)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    cache = model(input_ids=torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    written = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None)
    assert found.cache_bytes_per_token == written / 5


ENORMOUS = 10**12


@pytest.mark.parametrize(
    ("calibration", "validation", "algorithm", "message"),
    [
        ({"sequences": ENORMOUS}, {}, "gptq", "512,000,.* tokens are asked of sample, which has 149,928 bytes"),
        ({"length": ENORMOUS}, {}, "gptq", "tokens are asked of sample"),
        (
            {"sequences": ENORMOUS, "text": "few.jsonl", "documents": True},
            {},
            "gptq",
            "documents are asked of few.jsonl, which has 11 bytes",
        ),
        (
            {"sequences": ENORMOUS, "text": "few.parquet"},
            {},
            "gptq",
            "calibration.sequences x length: 512,.* GB of memory, .* ask for fewer",
        ),
        ({}, {"tokens": ENORMOUS}, "gptq", "validation: 1,000,.* tokens are asked of sample, which has 162,702 bytes"),
        ({}, {"tokens": ENORMOUS, "text": "few.parquet"}, "gptq", "logits of 1,000,.* GB of disk, .* ask for fewer"),
        ({}, {"prompts": "few.jsonl", "answer_tokens": ENORMOUS}, "gptq", "1,000,.* are to be written, and .* reads no more than 256"),
        ({}, {}, "[rtn, recover: {batch: 1000000000000}]", "recover.batch: 1,000,.* there are 32 "),
        ({}, {}, "[rtn, recover: {generated: 1000000000000}]", "recover.generated: 512,.* GB of memory, .* ask for fewer"),
    ],
)
def test_enormous_numbers_are_refused_before_any_work(
    calibration: Any, validation: Any, algorithm: str, message: str, make_llama: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_llama()
    monkeypatch.chdir(tmp_path)
    for name in ("few.jsonl", "few.parquet"):
        Path(name).write_text('{"text": 1}')
    text = json.dumps({"calibration": calibration, "validation": validation, "model": str(model)})[1:-1]
    rule = f"{{match: linear, scheme: int8-weight-only, algorithm: {algorithm}}}"
    text = f"{{{text}, targets: [{{name: q, format: compressed-tensors, rules: [{rule}]}}]}}"
    with pytest.raises(InputError, match=message) as failed:
        pipeline.convert(parse_recipe(text, "r.yaml", name="r"), tmp_path / "out")
    assert re.match(r"r.yaml:1:\d+: ", str(failed.value))
    assert failed.value.exit_code == 2


def test_a_transposed_weight_is_refused_by_name(tmp_path: Path, recipe_for: Any) -> None:
    with pytest.raises(RecipeError, match=r"c_attn.weight cannot be int8-dynamic: its weight is stored transposed"):
        plan_of(recipe_for(save_family("gpt2", tmp_path)))


def test_a_model_of_70_billion_is_planned_from_its_headers(recipe_for: Callable[..., Any]) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "tie_word_embeddings": False, **sizes}
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{k: v for k, v in config.items() if k != "architectures"}))
    specs = {name: TensorSpec(name, "BF16", tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    checkpoint = fake_checkpoint(config, specs)
    target = make_plan(recipe_for("x/y"), checkpoint, describe(config, specs)).targets[0]
    linear_elements = 80 * (8192 * 8192 * 2 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    rows = 80 * (8192 * 2 + 2 * 1024 + 2 * 28672 + 8192)
    kept = 2 * (2 * 128256 * 8192 + 8192 * 161)
    tensors = sum(item.spec.size_bytes for shard in target.shards for item in shard.tensors)
    assert tensors == linear_elements + 2 * rows + kept
    assert len(target.shards) > 10


def test_what_transformers_does_not_know_is_quantized_by_name_only(recipe_for: Any) -> None:
    specs = {name: TensorSpec(name, "BF16", shape) for name, shape in {"a.weight": (8, 8), "b.weight": (8, 8), "c.weight": (8,)}.items()}
    checkpoint = fake_checkpoint({"model_type": "unheard-of"}, specs)
    with pytest.raises(RecipeError, match="does not know this architecture, so rules must name tensors"):
        make_plan(recipe_for("x/y"), checkpoint, describe(checkpoint.config, specs))
    job = make_plan(recipe_for("x/y", text=HEAD_KEPT.replace("lm_head", "b").replace("linear", "a")), checkpoint, None)
    assert [entry.tensor.name for entry in job.targets[0].quantized] == ["a.weight"]
    assert job.targets[0].config["quantization_config"]["ignore"] == ["b"]
    assert "does not know the architecture 'unheard-of'" in job.warnings()[0]


def test_a_checkpoint_that_lacks_a_parameter_is_refused(make_llama: Any, recipe_for: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(SourceError, match=r"model.layers.1.mlp.up_proj.weight of LlamaForCausalLM is in no weight file"):
        plan_of(recipe_for(folder))


def test_weights_of_another_shape_than_the_config_s_are_refused(make_llama: Any, recipe_for: Any) -> None:
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 310}))
    with pytest.raises(SourceError, match=r"lm_head.weight \(and 1 more\) has the shape \[300, 64\], and the model .* wants \[310, 64\]"):
        plan_of(recipe_for(folder))


def test_a_tensor_the_model_has_no_use_for_is_kept_and_said_so(make_llama: Any, recipe_for: Any) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_llama()
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "rotary.inv_freq": torch.ones(4, 4)}, folder / "model.safetensors", metadata={"format": "pt"})
    entry = next(entry for entry in plan_of(recipe_for(folder)).targets[0].entries if entry.tensor.name == "rotary.inv_freq")
    assert entry.why == "no parameter of the architecture"


def test_layers_behind_the_last_one_are_kept_where_readers_know_of_it(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """As DeepSeek-V3 and GLM-4.5 have them, to predict more than one token ahead: vLLM builds them, and would look for codes."""
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    job = plan_of(recipe_for(folder))
    assert "model.layers.1.mlp.up_proj" in job.targets[0].config["quantization_config"]["ignore"]
    assert re.search(r"^model.layers.1.*\(and 8 more\), 0.1 MB, is no parameter of LlamaForCausalLM", "\n".join(job.warnings()), re.M)
    (artifact,) = export(job, tmp_path, QUIET)
    assert verify(artifact.path).findings == ()


def test_a_rule_that_finds_no_layer_of_a_known_model_does_not_blame_transformers(make_llama: Any, recipe_for: Any) -> None:
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 0}))
    with pytest.raises(RecipeError, match=r"'linear' matches nothing in .*; none of its tensors is the weight of a linear layer"):
        plan_of(recipe_for(folder))


def test_the_own_code_of_a_model_that_does_not_work_is_an_error_of_the_model(make_llama: Any, recipe_for: Any) -> None:
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": {"AutoConfig": "configuration_own.Own"}}))
    with pytest.raises(SourceError, match=r"the model needs code of its own .*set trust_remote_code: true"):
        plan_of(recipe_for(folder))
    with pytest.raises(SourceError, match=r"its own code does not build the model \(OSError: .*configuration_own.py"):
        plan_of(recipe_for(folder, trust_remote_code="true"))


def test_a_config_that_transformers_cannot_build_is_the_config_s_fault(make_llama: Any, recipe_for: Any) -> None:
    folder = make_llama()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_attention_heads": 0}))
    with pytest.raises(SourceError, match=r"config.json: transformers cannot build a llama from it"):
        plan_of(recipe_for(folder))


def fake_checkpoint(config: dict[str, Any], specs: dict[str, TensorSpec]) -> Any:
    """A checkpoint of headers alone: a plan must not touch anything else of it."""
    from convert.source import Checkpoint, SourceFile

    return Checkpoint("x/y", "0" * 40, config, specs, (SourceFile("f", 1),), dict.fromkeys(specs, "f"), None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert"])
def test_a_sequence_longer_than_the_table_of_positions_is_an_error_before_any_work(family: str, recipe_for: Any, tmp_path: Path) -> None:
    """Which would end in an IndexError of the model's."""
    folder = save_family(family, tmp_path)
    config = transformers.AutoConfig.from_pretrained(folder)
    longest = config.max_position_embeddings
    text = HEAD_KEPT.replace("      - {{match: lm_head, keep: true, why: because}}\n", "")
    there = {} if family == "opt" else {"targets.0.format": "onnx", "targets.0.runtimes": "[onnxruntime]"}
    fits, beyond = (
        plan_of(recipe_for(folder, "int8-weight-only", text, **{"validation.length": str(n), "validation.tokens": str(n), **there}))
        for n in (longest, longest + 1)
    )
    pipeline.require_places(fits, check=True)
    pipeline.require_places(beyond, check=False)
    with pytest.raises(InputError, match=rf"--set validation.length={longest + 1}: .*{longest + 1:,} tokens .* a table of {longest:,} pos"):
        pipeline.require_places(beyond, check=True)
    assert any(f"{longest + 1:,} tokens are longer than the {longest:,} that" in warning for warning in beyond.warnings())
    assert not any("are longer" in warning for warning in fits.warnings())


def test_a_sequence_longer_than_a_model_without_such_a_table_was_made_for_is_a_warning(make_llama: Any, recipe_for: Any) -> None:
    job = plan_of(recipe_for(make_llama(), **{"validation.length": "256", "calibration.length": "300", "targets.0.kv_cache": "fp8"}))
    pipeline.require_places(job, check=True)
    (said,) = (warning for warning in job.warnings() if "are longer" in warning)
    assert said.startswith("calibration.length: sequences of 300 tokens are longer than the 256 that ")


def test_a_budget_that_a_model_cannot_meet_or_miss_is_an_error_with_its_line(recipe_for: Any, tmp_path: Path) -> None:
    text = HEAD_KEPT.replace("      - {{match: lm_head, keep: true, why: because}}\n", "")
    budget = {"targets.0.budget": "{perplexity_ratio: 1.1}", "targets.0.ladder": "[rtn]"}
    with pytest.raises(
        RecipeError, match=r"--set targets.0.budget=.*predicts no tokens, so it has no perplexity_ratio; its limits are rel"
    ):
        plan_of(recipe_for(save_family("bert", tmp_path), text=text, **budget))


@pytest.mark.parametrize(
    ("text", "split", "warned"),
    [("{file}", None, True), ("sample", None, False), ("org/name", None, False), ("org/name", "train", True)],
)
def test_a_text_that_is_calibrated_on_and_compared_on_is_a_warning(
    text: str, split: str | None, warned: bool, make_llama: Any, recipe_for: Any, tmp_path: Path
) -> None:
    job = plan_of(recipe_for(make_llama(), **{"targets.0.kv_cache": "fp8"}))
    same = {"text": text.format(file=tmp_path / "a.txt"), "split": split}
    recipe = job.recipe.model_copy(
        update={"calibration": job.calibration.model_copy(update=same), "validation": job.recipe.validation.model_copy(update=same)}
    )
    warnings = make_plan(recipe, job.checkpoint, job.architecture).warnings()
    assert any("is what calibration reads" in warning for warning in warnings) == warned
