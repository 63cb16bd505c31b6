"""The loop: batches in, updates, metrics out, checkpoints on the way."""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from wings_jax import axes, files
from wings_jax.errors import UserError
from wings_jax.model.layout import PADDING, Batch
from wings_jax.training import metrics
from wings_jax.training import state as state_lib
from wings_jax.training.start import TrainingRun
from wings_jax.training.step import TrainState

# Begins to measure a state, which it only reads, and returns what waits for the scalars.
Watch = Callable[[TrainState], Callable[[], Mapping[str, float]]]


def train(run: TrainingRun, watch: Watch | None = None) -> dict[str, Any]:
    """Goes through all steps that are left and returns the summary, which it also writes.

    Metrics are fetched one step late, so the device never waits for them. What `watch` measures
    every `config.laws_every` steps, and at the first and last, joins them. SIGTERM (preemption)
    saves a checkpoint and ends the run with status 143.

    Raises:
      UserError: too many steps of the last few were not finite; the message names them.
    """
    config, done = run.config, int(run.state.step)
    is_first = jax.process_index() == 0
    is_preempted = _preemption()
    lines = metrics.MetricsWriter(run.workdir, start=done) if is_first else None
    guard = _Guard(
        config.optimizer.skip_limit, config.optimizer.skip_window, (done, int(run.state.skipped))
    )
    clock = metrics.Clock(run.steps)
    history: list[dict[str, float]] = []

    def tell(step: int, measured: Mapping[str, jax.Array], watched: Any) -> None:
        scalars = {name: float(x) for name, x in jax.device_get(measured).items()}
        scalars |= {f"lr/{group}": float(rate(step - 1)) for group, rate in run.rates.items()}
        scalars |= clock.read(step)
        scalars |= watched() if watched else {}
        history.append(scalars)
        if lines:
            lines.write(step, scalars)
            if step % config.log_every == 0 or step in (1, run.steps):
                print(metrics.format_line(step, run.steps, scalars), flush=True)
        guard.check(step, scalars["skipped"])

    started, pending = time.perf_counter(), None
    batches = run.loader.iterate(done) if done < run.steps else iter(())
    try:
        with run.writer:
            for step in range(done + 1, run.steps + 1):
                waits = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waits
                run.state, measured = run.update(run.state, _place(batch, run))
                if pending:
                    tell(*pending)
                is_watched = watch and (step in (1, run.steps) or step % config.laws_every == 0)
                pending = (
                    step,
                    measured,
                    watch({**run.state.frozen, **run.state.trained}) if is_watched else None,
                )
                if step == done + 1:
                    jax.block_until_ready(measured)
                    clock.start()  # the first step compiles, which says nothing about the others
                else:
                    clock.tick(waited=waited, tokens=_slots(batch) * jax.process_count())
                is_last = step == run.steps
                is_stopped = is_preempted(step) and not is_last
                if is_stopped or is_last or step % config.checkpoint_every == 0:
                    tell(*pending)  # first, so that a run that goes on from here lacks no line
                    pending = None
                    run.writer.save(step, *state_lib.to_checkpoint(run.state))
                if is_stopped:
                    raise SystemExit(143)
            if done >= run.steps:
                run.writer.save(run.steps, *state_lib.to_checkpoint(run.state))
    finally:
        _close(batches)
        if lines:
            lines.close()
    return _summarize(run, history, time.perf_counter() - started)


def _preemption() -> Callable[[int], bool]:
    """Returns what tells after a step whether SIGTERM came, to this host or to any of the job.

    Hosts must save together, so in a job of several it becomes true at a step they agree on.
    """
    if jax.process_count() > 1:
        return multihost_utils.reached_preemption_sync_point
    stop = threading.Event()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
    return lambda step: stop.is_set()


def _close(batches: Iterator[Batch]) -> None:
    close = getattr(batches, "close", None)
    if close is not None:
        close()


def _slots(batch: Batch) -> int:
    """Returns how many slots are not padding."""
    return int((np.asarray(batch.layout.modality) != PADDING).sum())


def _place(batch: Batch, run: TrainingRun) -> Batch:
    """Returns the global batch on the mesh, from this host's rows."""
    sharding = axes.sharding_of(run.mesh, ("B",))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


class _Guard:
    """Stops a run when too many of the last steps were skipped; `start` is (step, skipped)."""

    def __init__(self, limit: int, window: int, start: tuple[int, int] = (0, 0)):
        self._limit, self._counts = limit, deque([start], maxlen=window + 1)

    def check(self, step: int, skipped: float) -> None:
        self._counts.append((step, skipped))
        (first, before), (last, now) = self._counts[0], self._counts[-1]
        if now - before >= self._limit:
            raise UserError(
                f"steps {first + 1} to {last}: loss or gradient was not finite in "
                f"{now - before:.0f} steps; nothing was learned from them. "
                "Lower config.optimizer.learning_rates"
            )


def _summarize(run: TrainingRun, history: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    last = history[-min(len(history), 50) :]
    summary = {
        "stage": run.config.stage,
        "steps": run.steps,
        "seconds": round(seconds, 1),
        "skipped_steps": int(run.state.skipped),
        **{
            f"last_{name}": float(np.mean([h[name] for h in last]))
            for name in ("loss", "accuracy", "tokens_per_s", "data_wait")
            if last
        },
        "data": run.loader.stats,
    }
    is_news = history or not (run.workdir / "summary.json").exists()
    if jax.process_index() == 0 and is_news:
        files.write_json(run.workdir / "summary.json", summary)
    return summary
