"""The source itself, as the reference: the same request and answer as :mod:`convert.runtimes.transformers`.

Beside ``artifact`` the request has ``model``, what the recipe calls the source, and ``blocks``: whether it runs block by block, because
it would not fit in memory whole; the logits are the same, to the bit, but nothing is generated. This one may use this package: it
must open whatever the recipe can name.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from convert.runtimes.transformers import inputs_for, measure, model_class, peak_bytes
from convert.source import open_source
from formats.dtypes import DTYPES


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    import torch

    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(request["threads"])
    if request["blocks"]:
        Path(answer_path).write_text(json.dumps(_walk(request)))
        return
    started = time.perf_counter()
    model = load(request).to(request["device"])
    answer = measure(model, request, load_seconds=time.perf_counter() - started)
    Path(answer_path).write_text(json.dumps(answer))


def _walk(request: dict[str, Any]) -> dict[str, Any]:
    """The answer, with one block of weights in memory."""
    from importlib.metadata import version

    import numpy as np
    import torch

    from convert.lanes import walk
    from convert.loading import Skeleton

    started = time.perf_counter()
    skeleton = Skeleton(
        open_source(request["model"], trust_remote_code=request["trust_remote_code"]),
        dtype=request["dtype"],
        trust_remote_code=request["trust_remote_code"],
    )
    loaded = time.perf_counter()
    tokens = torch.from_numpy(np.load(request["tokens"]))
    module_dtypes = {name: str(module.weight.dtype).removeprefix("torch.") for name, module in _weighted(skeleton.model)}
    vocabulary, classes = 0, False
    with Path(request["logits"]).open("wb") as stream:

        def write(_: int, output: Any) -> None:
            nonlocal vocabulary, classes
            given = output.last_hidden_state if hasattr(output, "last_hidden_state") else output.logits
            vocabulary, classes = given.shape[-1], given.dim() == 2
            given[0].float().cpu().numpy().tofile(stream)

        predicts = bool(skeleton.model.can_generate())
        batches = [inputs_for(skeleton.model, sequence[None]) for sequence in tokens]
        for _ in walk(skeleton, batches, device=request["device"], place="host", finish=write):
            pass
    on_gpu = request["device"] != "cpu"
    return {
        "module_dtypes": module_dtypes,
        "weight_bytes": sum({id(p): p.nbytes for p in skeleton.model.parameters()}.values()),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else peak_bytes(),
        "load_seconds": loaded - started,
        "prefill_tokens_per_second": tokens.numel() / (time.perf_counter() - loaded),
        "decode_tokens_per_second": 0.0,
        "generated": [],
        "answers": [],
        "vocabulary": vocabulary,
        "predicts": predicts,
        "classes": classes,
        "written": predicts and bool(skeleton.model.config.is_encoder_decoder),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _weighted(model: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if getattr(module, "weight", None) is not None]


def load(request: dict[str, Any]) -> Any:
    """The request's ``model`` in its ``dtype``, on the CPU."""
    import torch
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    checkpoint = open_source(request["model"], trust_remote_code=request["trust_remote_code"])
    for file in checkpoint.files:
        checkpoint.reader.path(file.name)
    if checkpoint.folder is not None and not checkpoint.coded:
        return model_class(dict(checkpoint.config)).from_pretrained(
            str(checkpoint.folder), dtype=request["dtype"], local_files_only=True, trust_remote_code=request["trust_remote_code"]
        )
    config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(dict(checkpoint.config))
    # Of codes, "auto" is the dtype that their config names for the model; a GGUF decodes to float32.
    own = DTYPES[checkpoint.tensors[next(iter(checkpoint.coded))].dtype if checkpoint.coded else "F32"].torch_name
    dtype = getattr(torch, own if request["dtype"] == "auto" else request["dtype"])
    weights = {
        name: checkpoint.reader.read(name, 0, spec.matrix_shape[0]).reshape(spec.shape).to(dtype)
        for name, spec in checkpoint.tensors.items()
    }
    return model_class(dict(checkpoint.config)).from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


if __name__ == "__main__":
    main(*sys.argv[1:])
