"""The results of one model on one benchmark, and their files.

DIR/NAME/TASK.jsonl has a line per item, DIR/NAME/TASK.json the scores and what they depend on.
Neither has anything that differs from run to run; seconds are in DIR/NAME/timing.json.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import wings_jax
from wings_jax import checkpoint, checksums, files, formatting, tree
from wings_jax.errors import UserError
from wings_jax.evaluation.benchmarks import record, summary
from wings_jax.evaluation.benchmarks.record import Benchmark
from wings_jax.evaluation.benchmarks.runner import BenchmarkTask
from wings_jax.evaluation.benchmarks.summary import ProtocolScore
from wings_jax.evaluation.models import LazyModel
from wings_jax.inference import jobs


@dataclasses.dataclass(frozen=True)
class BenchmarkResult:
    """One model's answers to one benchmark."""

    # Name of the model.
    model: str
    # The declaration.
    benchmark: Benchmark
    # What the result depends on: hashes of data, prompts and model, versions, settings.
    provenance: Mapping[str, Any]
    # A line per item: id, group, truth, credit by protocol, and what each pass found.
    lines: Sequence[Mapping[str, Any]]
    # Protocol -> scores.
    scores: Mapping[str, ProtocolScore]
    # Wall-clock seconds of this run.
    seconds: float
    # Directory or description of the model, for people.
    origin: str
    # Optimizer steps of its last stage, None for a base.
    step: int | None

    @property
    def headline_protocol(self) -> str:
        """Returns the protocol of the paper's setting or, if it was not run, the first one."""
        return headline_protocol(self.benchmark, self.scores)

    @property
    def errors(self) -> dict[str, int]:
        """Returns cause -> how many items could not be asked; they count as wrong."""
        causes: dict[str, int] = {}
        for line in self.lines:
            for cause in error_causes(line):
                causes[cause] = causes.get(cause, 0) + 1
        return causes

    @property
    def failed(self) -> int:
        """Returns how many items could not be asked."""
        return sum(bool(error_causes(line)) for line in self.lines)


def headline_protocol(benchmark: Benchmark, scores: Mapping[str, ProtocolScore]) -> str:
    """Returns the protocol of the paper's setting or, if it was not run, the first one."""
    return benchmark.headline if benchmark.headline in scores else next(iter(scores), "")


def error_causes(line: Mapping[str, Any]) -> list[str]:
    """Returns why an item could not be asked, [] if it could; passes may share a reason."""
    passes = (value for value in line.values() if isinstance(value, Mapping))
    return sorted({one["error"] for one in passes if "error" in one})


def hash_text(text: str) -> str:
    """Returns the first 16 hex digits of the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_files(paths: Sequence[pathlib.Path]) -> str:
    """Returns the SHA-256 of the contents of files, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_model(opened: checkpoint.Checkpoint) -> str:
    """Returns a hash of a model's parameters and architecture."""
    # Checksums of arrays: the files that a checkpoint consists of have no influence.
    sums = checksums.checksum_arrays(tree.flatten(opened.params))
    return hash_text(json.dumps(sums, sort_keys=True) + repr(opened.arch))


def hash_prompts(task: BenchmarkTask) -> str:
    """Returns a hash of how items are written: prompts, shots and their positions."""
    prompts = {one.key: dataclasses.asdict(one.prompt) for one in task.passes}

    shots = dataclasses.asdict(task.benchmark.shots)
    return hash_text(json.dumps([prompts, shots, task.shots], sort_keys=True, ensure_ascii=False))


def make_provenance(
    task: BenchmarkTask, *, model_hash: str, rows: int, dtype: str, kernel: str
) -> dict[str, Any]:
    """Returns what a result depends on; equal values give equal results on one machine."""
    # Which items were asked depends on --limit and on rows that were left out.
    ids = "\n".join(item.id for item in task.data.items)

    return {
        "task": task.benchmark.name,
        "protocols": list(task.protocols),
        "shots": task.shots,
        "items": len(task.data.items),
        "items_hash": hash_text(ids),
        "data_form": task.data.form,
        "data_files": sorted(path.name for path in task.data.files),
        "data_sha256": hash_files(task.data.files),
        "skipped": dict(task.data.skipped),
        **({"remarks": list(task.data.remarks)} if task.data.remarks else {}),
        "prompt_hash": hash_prompts(task),
        "model_hash": model_hash,
        "dtype": dtype,
        "kernel": kernel,
        "batch_size": rows,
        "version": wings_jax.__version__,
        "jax": jax.__version__,
    }


