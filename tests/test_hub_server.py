"""The stand-in for the Hub, judged by the real client: what it downloads, where it puts it and which errors it raises.

The client's functions take `endpoint` and `cache_dir`, so most tests run in this process; `token=False` keeps a token of the
machine out. What the client reads from the environment when it is imported (offline mode, the default cache) needs a process.
"""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Commit, Exchange, Fault, Hub, hub_fixture, serve  # noqa: F401 - the fixture is used by name
from huggingface_hub import HfApi, HfFileSystem, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import httpx  # type: ignore[attr-defined] # httpx or httpx2, exported for both at run time
from huggingface_hub.utils.sha import git_hash, sha_fileobj
from safetensors.numpy import save_file

MIB = 1024 * 1024
CONFIG = b'{"model_type": "llama"}'
WEIGHTS = bytes(range(256)) * 1000
FILES = {
    "config.json": CONFIG,
    "model.safetensors": WEIGHTS,
    "README.md": b"---\nlicense: mit\nbase_model: octo/base\ntags: [int8]\n---\n# Tiny\n",
    "onnx/model.onnx": b"onnx" * 100,
    "onnx/deep/notes on # 100% é.txt": b"",
}

Download = Callable[..., bytes]


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=False)


@pytest.fixture
def download(hub: Hub, tmp_path: Path) -> Download:
    """hf_hub_download into the test's cache; returns the bytes it arrived with."""

    def download(repo_id: str, filename: str, **options: Any) -> bytes:
        options = {"endpoint": hub.url, "cache_dir": tmp_path / "cache", "token": False, **options}
        return Path(hf_hub_download(repo_id, filename, **options)).read_bytes()

    return download


@pytest.fixture
def big_file(tmp_path: Path) -> Path:
    """24 MiB of noise: more than two of the client's 10 MiB chunks, so that a broken download has something to resume from."""
    path = tmp_path / "big.safetensors"
    path.write_bytes(np.random.default_rng(0).bytes(24 * MIB))
    return path


