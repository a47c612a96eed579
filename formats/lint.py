"""What is wrong with a checkpoint that anybody made: from its headers, its config and its scales, without a manifest and without torch.

Each check is a plain function of a :class:`Checkpoint` that yields findings; :data:`CHECKS` lists them. What readers do was read in, or
seen with, transformers 5.23 with compressed-tensors 0.20, transformers 4.57 and vLLM 0.32.

Severities. ``error``: a reader that the format is written for refuses the checkpoint or gets wrong numbers out of it. ``warning``: it
loads and is right there, but something is missing, names nothing, or misleads an older reader.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from formats.dtypes import FLOATS, numpy_dtype
from formats.errors import FormatError
from formats.existing import (
    SIDE_FILE,
    ExistingLayer,
    ExistingQuantization,
    excludes,
    is_class_name,
    is_head,
    is_tied,
    matches_name,
    read_quantization,
)
from formats.manifest import CHUNK_BYTES
from formats.safetensors import INDEX_FILE, SINGLE_FILE, Located, TensorSpec, read_folder, read_header, read_json
from formats.scheme import PER_TENSOR, Quantization
from formats.skips import skips

ERROR, WARNING = "error", "warning"
_AGAIN = "fetch or make the checkpoint again"
_REQUANTIZE = "quantize the model again"
_BOTH = "transformers, vLLM"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: ``where`` (a file, tensor, module or key), ``what`` in numbers, ``remedy``, ``severity``, and ``runtime``,
    the reader that trips over it (empty: every one)."""

    where: str
    what: str
    remedy: str
    severity: str = ERROR
    runtime: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers could be read. ``metadata``: of each file its ``__metadata__``. ``quantization`` is None where nothing is
    quantized, or where what is said of it cannot be understood."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Located]
    metadata: Mapping[str, Mapping[str, str]]
    quantization: ExistingQuantization | None

    @property
    def modules(self) -> frozenset[str]:
        """Every module that has a tensor, and those that hold them."""
        found: set[str] = set()
        for name in self.tensors:
            while "." in name:
                name = name.rpartition(".")[0]
                found.add(name)
        return frozenset(found)


def lint(folder: Path, tensors: Mapping[str, Located] | None = None, *, quick: bool = False) -> list[Finding]:
    """The findings on a folder, errors first. ``tensors``: its headers, where the caller has read them already.

    ``quick`` leaves out what needs the codes: NaN among float8.
    """
    findings = []
    try:
        tensors = read_folder(folder) if tensors is None else tensors
    except FormatError as error:
        findings.append(Finding(str(folder), str(error), _AGAIN))
        tensors = {}
    try:
        config = read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise FormatError(f"{folder / 'config.json'}: not a JSON object")
    except FormatError as error:
        return [*findings, Finding("config.json", str(error), _AGAIN)]
    specs = {name: item.spec for name, item in tensors.items()}
    quantization = None
    try:
        side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).exists() else None
        quantization = read_quantization(config, specs, side)
    except FormatError as error:
        findings.append(Finding("quantization_config", str(error), "correct it, or make the checkpoint again"))
    else:
        if quantization is None:
            findings += _codes_without_config(specs)
    files = {item.file for item in tensors.values()}
    metadata = {file: read_header(folder / file)[1] for file in sorted(files)}
    checkpoint = Checkpoint(folder, config, tensors, metadata, quantization)
    for check in CHECKS:
        findings += check(checkpoint)
    if not quick:
        floats = [item for item in tensors.values() if item.spec.dtype == "F8_E4M3"]
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for found in pool.map(lambda item: _nan_codes(folder, item), floats):
                findings += found
    return sorted(dict.fromkeys(findings), key=lambda finding: finding.severity != ERROR)


def _codes_without_config(specs: Mapping[str, TensorSpec]) -> list[Finding]:
    coded = [
        name
        for name, spec in specs.items()
        if len(spec.shape) == 2
        and ((name.endswith(".weight") and spec.dtype in ("I8", "F8_E4M3")) or name.endswith((".weight_packed", "._weight_qdata")))
    ]
    if not coded:
        return []
    return [
        Finding(
            "config.json",
            f"{len(coded)} weights are 8-bit codes ({coded[0]} the first), and there is no quantization_config: readers would take codes "
            "for weights",
            "restore quantization_config, or make the checkpoint again",
        )
    ]


# The folder


def _files(checkpoint: Checkpoint) -> Iterator[Finding]:
    folder, tensors = checkpoint.folder, checkpoint.tensors
    if (folder / INDEX_FILE).exists():
        used = {item.file for item in tensors.values()}
        if (folder / SINGLE_FILE).exists() and SINGLE_FILE not in used:
            yield Finding(
                SINGLE_FILE,
                f"lies beside {INDEX_FILE}, which does not name it: transformers reads this file, vLLM the shards",
                "remove the one that is out of date",
                runtime="transformers",
            )
        for path in sorted(folder.glob("model-*.safetensors")):
            if tensors and path.name not in used:
                yield Finding(path.name, "the index does not name it: nobody reads it", "remove it, or name it in the index", WARNING)
    for file, metadata in checkpoint.metadata.items():
        if metadata.get("format") not in (None, "pt", "tf", "flax", "mlx"):
            yield Finding(file, f"__metadata__ says format {metadata['format']!r}", "write format: pt", runtime="transformers")


