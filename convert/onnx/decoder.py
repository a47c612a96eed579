"""The nodes of a decoder with a cache of keys and values, in the standard's own operators.

Inputs ``input_ids`` (batch_size, sequence_length), ``attention_mask`` (batch_size, total_sequence_length), ``past_key_values.N.key``
and ``.value`` (batch_size, heads, past_sequence_length, head size); outputs ``logits``, ``present.N.key`` and ``.value``. Positions are
counted from the mask, so that padding on the left changes nothing. transformers.js takes the shape of an empty cache from these
declarations: it knows the symbol ``batch_size``, and takes any other for zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from convert.onnx.families import ACTIVATIONS, Decoder, Rotary
from convert.onnx.nodes import ORT, Nodes, packs_of
from convert.onnx.stored import Stored
from formats.onnx_graph import DATA_TYPES, IR_VERSION, OPSET, Initializer, Pack
from formats.onnx_matmulnbits import ZERO


def plan_packs(decoder: Decoder, stored: Mapping[str, Stored]) -> list[Pack]:
    """The layers of each block that read the same input, where they are stored alike: one product instead of several."""
    found: list[Pack] = []
    for i in range(len(decoder.layers)):
        for modules in (decoder.family.inputs, decoder.family.up):
            found += packs_of([f"{decoder.family.blocks}.{i}.{module}" for module in modules], stored)
    return found


def build(
    decoder: Decoder,
    stored: Mapping[str, Stored],
    initializers: Iterable[Initializer],
    *,
    dtype: str,
    attention: str,
    halves: bool,
    metadata: Mapping[str, str],
) -> bytes:
    """The graph as bytes, its weights by reference. ``stored`` by the model's name of a parameter, ``dtype``: F32 or F16, of what is not
    quantized; ``attention``: ``standard`` or ``gqa``; ``halves``: as :class:`Nodes` has it. Raises ``KeyError`` for a parameter that is
    not there."""
    grouped = attention == "gqa"
    files = {item.spec.name: item for item in initializers}
    nodes = Nodes(ir.DataType(DATA_TYPES[dtype]), stored, files, fused=grouped, halves=halves)
    integers = ir.DataType.INT64
    ids = nodes.input("input_ids", integers, ("batch_size", "sequence_length"))
    attended = nodes.input("attention_mask", integers, ("batch_size", "total_sequence_length"))
    places = _Places(nodes, ids, attended)
    residual = _Residual(_embed(nodes, decoder, ids, places))
    masks = {
        window: (places.bias(window), *places.counts) if grouped else (places.mask(window),)
        for window in dict.fromkeys(layer.window for layer in decoder.layers)
    }
    turns = {name: _angles(nodes, decoder, name, rotary, places) for name, rotary in decoder.rotaries.items()}
    outputs = []
    for i, layer in enumerate(decoder.layers):
        residual, cache = _block(nodes, decoder, i, residual, masks[layer.window], turns.get(layer.rotary))
        outputs += cache
    hidden, _ = residual.norm(nodes, decoder, decoder.family.norm)
    logits = _logits(nodes, decoder, hidden)
    opsets = {"": OPSET, **{node.domain: 1 for node in nodes.nodes if node.domain}}
    graph = ir.Graph(
        nodes.inputs, [logits, *outputs], nodes=nodes.nodes, initializers=nodes.initializers(), opset_imports=opsets, name="decoder"
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="octavo", metadata_props=dict(metadata))
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


class _Places:
    """Where the tokens stand: from the shapes of what came in and from the mask."""

    def __init__(self, nodes: Nodes, ids: ir.Value, attended: ir.Value) -> None:
        self._nodes = nodes
        self._attended = attended
        length = nodes.op("Shape", "length", ids, start=1, end=2)
        self._total = nodes.op("Shape", "total", attended, start=1, end=2)
        self._past = nodes.op("Sub", "past", self._total, length)
        counted = nodes.op("CumSum", "counted", attended, nodes.number(1))
        counted = nodes.op("Max", "counted.positions", nodes.op("Sub", "counted.from_zero", counted, nodes.number(1)), nodes.number(0))
        #: (batch, length): of each token, how many unmasked ones stand before it.
        self.positions = nodes.op("Slice", "positions", counted, self._past, self._total, nodes.integer(1))
        #: (total,): 0 for the first.
        self.keys = nodes.op("Range", "keys", nodes.number(0), nodes.op("Squeeze", "total.number", self._total), nodes.number(1))
        queries = nodes.op("Slice", "queries", self.keys, self._past, self._total, nodes.integer(0))
        self._queries = nodes.op("Unsqueeze", "queries.column", queries, nodes.integer(1))
        real = nodes.op("Cast", "attended", attended, to=ir.DataType.BOOL)
        axes = nodes.constant("axes.1.2", np.array([1, 2], dtype=np.int64))
        itself = nodes.op("Equal", "itself", self.keys, self._queries)
        # A token of the padding sees itself: over nothing, a softmax is NaN to some, and NaN in its values would reach everybody.
        self._seen = nodes.op("Or", "seen", nodes.op("Unsqueeze", "attended.keys", real, axes), itself)
        self._causal = nodes.op("LessOrEqual", "causal", self.keys, self._queries)

    @cached_property
    def last(self) -> ir.Value:
        """The largest of :attr:`positions`, a number."""
        return self._nodes.op("ReduceMax", "positions.last", self.positions, keepdims=0)

    @cached_property
    def counts(self) -> tuple[ir.Value, ir.Value]:
        """As GroupQueryAttention wants them: of each sequence the last position, int32 (batch,), and how many there are. Those of the
        padding count too; the bias hides them."""
        nodes = self._nodes
        total = nodes.op("Cast", "total.int32", nodes.op("Squeeze", "total.scalar", self._total), to=ir.DataType.INT32)
        last = nodes.op("Sub", "total.last", total, nodes.constant("one.int32", np.array(1, dtype=np.int32)))
        batch = nodes.op("Shape", "batch", self._attended, start=0, end=1)
        return nodes.op("Expand", "last.positions", last, batch), total

    def bias(self, window: int | None) -> ir.Value:
        """:meth:`mask` as what is added to scores: nothing, or the lowest number there is."""
        nodes, mask = self._nodes, self.mask(window)
        lowest = nodes.constant("lowest", np.array(np.finfo(nodes.dtype.numpy()).min, dtype=nodes.dtype.numpy()))
        return nodes.op("Where", f"{mask.name}.bias", mask, nodes.float("nothing", 0.0), lowest)

    def mask(self, window: int | None) -> ir.Value:
        """(batch, 1, length, total): which keys a query sees."""
        causal, name = self._causal, "mask"
        if window is not None:
            name = f"mask.{window}"
            edge = self._nodes.op("Sub", f"{name}.edge", self._queries, self._nodes.number(window))
            causal = self._nodes.op("And", f"{name}.causal", causal, self._nodes.op("Greater", f"{name}.inside", self.keys, edge))
        return self._nodes.op("And", name, causal, self._seen)


@dataclass(frozen=True)
class _Turns:
    """Cosines and sines of a layer's angles, ``turned`` features of a head: of the tokens (batch, length, turned / 2), or with
    ``positions`` (batch, length) a table (total, turned / 2), which GroupQueryAttention looks them up in."""

    cosines: ir.Value
    sines: ir.Value
    turned: int
    positions: ir.Value | None


def _angles(nodes: Nodes, decoder: Decoder, name: str, rotary: Rotary, places: _Places) -> _Turns:
    """Computed, not looked up: a table of the longest text that some models allow is larger than a layer. GroupQueryAttention wants a row
    for each key there is; next to what it reads of each key that is little."""
    # What its kernels ask of a head and of a table of its angles (CheckRotaryCaches of group_query_attention_helper.h).
    inside = nodes.fused and decoder.head_size % 16 == 0 and len(rotary.frequencies) % 8 == 0
    positions, axis = (places.keys, 1) if inside else (places.positions, 2)
    as_float = nodes.op("Cast", f"{name}.positions", positions, to=ir.DataType.FLOAT)
    column = nodes.op("Unsqueeze", f"{name}.column", as_float, nodes.integer(axis))
    angles = nodes.op("Mul", f"{name}.angles", column, _frequencies(nodes, name, rotary, places))
    found = []
    for kind in ("Cos", "Sin"):
        value = nodes.op(kind, f"{name}.{kind.lower()}", angles)
        if rotary.factor != 1:
            value = nodes.op("Mul", f"{name}.{kind.lower()}.scaled", value, nodes.constant(f"{name}.factor", np.float32(rotary.factor)))
        if nodes.dtype != ir.DataType.FLOAT:
            value = nodes.op("Cast", f"{name}.{kind.lower()}.cast", value, to=nodes.dtype)
        found.append(value)
    return _Turns(found[0], found[1], 2 * len(rotary.frequencies), places.positions if inside else None)


def _frequencies(nodes: Nodes, name: str, rotary: Rotary, places: _Places) -> ir.Value:
    """(turned / 2,), the same for all tokens of a call: its last position decides, as in transformers. What lies in the cache stays as its
    own call turned it; transformers' ``generate`` throws the cache of a Phi-3 away at the switch, and so must who decodes over it."""
    usual = nodes.constant(f"{name}.frequencies", np.array(rotary.frequencies, dtype=np.float32))
    if not rotary.switch:
        return usual
    if rotary.stretch is None:
        other = nodes.constant(f"{name}.frequencies.long", np.array(rotary.long, dtype=np.float32))
    else:
        stretch, turned = rotary.stretch, 2 * len(rotary.frequencies)
        length = nodes.op("Cast", f"{name}.length", nodes.op("Add", f"{name}.count", places.last, nodes.number(1)), to=ir.DataType.FLOAT)
        constants = {
            "slope": stretch.factor / stretch.trained,
            "offset": stretch.factor - 1,
            "power": turned / (turned - 2),
            "base": stretch.base,
        }
        slope, offset, power, base = (nodes.constant(f"{name}.{key}", np.float32(value)) for key, value in constants.items())
        grown = nodes.op("Sub", f"{name}.growth", nodes.op("Mul", f"{name}.relative", length, slope), offset)
        base = nodes.op("Mul", f"{name}.base.grown", nodes.op("Pow", f"{name}.growth.power", grown, power), base)
        exponents = nodes.constant(f"{name}.exponents", -np.arange(0, turned, 2, dtype=np.float32) / turned)
        other = nodes.op("Pow", f"{name}.frequencies.grown", base, exponents)
    beyond = nodes.op("GreaterOrEqual", f"{name}.beyond", places.last, nodes.number(rotary.switch))
    return nodes.op("Where", f"{name}.frequencies.chosen", beyond, other, usual)


