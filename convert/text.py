"""Text as token sequences of one length: what a model is calibrated on, and what it is compared on."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from convert.datasets import Rows, Selection, is_hub_id, open_dataset, open_parquet, parse_row
from formats.errors import InputError

if TYPE_CHECKING:
    from convert.recipe import Validation

TEXTS = Path(__file__).parent / "texts"

#: What `sample` means for each purpose; two different sources, so that nothing is measured on what was calibrated on.
SAMPLES = {
    "calibration": ("calibration.txt", "The Devil's Dictionary (sample)"),
    "validation": ("validation.txt", "Moby-Dick (sample)"),
}


def load_tokenizer(folder: Path, *, trust_remote_code: bool, of: str = "") -> Any:
    """The tokenizer of a model folder; ``of``: what the user calls the model. Raises :class:`InputError` when there is none that loads."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
        if not tokenizer("a", add_special_tokens=False).input_ids:  # so some classes come out of a folder without any of their files
            raise ValueError("it makes no token of any text")
        return tokenizer
    except Exception as error:  # noqa: BLE001  tokenizers fail in as many ways as there are tokenizers
        why = " ".join(str(error).split())
        raise InputError(
            f"{of or folder}: its tokenizer cannot be loaded, so there is no text to run; put its files beside the weights ({why})"
        ) from None


#: A text of more characters, and of far more than is asked for, is not made into tokens as a whole to draw from them: 14 million characters
#: took 4 GB and 94 s.
WHOLE_CHARACTERS = 1 << 24
#: The split of a dataset that is read for each purpose, unless the recipe names one.
SPLITS = {"calibration": "train", "validation": "validation"}
EVERYTHING = Selection()


