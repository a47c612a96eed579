"""A sample of a vocabulary against all of it."""

from __future__ import annotations

import pytest
import torch

from convert.crew import Crew
from convert.reference import Reference, drawn


def _peaked(tokens: int, vocabulary: int) -> torch.Tensor:
    """Logits of which few are likely and many are not, in any order."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(tokens, vocabulary, generator=generator) * torch.rand(tokens, 1, generator=generator) * 5


def test_what_is_drawn_stands_for_the_whole() -> None:
    p = torch.softmax(_peaked(500, 3000), -1)
    places, weights = drawn(p, 200)
    assert places.shape[1] <= 200
    assert torch.allclose(weights.sum(-1), torch.ones(500))
    for row, chosen, weight in zip(p, places, weights, strict=True):
        own = chosen[weight > 0]
        assert len(set(own.tolist())) == len(own)
        assert set(torch.nonzero(row >= 1 / 200)[:, 0].tolist()) <= set(own.tolist()), "what is likely is always there"
    f = torch.randn(3000, generator=torch.Generator().manual_seed(1))
    error = (weights * f[places]).sum(-1) - p @ f
    assert float(error.std()) < 0.06, "a plain sample of as many has 0.07"
    assert abs(float(error.mean())) < 4 * float(error.std()) / 500**0.5
    assert torch.equal(drawn(p, 200)[0], places)


@pytest.mark.parametrize("size", [0.01, 0.3])
def test_kl_at_places_is_that_of_all(size: float) -> None:
    z = _peaked(2000, 3000)
    other = z + size * torch.randn(z.shape, generator=torch.Generator().manual_seed(2))
    all_, some = Reference(z), Reference(z, most=500)
    assert all_.places is None
    assert some.places is not None
    expected, found = all_.kl(other, Crew()), some.kl(other.gather(-1, some.places), Crew())
    assert float(found.mean()) == pytest.approx(float(expected.mean()), rel=5e-3)
    assert some.is_like(z.gather(-1, some.places) * 1.00001)
    assert not some.is_like(other.gather(-1, some.places) * 1.1)


def test_what_is_not_finite_stays_so() -> None:
    z = torch.full((3, 1000), torch.nan)
    assert Reference(z, most=100).kl(torch.zeros(3, 0), Crew()).isnan().all()
