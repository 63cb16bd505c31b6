"""Commands as processes: input that is not UTF-8, and interrupts, which leave nothing half done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import inference_cases as cases
import numpy as np
import pytest

from wings_jax import chat, cli
from wings_jax.inference import decode
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams

SHORT = SamplingParams(max_new_tokens=3)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return cases.write_checkpoint(tmp_path_factory.mktemp("run") / "random")


def start(*words, **options) -> subprocess.Popen:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def test_latin_1_prompt_is_one_line(workdir):
    command = ["wings_jax.generate", "--checkpoint", str(workdir), "--max-new-tokens", "2"]
    for prompt, piped in ((b"caf\xe9", b""), (b"-", b"caf\xe9")):
        process = start(*map(os.fsencode, command), b"--prompt", prompt)
        _, errors = process.communicate(piped, timeout=300)
        assert process.returncode == 2
        (line,) = errors.decode().strip().splitlines()
        assert "not valid Unicode" in line


def test_chat_with_latin_1_goes_on(workdir):
    process = start("wings_jax.chat", "--checkpoint", str(workdir), "--max-new-tokens", "2")
    lines = b"caf\xe9\n/image caf\xe9.png\n/save a\0b\nred\n/quit\n"
    output, errors = process.communicate(lines, timeout=300)
    assert process.returncode == 0, errors.decode()
    assert b"not valid Unicode" in output
    assert rb"caf\udce9.png" in output
    assert b"prompt slots computed" in output


def test_interrupted_job_keeps_its_journal(workdir, tmp_path):
    path, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    path.write_text('{"prompt": "red"}\nnot JSON\n' + '{"prompt": "red blue"}\n' * 400)
    words = ["wings_jax.generate", "--checkpoint", str(workdir), "--batch-size", "1"]
    words += ["--input", str(path), "--output", str(output), "--max-new-tokens", "100"]
    process = start(*words)
    journal = tmp_path / "answers.jsonl.partial"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if journal.exists() and len(journal.read_bytes().splitlines()) > 3:
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    lines = errors.decode().strip().splitlines()
    assert "interrupted: " in lines[-1]
    assert lines[-1].endswith("of 402 lines are answered; the same command resumes")
    assert "Traceback" not in errors.decode()
    assert not output.exists()
    answered = len(journal.read_text().splitlines()) - 1
    assert f" {answered} of 402" in lines[-1]


# --- Ctrl-C ----------------------------------------------------------------------------------


def test_interrupt_in_run_main_is_one_line_and_status_130(capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt("2 of 3 lines are answered")

    with pytest.raises(SystemExit) as end:
        cli.run_main("wings x", interrupted)
    assert end.value.code == 130
    assert capsys.readouterr().err == "wings x: interrupted: 2 of 3 lines are answered\n"


def test_interrupt_at_exit_is_ignored():
    """A signal while JAX destroys its backends is how a chat ended with SIGSEGV."""
    script = """
import atexit, os, signal
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))  # as if typed during clean-up
from wings_jax import cli
cli.run_main("wings x", lambda: print("done"))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("stage", ["prefill", "truncate", "extend", "decode"])
def test_interrupt_leaves_a_chat_consistent(monkeypatch, stage):
    """Ctrl-C inside of a device call, whose cache is donated by then."""
    chat = cases.generator(1).chat(sampling=SamplingParams(max_new_tokens=8))
    text = "".join(chat.ask("Hi."))
    before = list(chat.turns)

    def interrupt(*arguments, **keywords):
        real(*arguments, **keywords)
        raise KeyboardInterrupt

    real = getattr(decode, stage)
    with monkeypatch.context() as patch:
        patch.setattr(decode, stage, interrupt)
        if stage == "prefill":
            chat.reset()
        with pytest.raises(KeyboardInterrupt):
            list(chat.ask("Hi." if stage == "prefill" else "What is red?"))

    if stage == "prefill":
        assert chat.turns == []
        assert "".join(chat.ask("Hi.")) == text
        return
    if stage != "decode":
        assert chat.turns == before
    if len(chat.turns) > len(before):
        chat.undo()
    again = "".join(chat.ask("And blue?"))
    history = [*before, {"from": "human", "value": "And blue?"}]
    request = Request(history, (), SamplingParams(max_new_tokens=8))
    assert again == cases.generator(1).generate(request).text


def test_stopped_question_without_an_answer_is_removed():
    chat = cases.generator(1).chat(sampling=SHORT)
    image = np.zeros((8, 8, 3), np.uint8)
    pieces = chat.ask("What is red?", [image])
    pieces.close()
    assert (chat.turns, chat.images) == ([], [])


def test_interrupt_of_an_answer_waits_for_the_next_piece(capsys):
    """KeyboardInterrupt in the middle of JAX's code is lost, or ends the process."""

    class Chat:
        images, computed_slots, pieces = (), 3, 0

        def ask(self, text, images):
            for piece in ("one ", "two ", "three "):
                if piece == "two ":
                    os.kill(os.getpid(), signal.SIGINT)
                self.pieces += 1  # reached: nothing was raised here
                yield piece

    model, before = Chat(), signal.getsignal(signal.SIGINT)
    chat.Terminal(model).ask("Hi.")
    assert model.pieces == 2
    output = capsys.readouterr().out
    assert output.startswith("one two \n")
    assert "(stopped)" in output
    assert signal.getsignal(signal.SIGINT) is before


def test_second_interrupt_of_an_answer_is_not_held_back(capsys):
    class Chat:
        images, computed_slots = (), 3

        def ask(self, text, images):
            yield "one "
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            yield "never"

    chat.Terminal(Chat()).ask("Hi.")
    assert "never" not in capsys.readouterr().out