def _embed(nodes: Nodes, decoder: Decoder, ids: ir.Value, places: _Places) -> ir.Value:
    family = decoder.family
    rows = nodes.stored[f"{family.embedding}.weight"]
    if rows.scheme and rows.scheme.lookup:
        hidden = nodes.lookup(family.embedding, rows, ids)
    elif rows.scheme:
        hidden = _gather_codes(nodes, family.embedding, rows, ids)
    else:
        hidden = nodes.op("Gather", family.embedding, nodes.tensor(rows.name), ids)
    if family.scaled_embedding:
        hidden = nodes.op("Mul", f"{family.embedding}.scaled", hidden, nodes.float("embedding.scale", decoder.hidden_size**0.5))
    if family.positions:
        position = nodes.op("Gather", family.positions, nodes.parameter(f"{family.positions}.weight"), places.positions)
        hidden = nodes.op("Add", f"{family.embedding}.placed", hidden, position)
    return hidden


def _gather_codes(nodes: Nodes, module: str, rows: Stored, ids: ir.Value) -> ir.Value:
    """Rows of the head as embeddings: codes less 128, times the scales of their blocks."""
    codes = nodes.op("Cast", f"{module}.floats", nodes.op("Gather", f"{module}.codes", nodes.tensor(rows.name), ids), to=nodes.dtype)
    centred = nodes.op("Sub", f"{module}.centred", codes, nodes.float("code.zero", ZERO))
    scale = nodes.op("Gather", f"{module}.scales", nodes.scale(rows.scale), ids)
    blocks = nodes.op("Mul", f"{module}.blocks", centred, nodes.op("Unsqueeze", f"{module}.scales.column", scale, nodes.integer(-1)))
    return nodes.op("Reshape", module, blocks, nodes.constant("heads.together", np.array([0, 0, -1], dtype=np.int64)))


