"""Rows out of .parquet files and of datasets on the Hub, as a stream: what nobody asks for is not read, and nothing of a dataset runs here.

Which files belong to which configuration and split is read as the Hub's own documentation lays it down ("Structure your repository",
"Data files configuration"): ``configs`` in the card, else the words ``train``, ``validation`` and ``test`` in paths. Where a repository has
no .parquet, .jsonl or .txt, the branch ``refs/convert/parquet`` is read, in which the Hub keeps ``<config>/<split>/0000.parquet``.
"""

from __future__ import annotations

import fnmatch
import io
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from convert.hub import hub_errors, retried
from formats.errors import InputError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import DatasetInfo

#: ``organisation/name`` and a revision.
HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
#: What is read, in the order of preference.
SUFFIXES = (".parquet", ".jsonl", ".txt")
CONVERTED = "refs/convert/parquet"
#: Words in paths that mean a split.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
#: Text files that are about a dataset, not in it.
_ABOUT = ("readme", "license", "licence", "notice", "requirements", "citation")
_BUFFER_BYTES = 1 << 20

#: config -> split -> files, in their order
Layout = dict[str, dict[str, list[str]]]


@dataclass(frozen=True)
class Selection:
    """Which rows of a dataset: a configuration, a split and a column; None: what there is by default."""

    config: str | None = None
    split: str | None = None
    column: str | None = None


@dataclass(frozen=True)
class Rows:
    """Values of one column, read as they are taken, and what they are of."""

    name: str
    values: Iterator[Any]
    record: dict[str, Any] = field(default_factory=dict)


def is_hub_id(text: str) -> bool:
    """Whether a text is named by a Hub id: no file of a kind that is read, and none that is there."""
    matched = HUB_ID.fullmatch(text)
    return matched is not None and not text.startswith(".") and Path(text).suffix not in SUFFIXES and not Path(text).exists()


def parse_row(line: str) -> Any:
    """The JSON of a line. Raises :class:`ValueError`, also for what cannot be text: half a surrogate pair."""
    try:
        value = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if "\\ud" in line.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def pin(text: str) -> str:
    """A Hub id with the commit that its revision is now; any other text as it is. Raises :class:`InputError` or its kin."""
    matched = HUB_ID.fullmatch(text)
    if not is_hub_id(text) or matched is None or re.fullmatch("[0-9a-f]{40}", matched["revision"] or ""):
        return text
    return f"{matched['repo']}@{_info(matched['repo'], matched['revision']).sha}"


def open_parquet(path: Path, *, column: str, seed: int | None) -> Rows:
    """A column of a local file; with ``seed`` its row groups in random order. Raises :class:`InputError`."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise InputError(f"text {path}: cannot be read ({error.strerror})") from None
    return Rows(path.name, _parquet_rows(stream, path.name, column, random.Random(seed) if seed is not None else None), {"column": column})


def open_dataset(text: str, selection: Selection, *, split: str, column: str, seed: int | None) -> Rows:
    """A column of a dataset on the Hub, ``split`` and ``column`` being what is taken where ``selection`` says nothing.

    In the order of files and rows; with ``seed`` files, and row groups of .parquet, come in random order, so that rows are from all over
    and few are read. Raises :class:`InputError` where it is gated, missing or offline, or has no such configuration, split or column,
    naming those that there are.
    """
    matched = HUB_ID.fullmatch(text)
    assert matched is not None
    repo, config, column = matched["repo"], selection.config, selection.column or column
    info = _info(repo, matched["revision"])
    layout = _layout(info, config)
    if not layout:
        info = _info(
            repo, CONVERTED, absent=f"{repo}: no {', '.join(SUFFIXES)} among its files, and the Hub has not converted it; give a file"
        )
        layout = _converted(info)
    splits = _pick(layout, config or _default_config(info, layout), f"{repo}: config")
    chosen = config or next(name for name, found in layout.items() if found is splits)
    files = _pick(splits, selection.split or split, f"{repo}: split")
    sizes = {sibling.rfilename: int(sibling.size or 0) for sibling in info.siblings or []}
    shuffle = random.Random(seed) if seed is not None else None
    order = shuffle.sample(files, len(files)) if shuffle else files

    def values() -> Iterator[Any]:
        with hub_errors(f"datasets/{repo}", None):
            for file in order:
                name = f"{repo}/{file}"
                yield from _READERS[PurePosixPath(file).suffix](_Remote(repo, str(info.sha), file, sizes[file]), name, column, shuffle)

    record = {"commit": str(info.sha), "config": chosen, "split": selection.split or split, "column": column}
    return Rows(repo, values(), record)


def _info(repo: str, revision: str | None, *, absent: str = "") -> DatasetInfo:
    """What a repository holds at a revision. ``absent``: what to say where there is no such revision."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import RevisionNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise InputError(f"datasets/{repo}: datasets are read from the Hub, and offline mode is on (HF_HUB_OFFLINE); give a file")
    with hub_errors(f"datasets/{repo}", revision):
        try:
            return retried(lambda: HfApi().dataset_info(repo, revision=revision, files_metadata=True))
        except RevisionNotFoundError:
            if absent:
                raise InputError(absent) from None
            raise


