"""Layers beside what the source has shown of them, against the same block in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from convert.crew import Crew
from convert.differences import Differences, _codes
from convert.integers import pays

pytestmark = pytest.mark.skipif(not pays("cpu"), reason="this processor does not multiply INT8 faster than float32")
TOKENS = 13


class _Block(torch.nn.Module):
    """Two layers of the same input, one of what they make, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, (inner, outer) in {"gate": (48, 37), "up": (48, 37), "down": (37, 48), "twice": (48, 48)}.items():
            layer = torch.nn.Linear(inner, outer, bias=name != "up")
            layer.weight = torch.nn.Parameter(torch.randn(outer, inner, generator=generator) / inner**0.5, requires_grad=False)
            setattr(self, name, layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return self.twice(self.twice(y)) + x


def _lanes(size: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    source = torch.randn(1, TOKENS, 48, generator=generator)
    # Tokens that differ by very different amounts, one of them not at all.
    reach = torch.logspace(0, -2, TOKENS)[None, :, None] * (torch.arange(TOKENS) != 5)[None, :, None]
    return source, source + size * reach * torch.randn(source.shape, generator=generator)


@torch.no_grad()
def _error(block: Any, source: torch.Tensor, other: torch.Tensor, **kwargs: Any) -> tuple[float, Differences, torch.Tensor]:
    """How wrong a block is, as a share of what the difference makes of its output, token by token; the largest."""
    apart = Differences(block, "block", Crew(), on=True)
    with apart.put_in():
        with apart.source(0):
            first = block(source)
        with apart.beside(0, look=True, **kwargs):
            found = block(other)
    assert torch.equal(first, block(source)), "the source is what it is without"
    exact = block.double()
    wanted = exact(other.double()) - exact(source.double())
    block.float()
    moved = wanted.norm(dim=-1) > 0
    errors = ((found - first).double() - wanted).norm(dim=-1)
    assert (errors[~moved] == 0).all()
    return float((errors[moved] / wanted[moved].norm(dim=-1)).max()), apart, found


@pytest.mark.parametrize("size", [1.0, 0.01])
def test_a_difference_is_told_however_small(size: float) -> None:
    error, apart, _ = _error(_Block(), *_lanes(size))
    assert 1e-4 < error < 0.03
    assert len(apart.wrong) == 3
    assert 1e-4 < max(apart.wrong) < 0.03
    assert apart.unlooked, "what the source calls twice computes as ever"


def test_codes_are_rounded_to_the_nearest() -> None:
    source, other = _lanes(1.0)
    codes, steps = _codes(other - source)
    assert codes is not None
    missed = (other - source)[0] / steps[0] - (codes.float() - 128)
    assert 0.49 < missed.abs().max() <= 0.5001
    assert codes.min() == 1 or codes.max() == 255


def test_what_does_not_differ_is_the_sources_own() -> None:
    source, _ = _lanes(0)
    block = _Block()
    apart = Differences(block, "block", Crew(), on=True)
    with torch.no_grad(), apart.put_in():
        with apart.source(0):
            first = block(source)
        with apart.beside(0, look=True):
            assert torch.equal(block(source.clone()), first)
    assert apart.wrong == [], "nothing differed, so nothing was to be seen"


def test_a_layer_that_rounding_ruins_is_multiplied_in_float32() -> None:
    """One weight a row a thousand times the others, of an input that never differs."""
    block = _Block()
    block.gate.weight[:, 0] = 1000.0
    block.up.weight[:, 0] = 1000.0
    source, other = _lanes(0.01)
    other[..., 0] = source[..., 0]
    _, apart, found = _error(block, source, other)
    assert sorted(wrong > 0.1 for wrong in apart.wrong) == [False, True, True]
    with torch.no_grad():
        assert torch.allclose(found, block(other), rtol=1e-3, atol=1e-3)
        with apart.put_in(), apart.beside(0):
            again = block(other)
    # Seen: 4e-7 of a token's length, and 8e-6 where codes are multiplied.
    assert ((found - again).norm(dim=-1) < 2e-6 * again.norm(dim=-1)).all()


def test_what_no_one_has_looked_at_is_multiplied_in_float32() -> None:
    source, other = _lanes(0.01)
    block = _Block()
    apart = Differences(block, "block", Crew(), on=True)
    with torch.no_grad(), apart.put_in():
        with apart.source(0):
            block(source)
        with apart.beside(0):
            found = block(other)
        with apart.beside(0, look=True):
            assert not torch.equal(block(other), found)
    assert torch.equal(found, block(other))


def test_layers_that_were_changed_compute_as_ever() -> None:
    source, other = _lanes(0.01)
    error, apart, found = _error(block := _Block(), source, other, exact={f"block.{name}" for name in ("gate", "up", "down")})
    assert error < 1e-2
    assert apart.wrong == []
    with torch.no_grad():
        assert torch.equal(found, block(other))


def test_what_the_model_wrote_into_is_not_relied_on() -> None:
    class Writes(_Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.up(x).mul_(2)

    source, other = _lanes(0.01)
    block = Writes()
    _, apart, found = _error(block, source, other)
    assert apart.wrong == []
    with torch.no_grad():
        assert torch.equal(found, block(other))
