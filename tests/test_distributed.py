"""A model over several hosts: two processes compute what one does, and agree on mistakes."""

from __future__ import annotations

import json
import pathlib

import inference_cases as cases
import numpy as np
import pytest
import test_benchmark_run
from PIL import Image
from test_jobs import free_port, job, start

from wings_jax import evaluate, generate
from wings_jax.errors import UserError

GENERATE, EVALUATE = "wings_jax.generate", "wings_jax.evaluate"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> pathlib.Path:
    return cases.write_checkpoint(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def requests(tmp_path_factory) -> pathlib.Path:
    """Returns a file of more requests than rows, one with a missing image."""
    directory = tmp_path_factory.mktemp("requests")
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(
            directory / f"{number}.png"
        )
    lines = [
        {"id": "lost", "prompt": "What is it?", "images": ["lost.png"]},
        {"prompt": "<image> or <image>?", "images": ["0.png", "1.png"]},
        {"prompt": "What is this?", "images": ["0.png"], "sampling": {"repetition_penalty": 1.5}},
        {"prompt": "red", "sampling": {"stop": ["e"]}},
        *({"prompt": f"Is {n} even?", "sampling": {"temperature": 1, "seed": n}} for n in range(4)),
    ]
    path = directory / "requests.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def flags_of(checkpoint: pathlib.Path, requests: pathlib.Path) -> list[str]:
    """Returns the flags of `generate` without its output."""
    flags = ["--checkpoint", str(checkpoint), "--input", str(requests), "--logprobs"]
    return [*flags, "--max-new-tokens=5", "--batch-size=4"]


def finish(processes: list, status: int = 0) -> list[str]:
    """Returns the outputs of processes that have to end with this status."""
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [status] * len(processes), outputs
    return outputs


@pytest.mark.slow
def test_two_processes_generate_the_lines_of_one(checkpoint, requests, tmp_path):
    """Bitwise; a part of the file was answered by another process before."""
    flags = flags_of(checkpoint, requests)
    alone = [*flags, f"--output={tmp_path / 'one.jsonl'}", "--mesh=fsdp=2"]
    finish([start(alone, GENERATE, JAX_NUM_CPU_DEVICES="2")], status=1)

    output = f"--output={tmp_path / 'two.jsonl'}"
    part = [*flags, output, "--mesh=fsdp=2", "--shard=0/4"]
    finish([start(part, GENERATE, JAX_NUM_CPU_DEVICES="2")], status=1)
    first, second = finish(job([*flags, output], 2, 1, GENERATE), status=1)

    # Only the first process prints and writes.
    assert "1 of 2 devices" in first
    assert "resuming: 2 of 8 lines are answered" in first
    assert "7 of 8 answered" in first
    assert "answered" not in second
    assert {path.name for path in tmp_path.iterdir()} == {"one.jsonl", "two.jsonl"}
    one, two = ((tmp_path / f"{name}.jsonl").read_text() for name in ("one", "two"))
    assert two == one


@pytest.mark.slow
def test_two_processes_stream_the_answer_of_one(checkpoint):
    flags = ["--checkpoint", str(checkpoint), "--prompt=red", "--max-new-tokens=6"]
    (alone,) = finish([start([*flags, "--mesh=fsdp=2"], GENERATE, JAX_NUM_CPU_DEVICES="2")])
    first, second = finish(job(flags, 2, 1, GENERATE))
    assert alone.strip()
    assert first.endswith(alone)
    assert not second.endswith(alone)


@pytest.mark.slow
def test_two_processes_evaluate_to_the_report_of_one(checkpoint, tmp_path):
    """Every file bitwise, but for the seconds: with images, likelihoods, generation, perplexity."""
    root = test_benchmark_run.write_data(tmp_path / "data")
    tasks = "mmlu,ai2d,language_text,language_choices"
    flags = [f"--checkpoint={checkpoint}", f"--tasks={tasks}", f"--data-root={root}", "--shots=0"]
    flags += ["--limit=6", "--batch-size=4"]
    alone = [*flags, "--mesh=fsdp=2", f"--out={tmp_path / 'one'}"]
    finish([start(alone, EVALUATE, JAX_NUM_CPU_DEVICES="2")])
    first, second = finish(job([*flags, f"--out={tmp_path / 'two'}"], 2, 1, EVALUATE))

    assert "written: " in first
    assert "written: " not in second
    one, two = (contents(tmp_path / name) for name in ("one", "two"))
    assert len(one) > 8
    assert two == one

    # Started again, nothing is computed, and all processes know that.
    again = finish(job([*flags, f"--out={tmp_path / 'two'}"], 2, 1, EVALUATE))
    assert "written: " in again[0]
    assert contents(tmp_path / "two") == one


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """Returns path -> content of the files of a report that do not measure time."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "timing.json"]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_mistake_of_one_host_ends_all_with_one_line(checkpoint, requests, tmp_path):
    output = tmp_path / "answers.jsonl"
    output.write_text("")
    flags = [*flags_of(checkpoint, requests), f"--output={output}"]
    lines = [text.splitlines()[-1] for text in finish(job(flags, 2, 1, GENERATE), status=2)]
    message = f"--output: {output} exists"
    assert [line.partition(": ")[2] for line in lines] == [message, f"host 0: {message}"]


@pytest.mark.slow
def test_hosts_with_other_inputs_are_refused(checkpoint, requests, tmp_path):
    flags = [*flags_of(checkpoint, requests), f"--output={tmp_path / 'answers.jsonl'}"]
    flags += [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    own_flags = [[f"--process_id={number}", f"--seed={number}"] for number in range(2)]
    processes = [start([*flags, *own], GENERATE) for own in own_flags]
    message = "--distributed: host 1 has other flags or another --input than host 0\n"
    assert all(text.endswith(message) for text in finish(processes, status=2))
    assert not list(tmp_path.iterdir())


def test_shard_and_distributed_are_refused(monkeypatch, checkpoint, requests):
    message = "--shard: each part is computed by itself, without --distributed"
    flags = ["--shard=0/2", "--distributed"]
    words = [*flags_of(checkpoint, requests), "--output=a.jsonl", *flags]
    monkeypatch.setattr(generate.sys, "argv", ["generate", *words])
    with pytest.raises(UserError, match=message):
        generate.parse_flags()
    with pytest.raises(UserError, match=message):
        evaluate.parse_flags(["--checkpoint", "a", "--out", "b", *flags])
