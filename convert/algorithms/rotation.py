"""Rotations of hidden states, folded into weights (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456; SpinQuant, Liu et al. 2024, arXiv
2405.16406): outliers are spread over all channels, and no runtime needs to know.

R1 turns the residual stream: what is read from it is turned back. Between them an RMS norm may stand, which commutes with a rotation once
its weight has moved into the linears that follow (:func:`fold_norm`). Everything that reads or writes the stream must take part: the
embedding (:func:`rotate_rows_of_embedding`), every linear that reads it (:func:`rotate_input`; q, k, v, gate, up, head) and every one that
writes it (:func:`rotate_output`; o, down). An embedding and a head that are one tensor cannot: the head reads through the last norm's
weight, which the embedding lacks; untie them first. A LayerNorm must first be made an RMS norm (its mean folded into what writes the
stream). R2 turns values of each head before they are mixed, and o back (:func:`rotate_values`).

Weights are (out, in); all arithmetic is float64, the result in the dtype of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import isqrt

import torch

#: Doublings of a Hadamard matrix are multiplied in factors of up to this size: on a core of a CPU 64 are as fast as 2, in fewer passes.
_FACTOR = 64
#: And up to this size the whole is multiplied at once: 64 columns at 140 million elements a second, in factors at 40.
_DENSE = 128


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix (n, n) float64, as the Kronecker product of ``factors``, its rows multiplied by ``signs`` (n,); ``word``:
    ``hadamard``, or ``random`` where no Hadamard matrix is known here."""

    factors: tuple[torch.Tensor, ...]
    signs: torch.Tensor
    word: str

    @property
    def size(self) -> int:
        return len(self.signs)

    @property
    def matrix(self) -> torch.Tensor:
        """The whole of it, (n, n) float64."""
        return self.signs[:, None] * reduce(torch.kron, self.factors)

    def turn(self, rows: torch.Tensor) -> torch.Tensor:
        """``X R`` of float64 ``rows`` (any, k n), for each run of n columns: factor by factor (a fast Walsh-Hadamard transform where these
        are of size 2), ``n sum(factors)`` products a row in place of n^2."""
        turned = rows.reshape(-1, self.size) * self.signs
        behind = self.size
        for factor in self.factors:
            behind //= len(factor)
            turned = factor.T @ turned.view(-1, len(factor), behind) if behind > 1 else turned.view(-1, len(factor)) @ factor
        return turned.reshape(rows.shape)


