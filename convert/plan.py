"""The plan: what becomes of every tensor, decided from headers and the config alone. Pure: no weight is read, nothing is written."""

from __future__ import annotations

import difflib
import fnmatch
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any

from convert import __version__
from convert.architecture import Architecture, Parameter, Part, whole
from convert.recipe import HEAD_WHY, Recipe, Rule, Step, Target, calibrated
from convert.runtimes import RUNTIMES
from convert.source import Checkpoint
from formats import FORMATS
from formats.dtypes import FLOATS, from_torch_name
from formats.errors import FormatError, RecipeError, SourceError
from formats.layer import Contents, QuantizedLayer
from formats.model_config import spell
from formats.safetensors import Shard, TensorSpec, index_json, json_bytes, lay_out
from formats.scheme import SCHEMES, Quality, Quantization, Scheme

#: The algorithm that chooses nothing: the source's own codes.
RESPELL = "respell"
CONTEXTS = (2_048, 8_192, 32_768, 131_072)

_KEEP_WHY = {
    "embedding": "an embedding: looked up, not multiplied",
    "norm": "a vector: nothing to win",
    "bias": "a bias: added, not multiplied",
    "head": HEAD_WHY,
    "unused": "no parameter of the architecture",
    "linear": "no rule names it",
    "expert": "no rule names it",
    "other": "not a linear layer",
    "unknown": "no rule names it",
}


