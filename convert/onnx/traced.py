"""The graphs of a model that is no decoder: traced by transformers' own exporter, its linear layers then as the plan stores them.

There is one, or for an encoder-decoder two: what reads, and what writes with a cache (the names are Optimum's, which transformers.js and
its ``ORTModelForSeq2SeqLM`` look for). In the decoder, keys and values of the encoder's states come from the cache where there is one, and
are computed where not.

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
from convert.onnx.nodes import Nodes
from convert.onnx.stored import DECODER, ENCODER, WHOLE, Placed, Traced
from formats.dtypes import DTYPES
from formats.errors import FormatError
from formats.onnx_graph import DATA_TYPES, DOMAINS, IR_VERSION, OPSET, Initializer

if TYPE_CHECKING:
    import torch

    from convert.source import Checkpoint

#: What a model of text may be given, in this order. A type of tokens only where there are several: tokenizers give none otherwise.
_TEXT = ("input_ids", "attention_mask", "token_type_ids")
#: Sizes of what is traced with: no two alike, and none of 1, which torch.export takes for a constant.
_BATCH, _LENGTH, _WRITTEN, _PAST = 2, 11, 3, 5


def trace(checkpoint: Checkpoint, *, dtype: str, trust_remote_code: bool) -> tuple[Traced, ...]:
    """The graphs of a model in ``dtype`` (F32 or F16). Raises :class:`FormatError` where the exporter cannot give one, or where a parameter
    of it is no tensor of the checkpoint as it is."""
    skeleton = Skeleton(checkpoint, dtype=DTYPES[dtype].torch_name, trust_remote_code=trust_remote_code)
    model = skeleton.model
    skeleton.compute_buffers("cpu")
    _fill_with_nothing(model)
    model.config.use_cache = False
    if not (model.config.is_encoder_decoder and model.can_generate()):  # of an encoder alone, T5's config says that it is both
        return (_trace(skeleton, model, WHOLE, dtype, _examples(model)),)
    if model.main_input_name != "input_ids":
        raise FormatError(f"no graphs are known for {type(model).__name__}, an encoder-decoder that reads {model.main_input_name}")
    reads, writes = _halves(model)
    return (
        _trace(skeleton, reads, ENCODER, dtype, {name: _ones(_BATCH, _LENGTH) for name in _TEXT[:2]}),
        _trace(skeleton, writes, DECODER, dtype, _decoder_examples(model)),
    )


def _trace(skeleton: Skeleton, model: Any, name: str, dtype: str, examples: dict[str, Any]) -> Traced:
    """The graph of the model, or of a half of it."""
    within = "" if model is skeleton.model else "model."
    exported = _export(model, examples)
    graph = exported.graph
    sources: dict[str, str] = {}
    known = {parameter for parameter, _ in model.named_parameters(remove_duplicate=False)}
    for parameter in list(graph.initializers):
        own = parameter.removeprefix(within)
        source = skeleton.own_tensor(own)
        if source is None and parameter in known and skeleton.tensors(own):
            raise FormatError(
                f"{own} of {type(skeleton.model).__name__} is no tensor of the checkpoint as it is (transformers makes it of "
                f"{', '.join(skeleton.tensors(own)[:3])}); a traced graph holds tensors of the checkpoint only"
            )
        if source is not None:
            sources[parameter] = source
            value = graph.initializers.pop(parameter)
            value.const_value = None
            graph.inputs.append(value)
    _simplify(exported)
    for value in list(graph.inputs):
        if value.name in sources and not value.uses():
            graph.inputs.remove(value)
            del sources[str(value.name)]
    _tidy(exported, sources)
    if name == DECODER:
        _name_cache(graph)
    foreign = {f"{node.domain}.{node.op_type}" for node in graph.all_nodes() if node.domain not in DOMAINS}
    if foreign:
        raise FormatError(f"the graph of {type(skeleton.model).__name__} has operators of no standard: {', '.join(sorted(foreign))}")
    return Traced(bytes(ir.to_proto(exported).SerializeToString(deterministic=True)), sources, dtype, name)


def rewrite(
    traced: Traced,
    placed: Mapping[str, Placed],
    initializers: Iterable[Initializer],
    *,
    halves: bool,
    metadata: Callable[[Sequence[str]], Mapping[str, str]],
) -> bytes:
    """The graph as bytes, its weights by reference: ``placed`` by the checkpoint's name of a tensor; ``halves``: as
    :class:`~convert.onnx.nodes.Nodes` has it; ``metadata``: what it says of itself, given the names of its constants, which come from no
    tensor. Raises :class:`FormatError` for codes that the graph would read as something else than the weight of a linear layer."""
    import onnx

    model = ir.from_proto(onnx.ModelProto.FromString(traced.graph))
    graph = model.graph
    nodes = Nodes(ir.DataType(DATA_TYPES[traced.dtype]), {}, {item.spec.name: item for item in initializers}, halves=halves)
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
    if traced.name == DECODER:
        _keep_cross(model)
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


def _halves(model: Any) -> tuple[Any, Any]:
    """An encoder-decoder as what reads and what writes, each with tensors alone for inputs and outputs."""
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    class Half(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.config = model.config

    class Reads(Half):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
            states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)
            return {"last_hidden_state": states.last_hidden_state}

    class Writes(Half):
        def forward(
            self,
            encoder_attention_mask: torch.Tensor,
            input_ids: torch.Tensor,
            encoder_hidden_states: torch.Tensor,
            past: list[torch.Tensor],
        ) -> dict[str, Any]:
            cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
            for i in range(0, len(past), 2):
                cache.self_attention_cache.update(past[i], past[i + 1], i // 2)
            output = self.model(
                decoder_input_ids=input_ids,
                encoder_outputs=(encoder_hidden_states,),
                attention_mask=encoder_attention_mask,
                past_key_values=cache,
                use_cache=True,
            )
            layers = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
            return {"logits": output.logits, "present": [part for pair in layers for layer in pair for part in _kept(layer)]}

    return Reads().eval(), Writes().eval()


def _kept(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.keys, layer.values


def _decoder_examples(model: Any) -> dict[str, Any]:
    """What the writing half is traced with; how many heads there are is seen, since configs have many names for it."""
    import torch
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    ids = _ones(_BATCH, _WRITTEN)
    with torch.no_grad():
        output = model(input_ids=_ones(_BATCH, _LENGTH), decoder_input_ids=ids, past_key_values=cache, use_cache=True)
    kept = [part for layer in cache.self_attention_cache.layers for part in _kept(layer)]
    shapes = [(part.shape[0], part.shape[1], _PAST, part.shape[3]) for part in kept]
    states = output.encoder_last_hidden_state
    return {
        "encoder_attention_mask": _ones(_BATCH, _LENGTH),
        "input_ids": ids,
        "encoder_hidden_states": torch.zeros_like(states),
        "past": [torch.zeros(shape, dtype=states.dtype) for shape in shapes],
    }


def _ones(*shape: int) -> torch.Tensor:
    import torch

    return torch.ones(*shape, dtype=torch.long)


#: The parts of a decoder layer's cache, in the order in which they are in it.
_CACHE = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")


def _name_cache(graph: ir.Graph) -> None:
    """Gives the decoder's inputs and outputs the names, and their axes those, by which Optimum and transformers.js know them."""
    axes = {
        "encoder_attention_mask": ("batch_size", "encoder_sequence_length"),
        "input_ids": ("batch_size", "decoder_sequence_length"),
        "encoder_hidden_states": ("batch_size", "encoder_sequence_length"),
        "logits": ("batch_size", "decoder_sequence_length"),
    }
    for value in (*graph.inputs, *graph.outputs):
        kind, _, number = str(value.name).partition(".")
        if kind == "past" and number.isdecimal():
            layer, part = divmod(int(number), 2)
            value.name = f"past_key_values.{layer}.{_CACHE[part]}"
            names: dict[int, str] = {0: "batch_size", 2: "past_decoder_sequence_length"}
        elif kind == "present":
            layer, part = divmod(int(number), len(_CACHE))
            value.name = f"present.{layer}.{_CACHE[part]}"
            names = {0: "batch_size", 2: "encoder_sequence_length" if part > 1 else "total_decoder_sequence_length"}
        else:
            names = dict(enumerate(axes.get(str(value.name), ())))
        if names and value.shape is not None:
            value.shape = ir.Shape([names.get(axis, size) for axis, size in enumerate(value.shape)])


