"""The graph of a model that is no decoder: traced by transformers' own exporter, its linear layers then as the plan stores them.

Nothing is read for it. Parameters are memory that no one touches, and inputs of the graph while it is simplified, so that no value of
theirs can be folded into it; what the model computes of its configuration alone (position ids, rotary frequencies) is a constant inside.
"""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from convert.loading import Skeleton
from convert.onnx.nodes import Nodes, Stored
from formats.dtypes import DTYPES
from formats.errors import FormatError
from formats.onnx_graph import DATA_TYPES, DOMAINS, IR_VERSION, OPSET, Initializer

if TYPE_CHECKING:
    import torch

    from convert.source import Checkpoint

#: What a model of text may be given, in this order. A type of tokens only where there are several: tokenizers give none otherwise.
_TEXT = ("input_ids", "attention_mask", "token_type_ids")
#: Sizes of what is traced with: no two alike, and none of 1, which torch.export takes for a constant.
_BATCH, _LENGTH = 2, 11


@dataclass(frozen=True)
class Traced:
    """``graph``: an onnx.proto3 model without weights, in which a parameter is an input of the name that the model has for it.
    ``parameters``: of each that the graph computes with, the tensor of the checkpoint that it is. ``dtype``: F32 or F16, of its floats."""

    graph: bytes
    parameters: Mapping[str, str]
    dtype: str

    @property
    def tensors(self) -> frozenset[str]:
        """The checkpoint's tensors that the graph computes with."""
        return frozenset(self.parameters.values())


@dataclass(frozen=True)
class Placed:
    """A tensor of the checkpoint as it lies on disk. ``product``: as a linear layer multiplies with it; ``plain``: as everything else reads
    it, None where it is there as codes alone. ``columns``: the checkpoint has it as (in, out)."""

    product: Stored
    plain: Stored | None
    columns: bool = False


def trace(checkpoint: Checkpoint, *, dtype: str, trust_remote_code: bool) -> Traced:
    """The graph of a model in ``dtype`` (F32 or F16). Raises :class:`FormatError` where the exporter cannot give one, or where a parameter
    of it is no tensor of the checkpoint as it is."""
    skeleton = Skeleton(checkpoint, dtype=DTYPES[dtype].torch_name, trust_remote_code=trust_remote_code)
    model = skeleton.model
    skeleton.compute_buffers("cpu")
    _fill_with_nothing(model)
    model.config.use_cache = False
    exported = _export(model, _examples(model))
    graph = exported.graph
    sources: dict[str, str] = {}
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in list(graph.initializers):
        source = skeleton.own_tensor(name)
        if source is None and name in known:
            raise FormatError(
                f"{name} of {type(model).__name__} is no tensor of the checkpoint as it is (transformers makes it of "
                f"{', '.join(skeleton.tensors(name)[:3])}); a traced graph holds tensors of the checkpoint only"
            )
        if source is not None:
            sources[name] = source
            value = graph.initializers.pop(name)
            value.const_value = None
            graph.inputs.append(value)
    _simplify(exported)
    for value in list(graph.inputs):
        if value.name in sources and not value.uses():
            graph.inputs.remove(value)
            del sources[str(value.name)]
    _tidy(exported, sources)
    foreign = {f"{node.domain}.{node.op_type}" for node in graph.all_nodes() if node.domain not in DOMAINS}
    if foreign:
        raise FormatError(f"the graph of {type(model).__name__} has operators of no standard: {', '.join(sorted(foreign))}")
    return Traced(bytes(ir.to_proto(exported).SerializeToString(deterministic=True)), sources, dtype)


