"""Chooses the codes of a block's layers from what its inputs were seen to be."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from convert import health, quantize
from convert.algorithms import TRANSFORMS, awq, gptq, rtn, smoothing
from convert.algorithms.bias_correction import correct_bias
from convert.algorithms.output_error import output_errors
from convert.algorithms.rtn import CLIP_RATIOS
from convert.folds import Fold
from convert.groups import Group, fold, powers_of_two
from convert.moved import moved
from convert.observe import Limit, Observer, Stats
from convert.quantize import Piece
from formats.dtypes import DTYPES
from formats.errors import InputError, NumericsError

if TYPE_CHECKING:
    from convert.architecture import Part
    from convert.crew import Crew
    from convert.lanes import Stand
    from convert.ledger import Entry, TargetPlan
    from convert.loading import Skeleton
    from convert.recipe import Gptq, Step
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
    """What the input of a group was divided by: ``scales`` (in,), by the algorithm ``name`` with ``strength``. ``told_by``: in whose health
    ``fold`` is."""

    name: str
    strength: float
    scales: torch.Tensor
    fold: Fold
    told_by: str


@dataclass(frozen=True)
class Known:
    """What is known of the layers of a block when their codes are chosen, by module. ``smoothed``: what became of inputs, by leader;
    ``limits``: what chose static scales, where that is not the largest magnitude; ``inputs``: the largest magnitude that a static scale
    holds, behind smoothing (:func:`input_limits`); ``looked``: what :func:`convert.health.look` saw before."""

    skeleton: Skeleton
    observer: Observer
    smoothed: Mapping[str, Smoothed]
    limits: Mapping[str, Limit]
    inputs: Mapping[str, float]
    looked: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Chosen:
    """The ``codes`` of a module, and what there is to say of them (``noted``), as plain data."""

    codes: QTensor
    noted: dict[str, Any]


def smooth_block(
    target: TargetPlan,
    entries: Sequence[Entry],
    stand: Stand,
    groups: Sequence[Group],
    skeleton: Skeleton,
    observer: Observer,
    crew: Crew,
) -> tuple[dict[str, Smoothed], dict[str, str]]:
    """Moves what is large in inputs into weights, in every group of a block with a layer whose rule asks for it. A group's weights hang on
    what was folded before, so the crew shares out the strengths that are tried on it.

    Returns, by the module that its group's statistics are kept under, what was done, and the tensors that are kept but changed by it, with
    the parameter that each is. The block computes what it computed before.
    """
    asked = {entry.module(part): (entry, step) for entry in entries if (step := entry.asks(*TRANSFORMS)) for part in entry.parts}
    coded = {entry.module(part) for entry in entries for part in entry.parts}
    experts = skeleton.experts_in(stand.name)
    kept = {entry.tensor.name: entry for entry in target.entries if entry.scheme is None}
    done: dict[str, Smoothed] = {}
    changed: dict[str, str] = {}
    order = 0
    for group in groups:
        producer, *consumers = (f"{stand.name}.{name}" for name in (group.producer, *group.consumers))
        routers = [f"{stand.name}.{name}" for name in group.routers]
        told_by = next((name for name in consumers if name in asked), None)
        touched = [name for name in (producer, *consumers, *routers) if name not in skeleton.experts]
        parameters = [f"{module}.{last}" for module in touched for last in ("weight", "bias")]
        filled = [(name, skeleton.own_tensor(name)) for name in parameters if skeleton.has(name)]
        # What is not written here cannot be changed: an expert that is kept, or spelled anew.
        unwritten = [name for name in (producer, *consumers) if name in skeleton.experts and name not in coded]
        if told_by is None or unwritten or any(tensor is None for _, tensor in filled):
            continue
        entry, step = asked[told_by]
        reading = _by_leader(consumers, skeleton, observer)
        if not any(observer.has(leader, "rows" if _searched(step) else "channels") for leader in reading):
            continue  # an expert that no token came to
        strength, scales = _strength(entry, step, reading, observer, group.channels, crew)
        scales = powers_of_two(scales) if group.exact else scales
        stored = kept.get(str(skeleton.own_tensor(f"{producer}.weight"))) if producer not in skeleton.experts else None
        dtype = getattr(torch, DTYPES[stored.plain.dtype].torch_name) if stored else None
        scales = fold(stand.module, group, scales, dtype=dtype, experts=experts)
        rows = scales if group.channels is None else smoothing.of_producer(scales, group.channels)
        told = Fold(producer, (*consumers, *routers), scales, rows, group.offset, order, skeleton.weight(consumers[0]).dtype)
        order += 1
        done |= dict.fromkeys(reading, Smoothed(step.name, strength, scales, told, told_by))
        changed |= {str(tensor): name for name, tensor in filled if tensor in kept}
    return done, changed


def _by_leader(consumers: Sequence[str], skeleton: Skeleton, observer: Observer) -> dict[str, list[torch.Tensor]]:
    """The weights of a group, float32, by the module under which statistics of what they read are kept: experts see different tokens."""
    found: dict[str, list[torch.Tensor]] = {}
    for name in consumers:
        found.setdefault(observer.leader.get(name, name), []).append(skeleton.weight(name).float())
    return found


def _searched(step: Step) -> bool:
    return "search" in ((step.awq and step.awq.ratio), (step.smoothquant and step.smoothquant.alpha))


def _strength(
    entry: Entry,
    step: Step,
    reading: Mapping[str, Sequence[torch.Tensor]],
    observer: Observer,
    channels: torch.Tensor | None,
    crew: Crew,
) -> tuple[float, torch.Tensor]:
    """How strongly a group is scaled, and by what (in,), as the step of one of its layers says; ``reading``: all that read the input, by
    leader. Of experts the largest magnitude counts, and the mean of all tokens; a strength is tried on each with what came to it."""
    assert entry.scheme is not None
    scale_dtype = _scale_dtype(entry)
    weights = [weight for each in reading.values() for weight in each]
    shown = {leader: each for leader, each in reading.items() if observer.has(leader, "rows")}
    pairs = [(observer.get(leader, "rows").value, each) for leader, each in shown.items()] if _searched(step) else []
    if step.awq:
        means = [observer.get(leader, "mean_magnitude") for leader in reading if observer.has(leader, "mean_magnitude")]
        mean = means[0].value if len(means) == 1 else (sum(m.total for m in means) / sum(m.tokens for m in means)).float()
        if step.awq.ratio != "search":
            ratio = float(step.awq.ratio)
            return ratio, awq.awq_scales(mean, ratio=ratio, channels=channels)
        found = awq.search_scales(
            *pairs[0],
            input_mean=mean,
            weight_quantization=entry.scheme.weight,
            scale_dtype=scale_dtype,
            channels=channels,
            others=pairs[1:],
            mapped=crew.map,
        )
        return found.strength or 0.0, found.scales
    assert step.smoothquant is not None
    maxima = [observer.get(leader, "channels").value for leader in reading if observer.has(leader, "channels")]
    absmax = torch.stack(maxima).amax(dim=0)
    if step.smoothquant.alpha != "search":
        alpha = float(step.smoothquant.alpha)
        return alpha, smoothing.smoothing_scales(absmax, weights, alpha=alpha, channels=channels)
    found = smoothing.search_alpha(
        *pairs[0], input_absmax=absmax, weight_quantization=entry.scheme.weight, activation_quantization=entry.scheme.activation,
        scale_dtype=scale_dtype, channels=channels, others=pairs[1:], mapped=crew.map,
    )  # fmt: skip
    return found.strength or 0.0, found.scales


def _correct(entries: Sequence[Entry], known: Known, chosen: Mapping[str, Chosen]) -> dict[str, str]:
    """Takes the mean error of codes out of biases, and notes how far these moved; returns their tensors, with the parameter that each is.
    Raises :class:`InputError` for a bias that is no tensor of its own."""
    found: dict[str, str] = {}
    skeleton, observer = known.skeleton, known.observer
    for entry in entries:
        for name in (entry.module(part) for part in entry.parts if entry.asks("bias_correction")):
            bias = skeleton.model.get_submodule(name).bias
            if bias is None:
                continue
            tensor = skeleton.own_tensor(f"{name}.bias")
            if tensor is None:
                raise InputError(f"{name}.bias is no tensor of its own in the source, so it cannot be corrected; leave bias_correction out")
            leader = observer.leader.get(name, name)
            mean = observer.get(name, "mean").value / (known.smoothed[leader].scales if leader in known.smoothed else 1)
            corrected = correct_bias(bias, skeleton.weight(name).float(), chosen[name].codes.dequantize(), input_mean=mean)
            share = (corrected - bias).float().norm() / bias.float().norm().clamp(min=torch.finfo(torch.float32).tiny)
            chosen[name].noted["bias_moved"] = _short(share)
            bias.copy_(corrected)
            found[tensor] = f"{name}.bias"
    return found


def _as_changed(target: TargetPlan, entry: Entry, parameter: str, skeleton: Skeleton, why: Sequence[str]) -> Solved:
    """A kept tensor as it is now, rounded to what it is stored in, in the block too: the same when it is read back."""
    value: torch.Tensor = skeleton.model.get_parameter(parameter).detach()
    cast = value.to(getattr(torch, DTYPES[entry.plain.dtype].torch_name))
    if not quantize.is_finite(cast):
        raise NumericsError(f"{entry.tensor.name}: smoothing makes values that {entry.plain.dtype} cannot hold; lower alpha")
    value.copy_(cast)
    piece = quantize.plain_piece(target.name, entry, 0, cast.reshape(entry.tensor.matrix_shape))
    return Solved(target.name, entry.tensor.name, (piece,), {entry.tensor.name: dict.fromkeys(why, 1.0)})


def solve_block(
    target: TargetPlan,
    entries: Sequence[Entry],
    known: Known,
    *,
    changed: Mapping[str, str],
    crew: Crew,
    passes: Sequence[Collection[str]] = (),
    seen_in: Callable[[Collection[str]], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[Solved, dict[str, QTensor]]]:
    """The entries of a block in order, each with its codes, by module; before them what is kept and was ``changed``, or is corrected now.

    Layers of one input, scheme and algorithm are solved together, by one thread of the crew; those in ``passes``, named by their leaders,
    last, each pass while ``seen_in(pass)`` lasts, when the observer has their Hessians. Raises :class:`NumericsError`, naming the module,
    for a Hessian that cannot be factorised and for NaN or Inf.
    """
    together = _together(entries, known.observer)
    later = {leader for each in passes for leader in each}
    chosen: dict[str, Chosen] = {}
    first = [group for leader, group in together if leader not in later]
    # The longest begin first, so that no thread ends with one alone.
    for found in crew.map(partial(_solve, known=known), sorted(first, key=_work, reverse=True)):
        chosen |= found
    for each in passes:
        with seen_in(each):
            for found in crew.map(partial(_solve, known=known), [group for leader, group in together if leader in each]):
                chosen |= found
    for module, limit in known.limits.items():
        chosen[module].noted["static"] = limit.record()
    corrected = _correct(entries, known, chosen)
    kept = {entry.tensor.name: entry for entry in target.entries if entry.scheme is None}
    # What is kept but changed comes first: a block is finished when its codes are.
    for tensor, parameter in {**changed, **corrected}.items():
        why = [word for word, those in (("smoothed", changed), ("corrected", corrected)) if tensor in those]
        yield _as_changed(target, kept[tensor], parameter, known.skeleton, why), {}
    stats = Stats(inputs=known.inputs)
    for entry in entries:
        pieces: list[Piece] = []
        modules = [entry.module(part) for part in entry.parts]
        for part, module in zip(entry.parts, modules, strict=True):
            work = quantize.Work(entry.tensor, part.start, part.stop, {}, last=True)
            pieces += quantize.encode(target, entry, part, chosen[module].codes, work, stats)
        solved = Solved(target.name, entry.tensor.name, tuple(pieces), {module: chosen[module].noted for module in modules})
        yield solved, {module: chosen[module].codes for module in modules}


def input_limits(
    observer: Observer, inputs: Mapping[str, float], smoothed: Mapping[str, Smoothed], limits: Mapping[str, Limit]
) -> dict[str, float]:
    """By module, the largest magnitude that the scale of a static input holds, behind smoothing. ``inputs``: before it; ``limits``: where
    something else chose them."""
    seen = {leader: observer.get(leader, "channels").value for leader in smoothed if observer.has(leader, "channels")}
    divided = {
        # Nothing is known of the input of an expert that no token came to: the largest of those beside it clips none of them.
        module: max(
            float((seen[other] / smoothed[other].scales).max())
            for other in ([leader] if leader in seen else [name for name in seen if smoothed[name] is smoothed[leader]])
        )
        for module, leader in observer.leader.items()
        if leader in smoothed
    }
    return {**inputs, **divided, **{module: found.limit for module, found in limits.items()}}


def _together(entries: Sequence[Entry], observer: Observer) -> list[tuple[str, list[tuple[Entry, Part]]]]:
    """Layers that are solved together, with the leader that they have in common."""
    groups: dict[tuple[str, ...], list[tuple[Entry, Part]]] = {}
    for entry in entries:
        for part in entry.parts:
            leader = observer.leader.get(entry.module(part), entry.module(part))
            key = (leader, repr(entry.scheme), repr(entry.steps), entry.scale_dtype, *entry.alongside)
            groups.setdefault(key, []).append((entry, part))
    return [(key[0], members) for key, members in groups.items()]


def _work(members: Sequence[tuple[Entry, Part]]) -> int:
    """What layers that are solved together take, in proportion: their Hessian's cube, and its square for every row."""
    shapes = [part.shape(entry.tensor) for entry, part in members]
    return shapes[0][1] ** 2 * (shapes[0][1] + sum(rows for rows, _ in shapes))


