"""Loads a folder in transformers with bitsandbytes: 8-bit weights as they are, float weights with ``load_in_8bit``.

The same request and answer as :mod:`convert.runtimes.transformers`; what is loaded differs only where ``config.json`` has no
``quantization_config``, for then bitsandbytes quantizes while it loads, as its users do it.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from convert.runtimes.transformers import measure, model_class


def main(request_path: str, answer_path: str) -> None:
    """Answers one request."""
    import torch

    request = json.loads(Path(request_path).read_text())
    torch.set_num_threads(request["threads"])
    started = time.perf_counter()
    model = load(request)
    answer = measure(model, request, load_seconds=time.perf_counter() - started)
    Path(answer_path).write_text(json.dumps(answer))


def load(request: dict[str, Any]) -> Any:
    """The request's ``artifact``, on its ``device``."""
    from transformers import BitsAndBytesConfig

    config = json.loads((Path(request["artifact"]) / "config.json").read_text())
    quantize = {} if "quantization_config" in config else {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}  # type: ignore[no-untyped-call]
    return model_class(config).from_pretrained(
        request["artifact"],
        dtype=request["dtype"],
        device_map={"": request["device"]},
        local_files_only=True,
        trust_remote_code=request["trust_remote_code"],
        **quantize,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
