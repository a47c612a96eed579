"""Linear layers on inputs that differ a little from others they have seen: the difference is multiplied, in eight bits.

With ``y = W x`` known of the source, a lane beside it has ``y + W (x' - x)``. Rounding that difference and the weight to INT8 is wrong by a
percent or two of the *difference*, not of the layer, while all that is not linear is computed from ``x'`` itself in float32. An error that
has nothing to do with the difference lengthens it by its square, a part in thousands; and a CPU multiplies INT8 (VNNI, AMX) at four times
the speed of float32 or more. How wrong a layer is, is looked at before it is relied on.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import local
from typing import TYPE_CHECKING

from convert.integers import MOST_INPUTS, Packed, codes_of, largest

if TYPE_CHECKING:
    import torch

    from convert.crew import Crew

#: How wrong a layer may be, as a share of what a difference makes of its output; of one that is more all products are float32.
MOST_WRONG = 0.1
_TINY = 1e-30


@dataclass
class _Layer:
    """``packed``: its weight rounded to INT8. ``seen``: of each batch what went in, what came out and how often torch had written into
    both; ``wrong``: see :data:`MOST_WRONG`, None while no one has looked."""

    module: torch.nn.Linear
    packed: Packed
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor, tuple[int, int]]]] = field(default_factory=dict)
    wrong: float | None = None

    def known(self, batch: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What went in and came out of the source's batch, if an input (1, tokens, in) lies beside it. Tokens that a router chose for an
        expert, (some, in), do not, nor does what was written into since."""
        seen = self.seen.get(batch, ())
        if len(seen) != 1:
            return None
        was, y, versions = seen[0]
        return (was, y) if x.dim() == 3 and x.shape == was.shape and versions == (was._version, y._version) else None


class Differences:
    """The linear layers inside ``block``, called ``prefix`` in the model, which the source goes through batch by batch, and then others,
    each beside one of these batches. A layer that the source does not call just once with all tokens of a batch computes as ever; all do
    unless ``on``."""

    def __init__(self, block: torch.nn.Module, prefix: str, hands: Crew, *, on: bool) -> None:
        import torch

        self._now = local()
        linear = {f"{prefix}.{name}": module for name, module in block.named_modules() if on and type(module) is torch.nn.Linear}
        found = {name: module for name, module in linear.items() if module.in_features <= MOST_INPUTS}
        rounded = hands.map(_rounded, [module.weight.detach() for module in found.values()])
        self._layers = {name: _Layer(module, packed) for (name, module), packed in zip(found.items(), rounded, strict=True)}

    @property
    def wrong(self) -> list[float]:
        """How wrong each layer was that was looked at, see :data:`MOST_WRONG`."""
        return [layer.wrong for layer in self._layers.values() if layer.wrong is not None]

    @property
    def unlooked(self) -> bool:
        """Whether there are layers that no one has looked at, which until then compute as ever where anything differs."""
        return any(layer.wrong is None for layer in self._layers.values())

    @contextmanager
    def put_in(self) -> Iterator[None]:
        """The layers look at where they are called from while the context lasts."""
        for name, layer in self._layers.items():
            layer.module.forward = partial(self._forward, name)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self._layers.values():
                del layer.module.forward

    @contextmanager
    def source(self, batch: int) -> Iterator[None]:
        """In this thread the source goes through with a batch."""
        self._now.batch, self._now.is_source = batch, True
        try:
            yield
        finally:
            self._now.batch = None

    @contextmanager
    def beside(self, batch: int, *, exact: Set[str] = frozenset(), look: bool = False) -> Iterator[None]:
        """In this thread another goes through beside the source's ``batch``. Layers in ``exact`` are changed ones and compute as ever; with
        ``look`` those that no one has looked at are looked at."""
        now = self._now
        now.batch, now.is_source, now.exact, now.look, now.difference = batch, False, exact, look, None
        try:
            yield
        finally:
            now.batch = now.difference = None

    def _forward(self, name: str, x: torch.Tensor) -> torch.Tensor:
        import torch

        now, layer = self._now, self._layers[name]
        batch = getattr(now, "batch", None)
        if batch is not None and not now.is_source and name not in now.exact and (layer.wrong or 0) <= MOST_WRONG:
            known = layer.known(batch, x)
            if known is not None:
                return self._beside(layer, x, *known)
        y = torch.nn.functional.linear(x, layer.module.weight, layer.module.bias)
        if batch is not None and now.is_source:
            layer.seen.setdefault(batch, []).append((x, y, (x._version, y._version)))
        return y

    def _beside(self, layer: _Layer, x: torch.Tensor, was: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        import torch

        now = self._now
        if now.difference is None or now.difference[0] is not x:  # layers that read the same follow one another
            now.difference = (x, *_codes(x - was))
        _, codes, steps = now.difference
        if codes is None:
            return y
        if layer.wrong is None and not now.look:
            return torch.nn.functional.linear(x, layer.module.weight, layer.module.bias)
        product = layer.packed.product(codes).view(y.shape)
        out: torch.Tensor = torch.addcmul(y, product, steps, out=product)
        if layer.wrong is None:
            exact = torch.nn.functional.linear(x - was, layer.module.weight)
            layer.wrong = float((out - y - exact).norm() / exact.norm().clamp(min=_TINY))
            if layer.wrong > MOST_WRONG:
                return y + exact
        return out


def _codes(difference: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Of (1, tokens, in) float32, which is overwritten: (tokens, in), uint8 with zero at 128, or None where all is zero, and a step a token
    (1, tokens, 1)."""
    most = largest(difference)
    steps = most.clamp(min=_TINY * 127).div_(127)
    if not most.any():
        return None, steps
    return codes_of(difference.div_(steps)[0]), steps


def _rounded(weight: torch.Tensor) -> Packed:
    """Of a weight (out, in)."""
    import torch

    scale = weight.abs().amax(1, keepdim=True).clamp_(min=_TINY) / 127
    return Packed.of((weight / scale).round_().to(torch.int8), scale)