def _solve(members: Sequence[tuple[Entry, Part]], *, known: Known) -> dict[str, Chosen]:
    """The codes of layers that are solved together, by module."""
    entry, _ = members[0]
    names = [each.module(part) for each, part in members]
    weights = [known.skeleton.weight(name).float() for name in names]
    for (each, _), name, weight in zip(members, names, weights, strict=True):
        if not quantize.is_finite(weight):
            raise NumericsError(f"{each.tensor.name}: NaN or Inf in {name}; the checkpoint is damaged, fetch or train it again")
    step = entry.coding
    assert step is not None
    by_gptq = step.gptq is not None and known.observer.leader.get(names[0], names[0]) not in known.observer.rounded
    chosen = _by_gptq(entry, step.gptq, names, weights, known) if by_gptq and step.gptq else _by_rounding(entry, names, weights, known)
    return {name: Chosen(each.codes, {**_told(entry, name, known), **each.noted}) for name, each in zip(names, chosen, strict=True)}


def _told(entry: Entry, name: str, known: Known) -> dict[str, Any]:
    """What became of a layer's input: how many tokens an expert saw, how strongly it was smoothed, and, once in a group, by what."""
    leader = known.observer.leader.get(name, name)
    told: dict[str, Any] = dict(known.observer.noted(leader))
    asked, smoothed = entry.asks(*TRANSFORMS), known.smoothed.get(leader)
    if asked:
        told |= {"alpha" if asked.smoothquant else "ratio": smoothed.strength} if smoothed else {_bare(told): 1.0}
    if smoothed and smoothed.told_by == name:
        told["fold"] = smoothed.fold.record()
    return told


