"""Loads the graph of a folder in OpenVINO as a user would and writes down what it computes.

Run as a file, ``python -I convert/runtimes/openvino.py REQUEST ANSWER``, by the interpreter of an environment that has OpenVINO. It
imports nothing of this package, and ``-I`` keeps its own folder off the path, where ``openvino`` is the name of this program.

Request and answer are those of :mod:`convert.runtimes.transformers`. ``module_dtypes`` is what the compiled model multiplies with: the
dtype of each product's second input in the graph that OpenVINO says it runs. ``kernels`` counts the kinds of layers among those products,
``session`` is the device and the hint. OpenVINO computes in bfloat16 by default where the CPU can; float32 is asked for, so that what is
measured is the artifact.

Exit code 3: it cannot be imported.
"""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PRODUCTS = ("FullyConnected", "MatMul", "Gemm")
_DTYPES = {"i8": "int8", "u8": "uint8", "f32": "float32", "f16": "float16", "bf16": "bfloat16", "f8e4m3": "float8_e4m3fn"}


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    try:
        import openvino  # noqa: F401
    except ImportError as error:
        print(f"OpenVINO cannot be imported:\n{error}", file=sys.stderr)
        sys.exit(3)
    request = json.loads(Path(request_path).read_text())
    try:
        answer = _answer(request)
    except Exception as error:  # noqa: BLE001  it raises anything; the end of the output must say what it was
        traceback.print_exc()
        print(f"OpenVINO {version('openvino')} raised\n{type(error).__name__}: {' '.join(str(error).split())[:480]}", file=sys.stderr)
        sys.exit(1)
    Path(answer_path).write_text(json.dumps(answer))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    folder = Path(request["artifact"])
    started = time.perf_counter()
    decoder = Decoder(folder, threads=request["threads"])
    loaded = time.perf_counter()
    tokens = np.load(request["tokens"])
    seconds, vocabulary = 0.0, 0
    with Path(request["logits"]).open("wb") as stream:
        for sequence in tokens:
            began = time.perf_counter()
            decoder.forget()
            logits = decoder.run(sequence)
            seconds += time.perf_counter() - began
            vocabulary = logits.shape[-1]
            logits.astype("<f4").tofile(stream)
    began = time.perf_counter()
    generated = decoder.generate(request["prompt"], request["new_tokens"])
    decode_seconds = time.perf_counter() - began
    answers = [decoder.generate(prompt, request["answer_tokens"]) for prompt in request.get("prompts", [])]
    kernels, module_dtypes = decoder.kernels(), decoder.module_dtypes()
    return {
        "module_dtypes": module_dtypes,
        "dequantized": set(module_dtypes.values()) <= {"float32", "float16", "bfloat16"},
        "weight_bytes": sum(path.stat().st_size for path in decoder.graph.parent.glob(f"{decoder.graph.name}?data*")),
        "peak_bytes": peak_bytes(),
        "load_seconds": loaded - started,
        "prefill_tokens_per_second": tokens.size / seconds,
        "decode_tokens_per_second": len(generated) / decode_seconds,
        "generated": generated,
        "answers": answers,
        "vocabulary": vocabulary,
        "predicts": True,
        "device": "cpu",
        "versions": {"openvino": version("openvino")},
        "session": f"CPU; INFERENCE_PRECISION_HINT f32, {request['threads']} threads",
        "kernels": kernels,
    }


