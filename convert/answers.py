"""The user's own test set: prompts with the answers that are expected, and who is right."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.datasets import parse_row
from convert.intervals import wilson
from convert.report import Answers
from formats.errors import InputError

#: What a line must have one of, twice.
PROMPTS, EXPECTED = ("prompt", "messages"), ("answer", "pattern")


@dataclass(frozen=True)
class Question:
    """``prompt``: text that is continued as it stands, or messages for the model's chat template. Right is a continuation whose first lines
    are one of ``answers``, white space around them aside, or one in which ``pattern`` is found. ``line``: where it stands in the file."""

    line: int
    prompt: str | list[dict[str, Any]]
    answers: tuple[str, ...]
    pattern: re.Pattern[str] | None

    def is_answered(self, continuation: str) -> bool:
        """Whether this is an answer. Models go on talking after it, so an answer of one line is held against the first line."""
        if self.pattern is not None:
            return self.pattern.search(continuation) is not None
        said = continuation.strip().splitlines()
        return any(answer.splitlines() == [line.rstrip() for line in said[: len(answer.splitlines())]] for answer in self.answers)


def read_questions(path: Path) -> list[Question]:
    """A line a question, JSON: ``{"prompt": "The capital of France is", "answer": "Paris"}``. ``messages`` instead of ``prompt`` go through
    the chat template, ``answer`` may be a list of which any will do, and ``pattern`` instead of it is a regular expression.

    Raises :class:`InputError` naming file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"validation.prompts: {path} cannot be read ({error})") from None
    found = [_parse(line, f"{path}:{i}", i) for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise InputError(f"validation.prompts: {path} has no lines")
    return found


def _parse(line: str, where: str, number: int) -> Question:
    try:
        row = parse_row(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error})") from None
    keys = set(row) if isinstance(row, dict) else set()
    if len(keys & set(PROMPTS)) != 1 or len(keys & set(EXPECTED)) != 1 or keys - {*PROMPTS, *EXPECTED}:
        raise InputError(f"{where}: a line has one of {' and '.join(PROMPTS)}, one of {' and '.join(EXPECTED)}, and nothing else")
    prompt = row.get("prompt", row.get("messages"))
    if not prompt or not isinstance(prompt, str if "prompt" in row else list):
        raise InputError(f'{where}: "prompt" must be text, "messages" a list of messages, and not empty')
    answers = row.get("answer", [])
    answers = tuple(item.strip() if isinstance(item, str) else "" for item in (answers if isinstance(answers, list) else [answers]))
    if "answer" in row and not (answers and all(answers)):
        raise InputError(f'{where}: "answer" must be text or a list of texts, and not empty')
    try:
        return Question(number, prompt, answers, re.compile(row["pattern"]) if "pattern" in row else None)
    except (re.error, TypeError) as error:
        raise InputError(f'{where}: "pattern" is no regular expression ({error})') from None


def encode(questions: Sequence[Question], tokenizer: Any) -> list[list[int]]:
    """Token ids of each prompt. Raises :class:`InputError` where a chat template is wanted and does not do."""
    return [_encode(question, tokenizer) for question in questions]


def _encode(question: Question, tokenizer: Any) -> list[int]:
    if isinstance(question.prompt, str):
        return list(tokenizer(question.prompt).input_ids)
    try:
        text = tokenizer.apply_chat_template(question.prompt, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # noqa: BLE001  a template is code of the model's, and fails as it likes
        raise InputError(f"validation.prompts: line {question.line}: the model's chat template cannot be applied ({error})") from None
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def describe(path: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """What the report says of a test set."""
    return {"prompts": f"{len(questions):,} of {path.name}", "prompts_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def judge(questions: Sequence[Question], continuations: Sequence[str]) -> Answers:
    """Which prompts a model answered, in the file's order."""
    right = tuple(question.is_answered(said) for question, said in zip(questions, continuations, strict=True))
    return Answers(right, wilson(sum(right), len(right)))
