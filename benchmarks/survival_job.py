"""The processes that `survival.py` kills, and their workdirs on a disk or in a bucket."""

from __future__ import annotations

import json
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from typing import Any, Protocol

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT = 600  # seconds that a run may take
HANG = 120  # seconds in which a process has to end after another one of its job


class Job:
    """A training command in one process, or in several that form one job.

    Args:
      arguments: of Python.
      processes: how many.
      environment: variables of all of them.
    """

    def __init__(self, arguments: list[str], processes: int, environment: dict[str, str]):
        environment = {"JAX_PLATFORMS": "cpu", **environment, "PYTHONPATH": str(ROOT)}
        extra: list[dict[str, str]] = [{}]
        if processes > 1:
            arguments = [*arguments, "--distributed"]
            shared = {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{_free_port()}",
                "JAX_NUM_PROCESSES": str(processes),
            }
            extra = [shared | {"JAX_PROCESS_ID": str(number)} for number in range(processes)]

        self.hung = False  # whether a process did not end after another one was killed
        self._began = time.monotonic()
        self._lines: list[str] = []  # of the first process, which logs
        self._changed = threading.Condition()
        self._processes = [
            subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**environment, **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for variables in extra
        ]
        self._readers = [
            threading.Thread(target=self._read, args=(number, process), daemon=True)
            for number, process in enumerate(self._processes)
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, number: int, process: subprocess.Popen) -> None:
        assert process.stdout
        for line in process.stdout:
            with self._changed:
                self._lines.append(line if number == 0 else f"[{number}] {line}")
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def output(self) -> str:
        """What has been printed until now; lines of another than the first process are marked."""
        return "".join(self._lines)

    def wait_for(self, pattern: str) -> None:
        """Returns when a line of the first process matches, or when a process has ended."""
        seen = 0
        with self._changed:
            while all(process.poll() is None for process in self._processes):
                lines, seen = self._lines[seen:], len(self._lines)
                if any(re.search(pattern, line) for line in lines if line[0] != "["):
                    return
                if self.seconds > LIMIT:
                    raise SystemExit(f"no line {pattern!r} in {LIMIT} s:\n{''.join(self._lines)}")
                self._changed.wait(1)

    def sleep(self, seconds: float) -> None:
        """Waits so long, or until a process has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._processes[0].poll() is None:
            time.sleep(min(0.005, max(0.0, until - time.monotonic())))

    def kill(self, rng: random.Random) -> str:
        """Sends SIGKILL to a random process or to all; returns how far the job was.

        What is not killed has to end by itself. Before the processes have found each other, all are
        killed: they would wait for the missing one for minutes.
        """
        chosen = self._processes
        if len(chosen) > 1 and "host 0 of" in self.output and rng.random() < 0.5:
            chosen = [rng.choice(chosen)]

        for process in chosen:
            process.send_signal(signal.SIGKILL)
        for process in self._processes:
            try:
                process.wait(HANG)
            except subprocess.TimeoutExpired:
                self.hung = True
                process.kill()
        for reader in self._readers:
            reader.join(LIMIT)

        # Steps that were logged, and who was killed.
        steps = re.findall(r"^step +(\d+)/", self.output, re.MULTILINE)
        where = f"after step {steps[-1]}" if steps else "before step 1"
        if any(process.returncode == 0 for process in self._processes):
            where = "at the end"
        if len(self._processes) > 1:
            who = "both hosts"
            if len(chosen) == 1:
                who = f"host {self._processes.index(chosen[0])}"
            where = f"{who} {where}"
        return where

    def finish(self) -> list[int]:
        """Waits for the end; returns the exit statuses."""
        for process in self._processes:
            process.wait(LIMIT)
        for reader in self._readers:
            reader.join(LIMIT)
        return [process.returncode for process in self._processes]


class Workdir(Protocol):
    """Where a run writes."""

    def read_text(self, name: str) -> str:
        """Returns the text of a file."""

    def read_checksums(self, step: int) -> Any:
        """Returns the checksums of all arrays of a step."""

    def list_unfinished(self) -> list[str]:
        """Returns the names of steps and files that are not complete."""

    def describe_save(self) -> str:
        """Returns which save was in progress, as the end of a sentence."""

    def copy(self, target: pathlib.Path) -> None:
        """Copies everything to a local directory."""

    def remove(self) -> None:
        """Deletes everything."""


def _describe_unfinished(names: list[str]) -> str:
    steps = sorted({name.split(".")[0] for name in names if name[0].isdigit()}, key=int)
    return f" in the save of step {', '.join(steps)}" if steps else ""


class Disk:
    """A workdir on the disk."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def read_text(self, name: str) -> str:
        return (self._path / name).read_text()

    def read_checksums(self, step: int) -> Any:
        return json.loads(self.read_text(f"checkpoints/{step}/meta/metadata"))["checksums"]

    def list_unfinished(self) -> list[str]:
        if not self._path.exists():
            return []

        steps = self._path.glob("checkpoints/*")
        left = [path.name for path in steps if not path.name.isdigit()]
        hidden = [path.name for path in self._path.rglob(".*")]
        return sorted([*left, *hidden])

    def describe_save(self) -> str:
        return _describe_unfinished(self.list_unfinished())

    def copy(self, target: pathlib.Path) -> None:
        if self._path.exists():
            shutil.copytree(self._path, target, dirs_exist_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self._path, ignore_errors=True)


class Bucket:
    """A workdir in the emulator of Google Cloud Storage, by its JSON interface.

    Args:
      server: URL of the emulator.
      bucket: name.
      name: of the workdir in the bucket.
    """

    def __init__(self, server: str, bucket: str, name: str):
        self._url, self._bucket, self._name = f"{server}/storage/v1/b/{bucket}/o", bucket, name

    def __str__(self) -> str:
        return f"gs://{self._bucket}/{self._name}"

    def _list(self) -> list[str]:
        """Returns the objects below the workdir, by their path in it."""
        prefix = f"{self._name}/"
        with urllib.request.urlopen(f"{self._url}?prefix={prefix}&maxResults=100000") as response:
            items = json.load(response).get("items", [])
        return [item["name"].removeprefix(prefix) for item in items]

    def _object(self, name: str) -> str:
        return f"{self._url}/{urllib.parse.quote(f'{self._name}/{name}', safe='')}"

    def _read(self, name: str) -> bytes:
        with urllib.request.urlopen(f"{self._object(name)}?alt=media") as response:
            return response.read()

    def read_text(self, name: str) -> str:
        return self._read(name).decode()

    def read_checksums(self, step: int) -> Any:
        return json.loads(self.read_text(f"checkpoints/{step}/meta/metadata"))["checksums"]

    def list_unfinished(self) -> list[str]:
        names = [name.split("/") for name in self._list()]
        steps = {parts[1] for parts in names if parts[0] == "checkpoints" and len(parts) > 2}
        complete = {parts[1] for parts in names if parts[2:] == ["commit_success.txt"]}
        return sorted(steps - complete)

    def describe_save(self) -> str:
        return _describe_unfinished(self.list_unfinished())

    def copy(self, target: pathlib.Path) -> None:
        for name in self._list():
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not name.endswith("/"):
                path.write_bytes(self._read(name))

    def remove(self) -> None:
        for name in self._list():
            request = urllib.request.Request(self._object(name), method="DELETE")
            urllib.request.urlopen(request).close()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]