def _keep_cross(model: ir.Model) -> None:
    """Takes keys and values of the encoder's states from the cache where ``use_cache_branch`` says that there is one. What is computed of
    the states and put behind them is then of no states: products of nothing cost nothing, and no part of the graph is there twice."""
    graph = model.graph
    states = next(value for value in graph.inputs if value.name == "encoder_hidden_states")
    flag = ir.Value(name="use_cache_branch", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.BOOL))
    constants = {name: ir.val(f"cross.{name}", const_value=ir.tensor([number])) for name, number in _SLICE.items()}
    for constant in constants.values():
        graph.register_initializer(constant)
    end = ir.node("Where", [flag, constants["none"], constants["all"]])
    fresh = ir.node("Slice", [states, constants["none"], end.outputs[0], constants["axis"]])
    end.outputs[0].name, fresh.outputs[0].name = "cross.end", "cross.fresh_states"
    graph.insert_before(next(iter(graph)), [end, fresh])
    for computed in [value for value in graph.outputs if ".encoder." in str(value.name)]:
        name, producer = str(computed.name), computed.producer()
        assert producer is not None
        assert computed.shape is not None
        past = ir.Value(name=name.replace("present", "past_key_values"), type=computed.type)
        past.shape = ir.Shape([size if axis != 2 else "past_encoder_sequence_length" for axis, size in enumerate(computed.shape)])
        graph.inputs.append(past)
        nodes, value = _copies(computed, {states: fresh.outputs[0]}, f"{name}.fresh")
        both = ir.node("Concat", [past, value], {"axis": 2}, name=f"{name}.joined")
        graph.insert_after(producer, [*nodes, both])
        kept = both.outputs[0]
        kept.type, kept.shape = computed.type, computed.shape
        ir.convenience.replace_all_uses_with(computed, kept, replace_graph_outputs=True)
        computed.name, kept.name = f"{name}.unused", name
    order = {str(value.name).replace("present", "past_key_values"): i for i, value in enumerate(graph.outputs)}
    cache = sorted((value for value in graph.inputs if value.name in order), key=lambda value: order[str(value.name)])
    for value in cache:
        graph.inputs.remove(value)
    graph.inputs.extend([*cache, flag])
    ir.passes.common.RemoveUnusedNodesPass()(model)


