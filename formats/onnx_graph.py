"""An ONNX graph, and beside it the tensors it refers to (``external data`` of onnx.proto3, IR version 11): written and read, without torch.

Layers that read the same input are one initializer, side by side along ``out``. What each of them is made of, and by which recipe,
stands in the graph's ``metadata_props`` under :data:`METADATA`; without it an initializer is a tensor. Layout and file names are those
that transformers.js 4 looks for: ``onnx/model_quantized.onnx`` and ``.onnx_data``, ``.onnx_data_1`` and so on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formats.dtypes import DTYPES
from formats.errors import FormatError
from formats.safetensors import Located, Shard, TensorSpec, is_plain_name

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

FOLDER = "onnx"
METADATA = "octavo"
#: The standard's operators are those of this version; it has Attention, RotaryEmbedding and RMSNormalization. IR 11 goes with it.
OPSET, IR_VERSION = 23, 11
#: What the names of an encoder-decoder's graphs begin with.
PAIR = ("encoder_model", "decoder_model_merged")
#: Domains that a graph here may use: the standard's, and ONNX Runtime's own where the recipe asks for it.
DOMAINS = ("", "com.microsoft")
#: Large tensors begin at a page, so that they can be mapped; small ones where a cache line does.
PAGE_BYTES, LINE_BYTES = 4096, 64

#: onnx.TensorProto.DataType -> our name.
_DTYPES = {
    1: "F32",
    2: "U8",
    3: "I8",
    4: "U16",
    5: "I16",
    6: "I32",
    7: "I64",
    9: "BOOL",
    10: "F16",
    11: "F64",
    12: "U32",
    13: "U64",
    16: "BF16",
    17: "F8_E4M3",
    19: "F8_E5M2",
}
DATA_TYPES = {name: number for number, name in _DTYPES.items()}


@dataclass(frozen=True)
class Initializer:
    """A tensor of the graph, in the data file ``file`` from ``start`` on. ``members``: the tensors it is made of along ``axis``, with their
    extents there; none where it is one tensor itself."""

    spec: TensorSpec
    file: str
    start: int
    axis: int = 0
    members: tuple[tuple[str, int], ...] = ()

    def tensors(self) -> Iterator[Located]:
        """Where each member lies; along the last axis of a matrix they take turns, row by row."""
        if not self.members:
            yield Located(self.spec, self.file, self.start, self.start + self.spec.size_bytes)
            return
        width = DTYPES[self.spec.dtype].bits // 8
        inner = width
        for extent in self.spec.shape[self.axis + 1 :]:
            inner *= extent
        outer = 1
        for extent in self.spec.shape[: self.axis]:
            outer *= extent
        position, pitch = self.start, inner * self.spec.shape[self.axis]
        for name, extent in self.members:
            shape = (*self.spec.shape[: self.axis], extent, *self.spec.shape[self.axis + 1 :])
            stop = position + (outer - 1) * pitch + inner * extent
            yield Located(TensorSpec(name, self.spec.dtype, shape), self.file, position, stop, pitch if outer > 1 else 0)
            position += inner * extent


@dataclass(frozen=True)
class Pack:
    """Tensors that become one initializer called ``name``, side by side along ``axis``."""

    name: str
    members: tuple[str, ...]
    axis: int


def graph_file(*, quantized: bool, dtype: str, stem: str = "model") -> str:
    """Where a graph lies, by the names that transformers.js gives to what it loads; ``dtype``: F32 or F16, of what is not quantized;
    ``stem``: what a graph of several is called."""
    return f"{FOLDER}/{stem}{'_quantized' if quantized else '_fp16' if dtype == 'F16' else ''}.onnx"


def lay_out(
    specs: Sequence[TensorSpec], packs: Sequence[Pack], graph: str, max_file_bytes: int
) -> tuple[tuple[Shard, ...], list[Initializer]]:
    """Decides data files and offsets before any byte exists. ``graph``: the file that refers to them.

    A file is closed before it would pass ``max_file_bytes``; a larger tensor gets a file of its own.
    """
    initializers: list[Initializer] = []
    chunk, end = 0, 0
    sizes: dict[str, int] = {}
    for spec, pack, members in _packed(specs, packs):
        start = -(-end // _alignment(spec)) * _alignment(spec)
        if end and start + spec.size_bytes > max_file_bytes:
            chunk, start = chunk + 1, 0
        file = f"{graph}_data{f'_{chunk}' if chunk else ''}"
        initializers.append(Initializer(spec, file, start, pack.axis if pack else 0, members))
        end = sizes[file] = start + spec.size_bytes
    by_file: dict[str, list[Located]] = {file: [] for file in sizes}
    for initializer in initializers:
        by_file[initializer.file] += initializer.tensors()
    return tuple(Shard(file, b"", tuple(by_file[file]), size) for file, size in sizes.items()), initializers


def _packed(specs: Sequence[TensorSpec], packs: Sequence[Pack]) -> Iterator[tuple[TensorSpec, Pack | None, tuple[tuple[str, int], ...]]]:
    """What becomes an initializer, in the order of the first tensor of each."""
    known = {spec.name: spec for spec in specs}
    of = {member: pack for pack in packs for member in pack.members}
    for spec in specs:
        pack = of.get(spec.name)
        if pack is None:
            yield spec, None, ()
        elif spec.name == pack.members[0]:
            members = tuple((name, known[name].shape[pack.axis]) for name in pack.members)
            shape = list(spec.shape)
            shape[pack.axis] = sum(extent for _, extent in members)
            yield TensorSpec(pack.name, spec.dtype, tuple(shape)), pack, members


def _alignment(spec: TensorSpec) -> int:
    return PAGE_BYTES if spec.size_bytes >= 16 * PAGE_BYTES else LINE_BYTES


def read_folder(folder: Path) -> dict[str, Located]:
    """The tensors that a folder's graphs refer to, apart from their own small constants; files are named from ``folder``.

    Raises :class:`FormatError` where :func:`read_graph` does, and where the metadata disagrees with the graph.
    """
    return join_graphs(folder, {graph: read_graph(folder / graph) for graph in find_graphs(folder)})


def join_graphs(folder: Path, graphs: Mapping[str, ModelProto]) -> dict[str, Located]:
    """The tensors that graphs of a folder refer to, ``graphs`` by their files. Raises :class:`FormatError` where two have one."""
    tensors: dict[str, Located] = {}
    for graph, model in graphs.items():
        prefix = graph.rpartition("/")[0]
        for name, item in tensors_of(model, folder / graph).items():
            if name in tensors:
                raise FormatError(f"{folder / graph}: {name} is in {tensors[name].file} too")
            tensors[name] = replace(item, file=f"{prefix}/{item.file}".lstrip("/"))
    return tensors


def tensors_of(model: ModelProto, path: Path) -> dict[str, Located]:
    """The tensors that a graph refers to, files named from the folder of ``path``, which is where it was read."""
    packs = {name: (int(pack["axis"]), tuple(pack["members"].items())) for name, pack in metadata_of(model).get("packs", {}).items()}
    found: dict[str, Located] = {}
    for tensor in model.graph.initializer:
        if tensor.data_location != tensor.EXTERNAL:
            continue
        spec = TensorSpec(tensor.name, _DTYPES[tensor.data_type], tuple(tensor.dims))
        where = _external(tensor)
        axis, members = packs.get(tensor.name, (0, ()))
        if members and (axis >= len(spec.shape) or sum(extent for _, extent in members) != spec.shape[axis]):
            raise FormatError(f"{path}: {tensor.name} is of shape {list(spec.shape)}, and its members {dict(members)} are not")
        for item in Initializer(spec, where["location"], int(where.get("offset", 0)), axis, members).tensors():
            if item.spec.name in found:
                raise FormatError(f"{path}: {item.spec.name} comes twice")
            found[item.spec.name] = item
    return found


def has_graph(folder: Path) -> bool:
    """Whether a folder is that of a graph and of no checkpoint."""
    return not any(folder.glob("*.safetensors*")) and any(any(where.glob("*.onnx")) for where in (folder, folder / FOLDER))


def find_graphs(folder: Path) -> tuple[str, ...]:
    """The graph of a folder, from there, or the two of an encoder-decoder, the encoder first. Raises :class:`FormatError` where there is
    none, or where there are others."""
    found = sorted(path.relative_to(folder).as_posix() for where in (folder, folder / FOLDER) for path in where.glob("*.onnx"))
    pair = sorted(found, reverse=True)
    if len(found) == 2 and all(name.rpartition("/")[2].startswith(stem) for name, stem in zip(pair, PAIR, strict=True)):
        return tuple(pair)
    if len(found) != 1:
        what = f"several graphs, {', '.join(found)}" if found else f"no .onnx file in it or in {FOLDER}/"
        raise FormatError(f"{folder}: {what}")
    return tuple(found)


def read_graph(path: Path, *, data: Mapping[str, int] | None = None) -> ModelProto:
    """A graph without its data. Raises :class:`FormatError` for what is no ONNX, for operators that no reader here knows, and for data that
    is not where the graph says it is: outside its folder, beyond the end of its file, of another size than its shape.

    ``data``: where the files beside it are not on this machine, the bytes of each.
    """
    import onnx

    try:
        model = onnx.load_model(path, load_external_data=False)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except Exception as error:  # noqa: BLE001  protobuf has a DecodeError for each of its implementations
        raise FormatError(f"{path}: no ONNX graph ({error})") from None
    opsets = {item.domain: item.version for item in model.opset_import}
    foreign = sorted(set(opsets) - set(DOMAINS))
    if foreign or not opsets.get(""):
        raise FormatError(f"{path}: operators of {', '.join(foreign) or 'no opset'}; known are the standard's and {DOMAINS[1]}")
    sizes = dict(data or {})
    for tensor in model.graph.initializer:
        if tensor.data_location == tensor.EXTERNAL:
            _check_external(path, tensor, opsets[""], sizes, here=data is None)
    return model


def _check_external(path: Path, tensor: TensorProto, opset: int, sizes: dict[str, int], *, here: bool) -> None:
    where = _external(tensor)
    location = where.get("location")
    if not is_plain_name(location):
        raise FormatError(f"{path}: {tensor.name} is said to lie in {location!r}, which is not a file of this folder")
    if tensor.data_type not in _DTYPES or any(extent < 0 for extent in tensor.dims):
        raise FormatError(f"{path}: {tensor.name} is of type {tensor.data_type} and shape {list(tensor.dims)}, which nothing here can hold")
    spec = TensorSpec(tensor.name, _DTYPES[tensor.data_type], tuple(tensor.dims))
    if spec.dtype.startswith("F8") and opset < 19:
        raise FormatError(f"{path}: {tensor.name} is {spec.dtype}, which opset {opset} does not have; 19 does")
    try:
        offset, length = int(where.get("offset", 0)), int(where.get("length", spec.size_bytes))
    except ValueError:
        offset = length = -1
    if offset < 0 or length != spec.size_bytes:
        needs = f"{spec.dtype} {list(spec.shape)} needs {spec.size_bytes:,}"
        raise FormatError(f"{path}: {tensor.name} has offset {offset} and {length:,} bytes; {needs}")
    file = path.parent / str(location)
    if location not in sizes:
        if not here or not file.is_file():
            raise FormatError(f"{path}: {tensor.name} should lie in {location}, which is not there; fetch it again")
        # Hub clients keep graph and data as links into one folder; a link that the graph is not part of leads elsewhere.
        if file.resolve().parent != path.resolve().parent:
            raise FormatError(f"{path}: {location} is a link that leads to {file.resolve()}, out of the graph's folder")
        sizes[str(location)] = file.stat().st_size
    if offset + length > sizes[str(location)]:
        has = f"{location}, which has {sizes[str(location)]:,} bytes"
        raise FormatError(f"{path}: {tensor.name} should end at {offset + length:,} of {has}; it is truncated, fetch it again")


def _external(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def metadata_of(model: ModelProto) -> dict[str, Any]:
    """What is said of the quantization under :data:`METADATA`; empty in a graph that was made elsewhere. Raises :class:`FormatError`."""
    text = next((item.value for item in model.metadata_props if item.key == METADATA), None)
    if text is None:
        return {}
    try:
        found = json.loads(text)
        for pack in found.get("packs", {}).values():
            if type(pack["axis"]) is not int or any(type(extent) is not int for extent in pack["members"].values()):
                raise TypeError("a pack has an axis and members with their extents")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"metadata_props[{METADATA!r}] is not what octavo writes ({error})") from None
    return dict(found)


def metadata_packs(initializers: Iterable[Initializer]) -> dict[str, Any]:
    """``packs`` of the metadata: of each initializer that is made of several tensors, which they are."""
    return {item.spec.name: {"axis": item.axis, "members": dict(item.members)} for item in initializers if item.members}
