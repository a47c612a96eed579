"""Publishing, to a stand-in for the Hub through the real client; what that read of its environment when it was imported is set here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Hub, hub_fixture  # noqa: F401
from huggingface_hub import HfApi, ModelCard

from convert.admission import admit
from convert.card import Published, check_card, render_card
from convert.pipeline import convert
from convert.progress import QUIET
from convert.push import pack, push
from convert.recipe import Push
from convert.report import Report, at_most, read_report, report_path
from convert.upload import _errors
from formats.errors import HubError, InputError, RefusedError
from formats.manifest import read_manifest
from formats.verify import verify

ROOT = str(Path(__file__).parents[2])
TOKEN = "hf_SECRETSECRETSECRETSECRET"
RECIPE = """\
model: {model}
validation: {{tokens: 256, length: 64}}
targets:
  - name: w8a8
    format: compressed-tensors
    max_shard_size: 2MB
    limits: {{kl_nats: 5.0, top1: 0.0, perplexity_ratio: 50.0}}
  - name: fp8
    format: compressed-tensors
    rules: [{{match: linear, scheme: fp8-weight-only}}]
    limits: {{kl_nats: 5.0, top1: 0.0, perplexity_ratio: 50.0}}
"""
CARD = "---\nlicense: apache-2.0\n---\n"


@pytest.fixture(scope="module")
def made(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two proven artifacts of one model, `w8a8` in several shards and `fp8` in one."""
    from convert.recipe import parse_recipe

    source = make_llama(hidden_size=256, intermediate_size=768, vocab_size=3000)
    (source / "README.md").write_text(CARD)
    out = tmp_path_factory.mktemp("made") / "job"
    recipe = parse_recipe(RECIPE.format(model=source), "job.yaml", name="job")
    assert convert(recipe, out).passed
    assert len(list((out / "w8a8").glob("*.safetensors"))) >= 3
    return out


@pytest.fixture
def artifacts(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "job"))