def _texts(checkpoint: Checkpoint) -> Iterator[Finding]:
    folder, config = checkpoint.folder, checkpoint.config
    if "vocab_size" not in config and not isinstance(config.get("text_config"), dict):
        return
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json", "sentencepiece.bpe.model")
    if not any((folder / name).exists() for name in names):
        yield Finding(
            "tokenizer.json", "no tokenizer: readers need one to take text", "copy the source model's tokenizer files here", WARNING, _BOTH
        )
        return
    settings = folder / "tokenizer_config.json"
    try:
        spelled = read_json(settings) if settings.exists() else {}
    except FormatError as error:
        yield Finding(settings.name, str(error), "copy the source model's")
        return
    templates = [folder / "chat_template.jinja", folder / "chat_template.json", folder / "additional_chat_templates"]
    if (isinstance(spelled, dict) and spelled.get("chat_template")) or any(path.exists() for path in templates):
        return
    token = _chat_token(folder)
    if token is not None:
        yield Finding(
            "tokenizer_config.json",
            f"no chat template, though the tokenizer knows {token}: apply_chat_template and vLLM's chat endpoint refuse",
            "copy the source model's chat_template.jinja here",
            WARNING,
            _BOTH,
        )


_CHAT_TOKENS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|start_of_role|>", "<|assistant|>", "[/INST]", "<|turn_start|>")


def _chat_token(folder: Path) -> str | None:
    """A token that only conversations have. Added tokens stand at the head of ``tokenizer.json``; the vocabulary is not read."""
    text = b""
    for name, size in (("tokenizer_config.json", -1), ("tokenizer.json", 1 << 19)):
        if (folder / name).is_file():
            with (folder / name).open("rb") as stream:
                text += stream.read(size)
    return next((token for token in _CHAT_TOKENS if f'"{token}"'.encode() in text), None)


def _config_keys(checkpoint: Checkpoint) -> Iterator[Finding]:
    try:
        json.loads((checkpoint.folder / "config.json").read_bytes(), object_pairs_hook=_reject_duplicates)
    except _DuplicateKeyError as error:
        yield Finding("config.json", f"the key {error} comes twice in one object: readers keep the last", "remove one of the two", WARNING)
    for where, section in (("config.json", checkpoint.config), ("config.json: text_config", checkpoint.config.get("text_config"))):
        rope = section.get("rope_parameters") if isinstance(section, Mapping) else None
        theta = rope.get("rope_theta") if isinstance(rope, Mapping) else None
        if not isinstance(section, Mapping) or "rope_theta" in section or not isinstance(theta, int | float) or theta == 10_000:
            continue
        yield Finding(
            where,
            f"rope_theta {theta:,.10g} stands in rope_parameters only: transformers 4 does not read it there and takes 10,000",
            f"add rope_theta: {theta:.10g} beside rope_parameters",
            WARNING,
            "transformers 4",
        )


class _DuplicateKeyError(Exception):
    pass


def _reject_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise _DuplicateKeyError(key)
    return dict(pairs)


