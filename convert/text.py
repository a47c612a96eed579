"""Text as token sequences of one length: what a model is calibrated on, and what it is compared on."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from formats.errors import InputError

TEXTS = Path(__file__).parent / "texts"

#: What `sample` means for each purpose; two different sources, so that nothing is measured on what was calibrated on.
SAMPLES = {
    "calibration": ("calibration.txt", "The Devil's Dictionary (sample)"),
    "validation": ("validation.txt", "Moby-Dick (sample)"),
}


def load_tokenizer(folder: Path, *, trust_remote_code: bool) -> Any:
    """The tokenizer of a model folder. Raises :class:`InputError` when there is none that loads."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # noqa: BLE001  tokenizers fail in as many ways as there are tokenizers
        raise InputError(f"{folder}: its tokenizer cannot be loaded, so there is no text to run ({error})") from None


def take_tokens(
    text: str, tokenizer: Any, *, sequences: int, length: int, purpose: str, seed: int | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """int64 (sequences, length), each begun as the tokenizer begins a text, and a record of what they were made of.

    The text is read from its beginning; with ``seed`` its sequences are drawn from all of it. Raises :class:`InputError` when it is too
    short.
    """
    content, name = _read_text(text, purpose)
    start = (
        [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
    )
    body = length - len(start)
    ids = tokenizer(content, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < sequences * body:
        raise InputError(
            f"{purpose} text {name}: {len(ids):,} tokens, {sequences * body:,} are needed; give a longer text or ask for fewer"
        )
    places = list(range(len(ids) // body))
    chosen = places[:sequences] if seed is None else sorted(random.Random(seed).sample(places, sequences))
    tokens = np.array([[*start, *ids[i * body : (i + 1) * body]] for i in chosen], dtype=np.int64)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    return tokens, {"text": name, "tokens": int(tokens.size), "length": length, "tokens_sha256": digest}


def take_documents(
    text: str, tokenizer: Any, *, sequences: int, length: int, seed: int, chat: bool
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Documents as they are, int64 (at most ``length``,) each and cut there, drawn from all of a .jsonl file; and a record of them.

    ``chat``: a line has ``messages``, and the tokenizer's chat template is applied to them; else a line has a ``text``, begun as the
    tokenizer begins one. Raises :class:`InputError` for a line that has not what is asked for, a tokenizer without a template, and too few.
    """
    path = Path(text)
    if path.suffix != ".jsonl":
        raise InputError(f"calibration text {text}: documents are the lines of a .jsonl file; give one, or leave documents and chat out")
    if chat and not tokenizer.chat_template:
        raise InputError("calibration.chat: the tokenizer of this model has no chat template; leave chat out")
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"calibration text {text}: cannot be read ({error.strerror})") from None
    if len(lines) < sequences:
        raise InputError(f"calibration text {path.name}: {len(lines):,} documents, {sequences:,} are needed; give more or ask for fewer")
    key = "messages" if chat else "text"
    documents = []
    for i in sorted(random.Random(seed).sample(range(len(lines)), sequences)):
        try:
            content = json.loads(lines[i])[key]
            spelled = tokenizer.apply_chat_template(content, tokenize=False) if chat else str(content)
        except Exception as error:  # noqa: BLE001  a template is code of the model's, and fails as it likes
            raise InputError(f'calibration text {path.name}: line {i + 1} has no usable "{key}" ({error})') from None
        ids = tokenizer(spelled, add_special_tokens=not chat, verbose=False).input_ids[:length]
        if not ids:
            raise InputError(f"calibration text {path.name}: line {i + 1} is empty")
        documents.append(np.array(ids, dtype=np.int64))
    digest = hashlib.sha256(b"".join(len(item).to_bytes(8, "little") + item.tobytes() for item in documents)).hexdigest()
    tokens = sum(len(item) for item in documents)
    return documents, {
        "text": path.name,
        "documents": len(documents),
        "chat": chat,
        "tokens": tokens,
        "length": length,
        "tokens_sha256": digest,
    }


def _read_text(name: str, purpose: str) -> tuple[str, str]:
    if name == "sample":
        file, title = SAMPLES[purpose]
        return (TEXTS / file).read_text(encoding="utf-8"), title
    path = Path(name)
    try:
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            content = "\n\n".join(str(json.loads(line)["text"]) for line in content.splitlines() if line.strip())
    except OSError as error:
        raise InputError(f"{purpose} text {name}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f'{purpose} text {name}: each line must be a JSON object with a "text" ({error})') from None
    return content, path.name