def _pick(among: Mapping[str, Any], wanted: str | None, what: str) -> Any:
    if wanted is None or wanted not in among:
        missing = f"{wanted!r} is not there" if wanted else "there are several"
        raise InputError(f"datasets/{what}: {missing}; say one of {', '.join(sorted(among))}")
    return among[wanted]


def _default_config(info: DatasetInfo, layout: Layout) -> str | None:
    """The one that the card calls the default, the one of that name, or the only one."""
    said = next((str(item.get("config_name")) for item in _card_configs(info) if item.get("default")), "default")
    return said if said in layout else next(iter(layout)) if len(layout) == 1 else None


def _card_configs(info: DatasetInfo) -> list[dict[str, Any]]:
    found = getattr(info.card_data, "configs", None) or []
    return [item for item in found if isinstance(item, dict)] if isinstance(found, list) else []


def _layout(info: DatasetInfo, config: str | None) -> Layout:
    """Of a repository's own files; empty where there are none that are read."""
    names = sorted(sibling.rfilename for sibling in info.siblings or [] if not sibling.rfilename.startswith("."))
    usable = [name for name in names if name.endswith(SUFFIXES) and not PurePosixPath(name).name.lower().startswith(_ABOUT)]
    found: Layout = {}
    for item in _card_configs(info):
        folder = str(item.get("data_dir") or "").strip("/")
        inside = [name for name in usable if not folder or name.startswith(f"{folder}/")]
        data = item.get("data_files")
        splits = _inferred(inside) if data is None else _matched(data, inside, folder)
        if splits:
            found[str(item.get("config_name") or "default")] = splits
    if found or _card_configs(info):
        return found
    inside = [name for name in usable if config and name.startswith(f"{config}/")]
    splits = _inferred(inside or usable)
    return {(config or "default") if inside else "default": splits} if splits else {}


def _matched(data: Any, names: Sequence[str], folder: str) -> dict[str, list[str]]:
    """``data_files`` of a card: a pattern, a list of them, or these by split."""
    if isinstance(data, str):
        data = [data]
    items = data.items() if isinstance(data, dict) else [(d["split"], d["path"]) if isinstance(d, dict) else ("train", d) for d in data]
    found: dict[str, list[str]] = {}
    for split, patterns in items:
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            whole = f"{folder}/{pattern}" if folder else str(pattern)
            held = found.setdefault(str(split), [])
            held += [name for name in names if fnmatch.fnmatchcase(name, whole.removeprefix("./")) and name not in held]
    return {split: files for split, files in found.items() if files}


