"""What is kept of a model at work: accumulators at the inputs of its linear layers, and the numbers they end in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from threading import local
from traceback import clear_frames
from typing import TYPE_CHECKING, Any

from convert.crew import Crew
from formats.errors import InputError, MachineError

if TYPE_CHECKING:
    import torch

    from convert.experts import Watch
    from convert.loading import Skeleton


#: Rows of each sequence that searches try things on.
ROWS = 8


@dataclass(frozen=True)
class Limit:
    """``limit``: the magnitude that the largest code of an input stands for. Of the input that calibration saw: the share ``clipped``
    at it, and ``lost``, the error of its codes as a share of its length."""

    limit: float
    clipped: float
    lost: float

    def record(self) -> dict[str, float]:
        """To four digits, for people."""
        return {name: float(f"{value:.4g}") for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Stats:
    """Largest magnitudes: of the input of each linear module, and of each head's keys (after the rotary embedding) and values, by
    attention module. ``record`` says on which text they were seen; ``health`` what :mod:`convert.health` found of layers that were not
    solved. ``limits``: by target and module, what static scales hold where something else than the largest magnitude chose them;
    ``inputs`` has it too. ``experts``, by module, how many tokens came to an expert, and what was done where those were too few
    (:meth:`Observer.noted`)."""

    inputs: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Mapping[str, Limit]] = field(default_factory=dict)
    health: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    experts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


NO_STATS = Stats()


@dataclass(frozen=True)
class CacheRanges:
    """The largest magnitude of each head's keys and values, (heads,), by layer."""

    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def joined(each: Sequence[CacheRanges]) -> CacheRanges:
        """The largest of all batches."""
        import torch

        joined = CacheRanges()
        for ranges in each:
            for into, seen in ((joined.keys, ranges.keys), (joined.values, ranges.values)):
                for layer, absmax in seen.items():
                    into[layer] = torch.maximum(into[layer], absmax) if layer in into else absmax
        return joined


