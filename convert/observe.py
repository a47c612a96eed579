"""What is kept of a model at work: accumulators at the inputs of its linear layers, and the numbers they end in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from formats.errors import InputError

if TYPE_CHECKING:
    import torch

    from convert.loading import Skeleton


#: Rows of each batch that searches try things on.
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


class Observer:
    """Accumulators for the inputs of linear modules, fed while it is ``active``; modules that read the same input share one."""

    def __init__(self, skeleton: Skeleton, groups: Sequence[Sequence[str]] | None) -> None:
        self.active = False
        self.leader = {module: group[0] for group in groups or () for module in group}
        self._modules = dict(skeleton.model.named_modules())
        self._seen: dict[str, dict[str, Any]] = {}
        self._hooks: list[Any] = []

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

    def _feed(self, leader: str, x: torch.Tensor) -> None:
        from convert.statistics import AbsMax, ChannelAbsMax, Hessian, Maxima, Rows

        if not self.active:
            return
        rows = x.detach().reshape(-1, x.shape[-1])
        for kind, accumulator in self._seen[leader].items():
            if accumulator is None:
                match kind:
                    case "absmax":
                        accumulator = AbsMax(x.device)
                    case "channels":
                        accumulator = ChannelAbsMax(x.shape[-1], x.device)
                    case "rows":
                        accumulator = Rows(ROWS)
                    case "maxima":
                        accumulator = Maxima()
                    case _:
                        accumulator = Hessian(x.shape[-1], x.device)
                self._seen[leader][kind] = accumulator
            accumulator.update(rows)
