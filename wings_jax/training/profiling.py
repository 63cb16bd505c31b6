"""A trace of some steps of a run, which xprof and TensorBoard open."""

from __future__ import annotations

import contextlib
import pathlib
from typing import Any

import jax

from wings_jax import config_checks
from wings_jax.errors import UserError


class Profiler:
    """A context that traces the steps of `config.profile`, "START:STOP", without STOP.

    The trace is in `workdir/profile/plugins/profile/TIME/HOST.xplane.pb`. Of a run that is resumed
    or ends between the two, it has the steps that there are.
    """

    def __init__(self, steps: str, workdir: pathlib.Path, *, last: int):
        """`last` is the run's last step. Raises UserError if the trace would begin after it."""
        self._first, self._stop = config_checks.parse_profile(steps)

        if self._first > last:
            raise UserError(f"config.profile: {steps} begins after the last step, {last}")
        self._directory = workdir / "profile"
        self._is_tracing = False

    def trace_step(self, step: int) -> contextlib.AbstractContextManager[Any]:
        """Starts the trace if it begins with this step; returns a context for the step's work.

        Raises:
          UserError: the directory cannot be written.
        """
        if not self._first <= step < self._stop:
            return contextlib.nullcontext()

        if not self._is_tracing:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"config.profile: {self._directory}: {error.strerror}") from error
            jax.profiler.start_trace(self._directory)
            self._is_tracing = True

        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def end_step(self, step: int, outputs: Any) -> None:
        """Ends the trace with its last step, when the devices have computed its outputs."""
        # Computation is asynchronous: without the wait the trace would end before the last step.
        if self._is_tracing and step + 1 >= self._stop:
            jax.block_until_ready(outputs)
            self._write()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_tracing:
            self._write()

    def _write(self) -> None:
        self._is_tracing = False
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            print(f"profile: {self._directory}; open it with: xprof {self._directory}", flush=True)
