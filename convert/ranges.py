"""How far the largest weights and inputs of layers lie above the others, and what two schemes lose of them: why INT8 or FP8 fits better.

A short look at the source, apart from whatever made the artifacts, so that every layer is seen, with its weights and inputs rounded as they
are and nothing smoothed.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from convert import health
from convert.panels import place
from formats.dtypes import DTYPES
from formats.scheme import SCHEMES

if TYPE_CHECKING:
    import torch

    from convert.ledger import Plan
    from convert.observe import Observer
    from convert.progress import Progress

#: Of calibration text, what is looked at.
SEQUENCES, LENGTH = 8, 256
#: Rounding to even steps, of which 127 reach up to the largest value, errs by step / sqrt(12): relative to the root mean square that is the
#: crest over this.
INT8_STEPS = 127 * math.sqrt(12)
#: Rounding to three bits behind the leading one errs by this share, be the value large or small: 2**-4 / sqrt(3) where mantissas are spread
#: as those of numbers over many powers of two are (density 1 / (m ln 2) over [1, 2), of which the mean of 1 / m**2 is 3 / (8 ln 2)).
FP8_SHARE = 2**-4 / math.sqrt(3) * math.sqrt(3 / (8 * math.log(2)))


@dataclass(frozen=True)
class Range:
    """Of a layer: ``weight_crest``, the largest magnitude over the root mean square, of the median output channel; ``input_crest``, the
    same of the median token; and how far its output is off for the median token, as a share, ``int8_off`` and ``fp8_off``."""

    weight_crest: float
    input_crest: float
    int8_off: float
    fp8_off: float

    @property
    def crest(self) -> float:
        """Of weights and inputs together: errors that know nothing of each other add by their squares."""
        return math.hypot(self.weight_crest, self.input_crest)

    @property
    def favours_int8(self) -> bool:
        """Whether the range alone lets INT8 be expected to err less: where its two errors, together, are below FP8's two."""
        return self.crest / INT8_STEPS < math.sqrt(2) * FP8_SHARE


@dataclass(frozen=True)
class Kind:
    """Layers of one kind: the medians of their crests and errors, and in how many of them INT8 errs less."""

    name: str
    layers: int
    weight_crest: float
    input_crest: float
    int8_off: float
    fp8_off: float
    int8_wins: int


def observe(plan: Plan, schemes: Mapping[str, tuple[str, str]], progress: Progress, *, device: str = "cpu") -> dict[str, Range]:
    """By tensor, of those that are one linear layer in a block; ``schemes``: the INT8 and the FP8 scheme of each.

    Empty for a model that is no stack of blocks. Raises what reading text raises.
    """
    from convert.calibrate import calibration_tokens
    from convert.crew import crew
    from convert.export import cores, one_thread
    from convert.lanes import walk
    from convert.loading import Skeleton
    from convert.observe import Observer
    from convert.recipe import Calibration

    if plan.architecture is None or not plan.architecture.blocks:
        return {}
    entries = {entry.tensor.name: entry for entry in plan.targets[0].entries if len(entry.parts) == 1 and not entry.experts}
    modules = {entries[name].module(entries[name].parts[0]): name for name in schemes if name in entries}
    settings = (plan.recipe.calibration or Calibration()).model_copy(update={"sequences": SEQUENCES, "length": LENGTH})
    skeleton = Skeleton(plan.checkpoint, dtype="float32", trust_remote_code=plan.recipe.trust_remote_code)
    found: dict[str, Range] = {}
    with tempfile.TemporaryDirectory(prefix="octavo-") as scratch, Observer(skeleton, plan.architecture.groups) as observer:
        tokens, _ = calibration_tokens(replace(plan, recipe=plan.recipe.model_copy(update={"calibration": settings})), Path(scratch))
        cached = {"use_cache": False} if skeleton.model.can_generate() else {}
        batches = [{"input_ids": sequence[None], **cached} for sequence in tokens]
        size = sum(map(len, tokens))
        with (
            progress.stage("looking at ranges", size * len(plan.architecture.blocks), unit="tokens") as advance,
            one_thread(),
            crew(cores() if device == "cpu" else 1) as hands,
        ):
            for stand in walk(skeleton, batches, device=device, crew=hands):
                here = [module for module in modules if module.startswith(f"{stand.name}.")]
                observer.want(here, "rows")
                stand.run(keep=True, observer=observer)
                of = partial(_range_of, plan, observer, {module: schemes[modules[module]] for module in here})
                weights = [(module, skeleton.weight(module).float()) for module in here]
                found |= zip((modules[module] for module in here), hands.map(of, weights), strict=True)
                observer.forget("rows")
                advance(size)
    return found


