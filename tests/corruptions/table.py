"""Known failures of 8-bit checkpoints: what goes wrong, on which good one, in a few lines of code; and what must be said of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corruptions.folders import Config, Tensors, edit_config, edit_tensors, rename
from safetensors.torch import load_file, save_file

LAYER = "model.layers.0"
Q, K, UP, DOWN, GATE = (
    f"{LAYER}.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate_proj")
)


@dataclass(frozen=True)
class Corruption:
    """``do`` corrupts a copy of the good checkpoint ``good``. A finding must name ``where``, say ``what``, and blame ``runtime``."""

    good: str
    do: Callable[[Path], Any]
    where: str
    what: str
    runtime: str = ""
    severity: str = "error"


def section(change: Callable[[Config], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, lambda config: change(config["quantization_config"]))


def group(change: Callable[[Config], Any]) -> Callable[[Path], None]:
    return section(lambda q: change(q["config_groups"]["group_0"]))


def config(change: Callable[[Config], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, change)


def tensors(change: Callable[[Tensors], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        for change in changes:
            change(folder)

    return do


def scale(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return tensors(lambda t: t.update({name: change(t[name].clone())}))


def first(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


def floating(module: str) -> Callable[[Path], None]:
    """The codes become floats again, the scale goes."""

    def change(t: Tensors) -> None:
        t[f"{module}.weight"] = (t[f"{module}.weight"].float() * t.pop(f"{module}.weight_scale").float()).bfloat16()

    return tensors(change)


def bnb_floating(t: Tensors) -> None:
    t[f"{UP}.weight"] = (t[f"{UP}.weight"].float() * t.pop(f"{UP}.SCB")[:, None] / 127).bfloat16()
    del t[f"{UP}.weight_format"]


def bnb_head(t: Tensors) -> None:
    weight = t["lm_head.weight"].float()
    t["lm_head.SCB"] = weight.abs().amax(1)
    t["lm_head.weight"] = (weight * (127 / t["lm_head.SCB"][:, None])).round().to(torch.int8)
    t["lm_head.weight_format"] = torch.tensor(0, dtype=torch.uint8)


def narrow(module: str, rows: int, columns: int, scale_name: str = "weight_scale_inv", block: int = 128) -> Callable[[Tensors], None]:
    """A layer of another shape, with the scales that cover it."""

    def change(t: Tensors) -> None:
        t[f"{module}.weight"] = t[f"{module}.weight"][:rows, :columns]
        t[f"{module}.{scale_name}"] = t[f"{module}.{scale_name}"][: -(-rows // block), : -(-columns // block)]

    return change


def narrow_group(t: Tensors) -> None:
    t[f"{DOWN}.weight_packed"] = t[f"{DOWN}.weight_packed"][:, : 480 // 4]
    t[f"{DOWN}.weight_shape"] = torch.tensor([256, 480])


def halve_packed(t: Tensors) -> None:
    rename(t, "weight_packed", "weight_packed", lambda packed: packed[:, : packed.shape[1] // 2])


def quarter_blocks(t: Tensors) -> None:
    rename(t, "weight_scale_inv", "weight_scale_inv", lambda grid: grid.repeat_interleave(2, 0).repeat_interleave(2, 1))


def unknown_rope(c: Config) -> None:
    c.pop("rope_theta", None)
    c["rope_parameters"] = {"rope_type": "default", "rope_theta": 500_000.0}


def duplicate(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_bits": 8', '"num_bits": 8, "num_bits": 8', 1))


def know_chat(folder: Path) -> None:
    edit_config(folder, lambda c: c.update(additional_special_tokens=["<|im_start|>"]), "tokenizer_config.json")


def index(change: Callable[[Config], Any]) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, change, "model.safetensors.index.json")


def move_in_index(c: Config) -> None:
    files = sorted(set(c["weight_map"].values()))
    name = next(name for name, file in c["weight_map"].items() if file == files[0])
    c["weight_map"][name] = files[1]


def single_beside_shards(folder: Path) -> None:
    save_file(load_file(next(iter(sorted(folder.glob("model-*"))))), folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_metadata(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})


def without_layer(t: Tensors) -> None:
    for name in [name for name in t if name.startswith("model.layers.1.")]:
        del t[name]


def disagree(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))


CORRUPTIONS = {
    # compressed-tensors: the config
    "quantization_status missing": Corruption(
        "int8", section(lambda q: q.pop("quantization_status")), "quantization_status", "missing, which means initialized", "transformers"
    ),
    "quantization_status frozen": Corruption(
        "fp8", section(lambda q: q.update(quantization_status="frozen")), "quantization_status", "'frozen'", "transformers"
    ),
    "a misspelt ignore": Corruption(
        "int8", section(lambda q: q.update(ignore=["lm_heads"])), "lm_head.weight", "still BF16", "transformers"
    ),
    "an ignore that names nothing": Corruption(
        "int8", section(lambda q: q["ignore"].append("model.layers.7.mlp.up_proj")), "ignore", "names no module", severity="warning"
    ),
    "an ignore of a container": Corruption(
        "int8", section(lambda q: q["ignore"].append(f"{LAYER}.self_attn")), "ignore", "what is inside", severity="warning"
    ),
    "an ignore that is no regular expression": Corruption(
        "int8", section(lambda q: q.update(ignore=["re:(lm_head"])), "config", "no regular"
    ),
    "a target that names nothing": Corruption(
        "int8", group(lambda g: g["targets"].append("re:.*w1_proj$")), "targets", "names no module", severity="warning"
    ),
    "targets that all name nothing": Corruption(
        "int8", group(lambda g: g.update(targets=["re:.*w1_proj$"])), f"{UP}.weight", "does not know"
    ),
    "codes that the config leaves alone": Corruption(
        "fp8", section(lambda q: q["ignore"].append(DOWN)), f"{DOWN}.weight", "codes that the config does not know", "transformers, vLLM"
    ),
    "a tied head that is not ignored": Corruption("tied", section(lambda q: q.update(ignore=[])), "lm_head", "tied", "transformers"),
    "a quantized head that Linear does not name": Corruption(
        "int8-head", group(lambda g: g.update(targets=["Linear"])), "lm_head.weight", "no target names", "vLLM"
    ),
    "a quantized head tied to the embedding": Corruption(
        "int8-head", config(lambda c: c.update(tie_word_embeddings=True)), "lm_head.weight", "vLLM takes the embedding", "vLLM"
    ),
    "an unknown key of a group": Corruption(
        "int8", group(lambda g: g.update(octavo="0.1")), "group_0", "unknown key octavo", "transformers"
    ),
    "an unknown key of the weights": Corruption(
        "int8", group(lambda g: g["weights"].update(rounding="even")), "group_0.weights", "unknown key rounding", "transformers, vLLM"
    ),
    "a key that comes twice": Corruption("int8", duplicate, "config.json", "num_bits comes twice", severity="warning"),
    "static scales of tokens": Corruption(
        "int8", group(lambda g: g["input_activations"].update(dynamic=False)), "input_activations", "must be dynamic"
    ),
    "a group without a size": Corruption(
        "packed-g64", group(lambda g: g["weights"].update(group_size=None)), "quantization_config", "group_size None"
    ),
    "a group size without groups": Corruption(
        "packed", group(lambda g: g["weights"].update(group_size=64)), "weights", "group_size 64 needs strategy group"
    ),
    "no targets": Corruption("int8", group(lambda g: g.pop("targets")), "quantization_config", "no list of targets"),
    "a format that is none": Corruption("int8", group(lambda g: g.update(format="int8")), "group_0.format", "is no format"),
    "a format that only the groups say": Corruption(
        "int8", section(lambda q: q.update(format="int8")), "format", "is no format", "transformers 4", "warning"
    ),
    "another format's name": Corruption("fp8", group(lambda g: g.update(format="pack-quantized")), "group_0.format", "F8_E4M3"),
    "mixed precision without formats": Corruption(
        "mixed", section(lambda q: [g.pop("format") for g in q["config_groups"].values()]), "format", "'mixed-precision'", "vLLM"
    ),
    "mixed precision that is not called so": Corruption(
        "mixed",
        section(lambda q: q.update(format="int-quantized")),
        "format",
        "groups are float-quantized, int-quantized",
        "transformers 4",
        "warning",
    ),
    "weight-only INT8 that is not packed": Corruption(
        "int8", group(lambda g: g.update(input_activations=None)), "format", "weight-only and not packed", "vLLM"
    ),
    # compressed-tensors: the tensors
    "a scale of NaN": Corruption("int8", scale(f"{UP}.weight_scale", first(float("nan"))), f"{UP}.weight_scale", "the first nan at 0"),
    "a scale of infinity": Corruption("fp8", scale(f"{UP}.weight_scale", first(float("inf"))), f"{UP}.weight_scale", "the first inf"),
    "a scale of zero": Corruption("packed", scale(f"{UP}.weight_scale", first(0)), f"{UP}.weight_scale", "the first 0.0"),
    "a negative scale": Corruption("mixed", scale(f"{UP}.weight_scale", first(-0.01)), f"{UP}.weight_scale", "not positive"),
    "scales without their second axis": Corruption(
        "int8", scale(f"{Q}.weight_scale", lambda s: s.reshape(-1)), f"{Q}.weight_scale", "of shape [256]", "transformers, vLLM"
    ),
    "a scale without an axis": Corruption(
        "fp8-static", scale(f"{Q}.weight_scale", lambda s: s.reshape(())), f"{Q}.weight_scale", "expect [1]", "transformers"
    ),
    "scales of half the groups": Corruption(
        "packed-g64", scale(f"{DOWN}.weight_scale", lambda s: s[:, :4]), DOWN, "readers expect [256, 8]"
    ),
    "scales of another dtype": Corruption("int8", scale(f"{Q}.weight_scale", lambda s: s.int()), f"{Q}.weight_scale", "of dtype I32"),
    "no scale": Corruption("int8", tensors(lambda t: t.pop(f"{Q}.weight_scale")), f"{Q}.weight", "no weight_scale beside"),
    "a zero point in a symmetric scheme": Corruption(
        "int8",
        tensors(lambda t: t.update({f"{Q}.weight_zero_point": torch.zeros(256, 1, dtype=torch.int8)})),
        Q,
        "symmetric scheme",
        "vLLM",
    ),
    "no zero point in an asymmetric scheme": Corruption(
        "packed", group(lambda g: g["weights"].update(symmetric=False)), "weight_zero_point", "missing"
    ),
    "a layer that is still float": Corruption("int8", floating(DOWN), f"{DOWN}.weight", "still BF16, though the config", "transformers"),
    "q quantized and k not": Corruption(
        "int8", both(floating(K), section(lambda q: q["ignore"].append(K))), "q_proj/k_proj/v_proj", "2 schemes among 3 layers", "vLLM"
    ),
    "gate quantized and up not": Corruption(
        "fp8", both(floating(UP), section(lambda q: q["ignore"].append(UP))), "gate_proj/up_proj", f"{UP}", "vLLM"
    ),
    "float8 stored as uint8": Corruption(
        "fp8", tensors(lambda t: rename(t, f"{UP}.weight", f"{UP}.weight", lambda w: w.view(torch.uint8))), f"{UP}.weight", "dtype U8"
    ),
    "a NaN among float8 codes": Corruption(
        "fp8", scale(f"{UP}.weight", first(float("nan"))), f"{UP}.weight", "1 of its float8 codes are NaN"
    ),
    "no scale of a static activation": Corruption(
        "int8-static", tensors(lambda t: t.pop(f"{Q}.input_scale")), f"{Q}.input_scale", "activations are static"
    ),
    "the scale of a dynamic activation": Corruption(
        "int8", tensors(lambda t: t.update({f"{Q}.input_scale": torch.ones(1)})), f"{Q}.input_scale", "dynamic or none", "vLLM"
    ),
    "a static activation of zero": Corruption("int8-static", scale(f"{Q}.input_scale", first(0)), f"{Q}.input_scale", "not positive"),
    "int4 packed, called 8 bits": Corruption("packed", tensors(halve_packed), "weight_packed", "4 bits each"),
    "no shape of packed weights": Corruption("packed", tensors(lambda t: t.pop(f"{Q}.weight_shape")), f"{Q}.weight_shape", "missing"),
    "groups that do not divide": Corruption("packed-g64", tensors(narrow_group), DOWN, "480 columns are no multiple of group_size 64"),
    "blocks that do not fit": Corruption(
        "block", tensors(narrow(DOWN, 256, 480, "weight_scale")), f"{DOWN}.weight", "256 x 480 is not made of whole blocks", "vLLM"
    ),
    "microscaling with plain scales": Corruption(
        "mxfp8",
        tensors(lambda t: rename(t, "weight_scale", "weight_scale", lambda s: torch.exp2(s.float() - 127).bfloat16())),
        "weight_scale",
        "of dtype BF16",
    ),
    "an exponent that is NaN": Corruption("mxfp8", scale(f"{UP}.weight_scale", first(255)), f"{UP}.weight_scale", "the first nan"),
    # keys and values
    "scales of the cache under another name": Corruption(
        "cache", tensors(lambda t: rename(t, ".k_scale", ".k_cache_scale")), "k_cache_scale", "2 scales of keys and values under a name"
    ),
    "scales of the cache as ModelOpt names them": Corruption(
        "cache", tensors(lambda t: rename(t, "attn.v_scale", "attn.v_proj.v_scale")), "v_proj.v_scale", "dropped", "transformers"
    ),
    "no scale of the cache in one layer": Corruption(
        "cache", tensors(lambda t: t.pop(f"{LAYER}.self_attn.k_scale")), f"{LAYER}.self_attn.k_scale", "missing in 1 of 2 layers"
    ),
    "a scale of the cache without an axis": Corruption(
        "cache", tensors(lambda t: rename(t, ".k_scale", ".k_scale", lambda s: s.reshape(()))), "k_scale", "expect [1]"
    ),
    "one scale of the cache where each head has its own": Corruption(
        "cache-per-head", tensors(lambda t: rename(t, ".v_scale", ".v_scale", lambda s: s.reshape(-1))), "v_scale", "[heads, 1, 1]"
    ),
    "a scale of the cache that is zero": Corruption("cache", scale(f"{LAYER}.self_attn.v_scale", first(0)), "v_scale", "not positive"),
    "an INT8 cache": Corruption(
        "cache", section(lambda q: q["kv_cache_scheme"].update(type="int")), "kv_cache_scheme", "FP8 alone", "vLLM"
    ),
    "scales of a cache that is not set": Corruption(
        "cache", section(lambda q: q.update(kv_cache_scheme=None)), "_scale", "kv_cache_scheme is not set", severity="warning"
    ),
    # Hugging Face fp8
    "blocks that transformers misreads": Corruption(
        "fine-grained",
        tensors(narrow(DOWN, 192, 512)),
        f"{DOWN}.weight",
        "takes blocks of 96 x 128 and multiplies by wrong",
        "transformers",
    ),
    "blocks that transformers refuses": Corruption(
        "fine-grained", tensors(narrow(DOWN, 255, 512)), f"{DOWN}.weight", "transformers, where it dequantizes, refuses it", "transformers"
    ),
    "a grid of scales for smaller blocks": Corruption(
        "fine-grained", tensors(quarter_blocks), "weight_scale_inv", "of shape [4, 4]; with one for 128 x 128", "on a GPU, vLLM"
    ),
    "scales that are really inverse": Corruption(
        "fine-grained", tensors(lambda t: rename(t, "_inv", "_inv", lambda s: 1 / s)), "14 scales", "reciprocals, where multipliers belong"
    ),
    "codes beside no weight_scale_inv": Corruption(
        "fine-grained", tensors(lambda t: t.pop(f"{UP}.weight_scale_inv")), f"{UP}.weight", "no weight_scale_inv beside"
    ),
    "static activations of blocks": Corruption(
        "fine-grained", section(lambda q: q.update(activation_scheme="static")), "activation_scheme", "static with blocks", "vLLM"
    ),
    "a head that fp8 should skip and does not": Corruption(
        "fine-grained", section(lambda q: q.update(modules_to_not_convert=[])), "lm_head.weight", "still BF16", "on a GPU"
    ),
    "a skipped module that is fp8": Corruption(
        "fine-grained", section(lambda q: q["modules_to_not_convert"].append("down_proj")), f"{DOWN}.weight", "does not know"
    ),
    # ModelOpt
    "ModelOpt without its algorithm": Corruption("modelopt", section(lambda q: q.pop("quant_algo")), "config", "quant_algo None"),
    "ModelOpt's two files at odds": Corruption("modelopt", disagree, "hf_quant_config.json", "'NVFP4', config.json says 'FP8'", "vLLM"),
    "ModelOpt without its side file": Corruption(
        "modelopt-legacy", lambda folder: (folder / "hf_quant_config.json").unlink(), "config.json", "14 weights are 8-bit codes"
    ),
    "ModelOpt without input scales": Corruption(
        "modelopt", tensors(lambda t: t.pop(f"{Q}.input_scale")), f"{Q}.input_scale", "activations are static"
    ),
    "ModelOpt that excludes its codes": Corruption(
        "modelopt", section(lambda q: q["ignore"].append("*mlp*")), f"{UP}.weight", "does not know"
    ),
    # bitsandbytes
    "SCB divided by 127": Corruption(
        "bitsandbytes", tensors(lambda t: rename(t, ".SCB", ".SCB", lambda s: s / 127)), "14 scales", "SCB divided by 127"
    ),
    "SCB of half the rows": Corruption(
        "bitsandbytes", scale(f"{UP}.SCB", lambda s: s[:256]), f"{UP}.SCB", "readers expect [512]", "transformers"
    ),
    "SCB rounded to the model's dtype": Corruption(
        "bitsandbytes", scale(f"{UP}.SCB", lambda s: s.bfloat16()), f"{UP}.SCB", "of dtype BF16"
    ),
    "no SCB": Corruption("bitsandbytes", tensors(lambda t: t.pop(f"{UP}.SCB")), f"{UP}.weight", "no SCB beside its codes"),
    "rows in another order": Corruption(
        "bitsandbytes",
        scale(f"{UP}.weight_format", lambda _: torch.tensor(1, dtype=torch.uint8)),
        "weight_format",
        "0 (row-major",
        "bitsandbytes",
    ),
    "load_in_8bit missing": Corruption(
        "bitsandbytes",
        section(lambda q: (q.pop("load_in_8bit"), q.pop("_load_in_8bit", None))),
        f"{UP}.weight",
        "load_in_8bit is not set",
        "transformers",
    ),
    "a layer that bitsandbytes should have quantized": Corruption("bitsandbytes", tensors(bnb_floating), f"{UP}.weight", "still BF16"),
    "a head that bitsandbytes does not load": Corruption(
        "bitsandbytes", tensors(bnb_head), "lm_head.weight", "keeps the head", "transformers"
    ),
    "a skipped module that is quantized": Corruption(
        "bitsandbytes", section(lambda q: q.update(llm_int8_skip_modules=["lm_head", "down_proj"])), f"{DOWN}.weight", "does not know"
    ),
    # torchao
    "torchao without its metadata": Corruption("torchao", without_metadata, "model.safetensors", "no torchao metadata", "transformers"),
    "a torchao scale of NaN": Corruption(
        "torchao", scale(f"{UP}._weight_scale", first(float("nan"))), f"{UP}._weight_scale", "the first nan"
    ),
    "a torchao type per layer": Corruption(
        "torchao", section(lambda q: q["quant_type"].update(lm_head=None)), "quant_type", "the one key default", "transformers"
    ),
    # any checkpoint
    "no quantization_config": Corruption(
        "int8", config(lambda c: c.pop("quantization_config")), "config.json", "14 weights are 8-bit codes"
    ),
    "a quantization nobody knows": Corruption(
        "int8", section(lambda q: q.update(quant_method="octo")), "quantization_config", "'octo' is none of"
    ),
    "no config.json": Corruption("int8", lambda folder: (folder / "config.json").unlink(), "config.json", "cannot be read"),
    "no tokenizer": Corruption(
        "int8", lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json", "no tokenizer", "vLLM", severity="warning"
    ),
    "no chat template": Corruption(
        "int8", know_chat, "tokenizer_config.json", "though the tokenizer knows <|im_start|>", severity="warning"
    ),
    "a rope theta that transformers 4 does not see": Corruption(
        "int8", config(unknown_rope), "config.json", "rope_theta 500,000 stands in rope_parameters only", "transformers 4", "warning"
    ),
    "an index at odds with its shards": Corruption("sharded", index(move_in_index), "corrupted", "the index says"),
    "a shard that is missing": Corruption(
        "sharded",
        lambda folder: next(iter(folder.glob("model-*2.safetensors"))).unlink(),
        "corrupted",
        "1 shard(s) named by the index are missing",
    ),
    "a single file beside shards": Corruption(
        "sharded", single_beside_shards, "model.safetensors", "transformers reads this file", "transf"
    ),
    "a shard that nobody names": Corruption(
        "sharded",
        lambda folder: shutil.copy(next(iter(folder.glob("model-*"))), folder / "model-00009-of-00009.safetensors"),
        "model-00009",
        "the index does not name it",
        severity="warning",
    ),
    "a truncated file": Corruption("fp8", truncate, "corrupted", "truncated"),
    "a layer that is missing": Corruption("int8", tensors(without_layer), "model.layers.1", "1 of 2 layers have no tensor"),
    "another vocabulary": Corruption(
        "int8", config(lambda c: c.update(vocab_size=301)), "embed_tokens.weight", "300 rows, vocab_size says 301"
    ),
    "a head that is missing": Corruption("int8", tensors(lambda t: t.pop("lm_head.weight")), "lm_head.weight", "starts at random"),
}
