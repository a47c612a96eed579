"""What the table of :mod:`formats.compatibility` says of a target, in words: where it loads, where it does not, and where it is slow."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.compatibility import EXPERTS, HARDWARE, KERNELS, PLAIN, VERSIONS, Line, Part, Row, matrix, named, worst
from formats.layer import QuantizedLayer
from formats.scheme import SCHEMES


@dataclass(frozen=True)
class Judgement:
    """``refusal``: why a runtime cannot load an artifact at all, or None; ``warnings``: what its user should know."""

    refusal: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """One line of a model card: a runtime, its versions, and by kernel the hardware; ``proven`` where the report says it ran."""

    runtime: str
    versions: str
    proven: str | None
    where: str
    evidence: tuple[str, ...]


def parts_of(layers: Iterable[QuantizedLayer], *, apart: Container[str] = ()) -> tuple[Part, ...]:
    """Layers by scheme; without any, the one part of a model that is not quantized.

    ``apart``: experts (:attr:`~formats.layer.QuantizedLayer.experts`) that are linear layers like others to the runtime in question.
    """
    return _parts((named(layer.scheme, expert=bool(layer.experts) and layer.experts not in apart), layer.shape) for layer in layers)


def _parts(layers: Iterable[tuple[str, tuple[int, int]]]) -> tuple[Part, ...]:
    shapes: dict[str, set[tuple[int, int]]] = {}
    for scheme, shape in layers:
        shapes.setdefault(scheme, set()).add(shape)
    return tuple(Part(scheme, frozenset(found)) for scheme, found in shapes.items()) or (Part(PLAIN, frozenset()),)


def parts_of_ledger(ledger: Iterable[Mapping[str, Any]]) -> tuple[Part, ...]:
    """:func:`parts_of` what a manifest's ledger quantizes (:meth:`convert.ledger.Entry.record`)."""
    layers = []
    for entry in ledger:
        for _, start, stop, columns in entry["parts"] if entry["decision"] == "quantize" else ():
            shape = (stop - start, entry["shape"][-1]) if columns is None else (columns[1] - columns[0], stop - start)
            layers.append((named(entry["scheme"], expert="experts" in entry), shape))
    return _parts(layers)


def judge(runtime: str, format_name: str, parts: Sequence[Part], *, hardware: Sequence[str], machine: str | None) -> Judgement:
    """Whether any of the ``hardware`` a target names loads it, or else any at all; and what is amiss there, or on this ``machine``."""
    name = format_name if parts[0].scheme != PLAIN else PLAIN
    found = {place: worst(runtime, place, name, parts) for place in (hardware or HARDWARE)}
    what = f"{name} {' and '.join(str(part.scheme) for part in parts)}"
    kernels = {kernel for kernel, _ in found.values()}
    if kernels == {"none"}:
        _, row = next(iter(found.values()))
        on = f"on {', '.join(hardware)}" if hardware else "on any hardware"
        return Judgement(f"{runtime} does not load {what} {on}: {_why('none', row, parts)}", ())
    if not hardware:
        found = {machine: worst(runtime, machine, name, parts)} if machine else {}
    together: dict[tuple[str, Row | None], list[str]] = {}
    for place, answer in found.items():
        together.setdefault(answer, []).append(place)
    where = "" if hardware else " (this machine; hardware: in the target says otherwise)"
    return Judgement(
        None,
        tuple(
            f"{runtime} on {', '.join(places)}{where}: {what}: {_why(kernel, row, parts)}{_elsewhere(name, places, parts)}"
            for (kernel, row), places in together.items()
            if _is_amiss(kernel, row, parts)
        ),
    )


def loads_in(format_name: str, parts: Sequence[Part]) -> list[str]:
    """One text a runtime: by kernel, on which hardware its newest version loads the artifact."""
    newest: dict[str, Line] = {}
    for line in matrix(format_name if parts[0].scheme != PLAIN else PLAIN, parts):
        newest.setdefault(line.runtime, line)
    return [f"{line.runtime} {line.versions[0]} ({by_kernel(line)})" for line in newest.values()]


def by_kernel(line: Line) -> str:
    """``native on sm_80 sm_90; none on sm_100``; what is not known is left out."""
    groups: dict[str, list[str]] = {}
    for place, kernel in line.kernels.items():
        groups.setdefault(kernel, []).append(place)
    known = [kernel for kernel in KERNELS if kernel in groups]
    return "; ".join(f"{kernel} on {'all' if len(groups[kernel]) == len(HARDWARE) else ' '.join(groups[kernel])}" for kernel in known)


def places(format_name: str, parts: Sequence[Part], ran: Mapping[str, str]) -> list[Place]:
    """The lines of a model card. ``ran``: runtime -> version and device it was proven with."""
    found = []
    for line in matrix(format_name if parts[0].scheme != PLAIN else PLAIN, parts):
        version, _, device = ran.get(line.runtime, "").partition(" ")
        proven = f"{version} on {device}" if any(version == known or version.startswith(f"{known}.") for known in line.versions) else None
        evidence = tuple(dict.fromkeys(row.evidence for row in line.rows.values() if row is not None))
        found.append(Place(line.runtime, ", ".join(line.versions), proven, by_kernel(line), evidence))
    told = {place.runtime for place in found if place.proven}
    for runtime, run in ran.items():
        if runtime not in told:
            version, _, device = run.partition(" ")
            found.append(Place(runtime, version, f"{version} on {device}", "", ()))
    return found


def _elsewhere(format_name: str, places: Sequence[str], parts: Sequence[Part]) -> str:
    """The runtimes that have an 8-bit kernel in all these places."""
    good = [name for name in VERSIONS if all(not _is_amiss(*worst(name, place, format_name, parts), parts) for place in places)]
    return f"; {', '.join(good)} {'has one' if len(good) == 1 else 'have one'} there" if good else ""


def _is_amiss(kernel: str, row: Row | None, parts: Sequence[Part]) -> bool:
    if kernel == "fused" and row is not None:
        # Weights alone are made for such a kernel; of a scheme with 8-bit activations it is half of what was promised.
        held_back = [str(part.scheme).removesuffix(EXPERTS) for part in parts if part.scheme in row.schemes]
        return any(scheme in SCHEMES and SCHEMES[scheme].activation is not None for scheme in held_back)
    return kernel not in ("plain", "native", "fused")


def _why(kernel: str, row: Row | None, parts: Sequence[Part]) -> str:
    if row is None:
        return "not known: no run and no source says whether it loads; prove it there"
    if kernel == "none" and row.kernel != "none":
        bad = next(
            shape for part in parts if part.scheme in row.schemes for shape in part.shapes if row.shape and not row.shape.holds(shape)
        )
        return f"it wants {row.shape}, and a layer is {bad[0]} x {bad[1]} ({row.evidence})"
    reason = row.note or KERNELS[kernel]
    return f"{reason} ({row.evidence})" if kernel == "none" else f"no 8-bit kernel, {kernel}: {reason} ({row.evidence})"