def rewrite(
    traced: Traced,
    placed: Mapping[str, Placed],
    initializers: Iterable[Initializer],
    *,
    metadata: Callable[[Sequence[str]], Mapping[str, str]],
) -> bytes:
    """The graph as bytes, its weights by reference: ``placed`` by the checkpoint's name of a tensor; ``metadata``: what it says of itself,
    given the names of its constants, which come from no tensor. Raises :class:`FormatError` for codes that the graph would read as
    something else than the weight of a linear layer."""
    import onnx

    model = ir.from_proto(onnx.ModelProto.FromString(traced.graph))
    graph = model.graph
    nodes = Nodes(ir.DataType(DATA_TYPES[traced.dtype]), {}, {item.spec.name: item for item in initializers})
    for node in list(graph):
        reading = _reading(node)
        if reading is not None and reading.parameter in traced.parameters:
            begin = len(nodes.nodes)
            value = _read_stored(nodes, node, reading, placed[traced.parameters[reading.parameter]])
            if value is not None:
                _put(graph, node, nodes.nodes[begin:], value)
    ir.passes.common.RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if value.name in traced.parameters]:
        graph.inputs.remove(value)
        if value.uses():
            _read_plain(graph, value, nodes, traced.parameters[str(value.name)], placed)
    for value in nodes.initializers():
        graph.register_initializer(value)
    computed = sorted(name for name, value in graph.initializers.items() if not isinstance(value.const_value, ir.ExternalTensor))
    for node in graph.all_nodes():
        if node.domain:
            model.graph.opset_imports[node.domain] = 1
    model.metadata_props.update(metadata(computed))
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


@dataclass(frozen=True)
class _Reading:
    """How a node reads a parameter: ``rows`` of a table, or a product with it as it is or ``turned``; ``value``: the indices, or what is
    multiplied."""

    parameter: str
    value: ir.Value
    rows: bool = False
    turned: bool = False


def _reading(node: ir.Node) -> _Reading | None:
    if node.domain or node.op_type not in ("Gather", "MatMul", "Gemm"):
        return None
    left, right = node.inputs[:2]
    assert left is not None
    assert right is not None
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    if node.op_type == "Gather":
        return _Reading(str(left.name), right, rows=True) if attributes.get("axis", 0) == 0 else None
    if node.op_type == "Gemm":
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        return _Reading(str(right.name), left, turned=bool(attributes.get("transB", 0))) if plain else None
    before = right.producer()
    if before is not None and before.op_type == "Transpose" and list(before.attributes["perm"].as_ints()) == [1, 0]:
        assert before.inputs[0] is not None
        return _Reading(str(before.inputs[0].name), left, turned=True)
    return _Reading(str(right.name), left)


def _read_stored(nodes: Nodes, node: ir.Node, reading: _Reading, there: Placed) -> ir.Value | None:
    """What a node gives, of what is stored as codes or the other way round; None where it reads values as they are."""
    stored = there.product
    module = stored.name.removesuffix(".weight")
    lookup = stored.scheme is not None and stored.scheme.lookup
    if reading.rows or lookup:
        return nodes.lookup(module, stored, reading.value) if reading.rows and lookup else None
    # (out, in) that is turned, or (in, out) that is not, is a linear layer's.
    if reading.turned == there.columns or not (stored.scheme or stored.transposed):
        return None
    product = nodes.product(module, stored, reading.value)
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    return product if bias is None else nodes.op("Add", f"{module}.biased", product, bias)


def _put(graph: ir.Graph, node: ir.Node, made: Sequence[ir.Node], value: ir.Value) -> None:
    """Puts new nodes, and what they give, in the place of one."""
    old, name = node.outputs[0], node.outputs[0].name
    graph.insert_before(node, made)
    value.shape, value.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if value.is_graph_output():
        value.name = name


def _read_plain(graph: ir.Graph, value: ir.Value, nodes: Nodes, tensor: str, placed: Mapping[str, Placed]) -> None:
    """Lets what is left of a parameter's readers read what is stored."""
    plain, scheme = placed[tensor].plain, placed[tensor].product.scheme
    if plain is None:
        assert scheme is not None
        reader = next(iter(value.uses())).node
        what = "rows of a table" if scheme.lookup else "the weight of a linear layer"
        where = f"{reader.op_type} ({reader.name})"
        raise FormatError(f"{tensor} cannot be {scheme.name}: the graph reads it in {where}, and not as {what}; keep it with a rule")
    stored = nodes.tensor(plain.name)
    if stored.dtype != value.dtype:
        raise FormatError(f"{tensor} is {stored.dtype} on disk, and the graph computes with it as {value.dtype}; leave floats: float16 out")
    if plain.transposed:
        begin = len(nodes.nodes)
        stored = nodes.op("Transpose", f"{plain.name}.turned", stored, perm=[1, 0])
        graph.insert_before(next(iter(graph)), nodes.nodes[begin:])
    ir.convenience.replace_all_uses_with(value, stored)