def make_rotation(size: int, *, seed: int, device: torch.device | str = "cpu") -> Rotation:
    """A Hadamard matrix with random signs over the root of its size (QuaRot, section 4), or, where none is known, the Q of a random
    matrix. The same for a seed on every device: it is made on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    factors = hadamard_factors(size)
    if factors is None:
        q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
        # With a positive diagonal of R, Q is uniform over all rotations and reflections.
        return Rotation(((q * r.diagonal().sign()).to(device),), torch.ones(size, dtype=torch.float64, device=device), "random")
    signs = torch.randint(0, 2, (size, 1), generator=generator).double()[:, 0] * 2 - 1
    return Rotation(tuple(factor.to(device) for factor in factors), (signs / size**0.5).to(device), "hadamard")


def hadamard_factors(size: int) -> list[torch.Tensor] | None:
    """Matrices of 1 and -1, float64, whose Kronecker product H (n, n) has ``H H^T = n I``; None where Sylvester's and Paley's constructions
    (over primes) have none.

    ``size`` is a power of two times 1, q + 1 with a prime q = 3 mod 4, or 2 (q + 1) with a prime q = 1 mod 4 (Paley 1933): 12, 20, 28,
    36, 44, 60 and so on, but not 52, 92 or 172. Sylvester's are of up to 64, and one of Paley's is at the end: the largest of up to 128, or
    the smallest there is. Up to 128 the product itself is the one factor.
    """
    powers = [1 << i for i in range(max(size, 1).bit_length()) if size > 0 and size % (1 << i) == 0]
    sizes = [size // power for power in powers if _paley(size // power) is not None]
    if not sizes:
        return None
    core = next((each for each in sizes if each <= _DENSE), sizes[-1])
    doublings, factors = (size // core).bit_length() - 1, []
    while doublings:
        taken = min(doublings, _FACTOR.bit_length() - 1)
        factors.append(reduce(torch.kron, [torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()] * taken))
        doublings -= taken
    last = _paley(core)
    assert last is not None
    factors += [last] if core > 1 or not factors else []
    return factors if size > _DENSE else [reduce(torch.kron, factors)]


def fold_norm(norm: torch.Tensor, weight: torch.Tensor, *, offset: float = 0.0) -> torch.Tensor:
    """A linear (out, in) that reads through an RMS norm of weight (in,), with that weight in it; the norm's becomes 1 - ``offset``, which
    is what the model adds to it (1 in Gemma)."""
    return (weight.double() * (norm.double() + offset)).to(weight.dtype)


def rotate_rows_of_embedding(embedding: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """``E R``: an embedding (tokens, hidden), or any rows of the residual stream."""
    return (embedding.double() @ rotation).to(embedding.dtype)


def rotate_input(weight: torch.Tensor, rotation: torch.Tensor) -> torch.Tensor:
    """``W R``: a linear that reads the rotated stream gives what it gave; its bias stays."""
    return (weight.double() @ rotation).to(weight.dtype)


def rotate_output(weight: torch.Tensor, bias: torch.Tensor | None, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``R^T W`` and ``R^T b``: a linear that writes to the rotated stream."""
    turned = (rotation.T @ weight.double()).to(weight.dtype)
    return turned, None if bias is None else (rotation.T @ bias.double()).to(bias.dtype)


def rotate_values(
    v_weight: torch.Tensor, v_bias: torch.Tensor | None, o_weight: torch.Tensor, rotation: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """R2 (head size, head size): v's rows, a head after the other, turned, and o's columns turned back; v may have fewer heads than o."""
    size = len(rotation)
    v = (rotation.T @ v_weight.double().view(-1, size, v_weight.shape[1])).reshape(v_weight.shape).to(v_weight.dtype)
    bias = None if v_bias is None else (v_bias.double().view(-1, size) @ rotation).reshape(-1).to(v_bias.dtype)
    o = (o_weight.double().view(len(o_weight), -1, size) @ rotation).reshape(o_weight.shape).to(o_weight.dtype)
    return v, bias, o


def _paley(size: int) -> torch.Tensor | None:
    """The Hadamard matrix of this size that needs no doubling: 1, or one of Paley's."""
    if size == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if size % 4 == 0 and _is_prime(size - 1) and (size - 1) % 4 == 3:
        # H = I + S with S skew: a border of ones over the residues mod q.
        border = torch.ones(size, size, dtype=torch.float64)
        border[1:, 0] = -1
        border[1:, 1:] = _residues(size - 1)
        border.diagonal().zero_()
        return border + torch.eye(size, dtype=torch.float64)
    q = size // 2 - 1
    if size % 4 == 0 and q % 4 == 1 and _is_prime(q):
        border = torch.ones(q + 1, q + 1, dtype=torch.float64)
        border[1:, 1:] = _residues(q)
        border.diagonal().zero_()
        unit = torch.eye(q + 1, dtype=torch.float64)
        ones, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double(), torch.tensor([[1.0, -1.0], [-1.0, -1.0]]).double()
        return torch.kron(border, ones) + torch.kron(unit, other)
    return None


def _residues(q: int) -> torch.Tensor:
    """(q, q): at (i, j) 0 where i = j, 1 where i - j is a square mod q, -1 elsewhere."""
    character = torch.full((q,), -1.0, dtype=torch.float64)
    character[torch.arange(1, q) ** 2 % q] = 1
    character[0] = 0
    index = torch.arange(q)
    return character[(index[:, None] - index[None, :]) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % i for i in range(2, isqrt(number) + 1))
