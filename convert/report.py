"""The report: every check with its value, its limit and whether it passed, as one record that goes to JSON and back."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from formats.errors import FormatError
from formats.manifest import MANIFEST
from formats.safetensors import json_bytes, read_json

VERSION = 1

_Record = TypeVar("_Record")


@dataclass(frozen=True)
class Interval:
    """Where a value lies at 95 % (:mod:`convert.intervals`)."""

    low: float
    high: float


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: ``value`` in ``unit`` must be ``bound`` (``at most``, ``at least``) ``limit``; with ``bound``
    ``holds`` it is 1 for yes and 0 for no. The value decides, be the limit inside its ``interval`` or not; ``detail`` then says that the
    sample is too small to tell. Made by :func:`at_most`, :func:`at_least` and :func:`holds`."""

    name: str
    value: float
    bound: str
    limit: float
    unit: str
    passed: bool
    detail: str
    interval: Interval | None = None


def at_most(name: str, value: float, limit: float, unit: str, detail: str = "", interval: Interval | None = None) -> Check:
    """A value with an upper limit; NaN fails."""
    return Check(name, value, "at most", limit, unit, value <= limit, detail, interval)


def at_least(name: str, value: float, limit: float, unit: str, detail: str = "", interval: Interval | None = None) -> Check:
    """A value with a lower limit; NaN fails."""
    return Check(name, value, "at least", limit, unit, value >= limit, detail, interval)


def holds(name: str, fact: bool, detail: str = "") -> Check:
    """A yes or a no."""
    return Check(name, float(fact), "holds", 1.0, "", fact, detail)


@dataclass(frozen=True)
class LayerNumbers:
    """One tensor that is quantized, or kept and smoothed (scheme ``kept``), against its source: ``snr_db`` is the weight's power over the
    error's; ``worst`` the largest error as a share of its bound, at most 1, be it that of a code under its scheme, of a scale, or of what
    GPTQ noted; ``clipped`` the share of weights beyond the largest code."""

    tensor: str
    scheme: str
    snr_db: float
    worst: float
    clipped: float


@dataclass(frozen=True)
class Blocks:
    """What was measured, block of neighbouring tokens by block, so that it can be drawn again: how many ``tokens``, the sum of their
    ``kl_nats``, how many have the ``same`` most likely successor; how many were ``predicted``, and by how many ``excess_nats`` the
    artifact predicts these worse than the source."""

    tokens: tuple[int, ...]
    kl_nats: tuple[float, ...]
    same: tuple[int, ...]
    predicted: tuple[int, ...]
    excess_nats: tuple[float, ...]


@dataclass(frozen=True)
class Divergence:
    """How far a runtime's logits are from the source's on the same tokens: KL in nats a token, perplexities over next tokens; and the
    intervals in which they lie, None where there is too little text for one."""

    tokens: int
    kl_nats: float
    kl_nats_p99: float
    top1: float
    perplexity: float
    source_perplexity: float
    kl_interval: Interval | None = None
    top1_interval: Interval | None = None
    ratio_interval: Interval | None = None
    blocks: Blocks | None = None

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity / self.source_perplexity


@dataclass(frozen=True)
class Drift:
    """How far the last hidden states of a model that predicts no tokens are from the source's: over ``vectors``, the mean length of the
    error as a share of the source's, and the mean cosine. Where the vectors are logits of classes, ``top1``: how often the most likely
    class is the same, and ``kl_nats`` from the source's distribution of classes to the artifact's."""

    vectors: int
    relative_error: float
    cosine: float
    top1: float | None = None
    kl_nats: float | None = None


@dataclass(frozen=True)
class Answers:
    """Which prompts of the user's test set were answered right, in its order, and where the share lies (Wilson)."""

    right: tuple[bool, ...]
    interval: Interval

    @property
    def share(self) -> float:
        return sum(self.right) / len(self.right)


@dataclass(frozen=True)
class TaskScore:
    """The ``score`` of a model in one task of lm-evaluation-harness (``name``; ``task`` is what the recipe asked for, maybe a group of it),
    over ``documents``, in ``interval``. ``recovery``: as a share of the source's score, or the source's as a share of it where less is
    better; None for the source itself. Intervals are None where a metric is not the mean of its documents'."""

    task: str
    name: str
    metric: str
    higher_is_better: bool
    score: float
    documents: int
    shots: int
    interval: Interval | None = None
    recovery: float | None = None
    recovery_interval: Interval | None = None


@dataclass(frozen=True)
class RuntimeResult:
    """What one runtime did with a model folder, or with the source. ``divergence`` and ``drift`` are None for the source, and where it did
    not run; which of them there is follows from what the model gives. ``kernels`` says how many layers use which eight-bit kernel, where
    the runtime tells. ``passages``: how it goes on after each of the report's."""

    name: str
    versions: dict[str, str]
    device: str
    weight_bytes: int
    peak_bytes: int
    load_seconds: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    continuation: str
    divergence: Divergence | None
    drift: Drift | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    answers: Answers | None = None
    tasks: tuple[TaskScore, ...] = ()
    passages: tuple[str, ...] = ()

    @property
    def program(self) -> str:
        """The runtime, without the mode in which it was run."""
        return self.name.partition(" ")[0]

    @property
    def version(self) -> str:
        """Of the runtime itself; empty where it did not tell, as in a report that another version of octavo wrote."""
        return self.versions.get(self.program, "")


