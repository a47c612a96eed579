"""What an existing checkpoint's quantization says, module by module: read from ``config.json``, its side file and tensor names alone.

The configs are read as their readers read them: compressed-tensors 0.20 (``quantization/quant_config.py``, ``utils/match.py``),
transformers 5.23 (``quantizers/quantizers_utils.py``, ``integrations/finegrained_fp8.py``, ``integrations/bitsandbytes.py``,
``quantizers/quantizer_torchao.py``) and vLLM 0.32 (``layers/quantization/modelopt.py``).

=================== ============================================================== ==========================================
``format``          codes                                                          scales (``weight = codes * scale / divisor``)
=================== ============================================================== ==========================================
compressed-tensors  ``weight`` I8 or F8_E4M3; ``weight_packed`` I32                ``weight_scale``
fp8                 ``weight`` F8_E4M3                                             ``weight_scale_inv`` (or ``weight_scale``)
modelopt            ``weight`` F8_E4M3                                             ``weight_scale``
bitsandbytes        ``weight`` I8                                                  ``SCB``, divisor 127
torchao             ``_weight_qdata`` I8 or F8_E4M3                                ``_weight_scale``
=================== ============================================================== ==========================================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from formats.dtypes import FLOATS
from formats.errors import FormatError
from formats.safetensors import TensorSpec
from formats.scheme import FP8_E4M3, INT8, PER_CHANNEL, PER_TENSOR, PER_TOKEN, Quantization, Tile
from formats.skips import skips

#: Last parts of the names of output heads.
HEADS = ("lm_head", "embed_out", "output", "score", "classifier", "proj_out")

#: What a tied head is called: Llama and nearly all others; Whisper.
_TIED_HEADS = ("lm_head", "proj_out")

#: Where legacy ModelOpt checkpoints keep their quantization.
SIDE_FILE = "hf_quant_config.json"

_CODE_DTYPES = ("I8", "U8", "I32", "F8_E4M3", "F8_E5M2")
_EMBEDDINGS = re.compile(r"(^|[._])(\w*embed\w*|wte|wpe|shared|relative_attention_bias)$")
#: Models whose linear layers are transformers' Conv1D: (in, out), and no "Linear" to a reader.
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "gptsan-japanese")
_CONV1D = ("c_attn", "c_proj", "c_fc", "q_attn")
_CACHE_SCALE = re.compile(r"(\.(k|v|q|kv|qk)_(scale|zero_point)|\.(k|v)_cache\.scale|\.(k|v)_proj\.output_scale)$")


@dataclass(frozen=True)
class ExistingLayer:
    """One module whose codes are there.

    ``weight`` is None where nothing here can decode it; then ``unsupported`` says why. ``activation`` is None for weight-only.
    ``codes``, ``scale``, ``zero_point``, ``input_scale``, ``input_zero_point`` are tensor names, None where there is no such tensor;
    ``others``: the module's remaining quantization tensors (``weight_shape``, ``weight_format``, ...).
    ``shape``: (out, in) in elements; columns of ``packed`` codes (four to an int32) are rounded up to a multiple of four, and
    ``weight_shape`` says how many there are. ``weight = codes * scale / scale_divisor``; a scale of dtype U8 or F8_E8M0 is the
    exponent ``e`` of ``2 ** (e - 127)``; ``weight.scale`` says how scales are stored (``model``: in the dtype of the model).
    INT8 codes may be -128, though the grid says -127. ``rule``: where the config says so.
    """

    module: str
    weight: Quantization | None
    activation: Quantization | None
    codes: str
    scale: str | None
    zero_point: str | None
    input_scale: str | None
    input_zero_point: str | None
    others: tuple[str, ...]
    shape: tuple[int, int]
    packed: bool
    scale_divisor: float
    rule: str
    unsupported: str | None


@dataclass(frozen=True)
class ExistingQuantization:
    """``layers``: every module with codes. ``kept``: linear modules stored as floats that the config leaves alone.
    ``still_float``: those it says are quantized. ``tied_head``: whether it says so of a head that is tied, of which no tensor is stored.
    ``cache``: the quantization of keys and values, ``cache_scales`` its tensors.
    ``config``: the section that was read; ``patterns``: its list of modules to leave alone, None where there is none.
    """

    format: str
    layers: tuple[ExistingLayer, ...]
    kept: tuple[str, ...]
    still_float: tuple[str, ...]
    tied_head: bool
    cache: Quantization | None
    cache_scales: tuple[str, ...]
    patterns: tuple[str, ...] | None
    config: Mapping[str, Any]

    @property
    def undecodable(self) -> tuple[ExistingLayer, ...]:
        """The layers that nothing here can decode."""
        return tuple(layer for layer in self.layers if layer.weight is None)


@dataclass(frozen=True)
class Arguments:
    """What a config says of one module, before its tensors are looked at."""

    weight: Quantization | None
    activation: Quantization | None
    rule: str
    unsupported: str | None = None


def section_of(config: Mapping[str, Any], side: Mapping[str, Any] | None = None) -> tuple[str, Mapping[str, Any]] | None:
    """The quantization section of a whole ``config.json`` and the format it is of, or None where nothing is quantized.

    ``side`` is the parsed ``hf_quant_config.json`` of legacy ModelOpt checkpoints. Raises :class:`FormatError` for what is no
    section of a known 8-bit format.
    """
    text = config.get("text_config")
    section = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, Mapping) else None)
    if not section:
        if side is None:
            return None
        if not isinstance(side, Mapping) or not isinstance(side.get("quantization"), Mapping):
            raise FormatError(f"{SIDE_FILE}: no object 'quantization' in it")
        return "modelopt", side
    if not isinstance(section, Mapping):
        raise FormatError("config.json: quantization_config is not a JSON object")
    method = section.get("quant_method")
    if method is None and section.get("load_in_8bit"):
        method = "bitsandbytes"
    if method is None and "config_groups" in section:
        method = "compressed-tensors"
    if not isinstance(method, str) or method.lower() not in _READERS:
        raise FormatError(f"config.json: quant_method {method!r} is none of {', '.join(_READERS)}")
    return method.lower(), section


def read_quantization(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSpec], side: Mapping[str, Any] | None = None
) -> ExistingQuantization | None:
    """What ``config`` (the whole ``config.json``) and ``side`` (``hf_quant_config.json``, if there is one) say of ``tensors``.

    None when neither speaks of quantization. Raises :class:`FormatError` where they cannot be understood.
    Asymmetric weights and codes of less than 8 bits are recognised and given as ``unsupported``.
    """
    found = section_of(config, side)
    if found is None:
        return None
    name, section = found
    return _READERS[name](config, section, tensors)


def linear_modules(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Modules stored as a float matrix that readers take for a Linear: 2-D ``<module>.weight``, by its name no embedding.

    Routers of experts are among them: some readers have them as Linear, some do not.
    """
    found = []
    for name, spec in tensors.items():
        module, _, last = name.rpartition(".")
        if last != "weight" or not module or len(spec.shape) != 2 or spec.dtype not in FLOATS or min(spec.shape) < 1:
            continue
        if _EMBEDDINGS.search(module) and not is_head(module):
            continue
        if is_conv1d(config, module):
            continue
        found.append(module)
    return tuple(found)


