"""What the runtimes and options of a target ask of its layers together, once each has its fate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from convert.architecture import Architecture
from convert.compatibility import judge, parts_of
from convert.fusion import fused
from convert.ledger import Entry
from convert.recipe import applicable
from convert.rules import Asked, Claim
from convert.runtimes import RUNTIMES, Runtime
from formats.errors import RecipeError
from formats.layer import QuantizedLayer
from formats.scheme import Quality


def require_possible(asked: Asked) -> None:
    """Raises :class:`RecipeError` for a runtime that does not load the format, and for a limit this model can neither meet nor miss."""
    target = asked.target
    for i, name in enumerate(target.runtimes):
        if target.format not in RUNTIMES[name].formats:
            loaders = [each for each, runtime in RUNTIMES.items() if target.format in runtime.formats]
            raise RecipeError(
                f"{asked.where('runtimes', i)}: {name} does not load {target.format}; it loads {', '.join(RUNTIMES[name].formats)}, and "
                f"{target.format} is loaded by {', '.join(loaders)}: write them into runtimes"
            )
    limits = applicable(predicts=asked.predicts)
    budget = {} if target.budget is None else target.budget.model_dump(include=set(Quality.__dataclass_fields__), exclude_none=True)
    wanted = [*(("limits", name) for name in sorted(target.limits.model_fields_set)), *(("budget", name) for name in budget)]
    for section, limit in (one for one in wanted if one[1] not in limits):
        raise RecipeError(
            f"{asked.where(section, limit)}: {asked.checkpoint.origin} predicts {'tokens' if asked.predicts else 'no tokens'}, "
            f"so it has no {limit}; its limits are {', '.join(limits)}"
        )


def require_all(asked: Asked, entries: Sequence[Entry], claims: Mapping[str, Claim]) -> None:
    """Raises :class:`RecipeError` where entries that a format could hold one by one are nothing that its readers, or the recipe's options,
    can have together."""
    _require_loadable(asked, entries, claims)
    _require_biases(asked, claims)
    _require_halvable(asked, entries, claims)
    _require_predictions(asked)


def cautions(asked: Asked, entries: Iterable[Entry], layers: Sequence[QuantizedLayer], machine: str | None) -> tuple[str, ...]:
    """What the compatibility table says of each runtime of the target. Raises :class:`RecipeError` for one that cannot load it."""
    target, found = asked.target, list[str]()
    # Experts that become Linear modules where others are merged.
    apart = {entry.experts for entry in entries if entry.reading == "linear"}
    for i, name in enumerate(target.runtimes):
        parts = parts_of(layers, apart=() if RUNTIMES[name].merges is None else apart)
        judgement = judge(name, target.format, parts, hardware=target.hardware, machine=machine)
        if judgement.refusal:
            raise RecipeError(f"{asked.where('runtimes', i)}: {judgement.refusal}")
        found += judgement.warnings
    if target.options.inputs == "int8x2" and "openvino" in target.runtimes:
        found.append(
            "openvino computes products of two codes as floats: the same numbers, and neither memory nor speed is won (seen: 2026.4.1)"
        )
    return tuple(found)


def _require_loadable(asked: Asked, entries: Iterable[Entry], claims: Mapping[str, Claim]) -> None:
    """Raises :class:`RecipeError` where layers that become one do not have one scheme, or none of them one, and where layers that are kept
    would be looked for as codes, or codes where none are looked for."""
    fates = {entry.module(part): entry for entry in entries for part in entry.parts}
    if not any(entry.scheme for entry in fates.values()):
        return
    for name in asked.target.runtimes:
        runtime = RUNTIMES[name]
        found = _unequal(name, runtime, fates, asked.architecture)
        if runtime.merges is not None:
            found = chain(found, _unread(name, runtime, fates), _unfound(name, fates, asked.architecture))
        for culprits, why in found:
            where = next(claims[entry.tensor.name].where for entry in culprits if entry.tensor.name in claims)
            raise RecipeError(f"{where}: {why}")


#: The entries of which the first that a rule names is where the recipe is wrong, and what is wrong.
Trouble = tuple[tuple[Entry, ...], str]


def _unequal(name: str, runtime: Runtime, fates: Mapping[str, Entry], architecture: Architecture | None) -> Iterator[Trouble]:
    """Layers that become one and do not have one scheme."""
    merged = [module for module, entry in fates.items() if entry.reading == "merged"]
    together = [(merged, "reads all experts of a model in one way")] if runtime.merges else []
    together += [(group, "makes them one layer") for group in fused(architecture, fates)] if runtime.fuses else []
    for modules, why in together:
        schemes = Counter(fates[module].fate for module in modules)
        if len(schemes) > 1:
            odd = next(module for module in modules if fates[module].fate == schemes.most_common()[-1][0])
            other = next(module for module in modules if fates[module].fate != fates[odd].fate)
            yield (
                (fates[odd], fates[other]),
                f"{odd} is {fates[odd].fate} where {other} is {fates[other].fate}, and {name} {why}; give all {len(modules)} of them one "
                "scheme, or keep all",
            )


def _unread(name: str, runtime: Runtime, fates: Mapping[str, Entry]) -> Iterator[Trouble]:
    """Experts that are kept beside quantized layers, where they would be looked for as codes."""
    quantized = [entry for entry in fates.values() if entry.scheme]
    kept = next((entry for entry in fates.values() if entry.reading == "linear" and not entry.scheme), None)
    if kept is not None:
        yield (
            (kept, quantized[0]),
            f"{kept.tensor.name} is kept, and in a model of which anything is quantized {name} looks for its experts one by one; quantize "
            "the experts too, or nothing",
        )
    integers = next((entry for entry in quantized if entry.scheme and entry.scheme.weight.grid.kind == "int"), None)
    merged = next((m for m, entry in fates.items() if entry.reading == "merged" and not entry.scheme and len(entry.parts) == 1), None)
    if runtime.merges and integers is not None and merged is not None:
        yield (
            (integers,),
            f"{name} would read {merged}, which is kept, as the codes that {integers.modules[0]} has; quantize the experts too (one of "
            f"{', '.join(sorted(runtime.merges))}), or the other layers in FP8",
        )


def _unfound(name: str, fates: Mapping[str, Entry], architecture: Architecture | None) -> Iterator[Trouble]:
    """Codes under another name than the weight's, where the model asks for the weight."""
    if architecture is None:
        return
    packed = [entry for entry in fates.values() if entry.scheme and not any(output.name.endswith(".weight") for output in entry.outputs)]
    for entry in packed:
        if entry.kind == "linear" and entry.modules[0] not in architecture.replaceable:
            yield (
                (entry,),
                f"{entry.tensor.name} cannot be {entry.fate}: in {name} its layer is a Linear with arithmetic of its own, which does not "
                "find packed codes; use a scheme with 8-bit activations, or FP8",
            )
        if entry.modules[0] in architecture.begun_outside:
            yield (
                (entry,),
                f"{entry.tensor.name} cannot be {entry.fate}: while {name} loads this model it asks the layer for a weight, and one of "
                "packed codes has none (AttributeError); use a scheme with 8-bit activations, or FP8",
            )


