"""What the checksums of a checkpoint cost: saving and loading with and without them, in turns.

    python benchmarks/checksums.py [--megabytes 400] [--repeat 7] [--out FILE.json]

Saved is a training state of random float32 parameters and AdamW's two moments, by the writer that
training uses, until it is on the disk; loaded are the parameters. Before each load the files
are dropped from the page cache where the system allows it. Shown are medians of the time by the
clock and of the processor time, the share that checksums add (the median of the differences of
neighboring runs), and the checksums computed alone as a share of the run without them. On a machine
that others use too, the differences vary more than what they measure; the last column does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # from a clone

import jax
import numpy as np

from wings_jax import checkpoint, checksums
from wings_jax import config as config_lib
from wings_jax.model import presets
from wings_jax.training.writer import CheckpointWriter


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=400, help="default %(default)s")
    parser.add_argument("--repeat", type=int, default=7, help="default %(default)s")
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE.json")
    arguments = parser.parse_args()

    # AdamW's state has two moments of each parameter.
    params = make_params(arguments.megabytes * 1_000_000 // 3)
    opt_state = {
        name: {path: array * factor for path, array in params.items()}
        for name, factor in (("mu", 1e-2), ("nu", 1e-4))
    }
    sizes = sum(array.nbytes for array in params.values())

    runs: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="wings-checksums-") as directory:
        root = pathlib.Path(directory)
        for number in range(arguments.repeat + 1):
            # The first round warms up and is not counted; later ones begin with either in turns.
            for with_sums in ((True, False), (False, True))[number % 2]:
                key = "with" if with_sums else "without"
                workdir = root / "run"
                shutil.rmtree(workdir, ignore_errors=True)
                saved = measure(lambda w=workdir, s=with_sums: save(w, params, opt_state, s))

                # Loading compares with what a save with checksums has written.
                if not with_sums:
                    shutil.rmtree(workdir)
                    save(workdir, params, opt_state, True)
                step = checkpoint.find_step(workdir, flag="--checkpoint")
                drop_cache(step)
                loaded = measure(lambda p=step, s=with_sums: load(p, s))

                if number:
                    runs.setdefault(f"save {key}", []).append(saved)
                    runs.setdefault(f"load {key}", []).append(loaded)

            # The computation by itself, as the writer and the reader do it.
            for name, action in alone(params, opt_state).items():
                seconds = measure(action)
                if number:
                    runs.setdefault(f"{name} alone", []).append(seconds)

    print(
        f"{3 * sizes / 1e6:.0f} MB saved, {sizes / 1e6:.0f} MB loaded, {arguments.repeat} times\n"
    )
    print(format_table(runs))
    if arguments.out:
        arguments.out.write_text(json.dumps(runs, indent=2) + "\n")


def make_params(size: int) -> dict[str, jax.Array]:
    """Returns random parameters of so many bytes, in matrices of the sizes of a real model."""
    rng = np.random.default_rng(0)
    shape = (1024, 2816)
    count = max(1, size // (4 * shape[0] * shape[1]))
    return {
        f"decoder/layers/matrix{i}": jax.numpy.asarray(rng.standard_normal(shape, np.float32))
        for i in range(count)
    }


def save(workdir: pathlib.Path, params: Any, opt_state: Any, with_sums: bool) -> None:
    """Saves a state as training does, and waits until it is written."""
    arch = presets.WingsArch(presets.DECODERS["qwen1_5_0_5b"], presets.VISION["siglip_base_224"])
    with without_checksums(not with_sums):
        writer = CheckpointWriter(workdir, config_lib.Config(), arch, {}, max_checkpoints=1)
        writer.save(1, params, opt_state)
        writer.close()


def load(step: pathlib.Path, verify: bool) -> None:
    """Loads all parameters."""
    jax.block_until_ready(checkpoint.read_params(step, verify=verify))


def alone(params: Any, opt_state: Any) -> dict[str, Callable[[], None]]:
    """Returns what a save and a load compute for their checksums."""
    state = checkpoint.flatten_state(opt_state)
    saved = {path: {"float32": 0} for path in params}

    def sum_state() -> None:
        checksums.checksum_arrays(params)
        checksums.checksum_arrays(state, is_cast=False)

    def compare_params() -> None:
        checksums.find_damaged(params, saved)

    return {"save": sum_state, "load": compare_params}


@contextlib.contextmanager
def without_checksums(is_off: bool) -> Iterator[None]:
    """Replaces the computation of checksums by nothing, if `is_off`."""
    if not is_off:
        yield
        return
    with mock.patch.object(checksums, "checksum_arrays", return_value={}):
        yield


def measure(action: Callable[[], None]) -> tuple[float, float]:
    """Returns the seconds of an action by the clock and of the processor."""
    began, processor = time.perf_counter(), time.process_time()
    action()
    return time.perf_counter() - began, time.process_time() - processor


def drop_cache(directory: pathlib.Path) -> None:
    """Drops a directory's files from the page cache."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in (path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def format_table(runs: dict[str, list[tuple[float, float]]]) -> str:
    """Returns a Markdown table."""
    lines = [
        "| | clock with | without | added | alone | processor with | without | added | alone |",
        "|---|" + "---:|" * 8,
    ]
    for name in ("save", "load"):
        cells = []
        for kind in range(2):  # clock, processor
            on, off = ([run[kind] for run in runs[f"{name} {key}"]] for key in ("with", "without"))
            added = statistics.median(a - b for a, b in zip(on, off, strict=True))
            base = statistics.median(off)
            sums = statistics.median(run[kind] for run in runs[f"{name} alone"])
            cells += [f"{statistics.median(on):.2f} s", f"{base:.2f} s", f"{added / base:+.1%}"]
            cells.append(f"{sums:.3f} s, {sums / base:.1%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