def is_conv1d(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module is transformers' Conv1D, whose weight a model keeps (in, out), by the model's type and the module's name."""
    return config.get("model_type") in _CONV1D_MODELS and module.rpartition(".")[2] in _CONV1D


def is_head(module: str) -> bool:
    """Whether a module is an output head, by its name."""
    parts = module.split(".")
    return parts[-1] in HEADS and not any(part.isdigit() for part in parts)


def is_tied(config: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> bool:
    """Whether a language model has an output head of which no tensor is stored."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    generates = any(isinstance(name, str) and name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names)
    return generates and not any(is_head(name.rpartition(".")[0]) for name in tensors)


def matches_name(module: str, pattern: str) -> bool:
    """compressed-tensors ``utils/match.py``, ``match_name``. Raises :class:`FormatError` for what is no regular expression."""
    if not pattern.startswith("re:"):
        return module == pattern
    try:
        return re.match(pattern.removeprefix("re:"), module) is not None
    except re.error as error:
        raise FormatError(f"config.json: {pattern!r} is no regular expression ({error})") from None


def is_class_name(pattern: str) -> bool:
    """Whether a target is the name of a module's class: ``Linear``, ``ParallelLMHead``."""
    return pattern.isidentifier() and pattern[0].isupper()


def excludes(module: str, patterns: Iterable[str]) -> bool:
    """vLLM ``quantization/modelopt.py``, ``is_layer_excluded``: part of a name, or a wildcard."""
    return any(pattern in module or fnmatchcase(module, pattern) for pattern in patterns)


# compressed-tensors


def _compressed_tensors(config: Mapping[str, Any], section: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> ExistingQuantization:
    groups = section.get("config_groups")
    if not isinstance(groups, Mapping):
        raise FormatError("config.json: quantization_config has no object config_groups")
    patterns = _names(section.get("ignore"), "quantization_config.ignore")
    schemes = {name: (_targets(name, group), _group_arguments(name, group)) for name, group in groups.items()}

    def says(module: str, *, linear: bool = True) -> Arguments | None:
        if any(matches_name(module, pattern) or (pattern == "Linear" and linear) for pattern in patterns or ()):
            return None
        tests: tuple[Callable[[str], bool], ...] = (
            lambda target: target == module,
            lambda target: target.startswith("re:") and matches_name(module, target),
            lambda target: target == "Linear" and linear,
        )
        for test in tests:
            for targets, arguments in schemes.values():
                if any(test(target) for target in targets):
                    return arguments
        return None

    def foreign(module: str) -> Arguments | None:
        # A class that only a model's code knows may well be the class of a module whose codes are here.
        if any(matches_name(module, pattern) for pattern in patterns or ()):
            return None
        return next((arguments for targets, arguments in schemes.values() if any(map(_is_foreign_class, targets))), None)

    cache = section.get("kv_cache_scheme")
    if cache is not None and not isinstance(cache, Mapping):
        raise FormatError("config.json: quantization_config.kv_cache_scheme is not an object")
    return _collect(
        "compressed-tensors",
        config,
        section,
        tensors,
        says=lambda module: says(module) or foreign(module),
        keeps=lambda module: says(module) is None,
        cache=_arguments(cache, "kv_cache_scheme")[0] if cache else None,
        patterns=patterns,
    )


def _is_foreign_class(target: str) -> bool:
    return is_class_name(target) and target != "Linear"


def _targets(name: str, group: Any) -> tuple[str, ...]:
    targets = _names(group.get("targets") if isinstance(group, Mapping) else None, f"quantization_config.config_groups.{name}.targets")
    if targets is None:
        raise FormatError(f"config.json: quantization_config.config_groups.{name} has no list of targets; readers need one")
    return targets


def _group_arguments(name: str, group: Mapping[str, Any]) -> Arguments:
    rule = f"config_groups.{name}"
    weights, inputs = group.get("weights"), group.get("input_activations")
    activation, activation_problem = _arguments(inputs, f"{rule}.input_activations", activation=True) if inputs else (None, None)
    if not weights:
        return Arguments(None, activation, rule, "the group says nothing of weights")
    weight, problem = _arguments(weights, f"{rule}.weights")
    problem = problem or (weights.get("symmetric", True) is False and "asymmetric weights (zero points)") or activation_problem or None
    return Arguments(None if problem else weight, activation, rule, problem)


def _arguments(raw: Any, where: str, *, activation: bool = False) -> tuple[Quantization | None, str | None]:
    """What ``QuantizationArgs`` says (``quantization/quant_args.py``, defaults included), or why it cannot be had here."""
    if not isinstance(raw, Mapping):
        raise FormatError(f"config.json: quantization_config.{where} is not an object")
    bits, kind = raw.get("num_bits", 8), str(raw.get("type", "int")).lower()
    if bits != 8 or kind not in ("int", "float"):
        return None, f"{bits}-bit {kind}"
    group = raw.get("group_size")
    strategy = raw.get("strategy") or ("tensor" if group is None else "channel" if group == -1 else "group")
    structure = raw.get("block_structure")
    if isinstance(structure, str):  # as older versions spell it
        structure = [int(part) if part.isdigit() else 0 for part in structure.split("x")]
    tile: Tile | None = {"tensor": PER_TENSOR, "channel": PER_CHANNEL, "token": PER_TOKEN, "attn_head": PER_CHANNEL}.get(str(strategy))
    if strategy == "group":
        if not _is_extent(group):
            raise FormatError(f"config.json: quantization_config.{where} has strategy group and group_size {group!r}")
        tile = Tile(1, group)
    elif strategy == "block":
        if not isinstance(structure, list) or len(structure) != 2 or not all(map(_is_extent, structure)):
            raise FormatError(f"config.json: quantization_config.{where} has strategy block and block_structure {structure!r}")
        tile = Tile(structure[0], structure[1])
    if tile is None:
        return None, f"strategy {strategy}"
    grid = INT8 if kind == "int" else FP8_E4M3
    return Quantization(
        grid, tile, symmetric=raw.get("symmetric", True) is not False, dynamic=activation and bool(raw.get("dynamic"))
    ), None


# the others


def _fine_grained(config: Mapping[str, Any], section: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> ExistingQuantization:
    """transformers' ``FineGrainedFP8Config``; vLLM reads the same section and calls its list ``ignored_layers`` too."""
    block = section.get("weight_block_size", [128, 128] if any(name.endswith(".weight_scale_inv") for name in tensors) else None)
    if block is not None and not (isinstance(block, list | tuple) and len(block) == 2 and all(map(_is_extent, block))):
        raise FormatError(f"config.json: quantization_config.weight_block_size is {block!r}; it must be two natural numbers or null")
    weight = Quantization(FP8_E4M3, Tile(block[0], block[1]) if block else PER_TENSOR)
    scheme = section.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise FormatError(f"config.json: quantization_config.activation_scheme is {scheme!r}; it must be dynamic or static")
    tile = PER_TENSOR if scheme == "static" else Tile(1, block[1]) if block else PER_TOKEN
    key = "modules_to_not_convert" if section.get("modules_to_not_convert") is not None else "ignored_layers"
    return _reader_with_skips(
        "fp8",
        config,
        section,
        tensors,
        Arguments(weight, Quantization(FP8_E4M3, tile, dynamic=scheme == "dynamic"), "quant_method fp8"),
        key,
    )


def _bitsandbytes(config: Mapping[str, Any], section: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> ExistingQuantization:
    problem = None if section.get("load_in_8bit") or section.get("_load_in_8bit") else "load_in_8bit is not set"
    if section.get("load_in_4bit") or section.get("_load_in_4bit"):
        problem = "4-bit bitsandbytes"
    activation = Quantization(INT8, PER_TOKEN, dynamic=True)
    says = Arguments(None if problem else Quantization(INT8, PER_CHANNEL), activation, "load_in_8bit", problem)
    return _reader_with_skips("bitsandbytes", config, section, tensors, says, "llm_int8_skip_modules")


def _torchao(config: Mapping[str, Any], section: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> ExistingQuantization:
    kind = section.get("quant_type")
    default = kind.get("default") if isinstance(kind, Mapping) else None
    name = default.get("_type") if isinstance(default, Mapping) else None
    if not isinstance(default, Mapping) or not isinstance(name, str):
        raise FormatError("config.json: quantization_config.quant_type.default names no class of torchao")
    data = default.get("_data")
    group = data.get("group_size") if isinstance(data, Mapping) else None
    tile = Tile(1, group) if _is_extent(group) else PER_CHANNEL
    known = {
        "Int8WeightOnlyConfig": Arguments(Quantization(INT8, tile), None, name),
        "Int8DynamicActivationInt8WeightConfig": Arguments(Quantization(INT8, tile), Quantization(INT8, PER_TOKEN, dynamic=True), name),
        "Float8WeightOnlyConfig": Arguments(Quantization(FP8_E4M3, PER_CHANNEL), None, name),
        "Float8DynamicActivationFloat8WeightConfig": Arguments(
            Quantization(FP8_E4M3, PER_CHANNEL), Quantization(FP8_E4M3, PER_TOKEN, dynamic=True), name
        ),
    }
    says = known.get(name, Arguments(None, None, name, f"torchao's {name}"))
    return _reader_with_skips("torchao", config, section, tensors, says, "modules_to_not_convert")


def _reader_with_skips(
    name: str, config: Mapping[str, Any], section: Mapping[str, Any], tensors: Mapping[str, TensorSpec], says: Arguments, key: str
) -> ExistingQuantization:
    """transformers' own quantizers: every Linear but those of a list; without a list, every Linear but the head."""
    patterns = _names(section.get(key), f"quantization_config.{key}")

    def keeps(module: str) -> bool:
        return is_head(module) if patterns is None else skips(module, patterns)

    # A head that was quantized is loaded as such, whether the list is silent or not; one that the list names is not.
    return _collect(
        name,
        config,
        section,
        tensors,
        says=lambda module: says if patterns is None or not keeps(module) else None,
        keeps=keeps,
        cache=None,
        patterns=patterns,
    )


def _modelopt(config: Mapping[str, Any], section: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> ExistingQuantization:
    legacy = section.get("quantization")
    body, key = (legacy, "exclude_modules") if isinstance(legacy, Mapping) else (section, "ignore")
    algorithm = body.get("quant_algo")
    patterns = _names(body.get(key), key)
    per_tensor = Quantization(FP8_E4M3, PER_TENSOR)
    known = {
        "FP8": (per_tensor, per_tensor),
        "FP8_PER_CHANNEL_PER_TOKEN": (Quantization(FP8_E4M3, PER_CHANNEL), Quantization(FP8_E4M3, PER_TOKEN, dynamic=True)),
        "FP8_PB_WO": (Quantization(FP8_E4M3, Tile(128, 128)), Quantization(FP8_E4M3, Tile(1, 128), dynamic=True)),
        "MXFP8": (Quantization(FP8_E4M3, Tile(1, 32)), Quantization(FP8_E4M3, Tile(1, 32), dynamic=True)),
    }
    if not isinstance(algorithm, str):
        raise FormatError(f"the ModelOpt section has quant_algo {algorithm!r}; readers need one of {', '.join(known)}")
    weight, activation = known.get(algorithm.upper(), (None, None))
    says = Arguments(weight, activation, f"quant_algo {algorithm}", None if weight else f"ModelOpt's {algorithm}")
    scheme, spelled = body.get("kv_cache_scheme"), body.get("kv_cache_quant_algo")
    in_float8 = isinstance(scheme, Mapping) and scheme.get("type") == "float" and scheme.get("num_bits") == 8
    cache = per_tensor if in_float8 or (isinstance(spelled, str) and spelled.upper() == "FP8") else None
    return _collect(
        "modelopt",
        config,
        section,
        tensors,
        says=lambda module: None if excludes(module, patterns or ()) else says,
        keeps=lambda module: excludes(module, patterns or ()),
        cache=cache,
        patterns=patterns,
    )


_READERS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], Mapping[str, TensorSpec]], ExistingQuantization]] = {
    "compressed-tensors": _compressed_tensors,
    "fp8": _fine_grained,
    "modelopt": _modelopt,
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}

#: format -> the last parts of the names of a layer's tensors: scale (the first that is there), zero point, input scale, and others.
_PARTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]] = {
    "compressed-tensors": (
        ("weight_scale",),
        "weight_zero_point",
        ("input_scale",),
        ("weight_shape", "weight_g_idx", "weight_global_scale"),
    ),
    "fp8": (("weight_scale_inv", "weight_scale", "scale"), "weight_zero_point", ("activation_scale", "input_scale"), ()),
    "modelopt": (("weight_scale", "weight_scale_inv"), "weight_zero_point", ("input_scale",), ("weight_scale_2",)),
    "bitsandbytes": (("SCB",), "weight_zero_point", (), ("weight_format",)),
    "torchao": (("_weight_scale",), "_weight_zero_point", (), ("_weight_scale_and_zero", "_weight_act_pre_scale")),
}


#: dtype of a stored scale -> ``Quantization.scale``; every other is a rounded one.
_SCALES = {"F32": "F32", "F8_E8M0": "F8_E8M0", "U8": "F8_E8M0"}


def _collect(
    name: str,
    config: Mapping[str, Any],
    section: Mapping[str, Any],
    tensors: Mapping[str, TensorSpec],
    *,
    says: Callable[[str], Arguments | None],
    keeps: Callable[[str], bool],
    cache: Quantization | None,
    patterns: tuple[str, ...] | None,
) -> ExistingQuantization:
    layers = tuple(_layer(name, module, codes, says(module), tensors) for module, codes in _coded(tensors))
    floats = linear_modules(config, tensors)
    return ExistingQuantization(
        format=name,
        layers=layers,
        kept=tuple(module for module in floats if keeps(module)),
        still_float=tuple(module for module in floats if not keeps(module)),
        tied_head=is_tied(config, tensors) and all(not keeps(head) for head in _TIED_HEADS),
        cache=cache,
        cache_scales=tuple(tensor for tensor in tensors if _CACHE_SCALE.search(tensor)),
        patterns=patterns,
        config=section,
    )


def _coded(tensors: Mapping[str, TensorSpec]) -> list[tuple[str, TensorSpec]]:
    """Modules and their codes: matrices, under the name that the format gives them or any other gives them."""
    found = []
    for tensor, spec in tensors.items():
        module, _, last = tensor.rpartition(".")
        named = last in ("weight_packed", "_weight_qdata") or (last == "weight" and spec.dtype in _CODE_DTYPES)
        if named and module and len(spec.shape) == 2:
            found.append((module, spec))
    return found


def _layer(name: str, module: str, codes: TensorSpec, says: Arguments | None, tensors: Mapping[str, TensorSpec]) -> ExistingLayer:
    scales, zero_point, input_scales, others = _PARTS[name]
    packed = codes.name.endswith(".weight_packed")

    def there(*parts: str) -> str | None:
        return next((f"{module}.{part}" for part in parts if f"{module}.{part}" in tensors), None)

    scale = there(*scales)
    arguments = says or Arguments(None, None, "", "the config does not say how it is quantized")
    problem = arguments.unsupported
    weight = arguments.weight
    rows, columns = codes.shape
    if packed:
        columns *= 4
    expected = ("I32" if packed else weight.grid.dtype) if weight else codes.dtype
    if weight is not None and codes.dtype != expected:
        problem = f"codes of dtype {codes.dtype}, the config says {expected}"
    elif weight is not None and scale is None:
        problem = f"no {scales[0]} beside its codes"
    activation = arguments.activation
    if weight is not None and scale is not None:
        stored_as = _SCALES.get(tensors[scale].dtype, "model")
        weight = replace(weight, scale=stored_as)
        if stored_as == "F8_E8M0" and activation is not None and activation.tile == weight.tile:
            activation = replace(activation, scale=stored_as)
    return ExistingLayer(
        module=module,
        weight=None if problem else weight,
        activation=activation,
        codes=codes.name,
        scale=scale,
        zero_point=there(zero_point),
        input_scale=there(*input_scales),
        input_zero_point=there("input_zero_point"),
        others=tuple(found for part in others if (found := there(part))),
        shape=(rows, columns),
        packed=packed,
        scale_divisor=127.0 if name == "bitsandbytes" else 1.0,
        rule=arguments.rule,
        unsupported=problem,
    )


def _names(value: Any, where: str) -> tuple[str, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence) or not all(isinstance(item, str) and item for item in value):
        raise FormatError(f"config.json: {where} must be a list of names")
    return tuple(value)


def _is_extent(value: Any) -> bool:
    return type(value) is int and value > 0
