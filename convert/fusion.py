"""Layers that a runtime makes one as it loads them: which these are, and the one scale that they then share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from convert.architecture import Architecture
from convert.ledger import RESPELL, Entry
from formats.scheme import PER_TENSOR


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


def share_scales(entries: Sequence[Entry], architecture: Architecture | None) -> list[Entry]:
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
    return [replace(entry, alongside=alongside[name]) if (name := entry.tensor.name) in alongside else entry for entry in entries]


def _has_one_scale(entry: Entry) -> bool:
    """Whether it is one linear layer, whose weight has one scale that its largest magnitude makes."""
    if entry.scheme is None or entry.experts or entry.algorithm == RESPELL or len(entry.parts) != 1 or entry.parts[0].columns:
        return False
    searched = any((step.rtn and step.rtn.clip) or (step.gptq and step.gptq.clip) or step.recover for step in entry.steps)
    return entry.scheme.weight.tile == PER_TENSOR and entry.scheme.weight.grid.kind == "float" and not searched