def _fill_with_nothing(model: Any) -> None:
    """Gives what is on the meta device memory that nobody writes to, and so no memory: the exporter wants a device that computes."""
    import torch

    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for values in (module._parameters, module._buffers):
            for name, value in values.items():
                if value is not None and value.is_meta:
                    empty = torch.empty_like(value, device="cpu")
                    filled = torch.nn.Parameter(empty, requires_grad=False) if isinstance(value, torch.nn.Parameter) else empty
                    values[name] = made.setdefault(id(value), filled)


def _examples(model: Any) -> dict[str, torch.Tensor]:
    """What the model is traced with: of each input its dtype and its rank are what matters."""
    import torch

    known = inspect.signature(model.forward).parameters
    config = model.config
    if model.main_input_name == "input_ids":
        few = getattr(config, "type_vocab_size", 0) < 2
        names = [name for name in _TEXT if name in known and not (name == "token_type_ids" and few)]
        return {name: torch.ones(_BATCH, _LENGTH, dtype=torch.long) for name in names}
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(_BATCH, getattr(config, "num_channels", 3), height, width, dtype=model.dtype)}
    raise FormatError(
        f"no graph is known for {type(model).__name__}, which reads {model.main_input_name}; known are decoders, and what reads input_ids "
        "or pixel_values"
    )


def _export(model: Any, examples: dict[str, torch.Tensor]) -> ir.Model:
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    free = {"pixel_values": (0, 2, 3)}
    shapes = {name: dict.fromkeys(free.get(name, (0, 1)), torch.export.Dim.AUTO) for name in examples}
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET, optimize=False)
    try:
        with _quiet():
            exporter = OnnxExporter()  # type: ignore[no-untyped-call]
            program, _ = exporter.export_program(model, {**examples}, config)
    except Exception as error:  # noqa: BLE001  tracing runs the model's own code, which may fail in any way
        first = str(error).strip().partition("\n")[0][:300]
        raise FormatError(f"transformers' exporter gives no graph of {type(model).__name__} ({type(error).__name__}: {first})") from None
    assert isinstance(program, ir.Model)
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of their own internals, and print how far they are."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _simplify(model: ir.Model) -> None:
    """Inlines functions, folds constants, removes what nobody reads. A Resize of a constant is left, because folding it takes minutes (as
    transformers' exporter has it)."""
    from onnxscript import optimizer

    with _quiet():
        optimizer.optimize_ir(model, should_fold=lambda node: False if node.op_type == "Resize" else None)


def _tidy(model: ir.Model, parameters: Mapping[str, str]) -> None:
    """Leaves what a reader needs: no traces of the exporter's stack, which are long and name paths of this machine, names for the axes of
    inputs and outputs, and no shapes in between."""
    graph = model.graph
    model.ir_version, model.producer_name, model.producer_version = IR_VERSION, "octavo", None
    model.metadata_props.clear()
    graph.metadata_props.clear()
    graph.name, graph.doc_string, model.doc_string = "model", None, None
    ir.passes.common.RemoveUnusedOpsetsPass()(model)
    own = [value for value in graph.inputs if value.name not in parameters]
    names: dict[str, str] = {}
    for value in own:
        axes = ("batch_size", "channels", "height", "width") if value.name == "pixel_values" else ("batch_size", "sequence_length")
        for axis, size in zip(axes, value.shape or (), strict=False):
            if isinstance(size, ir.SymbolicDim):
                names.setdefault(str(size), axis)
    edges = {*graph.inputs, *graph.outputs}
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape([names.get(str(size), str(size)) if isinstance(size, ir.SymbolicDim) else size for size in value.shape])
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in edges:
                value.shape = value.type = None
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