def _range_of(plan: Plan, observer: Observer, schemes: Mapping[str, tuple[str, str]], layer: tuple[str, torch.Tensor]) -> Range:
    import torch

    from convert.algorithms import rtn

    module, weight = layer
    rows = health.few(observer.get(module, "rows").value)
    limit = float(rows.abs().max())
    dtype = getattr(torch, DTYPES[plan.targets[0].dtype].torch_name)
    off = []
    for name in schemes[module]:
        scheme = SCHEMES[name]
        rounded = rtn.quantize(weight.clone(), scheme.weight, scale_dtype=dtype)
        off.append(health.lost("rtn", weight, rounded, rows, scheme.activation, limit)["typical"])
    return Range(_crest(weight), _crest(rows), *off)


def _crest(rows: torch.Tensor) -> float:
    import torch

    crests = rows.abs().amax(-1) / rows.square().mean(-1).sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return float(f"{float(crests.median()):.4g}")


def by_kind(ranges: Mapping[str, Range]) -> list[Kind]:
    """In the order of the checkpoint."""
    kinds: dict[str, list[Range]] = {}
    for tensor, seen in ranges.items():
        kinds.setdefault(place(tensor)[0], []).append(seen)

    def median(those: Sequence[Range], what: str) -> float:
        return float(statistics.median(getattr(one, what) for one in those))

    return [
        Kind(
            name,
            len(those),
            median(those, "weight_crest"),
            median(those, "input_crest"),
            median(those, "int8_off"),
            median(those, "fp8_off"),
            sum(one.int8_off < one.fp8_off for one in those),
        )
        for name, those in kinds.items()
    ]


def explain(ranges: Mapping[str, Range]) -> list[str]:
    """What the ranges of weights and inputs let expect of INT8 and FP8, and whether it is so."""
    if not ranges:
        return []
    meet = INT8_STEPS * FP8_SHARE
    told = [
        f"Range: INT8 errs by the largest value over {INT8_STEPS:.0f}, for its steps are even; FP8 keeps three bits behind the leading one "
        f"and errs by {FP8_SHARE:.1%} of each value, whatever the range. They meet where the largest value is {meet:.0f} times the root "
        "mean square of its channel, or of its token (the crest).",
        *(
            f"{kind.name}: crest {kind.weight_crest:.3g} of weights and {kind.input_crest:.3g} of inputs; rounded, its output is off by "
            f"{kind.int8_off:.2%} in INT8, {kind.fp8_off:.2%} in FP8; INT8 is closer in {kind.int8_wins} of {kind.layers}."
            for kind in by_kind(ranges)
        ),
    ]
    seen = list(ranges.values())
    right = sum(one.favours_int8 == (one.int8_off < one.fp8_off) for one in seen)
    rho = _rank_correlation([one.crest for one in seen], [one.int8_off / max(one.fp8_off, 1e-30) for one in seen])
    less = "the ranges alone tell" if right > 0.9 * len(seen) else "the ranges alone do not always tell"
    how = f"; rank correlation of crest and of INT8's error over FP8's {rho:.2f}" if rho is not None else ""
    return [*told, f"Which of the two is closer, {less}: so in {right} of {len(seen)} layers{how}."]


def _rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's; None where one of them does not vary."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return None
    from scipy.stats import spearmanr

    return float(spearmanr(x, y).statistic)