def _bare(noted: Mapping[str, float]) -> str:
    """Why an input was not smoothed: nothing that feeds it was found, or it is that of an expert that no token came to."""
    return "unseen" if noted.get("tokens") == 0 else "uncovered"


def _by_rounding(entry: Entry, names: Sequence[str], weights: Sequence[torch.Tensor], known: Known) -> list[Chosen]:
    step = entry.coding
    assert entry.scheme is not None
    clip_search, absmax = CLIP_RATIOS if step and step.rtn and step.rtn.clip else (), _absmax(entry, weights)
    chosen = []
    for name, weight in zip(names, weights, strict=True):
        codes = rtn.quantize(weight.clone(), entry.scheme.weight, scale_dtype=_scale_dtype(entry), clip_search=clip_search, absmax=absmax)
        chosen.append(Chosen(codes, _seen_again(entry, name, weight, codes, codes, known)))
    return chosen


def _by_gptq(entry: Entry, options: Gptq, names: Sequence[str], weights: Sequence[torch.Tensor], known: Known) -> list[Chosen]:
    """Of the layers that read one input, whose Hessian is factorised once. Raises :class:`NumericsError` where it cannot be."""
    assert entry.scheme is not None
    hessian = known.observer.get(names[0], "hessian").value
    leader = known.observer.leader.get(names[0], names[0])
    if leader in known.smoothed:
        hessian = smoothing.smoothed_hessian(hessian, known.smoothed[leader].scales)
    try:
        factor = gptq.factorise(hessian, damping=options.damping, activation_order=options.activation_order)
    except gptq.FactorisationError as error:
        raise NumericsError(f"{names[0]}: {error}") from None
    absmax = _absmax(entry, weights)
    results = gptq.quantize_together(
        weights,
        entry.scheme.weight,
        scale_dtype=_scale_dtype(entry),
        factor=factor,
        block_size=min(options.block_size, weights[0].shape[1]),
        static_groups=options.static_groups,
        clip_search=CLIP_RATIOS if options.clip else (),
        absmax=absmax,
    )
    chosen = []
    for name, weight, result in zip(names, weights, results, strict=True):
        rounded = rtn.quantize(weight.clone(), entry.scheme.weight, scale_dtype=_scale_dtype(entry), absmax=absmax)
        before, after = output_errors(weight, [rounded.dequantize(), result.qtensor.dequantize()], hessian=hessian)
        noted = {
            **_seen_again(entry, name, weight, rounded, result.qtensor, known),
            "damping": result.damping,
            "dead": float(result.dead),
            "output_error_rounded": _short(before.sqrt()),
            "output_error": _short(after.sqrt()),
            "moved": asdict(moved(weight, result.qtensor)),
        }
        chosen.append(Chosen(result.qtensor, noted))
    return chosen


