"""Chooses the codes of a block's layers from what its inputs were seen to be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from convert import health, quantize
from convert.algorithms import gptq, rtn, smoothing
from convert.algorithms.output_error import output_errors
from convert.algorithms.rtn import CLIP_RATIOS
from convert.folds import Fold
from convert.groups import Group, fold
from convert.moved import moved
from convert.observe import Observer, Stats
from convert.quantize import Piece
from formats.dtypes import DTYPES
from formats.errors import NumericsError

if TYPE_CHECKING:
    from convert.architecture import Part
    from convert.crew import Crew
    from convert.lanes import Stand
    from convert.loading import Skeleton
    from convert.plan import Entry, TargetPlan
    from formats.qtensor import QTensor


@dataclass(frozen=True)
class Solved:
    """A source tensor whose codes were chosen while its block was at work, as the bytes of a target. ``health``: what was seen on the way,
    by module, as plain data."""

    target: str
    tensor: str
    pieces: tuple[Piece, ...]
    health: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Smoothed:
    """What the input of a group was divided by: ``scales`` (in,), of strength ``alpha``. ``told_by``: in whose health ``fold`` is."""

    alpha: float
    scales: torch.Tensor
    fold: Fold
    told_by: str


def smooth_block(
    target: TargetPlan, entries: Sequence[Entry], stand: Stand, groups: Sequence[Group], skeleton: Skeleton, observer: Observer
) -> tuple[dict[str, Smoothed], list[Solved]]:
    """Moves what is large in inputs into weights, in every group of a block with a layer whose rule asks for it.

    Returns, by the module that its group's statistics are kept under, what was done, and the tensors that are kept but changed by it. The
    block computes what it computed before. Raises :class:`NumericsError` where a changed value cannot be stored.
    """
    asked = {
        entry.module(part): (entry, step.smoothquant)
        for entry in entries
        for step in entry.steps
        if step.smoothquant
        for part in entry.parts
    }
    kept = {entry.tensor.name: entry for entry in target.entries if entry.scheme is None}
    done: dict[str, Smoothed] = {}
    changed: dict[str, str] = {}
    for group in groups:
        consumers = [f"{stand.name}.{name}" for name in group.consumers]
        told_by = next((name for name in consumers if name in asked), None)
        parameters = [f"{module}.{last}" for module in (f"{stand.name}.{group.producer}", *consumers) for last in ("weight", "bias")]
        filled = [(name, skeleton.own_tensor(name)) for name in parameters if skeleton.has(name)]
        if told_by is None or any(tensor is None for _, tensor in filled):
            continue
        entry, options = asked[told_by]
        assert entry.scheme is not None
        weights = [skeleton.model.get_submodule(name).weight.float() for name in consumers]
        absmax = observer.get(consumers[0], "channels").value
        if options.alpha == "search":
            found = smoothing.search_alpha(
                observer.get(consumers[0], "rows").value,
                weights,
                input_absmax=absmax,
                weight_quantization=entry.scheme.weight,
                activation_quantization=entry.scheme.activation,
                scale_dtype=getattr(torch, DTYPES[entry.scale_dtype].torch_name),
                channels=group.channels,
            )
            alpha, scales = found.strength or 0.0, found.scales
        else:
            alpha = float(options.alpha)
            scales = smoothing.smoothing_scales(absmax, weights, alpha=alpha, channels=group.channels)
        stored = kept.get(str(skeleton.own_tensor(f"{stand.name}.{group.producer}.weight")))
        dtype = getattr(torch, DTYPES[stored.plain.dtype].torch_name) if stored else None
        scales = fold(stand.module, group, scales, dtype=dtype)
        leader = observer.leader.get(consumers[0], consumers[0])
        rows = scales if group.channels is None else smoothing.of_producer(scales, group.channels)
        walked = skeleton.model.get_submodule(consumers[0]).weight.dtype
        told = Fold(f"{stand.name}.{group.producer}", tuple(consumers), scales, rows, group.offset, len(done), walked)
        done[leader] = Smoothed(alpha, scales, told, told_by)
        changed |= {str(tensor): name for name, tensor in filled if tensor in kept}
    return done, [_as_changed(target, kept[tensor], parameter, skeleton) for tensor, parameter in changed.items()]


def _as_changed(target: TargetPlan, entry: Entry, parameter: str, skeleton: Skeleton) -> Solved:
    value: torch.Tensor = skeleton.model.get_parameter(parameter).detach()
    cast = value.to(getattr(torch, DTYPES[entry.plain.dtype].torch_name))
    if not quantize.is_finite(cast):
        raise NumericsError(f"{entry.tensor.name}: smoothing makes values that {entry.plain.dtype} cannot hold; lower alpha")
    data = cast.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return Solved(target.name, entry.tensor.name, (Piece(target.name, entry.plain.name, 0, data),), {entry.tensor.name: {"smoothed": 1.0}})


def solve_block(
    target: TargetPlan,
    entries: Sequence[Entry],
    skeleton: Skeleton,
    observer: Observer,
    inputs: Mapping[str, float],
    smoothed: Mapping[str, Smoothed],
    looked: Mapping[str, Mapping[str, Any]],
    *,
    crew: Crew,
) -> Iterator[tuple[Solved, dict[str, QTensor]]]:
    """The entries of a block in order, each with its codes, by module.

    ``inputs``: the largest input of modules, for static scales, before smoothing; ``smoothed`` says what that did, ``looked`` what
    :func:`convert.health.look` saw before. Layers of one input, scheme and algorithm are solved together, by one thread of the
    crew. Raises :class:`NumericsError`, naming the module, for a Hessian that cannot be factorised and for NaN or Inf.
    """
    codes: dict[str, QTensor] = {}
    noted: dict[str, dict[str, Any]] = {}
    divided = {
        module: float((observer.get(leader, "channels").value / smoothed[leader].scales).max())
        for module, leader in observer.leader.items()
        if leader in smoothed
    }
    stats = Stats(inputs={**inputs, **divided})
    solve = partial(
        _solve, skeleton=skeleton, observer=observer, smoothed=smoothed, codes=codes, noted=noted, limits=stats.inputs, looked=looked
    )
    for _ in crew.map(solve, _together(entries, observer)):
        pass
    for entry in entries:
        pieces: list[Piece] = []
        for part in entry.parts:
            work = quantize.Work(entry.tensor, part.start, part.stop, {}, last=True)
            pieces += quantize.encode(target, entry, part, codes[entry.module(part)], work, stats)
        solved = Solved(
            target.name, entry.tensor.name, tuple(pieces), {entry.module(part): noted[entry.module(part)] for part in entry.parts}
        )
        yield solved, {entry.module(part): codes[entry.module(part)] for part in entry.parts}


def _together(entries: Sequence[Entry], observer: Observer) -> list[list[tuple[Entry, Part]]]:
    groups: dict[tuple[str, ...], list[tuple[Entry, Part]]] = {}
    for entry in entries:
        for part in entry.parts:
            key = (observer.leader.get(entry.module(part), entry.module(part)), repr(entry.scheme), repr(entry.steps), entry.scale_dtype)
            groups.setdefault(key, []).append((entry, part))
    return list(groups.values())


def _solve(
    members: Sequence[tuple[Entry, Part]],
    *,
    skeleton: Skeleton,
    observer: Observer,
    smoothed: Mapping[str, Smoothed],
    codes: dict[str, QTensor],
    noted: dict[str, dict[str, Any]],
    limits: Mapping[str, float],
    looked: Mapping[str, Mapping[str, Any]],
) -> None:
    entry, _ = members[0]
    assert entry.scheme is not None
    scale_dtype = getattr(torch, DTYPES[entry.scale_dtype].torch_name)
    names = [each.module(part) for each, part in members]
    weights = [skeleton.weight(name).float() for name in names]
    step = entry.steps[-1]
    leader = observer.leader.get(names[0], names[0])
    asked = any(step.smoothquant for step in entry.steps)
    reached = {} if not asked else {"alpha": smoothed[leader].alpha} if leader in smoothed else {"uncovered": 1.0}
    for (each, _), name, weight in zip(members, names, weights, strict=True):
        if not quantize.is_finite(weight):
            raise NumericsError(f"{each.tensor.name}: NaN or Inf in {name}; the checkpoint is damaged, fetch or train it again")
    for name in names:
        noted[name] = {
            **observer.noted(leader),
            **reached,
            **({"fold": smoothed[leader].fold.record()} if leader in smoothed and smoothed[leader].told_by == name else {}),
        }
    if step.gptq is None or leader in observer.rounded:
        clip_search = CLIP_RATIOS if step.rtn and step.rtn.clip else ()
        for name, weight in zip(names, weights, strict=True):
            codes[name] = rtn.quantize(weight.clone(), entry.scheme.weight, scale_dtype=scale_dtype, clip_search=clip_search)
            noted[name] |= _seen_again(
                entry, name, weight, codes[name], codes[name], observer, smoothed.get(leader), limits, looked.get(name)
            )
        return
    hessian = observer.get(names[0], "hessian").value
    if leader in smoothed:
        hessian = smoothing.smoothed_hessian(hessian, smoothed[leader].scales)
    options = step.gptq
    try:
        factor = gptq.factorise(hessian, damping=options.damping, activation_order=options.activation_order)
    except gptq.FactorisationError as error:
        raise NumericsError(f"{names[0]}: {error}") from None
    results = gptq.quantize_together(
        weights,
        entry.scheme.weight,
        scale_dtype=scale_dtype,
        factor=factor,
        block_size=options.block_size,
        static_groups=options.static_groups,
        clip_search=CLIP_RATIOS if options.clip else (),
    )
    for name, weight, result in zip(names, weights, results, strict=True):
        codes[name] = result.qtensor
        rounded = rtn.quantize(weight.clone(), entry.scheme.weight, scale_dtype=scale_dtype)
        lost = output_errors(weight, [rounded.dequantize(), result.qtensor.dequantize()], hessian=hessian)
        errors = [_share(error) for error in lost]
        noted[name] |= _seen_again(entry, name, weight, rounded, result.qtensor, observer, smoothed.get(leader), limits, looked.get(name))
        noted[name] |= {
            "damping": result.damping,
            "dead": float(result.dead),
            "output_error_rounded": errors[0],
            "output_error": errors[1],
            "moved": asdict(moved(weight, result.qtensor)),
        }


def _seen_again(
    entry: Entry,
    name: str,
    weight: torch.Tensor,
    rounded: QTensor,
    chosen: QTensor,
    observer: Observer,
    smoothed: Smoothed | None,
    limits: Mapping[str, float],
    looked: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """A layer's health with what smoothing made of its inputs, and what is lost after it and after the codes were chosen. ``rounded``: the
    ``weight`` as it is now, rounded to nearest where something else ``chosen`` its codes."""
    if not looked:
        return {}
    assert entry.scheme is not None
    rows, limit = observer.get(name, "rows").value, limits.get(name) if entry.scheme.static else None
    more: dict[str, Any] = {}
    errors = list(looked["errors"])
    if smoothed is not None:
        rows = rows.float() / smoothed.scales
        more = {"smoothed": health.describe(observer.get(name, "channels").value / smoothed.scales, rows, limit)}
        errors.append(health.lost("smoothquant", weight, rounded, health.few(rows), entry.scheme.activation, limit))
    last = entry.steps[-1]
    if (last.gptq and chosen is not rounded) or (last.rtn and last.rtn.clip and smoothed is None):
        after = "gptq" if last.gptq else "rtn with clip"
        errors.append(health.lost(after, weight, chosen, health.few(rows), entry.scheme.activation, limit))
    return {"health": {**looked, **more, "errors": errors}}


def _share(error: torch.Tensor) -> float:
    """The error at the layer's output as a share of the output, from that of their squares; to four digits, for it is for people."""
    return float(f"{error.sqrt().item():.4g}")
