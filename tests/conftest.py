"""Small real models to convert, made once and copied; and a guard for tests that need a GPU."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Before anything imports huggingface_hub: it would ask its endpoint, or the real Hub, for things no test is about.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# Workers of one machine share its processors: threads of torch that wait for others which do not run spin, and every product takes
# milliseconds. A process for each processor, each with one thread, takes half the time and less.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

Make = Callable[..., Path]

RECIPE = """\
model: {model}
validation: {{tokens: 256, length: 64}}
targets:
  - name: q
    format: compressed-tensors
    rules: [{{match: linear, scheme: {scheme}}}]
    limits: {{kl_nats: 5.0, top1: 0.0, perplexity_ratio: 50.0}}
"""
#: A graph, to be formatted with ``model`` and ``scheme``, the rules.
GRAPH = """\
model: {model}
validation: {{tokens: 64, length: 32}}
targets:
  - name: q
    format: onnx
    rules: {scheme}
    runtimes: [onnxruntime]
"""


#: A conversion of argv: a recipe, a folder, and after how many tensors it kills itself.
KILLED = """
import os, signal, sys
from pathlib import Path
from convert import export
from convert.pipeline import convert
from convert.recipe import parse_recipe
left = int(sys.argv[3])
finished = export._Writer.finished
def counted(self, tensor):
    global left
    finished(self, tensor)
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
export._Writer.finished = counted
convert(parse_recipe(Path(sys.argv[1]).read_text(), "test.yaml", name="test"), Path(sys.argv[2]), check=False)
"""


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup() -> None:
    """pytest's word for what runs changes with every test, and a changed environment begins a fork server anew."""
    os.environ.pop("PYTEST_CURRENT_TEST", None)


pytest_pyfunc_call = pytest_fixture_setup


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    for item in items:
        for marker in item.iter_markers("runtime"):
            if missing := _missing(marker.args[0]):
                item.add_marker(pytest.mark.skip(reason=missing))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _missing(runtime: str) -> str | None:
    """Why a runtime with an environment of its own cannot be run here."""
    from convert import environments
    from formats.errors import MachineError

    try:
        environments.require(runtime)
    except MachineError as error:
        return str(error)
    return None


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``make_llama(name, **config)``: the folder of a small random Llama in bfloat16 with a tokenizer, as transformers saves it.

    ``shards`` writes that many files with the tensors in reverse order, unlike the model's own. Each call gives a folder of its own.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def make(name: str = "llama", *, shards: int = 0, seed: int = 0, dtype: str = "bfloat16", **config: Any) -> Path:
        key = json.dumps([shards, seed, dtype, config], sort_keys=True)
        if key not in made:
            folder = root / f"{len(made)}"
            settings = {
                "hidden_size": 64,
                "intermediate_size": 96,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 300,
                "max_position_embeddings": 256,
                "tie_word_embeddings": False,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **config,
            }
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**settings)).to(getattr(torch, dtype))
            model.save_pretrained(folder)
            save_tokenizer(folder, settings["vocab_size"])
            if shards:
                reshard(folder, shards)
            made[key] = folder
        copy = root / f"{name}-{len(list(root.iterdir()))}"
        shutil.copytree(made[key], copy)
        return copy

    return make


def save_tokenizer(folder: Path, vocabulary: int) -> None:
    """A byte-level tokenizer whose ids all lie below ``vocabulary``, at least 259."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    assert len(words) <= vocabulary
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>").save_pretrained(folder)


def reshard(folder: Path, count: int) -> None:
    """Splits ``model.safetensors`` into ``count`` files, the tensors in reverse order, with an index."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors, reverse=True)
    weight_map = {}
    for i in range(count):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


@pytest.fixture
def recipe_for() -> Callable[..., Any]:
    """``recipe_for(model, scheme=..., text=...)``: a parsed recipe for a model; ``text`` replaces the whole YAML."""
    from convert.recipe import parse_recipe

    def make(model: Path | str, scheme: str = "int8-dynamic", text: str | None = None, **overrides: str) -> Any:
        return parse_recipe(
            (text or RECIPE).format(model=model, scheme=scheme),
            "test.yaml",
            name="test",
            overrides=[f"{k}={v}" for k, v in overrides.items()],
        )

    return make