def run_client(hub: Hub, home: Path, program: str, **environment: str) -> Any:
    """Run `program` in a process whose client knows `hub` and `home` from its environment only; returns the JSON it prints."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=hub.environment(home) | environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def steps(requests: list[Exchange]) -> list[tuple[str, str, str | None, int]]:
    """Method, first word of the path after the repo, range and status of each request."""
    places = {"api": "api", "cdn": "cdn"}
    return [(seen.method, places.get(seen.path.split("/")[1], "resolve"), seen.range, seen.status) for seen in requests]


def test_a_small_file_lands_under_its_git_hash(hub: Hub, download: Download, tmp_path: Path) -> None:
    commit = hub.add("octo/tiny", FILES).commits[0]
    assert download("octo/tiny", "config.json") == CONFIG
    repo = tmp_path / "cache/models--octo--tiny"
    assert (repo / "refs/main").read_text() == commit.sha
    link = repo / "snapshots" / commit.sha / "config.json"
    assert link.resolve() == (repo / "blobs" / git_hash(CONFIG)).resolve()
    assert steps(hub.requests) == [("HEAD", "resolve", None, 200), ("GET", "resolve", None, 200)]
    assert [seen.size_bytes for seen in hub.requests] == [0, len(CONFIG)]


def test_a_file_under_lfs_lands_under_its_sha256(hub: Hub, download: Download, tmp_path: Path, big_file: Path) -> None:
    commit = hub.add("octo/tiny", {"model.safetensors": big_file}).commits[0]
    assert download("octo/tiny", "model.safetensors") == big_file.read_bytes()
    with big_file.open("rb") as file:
        sha256 = sha_fileobj(file).hex()
    repo = tmp_path / "cache/models--octo--tiny"
    assert [path.name for path in (repo / "blobs").iterdir()] == [sha256]
    assert (repo / "snapshots" / commit.sha / "model.safetensors").stat().st_size == 24 * MIB
    assert steps(hub.requests) == [("HEAD", "resolve", None, 302), ("GET", "cdn", None, 200)]


def test_what_is_cached_is_not_downloaded_again(hub: Hub, download: Download) -> None:
    commit = hub.add("octo/tiny", FILES).commits[0]
    for name in ("config.json", "model.safetensors"):
        download("octo/tiny", name)
    hub.requests.clear()
    for name in ("config.json", "model.safetensors"):
        download("octo/tiny", name)
    assert [seen.method for seen in hub.requests] == ["HEAD", "HEAD"]
    download("octo/tiny", "model.safetensors", revision=commit.sha)
    assert len(hub.requests) == 2


def test_a_snapshot_is_whole_and_its_hashes_are_those_of_the_tree(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    commit = hub.add("octo/tiny", FILES).commits[0]
    options: dict[str, Any] = {"endpoint": hub.url, "token": False, "cache_dir": tmp_path / "cache"}
    folder = Path(snapshot_download("octo/tiny", **options))
    assert folder.name == commit.sha
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()} == FILES
    verified = api.verify_repo_checksums("octo/tiny", cache_dir=tmp_path / "cache")
    assert verified.checked_count == len(FILES)
    assert (verified.mismatches, verified.missing_paths, verified.extra_paths) == ([], [], [])
    hub.requests.clear()
    snapshot_download("octo/tiny", **options)
    assert not hub.asked("resolve|cdn")
    plain = Path(snapshot_download("octo/tiny", local_dir=tmp_path / "plain", allow_patterns="*.onnx", **options))
    assert [path.relative_to(plain) for path in plain.rglob("*.*") if ".cache" not in path.parts] == [Path("onnx/model.onnx")]


def test_a_dataset_has_its_own_namespace(hub: Hub, api: HfApi, download: Download) -> None:
    hub.add("octo/tiny", {"data.txt": b"model"})
    hub.add("octo/tiny", {"data.txt": b"dataset"}, kind="datasets")
    assert download("octo/tiny", "data.txt", repo_type="dataset") == b"dataset"
    assert download("octo/tiny", "data.txt") == b"model"
    assert api.dataset_info("octo/tiny").sha != api.model_info("octo/tiny").sha


def history(hub: Hub) -> tuple[Commit, Commit, Commit]:
    repo = hub.add("octo/tiny", {"config.json": b"1", "old.txt": b"old"})
    first = repo.commits[0]
    repo.tags["v1"] = first.sha
    second = repo.commit({"config.json": b"2"}, delete=["old.txt"], title="Second")
    third = repo.commit({"config.json": b"3"}, branch="refs/pr/1", title="Third")
    repo.branches["feature/x"] = first.sha
    return first, second, third


def test_a_revision_is_a_branch_a_tag_or_a_sha(hub: Hub, api: HfApi, download: Download) -> None:
    first, second, third = history(hub)
    revisions = {None: b"2", "main": b"2", "v1": b"1", "feature/x": b"1", "refs/pr/1": b"3"}
    revisions |= {first.sha: b"1", third.sha: b"3", second.sha[:8]: b"2"}
    assert {revision: download("octo/tiny", "config.json", revision=revision) for revision in revisions} == revisions
    assert api.model_info("octo/tiny", revision="feature/x").sha == first.sha
    assert api.list_repo_files("octo/tiny") == ["config.json"]
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: v2"):
        download("octo/tiny", "config.json", revision="v2")
    for unknown in ("v2", "0" * 40, first.sha[:6]):
        with pytest.raises(RevisionNotFoundError):
            api.model_info("octo/tiny", revision=unknown)


def test_refs_and_commits_tell_the_history(hub: Hub, api: HfApi) -> None:
    first, second, third = history(hub)
    refs = api.list_repo_refs("octo/tiny", include_pull_requests=True)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second.sha, "feature/x": first.sha}
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", first.sha)]
    assert [ref.target_commit for ref in refs.pull_requests or []] == [third.sha]
    told = api.list_repo_commits("octo/tiny")
    assert [commit.commit_id for commit in told] == [second.sha, first.sha]
    assert told[0].title == "Second"
    assert told[0].created_at > told[1].created_at


def test_model_info_tells_sizes_and_hashes(hub: Hub, api: HfApi) -> None:
    commit = hub.add("octo/tiny", FILES, gated="manual").commits[0]
    info = api.model_info("octo/tiny", files_metadata=True, securityStatus=True)
    assert (info.id, info.sha, info.private, info.gated) == ("octo/tiny", commit.sha, False, "manual")
    assert info.card_data is not None
    assert info.card_data.license == "mit"
    assert info.tags == ["int8", "base_model:octo/base", "license:mit"]
    assert info.security_repo_status == {"scansDone": True, "filesWithIssues": []}
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert {path: sibling.size for path, sibling in siblings.items()} == {path: len(content) for path, content in FILES.items()}
    assert siblings["config.json"].blob_id == git_hash(CONFIG)
    assert siblings["config.json"].lfs is None
    lfs = siblings["model.safetensors"].lfs
    assert lfs is not None
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{lfs.sha256}\nsize {len(WEIGHTS)}\n".encode()
    assert (lfs.size, lfs.pointer_size, siblings["model.safetensors"].blob_id) == (len(WEIGHTS), len(pointer), git_hash(pointer))
    bare = api.model_info("octo/tiny")
    assert {sibling.size for sibling in bare.siblings or []} == {None}
    assert api.model_info("octo/tiny", expand=["gated"]).sha is None


def test_the_tree_lists_files_and_folders(hub: Hub, api: HfApi) -> None:
    repo = hub.add("octo/tiny", FILES)
    repo.commit({"config.json": b"{}"}, title="Change the config")
    name = "onnx/deep/notes on # 100% é.txt"
    assert [entry.path for entry in api.list_repo_tree("octo/tiny")] == ["README.md", "config.json", "model.safetensors", "onnx"]
    assert [entry.path for entry in api.list_repo_tree("octo/tiny", "onnx")] == ["onnx/deep", "onnx/model.onnx"]
    assert [entry.path for entry in api.list_repo_tree("octo/tiny", "onnx", recursive=True)] == ["onnx/deep", name, "onnx/model.onnx"]
    assert [entry.path for entry in api.list_repo_tree("octo/tiny", "onnx/deep")] == [name]
    with pytest.raises(EntryNotFoundError, match="gone does not exist"):
        list(api.list_repo_tree("octo/tiny", "gone"))
    told: list[Any] = api.get_paths_info("octo/tiny", ["config.json", "onnx", "gone", "model.safetensors"], expand=True)
    assert [entry.path for entry in told] == ["config.json", "onnx", "model.safetensors"]
    assert [type(entry).__name__ for entry in told] == ["RepoFile", "RepoFolder", "RepoFile"]
    assert [entry.last_commit.title for entry in told] == ["Change the config", "Upload files", "Upload files"]
    assert told[0].security.safe
    assert told[2].lfs.size == len(WEIGHTS)
    assert api.get_paths_info("octo/tiny", "config.json")[0].last_commit is None


def test_a_name_that_must_be_quoted_survives(hub: Hub, download: Download) -> None:
    hub.add("octo/tiny", {"a b/# 100% é?.txt": b"small", "a b/# 100% é?.bin": b"large"})
    assert download("octo/tiny", "a b/# 100% é?.txt") == b"small"
    assert download("octo/tiny", "a b/# 100% é?.bin") == b"large"


def test_a_range_is_read_and_nothing_else(hub: Hub, big_file: Path) -> None:
    hub.add("octo/tiny", {"model.safetensors": big_file, "config.json": CONFIG})
    files = HfFileSystem(endpoint=hub.url, token=False, skip_instance_cache=True)
    with files.open("octo/tiny/model.safetensors", block_size=1024, cache_type="none") as file:
        file.seek(20 * MIB)
        assert file.read(1000) == big_file.read_bytes()[20 * MIB : 20 * MIB + 1000]
    asked = f"bytes={20 * MIB}-{20 * MIB + 999}"
    assert steps(hub.asked("resolve|cdn")) == [("GET", "resolve", asked, 302), ("GET", "cdn", asked, 206)]
    assert [seen.size_bytes for seen in hub.asked("cdn")] == [1000]
    assert files.cat_file("octo/tiny/config.json", start=2, end=7) == CONFIG[2:7]
    assert files.cat_file("octo/tiny/config.json") == CONFIG


def test_ranges_follow_the_rfc(hub: Hub) -> None:
    hub.add("octo/tiny", {"digits.txt": b"0123456789"})
    answers = {
        "bytes=2-4": (206, "bytes 2-4/10", b"234"),
        "bytes=7-": (206, "bytes 7-9/10", b"789"),
        "bytes=-3": (206, "bytes 7-9/10", b"789"),
        "bytes=-30": (206, "bytes 0-9/10", b"0123456789"),
        "bytes=8-100": (206, "bytes 8-9/10", b"89"),
        "bytes=10-": (416, "bytes */10", b""),
        "bytes=-0": (416, "bytes */10", b""),
        "bytes=4-2": (200, None, b"0123456789"),
        "bytes=-": (200, None, b"0123456789"),
        "lines=1-2": (200, None, b"0123456789"),
    }
    url = f"{hub.url}/octo/tiny/resolve/main/digits.txt"
    responses = {asked: get_session().get(url, headers={"Range": asked}) for asked in answers}
    assert {asked: (r.status_code, r.headers.get("Content-Range"), r.content) for asked, r in responses.items()} == answers


def test_safetensors_metadata_reads_headers_only(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    save_file({"up": np.ones((512, 2048), np.float32)}, tmp_path / "one.safetensors")
    hub.add("octo/one", {"model.safetensors": tmp_path / "one.safetensors"})
    metadata = api.get_safetensors_metadata("octo/one")
    assert metadata.files_metadata["model.safetensors"].tensors["up"].shape == [512, 2048]
    assert [(seen.range, seen.size_bytes) for seen in hub.asked("cdn")] == [("bytes=0-100000", 100001)]


def test_safetensors_metadata_of_shards(hub: Hub, tmp_path: Path) -> None:
    index = {"metadata": {}, "weight_map": {"up": "a.safetensors", "down": "b.safetensors"}}
    files: dict[str, bytes | Path] = {"model.safetensors.index.json": json.dumps(index).encode()}
    for name, shard in index["weight_map"].items():
        save_file({name: np.ones((3, 5), np.float16)}, tmp_path / shard)
        files[shard] = tmp_path / shard
    hub.add("octo/two", files)
    program = """
        import json
        from huggingface_hub import get_safetensors_metadata
        shards = get_safetensors_metadata("octo/two").files_metadata
        print(json.dumps({name: tensor.shape for shard in shards.values() for name, tensor in shard.tensors.items()}))
    """
    assert run_client(hub, tmp_path / "home", program) == {"up": [3, 5], "down": [3, 5]}


def test_a_cut_download_is_resumed(hub: Hub, download: Download, big_file: Path) -> None:
    hub.add("octo/tiny", {"model.safetensors": big_file})
    fault = Fault("model.safetensors", status="cut", after_bytes=21 * MIB)
    hub.faults.append(fault)
    assert download("octo/tiny", "model.safetensors") == big_file.read_bytes()
    assert fault.times == 0
    assert [(seen.range, seen.status, seen.size_bytes) for seen in hub.asked("cdn")] == [
        (None, 200, 21 * MIB),
        (f"bytes={20 * MIB}-", 206, 4 * MIB),
    ]


def test_a_cut_small_download_starts_again(hub: Hub, download: Download) -> None:
    hub.add("octo/tiny", FILES)
    hub.faults.append(Fault("model.safetensors", status="cut"))
    assert download("octo/tiny", "model.safetensors") == WEIGHTS
    assert [seen.size_bytes for seen in hub.asked("cdn")] == [len(WEIGHTS) // 2, len(WEIGHTS)]


def test_a_reset_connection_is_no_orderly_end(hub: Hub, download: Download) -> None:
    hub.add("octo/tiny", FILES)
    hub.faults.append(Fault("model.safetensors", status="reset"))
    with pytest.raises(httpx.ReadError):
        download("octo/tiny", "model.safetensors")
    assert download("octo/tiny", "model.safetensors") == WEIGHTS


def test_too_many_requests_are_waited_out(hub: Hub, download: Download) -> None:
    hub.add("octo/tiny", FILES)
    hub.faults.append(Fault("config.json", times=2, status=429, method="HEAD", headers={"Retry-After": "0"}))
    assert download("octo/tiny", "config.json") == CONFIG
    assert [(seen.method, seen.status) for seen in hub.requests] == [("HEAD", 429), ("HEAD", 429), ("HEAD", 200), ("GET", 200)]


def test_a_fault_can_spare_the_other_methods(hub: Hub, download: Download) -> None:
    hub.add("octo/tiny", FILES)
    hub.faults.append(Fault("config.json", status=503, method="GET"))
    with pytest.raises(HfHubHTTPError, match="503"):
        download("octo/tiny", "config.json")
    assert steps(hub.requests) == [("HEAD", "resolve", None, 200), ("GET", "resolve", None, 503)]


def test_an_answer_can_be_anything(hub: Hub, api: HfApi) -> None:
    hub.add("octo/tiny", FILES)
    hub.add("octo/other", FILES)
    hub.faults += [Fault("octo/tiny$", status=429, headers={"Retry-After": "7"}), Fault("octo/tiny$", times=2, status=500)]
    with pytest.raises(HfHubHTTPError) as refused:
        api.model_info("octo/tiny")
    assert (refused.value.response.status_code, refused.value.response.headers["Retry-After"]) == (429, "7")
    assert api.model_info("octo/other").id == "octo/other"
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="500"):
            api.model_info("octo/tiny")
    assert api.model_info("octo/tiny").id == "octo/tiny"


def test_a_slow_answer_times_out(hub: Hub, api: HfApi) -> None:
    hub.add("octo/tiny", FILES)
    hub.faults.append(Fault("octo/tiny", status="slow", delay_s=0.4))
    with pytest.raises(httpx.ReadTimeout):
        api.model_info("octo/tiny", timeout=0.1)
    hub.faults.append(Fault("octo/tiny", status="slow", delay_s=0.1))
    assert api.model_info("octo/tiny", timeout=5).id == "octo/tiny"


def test_a_failure_of_the_stand_in_itself_is_told(tmp_path: Path) -> None:
    hub = Hub()
    (tmp_path / "shard.bin").write_bytes(b"soon gone")
    hub.add("octo/tiny", {"shard.bin": tmp_path / "shard.bin"})
    (tmp_path / "shard.bin").unlink()
    with pytest.raises(ExceptionGroup, match="stand-in") as failed, serve(hub) as url:
        assert get_session().get(f"{url}/octo/tiny/resolve/main/shard.bin").status_code == 500
    assert isinstance(failed.value.exceptions[0], FileNotFoundError)


def test_what_is_missing_is_said_to_be(hub: Hub, api: HfApi, download: Download, tmp_path: Path) -> None:
    commit = hub.add("octo/tiny", FILES).commits[0]
    hub.tokens["hf_eve"] = "eve"
    with pytest.raises(EntryNotFoundError):
        download("octo/tiny", "gone.json")
    assert (tmp_path / "cache/models--octo--tiny/.no_exist" / commit.sha / "gone.json").exists()
    for token, status in ((False, 401), ("hf_eve", 404)):
        with pytest.raises(RepositoryNotFoundError) as missing:
            api.model_info("octo/gone", token=token)
        assert missing.value.response.status_code == status
        with pytest.raises(RepositoryNotFoundError):
            download("octo/gone", "config.json", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        api.model_info("octo/tiny", token="hf_expired")
    assert not isinstance(refused.value, RepositoryNotFoundError)
    assert api.file_exists("octo/tiny", "config.json")
    assert not api.file_exists("octo/tiny", "gone")
    assert not api.repo_exists("octo/gone")


def test_a_gated_repo_shows_its_metadata_and_keeps_its_files(hub: Hub, api: HfApi, download: Download) -> None:
    repo = hub.add("octo/tiny", FILES, gated="auto")
    hub.tokens |= {"hf_eve": "eve", "hf_octo": "octo"}
    for token, status in ((False, 401), ("hf_eve", 403)):
        assert api.model_info("octo/tiny", token=token).gated == "auto"
        assert len(list(api.list_repo_tree("octo/tiny", token=token))) == 4
        for ask in (lambda: download("octo/tiny", "config.json", token=token), lambda: api.auth_check("octo/tiny", token=token)):  # noqa: B023
            with pytest.raises(GatedRepoError, match="restricted") as refused:
                ask()
            assert refused.value.response.status_code == status
    repo.readers.add("eve")
    assert download("octo/tiny", "model.safetensors", token="hf_eve") == WEIGHTS
    assert download("octo/tiny", "config.json", token="hf_octo") == CONFIG
    api.auth_check("octo/tiny", token="hf_eve")


def test_a_private_repo_is_not_there_for_others(hub: Hub, api: HfApi, download: Download) -> None:
    hub.add("octo/secret", FILES, private=True, readers=["bob"])
    hub.tokens |= {"hf_eve": "eve", "hf_octo": "octo", "hf_bob": "bob"}
    for token in (False, "hf_eve"):
        with pytest.raises(RepositoryNotFoundError):
            download("octo/secret", "config.json", token=token)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("octo/secret", token=token)
    assert api.model_info("octo/secret", token="hf_bob").private
    assert download("octo/secret", "model.safetensors", token="hf_octo") == WEIGHTS
    assert api.whoami(token="hf_bob")["name"] == "bob"
    assert [seen.user for seen in hub.requests if seen.status < 300] == ["bob", None, "bob"]


def test_a_token_stays_off_the_cdn(hub: Hub) -> None:
    hub.add("octo/secret", FILES, private=True)
    hub.tokens["hf_octo"] = "octo"
    files = HfFileSystem(endpoint=hub.url, token="hf_octo", skip_instance_cache=True)
    assert files.cat_file("octo/secret/model.safetensors", start=0, end=8) == WEIGHTS[:8]
    assert [(seen.user, seen.status) for seen in hub.asked("resolve|cdn")] == [("octo", 302), (None, 206)]
    url = f"{hub.url}/octo/secret/resolve/main/model.safetensors"
    told = get_session().head(url, headers={"Authorization": "Bearer hf_octo"}, follow_redirects=False).headers
    assert (told["ETag"], told["X-Linked-Size"]) == (told["X-Linked-Etag"], str(len(WEIGHTS)))
    assert not [name for name in told if name.lower().startswith("x-xet")]
    signed = told["Location"]
    assert get_session().get(signed).content == WEIGHTS
    assert get_session().get(signed, headers={"Authorization": "Bearer hf_octo"}).status_code == 400
    assert get_session().get(signed.partition("?")[0]).status_code == 403
    assert "X-Repo-Commit" not in get_session().head(signed).headers
    assert get_session().head(signed).headers["ETag"].strip('"') not in signed


def test_a_renamed_repo_is_found_under_its_old_name(hub: Hub, api: HfApi, download: Download, tmp_path: Path) -> None:
    commit = hub.add("octo/new", FILES).commits[0]
    hub.moved |= {"octo/old": "octo/new", "tiny": "octo/new"}
    for old in ("octo/old", "tiny"):
        assert download(old, "config.json") == CONFIG
        assert download(old, "model.safetensors") == WEIGHTS
        info = api.model_info(old, files_metadata=True)
        assert (info.id, info.sha) == ("octo/new", commit.sha)
        assert (info.siblings or [])[0].size is not None
        assert [entry.path for entry in api.get_paths_info(old, ["config.json"])] == ["config.json"]
    assert (tmp_path / "cache/models--octo--old/refs/main").read_text() == commit.sha
    moves = [(before.status, after.status) for before, after in pairwise(hub.asked("config.json"))]
    assert moves[0] == (307, 200)


def test_telemetry_stays_on_the_endpoint(hub: Hub, tmp_path: Path) -> None:
    hub.add("octo/tiny", FILES)
    program = "import huggingface_hub as h; print(h.HfApi().model_info('octo/tiny').downloads)"
    assert run_client(hub, tmp_path / "home", program, HF_HUB_DISABLE_TELEMETRY="0") == 0
    assert [(seen.path, seen.status) for seen in hub.requests] == [("/api/agent-harnesses", 200), ("/api/models/octo/tiny", 200)]
    assert json.loads((tmp_path / "home/.agent_harnesses.json").read_text())["harnesses"] == {}


def test_offline_the_cache_is_enough(hub: Hub, tmp_path: Path) -> None:
    hub.add("octo/tiny", FILES)
    program = """
        import json
        from huggingface_hub import hf_hub_download, snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
        found = {name: open(hf_hub_download("octo/tiny", name), "rb").read().hex() for name in ("config.json", "model.safetensors")}
        folder = snapshot_download("octo/tiny")
        try:
            hf_hub_download("octo/tiny", "gone.json")
        except Exception as error:
            found["error"] = type(error).__name__
        print(json.dumps({**found, "folder": folder}))
    """
    online = run_client(hub, tmp_path / "home", program)
    assert (online["config.json"], online["model.safetensors"]) == (CONFIG.hex(), WEIGHTS.hex())
    assert online["error"] == "RemoteEntryNotFoundError"
    hub.requests.clear()
    offline = run_client(hub, tmp_path / "home", program, HF_HUB_OFFLINE="1")
    assert offline == {**online, "error": "LocalEntryNotFoundError"}
    assert hub.requests == []


def test_transformers_loads_config_and_tokenizer(hub: Hub, tmp_path: Path) -> None:
    words = {"[UNK]": 0, "eight": 1, "bits": 2}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
    }
    hub.add(
        "octo/llama",
        {
            "config.json": json.dumps({"model_type": "llama", "hidden_size": 96}).encode(),
            "tokenizer.json": json.dumps(tokenizer).encode(),
            "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]"}).encode(),
            "additional_chat_templates/tool.jinja": b"{{ messages }}",
        },
        gated="manual",
    )
    hub.tokens["hf_octo"] = "octo"
    program = """
        import json
        from transformers import AutoConfig, AutoTokenizer
        config = AutoConfig.from_pretrained("octo/llama")
        tokenizer = AutoTokenizer.from_pretrained("octo/llama")
        print(json.dumps([type(config).__name__, config.hidden_size, tokenizer("eight bits more")["input_ids"]]))
    """
    expected = ["LlamaConfig", 96, [1, 2, 0]]
    assert run_client(hub, tmp_path / "home", program, HF_TOKEN="hf_octo") == expected
    assert {seen.user for seen in hub.requests} == {"octo"}
