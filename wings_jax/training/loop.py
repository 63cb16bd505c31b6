"""The loop: batches in, updates, metrics out, checkpoints on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from wings_jax import files
from wings_jax.model import flops
from wings_jax.model.layout import Batch
from wings_jax.training import chips, divergence, meshes, metrics, wandb_log
from wings_jax.training import state as state_lib
from wings_jax.training.profiling import Profiler
from wings_jax.training.start import TrainingRun
from wings_jax.training.watchdog import Watchdog

# Starts to measure flat parameters, which it only reads; the result waits for the scalars.
Watch = Callable[[Mapping[str, jax.Array]], Callable[[], Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class TrainingMetric:
    """What is measured of the parameters at some steps, and joins the metrics."""

    name: str
    """What the watchdog reports."""
    is_due: Callable[[int], bool]
    """Whether a step, counted from 1, is measured."""
    start: Watch
    """Starts a measurement."""
    is_blocking: bool = False
    """Whether `start` takes its time, which then is none of the step's."""


PREEMPTED = 143  # exit status after SIGTERM, as shells report it


def train(run: TrainingRun, measurements: Sequence[TrainingMetric] = ()) -> dict[str, Any]:
    """Trains all remaining steps and returns the summary, which it also writes.

    Metrics are fetched one step late, so the device never waits for them. What `measurements`
    find joins them. SIGTERM (preemption) saves a checkpoint and ends the run with status 143.

    Raises:
      UserError: too many of the last steps were not finite; the message names them.
    """
    started = time.perf_counter()
    done = int(run.state.step)
    log = _StepLog(run, done)
    batches = run.loader.iterate(done) if done < run.steps else iter(())

    try:
        # The writer waits for its saves before a signal ends the process again.
        watchdog = Watchdog(60 * run.config.watchdog_minutes)
        with _preemption() as is_preempted, watchdog, run.writer:
            if done < run.steps:
                profiler = Profiler(run.config.profile, run.workdir, last=run.steps)
                with profiler:
                    _run_steps(run, batches, log, measurements, is_preempted, watchdog, profiler)
            else:
                run.writer.save(run.steps, *state_lib.to_checkpoint(run.state))
    finally:
        _close(batches)
        log.close()
    return _summarize(run, log.history, time.perf_counter() - started)


def _run_steps(
    run: TrainingRun,
    batches: Iterator[Batch],
    log: _StepLog,
    measurements: Sequence[TrainingMetric],
    is_preempted: Callable[[int], bool],
    watchdog: Watchdog,
    profiler: Profiler,
) -> None:
    """Trains from the state's step to the last. Raises SystemExit after a preemption."""
    config, first = run.config, int(run.state.step) + 1
    pending: tuple | None = None  # a step and its scalars, still on the device

    for step in range(first, run.steps + 1):
        is_last = step == run.steps
        watchdog.begin(f"the batch of step {step}")
        before = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - before

        watchdog.begin(f"step {step}")
        placed = meshes.place_batch(
            batch,
            run.mesh,
            batch_size=config.batch_size,
            accumulation=config.optimizer.accumulation,
        )

        called = time.perf_counter()
        with profiler.trace_step(step):
            run.state, scalars = run.update(run.state, placed)
        log.skip_compilation(batch, time.perf_counter() - called)

        # The scalars of the step before: the device has the next update to work on meanwhile.
        if pending:
            log.log_step(*pending)

        # After a preemption there may be no time to measure.
        is_stopped = is_preempted(step) and not is_last
        watched = [] if is_stopped else _measure(run, step, measurements, watchdog, log.clock)
        pending = (step, scalars, watched)

        # The first step compiles, so the clock starts after it.
        if step == first:
            jax.block_until_ready(scalars)
            log.clock.start()
        else:
            log.tick(waited, batch)

        profiler.end_step(step, scalars)

        # Log before a save, so that a run resumed from this checkpoint has every line.
        if is_stopped or is_last or step % config.checkpoint_every == 0:
            log.log_step(*pending)
            pending = None
            watchdog.begin(f"the checkpoint of step {step}")
            log.sync()
            run.writer.save(step, *state_lib.to_checkpoint(run.state))
        if is_stopped:
            raise SystemExit(PREEMPTED)


def _measure(
    run: TrainingRun,
    step: int,
    measurements: Sequence[TrainingMetric],
    watchdog: Watchdog,
    clock: metrics.Clock,
) -> list[Callable[[], Mapping[str, float]]]:
    """Starts the measurements that are due at a step; returns what waits for their scalars."""
    started = []
    for measurement in measurements:
        if not measurement.is_due(step):
            continue

        # The step itself is over before the time of a blocking measurement begins.
        watchdog.begin(f"the {measurement.name} of step {step}")
        if measurement.is_blocking:
            jax.block_until_ready(run.state.trained)
        before = time.perf_counter()
        started.append(measurement.start({**run.state.frozen, **run.state.trained}))
        if measurement.is_blocking:
            clock.skip(time.perf_counter() - before)
    return started


