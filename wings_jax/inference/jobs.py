"""Files of requests: read line by line, answered in batches, written in order, resumable.

A line is {"prompt" or "conversations", "images": [...], "id", "sampling": {...}}; its answer
{"id", "answer", "reason", "tokens"}, or {"id", "error"} where there is none. While a job runs its
answers are in a journal beside the output, as they come; a job that was interrupted goes on from
there, and the output appears, in the order of the input, when every line has its answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from wings_jax.data import samples
from wings_jax.errors import UserError
from wings_jax.inference.generator import Answer, Generator
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams

KEYS = {"id", "prompt", "conversations", "image", "images", "sampling"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the input: its number from 1, its id, and the request or what is wrong."""

    number: int
    id: Any
    request: Request | UserError


def read_requests(path: pathlib.Path, images: pathlib.Path, sampling: SamplingParams) -> list[Line]:
    """Returns the lines of a JSONL file; empty ones are passed over.

    Args:
      images: folder that the lines' image paths start from.
      sampling: what a line that says nothing else gets.

    Raises:
      UserError: the file cannot be read, or holds no line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--input: {path}: {error}") from error
    lines = [
        _line(number, line, images, sampling)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not lines:
        raise UserError(f"--input: {path} holds no request")
    return lines


def _line(number: int, text: str, images: pathlib.Path, sampling: SamplingParams) -> Line:
    identity: Any = number
    try:
        record = json.loads(text)
        if not isinstance(record, Mapping):
            raise UserError(f"is {samples.shorten(record)}, not an object")
        identity = record.get("id", number)
        return Line(number, identity, _request(record, images, sampling))
    except json.JSONDecodeError as error:
        return Line(
            number, identity, UserError(f"malformed JSON: {error.msg}, column {error.colno}")
        )
    except UserError as error:
        return Line(number, identity, error)


def _request(record: Mapping[str, Any], images: pathlib.Path, sampling: SamplingParams) -> Request:
    unknown = sorted(set(record) - KEYS)
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r}; there are {', '.join(sorted(KEYS))}")
    asked = [key for key in ("prompt", "conversations") if key in record]
    if len(asked) != 1:
        raise UserError('needs either "prompt" or "conversations"')
    question = record[asked[0]]
    if not isinstance(question, str if asked == ["prompt"] else list):
        raise UserError(f"{asked[0]} is {samples.shorten(question)}")
    names = record.get("images", record.get("image")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"images is {samples.shorten(names)}, not a list of paths")
    return Request(question, [images / name for name in names], _sampling(record, sampling))


def _sampling(record: Mapping[str, Any], sampling: SamplingParams) -> SamplingParams:
    wishes = record.get("sampling", {})
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    if not isinstance(wishes, Mapping) or not set(wishes) <= known:
        raise UserError(f"sampling is {samples.shorten(wishes)}; it may hold {', '.join(known)}")
    try:
        if "stop" in wishes:
            stop = wishes["stop"]
            wishes = {**wishes, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}
        return dataclasses.replace(sampling, **wishes)
    except TypeError as error:
        raise UserError(f"sampling: {samples.shorten(wishes)}: {error}") from error


class Journal:
    """The answers so far of one job, in a file beside its output.

    Args:
      output: the file that is made in the end.
      job: what the answers depend on; a journal of another job is not gone on with.

    Raises:
      UserError: the output exists, the journal is of another job, or cannot be written.
    """

    def __init__(self, output: pathlib.Path, job: Mapping[str, Any]):
        self._output = output
        self._path = output.with_name(f"{output.name}.partial")
        self._head = json.dumps({"job": hashlib.sha256(json.dumps(job).encode()).hexdigest()})
        if output.exists():
            raise UserError(f"--output: {output} exists")
        self.answers = self._read()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            if not self._path.stat().st_size:
                self._write(self._head)
        except OSError as error:
            raise UserError(f"--output: {self._path}: {error.strerror}") from error

    def _read(self) -> dict[int, dict[str, Any]]:
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"--output: {self._path}: {error.strerror}") from error
        head, *lines = text.split("\n")
        if text and head != self._head:
            raise UserError(
                f"--output: {self._path} is of another job (input, checkpoint or sampling differ): "
                "remove it to begin anew"
            )
        whole = lines[:-1]  # what follows the last line's end was cut off
        if text and lines and lines[-1]:
            self._path.write_text(text[: len(text) - len(lines[-1])], encoding="utf-8")
        return {entry["line"]: entry["answer"] for entry in map(json.loads, whole)}

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def add(self, number: int, answer: Mapping[str, Any]) -> None:
        """Notes the answer to a line."""
        self.answers[number] = dict(answer)
        self._write(json.dumps({"line": number, "answer": answer}, ensure_ascii=False))

    def finish(self) -> None:
        """Writes the output in the order of the input, and removes the journal."""
        self._file.close()
        whole = "".join(
            json.dumps(self.answers[number], ensure_ascii=False) + "\n"
            for number in sorted(self.answers)
        )
        passing = self._output.with_name(f".{self._output.name}")
        passing.write_text(whole, encoding="utf-8")
        passing.replace(self._output)
        self._path.unlink()

    def close(self) -> None:
        """Leaves the journal for a later run."""
        self._file.close()


def run(generator: Generator, lines: list[Line], journal: Journal) -> Iterator[dict[str, Any]]:
    """Answers every line that has no answer yet; yields the answers as they come."""
    waiting = [line for line in lines if line.number not in journal.answers]
    good = [line for line in waiting if isinstance(line.request, Request)]
    found = ((line, line.request) for line in waiting if isinstance(line.request, UserError))
    for line, error in found:
        yield _note(journal, line, error)
    for index, answer in generator.answers([line.request for line in good]):
        yield _note(journal, good[index], answer)


def _note(journal: Journal, line: Line, answer: Answer | UserError) -> dict[str, Any]:
    if isinstance(answer, UserError):
        entry = {"id": line.id, "error": f"line {line.number}: {answer}"}
    else:
        entry = {
            "id": line.id,
            "answer": answer.text,
            "reason": answer.reason,
            "tokens": len(answer.tokens),
        }
        if answer.logprobs is not None:
            entry["logprobs"] = [round(value, 5) for value in answer.logprobs]
    journal.add(line.number, entry)
    return entry
