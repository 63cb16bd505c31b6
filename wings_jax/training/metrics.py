"""The metrics of a run: a line on the terminal, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping

import numpy as np

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
        # Slow to import, and not needed by `train --help` (`process.import_without_torch`).
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
            # A resumed run computes the steps after its checkpoint again.
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

            # Flushed at every step, so that the points of a killed run are in the file.
            self._events.flush()
            if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
                self._upload()

    def sync(self) -> None:
        """Puts what was written on the disk or in the bucket. Raises UserError if that fails.

        A checkpoint that is saved after it has a line for each of its steps, whatever fails later.
        """
        with self._writing():
            os.fsync(self._lines.fileno())
            if self._mirror:
                self._upload()

    def close(self) -> None:
        """Closes both files. Raises UserError if what is buffered cannot be written."""
        with self._writing():
            try:
                self._lines.close()
            finally:
                self._close_events()
            self._upload()
            if self._mirror:
                self._mirror.cleanup()

    def _close_events(self) -> None:
        """Closes the event file also where it cannot be flushed, which tensorboardX does not.

        Python would report such a file once more when it is deleted.
        """
        # `EventsWriter.close` flushes first; if that raises, its file stays open.
        records = self._events._py_recordio_writer
        try:
            self._events.close()
        except OSError:
            with contextlib.suppress(OSError):
                records.close()
            raise

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
    # A killed run may have written half of its last line.
    lines = source.read_text(encoding="utf-8").splitlines()
    whole = [line for line in lines if line.endswith("}")]
    remaining = [line + "\n" for line in whole if json.loads(line)["step"] <= last]
    files.write_text(target, "".join(remaining))


@dataclasses.dataclass(frozen=True)
class _Mark:
    """The end of a step: when, and what there has been until then since the start."""

    time: float
    waited: float = 0.0
    tokens: int = 0
    flops: float = 0.0


class Clock:
    """Speed over the last 50 steps: tokens and operations per second, step times, waiting, ETA.

    Args:
      steps: number of the run's last step.
      devices: of the whole job.
      peak_flops: operations per second that one device has at most; None if that is not known.
    """

    def __init__(self, steps: int, *, devices: int = 1, peak_flops: float | None = None):
        self._steps, self._devices, self._peak_flops = steps, devices, peak_flops
        self._marks: deque[_Mark] = deque(maxlen=51)
        self._skipped = 0.0  # seconds that are not measured

    def start(self) -> None:
        """Starts the first measured step."""
        self._marks.append(_Mark(time.perf_counter() - self._skipped))

    def skip(self, seconds: float) -> None:
        """Leaves out seconds of the current step in which nothing was trained."""
        self._skipped += seconds

    def tick(self, *, waited: float, tokens: int, flops: float = 0.0) -> None:
        """Adds a step.

        Args:
          waited: seconds for data.
          tokens: slots of the whole batch that are not padding.
          flops: operations that the model needs for them, forward and backward.
        """
        # Sums since the start: the difference of two marks is the interval's.
        last = self._marks[-1]
        self._marks.append(
            _Mark(
                time.perf_counter() - self._skipped,
                last.waited + waited,
                last.tokens + tokens,
                last.flops + flops,
            )
        )

    def read(self, step: int) -> dict[str, float]:
        """Returns the speed until `step`, 0 before the first measured step.

        tokens_per_s          slots that are not padding, of the whole job
        tokens_per_s_device   the same per device
        tflops_per_s_device   10^12 operations that the model needs, per second and device
        mfu                   their share of the device's peak, 0 to 1; only if that is known
        data_wait             share of the time that the loop waited for a batch, 0 to 1
        step_s                mean seconds per step
        step_p50_s, step_p95_s  the median, and what 95 % of the steps stay below
        eta_s                 seconds until the last step
        """
        # Differences between the oldest and the newest mark: the last 50 steps.
        marks = list(self._marks) or [_Mark(0.0)]
        first, last = marks[0], marks[-1]
        elapsed = max(last.time - first.time, 1e-9)

        times = [after.time - before.time for before, after in itertools.pairwise(marks)] or [0.0]
        step_s = sum(times) / len(times)

        tokens_per_s = (last.tokens - first.tokens) / elapsed
        flops_per_s = (last.flops - first.flops) / elapsed / self._devices
        speed = {
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_device": tokens_per_s / self._devices,
            "tflops_per_s_device": flops_per_s / 1e12,
            "data_wait": (last.waited - first.waited) / elapsed,
            "step_s": step_s,
            "step_p50_s": float(np.percentile(times, 50)),
            "step_p95_s": float(np.percentile(times, 95)),
            "eta_s": step_s * (self._steps - step),
        }

        return speed | ({"mfu": flops_per_s / self._peak_flops} if self._peak_flops else {})


def format_line(step: int, steps: int, scalars: Mapping[str, float]) -> str:
    """Returns the line that the terminal shows for a step."""
    # The rates of the groups, whose scalars are named lr/GROUP.
    rates = {k.removeprefix("lr/"): v for k, v in scalars.items() if k.startswith("lr/")}
    shown_rates = " ".join(f"{name}={rate:.1e}" for name, rate in rates.items())

    # With one device both speeds are the same.
    speed = f"{scalars['tokens_per_s']:,.0f} tok/s"
    if scalars["tokens_per_s_device"] != scalars["tokens_per_s"]:
        speed += f" ({scalars['tokens_per_s_device']:,.0f} per device)"
    if "mfu" in scalars:
        speed += f"  MFU {scalars['mfu']:.1%}"

    if scalars["step_p50_s"]:  # not at the first step, which compiles
        speed += f"  {scalars['step_p50_s']:.2f} s/step (p95 {scalars['step_p95_s']:.2f})"

    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {scalars['loss']:.4f}  "
        f"acc {scalars['accuracy']:.3f}  grad {scalars['grad_norm']:.2f}  {speed}  "
        f"wait {scalars['data_wait']:.0%}  "
        f"ETA {formatting.format_duration(scalars['eta_s'])}  lr {shown_rates}"
        f"{_format_evaluation(scalars)}"
    )


def _format_evaluation(scalars: Mapping[str, float]) -> str:
    """Returns the end of a step's line, '' if it was not evaluated.

    >>> _format_evaluation({"eval/piqa/accuracy": 0.5, "eval/piqa/change": -0.25, "loss": 1.0})
    '  eval piqa=0.500 (-0.250)'
    """
    shown = ""
    for key, value in scalars.items():
        if key.startswith("eval/") and key.endswith("/accuracy"):
            task = key.split("/")[1]
            change = scalars.get(f"eval/{task}/change")
            shown += f" {task}={value:.3f}" + (f" ({change:+.3f})" if change is not None else "")
    return f"  eval{shown}" if shown else ""