@dataclass(frozen=True)
class Look:
    """A first look at an artifact's quality, in every runtime, on ``share`` of the validation tokens; 0 for none. ``only``: it is not
    followed by the whole check, whatever it shows."""

    share: float
    only: bool = False


NO_LOOK = Look(0.0)


@dataclass(frozen=True)
class Report:
    """What was measured of one artifact. ``manifest_sha256`` ties it to its bytes; ``validation`` says on which text;
    ``passages`` of it are continued as ``prompt`` is;
    ``card_sha256`` is the hash of the model card made from it, which no manifest covers. ``health``, by module, is what calibration saw
    (:mod:`convert.health`), from the manifest. ``ladder``: of a target with a budget, how it was met (:mod:`convert.ladder`). ``brief``: it
    is of a :class:`Look`, and nothing else was checked."""

    recipe: str
    target: str
    manifest_sha256: str
    checks: tuple[Check, ...]
    layers: tuple[LayerNumbers, ...]
    source: RuntimeResult
    runtimes: tuple[RuntimeResult, ...]
    validation: dict[str, Any]
    prompt: str
    passages: tuple[str, ...] = ()
    card_sha256: str | None = None
    health: dict[str, Any] = field(default_factory=dict)
    ladder: dict[str, Any] = field(default_factory=dict)
    brief: bool = False

    @property
    def passed(self) -> bool:
        """Every check passed, and there were some."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_bytes(self) -> bytes:
        """As :func:`plain_json` spells it."""
        return plain_json({"report_version": VERSION, "passed": self.passed, **asdict(self)})


def plain_json(record: dict[str, Any]) -> bytes:
    """JSON, in which a number that is not finite is null."""
    return json_bytes(_finite(record))


def manifest_digest(artifact: Path) -> str:
    """sha256 of the manifest's bytes, which hold the hash of every other byte."""
    return hashlib.sha256((artifact / MANIFEST).read_bytes()).hexdigest()


def report_path(artifact: Path) -> Path:
    """Reports lie beside their artifact: ``<target>.report.json``."""
    return artifact.with_name(f"{artifact.name}.report.json")


def read_report(path: Path) -> Report:
    """Raises :class:`FormatError` when the file is no report of this version."""
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.pop("report_version", None) != VERSION:
        raise FormatError(f"{path}: not a report of version {VERSION}; check the artifact again")
    try:
        raw.pop("passed")
        return Report(
            **{
                **raw,
                "checks": tuple(_with_intervals(Check, item) for item in raw["checks"]),
                "layers": tuple(_record(LayerNumbers, item) for item in raw["layers"]),
                "source": _runtime(raw["source"]),
                "runtimes": tuple(_runtime(item) for item in raw["runtimes"]),
                "passages": tuple(raw.get("passages", ())),
            }
        )
    except (KeyError, TypeError) as error:
        raise FormatError(f"{path}: not a whole report ({error}); check the artifact again") from None


def _runtime(raw: dict[str, Any]) -> RuntimeResult:
    divergence, drift, answers = raw["divergence"], raw.get("drift"), raw.get("answers")
    if divergence and divergence.get("blocks"):
        divergence = {**divergence, "blocks": Blocks(**{key: tuple(values) for key, values in divergence["blocks"].items()})}
    found = {
        "divergence": _with_intervals(Divergence, divergence) if divergence else None,
        "drift": _drift(drift) if drift else None,
        "answers": Answers(tuple(answers["right"]), Interval(**answers["interval"])) if answers else None,
        "tasks": tuple(_score(item) for item in raw.get("tasks", ())),
        "passages": tuple(raw.get("passages", ())),
    }
    return RuntimeResult(**{**raw, **found})


def _score(raw: dict[str, Any]) -> TaskScore:
    intervals = {key: Interval(**raw[key]) if raw[key] else None for key in ("interval", "recovery_interval")}
    score = math.nan if raw["score"] is None else raw["score"]
    # What is not finite is null, and only the source has no recovery at all.
    return TaskScore(**{**raw, **intervals, "score": score})


def _record(kind: type[_Record], raw: dict[str, Any]) -> _Record:
    return kind(**{key: math.nan if value is None else value for key, value in raw.items()})


def _drift(raw: dict[str, Any]) -> Drift:
    """Without logits of classes there are no numbers of them, which is no NaN."""
    classes = {key: raw[key] for key in ("top1", "kl_nats") if raw.get(key) is not None}
    return _record(Drift, {key: raw[key] for key in ("vectors", "relative_error", "cosine")} | classes)


def _with_intervals(kind: type[_Record], raw: dict[str, Any]) -> _Record:
    """A record of which some fields may be intervals, and may be None."""
    optional = {key: value for key, value in raw.items() if key.endswith("interval") or key == "blocks"}
    read = {key: Interval(**value) if isinstance(value, dict) else value for key, value in optional.items()}
    return kind(**{key: math.nan if value is None else value for key, value in raw.items() if key not in optional}, **read)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
