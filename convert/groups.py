"""Which channels of a block can be scaled without changing what it computes, found by scaling them and looking.

No table of names: a norm feeds the linears that were handed the very tensor it returned; a linear feeds another if, when its rows are
multiplied by factors, each channel of the other's input comes out multiplied by one of them, which also tells by which one (several query
heads may share values). Every group is then proved: with random scales folded in, the block must return what it returned before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from convert.lanes import Stand

#: How much a ratio may differ from one token to another, and a block's output from what it was, in float32 and otherwise.
TOLERANCE = {torch.float32: 1e-3}
COARSE = 4e-2


@dataclass(frozen=True)
class Group:
    """``consumers`` (linears) read what ``producer`` (a norm or a linear) makes; names are relative to the block.

    ``channels`` (in,): the producer's channel behind each channel of their input, None where they are the same. ``offset``: what a norm
    adds to its weight before it multiplies.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: torch.Tensor | None = None
    offset: float = 0.0


def find_groups(stand: Stand, likely: tuple[Group, ...] = ()) -> tuple[Group, ...]:
    """The groups of a block, in the order in which their consumers are called. Runs its first batch a few times; leaves it as it was.

    ``likely``: those of a block before it, which are only proved anew, all at once, where they all hold here too. The block computes in the
    dtype of its parameters, whatever that of the lane: float32 tells a scale from rounding where bfloat16 does not.
    """
    block = stand.module
    dtype = next(block.parameters()).dtype
    tolerance = TOLERANCE.get(dtype, COARSE)
    modules = {name: module for name, module in block.named_modules() if name}
    linears = {name: module for name, module in modules.items() if type(module) is torch.nn.Linear}
    inputs, makers, together, expected = _observe(stand, modules, linears)
    if likely and _same_names(likely, together) and _commutes(stand, likely, expected, tolerance):
        return likely
    found: list[Group] = []
    for consumers in together:
        candidates: list[Group] = []
        maker = makers.get(consumers[0])
        weight = getattr(modules[maker], "weight", None) if maker else None
        if maker is not None and weight is not None and weight.dim() == 1:
            candidates = [Group(maker, consumers, offset=offset) for offset in (0.0, 1.0)]
        found += [next((group for group in candidates if _commutes(stand, [group], expected, tolerance)), None) or Group("", consumers)]
    open_ = {group.consumers[0]: group for group in found if not group.producer}
    for producer, module in linears.items():
        for consumer, channels in _traced(stand, module, {name: modules[name] for name in open_}, inputs, tolerance).items():
            group = Group(producer, open_[consumer].consumers, channels)
            if producer not in group.consumers and _commutes(stand, [group], expected, tolerance):
                found[found.index(open_.pop(consumer))] = group
    return tuple(group for group in found if group.producer)


