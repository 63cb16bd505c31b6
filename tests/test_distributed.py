"""A model over several hosts: two processes compute what one does, and agree on mistakes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pathlib

import inference_cases as cases
import jax
import numpy as np
import pytest
import test_benchmark_run
from PIL import Image
from test_jobs import free_port, job, start

from wings_jax import axes, config, distributed, evaluate, generate
from wings_jax.errors import UserError
from wings_jax.evaluation import training_metric
from wings_jax.evaluation.benchmarks import journals, passes, runner
from wings_jax.evaluation.benchmarks.record import DataSet, ImageRef, Item
from wings_jax.evaluation.benchmarks.records import BENCHMARKS
from wings_jax.inference import jobs
from wings_jax.inference.shards import Shard

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
    """The prompt is read from the standard input of the first process alone."""
    flags = ["--checkpoint", str(checkpoint), "--max-new-tokens=6"]
    one = [*flags, "--prompt=red", "--mesh=fsdp=2"]
    (alone,) = finish([start(one, GENERATE, JAX_NUM_CPU_DEVICES="2")])
    processes = job([*flags, "--prompt=-"], 2, 1, GENERATE)
    first, _ = processes[0].communicate("red", timeout=600)
    (second,) = finish(processes[1:])
    assert processes[0].returncode == 0
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags"), [(GENERATE, ["--prompt=red"]), (EVALUATE, ["--tasks=language_text"])]
)
def test_hosts_with_other_flags_are_refused(module, flags, checkpoint):
    own = {GENERATE: "--seed", EVALUATE: "--limit"}[module]
    address = [f"--coordinator_address=localhost:{free_port()}", "--num_processes=2"]
    flags = [f"--checkpoint={checkpoint}", *flags, *address]
    processes = [start([*flags, f"--process_id={n}", f"{own}={n + 1}"], module) for n in range(2)]
    message = f"host 1 has other flags than host 0: {own[2:]} is '2', not '1'\n"
    assert all(text.endswith(message) for text in finish(processes, status=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags"), [(GENERATE, ["--prompt=red"]), (EVALUATE, ["--tasks=language_text"])]
)
def test_checkpoint_that_one_host_lacks_ends_all(module, flags, checkpoint, tmp_path):
    directories = [tmp_path / "0", tmp_path / "1"]
    for directory in directories:
        directory.mkdir()
    (directories[0] / "model").symlink_to(checkpoint)
    flags = ["--checkpoint=model", *flags]
    outputs = finish(job(flags, 2, 1, module, directories), status=2)
    message = "--checkpoint: model holds no checkpoint"
    lines = [text.splitlines()[-1].partition(": ")[2] for text in outputs]
    assert lines == [f"host 1: {message}", message]


@pytest.fixture
def image_directories(tmp_path) -> list[pathlib.Path]:
    """Returns where two hosts run: of images/*.png one has no `lost`, and another `other`."""
    directories = [tmp_path / "0", tmp_path / "1"]
    for number, directory in enumerate(directories):
        (directory / "images").mkdir(parents=True)
        for name, value in (("same", 9), ("lost", 9), ("other", number)):
            if (name, number) != ("lost", 1):
                image = Image.fromarray(np.full((20, 20, 3), value, np.uint8))
                image.save(directory / "images" / f"{name}.png")
    return directories


@pytest.mark.slow
def test_image_that_one_host_lacks_is_an_error_of_its_question(
    checkpoint, image_directories, tmp_path
):
    names = ("same", "lost", "other", "same")
    lines = [{"prompt": "What is it?", "images": [f"{name}.png"]} for name in names]
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [*flags_of(checkpoint, requests), f"--output={output}", "--images=images"]
    finish(job(flags, 2, 1, GENERATE, image_directories), status=1)

    same, lost, other, again = map(json.loads, output.read_text().splitlines())
    assert same["tokens"] == again["tokens"]
    assert "host 1: missing image: images/lost.png" in lost["error"]
    assert "host 1 has other images (images/other.png) than host 0" in other["error"]


@pytest.mark.slow
def test_image_that_one_host_lacks_ends_a_stream(checkpoint, image_directories):
    flags = [f"--checkpoint={checkpoint}", "--prompt=red", "--image=images/lost.png"]
    first, second = finish(job(flags, 2, 1, GENERATE, image_directories), status=2)
    assert "host 1: missing image: images/lost.png" in first.splitlines()[-1]
    assert "images/lost.png" in second.splitlines()[-1]


@pytest.fixture
def gathered(monkeypatch) -> list:
    """Makes this process one of two that have the same values; returns what they gather."""
    values: list = []
    monkeypatch.setattr(distributed, "is_alone", lambda: False)
    monkeypatch.setattr(distributed, "share", lambda value: value)
    monkeypatch.setattr(distributed, "gather", lambda value: values.append(value) or [value, value])
    return values


def test_image_of_a_benchmark_that_cannot_be_read_is_an_error_of_all(gathered):
    def read() -> bytes:
        raise UserError("lost.png is not a file")

    with pytest.raises(UserError, match=r"lost\.png"):
        passes.read_images(Item("1", "What is it?", images=(ImageRef("lost.png", read),)))
    assert gathered == ["lost.png is not a file"]


def test_part_of_another_run_is_an_error_of_all(gathered, tmp_path):
    benchmark = BENCHMARKS["mmlu"]
    task = runner.BenchmarkTask(benchmark, DataSet((), (), (), ""), ("ppl",), 0)
    part = tmp_path / "a" / f"{journals.part_name(task, Shard(0, 2))}"
    part.parent.mkdir()
    with contextlib.closing(jobs.Journal(part, {"limit": 1}, "--out")) as journal:
        journal.add(0, {})
    with pytest.raises(UserError), journals.open_journal(tmp_path, "a", task, {}, Shard()):
        pass
    assert "part-0-of-2" in gathered[-1]


def test_base_that_cannot_be_read_is_an_error_of_all(gathered, monkeypatch, tmp_path):
    settings = config.EvalConfig(tasks="scenes_text", base=str(tmp_path))
    monkeypatch.setattr(training_metric, "read_tasks", lambda _: [])
    whole = dataclasses.replace(config.Config(), eval=settings)
    mesh = axes.make_mesh({"data": 1}, jax.local_devices()[:1])
    monkeypatch.setattr(training_metric.chat_template, "template_from_settings", lambda *_: None)
    with pytest.raises(UserError, match="holds no checkpoint"):
        training_metric.make_metric(whole, None, None, mesh)
    assert "config.eval.base" in gathered[-1]


def test_other_processes_write_to_a_directory_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    monkeypatch.chdir(tmp_path)
    with distributed.first_writes() as own_path:
        directory = own_path(pathlib.Path("a")).parent
        assert own_path(pathlib.Path("..")) == directory / tmp_path.parent.name
        assert own_path(pathlib.Path(".")) == directory / tmp_path.name


@pytest.mark.parametrize("words", [["--list"], ["--compare", "a", "b"], ["iit", "build"]])
def test_distributed_without_a_model_is_refused(words):
    needed = ["--data-root=a", "--out=b"] if "build" in words else []
    with pytest.raises(UserError, match="--distributed: not with --compare, --list, `iit build`"):
        evaluate.parse_flags([*words, *needed, "--distributed"])


def test_shard_and_distributed_are_refused(monkeypatch, checkpoint, requests):
    message = "--shard: each part is computed by itself, without --distributed"
    flags = ["--shard=0/2", "--distributed"]
    words = [*flags_of(checkpoint, requests), "--output=a.jsonl", *flags]
    monkeypatch.setattr(generate.sys, "argv", ["generate", *words])
    with pytest.raises(UserError, match=message):
        generate.parse_flags()
    with pytest.raises(UserError, match=message):
        evaluate.parse_flags(["--checkpoint", "a", "--out", "b", *flags])
