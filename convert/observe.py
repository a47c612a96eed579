"""What is kept of a model at work: accumulators at the inputs of its linear layers, and the numbers they end in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local
from typing import TYPE_CHECKING, Any

from convert.crew import Crew
from formats.errors import InputError, MachineError

if TYPE_CHECKING:
    import torch

    from convert.loading import Skeleton


#: Rows of each sequence that searches try things on.
ROWS = 8


@dataclass(frozen=True)
class Stats:
    """Largest magnitudes: of the input of each linear module, and of each head's keys (after the rotary embedding) and values, by
    attention module. ``record`` says on which text they were seen; ``health`` what :mod:`convert.health` found of layers that were not
    solved."""

    inputs: Mapping[str, float] = field(default_factory=dict)
    keys: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    health: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


NO_STATS = Stats()


@dataclass(frozen=True)
class Shown:
    """An input (..., in) as a module was handed it, and how often it had been written to by then."""

    leader: str
    x: torch.Tensor
    version: int


class Observer:
    """Accumulators for the inputs of linear modules; modules that read the same input share one.

    What a batch shows is noted in the thread that runs it, and taken in the order of batches: sums come out the same for any number of
    threads.
    """

    def __init__(self, skeleton: Skeleton, groups: Sequence[Sequence[str]] | None) -> None:
        self.leader = {module: group[0] for group in groups or () for module in group}
        self._modules = dict(skeleton.model.named_modules())
        self._seen: dict[str, dict[str, Any]] = {}
        self._hooks: list[Any] = []
        self._thread = local()

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def want(self, modules: Sequence[str], kind: str) -> None:
        """Begins to accumulate the inputs of modules, where that was not begun: ``absmax``, ``channels`` (absmax of each), ``maxima``
        (absmax of each batch), ``hessian``, or ``rows`` (some of them as they are)."""
        for module in modules:
            leader = self.leader.get(module, module)
            if leader not in self._seen:
                self._seen[leader] = {}
                self._hooks.append(self._modules[leader].register_forward_pre_hook(lambda _, args, name=leader: self._feed(name, args[0])))
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
        return {module: seen[leader] for module, leader in members if leader in seen}

    def forget(self, *names: str) -> None:
        for kinds in self._seen.values():
            for kind in names:
                kinds.pop(kind, None)

    @contextmanager
    def watching(self) -> Iterator[list[Shown]]:
        """What modules are handed in this thread, in the order of their calls."""
        seen: list[Shown] = []
        self._thread.seen = seen
        try:
            yield seen
        finally:
            self._thread.seen = None

    def take(self, batches: Sequence[list[Shown]], crew: Crew) -> None:
        """Adds what batches have shown, one after the other, to every accumulator; the crew shares out accumulators, and parts of them.

        Raises :class:`MachineError` for an input that the model has overwritten since.
        """
        inputs: dict[str, list[torch.Tensor]] = {}
        for shown in (shown for batch in batches for shown in batch):
            if shown.x._version != shown.version:
                raise MachineError(f"{shown.leader}: the model overwrites what this layer reads, so that nothing can be known of it")
            inputs.setdefault(shown.leader, []).append(shown.x)
        parts: list[tuple[Callable[[torch.Tensor], None], list[torch.Tensor]]] = []
        for leader, each in inputs.items():
            rows = [x.reshape(-1, x.shape[-1]) for x in each]
            for kind in self._seen[leader]:
                accumulator = self._seen[leader][kind] = self._seen[leader][kind] or _begun(kind, rows[0])
                if kind == "rows":
                    parts.append((accumulator.update, [sequence for x in each for sequence in (x if x.dim() == 3 else [x])]))
                else:
                    parts += [(part, rows) for part in (accumulator.parts() if kind == "hessian" else [accumulator.update])]
        for _ in crew.map(lambda item: [item[0](rows) for rows in item[1]], parts):
            pass

    def _feed(self, leader: str, x: torch.Tensor) -> None:
        seen = getattr(self._thread, "seen", None)
        if seen is not None:
            seen.append(Shown(leader, x, x._version))


def _begun(kind: str, x: torch.Tensor) -> Any:
    """An accumulator of nothing yet, for inputs like ``x``."""
    from convert.statistics import AbsMax, ChannelAbsMax, Hessian, Maxima, Rows

    match kind:
        case "absmax":
            return AbsMax(x.device)
        case "channels":
            return ChannelAbsMax(x.shape[-1], x.device)
        case "rows":
            return Rows(ROWS)
        case "maxima":
            return Maxima()
        case _:
            return Hessian(x.shape[-1], x.device)