@dataclass(frozen=True)
class _Product:
    """``dtype`` and ``shape`` (out, in) are its weight's; ``names``: of the nodes in the graph that it came from, where they are known."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    names: tuple[str, ...]


class Decoder:
    """A graph with a cache of keys and values, compiled, and the cache of one sequence."""

    def __init__(self, folder: Path, *, threads: int) -> None:
        import openvino

        self.graph = next(iter(sorted(folder.glob("onnx/*.onnx")) or sorted(folder.glob("*.onnx"))))
        core = openvino.Core()
        self._model = core.read_model(str(self.graph))
        self._compiled = core.compile_model(self._model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads})
        self._request = self._compiled.create_infer_request()
        self._cache = [item for item in self._compiled.inputs if item.any_name.startswith("past_key_values.")]
        settings = folder / "generation_config.json"
        ends = json.loads(settings.read_text()).get("eos_token_id", []) if settings.exists() else []
        self._ends = frozenset(ends if isinstance(ends, list) else [ends])
        self.forget()

    def forget(self) -> None:
        """Begins a new sequence."""
        import openvino

        self._length = 0
        self._past = {}
        for item in self._cache:
            _, heads, _, size = item.partial_shape
            self._past[item.any_name] = openvino.Tensor(item.element_type, openvino.Shape([1, heads.get_length(), 0, size.get_length()]))

    def run(self, ids: Any) -> Any:
        """Float32 logits (length, vocabulary) of int64 ``ids`` (length) behind what was run before."""
        import numpy as np
        import openvino

        self._length += len(ids)
        feeds = {"input_ids": np.asarray(ids, np.int64)[None], "attention_mask": np.ones((1, self._length), np.int64), **self._past}
        self._request.infer({name: openvino.Tensor(value) if isinstance(value, np.ndarray) else value for name, value in feeds.items()})
        for name in self._past:
            present = self._request.get_tensor(name.replace("past_key_values.", "present."))
            self._past[name] = openvino.Tensor(np.array(present.data))  # the request will write over its own
        return np.array(self._request.get_tensor("logits").data[0], np.float32)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """The most likely continuation, at most ``count`` tokens, up to and with one that ends it."""
        self.forget()
        found = [int(self.run(prompt)[-1].argmax())]
        while len(found) < count and found[-1] not in self._ends:
            found.append(int(self.run(found[-1:])[-1].argmax()))
        return found

    def kernels(self) -> dict[str, int]:
        """Kind of layer, and the dtype of its weight -> how many. With static inputs there may be more than products in the graph: OpenVINO
        repeats some with what follows fused into them."""
        return dict(Counter(f"{product.kind} {product.dtype}" for product in self._products()))

    def module_dtypes(self) -> dict[str, str]:
        """By the name of a weight in the graph, or of those that were packed into it, the dtype that is multiplied.

        Products keep the names of what they came from. Of some that OpenVINO names anew only the shape is left: a weight that no name leads
        to has the dtype of the unnamed products of its shape, where they all have the same.
        """
        products = list(self._products())
        named = {name: product for product in products for name in product.names}
        weights = {}
        for constant in self._model.get_ops():
            name = constant.get_friendly_name()
            if constant.get_type_name() != "Constant" or not name.endswith(".weight") or len(constant.get_output_shape(0)) < 2:
                continue  # a norm is no product
            if origins := _products_of(constant):
                weights[name] = (tuple(constant.get_output_shape(0)), [named[origin] for origin in origins if origin in named])
        claimed = {id(product) for _, found in weights.values() for product in found}
        free = [product for product in products if id(product) not in claimed]
        packs = self._packs()
        dtypes = {}
        for name, (shape, found) in weights.items():
            kinds = {product.dtype for product in found or free if found or math.prod(product.shape) == math.prod(shape)}
            for member in packs.get(name, {}).get("members", [name]) if len(kinds) == 1 else ():
                dtypes[member.removesuffix(".weight")] = next(iter(kinds))
        return dtypes

    def _products(self) -> Iterator[_Product]:
        """Every product with a weight in the compiled model."""
        for operation in self._compiled.get_runtime_model().get_ops():
            facts = {name: value.value for name, value in operation.get_rt_info().items()}
            if facts.get("layerType") in _PRODUCTS and len(operation.input(1).get_partial_shape()) == 2:
                dtype = operation.input(1).get_element_type().get_type_name()
                # What multiplies by the scales of input and weight is fused into the product, and gives it its name.
                names = [name.removesuffix("/DequantizationMultiply") for name in str(facts["originalLayersNames"]).split(",")]
                shape = tuple(operation.input(1).get_partial_shape().to_shape())
                yield _Product(str(facts["layerType"]), _DTYPES.get(dtype, dtype), shape, tuple(names))

    def _packs(self) -> dict[str, Any]:
        """What the graph's metadata says of weights that stand together."""
        try:
            text = self._model.get_rt_info(["framework", "octavo"]).value
        except RuntimeError:
            return {}
        return dict(json.loads(text).get("packs", {}))


def _products_of(constant: Any) -> list[str]:
    """Names of the products that a constant reaches through what decodes it."""
    reached, ahead, seen = [], [constant], set()
    while ahead:
        node = ahead.pop()
        for target in (target for output in node.outputs() for target in output.get_target_inputs()):
            consumer = target.get_node()
            name = consumer.get_friendly_name()
            if name in seen:
                continue
            seen.add(name)
            if consumer.get_type_name() == "MatMul":
                reached.append(name)
            elif consumer.get_type_name() in ("Convert", "Multiply", "Subtract", "Reshape", "Transpose"):
                ahead.append(consumer)
    return reached


def peak_bytes() -> int:
    """The largest resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
