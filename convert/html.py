"""The report as one page: no network, no dates, the same bytes for the same report."""

from __future__ import annotations

import base64
import hashlib
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from convert.comparison import Comparison, explain
from convert.curves import draw_comparison, draw_frontier, draw_groups
from convert.gauges import SHADES, draw_gauge, draw_stages, shade
from convert.health import is_ruined, off, remark
from convert.ledger import REQUANTIZED
from convert.panels import EXACT_DB, MAX_PANELS, draw_panels, draw_ranges, is_drawable, place
from convert.report import Check, Drift, Interval, Report, RuntimeResult
from formats.errors import FormatError
from formats.manifest import Manifest
from formats.safetensors import json_bytes

#: How a bound is written before its limit.
SIGNS = {"at most": "\u2264", "at least": "\u2265"}
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
class _Measure:
    """A check of quality as people call it, with its drawing."""

    row: _CheckRow
    label: str
    gauge: Markup


@dataclass(frozen=True)
class _Tile:
    """A figure at the head of the page, and what it is to be held against."""

    name: str
    value: str
    beside: str


@dataclass(frozen=True)
class _Text:
    """What one run wrote: as far as the source's text goes (``same``), and from where it parts."""

    name: str
    same: str
    parted: str


@dataclass(frozen=True)
class _Passage:
    """A prompt, what the source wrote, and what each run of the artifact did."""

    prompt: str
    source: str
    runs: list[_Text]


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
        measures=_measures(report.checks),
        tiles=_tiles(report, sum(file.size_bytes for file in weights), sum(file["size_bytes"] for file in manifest.source["files"])),
        passages=_passages(report),
        stages=draw_stages(report.health),
        ranges=draw_ranges(report.health),
        alone=draw_groups(report.ladder["groups"]) if report.ladder.get("groups") else "",
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
        rungs=[_rung_row(rung, int(report.validation["tokens"])) for rung in report.ladder.get("rungs", [])],
        frontier=draw_frontier(report.ladder) if report.ladder else "",
        groups=sorted(report.ladder.get("groups", []), key=lambda group: -group["alone_nats"]),
    )


def render_comparison(comparison: Comparison) -> str:
    """One self-contained HTML page of several artifacts side by side."""
    return _page("compare.html.jinja").render(
        comparison=comparison,
        loss_name="Relative error" if any(row.run.drift for row in comparison.rows) else "KL divergence",
        plot=draw_comparison(comparison.rows),
        sentences=explain(comparison.layers, comparison.ranges),
        calibrated=any(layer.reach is not None for layer in comparison.layers),
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
        "times": _times,
        "short": _short,
        "interval": _interval,
        "decibels": _decibels,
        "csp_hash": _csp_hash,
    }
    return environment.get_template(template)


