"""Files of requests: answered in batches, written in the order of the input, resumable.

A line is {"prompt" or "conversations", "images": [...], "id", "sampling": {...}}; its answer is
{"id", "answer", "reason", "tokens"}, or {"id", "error"} if there is none. While a job runs, its
answers are appended to a journal beside the output as they come; a job that was interrupted
resumes from there. The output is written when every line has its answer.
"""

from __future__ import annotations

import codecs
import dataclasses
import glob
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from wings_jax import files
from wings_jax.data import samples
from wings_jax.errors import UserError
from wings_jax.inference.answers import Answer
from wings_jax.inference.generator import Generator
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams, change_params
from wings_jax.inference.shards import Shard

UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
KEYS = {"id", "prompt", "conversations", "image", "images", "sampling"}


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the input.

    number   from 1
    id       its "id", or else its number
    request  the request, or what is wrong with it
    """

    number: int
    id: Any
    request: Request | UserError


def read_requests(
    path: pathlib.Path, image_root: pathlib.Path, sampling: SamplingParams
) -> list[Line]:
    """Returns the lines of a JSONL file; empty ones are skipped.

    Args:
      image_root: directory that relative image paths of the lines start from.
      sampling: for lines that have none of their own.

    Raises:
      UserError: the file cannot be read, or has no line.
    """
    content = read_input(path)
    if content.startswith(UTF_16):
        raise UserError(f"--input: {path} is UTF-16; convert it to UTF-8")

    # Lines end with LF only: str.splitlines would split at other characters within JSON strings.
    byte_lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    lines = [
        _parse_line(number, line, image_root, sampling)
        for number, line in enumerate(byte_lines, start=1)
        if line.strip()
    ]
    if not lines:
        raise UserError(f"--input: {path} has no request")
    return lines


def read_input(path: pathlib.Path) -> bytes:
    """Returns the content of the input. Raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        raise UserError(f"--input: {path}: {error}") from error


def _parse_line(
    number: int, line: bytes, image_root: pathlib.Path, sampling: SamplingParams
) -> Line:
    """Returns a line of the input, with its request or what is wrong with it."""
    identity: Any = number
    try:
        record = json.loads(line.decode())
        if not isinstance(record, Mapping):
            raise UserError(f"is {samples.shorten(record)}, not an object")
        identity = record.get("id", number)
        return Line(number, identity, _request(record, image_root, sampling))
    except UserError as error:
        return Line(number, identity, error)
    except UnicodeDecodeError as error:
        byte = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return Line(number, identity, UserError(f"not UTF-8: {byte}"))
    except json.JSONDecodeError as error:
        reason = UserError(f"malformed JSON: {error.msg}, column {error.colno}")
        return Line(number, identity, reason)
    except (ValueError, RecursionError) as error:  # numbers and nesting beyond Python's limits
        return Line(number, identity, UserError(f"JSON that cannot be read: {error}"))


def _request(
    record: Mapping[str, Any], image_root: pathlib.Path, sampling: SamplingParams
) -> Request:
    """Returns the request of a record. Raises UserError naming the wrong key."""
    unknown = sorted(set(record) - KEYS)
    if unknown:
        raise UserError(f"unknown key {unknown[0]!r}; there are {', '.join(sorted(KEYS))}")

    # The question: one text, or the turns of a conversation.
    question_keys = [key for key in ("prompt", "conversations") if key in record]
    if len(question_keys) != 1:
        raise UserError('needs either "prompt" or "conversations"')

    key = question_keys[0]
    question = record[key]
    if not isinstance(question, str if key == "prompt" else list):
        raise UserError(f"{key} is {samples.shorten(question)}")

    # "image" is read too, and either may be one path: both occur in LLaVA files.
    names = record.get("images", record.get("image")) or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"images is {samples.shorten(names)}, not a list of paths")

    # The line's own sampling parameters, on top of those of the command.
    changes = record.get("sampling", {})
    if not isinstance(changes, Mapping):
        raise UserError(f"sampling is {samples.shorten(changes)}, not an object")
    try:
        params = change_params(sampling, changes)
    except UserError as error:
        raise UserError(f"sampling: {error}") from error
    return Request(question, [image_root / name for name in names], params)


def to_json(record: Any, indent: int | None = None) -> str:
    """Returns a record as JSON, in which surrogates, which UTF-8 does not have, are escaped.

    >>> print(to_json({"id": chr(0xDC80)}), to_json({"id": "é"}))
    {"id": "\\udc80"} {"id": "é"}
    """
    # Text stays readable; only a record with surrogates is escaped as a whole.
    text = json.dumps(record, ensure_ascii=False, indent=indent)
    has_surrogates = any("\ud800" <= letter <= "\udfff" for letter in text)
    return json.dumps(record, indent=indent) if has_surrogates else text


