"""Anybody's text files: what is read of them, and what is said of those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import pipeline, text
from convert.text import load_tokenizer, take_documents, take_tokens
from formats.errors import InputError

TEXT = "It was a night of storms and the sea rose up.\n\nNobody slept, and the captain least of all.\n\n" * 40


@pytest.fixture(scope="module")
def tokenizer(make_llama: Any) -> Any:
    return load_tokenizer(make_llama(), trust_remote_code=False)


def taken(path: Path, tokenizer: Any, **more: Any) -> np.ndarray:
    return take_tokens(str(path), tokenizer, **{"sequences": 4, "length": 32, "purpose": "validation"} | more)[0]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("mark.txt", b"\xef\xbb\xbf" + TEXT.encode()),
        ("dos.txt", TEXT.replace("\n", "\r\n").encode()),
        ("notes", TEXT.encode()),
        ("rows.jsonl", "\n".join(json.dumps({"text": part}) for part in TEXT.strip().split("\n\n")).encode()),
        ("some.jsonl", "\n".join(json.dumps({"text": part}) for part in (None, *TEXT.strip().split("\n\n"), "")).encode()),
    ],
)
def test_the_same_text_in_many_clothes(name: str, content: bytes, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text(TEXT)
    (tmp_path / name).write_bytes(content)
    np.testing.assert_array_equal(taken(tmp_path / name, tokenizer), taken(tmp_path / "plain.txt", tokenizer))


def test_of_one_giant_line_no_more_is_read_than_needed(tokenizer: Any, tmp_path: Path) -> None:
    class Counting:
        bos_token_id = None
        seen = 0

        def __call__(self, text: str, **options: Any) -> Any:
            self.seen += len(text)
            return tokenizer(text, **options)

    path = tmp_path / "giant.txt"
    path.write_text(" ".join(TEXT.split()) * 200)
    counting = Counting()
    found = taken(path, counting, sequences=2)
    assert counting.seen < 20_000 < path.stat().st_size
    whole = tokenizer(path.read_text(), add_special_tokens=False).input_ids
    assert found.ravel().tolist() == whole[:64]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: there is no text in it"),
        ("a.txt", b" \n" * 900, r"a\.txt: there is no text in it"),
        ("a.txt", b"Short.", r"a\.txt: \d+ tokens, 128 are needed; give a longer text or ask for fewer"),
        ("a.txt", "caf\u00e9 ".encode("latin-1") * 90, r"a\.txt: not UTF-8 \(invalid continuation byte at byte 3\); convert it"),
        ("a.txt", TEXT.encode("utf-16"), r"a\.txt: not UTF-8 \(invalid start byte at byte 0\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'\n{"body": "a", "id": 1}\n', r"a\.jsonl:2: each line must be .* \"text\"; it has 'body', 'id'; say column"),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl:1: each line must be a JSON object"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: \"text\" holds int, not text"),
        ("a.jsonl", b'{"text": null}\n' * 99, r"a\.jsonl: there is no text in it"),
        ("a.jsonl", rb'{"text": "\ud800 is half of a pair"}', r"a\.jsonl:1: not JSON \(.*surrogates not allowed"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON \(nested too deeply\)"),
    ],
)
def test_what_is_no_text_is_named(name: str, content: bytes, message: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        taken(tmp_path / name, tokenizer)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("null", 'line 2: "text" holds NoneType, not text; say another column'),
        ("5", 'line 2: "text" holds int, not text'),
        ('["a"]', 'line 2: "text" holds list, not text'),
        ('"\\ud800"', r'line 2 has no usable "text" \(.*surrogates'),
        ("[" * 100_000, r'line 2 has no usable "text" \(nested too deeply'),
    ],
)
def test_a_document_that_is_no_text_is_not_read_as_what_python_calls_it(row: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'\n{{"text": {row}}}\n')
    with pytest.raises(InputError, match=message):
        take_documents(str(tmp_path / "a.jsonl"), tokenizer, sequences=1, length=8, seed=0, chat=False)


def test_a_sequence_has_a_place_for_more_than_its_beginning(tokenizer: Any, tmp_path: Path) -> None:
    class Beginning:
        bos_token, bos_token_id = "<s>", 1

        def __call__(self, text: str, *, add_special_tokens: bool = True, **options: Any) -> Any:
            found = tokenizer(text, add_special_tokens=False, **options)
            found["input_ids"] = [1] * add_special_tokens + found["input_ids"]
            return found

    (tmp_path / "a.txt").write_text(TEXT)
    assert taken(tmp_path / "a.txt", Beginning(), length=2)[:, 0].tolist() == [1] * 4
    with pytest.raises(InputError, match=r"validation\.length: 1, and the tokenizer begins each text with <s>; ask for 2 or more"):
        taken(tmp_path / "a.txt", Beginning(), length=1)


def test_of_a_long_text_sequences_are_drawn_without_reading_it_all(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "WHOLE_CHARACTERS", 100_000)
    content = " ".join(f"{i:06}" for i in range(20_000))
    (tmp_path / "a.txt").write_text(content)
    found, again, other = (taken(tmp_path / "a.txt", tokenizer, seed=seed, length=28) for seed in (1, 1, 2))
    np.testing.assert_array_equal(found, again)
    assert found.tolist() != other.tolist()
    spelled = [tokenizer.decode(ids) for ids in found]
    assert all(one in content and len(one) == 28 and one[6] == " " for one in spelled), "each is whole words of the text"
    begun = [int(one[:6]) // 5_000 for one in spelled]
    assert begun == [0, 1, 2, 3], "one from each quarter"


def test_what_is_not_there_may_have_been_meant_for_the_hub(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"wikitext: cannot be read .*a dataset on the Hub is named org/name"):
        taken(Path("wikitext"), tokenizer)
    with pytest.raises(InputError, match=r"none\.txt: cannot be read \(No such file or directory\)$"):
        taken(tmp_path / "none.txt", tokenizer)


def test_documents_that_are_not_utf_8(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"text": "\u00e9"}'.encode("latin-1"))
    with pytest.raises(InputError, match="not UTF-8"):
        take_documents(str(tmp_path / "a.jsonl"), tokenizer, sequences=1, length=8, seed=0, chat=False)


def test_validation_text_is_looked_at_before_any_work(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Short." * 30)
    with pytest.raises(InputError, match=r"short\.txt: \d+ tokens, 256 are needed"):
        pipeline.convert(recipe_for(make_llama(), **{"validation.text": str(tmp_path / "short.txt")}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_climb_is_proven_anew_where_its_text_is_another(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """The artifact may stay what it is, but not what is said of it."""
    corpus = tmp_path / "corpus.txt"
    budget = {"targets.0.budget": "{kl_nats: 9.0}", "targets.0.ladder": "[rtn]", "targets.0.limits": "{top1: 0.0, perplexity_ratio: 99.0}"}
    recipe = recipe_for(make_llama(), **{"validation.text": str(corpus), **budget})
    found = []
    for content in (TEXT, TEXT, TEXT.upper()):
        corpus.write_text(content)
        outcome = pipeline.convert(recipe, tmp_path / "out")
        found.append((outcome.reports[0].validation["tokens_sha256"], outcome.reports[0].runtimes[0].load_seconds))
    assert found[0] == found[1], "climbed once"
    assert found[2][0] != found[1][0]


def test_a_folder_without_the_files_of_a_tokenizer_is_said_to_have_none(tmp_path: Path) -> None:
    """Where transformers makes one of the model's class all the same, without a vocabulary."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    with pytest.raises(InputError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path, trust_remote_code=False)
