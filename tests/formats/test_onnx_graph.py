"""Graphs and their data: layout before bytes, strict reading, and ONNX's own reader as the oracle of both."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from formats.dtypes import numpy_dtype
from formats.errors import FormatError
from formats.inspect import inspect
from formats.onnx_graph import (
    DATA_TYPES,
    LINE_BYTES,
    METADATA,
    Initializer,
    Pack,
    find_graphs,
    lay_out,
    metadata_packs,
    read_folder,
    read_graph,
)
from formats.safetensors import TensorSpec
from formats.verify import verify


def write_graph(path: Path, initializers: Sequence[Initializer], *, opset: int = 23, domain: str = "", packs: bool = True) -> None:
    """A graph that does nothing but refer to its tensors."""
    tensors = []
    for item in initializers:
        found = TensorProto(name=item.spec.name, data_type=DATA_TYPES[item.spec.dtype], dims=item.spec.shape)
        found.data_location = TensorProto.EXTERNAL
        for key, value in (("location", Path(item.file).name), ("offset", item.start), ("length", item.spec.size_bytes)):
            found.external_data.add(key=key, value=str(value))
        tensors.append(found)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [out], tensors)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    if packs:
        model.metadata_props.add(key=METADATA, value=json.dumps({"packs": metadata_packs(initializers)}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


def write_data(folder: Path, specs: Sequence[TensorSpec], packs: Sequence[Pack], limit: int) -> dict[str, np.ndarray]:
    """Data files as the exporter would fill them, each tensor row by row, and the tensors."""
    shards, initializers = lay_out(specs, packs, "onnx/model.onnx", limit)
    write_graph(folder / "onnx/model.onnx", initializers)
    random = np.random.default_rng(0)
    values = {spec.name: random.integers(-100, 100, spec.shape).astype(numpy_dtype(spec.dtype)) for spec in specs}
    for shard in shards:
        data = bytearray(shard.size_bytes)
        for item in shard.tensors:
            rows = values[item.spec.name].reshape(item.spec.matrix_shape)
            for i, row in enumerate(rows):
                start = item.start + i * (item.pitch_bytes or row.nbytes)
                assert start + row.nbytes <= item.stop
                assert not any(data[start : start + row.nbytes])
                data[start : start + row.nbytes] = row.tobytes()
        (folder / shard.file).write_bytes(data)
    return values


SPECS = st.lists(
    st.tuples(
        st.sampled_from(["I8", "F32", "F16"]), st.lists(st.integers(1, 9), max_size=2).map(tuple), st.integers(1, 3), st.integers(0, 1)
    ),
    min_size=1,
    max_size=6,
)


@given(SPECS, st.integers(100, 2_000))
def test_what_is_laid_out_onnx_reads_as_it_was(tmp_path_factory: pytest.TempPathFactory, drawn: list, limit: int) -> None:
    """Tensors of every rank, alone and side by side along each axis, in one file and in several."""
    folder = tmp_path_factory.mktemp("graph")
    specs, packs = [], []
    for i, (dtype, shape, count, axis) in enumerate(drawn):
        names = [f"t{i}.{j}" for j in range(count)]
        specs += [TensorSpec(name, dtype, shape) for name in names]
        if count > 1 and len(shape) > axis:
            packs.append(Pack(f"p{i}", tuple(names), axis))
    values = write_data(folder, specs, packs, limit)
    model = onnx.load_model(folder / "onnx/model.onnx")
    theirs = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    packed = {member: pack for pack in packs for member in pack.members}
    for name, value in values.items():
        if name not in packed:
            assert np.array_equal(theirs[name], value)
    for pack in packs:
        assert np.array_equal(theirs[pack.name], np.concatenate([values[name] for name in pack.members], pack.axis))
    located = read_folder(folder)
    assert {name: item.spec for name, item in located.items()} == {spec.name: spec for spec in specs}
    assert all(item.start % LINE_BYTES == 0 for name, item in located.items() if name not in packed)


def test_inspect_and_verify_read_a_graph_of_others(tmp_path: Path) -> None:
    write_data(tmp_path, [TensorSpec("m.weight", "I8", (3, 5)), TensorSpec("m.weight_scale", "F32", (5,))], [], 10_000)
    found = inspect(tmp_path / "onnx/model.onnx")
    assert [(row["dtype"], row["kind"], row["elements"]) for row in found["tensors"]] == [
        ("F32", "scales and shapes", 5),
        ("I8", "codes", 15),
    ]
    assert found["metadata"]["operators"] == {"Identity": 1}
    assert verify(tmp_path).findings == ()
    (tmp_path / "onnx/model.onnx_data").write_bytes(b"short")
    (finding,) = verify(tmp_path).findings
    assert "truncated" in finding.what


def _relocate(key: str, value: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "onnx/model.onnx"
        model = onnx.load_model(path, load_external_data=False)
        next(entry for entry in model.graph.initializer[0].external_data if entry.key == key).value = value
        path.write_bytes(model.SerializeToString())

    return damage


def _link_data(folder: Path) -> None:
    data = folder / "onnx/model.onnx_data"
    data.rename(folder / "elsewhere")
    data.symlink_to(folder / "elsewhere")


def _rewrite(**options: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        spec = TensorSpec("w", str(options.pop("dtype", "I8")), (3, 5))
        write_graph(folder / "onnx/model.onnx", [Initializer(spec, "onnx/model.onnx_data", 0)], packs=False, **options)  # type: ignore[arg-type]

    return damage


def _metadata(text: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "onnx/model.onnx"
        model = onnx.load_model(path, load_external_data=False)
        model.metadata_props[0].value = text
        path.write_bytes(model.SerializeToString())

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "data above": (_relocate("location", "../secret"), r"lie in '\.\./secret', which is not a file of this folder"),
    "data at the root": (_relocate("location", "/etc/passwd"), "which is not a file of this folder"),
    "data in a folder": (_relocate("location", "sub/data"), "which is not a file of this folder"),
    "data that is not there": (_relocate("location", "absent"), "absent, which is not there"),
    "a link that leads away": (_link_data, "a link that leads to .*elsewhere, out of the graph's folder"),
    "beyond the end": (_relocate("offset", "8"), "should end at 23 of model.onnx_data, which has 15 bytes"),
    "before the beginning": (_relocate("offset", "-1"), "offset -1"),
    "another size": (_relocate("length", "14"), "14 bytes; I8 .3, 5. needs 15"),
    "no number": (_relocate("offset", "x"), "offset -1"),
    "operators of strangers": (_rewrite(domain="evil.example"), "operators of evil.example"),
    "float8 before there was any": (_rewrite(opset=18, dtype="F8_E4M3"), "F8_E4M3, which opset 18 does not have"),
    "metadata that is no JSON": (_metadata("{"), "is not what octavo writes"),
    "metadata of other shapes": (_metadata('{"packs": {"w": {"axis": 1, "members": {"a": 2, "b": 2}}}}'), "its members .* are not"),
    "a second graph": (lambda folder: (folder / "onnx/other.onnx").write_bytes(b"") and None, "several graphs"),
    "no graph": (lambda folder: (folder / "onnx/model.onnx").write_bytes(b"\xff\xff") and None, "no ONNX graph"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_refused(name: str, tmp_path: Path) -> None:
    write_data(tmp_path, [TensorSpec("w", "I8", (3, 5))], [], 10_000)
    assert list(read_folder(tmp_path)) == ["w"]
    damage, message = DAMAGES[name]
    damage(tmp_path)
    with pytest.raises(FormatError, match=message):
        read_folder(tmp_path)


def test_links_into_one_folder_are_what_hub_clients_make(tmp_path: Path) -> None:
    write_data(tmp_path, [TensorSpec("w", "I8", (3, 5))], [], 10_000)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot/onnx"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, name in enumerate(("model.onnx", "model.onnx_data")):
        (tmp_path / "onnx" / name).rename(blobs / str(i))
        (snapshot / name).symlink_to(blobs / str(i))
    assert list(read_folder(snapshot.parent)) == ["w"]
    assert find_graphs(snapshot.parent)[-1] == "onnx/model.onnx"
    assert read_graph(snapshot / "model.onnx").ir_version == 11
