"""Text out of .parquet files and of datasets on the Hub, against pyarrow's own writer and a Hub on loopback."""

from __future__ import annotations

import io
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hub_server import Fault, Hub, serve
from pyarrow import parquet

from convert.datasets import _inferred, _matched, is_hub_id, pin
from convert.recipe import parse_recipe
from convert.text import Selection, load_tokenizer, take_documents, take_tokens
from formats.errors import InputError, RecipeError


def words(seed: int, count: int) -> list[str]:
    generator = random.Random(seed)
    return [" ".join(generator.choice(["one", "two", "three", "four"]) for _ in range(12)) + f" {seed}-{i}" for i in range(count)]


def to_parquet(columns: dict[str, list[Any]], rows_per_group: int = 1000) -> bytes:
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), stream, row_group_size=rows_per_group, compression="none", use_dictionary=False)
    return stream.getvalue()


def to_jsonl(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def tokenizer(make_llama: Any) -> Any:
    return load_tokenizer(make_llama(), trust_remote_code=False)


# --- files ---


def test_a_parquet_file_is_read_as_far_as_it_has_to_be_and_in_seeded_order(tokenizer: Any, tmp_path: Path) -> None:
    texts = words(1, 200)
    (tmp_path / "t.parquet").write_bytes(to_parquet({"id": list(range(200)), "text": texts}, rows_per_group=10))
    (tmp_path / "same.txt").write_text("\n\n".join(texts))
    of = {"sequences": 3, "length": 64, "purpose": "validation"}
    found, record = take_tokens(str(tmp_path / "t.parquet"), tokenizer, **of)
    plain, _ = take_tokens(str(tmp_path / "same.txt"), tokenizer, **of)
    assert found.tolist() == plain.tolist()
    assert (record["text"], record["column"], record["tokens"]) == ("t.parquet", "text", 192)
    seeded, again, other = (take_tokens(str(tmp_path / "t.parquet"), tokenizer, seed=seed, **of)[0].tolist() for seed in (1, 1, 2))
    assert seeded == again != other
    with pytest.raises(InputError, match=r"t.parquet: [\d,]+ tokens, 65,536 are needed"):
        take_tokens(str(tmp_path / "t.parquet"), tokenizer, **{**of, "sequences": 1024})


@pytest.mark.parametrize(
    ("content", "column", "message"),
    [
        (to_parquet({"id": [1], "body": ["x"]}), None, "no column 'text'; say column: with one of id, body"),
        (to_parquet({"id": [1], "body": ["x"]}), "id", "id holds int, not text"),
        (b"PAR1 not really", None, "no whole .parquet file"),
        (b"PAR1" + b"\xff" * 400 + to_parquet({"text": ["words " * 99] * 9})[404:], None, r"row group 0 is damaged \(.*page header failed"),
        (
            to_parquet({"text": ["words"]}).replace(b"\x05\x00\x00\x00words", b"\x05\x00\x00\x00\xffords"),
            None,
            "row group 0 is damaged .*utf-8",
        ),
    ],
)
def test_what_is_no_text_is_named(content: bytes, column: str | None, message: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(InputError, match=message):
        take_tokens(
            str(tmp_path / "t.parquet"), tokenizer, sequences=1, length=8, purpose="calibration", selection=Selection(column=column)
        )


def test_documents_of_a_parquet_file_may_be_chats(tokenizer: Any, tmp_path: Path) -> None:
    chats = [[{"role": "user", "content": word}] for word in words(2, 9)]
    (tmp_path / "t.parquet").write_bytes(to_parquet({"conversation": chats}))
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    chosen = Selection(column="conversation")
    of = {"length": 20, "seed": 0, "chat": True, "selection": chosen}
    found, record = take_documents(str(tmp_path / "t.parquet"), tokenizer, sequences=4, **of)
    assert [tokenizer.decode(ids) for ids in found] == [f"<user>{chat[0]['content']}"[:20] for chat in chats[:4]]
    assert (record["documents"], record["column"], record["chat"]) == (4, "conversation", True)
    with pytest.raises(InputError, match="9 documents, 10 are needed"):
        take_documents(str(tmp_path / "t.parquet"), tokenizer, sequences=10, **of)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("calibration: {text: some.txt, column: body}", "test.yaml:3:31: some.txt has no columns"),
        ("calibration: {text: some.jsonl, split: test}", "test.yaml:3:33: some.jsonl has no split"),
        ("validation: {text: sample, config: en}", "test.yaml:3:28: sample has no config"),
    ],
)
def test_what_a_text_does_not_have_is_an_error_with_its_line(section: str, message: str) -> None:
    text = f"\nmodel: x/y\n{section}\ntargets: [{{name: q, format: compressed-tensors, rules: [{{match: linear, scheme: int8-static}}]}}]\n"
    with pytest.raises(RecipeError, match=message):
        parse_recipe(text, "test.yaml")


