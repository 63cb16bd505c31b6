"""Stopping a run whose loss or gradient is no longer finite, with the samples of these steps."""

from __future__ import annotations

import pathlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn

import jax

from wings_jax import files, formatting
from wings_jax.errors import UserError

_SHOWN = 4  # steps and sample ids that the message names; the file has all


class NonFiniteGuard:
    """Finds when `limit` of the last `window` steps were skipped.

    `start` is (step, skipped steps until then) of the state that the run starts or resumes from.
    """

    def __init__(self, limit: int, window: int, start: tuple[int, int] = (0, 0)):
        self._limit, self._window = limit, window
        self._skipped = start[1]
        self._steps: deque[int] = deque()  # skipped steps within the window

    def check(self, step: int, skipped: float) -> tuple[int, ...]:
        """Takes the count of skipped steps up to `step`; returns those of the window at the limit.

        >>> guard = NonFiniteGuard(limit=2, window=10)
        >>> [guard.check(1, 1), guard.check(2, 1), guard.check(3, 2)]
        [(), (), (1, 3)]
        """
        # The count is kept on the devices, so a step was skipped if it has grown.
        if skipped > self._skipped:
            self._steps.append(step)

        self._skipped = int(skipped)
        while self._steps and self._steps[0] <= step - self._window:
            self._steps.popleft()

        return tuple(self._steps) if len(self._steps) >= self._limit else ()


def stop(
    workdir: pathlib.Path, steps: Sequence[int], sample_ids: Callable[[int], Sequence[str]]
) -> NoReturn:
    """Writes the samples of the skipped steps and ends the run.

    The steps changed no parameter, so the checkpoints of the run are good.

    Args:
      steps: optimizer steps, counted from 1.
      sample_ids: the samples of this host in the batch of a step, counted from 0.

    Raises:
      UserError: always, with the steps, the first samples, and the file that has them all.
    """
    # Batches are a function of the step, so the samples need not have been kept.
    samples = {str(step): list(sample_ids(step - 1)) for step in steps}

    # Each host has samples of its own, and all write to one workdir.
    name = "nonfinite.json"
    if jax.process_count() > 1:
        name = f"nonfinite-host{jax.process_index()}.json"
    path = files.write_json(workdir / name, samples)

    last = samples[str(steps[-1])]
    raise UserError(
        f"loss or gradient was not finite in {len(steps)} of the steps {steps[0]} to {steps[-1]} "
        f"({formatting.format_names(map(str, steps), _SHOWN)}), which were skipped; samples of "
        f"step {steps[-1]}: {formatting.format_names(last, _SHOWN)} (all of them: {path}). The "
        "checkpoints are from finite steps. Lower config.optimizer.learning_rates, or check the "
        "samples"
    )
