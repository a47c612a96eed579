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

from convert.runtimes.transformers import measure
from convert.source import Checkpoint, open_source


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    import torch

    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(request["threads"])
    started = time.perf_counter()
    checkpoint = open_source(request["model"], trust_remote_code=request["trust_remote_code"])
    for file in checkpoint.files:
        checkpoint.reader.path(file.name)
    model = _load(checkpoint, request).to(request["device"])
    answer = measure(model, request, load_seconds=time.perf_counter() - started)
    Path(answer_path).write_text(json.dumps(answer))


def _load(checkpoint: Checkpoint, request: dict[str, Any]) -> Any:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if checkpoint.folder is not None:
        return AutoModelForCausalLM.from_pretrained(
            str(checkpoint.folder), dtype=request["dtype"], local_files_only=True, trust_remote_code=request["trust_remote_code"]
        )
    config = CONFIG_MAPPING[checkpoint.config["model_type"]].from_dict(dict(checkpoint.config))
    dtype = torch.float32 if request["dtype"] == "auto" else getattr(torch, request["dtype"])
    weights = {name: checkpoint.reader.read(name, 0, spec.shape[0]).to(dtype) for name, spec in checkpoint.tensors.items()}
    return getattr(transformers, checkpoint.config["architectures"][0]).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
