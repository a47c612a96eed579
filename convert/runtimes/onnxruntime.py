"""Loads the graph of a folder in ONNX Runtime as a user would and writes down what it computes.

Run as ``python -m convert.runtimes.onnxruntime REQUEST ANSWER``, both JSON files, or as a file by the interpreter of an environment with
onnxruntime-gpu. This module imports nothing of this package, so that any interpreter with onnxruntime, onnx and NumPy can run it.

Request and answer are those of :mod:`convert.runtimes.transformers`; beside them the request has ``mode`` (``as exported``: no graph
optimisation, and ONNX's checker has to accept it; ``as deployed``: the session's defaults; ``on CUDA``: those, and the graph has to run
on the GPU, where inputs and outputs are bound and the cache stays), and the answer ``session`` (providers and
options, for people), ``kernels`` (how often each operator that reads weights ran, for one token) and ``checks`` (name -> [value, limit]:
decoding from the cache against one pass, and a batch of two with padding against each alone, on the left of what predicts tokens and on the
right of what does not, or of what an encoder reads: the largest difference of logits, or of hidden states, over their largest magnitude; on
CUDA, products that ran beside the GPU).

Exit code 3: there is no CUDA to run it on.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

#: Operators that a quantized weight may end up in; those of activations alone are left out.
_PRODUCTS = ("MatMul", "Gemm", "DequantizeLinear", "Dequantize", "QLinear", "QGemm")
#: How far logits of the same tokens may be apart. Deployed, products of quantized weights round their inputs to INT8 on the way
#: (accuracy_level 4), and a last place in which one token and many differ moves codes: 0.035 was seen with the sample.
#: On CUDA, products of floats are in TF32, whose mantissa of ten bits is cut anew for each shape of a product.
_AGREEMENT = {"as exported": 1e-3, "as deployed": 1e-1, "on CUDA": 1e-1}
#: Where inputs are two codes each, a last place in which one token and many differ moves one of 14 bits: 0.0017 was seen with the sample.
_HALVES_AGREEMENT = 1e-2
#: With inputs that are quantized as they come, one scale for all tokens of a call, what else is in the call does change a token.
_DYNAMIC_AGREEMENT = 0.5


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    import numpy as np

    request = json.loads(Path(request_path).read_text())
    if request["mode"] == "on CUDA":
        _require_cuda()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="octavo-ort-") as scratch:
        session = open_session(Path(request["artifact"]), request, Path(scratch))
        loaded = time.perf_counter()
        tokens = np.load(request["tokens"])
        kernels = session.kernels(tokens[:1] if session.sees else tokens[:1, :1])
    seconds, vocabulary = 0.0, 0
    with Path(request["logits"]).open("wb") as stream:
        for sequence in tokens:
            began = time.perf_counter()
            logits, _ = session.run(sequence[None])
            seconds += time.perf_counter() - began
            vocabulary = logits.shape[-1]
            logits[0].astype("<f4").tofile(stream)
    generated: list[int] = []
    answers: list[list[int]] = []
    decode_seconds = 0.0
    if session.predicts:
        began = time.perf_counter()
        generated = session.generate(request["prompt"], request["new_tokens"], session.ends)
        decode_seconds = time.perf_counter() - began
        answers = [session.generate(prompt, request["answer_tokens"], session.ends) for prompt in request.get("prompts", [])]
    agreement = session.agreement(request["mode"])
    found = session.agreements(tokens[0] if session.sees else tokens[0][:24])
    checks = {name: [value, agreement] for name, value in found.items()}
    if request["mode"] == "on CUDA":
        checks["products that ran beside the GPU"] = [session.beside, 0.0]
    answer = {
        "module_dtypes": session.module_dtypes(),
        "dequantized": False,
        "weight_bytes": session.weight_bytes,
        "peak_bytes": peak_bytes(),
        "load_seconds": loaded - started,
        "prefill_tokens_per_second": (len(tokens) if session.sees else tokens.size) / seconds,
        "decode_tokens_per_second": len(generated) / decode_seconds if session.predicts else 0.0,
        "generated": generated,
        "answers": answers,
        "vocabulary": vocabulary,
        "predicts": session.predicts,
        "device": session.device,
        "versions": versions("onnxruntime-gpu" if request["mode"] == "on CUDA" else "onnxruntime"),
        "session": session.description,
        "kernels": kernels,
        "checks": checks,
    }
    Path(answer_path).write_text(json.dumps(answer))


def _require_cuda() -> None:
    """Ends the program where ONNX Runtime has no CUDA: it would run on the CPU and only warn of it."""
    import onnxruntime

    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # of NVIDIA's packages, which lie where no loader looks
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        print(f"onnxruntime {onnxruntime.__version__} has no CUDA; it comes with the package onnxruntime-gpu", file=sys.stderr)
        sys.exit(3)


def open_session(folder: Path, request: dict[str, Any], scratch: Path) -> Session | Pair:
    """The graph of a folder, or the two of an encoder-decoder."""
    graphs = sorted(folder.glob("onnx/*.onnx")) or sorted(folder.glob("*.onnx"))
    if len(graphs) == 2 and graphs[1].name.startswith("encoder_model"):
        return Pair(*(Session(folder, request, scratch, graph) for graph in reversed(graphs)))
    return Session(folder, request, scratch, graphs[0])


class Session:
    """A graph, its names and the shape of an empty cache; ``predicts``: it has one; ``sees``: it reads pictures. ``beside``: how many
    products of the profile ran on no GPU."""

    def __init__(self, folder: Path, request: dict[str, Any], scratch: Path, graph: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = request["threads"]
        options.enable_profiling = True
        options.profile_file_prefix = str(scratch / graph.name)
        options.log_severity_level = 3
        if request["mode"] == "as exported":
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        providers = ["CUDAExecutionProvider"] if request["mode"] == "on CUDA" else []
        self._session = onnxruntime.InferenceSession(str(graph), options, providers=[*providers, "CPUExecutionProvider"])
        if providers and providers[0] not in self._session.get_providers():
            print("onnxruntime could not start CUDA and would run on the CPU; a driver or a library is missing", file=sys.stderr)
            sys.exit(3)
        self.beside = 0
        self._graph = graph
        if request["mode"] == "as exported" and not self._graph.is_symlink():  # it refuses links, which Hub clients make
            self._require_valid()
        self._cache = [item for item in self._session.get_inputs() if item.name.startswith("past_key_values.")]
        self.predicts = bool(self._cache)
        self._inputs = {item.name for item in self._session.get_inputs()}
        self.sees = "pixel_values" in self._inputs
        given = [item.name for item in self._session.get_outputs()]
        # What is compared comes first; of a model that predicts no tokens it is what the source's own program takes.
        first = "last_hidden_state" if "last_hidden_state" in given and not self.predicts else "logits"
        self._outputs = [first, *(name for name in given if name != first and self.predicts)]
        self.device = "cuda" if "CUDAExecutionProvider" in self._session.get_providers() else "cpu"
        optimised = "no graph optimisation" if request["mode"] == "as exported" else "all graph optimisations"
        ran = self._session.get_providers()
        options_said = [optimised, f"{request['threads']} threads"]
        if providers:
            options_said.append("use_tf32")  # an option of the provider, on unless told otherwise
        self.description = f"{', '.join(ran)}; {', '.join(options_said)}"
        files = [folder / name for name in ("config.json", "generation_config.json") if (folder / name).exists()]
        self.config = {key: value for file in files for key, value in json.loads(file.read_text()).items()}
        ends = self.config.get("eos_token_id") or []
        self.ends = frozenset(ends if isinstance(ends, list) else [ends])

    def run(
        self,
        ids: np.ndarray,
        past: list[Any] | None = None,
        mask: np.ndarray | None = None,
        read: dict[str, np.ndarray] | None = None,
    ) -> tuple[np.ndarray, list[Any]]:
        """Logits, or hidden states, (batch, length, vocabulary) of int64 ``ids`` (batch, length) behind ``past``, and the cache. The cache
        stays where the session keeps it; ``mask`` is all ones unless given; ``read``: what a decoder is given of what an encoder read. In
        the place of ``ids`` may be pictures (batch, channels, height, width), of which there may be logits of classes (batch, classes)."""
        import numpy as np
        import onnxruntime

        batch, length = ids.shape[:2]
        before = past[0].shape()[2] if past else 0
        binding = self._session.io_binding()
        if self.sees:
            binding.bind_cpu_input("pixel_values", np.ascontiguousarray(ids, self.floats))
        else:
            binding.bind_cpu_input("input_ids", ids.astype(np.int64))
        beside = {
            "attention_mask": np.ones((batch, before + length), np.int64) if mask is None else mask.astype(np.int64),
            "token_type_ids": np.zeros((batch, length), np.int64),
            "use_cache_branch": np.array([past is not None]),
            **(read or {}),
        }
        for name in beside.keys() & self._inputs:
            binding.bind_cpu_input(name, beside[name])
        for i, item in enumerate(self._cache):
            value = past[i] if past else onnxruntime.OrtValue.ortvalue_from_numpy(self._empty(item, batch), self.device)
            binding.bind_ortvalue_input(item.name, value)
        for name in self._outputs:
            binding.bind_output(name, "cpu" if name == self._outputs[0] else self.device)
        self._session.run_with_iobinding(binding)
        outputs = binding.get_outputs()
        return outputs[0].numpy(), list(outputs[1:])

    def _empty(self, item: Any, batch: int) -> np.ndarray:
        import numpy as np

        shape = (batch, item.shape[1], 0, item.shape[3])
        return np.zeros(shape, np.float16 if item.type == "tensor(float16)" else np.float32)

    def generate(self, prompt: list[int], count: int, ends: frozenset[int] = frozenset()) -> list[int]:
        """The most likely continuation, at most ``count`` tokens, up to and with one of ``ends``."""
        import numpy as np

        logits, cache = self.run(np.array([prompt]))
        found = [int(logits[0, -1].argmax())]
        while len(found) < count and found[-1] not in ends:
            logits, cache = self.run(np.array([found[-1:]]), cache)
            found.append(int(logits[0, -1].argmax()))
        return found

    def agreements(self, tokens: np.ndarray) -> dict[str, float]:
        """Differences that should be none, as shares of the largest logit or hidden state."""
        import numpy as np

        whole, _ = self.run(tokens[None])
        largest = np.abs(whole).max()
        if self.sees:
            mirrored = tokens[..., ::-1]
            together, _ = self.run(np.stack([tokens, mirrored]))
            alone, _ = self.run(mirrored[None])
            return {"a picture beside it changes nothing": float(np.abs(together - np.concatenate([whole, alone])).max() / largest)}
        found = {}
        half = len(tokens) // 2
        if self.predicts:
            _, cache = self.run(tokens[None, :half])
            stepped = []
            for token in tokens[half:]:
                logits, cache = self.run(np.array([[token]]), cache)
                stepped.append(logits[0, 0])
            found["decoding from the cache equals one pass"] = float(np.abs(np.stack(stepped) - whole[0, half:]).max() / largest)
        short = tokens[: half + 1]
        begin = len(tokens) - len(short) if self.predicts else 0
        padded = np.stack([tokens, np.zeros_like(tokens)])
        mask = np.stack([np.ones_like(tokens), np.zeros_like(tokens)])
        padded[1, begin : begin + len(short)], mask[1, begin : begin + len(short)] = short, 1
        together, _ = self.run(padded, mask=mask)
        alone, _ = self.run(short[None])
        padding = max(np.abs(together[0] - whole[0]).max(), np.abs(together[1, begin : begin + len(short)] - alone[0]).max())
        found[f"padding on the {'left' if self.predicts else 'right'} changes nothing"] = float(padding / largest)
        return found

    def kernels(self, ids: np.ndarray, read: dict[str, np.ndarray] | None = None) -> dict[str, int]:
        """How often operators that may hold weights ran for ``ids``; ends the profile."""
        self.run(ids, read=read)
        events = json.loads(Path(self._session.end_profiling()).read_text())
        ran = [event["args"] for event in events if event.get("cat") == "Node" and event["name"].endswith("kernel_time")]
        products = [item for item in ran if any(product in item["op_name"] for product in _PRODUCTS)]
        self.beside = sum(item.get("provider") != "CUDAExecutionProvider" for item in products)
        return dict(Counter(item["op_name"] for item in products))

    @cached_property
    def _model(self) -> Any:
        import onnx

        return onnx.load_model(self._graph, load_external_data=False)

    @property
    def floats(self) -> type:
        """The dtype of what is given to it and is no number of a token."""
        import numpy as np

        return np.float16 if any(item.type == "tensor(float16)" for item in self._session.get_inputs()) else np.float32

    def _require_valid(self) -> None:
        """Raises what ONNX's own checker has to say against the graph."""
        import onnx

        onnx.checker.check_model(str(self._graph))

    def agreement(self, mode: str) -> float:
        """How far logits of the same tokens may be apart, as a share of the largest."""
        operators = {node.op_type for node in self._model.graph.node}
        if "DynamicQuantizeLinear" in operators:
            return _DYNAMIC_AGREEMENT
        found = _AGREEMENT["as deployed" if "MatMulNBits" in operators else mode]
        return max(found, _HALVES_AGREEMENT) if "MatMulInteger" in operators else found

    def module_dtypes(self) -> dict[str, str]:
        """By the name of a tensor without its last part, the dtype in which the graph holds it."""
        kinds = {1: "float32", 3: "int8", 2: "uint8", 10: "float16", 17: "float8_e4m3fn"}
        model = self._model
        text = next((item.value for item in model.metadata_props if item.key == "octavo"), "{}")
        packs = json.loads(text).get("packs", {})
        found = {}
        for tensor in model.graph.initializer:
            for name in packs.get(tensor.name, {}).get("members", [tensor.name]):
                if name.endswith(".weight"):
                    found[name.removesuffix(".weight")] = kinds.get(tensor.data_type, str(tensor.data_type))
        return found

    @property
    def weight_bytes(self) -> int:
        """What the data files hold."""
        return sum(path.stat().st_size for path in self._graph.parent.glob(f"{self._graph.name}_data*"))


