"""The plan: what becomes of every tensor, decided from headers and the config alone. Pure: no weight is read, nothing is written."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set, Sized
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import PurePosixPath
from typing import Any

from convert import __version__
from convert.algorithms import ALGORITHMS
from convert.architecture import Architecture, Parameter, Part, whole
from convert.coded import Coded
from convert.compatibility import judge, parts_of
from convert.onnx.artifact import Files, inline_template, plan_decoder, plan_traced
from convert.onnx.nodes import Stored
from convert.onnx.traced import ENCODER, Placed, Traced, trace
from convert.recipe import HEAD_WHY, Calibration, Recipe, Rule, Step, Target, applicable, calibrated
from convert.runtimes import RUNTIMES
from convert.source import Checkpoint
from formats import FORMATS
from formats.dtypes import DTYPES, FLOATS, from_torch_name
from formats.errors import FormatError, RecipeError, SourceError
from formats.layer import Attention, Contents, LayerNames, QuantizedLayer
from formats.model_config import spell
from formats.onnx_matmulnbits import block_size
from formats.safetensors import Shard, TensorSpec, index_json, json_bytes, lay_out
from formats.scheme import CACHES, PER_TENSOR, SCHEMES, Quality, Quantization, Scheme
from formats.tensors import GRAPHS

#: The algorithm that chooses nothing: the source's own codes.
RESPELL = "respell"
#: What a note begins with: what became of codes that the source had, and of scales that belong to no weight.
DEQUANTIZED, RESPELLED, REQUANTIZED, TAKEN_OVER = "dequantized", "respelled", "requantized", "taken over"
CONTEXTS = (2_048, 8_192, 32_768, 131_072)

_KEEP_WHY = {
    "embedding": "an embedding: looked up, not multiplied",
    "norm": "a vector: nothing to win",
    "bias": "a bias: added, not multiplied",
    "head": HEAD_WHY,
    "unused": "no parameter of the architecture",
    "unread": "nothing that the graph returns depends on it",
    "linear": "no rule names it",
    "expert": "no rule names it",
    "router": "a router: its error changes which experts are asked",
    "other": "not a linear layer",
    "unknown": "no rule names it",
}


@dataclass(frozen=True)
class Entry:
    """The fate of one source tensor in one target: quantized by ``scheme`` and ``algorithm``, or kept because of ``why``.

    ``plain`` is the tensor as it is stored when kept, ``parts`` are the linear layers it holds, ``outputs`` the tensors it becomes on
    disk; ``rule`` is what decided, as ``recipe.yaml:line:column match``. ``scale_dtype`` is the dtype of the model, or that of the
    source's scales where its codes are only spelled anew; ``note`` says what became of codes that the source had. Of kind ``cache`` it
    is a scale that no source tensor becomes, and ``tensor`` the scale itself. ``observer``: what chooses the scale of a static input, a
    percentile behind it. ``experts`` and ``reading`` are those of :class:`~convert.architecture.Parameter`. ``beside``: what is stored as
    it is beside the codes, the embedding of a tied head. ``transposed``: rows become columns on disk. ``copies``: what each of its outputs
    that two graphs read is called where it lies once more.
    ``alone_nats``: what its group loses alone, where the recipe says. ``alongside``: the tensors, its own among them, that have one scale
    together (:func:`_together`).
    """

    tensor: TensorSpec
    plain: TensorSpec
    modules: tuple[str, ...]
    kind: str
    parts: tuple[Part, ...]
    scheme: Scheme | None
    algorithm: str | None
    rule: str
    why: str
    outputs: tuple[TensorSpec, ...]
    scale_dtype: str = ""
    note: str = ""
    turned: str = ""
    experts: str = ""
    reading: str = ""
    steps: tuple[Step, ...] = ()
    alone_nats: float | None = None
    beside: TensorSpec | None = None
    transposed: bool = False
    observer: str = ""
    copies: Mapping[str, str] = field(default_factory=dict)
    alongside: tuple[str, ...] = ()

    @property
    def coder(self) -> str:
        """What chooses the codes: the last of the algorithms but for corrections."""
        return self.coding.name if self.coding else str(self.algorithm)

    @property
    def coding(self) -> Step | None:
        """The step that chooses the codes, with its options."""
        return next((step for step in self.steps if step.name in ALGORITHMS), None)

    def asks(self, *names: str) -> Step | None:
        """The first of its steps that is called so."""
        return next((step for step in self.steps if step.name in names), None)

    @property
    def uncovered(self) -> str:
        """What becomes of it where nothing feeds it that could take up the factors of a transform; empty where none is asked for."""
        return next((options.uncovered for step in self.steps if (options := step.smoothquant or step.awq)), "")

    @property
    def again(self) -> str:
        """The word for what became of the source's codes; empty where it had none."""
        return self.note.partition(" (")[0]

    @property
    def decision(self) -> str:
        if self.scheme:
            return "quantize"
        return "add" if self.kind == "cache" else "keep" if self.outputs else "drop"

    def layers(self) -> list[QuantizedLayer]:
        """The linear layers it is quantized as."""
        scheme = self.scheme.name if self.scheme else ""
        head = self.kind == "head"
        return [
            QuantizedLayer(self.module(part), scheme, part.shape(self.tensor), head, stored=part.module, experts=self.experts)
            for part in self.parts
        ]

    def within(self, block: str) -> bool:
        """Whether one of its modules lies in a block."""
        return any(module.startswith(f"{block}.") for module in self.modules)

    def module(self, part: Part) -> str:
        """What the model calls a layer; an expert is no module of transformers', so it has the name it has on disk."""
        return part.module if self.experts else self.modules[0]

    @property
    def size_bytes(self) -> int:
        """Bytes on disk after conversion."""
        return sum(spec.size_bytes for spec in self.outputs)

    def record(self) -> dict[str, Any]:
        """The entry as plain data, for the manifest."""
        fate: dict[str, Any] = {"why": self.why}
        if self.scheme:
            parts = [[part.module, part.start, part.stop, part.columns] for part in self.parts]
            options = {step.name: getattr(step, step.name).model_dump(exclude_defaults=True) for step in self.steps}
            options = {name: chosen for name, chosen in options.items() if chosen}
            fate = {
                "scheme": self.scheme.name,
                "algorithm": self.algorithm,
                **({"options": options} if options else {}),
                **({"why": self.why} if self.why else {}),
                **({"observer": self.observer} if self.observer else {}),
                "scale_dtype": self.scale_dtype,
                **({"alongside": list(self.alongside)} if self.alongside else {}),
                "parts": parts,
            }
        return {
            "tensor": self.tensor.name,
            "dtype": self.tensor.dtype,
            "shape": list(self.tensor.shape),
            "module": self.modules[0],
            "decision": self.decision,
            **({"experts": self.experts} if self.experts else {}),
            **fate,
            **({"transposed": True} if self.transposed else {}),
            **({"note": note} if (note := "; ".join(filter(None, (self.note, self.turned)))) else {}),
            **({"alone_nats": self.alone_nats} if self.alone_nats is not None else {}),
            "rule": self.rule,
            "outputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in self.outputs],
        }