@pytest.fixture
def octo(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The stand-in, with a user `octo` of the organisation `org` logged in."""
    hub.tokens = {TOKEN: "octo", "hf_other": "other"}
    hub.orgs = {"octo": {"org"}, "other": set()}
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("convert.hub.RETRY_SECONDS", (0.01,) * 4)
    return hub


TO = Push(repo="org/name")


def content(hub: Hub, repo: str = "org/name", revision: str = "main") -> dict[str, bytes]:
    return {path: b"".join(blob.read()) for path, blob in hub.repos[repo].commit_at(revision).files.items()}


def puts(hub: Hub) -> list[str]:
    return [exchange.path for exchange in hub.asked("/upload/", method="PUT") if exchange.status == 200]


def test_every_byte_goes_up_in_one_commit_to_a_private_repo_and_nothing_the_second_time(octo: Hub, artifacts: Path) -> None:
    shown: list[int] = []

    class Watched:
        def stage(self, name: str, total: int, **_: str) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def counted() -> Iterator[Callable[[int], None]]:
                done: list[int] = []
                yield done.append
                if name.startswith("uploading"):
                    shown.extend((total, sum(done)))

            return counted()

        def say(self, message: str) -> None:
            pass

    (done,) = push([artifacts / "w8a8"], TO, progress=Watched())
    repo = octo.repos["org/name"]
    assert repo.private
    assert done.commit == repo.branches["main"]
    assert [commit.title for commit in repo.commits] == ["initial commit", "octavo 0.1.0: w8a8"]
    there = content(octo)
    ours = {path.name: path.read_bytes() for path in (artifacts / "w8a8").iterdir() if path.name != "README.md"}
    assert {name: there[name] for name in ours} == ours
    assert there["octavo.report.json"] == (artifacts / "w8a8.report.json").read_bytes()
    assert there.keys() - ours.keys() == {"README.md", ".gitattributes", "octavo.report.json"}
    assert shown[0] == shown[1] == sum(size for _, size in done.sent)
    octo.requests.clear()
    (again,) = push([artifacts / "w8a8"], TO)
    assert (again.changed, again.commit, again.sent) == (False, done.commit, ())
    assert again.unchanged == len(done.sent)
    assert not [exchange for exchange in octo.requests if exchange.method in ("PUT", "POST")], "the Hub was only read"


def test_only_what_changed_is_sent_and_what_the_artifact_no_longer_has_is_deleted(octo: Hub, artifacts: Path) -> None:
    push([artifacts / "w8a8"], TO)
    octo.repos["org/name"].commit({"photo.png": b"x"})
    octo.requests.clear()
    (done,) = push([artifacts / "fp8"], TO)
    assert {path for path, _ in done.sent} >= {"model.safetensors", "config.json", "octavo.json", "README.md"}
    assert "tokenizer.json" not in {path for path, _ in done.sent}
    assert "model.safetensors.index.json" in done.deleted
    there = content(octo)
    assert not [name for name in there if name.startswith("model-")]
    assert "photo.png" in there, "what somebody else put there stays"
    assert len(puts(octo)) == 1


def test_weights_of_somebody_else_in_the_repo_stop_the_push(octo: Hub, artifacts: Path) -> None:
    octo.add("org/name", {"model.safetensors": b"x"})
    with pytest.raises(InputError, match=r"holds model.safetensors, which is not of this artifact"):
        push([artifacts / "w8a8"], TO)
    assert len(octo.repos["org/name"].commits) == 1


def damage_a_weight(folder: Path) -> None:
    path = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def damage_the_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text().replace("<unk>", "<unq>"))


def add_a_file(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")


def edit_the_card(folder: Path) -> None:
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMMLU: 99 %\n")


def drop_the_report(folder: Path) -> None:
    report_path(folder).unlink()


def _rewrite(folder: Path, change: Callable[[Report], Report]) -> None:
    report_path(folder).write_bytes(change(read_report(report_path(folder))).to_bytes())


def fail_a_limit(folder: Path) -> None:
    _rewrite(
        folder,
        lambda report: replace(
            report, checks=tuple(at_most(c.name, 9.0, c.limit, c.unit) if c.name.endswith("kl_nats") else c for c in report.checks)
        ),
    )


def claim_a_pass(folder: Path) -> None:
    _rewrite(
        folder,
        lambda report: replace(report, checks=tuple(replace(c, value=9.0) if c.name.endswith("kl_nats") else c for c in report.checks)),
    )


def loosen_a_limit(folder: Path) -> None:
    _rewrite(
        folder,
        lambda report: replace(report, checks=tuple(replace(c, limit=7.0) if c.name.endswith("kl_nats") else c for c in report.checks)),
    )


def lose_a_runtime(folder: Path) -> None:
    _rewrite(
        folder,
        lambda report: replace(report, runtimes=(), checks=tuple(c for c in report.checks if not c.name.startswith("transformers"))),
    )


def lose_a_check(folder: Path) -> None:
    _rewrite(folder, lambda report: replace(report, checks=tuple(c for c in report.checks if not c.name.endswith("top1"))))


def take_anothers_report(folder: Path) -> None:
    shutil.copy(folder.parent / "fp8.report.json", report_path(folder))


def edit_the_manifest(folder: Path) -> None:
    path = folder / "octavo.json"
    path.write_text(path.read_text().replace("5.0", "50.0"))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (damage_a_weight, r"model-0000\d-of-0000\d.safetensors: its sha256 is not the manifest's"),
        (damage_the_tokenizer, "tokenizer.json: its sha256 is not the manifest's"),
        (add_a_file, "pytorch_model.bin: not in the manifest"),
        (edit_the_card, "README.md is not the one that was made from the report"),
        (drop_the_report, "it was not proven"),
        (fail_a_limit, r"transformers: kl_nats failed \(9, at most 5 nats"),
        (claim_a_pass, "kl_nats is said to have passed and did not"),
        (loosen_a_limit, "kl_nats was held against 7, its recipe says 5"),
        (lose_a_runtime, "it was not proven in transformers, which its target names"),
        (lose_a_check, r"it was not proven in transformers, which its target names \(no transformers: top1\)"),
        (take_anothers_report, "its report is of another manifest"),
        (edit_the_manifest, "its report is of another manifest"),
    ],
)
def test_what_is_not_proven_is_refused_and_nothing_is_created(octo: Hub, artifacts: Path, break_it: Any, said: str) -> None:
    break_it(artifacts / "w8a8")
    with pytest.raises(RefusedError, match=said) as refused:
        push([artifacts / "w8a8"], TO)
    assert refused.value.exit_code == 1
    assert not octo.repos
    assert not octo.requests, "the Hub was not even asked"


def test_a_file_that_changes_while_it_goes_up_is_not_published(octo: Hub, artifacts: Path) -> None:
    octo.faults.append(Fault("/upload/", status="slow", delay_s=0.2, times=9, method="PUT"))
    (parcel,) = pack([admit(artifacts / "w8a8", QUIET)], TO)
    os.utime(max((artifacts / "w8a8").glob("*.safetensors"), key=lambda path: path.stat().st_size))
    from convert.upload import send

    with pytest.raises(RefusedError, match="changed after it was admitted"):
        send(parcel, QUIET)
    assert len(octo.repos["org/name"].commits) == 1


FAULTS = {
    "500 for the repo": Fault("/api/repos/create", status=500),
    "429 for the repo": Fault("/api/repos/create", status=429, headers={"Retry-After": "0"}),
    "503 for a weight": Fault("/upload/", status=503, method="PUT"),
    "cut in a weight": Fault("/upload/", status="cut", method="PUT"),
    "reset in a weight": Fault("/upload/", status="reset", method="PUT", after_bytes=100_000),
    "429 for the list": Fault("/objects/batch", status=429, headers={"Retry-After": "0"}),
    "500 for the commit": Fault("/commit/main", status=500, method="POST"),
    "429 for the commit": Fault("/commit/main", status=429, headers={"Retry-After": "0"}, method="POST"),
    "the commit's answer lost": Fault("/commit/main", status="lost", method="POST"),
    "a slow commit": Fault("/commit/main", status="slow", method="POST"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_hub_that_stumbles_gets_everything_all_the_same(octo: Hub, artifacts: Path, name: str) -> None:
    fault = replace(FAULTS[name])
    octo.faults.append(fault)
    (done,) = push([artifacts / "w8a8"], TO)
    assert fault.times == 0, "the fault was met"
    assert done.commit == octo.repos["org/name"].branches["main"]
    assert len(octo.repos["org/name"].commits) == 2, "one commit, whatever happened to its answer"
    assert content(octo)["octavo.json"] == (artifacts / "w8a8" / "octavo.json").read_bytes()


def test_parts_of_a_large_file_are_sent_again_one_by_one(octo: Hub, artifacts: Path) -> None:
    octo.part_bytes = 500_000
    octo.faults.append(Fault(r"/upload/.*/2$", status="cut", method="PUT"))
    push([artifacts / "fp8"], TO)
    parts = [path.rpartition("/")[2] for path in puts(octo)]
    assert len(parts) == len(set(parts)) > 5, "no part twice"
    assert content(octo)["model.safetensors"] == (artifacts / "fp8" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("/api/repos/create", status=401), "does not know this token; log in again with: hf auth login"),
        (Fault("/api/repos/create", status=403), "this token may not write there"),
        (Fault("/commit/main", status=403), "this token may not write there"),
        (Fault("/preupload/", status=404), "deleted or renamed meanwhile"),
        (Fault("/commit/main", status=409), "push again"),
        (Fault("/commit/main", status=412), "somebody committed to main meanwhile"),
        (Fault("/commit/main", status=429, times=99, headers={"Retry-After": "0"}), "limits how often it is asked"),
        (Fault("/api/repos/create", status=502, times=99), "answered 502 again and again"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(octo: Hub, artifacts: Path, fault: Fault, said: str) -> None:
    octo.faults.append(replace(fault))
    with pytest.raises(HubError, match=said) as refused:
        push([artifacts / "fp8"], TO)
    assert refused.value.exit_code == 1
    assert "signature=" not in str(refused.value)
    assert TOKEN not in str(refused.value)
    assert not [repo for repo in octo.repos.values() if len(repo.commits) > 1], "nothing is visible"


def test_a_namespace_of_somebody_else_and_nobody_logged_in(octo: Hub, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HubError, match=r"this token may not write there .*namespace"):
        push([artifacts / "fp8"], Push(repo="theirs/name"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(HubError, match="nobody is logged in"):
        push([artifacts / "fp8"], TO)


def test_a_hub_that_is_not_there(octo: Hub, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached"):
        push([artifacts / "fp8"], TO)


def test_a_commit_of_somebody_else_meanwhile_is_a_conflict_and_stays(octo: Hub, artifacts: Path) -> None:
    octo.add("org/name", {"README.md": b"# ours\n"})
    octo.faults.append(Fault("/upload/", status="slow", delay_s=1.0, times=9, method="PUT"))
    failed: list[HubError] = []

    def try_it() -> None:
        try:
            push([artifacts / "w8a8"], TO)
        except HubError as error:
            failed.append(error)

    thread = threading.Thread(target=try_it)
    thread.start()
    while not octo.asked("/objects/batch"):
        time.sleep(0.01)
    theirs = octo.repos["org/name"].commit({"README.md": b"# theirs\n"})
    thread.join()
    assert "somebody committed to main meanwhile" in str(failed[0])
    assert theirs.sha[:12] in str(failed[0])
    assert content(octo)["README.md"] == b"# theirs\n"
    octo.requests.clear()
    push([artifacts / "w8a8"], TO)
    assert not puts(octo), "what was sent is there"
    assert content(octo)["octavo.json"] == (artifacts / "w8a8" / "octavo.json").read_bytes()


@pytest.mark.parametrize("names", [("w8a8", "fp8"), ("w8a8", "w8a8")], ids=["different", "the same"])
def test_two_pushes_at_once_end_in_one_artifact_never_in_a_mixture(octo: Hub, artifacts: Path, names: tuple[str, str]) -> None:
    octo.add("org/name", {".gitattributes": b""})
    octo.faults.append(Fault("/commit/main", status="slow", delay_s=0.5, times=1, method="POST"))
    outcomes: list[Any] = []

    def try_it(name: str) -> None:
        try:
            outcomes.append(push([artifacts / name], TO)[0].changed)
        except HubError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=try_it, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    there = content(octo)
    whole = [name for name in set(names) if there["octavo.json"] == (artifacts / name / "octavo.json").read_bytes()]
    assert len(whole) == 1
    manifest = read_manifest(artifacts / whole[0])
    assert {file.name for file in manifest.files} <= there.keys()
    assert not [name for name in there if name.endswith(".safetensors") and name not in {file.name for file in manifest.files}]
    if names[0] == names[1]:
        assert True in outcomes
        assert not [outcome for outcome in outcomes if isinstance(outcome, HubError)]
    else:
        assert [type(outcome) for outcome in outcomes if outcome is not True] in ([], [HubError])
    assert sum(commit.title.startswith("octavo") for commit in octo.repos["org/name"].commits) <= 2


def test_a_push_that_was_killed_goes_on_where_it_stopped(octo: Hub, artifacts: Path, tmp_path: Path) -> None:
    shards = sorted((artifacts / "w8a8").glob("*.safetensors"), key=lambda path: -path.stat().st_size)
    slow = next(file.sha256 for file in read_manifest(artifacts / "w8a8").files if file.name == shards[0].name)
    octo.faults.append(Fault(f"/upload/.*{slow}", status="slow", delay_s=60, method="PUT"))
    environment = {**octo.environment(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "convert", "push", str(artifacts / "w8a8"), "--repo", "org/name", "--quiet"]
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(puts(octo)) < len(shards) - 1:
        assert time.monotonic() < deadline
        assert running.poll() is None, running.stderr
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert len(octo.repos["org/name"].commits) == 1, "nothing is visible"
    octo.faults.clear()
    octo.requests.clear()
    push([artifacts / "w8a8"], TO)
    assert [path.rpartition("/")[2] for path in puts(octo)] == [slow], "only what was not finished is sent"
    assert verify_there(octo, artifacts / "w8a8", tmp_path)


def verify_there(hub: Hub, artifact: Path, tmp_path: Path, revision: str = "main") -> bool:
    """What is on the Hub, as a folder, is good, and is that artifact."""
    folder = tmp_path / "there"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, raw in content(hub, revision=revision).items():
        (folder / name).write_bytes(raw)
    return verify(folder).passed and read_manifest(folder) == read_manifest(artifact)


def test_a_branch_a_tag_and_a_pull_request(octo: Hub, artifacts: Path, tmp_path: Path) -> None:
    octo.add("org/name", {"README.md": b"# ours\n"})
    push([artifacts / "fp8"], Push(repo="org/name", revision="eight-bit/v1", tag="v1"))
    repo = octo.repos["org/name"]
    assert content(octo)["README.md"] == b"# ours\n"
    assert verify_there(octo, artifacts / "fp8", tmp_path, "eight-bit/v1")
    assert repo.tags["v1"] == repo.branches["eight-bit/v1"]
    (done,) = push([artifacts / "w8a8"], Push(repo="org/name", create_pr=True))
    assert done.url.endswith("/org/name/discussions/1")
    assert content(octo)["README.md"] == b"# ours\n"
    assert verify_there(octo, artifacts / "w8a8", tmp_path, "refs/pr/1")


def test_a_dry_run_creates_nothing(octo: Hub, artifacts: Path) -> None:
    (done,) = push([artifacts / "fp8"], TO, dry_run=True)
    assert (done.created, done.commit, done.changed) == (True, None, False)
    assert "model.safetensors" in {path for path, _ in done.sent}
    assert not octo.repos
    assert {exchange.method for exchange in octo.requests} == {"GET"}


def test_several_artifacts_go_to_repos_branches_or_folders(octo: Hub, artifacts: Path, tmp_path: Path) -> None:
    both = [artifacts / "w8a8", artifacts / "fp8"]
    with pytest.raises(InputError, match=r"write \{target\} into its name"):
        push(both, TO)
    push(both, Push(repo="org/model-{target}"))
    assert {"org/model-w8a8", "org/model-fp8"} == set(octo.repos)
    push(both, Push(repo="org/name", layout="branches"))
    assert verify_there(octo, both[0], tmp_path, "main")
    assert verify_there(octo, both[1], tmp_path, "fp8")
    assert 'revision="fp8"' in content(octo, revision="fp8")["README.md"].decode()
    push(both, Push(repo="org/folders", layout="folders"))
    assert len(octo.repos["org/folders"].commits) == 2, "one commit for all"
    there = content(octo, "org/folders")
    assert there["w8a8/octavo.json"] == (both[0] / "octavo.json").read_bytes()
    assert "[fp8](fp8/README.md)" in there["README.md"].decode()
    assert 'subfolder="fp8"' in there["fp8/README.md"].decode()
    ModelCard(there["README.md"].decode()).validate()


def test_the_card_is_valid_says_what_was_measured_and_nothing_else(octo: Hub, artifacts: Path) -> None:
    path = artifacts / "w8a8"
    report = read_report(report_path(path))
    push([path], TO)
    text = content(octo)["README.md"].decode()
    card = ModelCard(text)
    card.validate()
    check_card(text)
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results is not None
    assert card.data.eval_results[0].metric_value == round(report.runtimes[0].divergence.perplexity, 4)  # type: ignore[union-attr]
    found = report.runtimes[0].divergence
    assert found is not None
    for measured in (
        f"{found.kl_nats:.4f}",
        f"{100 * found.top1:.1f} %",
        f"{found.perplexity_ratio:.3f}",
        f"{report.source.weight_bytes:,}",
    ):
        assert measured in text
    assert 'from_pretrained("org/name", dtype="auto")' in text
    assert "octavo verify org/name`" in text
    assert f"{report.validation['tokens']:,} held-out tokens" in text


@pytest.mark.parametrize(
    ("source", "public", "accept", "said"),
    [
        ({"licence": "apache-2.0"}, True, (), None),
        ({"licence": None}, False, (), r"names no licence, so nothing allows copies.*accept: \[unknown\]"),
        ({"licence": None}, False, ("unknown",), None),
        ({"licence": "other"}, False, (), r"accept: \[other\]"),
        ({"licence": "llama3.1", "gated": True}, False, ("llama3.1",), r"is gated.*accept: \[gated\]"),
        ({"licence": "llama3.1", "gated": True}, False, ("Llama3.1", "gated"), None),
        ({"licence": "cc-by-nd-4.0"}, False, (), "allows no changed copies"),
        ({"licence": "mit", "private": True}, True, (), r"is private, and this push is public.*accept: \[private\]"),
        ({"licence": "mit", "private": True}, False, (), None),
        ({"licence": "mit", "gated": None, "commit": "f" * 40}, False, (), "was opened from the cache"),
    ],
)
def test_terms_need_a_word(source: dict[str, Any], public: bool, accept: tuple[str, ...], said: str | None) -> None:
    from convert.licence import require_permission

    full = {"origin": "org/source", "commit": None, "gated": False, "private": False, **source}
    if said is None:
        require_permission(full, accept, public=public, name="q")
        return
    with pytest.raises(InputError, match=said):
        require_permission(full, accept, public=public, name="q")


def test_a_private_source_does_not_go_to_a_public_repo_that_is_there(octo: Hub, artifacts: Path) -> None:
    octo.add("org/name", {".gitattributes": b""})
    item = admit(artifacts / "fp8", QUIET)
    private = replace(item, manifest=replace(item.manifest, source={**item.manifest.source, "private": True}))
    from convert.upload import send

    with pytest.raises(InputError, match="org/name is public, and a private source does not go to a public repo by itself"):
        send(pack([private], TO)[0], QUIET)
    send(pack([private], Push(repo="org/name", accept=("private",)))[0], QUIET)


def test_a_card_says_how_a_graph_runs_on_a_gpu_and_in_which_version(artifacts: Path) -> None:
    """And a report without that version, as one of another octavo may be, still gives a card."""
    report, manifest = read_report(report_path(artifacts / "fp8")), read_manifest(artifacts / "fp8")
    graph = replace(manifest.files[0], name="onnx/model_quantized.onnx")
    manifest = replace(manifest, files=(*manifest.files, graph))
    run = replace(report.runtimes[0], name="onnxruntime-gpu on CUDA (CUDAExecutionProvider)", device="cuda")
    for versions, installed in (({"onnxruntime-gpu": "1.31.1", "onnx": "1.23.2"}, "onnxruntime-gpu==1.31.1"), ({}, "onnxruntime-gpu")):
        text = render_card(replace(report, runtimes=(replace(run, versions=versions),)), manifest, Published("org/x", "v1", "f"))
        assert f"pip install {installed}\n" in text
        code = text.partition("```python\n")[2].partition("```")[0]
        assert '"model/f/onnx/model_quantized.onnx", providers=["CUDAExecutionProvider"' in code
        compile(code, "card", "exec")
        check_card(text)


def test_a_card_for_a_folder_names_no_repo(artifacts: Path) -> None:
    path = artifacts / "fp8"
    text = render_card(read_report(report_path(path)), read_manifest(path))
    assert 'from_pretrained("FOLDER"' in text
    assert Published("org/x", "v1", "f").name == "org/x@v1/f"
    check_card(text)


def test_the_token_is_nowhere_but_on_the_line(octo: Hub, artifacts: Path, tmp_path: Path) -> None:
    """Pushes with the command, through faults that end in retries and in an error, and looks into everything that it leaves."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    seen: list[str] = []
    said = b""
    for fault, code in ((Fault("/upload/", status=500, method="PUT"), 0), (Fault("/commit/main", status=403), 1)):
        octo.faults = [fault]
        octo.repos.clear()
        octo.stored.clear()
        command = [sys.executable, "-m", "convert", "push", str(artifacts / "fp8"), "--repo", "org/name"]
        environment = {**octo.environment(home), "HF_HUB_VERBOSITY": "debug"}
        running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        while running.poll() is None:
            try:
                seen.append(Path(f"/proc/{running.pid}/cmdline").read_text())
                seen.append(Path(f"/proc/{running.pid}/environ").read_text())
            except OSError:
                break
            time.sleep(0.2)
        said += running.communicate()[0]
        assert running.returncode == code, said.decode()
    assert seen
    assert [exchange for exchange in octo.requests if exchange.user == "octo"], "it was used"
    pushed = b"".join(b"".join(blob.read()) for repo in octo.repos.values() for blob in repo.commits[-1].files.values())
    left = [path.read_bytes() for path in artifacts.rglob("*") if path.is_file()]
    for place in (said, pushed, "".join(seen).encode(), *left):
        assert TOKEN.encode() not in place
    assert b"Traceback" not in said


@pytest.mark.slow
def test_a_pushed_artifact_loads_back_from_the_hub_to_the_byte(octo: Hub, artifacts: Path, tmp_path: Path) -> None:
    push([artifacts / "w8a8"], TO)
    program = """if True:
        import json, sys, torch, hashlib
        from transformers import AutoModelForCausalLM, AutoTokenizer
        def digest(name):
            model, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype="auto"), AutoTokenizer.from_pretrained(name)
            state = hashlib.sha256()
            for key, tensor in sorted(model.state_dict().items()):
                state.update(key.encode() + tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            ids = tokenizer("Call me Ishmael.", return_tensors="pt").input_ids
            return [state.hexdigest(), model(ids).logits.float().sum().item()]
        print(json.dumps([digest("org/name"), digest(sys.argv[1])]))
    """
    environment = {**octo.environment(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-c", program, str(artifacts / "w8a8")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    there, here = json.loads(done.stdout.splitlines()[-1])
    assert there == here
    cached = {path.name: path.read_bytes() for path in (tmp_path / "home").rglob("snapshots/*/*")}
    for name, raw in cached.items():
        if name != "README.md":
            assert raw == (artifacts / "w8a8" / name).read_bytes()
    assert "model-00001-of-00003.safetensors" in cached or len(cached) > 3


@pytest.mark.slow
def test_a_recipe_says_where_and_convert_pushes_what_passed(octo: Hub, make_llama: Any, tmp_path: Path) -> None:
    source = make_llama()
    (source / "README.md").write_text(CARD)
    job = tmp_path / "job.yaml"
    job.write_text(RECIPE.format(model=source).partition("  - name: fp8")[0] + "push: {repo: 'org/it-{target}', private: false}\n")
    environment = {**octo.environment(tmp_path / "home"), "HF_TOKEN": TOKEN}

    def octavo(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "convert", *arguments]
        return subprocess.run(
            command, env={**environment, "PYTHONPATH": ROOT}, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path
        )

    done = octavo("convert", str(job), "--push")
    assert done.returncode == 0, done.stderr
    assert {name: repo.private for name, repo in octo.repos.items()} == {"org/it-w8a8": False}
    again = octavo("push", "artifacts/job/w8a8", "--recipe", "job.yaml", "--tag", "v1")
    assert again.returncode == 0, again.stderr
    assert "nothing to send" in again.stdout
    assert octo.repos["org/it-w8a8"].tags["v1"] == octo.repos["org/it-w8a8"].branches["main"]
    for wrong, said in (
        (("push", "artifacts/job/w8a8"), "say where: --repo"),
        (("push", "artifacts/job/w8a8", "--repo", "nonsense"), "'nonsense': write organisation/name"),
        (("convert", str(job), "--push", "--no-check"), "what is not proven is not published"),
    ):
        refused = octavo(*wrong)
        assert (refused.returncode, said in " ".join(refused.stderr.split())) == (2, True), refused.stderr


def test_the_token_of_a_reader_cannot_write(octo: Hub, artifacts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    octo.add("org/name", {".gitattributes": b""})
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError, match="this token may not write there"):
        push([artifacts / "fp8"], TO)
    push([artifacts / "fp8"], Push(repo="org/name", create_pr=True))
    assert "refs/pr/1" in octo.repos["org/name"].branches, "but ask for it"
    assert HfApi(endpoint=octo.url).repo_exists("org/name")


def test_a_line_to_xet_that_fails_is_one_sentence() -> None:
    with pytest.raises(HubError, match=r"org/name: the line to Xet's storage failed .*HF_HUB_DISABLE_XET=1"), _errors("org/name"):
        raise ConnectionError("Network error: 404 Not Found")
