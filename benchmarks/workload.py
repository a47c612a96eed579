"""What is converted, and the command that converts it: shared by the scripts that measure octavo."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from math import prod
from pathlib import Path

from measure import run_measured

from formats.safetensors import read_folder, read_header

RECIPES = {"int8": "recipes/llama-int8.yaml", "fp8": "recipes/llama-fp8.yaml"}
#: Those that calibrate, which :mod:`memory` measures too.
CALIBRATED = {"int8-gptq": "recipes/llama-int8-gptq.yaml"}
#: Those that write a graph, which it measures as well.
GRAPHS = {"onnx-int8": "recipes/llama-onnx-int8.yaml"}
EIGHT_BIT = ("I8", "F8_E4M3")
#: What the tools under test would otherwise try to reach, and wait for.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
SHAPE = ("hidden", "ffn", "heads", "kv_heads", "vocab")


@dataclass(frozen=True)
class Workload:
    """A random Llama on disk, as benchmarks/make_llama.py writes it."""

    model: Path
    layers: int

    @property
    def size_bytes(self) -> int:
        """All tensors."""
        return sum(item.spec.size_bytes for item in read_folder(self.model).values())

    @property
    def largest_tensor_bytes(self) -> int:
        return max(item.spec.size_bytes for item in read_folder(self.model).values())


def add_shape_options(parser: argparse.ArgumentParser, *, hidden: int, ffn: int, heads: int, kv_heads: int, vocab: int) -> None:
    """The dimensions of the random Llama, with these defaults."""
    for name, default in zip(SHAPE, (hidden, ffn, heads, kv_heads, vocab), strict=True):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)


def make_workload(workdir: Path, args: argparse.Namespace, layers: int) -> Workload:
    """A Llama of ``layers`` layers and the dimensions in ``args``, taken from ``workdir`` or written there by a process of its own."""
    extents = {name: str(getattr(args, name)) for name in SHAPE}
    model = workdir / f"llama-{layers}x{'-'.join(extents.values())}"
    if not model.exists():
        options = [text for name, extent in extents.items() for text in (f"--{name.replace('_', '-')}", extent)]
        program = Path(__file__).with_name("make_llama.py")
        run_measured([args.python, str(program), str(model), "--layers", str(layers), *options])
    return Workload(model, layers)


def octavo_command(python: str, scheme: str, model: Path, out: Path, device: str | None) -> list[str]:
    """The command line that is measured: the conversion alone, since no peer proves what it made."""
    command = [
        python,
        "-m",
        "convert",
        "convert",
        (RECIPES | CALIBRATED | GRAPHS)[scheme],
        "--model",
        str(model),
        "--out",
        str(out),
        "--no-check",
        "--quiet",
    ]
    return command + (["--device", device] if device else [])


def require_converted(workload: Workload, out: Path, tool: str) -> None:
    """Raises :class:`SystemExit` unless ``out`` holds the blocks' linears in 8 bit: what did less is not measured. Elements are counted,
    for a graph joins projections that share an input."""
    import onnx

    found = sum(
        item.spec.elements for path in out.rglob("*.safetensors") for item in read_header(path)[0].values() if item.spec.dtype in EIGHT_BIT
    )
    for path in out.rglob("*.onnx"):
        held = onnx.load(path, load_external_data=False).graph.initializer
        found += sum(prod(each.dims) for each in held if each.data_type == onnx.TensorProto.INT8 and each.name.startswith("model.layers."))
    source = read_folder(workload.model)
    expected = sum(item.spec.elements for name, item in source.items() if ".layers." in name and len(item.spec.shape) == 2)
    if found != expected:
        raise SystemExit(f"{tool} wrote {found:,} 8-bit numbers, expected {expected:,}: it did not do the work that is measured")
