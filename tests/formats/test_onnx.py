"""A linear layer as ONNX stores it: shapes, and what its own DequantizeLinear makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime import InferenceSession

from convert.algorithms import rtn
from formats import FORMATS, onnx
from formats.onnx_graph import DATA_TYPES
from formats.safetensors import TensorSpec
from formats.scheme import SCHEMES

HELD = [name for name, scheme in SCHEMES.items() if onnx.refusal(scheme, (128, 128), transposed=False) is None]


def test_which_schemes_are_held() -> None:
    assert HELD == [
        "int8-dynamic",
        "int8-static",
        "int8-weight-only",
        "int8-weight-only-g32",
        "int8-weight-only-g64",
        "int8-weight-only-g128",
        "fp8-static",
        "fp8-weight-only",
        "int8-lookup",
    ]
    assert "DynamicQuantizeLinear" in str(onnx.refusal(SCHEMES["fp8-dynamic"], (8, 8), transposed=False))
    assert "32 does not divide" in str(onnx.refusal(SCHEMES["int8-weight-only-g32"], (8, 40), transposed=False))


@pytest.mark.parametrize("shape", [(1, 128), (7, 128), (128, 384)])
@pytest.mark.parametrize("name", HELD)
def test_dequantize_linear_gives_what_the_codes_stand_for(name: str, shape: tuple[int, int]) -> None:
    """The reference evaluator is the oracle, on what encode() gives, zero rows too."""
    scheme = SCHEMES[name]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    quantized = rtn.quantize(weight.clone(), scheme.weight, scale_dtype=torch.bfloat16)
    spec = TensorSpec("m.weight", "BF16", shape)
    tensors = FORMATS["onnx"].encode("m.weight", quantized, scheme)
    specs = {item.name: item for item in FORMATS["onnx"].layer_tensors(spec, scheme)}
    stored = {key: value.reshape(specs[key].shape) for key, value in tensors.items()}
    assert {key: specs[key].shape for key in stored} == {key: tuple(value.shape) for key, value in stored.items()}
    columns = scheme.weight.tile.columns
    # One scale a channel: a column of what a product reads, a row of a table.
    channel = {"axis": 0 if scheme.lookup else 1}
    attributes = {"axis": 0, "block_size": columns} if columns else channel if scheme.weight.tile.rows else {}
    codes = stored["m.weight"].contiguous()
    proto = helper.make_tensor("c", DATA_TYPES[specs["m.weight"].dtype], codes.shape, codes.view(torch.uint8).numpy().tobytes(), raw=True)
    scale = helper.make_tensor(
        "s", TensorProto.FLOAT, specs["m.weight_scale"].shape, stored["m.weight_scale"].contiguous().numpy().tobytes(), raw=True
    )
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["c", "s"], ["y"], **attributes)],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, codes.shape)],
        [proto, scale],
    )
    (found,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)).run(None, {})
    assert np.array_equal(found if scheme.lookup else found.T, quantized.dequantize().numpy())
    assert torch.equal(FORMATS["onnx"].decode(spec, stored, scheme).dequantize(), quantized.dequantize())


@pytest.mark.parametrize("shape", [(1, 128), (7, 33), (5, 96)])
@pytest.mark.parametrize("name", ["int8-weight-only", "int8-weight-only-g32"])
def test_matmulnbits_multiplies_with_what_the_codes_stand_for(name: str, shape: tuple[int, int]) -> None:
    """ONNX Runtime is the oracle of its own operator, with float inputs; rows of zeros and blocks that are not full too."""
    scheme = SCHEMES[name]
    form = FORMATS["onnx-matmulnbits"]
    if form.refusal(scheme, shape, transposed=False):
        assert (name, shape) == ("int8-weight-only-g32", (7, 33))
        return
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0
    quantized = rtn.quantize(weight.clone(), scheme.weight, scale_dtype=torch.bfloat16)
    tensors = form.encode("m.weight", quantized, scheme)
    spec = TensorSpec("m.weight", "BF16", shape)
    assert {item.name: item.shape for item in form.layer_tensors(spec, scheme)} == {key: tuple(v.shape) for key, v in tensors.items()}
    assert torch.equal(form.decode(spec, tensors, scheme).dequantize(), quantized.dequantize())
    sizes = {"K": shape[1], "N": shape[0], "bits": 8, "block_size": 32, "accuracy_level": 1}
    node = helper.make_node("MatMulNBits", ["x", "c", "s"], ["y"], domain="com.microsoft", **sizes)
    values = [onnx_numpy(tensors["m.weight"], "c"), onnx_numpy(tensors["m.weight_scale"], "s")]
    ends = [helper.make_tensor_value_info(end, TensorProto.FLOAT, [None, size]) for end, size in (("x", shape[1]), ("y", shape[0]))]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], values)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    session = InferenceSession(helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString())
    (found,) = session.run(None, {"x": np.eye(shape[1], dtype=np.float32)})
    assert np.abs(found.T - quantized.dequantize().numpy()).max() < 1e-6


def onnx_numpy(value: torch.Tensor, name: str) -> TensorProto:
    return numpy_helper.from_array(value.contiguous().numpy(), name)


def test_a_static_input_has_one_scale() -> None:
    weight = TensorSpec("m.weight", "BF16", (4, 8))
    assert [item.name for item in onnx.layer_tensors(weight, SCHEMES["int8-static"])][-1] == "m.input_scale"
    assert onnx.constants(weight, SCHEMES["int8-static"], 127.0)["m.input_scale"].item() == 1.0
    assert onnx.constants(weight, SCHEMES["int8-weight-only"], None) == {}
