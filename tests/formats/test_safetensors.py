"""safetensors headers: what the safetensors library says of the same bytes, and every way in which a header can lie."""

from __future__ import annotations

import itertools
import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.utils.hub import get_checkpoint_shard_files

from formats.dtypes import DTYPES
from formats.errors import FormatError
from formats.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    Located,
    Shard,
    TensorSpec,
    index_json,
    lay_out,
    parse_header,
    read_folder,
    read_header,
    read_json,
    shard_files,
)

METADATA = {"format": "pt", "what": 'línea\n"two"'}

#: Scalars, nothing at all, primes, and whatever lies between.
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 8, 13, 16]), max_size=4).map(tuple).filter(lambda shape: np.prod(shape) <= 4_000)
#: JSON escapes, quotes and characters outside the Basic Multilingual Plane are all legal in a name.
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
specs = st.lists(st.builds(TensorSpec, names, st.sampled_from(sorted(DTYPES)), shapes), max_size=8, unique_by=lambda spec: spec.name)
limits = st.integers(1, 3_000)


def content(spec: TensorSpec) -> bytes:
    """Bytes that differ from tensor to tensor; zeros and ones only for bool, of which the library checks the values."""
    rng = np.random.default_rng(spec.size_bytes + sum(map(ord, spec.name)))
    return rng.integers(0, 2 if spec.dtype == "BOOL" else 256, spec.size_bytes, np.uint8).tobytes()


def assemble(shard: Shard) -> bytes:
    """The file of a shard, each tensor's bytes put where the shard says they go."""
    file = bytearray(b"\xee" * shard.size_bytes)
    file[: len(shard.header)] = shard.header
    for item in shard.tensors:
        file[item.start : item.stop] = content(item.spec)
    return bytes(file)


