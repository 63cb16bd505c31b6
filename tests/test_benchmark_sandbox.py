"""Generated code: what it may do, and the one line that names what it may not."""

from __future__ import annotations

import contextlib
import os
import pathlib
import socket
import threading
import time

import pytest

from wings_jax.evaluation.benchmarks import extraction, readers, records, sandbox
from wings_jax.evaluation.benchmarks.record import Item

REAL = pathlib.Path(__file__).parents[2] / "shared" / "data" / "eval"
TEST = ["assert f(1) == 2"]
RIGHT = "def f(x): return x + 1\n"

# Name -> code and the beginning of the reason; {path} is a directory with a file `old`.
FAILURES = {
    "wrong answer": ("def f(x): return x", "wrong: assert f(1) == 2"),
    "syntax": ("def f(x) return x", "syntax: "),
    "exception": ("def f(x): return y", "error: NameError: name 'y' is not defined"),
    "recursion": ("def f(x): return f(x)", "error: RecursionError"),
    "no function": ("", "error: NameError: name 'f' is not defined"),
    "input": ("def f(x): return int(input())", "error: EOFError"),
    "fork": ("import os\nwhile True: os.fork()", "process: "),
    "subprocess": ("import subprocess\nsubprocess.run(['true'])", "process: "),
    "system": ("import os\nos.system('true')", "process: "),
    "kill": ("import os\nos.kill(os.getppid(), 9)", "process: "),
    "native call": ("import ctypes\nctypes.CDLL(None).fork()", "process: "),
    "write": ("open('{path}/new', 'w').write('x')", "file: tried to write"),
    "write here": ("open('here', 'a')", "file: tried to write 'here'"),
    "low-level write": ("import os\nos.open('here', os.O_CREAT | os.O_WRONLY)", "file: "),
    "remove": ("import os\nos.remove('{path}/old')", "file: tried to change"),
    "pipe": ("import os\nos.mkfifo('{path}/new')", "file: tried to change '{path}/new'"),
    "device": ("import os\nos.mknod('{path}/new')", "file: tried to change '{path}/new'"),
    "hidden pipe": ("import posix\nposix.mkfifo('{path}/new')", "file: tried to change"),
    "database": (
        "import sqlite3\nsqlite3.connect('{path}/new').execute('create table a(b)')",
        "file: tried to write '{path}/new'",
    ),
    "dbm": ("import dbm.gnu\ndbm.gnu.open('{path}/new', 'c')", "file: tried to load _"),
    "shared memory": (
        "from multiprocessing import shared_memory as m\nm.SharedMemory('wings', True, 9)",
        "file: tried to load _posixshmem",
    ),
    "socket": ("import socket\nsocket.socket()", "network: tried to open a socket"),
    "download": ("import urllib.request as r\nr.urlopen('http://127.0.0.1:9')", "network: "),
    "memory": ("x = bytearray(4 << 30)", "memory: needed more than 1024 MiB"),
    "exit": ("import sys\nsys.exit(0)", "exit: ended before the tests were done"),
    "hard exit": ("import os\nos._exit(0)", "exit: ended before the tests were done"),
    "abort": ("import os\nos.abort()", "crash: signal"),
    "null byte": ("x = 1\0", "syntax: "),
    "not text": ("x = '\ud83d'", "error: UnicodeEncodeError"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_code_that_fails_gives_one_line(name, tmp_path):
    code, expected = FAILURES[name]
    (tmp_path / "old").write_text("kept")
    outcome = sandbox.run_tests(code.replace("{path}", str(tmp_path)) + "\n", TEST)
    assert not outcome.passed
    assert outcome.reason.startswith(expected.replace("{path}", str(tmp_path)))
    assert "\n" not in outcome.reason
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "code",
    [
        RIGHT,
        RIGHT + "print('x' * 100_000)",
        "import math, re, collections, heapq, itertools, functools, random, string\n" + RIGHT,
        "import threading\nthreading.excepthook\n" + RIGHT,
        "import os\nos.listdir('.')\n" + RIGHT,
        "if __name__ == '__main__':\n    " + RIGHT,
        "import sqlite3\nsqlite3.connect(':memory:').execute('create table a(b)')\n" + RIGHT,
    ],
)
def test_code_that_passes(code):
    assert sandbox.run_tests(code, TEST) == sandbox.CodeOutcome(True, "")


@pytest.mark.parametrize("code", ["while True: pass", "import time\ntime.sleep(99)"])
def test_code_that_does_not_end_is_ended(code):
    started = time.monotonic()
    outcome = sandbox.run_tests(code, TEST, seconds=1)
    assert outcome.reason == "timeout: still running after 1 s"
    assert time.monotonic() - started < 9


def test_a_caught_refusal_still_counts():
    code = "import os\ntry:\n    os.fork()\nexcept BaseException:\n    pass\n" + RIGHT
    assert sandbox.run_tests(code, TEST).reason.startswith("process: ")


def test_no_connection_arrives_even_without_the_namespaces(monkeypatch):
    monkeypatch.setattr(sandbox, "namespace_command", lambda: ())
    arrived = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)

        def accept() -> None:
            with contextlib.suppress(TimeoutError):
                arrived.append(server.accept())

        thread = threading.Thread(target=accept)
        thread.start()
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}))\n"
        outcome = sandbox.run_tests(code, TEST)
        thread.join()
    assert outcome.reason == "network: tried to open a socket"
    assert not arrived


def test_setup_runs_between_code_and_tests():
    outcome = sandbox.run_tests("class Node: pass", ["assert isinstance(n, Node)"], "n = Node()")
    assert outcome.passed


def test_nothing_of_the_environment_is_passed_on(monkeypatch):
    monkeypatch.setenv("WINGS_SECRET", "1")
    code = "import os\ndef f(x): return 2 if 'WINGS_SECRET' not in os.environ else 0"
    assert sandbox.run_tests(code, TEST).passed


def test_no_process_is_left_over():
    before = set(os.listdir("/proc")) if os.path.isdir("/proc") else set()
    sandbox.run_tests("while True: pass", TEST, seconds=1)
    time.sleep(0.2)
    for name in set(os.listdir("/proc")) - before if before else ():
        try:
            command = pathlib.Path("/proc", name, "cmdline").read_bytes()
        except OSError:
            continue
        assert b"sandbox_child" not in command


def test_generated_answer_is_judged():
    item = Item("1", "Add one.", answer="", extra={"tests": tuple(TEST), "setup": ""})
    right = extraction.judge_answer("code", item, f" '{RIGHT}' \n[DONE] \n\n ")
    assert (right.credit, right.extracted) == (1.0, "passed")
    wrong = extraction.judge_answer("code", item, "I cannot code.")
    assert wrong.credit == 0
    assert wrong.extracted.startswith("syntax: ")


def test_real_solutions_of_mbpp_pass_their_tests():
    if not (REAL / "mbpp").exists():
        pytest.skip(f"{REAL / 'mbpp'} is not there")
    data = readers.read_data_set(records.BENCHMARKS["mbpp"], REAL)
    chosen = [item for item in data.items if int(item.id) % 20 == 7]  # 367 has a setup
    assert len(chosen) == 25
    for item in chosen:
        assert sandbox.run_tests(item.answer, item.extra["tests"], item.extra["setup"]).passed