# --- which files ---


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jsonl"], {"train": ["a.jsonl"]}),
        (["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"], {"train": 2}),
        (["dev.jsonl", "training_set.jsonl", "extra.jsonl"], {"validation": ["dev.jsonl"], "train": ["training_set.jsonl"]}),
        (["test/train.txt", "train/1.txt", "eval/2.txt"], {"train": ["test/train.txt", "train/1.txt"], "test": ["eval/2.txt"]}),
        (["constraint.parquet", "latest.parquet"], {"train": 2}),
        (["train.txt", "train.parquet"], {"train": ["train.parquet"]}),
        ([], {}),
    ],
)
def test_splits_are_read_from_paths(names: list[str], expected: dict[str, Any]) -> None:
    found = _inferred(names)
    assert found.keys() == expected.keys()
    for split, files in expected.items():
        assert found[split] == (names if isinstance(files, int) else files)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("*.jsonl", {"train": ["a.jsonl", "b/c.jsonl"]}),
        (["a.jsonl"], {"train": ["a.jsonl"]}),
        ([{"split": "test", "path": "b/*.jsonl"}, {"split": "none", "path": "z*"}], {"test": ["b/c.jsonl"]}),
        ({"train": ["a.*", "*.jsonl"]}, {"train": ["a.jsonl", "b/c.jsonl"]}),
    ],
)
def test_a_card_says_which_files(data: Any, expected: dict[str, list[str]]) -> None:
    assert _matched(data, ["a.jsonl", "b/c.jsonl"], "") == expected


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "here").write_text("x")
    found = {text: is_hub_id(text) for text in ("org/name", "org/name@v1.0", "org/x.jsonl", "./name", "org/here", "sample", "a/b/c")}
    assert [text for text, is_id in found.items() if is_id] == ["org/name", "org/name@v1.0"]


# --- the Hub, on loopback; huggingface_hub reads its environment once, so a process of its own answers all questions ---

PROGRAM = """if True:
    import json, sys
    from pathlib import Path
    from huggingface_hub import constants
    import convert.hub as hub
    from convert import pipeline
    from convert.datasets import Selection, pin
    from convert.recipe import parse_recipe
    from convert.text import load_tokenizer, take_tokens
    from formats.errors import OctavoError
    hub.RETRY_SECONDS = (0.1,) * 4
    tokenizer = load_tokenizer(Path(sys.argv[1]), trust_remote_code=False)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            if "recipe" in asked:
                made = pipeline.convert(parse_recipe(asked["recipe"], "test.yaml"), Path(asked["out"]), check=False).artifacts[0]
                digests = [file.sha256 for file in made.manifest.files]
                answer = {"calibration": made.manifest.calibration, "recipe": made.manifest.recipe, "files": digests}
                print(json.dumps(answer), flush=True)
                continue
            asked["selection"] = Selection(**asked.get("selection", {}))
            pinned = pin(asked.pop("text"))
            tokens, record = take_tokens(pinned, tokenizer, **asked)
            answer = {"pinned": pinned, "content": tokenizer.decode(tokens.flatten()), **record}
        except OctavoError as error:
            answer = {"error": str(error), "exit_code": error.exit_code}
        print(json.dumps(answer), flush=True)
"""