def _structure(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Layers that are missing, an embedding of another vocabulary, a head that is not there: readers start such weights at random."""
    text = checkpoint.config.get("text_config")
    config = {**checkpoint.config, **text} if isinstance(text, Mapping) else checkpoint.config
    specs = {name: item.spec for name, item in checkpoint.tensors.items()}
    if not specs:
        return
    stacks: dict[str, set[int]] = defaultdict(set)
    for name in specs:
        if (match := re.match(r"(.*?\b(?:layers|h|layer|blocks))\.(\d+)\.", name)) and not re.search(r"vision|visual|audio", name):
            stacks[match[1]].add(int(match[2]))
    count = config.get("num_hidden_layers") or config.get("n_layer")
    if isinstance(count, int) and len(stacks) == 1:
        stack, found = next(iter(stacks.items()))
        if absent := sorted(set(range(count)) - found):
            yield Finding(
                f"{stack}.{absent[0]}",
                f"{len(absent)} of {count} layers have no tensor: readers start them at random",
                _AGAIN,
                runtime=_BOTH,
            )
    vocabulary = config.get("vocab_size")
    for name, spec in specs.items():
        embeds = re.search(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$", name)
        if embeds and isinstance(vocabulary, int) and len(spec.shape) == 2 and spec.shape[0] != vocabulary and "vision" not in name:
            yield Finding(
                name,
                f"{spec.shape[0]:,} rows, vocab_size says {vocabulary:,}",
                "correct vocab_size, or copy config.json from the source",
                runtime=_BOTH,
            )
    if is_tied(checkpoint.config, specs) and config.get("tie_word_embeddings", checkpoint.config.get("tie_word_embeddings")) is False:
        yield Finding(
            "lm_head.weight", "tie_word_embeddings is false and no output head is stored: it starts at random", _AGAIN, runtime=_BOTH
        )


# What the config says, against the tensors


def _layers(checkpoint: Checkpoint) -> Iterator[Finding]:
    found = checkpoint.quantization
    if found is None:
        return
    for layer in found.layers:
        if layer.weight is None and (not layer.rule or layer.unsupported is None):
            yield Finding(
                layer.codes,
                "8-bit codes that the config does not know: readers take them for weights, or find no place for the scales",
                f"name {layer.module} in the config, or keep it out of the quantization",
                runtime=_READERS[found.format],
            )
        elif layer.weight is None and layer.unsupported is not None and layer.unsupported.startswith(("codes", "no ", "load_in")):
            yield Finding(layer.codes, f"{layer.unsupported} ({layer.rule})", _REQUANTIZE, runtime=_BOTH)
    for module in _unexpected_floats(checkpoint, found):
        router = module.rpartition(".")[2] in _ROUTERS
        readers = _READERS[found.format]
        if is_head(module):  # no Linear to vLLM, unless a target names it
            readers = {"compressed-tensors": "transformers", "fp8": "transformers on a GPU"}.get(found.format, readers)
        yield Finding(
            f"{module}.weight",
            f"still {checkpoint.tensors[f'{module}.weight'].spec.dtype}, though the config says it is quantized: readers look for its scale"
            + (" where the router is a Linear to them" if router else ""),
            f"name {module} among the modules to leave alone, or quantize it",
            WARNING if router else ERROR,
            "transformers 4" if router else readers,
        )
    if found.tied_head:
        yield Finding(
            "lm_head",
            "tied to the embedding, yet not among the modules to leave alone: transformers looks for its scale, starts it at random and "
            "computes NaN",
            "name lm_head there",
            runtime="transformers",
        )
    heads = [layer for layer in found.layers if is_head(layer.module)]
    if heads and checkpoint.config.get("tie_word_embeddings") is True:
        yield Finding(
            heads[0].codes,
            "the head is quantized, though tie_word_embeddings is true: vLLM takes the embedding in its stead",
            "set tie_word_embeddings to false",
            runtime="vLLM",
        )


#: On a CPU transformers dequantizes whatever fp8 has a scale beside it, whatever the config says.
_READERS = {
    "compressed-tensors": _BOTH,
    "fp8": "transformers on a GPU, vLLM",
    "modelopt": "vLLM",
    "bitsandbytes": "transformers",
    "torchao": "transformers",
}

#: Last parts of the names of what chooses experts.
_ROUTERS = ("gate", "router", "shared_expert_gate", "classifier")


def _unexpected_floats(checkpoint: Checkpoint, found: ExistingQuantization) -> Sequence[str]:
    floats = found.still_float
    if found.patterns is None and found.format in ("bitsandbytes", "fp8", "torchao"):
        # Without a list transformers leaves the model's last module alone as well, which names do not tell.
        specs = {name: item.spec for name, item in checkpoint.tensors.items()}
        if len(floats) == 1 and not is_tied(checkpoint.config, specs) and not any(is_head(module) for module in found.kept):
            return ()
    if found.format in ("bitsandbytes", "torchao"):
        # transformers 5 holds experts as one 3-D parameter and leaves them alone; saved, they are matrices again.
        floats = tuple(module for module in floats if not re.search(r"\.experts\.\d+\.", module))
    # Routers are built without quantization by vLLM and transformers 5, except under compressed-tensors.
    return floats if found.format == "compressed-tensors" else [m for m in floats if m.rpartition(".")[2] not in _ROUTERS]


def _patterns(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Entries of ``ignore`` and ``targets`` that name nothing."""
    found = checkpoint.quantization
    # The names in a vision-language checkpoint are not those of its modules, which the lists speak of.
    if found is None or not checkpoint.tensors or "vision_config" in checkpoint.config or "text_config" in checkpoint.config:
        return
    leaves = {layer.module for layer in found.layers} | set(found.kept) | set(found.still_float) | {"lm_head"}
    modules = checkpoint.modules | leaves
    keys = {"compressed-tensors": "ignore", "bitsandbytes": "llm_int8_skip_modules", "modelopt": "ignore"}
    key = keys.get(found.format, "modules_to_not_convert")
    for pattern in found.patterns or ():
        if _names_any(found.format, pattern, leaves) or is_class_name(pattern):
            continue
        if _names_any(found.format, pattern, modules):
            if found.format == "compressed-tensors" and pattern in modules and any(leaf.startswith(f"{pattern}.") for leaf in leaves):
                yield Finding(
                    f"quantization_config.{key}",
                    f"{pattern!r} names a module, and readers do not leave alone what is inside it",
                    f"write re:{re.escape(pattern)}.*",
                    WARNING,
                    _BOTH,
                )
            continue
        yield Finding(f"quantization_config.{key}", f"{pattern!r} names no module", "correct or remove it", WARNING, _BOTH)
    groups = found.config.get("config_groups") if found.format == "compressed-tensors" else None
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        for target in group["targets"]:
            if not is_class_name(target) and not any(matches_name(module, target) for module in modules):
                where = f"quantization_config.config_groups.{name}.targets"
                yield Finding(where, f"{target!r} names no module", "correct or remove it", WARNING, _BOTH)


def _names_any(form: str, pattern: str, modules: Iterable[str]) -> bool:
    if form == "compressed-tensors":
        return any(matches_name(module, pattern) for module in modules)
    test = excludes if form == "modelopt" else skips
    return any(test(module, (pattern,)) for module in modules)


def _siblings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Layers that vLLM fuses into one must be quantized alike (``should_ignore_layer``, ``is_layer_skipped``; fused experts likewise)."""
    found = checkpoint.quantization
    if found is None or found.format in ("bitsandbytes", "torchao"):
        return
    said: dict[str, tuple[str, tuple[Any, ...] | None]] = dict.fromkeys((*found.kept, *found.still_float), ("float", None))
    for layer in found.layers:
        said[layer.module] = (layer.rule, (layer.weight, layer.activation, layer.unsupported))
    fused: dict[str, list[str]] = defaultdict(list)
    for module in said:
        parent, _, last = module.rpartition(".")
        for group in _FUSED:
            if last in group:
                fused[f"{parent} {'/'.join(group)}"].append(module)
        if match := re.match(r"(.*\.experts)\.\d+\.", module):
            fused[f"{match[1]} (experts)"].append(module)
    for name, modules in fused.items():
        kinds = Counter(said[module][1] for module in modules)
        if len(kinds) > 1:
            odd_kind = min(kinds, key=lambda kind: (kinds[kind], kind is not None))
            odd = next(module for module in modules if said[module][1] == odd_kind)
            yield Finding(
                name,
                f"{len(kinds)} schemes among {len(modules)} layers that vLLM fuses into one; {odd} is the odd one ({said[odd][0]})",
                "quantize them alike, or leave all of them alone",
                runtime="vLLM",
            )


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


# compressed-tensors alone

_CT_FORMATS = {
    "int-quantized": "I8",
    "float-quantized": "F8_E4M3",
    "naive-quantized": "",
    "pack-quantized": "I32",
    "mxfp8-quantized": "F8_E4M3",
}
_CT_OTHER_FORMATS = ("dense", "mixed-precision", "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp6-pack-quantized", "marlin-24")
_CT_GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
_CT_ARGUMENTS = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype"),
    *("observer", "observer_kwargs"),
}
_ALLOWED = "compressed-tensors allows no others (quant_args.py, quant_scheme.py: extra=forbid)"


def _compressed_tensors(checkpoint: Checkpoint) -> Iterator[Finding]:
    found = checkpoint.quantization
    if found is None or found.format != "compressed-tensors":
        return
    section = found.config
    status = section.get("quantization_status")
    if found.layers and status != "compressed":
        said = "missing, which means initialized" if status is None else repr(status)
        yield Finding(
            "quantization_config.quantization_status",
            f"{said}: transformers takes the codes for weights without a word",
            'write "quantization_status": "compressed"',
            runtime="transformers",
        )
    groups: Mapping[str, Any] = section["config_groups"]
    for name, group in groups.items():
        where = f"quantization_config.config_groups.{name}"
        if unknown := sorted(set(group) - _CT_GROUP_KEYS):
            yield Finding(where, f"unknown key {', '.join(unknown)}: {_ALLOWED}", "remove it", runtime="transformers")
        for key in ("weights", "input_activations", "output_activations"):
            if isinstance(group.get(key), Mapping):
                yield from _ct_arguments(f"{where}.{key}", group[key], activation=key != "weights")
    if isinstance(section.get("kv_cache_scheme"), Mapping):
        yield from _ct_arguments("quantization_config.kv_cache_scheme", section["kv_cache_scheme"], activation=True)
    yield from _ct_formats(found, groups)
    heads = [layer for layer in found.layers if is_head(layer.module)]
    for layer in heads:
        targets = [target for group in groups.values() for target in group["targets"]]
        # vLLM's head is of class ParallelLMHead, in whose name a target is looked for.
        if not any(matches_name(layer.module, target) or target.lower() in "parallellmhead" for target in targets):
            yield Finding(
                layer.codes,
                'a quantized head that no target names ("Linear" is not its class in vLLM): no module or parameter named '
                f"{layer.module}.weight_scale",
                f'add "{layer.module}" to the targets',
                runtime="vLLM",
            )


def _ct_arguments(where: str, raw: Mapping[str, Any], *, activation: bool) -> Iterator[Finding]:
    if unknown := sorted(set(raw) - _CT_ARGUMENTS):
        yield Finding(where, f"unknown key {', '.join(unknown)}: {_ALLOWED}", "remove it", runtime=_BOTH)
    strategy, dynamic, group = raw.get("strategy"), raw.get("dynamic", False), raw.get("group_size")
    wrong = None
    if strategy == "token" and not dynamic:
        wrong = "strategy token must be dynamic"
    elif dynamic is True and strategy in ("channel", "block"):
        wrong = f"strategy {strategy} cannot be dynamic"
    elif isinstance(group, int) and group > 0 and strategy not in (None, "group", "tensor_group"):
        wrong = f"group_size {group} needs strategy group, not {strategy}"
    elif raw.get("block_structure") is not None and strategy != "block":
        wrong = f"block_structure needs strategy block, not {strategy}"
    elif raw.get("actorder") in ("group", "dynamic", True):
        wrong = f"actorder {raw['actorder']!r} is no longer read"
    elif activation and strategy in ("channel", "block"):
        wrong = f"strategy {strategy} is none of activations"
    if wrong:
        yield Finding(where, f"{wrong}: readers refuse it", _REQUANTIZE, runtime=_BOTH)


def _ct_formats(found: ExistingQuantization, groups: Mapping[str, Any]) -> Iterator[Finding]:
    top = found.config.get("format")
    own = {name: group.get("format") for name, group in groups.items()}
    known = (*_CT_FORMATS, *_CT_OTHER_FORMATS)
    for name, value in own.items():
        if value is not None and value not in known:
            where = f"quantization_config.config_groups.{name}.format"
            yield Finding(where, f"{value!r} is no format; known are {', '.join(_CT_FORMATS)}", "correct it", runtime=_BOTH)
            return
    if top not in (None, *known):
        # Newer readers ask the groups, where these say it.
        severity, runtime = (WARNING, "transformers 4") if all(own.values()) else (ERROR, _BOTH)
        what = f"{top!r} is no format; known are {', '.join(_CT_FORMATS)}"
        yield Finding("quantization_config.format", what, "correct it", severity, runtime)
        return
    distinct = {value for value in own.values() if value is not None}
    if len(distinct) > 1 and top != "mixed-precision":
        yield Finding(
            "quantization_config.format",
            f"{top!r}, though the groups are {', '.join(sorted(distinct))}: readers that look here decode the others wrongly",
            'write "mixed-precision"',
            WARNING,
            "transformers 4",
        )
    for name, value in own.items():
        effective = value or top
        layers = [layer for layer in found.layers if layer.rule == f"config_groups.{name}" and layer.weight is not None]
        where = f"quantization_config.config_groups.{name}.format"
        if layers and value is None and top in ("mixed-precision", "dense", None):
            yield Finding(where, f"missing, and quantization_config.format is {top!r}: no scheme fits", _spell(layers[0]), runtime="vLLM")
            continue
        for layer in layers:
            dtype = "I32" if layer.packed else layer.weight.grid.dtype if layer.weight else ""
            expected = _CT_FORMATS.get(str(effective))
            mx = layer.weight is not None and layer.weight.scale == "F8_E8M0"
            if (expected and expected != dtype) or (not expected and layer.packed) or ((effective == "mxfp8-quantized") != mx):
                yield Finding(
                    where, f"{effective!r}, yet {layer.codes} is {dtype}: readers look for other tensors", _spell(layer), runtime=_BOTH
                )
                break
        integers = [layer for layer in layers if layer.weight is not None and layer.weight.grid.kind == "int" and not layer.packed]
        if integers and integers[0].activation is None:
            yield Finding(
                where,
                f"{len(integers)} INT8 layers, weight-only and not packed: vLLM reads weight-only INT8 from pack-quantized alone",
                "write pack-quantized",
                runtime="vLLM",
            )
        elif integers and integers[0].weight is not None and integers[0].weight.tile.columns is not None:
            yield Finding(where, "INT8 weights in groups with INT8 activations: vLLM has no scheme for them", _REQUANTIZE, runtime="vLLM")


def _spell(layer: ExistingLayer) -> str:
    if layer.packed:
        return 'write "pack-quantized"'
    if layer.weight is not None and layer.weight.scale == "F8_E8M0":
        return 'write "mxfp8-quantized"'
    return f'write "{layer.weight.grid.kind}-quantized"' if layer.weight else _REQUANTIZE


# The other formats


def _fine_grained(checkpoint: Checkpoint) -> Iterator[Finding]:
    found = checkpoint.quantization
    if found is None or found.format != "fp8":
        return
    if found.config.get("activation_scheme") == "static" and found.config.get("weight_block_size"):
        yield Finding(
            "quantization_config.activation_scheme", "static with blocks: readers compute it or refuse", "write dynamic", runtime="vLLM"
        )
    if "activation_scheme" not in found.config:
        yield Finding("quantization_config.activation_scheme", "missing: vLLM refuses", 'write "dynamic"', runtime="vLLM")
    for layer in found.layers:
        if is_head(layer.module) and layer.weight is not None:
            yield Finding(
                layer.codes,
                "a quantized head: vLLM's fp8 method knows none and finds no place for its scale",
                "keep the head",
                runtime="vLLM",
            )
        if layer.scale is not None and not layer.scale.endswith("weight_scale_inv"):
            yield Finding(
                layer.scale,
                "transformers reads weight_scale_inv; this one is for vLLM only",
                "rename it for transformers",
                WARNING,
                "transformers",
            )
            break


def _bitsandbytes(checkpoint: Checkpoint) -> Iterator[Finding]:
    import numpy as np

    found = checkpoint.quantization
    if found is None or found.format != "bitsandbytes":
        return
    section = found.config
    if section.get("load_in_8bit") and section.get("load_in_4bit"):
        yield Finding("quantization_config", "load_in_8bit and load_in_4bit are both set", "unset load_in_4bit", runtime="transformers")
    for layer in found.layers:
        if is_head(layer.module) and found.patterns is None:
            yield Finding(
                layer.codes,
                "a quantized head, but without llm_int8_skip_modules transformers keeps the head a Linear and takes codes for weights",
                "keep the head, or list the modules to skip without it",
                runtime="transformers",
            )
        for name in layer.others:
            item = checkpoint.tensors[name]
            values = _read(checkpoint.folder, item).view(numpy_dtype(item.spec.dtype))
            if item.spec.dtype != "U8" or values.size != 1 or np.any(values != 0):
                value = values.flat[0] if values.size else "empty"
                yield Finding(
                    name,
                    f"{value} ({item.spec.dtype} {list(item.spec.shape)}); 0 (row-major, U8) is the only order that is read",
                    "store the rows as they are and write 0",
                    runtime="transformers, bitsandbytes",
                )


def _modelopt(checkpoint: Checkpoint) -> Iterator[Finding]:
    found = checkpoint.quantization
    if found is None or found.format != "modelopt" or not (checkpoint.folder / SIDE_FILE).exists() or "quantization" in found.config:
        return
    side = read_json(checkpoint.folder / SIDE_FILE)
    legacy = side.get("quantization") if isinstance(side, Mapping) else None
    if isinstance(legacy, Mapping) and legacy.get("quant_algo") != found.config.get("quant_algo"):
        yield Finding(
            SIDE_FILE,
            f"quant_algo {legacy.get('quant_algo')!r}, config.json says {found.config.get('quant_algo')!r}: readers disagree",
            "remove the one that is out of date",
            runtime="vLLM, TensorRT-LLM",
        )


def _torchao(checkpoint: Checkpoint) -> Iterator[Finding]:
    found = checkpoint.quantization
    if found is None or found.format != "torchao":
        return
    if set(found.config["quant_type"]) != {"default"}:
        yield Finding("quantization_config.quant_type", "must have the one key default", "remove the others", runtime="transformers")
    for file, metadata in checkpoint.metadata.items():
        try:
            listed = json.loads(metadata.get("tensor_names", "null"))
            kinds = {name: json.loads(metadata[name]).get("_type") for name in listed}
        except (ValueError, KeyError, TypeError, AttributeError):
            yield Finding(
                file, "no torchao metadata in its header: transformers cannot put its tensors together", _AGAIN, runtime="transformers"
            )
            continue
        for layer in found.layers:
            name = f"{layer.module}.weight"
            if checkpoint.tensors[layer.codes].file == file and kinds.get(name, "Tensor") == "Tensor":
                yield Finding(layer.codes, f"the header's metadata does not say that {name} is made of it", _AGAIN, runtime="transformers")


# Keys and values

_ATTENTION = re.compile(r"(.*\.(?:self_attn|attn|attention|mixer|self_attention))\.(k_proj|qkv_proj)$")
_CACHE_READ = {
    "compressed-tensors": (r"\.(self_attn|attn|attention|self_attention)\.(k|v|q)_(scale|zero_point)$", "<attention>.k_scale and .v_scale"),
    "modelopt": (
        r"(\.[kv]_proj\.[kv]_scale|\.(self_attn|attn)\.[kvq]_scale|\.[kvq]_proj\.output_scale)$",
        "k_proj.k_scale and v_proj.v_scale",
    ),
    "fp8": (r"(\.[kv]_proj\.[kv]_scale|\.(self_attn|attn)\.[kvq]_scale|\.[kvq]_proj\.output_scale)$", "<attention>.k_scale and .v_scale"),
}
_CACHE_LIKE = re.compile(
    r"\.((k|v|kv|key|value)_?(cache)?_?(scale|scales|scale_inv|zero_point)|[kv]_(cache|bmm_quantizer)\.\w+|[kv]_proj\.output_scale)$"
)


def _cache(checkpoint: Checkpoint) -> Iterator[Finding]:
    found = checkpoint.quantization
    if found is None or found.format not in _CACHE_READ:
        return
    read, spelled = _CACHE_READ[found.format]
    like = [name for name in checkpoint.tensors if _CACHE_LIKE.search(name)]
    dropped = [name for name in like if not re.search(read, name)]
    if dropped:
        yield Finding(
            dropped[0],
            f"{len(dropped)} scales of keys and values under a name that is not read: they are dropped and 1.0 is used, or refused",
            f"name them {spelled}",
            runtime=_BOTH if found.format == "compressed-tensors" else "vLLM",
        )
    taken = [name for name in like if re.search(read, name)]
    scheme = found.config.get("kv_cache_scheme")
    if scheme is None and found.cache is None:
        if taken and found.format == "compressed-tensors":
            yield Finding(
                taken[0],
                f"{len(taken)} scales of keys and values, and kv_cache_scheme is not set: they are not used",
                "set it",
                WARNING,
                _BOTH,
            )
        return
    if isinstance(scheme, Mapping) and (
        scheme.get("type") != "float" or scheme.get("num_bits", 8) != 8 or scheme.get("symmetric") is False
    ):
        yield Finding(
            "quantization_config.kv_cache_scheme",
            f"{scheme.get('num_bits')}-bit {scheme.get('type')}, symmetric {scheme.get('symmetric')}: vLLM knows symmetric FP8 alone",
            "use FP8",
            runtime="vLLM",
        )
    attentions = {match[1] for module in checkpoint.modules if (match := _ATTENTION.match(module))}
    dynamic = isinstance(scheme, Mapping) and scheme.get("dynamic")
    for letter in ("k", "v"):
        have = {name for name in taken if re.search(rf"\.{letter}_scale$|\.{letter}_proj\.output_scale$", name)}
        without = sorted(attention for attention in attentions if not any(name.startswith(f"{attention}.") for name in have))
        if without and not dropped and not dynamic and found.format == "compressed-tensors":
            yield Finding(
                f"{without[0]}.{letter}_scale",
                f"missing in {len(without)} of {len(attentions)} layers: readers take 1.0, or what memory held",
                "calibrate the cache again, or remove kv_cache_scheme",
                runtime=_BOTH,
            )
    per_head = found.cache is not None and found.cache.tile != PER_TENSOR
    for name in taken:
        spec = checkpoint.tensors[name].spec
        if found.format == "compressed-tensors" and ((not per_head and spec.shape != (1,)) or (per_head and spec.shape[1:] != (1, 1))):
            expected = "[heads, 1, 1]" if per_head else "[1]"
            yield Finding(name, f"of shape {list(spec.shape)}, readers expect {expected}", "reshape it", runtime=_BOTH)
        if not name.endswith("zero_point"):
            yield from _positive(checkpoint, checkpoint.tensors[name])


# Scales


def _scales(checkpoint: Checkpoint) -> Iterator[Finding]:
    found = checkpoint.quantization
    if found is None:
        return
    gains = []
    for layer in found.layers:
        yield from _zero_points(found, layer)
        yield from _input_scale(found, layer, checkpoint)
        if layer.weight is None or layer.scale is None:
            continue
        problem = _packing(checkpoint, layer) if layer.packed else _blocks(found, layer)
        scale = checkpoint.tensors[layer.scale]
        wrong_scale = _scale_layout(found, layer, layer.weight, scale.spec)
        yield from (*problem, *wrong_scale)
        if problem or wrong_scale:
            continue
        yield from _positive(checkpoint, scale, layer)
        gains.append(_gain(checkpoint, layer, layer.weight, scale))
    gains = sorted(gain for gain in gains if gain > 0)
    if not gains:
        return
    middle = gains[len(gains) // 2]
    if not _GAINS[0] < middle < _GAINS[1]:
        cause = (
            "SCB divided by 127, where the largest magnitude of the row belongs"
            if found.format == "bitsandbytes" and middle < 1
            else "scales divided twice"
            if middle < 1
            else "reciprocals, where multipliers belong"
        )
        yield Finding(
            f"{len(gains)} scales",
            f"with them half of the layers change the size of their input {middle:.2g} times or {'less' if middle < 1 else 'more'}; "
            f"between 0.05 and 50 is usual. They look like {cause}",
            "write the scales that the format asks for",
        )


#: sqrt(in) x the weights' spread: beyond these, half of the layers would silence the model, or blow it up.
_GAINS = (0.01, 1e4)


def _gain(checkpoint: Checkpoint, layer: ExistingLayer, weight: Quantization, item: Located) -> float:
    """sqrt(in) times a quarter of the median of the largest magnitudes that the scales allow; about 1 in a trained layer."""
    import numpy as np

    median = float(np.median(np.abs(_values(checkpoint.folder, item)))) if item.spec.elements else 0.0
    gain = median / layer.scale_divisor * weight.grid.high / 4 * math.sqrt(layer.shape[1])
    return gain if math.isfinite(gain) else 0.0


def _scale_layout(found: ExistingQuantization, layer: ExistingLayer, weight: Quantization, scale: TensorSpec) -> list[Finding]:
    readers = _READERS[found.format]
    rows, columns = weight.tile.scale_shape(layer.shape)
    shapes: tuple[tuple[int, ...], ...] = ((rows, columns),)
    if weight.tile == PER_TENSOR:
        shapes = ((1,),) if found.format == "compressed-tensors" else ((), (1,))
    elif found.format == "bitsandbytes":
        shapes = ((rows,), (rows, 1))  # read as one run of floats either way
    elif found.format == "modelopt":
        shapes = ((rows, columns), (rows, 1, columns, 1), *(((rows,),) if columns == 1 else ()))
    findings = []
    if scale.shape not in shapes:
        findings.append(
            Finding(
                scale.name,
                f"of shape {list(scale.shape)}; with one for {weight.tile.rows or 'all'} x {weight.tile.columns or 'all'} of "
                f"{list(layer.shape)}, readers expect {' or '.join(str(list(shape)) for shape in shapes)}",
                "reshape it" if math.prod(scale.shape) == math.prod(shapes[0]) else _REQUANTIZE,
                runtime=readers,
            )
        )
    allowed: tuple[str, ...] = FLOATS
    if found.format == "bitsandbytes":
        allowed = ("F32",)
    elif weight.tile.rows == 1 and weight.tile.columns == 32 and weight.grid.kind == "float":
        allowed = ("U8", "F8_E8M0")
    elif found.format == "fp8" and found.config.get("scale_fmt") == "ue8m0":
        allowed = (*FLOATS, "U8", "F8_E8M0")
    if scale.dtype not in allowed:
        findings.append(
            Finding(scale.name, f"of dtype {scale.dtype}, readers expect {' or '.join(allowed)}", "store it as such", runtime=readers)
        )
    return findings


def _positive(checkpoint: Checkpoint, item: Located, layer: ExistingLayer | None = None) -> Iterator[Finding]:
    """Scales that are NaN, infinite, negative, or zero over codes that are not."""
    import numpy as np

    values = _values(checkpoint.folder, item)
    bad = ~(np.isfinite(values) & (values > 0))
    zero = np.flatnonzero(values == 0)
    if layer is not None and zero.size and layer.weight is not None and layer.weight.tile.rows == 1:
        # Writers give rows of zeros a scale of zero, and readers get zeros out of it.
        per_row = values.size // max(1, layer.shape[0])
        harmless = [i for i in zero if _row_is_zero(checkpoint, layer, int(i) // max(1, per_row))]
        bad[harmless] = False
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        yield Finding(
            item.spec.name,
            f"{int(bad.sum())} scales are not positive numbers, the first {values[first]} at {first}",
            _REQUANTIZE,
        )


def _row_is_zero(checkpoint: Checkpoint, layer: ExistingLayer, row: int) -> bool:
    import numpy as np

    item = checkpoint.tensors[layer.codes]
    width = (item.stop - item.start) // layer.shape[0]
    with (checkpoint.folder / item.file).open("rb") as stream:
        stream.seek(item.start + row * width)
        codes = np.frombuffer(stream.read(width), np.uint8)
    return bool(np.all(codes == (128 if layer.packed else 0)))


def _zero_points(found: ExistingQuantization, layer: ExistingLayer) -> Iterator[Finding]:
    if found.format != "compressed-tensors" or not layer.rule:
        return
    group = found.config["config_groups"][layer.rule.removeprefix("config_groups.")]
    for key, name, part in (
        ("weights", layer.zero_point, "weight_zero_point"),
        ("input_activations", layer.input_zero_point, "input_zero_point"),
    ):
        arguments = group.get(key)
        symmetric = not isinstance(arguments, Mapping) or arguments.get("symmetric", True) is not False
        static = isinstance(arguments, Mapping) and not arguments.get("dynamic")
        if name is not None and symmetric:
            yield Finding(
                name, "a zero point in a symmetric scheme: vLLM finds no parameter of that name", "remove it from the file", runtime="vLLM"
            )
        elif name is None and not symmetric and static:
            yield Finding(f"{layer.module}.{part}", "missing, though the scheme is asymmetric", _REQUANTIZE, runtime=_BOTH)


def _input_scale(found: ExistingQuantization, layer: ExistingLayer, checkpoint: Checkpoint) -> Iterator[Finding]:
    if layer.weight is None:
        return
    static = layer.activation is not None and not layer.activation.dynamic
    if static and layer.input_scale is None:
        name = "activation_scale" if found.format == "fp8" else "input_scale"
        yield Finding(f"{layer.module}.{name}", "missing, though activations are static: readers take what memory held", "calibrate again")
    if layer.input_scale is None:
        return
    if not static and found.format == "compressed-tensors":
        yield Finding(
            layer.input_scale,
            "the scale of a static activation, and the config says dynamic or none: vLLM finds no parameter of that name",
            "remove it from the file",
            runtime="vLLM",
        )
    item = checkpoint.tensors[layer.input_scale]
    shapes = ((1,),) if found.format == "compressed-tensors" else ((), (1,))
    if item.spec.dtype not in FLOATS:
        yield Finding(item.spec.name, f"of dtype {item.spec.dtype}; readers expect a float", _REQUANTIZE)
        return
    if layer.activation is not None and layer.activation.tile == PER_TENSOR and item.spec.shape not in shapes:
        yield Finding(
            item.spec.name, f"of shape {list(item.spec.shape)}, readers expect {list(shapes[0])}", "reshape it", runtime="transformers"
        )
    yield from _positive(checkpoint, item)


def _packing(checkpoint: Checkpoint, layer: ExistingLayer) -> list[Finding]:
    """``weight_packed`` (out, in / 4) against ``weight_shape`` and the groups."""
    assert layer.weight is not None
    packed = checkpoint.tensors[layer.codes].spec.shape
    name = f"{layer.module}.weight_shape"
    if name not in checkpoint.tensors:
        return [Finding(name, "missing: the width of the weight cannot be known", _REQUANTIZE, runtime=_BOTH)]
    item = checkpoint.tensors[name]
    shape = [int(value) for value in _read(checkpoint.folder, item).view(numpy_dtype(item.spec.dtype)).reshape(-1)]
    if len(shape) != 2 or item.spec.dtype not in ("I64", "I32"):
        return [Finding(name, f"{shape} of dtype {item.spec.dtype}; readers expect two I64", _REQUANTIZE, runtime=_BOTH)]
    rows, columns = shape
    if rows != packed[0] or -(-columns // 4) != packed[1]:
        bits = packed[1] * 32 / max(1, columns)
        return [
            Finding(
                layer.codes,
                f"{list(packed)} int32 for {rows} x {columns} codes: {bits:.3g} bits each, where the config says 8",
                "correct num_bits, or pack four codes to an int32",
                runtime=_BOTH,
            )
        ]
    group = layer.weight.tile.columns
    if group is not None and columns % group:
        what = f"{columns} columns are no multiple of group_size {group}: readers refuse"
        return [Finding(layer.codes, what, "use a group_size that divides, or scales per channel", runtime=_BOTH)]
    return []


def _blocks(found: ExistingQuantization, layer: ExistingLayer) -> list[Finding]:
    assert layer.weight is not None
    tile = layer.weight.tile
    if tile.columns is None:
        return []
    (rows, columns), (block_rows, block_columns) = layer.shape, (tile.rows or 1, tile.columns)
    if rows % block_rows == 0 and columns % block_columns == 0:
        return []
    where = f"{rows} x {columns} is not made of whole blocks of {block_rows} x {block_columns}"
    remedy = "leave this layer alone, or use scales per channel"
    if found.format == "fp8":
        # integrations/finegrained_fp8.py, _dequantize_one: block = rows // rows of the grid.
        grid = tile.scale_shape(layer.shape)
        silent = rows % grid[0] == 0 and columns % grid[1] == 0
        what = f"takes blocks of {rows // grid[0]} x {columns // grid[1]} and multiplies by wrong scales" if silent else "refuses it"
        return [Finding(layer.codes, f"{where}: transformers, where it dequantizes, {what}", remedy, runtime="transformers")]
    return [Finding(layer.codes, f"{where}: readers refuse it", remedy, runtime="vLLM" if found.format == "modelopt" else _BOTH)]


CHECKS: tuple[Callable[[Checkpoint], Iterable[Finding]], ...] = (
    _files,
    _texts,
    _config_keys,
    _structure,
    _layers,
    _patterns,
    _siblings,
    _compressed_tensors,
    _fine_grained,
    _bitsandbytes,
    _modelopt,
    _torchao,
    _cache,
    _scales,
)


# Bytes


def _nan_codes(folder: Path, item: Located) -> list[Finding]:
    import numpy as np

    nans = sum(int(np.count_nonzero((chunk & 0x7F) == 0x7F)) for chunk in _chunks(folder, item))
    if not nans:
        return []
    return [Finding(item.spec.name, f"{nans} of its float8 codes are NaN: every logit would be", _REQUANTIZE)]


def _values(folder: Path, item: Located) -> Any:
    """float32, flat; exponents as the powers of two they mean."""
    import numpy as np

    raw = _read(folder, item)
    if item.spec.dtype in ("U8", "F8_E8M0"):
        return np.where(raw == 255, np.float32(np.nan), np.exp2(np.minimum(raw, 254).astype(np.float32) - 127))
    with np.errstate(over="ignore", invalid="ignore"):
        return raw.view(numpy_dtype(item.spec.dtype)).astype(np.float32)


def _chunks(folder: Path, item: Located) -> Iterator[Any]:
    import numpy as np

    with (folder / item.file).open("rb", buffering=0) as stream:
        stream.seek(item.start)
        for position in range(item.start, item.stop, CHUNK_BYTES):
            yield np.frombuffer(stream.read(min(CHUNK_BYTES, item.stop - position)), np.uint8)


def _read(folder: Path, item: Located) -> Any:
    import numpy as np

    return np.concatenate([np.empty(0, np.uint8), *_chunks(folder, item)])
