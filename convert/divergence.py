"""How far two sets of logits are apart, token by token."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from convert.intervals import block_lengths, kl_interval, ratio_interval, top1_interval
from convert.report import Blocks, Divergence, Drift
from formats.errors import OctavoError

#: Tokens compared at a time: 64 x 128,256 float32 logits are 33 MB.
CHUNK = 64


def compare_logits(source: Path, artifact: Path, tokens: np.ndarray, vocabulary: int) -> Divergence:
    """Compares raw float32 files of shape (sequences, length, vocabulary) over ``tokens`` (sequences, length).

    KL(source || artifact) is taken at every position; a perplexity over positions that have a successor in their sequence. Sums are kept
    by blocks of neighbouring tokens too, and drawn again for intervals (:mod:`convert.intervals`), unless a number is not finite.
    ``source`` may go on with more sequences. Raises :class:`OctavoError` when a file is not of that shape. NaN in ``artifact`` gives NaN
    results.
    """
    sequences, length = tokens.shape
    expected = sequences * length * vocabulary * 4
    for path in (source, artifact):
        found = path.stat().st_size
        if found != expected and (path is artifact or found < expected):
            raise OctavoError(f"{path.name}: {found:,} bytes of logits, expected {expected:,}: the vocabularies differ")
    reference = np.memmap(source, np.float32, "r", shape=(sequences * length, vocabulary))
    other = np.memmap(artifact, np.float32, "r", shape=(sequences * length, vocabulary))
    successors = torch.from_numpy(np.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1).reshape(-1))
    kl, same, losses, source_losses = [], [], [], []
    for start in range(0, sequences * length, CHUNK):
        p = torch.log_softmax(torch.from_numpy(np.array(reference[start : start + CHUNK])), -1)
        q = torch.log_softmax(torch.from_numpy(np.array(other[start : start + CHUNK])), -1)
        kl.append((p.exp() * (p - q)).sum(-1))
        same.append(p.argmax(-1) == q.argmax(-1))
        targets = successors[start : start + CHUNK, None]
        # The last position of a sequence predicts nothing that is known.
        losses.append(torch.where(targets < 0, 0, -q.gather(-1, targets.clamp_min(0)))[:, 0])
        source_losses.append(torch.where(targets < 0, 0, -p.gather(-1, targets.clamp_min(0)))[:, 0])
    values, agreed = torch.cat(kl).double(), torch.cat(same)
    lost, source_lost = torch.cat(losses).double(), torch.cat(source_losses).double()
    predicted = sequences * (length - 1)
    blocks = _blocks(values, agreed, successors >= 0, lost - source_lost, block_lengths(length) * sequences)
    return Divergence(
        tokens=sequences * length,
        kl_nats=float(values.mean()),
        kl_nats_p99=float(values.quantile(0.99)),
        top1=int(agreed.sum()) / (sequences * length),
        perplexity=_exp(float(lost.sum()) / predicted),
        source_perplexity=_exp(float(source_lost.sum()) / predicted),
        kl_interval=kl_interval(blocks) if blocks else None,
        top1_interval=top1_interval(blocks) if blocks else None,
        ratio_interval=ratio_interval(blocks) if blocks else None,
        blocks=blocks,
    )


def _blocks(kl: torch.Tensor, same: torch.Tensor, known: torch.Tensor, excess: torch.Tensor, lengths: list[int]) -> Blocks | None:
    """Sums over blocks of these lengths of what was measured of each token (tokens,); None where that is not finite."""
    if not bool(torch.isfinite(kl).all() & torch.isfinite(excess).all()):
        return None

    def sums(values: torch.Tensor) -> list[float]:
        return [float(part.sum(dtype=torch.float64)) for part in torch.split(values, lengths)]

    return Blocks(
        tokens=tuple(lengths),
        kl_nats=tuple(sums(kl)),
        same=tuple(map(int, sums(same))),
        predicted=tuple(map(int, sums(known))),
        excess_nats=tuple(sums(excess)),
    )


def compare_states(source: Path, artifact: Path, width: int, *, classes: bool = False) -> Drift:
    """Compares raw float32 files of vectors of ``width``, the last hidden states of as many tokens, or logits of ``classes``.

    Raises :class:`OctavoError` when one is longer than the other. NaN in ``artifact`` gives NaN results.
    """
    if source.stat().st_size != artifact.stat().st_size:
        raise OctavoError(
            f"{artifact.name}: {artifact.stat().st_size:,} bytes of hidden states, the source has {source.stat().st_size:,}: widths differ"
        )
    count = source.stat().st_size // (4 * width)
    reference = np.memmap(source, np.float32, "r", shape=(count, width))
    other = np.memmap(artifact, np.float32, "r", shape=(count, width))
    errors, cosines, same, kl = [], [], [], []
    for start in range(0, count, CHUNK):
        p = torch.from_numpy(np.array(reference[start : start + CHUNK])).double()
        q = torch.from_numpy(np.array(other[start : start + CHUNK])).double()
        errors.append((p - q).norm(dim=-1) / p.norm(dim=-1).clamp_min(1e-30))
        cosines.append(torch.nn.functional.cosine_similarity(p, q, dim=-1))
        if classes:
            p, q = torch.log_softmax(p, -1), torch.log_softmax(q, -1)
            same.append((p.argmax(-1) == q.argmax(-1)).double())
            kl.append((p.exp() * (p - q)).sum(-1))
    return Drift(
        count,
        relative_error=float(torch.cat(errors).mean()),
        cosine=float(torch.cat(cosines).mean()),
        top1=float(torch.cat(same).mean()) if classes else None,
        kl_nats=float(torch.cat(kl).mean()) if classes else None,
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
