"""From the path of a checkpoint to a generator: `wings_jax.load` and `wings_jax.score`."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jax.sharding import Mesh

from wings_jax import axes, checkpoint, errors
from wings_jax.inference.generator import Generator
from wings_jax.inference.likelihood import Likelihood
from wings_jax.inference.prompts import Request
from wings_jax.inference.sampling import SamplingParams
from wings_jax.model import parameters
from wings_jax.weights import adapter as adapter_lib

MEMORY_ADVICE = "use --dtype bfloat16, or share the model among devices with --mesh"


def load_generator(
    path: str | os.PathLike,
    *,
    adapter: str | os.PathLike | None = None,
    dtype: str | None = None,
    mesh: Mesh | str | None = None,
    rows: int = 16,
    sampling: SamplingParams | None = None,
    flag: str = "checkpoint",
) -> Generator:
    """Returns the generator of a checkpoint: a run's directory, an import, or one of its steps.

    Args:
      path: of a run's directory its newest step is loaded.
      adapter: a file of `convert export --format adapter`, put on the LLM and the tower of `path`;
        what else `path` has is not loaded. `Generator.with_adapter` switches to another one.
      dtype: "bfloat16" or "float32"; by default bfloat16 on accelerators and float32 on a CPU.
      mesh: devices that share the model, such as "data=2,tensor=4" (`axes.make_mesh`).
      rows: how many requests are answered at once.
      sampling: for requests that have none of their own; greedy by default.
      flag: what error messages call `path`; "--checkpoint" on a command line.

    Raises:
      UserError: there is no checkpoint at `path`, it does not fit the devices' memory, or the
        adapter belongs to another base.
      MeshError: the mesh does not divide the model.
    """
    # Options are resolved first: the parameters are loaded directly with their dtype and sharding.
    dtype = dtype or parameters.default_dtype()
    if isinstance(mesh, str):
        mesh = axes.make_mesh(axes.parse_mesh(mesh)) if mesh else None

    # Loading and the generator's own copies may both run out of memory.
    with errors.full_memory(MEMORY_ADVICE):
        if adapter is None:
            restored = checkpoint.load(os.fspath(path), flag=flag, dtype=dtype, mesh=mesh)
        else:
            # Messages name the adapter as the caller wrote it: a flag or an argument.
            adapter_flag = "--adapter" if flag.startswith("--") else "adapter"
            restored = adapter_lib.load_adapted(
                path, adapter, flag=flag, adapter_flag=adapter_flag, dtype=dtype, mesh=mesh
            )

        return Generator.from_checkpoint(
            restored, dtype=dtype, mesh=mesh, rows=rows, sampling=sampling, release=True
        )


def score(
    model: Generator | str | os.PathLike,
    requests: Sequence[tuple[Request, Sequence[str]]],
    *,
    with_end: bool = True,
) -> list[list[Likelihood]]:
    """Returns the likelihood of each given answer to each request: `Generator.score`.

    Args:
      model: a Generator, or the path of a checkpoint.
    """
    generator = model if isinstance(model, Generator) else load_generator(model)
    return generator.score(requests, with_end=with_end)
