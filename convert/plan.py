"""The plan: what becomes of every tensor, decided from headers and the config alone. Pure: no weight is read, nothing is written."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import PurePosixPath

from convert.architecture import Architecture, Parameter, whole
from convert.fusion import share_scales
from convert.initializers import as_initializer, copied, placed, read_by, stored, untied
from convert.ledger import (
    ANEW,
    DEQUANTIZED,
    KEEP_WHY,
    REQUANTIZED,
    RESPELL,
    RESPELLED,
    TAKEN_OVER,
    Entry,
    Plan,
    TargetPlan,
    and_more,
    is_tied,
)
from convert.onnx.artifact import Files, plan_decoder, plan_traced
from convert.onnx.stored import Traced
from convert.recipe import Recipe, Rule, Step
from convert.requirements import cautions, require_all, require_possible
from convert.respell import cache_sources, respellable, takes_input_scale
from convert.rules import Asked, Claim, claim, refusal
from convert.runtimes import RUNTIMES
from convert.source import Checkpoint
from formats import FORMATS
from formats.dtypes import FLOATS, from_torch_name
from formats.errors import FormatError, RecipeError, SourceError
from formats.layer import Contents
from formats.model_config import spell
from formats.safetensors import TensorSpec, index_json, lay_out
from formats.scheme import SCHEMES
from formats.tensors import GRAPHS

#: Traces the model, with floats of a ``dtype``.
Graph = Callable[..., tuple[Traced, ...]]


def make_plan(recipe: Recipe, checkpoint: Checkpoint, architecture: Architecture | None, *, machine: str | None = None) -> Plan:
    """Decides everything. Raises :class:`RecipeError` (naming the recipe's line) or :class:`SourceError`; nothing was written then.

    ``machine``: the hardware here (:func:`convert.hardware.this_machine`), of which the plan warns where a target names none.
    """
    if architecture is not None and architecture.missing:
        first, more = architecture.missing[0], and_more(architecture.missing)
        raise SourceError(f"{checkpoint.origin}: {first} of {architecture.name}{more} is in no weight file; the checkpoint is not whole")
    if architecture is not None and architecture.misshapen:
        name, shape = next(iter(architecture.misshapen.items()))
        raise SourceError(
            f"{checkpoint.origin}: {name}{and_more(architecture.misshapen)} has the shape {list(checkpoint.tensors[name].shape)}, and the "
            f"model that config.json describes wants {list(shape)}; weights and config.json are not of one model"
        )
    # Of targets that differ in their codes alone one graph is traced.
    graph = cache(partial(_trace, checkpoint, trust_remote_code=recipe.trust_remote_code))
    asked = (Asked(recipe, index, checkpoint, architecture) for index in range(len(recipe.targets)))
    return Plan(recipe, checkpoint, architecture, tuple(_plan_target(one, machine, graph) for one in asked))


def _trace(checkpoint: Checkpoint, *, dtype: str, trust_remote_code: bool) -> tuple[Traced, ...]:
    from convert.onnx.traced import trace

    return trace(checkpoint, dtype=dtype, trust_remote_code=trust_remote_code)


def _plan_target(asked: Asked, machine: str | None, graph: Graph) -> TargetPlan:
    require_possible(asked)
    target, checkpoint = asked.target, asked.checkpoint
    dtype = _model_dtype(asked) if target.format not in GRAPHS else from_torch_name(target.options.floats or "float32")
    traced = _traced(asked, graph, dtype)
    parameters = _parameters(asked, traced)
    claims = claim(asked, parameters)
    entries = [_enter(asked, spec, parameters[name], claims.get(name), dtype) for name, spec in checkpoint.tensors.items()]
    if len(traced) > 1:
        shared = frozenset.intersection(*(one.tensors for one in traced))
        entries = [copied(entry) if entry.tensor.name in shared else entry for entry in entries]
    entries = share_scales(entries, asked.architecture)
    require_all(asked, entries, claims)
    entries += _cache_entries(asked, dtype)
    _require_once(checkpoint, entries)
    contents = _contents(asked, entries, parameters, dtype)
    try:
        files = _plan_files(asked, entries, contents, traced)
    except FormatError as error:
        raise RecipeError(f"{asked.where()}: {error}") from None
    return TargetPlan(
        name=target.name,
        format=target.format,
        entries=tuple(entries),
        shards=files.shards,
        config=files.config,
        files=files.texts,
        dtype=dtype,
        runtimes=target.runtimes,
        bounds=target.bounds(),
        contents=contents,
        dropped=_dropped(checkpoint, entries, contents),
        cautions=cautions(asked, entries, contents.layers, machine),
    )


def _traced(asked: Asked, graph: Graph, dtype: str) -> tuple[Traced, ...]:
    """The graphs of a model that is no decoder; none of others, and where the format is none of graphs. Raises :class:`RecipeError` where
    the target asks for what only decoders have, or the model cannot be traced."""
    target, architecture = asked.target, asked.architecture
    if target.format not in GRAPHS or architecture is None or (architecture.predicts and not architecture.encoder_decoder):
        return ()
    for i, runtime in enumerate(target.runtimes):
        if RUNTIMES[runtime].decoders_only:
            raise RecipeError(f"{asked.where('runtimes', i)}: {runtime} runs decoders only, and the model is none")
    for option in ("attention", "tied_embedding"):
        if getattr(target.options, option) not in (None, "standard", "float"):
            raise RecipeError(f"{asked.where('options', option)}: for decoders only, and the model is none")
    try:
        return graph(dtype=dtype)
    except FormatError as error:
        raise RecipeError(f"{asked.where()}: {error}") from None


def _parameters(asked: Asked, traced: Sequence[Traced]) -> dict[str, Parameter]:
    """By tensor of the checkpoint, what it is to the model. To a graph a tied head is no embedding, and what it does not read is
    nothing."""
    tensors, architecture = asked.checkpoint.tensors, asked.architecture
    found = {name: _parameter(spec, architecture) for name, spec in tensors.items()}
    if asked.target.format in GRAPHS:
        found = {name: untied(parameter, tensors[name], architecture) for name, parameter in found.items()}
    if traced:
        read = frozenset[str]().union(*(one.tensors for one in traced))
        for name, parameter in found.items():
            if name not in read and parameter.kind != "unused":
                found[name] = Parameter(parameter.modules, "unread")
    return found


def _parameter(spec: TensorSpec, architecture: Architecture | None) -> Parameter:
    if architecture is not None:
        return architecture.parameters[spec.name]
    module, _, last = spec.name.rpartition(".")
    if last != "weight" or len(spec.shape) != 2:
        return Parameter((module or spec.name,), "bias" if last == "bias" else "norm" if len(spec.shape) < 2 else "other")
    return Parameter((module,), "unknown", whole(spec, module))


def _enter(asked: Asked, spec: TensorSpec, parameter: Parameter, claim: Claim | None, dtype: str) -> Entry:
    """The fate of a tensor. Raises :class:`RecipeError` where it cannot have the one that its rule wants."""
    kept = _keep(asked, spec, parameter, claim, dtype)
    if claim is None or claim.rule.scheme is None:
        return kept
    if parameter.kind == "embedding" and SCHEMES[claim.rule.scheme].lookup:
        parameter = replace(parameter, parts=whole(spec, spec.name.removesuffix(".weight")))
        kept = replace(kept, parts=parameter.parts)
    _require_floats_to_learn_from(asked.checkpoint, claim)
    if refused := refusal(asked, spec, parameter, claim.rule):
        raise RecipeError(f"{claim.where}: {spec.name} cannot be {claim.rule.scheme}: {refused}")
    return _quantize(asked, kept, claim.rule, dtype)


def _keep(asked: Asked, spec: TensorSpec, parameter: Parameter, claim: Claim | None, dtype: str) -> Entry:
    target, checkpoint = asked.target, asked.checkpoint
    coded = checkpoint.coded.get(spec.name)
    plain = TensorSpec(spec.name, _float_dtype(spec.dtype, asked.recipe.dtype, checkpoint), spec.shape)
    kept = Entry(
        tensor=spec,
        plain=plain,
        modules=parameter.modules,
        kind=parameter.kind,
        parts=parameter.parts,
        scheme=None,
        algorithm=None,
        rule=claim.label if claim else "default",
        why=(claim.rule.why or "") if claim else KEEP_WHY[parameter.kind],
        outputs=(plain,),
        note=f"{DEQUANTIZED} ({coded.description})" if coded else "",
        turned=checkpoint.turned.get(spec.name, ""),
        experts=parameter.experts,
        reading=parameter.reading,
        alone_nats=next((target.alone[module] for module in parameter.modules if module in target.alone), None) if target.alone else None,
    )
    return as_initializer(kept, dtype) if target.format in GRAPHS else kept


def _quantize(asked: Asked, kept: Entry, rule: Rule, dtype: str) -> Entry:
    target, scheme = asked.target, SCHEMES[str(rule.scheme)]
    beside = kept.plain if is_tied(kept) and target.options.tied_embedding != "shared" else None
    coding = _coding(asked, kept, rule, dtype)
    layers = [
        FORMATS[target.format].layer_tensors(TensorSpec(f"{part.module}.weight", coding.scale_dtype, part.shape(kept.tensor)), scheme)
        for part in kept.parts
    ]
    return replace(
        kept,
        scheme=scheme,
        algorithm=coding.algorithm,
        why=rule.why or "",
        outputs=(*(output for layer in layers for output in layer), *([beside] if beside else [])),
        scale_dtype=coding.scale_dtype,
        note=coding.note,
        steps=coding.steps,
        beside=beside,
        transposed=any(layer.columns for layer in layers),
        observer=_observer(rule),
    )


@dataclass(frozen=True)
class _Coding:
    """Where codes come from; see :class:`~convert.ledger.Entry`."""

    steps: tuple[Step, ...]
    algorithm: str
    scale_dtype: str
    note: str


def _coding(asked: Asked, kept: Entry, rule: Rule, dtype: str) -> _Coding:
    """From the rule's algorithms, or as the source has them, where these can stay."""
    # Scales are rounded to the dtype of the source's floats whatever the target, so that all targets have the same codes.
    if asked.target.format in GRAPHS and dtype != "F16":
        dtype = _model_dtype(asked)
    chosen = _Coding(rule.algorithm, "+".join(step.name for step in rule.algorithm), dtype, "")
    coded = asked.checkpoint.coded.get(kept.tensor.name)
    if coded is None:
        return chosen
    if coded.quantization is None or not respellable(coded.quantization, SCHEMES[str(rule.scheme)].weight, kept.parts):
        return replace(chosen, note=f"{REQUANTIZED} ({coded.description})")
    # A power of two is exact in every float but float16, whose exponents are too few.
    scale_dtype = coded.scale_dtype if coded.scale_dtype in FLOATS else "F32" if dtype == "F16" else dtype
    return _Coding((), RESPELL, scale_dtype, f"{RESPELLED} ({coded.description})")


def _require_floats_to_learn_from(checkpoint: Checkpoint, claim: Claim) -> None:
    # What a GGUF file holds is floats to all that comes, as everywhere here.
    first = next((name for name, found in checkpoint.coded.items() if found.quantization is not None), None)
    if first and any(step.recover for step in claim.rule.algorithm):
        raise RecipeError(
            f"{claim.where}: recover teaches a model to predict what its source predicts in 16 bit, and this "
            f"source is quantized already ({first}: {checkpoint.coded[first].description}): what it lost cannot come back from itself. "
            "Take the 16-bit model it was made from; fine-tune that first, if you want to; then convert it, with recover behind the other "
            "algorithms: quantization comes last"
        )


def _observer(rule: Rule) -> str:
    if not SCHEMES[str(rule.scheme)].static:
        return ""
    return f"percentile {rule.percentile or 99.999:g}" if rule.observer == "percentile" else rule.observer or "absmax"


def _model_dtype(asked: Asked) -> str:
    """The safetensors name of the float dtype that most of the artifact's unquantized bytes, and all its scales, are stored in."""
    checkpoint = asked.checkpoint
    if asked.recipe.dtype != "source":
        return from_torch_name(asked.recipe.dtype)
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


def _cache_entries(asked: Asked, dtype: str) -> Iterator[Entry]:
    """The scales of keys and values, which no tensor of the source becomes."""
    target, checkpoint = asked.target, asked.checkpoint
    if target.kv_cache is None:
        return
    where = asked.where("kv_cache")
    if asked.architecture is None or not asked.architecture.attentions:
        raise RecipeError(f"{where}: no attention of this model was seen to write to the cache; leave kv_cache out")
    sources = cache_sources(checkpoint, asked.architecture.attentions, target.kv_cache)
    note = f"{ANEW} (the source's own scales are dropped)" if checkpoint.cache_scales else ""
    if sources:
        note, dtype = f"{TAKEN_OVER} (the source's own scale)", checkpoint.cache_scales[next(iter(sources.values()))[0]].dtype
    for attention in asked.architecture.attentions:
        specs = FORMATS[target.format].cache_tensors(attention, target.kv_cache, dtype)
        if specs is None:
            raise RecipeError(f"{where}: {target.format} has no place for scales of a kv_cache in {target.kv_cache}; leave it out")
        for spec, what in zip(specs, ("keys", "values"), strict=True):
            yield Entry(
                tensor=spec,
                plain=spec,
                modules=(attention.module,),
                kind="cache",
                parts=(),
                scheme=None,
                algorithm=None,
                rule=PurePosixPath(where).name,
                why=f"the scale of its {what}",
                outputs=(spec,),
                note=note,
            )


def _require_once(checkpoint: Checkpoint, entries: Iterable[Entry]) -> None:
    counts = Counter(spec.name for entry in entries for spec in entry.outputs)
    doubled = next((name for name, count in counts.items() if count > 1), None)
    if doubled:
        raise SourceError(f"{checkpoint.origin}: {doubled} would be written twice; the source already has a tensor of that name")


def _contents(asked: Asked, entries: Sequence[Entry], parameters: Mapping[str, Parameter], dtype: str) -> Contents:
    """What the format's metadata has to say."""
    target, architecture = asked.target, asked.architecture
    layers = [layer for entry in entries if entry.scheme for layer in entry.layers()]
    quantized = {name for layer in layers for name in (layer.module, layer.stored)}
    linears = architecture.linears if architecture else [part.module for p in parameters.values() for part in p.parts]
    return Contents(
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


def _plan_files(asked: Asked, entries: Sequence[Entry], contents: Contents, traced: Sequence[Traced]) -> Files:
    """Weight files, ``config.json`` and what lies beside it. Raises :class:`FormatError` where the format cannot say it."""
    target, config = asked.target, asked.checkpoint.config
    if target.options.tied_embedding == "shared" and not any(is_tied(entry) and entry.scheme for entry in entries):
        raise FormatError("tied_embedding: shared, but no head that is tied is quantized; leave it out, or name lm_head in a rule")
    if target.format in GRAPHS:
        return _plan_graphs(asked, entries, contents, traced)
    form, specs = FORMATS[target.format], [spec for entry in entries for spec in entry.outputs]
    quantization = form.config(contents) if contents.layers or contents.cache else None
    shards = lay_out(specs, form.metadata(specs, contents), target.max_shard_size)
    index = index_json(shards)
    texts = {**form.side_files(contents), **({"model.safetensors.index.json": index} if index else {})}
    return Files(shards, texts, spell(config, contents.dtype, quantization))


def _plan_graphs(asked: Asked, entries: Sequence[Entry], contents: Contents, traced: Sequence[Traced]) -> Files:
    target, checkpoint = asked.target, asked.checkpoint
    digest = hashlib.sha256(json.dumps(asked.recipe.resolved(), sort_keys=True).encode()).hexdigest()
    source = {"origin": checkpoint.origin, "commit": checkpoint.commit}
    provenance = {"format": target.format, "recipe_sha256": digest, "source": source}
    blocks, halves = target.format == "onnx-matmulnbits", target.options.inputs == "int8x2"
    if traced:
        files = plan_traced(
            traced,
            lambda one: placed([entry for entry in entries if entry.tensor.name in one.tensors], one, blocks=blocks),
            lambda one: read_by(one, entries),
            halves=halves,
            max_file_bytes=target.max_shard_size,
            provenance=provenance,
        )
    else:
        files = plan_decoder(
            checkpoint.config,
            stored(entries, blocks=blocks),
            [spec for entry in entries for spec in entry.outputs],
            dtype=contents.dtype,
            attention=target.options.attention or "standard",
            halves=halves,
            max_file_bytes=target.max_shard_size,
            provenance=provenance,
        )
    return replace(files, config={**spell(checkpoint.config, contents.dtype, None), **files.config})


def _dropped(checkpoint: Checkpoint, entries: Sequence[Entry], contents: Contents) -> tuple[str, ...]:
    """Scales of the source that no tensor of the target comes from."""
    kept = {
        checkpoint.coded[entry.tensor.name].input_scale
        for entry in entries
        if entry.scheme and entry.tensor.name in checkpoint.coded and takes_input_scale(checkpoint.coded[entry.tensor.name], entry)
    }
    if any(entry.kind == "cache" and entry.note.startswith(TAKEN_OVER) for entry in entries):
        kept |= {name for pair in cache_sources(checkpoint, contents.attentions, contents.cache).values() for name in pair}
    inputs = [coded.input_scale for coded in checkpoint.coded.values() if coded.input_scale]
    return tuple(name for name in (*inputs, *checkpoint.cache_scales) if name not in kept)
