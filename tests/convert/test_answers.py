"""The user's own prompts: how they are read, who is right, and the whole way through a runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert import pipeline
from convert.answers import encode, judge, read_questions
from convert.report import read_report, report_path
from formats.errors import InputError, RecipeError


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("expected", "said", "right"),
    [
        ({"answer": "Paris"}, " Paris\nThe capital of", True),
        ({"answer": "Paris"}, " Paris.", False),
        ({"answer": "Paris"}, "paris", False),
        ({"answer": ["Paris.", " Paris "]}, "\nParis  \n", True),
        ({"answer": "one\ntwo"}, "one\ntwo\nthree", True),
        ({"answer": "one\ntwo"}, "one", False),
        ({"answer": "Paris"}, "", False),
        ({"pattern": r"\b4\b"}, "2 + 2 makes 4, surely", True),
        ({"pattern": r"\b4\b"}, "42", False),
        ({"pattern": "(?i)^yes"}, "Yes", True),
    ],
)
def test_who_is_right(expected: dict[str, Any], said: str, right: bool, tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path / "p.jsonl", {"prompt": "?", **expected}))
    assert question.is_answered(said) is right


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "p.jsonl:2: not JSON"),
        ("[1]", "p.jsonl:2: a line has one of prompt and messages, one of answer and pattern"),
        ({"prompt": "a"}, "p.jsonl:2: a line has"),
        ({"prompt": "a", "answer": "b", "pattern": "c"}, "p.jsonl:2: a line has"),
        ({"prompt": "a", "answer": "b", "anwser": "c"}, "and nothing else"),
        ({"prompt": "", "answer": "b"}, '"prompt" must be text'),
        ({"messages": "a", "answer": "b"}, '"messages" a list'),
        ({"prompt": "a", "answer": []}, '"answer" must be'),
        ({"prompt": "a", "answer": ["b", " "]}, '"answer" must be'),
        ({"prompt": "a", "answer": 4}, '"answer" must be'),
        ({"prompt": "a", "pattern": "("}, "no regular expression"),
        ({"prompt": "a", "pattern": 4}, "no regular expression"),
    ],
)
def test_lines_that_cannot_be_asked_are_named(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_questions(write(tmp_path / "p.jsonl", {"prompt": "a", "answer": "b"}, row))
    assert message in str(caught.value)


def test_a_file_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.jsonl cannot be read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="has no lines"):
        read_questions(write(tmp_path / "p.jsonl", ""))


def test_messages_want_a_chat_template_and_prompts_go_as_they_are(make_llama: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_llama())
    messages = [{"role": "user", "content": "Hi"}]
    questions = read_questions(write(tmp_path / "p.jsonl", {"prompt": "Hi", "answer": "b"}, {"messages": messages, "answer": "b"}))
    with pytest.raises(InputError, match="line 2: the model's chat template cannot be applied"):
        encode(questions, tokenizer)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    assert [tokenizer.decode(ids) for ids in encode(questions, tokenizer)] == ["Hi", "[Hi]>"]


def test_a_limit_without_prompts_is_an_error_with_its_line(make_llama: Any, recipe_for: Any) -> None:
    with pytest.raises(RecipeError, match=r"targets\.0\.limits\.answers=0\.1: validation has no prompts to answer"):
        recipe_for(make_llama(), **{"targets.0.limits.answers": "0.1"})


def test_the_share_answered_is_measured_in_the_runtime_and_in_the_source(make_llama: Any, recipe_for: Any, tmp_path: Path) -> None:
    """What the source says is what transformers says here, so half of the prompts can be made to be right for it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_llama()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    for i in range(8):
        ids = torch.tensor([tokenizer(f"Prompt {i}").input_ids])
        said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        text = tokenizer.decode(said, skip_special_tokens=True)
        exact = {"answer": text.strip()} if text.strip() and len(text.strip().splitlines()) == 1 else {"pattern": "^(?s:.*)$"}
        rows.append({"prompt": f"Prompt {i}", **(exact if i % 2 else {"pattern": "no model says this"})})
    path = write(tmp_path / "p.jsonl", *rows)
    settings = {"validation.prompts": str(path), "validation.answer_tokens": "4", "targets.0.limits.answers": "0.0"}
    outcome = pipeline.convert(recipe_for(folder, **settings), tmp_path / "out")
    (report,) = outcome.reports
    assert report.source.answers.right == (False, True) * 4
    answers = report.runtimes[0].answers
    lost = 4 - sum(answers.right)
    (check,) = [check for check in report.checks if check.name == "transformers: answers"]
    assert check.value == lost / 8
    assert check.passed is (lost == 0)
    assert check.detail.startswith("too few prompts to tell")
    assert f"right {4 - lost} of 8, the source 4; lost {lost}, won 0" in check.detail
    assert report.validation["prompts"] == "8 of p.jsonl"
    assert read_report(report_path(outcome.artifacts[0].path)) == report
    assert f"{4 - lost} of 8" in report_path(outcome.artifacts[0].path).with_suffix(".html").read_text()


def test_a_judgement_has_its_interval(tmp_path: Path) -> None:
    questions = read_questions(write(tmp_path / "p.jsonl", *[{"prompt": "a", "answer": "b"}] * 3))
    found = judge(questions, ["b", "c", "b"])
    assert found.right == (True, False, True)
    assert found.interval.low < found.share < found.interval.high