class _StepLog:
    """The metrics of every step: in files, on the terminal, and in `history`."""

    def __init__(self, run: TrainingRun, done: int):
        optimizer = run.config.optimizer
        self._run = run
        self._forms: set[tuple] = set()  # shapes of the batches so far
        self._guard = divergence.NonFiniteGuard(
            optimizer.skip_limit, optimizer.skip_window, (done, int(run.state.skipped))
        )
        is_first_host = jax.process_index() == 0
        self._writer = metrics.MetricsWriter(run.workdir, start=done) if is_first_host else None
        is_sent = is_first_host and run.config.wandb
        self._wandb = wandb_log.WandbLog(run.workdir, run.config) if is_sent else None

        chip = chips.find_chip(jax.devices()[0].device_kind)
        if not chip and is_first_host:
            print(chips.unknown_chip(jax.devices()[0].device_kind), flush=True)

        self.clock = metrics.Clock(
            run.steps, devices=run.mesh.size, peak_flops=chip.flops if chip else None
        )
        self.history: list[dict[str, float]] = []

    def skip_compilation(self, batch: Batch, seconds: float) -> None:
        """Leaves seconds out of the clock if they compiled the step for a new form of batch."""
        form = (batch.targets.shape, batch.images.shape)
        if form not in self._forms:
            self._forms.add(form)
            self.clock.skip(seconds)

    def tick(self, waited: float, batch: Batch) -> None:
        """Adds to the clock a step that waited so many seconds for this host's batch."""
        # The model's operations, not the hardware's: recomputed activations do not count.
        work = flops.count_workload(batch, self._run.arch)
        operations = flops.model_flops(self._run.arch, work, self._run.state.trained)
        hosts = jax.process_count()  # all have as many rows, and are assumed to be as full
        self.clock.tick(waited=waited, tokens=work.slots * hosts, flops=operations * hosts)

    def log_step(
        self,
        step: int,
        on_device: Mapping[str, jax.Array],
        watched: Sequence[Callable[[], Mapping[str, float]]],
    ) -> None:
        """Fetches and writes the scalars of a step.

        Raises:
          UserError: too many of the last steps were not finite.
        """
        run = self._run
        scalars = {name: float(x) for name, x in jax.device_get(on_device).items()}
        scalars |= {f"lr/{group}": float(rate(step - 1)) for group, rate in run.rates.items()}
        scalars |= self.clock.read(step)
        for fetch in watched:
            scalars |= fetch()
        self.history.append(scalars)

        if self._writer:
            self._writer.write(step, scalars)
            if step % run.config.log_every == 0 or step in (1, run.steps) or watched:
                print(metrics.format_line(step, run.steps, scalars), flush=True)

        if self._wandb:
            self._wandb.write(step, scalars)

        # Skipped steps changed no parameter; too many of them end the run.
        skipped_steps = self._guard.check(step, scalars["skipped"])
        if skipped_steps:
            divergence.stop(run.workdir, skipped_steps, run.loader.sample_ids)

    def sync(self) -> None:
        """Makes the lines until now outlive the process and the machine."""
        if self._writer:
            self._writer.sync()

    def close(self) -> None:
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.close()


@contextlib.contextmanager
def _preemption() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: did SIGTERM come to this host, or to any of the job?

    Hosts must save together, so in a job of several it becomes true at a step they agree on. The
    handler of before is restored at the end.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return

    # Not an Event: a second signal within its `set` would wait for its lock forever.
    received: list[int] = []
    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield lambda step: bool(received)
    finally:
        if is_main:  # None: a handler that is not Python's
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _close(batches: Iterator[Batch]) -> None:
    """Ends the threads that read ahead."""
    close = getattr(batches, "close", None)
    if close is not None:
        close()


def _summarize(run: TrainingRun, history: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """Returns the summary of a run and writes it; `last_*` are means over its last 50 steps."""
    last = history[-50:]
    summary = {
        "stage": run.config.stage,
        "steps": run.steps,
        "seconds": round(seconds, 1),
        "skipped_steps": int(run.state.skipped),
        **{
            f"last_{name}": float(np.mean([scalars[name] for scalars in last]))
            for name in ("loss", "accuracy", "tokens_per_s", "data_wait", "step_p50_s", "mfu")
            if last and name in last[-1]
        },
        "data": run.loader.stats,
    }

    # A finished run that is started again trains nothing and keeps its summary.
    path = run.workdir / "summary.json"
    if jax.process_index() == 0 and (history or not path.exists()):
        files.write_json(path, summary)
    return summary
