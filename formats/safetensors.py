"""safetensors headers, strictly: reading those of files nobody vouches for, laying out those of files to be written.

Follows the format section of the safetensors README and ``safetensors/src/tensor.rs`` (0.8): eight bytes of header
length, little-endian; a JSON object of at most 100 MB; then the tensors, without holes and without overlaps. Only headers
are handled here; whoever wants bytes reads them at the offsets that these functions return.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from formats.dtypes import DTYPES
from formats.errors import FormatError

MAX_HEADER_BYTES = 100_000_000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor before its bytes exist: ``dtype`` is a safetensors name, ``shape`` in elements."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].bits // 8

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The tensor as rows of its last axis: a vector is a column, a scalar one element."""
        if len(self.shape) < 2:
            return math.prod(self.shape), 1
        return math.prod(self.shape[:-1]), self.shape[-1]


@dataclass(frozen=True)
class Located:
    """A tensor in a file: its bytes are ``[start, stop)`` from the beginning of ``file`` (header included).

    With ``pitch_bytes`` its rows begin so many bytes apart, and those of other tensors lie between them; safetensors has no such thing.
    """

    spec: TensorSpec
    file: str
    start: int
    stop: int
    pitch_bytes: int = 0


@dataclass(frozen=True)
class Shard:
    """One safetensors file: ``header`` is everything before the first tensor; ``size_bytes`` the whole file."""

    file: str
    header: bytes
    tensors: tuple[Located, ...]
    size_bytes: int


def parse_header(raw: bytes, file: str, size_bytes: int) -> tuple[dict[str, Located], dict[str, str]]:
    """The tensors and the ``__metadata__`` of a safetensors file.

    ``raw`` holds at least the whole header (its first eight bytes give the length), ``size_bytes`` is the size of the
    whole file. Raises :class:`FormatError` on anything the format forbids: a length that does not fit, JSON that is none,
    a name that comes twice, an unknown dtype, offsets that overlap, leave holes, or disagree with shape and dtype.
    """
    length = header_length(raw[:8], file, size_bytes)
    body = raw[8 : 8 + length]
    if len(body) < length:
        raise FormatError(f"{file}: the header should have {length:,} bytes, {len(body):,} are there; the file is truncated")
    try:
        # Of bytes, json.loads would guess an encoding; the format knows one, and no byte order mark.
        header = json.loads(body.decode(), object_pairs_hook=_no_duplicates, parse_int=_parse_int)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{file}: the header is not the JSON object it must be ({error})") from None
    if not isinstance(header, dict) or not body.startswith(b"{"):
        raise FormatError(f"{file}: the header is not the JSON object it must be")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) and _is_text(value) for value in metadata.values()):
        raise FormatError(f"{file}: __metadata__ must map strings to strings (half a surrogate pair is none)")
    data_start = 8 + length
    located = sorted(
        (_parse_tensor(name, entry, file, data_start) for name, entry in header.items()), key=lambda item: (item.start, item.stop)
    )
    position = data_start
    for item in located:
        if item.start != position:
            what = "overlaps the tensor before it" if item.start < position else "leaves a hole before it"
            raise FormatError(f"{file}: {item.spec.name} {what} (it starts at {item.start:,}, expected {position:,})")
        position = item.stop
    if position != size_bytes:
        what = "truncated" if position > size_bytes else "followed by bytes that belong to no tensor"
        raise FormatError(f"{file}: {what}: the header promises {position:,} bytes, the file has {size_bytes:,}; fetch it again")
    return {item.spec.name: item for item in located}, metadata


def header_length(first_eight: bytes, file: str, size_bytes: int) -> int:
    """The header's length in bytes, from the first eight of the file. Raises :class:`FormatError` when impossible."""
    if len(first_eight) < 8:
        raise FormatError(f"{file}: {size_bytes} bytes are too few for a safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", first_eight)
    if length > MAX_HEADER_BYTES:
        raise FormatError(f"{file}: a header of {length:,} bytes, at most {MAX_HEADER_BYTES:,} are allowed; this is no safetensors file")
    if 8 + length > size_bytes:
        raise FormatError(f"{file}: a header of {length:,} bytes in a file of {size_bytes:,}; the file is truncated, fetch it again")
    return int(length)


def read_header(path: Path, file: str | None = None) -> tuple[dict[str, Located], dict[str, str]]:
    """:func:`parse_header` of a file on disk; ``file`` is the name to report and to keep (default: the last component)."""
    name = file or path.name
    try:
        with path.open("rb") as stream:
            size_bytes = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            return parse_header(first + stream.read(header_length(first, name, size_bytes)), name, size_bytes)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None


def shard_files(index: Mapping[str, Any], origin: str) -> dict[str, str]:
    """``weight_map`` of an index: tensor name -> file name, every file name plain.

    Raises :class:`FormatError` when the index is malformed or a file name leads outside its folder.
    """
    weight_map = index.get("weight_map") if isinstance(index, Mapping) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{origin}: no weight_map of tensors to files")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise FormatError(f"{origin}: {name} is said to lie in {file!r}, which is not a file of this folder")
    return weight_map


def is_plain_name(file: object) -> bool:
    """Whether ``file`` names a file of the folder it is looked up in, wherever that folder lies: no path, nothing special."""
    if not isinstance(file, str) or file in ("", ".", "..") or file != PurePosixPath(file).name:
        return False
    return not any(sign in file for sign in "\\\0") and _is_text(file)