def to_dict(result: BenchmarkResult) -> dict[str, Any]:
    """Returns scores and provenance as they are written to JSON."""
    benchmark = result.benchmark
    return {
        "model": result.model,
        "task": benchmark.name,
        "title": benchmark.title,
        "headline": {
            "protocol": result.headline_protocol,
            "average": benchmark.average,
            "metric": benchmark.metric,
        },
        "scores": {protocol: score.to_dict() for protocol, score in result.scores.items()},
        "errors": result.errors,
        "provenance": dict(result.provenance),
    }


def result_paths(directory: pathlib.Path, model: str, task: str) -> tuple[pathlib.Path, ...]:
    """Returns the files of a result: its lines and its scores."""
    return directory / model / f"{task}.jsonl", directory / model / f"{task}.json"


def write_result(directory: pathlib.Path, result: BenchmarkResult) -> list[pathlib.Path]:
    """Writes the lines, then the scores, then answers that others score; returns the paths."""
    lines_path, scores_path = result_paths(directory, result.model, result.benchmark.name)
    lines = "".join(jobs.to_json(line) + "\n" for line in result.lines)
    written = [files.write_text(lines_path, lines)]

    submission = make_submission(result)
    if submission:
        path = lines_path.with_suffix(".submission.json")
        written.append(files.write_text(path, formatting.json_text(submission)))

    # Last, as a file of scores means that the result is complete.
    written.append(files.write_text(scores_path, formatting.json_text(to_dict(result))))
    return written


def make_submission(result: BenchmarkResult) -> dict[str, str]:
    """Returns id -> answer of the items whose answers are withheld, as MMMU's server takes it."""
    answers = {}
    for line in result.lines:
        if line["truth"] is not None:
            continue

        # Passes are the mappings among the values of a line.
        for value in line.values():
            if not isinstance(value, Mapping):
                continue

            if "chosen" in value:
                answers[line["id"]] = record.LETTERS[next(iter(value["chosen"].values()))]
            elif "generated" in value:
                answers[line["id"]] = value["extracted"] or value["generated"]
    return answers


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the lines of a result. Raises UserError naming the file."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a result: {error}") from error


def read_finished(
    directory: pathlib.Path, model: str, benchmark: Benchmark, provenance: Mapping[str, Any]
) -> list[dict[str, Any]] | None:
    """Returns the lines of a finished result that depends on the same; None if there is none.

    Raises:
      UserError: there is a result that depends on something else; one of an embedded task, which
        takes seconds, is replaced instead.
    """
    lines_path, scores_path = result_paths(directory, model, benchmark.name)
    if not scores_path.exists():
        return None

    try:
        found = json.loads(scores_path.read_text(encoding="utf-8"))["provenance"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--out: {scores_path} is damaged: remove it") from error

    # JSON has lists for tuples: the same conversion makes the values comparable.
    wanted = json.loads(json.dumps(provenance))
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different and benchmark.is_embedded:
        return None
    if different:
        key = different[0]
        raise UserError(
            f"--out: {scores_path} is of another run ({key} differs: {found.get(key)!r} there, "
            f"{wanted[key]!r} now): remove it or choose another --out"
        )
    return read_lines(lines_path)


def make_result(
    model: LazyModel,
    task: BenchmarkTask,
    provenance: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    seconds: float,
) -> BenchmarkResult:
    """Returns the result of a task with its scores."""
    scores = summary.score_protocols(task.benchmark, task.data.items, lines)
    return BenchmarkResult(
        model.name, task.benchmark, provenance, lines, scores, seconds, model.origin, model.step
    )
