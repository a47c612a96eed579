"""Good checkpoints of every format, and how to change one in a line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from formats.manifest import MANIFEST, FileRecord, read_manifest
from formats.provenance import PROVENANCE, statement

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]

SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}

#: name of the target -> its scheme and what else it says; all of one source, in one run.
TARGETS = {
    "int8": "rules: [{match: linear, scheme: int8-dynamic}]",
    "int8-static": "rules: [{match: linear, scheme: int8-static}]",
    "int8-head": "rules: [{match: linear, scheme: int8-dynamic}, {match: lm_head, scheme: int8-dynamic}]",
    "packed": "rules: [{match: linear, scheme: int8-weight-only}]",
    "packed-g64": "rules: [{match: linear, scheme: int8-weight-only-g64}]",
    "fp8": "rules: [{match: linear, scheme: fp8-dynamic}]",
    "fp8-static": "rules: [{match: linear, scheme: fp8-static}]",
    "block": "rules: [{match: linear, scheme: fp8-block}]",
    "mxfp8": "rules: [{match: linear, scheme: mxfp8}]",
    "cache": "rules: [{match: linear, scheme: fp8-dynamic}], kv_cache: fp8",
    "cache-per-head": "rules: [{match: linear, scheme: fp8-dynamic}], kv_cache: fp8-per-head",
    "mixed": "rules: [{match: self_attn.o_proj, scheme: fp8-dynamic}, {match: linear, scheme: int8-dynamic}]",
    "sharded": "rules: [{match: linear, scheme: int8-dynamic}], max_shard_size: 1000000",
}


def recipe(model: Path, targets: dict[str, str], limits: str = "kl_nats: 9.0, top1: 0.0, perplexity_ratio: 99.0") -> str:
    lines = [f"  - {{name: {name}, format: compressed-tensors, {says}, limits: {{{limits}}}}}" for name, says in targets.items()]
    calibrated = any("static" in says or "kv_cache" in says for says in targets.values())
    calibration = "calibration: {sequences: 4, length: 32}\n" if calibrated else ""
    return f"model: {model}\nvalidation: {{tokens: 256, length: 64}}\n{calibration}targets:\n" + "\n".join(lines)


def edit_tensors(folder: Path, change: Callable[[Tensors], Any], file: str = "model.safetensors") -> None:
    with safe_open(folder / file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(folder / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, metadata=metadata)


def edit_config(folder: Path, change: Callable[[Config], Any], file: str = "config.json") -> None:
    config = json.loads((folder / file).read_text())
    change(config)
    (folder / file).write_text(json.dumps(config))


def vouch(folder: Path) -> None:
    """Makes the manifest promise what lies there now, as whoever made the mistake would have done."""
    manifest = read_manifest(folder)
    files = []
    for file in manifest.files:
        content = (folder / file.name).read_bytes()
        files.append(FileRecord(file.name, len(content), hashlib.sha256(content).hexdigest()))
    promising = replace(manifest, files=tuple(files))
    (folder / MANIFEST).write_bytes(promising.to_bytes())
    (folder / PROVENANCE).write_bytes(statement(promising))


def rename(tensors: Tensors, old: str, new: str, change: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor) -> None:
    """Every name that ends in ``old`` ends in ``new``."""
    for name in [name for name in tensors if name.endswith(old)]:
        tensors[name.removesuffix(old) + new] = change(tensors.pop(name))


def fine_grained(block: Path, folder: Path) -> Path:
    """DeepSeek's form of the blocks of compressed-tensors; transformers' ``FineGrainedFP8Config``."""
    shutil.copytree(block, folder)
    edit_tensors(folder, lambda t: rename(t, "weight_scale", "weight_scale_inv", lambda scale: scale.float()))
    section = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    edit_config(folder, lambda c: c.update(quantization_config=section))
    return folder


def modelopt(static: Path, folder: Path, *, legacy: bool = False) -> Path:
    """ModelOpt FP8: scales are scalars of float32; the section, or the legacy side file in its stead."""
    shutil.copytree(static, folder)
    edit_tensors(folder, lambda t: rename(t, "_scale", "_scale", lambda scale: scale.float().reshape(())))
    if legacy:
        edit_config(folder, lambda c: c.pop("quantization_config"))
        said = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
        (folder / "hf_quant_config.json").write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": said}))
    else:
        section = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"], "kv_cache_scheme": None}
        edit_config(folder, lambda c: c.update(quantization_config=section))
    return folder


def torchao(int8: Path, folder: Path) -> Path:
    """What torchao 0.18 writes of an Int8WeightOnlyConfig: flattened tensors, and in the header how to put them together."""
    shutil.copytree(int8, folder)
    tensors = load_file(folder / "model.safetensors")
    rename(tensors, ".weight_scale", "._weight_scale", lambda scale: scale.float())
    kinds: dict[str, str] = {}
    for name in [name for name in tensors if name.endswith(".weight")]:
        module, columns = name.removesuffix(".weight"), tensors[name].shape[-1]
        if tensors[name].dtype != torch.int8:
            kinds[name] = json.dumps({"_type": "Tensor"})
            continue
        tensors[f"{module}._weight_qdata"] = tensors.pop(name)
        tensors[f"{module}._weight_zero_point"] = torch.zeros(tensors[f"{module}._weight_scale"].shape, dtype=torch.int8)
        data = {"act_quant_kwargs": None, "reduce_range": False, "block_size": [1, columns], "dtype": "bfloat16"}
        kinds[name] = json.dumps({"_type": "Int8Tensor", "_data": data, "_tensor_data_names": ["qdata", "scale", "zero_point"]})
    metadata = {"format": "pt", "tensor_names": json.dumps(list(kinds)), **kinds}
    save_file(tensors, folder / "model.safetensors", metadata=metadata)
    kind = {"default": {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"group_size": None}}}
    section = {"quant_method": "torchao", "quant_type": kind, "modules_to_not_convert": None}
    edit_config(folder, lambda c: c.update(quantization_config=section))
    return folder


def bitsandbytes(model: Path, folder: Path) -> Path:
    """What transformers and bitsandbytes themselves save."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder
