"""`generate` and `chat` from the command line."""

from __future__ import annotations

import importlib.resources
import io
import json
import sys

import inference_cases as cases
import jax
import pytest
from PIL import Image

from wings_jax import chat, cli, generate
from wings_jax.errors import UserError
from wings_jax.inference import decode, engine, jobs
from wings_jax.inference.sampling import SamplingParams

LLM = importlib.resources.files("wings_jax") / "assets" / "tiny" / "llm"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("run") / "random")


@pytest.fixture
def run(monkeypatch, workdir):
    """Runs an entry point in this process; returns its exit status."""

    def command(entry, *flags, stdin: str = "") -> int:
        words = [str(workdir) if flag == "RUN" else str(flag) for flag in flags]
        monkeypatch.setattr(sys, "argv", [entry.__name__, *words])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        try:
            cli.run_main(entry.__name__, entry.main)
        except SystemExit as end:
            return end.code or 0
        return 0

    return command


@pytest.fixture
def requests(tmp_path):
    """A file with good and bad lines, and an image beside it."""
    Image.new("RGB", (9, 8), "red").save(tmp_path / "a.png")
    lines = [
        {"id": "text", "prompt": "red"},
        {"id": "image", "prompt": "<image>\nWhat is it?", "images": ["a.png"]},
        "{broken",
        {"prompt": "no id", "sampling": {"max_new_tokens": 2}},
        {"id": "lost", "prompt": "a", "images": ["lost.png"]},
        {"id": "empty", "prompt": " "},
        {"id": "odd", "question": "a"},
        {"id": "dialog", "conversations": [{"from": "human", "value": "hi"}]},
    ]
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path = tmp_path / "requests.jsonl"
    path.write_text(text + "\n\n")
    return path


def test_generate_answers_a_prompt(run, capsys):
    flags = ("--checkpoint", "RUN", "--prompt", "red", "--max-new-tokens", 5)
    assert run(generate, *flags) == 0
    output = capsys.readouterr().out
    assert output.strip()
    assert run(generate, *flags[:3], "-", *flags[4:], stdin="red") == 0
    assert capsys.readouterr().out == output


def test_generate_file_keeps_the_order_and_names_failed_lines(run, requests, capsys):
    output = requests.with_name("answers.jsonl")
    flags = ("--checkpoint", "RUN", "--input", requests, "--output", output)
    assert run(generate, *flags, "--max-new-tokens", 4, "--batch-size", 2) == 1
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    names = ["text", "image", 3, 4, "lost", "empty", "odd", "dialog"]
    assert [answer["id"] for answer in answers] == names
    failed = {answer["id"]: answer["error"] for answer in answers if "error" in answer}
    assert list(failed) == [3, "lost", "empty", "odd"]
    assert failed[3].startswith("line 3: malformed JSON")
    assert "lost.png" in failed["lost"]
    assert "line 6: the prompt is empty" in failed["empty"]
    assert "'question'" in failed["odd"]
    assert answers[3]["tokens"] <= 2
    assert not output.with_name("answers.jsonl.partial").exists()
    assert "4 of 8 answered" in capsys.readouterr().out
    assert run(generate, *flags) == 2
    assert "exists" in capsys.readouterr().err


def test_parts_of_a_file_are_put_together(run, requests, capsys):
    """Two shards answer all lines, each its own, and the command without them starts no model."""
    whole, output = requests.with_name("whole.jsonl"), requests.with_name("answers.jsonl")
    flags = ("--checkpoint", "RUN", "--input", requests, "--max-new-tokens", 4, "--batch-size", 2)
    assert run(generate, *flags, "--output", whole) == 1
    for part in ("0/2", "1/2"):
        assert run(generate, *flags, "--output", output, "--shard", part) == 1
        assert not output.exists()
    assert "part 1 of 2 is done" in capsys.readouterr().out

    assert run(generate, *flags, "--output", output) == 1
    assert "resuming: 8 of 8 lines are answered" in capsys.readouterr().err
    assert output.read_text() == whole.read_text()
    assert not list(requests.parent.glob("*.partial"))
    assert run(generate, *flags, "--output", output.with_name("b"), "--shard", "2/2") == 2
    assert "--shard: '2/2' is not I/N" in capsys.readouterr().err


def test_sampling_params_of_a_line_are_checked(tmp_path):
    changes = [{"stop": 5}, {"seed": None}, {"stop": ["a", 3]}, {"top_k": 0.5}, {"stop": "ab"}]
    lines = [json.dumps({"prompt": "red", "sampling": change}) for change in changes]
    (tmp_path / "requests.jsonl").write_text("\n".join(lines))
    *wrong, right = jobs.read_requests(tmp_path / "requests.jsonl", tmp_path, SamplingParams())
    messages = [str(line.request) for line in wrong]
    parts = (
        "stop: 5 is not a list",
        "seed: None is not a whole",
        "not a list of str",
        "top_k: 0.5 is not a",
    )
    assert [part in text for part, text in zip(parts, messages, strict=True)] == [True] * 4
    assert right.request.sampling.stop == ("ab",)


def test_job_resumes_after_an_interruption(requests, tmp_path):
    generator = cases.generator(2)
    sampling = SamplingParams(max_new_tokens=3)
    lines = jobs.read_requests(requests, requests.parent, sampling)
    whole = jobs.Journal(tmp_path / "whole.jsonl", {"job": 1})
    list(jobs.run(generator, lines, whole))
    whole.finish()
    output = tmp_path / "parts.jsonl"
    first = jobs.Journal(output, {"job": 1})
    steps = jobs.run(generator, lines, first)
    for _ in range(6):
        next(steps)
    first.close()
    with (tmp_path / "parts.jsonl.partial").open("a") as file:
        file.write('{"line": 8, "ans')  # a line that was cut off
    second = jobs.Journal(output, {"job": 1})
    assert len(second.answers) == 6
    assert len(list(jobs.run(generator, lines, second))) == 2
    second.finish()
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_journal_of_another_job_is_kept_once_it_has_an_answer(tmp_path):
    output = tmp_path / "x.jsonl"
    jobs.Journal(output, {"job": 0}).close()
    first = jobs.Journal(output, {"job": 1})
    first.add(1, {"text": "yes"})
    first.close()
    with pytest.raises(UserError, match=r"x.jsonl.partial is the journal of another job"):
        jobs.Journal(output, {"job": 2})
    assert jobs.Journal(output, {"job": 1}).answers == {1: {"text": "yes"}}


def test_chat_commands(run, requests, tmp_path, capsys):
    image, saved = requests.with_name("a.png"), tmp_path / "chat.json"
    lines = f"/image {image}\nWhat is it?\nAnd now?\n/undo\n/image no.png\n/oops\n/save {saved}\n"
    flags = ("--checkpoint", "RUN", "--max-new-tokens", 4)
    assert run(chat, *flags, stdin=lines + "/reset\nhi\n/quit\n") == 0
    out = capsys.readouterr().out
    assert "no.png" in out
    assert "/oops is not a command" in out
    record = json.loads(saved.read_text())[0]
    assert record["image"] == [str(image)]
    assert record["conversations"][0] == {"from": "human", "value": "<image>\nWhat is it?"}
    assert len(record["conversations"]) == 2


@pytest.mark.parametrize(
    ("entry", "flags", "message"),
    [
        (generate, ["--checkpoint", "no/such", "--prompt", "a"], "--checkpoint: no/such holds"),
        (generate, ["--checkpoint", "RUN"], "either --prompt or --input"),
        (generate, ["--checkpoint", "RUN", "--prompt", " "], "--prompt is empty"),
        (generate, ["--checkpoint", "RUN", "--input", "x"], "--input and --output"),
        (generate, ["--checkpoint", "RUN", "--input", "x", "--output", "y"], "--input: x"),
        (generate, ["--checkpoint", "RUN", "--prompt", "a", "--image", "x.png"], "x.png"),
        (generate, ["--checkpoint", "RUN", "--prompt", "a", "--top-p", "2"], "top_p: 2.0"),
        (generate, ["--checkpoint", "RUN", "--prompt", "a " * 300], "too many"),
        (generate, ["--checkpoint", str(LLM), "--prompt", "a"], "import it first: python -m"),
        (generate, ["--checkpoint", __file__, "--prompt", "a"], "holds no checkpoint"),
        (generate, ["--checkpoint", "RUN", "--prompt", "a", "--image", __file__], "test_inference"),
        (generate, ["--checkpoint", "RUN", "--prompt", "a", "--mesh", "rows=2"], "'rows=2' is not"),
        (generate, ["--checkpoint", "RUN", "--prompt", "a", "--mesh", "data=3"], "8 device(s)"),
        (generate, ["--checkpoint", "RUN", "--prompt", "a", "--mesh", "tensor=8"], "N=4 over"),
        (chat, ["--checkpoint", "no/such"], "--checkpoint: no/such holds no checkpoint"),
    ],
)
def test_error_message_is_one_line(run, capsys, entry, flags, message):
    assert run(entry, *flags) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]


def test_out_of_memory_is_one_line_and_answers_are_kept(run, requests, capsys, monkeypatch):
    output = requests.with_name("answers.jsonl")
    flags = ("--checkpoint", "RUN", "--input", requests, "--output", output, "--max-new-tokens", 3)

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

    with monkeypatch.context() as patch:
        patch.setattr(decode, "prefill", fail)
        assert run(generate, *flags) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert "out of memory" in lines[-1]
        assert "lower --batch-size" in lines[-1]
        assert not output.exists()
        patch.setattr(engine, "split_layers", fail)
        assert run(chat, *flags[:2]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert "use --dtype bfloat16" in lines[0]
    assert run(generate, *flags, "--batch-size", 1) == 1
    assert "resuming: 3 of 8" in capsys.readouterr().err


def test_text_only_llm_answers_text_and_refuses_images(run, requests, tmp_path, capsys):
    workdir = cases.write_checkpoint(tmp_path / "llm", "plain", parts=("decoder",))
    flags = ("--checkpoint", workdir, "--prompt", "red", "--max-new-tokens", 2)
    assert run(generate, *flags) == 0
    assert run(generate, *flags, "--image", requests.with_name("a.png")) == 2
    assert "the model is text-only: it has no vision and no projector" in capsys.readouterr().err


def test_mesh_flag_gives_the_same_answer(run, requests, capsys):
    flags = ("--checkpoint", "RUN", "--prompt", "red", "--max-new-tokens", 3)
    flags += ("--image", requests.with_name("a.png"))
    assert run(generate, *flags) == 0
    output = capsys.readouterr().out
    assert run(generate, *flags, "--mesh", "data=-1,tensor=2") == 0
    assert capsys.readouterr().out == output
