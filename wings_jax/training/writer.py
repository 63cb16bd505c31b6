"""Saving a run's states in the background, and restoring them."""

from __future__ import annotations

import contextlib
import functools
import logging
import pathlib
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from wings_jax import checkpoint, checkpoint_items, checksums, files, serialization, tree
from wings_jax import config as config_lib
from wings_jax.errors import UserError
from wings_jax.model import presets


class CheckpointWriter:
    """Saves a run's states into its workdir, in the background, and deletes the oldest ones."""

    def __init__(
        self,
        workdir: str | pathlib.Path,
        config: config_lib.Config,
        arch: presets.WingsArch,
        tokenizer_files: Mapping[str, str],
        *,
        max_checkpoints: int,
        keep_every_hours: float = 0.0,
    ):
        """Opens the workdir's checkpoints.

        Args:
          max_checkpoints: how many of the newest steps are kept.
          keep_every_hours: hours between steps that are kept beside these; 0 for none.
        """
        self._meta = {"config": serialization.to_dict(config), "arch": serialization.to_dict(arch)}
        self._tokenizer = dict(tokenizer_files)
        _silence_background_errors()

        # A step is kept if any policy keeps it.
        policies: list[Any] = [preservation.LatestN(max_checkpoints)]
        if keep_every_hours:
            policies.append(preservation.EveryNSeconds(round(keep_every_hours * 3600)))

        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation.AnyPreservationPolicy(policies),
            create=True,
            # What a killed run had begun to save; nobody else writes to this workdir.
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(
            files.absolute_path(workdir) / checkpoint.SUBDIRECTORY,
            options=options,
            item_names=checkpoint.ITEMS,
        )

    def save(self, step: int, params: Mapping[str, jax.Array], opt_state: Any) -> None:
        """Starts to save flat parameters and an optimizer state; returns once they are copied.

        Raises:
          UserError: this save, or the one before it, cannot be written.
        """
        # A finished run that is started again has saved its last step already.
        if step in self._manager.all_steps():
            return

        # Computed on the devices, before the arrays are copied.
        sums = {
            "params": checksums.checksum_arrays(params),
            "opt_state": checksums.checksum_arrays(
                checkpoint.flatten_state(opt_state), is_cast=False
            ),
        }

        meta = {**self._meta, "step": step, "checksums": sums}
        arguments = ocp.args.Composite(
            params=ocp.args.PyTreeSave(tree.nest(params)),
            opt_state=ocp.args.PyTreeSave(opt_state),
            meta=ocp.args.JsonSave(checkpoint_items.sign_meta(meta, self._tokenizer)),
            tokenizer=ocp.args.JsonSave(self._tokenizer),
        )

        with self._writing():
            self._manager.save(step, args=arguments)

    def restore_opt_state(self, step: int, opt_state: Any, *, verify: bool = True) -> Any:
        """Returns the optimizer state saved at `step`, on any mesh.

        It gets the shapes, dtypes and shardings of the given one. The parameters of a step are read
        by `checkpoint.read_params`.

        Raises:
          DamagedCheckpointError: the step cannot be read, or with `verify` its checksums differ.
        """
        # Read with the shardings of this run's mesh, whatever wrote it.
        directory = files.absolute_path(self._manager.directory) / str(step)
        items = ocp.args.Composite(opt_state=_restore_args(opt_state))
        with checkpoint.ReadErrors(directory):
            restored = self._manager.restore(step, args=items)["opt_state"]

        if verify:
            checkpoint.verify_arrays(directory, "opt_state", checkpoint.flatten_state(restored))
        return restored

    def close(self) -> None:
        """Waits until everything is written. Raises UserError if something cannot be."""
        with self._writing(), contextlib.closing(self._manager):
            self._manager.wait_until_finished()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Closes. An error of the block is raised rather than one of writing.

        After a stop (SystemExit, KeyboardInterrupt) an error of writing is raised: the caller
        relies on the saved state.
        """
        try:
            self.close()
        except UserError:
            if kind is None or not issubclass(kind, Exception):
                raise

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns a full disk and the like into a UserError; orbax raises several types for it."""
        try:
            yield
        except (OSError, ValueError) as error:
            # "OUT_OF_RANGE: Error writing ...: ...: No space left on device [os_error_code='28']"
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            reason = first_line.partition(" [")[0].rpartition(": ")[2]
            raise UserError(
                f"--workdir: {self._manager.directory}: cannot be written: {reason[:300]}"
            ) from error


def _restore_args(target: Any) -> ocp.args.PyTreeRestore:
    """Returns what makes orbax restore a tree with the shapes and shardings of `target`."""
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), target
    )
    arguments = ocp.checkpoint_utils.construct_restore_args(abstract)
    return ocp.args.PyTreeRestore(abstract, restore_args=arguments)


@functools.cache  # once per process
def _silence_background_errors() -> None:
    """Hides what orbax prints about a failed save besides the error that it raises.

    Its threads log the error with tracebacks, and each write that was still in flight then fails
    to report to an event loop that is gone: some hundred tracebacks, before our one line. Writes
    that had not begun are warned of at the end of the process.
    """
    logging.getLogger("absl").addFilter(
        lambda record: record.levelno < logging.ERROR or "/orbax/" not in record.pathname
    )
    show_unraisable = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show_unraisable(unraisable)

    sys.unraisablehook = hook
    never_awaited = r"coroutine '\w*serialize.* was never awaited"
    warnings.filterwarnings("ignore", never_awaited, RuntimeWarning)
