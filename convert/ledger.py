"""The ledger: what a plan says, an entry for every source tensor, and what it comes to; plain records, decided by :mod:`convert.plan`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from convert import __version__
from convert.algorithms import ALGORITHMS
from convert.architecture import Architecture, Parameter, Part
from convert.datasets import is_hub_id
from convert.onnx.artifact import inline_template
from convert.recipe import HEAD_WHY, Calibration, Recipe, Step, Target, Validation, calibrated, reads_calibration
from convert.runtimes import RUNTIMES
from convert.source import Checkpoint
from formats.dtypes import DTYPES
from formats.layer import Contents, QuantizedLayer
from formats.safetensors import Shard, TensorSpec, json_bytes
from formats.scheme import Quality, Scheme
from formats.tensors import GRAPHS

#: The algorithm that chooses nothing: the source's own codes.
RESPELL = "respell"
#: What a note begins with: what became of codes that the source had, and of scales that belong to no weight.
DEQUANTIZED, RESPELLED, REQUANTIZED, TAKEN_OVER = "dequantized", "respelled", "requantized", "taken over"
ANEW = "calibrated anew"
#: With any of these a source was quantized already; other notes are about what was done to it here.
CODED = (DEQUANTIZED, RESPELLED, REQUANTIZED, TAKEN_OVER, ANEW)
CONTEXTS = (2_048, 8_192, 32_768, 131_072)

KEEP_WHY = {
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
    together (:func:`convert.fusion.share_scales`).
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

    @property
    def fate(self) -> str:
        """Its scheme, or that it is kept, as messages say it."""
        return self.scheme.name if self.scheme else "kept"

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
        facts = [__version__, self.resolved(), self.checkpoint.fingerprint(), *self._text()]
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

    def lengths(self) -> dict[str, int]:
        """How many tokens the model is given in one sequence, by the section of the recipe that says so."""
        calibrated = any(map(reads_calibration, self.recipe.targets))
        return {**({"calibration": self.calibration.length} if calibrated else {}), "validation": self.recipe.validation.length}

    def _text(self) -> list[Any]:
        """Of calibration text that is a file, what changes when it does."""
        path = Path(self.calibration.text)
        if not any(map(reads_calibration, self.recipe.targets)) or not os.path.isfile(path):
            return []
        return [str(path), path.stat().st_size, path.stat().st_mtime_ns]

    def warnings(self) -> list[str]:
        """What a user should know and is no error."""
        found = [*_warnings_of_source(self)]
        for target, asked in zip(self.targets, self.recipe.targets, strict=True):
            found += (f"{target.name}: {warning}" for warning in _warnings_of_target(target, asked, self.checkpoint))
        return found

    def deployment_bytes(self, target: TargetPlan) -> dict[int, int] | None:
        """Weights plus keys and values in 16 bit, for one sequence of each length in :data:`CONTEXTS` that the model allows."""
        if self.architecture is None or self.architecture.cache_bytes_per_token is None:
            return None
        longest = self.architecture.context_length or CONTEXTS[0]
        per_token = self.architecture.cache_bytes_per_token
        return {length: target.weight_bytes + length * per_token for length in CONTEXTS if length <= max(longest, CONTEXTS[0])}


def _warnings_of_source(plan: Plan) -> Iterator[str]:
    checkpoint, architecture = plan.checkpoint, plan.architecture
    if architecture is None:
        kind = checkpoint.config.get("model_type")
        yield f"transformers does not know the architecture {kind!r}: only tensors that rules name are quantized"
    elif architecture.groups is None:
        yield f"{architecture.name} could not be run on the meta device: which layers share an input was not observed"
    longest = architecture.context_length if architecture is not None and architecture.reads == "input_ids" else None
    for key, length in plan.lengths().items():
        if longest is not None and length > longest:
            yield f"{key}.length: sequences of {length:,} tokens are longer than the {longest:,} that {plan.checkpoint.origin} was made for"
    if "calibration" in plan.lengths() and _is_same_text(plan.calibration, plan.recipe.validation):
        yield f"validation.text is what calibration reads, {plan.calibration.text}: an artifact looks better on that than on other text"
    again = [entry.tensor for target in plan.targets for entry in target.quantized if entry.again == REQUANTIZED]
    if again:
        was = checkpoint.coded[again[0].name].description
        yield (
            f"{len(set(again))} tensors are quantized a second time, first {again[0].name} ({was}): errors add up; "
            "convert the model it was made from, if there is one"
        )
    unused = [entry.tensor for entry in plan.targets[0].entries if entry.kind == "unused"]
    if unused and architecture is not None:
        yield (
            f"{unused[0].name}{and_more(unused)}, {sum(spec.size_bytes for spec in unused) / 1e6:,.1f} MB, is no parameter of "
            f"{architecture.name} as config.json describes it: nothing reads it in transformers, and it is not quantized"
        )


def _warnings_of_target(target: TargetPlan, asked: Target, checkpoint: Checkpoint) -> Iterator[str]:
    if asked.ruined is not None:
        fate = "kept in 16 bit" if asked.ruined.instead == "keep" else f"made {asked.ruined.instead}"
        yield (
            f"of its {len(target.static)} layers with static inputs up to {asked.ruined.at_most} may be {fate} "
            "instead, where calibration finds that a static scale ruins them; then it is calibrated and made again"
        )
    rounded = [entry for entry in target.quantized if entry.again == RESPELLED and _will_round(entry, target.dtype)]
    if rounded:
        yield (
            f"{len(rounded)} respelled tensors keep their scales in {rounded[0].scale_dtype}, lossless on disk; "
            f"transformers rounds scales of compressed-tensors to {target.dtype} as it loads them"
        )
    if target.dropped:
        yield (f"{len(target.dropped)} scales of inputs, keys or values that the source has are not taken over, first {target.dropped[0]}")
    merging = [name for name in target.runtimes if RUNTIMES[name].merges]
    merged = sum(len(entry.parts) for entry in target.quantized if entry.reading == "merged")
    if merging and merged:
        yield (
            f"{merging[0]} makes floats of {merged} layers of experts while it loads them: they take no less memory "
            "there, and their inputs are not quantized"
        )
    unnamed = [entry for entry in target.entries if entry.why == KEEP_WHY["linear"]]
    if unnamed:
        share = sum(entry.tensor.size_bytes for entry in unnamed) / max(checkpoint.size_bytes, 1)
        yield f"no rule names {len(unnamed)} linear layers ({share:.0%} of the bytes), first {unnamed[0].tensor.name}"
    yield from target.cautions


def _is_same_text(calibration: Calibration, validation: Validation) -> bool:
    """Whether both read one file, or one split of a dataset; unless named they are different splits, and samples are different texts."""
    if calibration.text == "sample" or calibration.text != validation.text:
        return False
    return not is_hub_id(calibration.text) or (calibration.split is not None and calibration.split == validation.split)


def _will_round(entry: Entry, dtype: str) -> bool:
    """Whether a reader that keeps scales in ``dtype`` changes those of the source."""
    assert entry.scheme is not None
    return entry.scheme.weight.scale == "model" and entry.scale_dtype != dtype and DTYPES[dtype].bits < 32


def is_tied(tensor: Entry | Parameter) -> bool:
    """Whether it is the head, and the embedding too."""
    return tensor.kind == "head" and len(tensor.modules) > 1


def and_more(found: Sized) -> str:
    """How many there are behind the first, for a message that names that."""
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


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