@dataclass(frozen=True)
class TargetPlan:
    """One artifact before it exists: every tensor's fate, every file's header, the finished ``config.json``.

    ``files``: what the format wants beside weights and ``config.json``.
    ``dropped``: scales of keys, values and inputs that the source has and no tensor here comes from. ``cautions``: where a runtime it is
    for loads it without an 8-bit kernel.
    """

    name: str
    format: str
    entries: tuple[Entry, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    dtype: str
    runtimes: tuple[str, ...]
    bounds: Quality
    contents: Contents
    files: Mapping[str, bytes]
    dropped: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    @cached_property
    def quantized(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.scheme)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weight files, headers included: exactly what will lie on disk."""
        return sum(shard.size_bytes for shard in self.shards)

    @property
    def static(self) -> tuple[str, ...]:
        """Modules whose inputs calibration must have seen."""
        return tuple(layer.module for entry in self.quantized if entry.scheme and entry.scheme.static for layer in entry.layers())

    @property
    def solved(self) -> bool:
        """Whether codes are chosen block by block, with the model at work."""
        return any(calibrated(entry.steps) for entry in self.quantized)

    @property
    def calibrated(self) -> bool:
        return self.solved or bool(self.static) or self.contents.cache is not None

    def texts(self, sidecars: Mapping[str, bytes]) -> dict[str, bytes]:
        """The files that are no weights: those of the source's tokenizer, ``config.json``, and what the format puts beside it."""
        return {
            **(inline_template(sidecars) if self.format in GRAPHS else sidecars),
            "config.json": json_bytes(dict(self.config)),
            **self.files,
        }

    def ledger(self) -> list[dict[str, Any]]:
        return [entry.record() for entry in self.entries]


@dataclass(frozen=True)
class Plan:
    """The whole job. ``digest`` identifies it: what must agree for an interrupted run to be taken up again."""

    recipe: Recipe
    checkpoint: Checkpoint
    architecture: Architecture | None
    targets: tuple[TargetPlan, ...]

    @cached_property
    def digest(self) -> str:
        facts = [__version__, self.resolved(), self.checkpoint.fingerprint()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def calibration(self) -> Calibration:
        """What the recipe says of it, with its defaults."""
        return self.recipe.calibration or Calibration()

    @property
    def predicts(self) -> bool:
        """Whether the model predicts tokens; of one that transformers does not know it is taken for granted."""
        return self.architecture is None or self.architecture.predicts

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default that applies to this model. Without ``push``: where an artifact goes is not what it is."""
        return {**self.recipe.resolved(predicts=self.predicts), "push": None}

    def warnings(self) -> list[str]:
        """What a user should know and is no error."""
        found = []
        if self.architecture is None:
            kind = self.checkpoint.config.get("model_type")
            found.append(f"transformers does not know the architecture {kind!r}: only tensors that rules name are quantized")
        elif self.architecture.groups is None:
            found.append(f"{self.architecture.name} could not be run on the meta device: which layers share an input was not observed")
        again = [entry.tensor for target in self.targets for entry in target.quantized if entry.again == REQUANTIZED]
        if again:
            was = self.checkpoint.coded[again[0].name].description
            found.append(
                f"{len(set(again))} tensors are quantized a second time, first {again[0].name} ({was}): errors add up; "
                "convert the model it was made from, if there is one"
            )
        unused = [entry.tensor for entry in self.targets[0].entries if entry.kind == "unused"]
        if unused and self.architecture is not None:
            found.append(
                f"{unused[0].name}{_and_more(unused)}, {sum(spec.size_bytes for spec in unused) / 1e6:,.1f} MB, is no parameter of "
                f"{self.architecture.name} as config.json describes it: nothing reads it in transformers, and it is not quantized"
            )
        for target, asked in zip(self.targets, self.recipe.targets, strict=True):
            if asked.ruined is not None:
                fate = "kept in 16 bit" if asked.ruined.instead == "keep" else f"made {asked.ruined.instead}"
                found.append(
                    f"{target.name}: of its {len(target.static)} layers with static inputs up to {asked.ruined.at_most} may be {fate} "
                    "instead, where calibration finds that a static scale ruins them; then it is calibrated and made again"
                )
            rounded = [entry for entry in target.quantized if entry.again == RESPELLED and _will_round(entry, target.dtype)]
            if rounded:
                found.append(
                    f"{target.name}: {len(rounded)} respelled tensors keep their scales in {rounded[0].scale_dtype}, lossless on disk; "
                    f"transformers rounds scales of compressed-tensors to {target.dtype} as it loads them"
                )
            if target.dropped:
                found.append(
                    f"{target.name}: {len(target.dropped)} scales of inputs, keys or values that the source has are not taken over, "
                    f"first {target.dropped[0]}"
                )
            merging = [name for name in target.runtimes if RUNTIMES[name].merges]
            merged = sum(len(entry.parts) for entry in target.quantized if entry.reading == "merged")
            if merging and merged:
                found.append(
                    f"{target.name}: {merging[0]} makes floats of {merged} layers of experts while it loads them: they take no less memory "
                    "there, and their inputs are not quantized"
                )
            unnamed = [entry for entry in target.entries if entry.why == _KEEP_WHY["linear"]]
            if unnamed:
                share = sum(entry.tensor.size_bytes for entry in unnamed) / max(self.checkpoint.size_bytes, 1)
                found.append(
                    f"{target.name}: no rule names {len(unnamed)} linear layers ({share:.0%} of the bytes), first {unnamed[0].tensor.name}"
                )
            found += (f"{target.name}: {caution}" for caution in target.cautions)
        return found

    def deployment_bytes(self, target: TargetPlan) -> dict[int, int] | None:
        """Weights plus keys and values in 16 bit, for one sequence of each length in :data:`CONTEXTS` that the model allows."""
        if self.architecture is None or self.architecture.cache_bytes_per_token is None:
            return None
        longest = self.architecture.context_length or CONTEXTS[0]
        per_token = self.architecture.cache_bytes_per_token
        return {length: target.weight_bytes + length * per_token for length in CONTEXTS if length <= max(longest, CONTEXTS[0])}


def make_plan(recipe: Recipe, checkpoint: Checkpoint, architecture: Architecture | None, *, machine: str | None = None) -> Plan:
    """Decides everything. Raises :class:`RecipeError` (naming the recipe's line) or :class:`SourceError`; nothing was written then.

    ``machine``: the hardware here (:func:`convert.hardware.this_machine`), of which the plan warns where a target names none.
    """
    if architecture is not None and architecture.missing:
        first, more = architecture.missing[0], _and_more(architecture.missing)
        raise SourceError(f"{checkpoint.origin}: {first} of {architecture.name}{more} is in no weight file; the checkpoint is not whole")
    if architecture is not None and architecture.misshapen:
        name, shape = next(iter(architecture.misshapen.items()))
        raise SourceError(
            f"{checkpoint.origin}: {name}{_and_more(architecture.misshapen)} has the shape {list(checkpoint.tensors[name].shape)}, and the "
            f"model that config.json describes wants {list(shape)}; weights and config.json are not of one model"
        )
    # Of targets that differ in their codes alone one graph is traced.
    graph = cache(partial(trace, checkpoint, trust_remote_code=recipe.trust_remote_code))
    targets = tuple(_plan_target(recipe, i, target, checkpoint, architecture, machine, graph) for i, target in enumerate(recipe.targets))
    return Plan(recipe, checkpoint, architecture, targets)


def _and_more(found: Sized) -> str:
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


def _plan_target(
    recipe: Recipe,
    index: int,
    target: Target,
    checkpoint: Checkpoint,
    architecture: Architecture | None,
    machine: str | None,
    graph: Callable[..., tuple[Traced, ...]],
) -> TargetPlan:
    """``graph``: traces the model, in a ``dtype``."""
    for i, runtime in enumerate(target.runtimes):
        if target.format not in RUNTIMES[runtime].formats:
            raise RecipeError(
                f"{recipe.where('targets', index, 'runtimes', i)}: {runtime} does not load {target.format}; "
                f"it loads {', '.join(RUNTIMES[runtime].formats)}"
            )
    predicts = architecture is None or architecture.predicts
    for limit in sorted(target.limits.model_fields_set - set(applicable(predicts=predicts))):
        raise RecipeError(
            f"{recipe.where('targets', index, 'limits', limit)}: {checkpoint.origin} predicts {'tokens' if predicts else 'no tokens'}, "
            f"so it has no {limit}; its limits are {', '.join(applicable(predicts=predicts))}"
        )
    dtype = _model_dtype(recipe, checkpoint) if target.format not in GRAPHS else from_torch_name(target.options.floats or "float32")
    parameters = {name: _parameter(spec, architecture) for name, spec in checkpoint.tensors.items()}
    if target.format in GRAPHS:
        parameters = {name: _untied(parameter, checkpoint.tensors[name], architecture) for name, parameter in parameters.items()}
    traced: tuple[Traced, ...] = ()
    if target.format in GRAPHS and architecture is not None and (architecture.encoder_decoder or not architecture.predicts):
        traced = _traced(recipe, index, target, graph, dtype)
        read = frozenset[str]().union(*(one.tensors for one in traced))
        parameters = {
            name: parameter if name in read or parameter.kind == "unused" else Parameter(parameter.modules, "unread")
            for name, parameter in parameters.items()
        }
    claims = _claim(recipe, index, target, checkpoint, parameters, architecture)
    entries = tuple(
        _enter(recipe, index, target, spec, parameters[name], claims.get(name), recipe.dtype, checkpoint, dtype, architecture)
        for name, spec in checkpoint.tensors.items()
    )
    if len(traced) > 1:
        shared = frozenset.intersection(*(one.tensors for one in traced))
        entries = tuple(_copied(entry) if entry.tensor.name in shared else entry for entry in entries)
    entries = _together(entries, architecture)
    _require_loadable(recipe, index, target, entries, claims, architecture)
    _require_biases(recipe, index, target, claims, checkpoint)
    _require_halvable(recipe, index, target, entries, claims)
    _require_predictions(recipe, index, target, predicts=predicts)
    entries += _cache_entries(recipe, index, target, architecture, checkpoint, dtype)
    specs = [spec for entry in entries for spec in entry.outputs]
    doubled = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if doubled:
        raise SourceError(f"{checkpoint.origin}: {doubled[0]} would be written twice; the source already has a tensor of that name")
    layers = [layer for entry in entries if entry.scheme for layer in entry.layers()]
    quantized = {name for layer in layers for name in (layer.module, layer.stored)}
    linears = architecture.linears if architecture else [part.module for p in parameters.values() for part in p.parts]
    contents = Contents(
        layers=layers,
        kept=[module for module in dict.fromkeys((*linears, *_stored_names(entries))) if module not in quantized],
        dtype=dtype,
        cache=target.kv_cache,
        attentions=(architecture.attentions if architecture else None) or (),
        replaceable=architecture.replaceable if architecture else None,
        skipped=architecture.skipped if architecture else (),
        options=target.options.model_dump(exclude_none=True),
        kept_experts=tuple(dict.fromkeys(entry.experts for entry in entries if entry.experts and not entry.scheme) if layers else ()),
    )
    try:
        files = _plan_files(recipe, target, checkpoint, entries, specs, contents, traced)
    except FormatError as error:
        raise RecipeError(f"{recipe.where('targets', index)}: {error}") from None
    return TargetPlan(
        name=target.name,
        format=target.format,
        entries=entries,
        shards=files.shards,
        config=files.config,
        files=files.texts,
        dtype=dtype,
        runtimes=target.runtimes,
        bounds=target.bounds(),
        contents=contents,
        dropped=_dropped(checkpoint, entries, contents),
        cautions=_cautions(recipe, index, target, layers, {entry.experts for entry in entries if entry.reading == "linear"}, machine),
    )


def _traced(recipe: Recipe, index: int, target: Target, graph: Callable[..., tuple[Traced, ...]], dtype: str) -> tuple[Traced, ...]:
    """The graphs of a model that is no decoder. Raises :class:`RecipeError` where there are none, or where the target asks for what only
    decoders have."""
    for i, runtime in enumerate(target.runtimes):
        if RUNTIMES[runtime].decoders_only:
            raise RecipeError(f"{recipe.where('targets', index, 'runtimes', i)}: {runtime} runs decoders only, and the model is none")
    for option in ("attention", "tied_embedding"):
        if getattr(target.options, option) not in (None, "standard", "float"):
            raise RecipeError(f"{recipe.where('targets', index, 'options', option)}: for decoders only, and the model is none")
    try:
        return graph(dtype=dtype)
    except FormatError as error:
        raise RecipeError(f"{recipe.where('targets', index)}: {error}") from None


def _plan_files(
    recipe: Recipe,
    target: Target,
    checkpoint: Checkpoint,
    entries: Sequence[Entry],
    specs: Sequence[TensorSpec],
    contents: Contents,
    traced: Sequence[Traced],
) -> Files:
    """Weight files, ``config.json`` and what lies beside it. Raises :class:`FormatError` where the format cannot say it."""
    form, config = FORMATS[target.format], checkpoint.config
    if target.options.tied_embedding == "shared" and not any(_is_tied(entry) and entry.scheme for entry in entries):
        raise FormatError("tied_embedding: shared, but no head that is tied is quantized; leave it out, or name lm_head in a rule")
    if target.format in GRAPHS:
        digest = hashlib.sha256(json.dumps(recipe.resolved(), sort_keys=True).encode()).hexdigest()
        provenance = {
            "format": target.format,
            "recipe_sha256": digest,
            "source": {"origin": checkpoint.origin, "commit": checkpoint.commit},
        }
        blocks, limit = target.format == "onnx-matmulnbits", target.max_shard_size
        halves = target.options.inputs == "int8x2"
        if traced:
            files = plan_traced(
                traced,
                lambda one: _placed([entry for entry in entries if entry.tensor.name in one.tensors], one, blocks=blocks),
                lambda one: _read_by(one, entries),
                halves=halves,
                max_file_bytes=limit,
                provenance=provenance,
            )
        else:
            files = plan_decoder(
                config,
                _stored(entries, blocks=blocks),
                specs,
                dtype=contents.dtype,
                attention=target.options.attention or "standard",
                halves=halves,
                max_file_bytes=limit,
                provenance=provenance,
            )
        return replace(files, config={**spell(config, contents.dtype, None), **files.config})
    quantization = form.config(contents) if contents.layers or contents.cache else None
    shards = lay_out(specs, form.metadata(specs, contents), target.max_shard_size)
    index = index_json(shards)
    texts = {**form.side_files(contents), **({"model.safetensors.index.json": index} if index else {})}
    return Files(shards, texts, spell(config, contents.dtype, quantization))


def _stored(entries: Iterable[Entry], *, blocks: bool) -> dict[str, Stored]:
    """By every name that the model has for a parameter, what is stored of it; ``blocks``: codes lie as MatMulNBits reads them."""
    found: dict[str, Stored] = {}
    for entry in entries:
        last = entry.tensor.name.rpartition(".")[2]
        if entry.scheme is None:
            found |= {f"{module}.{last}": _stored_plain(entry) for module in entry.modules if entry.outputs}
            continue
        for module, part in zip(entry.modules, entry.parts, strict=False):
            found[f"{module}.weight"] = _stored_codes(entry, part, blocks=blocks)
        if _is_tied(entry):
            own = Stored(entry.beside.name) if entry.beside else found[f"{entry.modules[0]}.weight"]
            found |= {f"{module}.weight": own for module in entry.modules[1:]}
    return found


def _copied(entry: Entry) -> Entry:
    """A tensor that both graphs of an encoder-decoder read, each from files of its own. Of a tied head the encoder reads the embedding."""
    copied = [entry.beside] if entry.beside else entry.outputs
    copies = {spec.name: f"{ENCODER}.{spec.name}" for spec in copied}
    return replace(entry, copies=copies, outputs=(*entry.outputs, *(replace(spec, name=copies[spec.name]) for spec in copied)))


def _read_by(traced: Traced, entries: Iterable[Entry]) -> list[TensorSpec]:
    """What of the outputs lies in the files of a graph."""
    found: list[TensorSpec] = []
    for entry in entries:
        if entry.tensor.name in traced.tensors:
            own = set(entry.copies.values())
            found += [spec for spec in entry.outputs if not own or (spec.name in own) == (traced.name == ENCODER)]
    return found


def _placed(entries: Iterable[Entry], traced: Traced, *, blocks: bool) -> dict[str, Placed]:
    """By tensor of the checkpoint, what a traced graph finds of it."""
    found: dict[str, Placed] = {}
    for entry in entries:
        columns = any(part.columns for part in entry.parts)
        beside = Stored(entry.beside.name) if entry.beside else None
        if entry.scheme is None:
            there = Placed(_stored_plain(entry), _stored_plain(entry), columns)
        else:
            there = Placed(_stored_codes(entry, entry.parts[0], blocks=blocks), beside, columns)
        if entry.copies and traced.name == ENCODER:
            there = Placed(beside, beside, columns) if beside else there
            plain = replace(there.plain, name=entry.copies[there.plain.name]) if there.plain else None
            there = Placed(_copy_of(there.product, entry.copies), plain, columns)
        found[entry.tensor.name] = there
    return found


def _copy_of(stored: Stored, copies: Mapping[str, str]) -> Stored:
    return replace(stored, name=copies[stored.name], scale=copies.get(stored.scale, stored.scale))


def _stored_plain(entry: Entry) -> Stored:
    return Stored(entry.plain.name, transposed=entry.transposed)


def _stored_codes(entry: Entry, part: Part, *, blocks: bool) -> Stored:
    assert entry.scheme is not None
    return Stored(
        f"{part.module}.weight",
        entry.scheme,
        LayerNames.of(f"{part.module}.weight").scale,
        f"{part.module}.input_scale",
        block_size(entry.scheme) if blocks else 0,
        part.shape(entry.tensor)[1],
    )


def _cautions(
    recipe: Recipe, index: int, target: Target, layers: Sequence[QuantizedLayer], apart: Set[str], machine: str | None
) -> tuple[str, ...]:
    """What the compatibility table says of each runtime the target names; an error for one that cannot load it. ``apart``: experts that
    become Linear modules where others are merged."""
    found: list[str] = []
    for i, runtime in enumerate(target.runtimes):
        parts = parts_of(layers, apart=() if RUNTIMES[runtime].merges is None else apart)
        judgement = judge(runtime, target.format, parts, hardware=target.hardware, machine=machine)
        if judgement.refusal:
            raise RecipeError(f"{recipe.where('targets', index, 'runtimes', i)}: {judgement.refusal}")
        found += judgement.warnings
    if target.options.inputs == "int8x2" and "openvino" in target.runtimes:
        found.append(
            "openvino computes products of two codes as floats: the same numbers, and neither memory nor speed is won (seen: 2026.4.1)"
        )
    return tuple(found)


def _stored_names(entries: Iterable[Entry]) -> Iterator[str]:
    """Layers and routers under the model's name and the checkpoint's: readers go by the one or by the other, and to some a router is a
    linear layer."""
    for entry in entries:
        if entry.kind == "router":
            yield entry.tensor.name.removesuffix(".weight")
        elif entry.kind in ("linear", "head") and len(entry.modules) == 1:
            yield from (part.module for part in entry.parts)
        elif entry.kind == "unused" and len(entry.tensor.shape) == 2 and entry.tensor.name.endswith(".weight") and entry.outputs:
            # Layers that predict more than one token ahead: transformers does not build them, and vLLM does.
            yield entry.tensor.name.removesuffix(".weight")


def _dropped(checkpoint: Checkpoint, entries: Iterable[Entry], contents: Contents) -> tuple[str, ...]:
    entries = list(entries)
    kept = {
        checkpoint.coded[entry.tensor.name].input_scale
        for entry in entries
        if entry.scheme and entry.tensor.name in checkpoint.coded and takes_input_scale(checkpoint.coded[entry.tensor.name], entry)
    }
    if any(entry.kind == "cache" and entry.note.startswith(TAKEN_OVER) for entry in entries):
        kept |= {name for pair in cache_sources(checkpoint, contents.attentions, contents.cache).values() for name in pair}
    inputs = [coded.input_scale for coded in checkpoint.coded.values() if coded.input_scale]
    return tuple(name for name in (*inputs, *checkpoint.cache_scales) if name not in kept)


def takes_input_scale(coded: Coded, entry: Entry) -> bool:
    """Whether the source's scale of a static input is that of the target: of codes that are only spelled anew, on the same grid."""
    wanted = entry.scheme.activation if entry.scheme else None
    if entry.algorithm != RESPELL or coded.input_scale is None or coded.activation is None or wanted is None:
        return False
    return (coded.activation.grid, coded.activation.tile, coded.activation.symmetric, coded.activation.dynamic) == (
        wanted.grid,
        wanted.tile,
        wanted.symmetric,
        False,
    ) and not wanted.dynamic


def lacks_cache(checkpoint: Checkpoint, target: TargetPlan) -> bool:
    """Whether a target wants scales of keys and values that the source does not have."""
    contents = target.contents
    return contents.cache is not None and not cache_sources(checkpoint, contents.attentions, contents.cache)


def cache_sources(checkpoint: Checkpoint, attentions: Iterable[Attention], cache: str | None) -> dict[str, tuple[str, str]]:
    """By attention module, the source's tensors of the scales of its keys and values; empty unless every attention has both, of the
    quantization that is wanted. ``k_proj.k_scale`` is ModelOpt's name for them."""
    if cache is None or checkpoint.cache is None:
        return {}
    if (checkpoint.cache.grid, checkpoint.cache.tile, checkpoint.cache.symmetric) != (CACHES[cache].grid, CACHES[cache].tile, True):
        return {}
    found = {}
    for attention in attentions:
        names = tuple(
            next(
                (
                    name
                    for name in (f"{attention.module}.{x}_scale", f"{attention.module}.{x}_proj.{x}_scale")
                    if name in checkpoint.cache_scales
                ),
                "",
            )
            for x in "kv"
        )
        count = attention.heads if CACHES[cache].tile.rows == 1 else 1
        if not all(name and checkpoint.cache_scales[name].elements == count for name in names):
            return {}
        found[attention.module] = (names[0], names[1])
    return found


def _will_round(entry: Entry, dtype: str) -> bool:
    """Whether a reader that keeps scales in ``dtype`` changes those of the source."""
    assert entry.scheme is not None
    return entry.scheme.weight.scale == "model" and entry.scale_dtype != dtype and DTYPES[dtype].bits < 32


def _cache_entries(
    recipe: Recipe, index: int, target: Target, architecture: Architecture | None, checkpoint: Checkpoint, dtype: str
) -> tuple[Entry, ...]:
    """The scales of keys and values, which no tensor of the source becomes."""
    if target.kv_cache is None:
        return ()
    where = recipe.where("targets", index, "kv_cache")
    if architecture is None or not architecture.attentions:
        raise RecipeError(f"{where}: no attention of this model was seen to write to the cache; leave kv_cache out")
    found: list[Entry] = []
    sources = cache_sources(checkpoint, architecture.attentions, target.kv_cache)
    note = "calibrated anew (the source's own scales are dropped)" if checkpoint.cache_scales else ""
    if sources:
        note, dtype = f"{TAKEN_OVER} (the source's own scale)", checkpoint.cache_scales[next(iter(sources.values()))[0]].dtype
    for attention in architecture.attentions:
        specs = FORMATS[target.format].cache_tensors(attention, target.kv_cache, dtype)
        if specs is None:
            raise RecipeError(f"{where}: {target.format} has no place for scales of a kv_cache in {target.kv_cache}; leave it out")
        found += (
            Entry(
                spec,
                spec,
                (attention.module,),
                "cache",
                (),
                None,
                None,
                PurePosixPath(where).name,
                f"the scale of its {what}",
                (spec,),
                note=note,
            )
            for spec, what in zip(specs, ("keys", "values"), strict=True)
        )
    return tuple(found)


def _claim(
    recipe: Recipe,
    index: int,
    target: Target,
    checkpoint: Checkpoint,
    parameters: Mapping[str, Parameter],
    architecture: Architecture | None,
) -> dict[str, tuple[Rule, str]]:
    """Which rule decides which tensor; an error for a rule that decides none."""
    claims: dict[str, tuple[Rule, str]] = {}
    for i, rule in enumerate(target.rules):
        where = recipe.where("targets", index, "rules", i) if "rules" in target.model_fields_set else "default rule:"
        matched = [name for name, parameter in parameters.items() if _matches(rule.match, name, parameter, where)]
        fresh = [name for name in matched if name not in claims]
        if not matched:
            near = _suggest(rule.match, parameters, known=architecture is not None)
            raise RecipeError(f"{where}: {rule.match!r} matches nothing in {checkpoint.origin}{near}")
        if not fresh:
            first = claims[matched[0]][1]
            raise RecipeError(
                f"{where}: {rule.match!r} matches {len(matched)} tensor(s), all taken by earlier rules (the first: {first}); move it up"
            )
        position = PurePosixPath(where).name
        claims |= dict.fromkeys(fresh, (rule, f"{position} {rule.match}"))
    return claims


def _enter(
    recipe: Recipe,
    index: int,
    target: Target,
    spec: TensorSpec,
    parameter: Parameter,
    claim: tuple[Rule, str] | None,
    wanted: str,
    checkpoint: Checkpoint,
    dtype: str,
    architecture: Architecture | None,
) -> Entry:
    rule, label = claim or (None, "default")
    coded = checkpoint.coded.get(spec.name)
    plain = TensorSpec(spec.name, _float_dtype(spec.dtype, wanted, checkpoint), spec.shape)
    kept = Entry(
        spec,
        plain,
        parameter.modules,
        parameter.kind,
        parameter.parts,
        None,
        None,
        label,
        (rule.why or "") if rule else _KEEP_WHY[parameter.kind],
        (plain,),
        note=f"{DEQUANTIZED} ({coded.description})" if coded else "",
        turned=checkpoint.turned.get(spec.name, ""),
        experts=parameter.experts,
        reading=parameter.reading,
        alone_nats=next((target.alone[module] for module in parameter.modules if module in target.alone), None) if target.alone else None,
    )
    if target.format in GRAPHS:
        kept = _as_initializer(kept, dtype)
    if rule is None or rule.scheme is None:
        return kept
    scheme = SCHEMES[rule.scheme]
    if scheme.lookup and parameter.kind == "embedding":
        parameter = replace(parameter, parts=whole(spec, spec.name.removesuffix(".weight")))
        kept = replace(kept, parts=parameter.parts)
    # What a GGUF file holds is floats to all that comes, as everywhere here.
    first = next((name for name, found in checkpoint.coded.items() if found.quantization is not None), None)
    if first and any(step.recover for step in rule.algorithm):
        raise RecipeError(
            f"{_position(recipe, index, rule, label)}: recover teaches a model to predict what its source predicts in 16 bit, and this "
            f"source is quantized already ({first}: {checkpoint.coded[first].description}): what it lost cannot come back from itself. "
            "Take the 16-bit model it was made from; fine-tune that first, if you want to; then convert it, with recover behind the other "
            "algorithms: quantization comes last"
        )
    refusal = _refusal(spec, parameter, scheme, target) or _unsolvable(parameter, rule, architecture)
    if refusal:
        raise RecipeError(f"{_position(recipe, index, rule, label)}: {spec.name} cannot be {scheme.name}: {refusal}")
    beside = kept.plain if _is_tied(parameter) and target.options.tied_embedding != "shared" else None
    # Scales are rounded to the dtype of the source's floats whatever the target, so that all targets have the same codes.
    if target.format in GRAPHS and dtype != "F16":
        dtype = _model_dtype(recipe, checkpoint)
    steps, algorithm, scale_dtype, note = rule.algorithm, "+".join(step.name for step in rule.algorithm), dtype, ""
    if coded is not None:
        note = f"{REQUANTIZED} ({coded.description})"
        if coded.quantization is not None and respellable(coded.quantization, scheme.weight, parameter.parts):
            steps, algorithm, note = (), RESPELL, f"{RESPELLED} ({coded.description})"
            # A power of two is exact in every float but float16, whose exponents are too few.
            scale_dtype = coded.scale_dtype if coded.scale_dtype in FLOATS else "F32" if dtype == "F16" else dtype
    layers = [
        FORMATS[target.format].layer_tensors(TensorSpec(f"{part.module}.weight", scale_dtype, part.shape(spec)), scheme)
        for part in parameter.parts
    ]
    return replace(
        kept,
        scheme=scheme,
        algorithm=algorithm,
        why=rule.why or "",
        outputs=(*(output for layer in layers for output in layer), *([beside] if beside else [])),
        scale_dtype=scale_dtype,
        note=note,
        steps=steps,
        beside=beside,
        transposed=any(layer.columns for layer in layers),
        observer=_observer(rule),
    )


def _untied(parameter: Parameter, spec: TensorSpec, architecture: Architecture | None) -> Parameter:
    """A tied head first and under its own name, because its codes and the embedding's rows are two tensors in a graph."""
    if not _is_tied(parameter) or architecture is None or architecture.head is None:
        return parameter
    others = [module for module in parameter.modules if module != architecture.head]
    return replace(parameter, modules=(architecture.head, *others), parts=whole(spec, architecture.head))


def _is_tied(parameter: Parameter | Entry) -> bool:
    return parameter.kind == "head" and len(parameter.modules) > 1


def _as_initializer(kept: Entry, dtype: str) -> Entry:
    """A tensor that is kept, as a graph has it: in its float dtype, a linear layer's weight (in, out), and nothing that no layer reads."""
    if kept.kind in ("unused", "unread"):
        return replace(kept, outputs=())
    transposed = kept.kind in ("linear", "head", "router") and len(kept.modules) == 1 and bool(kept.parts) and not kept.parts[0].columns
    shape = kept.tensor.shape[::-1] if transposed else kept.tensor.shape
    plain = TensorSpec(kept.tensor.name, dtype if kept.tensor.dtype in FLOATS else kept.tensor.dtype, shape)
    return replace(kept, plain=plain, outputs=(plain,), transposed=transposed)


def _observer(rule: Rule) -> str:
    if not SCHEMES[str(rule.scheme)].static:
        return ""
    return f"percentile {rule.percentile or 99.999:g}" if rule.observer == "percentile" else rule.observer or "absmax"


def _position(recipe: Recipe, index: int, rule: Rule, label: str) -> str:
    rules = recipe.targets[index].rules
    return next((recipe.where("targets", index, "rules", i) for i, known in enumerate(rules) if known is rule), label)


def _require_loadable(
    recipe: Recipe,
    index: int,
    target: Target,
    entries: Iterable[Entry],
    claims: Mapping[str, tuple[Rule, str]],
    architecture: Architecture | None,
) -> None:
    """What a runtime of the target asks of layers together. Raises :class:`RecipeError` where layers that become one do not have one
    scheme, or none of them one, and where layers that are kept would be looked for as codes, or codes where none are looked for."""
    fates = {entry.module(part): entry for entry in entries for part in entry.parts}
    quantized = [entry for entry in fates.values() if entry.scheme]
    merged = [module for module, entry in fates.items() if entry.reading == "merged"]

    def where(*found: Entry) -> str:
        return next(_position(recipe, index, *claims[entry.tensor.name]) for entry in found if entry.tensor.name in claims)

    for name in target.runtimes if quantized else ():
        runtime = RUNTIMES[name]
        together = [(merged, "reads all experts of a model in one way")] if runtime.merges else []
        together += [(group, "makes them one layer") for group in fused(architecture, fates)] if runtime.fuses else []
        for modules, why in together:
            schemes = Counter(_fate(fates[module]) for module in modules)
            if len(schemes) > 1:
                odd = next(module for module in modules if _fate(fates[module]) == schemes.most_common()[-1][0])
                other = next(module for module in modules if _fate(fates[module]) != _fate(fates[odd]))
                raise RecipeError(
                    f"{where(fates[odd], fates[other])}: {odd} is {_fate(fates[odd])} where {other} is {_fate(fates[other])}, "
                    f"and {name} {why}; give all {len(modules)} of them one scheme, or keep all"
                )
        if runtime.merges is None:
            continue
        whole = next((entry for entry in fates.values() if entry.reading == "linear" and not entry.scheme), None)
        if whole is not None:
            raise RecipeError(
                f"{where(whole, quantized[0])}: {whole.tensor.name} is kept, and in a model of which anything is quantized {name} looks "
                "for its experts one by one; quantize the experts too, or nothing"
            )
        hidden = next((entry for entry in quantized if _is_hidden(entry, architecture)), None)
        if hidden is not None:
            raise RecipeError(
                f"{where(hidden)}: {hidden.tensor.name} cannot be {_fate(hidden)}: in {name} its layer is a Linear with arithmetic of "
                "its own, which does not find packed codes; use a scheme with 8-bit activations, or FP8"
            )
        reached = next((entry for entry in quantized if _is_packed(entry) and entry.modules[0] in _begun_outside(architecture)), None)
        if reached is not None:
            raise RecipeError(
                f"{where(reached)}: {reached.tensor.name} cannot be {_fate(reached)}: while {name} loads this model it asks the layer for "
                "a weight, and one of packed codes has none (AttributeError); use a scheme with 8-bit activations, or FP8"
            )
        integers = next((entry for entry in quantized if entry.scheme and entry.scheme.weight.grid.kind == "int"), None)
        kept = next((module for module in merged if not fates[module].scheme and len(fates[module].parts) == 1), None)
        if runtime.merges and integers is not None and kept is not None:
            raise RecipeError(
                f"{where(integers)}: {name} would read {kept}, which is kept, as the codes that {integers.modules[0]} has; quantize the "
                f"experts too (one of {', '.join(sorted(runtime.merges))}), or the other layers in FP8"
            )


def _require_halvable(recipe: Recipe, index: int, target: Target, entries: Iterable[Entry], claims: Mapping[str, tuple[Rule, str]]) -> None:
    """Raises :class:`RecipeError` where inputs of products of weights alone shall be two codes, and there is no such product, or one whose
    sums have more scales than one a channel, or a runtime that has none for such codes."""
    if target.options.inputs != "int8x2":
        return
    where = recipe.where("targets", index, "options", "inputs")
    alone = [entry for entry in entries if entry.scheme and entry.scheme.activation is None and not entry.scheme.lookup]
    odd = next((entry for entry in alone if entry.scheme and not entry.scheme.halvable), None)
    if odd is not None:
        raise RecipeError(
            f"{_position(recipe, index, *claims[odd.tensor.name])}: {odd.tensor.name} is {_fate(odd)}, and inputs: int8x2 is for products "
            "with one scale a channel; use int8-weight-only, or leave inputs out"
        )
    if not alone:
        raise RecipeError(f"{where}: no layer has INT8 weights alone, so there are no inputs to be two codes; leave it out")
    if "onnxruntime-gpu" in target.runtimes:
        raise RecipeError(
            f"{where}: int8x2 is for a CPU; onnxruntime-gpu has no MatMulInteger for unsigned codes on CUDA, and would multiply on the host"
        )


def _require_biases(recipe: Recipe, index: int, target: Target, claims: Mapping[str, tuple[Rule, str]], checkpoint: Checkpoint) -> None:
    """Raises :class:`RecipeError` for a rule that corrects biases of layers of which none has one."""
    for rule in target.rules:
        claimed = [name for name, (claimant, _) in claims.items() if claimant is rule]
        corrects = rule.scheme and any(step.bias_correction for step in rule.algorithm)
        if corrects and not any(f"{name.removesuffix('.weight')}.bias" in checkpoint.tensors for name in claimed):
            label = claims[claimed[0]][1]
            raise RecipeError(f"{_position(recipe, index, rule, label)}: bias_correction: none of the {len(claimed)} layers has a bias")


def _require_predictions(recipe: Recipe, index: int, target: Target, *, predicts: bool) -> None:
    """Raises :class:`RecipeError` where predictions are to be taught, and the model makes none."""
    for i, rule in enumerate(target.rules):
        if not predicts and any(step.recover and step.recover.mode == "logits" for step in rule.algorithm):
            where = recipe.where("targets", index, "rules", i)
            raise RecipeError(f"{where}: the model predicts no tokens, so recover has no logits to go by; set mode: blocks")


def _fate(entry: Entry) -> str:
    return entry.scheme.name if entry.scheme else "kept"


def fused(architecture: Architecture | None, fates: Mapping[str, Entry]) -> list[list[str]]:
    """Layers that a runtime may make into one: all experts of a layer; and of one parent those that were seen to read the same input (q, k
    and v, or gate and up, but no MLP beside an attention)."""
    experts: dict[str, list[str]] = {}
    for module, entry in fates.items():
        if entry.experts:
            experts.setdefault(entry.experts, []).append(module)
    found = list(experts.values())
    for group in (architecture.groups if architecture else None) or ():
        by_parent: dict[str, list[str]] = {}
        for module in group:
            if module in fates:
                by_parent.setdefault(module.rpartition(".")[0], []).append(module)
        found += by_parent.values()
    return found


def _together(entries: Sequence[Entry], architecture: Architecture | None) -> tuple[Entry, ...]:
    """Gives one scale to all weights with one scale each that a runtime makes one layer (q, k, v; gate, up), if they are quantized alike.

    vLLM gives such a layer the largest of their scales and rounds the codes of the others anew, which cost the sample 0.006 nats; under one
    scale nothing moves. A float grid has room below: what is smaller keeps its mantissa down to 2**-15 of the largest. Integers would not,
    but have no scheme with one scale a weight. Experts, and scales that are searched or trained, keep their own.
    """
    fates = {entry.module(entry.parts[0]): entry for entry in entries if _has_one_scale(entry)}
    alongside: dict[str, tuple[str, ...]] = {}
    for modules in fused(architecture, fates):
        alike: dict[tuple[Any, ...], list[str]] = {}
        for entry in (fates[module] for module in modules):
            alike.setdefault((entry.scheme, entry.steps, entry.scale_dtype), []).append(entry.tensor.name)
        alongside |= {name: tuple(names) for names in alike.values() if len(names) > 1 for name in names}
    return tuple(replace(entry, alongside=alongside[name]) if (name := entry.tensor.name) in alongside else entry for entry in entries)


def _has_one_scale(entry: Entry) -> bool:
    """Whether it is one linear layer, whose weight has one scale that its largest magnitude makes."""
    if entry.scheme is None or entry.experts or entry.algorithm == RESPELL or len(entry.parts) != 1 or entry.parts[0].columns:
        return False
    searched = any((step.rtn and step.rtn.clip) or (step.gptq and step.gptq.clip) or step.recover for step in entry.steps)
    return entry.scheme.weight.tile == PER_TENSOR and entry.scheme.weight.grid.kind == "float" and not searched


def _is_hidden(entry: Entry, architecture: Architecture | None) -> bool:
    """Whether a module that is not torch's own Linear would look for its weight under a name that the artifact does not have."""
    if architecture is None or entry.kind != "linear" or entry.modules[0] in architecture.replaceable:
        return False
    return _is_packed(entry)


def _is_packed(entry: Entry) -> bool:
    """Whether its codes lie under another name than the weight."""
    return not any(output.name.endswith(".weight") for output in entry.outputs)


def _begun_outside(architecture: Architecture | None) -> frozenset[str]:
    return architecture.begun_outside if architecture else frozenset()


def respellable(existing: Quantization, wanted: Quantization, parts: Iterable[Part]) -> bool:
    """Whether codes that exist can stay as they are under the scales that are wanted: the same grid, each tile the same or cut out of a
    larger one along a whole axis (a scale for all rows is repeated for each), every part beginning where a tile does, and scales that
    can be had from the other's: magnitudes divided by 127, powers of two as floats, but no powers of two from any others."""
    tile = wanted.tile
    if existing.grid != wanted.grid or existing.tile.rows not in (None, tile.rows) or existing.tile.columns not in (None, tile.columns):
        return False
    if wanted.scale == "F8_E8M0" and existing.scale != "F8_E8M0":
        return False
    return all(part.start % (existing.tile.rows or 1) == 0 for part in parts)


def _refusal(spec: TensorSpec, parameter: Parameter, scheme: Scheme, target: Target) -> str | None:
    if _is_tied(parameter) and target.format not in GRAPHS:
        return f"it is also {parameter.modules[0]}, and an embedding cannot hold codes; keep it, or untie the head first"
    if scheme.lookup and parameter.kind != "embedding":
        return "it is no table of embeddings of its own"
    allowed = ("linear", "head", "expert", "unknown", *(["embedding"] if scheme.lookup else []))
    if parameter.kind not in allowed and not (parameter.kind == "router" and parameter.parts):
        hint = "; int8-lookup is for tables in graphs" if parameter.kind == "embedding" else ""
        return f"it is not the weight of a linear layer ({_KEEP_WHY[parameter.kind]}{hint})"
    if parameter.kind == "expert" and (refused := _refused_expert(parameter, scheme, target)):
        return refused
    if not parameter.parts or spec.elements == 0:
        return f"no linear layer was found in it, of shape {list(spec.shape)}"
    if spec.dtype not in FLOATS:
        return f"it is stored as {spec.dtype}, and only {', '.join(FLOATS)} can be quantized"
    for part in parameter.parts:
        refused = FORMATS[target.format].refusal(
            scheme, part.shape(spec), transposed=part.columns is not None and parameter.kind != "expert"
        )
        if refused:
            return refused
    return None


def _unsolvable(parameter: Parameter, rule: Rule, architecture: Architecture | None) -> str | None:
    """Why no calibrated algorithm can choose its codes."""
    if parameter.kind == "expert" and rule.observer not in (None, "absmax"):
        return f"observer {rule.observer} does not see what goes into one expert; use absmax for experts"
    if parameter.kind == "expert" and any(step.bias_correction for step in rule.algorithm):
        return "an expert has no bias of its own to correct; leave bias_correction out"
    if any(step.recover for step in rule.algorithm) and (refused := _untrainable(parameter, SCHEMES[str(rule.scheme)])):
        return refused
    if architecture is not None and architecture.encoder_decoder and (calibrated(rule.algorithm) or SCHEMES[str(rule.scheme)].static):
        return (
            "calibration gives a model text to read, and this one writes beside it; take weights alone or dynamic inputs, and rtn, for "
            "encoder-decoders"
        )
    if not calibrated(rule.algorithm):
        return None
    name = next(step.name for step in rule.algorithm if calibrated([step]))
    if SCHEMES[str(rule.scheme)].weight.scale == "absmax":
        return f"LLM.int8() rounds to nearest, by its definition; leave {name} out"
    if architecture is None or not architecture.blocks:
        return f"{name} runs the model block by block, and no blocks were found in it"
    if not any(module.startswith(f"{block}.") for block in architecture.blocks for module in parameter.modules):
        return f"{name} works block by block, and it lies in none; use rtn"
    return None


def _untrainable(parameter: Parameter, scheme: Scheme) -> str | None:
    if parameter.kind == "expert":
        return "recover does not train experts; give them a rule without it"
    if scheme.weight.scale == "F8_E8M0":
        return f"recover learns scales, and those of {scheme.name} are powers of two; leave it out"
    return None


def _refused_expert(parameter: Parameter, scheme: Scheme, target: Target) -> str | None:
    if not parameter.parts:
        return "no reader of 8-bit experts is known that takes them in the layout of this model; keep them with a rule"
    for name in target.runtimes:
        merges = RUNTIMES[name].merges
        if merges is None or parameter.reading == "linear":
            continue
        if parameter.reading == "unread" or not merges:
            return f"{name} holds the experts of this model as floats only; keep them with a rule, or name another runtime"
        if scheme.name not in merges:
            return (
                f"{name} holds experts as floats, and reads them from {', '.join(sorted(merges))} only; "
                "use one of these, keep them, or name another runtime"
            )
    return None


def _matches(pattern: str, name: str, parameter: Parameter, where: str) -> bool:
    if pattern == "linear":
        return parameter.kind in ("linear", "expert")
    if not name.endswith(".weight") and parameter.kind != "expert":
        return False
    if any(_names(pattern, module, where) for module in (*parameter.modules, name.removesuffix(".weight"))):
        return True
    named = [part.module for part in parameter.parts if _names(pattern, part.module, where)]
    if named and len(named) < len(parameter.parts):
        raise RecipeError(
            f"{where}: {pattern!r} names {named[0]} and not all {len(parameter.parts)} layers that the source has in one tensor, {name}; "
            f"they share their fate, so name {name}"
        )
    return bool(named)


def _names(pattern: str, module: str, where: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.fullmatch(pattern[3:], module) is not None
        except re.error as error:
            raise RecipeError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    if any(sign in pattern for sign in "*?["):
        return fnmatch.fnmatchcase(module, pattern)
    return module == pattern or module.endswith(f".{pattern}")


def _suggest(pattern: str, parameters: Mapping[str, Parameter], *, known: bool) -> str:
    """``known``: transformers knows the architecture."""
    if pattern == "linear" and known:
        return "; none of its tensors is the weight of a linear layer of the model that config.json describes"
    if pattern == "linear":
        return "; transformers does not know this architecture, so rules must name tensors, for instance *.mlp.*"
    modules = {module for parameter in parameters.values() for module in parameter.modules}
    last = {".".join(module.split(".")[-depth:]) for module in modules for depth in (1, 2)}
    close = difflib.get_close_matches(pattern, sorted(modules | last), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _parameter(spec: TensorSpec, architecture: Architecture | None) -> Parameter:
    if architecture is not None:
        return architecture.parameters[spec.name]
    module, _, last = spec.name.rpartition(".")
    if last != "weight" or len(spec.shape) != 2:
        return Parameter((module or spec.name,), "bias" if last == "bias" else "norm" if len(spec.shape) < 2 else "other")
    return Parameter((module,), "unknown", whole(spec, module))


def _model_dtype(recipe: Recipe, checkpoint: Checkpoint) -> str:
    """The safetensors name of the float dtype that most of the artifact's unquantized bytes, and all its scales, are stored in."""
    if recipe.dtype != "source":
        return from_torch_name(recipe.dtype)
    if checkpoint.float_dtype:
        return checkpoint.float_dtype
    weights: Counter[str] = Counter()
    for spec in checkpoint.tensors.values():
        if spec.dtype in FLOATS:
            weights[spec.dtype] += spec.size_bytes
    if not weights:
        raise SourceError(f"{checkpoint.origin}: no tensor of a float dtype, so nothing can be quantized")
    return weights.most_common(1)[0][0]


def _float_dtype(dtype: str, wanted: str, checkpoint: Checkpoint) -> str:
    if dtype not in FLOATS:
        return dtype
    return from_torch_name(wanted) if wanted != "source" else checkpoint.float_dtype or dtype


def summarize(entries: Iterable[Entry]) -> list[tuple[str, int, int, int, str]]:
    """Entries that share a fate, together: (what, tensors, bytes before, bytes after, rule or reason, and what became of the source's
    codes), for a table."""
    rows: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        what = entry.scheme.name if entry.scheme else "keep"
        reason = entry.why or entry.rule
        turned = entry.turned.partition(" (")[0]
        row = rows.setdefault((what, "; ".join(filter(None, (reason, entry.note, turned)))), [0, 0, 0])
        row[0] += 1
        row[1] += entry.plain.size_bytes
        row[2] += entry.size_bytes
    return [(what, count, before, after, reason) for (what, reason), (count, before, after) in rows.items()]
