"""Which channels of a block can be scaled without changing what it computes, found by scaling them and looking.

No table of names: a norm feeds the linears that were handed the very tensor it returned; a linear feeds another if, when its rows are
multiplied by factors, each channel of the other's input comes out multiplied by one of them, which also tells by which one (several query
heads may share values). A router reads what its experts read, so its columns are multiplied with theirs. Every group is then proved: with
random scales folded in, the block must return what it returned before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from convert.experts import Products, around

if TYPE_CHECKING:
    from convert.lanes import Stand
    from convert.loading import Place

#: How much a ratio may differ from one token to another, and a block's output from what it was, in float32 and otherwise.
TOLERANCE = {torch.float32: 1e-3}
COARSE = 4e-2


@dataclass(frozen=True)
class Group:
    """``consumers`` (linears and experts) read what ``producer`` (a norm, a linear or an expert) makes; names are relative to the block.

    ``channels`` (in,): the producer's channel behind each channel of their input, None where they are the same. ``offset``: what a norm
    adds to its weight before it multiplies. ``routers``: modules that read it too and stay in 16 bit. ``of_expert``: one expert's matrices
    feed each other.
    """

    producer: str
    consumers: tuple[str, ...]
    channels: torch.Tensor | None = None
    offset: float = 0.0
    routers: tuple[str, ...] = ()
    of_expert: bool = False

    @property
    def exact(self) -> bool:
        """Whether scales are powers of two: exact in 16 bit, so that a router sends every token where it went, and a byte each in the
        manifest, which a model with thousands of experts is full of."""
        return bool(self.routers) or self.of_expert


def find_groups(stand: Stand, likely: tuple[Group, ...] = (), experts: Mapping[str, Place] | None = None) -> tuple[Group, ...]:
    """The groups of a block, in the order in which their consumers are called. Runs its first batch a few times; leaves it as it was.

    ``likely``: those of a block before it with parameters of the same names and shapes. Where they all hold here too they are only proved
    anew, all at once, on the shortest that the stand has (:attr:`convert.lanes.Stand.sample`); to find groups takes a batch, for a channel
    that is zero at every token tells nothing.
    The block computes in the dtype of its parameters, whatever that of the lane: float32 tells a scale from rounding where bfloat16 does
    not. ``experts`` of the block (:meth:`convert.loading.Skeleton.experts_in`) are consumers and producers like linears; it is proved on
    those that tokens go to.
    """
    experts = experts or {}
    block = stand.module
    dtype = next(block.parameters()).dtype
    tolerance = TOLERANCE.get(dtype, COARSE)
    modules = {name: module for name, module in block.named_modules() if name}
    linears = {name: module for name, module in modules.items() if type(module) is torch.nn.Linear}
    if likely:
        seen = _observe(stand, stand.sample, modules, linears, experts)
        if _same_names(likely, seen) and _commutes(stand, stand.sample, likely, seen.output, tolerance, experts):
            return likely
    seen = _observe(stand, 0, modules, linears, experts)
    expected, inputs = seen.output, seen.inputs
    found: list[Group] = []
    for consumers in seen.together:
        candidates: list[Group] = []
        maker = seen.makers.get(consumers[0])
        weight = getattr(modules[maker], "weight", None) if maker else None
        if maker is not None and weight is not None and weight.dim() == 1:
            routers = seen.routers.get(consumers[0], ())
            candidates = [Group(maker, consumers, offset=offset, routers=routers) for offset in (0.0, 1.0)]
        proved = next((group for group in candidates if _commutes(stand, 0, [group], expected, tolerance, experts)), None)
        found.append(proved or Group("", consumers))
    for feeding in seen.pairs:
        pairs = [Group(producer, (consumer,), of_expert=True) for producer, consumer in feeding.items()]
        if _commutes(stand, 0, pairs, expected, tolerance, experts):
            found += pairs
    open_ = {group.consumers[0]: group for group in found if not group.producer and group.consumers[0] in linears}
    for producer, module in linears.items():
        for consumer, channels in _traced(stand, module, {name: modules[name] for name in open_}, inputs, tolerance).items():
            group = Group(producer, open_[consumer].consumers, channels)
            if producer not in group.consumers and _commutes(stand, 0, [group], expected, tolerance, experts):
                found[found.index(open_.pop(consumer))] = group
    return tuple(group for group in found if group.producer)


def powers_of_two(scales: torch.Tensor) -> torch.Tensor:
    """The nearest power of two of each of ``scales``, float32; zeros, Inf and NaN become 1."""
    usable = torch.isfinite(scales) & (scales > 0)
    return torch.exp2(torch.where(usable, scales, torch.ones_like(scales)).float().log2().round())


def fold(
    block: Any, group: Group, scales: torch.Tensor, *, dtype: torch.dtype | None = None, experts: Mapping[str, Place] | None = None
) -> torch.Tensor:
    """Divides what the producer makes by ``scales`` (in,), equal for all channels that share a producer's, and multiplies the consumers'
    columns by the same.

    A norm's weight is rounded to ``dtype``, in which it will be stored; the consumers' factors make up for that, and are returned.
    """
    from convert.algorithms import smoothing

    made = _matrix(block, group.producer, experts)
    bias = getattr(block.get_submodule(group.producer), "bias", None) if group.producer not in (experts or {}) else None
    own_bias: Any = bias
    if made.dim() == 1:
        was = made.float() + group.offset
        weight, bias = smoothing.fold_into_norm(made, bias, scales, offset=group.offset)
        weight = weight.to(dtype or weight.dtype).to(weight.dtype)
        now = weight.float() + group.offset
        if bias is None:
            scales = torch.where((now == 0) | (was == 0), scales, was / now)
    else:
        of_rows = scales if group.channels is None else smoothing.of_producer(scales, group.channels)
        weight, bias = smoothing.fold_into_producer(made, bias, of_rows)
    made.copy_(weight)
    if bias is not None:
        own_bias.copy_(bias)
    for consumer in (*group.consumers, *group.routers):
        matrix = _matrix(block, consumer, experts)
        matrix.copy_(smoothing.fold_into_consumer(matrix, scales))
    return scales


def _matrix(block: Any, name: str, experts: Mapping[str, Place] | None) -> torch.Tensor:
    """The weight of a module or of an expert, a view."""
    place = (experts or {}).get(name)
    weight: torch.Tensor = block.get_submodule(name).weight.detach() if place is None else place.of(block)
    return weight


def _same_names(likely: tuple[Group, ...], seen: _Seen) -> bool:
    linears = {group.consumers for group in likely}
    return linears <= {*seen.together, *((consumer,) for pairs in seen.pairs for consumer in pairs.values())}


@dataclass(frozen=True)
class _Seen:
    """Of a run of a block: ``inputs`` of linears; the leaf module that ``makers`` names for a consumer; consumers that read the same,
    ``together``, and, by the first of them, ``routers`` that read it too; experts that may feed one another, ``pairs``, producer by
    consumer for each of the places that a producer may have; and the block's ``output``."""

    inputs: Mapping[str, torch.Tensor]
    makers: Mapping[str, str]
    together: Sequence[tuple[str, ...]]
    routers: Mapping[str, tuple[str, ...]]
    pairs: Sequence[Mapping[str, str]]
    output: torch.Tensor


