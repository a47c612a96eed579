"""Loads a folder in onnxruntime-genai as a user would and writes down what it computes.

Run as a file, ``python -I convert/runtimes/onnxruntime_genai.py REQUEST ANSWER``, by the interpreter of an environment that has it. It
imports nothing of this package.

Request and answer are those of :mod:`convert.runtimes.transformers`; ``module_dtypes`` is not answered, because a session does not say in
what it holds its weights. What it says is which kernels ran, ``kernels`` (operator that reads weights -> how often it ran for one token),
from its own profile: an 8-bit weight is in ``MatMulNBits`` or an integer product, one that is widened first in ``DequantizeLinear``. The
request also has ``text``: ``checks`` says what share of the prompt's ids the runtime's own tokenizer gives otherwise.

Exit code 3: it cannot be imported.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

#: Operators that a quantized weight may end up in; those of activations alone are left out.
_PRODUCTS = ("MatMul", "Gemm", "DequantizeLinear", "QGemm")


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    try:
        import onnxruntime_genai  # noqa: F401
    except ImportError as error:
        print(f"onnxruntime-genai cannot be imported:\n{error}", file=sys.stderr)
        sys.exit(3)
    request = json.loads(Path(request_path).read_text())
    try:
        answer = _answer(request)
    except Exception as error:  # noqa: BLE001  it raises anything; the end of the output must say what it was
        traceback.print_exc()
        print(
            f"onnxruntime-genai {version('onnxruntime-genai')} raised\n{type(error).__name__}: {' '.join(str(error).split())[:480]}",
            file=sys.stderr,
        )
        sys.exit(1)
    Path(answer_path).write_text(json.dumps(answer))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    tokens = np.load(request["tokens"])
    # A profile cannot be ended while its session lives, and would slow down what is timed: so it has a session of its own.
    kernels = _kernels(request, tokens[0, :1])
    started = time.perf_counter()
    model = _load(request)
    loaded = time.perf_counter()
    seconds, vocabulary = 0.0, 0
    with Path(request["logits"]).open("wb") as stream:
        for sequence in tokens:
            began = time.perf_counter()
            generator = _generator(model, len(sequence) + 1)
            generator.append_tokens(sequence.astype(np.int32))
            logits = generator.get_output("logits")[0]
            seconds += time.perf_counter() - began
            if len(logits) != len(sequence):
                raise ValueError(f"{len(logits)} rows of logits for {len(sequence)} tokens")
            vocabulary = logits.shape[-1]
            logits.astype("<f4").tofile(stream)
    began = time.perf_counter()
    generated = _continue(model, request["prompt"], request["new_tokens"])
    decode_seconds = time.perf_counter() - began
    return {
        "weight_bytes": _weight_bytes(Path(request["artifact"])),
        "peak_bytes": peak_bytes(),
        "load_seconds": loaded - started,
        "prefill_tokens_per_second": tokens.size / seconds,
        "decode_tokens_per_second": len(generated) / decode_seconds,
        "generated": generated,
        "answers": [_continue(model, prompt, request["answer_tokens"]) for prompt in request.get("prompts", [])],
        "vocabulary": vocabulary,
        "predicts": True,
        "device": "cpu",
        "versions": {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")},
        "kernels": kernels,
        "checks": {"prompt tokenized otherwise than by transformers": [_otherwise(model, request), 0.0]},
    }


def _load(request: dict[str, Any], **options: Any) -> Any:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(request["artifact"])
    session = {"intra_op_num_threads": request["threads"], **options}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    return onnxruntime_genai.Model(config)


def _continue(model: Any, prompt: list[int], count: int) -> list[int]:
    import numpy as np

    generator = _generator(model, len(prompt) + count)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(prompt) :]]


def _generator(model: Any, length: int) -> Any:
    """One that decodes greedily, up to ``length`` tokens with the prompt."""
    import onnxruntime_genai

    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=0, do_sample=False, repetition_penalty=1.0)
    return onnxruntime_genai.Generator(model, parameters)


def _kernels(request: dict[str, Any], token: Any) -> dict[str, int]:
    import numpy as np

    with tempfile.TemporaryDirectory(prefix="octavo-genai-") as folder:
        model = _load(request, enable_profiling=f"{folder}/profile")
        generator = _generator(model, 2)
        generator.append_tokens(token.astype(np.int32))
        del generator, model  # its profile is written when a session ends
        events = [event for path in Path(folder).iterdir() for event in json.loads(path.read_text())]
    ran = [event["args"]["op_name"] for event in events if event.get("cat") == "Node" and event["name"].endswith("kernel_time")]
    return dict(Counter(name for name in ran if any(product in name for product in _PRODUCTS)))


def _otherwise(model: Any, request: dict[str, Any]) -> float:
    import onnxruntime_genai

    found = [int(token) for token in onnxruntime_genai.Tokenizer(model).encode(request["text"])]
    expected: list[int] = request["prompt"]
    differ = sum(a != b for a, b in zip(found, expected, strict=False)) + abs(len(found) - len(expected))
    return differ / len(expected)


def _weight_bytes(folder: Path) -> int:
    """What the files beside the graph hold."""
    graph = folder / json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["filename"]
    return sum(path.stat().st_size for path in graph.parent.glob(f"{graph.name}?data*"))


def peak_bytes() -> int:
    """The largest resident memory of this process."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
