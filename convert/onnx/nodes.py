"""A graph in the making: its nodes, the tensors they read, and a linear layer by the scheme that it is stored in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from convert.onnx.stored import Stored
from formats.onnx_graph import DATA_TYPES, DOMAINS, Initializer, Pack

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The domain of ONNX Runtime's own operators.
ORT = DOMAINS[1]


def packs_of(modules: Sequence[str], stored: Mapping[str, Stored]) -> list[Pack]:
    weights = [stored[f"{module}.weight"] for module in modules]
    biases = [stored[f"{module}.bias"].name for module in modules if f"{module}.bias" in stored]
    scheme = weights[0].scheme
    if len(modules) == 1 or any(weight.scheme != scheme for weight in weights) or len(biases) not in (0, len(modules)):
        return []
    if scheme and (scheme.static or scheme.weight.tile.rows is None):
        return []  # a scale of its own for each product
    name, axis = packed_name(modules), 0 if weights[0].block_size else 1
    packs = [Pack(f"{name}.weight", tuple(weight.name for weight in weights), axis)]
    if scheme:
        packs.append(Pack(f"{name}.weight_scale", tuple(weight.scale for weight in weights), axis if scheme.weight.tile.columns else 0))
    return [*packs, *([Pack(f"{name}.bias", tuple(biases), 0)] if biases else [])]


def packed_name(modules: Sequence[str]) -> str:
    """``model.layers.0.self_attn.q_k_v_proj`` of ``q_proj``, ``k_proj`` and ``v_proj``."""
    parent, _, _ = modules[0].rpartition(".")
    last = [module.rpartition(".")[2] for module in modules]
    return f"{parent}.{'_'.join(name.removesuffix('_proj') for name in last)}_proj"


#: The largest code of a half. Seven bits, because ONNX Runtime adds pairs of products of unsigned and signed codes in 16 bits where a CPU
#: has no VNNI: 2 x (64 + 63) x 127 is within, twice a whole byte's would be cut off.
HALF = 63


class Nodes:
    """A graph in the making: nodes in their order, and the tensors they read. ``fused``: by ONNX Runtime's own operators where one does
    what would take several of the standard's. ``halves``: inputs of products of INT8 weights alone are two codes each."""

    def __init__(
        self,
        dtype: ir.DataType,
        stored: Mapping[str, Stored],
        initializers: Mapping[str, Initializer],
        *,
        fused: bool = False,
        halves: bool = False,
    ) -> None:
        self.dtype = dtype
        self.fused = fused
        self._halves = halves
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.stored = stored
        self._files = initializers
        self._constants: dict[str, ir.Value] = {}
        self._used: dict[str, ir.Value] = {}
        self._dynamic: dict[ir.Value, ir.Value] = {}
        self._halved: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[str | int]) -> ir.Value:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def op(self, kind: str, name: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The only output, called ``name``, of a new node."""
        return self.ops(kind, (name,), *inputs, domain=domain, **attributes)[0]

    def ops(self, kind: str, names: Sequence[str], *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> list[ir.Value]:
        outputs = [ir.Value(name=name) for name in names]
        self.nodes.append(ir.node(kind, inputs, attributes, domain=domain, outputs=outputs, name=f"{names[0]}/{kind}"))
        return outputs

    def constant(self, name: str, value: NDArray[Any] | np.generic) -> ir.Value:
        """A small tensor inside the graph; of one name there is one."""
        if name not in self._constants:
            array = np.asarray(value)
            tensor = ir.tensor(array, name=name)
            self._constants[name] = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        return self._constants[name]

    def integer(self, value: int) -> ir.Value:
        """A vector of one int64."""
        return self.constant(f"integer.{value}", np.array([value], dtype=np.int64))

    def number(self, value: int) -> ir.Value:
        """An int64 without an axis."""
        return self.constant(f"number.{value}", np.array(value, dtype=np.int64))

    def float(self, name: str, value: float) -> ir.Value:
        """A scalar of the graph's float dtype."""
        return self.constant(name, np.array(value, dtype=self.dtype.numpy()))

    def tensor(self, name: str) -> ir.Value:
        """A tensor of the data files."""
        if name not in self._used:
            item = self._files[name]
            dtype, shape = ir.DataType(DATA_TYPES[item.spec.dtype]), ir.Shape(item.spec.shape)
            location = item.file.rpartition("/")[2]
            data = ir.ExternalTensor(location, item.start, item.spec.size_bytes, dtype, shape=shape, name=name)
            self._used[name] = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=data)
        return self._used[name]

    def initializers(self) -> list[ir.Value]:
        return [*self._constants.values(), *self._used.values()]

    def parameter(self, name: str) -> ir.Value:
        """A parameter of the model that is no linear layer's weight."""
        return self.tensor(self.stored[name].name)

    def scale(self, name: str) -> ir.Value:
        """A scale, in the dtype of what it gives; a graph in float16 has scales that it can hold."""
        scale = self.tensor(name)
        return scale if self.dtype == ir.DataType.FLOAT else self.op("Cast", f"{name}.cast", scale, to=self.dtype)

    def linear(self, modules: Sequence[str], value: ir.Value, sizes: Sequence[int]) -> list[ir.Value]:
        """What layers of one input make of it, ``sizes`` features each; one module may make all of them."""
        product = self.side_by_side(modules, value)
        if product is None:
            return [self.linear([module], value, [size])[0] for module, size in zip(modules, sizes, strict=True)]
        if len(sizes) == 1:
            return [product]
        module = packed_name(modules) if len(modules) > 1 else modules[0]
        parts = self.constant(f"sizes.{'.'.join(map(str, sizes))}", np.array(sizes, dtype=np.int64))
        return self.ops("Split", [f"{module}.{i}" for i in range(len(sizes))], product, parts, axis=-1)

    def side_by_side(self, modules: Sequence[str], value: ir.Value) -> ir.Value | None:
        """What layers of one input make of it, one behind the other along the last axis; None where they are not stored as one."""
        if len(modules) > 1 and not packs_of(modules, self.stored):
            return None
        module = packed_name(modules) if len(modules) > 1 else modules[0]
        weight = self.stored[f"{modules[0]}.weight"]
        bias = self.stored.get(f"{modules[0]}.bias")
        if len(modules) > 1:
            weight = replace(weight, name=f"{module}.weight", scale=f"{module}.weight_scale")
            bias = Stored(f"{module}.bias") if bias else None
        product = self.product(module, weight, value)
        return self.op("Add", f"{module}.biased", product, self.tensor(bias.name)) if bias else product

    def lookup(self, module: str, table: Stored, ids: ir.Value) -> ir.Value:
        """Rows of a table of codes, each times its scale."""
        codes = self.op("Cast", f"{module}.floats", self.op("Gather", f"{module}.codes", self.tensor(table.name), ids), to=self.dtype)
        scales = self.op("Gather", f"{module}.scales", self.scale(table.scale), ids)
        return self.op("Mul", f"{module}.rows", codes, self.op("Unsqueeze", f"{module}.scales.column", scales, self.integer(-1)))

    def product(self, module: str, weight: Stored, value: ir.Value) -> ir.Value:
        scheme = weight.scheme
        if scheme is None:
            return self.op("MatMul", module, value, self.tensor(weight.name))
        if weight.block_size:
            sizes = {"K": weight.columns, "N": self._files[weight.name].spec.shape[0], "bits": 8, "block_size": weight.block_size}
            scales = self.scale(weight.scale)
            return self.op("MatMulNBits", module, value, self.tensor(weight.name), scales, domain=ORT, accuracy_level=4, **sizes)
        if self._halves and scheme.halvable:
            return self._product_of_halves(module, weight, value)
        columns = scheme.weight.tile.columns
        attributes: dict[str, Any] = {"axis": 0, "block_size": columns} if columns else {"axis": 1}
        if scheme.weight.tile.rows is None:
            attributes = {}
        plain = self.op("DequantizeLinear", f"{module}.dequantized", self.tensor(weight.name), self.scale(weight.scale), **attributes)
        return self.op("MatMul", module, self._quantized_input(module, weight, value), plain)

    def _quantized_input(self, module: str, weight: Stored, value: ir.Value) -> ir.Value:
        """The input as its codes have it: of dynamic inputs one scale and one zero point for all of it, as the operator chooses them."""
        activation = weight.scheme.activation if weight.scheme else None
        if activation is None:
            return value
        if activation.dynamic:
            if value not in self._dynamic:  # one for all layers that read it
                parts = [f"{module}.input.{part}" for part in ("codes", "scale", "zero")]
                self._dynamic[value] = self.op("DequantizeLinear", f"{module}.input", *self.ops("DynamicQuantizeLinear", parts, value))
            return self._dynamic[value]
        scale = self.scale(weight.input_scale)
        # The same steps, counted from 128: ONNX Runtime has fast kernels for unsigned inputs and signed weights, none for two signed ones.
        unsigned = activation.grid.kind == "int"
        dtype = np.dtype(np.uint8) if unsigned else ir.DataType(DATA_TYPES[activation.grid.dtype]).numpy()
        zero = self.constant(f"zero.{'U8' if unsigned else activation.grid.dtype}", np.array(128 if unsigned else 0, dtype=dtype))
        codes = self.op("QuantizeLinear", f"{module}.input.codes", value, scale, zero)
        return self.op("DequantizeLinear", f"{module}.input", codes, scale, zero)

    def _product_of_halves(self, module: str, weight: Stored, value: ir.Value) -> ir.Value:
        """An input x (..., in) whose largest magnitude along its last axis is m, times codes W (in, out) with scales s (out,), in INT8:
        c1 = round(63 x / m), c2 = round(126 x 63 (x / m - c1 / 63)), and y = m s (c1 W / 63 + c2 W / (126 x 63)).

        Both are rows of one product, so weights are read once; what is left of x is 14 bits. Sums are exact: 64 x 127 x in stays within
        32 bits up to 264,000 input features."""
        codes, worth = self._halves_of(module, value)
        sums = self.op("MatMulInteger", f"{module}.sums", codes, self.tensor(weight.name), self._half_zero())
        floats = self.op("Cast", f"{module}.halves", sums, to=ir.DataType.FLOAT)
        row = self.op("Squeeze", f"{module}.row", self.op("MatMul", f"{module}.together", worth, floats), self.integer(-2))
        whole = self.dtype == ir.DataType.FLOAT
        product = self.op("Mul", module if whole else f"{module}.scaled", row, self.tensor(weight.scale))
        return product if whole else self.op("Cast", module, product, to=self.dtype)

    def _halves_of(self, module: str, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Codes (..., 2, in) of an input (..., in), uint8 around 64, and what one of each is worth, float32 (..., 1, 2)."""
        if value not in self._halved:
            name, step, single = f"{module}.input", 1 / HALF, np.float32
            floats = value if self.dtype == ir.DataType.FLOAT else self.op("Cast", f"{name}.float", value, to=ir.DataType.FLOAT)
            row = self.op("Unsqueeze", f"{name}.row", floats, self.integer(-2))
            largest = self.op("ReduceMax", f"{name}.largest", self.op("Abs", f"{name}.magnitudes", row), self.integer(-1), keepdims=1)
            # A row of zeros, as padding may have, stays zeros.
            largest = self.op("Max", f"{name}.unit", largest, self.constant("half.least", single(np.finfo(np.float32).tiny)))
            share = self.op("Div", f"{name}.share", row, largest)
            coarse, fine = self.constant("half.coarse", single(step)), self.constant("half.fine", single(step / (2 * HALF)))
            first = self.op("QuantizeLinear", f"{name}.first", share, coarse, self._half_zero())
            rest = self.op("Sub", f"{name}.rest", share, self.op("DequantizeLinear", f"{name}.near", first, coarse, self._half_zero()))
            second = self.op("QuantizeLinear", f"{name}.second", rest, fine, self._half_zero())
            codes = self.op("Concat", f"{name}.codes", first, second, axis=-2)
            steps = self.constant("half.steps", np.array([[step, step / (2 * HALF)]], dtype=np.float32))
            self._halved[value] = codes, self.op("Mul", f"{name}.worth", largest, steps)
        return self._halved[value]

    def _half_zero(self) -> ir.Value:
        return self.constant("half.zero", np.array(HALF + 1, dtype=np.uint8))
