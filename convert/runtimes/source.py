"""The source itself, as the reference: the same request and answer as :mod:`convert.runtimes.transformers`.

Beside ``artifact`` the request has ``model``, what the recipe calls the source; unlike the other programs this one may use this
package, because it must open whatever the recipe can name.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from convert.runtimes.transformers import measure, model_class
from convert.source import open_source
from formats.dtypes import DTYPES


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