class Served:
    """A Hub, and a process that reads texts from it."""

    def __init__(self, hub: Hub, model: Path, home: Path, **environment: str) -> None:
        self.hub = hub
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(model)],
            env={**hub.environment(home), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, text: str, **asked: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"text": text, "sequences": 2, "length": 64, "purpose": "calibration", **asked}) + "\n")
        self.process.stdin.flush()
        return dict(json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


@pytest.fixture(scope="module")
def served(make_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    hub = Hub()
    with serve(hub):
        found = Served(hub, make_llama(), tmp_path_factory.mktemp("home"))
        yield found
        found.close()


def test_parquet_is_streamed_pinned_and_recorded(served: Served) -> None:
    texts = words(3, 20_000)
    content = to_parquet({"text": texts, "noise": ["n" * 500] * 20_000}, rows_per_group=100)
    repo = served.hub.add(
        "org/text", {"data/train-00000-of-00001.parquet": content, "data/test-00000-of-00001.parquet": b"never opened"}, kind="datasets"
    )
    commit = repo.commits[-1].sha
    found = served.ask("org/text")
    assert found["pinned"] == f"org/text@{commit}"
    assert {key: found[key] for key in ("text", "commit", "config", "split", "column", "tokens")} == {
        "text": "org/text", "commit": commit, "config": "default", "split": "train", "column": "text", "tokens": 128,
    }  # fmt: skip
    sent = sum(exchange.size_bytes for exchange in served.hub.asked("parquet", method="GET"))
    assert len(content) > 10_000_000
    assert sent < 400_000, "a footer and a row group of one column"
    assert not served.hub.asked("test-00000", method="GET")
    repo.commit({"data/train-00000-of-00001.parquet": to_parquet({"text": ["changed"] * 100})})
    again = served.ask(f"org/text@{commit}")
    assert again["tokens_sha256"] == found["tokens_sha256"]
    seeded = served.ask(f"org/text@{commit}", seed=5)
    assert seeded["tokens_sha256"] != found["tokens_sha256"]


def test_a_job_is_pinned_to_the_commit_and_can_be_done_again_from_its_manifest(served: Served, make_llama: Any, tmp_path: Path) -> None:
    repo = served.hub.add("org/job", {"a.jsonl": to_jsonl([{"text": text} for text in words(9, 90)])}, kind="datasets")
    commit = repo.commits[-1].sha
    recipe = f"""
model: {make_llama()}
calibration: {{text: org/job, sequences: 4, length: 32}}
targets: [{{name: q, format: compressed-tensors, rules: [{{match: linear, scheme: fp8-static}}]}}]
"""
    made = served.ask("", recipe=recipe, out=str(tmp_path / "a"))
    assert made["recipe"]["calibration"]["text"] == f"org/job@{commit}"
    assert {key: made["calibration"][key] for key in ("text", "commit", "tokens")} == {"text": "org/job", "commit": commit, "tokens": 128}
    repo.commit({"a.jsonl": to_jsonl([{"text": "changed " * 40}] * 90)})
    again = served.ask("", recipe=json.dumps(made["recipe"]), out=str(tmp_path / "b"))
    assert again["files"] == made["files"]
    other = served.ask("", recipe=recipe, out=str(tmp_path / "c"))
    assert other["calibration"]["tokens_sha256"] != made["calibration"]["tokens_sha256"]


def test_configurations_splits_and_columns_are_chosen_or_named(served: Served) -> None:
    english_files = "- config_name: en\n  data_files:\n  - split: train\n    path: en/*.jsonl\n"
    card = f"---\nconfigs:\n{english_files}- config_name: de\n  data_files: de.jsonl\n---\n"
    english, german = ([{"body": text, "id": i} for i, text in enumerate(words(seed, 40))] for seed in (4, 5))
    served.hub.add("org/two", {"README.md": card.encode(), "en/a.jsonl": to_jsonl(english), "de.jsonl": to_jsonl(german)}, kind="datasets")
    found = served.ask("org/two", selection={"config": "de", "column": "body"})
    assert found["config"] == "de"
    errors = {
        "config: there are several; say one of de, en": {"column": "body"},
        "config: 'fr' is not there; say one of de, en": {"config": "fr"},
        "split: 'test' is not there; say one of train": {"config": "en", "split": "test"},
        "en/a.jsonl: line 1 has no 'text'; say column: with one of body, id": {"config": "en"},
    }
    for message, selection in errors.items():
        answer = served.ask("org/two", selection=selection)
        assert message in answer["error"]
        assert answer["exit_code"] == 2
    assert "split: 'validation' is not there" in served.ask("org/two", purpose="validation", selection={"config": "en"})["error"]


def test_the_hub_s_own_parquet_is_the_fallback(served: Served) -> None:
    repo = served.hub.add("org/csv", {"all.csv": b"text\nx\n"}, kind="datasets")
    assert "no .parquet, .jsonl, .txt among its files, and the Hub has not converted it" in served.ask("org/csv")["error"]
    repo.commit({"default/partial-train/0000.parquet": to_parquet({"text": words(6, 90)})}, branch="refs/convert/parquet")
    found = served.ask("org/csv")
    assert found["commit"] == repo.branches["refs/convert/parquet"]
    assert (found["config"], found["split"], found["tokens"]) == ("default", "train", 128)


def test_plain_text_is_read_by_paragraphs(served: Served) -> None:
    paragraphs = [f"line of {text}\nand another" for text in words(7, 30)]
    served.hub.add("org/plain", {"README.txt": b"not this", "book.txt": "\n\n\n".join(paragraphs).encode()}, kind="datasets")
    found = served.ask("org/plain")
    plain = "\n\n".join(paragraphs)
    assert found["content"].replace("<s>", "")[:100] == plain[:100]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/gated", "datasets/org/gated is gated: ask for access at"),
        ("org/none", "datasets/org/none does not exist on"),
        ("org/open@v9", "datasets/org/open has no revision v9"),
    ],
)
def test_what_the_hub_refuses_is_said_in_one_sentence(text: str, expected: str, served: Served) -> None:
    served.hub.add("org/open", {"a.jsonl": to_jsonl([{"text": "x"}])}, kind="datasets")
    served.hub.add("org/gated", {"a.jsonl": to_jsonl([{"text": "x"}])}, kind="datasets", gated="manual")
    answer = served.ask(text)
    assert expected in answer["error"]
    assert answer["exit_code"] == 2


@pytest.mark.parametrize("fault", [Fault("a.jsonl", 2, 503, method="GET"), Fault("a.jsonl", 1, "cut")], ids=["busy", "cut"])
def test_a_hub_that_stumbles_is_asked_again(fault: Fault, served: Served) -> None:
    served.hub.add("org/open", {"a.jsonl": to_jsonl([{"text": text} for text in words(8, 40)])}, kind="datasets")
    served.hub.faults.append(fault)
    assert served.ask("org/open")["tokens"] == 128


def test_offline_says_to_give_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="offline mode is on"):
        pin("org/open")
