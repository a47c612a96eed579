"""The tensors of an artifact, whatever its format keeps them in."""

from __future__ import annotations

from pathlib import Path

from formats import onnx_graph, safetensors
from formats.safetensors import Located

#: The formats whose folder has a graph; all others are checkpoints in safetensors.
GRAPHS = ("onnx", "onnx-matmulnbits")


def read_tensors(folder: Path, form: str) -> dict[str, Located]:
    """The tensors of a folder, files named from there. Raises :class:`~formats.errors.FormatError` when it is not whole."""
    return onnx_graph.read_folder(folder) if form in GRAPHS else safetensors.read_folder(folder)