def file_of(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header: bytes as they are, anything else as JSON."""
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(body)) + body + data


def entry(dtype: object, shape: object, start: object, stop: object) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def as_the_library_reads(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {name: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in safetensors.deserialize(file)}


def as_read_here(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    located, _ = parse_header(file, "x.safetensors", len(file))
    return {name: (item.spec.dtype, item.spec.shape, file[item.start : item.stop]) for name, item in located.items()}


# lay_out


@settings(deadline=None, max_examples=150)
@given(specs, limits)
def test_the_library_finds_every_tensor_at_the_offsets_that_lay_out_promised(specs: list[TensorSpec], limit: int) -> None:
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for shard in lay_out(specs, METADATA, limit):
        tensors = as_the_library_reads(assemble(shard))
        assert not tensors.keys() & found.keys()
        found |= tensors
    assert found == {spec.name: (spec.dtype, spec.shape, content(spec)) for spec in specs}


@settings(deadline=None, max_examples=100)
@given(specs, limits)
def test_what_is_laid_out_is_what_is_read_back_here(specs: list[TensorSpec], limit: int) -> None:
    for shard in lay_out(specs, METADATA, limit):
        located, metadata = parse_header(assemble(shard), shard.file, shard.size_bytes)
        assert list(located.values()) == sorted(shard.tensors, key=lambda item: (item.start, item.stop))
        assert metadata == METADATA


@settings(deadline=None, max_examples=100)
@given(specs, limits)
def test_every_tensor_begins_at_a_multiple_of_its_element_size(specs: list[TensorSpec], limit: int) -> None:
    for shard in lay_out(specs, METADATA, limit):
        assert [item for item in shard.tensors if item.start * 8 % DTYPES[item.spec.dtype].bits] == []


@settings(deadline=None, max_examples=100)
@given(specs, limits)
@example([TensorSpec("a", "U8", (3,)), TensorSpec("b", "U8", (4,)), TensorSpec("c", "U8", (3,))], 7)
def test_a_shard_is_filled_to_the_maximum_and_passes_it_only_with_a_single_tensor(specs: list[TensorSpec], limit: int) -> None:
    shards = lay_out(specs, METADATA, limit)
    sizes = [[item.spec.size_bytes for item in shard.tensors] for shard in shards]
    assert all(sum(inside) <= limit or sum(size > 0 for size in inside) == 1 for inside in sizes)
    order = {spec.name: position for position, spec in enumerate(specs)}
    for full, following in itertools.pairwise(shards):
        next_spec = min((item.spec for item in following.tensors), key=lambda spec: order[spec.name])
        assert sum(item.spec.size_bytes for item in full.tensors) + next_spec.size_bytes > limit, "closed before it was full"


@settings(deadline=None, max_examples=100)
@given(specs, limits)
def test_tensors_keep_their_order_across_shards_and_within_one_when_they_are_multiples_of_eight(
    specs: list[TensorSpec], limit: int
) -> None:
    shards = lay_out(specs, METADATA, limit)
    order = {spec.name: position for position, spec in enumerate(specs)}
    per_shard = [sorted(order[item.spec.name] for item in shard.tensors) for shard in shards]
    assert [position for positions in per_shard for position in positions] == list(range(len(specs)))
    for shard in shards:
        regular = [order[item.spec.name] for item in shard.tensors if item.spec.size_bytes % 8 == 0]
        assert regular == sorted(regular)
        assert [item.start for item in shard.tensors] == sorted(item.start for item in shard.tensors)


def test_torch_loads_what_was_written_at_the_promised_offsets(tmp_path: Path) -> None:
    specs = [
        TensorSpec(f"t{i}", dtype, shape) for i, (dtype, shape) in enumerate((d, s) for d in DTYPES for s in ((), (0, 3), (1, 1), (7, 13)))
    ]
    (shard,) = lay_out(specs, METADATA, 1 << 30)
    path = tmp_path / shard.file
    path.write_bytes(assemble(shard))
    tensors = safetensors.torch.load_file(path)
    for spec in specs:
        tensor = tensors[spec.name]
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, getattr(torch, DTYPES[spec.dtype].torch_name))
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == content(spec)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == METADATA


def test_one_file_has_no_index_and_is_called_what_everybody_calls_it() -> None:
    shards = lay_out([TensorSpec("a", "F32", (3,))], METADATA, 1 << 20)
    assert [shard.file for shard in shards] == [SINGLE_FILE] == ["model.safetensors"]
    assert index_json(shards) is None


def test_nothing_to_write_is_an_empty_file_that_the_library_reads() -> None:
    (shard,) = lay_out([], METADATA, 1)
    assert safetensors.deserialize(assemble(shard)) == []


STATE = {
    f"layer.{i}.{part}": torch.full(shape, i, dtype=torch.float32) for i in range(5) for part, shape in (("weight", (7, 5)), ("bias", (7,)))
}


def written_in_shards(folder: Path, limit: int) -> tuple[Shard, ...]:
    shards = lay_out([TensorSpec(name, "F32", tuple(tensor.shape)) for name, tensor in STATE.items()], {"format": "pt"}, limit)
    for shard in shards:
        file = bytearray(shard.header.ljust(shard.size_bytes, b"\xee"))
        for item in shard.tensors:
            file[item.start : item.stop] = STATE[item.spec.name].numpy().tobytes()
        (folder / shard.file).write_bytes(file)
    (folder / INDEX_FILE).write_bytes(index_json(shards) or b"")
    return shards


@pytest.mark.parametrize("limit", [168, 200, 336, 500])
def test_the_index_is_the_one_huggingface_hub_would_have_written(tmp_path: Path, limit: int) -> None:
    written_in_shards(tmp_path, limit)
    theirs = huggingface_hub.split_torch_state_dict_into_shards(STATE, filename_pattern="model{suffix}.safetensors", max_shard_size=limit)
    index = json.loads((tmp_path / INDEX_FILE).read_bytes())
    assert theirs.is_sharded
    assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}


def test_huggingface_hub_loads_the_shards_by_their_index(tmp_path: Path) -> None:
    written_in_shards(tmp_path, 300)
    model = torch.nn.Module()
    model.layer = torch.nn.ModuleList(torch.nn.Linear(5, 7) for _ in range(5))
    huggingface_hub.load_torch_model(model, tmp_path, strict=True)
    assert {name: tensor.tolist() for name, tensor in model.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in STATE.items()
    }


def test_transformers_finds_the_shards_by_their_index(tmp_path: Path) -> None:
    shards = written_in_shards(tmp_path, 300)
    files, metadata = get_checkpoint_shard_files(str(tmp_path), str(tmp_path / INDEX_FILE))
    assert [Path(file).name for file in files] == [shard.file for shard in shards]
    assert sorted(metadata["all_checkpoint_keys"]) == sorted(STATE)


def test_a_folder_of_shards_is_read_in_the_order_of_files_and_offsets(tmp_path: Path) -> None:
    shards = written_in_shards(tmp_path, 300)
    assert list(read_folder(tmp_path).values()) == [item for shard in shards for item in shard.tensors]


# Headers of other writers


@settings(deadline=None, max_examples=60)
@given(specs)
def test_a_file_that_the_library_wrote_is_read_as_the_library_reads_it(specs: list[TensorSpec]) -> None:
    tensors = {
        spec.name: torch.frombuffer(bytearray(content(spec)), dtype=getattr(torch, DTYPES[spec.dtype].torch_name)).reshape(spec.shape)
        if spec.size_bytes
        else torch.empty(spec.shape, dtype=getattr(torch, DTYPES[spec.dtype].torch_name))
        for spec in specs
    }
    file = safetensors.torch.save(tensors, METADATA)
    assert as_read_here(file) == as_the_library_reads(file) == {spec.name: (spec.dtype, spec.shape, content(spec)) for spec in specs}
    assert parse_header(file, "x", len(file))[1] == METADATA


def test_read_header_keeps_the_name_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"t": np.zeros((2, 3), np.float32)}, path)
    assert [item.file for item in read_header(path)[0].values()] == ["a.safetensors"]
    assert [item.file for item in read_header(path, "sub/b.safetensors")[0].values()] == ["sub/b.safetensors"]
    assert read_header(path)[1] == {}


# What the format forbids

GOOD = entry("U8", [2], 0, 2)
DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
MALFORMED: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "too few"),
    "seven bytes": (b"\x02\0\0\0\0\0\0", "too few"),
    "a header of ten gigabytes": (struct.pack("<Q", 10_000_000_000) + b"{}", "10,000,000,000"),
    "a header one byte above the limit": (struct.pack("<Q", 100_000_001) + b"{}", "at most 100,000,000"),
    "a header of 2**64-1 bytes": (b"\xff" * 8 + b"{}", "at most"),
    "a header longer than the file": (struct.pack("<Q", 3) + b"{}", "truncated"),
    "no JSON": (file_of(b"{nope}"), "not the JSON object"),
    "an empty header": (file_of(b""), "not the JSON object"),
    "bytes that are no UTF-8": (file_of(b'{"\xff":1}'), "not the JSON object"),
    "UTF-16": (file_of(json.dumps({"a": GOOD}).encode("utf-16"), b"ab"), "not the JSON object"),
    "a byte order mark": (file_of(b"\xef\xbb\xbf" + json.dumps({"a": GOOD}).encode(), b"ab"), "not the JSON object"),
    "a space before the brace": (file_of(b" " + json.dumps({"a": GOOD}).encode(), b"ab"), "not the JSON object"),
    "a name that is half a surrogate pair": (file_of(rb'{"\ud800":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab"), "surrogate"),
    "metadata that is half a surrogate pair": (file_of(rb'{"__metadata__":{"a":"\udc00"}}'), "surrogate"),
    "a list": (file_of([]), "not the JSON object"),
    "a number": (file_of(1), "not the JSON object"),
    "deeply nested JSON": (file_of(DEEP), "not the JSON object"),
    "an integer of five thousand digits": (file_of(b'{"a":' + b"9" * 5_000 + b"}"), "not the JSON object"),
    "a name that comes twice": (file_of(b'{"a":%b,"a":%b}' % (json.dumps(GOOD).encode(), json.dumps(GOOD).encode()), b"ab"), "comes twice"),
    "metadata that comes twice": (file_of(b'{"__metadata__":{},"__metadata__":{}}'), "comes twice"),
    "a dtype that comes twice": (file_of(b'{"a":{"dtype":"I8","dtype":"U8","shape":[2],"data_offsets":[0,2]}}', b"ab"), "comes twice"),
    "metadata that is a number": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata that is a list": (file_of({"__metadata__": ["a"]}), "__metadata__"),
    "an entry that is a list": (file_of({"a": ["U8", [2], [0, 2]]}, b"ab"), "a must have"),
    "no shape": (file_of({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b"ab"), "a must have"),
    "one key too many": (file_of({"a": {**GOOD, "device": "cpu"}}, b"ab"), "a must have"),
    "an unknown dtype": (file_of({"a": entry("F4", [4], 0, 2)}, b"ab"), "'F4'"),
    "a dtype that is a list": (file_of({"a": entry(["U8"], [2], 0, 2)}, b"ab"), "dtype"),
    "a dtype that is an object": (file_of({"a": entry({"U8": 1}, [2], 0, 2)}, b"ab"), "dtype"),
    "a dtype that is null": (file_of({"a": entry(None, [2], 0, 2)}, b"ab"), "dtype"),
    "a negative shape": (file_of({"a": entry("U8", [-2], 0, 2)}, b"ab"), "natural numbers"),
    "two negative extents that multiply to the right size": (file_of({"a": entry("U8", [-1, -2], 0, 2)}, b"ab"), "natural numbers"),
    "minus zero in the shape": (file_of(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "natural number"),
    "a float in the shape": (file_of({"a": entry("U8", [2.0], 0, 2)}, b"ab"), "natural numbers"),
    "NaN in the shape": (file_of(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,2]}}', b"ab"), "natural numbers"),
    "true in the shape": (file_of({"a": entry("U8", [2, True], 0, 2)}, b"ab"), "natural numbers"),
    "a shape that is a number": (file_of({"a": entry("U8", 2, 0, 2)}, b"ab"), "natural numbers"),
    "a shape of 2**63": (file_of({"a": entry("U8", [2**63], 0, 2)}, b"ab"), "natural numbers"),
    "a shape whose product is 2**64 + 2": (file_of({"a": entry("U8", [2, 2**63 - 1, 2], 0, 2)}, b"ab"), "elements"),
    "an overflow behind a zero": (file_of({"a": entry("U8", [2**62, 2**62, 0], 0, 0)}), "elements"),
    "a shape of ten thousand digits": (file_of({"a": entry("U8", [2**62] * 600, 0, 2)}, b"ab"), "elements"),
    "a shape of a million extents": (file_of({"a": entry("U8", [2**62] * 1_000_000, 0, 2)}, b"ab"), "elements"),
    "too few bytes for the shape": (file_of({"a": entry("F32", [2], 0, 4)}, b"abcd"), "needs 8"),
    "too many bytes for the shape": (file_of({"a": entry("U8", [], 0, 2)}, b"ab"), "needs 1"),
    "offsets in the wrong order": (file_of({"a": entry("U8", [2], 2, 0)}, b"ab"), "in order"),
    "negative offsets": (file_of({"a": entry("U8", [2], -2, 0)}, b"ab"), "natural numbers"),
    "three offsets": (file_of({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1, 2]}}, b"ab"), "natural numbers"),
    "offsets of 2**63": (file_of({"a": entry("U8", [0], 2**63, 2**63)}), "natural numbers"),
    "two tensors over the same bytes": (file_of({"a": GOOD, "b": GOOD}, b"ab"), "b overlaps"),
    "tensors that overlap in part": (file_of({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"abc"), "b overlaps"),
    "a tensor within another": (file_of({"a": entry("U8", [4], 0, 4), "b": entry("U8", [1], 1, 2)}, b"abcd"), "b overlaps"),
    "a hole between tensors": (file_of({"a": entry("U8", [2], 0, 2), "b": entry("U8", [1], 3, 4)}, b"abcd"), "hole"),
    "a hole before the first tensor": (file_of({"a": entry("U8", [1], 1, 2)}, b"ab"), "hole"),
    "an empty tensor within another": (file_of({"a": entry("U8", [4], 0, 4), "b": entry("U8", [0], 2, 2)}, b"abcd"), "overlaps"),
    "data that ends early": (file_of({"a": GOOD}, b"a"), "truncated"),
    "bytes after the last tensor": (file_of({"a": GOOD}, b"abc"), "belong to no tensor"),
    "bytes and no tensor": (file_of({}, b"a"), "belong to no tensor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_under_its_name_and_for_its_own_reason(case: str, tmp_path: Path) -> None:
    file, reason = MALFORMED[case]
    path = tmp_path / "model-00003-of-00007.safetensors"
    path.write_bytes(file)
    began = time.monotonic()
    with pytest.raises(FormatError) as raised:
        read_header(path)
    assert "model-00003-of-00007.safetensors" in str(raised.value)
    assert reason in str(raised.value)
    assert len(str(raised.value)) < 1_000
    assert time.monotonic() - began < 5


def test_the_good_file_that_the_malformed_ones_were_made_of_is_read() -> None:
    assert as_read_here(file_of({"a": GOOD}, b"ab")) == {"a": ("U8", (2,), b"ab")}


def test_a_header_cut_off_anywhere_is_refused() -> None:
    file = file_of({"__metadata__": {"k": "v"}, "a": GOOD, "b": entry("I64", [1], 2, 10)}, bytes(10))
    for length in range(len(file)):
        with pytest.raises(FormatError):
            parse_header(file[:length], "x", length)


def test_a_header_of_which_only_a_part_was_fetched_is_refused() -> None:
    file = file_of({"a": GOOD}, b"ab")
    with pytest.raises(FormatError, match="truncated"):
        parse_header(file[:20], "x", len(file))


@pytest.mark.parametrize("make", [lambda _: None, Path.mkdir], ids=["missing", "a folder"])
def test_what_cannot_be_opened_is_a_format_error(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "gone.safetensors"
    make(path)
    with pytest.raises(FormatError, match=r"gone\.safetensors: cannot be read"):
        read_header(path)


FUZZED = {
    "__metadata__": {"format": "pt"},
    "a": entry("F32", [2, 3], 0, 24),
    "é": entry("BF16", [], 24, 26),
    "z": entry("I8", [0, 2], 26, 26),
}
FUZZED_DATA = bytes(range(26))

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([0, 2**31, 2**62, 2**63, 2**64]) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def paths_within(value: object, prefix: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    children: Sequence[tuple[str | int, object]] = ()
    if isinstance(value, dict):
        children = list(value.items())
    elif isinstance(value, list):
        children = list(enumerate(value))
    return [prefix, *(path for key, child in children for path in paths_within(child, (*prefix, key)))]


def replaced(value: Any, path: tuple[str | int, ...], new: object) -> Any:
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


def check_against_the_library(file: bytes) -> None:
    """Refused with a FormatError, or read as the library reads it: stricter than the library, never laxer, never a crash."""
    try:
        found = as_read_here(file)
    except FormatError as error:
        assert "x.safetensors" in str(error)  # noqa: PT017  the other outcome is right as well
    else:
        assert found == as_the_library_reads(file)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(paths_within(FUZZED)), anything)
def test_any_value_in_any_place_of_a_header_is_refused_or_read_as_the_library_reads_it(path: tuple[str | int, ...], new: object) -> None:
    check_against_the_library(file_of(replaced(FUZZED, path, new), FUZZED_DATA))


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_bytes_changed_at_random_are_refused_or_read_as_the_library_reads_them(data: st.DataObject) -> None:
    file = bytearray(file_of(FUZZED, FUZZED_DATA))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(file)))
        length = data.draw(st.integers(0, 3))
        new = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"{", b"}", b"[", b",", b"-", b"0", b"9" * 30, b"\\", b"\\ud800", b" "])
        )
        file[start : start + length] = new
    if data.draw(st.booleans()):
        file[:8] = struct.pack("<Q", max(0, len(file) - 8 - len(FUZZED_DATA)))
    check_against_the_library(bytes(file))


# The index


def folder_of(folder: Path, shards: Mapping[str, Sequence[str]], weight_map: object = None) -> Path:
    """Shards that hold a small tensor of every name, and an index over them."""
    for file, held in shards.items():
        safetensors.numpy.save_file({name: np.zeros(2, np.float32) for name in held}, folder / file)
    mapped = {name: file for file, held in shards.items() for name in held} if weight_map is None else weight_map
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": mapped}))
    return folder


TWO = {"1.safetensors": ["a", "b"], "2.safetensors": ["c"]}


def test_the_good_folder_that_the_others_were_made_of_is_read(tmp_path: Path) -> None:
    assert {name: item.file for name, item in read_folder(folder_of(tmp_path, TWO)).items()} == {
        "a": "1.safetensors",
        "b": "1.safetensors",
        "c": "2.safetensors",
    }


@pytest.mark.parametrize(
    "file",
    [
        "../1.safetensors",
        "sub/1.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "./1.safetensors",
        "1.safetensors/",
        "..\\1.safetensors",
        "C:\\1.safetensors",
        "1\0.safetensors",
        None,
        3,
        ["1.safetensors"],
    ],
)
def test_a_shard_that_is_no_plain_file_name_is_refused(tmp_path: Path, file: object) -> None:
    folder_of(tmp_path, TWO, {"a": "1.safetensors", "b": file})
    with pytest.raises(FormatError, match="not a file of this folder") as raised:
        read_folder(tmp_path)
    assert INDEX_FILE in str(raised.value)
    assert "b is said" in str(raised.value)
    str(raised.value).encode()


INDEX_LIES: dict[str, tuple[Mapping[str, Sequence[str]], object, str]] = {
    "a shard that is missing": ({"1.safetensors": ["a"]}, {"a": "1.safetensors", "b": "2.safetensors"}, "2.safetensors"),
    "a shard whose name no file system takes": ({"1.safetensors": ["a"]}, {"a": "1.safetensors", "b": "n" * 300}, "missing"),
    "a tensor in two shards": (
        {"1.safetensors": ["a", "b"], "2.safetensors": ["b"]},
        {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"},
        "b lies in 1.safetensors and in 2.safetensors",
    ),
    "a tensor in the index that no shard has": (
        TWO,
        {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors", "d": "2.safetensors"},
        "d (and 0 more) should lie",
    ),
    "a tensor in a shard that the index lacks": (
        TWO,
        {"a": "1.safetensors", "c": "2.safetensors"},
        "b lies in 1.safetensors, the index says nothing",
    ),
    "a tensor in another shard than the index says": (
        TWO,
        {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"},
        "b lies in 1.safetensors, the index says 2.safetensors",
    ),
    "an empty weight_map": (TWO, {}, "weight_map"),
    "a weight_map that is a list": (TWO, ["a"], "weight_map"),
}


@pytest.mark.parametrize("case", INDEX_LIES)
def test_an_index_that_lies_is_refused(case: str, tmp_path: Path) -> None:
    shards, weight_map, reason = INDEX_LIES[case]
    folder_of(tmp_path, shards, weight_map)
    with pytest.raises(FormatError) as raised:
        read_folder(tmp_path)
    assert reason in str(raised.value)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[1]", b"\xff", b'{"weight_map": 1}', b"{}", b"[" * 100_000, rb'{"weight_map": {"a": "\ud800"}}'],
    ids=lambda text: text[:30],
)
def test_an_index_that_is_no_index_is_refused(tmp_path: Path, text: bytes) -> None:
    folder_of(tmp_path, TWO)
    (tmp_path / INDEX_FILE).write_bytes(text)
    with pytest.raises(FormatError, match=INDEX_FILE) as raised:
        read_folder(tmp_path)
    str(raised.value).encode()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=f"neither {SINGLE_FILE} nor {INDEX_FILE}"):
        read_folder(tmp_path)


def test_an_index_goes_before_a_single_file(tmp_path: Path) -> None:
    """As in transformers 5 and huggingface_hub; a stale ``model.safetensors`` beside shards is a common leftover of a repack."""
    folder_of(tmp_path, TWO)
    safetensors.numpy.save_file({"stale": np.zeros(1, np.float32)}, tmp_path / SINGLE_FILE)
    assert sorted(read_folder(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize("index", [None, [], {"weight_map": None}, "weight_map"])
def test_shard_files_refuses_what_is_no_index(index: Any) -> None:
    with pytest.raises(FormatError, match="there: no weight_map"):
        shard_files(index, "there")


def test_read_json_takes_a_byte_order_mark_and_whole_surrogate_pairs(tmp_path: Path) -> None:
    """Editors leave the one, JSON writers that keep to ASCII the other."""
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + rb'{"a": "\ud83d\ude00", "b": "\\ud800"}')
    assert read_json(tmp_path / "config.json") == {"a": "\N{GRINNING FACE}", "b": "\\ud800"}


def test_read_json_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"config\.json: cannot be read"):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("{'a': 1}")
    with pytest.raises(FormatError, match=r"config\.json: not valid JSON"):
        read_json(tmp_path / "config.json")


def test_a_located_tensor_is_counted_from_the_beginning_of_the_file() -> None:
    file = file_of({"a": GOOD}, b"ab")
    (item,) = parse_header(file, "x", len(file))[0].values()
    assert item == Located(TensorSpec("a", "U8", (2,)), "x", len(file) - 2, len(file))
