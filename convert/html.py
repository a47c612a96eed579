"""The report as one page: no network, no dates, the same bytes for the same report."""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from convert.comparison import Comparison, explain
from convert.curves import draw_comparison, draw_frontier
from convert.health import is_ruined, off, remark
from convert.panels import EXACT_DB, MAX_PANELS, draw_panels, is_drawable, place
from convert.plan import REQUANTIZED
from convert.report import Check, Interval, Report
from formats.errors import FormatError
from formats.manifest import Manifest
from formats.safetensors import json_bytes

#: How a bound is written before its limit.
SIGNS = {"at most": "\u2264", "at least": "\u2265"}
#: Shades of the heat map: none up to an error of a thousandth, the last from all of the output on, in equal steps of its logarithm.
SHADES = 8
#: Rows of the table of layers; of a mixture with thousands of experts those with the largest error at the output.
MAX_LAYERS = 1000
WEIGHT_FILES = (".safetensors", ".gguf", ".onnx", ".onnx_data", ".onnx.data", ".bin")


@dataclass(frozen=True)
class _CheckRow:
    check: Check
    value: str
    limit: str
    unit: str
    interval: str = ""


@dataclass(frozen=True)
class _Cell:
    """The worst of a layer's tensors of one kind: its error at the output, a shade for it, and whether static scales ruin it."""

    value: float
    shade: int
    ruined: bool


@dataclass(frozen=True)
class _LayerRow:
    module: str
    health: Mapping[str, Any]
    last: Mapping[str, Any]
    ruined: bool


def render(report: Report, manifest: Manifest) -> str:
    """One self-contained HTML page of a report and the manifest of the artifact that it is about.

    Raises :class:`FormatError` when the report is about other bytes.
    """
    digest = hashlib.sha256(manifest.to_bytes()).hexdigest()
    if digest != report.manifest_sha256:
        raise FormatError(
            f"the report of {report.target} is about another manifest ({report.manifest_sha256}, not {digest}); check the artifact again"
        )
    drawn = [layer for layer in report.layers if is_drawable(layer)]
    weights = [file for file in manifest.files if file.name.endswith(WEIGHT_FILES)]
    return _page("report.html.jinja").render(
        report=report,
        runs=[report.source, *report.runtimes],
        manifest=manifest,
        lead=_lead(report, sum(file.size_bytes for file in weights), sum(file["size_bytes"] for file in manifest.source["files"])),
        failed=[check for check in report.checks if not check.passed],
        checks=[_check_row(check) for check in report.checks],
        weights=weights,
        panels=draw_panels(drawn),
        median_db=statistics.median(layer.snr_db for layer in drawn) if drawn else math.nan,
        exact=sum(layer.snr_db >= EXACT_DB for layer in report.layers),
        broken=sum(math.isnan(layer.snr_db) or layer.snr_db == -math.inf for layer in report.layers),
        worst=sorted(report.layers, key=lambda layer: (not math.isnan(layer.snr_db), layer.snr_db, -layer.worst))[:5],
        decisions=Counter(_fate(entry) for entry in manifest.ledger),
        quantized=any(entry["decision"] == "quantize" for entry in manifest.ledger),
        requantized=any(entry.get("note", "").startswith(REQUANTIZED) for entry in manifest.ledger),
        recipe=json_bytes(manifest.recipe).decode(),
        heat=_heat(report.health),
        health=_layer_rows(report.health),
        remark=remark(report.health),
        shades=range(1, SHADES + 1),
        rungs=[_rung_row(rung) for rung in report.ladder.get("rungs", [])],
        frontier=draw_frontier(report.ladder) if report.ladder else "",
        groups=sorted(report.ladder.get("groups", []), key=lambda group: -group["alone_nats"]),
    )


def render_comparison(comparison: Comparison) -> str:
    """One self-contained HTML page of several artifacts side by side."""
    return _page("compare.html.jinja").render(
        comparison=comparison,
        loss_name="Relative error" if any(row.run.drift for row in comparison.rows) else "KL divergence",
        plot=draw_comparison(comparison.rows),
        sentences=explain(comparison.layers),
        shades=range(1, SHADES + 1),
    )


def _page(template: str) -> Template:
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    # Names, rules and continuations come from models and strangers: everything is escaped but our own drawings.
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": _number,
        "percent": _percent,
        "size": _size,
        "share": _share,
        "interval": _interval,
        "decibels": _decibels,
        "csp_hash": _csp_hash,
    }
    return environment.get_template(template)


def _rung_row(rung: Mapping[str, Any]) -> dict[str, Any]:
    """A rung as the page shows it; what is not finite is null in a report that was read."""

    def shown(value: float | None) -> str:
        return "not measured" if value is None or not math.isfinite(value) else _number(value)

    return {**rung, "kl_nats": shown(rung["kl_nats"]), "perplexity_ratio": shown(rung["perplexity_ratio"])}