@dataclass(frozen=True)
class _Residual:
    """Hidden states, and what is to be added to them, which makes the value called ``name``. The next norm reads the sum, and one operator
    may do both."""

    hidden: ir.Value
    change: ir.Value | None = None
    name: str = ""

    def norm(self, nodes: Nodes, decoder: Decoder, module: str) -> tuple[ir.Value, ir.Value]:
        """The sum, normed and as it is."""
        if self.change is None:
            return _norm(nodes, decoder, module, self.hidden), self.hidden
        return _norm_sum(nodes, decoder, module, self.name, self.hidden, self.change)


def _block(
    nodes: Nodes, decoder: Decoder, i: int, residual: _Residual, mask: tuple[ir.Value, ...], turns: _Turns | None
) -> tuple[_Residual, list[ir.Value]]:
    """The hidden states behind block ``i``, and its keys and values."""
    family, block = decoder.family, f"{decoder.family.blocks}.{i}"
    normed, hidden = residual.norm(nodes, decoder, f"{block}.{family.before_attention}")
    attended, cache = _attend(nodes, decoder, i, _project(nodes, decoder, block, normed, turns), mask, turns)
    residual = _change(nodes, decoder, block, family.output, family.after_attention, hidden, attended)
    normed, hidden = residual.norm(nodes, decoder, f"{block}.{family.before_mlp}")
    sizes = [decoder.up_size] * (2 if family.gated else 1)
    first, *second = nodes.linear([f"{block}.{module}" for module in family.up], normed, sizes)
    active = _activate(nodes, decoder.activation, f"{block}.active", first)
    if second:
        active = nodes.op("Mul", f"{block}.gated", active, second[0])
    return _change(nodes, decoder, block, family.down, family.after_mlp, hidden, active), cache


