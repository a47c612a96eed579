"""What a source that is quantized already gives as it is: codes under scales spelled anew, scales of inputs, of keys and values."""

from __future__ import annotations

from collections.abc import Iterable

from convert.architecture import Part
from convert.coded import Coded
from convert.ledger import RESPELL, Entry, TargetPlan
from convert.source import Checkpoint
from formats.layer import Attention
from formats.scheme import CACHES, Quantization


def respellable(existing: Quantization, wanted: Quantization, parts: Iterable[Part]) -> bool:
    """Whether codes that exist can stay as they are under the scales that are wanted: the same grid, each tile the same or cut out of a
    larger one along a whole axis (a scale for all rows is repeated for each), every part beginning where a tile does, and scales that
    can be had from the other's: magnitudes divided by 127, powers of two as floats, but no powers of two from any others."""
    tile = wanted.tile
    if existing.grid != wanted.grid or existing.tile.rows not in (None, tile.rows) or existing.tile.columns not in (None, tile.columns):
        return False
    if wanted.scale == "F8_E8M0" and existing.scale != "F8_E8M0":
        return False
    return all(part.start % (existing.tile.rows or 1) == 0 for part in parts)


def takes_input_scale(coded: Coded, entry: Entry) -> bool:
    """Whether the source's scale of a static input is that of the target: of codes that are only spelled anew, on the same grid."""
    wanted = entry.scheme.activation if entry.scheme else None
    if entry.algorithm != RESPELL or coded.input_scale is None or coded.activation is None or wanted is None:
        return False
    return (coded.activation.grid, coded.activation.tile, coded.activation.symmetric, coded.activation.dynamic) == (
        wanted.grid,
        wanted.tile,
        wanted.symmetric,
        False,
    ) and not wanted.dynamic


def cache_sources(checkpoint: Checkpoint, attentions: Iterable[Attention], cache: str | None) -> dict[str, tuple[str, str]]:
    """By attention module, the source's tensors of the scales of its keys and values; empty unless every attention has both, of the
    quantization that is wanted. ``k_proj.k_scale`` is ModelOpt's name for them."""
    if cache is None or checkpoint.cache is None:
        return {}
    if (checkpoint.cache.grid, checkpoint.cache.tile, checkpoint.cache.symmetric) != (CACHES[cache].grid, CACHES[cache].tile, True):
        return {}
    found = {}
    for attention in attentions:
        names = tuple(
            next(
                (
                    name
                    for name in (f"{attention.module}.{x}_scale", f"{attention.module}.{x}_proj.{x}_scale")
                    if name in checkpoint.cache_scales
                ),
                "",
            )
            for x in "kv"
        )
        count = attention.heads if CACHES[cache].tile.rows == 1 else 1
        if not all(name and checkpoint.cache_scales[name].elements == count for name in names):
            return {}
        found[attention.module] = (names[0], names[1])
    return found


def lacks_cache(checkpoint: Checkpoint, target: TargetPlan) -> bool:
    """Whether a target wants scales of keys and values that the source does not have."""
    contents = target.contents
    return contents.cache is not None and not cache_sources(checkpoint, contents.attentions, contents.cache)
