"""What a folder or file holds and how it is quantized, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from formats.compatibility import Line, Part, matrix, parts_of_folder
from formats.dtypes import FLOATS
from formats.errors import FormatError
from formats.existing import SIDE_FILE, section_of
from formats.manifest import MANIFEST, read_manifest
from formats.onnx_graph import find_graphs, has_graph, metadata_of, read_graph, tensors_of
from formats.safetensors import TensorSpec, read_folder, read_header, read_json
from formats.tensors import GRAPHS, read_tensors

#: Last parts of names under which quantized formats keep what is not a weight.
_QUANTIZATION_PARTS = ("scale", "scale_inv", "zero_point", "SCB", "shape", "format")


def inspect(path: Path) -> dict[str, Any]:
    """Plain data: ``path``, ``model``, ``made_by``, ``quantization``, ``metadata`` where known, and ``tensors`` counted by dtype and kind.

    Raises :class:`FormatError` when there is nothing at ``path`` that can be read.
    """
    if path.is_dir():
        return _inspect_folder(path)
    if not path.is_file():
        raise FormatError(f"{path}: no such file or folder")
    if path.suffix == ".gguf":
        from formats.gguf import open_gguf

        gguf = open_gguf(path)
        rows = _count((tensor.spec, tensor.kind, tensor.size_bytes) for tensor in gguf.tensors.values())
        return {"path": str(path), "model": gguf.config(), "metadata": {"name": gguf.fields.get("general.name")}, "tensors": rows}
    if path.suffix == ".onnx":
        return _inspect_graph(path)
    located, metadata = read_header(path)
    return {
        "path": str(path),
        "metadata": metadata,
        "tensors": _count((item.spec, item.spec.dtype, item.spec.size_bytes) for item in located.values()),
    }


def compatibility(folder: Path) -> dict[str, Any]:
    """Plain data: ``path``, ``format``, ``schemes``, and the ``matrix`` of :func:`formats.compatibility.matrix`, each line with its rows.

    Raises :class:`FormatError` when ``folder`` holds no model, or a quantization that cannot be understood.
    """
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder; the matrix is of a whole model")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{folder / 'config.json'}: not a JSON object")
    side = read_json(folder / SIDE_FILE) if (folder / SIDE_FILE).exists() else None
    if has_graph(folder):
        said = [metadata_of(read_graph(folder / graph)) for graph in find_graphs(folder)]
        schemes = sorted({scheme for one in said for scheme in one.get("schemes", [])})
        name, parts = said[-1].get("format", GRAPHS[0]), tuple(Part(scheme, frozenset()) for scheme in schemes)
        if not parts:
            raise FormatError(f"{folder}: its graph does not say by which scheme it is quantized; only what octavo wrote does")
    else:
        name, parts = parts_of_folder(config, {name: item.spec for name, item in read_folder(folder).items()}, side)
    return {
        "path": str(folder),
        "format": name,
        "schemes": [part.scheme or "one that has no name here" for part in parts],
        "matrix": [_line_record(line) for line in matrix(name, parts)],
    }


def _line_record(line: Line) -> dict[str, Any]:
    rows: dict[tuple[str, str, str], list[str]] = {}
    for place, row in line.rows.items():
        if row is not None:
            note = "; ".join(filter(None, (row.note, f"wants {row.shape}" if row.shape else "")))
            rows.setdefault((line.kernels[place], row.evidence, note), []).append(place)
    return {
        "runtime": line.runtime,
        "versions": list(line.versions),
        "kernels": dict(line.kernels),
        "rows": [{"hardware": places, "kernel": kernel, "evidence": said, "note": note} for (kernel, said, note), places in rows.items()],
    }


def _inspect_folder(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    if not isinstance(config, dict):
        raise FormatError(f"{folder / 'config.json'}: not a JSON object")
    graphed = has_graph(folder)
    located = read_tensors(folder, GRAPHS[0] if graphed else "")
    side = folder / SIDE_FILE
    try:
        section = section_of(config, read_json(side) if side.is_file() else None)
    except FormatError:  # of a format that is not read here, or broken: it is shown as it is
        section = ("", config.get("quantization_config") or {})
    found: dict[str, Any] = {
        "path": str(folder),
        "model": {
            key: config.get(key)
            for key in ("architectures", "model_type", "dtype", "hidden_size", "num_hidden_layers", "vocab_size")
            if config.get(key)
        },
        "quantization": dict(section[1]) if section else "none",
        "tensors": _count((item.spec, item.spec.dtype, item.spec.size_bytes) for item in located.values()),
    }
    if graphed:
        graphs = {name: _inspect_graph(folder / name) for name in find_graphs(folder)}
        last = list(graphs.values())[-1]
        found |= {key: last[key] for key in ("quantization", "metadata")}
        if len(graphs) > 1:
            found["metadata"] = {name: graph["metadata"] for name, graph in graphs.items()}
    if (folder / MANIFEST).exists():
        manifest = read_manifest(folder)
        found["made_by"] = {
            "octavo": manifest.versions.get("octavo"),
            "target": manifest.target,
            "source": manifest.source.get("origin"),
            "commit": manifest.source.get("commit"),
        }
    return found


def _inspect_graph(path: Path) -> dict[str, Any]:
    """A graph: what its metadata says of its quantization, its operators, and its tensors."""
    model = read_graph(path)
    said = metadata_of(model)
    operators = Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in model.graph.node)
    return {
        "path": str(path),
        "quantization": {key: value for key, value in said.items() if key != "packs"} or "none that octavo wrote",
        "metadata": {
            "opset": {item.domain or "ai.onnx": item.version for item in model.opset_import},
            "ir_version": model.ir_version,
            "producer": model.producer_name,
            "operators": dict(operators.most_common()),
        },
        "tensors": _count((item.spec, item.spec.dtype, item.spec.size_bytes) for item in tensors_of(model, path).values()),
    }


def _count(tensors: Iterable[tuple[TensorSpec, str, int]]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for spec, dtype, size_bytes in tensors:
        kind = _kind(spec, dtype)
        row = rows.setdefault((dtype, kind), {"dtype": dtype, "kind": kind, "tensors": 0, "elements": 0, "bytes": 0})
        row["tensors"] += 1
        row["elements"] += spec.elements
        row["bytes"] += size_bytes
    return sorted(rows.values(), key=lambda row: -row["bytes"])


def _kind(spec: TensorSpec, dtype: str) -> str:
    if spec.name.rpartition(".")[2].removeprefix("weight_").removeprefix("input_") in _QUANTIZATION_PARTS:
        return "scales and shapes"
    if len(spec.shape) < 2:
        return "vectors"
    return "matrices" if dtype in FLOATS else "codes"
