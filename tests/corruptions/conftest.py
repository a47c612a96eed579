"""Good checkpoints, made once."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from corruptions import folders

from convert import pipeline
from convert.recipe import parse_recipe


def save(folder: Path, kind: str, **settings: Any) -> Path:
    """A small random model of another class than Llama, with the tokenizer of ``settings``."""
    import torch
    import transformers

    tokenizer = settings.pop("tokenizer")
    config = {**folders.SIZES, "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 256, **settings}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**config))
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


@pytest.fixture(scope="session")
def artifacts(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Made by this tool, with their manifests. Not to be written to."""
    root = tmp_path_factory.mktemp("made")
    llama = make_llama(**folders.SIZES)
    others = {
        "tied": make_llama(**folders.SIZES, tie_word_embeddings=True),
        "qwen2": save(root / "qwen2-source", "Qwen2", tokenizer=llama, tie_word_embeddings=True),
    }
    jobs = [(llama, folders.TARGETS), *((model, {name: folders.TARGETS["int8"]}) for name, model in others.items())]
    made: dict[str, Path] = {}
    for model, targets in jobs:
        job = parse_recipe(folders.recipe(model, targets), "good.yaml", name="good")
        outcome = pipeline.convert(job, root / model.name, check=False)
        made |= {artifact.path.name: artifact.path for artifact in outcome.artifacts}
    made["source"] = llama
    return made


@pytest.fixture(scope="session")
def goods(artifacts: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """As anybody would have made them: no manifest. Not to be written to."""
    root = tmp_path_factory.mktemp("good")
    found = {}
    for name, artifact in artifacts.items():
        found[name] = shutil.copytree(artifact, root / name, ignore=shutil.ignore_patterns("octavo.json"))
    found["fine-grained"] = folders.fine_grained(found["block"], root / "fine-grained")
    found["modelopt"] = folders.modelopt(found["fp8-static"], root / "modelopt")
    found["modelopt-legacy"] = folders.modelopt(found["fp8-static"], root / "modelopt-legacy", legacy=True)
    found["torchao"] = folders.torchao(found["int8"], root / "torchao")
    if importlib.util.find_spec("bitsandbytes"):
        mixtral = save(root / "mixtral", "Mixtral", tokenizer=found["source"], num_local_experts=4, rope_theta=10_000.0)
        found["bitsandbytes"] = folders.bitsandbytes(found["source"], root / "bitsandbytes")
        found["bitsandbytes-mixtral"] = folders.bitsandbytes(mixtral, root / "bitsandbytes-mixtral")
        qwen2 = save(root / "qwen2-plain", "Qwen2", tokenizer=found["source"], tie_word_embeddings=True)
        found["bitsandbytes-tied"] = folders.bitsandbytes(qwen2, root / "bitsandbytes-tied")
    return found
