"""What the subcommands of `python -m wings_jax.convert` share: dtypes, output, progress."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import tqdm

from wings_jax.errors import UserError

# Choices of --dtype; None keeps each tensor as it is stored.
DTYPES = {
    "stored": None,
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


def require_output(arguments: argparse.Namespace) -> pathlib.Path:
    """Returns `--out`, which is optional in a dry run only."""
    if not arguments.out:
        raise UserError("--out is missing")
    return pathlib.Path(arguments.out)


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[str, int], None]]:
    """Shows a progress bar over bytes; yields the function that advances it."""
    with tqdm.tqdm(total=total, desc=label, unit="B", unit_scale=True, delay=1) as bar:
        yield lambda key, size: bar.update(size)
