"""Several artifacts of one model side by side: what each costs and loses, which can be told apart, and where INT8 or FP8 fits better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from convert.health import off
from convert.intervals import difference
from convert.ranges import Range
from convert.ranges import explain as explain_ranges
from convert.report import Interval, LayerNumbers, Report, RuntimeResult
from formats.errors import InputError
from formats.manifest import Manifest
from formats.scheme import SCHEMES

#: Sizes that differ by no more are the same: headers of INT8 and FP8 files differ by a kilobyte.
SAME_SIZE = 1e-3


@dataclass(frozen=True)
class Row:
    """One artifact in one runtime. ``loss``: the mean KL divergence in nats, or of a model that predicts no tokens the relative error, in
    ``interval``. ``apart``: its loss less that of the row that loses least, on the same tokens, pair by pair; None for that row itself,
    and where nothing can be said. ``frontier``: no other row is as small and loses less, or loses as little and is smaller."""

    name: str
    format: str
    schemes: tuple[str, ...]
    size_bytes: int
    passed: bool
    run: RuntimeResult
    loss: float
    interval: Interval | None
    apart: Interval | None = None
    frontier: bool = False

    @property
    def in_noise(self) -> bool:
        """Whether its distance from the row that loses least is within the noise of the text."""
        return self.apart is not None and self.apart.low <= 0 <= self.apart.high


@dataclass(frozen=True)
class Layer:
    """One layer in INT8 and in FP8, by these ``schemes``: the weight's signal to noise in dB in each, and where calibration saw its input,
    the largest magnitude over the median one (``reach``) and the share by which its output is off in each."""

    tensor: str
    schemes: tuple[str, str]
    int8_db: float
    fp8_db: float
    reach: float | None
    int8_off: float | None
    fp8_off: float | None


@dataclass(frozen=True)
class Comparison:
    """``source``: as it ran on the same text; ``pair``: the names of the artifacts whose ``layers`` are compared, if there are such, with
    the dynamic ``ranges`` of their tensors."""

    model: str
    source: RuntimeResult
    validation: dict[str, Any]
    rows: tuple[Row, ...]
    pair: tuple[str, str] | None
    layers: tuple[Layer, ...]
    ranges: Mapping[str, Range] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """As plain data, without what intervals were made of."""
        plain = asdict(self)
        for row in plain["rows"]:
            if row["run"]["divergence"]:
                del row["run"]["divergence"]["blocks"]
        return plain


def compare(made: Sequence[tuple[Manifest, Report]]) -> Comparison:
    """Raises :class:`InputError` when the reports are about different texts, and when nothing ran."""
    texts = {(report.validation["tokens_sha256"], report.validation["reference"]) for _, report in made}
    if len(texts) > 1:
        raise InputError("the artifacts were compared with their source on different texts; check them together")
    rows = [_row(manifest, report, run) for manifest, report in made for run in report.runtimes]
    if not rows:
        raise InputError("none of the artifacts ran, so there is nothing to compare; octavo check says why")
    best = min(rows, key=lambda row: (math.isnan(row.loss), row.loss))
    rows = [replace(row, apart=_apart(row, best), frontier=not any(_beats(other, row) for other in rows)) for row in rows]
    pair = _pair(made)
    first = made[0][1]
    return Comparison(
        model=made[0][0].source["origin"],
        source=first.source,
        validation=first.validation,
        rows=tuple(rows),
        pair=(f"{pair[0].recipe}/{pair[0].target}", f"{pair[1].recipe}/{pair[1].target}") if pair else None,
        layers=tuple(_layers(*pair)) if pair else (),
    )


def explain(layers: Sequence[Layer], ranges: Mapping[str, Range]) -> list[str]:
    """Sentences on INT8 against FP8, each from what was measured of the layers."""
    weights = [layer for layer in layers if math.isfinite(layer.int8_db) and math.isfinite(layer.fp8_db)]
    if not weights:
        return []
    finer = sum(layer.int8_db > layer.fp8_db for layer in weights)
    int8_db, fp8_db = statistics.median(layer.int8_db for layer in weights), statistics.median(layer.fp8_db for layer in weights)
    said = [
        f"Weights: {finer} of {len(weights)} are closer to the source in INT8 (median signal to noise {int8_db:.1f} dB, "
        f"in FP8 {fp8_db:.1f} dB). "
        "The steps of INT8 are even, so its error follows the largest value; those of FP8 grow with the value, whatever the range.",
        *explain_ranges(ranges),
    ]
    seen = [
        (layer.reach, layer.int8_off < layer.fp8_off)
        for layer in layers
        if layer.reach is not None and layer.int8_off is not None and layer.fp8_off is not None
    ]
    if not seen:
        return said
    told = []
    for better, name in ((True, "INT8"), (False, "FP8")):
        reaches = [reach for reach, int8_is_better in seen if int8_is_better is better]
        if reaches:
            range_ = f"largest input {statistics.median(reaches):,.0f} times the median one, by the median layer"
            told.append(f"{len(reaches)} of {len(seen)} are closer to the source in {name} ({range_})")
    return [*said, f"Outputs as both artifacts were made, which calibration saw: {'; '.join(told)}."]


def _row(manifest: Manifest, report: Report, run: RuntimeResult) -> Row:
    found = run.divergence
    loss = found.kl_nats if found else run.drift.relative_error if run.drift else math.nan
    return Row(
        name=f"{report.recipe}/{report.target}",
        format=manifest.format,
        schemes=tuple(dict.fromkeys(entry["scheme"] for entry in manifest.ledger if entry["decision"] == "quantize")),
        size_bytes=manifest.weight_bytes,
        passed=report.passed,
        run=run,
        loss=loss,
        interval=found.kl_interval if found else None,
    )


def _apart(row: Row, best: Row) -> Interval | None:
    mine, least = (item.run.divergence.blocks if item.run.divergence else None for item in (row, best))
    return difference(mine, least) if row is not best and mine and least else None


def _beats(other: Row, row: Row) -> bool:
    """NaN beats nothing and is beaten by any number."""
    if math.isnan(row.loss):
        return not math.isnan(other.loss)
    as_small, smaller = other.size_bytes <= row.size_bytes * (1 + SAME_SIZE), other.size_bytes < row.size_bytes * (1 - SAME_SIZE)
    return as_small and other.loss <= row.loss and (smaller or other.loss < row.loss)


def _pair(made: Sequence[tuple[Manifest, Report]]) -> tuple[Report, Report] | None:
    """The first report with layers in INT8, and the first with layers in FP8."""
    found = [
        next((report for _, report in made if any(_kind(layer) == kind for layer in report.layers)), None) for kind in ("int", "float")
    ]
    return (found[0], found[1]) if found[0] and found[1] else None


def _kind(layer: LayerNumbers) -> str:
    scheme = SCHEMES.get(layer.scheme)
    return scheme.weight.grid.kind if scheme else ""


def _layers(int8: Report, fp8: Report) -> list[Layer]:
    other = {layer.tensor: layer for layer in fp8.layers if _kind(layer) == "float"}
    found = []
    for layer in int8.layers:
        if _kind(layer) != "int" or layer.tensor not in other:
            continue
        module = layer.tensor.removesuffix(".weight")
        healths = [report.health.get(module) for report in (int8, fp8)]
        inputs = next((health["inputs"] for health in healths if health), None)
        offs = [off(health) if health else None for health in healths]
        reach = inputs["absmax"] / inputs["typical"] if inputs and inputs["typical"] else None
        fp8_layer = other[layer.tensor]
        found.append(Layer(layer.tensor, (layer.scheme, fp8_layer.scheme), layer.snr_db, fp8_layer.snr_db, reach, *offs))
    return found