def _inferred(names: Sequence[str]) -> dict[str, list[str]]:
    """By the words in their paths, the file's own first; all of them train where no path has one."""
    for suffix in SUFFIXES:
        files = [name for name in names if name.endswith(suffix)]
        found: dict[str, list[str]] = {}
        for name in files:
            parts = [re.split(r"[^a-z]+", part.lower()) for part in reversed(PurePosixPath(name).with_suffix("").parts)]
            split = next((split for words in parts for split, known in SPLITS.items() if any(word in known for word in words)), None)
            if split is not None:
                found.setdefault(split, []).append(name)
        if files:
            return found or {"train": files}
    return {}


def _converted(info: DatasetInfo) -> Layout:
    found: Layout = {}
    for name in sorted(sibling.rfilename for sibling in info.siblings or []):
        parts = PurePosixPath(name).parts
        if len(parts) == 3 and name.endswith(".parquet"):
            found.setdefault(parts[0], {}).setdefault(parts[1].removeprefix("partial-"), []).append(name)
    return found


class _Remote(io.RawIOBase):
    """A file on the Hub, read by ranges, each exactly as long as it is asked for."""

    def __init__(self, repo: str, commit: str, file: str, size_bytes: int) -> None:
        from huggingface_hub import HfFileSystem

        self._path = f"datasets/{repo}@{commit}/{file}"
        self._system = HfFileSystem(skip_instance_cache=True)
        self._size = size_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        stop = min(self._at + len(buffer), self._size)
        if stop <= self._at:
            return 0

        def fetch() -> bytes:
            with self._system.open(self._path, "rb", cache_type="none", size=self._size) as stream:
                stream.seek(self._at)
                data: bytes = stream.read(stop - self._at)
                return data

        data = retried(fetch)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _parquet_rows(stream: Any, name: str, column: str, shuffle: random.Random | None) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(stream, pre_buffer=False)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"text {name}: no whole .parquet file ({error})") from None
    if column not in file.schema_arrow.names:
        raise InputError(f"text {name}: no column {column!r}; say column: with one of {', '.join(file.schema_arrow.names)}")
    groups = list(range(file.num_row_groups))
    for group in shuffle.sample(groups, len(groups)) if shuffle else groups:
        batches = file.iter_batches(batch_size=1024, row_groups=[group], columns=[column])
        while True:
            try:
                batch = next(batches, None)
                values = [] if batch is None else batch.column(0).to_pylist()
            except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
                # Arrow's own word for a page it cannot read is an OSError without a number; others are the network's.
                if isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError):
                    raise
                raise InputError(f"text {name}: row group {group} is damaged ({' '.join(str(error).split())})") from None
            if batch is None:
                break
            yield from values


def _jsonl_rows(stream: io.RawIOBase, name: str, column: str, shuffle: random.Random | None) -> Iterator[Any]:  # noqa: ARG001
    for i, line in enumerate(io.TextIOWrapper(io.BufferedReader(stream, _BUFFER_BYTES), encoding="utf-8")):
        if not line.strip():
            continue
        try:
            row = parse_row(line)
        except ValueError as error:
            raise InputError(f"text {name}: line {i + 1} is no JSON ({error})") from None
        if not isinstance(row, dict) or column not in row:
            known = ", ".join(row) if isinstance(row, dict) else "none"
            raise InputError(f"text {name}: line {i + 1} has no {column!r}; say column: with one of {known}")
        yield row[column]


def _txt_rows(stream: io.RawIOBase, name: str, column: str, shuffle: random.Random | None) -> Iterator[str]:  # noqa: ARG001
    """Paragraphs, which an empty line ends."""
    lines: list[str] = []
    for line in io.TextIOWrapper(io.BufferedReader(stream, _BUFFER_BYTES), encoding="utf-8"):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines).rstrip("\n")
            lines = []
    if lines:
        yield "".join(lines).rstrip("\n")


_READERS: dict[str, Callable[[Any, str, str, random.Random | None], Iterator[Any]]] = {
    ".parquet": _parquet_rows,
    ".jsonl": _jsonl_rows,
    ".txt": _txt_rows,
}
