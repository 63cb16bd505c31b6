"""What a run tells of itself: a line on the terminal, `metrics.jsonl`, TensorBoard."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import time
from collections import deque
from collections.abc import Mapping

import tensorboardX

from wings_jax import formatting


class MetricsWriter:
    """Appends scalars by step to `workdir/metrics.jsonl` and to TensorBoard's event files."""

    def __init__(self, workdir: str | pathlib.Path, *, start: int):
        """Opens them to go on after step `start`: lines of later steps were lost and are cut."""
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        if self._path.is_file():
            _keep(self._path, start)
        self._lines = self._path.open("a", encoding="utf-8", buffering=1)
        self._board = tensorboardX.SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=start + 1 if start else None
        )

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes one line and one point per scalar."""
        self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def _keep(path: pathlib.Path, last: int) -> None:
    """Cuts a JSONL file behind step `last`; a line torn by a crash goes too."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.endswith("}") and json.loads(line)["step"] <= last:
            kept.append(line + "\n")
    passing = path.with_suffix(".tmp")
    passing.write_text("".join(kept), encoding="utf-8")
    os.replace(passing, path)


@dataclasses.dataclass
class Clock:
    """Speed over the last steps: tokens per second, share of time spent waiting for data, ETA."""

    steps: int
    _marks: deque = dataclasses.field(default_factory=lambda: deque(maxlen=51))
    _waited: float = 0.0
    _tokens: int = 0

    def start(self) -> None:
        """Begins to count."""
        self._marks.append((time.perf_counter(), 0.0, 0))

    def tick(self, *, waited: float, tokens: int) -> None:
        """Notes a step that waited so many seconds for data and read so many slots."""
        self._waited += waited
        self._tokens += tokens
        self._marks.append((time.perf_counter(), self._waited, self._tokens))

    def read(self, step: int) -> dict[str, float]:
        """Returns tokens_per_s, data_wait (0 to 1), step_s and eta_s (seconds)."""
        if not self._marks:
            return dict.fromkeys(("tokens_per_s", "data_wait", "step_s", "eta_s"), 0.0)
        first, last = self._marks[0], self._marks[-1]
        elapsed = max(last[0] - first[0], 1e-9)
        per_step = elapsed / max(len(self._marks) - 1, 1)
        return {
            "tokens_per_s": (last[2] - first[2]) / elapsed,
            "data_wait": (last[1] - first[1]) / elapsed,
            "step_s": per_step,
            "eta_s": per_step * (self.steps - step),
        }


def format_line(step: int, steps: int, scalars: Mapping[str, float]) -> str:
    """Returns the line that the terminal shows for a step."""
    rates = {k.removeprefix("lr/"): v for k, v in scalars.items() if k.startswith("lr/")}
    shown = " ".join(f"{name}={rate:.1e}" for name, rate in rates.items())
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {scalars['loss']:.4f}  "
        f"acc {scalars['accuracy']:.3f}  grad {scalars['grad_norm']:.2f}  "
        f"{scalars['tokens_per_s']:,.0f} tok/s  wait {scalars['data_wait']:.0%}  "
        f"ETA {formatting.format_duration(scalars['eta_s'])}  lr {shown}"
    )