class Pair:
    """An encoder-decoder's two graphs, as :class:`Session` is one: what it is given it reads, and is told to write but for the first
    token, in whose place it begins."""

    predicts, sees = True, False

    def __init__(self, encoder: Session, decoder: Session) -> None:
        self._encoder, self._decoder = encoder, decoder
        self.ends, self.device = decoder.ends, decoder.device
        self.description = decoder.description
        self._start = int(decoder.config["decoder_start_token_id"])

    def _read(self, ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
        import numpy as np

        mask = np.ones(ids.shape, np.int64) if mask is None else mask
        states, _ = self._encoder.run(ids, mask=mask)
        return {"encoder_hidden_states": states.astype(self._decoder.floats), "encoder_attention_mask": mask.astype(np.int64)}

    def _begun(self, ids: np.ndarray) -> np.ndarray:
        written = ids.copy()
        written[:, 0] = self._start
        return written

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> tuple[np.ndarray, list[Any]]:
        """Logits (batch, length, vocabulary) of what is written behind int64 ``ids`` (batch, length), which were read under ``mask``."""
        return self._decoder.run(self._begun(ids), read=self._read(ids, mask))

    def generate(self, prompt: list[int], count: int, ends: frozenset[int] = frozenset()) -> list[int]:
        """What is most likely written of a prompt, at most ``count`` tokens, up to and with one of ``ends``."""
        import numpy as np

        read = self._read(np.array([prompt]))
        found: list[int] = []
        cache, last = None, self._start
        while len(found) < count and (not found or found[-1] not in ends):
            logits, cache = self._decoder.run(np.array([[last]]), cache, read=read)
            last = int(logits[0, -1].argmax())
            found.append(last)
        return found

    def agreements(self, tokens: np.ndarray) -> dict[str, float]:
        """Differences that should be none, as shares of the largest logit. Of the steps, all but the first are given no states."""
        import numpy as np

        ids = tokens[None]
        whole, _ = self.run(ids)
        largest, read = np.abs(whole).max(), self._read(ids)
        nothing = {**read, "encoder_hidden_states": np.zeros_like(read["encoder_hidden_states"])}
        stepped, cache = [], None
        for token in self._begun(ids)[0]:
            logits, cache = self._decoder.run(np.array([[token]]), cache, read=nothing if cache else read)
            stepped.append(logits[0, 0])
        half = len(tokens) // 2 + 1
        padded, mask = np.stack([tokens, np.zeros_like(tokens)]), np.ones((2, len(tokens)), np.int64)
        padded[1, :half], mask[1, half:] = tokens[:half], 0
        together, _ = self.run(padded, mask=mask)
        alone, _ = self.run(ids[:, :half])
        padding = max(np.abs(together[0] - whole[0]).max(), np.abs(together[1, :half] - alone[0]).max())
        return {
            "decoding from the cache equals one pass": float(np.abs(np.stack(stepped) - whole[0]).max() / largest),
            "padding of what is read, on the right, changes nothing": float(padding / largest),
        }

    def kernels(self, ids: np.ndarray) -> dict[str, int]:
        """How often operators that may hold weights ran to read ``ids`` and write as many; ends the profiles."""
        ran = Counter(self._encoder.kernels(ids))
        return dict(ran + Counter(self._decoder.kernels(self._begun(ids), read=self._read(ids))))

    @property
    def beside(self) -> int:
        return self._encoder.beside + self._decoder.beside

    def agreement(self, mode: str) -> float:
        return max(self._encoder.agreement(mode), self._decoder.agreement(mode))

    def module_dtypes(self) -> dict[str, str]:
        return {**self._encoder.module_dtypes(), **self._decoder.module_dtypes()}

    @property
    def weight_bytes(self) -> int:
        """What the data files of both hold."""
        return self._encoder.weight_bytes + self._decoder.weight_bytes


def versions(distribution: str) -> dict[str, str]:
    """Of what ran; the package with CUDA has another name."""
    from importlib.metadata import version

    return {name: version(name) for name in (distribution, "onnx")}


def peak_bytes() -> int:
    """The largest resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