def is_inner_path(file: object) -> bool:
    """Whether ``file`` names a file of the folder it is looked up in, or of a folder there."""
    return isinstance(file, str) and all(is_plain_name(part) for part in file.split("/"))


def read_folder(folder: Path) -> dict[str, Located]:
    """The tensors of a folder, from its index or its single file, in the order of files and offsets.

    Raises :class:`FormatError` when there is neither, a shard is missing, or index and shards disagree.
    """
    index_path = folder / INDEX_FILE
    if not index_path.exists():
        if not (folder / SINGLE_FILE).exists():
            raise FormatError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")
        return read_header(folder / SINGLE_FILE)[0]
    weight_map = shard_files(read_json(index_path), str(index_path))
    missing = sorted(file for file in set(weight_map.values()) if not os.path.exists(folder / file))
    if missing:
        raise FormatError(f"{folder}: {len(missing)} shard(s) named by the index are missing: {', '.join(missing[:3])}; fetch them again")
    headers = {file: read_header(folder / file)[0] for file in sorted(set(weight_map.values()))}
    return join_shards(weight_map, headers, str(index_path))


def join_shards(weight_map: Mapping[str, str], headers: Mapping[str, Mapping[str, Located]], origin: str) -> dict[str, Located]:
    """One map of tensors out of an index and its shards' headers. Raises :class:`FormatError` where they disagree."""
    tensors: dict[str, Located] = {}
    for file in sorted(headers):
        for name, located in headers[file].items():
            if name in tensors:
                raise FormatError(f"{origin}: {name} lies in {tensors[name].file} and in {file}")
            if weight_map.get(name) != file:
                raise FormatError(f"{origin}: {name} lies in {file}, the index says {weight_map.get(name, 'nothing')}")
            tensors[name] = located
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise FormatError(f"{origin}: {absent[0]} (and {len(absent) - 1} more) should lie in {weight_map[absent[0]]} and does not")
    return tensors


def lay_out(specs: Sequence[TensorSpec], metadata: Mapping[str, str], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Decides files, headers and offsets of ``specs``, in their order, before any byte exists. ``metadata``: that of every file.

    A file is closed before it would pass ``max_shard_bytes`` of tensors (a larger tensor gets a file of its own). Within a file
    tensors keep their order as long as their sizes are multiples of eight, so that every offset is aligned to its dtype
    and a writer that works in order writes in order; the few others go last, widest dtype first, as the safetensors
    library orders all of them.
    """
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.size_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.size_bytes
    count = len(groups)
    return tuple(
        _lay_out_file(SINGLE_FILE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors", group, metadata)
        for i, group in enumerate(groups, start=1)
    )


def index_json(shards: Sequence[Shard]) -> bytes | None:
    """The text of ``model.safetensors.index.json``, or None for a single file."""
    if len(shards) == 1:
        return None
    total = sum(item.spec.size_bytes for shard in shards for item in shard.tensors)
    weight_map = {item.spec.name: shard.file for shard in shards for item in shard.tensors}
    return json_bytes({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def json_bytes(value: object) -> bytes:
    """JSON as every file here is written: indented, as UTF-8, with a newline at the end."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """The JSON of a small file. Raises :class:`FormatError` naming the file."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        value = json.loads(text)
        if "\\ud" in text.lower():
            json_bytes(value)  # half a surrogate pair, which could not be written or hashed again
        return value
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from None


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key!r} comes twice")
        if not _is_text(key):
            raise ValueError(f"{key!r} has half a surrogate pair, which UTF-8 cannot hold")
        found[key] = value
    return found


def _parse_int(digits: str) -> int:
    if digits == "-0":
        raise ValueError("-0 is no natural number")  # but Python's int makes one of it
    return int(digits)


def _is_text(value: str) -> bool:
    """JSON can spell half a surrogate pair and Python reads it, but no file, terminal or other reader can have it."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_tensor(name: str, entry: Any, file: str, data_start: int) -> Located:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FormatError(f"{file}: {name} must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise FormatError(f"{file}: {name} is of dtype {reprlib.repr(dtype)}; known are {', '.join(DTYPES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        found = f"shape {reprlib.repr(shape)} and offsets {reprlib.repr(offsets)}"
        raise FormatError(f"{file}: {name} has {found}; both must be natural numbers, offsets in order")
    elements = 1
    for extent in shape:
        # Stops here, not at the end: the product of a million large extents takes hours and is no number anybody can print.
        elements *= extent
        if elements * DTYPES[dtype].bits >= 2**63:
            raise FormatError(f"{file}: {name} has shape {reprlib.repr(shape)}: more elements than any file can hold")
    spec = TensorSpec(name, dtype, tuple(shape))
    if offsets[1] - offsets[0] != spec.size_bytes:
        count = offsets[1] - offsets[0]
        raise FormatError(f"{file}: {name} has {count:,} bytes; {dtype} of shape {reprlib.repr(shape)} needs {spec.size_bytes:,}")
    return Located(spec, file, data_start + offsets[0], data_start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _lay_out_file(file: str, specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> Shard:
    aligned = [spec for spec in specs if spec.size_bytes % 8 == 0]
    rest = sorted((spec for spec in specs if spec.size_bytes % 8), key=lambda spec: -DTYPES[spec.dtype].bits)
    position = 0
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    ranges = []
    for spec in aligned + rest:
        entries[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, position + spec.size_bytes]}
        ranges.append((spec, position))
        position += spec.size_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    located = tuple(Located(spec, file, len(header) + start, len(header) + start + spec.size_bytes) for spec, start in ranges)
    return Shard(file, header, located, len(header) + position)