def watch_cache(batches: list[dict[str, Any]]) -> list[CacheRanges]:
    """Gives every batch a cache that keeps nothing but how large keys and values become."""
    import torch
    from transformers import DynamicCache

    class Watcher(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            self.ranges = CacheRanges()

        def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
            for seen, states in ((self.ranges.keys, key_states), (self.ranges.values, value_states)):
                absmax = states.detach().abs().amax(dim=(0, 2, 3)).float()
                seen[layer_idx] = torch.maximum(seen[layer_idx], absmax) if layer_idx in seen else absmax
            return key_states, value_states

    watchers = [Watcher() for _ in batches]
    for batch, watcher in zip(batches, watchers, strict=True):
        batch |= {"past_key_values": watcher, "use_cache": True}
    return [watcher.ranges for watcher in watchers]


@dataclass(frozen=True)
class Shown:
    """What an input (..., in) of ``dtype`` was reduced to when a module was handed it, by kind of accumulator. ``factor``: what a Hessian
    multiplies, which may be the input itself, and how often it had been written to by then."""

    leader: str
    tokens: int
    dtype: torch.dtype
    reduced: Mapping[str, Any]
    factor: tuple[torch.Tensor, int] | None


class _Enough(BaseException):
    """Nothing that follows in this run would be looked at. No model's own ``except Exception`` may hold it up."""


class Observer:
    """Accumulators for the inputs of linear modules; modules that read the same input share one.

    What a batch shows is noted in the thread that runs it, and taken in the order of batches: sums come out the same for any number of
    threads. An expert that ``skeleton`` found is a module among others. ``shown`` and ``rounded``: experts that see too few tokens, and
    either were shown all of their layer or are rounded.
    """

    def __init__(self, skeleton: Skeleton, groups: Sequence[Sequence[str]] | None) -> None:
        self.leader = {module: group[0] for group in groups or () for module in group}
        self.shown: set[str] = set()
        self.rounded: set[str] = set()
        self._experts: dict[tuple[str, int], str] = {}
        for module, place in sorted(skeleton.experts.items(), key=lambda item: item[1].start):
            self.leader[module] = self._experts.setdefault((place.parameter, place.expert), module)
        self._places = {module: place for place, module in self._experts.items()}
        self._tokens: Counter[str] = Counter()
        self._only: frozenset[str] | None = None
        self._watches: dict[str, Watch] = {}
        self._modules = dict(skeleton.model.named_modules())
        self._seen: dict[str, dict[str, Any]] = {}
        self._hooks: list[Any] = []
        self._thread = local()

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in (*self._hooks, *self._watches.values()):
            hook.remove()

    def want(self, modules: Sequence[str], kind: str) -> None:
        """Begins to accumulate the inputs of modules, where that was not begun: ``absmax``, ``channels`` (absmax of each), ``maxima``
        (absmax of each batch), ``mean`` and ``mean_magnitude`` (of each channel), ``histogram`` (of magnitudes), ``hessian``, or ``rows``
        (some of them as they are)."""
        for module in modules:
            leader = self.leader.get(module, module)
            if leader not in self._seen:
                self._seen[leader] = {}
                if leader in self._places:
                    self._watch(self._places[leader][0])
                else:
                    hook = self._modules[leader].register_forward_pre_hook(lambda _, args, name=leader: self._feed(name, args[0]))
                    self._hooks.append(hook)
            self._seen[leader].setdefault(kind, None)

    def get(self, module: str, kind: str) -> Any:
        """The accumulator. Raises :class:`InputError` where the module was never run."""
        found = self._seen.get(self.leader.get(module, module), {}).get(kind)
        if found is None:
            raise InputError(f"{module} was never run by calibration, so nothing is known of its inputs")
        return found

    def has(self, module: str, kind: str) -> bool:
        return self._seen.get(self.leader.get(module, module), {}).get(kind) is not None

    def absmax(self) -> dict[str, float]:
        """By module, for all that read an input whose largest magnitude is known."""
        members = [(module, leader) for module, leader in self.leader.items()] + [(leader, leader) for leader in self._seen]
        seen = {leader: kinds["absmax"].value.item() for leader, kinds in self._seen.items() if kinds.get("absmax") is not None}
        for leader in self.rounded:
            # Nothing is known of this input: the largest of those beside it clips none of them.
            beside = [seen[other] for other, place in self._places.items() if place[0] == self._places[leader][0] and other in seen]
            if "absmax" in self._seen[leader] and beside:
                seen[leader] = max(beside)
        return {module: seen[leader] for module, leader in members if leader in seen}

    def too_few(self, modules: Iterable[str], least: int) -> dict[str, int]:
        """Experts among ``modules`` that fewer than ``least`` tokens came to, each with that number, under the module that leads them."""
        leaders = dict.fromkeys(self.leader.get(module, module) for module in modules)
        return {leader: self._tokens[leader] for leader in leaders if leader in self._places and self._tokens[leader] < least}

    def show_all(self, leaders: Iterable[str], run: Callable[[], None]) -> None:
        """Has ``run`` (of a block) show these experts all tokens of their layer, in place of those that came to them."""
        numbers: dict[str, list[int]] = {}
        for leader in leaders:
            parameter, expert = self._places[leader]
            numbers.setdefault(parameter.rpartition(".")[0], []).append(expert)
            self._seen[leader] = dict.fromkeys(self._seen[leader])
            self._tokens[leader] = 0
            self.shown.add(leader)
        for owner, experts in numbers.items():
            self._watches[owner].show = tuple(dict.fromkeys(experts))
        self._only = frozenset(self.shown)
        run()
        self._only = None
        for owner in numbers:
            self._watches[owner].show = ()

    def noted(self, module: str) -> dict[str, float]:
        """Of an expert: how many tokens its statistics are of, and what was done where too few came to it."""
        leader = self.leader.get(module, module)
        if leader not in self._places:
            return {}
        done = {"shown_all_tokens": leader in self.shown, "rounded": leader in self.rounded}
        return {"tokens": float(self._tokens[leader]), **{name: 1.0 for name, was in done.items() if was}}

    def experts(self) -> dict[str, dict[str, float]]:
        """:meth:`noted`, for every expert that was to be seen."""
        return {module: self.noted(module) for module, leader in self.leader.items() if leader in self._places and leader in self._seen}

    def _watch(self, parameter: str) -> None:
        from convert.experts import Watch

        owner = parameter.rpartition(".")[0]
        if owner not in self._watches:
            names = dict.fromkeys(name for name, _ in self._experts if name.rpartition(".")[0] == owner)
            self._watches[owner] = Watch(
                self._modules[owner], names, self._feed_expert, active=lambda: getattr(self._thread, "seen", None) is not None
            )

    def _feed_expert(self, parameter: str, expert: int, x: torch.Tensor) -> None:
        leader = self._experts.get((parameter, expert))
        if leader is not None and leader in self._seen:
            self._feed(leader, x)

    @contextmanager
    def lent(self, other: Observer, modules: Iterable[str], kind: str) -> Iterator[None]:
        """What another observer kept of modules is there while the context lasts."""
        leaders = dict.fromkeys(self.leader.get(module, module) for module in modules)
        for leader in leaders:
            self._seen.setdefault(leader, {})[kind] = other._seen.get(leader, {}).pop(kind, None)
        try:
            yield
        finally:
            for leader in leaders:
                del self._seen[leader][kind]

    def forget(self, *names: str) -> None:
        for kinds in self._seen.values():
            for kind in names:
                kinds.pop(kind, None)

    @property
    def steady(self) -> bool:
        """Whether every batch shows as much as any other: with experts, it depends on where its tokens go."""
        return not self._watches

    @contextmanager
    def watching(self, enough: int | None = None) -> Iterator[list[Shown]]:
        """What modules are handed in this thread, in the order of their calls; after ``enough`` of them the context ends, and with it
        what ran in it."""
        seen: list[Shown] = []
        self._thread.seen, self._thread.enough = seen, enough
        try:
            yield seen
        except _Enough as stop:
            # What the model had computed by then hangs on its frames, and on what they close over: on a GPU gigabytes, where a cycle waits
            # for the garbage collector.
            clear_frames(stop.__traceback__)
            stop.__traceback__ = None
        finally:
            self._thread.seen = None

    @contextmanager
    def watching_outside(self, modules: Iterable[str]) -> Iterator[list[Shown]]:
        """What these modules, which lie in no block, are handed in this thread; whoever takes it clears the list."""
        with self.watching() as seen:
            self._only = frozenset(self.leader.get(module, module) for module in modules)
            try:
                yield seen
            finally:
                self._only = None

    def take(self, batches: Sequence[list[Shown]], crew: Crew) -> None:
        """Adds what batches have shown, one after the other, to every accumulator; the crew shares out what Hessians multiply. The lists
        are empty then, so that whatever else still knows one holds no inputs.

        Raises :class:`MachineError` for an input that the model has overwritten since.
        """
        import torch

        from convert.statistics import multiplies_bfloat16, sixteen_bit_factors

        factors: dict[tuple[str, bool], list[torch.Tensor]] = {}
        for shown in (shown for batch in batches for shown in batch):
            self._tokens[shown.leader] += shown.tokens
            for kind, reduced in shown.reduced.items():
                self._seen[shown.leader][kind].add(reduced)
            if shown.factor:
                x, version = shown.factor
                if x._version != version:
                    raise MachineError(f"{shown.leader}: the model overwrites what this layer reads, so that nothing can be known of it")
                halves = shown.dtype == torch.bfloat16 and not x.is_cuda and multiplies_bfloat16()
                factors.setdefault((shown.leader, halves), []).append(x)
        for halves in (False, True):
            parts = [
                (part, each)
                for (leader, of_halves), each in factors.items()
                if of_halves == halves
                for part in self._seen[leader]["hessian"].parts()
            ]
            with sixteen_bit_factors() if halves else nullcontext():
                for _ in crew.map(lambda item: [item[0](x) for x in item[1]], parts):
                    pass
        for batch in batches:
            batch.clear()

    def _feed(self, leader: str, x: torch.Tensor) -> None:
        seen = getattr(self._thread, "seen", None)
        if seen is not None and (self._only is None or leader in self._only):
            seen.append(self._shown(leader, x))
            if len(seen) == self._thread.enough:
                raise _Enough

    def _shown(self, leader: str, x: torch.Tensor) -> Shown:
        """Reduced in the thread that runs the batch, while the input is near, so that it need not be kept."""
        import torch

        from convert.statistics import OfChannels

        rows = x.reshape(-1, x.shape[-1])
        kinds, reduced = self._seen[leader], dict[str, Any]()
        factor = largest = None
        for kind in kinds:
            accumulator = kinds[kind] = kinds[kind] or _begun(kind, rows)
            if not len(rows):
                continue
            if kind == "hessian":
                factor = accumulator.reduce(rows)
            elif isinstance(accumulator, OfChannels):
                largest = reduced[kind] = accumulator.reduce(rows) if largest is None else largest
            elif kind == "rows":
                reduced[kind] = torch.cat([accumulator.reduce(sequence) for sequence in (x if x.dim() == 3 else [x])])
            else:
                reduced[kind] = accumulator.reduce(rows)
        return Shown(leader, len(rows), x.dtype, reduced, None if factor is None else (factor, factor._version))


def _begun(kind: str, x: torch.Tensor) -> Any:
    """An accumulator of nothing yet, for inputs like ``x``."""
    from convert.statistics import AbsMax, ChannelAbsMax, ChannelMean, Hessian, Histogram, Maxima, Rows

    match kind:
        case "absmax":
            return AbsMax(x.device)
        case "channels":
            return ChannelAbsMax(x.shape[-1], x.device)
        case "histogram":
            return Histogram(x.device)
        case "mean":
            return ChannelMean(x.shape[-1], x.device)
        case "mean_magnitude":
            return ChannelMean(x.shape[-1], x.device, magnitude=True)
        case "rows":
            return Rows(ROWS)
        case "maxima":
            return Maxima()
        case _:
            return Hessian(x.shape[-1], x.device)
