"""Chooses the codes of a block's layers from what its inputs were seen to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from convert import quantize
from convert.algorithms import gptq, rtn
from convert.algorithms.rtn import CLIP_RATIOS
from convert.observe import Observer, Stats
from convert.quantize import Piece
from formats.dtypes import DTYPES
from formats.errors import NumericsError

if TYPE_CHECKING:
    from convert.architecture import Part
    from convert.loading import Skeleton
    from convert.plan import Entry, TargetPlan
    from formats.qtensor import QTensor


@dataclass(frozen=True)
class Solved:
    """A source tensor whose codes were chosen while its block was at work, as the bytes of a target. ``health``: what was seen on the way,
    by module."""

    target: str
    tensor: str
    pieces: tuple[Piece, ...]
    health: Mapping[str, Mapping[str, float]]


def solve_block(
    target: TargetPlan, entries: Sequence[Entry], skeleton: Skeleton, observer: Observer, inputs: Mapping[str, float]
) -> Iterator[tuple[Solved, dict[str, torch.Tensor]]]:
    """The entries of a block in order, each with the weights (out, in), by module, that its codes stand for.

    ``inputs``: the largest input of modules, for static scales. Layers of one input, scheme and algorithm are solved together.
    Raises :class:`NumericsError`, naming the module, for a Hessian that cannot be factorised and for NaN or Inf.
    """
    codes: dict[str, QTensor] = {}
    health: dict[str, dict[str, float]] = {}
    for members in _together(entries, observer):
        _solve(members, skeleton, observer, codes, health)
    stats = Stats(inputs=inputs)
    for entry in entries:
        pieces: list[Piece] = []
        for part in entry.parts:
            work = quantize.Work(entry.tensor, part.start, part.stop, {}, last=True)
            pieces += quantize.encode(target, entry, part, codes[part.module], work, stats)
        solved = Solved(target.name, entry.tensor.name, tuple(pieces), {part.module: health[part.module] for part in entry.parts})
        yield solved, {part.module: codes[part.module].dequantize() for part in entry.parts}


def _together(entries: Sequence[Entry], observer: Observer) -> list[list[tuple[Entry, Part]]]:
    groups: dict[tuple[str, ...], list[tuple[Entry, Part]]] = {}
    for entry in entries:
        for part in entry.parts:
            key = (observer.leader.get(part.module, part.module), repr(entry.scheme), repr(entry.steps), entry.scale_dtype)
            groups.setdefault(key, []).append((entry, part))
    return list(groups.values())


def _solve(
    members: Sequence[tuple[Entry, Part]],
    skeleton: Skeleton,
    observer: Observer,
    codes: dict[str, QTensor],
    health: dict[str, dict[str, float]],
) -> None:
    entry, part = members[0]
    assert entry.scheme is not None
    scale_dtype = getattr(torch, DTYPES[entry.scale_dtype].torch_name)
    weights = [_weight(skeleton, part) for _, part in members]
    step = entry.steps[-1]
    for (each, part), weight in zip(members, weights, strict=True):
        if not quantize.is_finite(weight):
            raise NumericsError(f"{each.tensor.name}: NaN or Inf in {part.module}; the checkpoint is damaged, fetch or train it again")
    if step.gptq is None:
        clip_search = CLIP_RATIOS if step.rtn and step.rtn.clip else ()
        for (_, part), weight in zip(members, weights, strict=True):
            codes[part.module] = rtn.quantize(weight.clone(), entry.scheme.weight, scale_dtype=scale_dtype, clip_search=clip_search)
            health[part.module] = {}
        return
    hessian = observer.get(part.module, "hessian")
    options = step.gptq
    try:
        factor = gptq.factorise(hessian.value, damping=options.damping, activation_order=options.activation_order)
    except gptq.FactorisationError as error:
        raise NumericsError(f"{part.module}: {error}") from None
    results = gptq.quantize_together(
        weights,
        entry.scheme.weight,
        scale_dtype=scale_dtype,
        factor=factor,
        block_size=options.block_size,
        static_groups=options.static_groups,
        clip_search=CLIP_RATIOS if options.clip else (),
    )
    for (_, part), result in zip(members, results, strict=True):
        codes[part.module] = result.qtensor
        health[part.module] = {"damping": result.damping, "dead": float(result.dead)}


def _weight(skeleton: Skeleton, part: Part) -> torch.Tensor:
    """(out, in) in float32, as it is now."""
    from transformers.pytorch_utils import Conv1D

    module = skeleton.model.get_submodule(part.module)
    weight: torch.Tensor = module.weight.detach()
    return (weight.T if isinstance(module, Conv1D) else weight).float()