def _seen_again(entry: Entry, name: str, weight: torch.Tensor, rounded: QTensor, chosen: QTensor, known: Known) -> dict[str, Any]:
    """A layer's health with what smoothing made of its inputs, and what is lost after it and after the codes were chosen. ``rounded``: the
    ``weight`` as it is now, rounded to nearest where something else ``chosen`` its codes."""
    looked = known.looked.get(name)
    if not looked:
        return {}
    assert entry.scheme is not None
    smoothed = known.smoothed.get(known.observer.leader.get(name, name))
    rows, limit = known.observer.get(name, "rows").value, known.inputs.get(name) if entry.scheme.static else None
    more: dict[str, Any] = {}
    errors = list(looked["errors"])
    if smoothed is not None:
        rows = rows.float() / smoothed.scales
        more = {"smoothed": health.describe(known.observer.get(name, "channels").value / smoothed.scales, rows, limit)}
        errors.append(health.lost(smoothed.name, weight, rounded, health.few(rows), entry.scheme.activation, limit))
    last = entry.coding
    assert last is not None
    if (last.gptq and chosen is not rounded) or (last.rtn and last.rtn.clip and smoothed is None):
        after = "gptq" if last.gptq else "rtn with clip"
        errors.append(health.lost(after, weight, chosen, health.few(rows), entry.scheme.activation, limit))
    return {"health": {**looked, **more, "errors": errors}}


def _absmax(entry: Entry, weights: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """What the scale holds that layers solved together have together, where they have one."""
    return torch.stack([weight.abs().amax() for weight in weights]).amax() if entry.alongside else None


def _scale_dtype(entry: Entry) -> torch.dtype:
    found: torch.dtype = getattr(torch, DTYPES[entry.scale_dtype].torch_name)
    return found


def _short(value: torch.Tensor) -> float:
    """To four digits, for it is for people."""
    return float(f"{value.item():.4g}")