@dataclass(frozen=True)
class Entry:
    """The fate of one source tensor in one target: quantized by ``scheme`` and ``algorithm``, or kept because of ``why``.

    ``plain`` is the tensor as it is stored when kept, ``parts`` are the linear layers it holds, ``outputs`` the tensors it becomes on
    disk; ``rule`` is what decided, as ``recipe.yaml:line:column match``. ``scale_dtype`` is the dtype of the model, or that of the
    source's scales where its codes are only spelled anew; ``note`` says what became of codes that the source had. Of kind ``cache`` it
    is a scale that no source tensor becomes, and ``tensor`` the scale itself.
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
    steps: tuple[Step, ...] = ()

    @property
    def coder(self) -> str:
        """What chooses the codes: the last of the algorithms."""
        return str(self.algorithm).rpartition("+")[2]

    @property
    def decision(self) -> str:
        return "quantize" if self.scheme else "add" if self.kind == "cache" else "keep"

    def layers(self) -> list[QuantizedLayer]:
        """The linear layers it is quantized as."""
        scheme = self.scheme.name if self.scheme else ""
        return [QuantizedLayer(part.module, scheme, part.shape(self.tensor), head=self.kind == "head") for part in self.parts]

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
            fate = {"scheme": self.scheme.name, "algorithm": self.algorithm, "parts": parts, **({"options": options} if options else {})}
        return {
            "tensor": self.tensor.name,
            "dtype": self.tensor.dtype,
            "shape": list(self.tensor.shape),
            "module": self.modules[0],
            "decision": self.decision,
            **fate,
            **({"note": self.note} if self.note else {}),
            "rule": self.rule,
            "outputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in self.outputs],
        }


@dataclass(frozen=True)
class TargetPlan:
    """One artifact before it exists: every tensor's fate, every file's header, the finished ``config.json``."""

    name: str
    format: str
    entries: tuple[Entry, ...]
    shards: tuple[Shard, ...]
    config: Mapping[str, Any]
    dtype: str
    runtimes: tuple[str, ...]
    bounds: Quality
    contents: Contents

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

    def texts(self) -> dict[str, bytes]:
        """The files that the plan alone decides: ``config.json``, what the format puts beside it and, for several shards, the index."""
        index = index_json(self.shards)
        return {
            "config.json": json_bytes(dict(self.config)),
            **FORMATS[self.format].side_files(self.contents),
            **({"model.safetensors.index.json": index} if index else {}),
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
        facts = [__version__, self.recipe.resolved(), self.checkpoint.fingerprint()]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def warnings(self) -> list[str]:
        """What a user should know and is no error."""
        found = []
        if self.architecture is None:
            kind = self.checkpoint.config.get("model_type")
            found.append(f"transformers does not know the architecture {kind!r}: only tensors that rules name are quantized")
        elif self.architecture.groups is None:
            found.append(f"{self.architecture.name} could not be run on the meta device: which layers share an input was not observed")
        again = [entry.tensor for target in self.targets for entry in target.quantized if entry.note.startswith("requantized")]
        if again:
            was = self.checkpoint.coded[again[0].name].description
            found.append(
                f"{len(set(again))} tensors are quantized a second time, first {again[0].name} ({was}): errors add up; "
                "convert the model it was made from, if there is one"
            )
        for target in self.targets:
            unnamed = [entry for entry in target.entries if entry.why == _KEEP_WHY["linear"]]
            if unnamed:
                share = sum(entry.tensor.size_bytes for entry in unnamed) / max(self.checkpoint.size_bytes, 1)
                found.append(
                    f"{target.name}: no rule names {len(unnamed)} linear layers ({share:.0%} of the bytes), first {unnamed[0].tensor.name}"
                )
        return found

    def deployment_bytes(self, target: TargetPlan) -> dict[int, int] | None:
        """Weights plus keys and values in 16 bit, for one sequence of each length in :data:`CONTEXTS` that the model allows."""
        if self.architecture is None or self.architecture.cache_bytes_per_token is None:
            return None
        longest = self.architecture.context_length or CONTEXTS[0]
        per_token = self.architecture.cache_bytes_per_token
        return {length: target.weight_bytes + length * per_token for length in CONTEXTS if length <= max(longest, CONTEXTS[0])}


def make_plan(recipe: Recipe, checkpoint: Checkpoint, architecture: Architecture | None) -> Plan:
    """Decides everything. Raises :class:`RecipeError` (naming the recipe's line) or :class:`SourceError`; nothing was written then."""
    if architecture is not None and architecture.missing:
        first, more = architecture.missing[0], len(architecture.missing) - 1
        raise SourceError(
            f"{checkpoint.origin}: {first} of {architecture.name} (and {more} more) is in no weight file; the checkpoint is not whole"
        )
    targets = tuple(_plan_target(recipe, i, target, checkpoint, architecture) for i, target in enumerate(recipe.targets))
    return Plan(recipe, checkpoint, architecture, targets)


def _plan_target(recipe: Recipe, index: int, target: Target, checkpoint: Checkpoint, architecture: Architecture | None) -> TargetPlan:
    for i, runtime in enumerate(target.runtimes):
        if target.format not in RUNTIMES[runtime].formats:
            raise RecipeError(
                f"{recipe.where('targets', index, 'runtimes', i)}: {runtime} does not load {target.format}; "
                f"it loads {', '.join(RUNTIMES[runtime].formats)}"
            )
    dtype = _model_dtype(recipe, checkpoint)
    parameters = {name: _parameter(spec, architecture) for name, spec in checkpoint.tensors.items()}
    claims = _claim(recipe, index, target, checkpoint, parameters)
    entries = tuple(
        _enter(recipe, index, target, spec, parameters[name], claims.get(name), recipe.dtype, checkpoint, dtype, architecture)
        for name, spec in checkpoint.tensors.items()
    )
    entries += _cache_entries(recipe, index, target, architecture, dtype)
    specs = [spec for entry in entries for spec in entry.outputs]
    doubled = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if doubled:
        raise SourceError(f"{checkpoint.origin}: {doubled[0]} would be written twice; the source already has a tensor of that name")
    layers = [layer for entry in entries if entry.scheme for layer in entry.layers()]
    quantized = {layer.module for layer in layers}
    linears = architecture.linears if architecture else [part.module for p in parameters.values() for part in p.parts]
    contents = Contents(
        layers=layers,
        kept=[module for module in linears if module not in quantized],
        dtype=dtype,
        cache=target.kv_cache,
        attentions=(architecture.attentions if architecture else None) or (),
        replaceable=architecture.replaceable if architecture else None,
        skipped=architecture.skipped if architecture else (),
        options=target.options.model_dump(exclude_none=True),
    )
    form = FORMATS[target.format]
    try:
        quantization = form.config(contents) if layers or target.kv_cache else None
    except FormatError as error:
        raise RecipeError(f"{recipe.where('targets', index)}: {error}") from None
    return TargetPlan(
        name=target.name,
        format=target.format,
        entries=entries,
        shards=lay_out(specs, lambda group: form.metadata(group, contents), target.max_shard_size),
        config=spell(checkpoint.config, dtype, quantization),
        dtype=dtype,
        runtimes=target.runtimes,
        bounds=target.bounds(),
        contents=contents,
    )


def _cache_entries(recipe: Recipe, index: int, target: Target, architecture: Architecture | None, dtype: str) -> tuple[Entry, ...]:
    """The scales of keys and values, which no tensor of the source becomes."""
    if target.kv_cache is None:
        return ()
    where = recipe.where("targets", index, "kv_cache")
    if architecture is None or not architecture.attentions:
        raise RecipeError(f"{where}: no attention of this model was seen to write to the cache; leave kv_cache out")
    found: list[Entry] = []
    for attention in architecture.attentions:
        specs = FORMATS[target.format].cache_tensors(attention, target.kv_cache, dtype)
        if specs is None:
            raise RecipeError(f"{where}: {target.format} has no place for scales of a kv_cache in {target.kv_cache}; leave it out")
        found += (
            Entry(spec, spec, (attention.module,), "cache", (), None, None, PurePosixPath(where).name, f"the scale of its {what}", (spec,))
            for spec, what in zip(specs, ("keys", "values"), strict=True)
        )
    return tuple(found)


def _claim(
    recipe: Recipe, index: int, target: Target, checkpoint: Checkpoint, parameters: Mapping[str, Parameter]
) -> dict[str, tuple[Rule, str]]:
    """Which rule decides which tensor; an error for a rule that decides none."""
    claims: dict[str, tuple[Rule, str]] = {}
    for i, rule in enumerate(target.rules):
        where = recipe.where("targets", index, "rules", i) if "rules" in target.model_fields_set else "default rule:"
        matched = [name for name, parameter in parameters.items() if _matches(rule.match, name, parameter, where)]
        fresh = [name for name in matched if name not in claims]
        if not matched:
            raise RecipeError(f"{where}: {rule.match!r} matches nothing in {checkpoint.origin}{_suggest(rule.match, parameters)}")
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
    if rule is None or rule.scheme is None:
        why = (rule.why or "") if rule else _KEEP_WHY[parameter.kind]
        note = f"dequantized ({coded.description})" if coded else ""
        return Entry(spec, plain, parameter.modules, parameter.kind, parameter.parts, None, None, label, why, (plain,), note=note)
    scheme = SCHEMES[rule.scheme]
    position = next((recipe.where("targets", index, "rules", i) for i, known in enumerate(target.rules) if known is rule), label)
    refusal = _refusal(spec, parameter, scheme, target.format) or _unsolvable(parameter, rule, architecture)
    if refusal:
        raise RecipeError(f"{position}: {spec.name} cannot be {scheme.name}: {refusal}")
    steps, algorithm, scale_dtype, note = rule.algorithm, "+".join(step.name for step in rule.algorithm), dtype, ""
    if coded is not None:
        note = f"requantized ({coded.description})"
        if respellable(coded.quantization, scheme.weight):
            steps, algorithm, note = (), RESPELL, f"respelled ({coded.description})"
            scale_dtype = coded.scale_dtype if coded.scale_dtype in FLOATS else dtype
    outputs = tuple(
        output
        for part in parameter.parts
        for output in FORMATS[target.format].layer_tensors(TensorSpec(f"{part.module}.weight", scale_dtype, part.shape(spec)), scheme)
    )
    return Entry(
        spec,
        plain,
        parameter.modules,
        parameter.kind,
        parameter.parts,
        scheme,
        algorithm,
        label,
        "",
        outputs,
        scale_dtype=scale_dtype,
        note=note,
        steps=steps,
    )


def respellable(existing: Quantization | None, wanted: Quantization) -> bool:
    """Whether codes that exist are those that are wanted, so that only their spelling changes: the same grid and tiles, and scales that can
    be had from the other's (the largest magnitude is a scale times 127)."""
    if existing is None or (existing.grid, existing.tile) != (wanted.grid, wanted.tile):
        return False
    return (existing.scale == "F8_E8M0") == (wanted.scale == "F8_E8M0")


def _refusal(spec: TensorSpec, parameter: Parameter, scheme: Scheme, format_name: str) -> str | None:
    if parameter.kind == "head" and len(parameter.modules) > 1:
        return f"it is also {parameter.modules[0]}, and an embedding cannot hold codes; keep it, or untie the head first"
    if parameter.kind not in ("linear", "head", "expert", "unknown"):
        return f"it is not the weight of a linear layer ({_KEEP_WHY[parameter.kind]})"
    if not parameter.parts or spec.elements == 0:
        return f"no linear layer was found in it, of shape {list(spec.shape)}"
    if spec.dtype not in FLOATS:
        return f"it is stored as {spec.dtype}, and only {', '.join(FLOATS)} can be quantized"
    for part in parameter.parts:
        refused = FORMATS[format_name].refusal(scheme, part.shape(spec), transposed=part.columns is not None and parameter.kind != "expert")
        if refused:
            return refused
    return None


def _unsolvable(parameter: Parameter, rule: Rule, architecture: Architecture | None) -> str | None:
    """Why no calibrated algorithm can choose its codes."""
    if not calibrated(rule.algorithm):
        return None
    name = next(step.name for step in rule.algorithm if calibrated([step]))
    if SCHEMES[str(rule.scheme)].weight.scale == "absmax":
        return f"LLM.int8() rounds to nearest, by its definition; leave {name} out"
    if architecture is None or not architecture.blocks:
        return f"{name} runs the model block by block, and no blocks were found in it"
    if parameter.kind == "expert":
        return f"{name} does not yet see which tokens go to which expert; use rtn for experts"
    if not any(module.startswith(f"{block}.") for block in architecture.blocks for module in parameter.modules):
        return f"{name} works block by block, and it lies in none; use rtn"
    return None


def _matches(pattern: str, name: str, parameter: Parameter, where: str) -> bool:
    if pattern == "linear":
        return parameter.kind in ("linear", "expert")
    if not name.endswith(".weight") and parameter.kind != "expert":
        return False
    candidates = (*parameter.modules, name.removesuffix(".weight"))
    if pattern.startswith("re:"):
        try:
            return any(re.fullmatch(pattern[3:], candidate) for candidate in candidates)
        except re.error as error:
            raise RecipeError(f"{where}: {pattern!r} is no regular expression: {error}") from None
    if any(sign in pattern for sign in "*?["):
        return any(fnmatch.fnmatchcase(candidate, pattern) for candidate in candidates)
    return any(candidate == pattern or candidate.endswith(f".{pattern}") for candidate in candidates)


def _suggest(pattern: str, parameters: Mapping[str, Parameter]) -> str:
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
    """Entries that share a fate, together: (what, tensors, bytes before, bytes after, rule or reason), for a table."""
    rows: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        what = entry.scheme.name if entry.scheme else "keep"
        row = rows.setdefault((what, f"{entry.rule}" if entry.scheme else entry.why), [0, 0, 0])
        row[0] += 1
        row[1] += entry.plain.size_bytes
        row[2] += entry.size_bytes
    return [(what, count, before, after, reason) for (what, reason), (count, before, after) in rows.items()]