def _fate(entry: Mapping[str, Any]) -> str:
    what = str(entry["scheme"]) if entry["decision"] == "quantize" else "kept"
    return f"{what} {entry['note'].partition(' (')[0]}" if entry.get("note") else what


def _heat(layers: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[int, dict[str, _Cell]]]:
    """Kinds of projection, and by layer and kind the worst error at the output; what lies in no layer has no place here."""
    worst: dict[int, dict[str, _Cell]] = {}
    kinds: Counter[str] = Counter()
    for module, health in layers.items():
        kind, index = place(module)
        if index is None:
            continue
        kinds[kind] += 1
        value = off(health)
        shade = min(SHADES, max(0, round((math.log10(max(value, 1e-9)) + 3) / 3 * SHADES)))
        row = worst.setdefault(index, {})
        if kind not in row or row[kind].value < value:
            row[kind] = _Cell(value, shade, is_ruined(health) or (kind in row and row[kind].ruined))
    shown = {kind for kind, _ in kinds.most_common(MAX_PANELS)}
    return [kind for kind in kinds if kind in shown], dict(sorted(worst.items()))


def _layer_rows(layers: Mapping[str, Mapping[str, Any]]) -> list[_LayerRow]:
    """A row a layer in the ledger's order; of too many those with the largest error."""
    worst = sorted(layers, key=lambda module: -off(layers[module]))[:MAX_LAYERS]
    shown = layers if len(worst) == len(layers) else worst
    return [_LayerRow(module, layers[module], layers[module]["errors"][-1], is_ruined(layers[module])) for module in shown]


def _percent(value: float) -> str:
    return f"{value:.2%}" if value < 0.1 else f"{value:.0%}"


def _number(value: float, other: float | None = None) -> str:
    """Four significant digits, or as many as tell ``value`` from ``other``: 0.050004 must not read 0.05 beside a limit of 0.05."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return next(text for digits in (4, 6, 9, 17) if (text := f"{value:.{digits}g}") and (digits == 17 or float(text) != other))


def _size(size_bytes: int) -> str:
    """Bytes in decimal units, as disks and the Hub count them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.4g} {unit}"
    return f"{size_bytes} bytes"


def _share(value: float) -> str:
    return f"{value:.3%}" if math.isfinite(value) else _number(value)


def _decibels(value: float) -> str:
    return "no error" if value >= EXACT_DB else f"{value:.1f} dB" if math.isfinite(value) else _number(value)


def _csp_hash(script: str) -> str:
    """The source expression that lets this inline script run, and no other (Content Security Policy Level 3, 2.3.1)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _lead(report: Report, weight_bytes: int, source_bytes: int) -> str:
    sizes = f"The weights take {_size(weight_bytes)} on disk, the files of the source {_size(source_bytes)}"
    drifts = [(run.name, run.drift) for run in report.runtimes if run.drift]
    if drifts:
        name, worst = max(drifts, key=lambda item: (math.isnan(item[1].relative_error), item[1].relative_error))
        return (
            f"{sizes}. Over {worst.vectors:,} last hidden states on held-out text the mean error, in {name}, is "
            f"{_number(worst.relative_error)} of their length."
        )
    measured = [(run.name, run.divergence) for run in report.runtimes if run.divergence]
    if not measured:
        return f"{sizes}; no runtime returned logits, so how far it is from the source is not known."
    name, far = max(measured, key=lambda item: (math.isnan(item[1].kl_nats), item[1].kl_nats))
    limit = next((check.limit for check in report.checks if check.name == f"{name}: kl_nats"), None)
    allowed = f"; the limit is {_number(limit)}" if limit is not None else ""
    distance = f"{_number(far.kl_nats, limit)}{' nats a token' if math.isfinite(far.kl_nats) else ''}"
    if far.kl_interval:
        distance += f" {_interval(far.kl_interval, limit)}"
    return f"{sizes}. On {far.tokens:,} held-out tokens the KL divergence from the source, in {name}, is {distance}{allowed}."


def _check_row(check: Check) -> _CheckRow:
    if check.bound == "holds":
        return _CheckRow(check, "yes" if check.value else "no", "yes", "")
    interval = _interval(check.interval, check.limit)
    return _CheckRow(check, _number(check.value, check.limit), f"{SIGNS[check.bound]} {_number(check.limit)}", check.unit, interval)


def _interval(interval: Interval | None, limit: float | None = None) -> str:
    return f"[{_number(interval.low, limit)}, {_number(interval.high, limit)}] at 95 %" if interval else ""
