"""Loads a model folder in transformers as a user would and writes down what it computes.

Run as ``python -m convert.runtimes.transformers REQUEST ANSWER``, both JSON files. This module imports nothing of this package, so that
any interpreter with transformers can run it.

Request: ``artifact`` (folder), ``tokens`` (.npy, int64 (sequences, length), or pictures, float32 (pictures, channels, height, width)),
``logits`` (file to write: float32 (sequences, length, vocabulary), raw; of a model that predicts no tokens its last hidden states, or
whatever logits it has), ``prompt`` (token ids),
``new_tokens``, ``dtype`` (``auto`` or a torch dtype), ``device``, ``threads``, ``trust_remote_code``; and, if asked, ``prompts`` (token ids
of each) with ``answer_tokens``.

Answer: ``module_dtypes`` (module -> dtype of its weight as loaded, before anything ran), ``dequantized`` (whether loading turned codes into
floats), ``weight_bytes``, ``peak_bytes``, ``load_seconds``, ``prefill_tokens_per_second`` (of pictures, how many a second),
``decode_tokens_per_second``, ``generated``
(token ids, none where it predicts none), ``answers`` (the same for each of ``prompts``), ``vocabulary`` (the last axis of what was
written), ``predicts`` (whether that is logits of next tokens), ``classes`` (whether it is logits of classes), ``written``
(whether what was read was written, by an encoder-decoder), ``device``, ``versions``.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

#: What decodes a ``quant_method``, beside transformers itself.
_DECODERS = {"compressed-tensors": "compressed-tensors", "torchao": "torchao", "bitsandbytes": "bitsandbytes"}


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    import torch

    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(request["threads"])
    started = time.perf_counter()
    model = load(request).to(request["device"])
    answer = measure(model, request, load_seconds=time.perf_counter() - started)
    Path(answer_path).write_text(json.dumps(answer))


def load(request: dict[str, Any]) -> Any:
    """The request's ``artifact``, on the CPU."""
    config = json.loads((Path(request["artifact"]) / "config.json").read_text())
    return model_class(config).from_pretrained(
        request["artifact"], dtype=request["dtype"], local_files_only=True, trust_remote_code=request["trust_remote_code"]
    )


def model_class(config: dict[str, Any]) -> Any:
    """The class that a ``config.json`` names, or one that finds the code which comes with the model."""
    import transformers

    named = getattr(transformers, (config.get("architectures") or [""])[0], None)
    return named or transformers.AutoModelForCausalLM


def measure(model: Any, request: dict[str, Any], *, load_seconds: float) -> dict[str, Any]:
    """Runs the request's tokens and prompt through a loaded model; the answer described above."""
    from importlib.metadata import version

    import numpy as np
    import torch

    model.eval()
    module_dtypes = {name: _weight_dtype(module) for name, module in model.named_modules() if _weight_dtype(module)}
    weights = {part.data_ptr(): part.nbytes for tensor in (*model.parameters(), *model.buffers()) for part in _stored(tensor)}
    device = request["device"]
    tokens = torch.from_numpy(np.load(request["tokens"])).to(device)
    seconds = 0.0
    vocabulary, classes = 0, False
    predicts = bool(model.can_generate())
    generated: list[int] = []
    answers: list[list[int]] = []
    decode_seconds = 0.0
    with torch.inference_mode(), Path(request["logits"]).open("wb") as stream:
        for sequence in tokens:
            started = time.perf_counter()
            output = model(**inputs_for(model, sequence[None]))
            given = output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits
            classes = given.dim() == 2
            logits = given[0].float().cpu()
            seconds += time.perf_counter() - started
            vocabulary = logits.shape[-1]
            logits.numpy().tofile(stream)
        if predicts:
            started = time.perf_counter()
            generated = _continue(model, request["prompt"], request["new_tokens"])
            decode_seconds = time.perf_counter() - started
            # One by one: padding would be part of what is measured.
            answers = [_continue(model, prompt, request["answer_tokens"]) for prompt in request.get("prompts", [])]
    on_gpu = device != "cpu"
    quantization = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    decoders = [_DECODERS[method]] if method in _DECODERS else []
    return {
        "module_dtypes": module_dtypes,
        # A quantizer that has decoded everything takes itself off the model, and leaves this behind.
        "dequantized": vars(model).get("is_quantized") is False,
        "weight_bytes": sum(weights.values()),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes(),
        "load_seconds": load_seconds,
        "prefill_tokens_per_second": (len(tokens) if tokens.is_floating_point() else tokens.numel()) / seconds,
        "decode_tokens_per_second": len(generated) / decode_seconds if predicts else 0.0,
        "generated": generated,
        "answers": answers,
        "vocabulary": vocabulary,
        "predicts": predicts,
        "classes": classes,
        "written": predicts and bool(model.config.is_encoder_decoder),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers", *decoders)},
    }


def inputs_for(model: Any, ids: Any) -> dict[str, Any]:
    """What a model is given of token ids (batch, length), or of pictures (batch, channels, height, width). An
    encoder-decoder reads ids, and is told to write them: behind the token that its decoder begins with come those from the second on, so
    that the logits at a place are of the token after it, as in a decoder."""
    if ids.is_floating_point():  # pictures
        return {"pixel_values": ids.to(model.dtype)}
    if not model.can_generate():
        return {"input_ids": ids}
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "use_cache": False}
    written = ids.clone()
    written[:, 0] = model.config.decoder_start_token_id
    return {"input_ids": ids, "decoder_input_ids": written, "use_cache": False}


def _continue(model: Any, prompt: list[int], count: int) -> list[int]:
    """At most ``count`` tokens, each the most likely one."""
    import torch

    ids = torch.tensor([prompt], device=model.device)
    options = {"max_new_tokens": count, "do_sample": False, "num_beams": 1}
    found: list[int] = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()
    return found[1 if model.config.is_encoder_decoder else len(prompt) :]


def peak_bytes() -> int:
    """The largest resident memory of this process; ``ru_maxrss`` would begin with that of the process it was forked from."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def _weight_dtype(module: Any) -> str | None:
    """The dtype of a module's own weight, under whichever name a quantizer keeps it."""
    for name in ("weight", "weight_packed"):
        tensor = getattr(module, "_parameters", {}).get(name)
        if tensor is not None:
            return str(_stored(tensor)[0].dtype).removeprefix("torch.")
    return None


def _stored(tensor: Any) -> list[Any]:
    """The plain tensors that a tensor is made of, its codes first: torchao's weights claim the dtype that they stand for."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _stored(getattr(tensor, name))]


if __name__ == "__main__":
    main(*sys.argv[1:])