def _rung_row(rung: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    """A rung as the page shows it, of a report on so many tokens; what is not finite is null in a report that was read."""

    def shown(value: float | None) -> str:
        return "not measured" if value is None or not math.isfinite(value) else _number(value)

    few = rung.get("tokens") if 0 < (rung.get("tokens") or 0) < tokens else 0
    said = [f"on {few:,} tokens"] if few else [f"chosen by {rung['chosen_by']}"] if rung.get("chosen_by") else []
    said += [f"pilot, calibrated on {rung['pilot']:,} tokens"] if rung.get("pilot") else []
    said += ["by no more than the noise of the text"] if rung["passed"] and not rung.get("certain", True) else []
    return {**rung, "kl_nats": shown(rung["kl_nats"]), "perplexity_ratio": shown(rung["perplexity_ratio"]), "said": said}


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
        row = worst.setdefault(index, {})
        if kind not in row or row[kind].value < value:
            row[kind] = _Cell(value, shade(value), is_ruined(health) or (kind in row and row[kind].ruined))
    shown = {kind for kind, _ in kinds.most_common(MAX_PANELS)}
    return [kind for kind in kinds if kind in shown], dict(sorted(worst.items()))


def _layer_rows(layers: Mapping[str, Mapping[str, Any]]) -> list[_LayerRow]:
    """A row a layer, the tenth behind the ninth and else in the ledger's order; of too many those with the largest error."""
    worst = sorted(layers, key=lambda module: -off(layers[module]))[:MAX_LAYERS]
    numbers = {module: math.inf if (number := place(module)[1]) is None else number for module in layers}
    shown = sorted(layers, key=lambda module: numbers[module]) if len(worst) == len(layers) else worst
    return [_LayerRow(module, layers[module], layers[module]["errors"][-1], is_ruined(layers[module])) for module in shown]


def _percent(value: float) -> str:
    return f"{value:.2%}" if value < 0.1 else f"{value:.0%}"


def _number(value: float, other: float | None = None) -> str:
    """Four significant digits, or as many as tell ``value`` from ``other``: 0.050004 must not read 0.05 beside a limit of 0.05."""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if other is not None and math.isclose(value, other, rel_tol=1e-12):
        other = None
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return next(text for digits in (4, 6, 9, 17) if (text := f"{value:.{digits}g}") and (digits == 17 or float(text) != other))


def _short(name: str) -> str:
    """A runtime's name without what it says of its session."""
    return name.partition(" (")[0]


def _times(value: float) -> str:
    """A factor, in as many digits as anybody reads."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


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


def _vectors(drift: Drift) -> str:
    return "last hidden states" if drift.top1 is None else "logits of classes"


def _lead(report: Report, weight_bytes: int, source_bytes: int) -> str:
    sizes = f"The weights take {_size(weight_bytes)} on disk, the files of the source {_size(source_bytes)}"
    drifts = [(run.name, run.drift) for run in report.runtimes if run.drift]
    if drifts:
        name, worst = max(drifts, key=lambda item: (math.isnan(item[1].relative_error), item[1].relative_error))
        return (
            f"{sizes}. Over {worst.vectors:,} {_vectors(worst)} of what was held out the mean error, in {_short(name)}, is "
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
    return f"{sizes}. On {far.tokens:,} held-out tokens the KL divergence from the source, in {_short(name)}, is {distance}{allowed}."


#: Checks of quality, as people call them; that of a task is called after it.
LABELS = {
    "kl_nats": "KL divergence",
    "top1": "Same top token",
    "perplexity_ratio": "Perplexity ratio",
    "relative_error": "Relative error",
    "answers": "Prompts lost",
}


def _measures(checks: Sequence[Check]) -> dict[str, list[_Measure]]:
    """By runtime."""
    found: dict[str, list[_Measure]] = {}
    for check in checks:
        runtime, _, name = check.name.rpartition(": ")
        if name in LABELS or name.startswith("recovery of "):
            label = LABELS.get(name) or f"R{name[1:]}"
            found.setdefault(runtime, []).append(_Measure(_check_row(check), label, draw_gauge(check)))
    return found


def _tiles(report: Report, weight_bytes: int, source_bytes: int) -> list[_Tile]:
    """The worst of what was measured, and what it costs."""
    found = []
    far = [run.divergence for run in report.runtimes if run.divergence]
    if far:
        worst = max(far, key=lambda item: (math.isnan(item.kl_nats), item.kl_nats))
        found += [
            _Tile("KL divergence", f"{worst.kl_nats:.3g}", "nats a token"),
            _Tile("Perplexity", f"{worst.perplexity_ratio - 1:+.2%}", f"{worst.perplexity:.4g}, the source {worst.source_perplexity:.4g}"),
            _Tile("Same top token", f"{worst.top1:.1%}", f"of {worst.tokens:,} tokens"),
        ]
    drifts = [run.drift for run in report.runtimes if run.drift]
    if drifts:
        found.append(_Tile("Relative error", f"{max(item.relative_error for item in drifts):.3g}", f"of the {_vectors(drifts[0])}"))
        if drifts[0].top1 is not None:
            worst_top1 = min(item.top1 for item in drifts if item.top1 is not None)
            found.append(_Tile("Same class", f"{worst_top1:.1%}", f"of {drifts[0].vectors:,}"))
    # Of a source in four bits, a factor would tell nobody anything.
    beside = f"{_times(weight_bytes / source_bytes)} × the source" if weight_bytes < source_bytes else f"the source {_size(source_bytes)}"
    found.append(_Tile("On disk", _size(weight_bytes), beside))
    for run in sorted(report.runtimes, key=lambda run: -run.decode_tokens_per_second)[:1]:
        before = report.source.decode_tokens_per_second
        beside = "tokens/s" + (f", {_times(run.decode_tokens_per_second / before)} × the source" if before else f" in {run.program}")
        if run.decode_tokens_per_second:
            found.append(_Tile("Writes", _times(run.decode_tokens_per_second), beside))
    return found


def _passages(report: Report) -> list[_Passage]:
    """Each prompt with what was written after it; those of which nothing is known are left out."""
    found = []
    for i, prompt in enumerate((report.prompt, *report.passages)):
        texts = [(run.name, _written(run, i)) for run in (report.source, *report.runtimes)]
        if all(text.startswith(" ") for _, text in texts if text):  # what goes on in the middle of a line is none the less shown alone
            texts = [(name, text.removeprefix(" ")) for name, text in texts]
        (_, source), *others = texts
        if any(text for _, text in texts):
            found.append(_Passage(prompt.strip(), source, [_text(name, text, source) for name, text in others]))
    return found


def _written(run: RuntimeResult, number: int) -> str:
    """What a run wrote after the prompt, or after one of the passages."""
    texts = (run.continuation, *run.passages)
    return texts[number] if number < len(texts) else ""


def _text(name: str, text: str, source: str) -> _Text:
    """Parted at the word in which they differ."""
    if not source or text == source:
        return _Text(name, text, "")
    end = next((i for i, (ours, theirs) in enumerate(zip(text, source, strict=False)) if ours != theirs), min(len(text), len(source)))
    while 0 < end < len(text) and not text[end - 1].isspace() and not text[end].isspace():
        end -= 1
    return _Text(name, text[:end], text[end:] or " (ends here)")


def _check_row(check: Check) -> _CheckRow:
    if check.bound == "holds":
        return _CheckRow(check, "yes" if check.value else "no", "yes", "")
    interval = _interval(check.interval, check.limit)
    return _CheckRow(check, _number(check.value, check.limit), f"{SIGNS[check.bound]} {_number(check.limit)}", check.unit, interval)


def _interval(interval: Interval | None, limit: float | None = None) -> str:
    return f"[{_number(interval.low, limit)}, {_number(interval.high, limit)}] at 95 %" if interval else ""