#: Where a slice of the encoder's states begins, where it ends, and along which axis it is.
_SLICE = {"none": 0, "all": (1 << 63) - 1, "axis": 1}


def _copies(value: ir.Value, instead: Mapping[ir.Value, ir.Value], prefix: str) -> tuple[list[ir.Node], ir.Value]:
    """The nodes that a value comes from, once more, in their order and of other values ``instead``, and what is then the value."""
    wanted: set[ir.Node] = set()
    open_ = [value]
    while open_:
        producer = open_.pop().producer()
        if producer is not None and producer not in wanted:
            wanted.add(producer)
            open_ += [item for item in producer.inputs if item is not None]
    made = dict(instead)
    nodes = []
    assert value.graph is not None
    for node in value.graph:
        if node not in wanted:
            continue
        inputs = [made.get(item, item) if item is not None else None for item in node.inputs]
        copy = ir.Node(
            node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=len(node.outputs), name=f"{prefix}.{node.name}"
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name = f"{prefix}.{old.name}"
            made[old] = new
        nodes.append(copy)
    return nodes, made[value]


def _examples(model: Any) -> dict[str, torch.Tensor]:
    """What the model is traced with: of each input its dtype and its rank are what matters."""
    import torch

    known = inspect.signature(model.forward).parameters
    config = model.config
    if model.main_input_name == "input_ids":
        few = getattr(config, "type_vocab_size", 0) < 2
        names = [name for name in _TEXT if name in known and not (name == "token_type_ids" and few)]
        return {name: _ones(_BATCH, _LENGTH) for name in names}
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return {"pixel_values": torch.zeros(_BATCH, getattr(config, "num_channels", 3), height, width, dtype=model.dtype)}
    raise FormatError(
        f"no graph is known for {type(model).__name__}, which reads {model.main_input_name}; known are decoders, and what reads input_ids "
        "or pixel_values"
    )


def _export(model: Any, examples: dict[str, Any]) -> ir.Model:
    import torch
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    free = {"pixel_values": (0, 2, 3), "past": (0, 2)}

    def axes(name: str) -> dict[int, Any]:
        return dict.fromkeys(free.get(name, (0, 1)), torch.export.Dim.AUTO)

    shapes = {name: [axes(name) for _ in value] if isinstance(value, list) else axes(name) for name, value in examples.items()}
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