def _observe(stand: Stand, i: int, modules: dict[str, Any], linears: dict[str, Any], experts: Mapping[str, Place]) -> _Seen:
    """Runs a batch through the block once and sees what goes where."""
    eye = _Eye(stand.module, modules, linears, experts)
    with eye:
        output = first_tensor(stand.output(i, next(stand.module.parameters()).dtype))
    return eye.seen(output)


#: Where a tensor lies, whatever the shape of what precedes its last axis: the same memory holds the same numbers.
_Memory = tuple[int, ...]


class _Eye:
    """Hooks on a block while it runs: which modules read, and which one made, what lies in a piece of memory."""

    def __init__(self, block: Any, modules: dict[str, Any], linears: dict[str, Any], experts: Mapping[str, Place]) -> None:
        self._block, self._modules, self._linears, self._experts = block, modules, linears, experts
        self._held: list[torch.Tensor] = []  # so that no memory is reused
        self._made: dict[_Memory, str] = {}
        self._inputs: dict[str, torch.Tensor] = {}
        self._makers: dict[str, str] = {}
        self._readers: dict[_Memory, list[str]] = {}
        self._routers: dict[_Memory, list[str]] = {}
        # By owner of experts' parameters: these in the order of their products, and what it reads.
        self._products: dict[str, list[str]] = {place.parameter.rpartition(".")[0]: [] for place in experts.values()}
        self._read: dict[str, _Memory] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> _Eye:
        for name, module in self._modules.items():
            if name in self._products or not any(True for _ in module.children()):
                self._hooks.append(module.register_forward_pre_hook(lambda _, args, name=name: self._enter(name, args)))
                self._hooks.append(module.register_forward_hook(lambda _m, _a, output, name=name: self._leave(name, output)))
        for name in self._products:
            self._hooks += around(self._modules[name], lambda name=name: self._watch(name))  # type: ignore[misc]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str, args: Any) -> None:
        x = next((value for value in args if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1), None)
        if x is None:
            return
        self._held.append(x)
        weight = getattr(self._modules[name], "weight", None)
        if name in self._products:
            self._read[name] = _memory(x)
        elif name in self._linears:
            self._inputs[name] = x
            self._readers.setdefault(_memory(x), []).append(name)
            if _memory(x) in self._made:
                self._makers[name] = self._made[_memory(x)]
        elif weight is not None and weight.dim() == 2 and weight.shape[1] == x.shape[-1]:
            self._routers.setdefault(_memory(x), []).append(name)

    def _leave(self, name: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            self._held.append(output)
            self._made[_memory(output)] = name

    def _watch(self, owner: str) -> Products:
        """Notes the order in which an owner's parameters are multiplied."""
        inside = {place.parameter for place in self._experts.values() if place.parameter.rpartition(".")[0] == owner}
        order = self._products[owner]
        return Products(
            {parameter: self._block.get_parameter(parameter) for parameter in inside},
            lambda parameter, *_: order.append(parameter) if parameter not in order else None,
        )

    def seen(self, output: torch.Tensor) -> _Seen:
        """All of it, when the block has run."""
        readers, makers, pairs = dict(self._readers), dict(self._makers), []
        for name, parameters in self._products.items():
            reading = [expert for expert, place in self._experts.items() if place.parameter in parameters[:1]]
            if len(parameters) == 2 and self._covers(reading, parameters[0], self._read[name][-1]):
                # What is multiplied first reads the owner's input, and makes the other's.
                readers[self._read[name]] = [*readers.get(self._read[name], ()), *reading]
                makers |= dict.fromkeys(reading, self._made[self._read[name]]) if self._read[name] in self._made else {}
                pairs += _pairs(self._block, self._experts, *parameters)
            elif name in self._read:  # an expert that no token of this batch comes to would not be missed by any proof
                readers.pop(self._read[name], None)
        return _Seen(
            inputs=self._inputs,
            makers=makers,
            together=[tuple(names) for names in readers.values()],
            routers={names[0]: tuple(self._routers[memory]) for memory, names in readers.items() if memory in self._routers},
            pairs=pairs,
            output=output,
        )

    def _covers(self, reading: Sequence[str], parameter: str, features: int) -> bool:
        """Whether experts that read ``features`` are all there is in a parameter."""
        whole = self._block.get_parameter(parameter)
        return len(whole) > 0 and sum(len(_matrix(self._block, expert, self._experts)) for expert in reading) == whole.numel() // features


def _memory(x: torch.Tensor) -> _Memory:
    return (x.untyped_storage().data_ptr(), int(x.storage_offset()), x.numel(), x.shape[-1])


def _pairs(block: Any, experts: Mapping[str, Place], first: str, second: str) -> list[dict[str, str]]:
    """What an expert of the ``second`` parameter reads may be made by rows of the ``first``: for each run of rows there of that many, the
    experts that may make it, each with the one that reads it."""
    reads = {place.expert: name for name, place in experts.items() if place.parameter == second}
    found: dict[int, dict[str, str]] = {}
    for name, place in experts.items():
        wide = _matrix(block, reads[place.expert], experts).shape[1] if place.parameter == first and place.expert in reads else -1
        if place.stop - place.start == wide:
            found.setdefault(place.start, {})[name] = reads[place.expert]
    return list(found.values())


def _traced(
    stand: Stand, producer: Any, consumers: dict[str, Any], inputs: Mapping[str, torch.Tensor], tolerance: float
) -> dict[str, torch.Tensor]:
    """By consumer of which each channel of the input follows one row of ``producer``: that row, (in,).

    Rows are numbered with two digits, and multiplied by a factor for each digit in turn: few factors, far apart.
    """
    rows = len(producer.weight)
    base = max(2, int(rows**0.5) + 1)
    number = torch.arange(rows, device=producer.weight.device)
    factors = torch.logspace(-1, 1, base, base=2.0, device=producer.weight.device)
    tolerance = min(tolerance, 0.2 / base)
    low = _digit(stand, producer, factors[number % base], factors, consumers, inputs, tolerance)
    high = _digit(stand, producer, factors[number // base], factors, consumers, inputs, tolerance) if low else {}
    found = {name: digits + base * high[name] for name, digits in low.items() if name in high}
    return {name: channels for name, channels in found.items() if len(torch.unique(channels)) == rows and int(channels.max()) < rows}


def _digit(
    stand: Stand,
    producer: Any,
    of_rows: torch.Tensor,
    factors: torch.Tensor,
    consumers: dict[str, Any],
    inputs: Mapping[str, torch.Tensor],
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


def _commutes(
    stand: Stand, i: int, groups: Sequence[Group], expected: torch.Tensor, tolerance: float, experts: Mapping[str, Place] | None = None
) -> bool:
    """Whether the block returns what it returned for a batch, with random scales folded into all of ``groups``."""
    block = stand.module
    experts = experts or {}
    names = dict.fromkeys(name for group in groups for name in (group.producer, *group.consumers, *group.routers))
    touched = [block.get_submodule(name) for name in names if name not in experts]
    parameters = dict.fromkeys(experts[name].parameter for name in names if name in experts)
    was = [(p, p.clone()) for module in touched for p in (module.weight, getattr(module, "bias", None)) if p is not None]
    was += [(p, p.clone()) for p in map(block.get_parameter, parameters)]
    generator = torch.Generator().manual_seed(0)
    try:
        for group in groups:
            weight = _matrix(block, group.producer, experts)
            of_producer = torch.exp2(torch.rand(len(weight), generator=generator) * 4 - 2).to(weight.device)
            of_producer = powers_of_two(of_producer) if group.exact else of_producer
            fold(block, group, of_producer if group.channels is None else of_producer[group.channels], experts=experts)
        now = first_tensor(stand.output(i, weight.dtype))
    finally:
        for parameter, before in was:
            parameter.copy_(before)
    return bool((now - expected).float().norm() <= tolerance * expected.float().norm())


def first_tensor(value: Any) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else first_tensor(value[0])
