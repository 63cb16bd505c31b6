"""The metrics of a run: a line on the terminal, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import contextlib
import json
import pathlib
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping

from wings_jax import files, formatting
from wings_jax.errors import UserError

_UPLOAD_SECONDS = 60.0


class MetricsWriter:
    """Appends scalars by step to `workdir/metrics.jsonl` and to TensorBoard's event files.

    Both are written by the caller's thread. (tensorboardX's SummaryWriter has a thread of its own;
    it ends at the first error, and whoever fills its queue after that waits forever.) An object of
    a bucket cannot be appended to: there both files are written to a local directory, which is
    uploaded every `_UPLOAD_SECONDS` and at the end.
    """

    def __init__(self, workdir: str | pathlib.Path, *, start: int):
        """Opens them to continue after step `start`; lines of later steps are removed.

        Raises:
          UserError: a file cannot be written.
        """
        # Importing tensorboardX imports torch where that is installed, which takes seconds.
        from tensorboardX import event_file_writer
        from tensorboardX.proto import event_pb2

        self._workdir = workdir
        self._mirror, self._uploaded = None, time.monotonic()
        directory = pathlib.Path(workdir)
        if files.is_url(workdir):
            self._mirror = tempfile.TemporaryDirectory(prefix="wings-metrics-")
            directory = pathlib.Path(self._mirror.name)
        self._path, board = directory / "metrics.jsonl", directory / "tensorboard"

        with self._writing():
            earlier = files.as_path(workdir) / "metrics.jsonl"
            if earlier.exists():
                _copy_lines_until(earlier, start, self._path)
            self._lines = self._path.open("a", encoding="utf-8", buffering=1)
            board.mkdir(parents=True, exist_ok=True)
            self._events = event_file_writer.EventsWriter(str(board / "events"))
            if start:  # TensorBoard hides the points of later steps
                session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self._events.write_event(event_pb2.Event(step=start + 1, session_log=session))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line and one point per scalar. Raises UserError if that fails."""
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2

        with self._writing():
            self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
            for name, value in scalars.items():
                point = summary.scalar(name, value)
                event = event_pb2.Event(wall_time=time.time(), step=step, summary=point)
                self._events.write_event(event)
            self._events.flush()
            if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
                self._upload()

    def close(self) -> None:
        """Closes both files. Raises UserError if what is buffered cannot be written."""
        with self._writing():
            self._lines.close()
            self._events.close()
            self._upload()
            if self._mirror:
                self._mirror.cleanup()

    def _upload(self) -> None:
        """Copies both files into the bucket, if the workdir is in one."""
        self._uploaded = time.monotonic()
        if self._mirror:
            root = pathlib.Path(self._mirror.name)
            for path in sorted(path for path in root.rglob("*") if path.is_file()):
                files.upload(path, f"{self._workdir}/{path.relative_to(root).as_posix()}")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"--workdir: {self._workdir}: metrics cannot be written: {error.strerror}"
            ) from error


def _copy_lines_until(source: pathlib.Path, last: int, target: pathlib.Path) -> None:
    """Copies the lines of a JSONL file up to step `last`, without a line that is not whole."""
    lines = source.read_text(encoding="utf-8").splitlines()
    whole = [line for line in lines if line.endswith("}")]
    remaining = [line + "\n" for line in whole if json.loads(line)["step"] <= last]
    files.write_text(target, "".join(remaining))


class Clock:
    """Speed over the last 50 steps: tokens per second, share of time waiting for data, ETA."""

    def __init__(self, steps: int):
        """`steps` is the number of the run's last step."""
        self._steps = steps
        # Per step: time, seconds waited for data and slots read since the start.
        self._marks: deque[tuple[float, float, int]] = deque(maxlen=51)
        self._waited, self._tokens = 0.0, 0

    def start(self) -> None:
        """Starts the first measured step."""
        self._marks.append((time.perf_counter(), 0.0, 0))

    def tick(self, *, waited: float, tokens: int) -> None:
        """Adds a step that waited so many seconds for data and read so many slots."""
        self._waited += waited
        self._tokens += tokens
        self._marks.append((time.perf_counter(), self._waited, self._tokens))

    def read(self, step: int) -> dict[str, float]:
        """Returns tokens_per_s, data_wait (0 to 1), step_s and eta_s (seconds)."""
        if not self._marks:
            return dict.fromkeys(("tokens_per_s", "data_wait", "step_s", "eta_s"), 0.0)

        first, last = self._marks[0], self._marks[-1]
        elapsed = max(last[0] - first[0], 1e-9)
        seconds_per_step = elapsed / max(len(self._marks) - 1, 1)
        return {
            "tokens_per_s": (last[2] - first[2]) / elapsed,
            "data_wait": (last[1] - first[1]) / elapsed,
            "step_s": seconds_per_step,
            "eta_s": seconds_per_step * (self._steps - step),
        }


def format_line(step: int, steps: int, scalars: Mapping[str, float]) -> str:
    """Returns the line that the terminal shows for a step."""
    rates = {k.removeprefix("lr/"): v for k, v in scalars.items() if k.startswith("lr/")}
    shown_rates = " ".join(f"{name}={rate:.1e}" for name, rate in rates.items())
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {scalars['loss']:.4f}  "
        f"acc {scalars['accuracy']:.3f}  grad {scalars['grad_norm']:.2f}  "
        f"{scalars['tokens_per_s']:,.0f} tok/s  wait {scalars['data_wait']:.0%}  "
        f"ETA {formatting.format_duration(scalars['eta_s'])}  lr {shown_rates}"
    )