def _project(nodes: Nodes, decoder: Decoder, block: str, normed: ir.Value, turns: _Turns | None) -> tuple[ir.Value | None, ...]:
    """Queries, keys and values; turned, unless the attention does that. GroupQueryAttention takes them as one, where nothing is done to
    them before: then there are no keys and values."""
    family = decoder.family
    modules, turned_here = [f"{block}.{module}" for module in family.inputs], turns is not None and turns.positions is None
    if nodes.fused and not family.normed_heads and not turned_here:
        together = nodes.side_by_side(modules, normed)
        if together is not None:
            return together, None, None
    query, key, value = nodes.linear(modules, normed, decoder.head_sizes)
    if family.normed_heads:
        query = _norm_heads(nodes, decoder, f"{block}.{family.normed_heads[0]}", query, decoder.heads)
        key = _norm_heads(nodes, decoder, f"{block}.{family.normed_heads[1]}", key, decoder.kv_heads)
    if turns and turned_here:
        query = _turn(nodes, decoder, f"{block}.query.turned", query, decoder.heads, turns)
        key = _turn(nodes, decoder, f"{block}.key.turned", key, decoder.kv_heads, turns)
    return query, key, value


def _attend(
    nodes: Nodes,
    decoder: Decoder,
    i: int,
    projected: tuple[ir.Value | None, ...],
    mask: tuple[ir.Value, ...],
    turns: _Turns | None,
) -> tuple[ir.Value, list[ir.Value]]:
    """What the heads of block ``i`` gather, and its keys and values, past and present. ``mask``: that of the standard's Attention, or a
    bias and two counts for ONNX Runtime's."""
    shape = ("batch_size", decoder.kv_heads, "past_sequence_length", decoder.head_size)
    past = [nodes.input(f"past_key_values.{i}.{what}", nodes.dtype, shape) for what in ("key", "value")]
    names = [f"{decoder.family.blocks}.{i}.attended", f"present.{i}.key", f"present.{i}.value"]
    options: dict[str, Any] = {"scale": decoder.attention_scale, "kv_num_heads": decoder.kv_heads}
    if decoder.attention_softcap:
        options["softcap"] = decoder.attention_softcap
    if len(mask) == 1:
        attended, *cache = nodes.ops("Attention", names, *projected, *mask, *past, q_num_heads=decoder.heads, **options)
    else:
        bias, last, total = mask
        rotary: tuple[ir.Value | None, ...] = (None, None, None)
        if turns and turns.positions:
            rotary, options = (turns.cosines, turns.sines, turns.positions), {**options, "do_rotary": 1}
        inputs = (*projected, *past, last, total, *rotary, bias)
        attended, *cache = nodes.ops("GroupQueryAttention", names, *inputs, domain=ORT, num_heads=decoder.heads, **options)
    for present in cache:
        present.shape = ir.Shape(("batch_size", decoder.kv_heads, "total_sequence_length", decoder.head_size))
        present.type = ir.TensorType(nodes.dtype)
    return attended, cache


def _change(nodes: Nodes, decoder: Decoder, block: str, module: str, norm: str, hidden: ir.Value, value: ir.Value) -> _Residual:
    """What a linear layer makes of a value, normed where the family does so, to be added to the hidden states."""
    change = nodes.linear([f"{block}.{module}"], value, [decoder.hidden_size])[0]
    if norm:
        change = _norm(nodes, decoder, f"{block}.{norm}", change)
    return _Residual(hidden, change, f"{block}.{module}.added")


def _norm(nodes: Nodes, decoder: Decoder, module: str, value: ir.Value, name: str = "") -> ir.Value:
    """The norm ``module`` over the last axis."""
    kind = "LayerNormalization" if decoder.family.norm_kind == "layer" else "RMSNormalization"
    return nodes.op(kind, name or module, value, *_norm_weights(nodes, decoder, module), axis=-1, epsilon=decoder.epsilon)