def _require_halvable(asked: Asked, entries: Iterable[Entry], claims: Mapping[str, Claim]) -> None:
    """Raises :class:`RecipeError` where inputs of products of weights alone shall be two codes, and there is no such product, or one whose
    sums have more scales than one a channel, or a runtime that has none for such codes."""
    if asked.target.options.inputs != "int8x2":
        return
    where = asked.where("options", "inputs")
    alone = [entry for entry in entries if entry.scheme and entry.scheme.activation is None and not entry.scheme.lookup]
    odd = next((entry for entry in alone if entry.scheme and not entry.scheme.halvable), None)
    if odd is not None:
        raise RecipeError(
            f"{claims[odd.tensor.name].where}: {odd.tensor.name} is {odd.fate}, and inputs: int8x2 is for products with one scale a "
            "channel; use int8-weight-only, or leave inputs out"
        )
    if not alone:
        raise RecipeError(f"{where}: no layer has INT8 weights alone, so there are no inputs to be two codes; leave it out")
    if "onnxruntime-gpu" in asked.target.runtimes:
        raise RecipeError(
            f"{where}: int8x2 is for a CPU; onnxruntime-gpu has no MatMulInteger for unsigned codes on CUDA, and would multiply on the host"
        )


def _require_biases(asked: Asked, claims: Mapping[str, Claim]) -> None:
    """Raises :class:`RecipeError` for a rule that corrects biases of layers of which none has one."""
    for rule in asked.target.rules:
        claimed = {name: claim for name, claim in claims.items() if claim.rule is rule}
        corrects = rule.scheme and any(step.bias_correction for step in rule.algorithm)
        if corrects and not any(f"{name.removesuffix('.weight')}.bias" in asked.checkpoint.tensors for name in claimed):
            where = next(iter(claimed.values())).where
            raise RecipeError(f"{where}: bias_correction: none of the {len(claimed)} layers has a bias")


def _require_predictions(asked: Asked) -> None:
    """Raises :class:`RecipeError` where predictions are to be taught, and the model makes none."""
    for i, rule in enumerate(asked.target.rules):
        if not asked.predicts and any(step.recover and step.recover.mode == "logits" for step in rule.algorithm):
            raise RecipeError(
                f"{asked.where('rules', i)}: the model predicts no tokens, so recover has no logits to go by; set mode: blocks"
            )