def take_tokens(
    text: str,
    tokenizer: Any,
    *,
    sequences: int,
    length: int,
    purpose: str,
    seed: int | None = None,
    selection: Selection = EVERYTHING,
) -> tuple[np.ndarray, dict[str, Any]]:
    """int64 (sequences, length), each begun as the tokenizer begins a text, and a record of what they were made of.

    The text is read from its beginning; with ``seed`` its sequences are drawn from all of it, of a text beyond :data:`WHOLE_CHARACTERS`
    one from each of as many equal stretches, from a random place in its first half. A dataset on the Hub or a .parquet file is
    read as far as it has to be, with ``seed`` in random order (:mod:`convert.datasets`). Raises :class:`InputError` when it is too short.
    """
    start = (
        [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else []
    )
    body = length - len(start)
    if body < 1:
        raise InputError(f"{purpose}.length: {length}, and the tokenizer begins each text with {tokenizer.bos_token}; ask for 2 or more")
    rows = _open_rows(text, selection, purpose=purpose, column="text", seed=seed)
    if rows is not None:
        content, name, seed = _enough(rows, tokenizer, sequences * body), rows.name, None
    else:
        content, name = _read_text(text, purpose, selection.column or "text")
    if seed is not None and len(content) > max(WHOLE_CHARACTERS, 64 * sequences * body):
        ids, seed = _from_stretches(content, tokenizer, sequences, body, seed), None
    else:
        ids = _encode(content, tokenizer, sequences * body if seed is None else None)
    if len(ids) < sequences * body:
        raise InputError(
            f"{purpose} text {name}: {len(ids):,} tokens, {sequences * body:,} are needed; give a longer text or ask for fewer"
        )
    places = list(range(len(ids) // body))
    chosen = places[:sequences] if seed is None else sorted(random.Random(seed).sample(places, sequences))
    tokens = np.array([[*start, *ids[i * body : (i + 1) * body]] for i in chosen], dtype=np.int64)
    digest = hashlib.sha256(tokens.tobytes()).hexdigest()
    record = rows.record if rows is not None else {}
    return tokens, {"text": name, **record, "tokens": int(tokens.size), "length": length, "tokens_sha256": digest}


def _encode(content: str, tokenizer: Any, enough: int | None) -> list[int]:
    """Token ids of a text; no more of it than gives ``enough`` is looked at, so that a gigabyte does not cost its minutes. The cut lies far
    behind what is taken, so its tokens are those of the whole."""
    end = len(content) if enough is None else 16 * enough
    while True:
        ids: list[int] = tokenizer(content[:end], add_special_tokens=False, verbose=False).input_ids
        if enough is None or end >= len(content) or len(ids) >= enough + enough // 50 + 16:
            return ids
        end *= 4


def _from_stretches(content: str, tokenizer: Any, sequences: int, body: int, seed: int) -> list[int]:
    """``body`` token ids from each of so many stretches of a text, begun behind white space where there is some; all those behind one that
    has fewer are missing too."""
    drawn = random.Random(seed)
    width = len(content) // sequences
    ids: list[int] = []
    for i in range(sequences):
        begin, end = i * width + drawn.randrange(width // 2), (i + 1) * width
        space = re.compile(r"\s").search(content, begin, begin + width // 4)
        found = _encode(content[space.end() if space else begin : end], tokenizer, body)[:body]
        ids += found
        if len(found) < body:
            break
    return ids


def take_documents(
    text: str, tokenizer: Any, *, sequences: int, length: int, seed: int, chat: bool, selection: Selection = EVERYTHING
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Documents as they are, int64 (at most ``length``,) each and cut there, drawn from all of a .jsonl file; and a record of them. Of a
    dataset on the Hub or a .parquet file they are the first in the random order in which these are read.

    ``chat``: a row has ``messages``, and the tokenizer's chat template is applied to them; else a row has a ``text``, begun as the
    tokenizer begins one. Raises :class:`InputError` for a row that has not what is asked for, a tokenizer without a template, and too few.
    """
    path = Path(text)
    key = selection.column or ("messages" if chat else "text")
    if chat and not tokenizer.chat_template:
        raise InputError("calibration.chat: the tokenizer of this model has no chat template; leave chat out")
    rows = _open_rows(text, selection, purpose="calibration", column=key, seed=seed)
    name, record = (rows.name, rows.record) if rows is not None else (path.name, {})
    chosen = list(_first(rows, sequences)) if rows is not None else _drawn(path, key, sequences, seed)
    documents = []
    for place, content in chosen:
        if not chat and not isinstance(content, str):
            raise InputError(f'calibration text {name}: {place}: "{key}" holds {type(content).__name__}, not text; say another column')
        try:
            spelled = tokenizer.apply_chat_template(content, tokenize=False) if chat else content
        except Exception as error:  # noqa: BLE001  a template is code of the model's, and fails as it likes
            raise InputError(f'calibration text {name}: {place} has no usable "{key}" ({error})') from None
        ids = tokenizer(spelled, add_special_tokens=not chat, verbose=False).input_ids[:length]
        if not ids:
            raise InputError(f"calibration text {name}: {place} is empty")
        documents.append(np.array(ids, dtype=np.int64))
    digest = hashlib.sha256(b"".join(len(item).to_bytes(8, "little") + item.tobytes() for item in documents)).hexdigest()
    return documents, {
        "text": name,
        **record,
        "documents": len(documents),
        "chat": chat,
        "tokens": sum(len(item) for item in documents),
        "length": length,
        "tokens_sha256": digest,
    }


def take_held_out(validation: Validation, tokenizer: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """What a recipe's ``validation`` compares: :func:`take_tokens` from the beginning of its text."""
    return take_tokens(
        validation.text,
        tokenizer,
        sequences=validation.tokens // validation.length,
        length=validation.length,
        purpose="validation",
        selection=Selection(validation.config, validation.split, validation.column),
    )


def _open_rows(text: str, selection: Selection, *, purpose: str, column: str, seed: int | None) -> Rows | None:
    """What is read as a stream, or None for what is read whole."""
    if Path(text).suffix == ".parquet":
        return open_parquet(Path(text), column=selection.column or column, seed=seed)
    if text != "sample" and is_hub_id(text):
        return open_dataset(text, selection, split=SPLITS[purpose], column=column, seed=seed)
    return None


def _enough(rows: Rows, tokenizer: Any, tokens: int) -> str:
    """Rows with an empty line between them, as many as make so many tokens and a few more, or all there are."""
    taken: list[str] = []
    left = tokens + tokens // 50
    for value in rows.values:
        if value is not None and not isinstance(value, str):
            raise InputError(f"text {rows.name}: {rows.record['column']} holds {type(value).__name__}, not text; say another column")
        if value and value.strip():
            taken.append(value)
            left -= len(tokenizer(value, add_special_tokens=False, verbose=False).input_ids)
        if left <= 0:
            break
    return "\n\n".join(taken)


def _first(rows: Rows, count: int) -> Iterator[tuple[str, Any]]:
    """Rows that are not empty, each with its place."""
    seen = 0
    for i, value in enumerate(rows.values):
        if seen == count:
            return
        if value is not None and (not isinstance(value, str) or value.strip()):
            seen += 1
            yield f"row {i + 1} as read", value
    if seen < count:
        raise InputError(f"calibration text {rows.name}: {seen:,} documents, {count:,} are needed; give more or ask for fewer")


def _drawn(path: Path, key: str, count: int, seed: int) -> list[tuple[str, Any]]:
    """Lines of a .jsonl file, drawn from all of it."""
    if path.suffix != ".jsonl":
        raise InputError(
            f"calibration text {path}: documents are rows of a .jsonl or .parquet file or of a dataset on the Hub; give one, or leave "
            "documents and chat out"
        )
    try:
        lines = [(i, line) for i, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1) if line.strip()]
    except OSError as error:
        raise InputError(f"calibration text {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"calibration text {path}: not UTF-8 ({error.reason} at byte {error.start:,}); convert it") from None
    if len(lines) < count:
        raise InputError(f"calibration text {path.name}: {len(lines):,} documents, {count:,} are needed; give more or ask for fewer")
    found = []
    for i in sorted(random.Random(seed).sample(range(len(lines)), count)):
        number, line = lines[i]
        try:
            found.append((f"line {number}", parse_row(line)[key]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'calibration text {path.name}: line {number} has no usable "{key}" ({error})') from None
    return found


def _read_text(name: str, purpose: str, column: str = "text") -> tuple[str, str]:
    if name == "sample":
        file, title = SAMPLES[purpose]
        return (TEXTS / file).read_text(encoding="utf-8"), title
    path = Path(name)
    try:
        content = path.read_text(encoding="utf-8-sig")  # a mark at the beginning is no text
    except FileNotFoundError:
        hint = "" if path.suffix else "; a dataset on the Hub is named org/name"
        raise InputError(f"{purpose} text {name}: cannot be read (No such file or directory){hint}") from None
    except OSError as error:
        raise InputError(f"{purpose} text {name}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{purpose} text {name}: not UTF-8 ({error.reason} at byte {error.start:,}); convert it, for instance: iconv -f LATIN1 -t UTF-8"
        ) from None
    if path.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
        values = [_value(line, column, f"{purpose} text {name}:{i}") for i, line in lines]
        content = "\n\n".join(value for value in values if value is not None)
    if not content.strip():
        raise InputError(f"{purpose} text {name}: there is no text in it")
    return content, path.name


def _value(line: str, column: str, where: str) -> str | None:
    """The text of a line of .jsonl; null is none. Raises :class:`InputError` naming the line."""
    try:
        row = parse_row(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or column not in row:
        has = f"it has {', '.join(map(repr, row))}; say column: with one of these" if isinstance(row, dict) and row else "it has none"
        raise InputError(f'{where}: each line must be a JSON object with a "{column}"; {has}')
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise InputError(f'{where}: "{column}" holds {type(value).__name__}, not text; say another column')
    return value