def _norm_sum(nodes: Nodes, decoder: Decoder, module: str, name: str, value: ir.Value, change: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The norm ``module`` of a sum, and the sum, called ``name``."""
    if not nodes.fused:
        total = nodes.op("Add", name, value, change)
        return _norm(nodes, decoder, module, total), total
    kind = "SkipLayerNormalization" if decoder.family.norm_kind == "layer" else "SkipSimplifiedLayerNormalization"
    inputs = (value, change, *_norm_weights(nodes, decoder, module))
    normed, *_, total = nodes.ops(kind, (module, "", "", name), *inputs, domain=ORT, epsilon=decoder.epsilon)
    return normed, total


def _norm_weights(nodes: Nodes, decoder: Decoder, module: str) -> list[ir.Value]:
    weight = nodes.parameter(f"{module}.weight")
    if decoder.family.norm_kind == "layer":
        return [weight, nodes.parameter(f"{module}.bias")]
    if decoder.family.offset:
        return [nodes.op("Add", f"{module}.scale", weight, nodes.float("norm.offset", decoder.family.offset))]
    return [weight]


def _norm_heads(nodes: Nodes, decoder: Decoder, module: str, value: ir.Value, heads: int) -> ir.Value:
    apart = nodes.constant(f"heads.{heads}", np.array([0, 0, heads, decoder.head_size], dtype=np.int64))
    together = nodes.constant("heads.together", np.array([0, 0, -1], dtype=np.int64))
    normed = _norm(nodes, decoder, module, nodes.op("Reshape", f"{module}.heads", value, apart), f"{module}.normed")
    return nodes.op("Reshape", module, normed, together)


def _turn(nodes: Nodes, decoder: Decoder, name: str, value: ir.Value, heads: int, turns: _Turns) -> ir.Value:
    partial: dict[str, Any] = {} if turns.turned == decoder.head_size else {"rotary_embedding_dim": turns.turned}
    return nodes.op("RotaryEmbedding", name, value, turns.cosines, turns.sines, num_heads=heads, **partial)


def _activate(nodes: Nodes, activation: str, name: str, value: ir.Value) -> ir.Value:
    if ACTIVATIONS[activation]:
        return nodes.op("Gelu", name, value, approximate=ACTIVATIONS[activation])
    if activation == "relu":
        return nodes.op("Relu", name, value)
    return nodes.op("Mul", name, value, nodes.op("Sigmoid", f"{name}.sigmoid", value))


def _logits(nodes: Nodes, decoder: Decoder, hidden: ir.Value) -> ir.Value:
    head, embedding = (nodes.stored[f"{module}.weight"] for module in (decoder.family.head, decoder.family.embedding))
    if head == embedding and not head.scheme:  # tied, and not quantized: the rows of the embedding are the columns of the head
        turned = nodes.op("Transpose", "head.turned", nodes.tensor(head.name), perm=[1, 0])
        logits = nodes.op("MatMul", decoder.family.head, hidden, turned)
    else:
        logits = nodes.linear([decoder.family.head], hidden, [decoder.vocabulary])[0]
    if decoder.softcap:
        cap = nodes.float("softcap", decoder.softcap)
        logits = nodes.op("Tanh", "logits.bent", nodes.op("Div", "logits.divided", logits, cap))
        logits = nodes.op("Mul", "logits.capped", logits, cap)
    if nodes.dtype != ir.DataType.FLOAT:
        logits = nodes.op("Cast", "logits", logits, to=ir.DataType.FLOAT)
    logits.name = "logits"
    logits.shape, logits.type = ir.Shape(("batch_size", "sequence_length", decoder.vocabulary)), ir.TensorType(ir.DataType.FLOAT)
    return logits


def spare(decoder: Decoder, stored: Mapping[str, Stored]) -> list[str]:
    """Parameters that the graph has no place for."""
    known = {f"{module}.{last}" for module in _modules(decoder) for last in ("weight", "bias")}
    return [name for name in stored if name not in known]


def _modules(decoder: Decoder) -> list[str]:
    family = decoder.family
    own = [family.before_attention, *family.inputs, *(family.normed_heads or ()), family.output, family.after_attention]
    own += [family.before_mlp, *family.up, family.down, family.after_mlp]
    blocks = [f"{family.blocks}.{i}.{module}" for i in range(len(decoder.layers)) for module in own if module]
    return [family.embedding, family.positions, *blocks, family.norm, family.head]