class Journal:
    """The answers of one job so far, in a file beside its output.

    Args:
      output: the file to write in the end.
      job: what the answers depend on; the journal of another job is not resumed.
      flag: what error messages call the output.
      replace: whether the journal of another job is replaced.

    Raises:
      UserError: the output exists, or the journal is another job's or cannot be written.
    """

    def __init__(
        self,
        output: pathlib.Path,
        job: Mapping[str, Any],
        flag: str = "--output",
        *,
        replace: bool = False,
    ):
        self._output = output
        self._replace = replace
        self._flag = flag
        self._path = output.with_name(f"{output.name}.partial")
        digest = hashlib.sha256(json.dumps(job).encode()).hexdigest()
        self._header = json.dumps({"job": digest})

        if output.exists():
            raise UserError(f"{self._flag}: {output} exists")

        # Resume from the answers of an earlier run, then append to the same file.
        self.answers = self._read_answers()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            if not self._path.stat().st_size:
                self._write_line(self._header)
        except OSError as error:
            raise UserError(f"{self._flag}: {self._path}: {error.strerror}") from error

    def _read_answers(self) -> dict[int, dict[str, Any]]:
        """Returns line number -> answer of an earlier run, {} if there was none."""
        try:
            text = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"{self._flag}: {self._path}: {error.strerror}") from error

        # The first line names the job, every other one is an answer.
        header, *lines = text.split("\n")
        # A job that ended before its first answer does not keep another one from starting.
        is_other = header != self._header and (self._replace or not any(lines))
        if not lines or is_other:  # empty, or a header that was cut off
            files.write_text(self._path, "")
            return {}
        if header != self._header:
            raise UserError(
                f"{self._flag}: {self._path} is the journal of another job (input, checkpoint or "
                "settings differ): remove it to start over"
            )

        # What follows the last end of line is a line that was cut off.
        if lines[-1]:
            files.write_text(self._path, text.removesuffix(lines[-1]))

        try:
            entries = [json.loads(line) for line in lines[:-1]]
            return {entry["line"]: entry["answer"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._flag}: {self._path} is damaged: remove it to start over"
            ) from error

    def _write_line(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()

    def add(self, number: int, answer: Mapping[str, Any]) -> None:
        """Appends the answer to a line of the input."""
        self.answers[number] = dict(answer)
        self._write_line(to_json({"line": number, "answer": answer}))

    def finish(self) -> None:
        """Writes the output in the order of the input, and removes the journal."""
        self._file.close()
        # Lines are answered in the order of their length, and written in that of the input.
        ordered = [self.answers[number] for number in sorted(self.answers)]
        lines = [to_json(answer) + "\n" for answer in ordered]
        files.write_text(self._output, "".join(lines))
        self._path.unlink()

    def close(self) -> None:
        """Closes the journal; it stays for a later run."""
        self._file.close()

    def remove(self) -> None:
        """Removes the journal, when its answers were written elsewhere."""
        self._file.close()
        self._path.unlink()


def open_journals(
    output: pathlib.Path, job: Mapping[str, Any], shard: Shard
) -> tuple[Journal, list[Journal]]:
    """Returns the journal of a job and those of its parts, whose answers it has too.

    A shard has a journal of its own, and reads none of the others.

    Raises:
      UserError: the output exists, or a journal is another job's or cannot be written.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists")
    if shard.count > 1:
        name = f"{output.name}.part-{shard.index}-of-{shard.count}"
        return Journal(output.with_name(name), job), []

    journal = Journal(output, job)
    paths = sorted(output.parent.glob(f"{glob.escape(output.name)}.part-*-of-*.partial"))
    parts = [Journal(path.with_suffix(""), job) for path in paths]
    for part in parts:
        journal.answers.update(part.answers)
    return journal, parts


def run(generator: Generator, lines: list[Line], journal: Journal) -> Iterator[dict[str, Any]]:
    """Answers every line that has no answer yet; yields the answers as they come."""
    # Lines that cannot be answered need no model.
    waiting = [line for line in lines if line.number not in journal.answers]
    for line in waiting:
        if isinstance(line.request, UserError):
            yield _add_answer(journal, line, line.request)

    # Answers come in the generator's order; `index` is the place of the request.
    valid = [line for line in waiting if isinstance(line.request, Request)]
    requests = [line.request for line in valid if isinstance(line.request, Request)]
    for index, answer in generator.answers(requests):
        yield _add_answer(journal, valid[index], answer)


def _add_answer(journal: Journal, line: Line, answer: Answer | UserError) -> dict[str, Any]:
    """Appends the answer to a line to the journal, and returns it as a record."""
    if isinstance(answer, UserError):
        record = {"id": line.id, "error": f"line {line.number}: {answer}"}
    else:
        record = {
            "id": line.id,
            "answer": answer.text,
            "reason": answer.reason,
            "tokens": len(answer.tokens),
        }
        if answer.logprobs is not None:
            record["logprobs"] = [round(value, 5) for value in answer.logprobs]

    journal.add(line.number, record)
    return record