def fold(block: Any, group: Group, scales: torch.Tensor, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Divides what the producer makes by ``scales`` (in,), equal for all channels that share a producer's, and multiplies the consumers'
    columns by the same.

    A norm's weight is rounded to ``dtype``, in which it will be stored; the consumers' factors make up for that, and are returned.
    """
    from convert.algorithms import smoothing

    producer = block.get_submodule(group.producer)
    bias = getattr(producer, "bias", None)
    if producer.weight.dim() == 1:
        was = producer.weight.float() + group.offset
        weight, bias = smoothing.fold_into_norm(producer.weight, bias, scales, offset=group.offset)
        weight = weight.to(dtype or weight.dtype).to(weight.dtype)
        now = weight.float() + group.offset
        if bias is None:
            scales = torch.where((now == 0) | (was == 0), scales, was / now)
    else:
        of_rows = scales if group.channels is None else smoothing.of_producer(scales, group.channels)
        weight, bias = smoothing.fold_into_producer(producer.weight, bias, of_rows)
    producer.weight.copy_(weight)
    if bias is not None:
        producer.bias.copy_(bias)
    for consumer in group.consumers:
        module = block.get_submodule(consumer)
        module.weight.copy_(smoothing.fold_into_consumer(module.weight, scales))
    return scales


def _same_names(likely: tuple[Group, ...], together: list[tuple[str, ...]]) -> bool:
    return {group.consumers for group in likely} <= set(together)


def _observe(
    stand: Stand, modules: dict[str, Any], linears: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, str], list[tuple[str, ...]], torch.Tensor]:
    """Inputs of linears, which leaf module made them, which linears read the same, and what the block returns."""
    inputs: dict[str, torch.Tensor] = {}
    made: dict[int, str] = {}
    held: list[torch.Tensor] = []
    together: dict[int, list[str]] = {}
    makers: dict[str, str] = {}

    def enter(name: str, args: Any) -> None:
        if name in linears and args:
            inputs[name] = args[0]
            together.setdefault(id(args[0]), []).append(name)
            if id(args[0]) in made:
                makers[name] = made[id(args[0])]

    def leave(name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            held.append(output)
            made[id(output)] = name

    leaves = [name for name, module in modules.items() if not any(True for _ in module.children())]
    hooks = [modules[name].register_forward_pre_hook(lambda _, args, name=name: enter(name, args)) for name in leaves]
    hooks += [modules[name].register_forward_hook(lambda _m, _a, output, name=name: leave(name, output)) for name in leaves]
    try:
        expected = first_tensor(stand.output(0, next(stand.module.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs, makers, [tuple(names) for names in together.values()], expected


def _traced(
    stand: Stand, producer: Any, consumers: dict[str, Any], inputs: dict[str, torch.Tensor], tolerance: float
) -> dict[str, torch.Tensor]:
    """By consumer of which each channel of the input follows one row of ``producer``: that row, (in,).

    Rows are numbered with two digits, and multiplied by a factor for each digit in turn: few factors, far apart.
    """
    rows = len(producer.weight)
    base = max(2, int(rows**0.5) + 1)
    number = torch.arange(rows, device=producer.weight.device)
    factors = torch.logspace(-1, 1, base, base=2.0, device=producer.weight.device)
    digits = [
        _digit(stand, producer, factors[digit], factors, consumers, inputs, min(tolerance, 0.2 / base))
        for digit in (number % base, number // base)
    ]
    found = {name: low + base * digits[1][name] for name, low in digits[0].items() if name in digits[1]}
    return {name: channels for name, channels in found.items() if len(torch.unique(channels)) == rows and int(channels.max()) < rows}


def _digit(
    stand: Stand,
    producer: Any,
    of_rows: torch.Tensor,
    factors: torch.Tensor,
    consumers: dict[str, Any],
    inputs: dict[str, torch.Tensor],
    tolerance: float,
) -> dict[str, torch.Tensor]:
    """By consumer: which of ``factors`` each channel of its input was multiplied by, where each was by one."""
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]})) for name, module in consumers.items()
    ]
    try:
        with _scaled(producer, of_rows):
            stand.output(0, producer.weight.dtype)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, now in seen.items():
        was = inputs[name].reshape(-1, inputs[name].shape[-1]).float()
        ratio = _ratio(was, now.reshape(was.shape).float(), tolerance)
        if ratio is not None:
            found[name] = (ratio[:, None].log() - factors.log()).abs().argmin(dim=1)
    return found


def _ratio(was: torch.Tensor, now: torch.Tensor, tolerance: float) -> torch.Tensor | None:
    """(in,): how many times larger each channel became, None unless that is so at every token, and some channel did change."""
    ratio = (was * now).sum(dim=0) / was.square().sum(dim=0)
    if not bool((torch.isfinite(ratio) & (ratio > 0)).all()):
        return None
    error = (now - was * ratio).norm(dim=0) / now.norm(dim=0)
    return ratio if bool((error <= tolerance).all()) and bool(((ratio - 1).abs() > tolerance).any()) else None


class _scaled:  # noqa: N801  reads as a verb where it is used
    """A linear whose rows, and bias, are multiplied while the context lasts."""

    def __init__(self, module: Any, factors: torch.Tensor) -> None:
        self._module = module
        self._factors = factors

    def __enter__(self) -> None:
        self._was = [(p, p.clone()) for p in (self._module.weight, self._module.bias) if p is not None]
        self._module.weight.mul_(self._factors[:, None].to(self._module.weight.dtype))
        if self._module.bias is not None:
            self._module.bias.mul_(self._factors.to(self._module.bias.dtype))

    def __exit__(self, *error: object) -> None:
        for parameter, was in self._was:
            parameter.copy_(was)


def _commutes(stand: Stand, groups: Sequence[Group], expected: torch.Tensor, tolerance: float) -> bool:
    """Whether the block returns what it returned, with random scales folded into all of ``groups``."""
    block = stand.module
    names = dict.fromkeys(name for group in groups for name in (group.producer, *group.consumers))
    touched = [block.get_submodule(name) for name in names]
    was = [(p, p.clone()) for module in touched for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    generator = torch.Generator().manual_seed(0)
    try:
        for group in groups:
            weight = block.get_submodule(group.producer).weight
            of_producer = torch.exp2(torch.rand(len(weight), generator=generator) * 4 - 2).to(weight.device)
            fold(block, group, of_producer if group.channels is None else of_producer[group.channels])
        now = first_tensor(stand.output(0, weight.dtype))
    finally:
        for parameter, before in was:
            parameter.copy_(before)
    return bool((now - expected).float().norm() <= tolerance * expected.float().norm())


def first_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else first_tensor(value[0])
